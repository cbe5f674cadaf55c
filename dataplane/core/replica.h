/* Sessions for a peer: what ctl/sync.c may include besides nat.h.
 *
 * A table is told to a peer as numbered places: "under my number 7 stands this session", or "nothing
 * stands there any longer". Saying that again is harmless, and the last word counts; so what was lost on
 * the way is simply said again as it is by then, and nothing must be kept for that. A worker keeps three
 * bits per record: to be told soon (established), to be told when there is time, and known to the peer.
 * That bounds the memory, however long the peer is away.
 *
 * A session that the peer has told stands in our table like any other, findable at once, but as the peer's
 * (NAT_STATE_FOREIGN): it is not told back, and it stays a minute beyond its time, because it is the peer
 * that sees its packets and says when it is over. The first packet of it that comes by here makes it ours,
 * and the peer is told. So nothing has to be done when the address moves.
 *
 * What lives shorter than the hold-back time (a SYN that nobody answers, a DNS query) is never told.
 */
#ifndef NAT_REPLICA_H
#define NAT_REPLICA_H

#include "hash.h"
#include "nat.h"

enum nat_replica_kind {
	NAT_REPLICA_GONE, /* nothing stands under this number; only `slot` counts */
	NAT_REPLICA_SESSION,
	NAT_REPLICA_YOURS, /* what stood there is not ours any longer, as you have said; only `slot` counts */
};

/* nat_replica.traits */
enum {
	NAT_REPLICA_UNDER_MAPPING =
		0x01, /* of an endpoint-independent pool: the mapping is made with the first of them */
	NAT_REPLICA_STATIC = 0x02,
	NAT_REPLICA_PERMITS = 0x04,
	NAT_REPLICA_LOGGED = 0x08,
};

/* Values only: nothing of it depends on the order of a configuration, on a clock, or on where it stands. */
struct nat_replica {
	struct nat_tuple inside;
	uint32_t out_addr_be;
	uint16_t out_port_be;
	uint8_t kind, traits;
	uint8_t timer, state; /* enum nat_timer; NAT_TCP_SAW_* */
	uint32_t slot;        /* record number of the one that tells */
	uint32_t pool, zone;  /* digests of the pool's name, of the zone's prefixes */
	uint32_t idle_s, age_s;
};

#define NAT_REPLICA_RANGE 1024u /* records that are compared at once: NAT_CHUNK */
#define NAT_REPLICA_WORDS (NAT_REPLICA_RANGE / 64)

/* All of these: from the worker's own thread, and only where nat_engine_params.replicate is set. */

void nat_engine_hold_back(struct nat_engine *e, uint32_t hold_back_ms);

/* Up to `most` changes, established sessions first. They count as known to the peer from here on. */
uint32_t nat_engine_export(struct nat_engine *e, struct nat_replica *out, uint32_t most);

/* Changes that nat_engine_export() would give now, about; also from another thread. */
uint64_t nat_engine_export_waiting(const struct nat_engine *e);

/* These places must be told again. */
void nat_engine_export_again(struct nat_engine *e, const uint32_t *slot, uint32_t n);

/* A new peer: it knows nothing. `cursor` starts with 0; true when there is more. */
bool nat_engine_export_all(struct nat_engine *e, uint64_t *cursor, uint32_t budget);

/* One range of our places: sums up what the peer should have. `without` are places on their way, on return
 * also those that wait to be told: they are not part of the sum. Sessions used since `since_s` are told
 * again now and then, so that the peer knows that they live. */
struct nat_replica_sum {
	uint64_t without[NAT_REPLICA_WORDS];
	uint64_t sum;
	uint32_t n; /* sessions in it */
};
void nat_engine_export_sum(struct nat_engine *e, uint32_t range, const struct nat_key *key, uint32_t since_s,
			   struct nat_replica_sum *sum);

enum nat_import_result {
	NAT_IMPORT_DONE,
	NAT_IMPORT_OURS,     /* it is ours, and was used here more recently: the peer will be told */
	NAT_IMPORT_CONFLICT, /* something of ours has one of its tuples, and was used more recently */
	NAT_IMPORT_FULL,
	NAT_IMPORT_INVALID,
	NAT_IMPORT_RESULTS
};

/* A session that the peer tells. `yields`: which side keeps one that both say was used just now. `record`
 * is where it stands. */
enum nat_import_result nat_engine_import(struct nat_engine *e, const struct nat_replica *replica, bool yields,
					 uint32_t *record);
/* The worker that it should be told to: the one that its replies come to. Any worker may be asked. */
uint32_t nat_engine_import_place(const struct nat_engine *e, const struct nat_replica *replica);
/* One that it has ended. */
void nat_engine_import_end(struct nat_engine *e, uint32_t record);
/* One that it holds to be ours. With two masters both may have given way to the other at once: then nobody
 * would tell of it, and it must not end for that. */
void nat_engine_import_ours(struct nat_engine *e, uint32_t record);

/* The other side of nat_engine_export_sum(): `record[i]` stands for the peer's place `slot[i]`. */
void nat_engine_import_sum(struct nat_engine *e, const struct nat_key *key, const uint32_t *record,
			   const uint32_t *slot, uint32_t n, struct nat_replica_sum *sum);

/* The peer has told all: what it did not name (origin[record] is NAT_NO_SESSION) is ours now. */
bool nat_engine_take_orphans(struct nat_engine *e, const uint32_t *origin, uint64_t *cursor, uint32_t budget);

#endif
