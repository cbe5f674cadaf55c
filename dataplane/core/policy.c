/* Builds a policy in one piece of memory, and answers its look-ups. See policy.h. */
#include "policy.h"

#include <string.h>

#include "workers.h"

static uint32_t prefix_mask(uint8_t length_bits)
{
	return length_bits == 0 ? 0 : UINT32_MAX << (32 - length_bits);
}

static uint32_t count_addresses(const struct nat_config *config)
{
	uint32_t n = 0;
	for (uint32_t p = 0; p < config->n_pools; p++)
		for (uint32_t r = 0; r < config->pools[p].n_ranges; r++)
			n += config->pools[p].ranges[r].last - config->pools[p].ranges[r].first + 1;
	return n;
}

static uint32_t weight_of(const struct nat_pool_config *pool, uint32_t range)
{
	return pool->weights ? pool->weights[range] : 1;
}

static uint32_t count_turns(const struct nat_config *config)
{
	uint32_t n = 0;
	for (uint32_t p = 0; p < config->n_pools; p++)
		for (uint32_t r = 0; r < config->pools[p].n_ranges; r++) {
			const struct nat_range *range = &config->pools[p].ranges[r];
			n += (range->last - range->first + 1) * weight_of(&config->pools[p], r);
		}
	return n;
}

static uint32_t blocks_of(const struct nat_pool_config *pool)
{
	return pool->block_ports == 0
		       ? 0
		       : ((uint32_t)pool->port_last - pool->port_first + 1) / pool->block_ports;
}

static uint32_t count_blocks(const struct nat_config *config)
{
	uint32_t n = 0;
	for (uint32_t p = 0; p < config->n_pools; p++)
		for (uint32_t r = 0; r < config->pools[p].n_ranges; r++)
			n += (config->pools[p].ranges[r].last - config->pools[p].ranges[r].first + 1) *
			     blocks_of(&config->pools[p]);
	return n;
}

/* At most a quarter full. */
static uint32_t slots_for(uint32_t n)
{
	uint32_t slots = 16;
	while (slots < n * 4)
		slots *= 2;
	return slots;
}

static uint32_t workers_of(const struct nat_config *config)
{
	if (config->n_workers != 0)
		return config->n_workers;
	return config->workers == 0 ? 1 : config->workers;
}

/* ---- many workers ---- */

bool nat_config_spreads(const struct nat_config *config, const struct nat_pool_config *pool)
{
	return pool->mapping == NAT_ENDPOINT_DEPENDENT && pool->select == NAT_SELECT_ROUND_ROBIN &&
	       pool->block_ports == 0 && pool->deterministic.length_bits == 0 &&
	       config->limits.sessions_per_host == 0 && config->limits.new_per_host_per_s == 0;
}

static uint64_t digest(uint64_t sum, uint64_t value)
{
	return nat_multiply_fold(sum ^ value, UINT64_C(0x9e3779b97f4a7c15)) + value;
}

/* By name: pools may change their order under live sessions. */
static uint8_t keeper_of(const struct nat_config *config, const struct nat_pool_config *pool)
{
	uint64_t sum = 1;

	if (workers_of(config) == 1)
		return 0;
	if (nat_config_spreads(config, pool))
		return NAT_SPREAD;
	for (const char *c = pool->name; *c; c++)
		sum = digest(sum, (uint8_t)*c);
	return (uint8_t)(sum % workers_of(config));
}

static void digest_places(struct nat_policy *p)
{
	uint64_t sum = 1;

	for (uint32_t i = 0; i < p->n_addresses; i++)
		sum = digest(sum,
			     (uint64_t)p->address[i].address_be << 8 | p->pool[p->address[i].pool].keeper);
	for (uint32_t i = 0; i < p->n_zones; i++) {
		const struct nat_zone_config *zone = &p->zone[i].config;
		sum = digest(sum, (uint64_t)zone->source.address << 32 | zone->destination.address);
		sum = digest(sum, (uint64_t)zone->source.length_bits << 8 | zone->destination.length_bits);
		sum = digest(sum, zone->action == NAT_ACTION_POOL ? p->pool[zone->pool].keeper
								  : 256u + zone->action);
	}
	for (uint32_t i = 0; i < p->n_statics; i++) {
		const struct nat_static *s = &p->statics[i];
		sum = digest(sum, (uint64_t)s->inside_be << 32 | s->outside_be);
		sum = digest(sum, (uint64_t)s->inside_port_be << 32 | (uint64_t)s->outside_port_be << 8 |
					  s->protocol);
	}
	p->places = sum;
}

bool nat_policy_keeps(const struct nat_policy *policy, uint32_t worker)
{
	for (uint32_t i = 0; i < policy->n_pools; i++)
		if (policy->pool[i].keeper == worker)
			return true;
	return false;
}

uint32_t nat_policy_worker_of_host(const struct nat_policy *policy, uint32_t host_be)
{
	const uint32_t zone = nat_policy_zone(policy, NAT_NTOH32(host_be), 0);
	uint8_t keeper = NAT_SPREAD;

	if (zone != NAT_NO_ZONE && policy->zone[zone].config.action == NAT_ACTION_POOL)
		keeper = policy->pool[policy->zone[zone].config.pool].keeper;
	return keeper == NAT_SPREAD ? 0 : keeper; /* there is nothing to ask for */
}

/* Carves aligned pieces off one block; with base NULL it only adds up sizes. */
struct carver {
	uint8_t *base;
	size_t used;
};

static void *carve(struct carver *c, size_t bytes)
{
	c->used = (c->used + NAT_CACHE_LINE - 1) & ~(size_t)(NAT_CACHE_LINE - 1);
	void *piece = c->base ? c->base + c->used : NULL;
	c->used += bytes;
	return piece;
}

static void carve_policy(struct carver *c, const struct nat_config *config, struct nat_policy *scratch,
			 struct nat_policy **policy)
{
	const size_t n_addresses = count_addresses(config), n_zones = config->n_zones;

	*policy = carve(c, sizeof(**policy));
	struct nat_policy *p = *policy ? *policy : scratch;
	p->pool = carve(c, config->n_pools * sizeof(*p->pool));
	p->zone = carve(c, n_zones * sizeof(*p->zone));
	p->address = carve(c, n_addresses * sizeof(*p->address));
	p->order = carve(c, count_turns(config) * sizeof(*p->order));
	p->interval = carve(c, (2 * n_zones + 1) * sizeof(*p->interval));
	p->source = carve(c, n_zones * sizeof(*p->source));
	p->listed = carve(c, n_zones * sizeof(*p->listed));
	p->sorted = carve(c, n_zones * sizeof(*p->sorted));
	p->zone_before = carve(c, n_zones * sizeof(*p->zone_before));
	p->zone_slots = slots_for((uint32_t)n_zones);
	p->zone_slot = carve(c, p->zone_slots * sizeof(*p->zone_slot));
	p->address_slots = slots_for((uint32_t)n_addresses);
	p->address_slot = carve(c, p->address_slots * sizeof(*p->address_slot));
	p->static_slots = slots_for(config->n_statics);
	p->statics = carve(c, config->n_statics * sizeof(*p->statics));
	for (unsigned side = 0; side < 2; side++)
		p->static_slot[side] = carve(c, p->static_slots * sizeof(*p->static_slot[side]));
	for (uint32_t w = 0; w < workers_of(config); w++) {
		p->notes[w].address = carve(c, n_addresses * sizeof(*p->notes[w].address));
		p->notes[w].zone = carve(c, n_zones * sizeof(*p->notes[w].zone));
		p->notes[w].pool = carve(c, config->n_pools * sizeof(*p->notes[w].pool));
		p->notes[w].block = carve(c, count_blocks(config) * sizeof(*p->notes[w].block));
	}
}

size_t nat_policy_size(const struct nat_config *config)
{
	struct nat_policy scratch, *none;
	struct carver c = {NULL, 0};
	carve_policy(&c, config, &scratch, &none);
	return c.used;
}

static bool in_ranges(const struct nat_range *ranges, uint32_t n, uint32_t address)
{
	for (uint32_t i = 0; i < n; i++)
		if (address >= ranges[i].first && address <= ranges[i].last)
			return true;
	return false;
}

static void add_address(struct nat_policy *p, uint32_t pool, uint32_t address, bool draining)
{
	const uint32_t number = p->n_addresses++, mask = p->address_slots - 1;
	p->address[number] = (struct nat_address){NAT_HTON32(address), pool, draining, false};
	uint32_t at =
		(uint32_t)nat_multiply_fold(NAT_HTON32(address) ^ p->address_key.k0, p->address_key.k1) &
		mask;
	while (p->address_slot[at].number != 0)
		at = (at + 1) & mask;
	p->address_slot[at] = (struct nat_address_slot){NAT_HTON32(address), number + 1};
	p->pool[pool].n_addresses++;
	p->pool[pool].n_in_service += !draining;
}

static void find_address_span(struct nat_policy *p)
{
	uint32_t low = UINT32_MAX, high = 0;

	for (uint32_t i = 0; i < p->n_addresses; i++) {
		const uint32_t address = NAT_NTOH32(p->address[i].address_be);
		low = address < low ? address : low;
		high = address > high ? address : high;
	}
	p->address_low = low;
	p->address_span = p->n_addresses ? high - low : 0;
}

/* Round robin: in the first round each address has a turn, in the second those with weight 2 and more, and so
 * on. */
static void build_order(struct nat_policy *p, struct nat_pool *pool, const struct nat_pool_config *config,
			uint32_t *used)
{
	pool->first_order = *used;
	for (uint32_t round = 1, more = 1; more; round++) {
		uint32_t number = pool->first_address;
		more = 0;
		for (uint32_t r = 0; r < config->n_ranges; r++) {
			const uint32_t n = config->ranges[r].last - config->ranges[r].first + 1;
			for (uint32_t k = 0; k < n && weight_of(config, r) >= round; k++)
				p->order[(*used)++] = number + k;
			more |= weight_of(config, r) > round;
			number += n;
		}
	}
	pool->n_order = *used - pool->first_order;
}

/* RFC 7422 section 2: each address serves as many hosts as are needed to serve all, each host has an equal
 * share of the ports. */
static void build_deterministic(struct nat_pool *pool, const struct nat_pool_config *config)
{
	const uint32_t n_ports = (uint32_t)config->port_last - config->port_first + 1;

	if (config->deterministic.length_bits == 0)
		return;
	pool->hosts_first = config->deterministic.address & prefix_mask(config->deterministic.length_bits);
	pool->n_hosts = UINT32_C(1) << (32 - config->deterministic.length_bits);
	pool->hosts_per_address = (pool->n_hosts + pool->n_addresses - 1) / pool->n_addresses;
	pool->ports_per_host = (uint16_t)((n_ports - config->dynamic_ports) / pool->hosts_per_address);
	pool->dynamic_first = (uint16_t)(config->port_first + pool->ports_per_host * pool->hosts_per_address);
}

bool nat_policy_deterministic(const struct nat_policy *policy, uint32_t i, uint32_t host_be,
			      uint32_t *address_be, uint16_t *port_first, uint16_t *n_ports)
{
	const struct nat_pool *pool = &policy->pool[i];
	const uint32_t host = NAT_NTOH32(host_be) - pool->hosts_first;

	if (host >= pool->n_hosts)
		return false;
	*address_be = policy->address[pool->first_address + host / pool->hosts_per_address].address_be;
	*port_first = (uint16_t)(pool->port_first + host % pool->hosts_per_address * pool->ports_per_host);
	*n_ports = pool->ports_per_host;
	return true;
}

static void build_pool(struct nat_policy *p, uint32_t i, const struct nat_pool_config *config,
		       uint32_t *turns)
{
	struct nat_pool *pool = &p->pool[i];
	memcpy(pool->name, config->name, sizeof(pool->name));
	pool->first_address = p->n_addresses;
	pool->port_first = config->port_first;
	pool->port_last = config->port_last;
	pool->mapping = (uint8_t)config->mapping;
	pool->filtering = (uint8_t)config->filtering;
	pool->select = (uint8_t)config->select;
	pool->announce = (uint8_t)config->announce;
	pool->log = config->log;
	pool->active_while_be = config->active_while_be;
	atomic_init(&pool->active, config->active_while_be == 0);
	for (uint32_t r = 0; r < config->n_ranges; r++) {
		const struct nat_range *range = &config->ranges[r];
		for (uint32_t k = 0; k <= range->last - range->first; k++) {
			uint32_t address = range->first + k;
			add_address(p, i, address, in_ranges(config->drain, config->n_drain, address));
		}
	}
	build_order(p, pool, config, turns);
	build_deterministic(pool, config);
	pool->block_ports = config->block_ports;
	pool->blocks_per_host = config->blocks_per_host;
	pool->n_blocks = blocks_of(config);
	pool->first_block = p->n_blocks;
	p->n_blocks += pool->n_blocks * pool->n_addresses;
}

/* ---- static mappings ---- */

static uint32_t static_home(const struct nat_policy *p, uint32_t address_be, uint16_t port_be,
			    uint8_t protocol)
{
	const uint64_t key = (uint64_t)address_be << 32 | (uint64_t)port_be << 8 | protocol;
	return (uint32_t)nat_multiply_fold(key ^ p->address_key.k0, p->address_key.k1) &
	       (p->static_slots - 1);
}

static void build_statics(struct nat_policy *p, const struct nat_config *config)
{
	for (uint32_t i = 0; i < config->n_statics; i++) {
		const struct nat_static_config *from = &config->statics[i];
		struct nat_static *to = &p->statics[p->n_statics++];
		*to = (struct nat_static){NAT_HTON32(from->inside), NAT_HTON32(from->outside),
					  NAT_HTON16(from->inside_port), NAT_HTON16(from->outside_port),
					  from->protocol};
		uint32_t at[2] = {static_home(p, to->inside_be, to->inside_port_be, to->protocol),
				  static_home(p, to->outside_be, to->outside_port_be, to->protocol)};
		for (unsigned side = 0; side < 2; side++) {
			while (p->static_slot[side][at[side]] != 0)
				at[side] = (at[side] + 1) & (p->static_slots - 1);
			p->static_slot[side][at[side]] = i + 1;
		}
		const uint32_t number = nat_policy_address(p, to->outside_be);
		if (to->outside_port_be != 0 || number == UINT32_MAX || p->address[number].reserved)
			continue;
		p->address[number].reserved = true;
		p->pool[p->address[number].pool].n_in_service -= !p->address[number].draining;
	}
}

static const struct nat_static *find_static(const struct nat_policy *p, unsigned side, uint32_t address_be,
					    uint16_t port_be, uint8_t protocol)
{
	const uint32_t mask = p->static_slots - 1;
	for (uint32_t at = static_home(p, address_be, port_be, protocol); p->static_slot[side][at] != 0;
	     at = (at + 1) & mask) {
		const struct nat_static *s = &p->statics[p->static_slot[side][at] - 1];
		if ((side ? s->outside_be : s->inside_be) == address_be &&
		    (side ? s->outside_port_be : s->inside_port_be) == port_be && s->protocol == protocol)
			return s;
	}
	return NULL;
}

const struct nat_static *nat_policy_static(const struct nat_policy *p, unsigned side, uint32_t address_be,
					   uint16_t port_be, uint8_t protocol)
{
	if (NAT_LIKELY(p->n_statics == 0))
		return NULL;
	const struct nat_static *exact = find_static(p, side, address_be, port_be, protocol);
	return exact ? exact : find_static(p, side, address_be, 0, 0);
}

static void keep_active(struct nat_policy *p, const struct nat_policy *previous)
{
	for (uint32_t i = 0; i < p->n_pools; i++)
		for (uint32_t step = 0; step < previous->n_pools; step++) { /* mostly in the same place */
			const struct nat_pool *before = &previous->pool[(i + step) % previous->n_pools];
			if (p->pool[i].active_while_be != before->active_while_be ||
			    strcmp(p->pool[i].name, before->name) != 0)
				continue;
			atomic_store(&p->pool[i].active, atomic_load(&before->active));
			break;
		}
}

struct nat_policy *nat_policy_init(void *mem, const struct nat_config *config,
				   const struct nat_policy *previous)
{
	struct nat_policy scratch, *p;
	struct carver c = {mem, 0};

	memset(mem, 0, nat_policy_size(config));
	carve_policy(&c, config, &scratch, &p);
	p->n_interfaces = config->n_interfaces;
	p->n_pools = config->n_pools;
	p->n_zones = config->n_zones;
	p->n_workers = workers_of(config);
	p->timeouts = config->timeouts;
	p->limits = config->limits;
	p->tcp_midflow = (uint8_t)config->tcp_midflow;
	p->refusal = (uint8_t)config->refusal;
	p->pass_other_protocols = config->pass_other_protocols;
	p->address_key = nat_key_from_seed(0, 'a');
	p->previous = previous;
	for (uint32_t i = 0; i < config->n_interfaces; i++) {
		p->role[i] = (uint8_t)config->interfaces[i].role;
		p->silent[i] = config->interfaces[i].silent;
		p->from_queue[i] = config->interfaces[i].path == NAT_PATH_NFQUEUE;
	}
	for (uint32_t i = 0, turns = 0; i < config->n_pools; i++) {
		build_pool(p, i, &config->pools[i], &turns);
		p->pool[i].keeper = keeper_of(config, &config->pools[i]);
	}
	find_address_span(p);
	nat_zones_build(p, config->zones);
	build_statics(p, config);
	digest_places(p);
	if (previous)
		keep_active(p, previous);
	return p;
}

uint32_t nat_policy_address_from(const struct nat_policy *p, uint32_t address_be, uint32_t at)
{
	while (p->address_slot[at].address_be != address_be && p->address_slot[at].number != 0)
		at = (at + 1) & (p->address_slots - 1);
	return p->address_slot[at].number - 1;
}

bool nat_policy_passes(const struct nat_policy *p, uint32_t outside_source, uint32_t inside_destination)
{
	if (!p->has_pass_zone)
		return false;
	uint32_t zone = nat_policy_zone(p, inside_destination, outside_source);
	return zone != NAT_NO_ZONE && p->zone[zone].config.action == NAT_ACTION_PASS;
}

/* Blocks of another size or place are not the same blocks: the ports that are in use there stay with their
 * sessions, and the blocks that hold them now are learned as those end (see block.c). */
static void inherit_blocks(const struct nat_policy *policy, struct nat_worker_notes *to, uint32_t address,
			   const struct nat_policy *old, const struct nat_worker_notes *from,
			   uint32_t old_address)
{
	const struct nat_pool *pool = &policy->pool[policy->address[address].pool];
	const struct nat_pool *old_pool = &old->pool[old->address[old_address].pool];

	if (pool->n_blocks == 0 || pool->block_ports != old_pool->block_ports ||
	    pool->port_first != old_pool->port_first || pool->n_blocks != old_pool->n_blocks)
		return;
	memcpy(&to->block[pool->first_block + (address - pool->first_address) * pool->n_blocks],
	       &from->block[old_pool->first_block + (old_address - old_pool->first_address) * pool->n_blocks],
	       pool->n_blocks * sizeof(struct nat_block));
}

void nat_policy_inherit(struct nat_policy *policy, const struct nat_policy *old, uint32_t worker)
{
	struct nat_worker_notes *to = &policy->notes[worker];
	const struct nat_worker_notes *from = &old->notes[worker];

	for (uint32_t i = 0; i < policy->n_addresses; i++) {
		uint32_t k = nat_policy_address(old, policy->address[i].address_be);
		if (k == UINT32_MAX)
			continue;
		to->address[i] = from->address[k];
		inherit_blocks(policy, to, i, old, from, k);
	}
	nat_zones_inherit(policy, old, worker);
}

void nat_policy_set_active(struct nat_policy *policy, uint32_t pool, bool active)
{
	atomic_store_explicit(&policy->pool[pool].active, active, memory_order_relaxed);
}

bool nat_policy_is_active(const struct nat_policy *policy, uint32_t pool)
{
	return nat_pool_is_active(&policy->pool[pool]);
}

int32_t nat_policy_pool_of(const struct nat_policy *policy, uint32_t address_be)
{
	uint32_t number = nat_policy_address(policy, address_be);
	return number == UINT32_MAX ? -1 : (int32_t)policy->address[number].pool;
}

uint16_t nat_policy_pool_id(const struct nat_policy *policy, uint32_t pool)
{
	return policy->pool[pool].id;
}

const char *nat_policy_pool_name(const struct nat_policy *policy, uint32_t pool)
{
	return policy->pool[pool].name;
}
