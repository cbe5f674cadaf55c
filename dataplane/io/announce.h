/* Gratuitous ARP for pool addresses: when we become their owner, and again five seconds later. */
#ifndef ANNOUNCE_H
#define ANNOUNCE_H

#include "arp.h"

#define ANNOUNCE_EVERY_MS 20u /* call announce_serve() so often while announce_busy() */

struct announce_run { /* over all pools, once */
	bool active;
	uint64_t from_ns;
	uint32_t pool, range, offset;
};

struct announce {
	struct announce_run run[2]; /* now, and again after 5 s */
	uint64_t sent;
};

/* Everything is announced from the start. */
void announce_all(struct announce *a, uint64_t now_ns);
static inline bool announce_busy(const struct announce *a)
{
	return a->run[0].active || a->run[1].active;
}

/* Sends the next few. `send` is asked for each outside interface that may speak for the address; false:
 * later. */
void announce_serve(struct announce *a, const struct plan *plan, const struct route *route, uint64_t now_ns,
		    bool (*send)(void *context, uint8_t iface, uint32_t address_be), void *context);

#endif
