/* How many workers there are, and what they share: see core/workers.h. */
#ifndef CREW_H
#define CREW_H

#include "../core/nat.h"
#include "dpdk/port.h"
#include "memory.h"

struct crew {
	struct memory memory;
	struct nat_workers *workers; /* NULL: there is one */
};

/* The number of workers that the configuration asks for. Where that cannot be, says so on stderr. */
uint32_t crew_size(const struct nat_config *config);

/* After the ports are open. False: no memory. Ports whose RSS cannot be followed are named on stderr. */
bool crew_open(struct crew *crew, const struct nat_config *config, const struct ports *ports, uint64_t seed,
	       bool no_huge);
void crew_close(struct crew *crew);

/* Sessions that one worker's tables must have room for. */
uint64_t crew_share(const struct nat_config *config, const struct nat_policy *policy, uint32_t worker);

#endif
