/* The cuckoo index of a worker. See session.h for the bucket. */
#include <string.h>

#include "session.h"

#define LANES_LOW  UINT64_C(0x7fff7fff7fff7fff)
#define LANES_HIGH UINT64_C(0x8000800080008000)
#define LANE_ONES  UINT64_C(0x0001000100010001)

/* One bit (the lane's highest) per 16-bit lane of `word` that equals `tag`; exact for every lane. */
static inline uint64_t equal_lanes(uint64_t word, uint16_t tag)
{
	uint64_t x = word ^ (LANE_ONES * tag);
	return ~(((x & LANES_LOW) + LANES_LOW) | x) & LANES_HIGH;
}

/* One bit per way, at bit 0 to 9. */
static inline uint32_t matching_ways(const struct nat_bucket *bucket, uint16_t tag)
{
	uint64_t word[3];
	memcpy(word, bucket, sizeof(word));
	/* A multiplication gathers the lanes' bits 0, 16, 32, 48 at 48 to 51; no two of its terms meet. */
	const uint64_t gather = UINT64_C(1) << 48 | UINT64_C(1) << 33 | UINT64_C(1) << 18 | UINT64_C(1) << 3;
	uint32_t ways = (uint32_t)(((equal_lanes(word[0], tag) >> 15) * gather) >> 48) & 0xf;
	ways |= ((uint32_t)(((equal_lanes(word[1], tag) >> 15) * gather) >> 48) & 0xf) << 4;
	ways |= ((uint32_t)(((equal_lanes(word[2], tag) >> 15) * gather) >> 48) & 0x3) << 8;
	return ways;
}

static inline uint32_t alternate(const struct nat_index *index, uint32_t bucket, uint16_t tag)
{
	uint32_t sum = nat_scale32(tag * UINT32_C(0x9e3779b1), index->n_buckets);
	return sum >= bucket ? sum - bucket : sum - bucket + index->n_buckets;
}

static inline bool holds(const struct nat_session *s, const struct nat_tuple *tuple)
{
	if (tuple->side == 0)
		return memcmp(&s->inside, tuple, sizeof(*tuple)) == 0;
	return s->out_addr_be == tuple->local_be && s->out_port_be == tuple->local_port_be &&
	       s->inside.remote_be == tuple->remote_be && s->inside.remote_port_be == tuple->remote_port_be &&
	       s->inside.protocol == tuple->protocol && s->inside.zero[0] == tuple->zero[0];
}

static uint32_t find_in(const struct nat_index *index, const struct nat_bucket *bucket, uint16_t tag,
			const struct nat_tuple *tuple)
{
	for (uint32_t ways = matching_ways(bucket, tag); ways; ways &= ways - 1) {
		uint32_t entry = bucket->entry[NAT_CTZ64(ways)];
		if ((entry & 1) == tuple->side && holds(&index->record[entry >> 1], tuple))
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
	uint32_t other = alternate(index, (uint32_t)(bucket - index->bucket), tag);
	return find_in(index, &index->bucket[other], tag, tuple);
}

uint32_t nat_index_guess(const struct nat_index *index, uint64_t hash)
{
	const struct nat_bucket *bucket = nat_index_bucket(index, hash);
	uint32_t ways = matching_ways(bucket, nat_index_tag(hash));
	return ways ? bucket->entry[NAT_CTZ64(ways)] >> 1 : NAT_NO_RECORD;
}

static bool put(struct nat_bucket *bucket, uint16_t tag, uint32_t entry, bool moved)
{
	uint32_t empty = matching_ways(bucket, 0);
	if (!empty)
		return false;
	unsigned way = NAT_CTZ64(empty);
	bucket->entry[way] = entry;
	bucket->tag[way] = tag;
	bucket->moved = (uint16_t)((bucket->moved & ~(1u << way)) | (unsigned)moved << way);
	return true;
}

/* Takes the entry at `way` out of bucket `from` into its other bucket, which has room. */
static void displace(struct nat_index *index, uint32_t from, unsigned way)
{
	struct nat_bucket *source = &index->bucket[from];
	uint16_t tag = source->tag[way];
	uint32_t to = alternate(index, from, tag);
	bool was_moved = source->moved >> way & 1;
	bool done = put(&index->bucket[to], tag, source->entry[way], !was_moved);

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
			uint32_t next = alternate(index, node[i].bucket, bucket->tag[way]);
			/* A bucket twice on one path would be emptied under our feet. */
			bool twice = false;
			for (uint32_t k = i; k != QUEUE; k = node[k].parent)
				twice |= node[k].bucket == next;
			if (twice)
				continue;
			if (matching_ways(&index->bucket[next], 0)) {
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

	if (put(bucket, tag, entry, false))
		return true;
	const uint32_t other = alternate(index, number, tag);
	for (int attempt = 0; attempt < 2; attempt++) {
		if (put(bucket, tag, entry, false))
			return true;
		if (other != number && put(&index->bucket[other], tag, entry, true)) {
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
	for (uint32_t ways = matching_ways(bucket, tag); ways; ways &= ways - 1) {
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
	bool found =
		take(&index->bucket[alternate(index, (uint32_t)(bucket - index->bucket), tag)], tag, entry);
	NAT_ASSERT(found);
	bucket->strangers--;
}
