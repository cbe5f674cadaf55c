/* Packets of sessions that are there already, which nearly all are: looked up, routed, translated and
 * booked in one walk instead of four.
 *
 * Takes a packet only if nothing about it is special: whole TCP or UDP without IP options; its record came
 * to the cache, holds its tuple and is not over; its state and timer stay as they are; it may leave (TTL,
 * route, MTU). All others stay unsettled, as they came, for the stages in session.c, route.c, allocate.c
 * and rewrite.c, which decide the same for any packet. known_test.c compares the two ways.
 *
 * A record was sent for while its packet was classified. The walk is in steps of a few packets, so that
 * the last of a burst are asked about late, when theirs have come too; and because only the record says
 * where a packet from outside goes, its routes are asked for step by step.
 */
#include "engine.h"

#define STEP 8u

/* What the packets taken add to the counters. The sums are made in registers: a counter in memory waits
 * for its own last value. */
struct sums {
	uint64_t packets, tcp_packets, bytes, tcp_bytes;
};

/* No packet may overtake a RST of its session, which the next segment takes back (tcp.c); all else that
 * two packets of a session do comes to the same in any order. So what is left over a RST is remembered:
 * sessions with a bit of their number each, which also bars a few others; `lost`: one whose session is not
 * known yet. */
struct barred {
	uint64_t sessions;
	bool lost;
};

NAT_ALWAYS_INLINE bool is_plain(const struct nat_pkt *pkt)
{
	return !pkt->settled && !(pkt->stage_flags & ~NAT_STAGE_INBOUND) && pkt->guess != NAT_NO_RECORD &&
	       pkt->l4_offset == NAT_IP_HEADER_BYTES && /* no IP options: translate() counts on it */
	       (pkt->tuple.protocol == NAT_PROTO_UDP || pkt->tuple.protocol == NAT_PROTO_TCP) &&
	       !(pkt->flags & (NAT_PKT_KERNEL_ROUTES | NAT_PKT_CSUM_PARTIAL | NAT_PKT_TAKEN_OVER));
}

/* nat_session_touch() would change nothing but bytes and time. */
NAT_ALWAYS_INLINE bool stays_as_it_is(const struct nat_session *s, const struct nat_pkt *pkt, bool inbound)
{
	if ((s->flags & (NAT_RECORD_MAPPING | NAT_RECORD_ASKED)) | (s->state & NAT_STATE_FOREIGN))
		return false;
	if (pkt->tuple.protocol == NAT_PROTO_TCP)
		return !(pkt->tcp_flags & (NAT_TCP_SYN | NAT_TCP_FIN | NAT_TCP_RST)) &&
		       !(s->state & NAT_TCP_SAW_RST);
	return !inbound || s->timer != NAT_TIMER_UDP_ONE_WAY;
}

NAT_ALWAYS_INLINE bool may_leave(const struct nat_pkt *pkt, struct nat_hop hop)
{
	return (hop.kind == NAT_HOP_FORWARD || hop.kind == NAT_HOP_KERNEL) && pkt->l3[NAT_IP_TTL] > 1 &&
	       (hop.mtu_bytes == 0 || pkt->total_bytes <= hop.mtu_bytes);
}

NAT_ALWAYS_INLINE void book(const struct nat_engine *e, struct nat_session *s, const struct nat_pkt *pkt,
			    bool inbound)
{
	if (inbound)
		s->bytes_in += pkt->total_bytes;
	else
		s->bytes_out += pkt->total_bytes;
	if (!inbound || !(s->flags & NAT_RECORD_UNDER_MAPPING) || pkt->tuple.protocol == NAT_PROTO_TCP)
		s->last_seen_s = e->now_s; /* see nat_session_touch() */
}

/* What rewrite.c does to such a packet. What is replaced stands in the tuple too. TTL and protocol share a
 * word, of which one TTL less takes the same whatever it was. */
NAT_ALWAYS_INLINE void translate(const struct nat_pkt *pkt, uint32_t address_be, uint16_t port_be,
				 bool inbound)
{
	uint8_t *ip = pkt->l3, *l4 = ip + NAT_IP_HEADER_BYTES;
	const bool tcp = pkt->tuple.protocol == NAT_PROTO_TCP;
	uint8_t *field = l4 + (tcp ? NAT_TCP_CHECKSUM : NAT_UDP_CHECKSUM);
	const uint16_t one_ttl_be = NAT_HTON16(0x100), old = nat_get16(field);
	const nat_sum addresses = nat_sum_replace32(0, pkt->tuple.local_be, address_be);
	const nat_sum ports = nat_sum_replace16(addresses, pkt->tuple.local_port_be, port_be);

	nat_put32(ip + (inbound ? NAT_IP_DESTINATION : NAT_IP_SOURCE), address_be);
	nat_put16(l4 + (inbound ? NAT_L4_DESTINATION_PORT : NAT_L4_SOURCE_PORT), port_be);
	ip[NAT_IP_TTL]--;
	nat_put16(ip + NAT_IP_CHECKSUM, nat_csum_update(nat_get16(ip + NAT_IP_CHECKSUM),
							nat_sum_replace16(addresses, one_ttl_be, 0)));
	uint16_t new = nat_csum_update(old, ports);
	if (!tcp) /* RFC 768: zero means "no checksum", a sum of zero is sent as all ones */
		new = old == 0 ? 0 : new == 0 ? UINT16_MAX : new;
	nat_put16(field, new);
}

/* Both directions have a walk of their own, made from the same text: which one it is is known to the
 * compiler. */
NAT_ALWAYS_INLINE bool is_known(const struct nat_engine *e, const struct nat_pkt *pkt, bool inbound)
{
	const struct nat_session *s = &e->record[pkt->guess];

	return nat_session_holds_on(s, &pkt->tuple, inbound) && stays_as_it_is(s, pkt, inbound) &&
	       !nat_session_over(e, s);
}

NAT_ALWAYS_INLINE void take(struct nat_engine *e, struct nat_pkt *pkt, bool inbound, struct sums *sums)
{
	struct nat_session *s = &e->record[pkt->guess];
	const bool tcp = pkt->tuple.protocol == NAT_PROTO_TCP;

	book(e, s, pkt, inbound);
	translate(pkt, inbound ? s->inside.local_be : s->out_addr_be,
		  inbound ? s->inside.local_port_be : s->out_port_be, inbound);
	pkt->session = pkt->guess;
	nat_settle(pkt, NAT_FORWARD, NAT_REASON_OK);
	pkt->settled = NAT_SETTLED_COUNTED;
	sums->packets++;
	sums->bytes += pkt->total_bytes;
	sums->tcp_packets += tcp;
	sums->tcp_bytes += tcp ? pkt->total_bytes : 0;
}

static void count(struct nat_engine *e, const struct sums *sums, bool inbound)
{
	struct nat_traffic *tcp = &e->counters.traffic[NAT_TRAFFIC_TCP],
			   *udp = &e->counters.traffic[NAT_TRAFFIC_UDP];

	if (inbound) {
		tcp->packets_in += sums->tcp_packets;
		tcp->bytes_in += sums->tcp_bytes;
		udp->packets_in += sums->packets - sums->tcp_packets;
		udp->bytes_in += sums->bytes - sums->tcp_bytes;
	} else {
		tcp->packets_out += sums->tcp_packets;
		tcp->bytes_out += sums->tcp_bytes;
		udp->packets_out += sums->packets - sums->tcp_packets;
		udp->bytes_out += sums->bytes - sums->tcp_bytes;
	}
	e->counters.received += sums->packets;
	e->counters.forwarded += sums->packets;
}

static void leave(const struct nat_pkt *pkt, struct barred *barred)
{
	if (pkt->settled || !(pkt->tcp_flags & NAT_TCP_RST))
		return;
	barred->sessions |= UINT64_C(1) << pkt->guess % 64;
	barred->lost = true;
}

NAT_ALWAYS_INLINE bool is_barred(const struct nat_pkt *pkt, const struct barred *barred)
{
	return (barred->sessions >> pkt->guess % 64 & 1) != 0;
}

/* Up to the first packet of the other direction: the number of those before it. Likewise below. */
static uint32_t walk_outbound(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n, struct barred *barred)
{
	struct sums sums = {0};
	uint32_t i = 0;

	for (; i < n; i++) {
		if (NAT_UNLIKELY(nat_is_inbound(&pkt[i])))
			break;
		if (NAT_LIKELY(is_plain(&pkt[i]) && is_known(e, &pkt[i], false) &&
			       may_leave(&pkt[i], pkt[i].hop) && !is_barred(&pkt[i], barred)))
			take(e, &pkt[i], false, &sums);
		else
			leave(&pkt[i], barred);
	}
	count(e, &sums, false);
	return i;
}

static uint32_t step_inbound(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n, struct barred *barred,
			     struct sums *sums)
{
	uint32_t destination_be[STEP], of[STEP], wanted = 0, i = 0;
	struct nat_hop hop[STEP];

	for (; i < n; i++) {
		if (NAT_UNLIKELY(!nat_is_inbound(&pkt[i])))
			break;
		if (NAT_LIKELY(is_plain(&pkt[i]) && is_known(e, &pkt[i], true) &&
			       !is_barred(&pkt[i], barred))) {
			destination_be[wanted] = e->record[pkt[i].guess].inside.local_be;
			of[wanted++] = i;
		} else {
			leave(&pkt[i], barred);
		}
	}
	if (wanted != 0)
		e->world.route(e->world.context, destination_be, hop, wanted);
	for (uint32_t k = 0; k < wanted; k++)
		if (NAT_LIKELY(may_leave(&pkt[of[k]], hop[k]))) {
			pkt[of[k]].hop = hop[k];
			take(e, &pkt[of[k]], true, sums);
		}
	return i;
}

static uint32_t walk_inbound(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n, struct barred *barred)
{
	struct sums sums = {0};
	uint32_t at = 0;

	while (at < n) {
		const uint32_t step = n - at < STEP ? n - at : STEP;
		const uint32_t done = step_inbound(e, pkt + at, step, barred, &sums);
		at += done;
		if (done < step)
			break;
	}
	count(e, &sums, true);
	return at;
}

/* Those whose record stands in the other bucket, which has come by now: sends for their records. */
static uint32_t fetch_late(const struct nat_engine *e, const struct nat_pkt *pkt,
			   uint32_t late[NAT_BURST_MAX], uint32_t guess[NAT_BURST_MAX])
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < e->elsewhere.n; i++) {
		const struct nat_pkt *p = &pkt[e->elsewhere.at[i]];
		const struct nat_bucket *bucket = nat_session_other_bucket(e, p);
		const uint32_t ways = p->settled ? 0 : nat_bucket_ways(bucket, nat_index_tag(p->hash));
		if (!ways)
			continue;
		late[n] = e->elsewhere.at[i];
		guess[n] = bucket->entry[NAT_CTZ64(ways)] >> 1;
		NAT_PREFETCH(&e->record[guess[n++]]);
	}
	return n;
}

uint32_t nat_known(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	const uint64_t before = e->counters.forwarded;
	struct barred barred = {0, false};
	uint32_t late[NAT_BURST_MAX], guess[NAT_BURST_MAX], n_late = 0;

	if (NAT_UNLIKELY(e->elsewhere.n))
		n_late = fetch_late(e, pkt, late, guess);
	/* A burst comes from one port, so most are of one direction only. Where it changes, the RST of a
	 * session that was not found yet could be one of this direction's. */
	for (uint32_t at = 0; at < n && !barred.lost;)
		at += nat_is_inbound(&pkt[at]) ? walk_inbound(e, pkt + at, n - at, &barred)
					       : walk_outbound(e, pkt + at, n - at, &barred);
	for (uint32_t i = 0; i < n_late; i++) {
		struct nat_pkt *p = &pkt[late[i]];
		p->guess = guess[i];
		if (barred.lost)
			continue;
		if (nat_is_inbound(p))
			walk_inbound(e, p, 1, &barred);
		else
			walk_outbound(e, p, 1, &barred);
	}
	return (uint32_t)(e->counters.forwarded - before);
}
