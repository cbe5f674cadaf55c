/* Free ports: finds one for a new session, and finds one whenever there is one.
 *
 * What makes an outside port taken is that the index holds its outside tuple, nothing else: (protocol,
 * address, port, remote address, remote port) for endpoint-dependent pools, the same with remote 0.0.0.0:0
 * for endpoint-independent ones. So there is no second truth to keep in step, and nothing to rebuild after a
 * restart.
 *
 *   1. A few ports drawn at random are looked up. While less than half of an address's ports towards this
 * remote are taken this ends almost always here.
 *   2. If all were taken, the pair (address, remote) is *hot* and gets a port set: a bitmap of its ports
 * which is filled lazily, one word of 64 ports by 64 look-ups when the word is first wanted, and kept
 * exact from then on. A summary of full words leads to a word with room, so the cost of an allocation does
 * not grow with use.
 *
 * With several workers the ports of a spread pool are divided: each worker takes those whose replies come
 * to it (workers.h), and to its port sets all others are taken.
 *
 * A port set is a cache: it may be thrown away at any time. A record that a set knows is marked
 * NAT_RECORD_TRACKED, so that its end is reported to the set; records of cold pairs never pay for that.
 */
#ifndef NAT_POOL_H
#define NAT_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef NAT_PORT_WORDS       /* a proof needs fewer */
#define NAT_PORT_WORDS 1024u /* 65536 ports in words of 64 */
#endif
#define NAT_PORT_PROBES 8u
#define NAT_PORT_TRIES  256u /* of one probe, for a port that leads back to this worker */
#define NAT_ALIKE_WORDS 32u  /* looked at for a port of the wanted parity and class */

struct nat_portset {
	uint32_t address_be, remote_be;
	uint16_t remote_port_be;
	uint8_t protocol, used;
	uint32_t next;                       /* hash chain */
	uint32_t touched;                    /* clock for replacement */
	uint64_t known[NAT_PORT_WORDS / 64]; /* the word has been filled */
	uint64_t full[NAT_PORT_WORDS / 64];  /* the word is known and has no free port */
	uint64_t taken[NAT_PORT_WORDS];      /* all 65536 ports, whatever part of them a pool uses */
};

/* A set that a trial would have made. */
#define NAT_TRIAL_SETS 64u
struct nat_trial_set {
	uint32_t address_be;
	const struct nat_portset *instead_of; /* NULL: there was room */
};

struct nat_portsets {
	struct nat_portset *set;
	uint32_t *bucket; /* heads of chains, number + 1 */
	uint32_t n_sets, bucket_mask, n_used, hand;
	uint32_t n_made; /* ever: who has looked for a set finds out that there may be one now */
	uint32_t clock;
	struct nat_trial_set trial[NAT_TRIAL_SETS];
	uint32_t n_trial, trial_hand;
};

struct nat_engine;
struct nat_tuple;
struct nat_session;

size_t nat_portsets_size(uint64_t max_sessions);
void nat_portsets_init(struct nat_engine *e, void *mem, uint64_t max_sessions);
void nat_portsets_forget(struct nat_engine *e);
void nat_portsets_begin_trial(struct nat_engine *e); /* trial.c */

/* A free port in first..last for the outside tuple (whose local port is ignored), in network order, or 0.
 * `tracked`: the new record must carry NAT_RECORD_TRACKED. With `alike` the port is even or odd as `like_be`
 * is, and below 1024 or not, as long as such a port is easily found (RFC 4787 REQ-4, REQ-3a): that is a wish,
 * and no reason to refuse. */
uint16_t nat_port_take(struct nat_engine *e, struct nat_tuple *outside, uint16_t first, uint16_t last,
		       bool alike, uint16_t like_be, bool *tracked);

/* Makes the random numbers that the next n calls (NAT_BURST_MAX at most) begin with, if those before each
 * take the first port they look at. */
void nat_port_look_ahead(struct nat_engine *e, uint32_t n);

/* The port that the next call but `ahead` will look at first, under that condition, or 0. Changes nothing.
 * `of_set`: the pair is hot, so that a set will tell and not chance. */
uint16_t nat_port_forecast(const struct nat_engine *e, const struct nat_tuple *outside, uint32_t ahead,
			   uint16_t first, uint16_t last, bool alike, uint16_t like_be, bool *of_set);

/* This port is taken, by somebody who has not asked: a session that comes from a peer. True: tracked, as
 * above. */
bool nat_port_claim(struct nat_engine *e, const struct nat_tuple *outside);

/* The record's port is free again; for records with NAT_RECORD_TRACKED. */
void nat_port_release(struct nat_engine *e, const struct nat_session *s);

#endif
