/* Bytes to tuple. Every length is checked here and nowhere later: a packet that leaves this file unsettled
 * has a sound IPv4 header, and (but for later fragments) the transport header that its protocol needs, inside
 * its total length and inside the buffer.
 *
 * The tuple is left as "local = source": classify.c turns it round for packets from outside.
 */
#include "engine.h"

#include <string.h>

static bool is_martian_source(uint32_t address)
{
	return address >> 24 == 0 || address >> 24 == 127 ||
	       address >> 28 >= 14; /* RFC 1122 3.2.1.3; 224/4, 240/4 */
}

static bool is_martian_destination(uint32_t address)
{
	return address >> 24 == 0 || address >> 24 == 127;
}

static bool is_group(uint32_t address)
{
	return address >> 28 == 14 || address == UINT32_MAX;
}

/* Addresses stand in the header as in the tuple, and so do ports: each pair is moved as one word, because
 * the hash will read the tuple as two (see nat_tuple_turn()). */
static void put_ports(struct nat_tuple *tuple, uint32_t ports)
{
	const struct nat_tuple rest = {.protocol = tuple->protocol};
	uint32_t tail;

	memcpy(&tail, &rest.protocol, sizeof(tail));
	const uint64_t word = NAT_PAIR32(ports, tail);
	memcpy(&tuple->local_port_be, &word, sizeof(word));
}

static void parse_ports(struct nat_pkt *pkt, const uint8_t *l4)
{
	const uint32_t ports = nat_get32(l4 + NAT_L4_SOURCE_PORT);

	put_ports(&pkt->tuple, ports);
	if ((ports & 0xffff) == 0 || ports >> 16 == 0)
		nat_drop(pkt, NAT_REASON_BAD_PORT);
}

static void parse_tcp(struct nat_pkt *pkt, const uint8_t *l4)
{
	if (pkt->l4_bytes < NAT_TCP_HEADER_BYTES) {
		/* RFC 1858: a first fragment too small for the TCP header hides its flags. */
		nat_drop(pkt,
			 pkt->stage_flags & NAT_STAGE_FRAGMENT ? NAT_REASON_FRAG_BAD : NAT_REASON_TRUNCATED);
		return;
	}
	unsigned header_bytes = (l4[NAT_TCP_OFFSET] >> 4) * 4u;
	if (header_bytes < NAT_TCP_HEADER_BYTES ||
	    (header_bytes > pkt->l4_bytes && !(pkt->stage_flags & NAT_STAGE_FRAGMENT))) {
		nat_drop(pkt, NAT_REASON_BAD_LENGTH);
		return;
	}
	pkt->tcp_flags = l4[NAT_TCP_FLAGS];
	parse_ports(pkt, l4);
}

static void parse_udp(struct nat_pkt *pkt, const uint8_t *l4)
{
	if (pkt->l4_bytes < NAT_UDP_HEADER_BYTES) {
		nat_drop(pkt, NAT_REASON_TRUNCATED);
		return;
	}
	unsigned length_bytes = nat_read16(l4 + NAT_UDP_LENGTH);
	if (length_bytes < NAT_UDP_HEADER_BYTES ||
	    (length_bytes > pkt->l4_bytes && !(pkt->stage_flags & NAT_STAGE_FRAGMENT))) {
		nat_drop(pkt, NAT_REASON_BAD_LENGTH);
		return;
	}
	parse_ports(pkt, l4);
}

static void parse_icmp(struct nat_pkt *pkt, const uint8_t *l4)
{
	if (pkt->l4_bytes < NAT_ICMP_HEADER_BYTES) {
		nat_drop(pkt, NAT_REASON_TRUNCATED);
		return;
	}
	switch (l4[NAT_ICMP_TYPE]) {
	case NAT_ICMP_ECHO:
	case NAT_ICMP_ECHO_REPLY:
		pkt->tuple.local_port_be = nat_get16(l4 + NAT_ICMP_ID);
		return;
	case NAT_ICMP_UNREACHABLE:
	case NAT_ICMP_QUENCH:
	case NAT_ICMP_TIME_EXCEEDED:
	case NAT_ICMP_PARAMETER:
		/* An error in fragments cannot be restored; RFC 1812 4.3.2.3 keeps errors to 576 bytes, so
		 * nobody sends one. */
		if (pkt->stage_flags & NAT_STAGE_FRAGMENT)
			nat_drop(pkt, NAT_REASON_FRAG_BAD);
		else
			pkt->stage_flags |= NAT_STAGE_ICMP_ERROR;
		return;
	default:
		return; /* classify.c decides: it may be for the gateway itself */
	}
}

static void parse_transport(struct nat_pkt *pkt)
{
	const uint8_t *l4 = pkt->l3 + pkt->l4_offset;

	switch (pkt->tuple.protocol) {
	case NAT_PROTO_TCP:
		parse_tcp(pkt, l4);
		break;
	case NAT_PROTO_UDP:
		parse_udp(pkt, l4);
		break;
	case NAT_PROTO_ICMP:
		parse_icmp(pkt, l4);
		break;
	default:
		break; /* classify.c decides */
	}
}

static void parse_fragment(struct nat_pkt *pkt, unsigned fragment)
{
	const unsigned offset_bytes = (fragment & NAT_IP_OFFSET_MASK) * 8u;

	pkt->stage_flags |= NAT_STAGE_FRAGMENT;
	/* RFC 1858 and 3128: offset 1 overwrites TCP flags; and nothing may end behind byte 65535. */
	if ((fragment & NAT_IP_OFFSET_MASK) == 1 || offset_bytes + pkt->total_bytes > UINT16_MAX ||
	    pkt->l4_bytes == 0)
		nat_drop(pkt, NAT_REASON_FRAG_BAD);
	else if (offset_bytes != 0)
		pkt->stage_flags |= NAT_STAGE_LATER;
}

/* RFC 791 section 3.1. A source route would choose the way of a packet whose addresses we change; nobody
 * forwards it any more (RFC 7126 sections 4.3 and 4.4). */
static bool are_good_options(const uint8_t *ip, unsigned header_bytes)
{
	enum { END = 0, NOTHING = 1, LOOSE_SOURCE_ROUTE = 131, STRICT_SOURCE_ROUTE = 137 };

	for (unsigned at = NAT_IP_HEADER_BYTES; at < header_bytes;) {
		const uint8_t kind = ip[at];
		if (kind == END)
			return true;
		if (kind == NOTHING) {
			at++;
			continue;
		}
		if (kind == LOOSE_SOURCE_ROUTE || kind == STRICT_SOURCE_ROUTE || at + 1 == header_bytes ||
		    ip[at + 1] < 2 || at + ip[at + 1] > header_bytes)
			return false;
		at += ip[at + 1];
	}
	return true;
}

static void begin(struct nat_pkt *pkt)
{
	pkt->settled = 0;
	pkt->made = 0;
	pkt->stage_flags = 0;
	pkt->tcp_flags = 0;
	pkt->session = pkt->guess = NAT_NO_SESSION;
	pkt->zone = NAT_NO_ZONE;
	pkt->hop = (struct nat_hop){0};
}

/* Nearly all packets are whole, TCP or UDP, without IP options, and right. Their checks are made on whole
 * words and lead to nothing but yes; parse_one() finds out what is wrong with the others, or that nothing
 * is.
 *
 * The header begins with version 4 and 5 words, and is no fragment. */
static bool parse_plain(struct nat_pkt *pkt)
{
	static const uint8_t shape[8] = {0x45}, looked_at[8] = {0xff, [NAT_IP_FRAGMENT] = 0x3f, 0xff};
	const uint8_t *ip = pkt->l3, *l4 = ip + NAT_IP_HEADER_BYTES;
	const uint32_t len_bytes = pkt->len_bytes;
	uint64_t first, wanted, mask, addresses;

	if (len_bytes < NAT_IP_HEADER_BYTES + NAT_UDP_HEADER_BYTES)
		return false;
	memcpy(&first, ip, sizeof(first));
	memcpy(&wanted, shape, sizeof(wanted));
	memcpy(&mask, looked_at, sizeof(mask));
	if ((first & mask) != wanted)
		return false;
	const uint32_t total_bytes = nat_read16(ip + NAT_IP_LENGTH),
		       l4_bytes = total_bytes - NAT_IP_HEADER_BYTES;
	const uint8_t protocol = ip[NAT_IP_PROTOCOL], source = ip[NAT_IP_SOURCE],
		      destination = ip[NAT_IP_DESTINATION];
	if (total_bytes > len_bytes)
		return false;
	uint8_t tcp_flags = 0;
	if (protocol == NAT_PROTO_UDP) {
		const uint32_t length_bytes = nat_read16(l4 + NAT_UDP_LENGTH);
		if (length_bytes < NAT_UDP_HEADER_BYTES || length_bytes + NAT_IP_HEADER_BYTES > total_bytes)
			return false;
	} else {
		if (protocol != NAT_PROTO_TCP || total_bytes < NAT_IP_HEADER_BYTES + NAT_TCP_HEADER_BYTES)
			return false;
		const uint32_t header_bytes = (l4[NAT_TCP_OFFSET] >> 4) * 4u;
		if (header_bytes < NAT_TCP_HEADER_BYTES || header_bytes > l4_bytes)
			return false;
		tcp_flags = l4[NAT_TCP_FLAGS];
	}
	/* 0/8, 127/8, groups and what is above: see is_martian_source() and its like */
	if ((uint8_t)(source - 1) >= 223 || source == 127 || (uint8_t)(destination - 1) >= 223 ||
	    destination == 127)
		return false;
	const uint32_t ports = nat_get32(l4 + NAT_L4_SOURCE_PORT);
	if ((ports & 0xffff) == 0 || ports >> 16 == 0)
		return false;
	if (!(pkt->flags & NAT_PKT_IP_CSUM_GOOD) && !nat_csum_header_good(ip))
		return false;
	begin(pkt);
	pkt->tcp_flags = tcp_flags;
	pkt->total_bytes = (uint16_t)total_bytes;
	pkt->l4_offset = NAT_IP_HEADER_BYTES;
	pkt->l4_bytes = (uint16_t)l4_bytes;
	memcpy(&addresses, ip + NAT_IP_SOURCE, sizeof(addresses));
	memcpy(&pkt->tuple.local_be, &addresses, sizeof(addresses));
	pkt->tuple.protocol = protocol;
	put_ports(&pkt->tuple, ports);
	return true;
}

static void parse_one(struct nat_pkt *pkt)
{
	const uint8_t *ip = pkt->l3;

	begin(pkt);
	if (pkt->len_bytes < NAT_IP_HEADER_BYTES) {
		nat_drop(pkt, NAT_REASON_TRUNCATED);
		return;
	}
	const unsigned header_bytes = (ip[0] & 0xf) * 4u;
	pkt->total_bytes = nat_read16(ip + NAT_IP_LENGTH);
	if (ip[0] >> 4 != 4) {
		nat_drop(pkt, NAT_REASON_BAD_VERSION);
		return;
	}
	if (header_bytes < NAT_IP_HEADER_BYTES || pkt->total_bytes < header_bytes) {
		nat_drop(pkt, NAT_REASON_BAD_HEADER);
		return;
	}
	if (pkt->total_bytes > pkt->len_bytes) {
		nat_drop(pkt, NAT_REASON_TRUNCATED);
		return;
	}
	if (!(pkt->flags & NAT_PKT_IP_CSUM_GOOD) && nat_csum_bytes(ip, header_bytes) != 0) {
		nat_drop(pkt, NAT_REASON_BAD_CHECKSUM);
		return;
	}
	if (NAT_UNLIKELY(header_bytes > NAT_IP_HEADER_BYTES) && !are_good_options(ip, header_bytes)) {
		nat_drop(pkt, NAT_REASON_BAD_OPTION);
		return;
	}
	pkt->l4_offset = (uint16_t)header_bytes;
	pkt->l4_bytes = (uint16_t)(pkt->total_bytes - header_bytes);
	pkt->tuple = (struct nat_tuple){.protocol = ip[NAT_IP_PROTOCOL]};
	memcpy(&pkt->tuple.local_be, ip + NAT_IP_SOURCE, 8);
	const uint32_t source = NAT_NTOH32(pkt->tuple.local_be),
		       destination = NAT_NTOH32(pkt->tuple.remote_be);
	/* 0.0.0.0 as source towards a group is DHCP's: the kernel's matter. */
	if (is_group(destination)) {
		nat_pass(pkt, NAT_REASON_GROUP);
		return;
	}
	if (is_martian_source(source)) {
		nat_drop(pkt, NAT_REASON_BAD_SOURCE);
		return;
	}
	if (is_martian_destination(destination) || destination >> 28 == 15) {
		nat_drop(pkt, NAT_REASON_BAD_DESTINATION);
		return;
	}
	const unsigned fragment = nat_read16(ip + NAT_IP_FRAGMENT);
	if (NAT_UNLIKELY(fragment & (NAT_IP_MF | NAT_IP_OFFSET_MASK))) {
		parse_fragment(pkt, fragment);
		if (pkt->settled || (pkt->stage_flags & NAT_STAGE_LATER))
			return;
	}
	parse_transport(pkt);
}

void nat_parse(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (NAT_LIKELY(parse_plain(&pkt[i]))) {
			nat_session_fetch_bucket(e, &pkt[i]);
			continue;
		}
		parse_one(&pkt[i]);
		if (nat_has_own_tuple(&pkt[i]))
			nat_session_fetch_bucket(e, &pkt[i]);
	}
}
