/* Addresses that leave a pool while sessions use them. A reload must not cut those sessions: the new
 * configuration keeps such an address as one that drains, so that replies are still translated, ARP is
 * still answered and `show pools` tells how many are left. The next reload lets go those that have none
 * left. `reload --cut` asks for the other thing: it keeps none, and ends their sessions.
 */
#include <stdlib.h>
#include <string.h>

#include "config_internal.h"
#include "request_internal.h"

struct in_use {
	uint32_t *address; /* host order */
	uint32_t n, room;
	bool failed;
};

static void add(struct in_use *list, uint32_t address)
{
	if (list->n == list->room) {
		uint32_t room = list->room ? 2 * list->room : 256;
		uint32_t *more = realloc(list->address, room * sizeof(*more));
		if (!more) {
			list->failed = true;
			return;
		}
		list->address = more;
		list->room = room;
	}
	list->address[list->n++] = address;
}

static void collect(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct in_use *list = argument;
	struct nat_address_view view;

	(void)now_ns;
	for (uint32_t i = 0; nat_engine_address(e, i, &view); i++)
		if (view.sessions > 0)
			add(list, __builtin_bswap32(view.address_be));
}

static bool holds(const struct nat_pool_config *pool, uint32_t address)
{
	for (uint32_t i = 0; i < pool->n_ranges; i++)
		if (address >= pool->ranges[i].first && address <= pool->ranges[i].last)
			return true;
	return false;
}

static bool held_by_any(const struct nat_config *nat, uint32_t address)
{
	for (uint32_t i = 0; i < nat->n_pools; i++)
		if (holds(&nat->pools[i], address))
			return true;
	return false;
}

static struct nat_range *copy_and_add(struct config *next, const struct nat_range *from, uint32_t n,
				      const struct nat_range *more, uint32_t n_more)
{
	struct nat_range *to = config_take(next, n + n_more + 1, sizeof(*to));
	if (n)
		memcpy(to, from, n * sizeof(*to));
	memcpy(to + n, more, n_more * sizeof(*to));
	return to;
}

/* The pool of that name in the new configuration, or a new one of that name, which no zone uses. */
static struct nat_pool_config *pool_like(struct config *next, const struct nat_pool_config *old)
{
	struct nat_pool_config *pools;

	for (uint32_t i = 0; i < next->nat.n_pools; i++)
		if (!strcmp(next->nat.pools[i].name, old->name))
			return (struct nat_pool_config *)(uintptr_t)&next->nat.pools[i];
	pools = config_take(next, next->nat.n_pools + 1, sizeof(*pools));
	if (next->nat.n_pools)
		memcpy(pools, next->nat.pools, next->nat.n_pools * sizeof(*pools));
	struct nat_pool_config *pool = &pools[next->nat.n_pools++];
	*pool = *old;
	pool->ranges = pool->drain = NULL;
	pool->weights = NULL;
	pool->n_ranges = pool->n_drain = 0;
	next->nat.pools = pools;
	return pool;
}

static void keep(struct config *next, const struct nat_pool_config *old, const struct in_use *list)
{
	struct nat_range *gone = calloc(list->n + 1, sizeof(*gone));
	uint32_t n = 0;

	for (uint32_t i = 0; gone && i < list->n; i++) {
		const uint32_t address = list->address[i];
		if (!holds(old, address) || held_by_any(&next->nat, address))
			continue;
		gone[n++] = (struct nat_range){address, address};
	}
	if (n > 0) {
		struct nat_pool_config *pool = pool_like(next, old);
		uint32_t *weights = config_take(next, pool->n_ranges + n + 1, sizeof(*weights));
		for (uint32_t i = 0; i < pool->n_ranges + n; i++)
			weights[i] = pool->weights && i < pool->n_ranges ? pool->weights[i] : 1;
		pool->ranges = copy_and_add(next, pool->ranges, pool->n_ranges, gone, n);
		pool->weights = weights;
		pool->n_ranges += n;
		pool->drain = copy_and_add(next, pool->drain, pool->n_drain, gone, n);
		pool->n_drain += n;
	}
	free(gone);
}

void request_keep_departed(const struct request_ops *ops, struct config *next)
{
	const struct nat_config *running = &ops->config(ops->context)->nat;
	struct in_use list = {0};

	for (uint32_t w = 0; w < ops->n_workers; w++)
		(void)ops->on_worker(ops->context, w, collect, &list);
	for (uint32_t i = 0; i < running->n_pools && list.n > 0; i++)
		keep(next, &running->pools[i], &list);
	free(list.address);
}

struct cut {
	uint64_t cursor, ended;
	bool more;
};

static void step_cut(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct cut *cut = argument;

	cut->more = nat_engine_cut(e, &cut->cursor, REQUEST_STEP_RECORDS, now_ns, &cut->ended);
}

uint64_t request_cut_departed(struct request_context *c)
{
	struct cut cut = {0};

	for (uint32_t w = 0; w < c->ops->n_workers; w++) {
		cut.cursor = 0;
		do {
			if (!request_on_worker(c, w, step_cut, &cut))
				return cut.ended; /* and the answer says that the worker hangs */
		} while (cut.more);
	}
	return cut.ended;
}
