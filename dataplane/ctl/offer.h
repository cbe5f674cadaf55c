/* What a gateway offers as a NAT, in so few bytes that it goes with every datagram to the peer: do both
 * have the same pools and zones, which one has more public addresses, and does one refuse because its
 * ports are spent?
 */
#ifndef OFFER_H
#define OFFER_H

#include <stdbool.h>
#include <stdint.h>

#include "../core/nat.h"

struct offer {
	uint64_t digest; /* of pools and zones; 0: not told */
	uint32_t addresses;
	bool exhausted; /* a session was refused for want of a port a moment ago */
};

/* `exhausted` is the caller's. Interfaces, workers, limits and timers may differ in a pair, so they do not
 * count. */
struct offer offer_of(const struct nat_config *config);

#endif
