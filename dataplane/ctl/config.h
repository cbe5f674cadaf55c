/* The engine's one configuration file, read strictly: every error at once, each with its line and column.
 *
 * config_load() always gives a struct config. With n_errors == 0 `nat` is complete, defaults filled in,
 * and what it points to lives until config_free(). With errors `nat` must not be used; the problems say
 * what to do. Warnings never stand in the way.
 *
 *	struct config *c = config_load("/etc/dsnat/dsnatd.yaml", 0);
 *	config_print(c, stderr);                 FILE:LINE:COL: what; what to do
 *	if (c->n_errors)
 *		return CONFIG_EXIT_INVALID;
 */
#ifndef CONFIG_H
#define CONFIG_H

#include <stdio.h>

#include "../core/nat.h"
#include "sync.h"

#define CONFIG_EXIT_INVALID   2 /* exit status of a program whose configuration is wrong */
#define CONFIG_BYTES_MAX      (16u << 20)
#define CONFIG_POOLS_MAX      4096u
#define CONFIG_ZONES_MAX      65535u
#define CONFIG_STATICS_MAX    4096u
#define CONFIG_ADDRESSES_MAX  (1u << 20) /* over all pools */
#define CONFIG_SESSIONS_MAX   1000000000u
#define CONFIG_COLLECTORS_MAX 8u
#define CONFIG_PROBLEMS_MAX   200u /* the rest are counted only */

/* An interface need not name its device: dsnat-replay has none. */
#define CONFIG_WITHOUT_DEVICES 0x1u
/* Interfaces with `path: dpdk` become ones of the kernel, as `degraded: nfqueue` allows. */
#define CONFIG_DEGRADED 0x2u

struct config_problem {
	uint32_t line, column; /* from 1; 0: the whole file */
	bool warning;
	char *text; /* "what; what to do" */
};

/* Where the life of mappings is told (config_logging.c, export.h). */
enum config_log_protocol { CONFIG_LOG_IPFIX, CONFIG_LOG_SYSLOG };
enum config_log_transport { CONFIG_LOG_UDP, CONFIG_LOG_TCP };

struct config_collector {
	enum config_log_protocol protocol;
	enum config_log_transport transport;
	uint32_t address; /* host order */
	uint16_t port;
	bool destinations; /* RFC 6888 REQ-12: off unless asked for */
	bool *pools;       /* one per nat_config.pools; NULL: all */
};

struct config {
	struct nat_config nat;
	const struct config_collector *collectors;
	uint32_t n_collectors;
	char *path;                      /* as given to config_load() */
	struct config_problem *problems; /* in the file's order */
	uint32_t n_problems, n_errors, n_warnings;
	struct sync_settings sync;
	bool spare; /* a second process is kept prepared */
	struct config_arena *arena;
};

struct config *config_load(const char *path, unsigned flags);

/* The same from memory; `path` only names the text in messages. */
struct config *config_parse(const char *path, const char *text, size_t text_bytes, unsigned flags);

void config_free(struct config *config);

/* One line per problem, errors and warnings ("warning: " before the text). */
void config_print(const struct config *config, FILE *to);

/* Can `next` replace `running` without a restart? All but hardware, worker count and table size can. Returns
 * false and a sentence for the first thing that cannot. */
bool config_can_follow(const struct config *running, const struct config *next, char *why, size_t why_bytes);

/* The words of the file for the values in nat.h, for printing them again. */
const char *config_role_word(enum nat_role role);
const char *config_path_word(enum nat_path path);
const char *config_mapping_word(enum nat_mapping_kind mapping);
const char *config_filtering_word(enum nat_filtering filtering);
const char *config_select_word(enum nat_select select);
const char *config_announce_word(enum nat_announce announce);
const char *config_action_word(enum nat_action action);
const char *config_midflow_word(enum nat_midflow midflow);
const char *config_refusal_word(enum nat_refusal refusal);
const char *config_log_protocol_word(enum config_log_protocol protocol);
const char *config_log_transport_word(enum config_log_transport transport);

#endif
