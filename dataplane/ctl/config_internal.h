/* Shared by the files that read the configuration (config*.c), by nobody else. */
#ifndef CONFIG_INTERNAL_H
#define CONFIG_INTERNAL_H

#include "config.h"

/* A piece of YAML with its place. Anchors, aliases, tags and a second document are refused while the tree is
 * made, so a tree has at most as many nodes as the text has words, whatever the text says. */
enum node_kind { NODE_SCALAR, NODE_LIST, NODE_MAP };
struct node {
	enum node_kind kind;
	uint32_t line, column;
	bool plain;         /* scalar without quotes */
	char *text;         /* scalar: ends in a zero, holds none */
	struct node *first; /* list: elements; map: key, value, key, value */
	struct node *next;  /* sibling */
	uint32_t n;         /* children */
};

/* Where the objects stood in the file, for rules between them; same order as in struct nat_config. */
struct pool_places {
	const struct node *pool;
	const struct node **range;       /* one per nat_pool_config.ranges */
	const struct node **drain;       /* one per nat_pool_config.drain */
	const struct node *active_while; /* NULL: not given */
};
struct places {
	const struct node *root;
	const struct node **interface;
	bool interfaces_good; /* none of them has an error of its own */
	struct pool_places *pool;
	const struct node **zone;
	const struct node **statics;   /* one per nat_config.statics */
	const struct node **collector; /* one per config.collectors */
};

/* Memory that lives as long as the configuration, zeroed. A failed small allocation aborts: a process in that
 * state can neither read a configuration nor say why. */
void *config_take(struct config *config, size_t n, size_t size);

void config_error(struct config *config, const struct node *at, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
void config_warning(struct config *config, const struct node *at, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
void config_error_at(struct config *config, uint32_t line, uint32_t column, const char *format, ...)
	__attribute__((format(printf, 4, 5)));

/* No further problem will be shown: do not spend memory and time on its text. A hostile file can hold a
 * million. */
bool config_is_full(const struct config *config);

/* Text from the file made fit for a message: quoted, cut, without control characters. */
const char *config_shown(struct config *config, const char *text);
const char *config_shown_address(struct config *config, uint32_t address);
const char *config_shown_range(struct config *config, struct nat_range range);
const char *config_shown_prefix(struct config *config, struct nat_prefix prefix);

/* config_tree.c: text -> tree; NULL after an error. An empty text is an empty map. */
const struct node *config_tree(struct config *config, const char *text, size_t text_bytes);

/* config_keys.c: tree -> values and places, each key by itself. */
void config_keys(struct config *config, const struct node *root, struct places *places, unsigned flags);

extern const char *const config_switch_words[2]; /* off, on */

/* config_interfaces.c: the section `interfaces`. */
void config_interfaces(struct config *config, const struct node *node, struct places *places, unsigned flags);

/* config_pools.c: the section `pools`; each is what `defaults` is, where it does not say more. */
void config_pools(struct config *config, const struct node *node, struct places *places,
		  const struct nat_pool_config *defaults);

/* config_logging.c: the section `logging`, when the pools are read. */
void config_logging(struct config *config, const struct node *node, struct places *places);

/* config_sync.c: the section `sync`. */
void config_sync(struct config *config, const struct node *node);

/* config_values.c: how a value is read. */
#define CONFIG_KEYS_MAX      16
#define CONFIG_TIMEOUT_MAX_S (30u * 86400u)
struct key {
	const char *name;
	bool required;
};

/* The word that was meant by a misspelt one, or NULL. */
const char *config_nearest(const char *word, const char *const *words, size_t n);

/* Puts the value of keys[i] into value[i], NULL when it is not given. `where` names the map in messages. */
bool config_fields(struct config *config, const struct node *map, const char *where, const struct key *keys,
		   size_t n, const struct node **value);
const struct node *config_as_list(struct config *config, const struct node *node, const char *where);
bool config_as_scalar(struct config *config, const struct node *node, const char *key);
bool config_read_number(struct config *config, const struct node *node, const char *key, uint64_t least,
			uint64_t most, uint64_t *out);
bool config_read_u32(struct config *config, const struct node *node, const char *key, uint32_t least,
		     uint32_t most, uint32_t *out);
bool config_read_u16(struct config *config, const struct node *node, const char *key, uint16_t least,
		     uint16_t most, uint16_t *out);
bool config_read_word(struct config *config, const struct node *node, const char *key,
		      const char *const *words, size_t n, unsigned *out);
bool config_read_duration(struct config *config, const struct node *node, const char *key, uint32_t least_s,
			  uint32_t *out_s);
bool config_read_name(struct config *config, const struct node *node, const char *key, size_t longest,
		      char *out);
bool config_read_prefix(struct config *config, const struct node *node, const char *key,
			struct nat_prefix *out);
bool config_read_address(struct config *config, const struct node *node, const char *key, uint32_t *out);

/* What cannot be read is left out; gives how many remain, each with its place and, where asked for, its
 * weight. */
uint32_t config_read_ranges(struct config *config, const struct node *node, const char *key,
			    const struct nat_range **out, const uint32_t **weights,
			    const struct node ***places);
void config_read_ports(struct config *config, const struct node *node, uint16_t *port_first,
		       uint16_t *port_last);

/* config_rules.c: what must hold between objects. */
void config_rules(struct config *config, const struct places *places);

/* Not an address that a host on the Internet may have: says what it is, or gives NULL. */
const char *config_martian(struct nat_range range);

#endif
