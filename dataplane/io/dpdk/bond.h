/* The members of a bonded port, and which of them has a link. */
#ifndef BOND_H
#define BOND_H

#include <stdbool.h>
#include <stdint.h>

#include "../../core/nat.h"

struct bond_member {
	uint16_t id;     /* DPDK's number of it */
	char device[64]; /* as the configuration names it, up to the first comma */
	char copies[32]; /* the kernel interface that the device listens to, or "": see port.h */
	bool up;
};

struct bond {
	uint32_t n; /* 0: the port is no bond */
	bool active_backup;
	uint16_t active; /* of an active-backup bond: the member that sends */
	struct bond_member member[NAT_MEMBERS_MAX];
};

/* Once, when the bonded device has been started; `id` is its number. */
void bond_open(struct bond *bond, uint16_t id, const struct nat_interface_config *c);

/* Control thread, often: looks at each member's link. Of an active-backup bond whose active member has
 * none another one sends from now on. Its name when another one sends than the last time, whoever has seen
 * to that; mostly NULL. */
const char *bond_follow(struct bond *bond, uint16_t id);

/* How many members have a link. */
uint32_t bond_links(const struct bond *bond);

#endif
