/* Zones, made ready for packets: by source, and by name.
 *
 * By source: two prefixes are apart, or one lies within the other. So the prefixes that zones name as
 * their source, each once, are a tree, and each lists its zones in the file's order, up to the first
 * without a destination. All boundaries cut the addresses into intervals; an interval knows the narrowest
 * prefix around it, and that one the next wider. A zone is listed once, whatever lies within its source:
 * memory and time to build are those of sorting the zones.
 *
 * By name: a zone is known by source and destination, in the table's header and from one policy to the
 * next. Of several with the same only the first can match.
 */
#include "policy.h"

#define ZONE_BITS  26u /* of a sort key; the length of a prefix needs six, its address 32 */
#define DEPTH_MAX  33u /* prefixes within each other, each narrower: /0 to /32 */
#define ADDRESSES  (UINT64_C(1) << 32)
#define KEY_OF_ALL ((UINT64_C(1) << ZONE_BITS) - 1)

/* ---- by source ---- */

static void sift_down(uint64_t *a, uint32_t root, uint32_t n)
{
	for (uint32_t child; (child = root * 2 + 1) < n; root = child) {
		if (child + 1 < n && a[child + 1] > a[child])
			child++;
		if (a[root] >= a[child])
			return;
		uint64_t swap = a[root];
		a[root] = a[child];
		a[child] = swap;
	}
}

static void sort(uint64_t *a, uint32_t n)
{
	for (uint32_t i = n / 2; i-- > 0;)
		sift_down(a, i, n);
	for (uint32_t end = n; end > 1;) {
		end--;
		uint64_t swap = a[0];
		a[0] = a[end];
		a[end] = swap;
		sift_down(a, 0, end);
	}
}

/* Wider prefixes before those within them, zones of one prefix in the file's order. */
static void sort_by_source(struct nat_policy *p)
{
	NAT_ASSERT(p->n_zones <= KEY_OF_ALL);
	for (uint32_t z = 0; z < p->n_zones; z++) {
		const struct nat_prefix *source = &p->zone[z].config.source;
		p->sorted[z] =
			(uint64_t)source->address << 32 | (uint64_t)source->length_bits << ZONE_BITS | z;
	}
	sort(p->sorted, p->n_zones);
}

static void begin_interval(struct nat_policy *p, uint32_t first, uint32_t source)
{
	if (p->n_intervals == 0 || p->interval[p->n_intervals - 1].first != first)
		p->n_intervals++;
	p->interval[p->n_intervals - 1] = (struct nat_interval){first, source, NAT_NO_ZONE, 0};
}

/* The prefixes around the address that the sweep has reached, widest first. */
struct around {
	uint32_t source[DEPTH_MAX], n;
	uint64_t end[DEPTH_MAX]; /* behind its last address */
};

static uint32_t narrowest(const struct around *around)
{
	return around->n ? around->source[around->n - 1] : NAT_NO_SOURCE;
}

/* Ends those that do not reach `first`. */
static void leave(struct nat_policy *p, struct around *around, uint64_t first)
{
	while (around->n && around->end[around->n - 1] <= first) {
		const uint64_t end = around->end[--around->n];
		if (end < ADDRESSES)
			begin_interval(p, (uint32_t)end, narrowest(around));
	}
}

/* Lists the zones of the prefix that begins in the sort at `at`; gives where the next one begins. */
static uint32_t list_zones(struct nat_policy *p, struct nat_source *source, uint32_t at)
{
	const uint64_t prefix = p->sorted[at] >> ZONE_BITS;
	bool settled = false;

	source->first_listed = p->n_listed;
	for (; at < p->n_zones && p->sorted[at] >> ZONE_BITS == prefix; at++) {
		const uint32_t zone = (uint32_t)(p->sorted[at] & KEY_OF_ALL);
		if (settled)
			continue; /* nothing behind the first without a destination can match */
		p->listed[p->n_listed++] = zone;
		settled = p->zone[zone].destination_mask == 0;
	}
	source->n_listed = p->n_listed - source->first_listed;
	return at;
}

/* The zone that every packet from there matches, if destinations do not matter. */
static uint32_t only_zone(const struct nat_policy *p, uint32_t source)
{
	uint32_t first = NAT_NO_ZONE, settles = NAT_NO_ZONE;

	for (; source != NAT_NO_SOURCE; source = p->source[source].wider) {
		const uint32_t *listed = p->listed + p->source[source].first_listed;
		const uint32_t last = listed[p->source[source].n_listed - 1];
		first = listed[0] < first ? listed[0] : first;
		if (p->zone[last].destination_mask == 0 && last < settles)
			settles = last;
	}
	return first == settles ? settles : NAT_NO_ZONE;
}

static void build_intervals(struct nat_policy *p)
{
	struct around around = {.n = 0};

	sort_by_source(p);
	begin_interval(p, 0, NAT_NO_SOURCE);
	for (uint32_t at = 0; at < p->n_zones;) {
		const struct nat_prefix prefix = p->zone[p->sorted[at] & KEY_OF_ALL].config.source;
		const uint32_t number = p->n_sources++;
		leave(p, &around, prefix.address);
		p->source[number].wider = narrowest(&around);
		at = list_zones(p, &p->source[number], at);
		NAT_ASSERT(around.n < DEPTH_MAX);
		around.source[around.n] = number;
		around.end[around.n++] = prefix.address + (ADDRESSES >> prefix.length_bits);
		begin_interval(p, prefix.address, number);
	}
	leave(p, &around, ADDRESSES);
	for (uint32_t i = 0; i < p->n_intervals; i++)
		p->interval[i].only = only_zone(p, p->interval[i].source);
	for (uint32_t top = 0, i = 0; top < 256; top++) {
		while (i + 1 < p->n_intervals && p->interval[i + 1].first <= top << 24)
			i++;
		p->interval_of[top] = i;
	}
	p->interval_of[256] = p->n_intervals - 1;
}

uint32_t nat_policy_zone_of(const struct nat_policy *p, const struct nat_interval *interval,
			    uint32_t destination)
{
	uint32_t best = NAT_NO_ZONE;

	for (uint32_t at = interval->source; at != NAT_NO_SOURCE; at = p->source[at].wider) {
		const struct nat_source *source = &p->source[at];
		const uint32_t *listed = p->listed + source->first_listed;
		for (uint32_t i = 0; i < source->n_listed && listed[i] < best; i++) {
			const struct nat_zone *zone = &p->zone[listed[i]];
			if (((destination ^ zone->config.destination.address) & zone->destination_mask) == 0)
				best = listed[i]; /* which ends the walk */
		}
	}
	return best;
}

/* ---- by name ---- */

static bool same_prefix(const struct nat_prefix *a, const struct nat_prefix *b)
{
	return a->address == b->address && a->length_bits == b->length_bits;
}

/* The slot of the zone with this name, or the empty one where it would be. */
static uint32_t slot_of(const struct nat_policy *p, const struct nat_prefix *source,
			const struct nat_prefix *destination)
{
	const uint64_t hash =
		nat_hash64(&p->address_key, (uint64_t)source->address << 32 | destination->address,
			   (uint64_t)source->length_bits << 8 | destination->length_bits);
	uint32_t at = (uint32_t)hash & (p->zone_slots - 1);

	for (; p->zone_slot[at] != 0; at = (at + 1) & (p->zone_slots - 1)) {
		const struct nat_zone_config *zone = &p->zone[p->zone_slot[at] - 1].config;
		if (same_prefix(&zone->source, source) && same_prefix(&zone->destination, destination))
			break;
	}
	return at;
}

uint32_t nat_policy_zone_named(const struct nat_policy *p, const struct nat_prefix *source,
			       const struct nat_prefix *destination)
{
	return p->zone_slot[slot_of(p, source, destination)] - 1; /* that of no zone is NAT_NO_ZONE */
}

/* What a packet of this zone gets is what it got before: the same pool, or the same refusal. */
static bool goes_on(const struct nat_policy *a, const struct nat_zone_config *x, const struct nat_policy *b,
		    const struct nat_zone_config *y)
{
	return x->action == y->action &&
	       (x->action != NAT_ACTION_POOL || strcmp(a->pool[x->pool].name, b->pool[y->pool].name) == 0);
}

static uint32_t zone_before(const struct nat_policy *p, uint32_t zone, const struct nat_policy *old)
{
	const struct nat_zone_config *config = &p->zone[zone].config;
	const uint32_t before = nat_policy_zone_named(old, &config->source, &config->destination);

	return before != NAT_NO_ZONE && goes_on(p, config, old, &old->zone[before].config) ? before
											   : NAT_NO_ZONE;
}

void nat_zones_inherit(struct nat_policy *policy, const struct nat_policy *old, uint32_t worker)
{
	struct nat_zone_note *to = policy->notes[worker].zone;
	const struct nat_zone_note *from = old->notes[worker].zone;

	for (uint32_t i = 0; i < policy->n_zones; i++) {
		const struct nat_zone_config *zone = &policy->zone[i].config;
		const uint32_t before =
			policy->previous == old ? policy->zone_before[i] : zone_before(policy, i, old);
		if (before == NAT_NO_ZONE)
			continue;
		to[i] = from[before];
		if (zone->action == NAT_ACTION_POOL && to[i].cursor >= policy->pool[zone->pool].n_order)
			to[i].cursor = 0;
	}
}

/* ---- building ---- */

static uint32_t mask_of(const struct nat_prefix *prefix)
{
	return prefix->length_bits == 0 ? 0 : UINT32_MAX << (32 - prefix->length_bits);
}

void nat_zones_build(struct nat_policy *p, const struct nat_zone_config *config)
{
	for (uint32_t z = 0; z < p->n_zones; z++) {
		struct nat_zone *zone = &p->zone[z];
		zone->config = config[z];
		zone->source_mask = mask_of(&zone->config.source);
		zone->destination_mask = mask_of(&zone->config.destination);
		zone->config.source.address &= zone->source_mask;
		zone->config.destination.address &= zone->destination_mask;
		p->has_pass_zone |= zone->config.action == NAT_ACTION_PASS;
		uint32_t *slot = &p->zone_slot[slot_of(p, &zone->config.source, &zone->config.destination)];
		if (*slot == 0)
			*slot = z + 1;
	}
	build_intervals(p);
	for (uint32_t z = 0; p->previous && z < p->n_zones; z++)
		p->zone_before[z] = zone_before(p, z, p->previous);
}
