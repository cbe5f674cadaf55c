/* Two engines see the same packets. One takes the short ways of known.c and begin.c where it can; to the
 * other all packets come as if handed over, which those leave to the general stages. They must not differ
 * in a bit. */
#include "testbed.h"

#define BURSTS    4000u
#define REMOTE    ADDRESS(198, 51, 100, 1)
#define HOST      ADDRESS(100, 64, 0, 1)
#define POOL      ADDRESS(203, 0, 113, 1)
#define BYTES_MAX 64u

static uint64_t state = 1;

static uint32_t chance(uint32_t n)
{
	state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return nat_scale32((uint32_t)(state >> 32), n);
}

struct seen { /* an outside tuple that was in use */
	uint32_t remote, address;
	uint16_t remote_port, port;
	uint8_t protocol;
};
static struct seen seen[256];
static uint32_t n_seen;

static void note(const struct nat_pkt *pkt)
{
	const uint8_t *ip = pkt->l3;

	if (pkt->verdict != NAT_FORWARD || pkt->iface != 0 || pkt->len_bytes < 28 || ip[0] != 0x45)
		return;
	seen[n_seen++ % 256] =
		(struct seen){nat_read32(ip + NAT_IP_DESTINATION), nat_read32(ip + NAT_IP_SOURCE),
			      nat_read16(ip + 22), nat_read16(ip + 20), ip[NAT_IP_PROTOCOL]};
}

/* Mostly right, sometimes not. */
static uint32_t write_packet(uint8_t *ip, uint8_t iface)
{
	static const uint8_t flag[] = {NAT_TCP_SYN,
				       NAT_TCP_ACK,
				       NAT_TCP_ACK,
				       NAT_TCP_ACK,
				       NAT_TCP_FIN | NAT_TCP_ACK,
				       NAT_TCP_RST,
				       NAT_TCP_SYN | NAT_TCP_ACK};
	uint8_t protocol = chance(2) ? NAT_PROTO_UDP : NAT_PROTO_TCP;
	uint32_t total_bytes = 28 + chance(BYTES_MAX - 28), source = HOST + chance(8),
		 destination = REMOTE + chance(4);
	uint16_t source_port = (uint16_t)(1000 + chance(8)),
		 destination_port = (uint16_t)(chance(8) ? 53 + chance(3) : 0);

	memset(ip, 0, BYTES_MAX);
	if (iface == 1) {
		const struct seen *s = &seen[chance(n_seen < 256 ? n_seen + 1 : 256) % 256];
		source = s->remote;
		destination = chance(16) ? s->address : POOL + chance(4);
		source_port = s->remote_port;
		destination_port = s->port;
		protocol = chance(32) ? s->protocol : protocol;
	} else if (chance(32) == 0) {
		destination = POOL; /* hairpin */
	}
	if (chance(64) == 0)
		protocol = NAT_PROTO_ICMP;
	if (protocol == NAT_PROTO_TCP && total_bytes < 40 && chance(16))
		total_bytes = 40;
	ip[0] = chance(64) ? 0x45 : (uint8_t)chance(256);
	nat_write16(ip + NAT_IP_LENGTH, total_bytes);
	nat_write16(ip + NAT_IP_ID, chance(65536));
	nat_write16(ip + NAT_IP_FRAGMENT, chance(64) ? NAT_IP_DF : chance(65536));
	ip[NAT_IP_TTL] = chance(64) ? 64 : (uint8_t)chance(3);
	ip[NAT_IP_PROTOCOL] = protocol;
	nat_put32(ip + NAT_IP_SOURCE, NAT_HTON32(source));
	nat_put32(ip + NAT_IP_DESTINATION, chance(64) ? NAT_HTON32(destination) : chance(UINT32_MAX));
	nat_put16(ip + NAT_IP_CHECKSUM, nat_csum_bytes(ip, 20));
	if (chance(64) == 0)
		ip[chance(20)] ^= 1;
	nat_write16(ip + 20, source_port);
	nat_write16(ip + 22, destination_port);
	if (protocol == NAT_PROTO_TCP) {
		ip[20 + NAT_TCP_OFFSET] = (uint8_t)((chance(64) ? 5 : chance(16)) << 4);
		ip[20 + NAT_TCP_FLAGS] = flag[chance(sizeof(flag))];
		nat_write16(ip + 20 + NAT_TCP_CHECKSUM, chance(65536));
	} else {
		nat_write16(ip + 20 + NAT_UDP_LENGTH, chance(64) ? total_bytes - 20 : chance(64));
		nat_write16(ip + 20 + NAT_UDP_CHECKSUM, chance(4) ? chance(65536) : chance(2) * 65535);
	}
	return chance(64) ? total_bytes : chance(BYTES_MAX);
}

static void compare_counters(const struct nat_counters *a, const struct nat_counters *b)
{
	struct nat_counters x = *a, y = *b;

	assert(x.received == y.taken_over && x.taken_over == 0 && y.received == 0);
	x.received = x.taken_over = y.received = y.taken_over = 0;
	assert(memcmp(&x, &y, sizeof(x)) == 0);
}

static void compare_outboxes(struct testbed *a, struct testbed *b)
{
	struct nat_pkt x, y;

	for (;;) {
		const bool one = nat_engine_next(a->e, &x), other = nat_engine_next(b->e, &y);
		assert(one == other);
		if (!one)
			return;
		assert(x.verdict == y.verdict && x.reason == y.reason && x.len_bytes == y.len_bytes);
		if (x.made)
			assert(memcmp(x.l3, y.l3, x.len_bytes) == 0);
	}
}

/* `forgets`: sets of ports are made anew all the time, as after a reload, and for one address only. */
static void run(enum nat_mapping_kind mapping, enum nat_filtering filtering, uint16_t last_port, bool forgets)
{
	const bool scarce =
		last_port < 2063; /* time hardly moves: a wheel that is behind is turned when ports are out */
	/* Held fragments keep their bytes: each packet has its own. */
	static uint8_t bytes[2][4096][BYTES_MAX];
	struct testbed t[2];
	uint64_t now_ns = SECOND_NS, taken = 0;
	uint32_t at = 0;

	for (int i = 0; i < 2; i++) {
		testbed_config(&t[i], forgets ? 1 : 2, 2000, last_port, 4096);
		t[i].pool.mapping = mapping;
		t[i].pool.filtering = filtering;
		testbed_start(&t[i], now_ns);
	}
	for (uint32_t burst = 0; burst < BURSTS; burst++) {
		struct nat_pkt pkt[2][NAT_BURST_MAX];
		const uint32_t n = 1 + chance(NAT_BURST_MAX), mixed = chance(4) == 0, iface = chance(2);

		for (uint32_t i = 0; i < n; i++, at = (at + 1) % 4096) {
			const uint8_t from = (uint8_t)(mixed ? chance(2) : iface);
			const uint32_t len_bytes = write_packet(bytes[0][at], from);
			memcpy(bytes[1][at], bytes[0][at], BYTES_MAX);
			for (int k = 0; k < 2; k++)
				pkt[k][i] = (struct nat_pkt){.l3 = bytes[k][at],
							     .len_bytes = len_bytes,
							     .iface = from,
							     .flags = k ? NAT_PKT_TAKEN_OVER : 0};
		}
		now_ns += scarce || chance(8) ? 1000 : chance(2) ? SECOND_NS / 4 : chance(8) * 10 * SECOND_NS;
		for (int i = 0; i < 2 && forgets; i++)
			nat_portsets_forget(t[i].e);
		nat_engine_run(t[0].e, pkt[0], n, now_ns);
		nat_engine_run(t[1].e, pkt[1], n, now_ns);
		for (uint32_t i = 0; i < n; i++) {
			assert(pkt[0][i].verdict == pkt[1][i].verdict &&
			       pkt[0][i].reason == pkt[1][i].reason);
			assert(memcmp(pkt[0][i].l3, pkt[1][i].l3, BYTES_MAX) == 0);
			assert(memcmp(&pkt[0][i].hop, &pkt[1][i].hop, sizeof(struct nat_hop)) == 0);
			taken += pkt[0][i].settled == NAT_SETTLED_COUNTED;
			assert(pkt[1][i].settled != NAT_SETTLED_COUNTED);
			note(&pkt[0][i]);
		}
		compare_outboxes(&t[0], &t[1]);
		compare_counters(nat_engine_counters(t[0].e), nat_engine_counters(t[1].e));
	}
	/* Were both ways gone? */
	const uint64_t forwarded = nat_engine_counters(t[0].e)->forwarded;
	assert(taken > forwarded / 4 && taken < forwarded);
	const struct nat_engine *a = t[0].e, *b = t[1].e;
	assert(memcmp(a->record, b->record, 4096 * sizeof(struct nat_session)) == 0);
	assert(memcmp(a->index.bucket, b->index.bucket, a->index.n_buckets * sizeof(struct nat_bucket)) == 0);
	assert(memcmp(a->hosts.slot, b->hosts.slot, a->hosts.n_slots * sizeof(struct nat_host)) == 0);
	assert(memcmp(a->notes->address, b->notes->address, 2 * sizeof(struct nat_address_note)) == 0);
	assert((a->portsets.n_used != 0) >= scarce);
	assert(a->notes->zone[0].created == b->notes->zone[0].created);
	for (int i = 0; i < 2; i++)
		testbed_stop(&t[i], false);
}

int main(void)
{
	run(NAT_ENDPOINT_DEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 2024,
	    false); /* sets of ports, at last refusals */
	run(NAT_ENDPOINT_DEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 2063, false);
	run(NAT_ENDPOINT_DEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 2063, true);
	run(NAT_ENDPOINT_DEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 2255, false);
	run(NAT_ENDPOINT_DEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 65535, false);
	run(NAT_ENDPOINT_INDEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 2063, false);
	run(NAT_ENDPOINT_INDEPENDENT, NAT_FILTER_ADDRESS, 2063, false);
	return 0;
}
