/* Session records and the index that finds them.
 *
 * A record (64 bytes, one cache line) serves both directions. It lives in the table, memory that outlives the
 * process; it holds addresses and ports as values and zone and pool as stable ids, so that neither a reload
 * nor a restart changes what it means. The index (nat_index) is private to a worker and can be made again
 * from the records at any time.
 *
 * A record's life, told by `timer`:
 *
 *   NAT_TIMER_FREE   not in the index, on a worker's free list or never used
 *        may:     be filled by nat_session_create(), which writes `timer` last, with release order: a process
 * that dies in between leaves a free record, never half a session NAT_TIMER_HOLD   a mapping whose last
 * session has ended: its port is not given out again until the hold time is over (RFC 6888 REQ-8) any other
 * live: in the index under its inside and its outside tuple, on the wheel; may be refreshed, may change its
 * timer may not: be moved, or change its tuples
 *
 * A *mapping* of an endpoint-independent pool is a record whose remote is 0.0.0.0:0 (NAT_RECORD_MAPPING). It
 * is not on the wheel while sessions refer to it (`references`). Sessions are begun by packets from inside
 * only: what an uninvited remote sends is translated by the mapping itself and leaves no trace, so that
 * nobody outside can fill the table or keep a mapping alive (RFC 6888 REQ-5, RFC 7857 section 7). Where the
 * pool filters by address, each remote address that a mapping has talked to is a record of the same kind,
 * with inside.zero[0] = 1 and no remote port; it is made again from the sessions after a restart.
 */
#ifndef NAT_SESSION_H
#define NAT_SESSION_H

#include <stdatomic.h>
#include <string.h>

#include "hash.h"
#include "nat.h"
#include "platform.h"

/* which time-out rules a record */
enum nat_timer {
	NAT_TIMER_FREE,
	NAT_TIMER_TCP_OPENING,
	NAT_TIMER_TCP_ESTABLISHED,
	NAT_TIMER_TCP_CLOSING,
	NAT_TIMER_UDP,
	NAT_TIMER_UDP_ONE_WAY,
	NAT_TIMER_DNS,
	NAT_TIMER_ICMP,
	NAT_TIMER_HOLD,
	NAT_TIMER_COUNT
};

/* nat_session.flags */
enum {
	/* endpoint-independent mapping, not a session */
	NAT_RECORD_MAPPING = 0x01,
	/* a port set may know its port: tell it when the port is free */
	NAT_RECORD_TRACKED = 0x02,
	/* its beginning is in the log, so its end must be */
	NAT_RECORD_LOGGED = 0x04,
	/* session of an endpoint-independent pool: the port is its mapping's */
	NAT_RECORD_UNDER_MAPPING = 0x08,
	/* mapping: goes through NAT_TIMER_HOLD when its last session has ended */
	NAT_RECORD_HOLDS = 0x10,
	/* session under a mapping with address-dependent filtering: see nat_session_permits() */
	NAT_RECORD_PERMITS = 0x20, /* session over a static mapping: it owns no port */
	NAT_RECORD_STATIC = 0x40,
	/* mapping that its host asked for (PCP): that counts as a reference until `asked_until_s` */
	NAT_RECORD_ASKED = 0x80,
};

/* nat_session.state, TCP only: what has been seen (RFC 6146 section 3.5.2 drawn as flags) */
enum {
	NAT_TCP_SAW_SYN_OUT = 0x01,
	NAT_TCP_SAW_SYN_IN = 0x02,
	NAT_TCP_SAW_FIN_OUT = 0x04,
	NAT_TCP_SAW_FIN_IN = 0x08,
	NAT_TCP_SAW_RST = 0x10,
};

/* nat_session.state of a session, any protocol: it is the peer's, told by it; no packet of it has come by
 * here (replica.h) */
enum { NAT_STATE_FOREIGN = 0x80 };

/* nat_session.state of a mapping: its host has asked for anybody to be let in, whatever the pool filters */
enum { NAT_MAPPING_OPEN = 1 };

struct nat_session {
	struct nat_tuple inside; /* host and remote */
	uint32_t out_addr_be;
	uint16_t out_port_be;
	uint16_t zone_id, pool_id; /* stable ids kept in the table's header */
	uint16_t slot;             /* of the wheel, or NAT_OFF_WHEEL */
	uint8_t flags, timer, state, worker;
	union {
		uint32_t last_seen_s;
		uint32_t asked_until_s; /* mapping with NAT_RECORD_ASKED */
	};
	uint32_t created_s;
	uint32_t next, previous; /* on the wheel */
	union {
		uint64_t bytes_out;
		uint64_t references; /* mapping: sessions that use it */
	};
	union {
		uint64_t bytes_in;
		uint64_t
			nonce; /* mapping with NAT_RECORD_ASKED: whoever knows it may change it; 0: anybody */
	};
};
_Static_assert(sizeof(struct nat_session) == NAT_CACHE_LINE, "a known session costs one line");

#define NAT_OFF_WHEEL   UINT16_MAX
#define NAT_NO_RECORD   UINT32_MAX
#define NAT_RECORDS_MAX (UINT32_MAX >> 1) /* the index keeps the side in one bit */
#define NAT_CHUNK       1024u             /* records that a worker leases at once */
#define NAT_POOL_IDS    4096u
#define NAT_ZONE_IDS    65535u
#define NAT_NO_ID       UINT16_MAX

struct nat_zone_identity {
	struct nat_prefix source, destination;
};

/* The table: this header, then the records. Offsets only, no pointers. */
struct nat_table {
	uint64_t magic;
	uint32_t layout, record_bytes;
	uint64_t n_records;
	uint64_t seed;
	uint64_t records_offset;
	_Atomic uint32_t chunks_leased;
	uint32_t n_chunks;
	_Atomic uint32_t n_pool_ids, n_zone_ids; /* what is counted is written */
	char pool_name[NAT_POOL_IDS][NAT_NAME_MAX];
	struct nat_zone_identity zone_identity[NAT_ZONE_IDS];
};

static inline struct nat_session *nat_table_records(struct nat_table *table)
{
	return (struct nat_session *)(void *)((uint8_t *)table + table->records_offset);
}

/* ---- the index ---- */

/* A bucket is one cache line: ten entries, each with a 16-bit tag of its hash. An entry stands in the bucket
 * of its hash or, marked in `moved`, in the alternate one (cuckoo hashing with buckets: Dietzfelbinger,
 * Weidling 2007). `strangers` counts the entries whose first choice was this bucket and that stand in their
 * alternate: while it is zero a look-up ends here. */
#define NAT_WAYS 10u
struct nat_bucket {
	uint16_t tag[NAT_WAYS]; /* 0: empty */
	uint16_t strangers;
	uint16_t moved;           /* bit per way */
	uint32_t entry[NAT_WAYS]; /* record number * 2 + side */
} NAT_ALIGNED;
_Static_assert(sizeof(struct nat_bucket) == NAT_CACHE_LINE, "a look-up costs one line");

struct nat_index {
	struct nat_bucket *bucket;
	uint32_t n_buckets;
	struct nat_key key;
	struct nat_session *record;
};

/* Entries for n records with two each, at most 65 % full: at 85 % every third insertion found its first
 * bucket full and waited for memory once more. */
static inline uint64_t nat_index_buckets(uint64_t n_records)
{
	return n_records * 2 * 20 / (NAT_WAYS * 13) + 2;
}

static inline uint16_t nat_index_tag(uint64_t hash)
{
	uint16_t tag = (uint16_t)(hash >> 48);
	return tag == 0 ? 1 : tag;
}

static inline struct nat_bucket *nat_index_bucket(const struct nat_index *index, uint64_t hash)
{
	return &index->bucket[nat_scale32((uint32_t)hash, index->n_buckets)];
}

/* One bit per way whose tag this is. */
static inline uint32_t nat_bucket_ways(const struct nat_bucket *bucket, uint16_t tag)
{
	/* The 16 lanes go on behind the tags; what they hold there is masked out. */
	return nat_equal_lanes((const uint16_t *)(const void *)bucket, tag) & ((1u << NAT_WAYS) - 1);
}

/* False: it is full. */
static inline bool nat_bucket_put(struct nat_bucket *bucket, uint16_t tag, uint32_t entry, bool moved)
{
	const uint32_t empty = nat_bucket_ways(bucket, 0);

	if (!empty)
		return false;
	const unsigned way = NAT_CTZ64(empty);
	bucket->entry[way] = entry;
	bucket->tag[way] = tag;
	bucket->moved = (uint16_t)((bucket->moved & ~(1u << way)) | (unsigned)moved << way);
	return true;
}

/* The other bucket that an entry with this tag may stand in; its other one is this one again. */
static inline uint32_t nat_index_alternate(const struct nat_index *index, uint32_t bucket, uint16_t tag)
{
	uint32_t sum = nat_scale32(tag * UINT32_C(0x9e3779b1), index->n_buckets);
	return sum >= bucket ? sum - bucket : sum - bucket + index->n_buckets;
}

/* Is this the record's tuple on that side? */
static inline bool nat_session_holds_on(const struct nat_session *s, const struct nat_tuple *tuple,
					uint8_t side)
{
	/* One branch at the end: which field differs first is nothing to predict. */
	if (side == 0)
		return memcmp(&s->inside, tuple, sizeof(*tuple)) == 0;
	return ((s->out_addr_be ^ tuple->local_be) | (s->inside.remote_be ^ tuple->remote_be) |
		(uint32_t)(s->out_port_be ^ tuple->local_port_be) |
		(uint32_t)(s->inside.remote_port_be ^ tuple->remote_port_be) |
		(uint32_t)(s->inside.protocol ^ tuple->protocol) |
		(uint32_t)(s->inside.zero[0] ^ tuple->zero[0])) == 0;
}

static inline bool nat_session_holds(const struct nat_session *s, const struct nat_tuple *tuple)
{
	return nat_session_holds_on(s, tuple, tuple->side);
}

/* The record that holds this tuple on its side, or NAT_NO_RECORD. Says nothing about its time-out. */
uint32_t nat_index_find(const struct nat_index *index, const struct nat_tuple *tuple, uint64_t hash);

/* False when there is no room: it is never so full that this is likely. */
bool nat_index_insert(struct nat_index *index, uint64_t hash, uint32_t record, uint8_t side);
void nat_index_remove(struct nat_index *index, uint64_t hash, uint32_t record, uint8_t side);

static inline struct nat_tuple nat_session_outside(const struct nat_session *s)
{
	struct nat_tuple tuple = s->inside;
	tuple.local_be = s->out_addr_be;
	tuple.local_port_be = s->out_port_be;
	tuple.side = 1;
	return tuple;
}

#endif
