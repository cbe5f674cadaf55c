/* Sessions end when their time is over and not before, in bounded steps; and a new engine on the same table
 * goes on where the old one died. */
#include <assert.h>

#include "testbed.h"

static uint64_t live(const struct testbed *t)
{
	return nat_engine_counters(t->e)->sessions;
}

static void test_expiry(void)
{
	struct testbed t;
	uint8_t bytes[28];
	const uint64_t start_ns = 5 * SECOND_NS;

	testbed_config(&t, 4, 1024, 65535, 8192);
	testbed_start(&t, start_ns);
	for (uint32_t i = 0; i < 5000; i++)
		testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1) + i, 4000, ADDRESS(198, 51, 100, 1), 443,
			    start_ns);
	assert(live(&t) == 5000);
	/* one_way is 120 s; one session is refreshed on the way */
	testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1), 4000, ADDRESS(198, 51, 100, 1), 443,
		    start_ns + 100 * SECOND_NS);
	for (uint64_t s = 101; s <= 120; s++)
		nat_engine_tick(t.e, start_ns + s * SECOND_NS);
	assert(live(&t) == 5000);
	uint32_t ticks = 0;
	while (live(&t) > 1 && ticks < 100000) {
		const uint64_t before = live(&t);
		nat_engine_tick(t.e, start_ns + 121 * SECOND_NS);
		assert(before - live(&t) <= 512); /* no burst pays for all */
		ticks++;
	}
	assert(live(&t) == 1);
	for (int i = 0; i < 10; i++)
		nat_engine_tick(t.e, start_ns + 220 * SECOND_NS);
	assert(live(&t) == 1);
	for (int i = 0; i < 10; i++)
		nat_engine_tick(t.e, start_ns + 221 * SECOND_NS);
	assert(live(&t) == 0);
	/* a pause longer than the wheel */
	testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1), 4000, ADDRESS(198, 51, 100, 1), 443,
		    start_ns + 300 * SECOND_NS);
	for (int i = 0; i < 10; i++)
		nat_engine_tick(t.e, start_ns + 90000 * SECOND_NS);
	assert(live(&t) == 0);
	testbed_stop(&t, false);
}

static void test_restart(enum nat_mapping_kind mapping)
{
	struct testbed t;
	uint8_t bytes[28], reply[28];
	enum { N = 3000 };
	static uint32_t out_addr[N];
	static uint16_t out_port[N];

	testbed_config(&t, 4, 1024, 65535, 8192);
	t.pool.mapping = mapping;
	assert(!testbed_start(&t, SECOND_NS));
	for (uint32_t i = 0; i < N; i++) {
		testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1) + i / 2, 4000,
			    ADDRESS(198, 51, 100, 1) + i % 2, 443, SECOND_NS);
		out_addr[i] = nat_read32(bytes + NAT_IP_SOURCE);
		out_port[i] = nat_read16(bytes + 20);
	}
	/* A process that died while it filled a record leaves it free. */
	t.e->record[t.e->free_record[t.e->n_free - 1]].inside.local_be = 77;
	testbed_stop(&t, true);
	assert(testbed_start(&t, 2 * SECOND_NS));
	assert(live(&t) == N);
	for (uint32_t i = 0; i < N; i++) {
		struct nat_pkt pkt = testbed_udp(&t, reply, 1, ADDRESS(198, 51, 100, 1) + i % 2, 443,
						 out_addr[i], out_port[i], 2 * SECOND_NS);
		assert(pkt.verdict == NAT_FORWARD &&
		       nat_read32(reply + NAT_IP_DESTINATION) == ADDRESS(100, 64, 0, 1) + i / 2);
		pkt = testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1) + i / 2, 4000,
				  ADDRESS(198, 51, 100, 1) + i % 2, 443, 2 * SECOND_NS);
		assert(nat_read32(bytes + NAT_IP_SOURCE) == out_addr[i] &&
		       nat_read16(bytes + 20) == out_port[i]);
	}
	/* All end, and every record is free again. */
	for (int i = 0; i < 2000; i++)
		nat_engine_tick(t.e, 2000 * SECOND_NS);
	for (int i = 0; i < 2000; i++)
		nat_engine_tick(t.e, 4000 * SECOND_NS);
	assert(live(&t) == 0 && t.e->records_left == 8192);
	testbed_stop(&t, false);
}

static uint64_t on_address(const struct testbed *t, bool mappings)
{
	struct nat_address_view view;

	assert(nat_engine_address(t->e, 0, &view));
	return mappings ? view.mappings[NAT_TRAFFIC_UDP] : view.sessions;
}

/* Sessions on an address that no pool has, from before a restart or from a peer whose configuration was
 * changed first. */
static void test_sessions_on_an_address_that_comes_later_are_counted(enum nat_mapping_kind mapping)
{
	enum { BLOCK = 64 };
	struct testbed t;
	uint8_t bytes[28];
	const bool maps = mapping == NAT_ENDPOINT_INDEPENDENT;

	testbed_config(&t, 1, 2048, 2048 + 2 * BLOCK - 1, 8192);
	t.pool.mapping = mapping;
	t.pool.block_ports = BLOCK;
	t.pool.blocks_per_host = 1;
	testbed_start(&t, SECOND_NS);
	testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1), 4000, ADDRESS(198, 51, 100, 1), 443, SECOND_NS);
	const uint16_t port = nat_read16(bytes + 20);
	testbed_stop(&t, true);
	t.range.first = t.range.last = ADDRESS(203, 0, 113, 2);
	assert(testbed_start(&t, 2 * SECOND_NS) && live(&t) == 1);
	t.range.first = t.range.last = ADDRESS(203, 0, 113, 1);
	struct nat_policy *first = t.policy;
	t.policy = nat_policy_init(testbed_memory(nat_policy_size(&t.config)), &t.config, first);
	nat_engine_set_policy(t.e, t.policy);
	free(first);
	assert(on_address(&t, false) == 1 && on_address(&t, true) == maps);
	testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 2), 4000, ADDRESS(198, 51, 100, 1), 443, 2 * SECOND_NS);
	assert(nat_read16(bytes + 20) / BLOCK != port / BLOCK); /* a block has one host */
	for (uint64_t s = 2; s < 500; s++)
		nat_engine_tick(t.e, s * SECOND_NS);
	assert(live(&t) == 0 && on_address(&t, false) == 0 && on_address(&t, true) == 0);
	testbed_stop(&t, false);
}

static void test_a_strange_table_is_refused(void)
{
	bool adopted;
	const char *why;
	void *mem = testbed_memory(nat_table_size(2048));

	assert(nat_table_init(mem, nat_table_size(2048), 2048, 1, &adopted, &why) && !adopted);
	assert(nat_table_init(mem, nat_table_size(2048), 2048, 1, &adopted, &why) && adopted);
	assert(!nat_table_init(mem, nat_table_size(2048), 1024, 1, &adopted, &why) && why[0]);
	((struct nat_table *)mem)->layout++;
	assert(!nat_table_init(mem, nat_table_size(2048), 2048, 1, &adopted, &why) && why[0]);
	free(mem);
}

int main(void)
{
	test_expiry();
	test_restart(NAT_ENDPOINT_DEPENDENT);
	test_restart(NAT_ENDPOINT_INDEPENDENT);
	test_sessions_on_an_address_that_comes_later_are_counted(NAT_ENDPOINT_DEPENDENT);
	test_sessions_on_an_address_that_comes_later_are_counted(NAT_ENDPOINT_INDEPENDENT);
	test_a_strange_table_is_refused();
	return 0;
}
