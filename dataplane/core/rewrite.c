/* Addresses, ports, checksums. The session is known, the route is good: what is left cannot fail.
 *
 * Every byte that changes is booked in two sums, one for the IPv4 header and one for the transport checksum,
 * and each checksum is updated once (RFC 1624). The transport checksum covers the pseudo header, so addresses
 * are in its sum too; but not for ICMP.
 */
#include "engine.h"

struct change {
	nat_sum ip, transport;
};

static void replace_address(uint8_t *ip, unsigned offset, uint32_t new_be, struct change *change)
{
	const uint32_t old_be = nat_get32(ip + offset);
	nat_put32(ip + offset, new_be);
	change->ip = nat_sum_replace32(change->ip, old_be, new_be);
	change->transport = nat_sum_replace32(change->transport, old_be, new_be);
}

/* RFC 7857 section 10: fragments must not share their identification with those of another host behind the
 * same address (RFC 6864). A whole packet keeps its own: an ICMP error that quotes it must be recognised. */
static void renumber(struct nat_engine *e, uint8_t *ip, uint8_t protocol, struct change *change)
{
	const uint16_t old_be = nat_get16(ip + NAT_IP_ID);
	const uint16_t new_be =
		nat_frags_id(e, nat_get32(ip + NAT_IP_SOURCE), nat_get32(ip + NAT_IP_DESTINATION), protocol);

	change->ip = nat_sum_replace16(change->ip, old_be, new_be);
	nat_put16(ip + NAT_IP_ID, new_be);
}

/* TTL shares its 16-bit word with the protocol. */
static void decrement_ttl(struct nat_pkt *pkt, struct change *change)
{
	uint8_t *word = pkt->l3 + NAT_IP_TTL;
	const uint16_t old_be = nat_get16(word), new_be = NAT_HTON16(NAT_NTOH16(old_be) - 0x100);

	if ((pkt->flags & NAT_PKT_KERNEL_ROUTES) || (pkt->stage_flags & NAT_STAGE_SECOND))
		return;
	nat_put16(word, new_be);
	change->ip = nat_sum_replace16(change->ip, old_be, new_be);
}

static void update_ip(uint8_t *ip, const struct change *change)
{
	nat_put16(ip + NAT_IP_CHECKSUM, nat_csum_update(nat_get16(ip + NAT_IP_CHECKSUM), change->ip));
}

static void replace_port(uint8_t *field, uint16_t new_be, nat_sum *sum)
{
	*sum = nat_sum_replace16(*sum, nat_get16(field), new_be);
	nat_put16(field, new_be);
}

/* A checksum that the kernel left unfinished holds the plain sum of the pseudo header: addresses count, ports
 * do not. */
static void update_partial(uint8_t *field, nat_sum addresses)
{
	nat_put16(field, nat_sum_fold(nat_get16(field) + addresses));
}

static void rewrite_transport(struct nat_pkt *pkt, uint16_t port_be, nat_sum addresses)
{
	uint8_t *l4 = pkt->l3 + pkt->l4_offset;
	const bool tcp = pkt->tuple.protocol == NAT_PROTO_TCP;
	uint8_t *field = l4 + (tcp ? NAT_TCP_CHECKSUM : NAT_UDP_CHECKSUM);
	nat_sum sum = addresses;

	replace_port(l4 + (nat_is_inbound(pkt) ? NAT_L4_DESTINATION_PORT : NAT_L4_SOURCE_PORT), port_be,
		     &sum);
	if (pkt->flags & NAT_PKT_CSUM_PARTIAL) {
		update_partial(field, addresses);
		return;
	}
	const uint16_t old = nat_get16(field);
	if (!tcp && old == 0)
		return; /* RFC 768: zero means "no checksum" */
	uint16_t new = nat_csum_update(old, sum);
	if (!tcp && new == 0)
		new = UINT16_MAX; /* RFC 768: a sum of zero is sent as all ones */
	nat_put16(field, new);
}

static void rewrite_query(struct nat_pkt *pkt, uint16_t id_be)
{
	uint8_t *l4 = pkt->l3 + pkt->l4_offset;
	nat_sum sum = 0;

	replace_port(l4 + NAT_ICMP_ID, id_be, &sum);
	nat_put16(l4 + NAT_ICMP_CHECKSUM, nat_csum_update(nat_get16(l4 + NAT_ICMP_CHECKSUM), sum));
	/* No pseudo header is summed here, so the message may become all zeros (an echo reply with identifier
	 * and sequence 0), the one case in which equation 3 gives the wrong one of the two zeros. */
	if (NAT_UNLIKELY(nat_get16(l4 + NAT_ICMP_CHECKSUM) == 0) &&
	    !(pkt->stage_flags & NAT_STAGE_FRAGMENT) && nat_sum_bytes(0, l4, pkt->l4_bytes) == 0)
		nat_put16(l4 + NAT_ICMP_CHECKSUM, UINT16_MAX);
}

/* TCP option 2, RFC 9293 3.7.1. The value may stand at an odd offset, where its bytes count swapped. */
static void clamp_mss(struct nat_pkt *pkt, uint16_t clamp_bytes)
{
	uint8_t *l4 = pkt->l3 + pkt->l4_offset;
	const unsigned header_bytes = (l4[NAT_TCP_OFFSET] >> 4) * 4u;

	if (header_bytes > pkt->l4_bytes)
		return;
	for (unsigned at = NAT_TCP_HEADER_BYTES; at < header_bytes;) {
		const uint8_t kind = l4[at];
		if (kind == 0)
			return;
		if (kind == 1) {
			at++;
			continue;
		}
		if (at + 1 >= header_bytes || l4[at + 1] < 2 || at + l4[at + 1] > header_bytes)
			return;
		if (kind == 2 && l4[at + 1] == 4) {
			uint8_t *value = l4 + at + 2;
			const uint16_t old_be = nat_get16(value), new_be = NAT_HTON16(clamp_bytes);
			if (NAT_NTOH16(old_be) <= clamp_bytes)
				return;
			nat_put16(value, new_be);
			if (pkt->flags & NAT_PKT_CSUM_PARTIAL)
				return;
			const bool odd = at % 2 == 1;
			nat_sum sum = nat_sum_replace16(0, odd ? NAT_SWAP16(old_be) : old_be,
							odd ? NAT_SWAP16(new_be) : new_be);
			uint8_t *field = l4 + NAT_TCP_CHECKSUM;
			nat_put16(field, nat_csum_update(nat_get16(field), sum));
			return;
		}
		at += l4[at + 1];
	}
}

static uint16_t mss_clamp_of(const struct nat_engine *e, const struct nat_pkt *pkt,
			     const struct nat_session *s)
{
	uint32_t zone = pkt->zone;
	if (zone == NAT_NO_ZONE)
		zone = nat_policy_zone(e->policy, NAT_NTOH32(s->inside.local_be),
				       NAT_NTOH32(pkt->tuple.remote_be));
	return zone == NAT_NO_ZONE ? 0 : e->policy->zone[zone].config.mss_clamp_bytes;
}

static void rewrite_one(struct nat_engine *e, struct nat_pkt *pkt)
{
	const struct nat_session *s = &e->record[pkt->session];
	const bool inbound = nat_is_inbound(pkt);
	const uint32_t address_be = inbound ? s->inside.local_be : s->out_addr_be;
	const uint16_t port_be = inbound ? s->inside.local_port_be : s->out_port_be;
	const bool hairpin = (pkt->stage_flags & NAT_STAGE_HAIRPIN) != 0,
		   second = (pkt->stage_flags & NAT_STAGE_SECOND) != 0;
	/* A hairpin leads when it is through (engine.c). */
	const bool leads = (pkt->stage_flags & NAT_STAGE_FRAGMENT) && !hairpin && !second;
	uint32_t source_be = 0, destination_be = 0;
	uint16_t id_be = 0;
	struct change change = {0, 0};

	if (NAT_UNLIKELY(leads)) {
		source_be = nat_get32(pkt->l3 + NAT_IP_SOURCE);
		destination_be = nat_get32(pkt->l3 + NAT_IP_DESTINATION);
		id_be = nat_get16(pkt->l3 + NAT_IP_ID);
	}

	if (NAT_UNLIKELY(pkt->tcp_flags & NAT_TCP_SYN)) {
		uint16_t clamp_bytes = mss_clamp_of(e, pkt, s);
		if (clamp_bytes != 0)
			clamp_mss(pkt, clamp_bytes);
	}
	nat_session_touch(e, pkt);
	replace_address(pkt->l3, inbound ? NAT_IP_DESTINATION : NAT_IP_SOURCE, address_be, &change);
	if (pkt->tuple.protocol == NAT_PROTO_ICMP)
		rewrite_query(pkt, port_be);
	else
		rewrite_transport(pkt, port_be, change.transport);
	decrement_ttl(pkt, &change);
	if (NAT_UNLIKELY(pkt->stage_flags & NAT_STAGE_FRAGMENT) && (second || (!inbound && !hairpin)))
		renumber(e, pkt->l3, pkt->tuple.protocol, &change);
	update_ip(pkt->l3, &change);
	nat_settle(pkt, NAT_FORWARD, NAT_REASON_OK);
	if (NAT_UNLIKELY(leads))
		nat_frags_lead(e, pkt, source_be, destination_be, id_be);
}

void nat_rewrite_addresses(struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be)
{
	struct change change = {0, 0};

	replace_address(pkt->l3, NAT_IP_SOURCE, source_be, &change);
	replace_address(pkt->l3, NAT_IP_DESTINATION, destination_be, &change);
	decrement_ttl(pkt, &change);
	update_ip(pkt->l3, &change);
}

void nat_rewrite(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (pkt[i].settled)
			continue;
		if (NAT_UNLIKELY(pkt[i].stage_flags & NAT_STAGE_ICMP_ERROR))
			nat_icmp_rewrite_error(e, &pkt[i], &e->record[pkt[i].session]);
		else
			rewrite_one(e, &pkt[i]);
	}
}
