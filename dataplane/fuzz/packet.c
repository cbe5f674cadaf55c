/* Packets, time and changes of mind through a whole engine, as the fuzzer likes.
 *
 * The input is a small program. Its first byte chooses the pool's kind, its filter and what is done with
 * strays; then come steps, each one byte of operation and its operands:
 *
 *	RAW         bytes as they are, from inside or outside, with header repaired or not
 *	TEMPLATE    a sound TCP, UDP or ICMP packet between a few addresses and ports
 *	REPLY       an earlier packet that was forwarded, turned round
 *	ERROR       an ICMP error that quotes one
 *	FRAGMENT    one cut into pieces, in any order
 *	AGAIN       an earlier packet once more, with one byte changed
 *	TIME        seconds pass
 *	CHANGE      reload with another policy, restart on the same table, or a session cleared
 *
 * After each burst: every packet has a verdict, the equation of nat.h holds, and what was forwarded differs
 * from what came in only where a translation may write. Records, index, mappings and port sets are compared
 * with each other now and then, and at the end everything must age away to nothing.
 *
 *	CC=clang meson setup .build/fuzz dataplane -Dfuzz=true ...; `make fuzz` does it
 */
#include <stdio.h>
#include <stdlib.h>

#include "../core/engine.h"

#define CHECK(condition)                                                                                     \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);            \
			abort();                                                                             \
		}                                                                                            \
	} while (0)

#define ADDRESS(a, b, c, d) ((uint32_t)(a) << 24 | (uint32_t)(b) << 16 | (uint32_t)(c) << 8 | (uint32_t)(d))
#define SECOND_NS           UINT64_C(1000000000)
#define SESSIONS            40u
#define REMEMBERED          8u
#define BURST               4u
#define PACKET_MAX          2048u
#define N_ADDRESSES         3u
#define PORT_FIRST          4090u /* 12 ports over a word's boundary */
#define PORT_LAST           4101u

enum { RAW, TEMPLATE, REPLY, ERROR, FRAGMENT, AGAIN, TIME, CHANGE };

struct input {
	const uint8_t *at, *end;
};

struct block { /* a packet on its way; one byte past its end is not ours */
	uint8_t *original;
	uint32_t len_bytes;
	uint8_t bytes[];
};

struct past { /* a packet that was forwarded: as it came and as it left */
	uint8_t came[PACKET_MAX], left[PACKET_MAX];
	uint32_t bytes;
	uint8_t iface;
};

struct lab {
	struct nat_engine *e;
	struct nat_table *table;
	void *engine_memory,
		*table_memory; /* kept from input to input: making them anew costs most of the time */
	size_t engine_bytes;
	struct nat_policy *policy;
	struct nat_config config;
	struct nat_interface_config interface[2];
	struct nat_range range[2], drain;
	struct nat_pool_config pool;
	struct nat_zone_config zone[3];
	struct nat_static_config fixed[2];
	struct nat_pkt burst[BURST];
	uint32_t n_burst;
	uint64_t now_ns, held_blocks;
	struct past past[REMEMBERED];
	uint32_t n_past;
};

static unsigned byte(struct input *in)
{
	return in->at < in->end ? *in->at++ : 0;
}

/* ---- the world
 * ------------------------------------------------------------------------------------------------------ */

static bool is_inside(uint32_t address)
{
	return address >> 22 == ADDRESS(100, 64, 0, 0) >> 22;
}

static void route(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n)
{
	(void)context;
	for (uint32_t i = 0; i < n; i++) {
		const uint32_t address = NAT_NTOH32(destination_be[i]);
		hop[i] = (struct nat_hop){destination_be[i], 1500, is_inside(address) ? 0 : 1,
					  NAT_HOP_FORWARD};
		if (address >> 8 == ADDRESS(192, 0, 2, 0) >> 8)
			hop[i].kind = NAT_HOP_LOCAL;
		else if (address >> 17 == ADDRESS(198, 18, 0, 0) >> 17)
			hop[i].kind = address & 1 ? NAT_HOP_NONE : NAT_HOP_PROHIBIT;
		else if (address >> 24 == 10)
			hop[i].kind = NAT_HOP_KERNEL;
	}
}

static uint32_t own_address(void *context, uint8_t iface)
{
	(void)context;
	return NAT_HTON32(ADDRESS(192, 0, 2, 1 + iface));
}

static bool is_of_pool(const struct lab *lab, uint32_t address_be)
{
	return nat_policy_pool_of(lab->policy, address_be) >= 0;
}

static void configure(struct lab *lab, unsigned choice)
{
	const struct nat_prefix inside = {ADDRESS(100, 64, 0, 0), 10}, any = {0, 0};

	lab->interface[0] = (struct nat_interface_config){.name = "inside0", .role = NAT_ROLE_INSIDE};
	lab->interface[1] = (struct nat_interface_config){.name = "outside0", .role = NAT_ROLE_OUTSIDE};
	lab->range[0] = (struct nat_range){ADDRESS(203, 0, 113, 1), ADDRESS(203, 0, 113, N_ADDRESSES - 1)};
	lab->range[1] = (struct nat_range){ADDRESS(203, 0, 113, 9), ADDRESS(203, 0, 113, 9)};
	lab->drain = (struct nat_range){ADDRESS(203, 0, 113, 2), ADDRESS(203, 0, 113, 2)};
	lab->pool = (struct nat_pool_config){
		.name = "p",
		.ranges = lab->range,
		.n_ranges = 2,
		.drain = &lab->drain,
		.n_drain = choice >> 6 & 1,
		.port_first = PORT_FIRST,
		.port_last = PORT_LAST,
		.mapping = choice & 1 ? NAT_ENDPOINT_INDEPENDENT : NAT_ENDPOINT_DEPENDENT,
		.filtering = (enum nat_filtering)((choice >> 1 & 3) % 3),
		.select = choice >> 3 & 1 ? NAT_SELECT_PAIRED : NAT_SELECT_ROUND_ROBIN};
	lab->zone[0] = (struct nat_zone_config){
		.source = {ADDRESS(100, 64, 9, 0), 24}, .destination = any, .action = NAT_ACTION_DROP};
	lab->zone[1] = (struct nat_zone_config){
		.source = inside, .destination = {ADDRESS(192, 0, 2, 128), 25}, .action = NAT_ACTION_PASS};
	lab->zone[2] = (struct nat_zone_config){
		.source = inside, .destination = any, .action = NAT_ACTION_POOL, .mss_clamp_bytes = 1400};
	lab->fixed[0] = (struct nat_static_config){ADDRESS(100, 64, 0, 4), ADDRESS(203, 0, 113, 9), 53,
						   PORT_FIRST, choice & 2 ? NAT_PROTO_TCP : NAT_PROTO_UDP};
	lab->fixed[1] = (struct nat_static_config){ADDRESS(100, 64, 0, 3), ADDRESS(203, 0, 113, 2), 0, 0, 0};
	lab->config = (struct nat_config){.statics = lab->fixed,
					  .n_statics = choice >> 4 & 3 & 2,
					  .workers = 1,
					  .max_sessions = SESSIONS,
					  .interfaces = lab->interface,
					  .n_interfaces = 2,
					  .pools = &lab->pool,
					  .n_pools = 1,
					  .zones = lab->zone,
					  .n_zones = 3,
					  .limits = {.sessions_per_host = choice >> 7 ? 9 : 0,
						     .new_per_host_per_s = choice >> 7 ? 5 : 0,
						     .icmp_errors_per_s = choice >> 7 ? 10 : 0,
						     .fragments = 16},
					  .timeouts = {7440, 240, choice >> 6 & 1 ? 4 : 240, 300, 120, 20, 60,
						       choice >> 5 & 1 ? 0 : 30},
					  .tcp_midflow = (enum nat_midflow)((choice >> 4 & 3) % 3),
					  .refusal = (enum nat_refusal)((choice >> 5 & 3) % 3)};
}

static void *memory(size_t bytes)
{
	const size_t whole = (bytes + NAT_CACHE_LINE - 1) & ~(size_t)(NAT_CACHE_LINE - 1);
	void *mem = aligned_alloc(NAT_CACHE_LINE, whole);

	CHECK(mem);
	memset(mem, 0, whole);
	return mem;
}

static void start_engine(struct lab *lab)
{
	struct nat_engine_params params = {.table = lab->table,
					   .policy = lab->policy,
					   .world = {lab, route, own_address},
					   .max_sessions = SESSIONS,
					   .seed = 1,
					   .now_ns = lab->now_ns,
					   .n_workers = 1};

	if (nat_engine_size(&params) > lab->engine_bytes) {
		free(lab->engine_memory);
		lab->engine_bytes = nat_engine_size(&params);
		lab->engine_memory = memory(lab->engine_bytes);
	}
	lab->e = nat_engine_init(lab->engine_memory, &params);
}

/* ---- what must hold
 * -------------------------------------------------------------------------------------------------- */

static void check_equation(const struct lab *lab)
{
	const struct nat_counters *c = nat_engine_counters(lab->e);
	uint64_t out = c->forwarded + c->passed + c->handed_over + c->held;

	for (int reason = 0; reason < NAT_REASON_COUNT; reason++)
		if (nat_reason_verdict((enum nat_reason)reason) == NAT_DROP)
			out += c->reason[reason];
	CHECK(c->received + c->taken_over == out);
	CHECK(c->held == lab->held_blocks);
}

static bool same_tuple(const struct nat_tuple *a, const struct nat_tuple *b)
{
	return memcmp(a, b, sizeof(*a)) == 0;
}

/* A set says taken exactly where the index holds the tuple. */
static void check_portset(const struct lab *lab, const struct nat_portset *set)
{
	struct nat_tuple tuple = {.local_be = set->address_be,
				  .remote_be = set->remote_be,
				  .remote_port_be = set->remote_port_be,
				  .protocol = set->protocol,
				  .side = 1};

	for (uint32_t port = PORT_FIRST; port <= PORT_LAST; port++) {
		if (!(set->known[port / 4096] >> (port / 64 % 64) & 1))
			continue;
		tuple.local_port_be = NAT_HTON16(port);
		const bool indexed =
			nat_index_find(&lab->e->index, &tuple, nat_tuple_hash(&lab->e->index.key, &tuple)) !=
			NAT_NO_RECORD;
		if (nat_policy_static(lab->policy, 1, set->address_be, tuple.local_port_be, set->protocol))
			continue;
		CHECK(indexed == (set->taken[port / 64] >> (port % 64) & 1));
	}
}

static void check_tables(const struct lab *lab)
{
	struct nat_engine *e = lab->e;
	const struct nat_session *live[SESSIONS];
	uint32_t n = 0, n_sessions = 0;

	for (uint32_t i = 0; i < SESSIONS; i++) { /* the free list never leads to a later one */
		const struct nat_session *s = &e->record[i];
		if (s->timer == NAT_TIMER_FREE)
			continue;
		live[n++] = s;
		n_sessions += !(s->flags & NAT_RECORD_MAPPING);
	}
	CHECK(n + e->records_left == SESSIONS);
	CHECK(n_sessions == e->counters.sessions);
	for (uint32_t i = 0; i < n; i++) {
		const struct nat_session *s = live[i];
		const struct nat_tuple outside = nat_session_outside(s);
		const uint32_t record = (uint32_t)(s - e->record);
		uint64_t references = 0;

		CHECK(nat_index_find(&e->index, &s->inside, nat_tuple_hash(&e->index.key, &s->inside)) ==
		      record);
		CHECK(nat_index_find(&e->index, &outside, nat_tuple_hash(&e->index.key, &outside)) == record);
		for (uint32_t k = 0; k < n; k++) {
			const struct nat_tuple other = nat_session_outside(live[k]);
			CHECK(k == i || !same_tuple(&live[k]->inside, &s->inside));
			CHECK(k == i || !same_tuple(&other, &outside));
			references += !(live[k]->flags & NAT_RECORD_MAPPING) &&
				      (live[k]->flags & NAT_RECORD_UNDER_MAPPING) &&
				      live[k]->inside.local_be == s->inside.local_be &&
				      live[k]->inside.local_port_be == s->inside.local_port_be &&
				      live[k]->inside.protocol == s->inside.protocol;
		}
		if (s->flags &
		    NAT_RECORD_UNDER_MAPPING) { /* never without its mapping, nor at another port */
			const uint32_t mapping = nat_session_mapping(e, s);
			CHECK(mapping != NAT_NO_RECORD);
			CHECK(e->record[mapping].out_addr_be == s->out_addr_be);
			CHECK(e->record[mapping].out_port_be == s->out_port_be);
		}
		if ((s->flags & NAT_RECORD_MAPPING) && s->inside.zero[0] == 0)
			CHECK(s->references == references);
	}
	for (uint32_t i = 0; i < e->portsets.n_used; i++)
		check_portset(lab, &e->portsets.set[i]);
}

/* Sum over the transport and its pseudo header, 0xffff if it is good; ICMP has no pseudo header. */
static uint16_t transport_sum(const uint8_t *ip)
{
	const unsigned header = (ip[0] & 0xf) * 4u, bytes = nat_read16(ip + NAT_IP_LENGTH) - header;
	nat_sum sum = 0;

	if (ip[NAT_IP_PROTOCOL] != NAT_PROTO_ICMP) {
		sum = nat_sum_bytes(0, ip + NAT_IP_SOURCE, 8);
		sum += NAT_HTON16(ip[NAT_IP_PROTOCOL]);
		sum += NAT_HTON16(bytes);
	}
	return nat_sum_fold(nat_sum_bytes(sum, ip + header, bytes));
}

/* Zero has two names in one's complement: a segment that is all zeros, checksum included, adds up as well. */
static bool adds_up(const uint8_t *ip)
{
	const uint16_t sum = transport_sum(ip);
	return sum == UINT16_MAX || sum == 0;
}

static bool in_range(unsigned at, unsigned first, unsigned count)
{
	return at >= first && at < first + count;
}

/* May a translation write the byte `at` of the transport `l4`, seen from its start? */
static bool may_write_transport(uint8_t protocol, const uint8_t *l4, unsigned at)
{
	if (protocol == NAT_PROTO_ICMP)
		return in_range(at, NAT_ICMP_CHECKSUM, 4);
	if (protocol == NAT_PROTO_UDP)
		return at < 4 || in_range(at, NAT_UDP_CHECKSUM, 2);
	const bool option = at >= NAT_TCP_HEADER_BYTES && at < (l4[NAT_TCP_OFFSET] >> 4) * 4u;
	return at < 4 || in_range(at, NAT_TCP_CHECKSUM, 2) || (option && (l4[NAT_TCP_FLAGS] & NAT_TCP_SYN));
}

static bool may_write_ip(unsigned at)
{
	return in_range(at, NAT_IP_CHECKSUM, 10);
}

static bool may_write(const uint8_t *ip, unsigned at)
{
	const unsigned header = (ip[0] & 0xf) * 4u, fragment = nat_read16(ip + NAT_IP_FRAGMENT);
	const uint8_t *l4 = ip + header;

	if (at == NAT_IP_TTL || may_write_ip(at))
		return true;
	if (in_range(at, NAT_IP_ID, 2))
		return (fragment & (NAT_IP_MF | NAT_IP_OFFSET_MASK)) != 0;
	if (at < header || (fragment & NAT_IP_OFFSET_MASK) != 0)
		return false;
	at -= header;
	const bool error = ip[NAT_IP_PROTOCOL] == NAT_PROTO_ICMP && l4[NAT_ICMP_TYPE] != NAT_ICMP_ECHO &&
			   l4[NAT_ICMP_TYPE] != NAT_ICMP_ECHO_REPLY;
	if (!error)
		return may_write_transport(ip[NAT_IP_PROTOCOL], l4, at);
	const uint8_t *quote = l4 + NAT_ICMP_HEADER_BYTES;
	const unsigned quote_header = (quote[0] & 0xf) * 4u;
	if (at < NAT_ICMP_HEADER_BYTES)
		return in_range(at, NAT_ICMP_CHECKSUM, 2);
	at -= NAT_ICMP_HEADER_BYTES;
	if (at < quote_header)
		return may_write_ip(at);
	return at - quote_header < 18 &&
	       may_write_transport(quote[NAT_IP_PROTOCOL], quote + quote_header, at - quote_header);
}

static void check_forwarded(const struct lab *lab, const struct nat_pkt *pkt, const uint8_t *came)
{
	const uint8_t *left = pkt->l3;
	const unsigned total = nat_read16(left + NAT_IP_LENGTH), header = (came[0] & 0xf) * 4u;
	const bool cut = total < nat_read16(came + NAT_IP_LENGTH);
	const uint32_t source_be = nat_get32(left + NAT_IP_SOURCE),
		       destination_be = nat_get32(left + NAT_IP_DESTINATION);

	if (!(pkt->flags & NAT_PKT_KERNEL_ROUTES))
		CHECK(pkt->hop.kind == NAT_HOP_FORWARD || pkt->hop.kind == NAT_HOP_KERNEL);
	CHECK(nat_csum_bytes(left, header) == 0);
	CHECK(left[NAT_IP_TTL] == came[NAT_IP_TTL] - !(pkt->flags & NAT_PKT_KERNEL_ROUTES));
	/* Nothing leaves untranslated, and nothing comes in that is still addressed to the pool. */
	CHECK(!is_of_pool(lab, destination_be) || lab->policy != lab->e->policy);
	if (pkt->hop.iface == 1)
		CHECK(!is_inside(NAT_NTOH32(source_be)));
	CHECK(total == (cut ? pkt->len_bytes : nat_read16(came + NAT_IP_LENGTH)));
	for (unsigned i = 0; i < total; i++)
		CHECK(left[i] == came[i] || may_write(came, i) || (cut && in_range(i, NAT_IP_LENGTH, 6)));
	if (cut)
		return;
	if ((nat_read16(came + NAT_IP_FRAGMENT) & (NAT_IP_MF | NAT_IP_OFFSET_MASK)) ||
	    (pkt->flags & NAT_PKT_CSUM_PARTIAL))
		return;
	if (came[NAT_IP_PROTOCOL] == NAT_PROTO_UDP && nat_get16(came + header + NAT_UDP_CHECKSUM) == 0)
		CHECK(nat_get16(left + header + NAT_UDP_CHECKSUM) == 0);
	else
		CHECK(adds_up(came) == adds_up(left));
}

/* ---- bursts
 * ----------------------------------------------------------------------------------------------------------
 */

static void remember(struct lab *lab, const struct nat_pkt *pkt, const uint8_t *came)
{
	const uint32_t bytes = nat_read16(came + NAT_IP_LENGTH);
	struct past *past = &lab->past[lab->n_past++ % REMEMBERED];

	memcpy(past->came, came, bytes);
	memcpy(past->left, pkt->l3, bytes);
	past->bytes = bytes;
	past->iface = pkt->iface;
}

static void finish(struct lab *lab, struct nat_pkt *pkt)
{
	struct block *block = pkt->cookie;

	if (pkt->verdict == NAT_FORWARD) {
		check_forwarded(lab, pkt, block->original);
		remember(lab, pkt, block->original);
	} else {
		CHECK(pkt->verdict == NAT_DROP || pkt->verdict == NAT_PASS);
		CHECK(nat_reason_verdict((enum nat_reason)pkt->reason) == pkt->verdict);
		if (pkt->verdict == NAT_PASS)
			CHECK(memcmp(block->bytes, block->original, block->len_bytes) == 0);
	}
	free(block->original);
	free(block);
}

static void drain(struct lab *lab)
{
	struct nat_pkt out;

	while (nat_engine_next(lab->e, &out)) {
		if (!out.made) {
			lab->held_blocks--;
			finish(lab, &out);
			continue;
		}
		CHECK(nat_csum_bytes(out.l3, (out.l3[0] & 0xf) * 4u) == 0);
		if (nat_read16(out.l3 + NAT_IP_FRAGMENT) & (NAT_IP_MF | NAT_IP_OFFSET_MASK)) {
			CHECK(out.len_bytes <= out.hop.mtu_bytes);
			continue;
		}
		CHECK(out.len_bytes <= NAT_MADE_BYTES_MAX);
		CHECK(transport_sum(out.l3) == UINT16_MAX);
	}
	check_equation(lab);
}

static void run_burst(struct lab *lab)
{
	if (lab->n_burst == 0)
		return;
	nat_engine_run(lab->e, lab->burst, lab->n_burst, lab->now_ns);
	for (uint32_t i = 0; i < lab->n_burst; i++) {
		if (lab->burst[i].verdict == NAT_HOLD)
			lab->held_blocks++;
		else
			finish(lab, &lab->burst[i]);
	}
	lab->n_burst = 0;
	drain(lab);
}

static void give(struct lab *lab, const uint8_t *bytes, uint32_t len_bytes, uint8_t iface, uint16_t flags)
{
	struct block *block = malloc(sizeof(*block) + len_bytes);

	CHECK(block);
	block->len_bytes = len_bytes;
	block->original = malloc(len_bytes + 1);
	CHECK(block->original);
	memcpy(block->bytes, bytes, len_bytes);
	memcpy(block->original, bytes, len_bytes);
	lab->burst[lab->n_burst++] = (struct nat_pkt){
		.l3 = block->bytes, .cookie = block, .len_bytes = len_bytes, .iface = iface, .flags = flags};
	if (lab->n_burst == BURST)
		run_burst(lab);
}

/* ---- steps
 * ----------------------------------------------------------------------------------------------------------- */

static void repair_header(uint8_t *ip, uint32_t len_bytes)
{
	if (len_bytes < NAT_IP_HEADER_BYTES)
		return;
	unsigned header = (ip[0] & 0xf) * 4u;
	if (header < NAT_IP_HEADER_BYTES || header > len_bytes)
		header = NAT_IP_HEADER_BYTES;
	ip[0] = (uint8_t)(0x40 | header / 4);
	nat_write16(ip + NAT_IP_LENGTH, len_bytes);
	nat_put16(ip + NAT_IP_CHECKSUM, 0);
	nat_put16(ip + NAT_IP_CHECKSUM, nat_csum_bytes(ip, header));
}

/* For what has been repaired or built: length fields are right, the packet is whole. */
static void repair_transport(uint8_t *ip)
{
	const unsigned header = (ip[0] & 0xf) * 4u, bytes = nat_read16(ip + NAT_IP_LENGTH) - header;
	static const struct {
		uint8_t protocol, field, least;
	} kind[] = {{NAT_PROTO_TCP, NAT_TCP_CHECKSUM, NAT_TCP_HEADER_BYTES},
		    {NAT_PROTO_UDP, NAT_UDP_CHECKSUM, NAT_UDP_HEADER_BYTES},
		    {NAT_PROTO_ICMP, NAT_ICMP_CHECKSUM, NAT_ICMP_HEADER_BYTES}};

	for (unsigned i = 0; i < 3; i++)
		if (kind[i].protocol == ip[NAT_IP_PROTOCOL] && bytes >= kind[i].least) {
			nat_put16(ip + header + kind[i].field, 0);
			const uint16_t sum = (uint16_t)~transport_sum(ip);
			nat_put16(ip + header + kind[i].field, sum == 0 ? UINT16_MAX : sum);
		}
}

static void step_raw(struct lab *lab, struct input *in, unsigned op)
{
	static uint8_t bytes[512];
	uint32_t wanted = byte(in) * 2, n = 0;

	while (n < wanted && in->at < in->end)
		bytes[n++] = (uint8_t)byte(in);
	if (op & 0x10)
		repair_header(bytes, n);
	if ((op & 0x20) && (op & 0x10) && n >= NAT_IP_HEADER_BYTES)
		repair_transport(bytes);
	give(lab, bytes, n, op >> 3 & 1, (uint16_t)(op >> 6 & 1 ? NAT_PKT_KERNEL_ROUTES : 0));
}

static uint32_t an_address(unsigned choice)
{
	static const uint32_t known[16] = {
		ADDRESS(100, 64, 0, 2),     ADDRESS(100, 64, 0, 3),   ADDRESS(100, 64, 0, 4),
		ADDRESS(100, 64, 9, 1),     ADDRESS(100, 127, 0, 9),  ADDRESS(198, 51, 100, 1),
		ADDRESS(198, 51, 100, 2),   ADDRESS(198, 51, 100, 1), ADDRESS(203, 0, 113, 1),
		ADDRESS(203, 0, 113, 2),    ADDRESS(203, 0, 113, 9),  ADDRESS(192, 0, 2, 1),
		ADDRESS(192, 0, 2, 200),    ADDRESS(198, 18, 0, 1),   ADDRESS(10, 0, 0, 1),
		ADDRESS(255, 255, 255, 255)};
	return NAT_HTON32(known[choice & 15]);
}

static uint16_t a_port(unsigned choice)
{
	const unsigned port = choice & 0x10 ? PORT_FIRST + choice % 16 : choice & 8 ? 53 : 40000 + choice % 8;
	return NAT_HTON16(port);
}

static void step_template(struct lab *lab, struct input *in, unsigned op)
{
	uint8_t ip[20 + 24 + 16] = {0x45};
	const unsigned ends = byte(in), ports = byte(in), kind = byte(in), detail = byte(in);
	uint8_t *l4 = ip + NAT_IP_HEADER_BYTES;
	unsigned bytes;

	ip[NAT_IP_TTL] = op & 0x10 ? (uint8_t)(detail & 3) : 64;
	nat_put32(ip + NAT_IP_SOURCE, an_address(ends & 15));
	nat_put32(ip + NAT_IP_DESTINATION, an_address(ends >> 4));
	nat_put16(l4, a_port(ports & 31));
	nat_put16(l4 + 2, a_port(ports >> 5 | (kind & 0x40) >> 2));
	switch (kind & 3) {
	case 0:
		ip[NAT_IP_PROTOCOL] = NAT_PROTO_UDP;
		bytes = NAT_UDP_HEADER_BYTES + (kind >> 2 & 15);
		nat_write16(l4 + NAT_UDP_LENGTH, bytes);
		break;
	case 1:
	case 2:
		ip[NAT_IP_PROTOCOL] = NAT_PROTO_TCP;
		bytes = 24;
		l4[NAT_TCP_OFFSET] = 0x60;
		l4[NAT_TCP_FLAGS] = (uint8_t)(kind & 1 ? NAT_TCP_SYN : detail);
		l4[20] = 2; /* MSS */
		l4[21] = 4;
		nat_write16(l4 + 22, 1000 + (kind & 4) * 200);
		break;
	default:
		ip[NAT_IP_PROTOCOL] = NAT_PROTO_ICMP;
		bytes = NAT_ICMP_HEADER_BYTES + (kind >> 2 & 15);
		nat_put32(l4, 0);
		l4[NAT_ICMP_TYPE] = kind & 0x80 ? NAT_ICMP_ECHO_REPLY : NAT_ICMP_ECHO;
		nat_put16(l4 + NAT_ICMP_ID, kind & 0x40 ? a_port(ports & 31) : 0);
		nat_put16(l4 + 6, (uint16_t)(detail & 1));
		break;
	}
	repair_header(ip, NAT_IP_HEADER_BYTES + bytes);
	if (!(kind & 0x80) || (kind & 3) != 0) /* else UDP without a checksum */
		repair_transport(ip);
	give(lab, ip, NAT_IP_HEADER_BYTES + bytes, op >> 3 & 1,
	     (uint16_t)(op >> 6 & 1 ? NAT_PKT_KERNEL_ROUTES : 0));
}

static const struct past *a_past(const struct lab *lab, unsigned choice)
{
	const uint32_t n = lab->n_past < REMEMBERED ? lab->n_past : REMEMBERED;
	return n == 0 ? NULL : &lab->past[(lab->n_past - 1 - choice % n) % REMEMBERED];
}

static void turn_round(uint8_t *ip)
{
	const uint32_t source_be = nat_get32(ip + NAT_IP_SOURCE);
	uint8_t *l4 = ip + (ip[0] & 0xf) * 4u;

	nat_put32(ip + NAT_IP_SOURCE, nat_get32(ip + NAT_IP_DESTINATION));
	nat_put32(ip + NAT_IP_DESTINATION, source_be);
	ip[NAT_IP_TTL] = 64;
	if (ip[NAT_IP_PROTOCOL] == NAT_PROTO_ICMP) {
		if (l4[NAT_ICMP_TYPE] == NAT_ICMP_ECHO)
			l4[NAT_ICMP_TYPE] = NAT_ICMP_ECHO_REPLY;
	} else {
		const uint16_t port_be = nat_get16(l4);
		nat_put16(l4, nat_get16(l4 + 2));
		nat_put16(l4 + 2, port_be);
	}
}

static void step_reply(struct lab *lab, struct input *in, unsigned op)
{
	const struct past *past = a_past(lab, op >> 4);
	uint8_t ip[PACKET_MAX];
	const unsigned detail = byte(in);

	if (!past || past->bytes < 28)
		return;
	memcpy(ip, past->left, past->bytes);
	turn_round(ip);
	if (ip[NAT_IP_PROTOCOL] == NAT_PROTO_TCP && past->bytes >= 40 && (detail & 0x40))
		ip[(ip[0] & 0xf) * 4u + NAT_TCP_FLAGS] = (uint8_t)detail;
	repair_header(ip, past->bytes);
	if (!(nat_read16(ip + NAT_IP_FRAGMENT) & (NAT_IP_MF | NAT_IP_OFFSET_MASK)))
		repair_transport(ip);
	give(lab, ip, past->bytes, past->iface ^ 1, 0);
}

static void step_error(struct lab *lab, struct input *in, unsigned op)
{
	const struct past *past = a_past(lab, op >> 4);
	const unsigned type = byte(in), cut = byte(in), where = byte(in), change = byte(in);
	uint8_t ip[PACKET_MAX] = {0x45};
	uint8_t *icmp = ip + NAT_IP_HEADER_BYTES, *quote = icmp + NAT_ICMP_HEADER_BYTES;

	if (!past || past->bytes > 1400)
		return;
	const uint32_t quoted = cut < past->bytes && (cut & 1) ? cut : past->bytes;
	memcpy(quote, past->left, quoted);
	if (change && where < quoted)
		quote[where] = (uint8_t)change;
	if ((op & 8) && quoted >= NAT_IP_HEADER_BYTES) { /* its header's checksum is right again */
		const unsigned header = (quote[0] & 0xf) * 4u;
		nat_put16(quote + NAT_IP_CHECKSUM, 0);
		if (header >= NAT_IP_HEADER_BYTES && header <= quoted)
			nat_put16(quote + NAT_IP_CHECKSUM, nat_csum_bytes(quote, header));
	}
	ip[NAT_IP_TTL] = 64;
	ip[NAT_IP_PROTOCOL] = NAT_PROTO_ICMP;
	icmp[NAT_ICMP_TYPE] = type & 8 ? (uint8_t)type : NAT_ICMP_UNREACHABLE;
	icmp[NAT_ICMP_CODE] = type & 7;
	nat_put32(ip + NAT_IP_SOURCE,
		  type & 0x40 ? an_address(type) : nat_get32(past->left + NAT_IP_DESTINATION));
	nat_put32(ip + NAT_IP_DESTINATION, nat_get32(past->left + NAT_IP_SOURCE));
	repair_header(ip, NAT_IP_HEADER_BYTES + NAT_ICMP_HEADER_BYTES + quoted);
	repair_transport(ip);
	give(lab, ip, NAT_IP_HEADER_BYTES + NAT_ICMP_HEADER_BYTES + quoted, past->iface ^ 1, 0);
}

/* One piece of an earlier packet: 8-byte units from the first to behind the last. */
static void step_fragment(struct lab *lab, struct input *in, unsigned op)
{
	const struct past *past = a_past(lab, op >> 5);
	const unsigned cut = byte(in), id = byte(in);
	uint8_t ip[PACKET_MAX];

	if (!past || past->bytes > 1400)
		return;
	const unsigned header = (past->came[0] & 0xf) * 4u, units = (past->bytes - header) / 8,
		       first = cut & 7, count = 1 + (cut >> 3 & 7);
	if (first >= units)
		return;
	const unsigned bytes = first + count >= units ? past->bytes - header - first * 8 : count * 8;
	memcpy(ip, past->came, header);
	memcpy(ip + header, past->came + header + first * 8, bytes);
	nat_write16(ip + NAT_IP_ID, id & 3);
	nat_write16(ip + NAT_IP_FRAGMENT, first | (cut & 0x80 ? 0u : (unsigned)NAT_IP_MF));
	ip[NAT_IP_TTL] = 64;
	repair_header(ip, header + bytes);
	give(lab, ip, header + bytes, op & 8 ? past->iface ^ 1 : past->iface, 0);
}

static void step_again(struct lab *lab, struct input *in, unsigned op)
{
	const struct past *past = a_past(lab, op >> 4);
	const unsigned where = byte(in), change = byte(in);
	uint8_t ip[PACKET_MAX];

	if (!past)
		return;
	memcpy(ip, op & 8 ? past->left : past->came, past->bytes);
	if (where < past->bytes)
		ip[where] ^= (uint8_t)change;
	if (change & 1)
		repair_header(ip, past->bytes);
	give(lab, ip, past->bytes, past->iface, 0);
}

static void step_time(struct lab *lab, struct input *in, unsigned op)
{
	const uint64_t amount = byte(in);

	run_burst(lab);
	lab->now_ns += op & 8 ? amount * SECOND_NS * (op & 0x10 ? 60 : 1) : amount * (SECOND_NS / 64);
	if (op & 0x20) {
		nat_engine_tick(lab->e, lab->now_ns);
		drain(lab);
	}
	check_tables(lab);
}

static void reload(struct lab *lab, unsigned choice)
{
	struct nat_policy *old = lab->policy;

	/* A pool's kind of mapping may change under live sessions; its name stays. */
	configure(lab, choice);
	lab->policy = nat_policy_init(memory(nat_policy_size(&lab->config)), &lab->config, old);
	nat_engine_set_policy(lab->e, lab->policy);
	free(old);
}

static void restart(struct lab *lab)
{
	if (lab->held_blocks) /* a process that dies takes them along */
		return;
	start_engine(lab);
}

static void step_change(struct lab *lab, struct input *in, unsigned op)
{
	const unsigned choice = byte(in);

	run_burst(lab);
	switch (op >> 3 & 3) {
	case 0:
		reload(lab, choice);
		break;
	case 1:
		restart(lab);
		break;
	case 2:
		nat_policy_set_active(lab->policy, 0, choice & 1);
		break;
	default:
		nat_engine_clear(lab->e, choice % SESSIONS);
		break;
	}
	check_tables(lab);
}

static void step(struct lab *lab, struct input *in)
{
	const unsigned op = byte(in);

	switch (op & 7) {
	case RAW:
		step_raw(lab, in, op);
		break;
	case TEMPLATE:
		step_template(lab, in, op);
		break;
	case REPLY:
		step_reply(lab, in, op);
		break;
	case ERROR:
		step_error(lab, in, op);
		break;
	case FRAGMENT:
		step_fragment(lab, in, op);
		break;
	case AGAIN:
		step_again(lab, in, op);
		break;
	case TIME:
		step_time(lab, in, op);
		break;
	default:
		step_change(lab, in, op);
		break;
	}
	if (op & 0x80)
		run_burst(lab);
}

static void age_away(struct lab *lab)
{
	run_burst(lab);
	check_tables(lab);
	for (int i = 0;
	     i < 40 && (lab->e->counters.sessions || lab->held_blocks || lab->e->records_left != SESSIONS);
	     i++) {
		lab->now_ns += 1000 * SECOND_NS;
		for (int tick = 0; tick < 4; tick++) {
			nat_engine_tick(lab->e, lab->now_ns);
			drain(lab);
		}
	}
	CHECK(lab->e->counters.sessions == 0 && lab->held_blocks == 0 && lab->e->records_left == SESSIONS);
	check_tables(lab);
}

/* A new table, without clearing the names and ids that were never written. */
static void new_table(struct lab *lab)
{
	const char *why;
	bool adopted;

	if (!lab->table_memory)
		lab->table_memory = memory(nat_table_size(SESSIONS));
	struct nat_table *table = lab->table_memory;
	if (table->magic) {
		memset(nat_table_records(table), 0, SESSIONS * sizeof(struct nat_session));
		memset(table->pool_name, 0, table->n_pool_ids * sizeof(table->pool_name[0]));
		memset(table->zone_identity, 0, table->n_zone_ids * sizeof(table->zone_identity[0]));
		memset(table, 0, offsetof(struct nat_table, pool_name));
	}
	lab->table = nat_table_init(table, nat_table_size(SESSIONS), SESSIONS, 1, &adopted, &why);
	CHECK(lab->table && !adopted);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct lab kept;
	struct lab *lab = &kept;
	struct input in = {data, data + size};

	lab->now_ns = SECOND_NS;
	lab->n_past = 0;
	configure(lab, byte(&in));
	lab->policy = nat_policy_init(memory(nat_policy_size(&lab->config)), &lab->config, NULL);
	new_table(lab);
	start_engine(lab);
	while (in.at < in.end)
		step(lab, &in);
	age_away(lab);
	free(lab->policy);
	lab->policy = NULL;
	return 0;
}
