/* One engine in plain memory, for the *_test.c beside the data structures. Not part of the core. */
#ifndef NAT_TESTBED_H
#define NAT_TESTBED_H

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define SECOND_NS           UINT64_C(1000000000)
#define ADDRESS(a, b, c, d) ((uint32_t)(a) << 24 | (uint32_t)(b) << 16 | (uint32_t)(c) << 8 | (uint32_t)(d))

struct testbed {
	struct nat_engine *e;
	struct nat_policy *policy;
	void *table, *engine;
	struct nat_range range;
	struct nat_pool_config pool;
	struct nat_zone_config zone;
	struct nat_interface_config interface[2];
	struct nat_config config;
	struct nat_engine_params params;
};

static void testbed_route(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n)
{
	(void)context;
	for (uint32_t i = 0; i < n; i++) {
		bool inside = NAT_NTOH32(destination_be[i]) >> 22 == ADDRESS(100, 64, 0, 0) >> 22;
		hop[i] = (struct nat_hop){destination_be[i], 1500, inside ? 0 : 1, NAT_HOP_FORWARD};
	}
}

static uint32_t testbed_own_address(void *context, uint8_t iface)
{
	(void)context;
	return NAT_HTON32(ADDRESS(192, 0, 2, 1 + iface));
}

static inline void testbed_config(struct testbed *t, uint32_t n_addresses, uint16_t port_first,
				  uint16_t port_last, uint64_t max_sessions)
{
	memset(t, 0, sizeof(*t));
	t->range = (struct nat_range){ADDRESS(203, 0, 113, 1), ADDRESS(203, 0, 113, n_addresses)};
	t->pool = (struct nat_pool_config){.name = "p",
					   .ranges = &t->range,
					   .n_ranges = 1,
					   .port_first = port_first,
					   .port_last = port_last};
	t->zone = (struct nat_zone_config){.source = {ADDRESS(100, 64, 0, 0), 10}, .action = NAT_ACTION_POOL};
	t->interface[0] = (struct nat_interface_config){.name = "inside0", .role = NAT_ROLE_INSIDE};
	t->interface[1] = (struct nat_interface_config){.name = "outside0", .role = NAT_ROLE_OUTSIDE};
	t->config = (struct nat_config){.workers = 1,
					.max_sessions = max_sessions,
					.interfaces = t->interface,
					.n_interfaces = 2,
					.pools = &t->pool,
					.n_pools = 1,
					.zones = &t->zone,
					.n_zones = 1,
					.limits = {.fragments = 64},
					.timeouts = {7440, 240, 240, 300, 120, 20, 60, 120}};
}

static inline void *testbed_memory(size_t bytes)
{
	void *mem =
		aligned_alloc(NAT_CACHE_LINE, (bytes + NAT_CACHE_LINE - 1) & ~(size_t)(NAT_CACHE_LINE - 1));
	assert(mem);
	memset(mem, 0, bytes);
	return mem;
}

/* Makes the engine; with t->table set already it adopts that. */
static inline bool testbed_start(struct testbed *t, uint64_t now_ns)
{
	bool adopted;
	const char *why;

	if (!t->table)
		t->table = testbed_memory(nat_table_size(t->config.max_sessions));
	t->policy = nat_policy_init(testbed_memory(nat_policy_size(&t->config)), &t->config, NULL);
	struct nat_table *table = nat_table_init(t->table, nat_table_size(t->config.max_sessions),
						 t->config.max_sessions, 1, &adopted, &why);
	assert(table);
	t->params = (struct nat_engine_params){.table = table,
					       .policy = t->policy,
					       .world = {NULL, testbed_route, testbed_own_address},
					       .max_sessions = t->config.max_sessions,
					       .seed = 1,
					       .now_ns = now_ns,
					       .n_workers = 1,
					       .replicate = t->params.replicate};
	t->engine = testbed_memory(nat_engine_size(&t->params));
	t->e = nat_engine_init(t->engine, &t->params);
	return adopted;
}

static inline void testbed_stop(struct testbed *t, bool keep_table)
{
	free(t->engine);
	free(t->policy);
	if (!keep_table) {
		free(t->table);
		t->table = NULL;
	}
}

static inline void testbed_write_udp(uint8_t *bytes, uint32_t source, uint16_t source_port,
				     uint32_t destination, uint16_t destination_port)
{
	memset(bytes, 0, 28);
	bytes[0] = 0x45;
	nat_write16(bytes + NAT_IP_LENGTH, 28);
	bytes[NAT_IP_TTL] = 64;
	bytes[NAT_IP_PROTOCOL] = NAT_PROTO_UDP;
	nat_put32(bytes + NAT_IP_SOURCE, NAT_HTON32(source));
	nat_put32(bytes + NAT_IP_DESTINATION, NAT_HTON32(destination));
	nat_put16(bytes + NAT_IP_CHECKSUM, nat_csum_bytes(bytes, 20));
	nat_write16(bytes + 20, source_port);
	nat_write16(bytes + 22, destination_port);
	nat_write16(bytes + 24, 8);
}

/* A UDP packet of 28 bytes in `bytes`; gives its verdict. */
static inline struct nat_pkt testbed_udp(struct testbed *t, uint8_t *bytes, uint8_t iface, uint32_t source,
					 uint16_t source_port, uint32_t destination,
					 uint16_t destination_port, uint64_t now_ns)
{
	struct nat_pkt pkt = {.l3 = bytes, .len_bytes = 28, .iface = iface};

	testbed_write_udp(bytes, source, source_port, destination, destination_port);
	nat_engine_run(t->e, &pkt, 1, now_ns);
	return pkt;
}

#endif
