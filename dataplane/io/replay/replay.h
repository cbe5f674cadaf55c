/* Between the files of dsnat-replay. */
#ifndef REPLAY_H
#define REPLAY_H

#include <stdio.h>

#include "../../core/nat.h"
#include "../../ctl/config.h"
#include "../../ctl/export.h"
#include "../../ctl/log.h"
#include "../../ctl/request.h"
#include "../../ctl/socket.h"

#define REPLAY_PACKET_MAX 65535u /* an IPv4 packet cannot be longer */

/* ---- world.c: what a kernel would know ---- */

struct world;

struct world *world_open(const struct nat_config *config);
void world_close(struct world *world);

/* The configuration after a reload; interfaces are the same. */
void world_set_config(struct world *world, const struct nat_config *config);

/* "198.51.100.0/24=outside1"; false when it cannot be read. */
bool world_add_route(struct world *world, const char *text);

/* "outside0=198.51.100.2" */
bool world_add_address(struct world *world, const char *text);

void world_clear_addresses(struct world *world, uint8_t iface);
bool world_is_own(const struct world *world, uint32_t address_be);

/* A packet with this source came in: a host inside is answered where it was last seen. */
void world_learn(struct world *world, uint8_t iface, const uint8_t *l3, uint32_t len_bytes);

/* For nat_engine_params. */
struct nat_world world_functions(struct world *world);

/* The interface of this name, or -1. */
int world_interface(const struct world *world, const char *name);

/* ---- bench.c: engines and packets ---- */

struct bench;

/* A packet that left or was dropped. */
struct result {
	uint8_t *bytes;
	uint32_t len_bytes;
	uint8_t iface; /* out: where it leaves; dropped: where it came in */
	uint8_t verdict, reason;
	bool made; /* by the engine itself */
};

/* What one packet or one move of the clock led to; valid until the next. */
struct outcome {
	uint8_t verdict, reason; /* of the packet that was given */
	struct result *out;      /* forwarded: it, packets made, held packets let go */
	uint32_t n_out;
	struct result *dropped; /* held packets that are dropped now */
	uint32_t n_dropped;
};

/* To which worker a packet comes: as a NIC with RSS would bring it, in turns, or all to the first one. */
enum spread { SPREAD_RSS, SPREAD_TURNS, SPREAD_ONE };

/* Takes ownership of `config`; NULL when there is no memory. */
struct bench *bench_open(struct config *config, uint64_t seed, uint32_t workers, enum spread spread);
void bench_close(struct bench *bench);

struct world *bench_world(struct bench *bench);
const struct nat_config *bench_config(const struct bench *bench);
uint64_t bench_now_ns(const struct bench *bench);
const struct request_ops *bench_ops(const struct bench *bench);
struct log *bench_log(struct bench *bench);

/* What the first collector of the configuration would get, into a file. False: the configuration has none. */
bool bench_log_to(struct bench *bench, FILE *to);
/* Writes the rest; false: it could not, or something was lost. */
bool bench_log_end(struct bench *bench);

/* Pools with `active_while` are active when the gateway has that address. */
void bench_follow_addresses(struct bench *bench);

/* One packet; worker -1: as `spread` says. */
const struct outcome *bench_packet(struct bench *bench, uint64_t now_ns, uint8_t iface, uint16_t flags,
				   int worker, const uint8_t *bytes, uint32_t len_bytes);

/* Only time passes. */
const struct outcome *bench_tick(struct bench *bench, uint64_t now_ns);

/* A frame that is not IPv4: counted as received and passed. */
void bench_bypass(struct bench *bench);

/* ---- lines.c, capture.c: the two forms of input; both give the exit status ---- */

/* Standard input; `server` (may be NULL) is answered between lines. */
int lines_run(struct bench *bench, struct socket_server *server, FILE *out);
int capture_run(struct bench *bench, const char *const *read, int n_read, const char *const *write,
		int n_write, FILE *summary);

#endif
