/* YAML text -> a tree of nodes with places.
 *
 * libyaml's events are taken one by one, not its ready-made documents: only the events still know an alias
 * from the node it stands for. Aliases are refused. They are the one thing in YAML that makes a small file
 * large ("billion laughs"), and a message about an aliased node would point to a place the operator did not
 * write.
 *
 * Depth is bounded before the recursion, and the number of nodes by the size of the text.
 */
#include <limits.h>
#include <string.h>
#include <yaml.h>

#include "config_internal.h"

#define DEPTH_MAX 12       /* the deepest valid place is 5: pools > pool > addresses > address */
#define NODES_MAX 2000000u /* 65535 zones with every key have 0.7 million */

struct builder {
	struct config *config;
	yaml_parser_t parser;
	const char *text;
	size_t text_bytes;
	uint32_t n_nodes;
};

static uint32_t line_of(yaml_mark_t mark)
{
	return mark.line < UINT32_MAX ? (uint32_t)mark.line + 1 : UINT32_MAX;
}

static uint32_t column_of(yaml_mark_t mark)
{
	return mark.column < UINT32_MAX ? (uint32_t)mark.column + 1 : UINT32_MAX;
}

/* libyaml gives a byte offset, and no mark, for what is not even text. */
static void complain_bytes(struct builder *b)
{
	uint32_t line = 1, column = 1;

	for (size_t i = 0; i < b->parser.problem_offset && i < b->text_bytes; i++) {
		column++;
		if (b->text[i] == '\n') {
			line++;
			column = 1;
		}
	}
	config_error_at(b->config, line, column, "the file is not UTF-8 text (%s); remove this character",
			b->parser.problem);
}

static void complain_syntax(struct builder *b)
{
	const yaml_parser_t *p = &b->parser;

	if (p->error == YAML_READER_ERROR && p->problem) {
		complain_bytes(b);
		return;
	}
	config_error_at(b->config, line_of(p->problem_mark), column_of(p->problem_mark),
			"this is not YAML: %s%s%s; look for a missing bracket, quote or indent at or before "
			"this place",
			p->problem ? p->problem : "cannot be parsed", p->context ? " " : "",
			p->context ? p->context : "");
}

static bool next_event(struct builder *b, yaml_event_t *event)
{
	if (yaml_parser_parse(&b->parser, event))
		return true;
	complain_syntax(b);
	return false;
}

static struct node *make_node(struct builder *b, enum node_kind kind, const yaml_event_t *event)
{
	struct node *node = config_take(b->config, 1, sizeof(*node));

	node->kind = kind;
	node->line = line_of(event->start_mark);
	node->column = column_of(event->start_mark);
	return node;
}

static struct node *make_scalar(struct builder *b, const yaml_event_t *event)
{
	struct node *node = make_node(b, NODE_SCALAR, event);
	const char *value = (const char *)event->data.scalar.value;
	size_t length = event->data.scalar.length;

	node->plain = event->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
	node->text = config_take(b->config, length + 1, 1);
	memcpy(node->text, value, length);
	if (memchr(value, 0, length))
		config_error(b->config, node, "the value holds a zero character; remove it");
	return node;
}

static struct node *build(struct builder *b, yaml_event_t *event, int depth);

/* Children up to the event `end`. */
static bool build_children(struct builder *b, struct node *parent, yaml_event_type_t end, int depth)
{
	struct node **tail = &parent->first;

	for (;;) {
		yaml_event_t event;
		struct node *child;

		if (!next_event(b, &event))
			return false;
		if (event.type == end) {
			yaml_event_delete(&event);
			return true;
		}
		child = build(b, &event, depth);
		yaml_event_delete(&event);
		if (!child)
			return false;
		*tail = child;
		tail = &child->next;
		parent->n++;
	}
}

static bool has_tag(const yaml_event_t *event)
{
	switch (event->type) {
	case YAML_SCALAR_EVENT:
		return event->data.scalar.tag;
	case YAML_SEQUENCE_START_EVENT:
		return event->data.sequence_start.tag;
	case YAML_MAPPING_START_EVENT:
		return event->data.mapping_start.tag;
	default:
		return false;
	}
}

/* NULL: an error was reported and reading ends. */
static struct node *build(struct builder *b, yaml_event_t *event, int depth)
{
	struct node *node;

	if (has_tag(event)) {
		config_error_at(b->config, line_of(event->start_mark), column_of(event->start_mark),
				"tags (!...) have no meaning here; remove it");
		return NULL;
	}
	if (++b->n_nodes > NODES_MAX) {
		config_error_at(b->config, line_of(event->start_mark), column_of(event->start_mark),
				"the file has more than %u words; use prefixes and ranges instead of single "
				"addresses",
				NODES_MAX);
		return NULL;
	}
	switch (event->type) {
	case YAML_SCALAR_EVENT:
		return make_scalar(b, event);
	case YAML_SEQUENCE_START_EVENT:
	case YAML_MAPPING_START_EVENT:
		break;
	default: /* YAML_ALIAS_EVENT; no other can stand here */
		config_error_at(b->config, line_of(event->start_mark), column_of(event->start_mark),
				"aliases (*name) are not supported; write the value itself");
		return NULL;
	}
	if (depth >= DEPTH_MAX) {
		config_error_at(b->config, line_of(event->start_mark), column_of(event->start_mark),
				"nested more than %d deep; no key needs that", DEPTH_MAX);
		return NULL;
	}
	if (event->type == YAML_SEQUENCE_START_EVENT) {
		node = make_node(b, NODE_LIST, event);
		return build_children(b, node, YAML_SEQUENCE_END_EVENT, depth + 1) ? node : NULL;
	}
	node = make_node(b, NODE_MAP, event);
	return build_children(b, node, YAML_MAPPING_END_EVENT, depth + 1) ? node : NULL;
}

/* stream start, document start, the root, document end, stream end */
static const struct node *build_stream(struct builder *b)
{
	struct node *root = NULL;

	for (;;) {
		yaml_event_t event;
		bool more = true;

		if (!next_event(b, &event))
			return NULL;
		switch (event.type) {
		case YAML_STREAM_START_EVENT:
		case YAML_DOCUMENT_END_EVENT:
			break;
		case YAML_DOCUMENT_START_EVENT:
			if (root) {
				config_error_at(b->config, line_of(event.start_mark),
						column_of(event.start_mark),
						"a second document begins here; put everything in one");
				root = NULL;
				more = false;
			}
			break;
		case YAML_STREAM_END_EVENT:
			if (!root)
				root = make_node(b, NODE_MAP, &event);
			more = false;
			break;
		default:
			root = build(b, &event, 0);
			more = root;
		}
		yaml_event_delete(&event);
		if (!more)
			return root;
	}
}

const struct node *config_tree(struct config *config, const char *text, size_t text_bytes)
{
	struct builder b = {.config = config, .text = text, .text_bytes = text_bytes};
	const struct node *root;

	if (!yaml_parser_initialize(&b.parser)) {
		config_error_at(config, 0, 0, "no memory for the YAML parser; free some");
		return NULL;
	}
	yaml_parser_set_encoding(&b.parser, YAML_UTF8_ENCODING);
	yaml_parser_set_input_string(&b.parser, (const unsigned char *)text, text_bytes);
	root = build_stream(&b);
	yaml_parser_delete(&b.parser);
	return root;
}
