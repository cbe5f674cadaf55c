/* Bounds: no byte outside a packet is read or written, and of the packet only the fields of a translation.
 *
 * The packet is an object of exactly its length, filled with any bytes; what parse.c leaves unsettled is
 * rewritten with any session, in any direction. Sums are any number here, the same each time (csum.c
 * proves them), but the bytes under a sum must be there.
 */
#undef __SSE2__
#include "proof.h"

#include "../core/csum.h"

/* Byte by byte, as a little-endian machine keeps them: the solver's work is half of what memcpy() makes. */
static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put16(uint8_t *p, uint16_t v)
{
	p[0] = (uint8_t)v;
	p[1] = (uint8_t)(v >> 8);
}

static void put32(uint8_t *p, uint32_t v)
{
	put16(p, (uint16_t)v);
	put16(p + 2, (uint16_t)(v >> 16));
}

static uint16_t the_sum;
static uint16_t any_sum(const uint8_t *p, size_t n)
{
	assert(n == 0 || __CPROVER_r_ok(p, n));
	return the_sum;
}

#define nat_get16                get16
#define nat_get32                get32
#define nat_put16                put16
#define nat_put32                put32
#define nat_csum_bytes(p, n)     any_sum(p, n)
#define nat_sum_bytes(sum, p, n) ((sum) + any_sum(p, n))
#define nat_csum_update(sum, by) nondet_u16()

#include "../core/engine.h"
#include "../core/icmp.c"
#include "../core/known.c"
#include "../core/rewrite.c"

#define PACKET_BYTES_MAX 64u

/* What rewriting calls elsewhere touches no packet. */
uint32_t nat_policy_zone(const struct nat_policy *policy, uint32_t source, uint32_t destination)
{
	(void)policy, (void)source, (void)destination;
	return 0;
}

void nat_session_touch(struct nat_engine *e, struct nat_pkt *pkt)
{
	(void)e, (void)pkt;
}

void nat_frags_lead(struct nat_engine *e, struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be,
		    uint16_t id_be)
{
	(void)e, (void)pkt, (void)source_be, (void)destination_be, (void)id_be;
}

uint16_t nat_frags_id(struct nat_engine *e, uint32_t source_be, uint32_t destination_be, uint8_t protocol)
{
	(void)e, (void)source_be, (void)destination_be, (void)protocol;
	return nondet_u16();
}

static struct nat_zone zone;
static struct nat_policy policy = {.zone = &zone};
static struct nat_session session;
static struct nat_engine engine = {.policy = &policy, .record = &session};

static struct nat_pkt any_packet(void)
{
	the_sum = nondet_u16();
	const uint32_t bytes = nondet_u8();
	assume(bytes >= 1 && bytes <= PACKET_BYTES_MAX);
	struct nat_pkt pkt = {.l3 = malloc(bytes), .len_bytes = bytes, .flags = nondet_u16()};
	assume(pkt.l3 != NULL);
	return pkt;
}

static void any_session(void)
{
	session.inside.local_be = nondet_u32();
	session.inside.local_port_be = nondet_u16();
	session.out_addr_be = nondet_u32();
	session.out_port_be = nondet_u16();
}

/* What parse.c promises of a packet that it leaves unsettled, and all that rewriting relies on: assumed
 * here, since the same claim about parse.c had no answer in ten minutes; the fuzzer and test_bad_input.py
 * try it. */
static bool is_sound(const struct nat_pkt *pkt)
{
	const uint8_t *l4 = pkt->l3 + pkt->l4_offset;
	const bool later = (pkt->stage_flags & NAT_STAGE_LATER) != 0;

	if (pkt->len_bytes < NAT_IP_HEADER_BYTES || pkt->total_bytes > pkt->len_bytes ||
	    pkt->l4_offset != (pkt->l3[0] & 0xf) * 4u || pkt->l4_offset < NAT_IP_HEADER_BYTES ||
	    pkt->l4_offset + pkt->l4_bytes != pkt->total_bytes ||
	    pkt->tuple.protocol != pkt->l3[NAT_IP_PROTOCOL])
		return false;
	if (later)
		return true;
	switch (pkt->tuple.protocol) {
	case NAT_PROTO_TCP:
		return pkt->l4_bytes >= NAT_TCP_HEADER_BYTES && pkt->tcp_flags == l4[NAT_TCP_FLAGS];
	case NAT_PROTO_UDP:
		return pkt->l4_bytes >= NAT_UDP_HEADER_BYTES && pkt->tcp_flags == 0;
	case NAT_PROTO_ICMP:
		return pkt->l4_bytes >= NAT_ICMP_HEADER_BYTES && pkt->tcp_flags == 0;
	default:
		return true;
	}
}

static bool in_range(unsigned at, unsigned first, unsigned count)
{
	return at >= first && at < first + count;
}

/* A packet that parse.c may have left so, whole or the first of its fragments. */
static struct nat_pkt any_parsed_packet(void)
{
	struct nat_pkt pkt = any_packet();

	pkt.total_bytes = nondet_u16();
	pkt.l4_offset = nondet_u16();
	pkt.l4_bytes = nondet_u16();
	pkt.tcp_flags = nondet_u8();
	pkt.stage_flags = nondet_u8();
	pkt.tuple.protocol = nondet_u8();
	pkt.guess = nondet_u32();
	assume(is_sound(&pkt) && !(pkt.stage_flags & NAT_STAGE_LATER));
	return pkt;
}

/* Claim: rewriting a packet that parsing has left touches no byte outside it, and changes only TTL, the
 * identification of a fragment, the address, port or identifier of one end, and checksums. For: every TCP,
 * UDP and ICMP query packet of 20 to 64 bytes, fragments too, both directions, every session; no MSS to be
 * lowered (which is the next claim). cbmc: --unwind 2 */
void proof_rewrite(void)
{
	struct nat_pkt pkt = any_parsed_packet();
	const unsigned at = nondet_u8();
	assume(at < pkt.len_bytes && !(pkt.stage_flags & NAT_STAGE_ICMP_ERROR));
	assume(pkt.tuple.protocol == NAT_PROTO_TCP || pkt.tuple.protocol == NAT_PROTO_UDP ||
	       pkt.tuple.protocol == NAT_PROTO_ICMP);
	any_session();
	const uint8_t before = pkt.l3[at];

	rewrite_one(&engine, &pkt);
	const bool inbound = nat_is_inbound(&pkt), icmp = pkt.tuple.protocol == NAT_PROTO_ICMP;
	const unsigned l4 = pkt.l4_offset,
		       checksum = icmp                                  ? NAT_ICMP_CHECKSUM
				  : pkt.tuple.protocol == NAT_PROTO_TCP ? NAT_TCP_CHECKSUM
									: NAT_UDP_CHECKSUM,
		       port = icmp      ? NAT_ICMP_ID
			      : inbound ? NAT_L4_DESTINATION_PORT
					: NAT_L4_SOURCE_PORT;
	assert(pkt.l3[at] == before || at == NAT_IP_TTL || in_range(at, NAT_IP_CHECKSUM, 2) ||
	       in_range(at, inbound ? NAT_IP_DESTINATION : NAT_IP_SOURCE, 4) ||
	       ((pkt.stage_flags & NAT_STAGE_FRAGMENT) && in_range(at, NAT_IP_ID, 2)) ||
	       in_range(at, l4 + port, 2) || in_range(at, l4 + checksum, 2));
}

/* Claim: a packet of a known session that known.c takes is changed in TTL, one address, one port and
 * checksums, and nothing outside it is touched. For: every packet of 20 to 64 bytes that is_plain()
 * admits, both directions, every session. cbmc: --unwind 2 */
void proof_known(void)
{
	struct nat_pkt pkt = any_parsed_packet();
	const unsigned at = nondet_u8();
	assume(at < pkt.len_bytes && is_plain(&pkt));
	const bool inbound = nat_is_inbound(&pkt);
	const uint8_t before = pkt.l3[at];

	translate(&pkt, nondet_u32(), nondet_u16(), inbound);
	const unsigned l4 = pkt.l4_offset,
		       checksum = pkt.tuple.protocol == NAT_PROTO_TCP ? NAT_TCP_CHECKSUM : NAT_UDP_CHECKSUM,
		       port = inbound ? NAT_L4_DESTINATION_PORT : NAT_L4_SOURCE_PORT;
	assert(pkt.l3[at] == before || at == NAT_IP_TTL || in_range(at, NAT_IP_CHECKSUM, 2) ||
	       in_range(at, inbound ? NAT_IP_DESTINATION : NAT_IP_SOURCE, 4) || in_range(at, l4 + port, 2) ||
	       in_range(at, l4 + checksum, 2));
}

/* Claim: lowering the MSS touches no byte outside the TCP segment, and changes only its checksum and bytes
 * among its options. For: every segment of 20, 24 or 28 bytes, so up to 8 bytes of options, whatever they
 * are. cbmc: --unwind 29 */
void proof_clamp_mss(void)
{
	static uint8_t least[20], some[24], more[28];
	const unsigned kind = nondet_u8(), at = nondet_u8();
	struct nat_pkt pkt = {.l3 = kind == 0   ? least
				    : kind == 1 ? some
						: more, /* seen from its TCP header */
			      .l4_bytes = kind == 0   ? 20
					  : kind == 1 ? 24
						      : 28,
			      .flags = nondet_u16()};
	for (unsigned i = 0; i < pkt.l4_bytes; i++)
		pkt.l3[i] = nondet_u8();
	assume(at < pkt.l4_bytes);
	const uint8_t before = pkt.l3[at];
	const unsigned header = (pkt.l3[NAT_TCP_OFFSET] >> 4) * 4u;
	assume(header >= NAT_TCP_HEADER_BYTES);

	clamp_mss(&pkt, nondet_u16());
	assert(pkt.l3[at] == before || in_range(at, NAT_TCP_CHECKSUM, 2) ||
	       in_range(at, NAT_TCP_HEADER_BYTES, header - NAT_TCP_HEADER_BYTES));
}

/* Claim: reading and rewriting an ICMP error touches no byte outside the packet; of the error TTL, both
 * addresses and checksums change, of the packet that it quotes one address, one port or identifier, and
 * checksums. For: every error of 68 bytes without IP options, with whatever it quotes and however long
 * that says it is, both directions, every session. cbmc: --unwind 69 --max-field-sensitivity-array-size
 * 128 */
void proof_icmp_error(void)
{
	static uint8_t bytes[68];
	const unsigned at = nondet_u8();
	struct nat_pkt pkt = {.l3 = bytes,
			      .len_bytes = 68,
			      .total_bytes = 68,
			      .l4_offset = NAT_IP_HEADER_BYTES,
			      .l4_bytes = 68 - NAT_IP_HEADER_BYTES,
			      .stage_flags = nondet_u8(),
			      .flags = nondet_u16(),
			      .tuple = {.protocol = NAT_PROTO_ICMP}};
	assume(at < pkt.len_bytes);
	the_sum = nondet_u16();
	for (unsigned i = 0; i < pkt.len_bytes; i++)
		bytes[i] = nondet_u8();
	any_session();
	const uint8_t before = pkt.l3[at];

	pkt.settled = 0;
	nat_icmp_parse_error(&pkt);
	assert(pkt.l3[at] == before);
	if (pkt.settled)
		return;
	nat_icmp_rewrite_error(&engine, &pkt, &session);
	const bool inbound = nat_is_inbound(&pkt);
	const unsigned icmp = pkt.l4_offset, quote = icmp + NAT_ICMP_HEADER_BYTES,
		       l4 = quote + (pkt.l3[quote] & 0xf) * 4u;
	const uint8_t protocol = pkt.l3[quote + NAT_IP_PROTOCOL];
	const unsigned checksum = protocol == NAT_PROTO_ICMP  ? NAT_ICMP_CHECKSUM
				  : protocol == NAT_PROTO_TCP ? NAT_TCP_CHECKSUM
							      : NAT_UDP_CHECKSUM,
		       port = protocol == NAT_PROTO_ICMP ? NAT_ICMP_ID
			      : inbound                  ? NAT_L4_SOURCE_PORT
							 : NAT_L4_DESTINATION_PORT;
	assert(pkt.l3[at] == before || at == NAT_IP_TTL || in_range(at, NAT_IP_CHECKSUM, 10) ||
	       in_range(at, icmp + NAT_ICMP_CHECKSUM, 2) || in_range(at, quote + NAT_IP_CHECKSUM, 2) ||
	       in_range(at, quote + (inbound ? NAT_IP_SOURCE : NAT_IP_DESTINATION), 4) ||
	       in_range(at, l4 + port, 2) || in_range(at, l4 + checksum, 2));
}
