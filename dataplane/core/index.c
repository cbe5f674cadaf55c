/* The cuckoo index of a worker. See session.h for the bucket. */
#include "session.h"

static uint32_t find_in(const struct nat_index *index, const struct nat_bucket *bucket, uint16_t tag,
			const struct nat_tuple *tuple)
{
	for (uint32_t ways = nat_bucket_ways(bucket, tag); ways; ways &= ways - 1) {
		uint32_t entry = bucket->entry[NAT_CTZ64(ways)];
		if ((entry & 1) == tuple->side && nat_session_holds(&index->record[entry >> 1], tuple))
			return entry >> 1;
	}
	return NAT_NO_RECORD;
}

uint32_t nat_index_find(const struct nat_index *index, const struct nat_tuple *tuple, uint64_t hash)
{
	const uint16_t tag = nat_index_tag(hash);
	const struct nat_bucket *bucket = nat_index_bucket(index, hash);
	uint32_t record = find_in(index, bucket, tag, tuple);

	if (record != NAT_NO_RECORD || NAT_LIKELY(bucket->strangers == 0))
		return record;
	uint32_t other = nat_index_alternate(index, (uint32_t)(bucket - index->bucket), tag);
	return find_in(index, &index->bucket[other], tag, tuple);
}

/* Takes the entry at `way` out of bucket `from` into its other bucket, which has room. */
static void displace(struct nat_index *index, uint32_t from, unsigned way)
{
	struct nat_bucket *source = &index->bucket[from];
	uint16_t tag = source->tag[way];
	uint32_t to = nat_index_alternate(index, from, tag);
	bool was_moved = source->moved >> way & 1;
	bool done = nat_bucket_put(&index->bucket[to], tag, source->entry[way], !was_moved);

	NAT_ASSERT(done);
	if (was_moved)
		index->bucket[to].strangers--;
	else
		source->strangers++;
	source->tag[way] = 0;
	source->moved = (uint16_t)(source->moved & ~(1u << way));
}

/* Breadth-first search for a bucket with room that is reached from `start` by the fewest displacements;
 * performs them, so that one of the two starting buckets has room. */
static bool make_room(struct nat_index *index, uint32_t first, uint32_t second)
{
	enum { QUEUE = 512 };
	struct {
		uint32_t bucket;
		uint16_t parent;
		uint8_t way; /* of the parent's entry that leads here */
	} node[QUEUE];
	uint32_t n = 0;

	node[n].bucket = first;
	node[n++].parent = QUEUE;
	node[n].bucket = second;
	node[n++].parent = QUEUE;
	for (uint32_t i = 0; i < n; i++) {
		const struct nat_bucket *bucket = &index->bucket[node[i].bucket];
		for (unsigned way = 0; way < NAT_WAYS && n < QUEUE; way++) {
			uint32_t next = nat_index_alternate(index, node[i].bucket, bucket->tag[way]);
			/* A bucket twice on one path would be emptied under our feet. */
			bool twice = false;
			for (uint32_t k = i; k != QUEUE; k = node[k].parent)
				twice |= node[k].bucket == next;
			if (twice)
				continue;
			if (nat_bucket_ways(&index->bucket[next], 0)) {
				displace(index, node[i].bucket, way);
				for (uint32_t k = i; node[k].parent != QUEUE; k = node[k].parent)
					displace(index, node[node[k].parent].bucket, node[k].way);
				return true;
			}
			node[n].bucket = next;
			node[n].parent = (uint16_t)i;
			node[n++].way = (uint8_t)way;
		}
	}
	return false;
}

bool nat_index_insert(struct nat_index *index, uint64_t hash, uint32_t record, uint8_t side)
{
	const uint16_t tag = nat_index_tag(hash);
	struct nat_bucket *bucket = nat_index_bucket(index, hash);
	const uint32_t entry = record << 1 | side, number = (uint32_t)(bucket - index->bucket);

	if (nat_bucket_put(bucket, tag, entry, false))
		return true;
	const uint32_t other = nat_index_alternate(index, number, tag);
	for (int attempt = 0; attempt < 2; attempt++) {
		if (nat_bucket_put(bucket, tag, entry, false))
			return true;
		if (other != number && nat_bucket_put(&index->bucket[other], tag, entry, true)) {
			bucket->strangers++;
			return true;
		}
		if (attempt == 0 && !make_room(index, number, other))
			return false;
	}
	return false;
}

static bool take(struct nat_bucket *bucket, uint16_t tag, uint32_t entry)
{
	for (uint32_t ways = nat_bucket_ways(bucket, tag); ways; ways &= ways - 1) {
		unsigned way = NAT_CTZ64(ways);
		if (bucket->entry[way] != entry)
			continue;
		bucket->tag[way] = 0;
		bucket->moved = (uint16_t)(bucket->moved & ~(1u << way));
		return true;
	}
	return false;
}

void nat_index_remove(struct nat_index *index, uint64_t hash, uint32_t record, uint8_t side)
{
	const uint16_t tag = nat_index_tag(hash);
	struct nat_bucket *bucket = nat_index_bucket(index, hash);
	const uint32_t entry = record << 1 | side;

	if (take(bucket, tag, entry))
		return;
	bool found = take(&index->bucket[nat_index_alternate(index, (uint32_t)(bucket - index->bucket), tag)],
			  tag, entry);
	NAT_ASSERT(found);
	bucket->strangers--;
}
