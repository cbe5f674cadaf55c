/* The checksum: folding, and the update of RFC 1624 against full recomputation. csum.smt2 goes on where
 * this takes too long. */
#include "proof.h"

#include "../core/csum.h"

/* One's complement sum of two words, as RFC 1071 defines it: the carry comes back in at the bottom. */
static uint16_t plus(uint16_t a, uint16_t b)
{
	const uint32_t sum = (uint32_t)a + b;
	return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

/* Claim: nat_sum_fold() is the one's complement sum of the words of a nat_sum. (csum.smt2 has every sum.)
 * For: every sum of up to 34 bits: a word and an address and a port changed.
 * cbmc: */
void proof_fold(void)
{
	const nat_sum sum = nondet_u64();

	assume(sum >> 34 == 0);
	assert(nat_sum_fold(sum) == plus(plus((uint16_t)sum, (uint16_t)(sum >> 16)), (uint16_t)(sum >> 32)));
}

/* Claim: the order of addition does not matter, so any part of a packet may stand for "the rest" below.
 * For: every three words.
 * cbmc: */
void proof_plus_is_associative(void)
{
	const uint16_t a = nondet_u16(), b = nondet_u16(), c = nondet_u16();

	assert(plus(plus(a, b), c) == plus(a, plus(b, c)) && plus(a, b) == plus(b, a));
}

/* Claim: after one word changes, the updated checksum is the one that full recomputation gives. For: every
 * old and new word and every sum of the rest, unless all that is summed is zero afterwards (an ICMP
 * message only: rewrite.c mends that case). cbmc: */
void proof_update_of_a_word(void)
{
	const uint16_t rest = nondet_u16(), old = nondet_u16(), new = nondet_u16();
	const uint16_t before = (uint16_t)~plus(rest, old), after = (uint16_t)~plus(rest, new);

	assume(rest != 0 || new != 0);
	assert(nat_csum_update(before, nat_sum_replace16(0, old, new)) == after);
}

/* Claim: a wrong checksum stays wrong: an update never makes a damaged packet look whole.
 * For: every word and every sum of the rest.
 * cbmc: */
void proof_update_keeps_a_wrong_checksum_wrong(void)
{
	const uint16_t rest = nondet_u16(), old = nondet_u16(), new = nondet_u16(), checksum = nondet_u16();
	const uint16_t updated = nat_csum_update(checksum, nat_sum_replace16(0, old, new));

	assume(plus(plus(rest, old), checksum) != UINT16_MAX);
	assume(rest != 0 || old != 0 || checksum != 0);
	assert(plus(plus(rest, new), updated) != UINT16_MAX);
}

/* Claim: nat_csum_bytes() reads exactly the bytes it is given, and a message that carries it sums to all
 * ones. For: every message of 4 to 8 bytes, odd lengths included. cbmc: --unwind 6 */
void proof_sum_of_bytes(void)
{
	const size_t bytes = nondet_u8();
	assume(bytes >= 4 && bytes <= 8);
	uint8_t *message = malloc(bytes);
	assume(message != NULL);

	nat_put16(message + 2, 0);
	nat_put16(message + 2, nat_csum_bytes(message, bytes));
	assert(nat_sum_fold(nat_sum_bytes(0, message, bytes)) == UINT16_MAX);
}
