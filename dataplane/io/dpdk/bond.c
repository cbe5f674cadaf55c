/* DPDK's bonding driver gives up a member when that member's driver tells of a lost link, by an interrupt
 * or when it is asked. NICs do. net_tap only tells who asks and is not asked, net_af_packet says "up"
 * whatever happens (DPDK 22.11), and the bond would go on sending into the dark. So the control thread
 * looks at the links itself, and moves what is sent of an active-backup bond to a member that has one.
 * Received is from all members at any time.
 *
 * Where the driver has been faster only the switches are left to be told. The other modes are the driver's
 * alone: with 802.3ad a silent partner is one without a link, whatever a member says.
 */
#include "bond.h"

#include <rte_eth_bond.h>
#include <rte_ethdev.h>
#include <stdio.h>
#include <string.h>

#include "eal.h"
#include "guard.h"

void bond_open(struct bond *bond, uint16_t id, const struct nat_interface_config *c)
{
	memset(bond, 0, sizeof *bond);
	bond->active_backup = rte_eth_bond_mode_get(id) == BONDING_MODE_ACTIVE_BACKUP;
	for (uint32_t i = 0; i < c->n_members; i++) {
		struct bond_member *member = &bond->member[bond->n];

		eal_device_name(c->member[i], member->device, sizeof member->device);
		if (rte_eth_dev_get_port_by_name(member->device, &member->id))
			continue; /* the driver has refused to start without it */
		(void)guard_needed(c->member[i], member->copies, sizeof member->copies);
		member->up = true;
		bond->n++;
	}
	if (bond->active_backup)
		bond->active = (uint16_t)rte_eth_bond_primary_get(id);
}

static bool has_link(const struct bond_member *member)
{
	struct rte_eth_link link = {0};

	if (member->copies[0])
		return guard_has_carrier(member->copies);
	return rte_eth_link_get_nowait(member->id, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;
}

const char *bond_follow(struct bond *bond, uint16_t id)
{
	const struct bond_member *other = NULL;
	int active = bond->n && bond->active_backup ? rte_eth_bond_primary_get(id) : -1;
	bool dark = false;

	for (uint32_t i = 0; i < bond->n; i++) {
		struct bond_member *member = &bond->member[i];

		member->up = has_link(member);
		dark |= !member->up && member->id == active;
		if (member->up && !other)
			other = member;
	}
	if (dark && other && rte_eth_bond_primary_set(id, other->id) == 0)
		active = rte_eth_bond_primary_get(id);
	if (active < 0 || active == bond->active)
		return NULL;
	bond->active = (uint16_t)active;
	for (uint32_t i = 0; i < bond->n; i++)
		if (bond->member[i].id == active)
			return bond->member[i].device;
	return NULL;
}

uint32_t bond_links(const struct bond *bond)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < bond->n; i++)
		n += bond->member[i].up;
	return n;
}
