/* The index finds what was put in and nothing else, as full as it gets, after any mix of insertions and
 * removals. */
#include <assert.h>

#include "testbed.h"

enum { RECORDS = 40000 };

static struct nat_tuple tuple_of(uint32_t i)
{
	return (struct nat_tuple){.local_be = i * 2654435761u,
				  .remote_be = i,
				  .local_port_be = (uint16_t)i,
				  .remote_port_be = 80,
				  .protocol = NAT_PROTO_TCP};
}

static void put(struct nat_index *index, uint32_t i)
{
	struct nat_session *s = &index->record[i];
	s->inside = tuple_of(i);
	s->out_addr_be = ~s->inside.local_be;
	s->out_port_be = (uint16_t)~s->inside.local_port_be;
	struct nat_tuple outside = nat_session_outside(s);
	assert(nat_index_insert(index, nat_tuple_hash(&index->key, &s->inside), i, 0));
	assert(nat_index_insert(index, nat_tuple_hash(&index->key, &outside), i, 1));
}

static void check(const struct nat_index *index, uint32_t i, bool there)
{
	struct nat_tuple inside = tuple_of(i), outside = nat_session_outside(&index->record[i]);
	assert(nat_index_find(index, &inside, nat_tuple_hash(&index->key, &inside)) ==
	       (there ? i : NAT_NO_RECORD));
	assert(nat_index_find(index, &outside, nat_tuple_hash(&index->key, &outside)) ==
	       (there ? i : NAT_NO_RECORD));
}

int main(void)
{
	struct nat_index index = {.n_buckets = (uint32_t)nat_index_buckets(RECORDS),
				  .key = nat_key_from_seed(1, 'i')};
	index.bucket = testbed_memory(index.n_buckets * sizeof(struct nat_bucket));
	index.record = testbed_memory(RECORDS * sizeof(struct nat_session));
	struct nat_random random = {nat_key_from_seed(2, 't'), 0};
	static bool there[RECORDS];

	for (uint32_t i = 0; i < RECORDS; i++) {
		put(&index, i);
		there[i] = true;
	}
	for (uint32_t round = 0; round < 200000; round++) {
		uint32_t i = (uint32_t)nat_random_next(&random) % RECORDS;
		if (there[i]) {
			struct nat_tuple outside = nat_session_outside(&index.record[i]);
			nat_index_remove(&index, nat_tuple_hash(&index.key, &index.record[i].inside), i, 0);
			nat_index_remove(&index, nat_tuple_hash(&index.key, &outside), i, 1);
		} else {
			put(&index, i);
		}
		there[i] = !there[i];
		check(&index, i, there[i]);
	}
	uint64_t strangers = 0, moved = 0, used = 0;
	for (uint32_t i = 0; i < RECORDS; i++)
		check(&index, i, there[i]);
	for (uint32_t b = 0; b < index.n_buckets; b++) {
		strangers += index.bucket[b].strangers;
		for (unsigned way = 0; way < NAT_WAYS; way++) {
			used += index.bucket[b].tag[way] != 0;
			moved += index.bucket[b].moved >> way & 1;
			assert(index.bucket[b].tag[way] != 0 || !(index.bucket[b].moved >> way & 1));
		}
	}
	assert(strangers == moved); /* every entry away from home is known at home */
	for (uint32_t i = 0; i < RECORDS; i++)
		used -= there[i] ? 2 : 0;
	assert(used == 0);
	free(index.bucket);
	free(index.record);
	return 0;
}
