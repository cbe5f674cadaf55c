/* What must hold between the objects of dsnatd.yaml: nothing named twice, no address in two pools, no zone
 * that can never match.
 *
 * Every rule costs at most n log n, because a file may hold a million addresses and 65535 zones. Errors stand
 * at the later of the two places and name the earlier one.
 */
#include <stdlib.h>
#include <string.h>

#include "config_internal.h"

const char *config_martian(struct nat_range range)
{
	static const struct {
		struct nat_range range;
		const char *what;
	} martians[] = {
		{{0x00000000, 0x00ffffff}, "an address of 0.0.0.0/8 (\"this network\")"},
		{{0x7f000000, 0x7fffffff}, "a loopback address"},
		{{0xa9fe0000, 0xa9feffff}, "a link-local address"},
		{{0xe0000000, 0xefffffff}, "a multicast address"},
		{{0xf0000000, 0xffffffff}, "a reserved or broadcast address"},
	};

	for (size_t i = 0; i < sizeof(martians) / sizeof(martians[0]); i++)
		if (range.first <= martians[i].range.last && range.last >= martians[i].range.first)
			return martians[i].what;
	return NULL;
}

static bool is_later(const struct node *a, const struct node *b)
{
	return a->line != b->line ? a->line > b->line : a->column > b->column;
}

/* ---- names ---- */

struct named {
	const char *name;
	const struct node *at;
};

static int by_name(const void *a, const void *b)
{
	const struct named *x = a, *y = b;
	int order = strcmp(x->name, y->name);

	return order ? order : is_later(x->at, y->at) - is_later(y->at, x->at);
}

static void no_name_twice(struct config *config, struct named *names, uint32_t n, const char *what)
{
	qsort(names, n, sizeof(*names), by_name);
	for (uint32_t i = 1; i < n; i++)
		if (names[i].name[0] && !strcmp(names[i].name, names[i - 1].name))
			config_error(config, names[i].at, "%s %s is there twice (first in line %u); %s", what,
				     config_shown(config, names[i].name), names[i - 1].at->line,
				     !strcmp(what, "device")
					     ? "give each interface its own, or a vlan of its own"
					     : "rename one");
}

/* Interfaces may share a device when their frames have different tags. */
static const char *device_and_vlan(struct config *config, const struct nat_interface_config *i)
{
	size_t bytes = sizeof(i->device) + sizeof(" vlan 4094");
	char *text;

	if (!i->vlan || !i->device[0])
		return i->device;
	text = config_take(config, (uint32_t)bytes, 1);
	snprintf(text, bytes, "%s vlan %u", i->device, i->vlan);
	return text;
}

static void names(struct config *config, const struct places *places)
{
	const struct nat_config *nat = &config->nat;
	uint32_t most = nat->n_interfaces > nat->n_pools ? nat->n_interfaces : nat->n_pools;
	struct named *list = config_take(config, most, sizeof(*list));

	for (uint32_t i = 0; i < nat->n_interfaces; i++)
		list[i] = (struct named){nat->interfaces[i].name, places->interface[i]};
	no_name_twice(config, list, nat->n_interfaces, "interface");
	for (uint32_t i = 0; i < nat->n_interfaces; i++)
		list[i] = (struct named){device_and_vlan(config, &nat->interfaces[i]), places->interface[i]};
	no_name_twice(config, list, nat->n_interfaces, "device");
	for (uint32_t i = 0; i < nat->n_pools; i++)
		list[i] = (struct named){nat->pools[i].name, places->pool[i].pool};
	no_name_twice(config, list, nat->n_pools, "pool");
}

/* ---- addresses ---- */

struct owned {
	struct nat_range range;
	const struct node *at;
	uint32_t pool;
};

static int by_first(const void *a, const void *b)
{
	const struct owned *x = a, *y = b;

	if (x->range.first != y->range.first)
		return x->range.first < y->range.first ? -1 : 1;
	if (x->range.last != y->range.last)
		return x->range.last < y->range.last ? -1 : 1;
	return is_later(x->at, y->at) - is_later(y->at, x->at);
}

static void complain_overlap(struct config *config, const struct owned *a, const struct owned *b)
{
	const struct owned *early = is_later(a->at, b->at) ? b : a, *late = early == a ? b : a;
	struct nat_range both = {a->range.first > b->range.first ? a->range.first : b->range.first,
				 a->range.last < b->range.last ? a->range.last : b->range.last};
	const char *shown = config_shown_range(config, both);

	if (a->pool == b->pool)
		config_error(config, late->at, "pool %s lists %s twice (first at %u:%u); keep one",
			     config_shown(config, config->nat.pools[a->pool].name), shown, early->at->line,
			     early->at->column);
	else
		config_error(config, late->at,
			     "pools %s and %s both own %s (first at %u:%u); give each address to one pool",
			     config_shown(config, config->nat.pools[early->pool].name),
			     config_shown(config, config->nat.pools[late->pool].name), shown, early->at->line,
			     early->at->column);
}

/* All ranges of all pools, sorted. */
static struct owned *sorted_ranges(struct config *config, const struct places *places, uint32_t *count)
{
	uint32_t n = 0;
	struct owned *list;

	for (uint32_t i = 0; i < config->nat.n_pools; i++)
		n += config->nat.pools[i].n_ranges;
	list = config_take(config, n, sizeof(*list));
	*count = n;
	n = 0;
	for (uint32_t i = 0; i < config->nat.n_pools; i++)
		for (uint32_t j = 0; j < config->nat.pools[i].n_ranges; j++)
			list[n++] =
				(struct owned){config->nat.pools[i].ranges[j], places->pool[i].range[j], i};
	qsort(list, n, sizeof(*list), by_first);
	return list;
}

/* Each range is compared with the one before it that reaches furthest: every overlap shows up at least once.
 */
static void no_address_twice(struct config *config, const struct owned *list, uint32_t n)
{
	uint32_t furthest = 0;

	for (uint32_t i = 1; i < n; i++) {
		if (list[i].range.first <= list[furthest].range.last)
			complain_overlap(config, &list[furthest], &list[i]);
		if (list[i].range.last > list[furthest].range.last)
			furthest = i;
	}
}

static void not_too_many(struct config *config, const struct places *places)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < config->nat.n_pools; i++) {
		const struct nat_pool_config *pool = &config->nat.pools[i];

		for (uint32_t j = 0; j < pool->n_ranges; j++) {
			uint64_t before = sum;

			sum += (uint64_t)pool->ranges[j].last - pool->ranges[j].first + 1;
			if (before <= CONFIG_ADDRESSES_MAX && sum > CONFIG_ADDRESSES_MAX)
				config_error(config, places->pool[i].range[j],
					     "with this range the pools hold more than %u addresses, which "
					     "is the limit; shorten it",
					     CONFIG_ADDRESSES_MAX);
		}
	}
}

/* The sorted range that holds `address`, or NULL. Only meaningful when no two overlap. */
static const struct owned *owner_of(const struct owned *list, uint32_t n, uint32_t address)
{
	uint32_t low = 0, high = n;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (list[middle].range.last < address)
			low = middle + 1;
		else
			high = middle;
	}
	return low < n && list[low].range.first <= address ? &list[low] : NULL;
}

/* Does the pool own every address of the range? */
static bool pool_owns(const struct owned *list, uint32_t n, uint32_t pool, struct nat_range range)
{
	uint64_t address = range.first;

	while (address <= range.last) {
		const struct owned *owner = owner_of(list, n, (uint32_t)address);

		if (!owner || owner->pool != pool)
			return false;
		address = (uint64_t)owner->range.last + 1;
	}
	return true;
}

static uint64_t addresses_in(const struct nat_range *ranges, uint32_t n)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < n; i++)
		sum += (uint64_t)ranges[i].last - ranges[i].first + 1;
	return sum;
}

static void drains(struct config *config, const struct places *places, const struct owned *list, uint32_t n)
{
	for (uint32_t i = 0; i < config->nat.n_pools; i++) {
		const struct nat_pool_config *pool = &config->nat.pools[i];
		bool all_ours = true;

		for (uint32_t j = 0; j < pool->n_drain; j++) {
			if (pool_owns(list, n, i, pool->drain[j]))
				continue;
			all_ours = false;
			config_error(config, places->pool[i].drain[j],
				     "%s drains but is not in the addresses of pool %s; keep it there while "
				     "it drains",
				     config_shown_range(config, pool->drain[j]),
				     config_shown(config, pool->name));
		}
		if (all_ours && pool->n_drain &&
		    addresses_in(pool->drain, pool->n_drain) >= addresses_in(pool->ranges, pool->n_ranges))
			config_warning(config, places->pool[i].pool,
				       "every address of pool %s drains, so it takes no new session; add an "
				       "address that does not",
				       config_shown(config, pool->name));
	}
}

/* The VRRP address is the gateway's own: BGP, ping and SSH to it must not end in a pool. */
static void own_addresses(struct config *config, const struct places *places, const struct owned *list,
			  uint32_t n)
{
	for (uint32_t i = 0; i < config->nat.n_pools; i++) {
		uint32_t address = __builtin_bswap32(config->nat.pools[i].active_while_be);
		const struct owned *owner;

		if (!places->pool[i].active_while)
			continue;
		owner = owner_of(list, n, address);
		if (owner)
			config_error(config, owner->at,
				     "pool %s covers %s, which is the gateway's own address (active_while at "
				     "%u:%u); take it out of the pool",
				     config_shown(config, config->nat.pools[owner->pool].name),
				     config_shown_address(config, address),
				     places->pool[i].active_while->line,
				     places->pool[i].active_while->column);
	}
}

/* Our own records must not come back to us as packets for a session. */
static void collectors(struct config *config, const struct places *places, const struct owned *list,
		       uint32_t n)
{
	for (uint32_t i = 0; i < config->n_collectors; i++) {
		const struct owned *owner = owner_of(list, n, config->collectors[i].address);

		if (owner)
			config_error(config, places->collector[i],
				     "the collector %s is an address of pool %s; no collector can be there",
				     config_shown_address(config, config->collectors[i].address),
				     config_shown(config, config->nat.pools[owner->pool].name));
	}
}

/* ---- zones ---- */

/* A zone is shadowed when an earlier one has a source and a destination that both contain its own. Earlier
 * zones lie in a hash table under (source, destination); one look-up per pair of prefix lengths in use finds
 * the container. */
struct shadow {
	uint32_t *slot; /* zone number + 1, 0: empty */
	uint32_t mask;
	uint64_t lengths[33]; /* lengths[source] has bit d: a zone with these two lengths is in the table */
};

static uint32_t cut(uint32_t address, unsigned length_bits)
{
	return length_bits ? address & UINT32_MAX << (32 - length_bits) : 0;
}

static uint32_t hash_of(uint32_t source, unsigned source_bits, uint32_t destination,
			unsigned destination_bits)
{
	uint64_t h = ((uint64_t)source << 32 | destination) ^ (uint64_t)(source_bits * 64 + destination_bits)
								      << 7;

	h *= 0x9e3779b97f4a7c15u;
	h ^= h >> 29;
	h *= 0xbf58476d1ce4e5b9u;
	return (uint32_t)(h >> 32);
}

/* The slot of the zone with exactly these prefixes, or the empty one where it belongs. */
static uint32_t *find_slot(const struct shadow *s, const struct nat_zone_config *zones,
			   struct nat_prefix source, struct nat_prefix destination)
{
	uint32_t i =
		hash_of(source.address, source.length_bits, destination.address, destination.length_bits);

	for (;; i++) {
		uint32_t *slot = &s->slot[i & s->mask];
		const struct nat_zone_config *zone = &zones[*slot ? *slot - 1 : 0];

		if (!*slot || (zone->source.address == source.address &&
			       zone->source.length_bits == source.length_bits &&
			       zone->destination.address == destination.address &&
			       zone->destination.length_bits == destination.length_bits))
			return slot;
	}
}

/* The earliest zone that contains this one, or 0 for none; the number is its index + 1. */
static uint32_t container_of_zone(const struct shadow *s, const struct nat_zone_config *zones,
				  const struct nat_zone_config *zone)
{
	uint32_t earliest = 0;

	for (uint8_t from = 0; from <= zone->source.length_bits; from++) {
		for (uint8_t to = 0; to <= zone->destination.length_bits; to++) {
			struct nat_prefix source = {cut(zone->source.address, from), from};
			struct nat_prefix destination = {cut(zone->destination.address, to), to};
			uint32_t found;

			if (!(s->lengths[from] >> to & 1))
				continue;
			found = *find_slot(s, zones, source, destination);
			if (found && (!earliest || found < earliest))
				earliest = found;
		}
	}
	return earliest;
}

static void shadowed_zones(struct config *config, const struct places *places)
{
	const struct nat_zone_config *zones = config->nat.zones;
	uint32_t n = config->nat.n_zones, size = 16;
	struct shadow s = {0};

	while (size < n * 2)
		size *= 2;
	s.slot = config_take(config, size, sizeof(*s.slot));
	s.mask = size - 1;
	for (uint32_t i = 0; i < n; i++) {
		uint32_t container = container_of_zone(&s, zones, &zones[i]);

		if (container) {
			config_warning(config, places->zone[i],
				       "this zone never matches, the zone in line %u takes all its packets; "
				       "move it up or remove it",
				       places->zone[container - 1]->line);
			continue; /* what it would shadow, its container shadows too */
		}
		*find_slot(&s, zones, zones[i].source, zones[i].destination) = i + 1;
		s.lengths[zones[i].source.length_bits] |= UINT64_C(1) << zones[i].destination.length_bits;
	}
}

/* A packet whose source is a pool address is dropped as spoofed, so such hosts get no service. */
static void zones_and_pools(struct config *config, const struct places *places, const struct owned *list,
			    uint32_t n)
{
	for (uint32_t i = 0; i < config->nat.n_zones; i++) {
		const struct nat_zone_config *zone = &config->nat.zones[i];
		uint32_t first = zone->source.address, last;
		const struct owned *owner;
		const char *martian;

		if (zone->source.length_bits < 8)
			continue; /* "everybody" is not meant to name pool addresses */
		last = first | (zone->source.length_bits < 32 ? UINT32_MAX >> zone->source.length_bits : 0);
		martian = config_martian((struct nat_range){first, last});
		if (martian)
			config_warning(
				config, places->zone[i],
				"the source holds %s, and such packets are always dropped; remove the zone",
				martian);
		owner = owner_of(list, n, first);
		if (!owner)
			for (uint32_t low = 0, high = n; low < high;) { /* the first range behind `first` */
				uint32_t middle = low + (high - low) / 2;

				if (list[middle].range.first < first) {
					low = middle + 1;
				} else {
					high = middle;
					owner = list[middle].range.first <= last ? &list[middle] : NULL;
				}
			}
		if (owner && zone->action == NAT_ACTION_POOL)
			config_warning(config, places->zone[i],
				       "the source holds addresses of pool %s, and packets from those are "
				       "dropped as spoofed; shorten the source",
				       config_shown(config, config->nat.pools[owner->pool].name));
	}
}

static void unused_pools(struct config *config, const struct places *places)
{
	bool *used = config_take(config, config->nat.n_pools, sizeof(*used));

	for (uint32_t i = 0; i < config->nat.n_zones; i++)
		if (config->nat.zones[i].action == NAT_ACTION_POOL &&
		    config->nat.zones[i].pool < config->nat.n_pools)
			used[config->nat.zones[i].pool] = true;
	for (uint32_t i = 0; i < config->nat.n_pools; i++)
		if (!used[i] && config->nat.pools[i].name[0])
			config_warning(config, places->pool[i].pool,
				       "no zone uses pool %s; add a zone with \"pool: %s\"",
				       config_shown(config, config->nat.pools[i].name),
				       config->nat.pools[i].name);
}

/* ---- static mappings ---- */

static bool same_or_whole(const struct nat_static_config *a, const struct nat_static_config *b)
{
	return a->outside_port == 0 || b->outside_port == 0 ||
	       (a->outside_port == b->outside_port && a->protocol == b->protocol);
}

static void statics(struct config *config, const struct places *places, const struct owned *list, uint32_t n)
{
	const struct nat_static_config *all = config->nat.statics;

	for (uint32_t i = 0; i < config->nat.n_statics; i++) {
		if (!owner_of(list, n, all[i].outside))
			config_error(config, places->statics[i],
				     "no pool holds %s; add it to the addresses of a pool, whose VRRP "
				     "address and ARP then "
				     "count for it",
				     config_shown_address(config, all[i].outside));
		if (owner_of(list, n, all[i].inside))
			config_error(config, places->statics[i],
				     "%s is a pool's address; \"inside\" is the host's own",
				     config_shown_address(config, all[i].inside));
		for (uint32_t j = 0; j < i && !config_is_full(config); j++) {
			if (all[i].outside == all[j].outside && same_or_whole(&all[i], &all[j]))
				config_error(config, places->statics[i],
					     "this outside address and port are given away already at %u:%u; "
					     "remove one of "
					     "the two",
					     places->statics[j]->line, places->statics[j]->column);
			else if (all[i].inside == all[j].inside && all[i].outside_port == 0 &&
				 all[j].outside_port == 0)
				config_error(config, places->statics[i],
					     "the host has an address of its own already at %u:%u; remove "
					     "one of the two",
					     places->statics[j]->line, places->statics[j]->column);
		}
	}
}

/* ---- all of it ---- */

static void both_sides(struct config *config, const struct places *places)
{
	uint32_t sides[2] = {0, 0};

	if (!places->interfaces_good)
		return; /* the one that is missing may be the one that could not be read */
	for (uint32_t i = 0; i < config->nat.n_interfaces; i++)
		sides[config->nat.interfaces[i].role]++;
	if (!sides[NAT_ROLE_INSIDE])
		config_error(config, places->root,
			     "no interface has role inside; add the one that the hosts are behind");
	if (!sides[NAT_ROLE_OUTSIDE])
		config_error(config, places->root,
			     "no interface has role outside; add the one that leads to the Internet");
}

void config_rules(struct config *config, const struct places *places)
{
	bool whole = config->n_errors == 0;
	struct owned *list;
	uint32_t n;

	if (!places->root)
		return;
	both_sides(config, places);
	names(config, places);
	list = sorted_ranges(config, places, &n);
	no_address_twice(config, list, n);
	not_too_many(config, places);
	drains(config, places, list, n);
	own_addresses(config, places, list, n);
	collectors(config, places, list, n);
	shadowed_zones(config, places);
	zones_and_pools(config, places, list, n);
	statics(config, places, list, n);
	if (!whole)
		return; /* a zone that could not be read may be the one that uses the pool */
	unused_pools(config, places);
	if (!config->nat.n_zones)
		config_warning(config, places->root,
			       "there is no zone, so every packet from inside is dropped; add one");
}
