/* ICMP errors: those of others, translated with the packet they quote (RFC 5508 section 4), and our own.
 *
 * An error from outside quotes a packet as we sent it: its source is the mapping. An error from inside quotes
 * one as we delivered it: its destination is the host. The quoted packet finds the session; its address, port
 * (or identifier) and the checksums that lie within the quote are restored to what the receiver of the error
 * knows. An error never refreshes or ends a session (RFC 5508 REQ-6).
 */
#include <string.h>

#include "engine.h"

struct quote {
	uint8_t *ip, *l4;
	unsigned l4_bytes; /* of the quoted transport header and data that are there */
	uint8_t protocol;
};

static bool read_quote(const struct nat_pkt *pkt, struct quote *q)
{
	const unsigned room = pkt->l4_bytes - (unsigned)NAT_ICMP_HEADER_BYTES;

	q->ip = pkt->l3 + pkt->l4_offset + NAT_ICMP_HEADER_BYTES;
	if (room < NAT_IP_HEADER_BYTES || q->ip[0] >> 4 != 4)
		return false;
	const unsigned header_bytes = (q->ip[0] & 0xf) * 4u; /* RFC 5508 REQ-3b: options are skipped */
	if (header_bytes < NAT_IP_HEADER_BYTES || header_bytes + 8 > room)
		return false;
	/* A later fragment has no ports; RFC 5508 REQ-3a: a damaged header is not believed. */
	if ((nat_read16(q->ip + NAT_IP_FRAGMENT) & NAT_IP_OFFSET_MASK) != 0 ||
	    nat_csum_bytes(q->ip, header_bytes) != 0)
		return false;
	q->l4 = q->ip + header_bytes;
	q->l4_bytes = room - header_bytes;
	q->protocol = q->ip[NAT_IP_PROTOCOL];
	return true;
}

uint32_t nat_icmp_quoted_host(const struct nat_pkt *pkt)
{
	struct quote q;

	return read_quote(pkt, &q) ? nat_get32(q.ip + NAT_IP_DESTINATION)
				   : nat_get32(pkt->l3 + NAT_IP_SOURCE);
}

void nat_icmp_parse_error(struct nat_pkt *pkt)
{
	const bool inbound = nat_is_inbound(pkt);
	struct quote q;

	if (nat_csum_bytes(pkt->l3 + pkt->l4_offset, pkt->l4_bytes) != 0) {
		nat_drop(pkt, NAT_REASON_ICMP_CHECKSUM); /* RFC 5508 REQ-3 */
		return;
	}
	if (!read_quote(pkt, &q)) {
		nat_drop(pkt, NAT_REASON_ICMP_QUOTE);
		return;
	}
	/* What was the quoted packet's source is "local" for an error from outside, "remote" for one from
	 * inside. */
	const unsigned local_address = inbound ? NAT_IP_SOURCE : NAT_IP_DESTINATION;
	const unsigned remote_address = inbound ? NAT_IP_DESTINATION : NAT_IP_SOURCE;
	struct nat_tuple tuple = {.local_be = nat_get32(q.ip + local_address),
				  .remote_be = nat_get32(q.ip + remote_address),
				  .protocol = q.protocol,
				  .side = inbound};
	if (q.protocol == NAT_PROTO_TCP || q.protocol == NAT_PROTO_UDP) {
		tuple.local_port_be =
			nat_get16(q.l4 + (inbound ? NAT_L4_SOURCE_PORT : NAT_L4_DESTINATION_PORT));
		tuple.remote_port_be =
			nat_get16(q.l4 + (inbound ? NAT_L4_DESTINATION_PORT : NAT_L4_SOURCE_PORT));
	} else if (q.protocol == NAT_PROTO_ICMP &&
		   (q.l4[NAT_ICMP_TYPE] == NAT_ICMP_ECHO || q.l4[NAT_ICMP_TYPE] == NAT_ICMP_ECHO_REPLY)) {
		tuple.local_port_be = nat_get16(q.l4 + NAT_ICMP_ID);
	} else {
		nat_drop(pkt, NAT_REASON_ICMP_QUOTE);
		return;
	}
	/* An error goes to the source of the packet that it quotes (RFC 1122 3.2.2); RFC 5508 REQ-4c,
	 * REQ-7a say so of those from outside. REQ-5 leaves the destination of those from inside alone:
	 * one that goes elsewhere would tell a third party the host's public port, past the zones, which
	 * were asked about the quoted remote. */
	if (nat_get32(q.ip + NAT_IP_SOURCE) != nat_get32(pkt->l3 + NAT_IP_DESTINATION)) {
		nat_drop(pkt, NAT_REASON_ICMP_QUOTE);
		return;
	}
	pkt->tuple = tuple;
}

static void put_checked(uint8_t *field, nat_sum change, bool zero_means_none)
{
	const uint16_t old = nat_get16(field);
	if (zero_means_none && old == 0)
		return;
	uint16_t new = nat_csum_update(old, change);
	nat_put16(field, zero_means_none && new == 0 ? UINT16_MAX : new);
}

static void restore_quote(const struct quote *q, unsigned address_offset, uint32_t address_be,
			  unsigned port_offset, uint16_t port_be)
{
	const uint32_t old_address_be = nat_get32(q->ip + address_offset);
	const nat_sum addresses = nat_sum_replace32(0, old_address_be, address_be);

	nat_put32(q->ip + address_offset, address_be);
	put_checked(q->ip + NAT_IP_CHECKSUM, addresses, false);
	if (q->protocol == NAT_PROTO_ICMP)
		port_offset = NAT_ICMP_ID;
	const nat_sum port = nat_sum_replace16(0, nat_get16(q->l4 + port_offset), port_be);
	nat_put16(q->l4 + port_offset, port_be);
	if (q->protocol == NAT_PROTO_ICMP)
		put_checked(q->l4 + NAT_ICMP_CHECKSUM, port, false);
	else if (q->protocol == NAT_PROTO_UDP)
		put_checked(q->l4 + NAT_UDP_CHECKSUM, addresses + port, true);
	else if (q->l4_bytes >= NAT_TCP_CHECKSUM + 2)
		put_checked(q->l4 + NAT_TCP_CHECKSUM, addresses + port, false);
}

void nat_icmp_rewrite_error(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_session *s)
{
	const bool inbound = nat_is_inbound(pkt);
	uint8_t *icmp = pkt->l3 + pkt->l4_offset;
	struct quote q;

	(void)e;
	bool readable = read_quote(pkt, &q);
	NAT_ASSERT(readable);
	if (inbound)
		restore_quote(&q, NAT_IP_SOURCE, s->inside.local_be, NAT_L4_SOURCE_PORT,
			      s->inside.local_port_be);
	else
		restore_quote(&q, NAT_IP_DESTINATION, s->out_addr_be, NAT_L4_DESTINATION_PORT,
			      s->out_port_be);
	/* Errors are rare and short: the whole sum is simpler than its difference, and cannot carry an old
	 * fault on. */
	nat_put16(icmp + NAT_ICMP_CHECKSUM, 0);
	nat_put16(icmp + NAT_ICMP_CHECKSUM, nat_csum_bytes(icmp, pkt->l4_bytes));
	nat_rewrite_addresses(pkt, inbound ? nat_get32(pkt->l3 + NAT_IP_SOURCE) : s->out_addr_be,
			      inbound ? s->inside.local_be : nat_get32(pkt->l3 + NAT_IP_DESTINATION));
	nat_settle(pkt, NAT_FORWARD, NAT_REASON_OK);
}

/* ---- our own ---- */

/* A bucket of one second's worth of packets, filled by time. */
static bool may_make(struct nat_engine *e)
{
	const uint64_t second_ns = UINT64_C(1000000000), rate = e->policy->limits.icmp_errors_per_s;
	struct nat_outbox *box = &e->outbox;

	if (rate == 0)
		return true; /* no limit */
	box->credit_ns += e->now_ns - box->credited_ns;
	box->credited_ns = e->now_ns;
	if (box->credit_ns > second_ns)
		box->credit_ns = second_ns;
	if (box->credit_ns < second_ns / rate)
		return false;
	box->credit_ns -= second_ns / rate;
	return true;
}

static void write_ip(uint8_t *ip, unsigned total_bytes, uint8_t protocol, uint32_t source_be,
		     uint32_t destination_be)
{
	memset(ip, 0, NAT_IP_HEADER_BYTES);
	ip[0] = 0x45;
	nat_write16(ip + NAT_IP_LENGTH, total_bytes);
	nat_write16(ip + NAT_IP_FRAGMENT,
		    NAT_IP_DF); /* RFC 6864: atomic, so the identification may stay zero */
	ip[NAT_IP_TTL] = 64;
	ip[NAT_IP_PROTOCOL] = protocol;
	nat_put32(ip + NAT_IP_SOURCE, source_be);
	nat_put32(ip + NAT_IP_DESTINATION, destination_be);
	nat_put16(ip + NAT_IP_CHECKSUM, nat_csum_bytes(ip, NAT_IP_HEADER_BYTES));
}

/* Sends what stands in `ip` to the sender of `about`. */
static void send_made(struct nat_engine *e, const struct nat_pkt *about, uint8_t *ip)
{
	struct nat_pkt made = {.l3 = ip,
			       .len_bytes = nat_read16(ip + NAT_IP_LENGTH),
			       .total_bytes = nat_read16(ip + NAT_IP_LENGTH),
			       .l4_offset = NAT_IP_HEADER_BYTES,
			       .iface = about->iface,
			       .made = 1};
	const uint32_t destination_be = nat_get32(ip + NAT_IP_DESTINATION);

	e->world.route(e->world.context, &destination_be, &made.hop, 1);
	if (ip[NAT_IP_PROTOCOL] == NAT_PROTO_ICMP && made.hop.iface < e->policy->n_interfaces &&
	    e->policy->silent[made.hop.iface])
		return; /* RFC 5508 REQ-9 */
	nat_settle(&made, NAT_FORWARD, NAT_REASON_OK);
	e->counters.made++;
	nat_outbox_put(e, &made);
}

void nat_icmp_make(struct nat_engine *e, const struct nat_pkt *pkt, uint8_t type, uint8_t code,
		   uint16_t mtu_bytes)
{
	/* RFC 1122 3.2.2: never about an ICMP error, nor about a fragment other than the first. */
	if (pkt->stage_flags & (NAT_STAGE_ICMP_ERROR | NAT_STAGE_LATER))
		return;
	const uint32_t own_be = e->world.own_address(e->world.context, pkt->iface);
	if (own_be == 0 || !may_make(e))
		return;
	uint8_t *ip = nat_outbox_buffer(e);
	if (!ip)
		return;
	const unsigned overhead = NAT_IP_HEADER_BYTES + NAT_ICMP_HEADER_BYTES;
	const unsigned quoted = pkt->total_bytes < NAT_MADE_BYTES_MAX - overhead
					? pkt->total_bytes
					: NAT_MADE_BYTES_MAX - overhead;
	uint8_t *icmp = ip + NAT_IP_HEADER_BYTES;

	write_ip(ip, overhead + quoted, NAT_PROTO_ICMP, own_be, nat_get32(pkt->l3 + NAT_IP_SOURCE));
	memset(icmp, 0, NAT_ICMP_HEADER_BYTES);
	icmp[NAT_ICMP_TYPE] = type;
	icmp[NAT_ICMP_CODE] = code;
	nat_write16(icmp + NAT_ICMP_MTU, mtu_bytes);
	memcpy(icmp + NAT_ICMP_HEADER_BYTES, pkt->l3, quoted);
	nat_put16(icmp + NAT_ICMP_CHECKSUM, nat_csum_bytes(icmp, NAT_ICMP_HEADER_BYTES + quoted));
	send_made(e, pkt, ip);
}

void nat_tcp_make_reset(struct nat_engine *e, const struct nat_pkt *pkt)
{
	uint8_t *ip = (pkt->stage_flags & NAT_STAGE_FRAGMENT) || !may_make(e) ? NULL : nat_outbox_buffer(e);
	if (!ip)
		return;
	const uint8_t *from = pkt->l3 + pkt->l4_offset;
	uint8_t *tcp = ip + NAT_IP_HEADER_BYTES;
	const unsigned header_bytes = (from[NAT_TCP_OFFSET] >> 4) * 4u;
	const bool has_ack = (from[NAT_TCP_FLAGS] & NAT_TCP_ACK) != 0;

	write_ip(ip, NAT_IP_HEADER_BYTES + NAT_TCP_HEADER_BYTES, NAT_PROTO_TCP,
		 nat_get32(pkt->l3 + NAT_IP_DESTINATION), nat_get32(pkt->l3 + NAT_IP_SOURCE));
	memset(tcp, 0, NAT_TCP_HEADER_BYTES);
	nat_put16(tcp + NAT_L4_SOURCE_PORT, nat_get16(from + NAT_L4_DESTINATION_PORT));
	nat_put16(tcp + NAT_L4_DESTINATION_PORT, nat_get16(from + NAT_L4_SOURCE_PORT));
	if (has_ack) {
		nat_put32(tcp + NAT_TCP_SEQUENCE, nat_get32(from + NAT_TCP_ACKNOWLEDGE));
	} else {
		uint32_t consumed = pkt->l4_bytes - header_bytes + !!(from[NAT_TCP_FLAGS] & NAT_TCP_SYN) +
				    !!(from[NAT_TCP_FLAGS] & NAT_TCP_FIN);
		nat_put32(tcp + NAT_TCP_ACKNOWLEDGE,
			  NAT_HTON32(NAT_NTOH32(nat_get32(from + NAT_TCP_SEQUENCE)) + consumed));
	}
	tcp[NAT_TCP_OFFSET] = NAT_TCP_HEADER_BYTES / 4 << 4;
	tcp[NAT_TCP_FLAGS] = has_ack ? NAT_TCP_RST : NAT_TCP_RST | NAT_TCP_ACK;
	nat_sum sum = nat_sum_bytes(0, ip + NAT_IP_SOURCE, 8);
	sum += NAT_HTON16(NAT_PROTO_TCP);
	sum += NAT_HTON16(NAT_TCP_HEADER_BYTES);
	nat_put16(tcp + NAT_TCP_CHECKSUM,
		  (uint16_t)~nat_sum_fold(nat_sum_bytes(sum, tcp, NAT_TCP_HEADER_BYTES)));
	send_made(e, pkt, ip);
}
