/* The index: which ways of a bucket fit a tag, and where an entry's other bucket is.
 *
 * The lanes are compared by nat_equal_lanes() as C17 has it; that the SSE2 form gives the same is
 * core/index_test.c's to show. */
#undef __SSE2__
#include "proof.h"

/* The sum of an entry's two buckets: any number below n, the same for one tag. */
#include "../core/hash.h"
static uint32_t sum_of_tag;
#define nat_scale32(x, n) sum_of_tag

#include "../core/index.c"

/* Claim: nat_bucket_ways() has the bit of a way exactly where the way's tag is the one that is sought.
 * For: every bucket and every tag, 0 (empty ways) included.
 * cbmc: --unwind 17 */
void proof_ways_of_a_bucket(void)
{
	struct nat_bucket bucket;
	const uint16_t tag = nondet_u16();
	uint32_t expected = 0;

	for (uint32_t way = 0; way < NAT_WAYS; way++) {
		bucket.tag[way] = nondet_u16();
		expected |= (uint32_t)(bucket.tag[way] == tag) << way;
	}
	bucket.strangers = nondet_u16(); /* they lie in the same words as tags */
	bucket.moved = nondet_u16();
	assert(nat_bucket_ways(&bucket, tag) == expected);
}

/* Claim: no entry's tag is the one of an empty way.
 * For: every hash.
 * cbmc: */
void proof_tag_is_never_empty(void)
{
	assert(nat_index_tag(nondet_u64()) != 0);
}

/* Claim: the alternate of the alternate is where one began, and both are buckets of the index.
 * For: every tag, every bucket and every number of buckets.
 * cbmc: */
void proof_alternate_is_an_involution(void)
{
	struct nat_index index = {.n_buckets = nondet_u32()};
	const uint32_t bucket = nondet_u32();
	const uint16_t tag = nondet_u16();

	sum_of_tag = nondet_u32();
	assume(bucket < index.n_buckets && sum_of_tag < index.n_buckets);
	const uint32_t other = nat_index_alternate(&index, bucket, tag);
	assert(other < index.n_buckets && nat_index_alternate(&index, other, tag) == bucket);
}

/* Claim: an entry that is put into a bucket is found there, no other entry moves, and a full bucket refuses.
 * For: every bucket, tag and entry.
 * cbmc: --unwind 17 */
void proof_put(void)
{
	struct nat_bucket bucket, before;
	const uint16_t tag = nondet_u16();
	const uint32_t entry = nondet_u32(), way = nondet_u32();
	const bool moved = nondet_bool();
	assume(tag != 0 && way < NAT_WAYS);

	before = bucket;
	const bool had_room = nat_bucket_ways(&before, 0) != 0;
	assert(nat_bucket_put(&bucket, tag, entry, moved) == had_room);
	const bool same = bucket.tag[way] == before.tag[way] && bucket.entry[way] == before.entry[way] &&
			  (bucket.moved >> way & 1) == (before.moved >> way & 1);
	const bool is_it = before.tag[way] == 0 && bucket.tag[way] == tag && bucket.entry[way] == entry &&
			   (bucket.moved >> way & 1) == moved;
	assert(same || (had_room && is_it));
	assert(bucket.strangers == before.strangers);
	uint32_t changed = 0;
	for (uint32_t i = 0; i < NAT_WAYS; i++)
		changed += bucket.tag[i] != before.tag[i];
	assert(changed == had_room);
}

/* Claim: an entry that is taken out is gone, once, and no other entry is touched.
 * For: every bucket, tag and entry.
 * cbmc: --unwind 17 */
void proof_take(void)
{
	struct nat_bucket bucket, before;
	const uint16_t tag = nondet_u16();
	const uint32_t entry = nondet_u32(), way = nondet_u32();
	assume(tag != 0 && way < NAT_WAYS);

	before = bucket;
	bool was_there = false;
	for (uint32_t i = 0; i < NAT_WAYS; i++)
		was_there |= before.tag[i] == tag && before.entry[i] == entry;
	assert(take(&bucket, tag, entry) == was_there);
	const bool same = bucket.tag[way] == before.tag[way] && bucket.entry[way] == before.entry[way] &&
			  (bucket.moved >> way & 1) == (before.moved >> way & 1);
	assert(same || (before.tag[way] == tag && before.entry[way] == entry && bucket.tag[way] == 0 &&
			(bucket.moved >> way & 1) == 0));
	uint32_t changed = 0;
	for (uint32_t i = 0; i < NAT_WAYS; i++)
		changed += bucket.tag[i] != before.tag[i];
	assert(changed == was_there);
}

/* Claim: a displaced entry stands in its other bucket, marked as moved or no longer so, the strangers of its
 * first bucket are counted, and so a look-up still comes by.
 * For: every content of an index of 3 buckets.
 * cbmc: --unwind 17 */
void proof_displace(void)
{
	struct nat_bucket bucket[3], before[3];
	struct nat_index index = {.bucket = bucket, .n_buckets = 3};
	const uint32_t from = nondet_u32(), way = nondet_u32();
	sum_of_tag = nondet_u32();
	assume(from < 3 && way < NAT_WAYS && sum_of_tag < 3);
	memcpy(before, bucket, sizeof(before));
	const uint16_t tag = bucket[from].tag[way];
	const uint32_t entry = bucket[from].entry[way], to = nat_index_alternate(&index, from, tag);
	assume(tag != 0 && to != from && nat_bucket_ways(&bucket[to], 0) != 0);
	const bool was_moved = bucket[from].moved >> way & 1;
	const uint32_t first = was_moved ? to : from; /* the bucket of its hash */
	assume(was_moved ? bucket[first].strangers > 0 : bucket[first].strangers < UINT16_MAX);
	displace(&index, from, way);
	assert(bucket[from].tag[way] == 0);
	assert(bucket[first].strangers == before[first].strangers + (was_moved ? -1 : 1));
	bool stands = false;
	for (uint32_t i = 0; i < NAT_WAYS; i++)
		stands |= bucket[to].tag[i] == tag && bucket[to].entry[i] == entry &&
			  (bucket[to].moved >> i & 1) == !was_moved && before[to].tag[i] == 0;
	assert(stands);
}
