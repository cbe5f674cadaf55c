/* A pool may have a million addresses and a switch's CPU takes a few thousand ARP frames a second. So a run
 * walks over the pools with a cursor: at most SENT_MAX frames and LOOKED_MAX addresses in one call, 2,500
 * frames a second. The second run, 5 s later, is for those whose first frame was lost (a port that was not
 * forwarding yet).
 */
#include "announce.h"

#include <arpa/inet.h>

#define SENT_MAX   50u
#define LOOKED_MAX 20000u
#define AGAIN_NS   5000000000u

void announce_all(struct announce *a, uint64_t now_ns)
{
	a->run[0] = (struct announce_run){.active = true, .from_ns = now_ns};
	a->run[1] = (struct announce_run){.active = true, .from_ns = now_ns + AGAIN_NS};
}

/* The run's next address, 0 at the end. */
static uint32_t step(struct announce_run *run, const struct nat_config *config)
{
	while (run->pool < config->n_pools) {
		const struct nat_pool_config *pool = &config->pools[run->pool];

		if (run->range < pool->n_ranges) {
			const struct nat_range *range = &pool->ranges[run->range];

			if (run->offset <= range->last - range->first)
				return htonl(range->first + run->offset++);
			run->range++;
		} else {
			run->pool++;
			run->range = 0;
		}
		run->offset = 0;
	}
	return 0;
}

static void run_serve(struct announce *a, struct announce_run *run, const struct plan *plan,
		      const struct route *route,
		      bool (*send)(void *context, uint8_t iface, uint32_t address_be), void *context)
{
	const struct nat_config *config = &plan->config->nat;
	uint32_t sent = 0;

	for (uint32_t looked = 0; looked < LOOKED_MAX && sent < SENT_MAX; looked++) {
		struct announce_run before = *run;
		uint32_t address_be = step(run, config);

		if (!address_be) {
			run->active = false;
			return;
		}
		for (uint8_t iface = 0; iface < config->n_interfaces; iface++) {
			if (!arp_is_ours(plan, route, iface, address_be))
				continue;
			if (!send(context, iface, address_be)) {
				*run = before; /* no room: go on here at the next call */
				return;
			}
			sent++;
			a->sent++;
		}
	}
}

void announce_serve(struct announce *a, const struct plan *plan, const struct route *route, uint64_t now_ns,
		    bool (*send)(void *context, uint8_t iface, uint32_t address_be), void *context)
{
	for (unsigned i = 0; i < 2; i++)
		if (a->run[i].active && now_ns >= a->run[i].from_ns)
			run_serve(a, &a->run[i], plan, route, send, context);
}
