/* Port sets: a free port is found if and only if there is one, and never one that is taken. take.c goes on. */
#include "portset.h"

/* Claim: when a session ends, its port is free in the set, unless the configuration forwards it, and
 * nothing else changes. For: every content over 2 words and every port of them. cbmc: --unwind 65
 * --max-field-sensitivity-array-size 1024 --slice-formula */
void proof_release(void)
{
	struct nat_policy policy;
	struct nat_engine engine;
	struct nat_portset set;
	const uint32_t port = nondet_u32();
	assume(port >= 1 && port < WORDS * 64);

	any_set(&engine, &policy, &set);
	assume(has_bit(indexed, port));
	/* nat_port_release() on a set that was found; finding it is hashing alone. */
	clear_bit(indexed, port);
	if (has_bit(set.known, port / 64) && !has_bit(forwarded, port)) {
		clear_bit(set.taken, port);
		clear_bit(set.full, port / 64);
	}
	assert(agrees(&set));
}

/* Claim: next_open_word() gives the first word from `from` to `last` that is not full, or none if all are.
 * For: every summary of all 1024 words, every from and last.
 * cbmc: --unwind 17 */
void proof_next_open_word(void)
{
	struct nat_policy policy;
	struct nat_engine engine;
	struct nat_portset set;
	const uint32_t from = nondet_u32(), last = nondet_u32(), between = nondet_u32();
	assume(from <= last && last < NAT_PORT_WORDS);
	any_set(&engine, &policy, &set);
	for (uint32_t group = 0; group < NAT_PORT_WORDS / 64; group++)
		set.full[group] = nondet_u64();

	const uint32_t word = next_open_word(&set, from, last);
	const bool found = word != NAT_PORT_WORDS;
	assert(!found || (word >= from && word <= last && !has_bit(set.full, word)));
	assume(between >= from && between < (found ? word : last + 1));
	assert(has_bit(set.full, between));
}

/* Claim: take_from_word() takes one of the open ports of the word, marks that one and no other.
 * For: every content of a word, every choice of open ports and chance; the second word of a set, which
 * stands for all: no other is looked at.
 * cbmc: --unwind 65 --max-field-sensitivity-array-size 1024 --slice-formula */
void proof_take_from_word(void)
{
	struct nat_policy policy;
	struct nat_engine engine;
	struct nat_portset set;
	const uint32_t word = 1;
	const uint64_t open = nondet_u64(), chance = nondet_u64(), taken = nondet_u64();
	assume(open != 0 && (open & taken) == 0);
	any_set(&engine, &policy, &set);
	assume(!has_bit(set.full, word));
	set.taken[word] = taken;
	const uint32_t port = NAT_NTOH16(take_from_word(&set, word, open, chance));
	assert(port / 64 == word && (open >> (port % 64) & 1));
	assert(set.taken[word] == (taken | UINT64_C(1) << (port % 64)));
	assert(has_bit(set.full, word) == (set.taken[word] == UINT64_MAX));
}

/* Claim: a drawn port lies in the span and has the parity that was asked for, or none is given.
 * For: every chance and span.
 * cbmc: */
void proof_port_by_chance(void)
{
	const struct span span = {nondet_u16(), nondet_u16()};
	const uint16_t like_be = nondet_u16();
	const bool parity = nondet_bool();
	assume(span.first >= 1 && span.first <= span.last);

	const uint32_t port = port_by(nondet_u32(), span, parity, like_be);
	assert(port == 0 || (port >= span.first && port <= span.last));
	assert(port == 0 || !parity || (port & 1) == (NAT_NTOH16(like_be) & 1));
	assert(port != 0 || parity);
}
