/* Several engines on one table: ports are divided and none is left over, sessions survive another number
 * of workers. */
#include "testbed.h"

#define N_MAX 5u

struct gang {
	struct testbed t; /* configuration, policy and table */
	struct nat_workers *workers;
	struct nat_engine *e[N_MAX];
	uint32_t n, turn;
	uint64_t handovers;
};

static void start(struct gang *g, uint32_t n)
{
	bool adopted;
	const char *why;

	g->n = n;
	g->t.config.n_workers = n;
	if (!g->t.table)
		g->t.table = testbed_memory(nat_table_size(g->t.config.max_sessions));
	g->t.policy = nat_policy_init(testbed_memory(nat_policy_size(&g->t.config)), &g->t.config, NULL);
	struct nat_table *table = nat_table_init(g->t.table, nat_table_size(g->t.config.max_sessions),
						 g->t.config.max_sessions, 1, &adopted, &why);
	assert(table);
	g->workers = nat_workers_init(testbed_memory(nat_workers_size(n, g->t.config.max_sessions)), n,
				      g->t.config.max_sessions, 1, NULL, NULL);
	for (uint32_t w = 0; w < n; w++) {
		const struct nat_engine_params params = {.table = table,
							 .policy = g->t.policy,
							 .world = {NULL, testbed_route, testbed_own_address},
							 .max_sessions = g->t.config.max_sessions,
							 .seed = 1,
							 .now_ns = SECOND_NS,
							 .worker = w,
							 .n_workers = n,
							 .workers = g->workers};
		g->e[w] = nat_engine_init(testbed_memory(nat_engine_size(&params)), &params);
	}
}

static void stop(struct gang *g)
{
	for (uint32_t w = 0; w < g->n; w++)
		free(g->e[w]);
	free(g->workers);
	free(g->t.policy);
}

/* The packet comes to each worker in turn, and goes where they send it. */
static struct nat_pkt run(struct gang *g, uint8_t *bytes, uint8_t iface, uint32_t source,
			  uint16_t source_port, uint32_t destination, uint16_t destination_port)
{
	struct nat_pkt pkt = {.l3 = bytes, .len_bytes = 28, .iface = iface};
	uint32_t at = g->turn++ % g->n;

	testbed_write_udp(bytes, source, source_port, destination, destination_port);
	nat_engine_run(g->e[at], &pkt, 1, SECOND_NS);
	while (pkt.verdict == NAT_HANDOVER) {
		g->handovers++;
		at = pkt.owner;
		pkt = (struct nat_pkt){.l3 = bytes,
				       .len_bytes = 28,
				       .iface = iface,
				       .flags = NAT_PKT_TAKEN_OVER,
				       .errand = pkt.errand};
		nat_engine_run(g->e[at], &pkt, 1, SECOND_NS);
	}
	return pkt;
}

static uint64_t sessions(const struct gang *g)
{
	uint64_t n = 0;

	for (uint32_t w = 0; w < g->n; w++)
		n += nat_engine_counters(g->e[w])->sessions;
	return n;
}

static void check_equation(const struct gang *g)
{
	uint64_t out = 0, in = 0;

	for (uint32_t w = 0; w < g->n; w++) {
		const struct nat_counters *c = nat_engine_counters(g->e[w]);
		uint64_t dropped = 0, causes = 0;
		for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
			dropped += nat_reason_verdict((enum nat_reason)i) == NAT_DROP ? c->reason[i] : 0;
		for (unsigned i = 0; i < NAT_CAUSE_COUNT; i++)
			causes += c->cause[i];
		assert(c->received + c->taken_over ==
		       c->forwarded + c->passed + dropped + c->handed_over + c->held);
		assert(causes == c->handed_over);
		out += c->handed_over;
		in += c->taken_over;
	}
	assert(out == in && out == g->handovers);
}

#define HOSTS     ADDRESS(100, 64, 0, 1)
#define REMOTE    ADDRESS(198, 51, 100, 1)
#define ADDRESSES 3u
#define PORTS     100u
#define ALL       (ADDRESSES * PORTS)

static uint32_t outside_of[ALL];
static uint16_t port_of[ALL];

struct odd {
	uint32_t record[ALL], n;
};

static bool note_odd(void *context, const struct nat_session_view *view)
{
	struct odd *odd = context;

	if ((NAT_NTOH32(view->inside.local_be) - HOSTS) % 2 == 1)
		odd->record[odd->n++] = view->record;
	return true;
}

/* Ends the session of every second host: now each worker has ports of its own again. */
static void end_odd(struct gang *g)
{
	for (uint32_t w = 0; w < g->n; w++) {
		struct odd odd = {.n = 0};
		uint64_t cursor = 0;
		while (nat_engine_sessions(g->e[w], &cursor, ALL, SECOND_NS, note_odd, &odd))
			;
		for (uint32_t i = 0; i < odd.n; i++)
			assert(nat_engine_clear(g->e[w], odd.record[i]));
	}
}

/* Every session still has its address and port, both ways, wherever its packets come in. */
static void check_sessions(struct gang *g, uint32_t step)
{
	uint8_t bytes[28];

	for (uint32_t i = 0; i < ALL; i += step) {
		struct nat_pkt pkt = run(g, bytes, 0, HOSTS + i, 4000, REMOTE, 80);
		assert(pkt.verdict == NAT_FORWARD);
		assert(nat_read32(bytes + NAT_IP_SOURCE) == outside_of[i] &&
		       nat_read16(bytes + 20) == port_of[i]);
		pkt = run(g, bytes, 1, REMOTE, 80, outside_of[i], port_of[i]);
		assert(pkt.verdict == NAT_FORWARD && nat_read32(bytes + NAT_IP_DESTINATION) == HOSTS + i);
	}
	assert(sessions(g) == ALL / step);
	check_equation(g);
}

static void a_session_is_refused_only_when_no_port_of_any_worker_is_free(uint32_t n)
{
	struct gang g = {0};
	uint8_t bytes[28], seen[ADDRESSES][PORTS] = {0};

	testbed_config(&g.t, ADDRESSES, 5000, 5000 + PORTS - 1, 4096);
	start(&g, n);
	for (uint32_t i = 0; i < ALL; i++) {
		const struct nat_pkt pkt = run(&g, bytes, 0, HOSTS + i, 4000, REMOTE, 80);
		assert(pkt.verdict == NAT_FORWARD);
		outside_of[i] = nat_read32(bytes + NAT_IP_SOURCE);
		port_of[i] = nat_read16(bytes + 20);
		uint8_t *once = &seen[outside_of[i] - ADDRESS(203, 0, 113, 1)][port_of[i] - 5000];
		assert(*once == 0);
		*once = 1;
	}
	for (uint32_t i = 0; i < n; i++) {
		const struct nat_pkt pkt = run(&g, bytes, 0, HOSTS + ALL + i, 4000, REMOTE, 80);
		assert(pkt.verdict == NAT_DROP && pkt.reason == NAT_REASON_NO_PORT);
	}
	check_sessions(&g, 1);
	end_odd(&g);
	check_sessions(&g, 2);
	stop(&g);
	free(g.t.table);
}

static void sessions_survive_another_number_of_workers(uint32_t before, uint32_t after)
{
	struct gang g = {0};
	uint8_t bytes[28];

	testbed_config(&g.t, ADDRESSES, 5000, 5000 + PORTS - 1, 4096);
	start(&g, before);
	for (uint32_t i = 0; i < ALL; i++) {
		assert(run(&g, bytes, 0, HOSTS + i, 4000, REMOTE, 80).verdict == NAT_FORWARD);
		outside_of[i] = nat_read32(bytes + NAT_IP_SOURCE);
		port_of[i] = nat_read16(bytes + 20);
	}
	stop(&g);
	g.handovers = 0;
	start(&g, after);
	check_sessions(&g, 1);
	end_odd(&g);
	check_sessions(&g, 2);
	/* to another remote every port is free, and what the restart left free can all be used */
	for (uint32_t i = 0; i < ALL; i++)
		assert(run(&g, bytes, 0, HOSTS + i, 4000, REMOTE + 1, 80).verdict == NAT_FORWARD);
	check_equation(&g);
	stop(&g);
	free(g.t.table);
}

static void every_record_of_a_small_table_can_be_used(uint32_t n)
{
	struct gang g = {0};
	uint8_t bytes[28];
	uint32_t made = 0;

	testbed_config(&g.t, ADDRESSES, 1024, 65535, 1024);
	start(&g, n);
	for (uint32_t i = 0; i < 1100; i++)
		made += run(&g, bytes, 0, HOSTS + i, 4000, REMOTE, 80).verdict == NAT_FORWARD;
	assert(made == 1024);
	check_equation(&g);
	stop(&g);
	free(g.t.table);
}

static void a_key_that_reaches_no_class_is_not_followed(void)
{
	struct nat_rss rss = {.n_classes = 128};

	for (uint32_t i = 0; i < rss.n_classes; i++)
		rss.worker[i] = (uint8_t)(i % 3);
	assert(!nat_rss_is_usable(&rss, 3)); /* a key of zeros */
	for (uint32_t i = 0; i < NAT_RSS_KEY_BYTES; i++)
		rss.key[i] = (uint8_t)(0x6d + i * 37);
	assert(nat_rss_is_usable(&rss, 3));
	assert(!nat_rss_is_usable(&rss, 2)); /* names a worker that is not there */
	assert(!nat_rss_is_usable(&rss, 4)); /* leaves one out */
	rss.n_classes = 100;
	assert(!nat_rss_is_usable(&rss, 3));
}

/* The example of Microsoft's specification: 66.9.149.187:2794 to 161.142.100.80:1766 is 0x51ccc178. */
static void the_hash_is_that_of_the_specification(void)
{
	static const uint8_t key[40] = {0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67,
					0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb,
					0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
					0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa};
	struct nat_rss rss = {.n_classes = 1};
	memcpy(rss.key, key, sizeof(key));
	struct nat_workers *workers =
		nat_workers_init(testbed_memory(nat_workers_size(2, 1024)), 2, 1024, 1, &rss, &rss);
	const struct nat_tuple sent = {.local_be = NAT_HTON32(ADDRESS(66, 9, 149, 187)),
				       .remote_be = NAT_HTON32(ADDRESS(161, 142, 100, 80)),
				       .local_port_be = NAT_HTON16(2794),
				       .remote_port_be = NAT_HTON16(1766)};
	const struct nat_tuple came = {.local_be = sent.remote_be,
				       .remote_be = sent.local_be,
				       .local_port_be = sent.remote_port_be,
				       .remote_port_be = sent.local_port_be,
				       .side = 1};

	assert((nat_spread_rest(&workers->spread[0], &sent) ^
		nat_spread_port(&workers->spread[0], 0, 2794)) == 0x51ccc178);
	assert((nat_spread_rest(&workers->spread[1], &came) ^
		nat_spread_port(&workers->spread[1], 1, 1766)) == 0x51ccc178);
	free(workers);
}

static uint32_t marks_set(const struct nat_workers *workers, uint32_t worker)
{
	const size_t n = (size_t)workers->mark_mask + 1;
	uint32_t set = 0;

	for (size_t i = 0; i < n; i++)
		set += atomic_load(&workers->mark[worker * n + i]) != 0;
	return set;
}

/* A packet must not wait for marks of a million sessions. */
static void marks_are_wiped_a_bit_at_a_time_and_only_when_none_is_needed(void)
{
	enum { MARKED = 4000 };
	const uint64_t max_sessions = UINT64_C(1) << 20;
	struct nat_workers *workers = nat_workers_init(testbed_memory(nat_workers_size(2, max_sessions)), 2,
						       max_sessions, 1, NULL, NULL);
	struct nat_tidying tidying = {0};
	struct nat_tuple tuple = {.local_be = NAT_HTON32(ADDRESS(100, 64, 0, 1)), .protocol = NAT_PROTO_UDP};
	const uint32_t rounds = (workers->mark_mask + 1) / NAT_TIDIED_AT_ONCE;

	assert(rounds > 8);
	for (uint32_t i = 0; i < MARKED; i++) {
		tuple.remote_be = NAT_HTON32(i);
		nat_away_begin(workers, 0, &tuple, 1, false);
	}
	const uint32_t all = marks_set(workers, 0);
	nat_marks_tidy(workers, 0, &tidying);
	assert(all > MARKED / 2 && marks_set(workers, 0) == all); /* they are needed */
	for (uint32_t i = 0; i < MARKED; i++)
		nat_away_end(workers, 0);
	for (uint32_t round = 0; round < rounds / 2; round++)
		nat_marks_tidy(workers, 0, &tidying);
	const uint32_t rest = marks_set(workers, 0);
	assert(rest > all / 4 && rest < all);
	nat_away_begin(workers, 0, &tuple, 1, false);
	for (uint32_t round = 0; round < 2 * rounds; round++)
		nat_marks_tidy(workers, 0, &tidying);
	assert(marks_set(workers, 0) >= rest && tidying.left == 0);
	assert(atomic_load(nat_mark_of(workers, 0, &tuple)) == 2);
	nat_away_end(workers, 0);
	for (uint32_t round = 0; round < rounds; round++)
		nat_marks_tidy(workers, 0, &tidying);
	assert(marks_set(workers, 0) == 0 && tidying.left == 0);
	free(workers);
}

int main(void)
{
	the_hash_is_that_of_the_specification();
	a_key_that_reaches_no_class_is_not_followed();
	marks_are_wiped_a_bit_at_a_time_and_only_when_none_is_needed();
	for (uint32_t n = 2; n <= N_MAX; n++) {
		a_session_is_refused_only_when_no_port_of_any_worker_is_free(n);
		every_record_of_a_small_table_can_be_used(n);
	}
	sessions_survive_another_number_of_workers(1, 3);
	sessions_survive_another_number_of_workers(3, 5);
	sessions_survive_another_number_of_workers(5, 2);
	sessions_survive_another_number_of_workers(2, 1);
	return 0;
}
