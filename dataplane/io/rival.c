/* A gateway that was cut off from its peer, or stood still for a while, may think that it is the master
 * when the other one has taken over. When that heals, VRRP lets one of them step back; the one that stays
 * did not become master again, so nothing else would make it announce its addresses, and the neighbours
 * would go on sending to the other one.
 *
 * So each ARP frame from outside is looked at: does somebody else claim an address of ours? A second
 * later, when the one that had to has stepped back, we claim it again if it is still ours.
 */
#include "rival.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

#include "arp.h"

#define SAY_EVERY_NS UINT64_C(60000000000)

void rival_note(struct thread *t, const uint8_t *frame, uint32_t bytes, uint8_t iface, const uint8_t mac[6])
{
	uint32_t sender_be;
	uint64_t sender = 0;

	if (!arp_sender(frame, bytes, &sender_be, &sender) || sender_be == 0)
		return;
	if (memcmp(&sender, mac, 6) == 0 || !arp_is_ours(t->plan, t->route, iface, sender_be))
		return;
	atomic_store_explicit(&t->rival_address_be, sender_be, memory_order_relaxed);
	atomic_store_explicit(&t->rival_mac, sender, memory_order_release);
}

bool rival_look(struct rival *r, struct thread *t, const struct plan *plan, uint64_t now_ns, char *why,
		size_t why_bytes)
{
	const uint64_t before = r->mac;
	const int32_t pool = before ? nat_policy_pool_of(plan->policy, r->address_be) : -1;
	const uint32_t address_be = r->address_be;
	char text[INET_ADDRSTRLEN];
	uint8_t mac[8];

	why[0] = '\0';
	r->mac = atomic_exchange(&t->rival_mac, 0);
	r->address_be = atomic_load_explicit(&t->rival_address_be, memory_order_relaxed);
	if (pool < 0 || !nat_policy_is_active(plan->policy, (uint32_t)pool))
		return false;
	if (r->said_ns != 0 && now_ns - r->said_ns < SAY_EVERY_NS)
		return true;
	r->said_ns = now_ns;
	memcpy(mac, &before, sizeof mac);
	inet_ntop(AF_INET, &address_be, text, sizeof text);
	snprintf(why, why_bytes,
		 "two masters: %02x:%02x:%02x:%02x:%02x:%02x spoke for pool address %s, which is ours; it is "
		 "announced again. "
		 "Look whether VRRP reaches the peer on every interface",
		 mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], text);
	return true;
}
