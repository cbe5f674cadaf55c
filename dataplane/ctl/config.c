/* The configuration file: text -> tree -> values -> rules.
 *
 *	config_tree.c    YAML to nodes, each with its place; stops at the first thing that is not YAML
 *	config_keys.c    one key at a time: known, given once, in range; fills struct nat_config
 *	config_values.c  how numbers, words, times, names and addresses are read
 *	config_rules.c   between objects: overlaps, unknown names, shadowed zones
 *
 * Each stage reports all it finds and goes on with a harmless value, so that one run tells the operator
 * everything. Rules run also after key errors: a bad port range must not hide an overlap. What cannot be
 * read is left out of the lists, so a rule never sees a made-up value.
 *
 * All memory hangs off the configuration and goes with config_free(): a reload reads a new one aside, and a
 * refused one leaves no trace.
 */
#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "config_internal.h"

/* ---- memory ---- */

#define CHUNK_BYTES 65536u

struct chunk {
	struct chunk *next;
	size_t used, size;
	_Alignas(max_align_t) unsigned char bytes[];
};

struct config_arena {
	struct chunk *chunks;
};

static _Noreturn void out_of_memory(void)
{
	fputs("no memory left to read the configuration; stop other programs or add memory\n", stderr);
	abort();
}

void *config_take(struct config *config, size_t n, size_t size)
{
	struct config_arena *arena = config->arena;
	struct chunk *chunk = arena->chunks;
	size_t bytes, align = sizeof(max_align_t);

	if (size && n > (SIZE_MAX - align) / size)
		out_of_memory();
	bytes = (n * size + align - 1) / align * align;
	if (!chunk || chunk->size - chunk->used < bytes) {
		size_t room = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES;

		chunk = calloc(1, sizeof(*chunk) + room);
		if (!chunk)
			out_of_memory();
		chunk->size = room;
		chunk->next = arena->chunks;
		arena->chunks = chunk;
	}
	chunk->used += bytes;
	return chunk->bytes + chunk->used - bytes;
}

/* ---- problems ---- */

static char *format_text(struct config *config, const char *format, va_list args)
{
	va_list again;
	int length;
	char *text;

	va_copy(again, args);
	length = vsnprintf(NULL, 0, format, args);
	if (length < 0)
		length = 0;
	text = config_take(config, (size_t)length + 1, 1);
	vsnprintf(text, (size_t)length + 1, format, again);
	va_end(again);
	return text;
}

bool config_is_full(const struct config *config)
{
	return config->n_problems >= CONFIG_PROBLEMS_MAX;
}

static void add_problem(struct config *config, uint32_t line, uint32_t column, bool warning,
			const char *format, va_list args)
{
	struct config_problem *problem;

	if (warning)
		config->n_warnings++;
	else
		config->n_errors++;
	/* Warnings may fill at most half, so that they never push an error out of sight. */
	if (config->n_problems >= (warning ? CONFIG_PROBLEMS_MAX / 2 : CONFIG_PROBLEMS_MAX))
		return;
	problem = &config->problems[config->n_problems++];
	problem->line = line;
	problem->column = column;
	problem->warning = warning;
	problem->text = format_text(config, format, args);
}

void config_error_at(struct config *config, uint32_t line, uint32_t column, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	add_problem(config, line, column, false, format, args);
	va_end(args);
}

void config_error(struct config *config, const struct node *at, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	add_problem(config, at->line, at->column, false, format, args);
	va_end(args);
}

void config_warning(struct config *config, const struct node *at, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	add_problem(config, at->line, at->column, true, format, args);
	va_end(args);
}

/* Insertion sort: stable, and there are at most CONFIG_PROBLEMS_MAX. */
static void sort_problems(struct config *config)
{
	struct config_problem *p = config->problems;

	for (uint32_t i = 1; i < config->n_problems; i++) {
		struct config_problem moving = p[i];
		uint32_t j = i;

		for (; j > 0 && (p[j - 1].line > moving.line ||
				 (p[j - 1].line == moving.line && p[j - 1].column > moving.column));
		     j--)
			p[j] = p[j - 1];
		p[j] = moving;
	}
}

void config_print(const struct config *config, FILE *to)
{
	uint32_t shown_errors = 0;

	for (uint32_t i = 0; i < config->n_problems; i++) {
		const struct config_problem *p = &config->problems[i];

		if (p->line)
			fprintf(to, "%s:%u:%u: ", config->path, p->line, p->column);
		else
			fprintf(to, "%s: ", config->path);
		fprintf(to, "%s%s\n", p->warning ? "warning: " : "", p->text);
		shown_errors += !p->warning;
	}
	if (config->n_errors > shown_errors)
		fprintf(to, "%s: %u more errors are not shown; correct these first\n", config->path,
			config->n_errors - shown_errors);
}

/* ---- text for messages ---- */

const char *config_shown(struct config *config, const char *text)
{
	enum { CUT = 60 };
	size_t length = strlen(text), keep = length > CUT ? CUT : length, n = 0;
	char *out;

	if (config_is_full(config))
		return "";
	out = config_take(config, keep + sizeof("\"\"..."), 1);
	/* Never cut inside a UTF-8 character: continuation bytes are 10xxxxxx. */
	while (keep < length && keep > 0 && ((unsigned char)text[keep] & 0xc0) == 0x80)
		keep--;
	out[n++] = '"';
	for (size_t i = 0; i < keep; i++) {
		unsigned char c = (unsigned char)text[i];

		out[n++] = c < 0x20 || c == 0x7f ? '?' : (char)c;
	}
	if (keep < length) {
		memcpy(out + n, "...", 3);
		n += 3;
	}
	out[n++] = '"';
	return out;
}

static const char *shown_format(struct config *config, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
static const char *shown_format(struct config *config, const char *format, ...)
{
	va_list args;
	char *text;

	if (config_is_full(config))
		return "";
	va_start(args, format);
	text = format_text(config, format, args);
	va_end(args);
	return text;
}

const char *config_shown_address(struct config *config, uint32_t address)
{
	return shown_format(config, "%u.%u.%u.%u", address >> 24, address >> 16 & 255, address >> 8 & 255,
			    address & 255);
}

const char *config_shown_range(struct config *config, struct nat_range range)
{
	if (range.first == range.last)
		return config_shown_address(config, range.first);
	return shown_format(config, "%s-%s", config_shown_address(config, range.first),
			    config_shown_address(config, range.last));
}

const char *config_shown_prefix(struct config *config, struct nat_prefix prefix)
{
	return shown_format(config, "%s/%u", config_shown_address(config, prefix.address),
			    prefix.length_bits);
}

/* ---- reading ---- */

static struct config *config_new(const char *path)
{
	struct config *config = calloc(1, sizeof(*config));

	if (!config)
		out_of_memory();
	config->arena = calloc(1, sizeof(*config->arena));
	if (!config->arena)
		out_of_memory();
	config->path = config_take(config, strlen(path) + 1, 1);
	memcpy(config->path, path, strlen(path));
	config->problems = config_take(config, CONFIG_PROBLEMS_MAX, sizeof(*config->problems));
	return config;
}

static void read_text(struct config *config, const char *text, size_t text_bytes, unsigned flags)
{
	struct places places = {0};
	const struct node *root;

	if (text_bytes > CONFIG_BYTES_MAX) {
		config_error_at(
			config, 0, 0,
			"the file is larger than %u MiB; use prefixes and ranges instead of single addresses",
			CONFIG_BYTES_MAX >> 20);
		return;
	}
	root = config_tree(config, text, text_bytes);
	if (!root)
		return;
	config_keys(config, root, &places, flags);
	config_rules(config, &places);
	sort_problems(config);
}

struct config *config_parse(const char *path, const char *text, size_t text_bytes, unsigned flags)
{
	struct config *config = config_new(path);

	read_text(config, text, text_bytes, flags);
	return config;
}

/* The whole file, at most CONFIG_BYTES_MAX + 1 bytes; -errno when it cannot be read. */
static ssize_t read_file(struct config *config, const char *path, char **text)
{
	size_t size = 65536, used = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	*text = config_take(config, size, 1);
	for (;;) {
		ssize_t got = read(fd, *text + used, size - used);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0) {
			int error = errno;

			close(fd);
			return -error;
		}
		used += (size_t)got;
		if (got == 0 || used > CONFIG_BYTES_MAX)
			break;
		if (used == size) {
			char *larger = config_take(config, size * 2, 1);

			memcpy(larger, *text, used);
			*text = larger;
			size *= 2;
		}
	}
	close(fd);
	return (ssize_t)used;
}

struct config *config_load(const char *path, unsigned flags)
{
	struct config *config = config_new(path);
	char *text = NULL;
	ssize_t got = read_file(config, path, &text);

	if (got < 0)
		config_error_at(config, 0, 0,
				"the configuration cannot be read (%s); check the path and its permissions",
				strerror((int)-got));
	else
		read_text(config, text, (size_t)got, flags);
	return config;
}

void config_free(struct config *config)
{
	struct chunk *chunk, *next;

	if (!config)
		return;
	for (chunk = config->arena->chunks; chunk; chunk = next) {
		next = chunk->next;
		free(chunk);
	}
	free(config->arena);
	free(config);
}

/* ---- reload ---- */

/* With several workers a pool is spread over all of them or kept by one (core/workers.h): its sessions
 * cannot move. */
static bool pools_stay(const struct nat_config *a, const struct nat_config *b, char *why, size_t why_bytes)
{
	if (a->n_workers <= 1)
		return true;
	for (uint32_t i = 0; i < a->n_pools; i++)
		for (uint32_t k = 0; k < b->n_pools; k++) {
			if (strcmp(a->pools[i].name, b->pools[k].name) != 0 ||
			    nat_config_spreads(a, &a->pools[i]) == nat_config_spreads(b, &b->pools[k]))
				continue;
			snprintf(why, why_bytes,
				 "pool \"%s\" would change between all workers and one (mapping, select, "
				 "blocks, "
				 "deterministic or limits); restart dsnatd for that, sessions live on",
				 a->pools[i].name);
			return false;
		}
	return true;
}

bool config_can_follow(const struct config *running, const struct config *next, char *why, size_t why_bytes)
{
	const struct nat_config *a = &running->nat, *b = &next->nat;

	if (a->n_interfaces != b->n_interfaces) {
		snprintf(why, why_bytes,
			 "the number of interfaces changed from %u to %u; restart dsnatd for that",
			 a->n_interfaces, b->n_interfaces);
		return false;
	}
	for (uint32_t i = 0; i < a->n_interfaces; i++) {
		const struct nat_interface_config *x = &a->interfaces[i], *y = &b->interfaces[i];

		if (strcmp(x->name, y->name) != 0 || strcmp(x->device, y->device) != 0 ||
		    x->role != y->role || x->path != y->path ||
		    memcmp(x->member, y->member, sizeof(x->member)) || x->vlan != y->vlan ||
		    x->mtu_bytes != y->mtu_bytes) {
			snprintf(why, why_bytes,
				 "interface \"%s\" changed its name, role, path, device, members, vlan or "
				 "mtu; restart "
				 "dsnatd for that",
				 x->name);
			return false;
		}
	}
	if (a->workers != b->workers) {
		snprintf(why, why_bytes, "engine.workers changed; restart dsnatd for that");
		return false;
	}
	if (a->max_sessions != b->max_sessions) {
		snprintf(why, why_bytes,
			 "engine.max_sessions changed from %llu to %llu; restart dsnatd for that",
			 (unsigned long long)a->max_sessions, (unsigned long long)b->max_sessions);
		return false;
	}
	if (memcmp(&running->sync, &next->sync, sizeof(running->sync)) != 0) {
		snprintf(why, why_bytes, "sync changed; restart dsnatd for that, the sessions stay");
		return false;
	}
	return pools_stay(a, b, why, why_bytes);
}
