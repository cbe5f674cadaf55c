/* What one engine tells, another one has, whatever is lost on the way; and it goes on with it. */
#include <assert.h>
#include <time.h>

#include "replica.h"
#include "testbed.h"

enum { SESSIONS = 1600, MAX = 8192 };

static const struct nat_key key = {1, 2};

/* One side's view of the other: which of our records stands for which of its places. */
struct link {
	uint32_t shadow[MAX], origin[MAX];
};

static uint32_t out_addr[SESSIONS];
static uint16_t out_port[SESSIONS];

static uint32_t host_of(uint32_t i)
{
	return ADDRESS(100, 64, 0, 1) + i / 4;
}

static uint32_t remote_of(uint32_t i)
{
	return ADDRESS(198, 51, 100, 1) + i % 4;
}

static void start(struct testbed *t, enum nat_mapping_kind mapping, enum nat_filtering filtering,
		  uint16_t block_ports, uint64_t now_ns)
{
	testbed_config(t, 8, 1024, 65535, MAX);
	t->pool.mapping = mapping;
	t->pool.filtering = filtering;
	t->pool.block_ports = block_ports;
	t->pool.blocks_per_host = 4;
	t->params.replicate = true;
	testbed_start(t, now_ns);
}

static void link_clear(struct link *link)
{
	memset(link, 0xff, sizeof(*link));
}

/* Takes all that waits; every `loss`-th word gets lost and is asked for again. Gives the number told. */
static uint32_t pump(struct testbed *from, struct testbed *to, struct link *link, uint32_t loss,
		     uint32_t result[])
{
	struct nat_replica told[64];
	uint32_t n, all = 0;

	while ((n = nat_engine_export(from->e, told, 64)) > 0)
		for (uint32_t i = 0; i < n; i++) {
			const uint32_t slot = told[i].slot;
			uint32_t record;

			if (loss && ++all % loss == 0) {
				nat_engine_export_again(from->e, &slot, 1);
				continue;
			}
			if (told[i].kind != NAT_REPLICA_SESSION) {
				record = link->shadow[slot];
				link->shadow[slot] = NAT_NO_SESSION;
				if (record == NAT_NO_SESSION || link->origin[record] != slot)
					continue;
				link->origin[record] = NAT_NO_SESSION;
				if (told[i].kind == NAT_REPLICA_YOURS)
					nat_engine_import_ours(to->e, record);
				else
					nat_engine_import_end(to->e, record);
				continue;
			}
			enum nat_import_result done = nat_engine_import(to->e, &told[i], false, &record);
			if (result)
				result[done]++;
			if (done == NAT_IMPORT_DONE) {
				link->shadow[slot] = record;
				link->origin[record] = slot;
			}
		}
	return all;
}

/* A place that the other side knows. */
static uint32_t place(const struct link *link, uint32_t from)
{
	while (link->shadow[from] == NAT_NO_SESSION)
		from++;
	return from;
}

static bool equal(struct testbed *from, struct testbed *to, const struct link *link, uint32_t expect)
{
	uint32_t n = 0;

	for (uint32_t range = 0; range < MAX / NAT_REPLICA_RANGE; range++) {
		struct nat_replica_sum a = {0}, b = {0};
		nat_engine_export_sum(from->e, range, &key, from->e->now_s, &a);
		for (uint32_t i = 0; i < NAT_REPLICA_RANGE; i++) {
			const uint32_t slot = range * NAT_REPLICA_RANGE + i;
			assert(!(a.without[i / 64] >> (i % 64) & 1));
			if (link->shadow[slot] != NAT_NO_SESSION)
				nat_engine_import_sum(to->e, &key, &link->shadow[slot], &slot, 1, &b);
		}
		if (a.sum != b.sum || a.n != b.n)
			return false;
		n += a.n;
	}
	return n == expect;
}

static void talk(struct testbed *t, uint32_t i, bool answer, uint64_t now_ns, bool first)
{
	uint8_t bytes[28];

	struct nat_pkt pkt = testbed_udp(t, bytes, 0, host_of(i), 4000, remote_of(i), 443, now_ns);
	assert(pkt.verdict == NAT_FORWARD);
	if (first) {
		out_addr[i] = nat_read32(bytes + NAT_IP_SOURCE);
		out_port[i] = nat_read16(bytes + 20);
	}
	assert(nat_read32(bytes + NAT_IP_SOURCE) == out_addr[i] && nat_read16(bytes + 20) == out_port[i]);
	if (!answer)
		return;
	pkt = testbed_udp(t, bytes, 1, remote_of(i), 443, out_addr[i], out_port[i], now_ns);
	assert(pkt.verdict == NAT_FORWARD && nat_read32(bytes + NAT_IP_DESTINATION) == host_of(i));
}

static void test_failover(enum nat_mapping_kind mapping, enum nat_filtering filtering, uint16_t block_ports,
			  uint32_t loss)
{
	static struct link ab, ba;
	struct testbed a, b;
	uint64_t now_ns = 10 * SECOND_NS;

	link_clear(&ab);
	link_clear(&ba);
	start(&a, mapping, filtering, block_ports, now_ns);
	start(&b, mapping, filtering, block_ports, now_ns + 5000 * SECOND_NS); /* another clock */
	uint64_t b_ahead = 5000 * SECOND_NS;
	for (uint32_t i = 0; i < SESSIONS; i++)
		talk(&a, i, i % 2 == 0, now_ns, true);
	/* half are answered and told at once, the others when they are two seconds old */
	pump(&a, &b, &ab, loss, NULL);
	assert(nat_engine_counters(b.e)->sessions == SESSIONS / 2);
	now_ns += 2 * SECOND_NS;
	nat_engine_tick(a.e, now_ns);
	nat_engine_tick(b.e, now_ns + b_ahead);
	pump(&a, &b, &ab, loss, NULL);
	assert(nat_engine_counters(b.e)->sessions == SESSIONS && equal(&a, &b, &ab, SESSIONS));
	/* a session that ends is gone at the peer, and one that the peer lost is a difference, and comes
	 * back */
	nat_engine_clear(a.e, place(&ab, 7));
	pump(&a, &b, &ab, loss, NULL);
	assert(nat_engine_counters(b.e)->sessions == SESSIONS - 1 && equal(&a, &b, &ab, SESSIONS - 1));
	const uint32_t nine = place(&ab, 9);
	nat_engine_clear(b.e, ab.shadow[nine]);
	assert(!equal(&a, &b, &ab, SESSIONS - 1));
	nat_engine_export_again(a.e, &nine, 1);
	pump(&a, &b, &ab, 0, NULL);
	assert(equal(&a, &b, &ab, SESSIONS - 1));
	/* b takes the traffic: every session goes on with its address and port, and becomes b's */
	for (uint32_t i = 0; i < SESSIONS; i++) {
		struct nat_tuple inside = {.local_be = NAT_HTON32(host_of(i)),
					   .remote_be = NAT_HTON32(remote_of(i)),
					   .local_port_be = NAT_HTON16(4000),
					   .remote_port_be = NAT_HTON16(443),
					   .protocol = NAT_PROTO_UDP};
		if (nat_index_find(&b.e->index, &inside, nat_tuple_hash(&b.e->index.key, &inside)) !=
		    NAT_NO_RECORD)
			talk(&b, i, true, now_ns + b_ahead + SECOND_NS, false);
	}
	/* new ones there take no port that is in use */
	uint8_t bytes[28];
	for (uint32_t i = 0; i < 500; i++)
		assert(testbed_udp(&b, bytes, 0, ADDRESS(100, 64, 200, 1) + i, 4000, ADDRESS(198, 51, 100, 1),
				   443, now_ns + b_ahead + SECOND_NS)
			       .verdict == NAT_FORWARD);
	/* a comes back, and b tells it; a's old word does not harm */
	now_ns += 3 * SECOND_NS;
	nat_engine_tick(a.e, now_ns);
	nat_engine_tick(b.e, now_ns + b_ahead);
	pump(&b, &a, &ba, loss, NULL);
	pump(&a, &b, &ab, loss, NULL);
	pump(&b, &a, &ba, loss, NULL);
	assert(equal(&b, &a, &ba, SESSIONS - 1 + 500));
	assert(equal(&a, &b, &ab, 0));
	assert(nat_engine_counters(a.e)->sessions == SESSIONS - 1 + 500);
	/* nobody refreshes any more: they end at b by their time, and at a because b says so */
	for (uint32_t s = 0; s < 302 * 5; s++) {
		nat_engine_tick(a.e, now_ns + s * SECOND_NS / 5);
		nat_engine_tick(b.e, now_ns + b_ahead + s * SECOND_NS / 5);
	}
	pump(&b, &a, &ba, 0, NULL);
	assert(nat_engine_counters(b.e)->sessions == 0 && nat_engine_counters(a.e)->sessions == 0);
	for (uint32_t s = 0; s < 200 * 5; s++) {
		nat_engine_tick(a.e, now_ns + (302 + s / 5) * SECOND_NS);
		nat_engine_tick(b.e, now_ns + b_ahead + (302 + s / 5) * SECOND_NS);
	}
	assert(a.e->records_left == MAX && b.e->records_left == MAX);
	testbed_stop(&a, false);
	testbed_stop(&b, false);
}

static void test_a_peer_that_is_silent_keeps_sessions_no_longer_than_a_minute_beyond_their_time(void)
{
	static struct link ab;
	struct testbed a, b;
	const uint64_t now_ns = 10 * SECOND_NS;

	link_clear(&ab);
	start(&a, NAT_ENDPOINT_DEPENDENT, 0, 0, now_ns);
	start(&b, NAT_ENDPOINT_DEPENDENT, 0, 0, now_ns);
	talk(&a, 1, true, now_ns, true);
	pump(&a, &b, &ab, 0, NULL);
	nat_engine_tick(b.e, now_ns + 359 * SECOND_NS);
	assert(nat_engine_counters(b.e)->sessions == 1);
	for (uint32_t i = 0; i < 10; i++)
		nat_engine_tick(b.e, now_ns + 363 * SECOND_NS);
	assert(nat_engine_counters(b.e)->sessions == 0);
	testbed_stop(&a, false);
	testbed_stop(&b, false);
}

/* Both have taken the same port, as after a split: the one that was used last stays, on both sides. */
static void test_of_two_that_cannot_both_be_the_one_used_last_stays(void)
{
	static struct link ab, ba;
	struct testbed a, b;
	uint64_t now_ns = 10 * SECOND_NS;
	uint32_t at_a[NAT_IMPORT_RESULTS] = {0}, at_b[NAT_IMPORT_RESULTS] = {0};

	link_clear(&ab);
	link_clear(&ba);
	testbed_config(&a, 1, 5000, 5000, MAX);
	testbed_config(&b, 1, 5000, 5000, MAX);
	a.params.replicate = b.params.replicate = true;
	testbed_start(&a, now_ns);
	testbed_start(&b, now_ns);
	talk(&a, 4, true, now_ns, true);
	talk(&b, 8, true, now_ns + 20 * SECOND_NS, true);
	nat_engine_tick(a.e, now_ns + 20 * SECOND_NS);
	assert(out_addr[4] == out_addr[8] && out_port[4] == out_port[8]);
	pump(&a, &b, &ab, 0, at_b);
	pump(&b, &a, &ba, 0, at_a);
	pump(&a, &b, &ab, 0, at_b);
	assert(at_b[NAT_IMPORT_CONFLICT] == 1 && at_a[NAT_IMPORT_DONE] >= 1);
	assert(equal(&b, &a, &ba, 1) && equal(&a, &b, &ab, 0));
	testbed_stop(&a, false);
	testbed_stop(&b, false);
}

/* With two masters at once packets of a session come by on both sides, and their words cross: each gives
 * it to the other one. */
static void test_a_session_that_both_have_given_away_lives_on(void)
{
	static struct link ab, ba;
	struct testbed a, b;
	uint64_t now_ns = 10 * SECOND_NS;
	struct nat_replica by_a, by_b;
	uint32_t record;

	link_clear(&ab);
	link_clear(&ba);
	start(&a, NAT_ENDPOINT_DEPENDENT, 0, 0, now_ns);
	start(&b, NAT_ENDPOINT_DEPENDENT, 0, 0, now_ns);
	talk(&a, 5, true, now_ns, true);
	pump(&a, &b, &ab, 0, NULL);
	talk(&b, 5, true, now_ns, false);
	nat_engine_export_again(a.e, (uint32_t[]){place(&ab, 0)}, 1);
	assert(nat_engine_export(a.e, &by_a, 1) == 1 && nat_engine_export(b.e, &by_b, 1) == 1);
	now_ns += SECOND_NS;
	nat_engine_tick(a.e, now_ns);
	nat_engine_tick(b.e, now_ns);
	assert(nat_engine_import(b.e, &by_a, false, &record) == NAT_IMPORT_DONE);
	ab.shadow[by_a.slot] = record;
	ab.origin[record] = by_a.slot;
	assert(nat_engine_import(a.e, &by_b, true, &record) == NAT_IMPORT_DONE);
	ba.shadow[by_b.slot] = record;
	ba.origin[record] = by_b.slot;
	/* neither tells of it; the sums differ, and both are asked again */
	nat_engine_export_again(a.e, &by_a.slot, 1);
	nat_engine_export_again(b.e, &by_b.slot, 1);
	pump(&a, &b, &ab, 0, NULL);
	pump(&b, &a, &ba, 0, NULL);
	pump(&a, &b, &ab, 0, NULL);
	assert(nat_engine_counters(a.e)->sessions == 1 && nat_engine_counters(b.e)->sessions == 1);
	assert(equal(&b, &a, &ba, 1) && equal(&a, &b, &ab, 0));
	talk(&a, 5, true, now_ns, false);
	testbed_stop(&a, false);
	testbed_stop(&b, false);
}

/* A peer that was away and has lost everything gets all of it again, what was its own included. */
static void test_a_peer_with_an_empty_table_gets_everything(void)
{
	static struct link ab, ba;
	struct testbed a, b;
	uint64_t now_ns = 10 * SECOND_NS, cursor = 0;

	link_clear(&ab);
	start(&a, NAT_ENDPOINT_INDEPENDENT, 0, 0, now_ns);
	start(&b, NAT_ENDPOINT_INDEPENDENT, 0, 0, now_ns);
	for (uint32_t i = 0; i < SESSIONS; i++)
		talk(&a, i, true, now_ns, true);
	pump(&a, &b, &ab, 0, NULL);
	testbed_stop(&a, false);
	start(&a, NAT_ENDPOINT_INDEPENDENT, 0, 0, now_ns);
	link_clear(&ab); /* a has told nothing yet; b takes all as its own */
	link_clear(&ba);
	while (nat_engine_take_orphans(b.e, ab.origin, &cursor, 100))
		;
	cursor = 0;
	while (nat_engine_export_all(b.e, &cursor, 100))
		;
	pump(&b, &a, &ba, 0, NULL);
	assert(equal(&b, &a, &ba, SESSIONS));
	for (uint32_t i = 0; i < SESSIONS; i++)
		talk(&a, i, true, now_ns + SECOND_NS, false);
	testbed_stop(&a, false);
	testbed_stop(&b, false);
}

/* More begin within the hold-back time than are remembered: those beyond are told early, but told. */
static void test_a_session_is_told_also_when_too_many_are_young(void)
{
	static struct link ab;
	struct testbed a, b;
	uint64_t now_ns = 10 * SECOND_NS;

	link_clear(&ab);
	start(&a, NAT_ENDPOINT_DEPENDENT, 0, 0, now_ns);
	start(&b, NAT_ENDPOINT_DEPENDENT, 0, 0, now_ns);
	for (uint32_t i = 0; i < NAT_REPLICA_YOUNG; i++)
		a.e->replicas.young[i] =
			(struct nat_replica_young){MAX - 1, (uint32_t)(now_ns / 1000000)}; /* over by then */
	a.e->replicas.n_young = NAT_REPLICA_YOUNG;
	talk(&a, 1, false, now_ns, true);
	talk(&a, 2, false, now_ns, true);
	for (uint32_t s = 0; s < 5; s++) {
		pump(&a, &b, &ab, 0, NULL);
		nat_engine_tick(a.e, now_ns += SECOND_NS);
	}
	assert(nat_engine_counters(b.e)->sessions == 2 && equal(&a, &b, &ab, 2));
	testbed_stop(&a, false);
	testbed_stop(&b, false);
}

/* Minutes, not the years that are left until the time comes round again. */
static void test_a_session_last_used_in_the_future_ends_like_any_other(void)
{
	struct testbed t;
	uint32_t record;
	const uint64_t now_ns = 5000 * SECOND_NS;
	struct nat_replica said = {.inside = {.local_be = NAT_HTON32(host_of(0)),
					      .remote_be = NAT_HTON32(remote_of(0)),
					      .local_port_be = NAT_HTON16(4000),
					      .remote_port_be = NAT_HTON16(443),
					      .protocol = NAT_PROTO_UDP},
				   .out_addr_be = NAT_HTON32(ADDRESS(203, 0, 113, 1)),
				   .out_port_be = NAT_HTON16(5000),
				   .kind = NAT_REPLICA_SESSION,
				   .timer = NAT_TIMER_UDP,
				   .idle_s = UINT32_C(0x90000000),
				   .age_s = UINT32_MAX};

	start(&t, NAT_ENDPOINT_DEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 0, now_ns);
	assert(nat_engine_import(t.e, &said, false, &record) == NAT_IMPORT_DONE);
	assert(t.e->record[record].created_s <= t.e->now_s);
	nat_engine_tick(t.e, now_ns + 299 * SECOND_NS);
	assert(nat_engine_counters(t.e)->sessions == 1);
	nat_engine_tick(t.e, now_ns + 400 * SECOND_NS);
	assert(nat_engine_counters(t.e)->sessions == 0);
	testbed_stop(&t, false);
}

static void with_zones(struct testbed *t, const struct nat_zone_config *zone, uint32_t n, uint64_t now_ns)
{
	testbed_config(t, 8, 1024, 65535, MAX);
	t->config.zones = zone;
	t->config.n_zones = n;
	t->params.replicate = true;
	testbed_start(t, now_ns);
}

/* Two seconds of a processor, with sanitizers, are ten times what it takes; looking through all zones for
 * each session takes minutes. */
static void test_sessions_of_65535_zones_are_taken_at_the_pace_of_one(void)
{
	enum { N = 65535 };
	static struct nat_zone_config zone[N];
	static struct link ab;
	struct testbed a = {0}, b = {0};
	uint8_t bytes[28];
	const uint64_t now_ns = 10 * SECOND_NS;

	for (uint32_t z = 0; z < N; z++)
		zone[z] = (struct nat_zone_config){.source = {ADDRESS(100, 64, 0, 0) + z, 32},
						   .action = NAT_ACTION_POOL};
	with_zones(&a, zone, N, now_ns);
	with_zones(&b, zone, N, now_ns);
	link_clear(&ab);
	for (uint32_t i = 0; i < 4000; i++) {
		const uint32_t host = ADDRESS(100, 64, 0, 0) + i * 16;
		assert(testbed_udp(&a, bytes, 0, host, 4000, remote_of(0), 443, now_ns).verdict ==
		       NAT_FORWARD);
	}
	nat_engine_tick(a.e, now_ns + 60 * SECOND_NS);
	nat_engine_tick(b.e, now_ns + 60 * SECOND_NS);
	const clock_t begun = clock();
	pump(&a, &b, &ab, 0, NULL);
	assert((double)(clock() - begun) / CLOCKS_PER_SEC < 2);
	assert(nat_engine_counters(b.e)->sessions == 4000);
	for (uint32_t i = 0; i < MAX; i++)
		if (ab.shadow[i] != NAT_NO_SESSION)
			assert(b.e->record[ab.shadow[i]].zone_id == a.e->record[i].zone_id);
	testbed_stop(&a, false);
	testbed_stop(&b, false);
}

int main(void)
{
	test_a_session_last_used_in_the_future_ends_like_any_other();
	test_sessions_of_65535_zones_are_taken_at_the_pace_of_one();
	for (uint32_t loss = 0; loss < 8; loss += 3) {
		test_failover(NAT_ENDPOINT_DEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 0, loss);
		test_failover(NAT_ENDPOINT_INDEPENDENT, NAT_FILTER_ENDPOINT_INDEPENDENT, 0, loss);
		test_failover(NAT_ENDPOINT_INDEPENDENT, NAT_FILTER_ADDRESS, 64, loss);
	}
	test_a_peer_that_is_silent_keeps_sessions_no_longer_than_a_minute_beyond_their_time();
	test_of_two_that_cannot_both_be_the_one_used_last_stays();
	test_a_session_that_both_have_given_away_lives_on();
	test_a_peer_with_an_empty_table_gets_everything();
	test_a_session_is_told_also_when_too_many_are_young();
	return 0;
}
