/* Can the packet go where it is to go? Route, TTL and MTU, before a port is spent on it and while its bytes
 * are still the original ones, which an ICMP error must quote.
 */
#include "engine.h"

static void check_one(struct nat_engine *e, struct nat_pkt *pkt)
{
	if (pkt->flags & NAT_PKT_KERNEL_ROUTES)
		return;
	if (!(pkt->stage_flags & NAT_STAGE_SECOND) && pkt->l3[NAT_IP_TTL] <= 1) {
		nat_icmp_make(e, pkt, NAT_ICMP_TIME_EXCEEDED, 0, 0);
		nat_drop(pkt, NAT_REASON_TTL_EXPIRED);
		return;
	}
	if (pkt->stage_flags & NAT_STAGE_HAIRPIN)
		return;
	if (pkt->hop.kind != NAT_HOP_FORWARD && pkt->hop.kind != NAT_HOP_KERNEL) {
		/* RFC 1812 5.2.7.1; a prohibit route says so (13), a missing one "network unreachable" (0).
		 */
		nat_icmp_make(e, pkt, NAT_ICMP_UNREACHABLE, pkt->hop.kind == NAT_HOP_PROHIBIT ? 13 : 0, 0);
		nat_drop(pkt, NAT_REASON_NO_ROUTE);
		return;
	}
	if (pkt->hop.mtu_bytes != 0 && pkt->total_bytes > pkt->hop.mtu_bytes &&
	    (nat_read16(pkt->l3 + NAT_IP_FRAGMENT) & NAT_IP_DF)) {
		nat_icmp_make(e, pkt, NAT_ICMP_UNREACHABLE, 4, pkt->hop.mtu_bytes); /* RFC 1191 */
		nat_drop(pkt, NAT_REASON_TOO_BIG);
	}
}

/* Routes of those whose destination translation does not change, and of those that may be for the gateway
 * itself: which addresses are its own only the routes know (NAT_HOP_LOCAL). */
void nat_route_as_sent(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	uint32_t destination_be[NAT_BURST_MAX], of[NAT_BURST_MAX], wanted = 0;
	struct nat_hop hop[NAT_BURST_MAX];

	for (uint32_t i = 0; i < n; i++)
		if (!pkt[i].settled &&
		    (e->policy->role[pkt[i].iface] == NAT_ROLE_INSIDE ||
		     nat_policy_address(e->policy, pkt[i].tuple.remote_be) == UINT32_MAX)) {
			destination_be[wanted] = pkt[i].tuple.remote_be;
			of[wanted++] = i;
		}
	if (wanted == 0)
		return;
	e->world.route(e->world.context, destination_be, hop, wanted);
	for (uint32_t i = 0; i < wanted; i++)
		pkt[of[i]].hop = hop[i];
}

/* Packets from outside go to the session's host: their destination is known only now. */
static void ask_routes_inside(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	uint32_t destination_be[NAT_BURST_MAX], of[NAT_BURST_MAX], wanted = 0;
	struct nat_hop hop[NAT_BURST_MAX];

	for (uint32_t i = 0; i < n; i++)
		if (!pkt[i].settled && nat_is_inbound(&pkt[i]) && pkt[i].session != NAT_NO_SESSION) {
			destination_be[wanted] = e->record[pkt[i].session].inside.local_be;
			of[wanted++] = i;
		}
	if (wanted == 0)
		return;
	e->world.route(e->world.context, destination_be, hop, wanted);
	for (uint32_t i = 0; i < wanted; i++)
		pkt[of[i]].hop = hop[i];
}

void nat_route(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	ask_routes_inside(e, pkt, n);
	for (uint32_t i = 0; i < n; i++)
		if (!pkt[i].settled && (!nat_is_inbound(&pkt[i]) || pkt[i].session != NAT_NO_SESSION))
			check_one(e, &pkt[i]);
}
