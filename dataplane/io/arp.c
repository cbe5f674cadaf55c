/* Frames by offset: Ethernet 0..13, ARP 14..41 (RFC 826 for Ethernet and IPv4). */
#include "arp.h"

#include <string.h>

enum {
	DESTINATION = 0,
	SOURCE = 6,
	TYPE = 12,
	ARP = 14,
	OPERATION = 20,
	SENDER_MAC = 22,
	SENDER = 28,
	TARGET_MAC = 32,
	TARGET = 38
};

static const uint8_t ethernet_ipv4[6] = {0, 1, 8, 0, 6, 4};

bool arp_is_ours(const struct plan *plan, const struct route *route, uint8_t iface, uint32_t address_be)
{
	const struct nat_config *config = &plan->config->nat;
	int32_t pool = nat_policy_pool_of(plan->policy, address_be);

	if (pool < 0 || config->interfaces[iface].role != NAT_ROLE_OUTSIDE ||
	    !nat_policy_is_active(plan->policy, (uint32_t)pool))
		return false;
	switch (config->pools[pool].announce) {
	case NAT_ANNOUNCE_ARP:
		return true;
	case NAT_ANNOUNCE_AUTO:
		return route_connected(route, iface, address_be);
	case NAT_ANNOUNCE_NONE:
		break;
	}
	return false;
}

uint32_t arp_asked_for(const uint8_t *frame, uint32_t bytes)
{
	uint32_t sender_be, target_be;

	if (bytes < ARP_FRAME_BYTES || frame[TYPE] != 0x08 || frame[TYPE + 1] != 0x06 ||
	    memcmp(frame + ARP, ethernet_ipv4, sizeof ethernet_ipv4) || frame[OPERATION] ||
	    frame[OPERATION + 1] != 1)
		return 0;
	memcpy(&sender_be, frame + SENDER, 4);
	memcpy(&target_be, frame + TARGET, 4);
	return sender_be == target_be ? 0 : target_be; /* equal: somebody announces, nobody asks */
}

bool arp_sender(const uint8_t *frame, uint32_t bytes, uint32_t *address_be, uint64_t *mac)
{
	if (bytes < ARP_FRAME_BYTES || frame[TYPE] != 0x08 || frame[TYPE + 1] != 0x06 ||
	    memcmp(frame + ARP, ethernet_ipv4, sizeof ethernet_ipv4))
		return false;
	memcpy(address_be, frame + SENDER, 4);
	*mac = 0;
	memcpy(mac, frame + SENDER_MAC, 6);
	return true;
}

void arp_answer(uint8_t *frame, const uint8_t mac[6])
{
	uint8_t asker[10], target[4]; /* MAC and address */

	memcpy(asker, frame + SENDER_MAC, 10);
	memcpy(target, frame + TARGET, 4);
	memcpy(frame + DESTINATION, frame + SOURCE, 6);
	memcpy(frame + SOURCE, mac, 6);
	frame[OPERATION + 1] = 2;
	memcpy(frame + SENDER_MAC, mac, 6);
	memcpy(frame + SENDER, target, 4);
	memcpy(frame + TARGET_MAC, asker, 10);
}

void arp_announcement(uint8_t frame[ARP_FRAME_BYTES], const uint8_t mac[6], uint32_t address_be)
{
	memset(frame, 0, ARP_FRAME_BYTES);
	memset(frame + DESTINATION, 0xff, 6);
	memcpy(frame + SOURCE, mac, 6);
	frame[TYPE] = 0x08;
	frame[TYPE + 1] = 0x06;
	memcpy(frame + ARP, ethernet_ipv4, sizeof ethernet_ipv4);
	frame[OPERATION + 1] = 1;
	memcpy(frame + SENDER_MAC, mac, 6);
	memcpy(frame + SENDER, &address_be, 4);
	memcpy(frame + TARGET, &address_be, 4);
}

void arp_presence(uint8_t frame[ARP_FRAME_BYTES], const uint8_t mac[6])
{
	arp_announcement(frame, mac, 0);
	frame[TYPE] = 0x80;
	frame[TYPE + 1] = 0x35;
	frame[OPERATION + 1] = 3;
	memcpy(frame + TARGET_MAC, mac, 6);
}
