/* What the workers of one gateway have in common: who owns which packet.
 *
 * Each worker has an engine of its own: index, port sets, wheel, counters. This is all that they share
 * beside the records, and nearly all of it is only read.
 *
 * One rule says where a packet belongs: every worker can tell the *place* of a tuple from the tuple and the
 * policy alone (nat_place()), and a session lives at the place of its outside tuple, where its replies go.
 *
 *   - In a pool that is *spread* the place is the Toeplitz hash of the packet as it is on the wire (RSS), looked up
 *     in the port's redirection table: on a NIC that hashes with this key and table the packet comes to its place
 *     by itself. A new session takes a port whose reply's hash leads back to the worker that the request came to.
 *   - A pool whose state is per host (endpoint-independent or paired mapping, port blocks, deterministic mapping,
 *     limits) is *kept* by one worker, the place of all its packets: so limits, pairs and blocks are as exact as
 *     with one worker.
 *   - A tuple of a static mapping has the place of the outside tuple that the mapping says.
 *
 * A worker that gets a packet looks into its own index first. Only when nothing is found it asks for the
 * place, and hands the packet over if that is another one. So where RSS is right nothing is handed over,
 * and where it is wrong, or there is none, all is still correct.
 *
 * A session that does not live at the place of its inside tuple is *away* from there: its port was
 * borrowed, or it was begun under another number of workers or another configuration. So that the place of
 * the tuple knows, it has one byte per hash of tuple, its *marks*: 0: nobody away has such a tuple; a
 * worker's number, plus one: only that one may; NAT_MARK_MANY: several may. Marks are written by the
 * worker that has the session, and wiped by their owner when nobody is away from it any more. handover.c
 * has the questions that are asked along them.
 */
#ifndef NAT_WORKERS_H
#define NAT_WORKERS_H

#include <stdatomic.h>

#include "hash.h"
#include "nat.h"

#define NAT_HASHED_BYTES  12u       /* two addresses, two ports */
#define NAT_SPREAD        UINT8_MAX /* nat_pool.keeper: no single worker */
#define NAT_MARK_MANY     UINT8_MAX
#define NAT_MARK_BORROWED 0x80u /* beside a worker's number + 1: the session has a port of that one's */

struct nat_spread {
	uint32_t part[NAT_HASHED_BYTES][256]; /* Toeplitz is linear: a hash is the xor of its bytes' parts */
	uint32_t class_mask;
	uint8_t worker[NAT_RSS_CLASSES_MAX];
};

struct nat_workers_line { /* of one worker, on a cache line of its own */
	_Alignas(
		NAT_CACHE_LINE) _Atomic uint32_t away; /* sessions elsewhere whose tuple has its place here */
	_Atomic bool marked, wiping;
};

struct nat_workers {
	uint32_t n;
	uint32_t mark_mask;          /* marks of each worker, less one */
	struct nat_key key;          /* of marks, and of the fragments' places */
	struct nat_spread spread[2]; /* by nat_tuple.side */
	/* Records that a worker has too many of: lists of nat_free_list_records, linked by
	 * nat_session.next; the lists by `previous` of their first. Head of the stack: number + 1 in the
	 * low half, a count against ABA in the high one. */
	_Alignas(NAT_CACHE_LINE) _Atomic uint64_t free_lists;
	uint32_t free_list_records;
	struct nat_workers_line line[NAT_WORKERS_MAX];
	_Atomic uint8_t mark[];
};

/* Of the packet that has this tuple on its side, as it is on the wire, but for the local port. */
static inline uint32_t nat_spread_rest(const struct nat_spread *spread, const struct nat_tuple *tuple)
{
	const bool out = tuple->side == 0; /* local is the source, else the destination */
	const uint32_t local = NAT_NTOH32(tuple->local_be), remote = NAT_NTOH32(tuple->remote_be);
	const uint32_t remote_port = NAT_NTOH16(tuple->remote_port_be);
	const uint32_t(*at_local)[256] = &spread->part[out ? 0 : 4],
	      (*at_remote)[256] = &spread->part[out ? 4 : 0], (*at_port)[256] = &spread->part[out ? 10 : 8];

	return at_local[0][local >> 24] ^ at_local[1][local >> 16 & 0xff] ^ at_local[2][local >> 8 & 0xff] ^
	       at_local[3][local & 0xff] ^ at_remote[0][remote >> 24] ^ at_remote[1][remote >> 16 & 0xff] ^
	       at_remote[2][remote >> 8 & 0xff] ^ at_remote[3][remote & 0xff] ^ at_port[0][remote_port >> 8] ^
	       at_port[1][remote_port & 0xff];
}

static inline uint32_t nat_spread_port(const struct nat_spread *spread, unsigned side, uint32_t local_port)
{
	const uint32_t(*at_port)[256] = &spread->part[side == 0 ? 8 : 10];
	return at_port[0][local_port >> 8] ^ at_port[1][local_port & 0xff];
}

static inline uint32_t nat_spread_worker(const struct nat_spread *spread, uint32_t hash)
{
	return spread->worker[hash & spread->class_mask];
}

/* The class of a tuple, as the worker it leads to. */
static inline uint32_t nat_spread_place(const struct nat_workers *workers, const struct nat_tuple *tuple)
{
	const struct nat_spread *spread = &workers->spread[tuple->side];
	return nat_spread_worker(
		spread, nat_spread_rest(spread, tuple) ^
				nat_spread_port(spread, tuple->side, NAT_NTOH16(tuple->local_port_be)));
}

/* Where all fragments of a datagram are brought together, known by what each of them carries. */
static inline uint32_t nat_fragment_place(const struct nat_workers *workers, uint32_t source_be,
					  uint32_t destination_be, uint16_t id_be, uint8_t protocol)
{
	const uint64_t hash = nat_hash64(&workers->key, (uint64_t)source_be << 32 | destination_be,
					 (uint64_t)id_be << 16 | protocol);
	return nat_scale32((uint32_t)(hash >> 32), workers->n);
}

/* ---- marks ---- */

static inline _Atomic uint8_t *nat_mark_of(struct nat_workers *workers, uint32_t worker,
					   const struct nat_tuple *tuple)
{
	const size_t first = (size_t)worker * ((size_t)workers->mark_mask + 1);
	return &workers->mark[first + ((uint32_t)nat_tuple_hash(&workers->key, tuple) & workers->mark_mask)];
}

/* A session with this tuple, whose place is `place`, lives at `at`; and does so no longer. */
void nat_away_begin(struct nat_workers *workers, uint32_t place, const struct nat_tuple *tuple, uint32_t at,
		    bool borrowed);
void nat_away_end(struct nat_workers *workers, uint32_t place);

/* Wipes a worker's marks when none of them means anything. By that worker, now and then, and again in each
 * burst as long as some are left: there is one for each of its sessions, and whoever begins one meanwhile
 * waits. */
#define NAT_TIDIED_AT_ONCE 16384u /* some 10 us */
struct nat_tidying {
	uint32_t at, left;
};
void nat_marks_tidy(struct nat_workers *workers, uint32_t worker, struct nat_tidying *tidying);

#endif
