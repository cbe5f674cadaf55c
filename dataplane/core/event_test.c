/* Every create has one delete, each public port is told once, and a ring that nobody reads loses the
 * newest and counts them, while the engine goes on. */
#include <assert.h>

#include "testbed.h"

#define RING 1024u

static struct nat_event_ring *ring_new(struct testbed *t)
{
	struct nat_event_ring *ring = nat_event_ring_init(testbed_memory(nat_event_ring_size(RING)), RING);

	nat_engine_log_to(t->e, ring);
	return ring;
}

static void begin(struct testbed *t, uint32_t n, uint64_t now_ns)
{
	uint8_t bytes[28];

	for (uint32_t i = 0; i < n; i++)
		testbed_udp(t, bytes, 0, ADDRESS(100, 64, 0, 1) + i / 2, 4000,
			    ADDRESS(198, 51, 100, 1) + i % 2, 443, now_ns);
}

static void end_all(struct testbed *t, uint64_t now_ns)
{
	for (uint64_t s = 1; s < 600; s++)
		nat_engine_tick(t->e, now_ns + s * SECOND_NS);
	assert(nat_engine_counters(t->e)->sessions == 0);
}

static void expect(struct nat_event_ring *ring, enum nat_event_kind created, uint32_t n, uint8_t implied)
{
	struct nat_event event[RING];
	const uint32_t got = nat_event_ring_take(ring, event, RING);
	uint32_t begun = 0, ended = 0;

	for (uint32_t i = 0; i < got; i++) {
		if (event[i].implied != implied)
			continue;
		begun += event[i].kind == created;
		ended += event[i].kind == created + 1u;
		assert(event[i].outside_be != 0 && event[i].outside_port_be != 0 &&
		       event[i].inside_port_be == NAT_HTON16(4000) && event[i].protocol == 17);
	}
	assert(begun == n && ended == n);
}

static void test_what_is_told(enum nat_mapping_kind mapping, uint8_t log, uint32_t sessions,
			      uint32_t mappings, uint32_t implied)
{
	struct testbed t;

	testbed_config(&t, 4, 1024, 65535, 8192);
	t.pool.mapping = mapping;
	t.pool.log = log;
	testbed_start(&t, SECOND_NS);
	struct nat_event_ring *ring = ring_new(&t);
	for (int part = 0; part < 3; part++) { /* one kind is looked at in each */
		begin(&t, 100, (uint64_t)(1 + 1000 * part) * SECOND_NS);
		end_all(&t, (uint64_t)(1 + 1000 * part) * SECOND_NS);
		if (part == 0)
			expect(ring, NAT_EVENT_SESSION_CREATED, sessions, 0);
		else if (part == 1)
			expect(ring, NAT_EVENT_MAPPING_CREATED, mappings, 0);
		else
			expect(ring, NAT_EVENT_SESSION_CREATED, implied, 1);
	}
	nat_engine_log_to(t.e, NULL);
	begin(&t, 10, 4000 * SECOND_NS);
	expect(ring, NAT_EVENT_SESSION_CREATED, 0, 0);
	testbed_stop(&t, false);
	free(ring);
}

static void test_overflow(void)
{
	struct testbed t;
	struct nat_event event[RING];
	struct nat_event_counts counts;

	testbed_config(&t, 4, 1024, 65535, 8192);
	t.pool.log = NAT_LOG_PORTS;
	testbed_start(&t, SECOND_NS);
	struct nat_event_ring *ring = ring_new(&t);
	begin(&t, 3000, SECOND_NS);
	assert(nat_engine_counters(t.e)->sessions == 3000);
	assert(nat_event_ring_take(ring, event, 100) == 100);
	assert(event[0].inside_be == NAT_HTON32(ADDRESS(100, 64, 0, 1)) && event[0].now_ns == SECOND_NS);
	end_all(&t, SECOND_NS);
	nat_event_ring_counts(ring, &counts);
	assert(counts.put[NAT_EVENT_SESSION_CREATED] == RING &&
	       counts.lost[NAT_EVENT_SESSION_CREATED] == 3000 - RING);
	assert(counts.put[NAT_EVENT_SESSION_ENDED] == 100 &&
	       counts.lost[NAT_EVENT_SESSION_ENDED] == 3000 - 100);
	assert(nat_event_ring_take(ring, event, RING) == RING);
	assert(nat_event_ring_take(ring, event, RING) == 0);
	testbed_stop(&t, false);
	free(ring);
}

int main(void)
{
	test_what_is_told(NAT_ENDPOINT_DEPENDENT, 0, 0, 0, 0);
	test_what_is_told(NAT_ENDPOINT_DEPENDENT, NAT_LOG_PORTS, 100, 0, 0);
	test_what_is_told(NAT_ENDPOINT_INDEPENDENT, NAT_LOG_PORTS, 0, 50, 0);
	test_what_is_told(NAT_ENDPOINT_INDEPENDENT, NAT_LOG_PORTS | NAT_LOG_SESSIONS, 0, 50, 100);
	test_overflow();
	return 0;
}
