/* Whose packet is this? One that the NAT translates leaves this file with its tuple turned to the side that
 * looks it up; all others leave with a verdict.
 *
 *   from inside:   to the gateway itself, or to another inside network: the kernel's. Else the first zone
 * that matches decides. To a pool address: a hairpin, translated like any other and sent through once more,
 * then as from outside. from outside:  to a pool address: a reply, or dropped. To the gateway itself: the
 * kernel's. Answer to a pass zone: the kernel's. Anything else is dropped: it must not reach the inside
 * untranslated.
 *
 * Whether an address is the gateway's own only the routes know: nat_route_as_sent() has asked them.
 */
#include "engine.h"

static bool is_translated_protocol(uint8_t protocol)
{
	return protocol == NAT_PROTO_TCP || protocol == NAT_PROTO_UDP || protocol == NAT_PROTO_ICMP;
}

static bool is_query(const struct nat_pkt *pkt, uint8_t type)
{
	return pkt->l3[pkt->l4_offset + NAT_ICMP_TYPE] == type;
}

/* Later fragments and ICMP errors have no ports of their own to look at. */
static bool has_own_ports(const struct nat_pkt *pkt)
{
	return (pkt->stage_flags & (NAT_STAGE_LATER | NAT_STAGE_ICMP_ERROR)) == 0;
}

/* Only a host with an address of its own can be pinged, and so have something to answer. */
static bool may_be_asked(const struct nat_policy *policy, const struct nat_pkt *pkt)
{
	return nat_policy_static(policy, 0, pkt->tuple.local_be, 0, 0) != NULL;
}

/* RFC 5508 REQ-5: the mapping of the quoted packet decides about an ICMP error, whatever address the
 * router has that complains. Only for what is translated: a quote is easily made up, and must open no way
 * that the zone of the sender itself does not. */
static uint32_t zone_inside(const struct nat_policy *policy, const struct nat_pkt *pkt)
{
	const uint32_t remote = NAT_NTOH32(pkt->tuple.remote_be);
	const uint32_t zone = nat_policy_zone(policy, NAT_NTOH32(pkt->tuple.local_be), remote);

	if (!(pkt->stage_flags & NAT_STAGE_ICMP_ERROR) ||
	    (zone != NAT_NO_ZONE && policy->zone[zone].config.action == NAT_ACTION_DROP))
		return zone;
	const uint32_t quoted = nat_policy_zone(policy, NAT_NTOH32(nat_icmp_quoted_host(pkt)), remote);
	return quoted != NAT_NO_ZONE && policy->zone[quoted].config.action == NAT_ACTION_POOL ? quoted : zone;
}

static void classify_inside(struct nat_engine *e, struct nat_pkt *pkt)
{
	const struct nat_policy *policy = e->policy;
	const bool hairpin = nat_policy_address(policy, pkt->tuple.remote_be) != UINT32_MAX;

	if (nat_policy_address(policy, pkt->tuple.local_be) != UINT32_MAX) {
		nat_drop(pkt, NAT_REASON_SPOOFED);
		return;
	}
	if (hairpin) {
		pkt->stage_flags |= NAT_STAGE_HAIRPIN;
	} else if (pkt->hop.kind == NAT_HOP_LOCAL) {
		nat_pass(pkt, NAT_REASON_LOCAL);
		return;
	}
	pkt->zone = zone_inside(policy, pkt);
	if (pkt->zone == NAT_NO_ZONE) {
		nat_drop(pkt, NAT_REASON_NO_ZONE);
		return;
	}
	const enum nat_action action = policy->zone[pkt->zone].config.action;
	if (action != NAT_ACTION_POOL) {
		if (action == NAT_ACTION_DROP)
			nat_drop(pkt, NAT_REASON_ZONE_DROP);
		else
			nat_pass(pkt, NAT_REASON_ZONE_PASS);
		return;
	}
	const bool has_route = pkt->hop.kind == NAT_HOP_FORWARD || pkt->hop.kind == NAT_HOP_KERNEL;
	if (!hairpin && has_route && pkt->hop.iface < policy->n_interfaces &&
	    policy->role[pkt->hop.iface] == NAT_ROLE_INSIDE) {
		nat_pass(pkt, NAT_REASON_INSIDE_ONLY);
		return;
	}
	if (!is_translated_protocol(pkt->tuple.protocol)) {
		if (policy->pass_other_protocols)
			nat_pass(pkt, NAT_REASON_OTHER_PROTOCOL);
		else
			nat_drop(pkt, NAT_REASON_PROTOCOL);
		return;
	}
	if (has_own_ports(pkt) && pkt->tuple.protocol == NAT_PROTO_ICMP && !is_query(pkt, NAT_ICMP_ECHO) &&
	    !(is_query(pkt, NAT_ICMP_ECHO_REPLY) && may_be_asked(policy, pkt))) {
		nat_drop(pkt, NAT_REASON_ICMP_TYPE);
		return;
	}
	if (pkt->stage_flags & NAT_STAGE_ICMP_ERROR)
		nat_icmp_parse_error(pkt);
	if (!nat_pool_is_active(&policy->pool[policy->zone[pkt->zone].config.pool]))
		nat_drop(pkt, NAT_REASON_POOL_INACTIVE);
}

static void classify_outside(struct nat_engine *e, struct nat_pkt *pkt)
{
	const struct nat_policy *policy = e->policy;
	const uint32_t address = nat_policy_address(policy, pkt->tuple.remote_be);

	if (address == UINT32_MAX) {
		if (pkt->hop.kind == NAT_HOP_LOCAL)
			nat_pass(pkt, NAT_REASON_LOCAL);
		else if (nat_policy_passes(policy, NAT_NTOH32(pkt->tuple.local_be),
					   NAT_NTOH32(pkt->tuple.remote_be)))
			nat_pass(pkt, NAT_REASON_KERNEL_ROUTE);
		else
			nat_drop(pkt, NAT_REASON_NOT_OURS);
		return;
	}
	pkt->stage_flags |= NAT_STAGE_INBOUND;
	if (!nat_pool_is_active(&policy->pool[policy->address[address].pool])) {
		nat_drop(pkt, NAT_REASON_POOL_INACTIVE);
		return;
	}
	if (!(pkt->stage_flags & NAT_STAGE_SECOND) &&
	    nat_policy_address(policy, pkt->tuple.local_be) != UINT32_MAX) {
		nat_drop(pkt, NAT_REASON_SPOOFED);
		return;
	}
	if (!is_translated_protocol(pkt->tuple.protocol)) {
		if (policy->pass_other_protocols)
			nat_pass(pkt, NAT_REASON_OTHER_PROTOCOL);
		else
			nat_drop(pkt, NAT_REASON_PROTOCOL);
		return;
	}
	if (has_own_ports(pkt) && pkt->tuple.protocol == NAT_PROTO_ICMP &&
	    !is_query(pkt, NAT_ICMP_ECHO_REPLY)) {
		const bool may_ask =
			(pkt->stage_flags & NAT_STAGE_SECOND) || policy->address[address].reserved;
		if (!is_query(pkt, NAT_ICMP_ECHO) || !may_ask) {
			nat_drop(pkt,
				 is_query(pkt, NAT_ICMP_ECHO) ? NAT_REASON_NO_SESSION : NAT_REASON_ICMP_TYPE);
			return;
		}
	}
	if (pkt->stage_flags & NAT_STAGE_ICMP_ERROR)
		nat_icmp_parse_error(pkt);
	else
		nat_tuple_turn(&pkt->tuple);
}

/* ---- the usual packet: plain TCP or UDP that a pool translates ----
 *
 * The same questions as above, all of which must have their usual answer; else those above are asked, who
 * know what follows from the others. */

static bool is_plain(const struct nat_pkt *pkt)
{
	return pkt->stage_flags == 0 &&
	       (pkt->tuple.protocol == NAT_PROTO_UDP || pkt->tuple.protocol == NAT_PROTO_TCP);
}

static bool classify_plain_inside(const struct nat_policy *policy, struct nat_pkt *pkt)
{
	const struct nat_hop hop = pkt->hop;

	if (nat_policy_spans(policy, pkt->tuple.remote_be) || nat_policy_spans(policy, pkt->tuple.local_be))
		return false;
	if ((hop.kind != NAT_HOP_FORWARD && hop.kind != NAT_HOP_KERNEL) ||
	    hop.iface >= policy->n_interfaces || policy->role[hop.iface] == NAT_ROLE_INSIDE)
		return false;
	const uint32_t zone =
		nat_policy_zone(policy, NAT_NTOH32(pkt->tuple.local_be), NAT_NTOH32(pkt->tuple.remote_be));
	if (zone == NAT_NO_ZONE)
		return false;
	const struct nat_zone_config *config = &policy->zone[zone].config;
	if (config->action != NAT_ACTION_POOL || !nat_pool_is_active(&policy->pool[config->pool]))
		return false;
	pkt->zone = zone;
	return true;
}

static bool classify_plain_outside(const struct nat_policy *policy, struct nat_pkt *pkt)
{
	const uint32_t address = nat_policy_address(policy, pkt->tuple.remote_be);

	if (address == UINT32_MAX || nat_policy_spans(policy, pkt->tuple.local_be) ||
	    !nat_pool_is_active(&policy->pool[policy->address[address].pool]))
		return false;
	pkt->stage_flags = NAT_STAGE_INBOUND;
	nat_tuple_turn(&pkt->tuple);
	return true;
}

void nat_classify(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	e->elsewhere.n = 0;
	for (uint32_t i = 0; i < n; i++) {
		if (pkt[i].settled)
			continue;
		if (NAT_LIKELY(nat_has_own_tuple(&pkt[i])) &&
		    NAT_UNLIKELY(!nat_session_fetch_record(e, &pkt[i])))
			e->elsewhere.at[e->elsewhere.n++] = (uint8_t)i;
		const bool from_inside = nat_is_from_inside(e, &pkt[i]);
		if (is_plain(&pkt[i]) && (from_inside ? classify_plain_inside(e->policy, &pkt[i])
						      : classify_plain_outside(e->policy, &pkt[i])))
			continue;
		if (from_inside)
			classify_inside(e, &pkt[i]);
		else
			classify_outside(e, &pkt[i]);
		if (pkt[i].settled)
			continue;
		if (NAT_UNLIKELY(pkt[i].stage_flags & NAT_STAGE_LATER))
			nat_frags_follow(e, &pkt[i]);
		else if (NAT_UNLIKELY(pkt[i].stage_flags &
				      NAT_STAGE_ICMP_ERROR)) /* the quoted packet's tuple */
			pkt[i].hash = nat_tuple_hash(&e->index.key, &pkt[i].tuple);
	}
}
