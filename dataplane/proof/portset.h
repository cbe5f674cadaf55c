/* What the proofs about pool.c share: the code itself, and a model of what it asks. */
#ifndef PORTSET_H
#define PORTSET_H

#undef __SSE2__
#include "proof.h"

#include "../core/engine.h"

/* Chance is any number; hashes only lead to the index, which is the model below. */
#define nat_random_next(random)    nondet_u64()
#define nat_tuple_hash(key, tuple) UINT64_C(0)
#define nat_index_bucket(index, h) ((index)->bucket)
#define nat_scale32(x, n)          any_below(n)
static uint32_t any_below(uint32_t n)
{
	const uint32_t any = nondet_u32();
	assume(any < n);
	return any;
}

#include "../core/pool.c"

#define WORDS 2u

/* What the index and the configuration hold, a bit per port: the truth that a set must agree with. */
static uint64_t indexed[WORDS], forwarded[WORDS];
static struct nat_session one_record;
static struct nat_static one_static;

uint32_t nat_session_find(struct nat_engine *e, const struct nat_tuple *tuple, uint64_t hash)
{
	const uint32_t port = NAT_NTOH16(tuple->local_port_be);
	(void)e, (void)hash;
	assert(port < WORDS * 64);
	return has_bit(indexed, port) ? 0 : NAT_NO_RECORD;
}

const struct nat_static *nat_policy_static(const struct nat_policy *policy, unsigned side,
					   uint32_t address_be, uint16_t port_be, uint8_t protocol)
{
	const uint32_t port = NAT_NTOH16(port_be);
	(void)policy, (void)side, (void)address_be, (void)protocol;
	assert(port < WORDS * 64);
	return has_bit(forwarded, port) ? &one_static : NULL;
}

/* A set is a cache: a word that it knows is the truth, and it calls a word full exactly if it knows it as
 * full. */
static bool agrees(const struct nat_portset *set)
{
	bool good = true;

	for (uint32_t word = 0; word < WORDS; word++) {
		const bool known = has_bit(set->known, word), full = has_bit(set->full, word);
		good &= !known || set->taken[word] == (indexed[word] | forwarded[word]);
		good &= full == (known && set->taken[word] == UINT64_MAX);
	}
	return good;
}

/* Everything else in these is any value. */
static void any_set(struct nat_engine *engine, struct nat_policy *policy, struct nat_portset *set)
{
	for (uint32_t word = 0; word < WORDS; word++) {
		indexed[word] = nondet_u64();
		forwarded[word] = nondet_u64();
	}
	policy->n_statics = (forwarded[0] | forwarded[1]) != 0;
	engine->policy = policy;
	engine->record = &one_record;
	engine->workers = NULL; /* one worker: all ports are its own */
	assume(agrees(set));
}

#endif
