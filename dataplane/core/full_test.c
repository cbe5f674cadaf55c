/* A full table: what is refused leaves nothing behind, and nothing is refused for the sake of a session
 * whose time is over. */
#include <assert.h>

#include "testbed.h"

enum { RECORDS = 1024, BLOCK = 64 };

static uint32_t host_of(uint32_t i)
{
	return ADDRESS(100, 64, 0, 1) + i;
}

static struct nat_pkt talk(struct testbed *t, uint32_t host, uint16_t port, uint64_t now_ns)
{
	uint8_t bytes[28];

	return testbed_udp(t, bytes, 0, host, port, ADDRESS(198, 51, 100, 1), 443, now_ns);
}

/* One host fills the table; others come, each of which would need a block of its own. */
static void test_a_refused_session_leaves_its_block_to_others(enum nat_mapping_kind mapping)
{
	struct testbed t;
	uint64_t now_ns = SECOND_NS;
	struct nat_event event;
	uint32_t taken = 0, freed = 0;

	testbed_config(&t, 1, 1024, 1024 + 40 * BLOCK - 1, RECORDS);
	t.pool.mapping = mapping;
	t.pool.block_ports = BLOCK;
	t.pool.blocks_per_host = 32;
	testbed_start(&t, now_ns);
	for (uint16_t port = 2000; t.e->records_left > 0; port++)
		talk(&t, host_of(0), port, now_ns);
	for (uint32_t i = 1; i <= 100; i++)
		assert(talk(&t, host_of(i), 2000, now_ns).reason == NAT_REASON_TABLE_FULL);
	now_ns += 121 * SECOND_NS;
	for (uint32_t i = 0; i < 100; i++)
		nat_engine_tick(t.e, now_ns);
	now_ns += 121 * SECOND_NS; /* a port may rest */
	for (uint32_t i = 0; i < 100; i++)
		nat_engine_tick(t.e, now_ns);
	assert(t.e->records_left == RECORDS);
	while (nat_engine_event(t.e, &event)) {
		taken += event.kind == NAT_EVENT_BLOCK_TAKEN;
		freed += event.kind == NAT_EVENT_BLOCK_FREED;
	}
	assert(taken == freed);
	for (uint32_t i = 0; i < 40; i++)
		assert(talk(&t, host_of(1000 + i), 2000, now_ns).verdict == NAT_FORWARD);
	testbed_stop(&t, false);
}

/* The records of sessions that are over hang on the wheel behind those that were refreshed, which come up
 * first. */
static void test_a_table_full_of_sessions_that_are_over_is_not_full(void)
{
	enum { REFRESHED = 800 };
	struct testbed t;
	uint64_t now_ns = SECOND_NS;

	testbed_config(&t, 1, 1024, 65535, RECORDS);
	testbed_start(&t, now_ns);
	for (uint32_t i = RECORDS; i-- > 0;)
		assert(talk(&t, host_of(i), 2000, now_ns).verdict == NAT_FORWARD);
	assert(t.e->records_left == 0);
	for (uint32_t i = 0; i < REFRESHED; i++)
		talk(&t, host_of(i), 2000, now_ns + 60 * SECOND_NS);
	now_ns += 121 * SECOND_NS;
	for (uint32_t i = 0; i < RECORDS - REFRESHED; i++)
		assert(talk(&t, host_of(RECORDS + i), 2000, now_ns).verdict == NAT_FORWARD);
	assert(talk(&t, host_of(3 * RECORDS), 2000, now_ns).reason == NAT_REASON_TABLE_FULL);
	testbed_stop(&t, false);
}

/* A packet passes over a mapping whose last session is over; the next of the burst finds all ports taken,
 * so those that are over end, and their records and ports are given out again. */
static void test_a_packet_over_a_mapping_that_ends_in_its_burst_goes_to_no_other_host(uint32_t victim)
{
	enum { PORTS = 128, OVER = 64 };
	struct testbed t;
	uint8_t bytes[2][28], sent[28];
	uint64_t now_ns = SECOND_NS;
	uint16_t port = 0;

	testbed_config(&t, 1, 2000, 2000 + PORTS - 1, RECORDS);
	t.pool.mapping = NAT_ENDPOINT_INDEPENDENT;
	t.config.timeouts.hold_s = 0;
	testbed_start(&t, now_ns);
	for (uint32_t i = 0; i < PORTS; i++) {
		testbed_udp(&t, sent, 0, host_of(i), 4000, ADDRESS(198, 51, 100, 1), 443, now_ns);
		if (i == victim)
			port = nat_read16(sent + 20);
	}
	for (uint32_t i = OVER; i < PORTS; i++)
		talk(&t, host_of(i), 4000, now_ns + 60 * SECOND_NS);
	now_ns += 121 * SECOND_NS;
	struct nat_pkt pkt[2] = {{.l3 = bytes[0], .len_bytes = 28, .iface = 1},
				 {.l3 = bytes[1], .len_bytes = 28, .iface = 0}};
	testbed_write_udp(bytes[0], ADDRESS(198, 51, 100, 77), 9, ADDRESS(203, 0, 113, 1), port);
	testbed_write_udp(bytes[1], host_of(1000), 4000, ADDRESS(198, 51, 100, 1), 443);
	nat_engine_run(t.e, pkt, 2, now_ns);
	assert(pkt[1].verdict == NAT_FORWARD);
	if (pkt[0].verdict == NAT_FORWARD)
		assert(nat_read32(bytes[0] + NAT_IP_DESTINATION) == host_of(victim) ||
		       (nat_read16(bytes[1] + 20) == port &&
			nat_read32(bytes[0] + NAT_IP_DESTINATION) == host_of(1000)));
	testbed_stop(&t, false);
}

/* Ports towards one remote are all in use, and very many other sessions are over: no burst waits for the
 * end of all of them. */
static void test_a_backlog_that_is_over_holds_no_burst_up(void)
{
	enum { PORTS = 64, BACKLOG = 20000 };
	struct testbed t;
	uint8_t bytes[28];
	uint64_t now_ns = SECOND_NS, expired = 0;

	testbed_config(&t, 1, 2000, 2000 + PORTS - 1, BACKLOG + RECORDS);
	testbed_start(&t, now_ns);
	for (uint32_t i = 0; i < BACKLOG; i++)
		testbed_udp(&t, bytes, 0, host_of(i), 2000, ADDRESS(198, 18, 0, 0) + i, 443, now_ns);
	now_ns += 60 * SECOND_NS;
	for (uint32_t i = 0; i < PORTS; i++)
		assert(talk(&t, host_of(i), 2000, now_ns).verdict == NAT_FORWARD);
	now_ns += 61 * SECOND_NS;
	while (t.e->counters.sessions > PORTS) {
		assert(talk(&t, host_of(PORTS), 2000, now_ns).reason == NAT_REASON_NO_PORT);
		const uint64_t ended = t.e->counters.sessions_expired - expired;
		assert(ended > 0 && ended <= NAT_OVERDUE_MAX + 64);
		expired += ended;
	}
	assert(expired == BACKLOG);
	testbed_stop(&t, false);
}

int main(void)
{
	test_a_refused_session_leaves_its_block_to_others(NAT_ENDPOINT_DEPENDENT);
	test_a_refused_session_leaves_its_block_to_others(NAT_ENDPOINT_INDEPENDENT);
	test_a_table_full_of_sessions_that_are_over_is_not_full();
	test_a_backlog_that_is_over_holds_no_burst_up();
	for (uint32_t victim = 0; victim < 64; victim++)
		test_a_packet_over_a_mapping_that_ends_in_its_burst_goes_to_no_other_host(victim);
	return 0;
}
