/* Port sets: the choice of a port, in sets of 4096 ports (64 words), of which the first two words are
 * used; one worker. */
#define NAT_PORT_WORDS 64u
#include "portset.h"

/* Claim: learn_word() makes a word the truth: taken exactly where the index holds the tuple or the
 * configuration forwards the port; no other word changes. For: every content of 2 words; the second one,
 * which stands for all: no other is looked at. cbmc: --unwind 65 */
void proof_learn_word(void)
{
	struct nat_policy policy;
	struct nat_engine engine;
	struct nat_portset set;
	const struct nat_tuple outside = {0};
	const uint32_t word = 1;

	any_set(&engine, &policy, &set);
	const uint64_t other = set.taken[1 - word];
	assume(!has_bit(set.known, word));
	learn_word(&engine, &set, word, &outside);
	assert(has_bit(set.known, word) && agrees(&set));
	assert(set.taken[1 - word] == other);
}

/* Claim: take_pattern() without a budget gives a port if and only if one of the span is free and fits the
 * pattern; the port is such a one, and afterwards the set knows it as taken and is the truth about all
 * others. For: every span and every content over 2 words, which are known already or have just been
 * learned, every pattern and chance. cbmc: --unwind 4 --unwindset
 * learn_word.0:1,learn_word.1:1,learn_word.2:1,learn_word.3:1 */
void proof_take_pattern(void)
{
	struct nat_policy policy;
	struct nat_engine engine;
	struct nat_portset set;
	const struct nat_tuple outside = {0};
	const struct span span = {nondet_u16(), nondet_u16()};
	const uint64_t pattern = nondet_u64();
	const uint32_t any = nondet_u32();
	assume(span.first >= 1 && span.first <= span.last && span.last < WORDS * 64);
	assume(any >= span.first && any <= span.last && (pattern >> any % 64 & 1));

	any_set(&engine, &policy, &set);
	assume(has_bit(set.known, 0) && has_bit(set.known, 1));
	const uint32_t port = NAT_NTOH16(take_pattern(&engine, &set, &outside, span, pattern, UINT32_MAX));
	if (port == 0) {
		assert(has_bit(indexed, any) || has_bit(forwarded, any));
		assert(agrees(&set));
		return;
	}
	assert(port >= span.first && port <= span.last && (pattern >> port % 64 & 1));
	assert(!has_bit(indexed, port) && !has_bit(forwarded, port));
	set_bit(indexed, port); /* as the new session will */
	assert(agrees(&set));
}
