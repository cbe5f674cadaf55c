/* See offer.h. Values are hashed one by one, never structures: padding is not part of a configuration. */
#include "offer.h"

#include <string.h>

#define FNV_BASIS UINT64_C(0xcbf29ce484222325)
#define FNV_PRIME UINT64_C(0x100000001b3)

static void add(uint64_t *digest, uint64_t value)
{
	for (unsigned i = 0; i < 8; i++, value >>= 8)
		*digest = (*digest ^ (value & 0xff)) * FNV_PRIME;
}

static void add_ranges(uint64_t *digest, const struct nat_range *range, uint32_t n)
{
	add(digest, n);
	for (uint32_t i = 0; i < n; i++) {
		add(digest, range[i].first);
		add(digest, range[i].last);
	}
}

static void add_prefix(uint64_t *digest, const struct nat_prefix *prefix)
{
	add(digest, prefix->address);
	add(digest, prefix->length_bits);
}

static void add_pool(struct offer *offer, const struct nat_pool_config *pool)
{
	uint64_t *digest = &offer->digest;

	for (size_t i = 0; i < strnlen(pool->name, sizeof pool->name); i++)
		add(digest, (uint8_t)pool->name[i]);
	add_ranges(digest, pool->ranges, pool->n_ranges);
	add_ranges(digest, pool->drain, pool->n_drain);
	add(digest, (uint64_t)pool->port_first << 16 | pool->port_last);
	add(digest, (uint64_t)pool->mapping << 16 | (uint64_t)pool->filtering << 8 | (uint64_t)pool->select);
	add(digest, (uint64_t)pool->block_ports << 16 | pool->blocks_per_host);
	add_prefix(digest, &pool->deterministic);
	for (uint32_t i = 0; i < pool->n_ranges; i++)
		offer->addresses += pool->ranges[i].last - pool->ranges[i].first + 1;
}

struct offer offer_of(const struct nat_config *config)
{
	struct offer offer = {.digest = FNV_BASIS};

	for (uint32_t i = 0; i < config->n_pools; i++)
		add_pool(&offer, &config->pools[i]);
	for (uint32_t i = 0; i < config->n_zones; i++) {
		const struct nat_zone_config *zone = &config->zones[i];

		add_prefix(&offer.digest, &zone->source);
		add_prefix(&offer.digest, &zone->destination);
		add(&offer.digest, (uint64_t)zone->action << 32 | zone->pool);
	}
	offer.digest |= offer.digest == 0;
	return offer;
}
