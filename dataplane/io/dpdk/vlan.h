/* 802.1Q tags, for interfaces that share a device. Hardware may have taken the tag off a received frame;
 * else it is in the frame. What it is put on to is sent with the tag in the frame.
 */
#ifndef VLAN_H
#define VLAN_H

#include <rte_ether.h>
#include <rte_mbuf.h>
#include <stdbool.h>
#include <string.h>

#include "port.h"

#define VLAN_ID      0x0fffu
#define VLAN_TYPE_BE RTE_BE16(RTE_ETHER_TYPE_VLAN)

struct vlan_header { /* between the source address and the EtherType */
	rte_be16_t type, id;
};

/* False: no room in front of the frame, or its buffer is shared. */
static inline bool vlan_push(struct rte_mbuf *m, uint16_t id)
{
	const struct vlan_header tag = {VLAN_TYPE_BE, rte_cpu_to_be_16(id)};
	char *frame;

	if (rte_mbuf_refcnt_read(m) > 1 || !(frame = rte_pktmbuf_prepend(m, sizeof(tag))))
		return false;
	memmove(frame, frame + sizeof(tag), 2 * RTE_ETHER_ADDR_LEN);
	memcpy(frame + 2 * RTE_ETHER_ADDR_LEN, &tag, sizeof(tag));
	return true;
}

/* Whose frame is it? When it has the tag of a port of this device, the tag is taken off. With another tag
 * it stays as it is and goes to the port without one, if there is: its twin may have VLAN interfaces of
 * the kernel. Else NULL. */
static inline struct port *vlan_port(struct ports *ports, const struct port *first, struct rte_mbuf *m)
{
	char *frame = rte_pktmbuf_mtod(m, char *);
	const bool stripped = (m->ol_flags & RTE_MBUF_F_RX_VLAN_STRIPPED) != 0;
	struct port *untagged = NULL;
	struct vlan_header tag = {0};

	/* a frame that ends with its tag has no EtherType: behind it stands what was in the buffer before */
	if (!stripped && rte_pktmbuf_data_len(m) >= sizeof(struct rte_ether_hdr) + sizeof(tag))
		memcpy(&tag, frame + 2 * RTE_ETHER_ADDR_LEN, sizeof(tag));
	const bool inside = tag.type == VLAN_TYPE_BE;
	const uint16_t id = (stripped ? m->vlan_tci : inside ? rte_be_to_cpu_16(tag.id) : 0) & VLAN_ID;

	for (uint32_t i = 0; i < ports->n; i++) {
		struct port *port = &ports->port[i];

		if (port->first != first->index)
			continue;
		if (!port->vlan)
			untagged = port;
		if (port->vlan != id)
			continue;
		m->ol_flags &= ~RTE_MBUF_F_RX_VLAN_STRIPPED;
		if (inside) { /* VLAN 0 too: a priority, no VLAN (IEEE 802.1Q 6.9) */
			memmove(frame + sizeof(tag), frame, 2 * RTE_ETHER_ADDR_LEN);
			rte_pktmbuf_adj(m, sizeof(tag));
		}
		return port;
	}
	return untagged;
}

#endif
