/* Memory, flows and frames. The engine sees what a worker of dsnatd would show it: buffers as DPDK lays them
 * out, routes and neighbours read from tables like those of ctl/route.c, time read once a burst. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../../core/wire.h"
#include "bench.h"

#define HUGE_BYTES      (UINT64_C(2) << 20)
#define N_ADDRESSES     64u
#define PORT_FIRST      1024u
#define PORT_LAST       65535u
#define INSIDE_NET      0x64400000u /* 100.64.0.0/10 */
#define REMOTE_NET      0xc6120000u /* 198.18.0.0/15 */
#define POOL_NET        0xcb007100u /* 203.0.113.0/24 */
#define INSIDE_ROUTER   0x647ffffeu
#define OUTSIDE_ROUTER  0xc6336401u
#define FLOWS_PER_HOST  32u
#define ROOT_ENTRIES    65536u
#define NEIGHBOUR_SLOTS 1024u
#define BURST_NS        2000u

struct neighbour {
	uint64_t key, mac;
};

struct hop_cache {
	uint32_t root[ROOT_ENTRIES]; /* by the first 16 bits: number of a hop */
	struct nat_hop hop[4];
	struct neighbour neighbour[NEIGHBOUR_SLOTS];
};

/* ---- memory ---- */

static bool take(struct load *load, struct memory *memory, size_t used_bytes, enum pages wanted)
{
	const size_t bytes = (used_bytes + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);
	if (wanted == PAGES_HUGE) {
		void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE, -1, 0);
		if (at != MAP_FAILED) {
			*memory = (struct memory){at, bytes, used_bytes, PAGES_HUGE};
			return true;
		}
	}
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		return false;
	madvise(at, bytes,
		MADV_NOHUGEPAGE); /* or the kernel might give huge pages to one run and not to the next */
	memset(at, 0, bytes);
	*memory = (struct memory){at, bytes, used_bytes, PAGES_PLAIN};
	load->pages = PAGES_PLAIN;
	return true;
}

static void give(struct memory *memory)
{
	if (memory->at)
		munmap(memory->at, memory->bytes);
	*memory = (struct memory){0};
}

/* ---- routes ---- */

static uint64_t neighbour_key(uint8_t iface, uint32_t address_be)
{
	return (uint64_t)(iface + 1u) << 32 | address_be;
}

static struct neighbour *neighbour_slot(struct hop_cache *routes, uint64_t key)
{
	uint32_t at = (uint32_t)(key * UINT64_C(0x9e3779b97f4a7c15) >> 40);

	while (routes->neighbour[at % NEIGHBOUR_SLOTS].key &&
	       routes->neighbour[at % NEIGHBOUR_SLOTS].key != key)
		at++;
	return &routes->neighbour[at % NEIGHBOUR_SLOTS];
}

static void add_neighbour(struct hop_cache *routes, uint8_t iface, uint32_t address)
{
	const uint64_t key = neighbour_key(iface, NAT_HTON32(address));

	*neighbour_slot(routes, key) = (struct neighbour){key, UINT64_C(0x020000000000) | address};
}

/* Inside prefixes lead to a router inside, all else to one outside. */
static void fill_routes(struct hop_cache *routes)
{
	routes->hop[0] = (struct nat_hop){.next_hop_be = NAT_HTON32(OUTSIDE_ROUTER),
					  .mtu_bytes = 1500,
					  .iface = OUTSIDE,
					  .kind = NAT_HOP_FORWARD};
	routes->hop[1] = (struct nat_hop){.next_hop_be = NAT_HTON32(INSIDE_ROUTER),
					  .mtu_bytes = 1500,
					  .iface = INSIDE,
					  .kind = NAT_HOP_FORWARD};
	for (uint32_t i = INSIDE_NET >> 16; i < (INSIDE_NET >> 16) + 64; i++)
		routes->root[i] = 1;
	add_neighbour(routes, OUTSIDE, OUTSIDE_ROUTER);
	add_neighbour(routes, INSIDE, INSIDE_ROUTER);
}

static void route(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n)
{
	const struct hop_cache *routes = context;

	for (uint32_t i = 0; i < n; i++)
		NAT_PREFETCH(&routes->root[NAT_NTOH32(destination_be[i]) >> 16]);
	for (uint32_t i = 0; i < n; i++)
		hop[i] = routes->hop[routes->root[NAT_NTOH32(destination_be[i]) >> 16]];
}

static uint32_t own_address(void *context, uint8_t iface)
{
	(void)context;
	return NAT_HTON32(iface == INSIDE ? INSIDE_ROUTER - 1 : OUTSIDE_ROUTER + 1);
}

/* ---- flows ---- */

uint64_t load_chance(struct load *load, uint64_t n)
{
	uint64_t x = load->chance += UINT64_C(0x9e3779b97f4a7c15); /* splitmix64 */

	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return (uint64_t)(((nat_u128)(x ^ x >> 31) * n) >> 64);
}

uint32_t load_ports(void)
{
	return PORT_LAST - PORT_FIRST + 1;
}

static uint32_t mix(uint64_t flow)
{
	return (uint32_t)(flow * UINT64_C(0x9e3779b97f4a7c15) >> 32);
}

static void write_transport(uint8_t *l4, uint8_t protocol, uint8_t tcp_flags, uint16_t source_be,
			    uint16_t destination_be)
{
	nat_put16(l4 + NAT_L4_SOURCE_PORT, source_be);
	nat_put16(l4 + NAT_L4_DESTINATION_PORT, destination_be);
	if (protocol == NAT_PROTO_TCP) {
		l4[NAT_TCP_OFFSET] = 5 << 4;
		l4[NAT_TCP_FLAGS] = tcp_flags;
		nat_put16(l4 + NAT_TCP_CHECKSUM, 0x1234); /* the engine updates it and never verifies it */
	} else {
		nat_write16(l4 + NAT_UDP_LENGTH, FRAME_BYTES - ETHER_BYTES - NAT_IP_HEADER_BYTES);
		nat_put16(l4 + NAT_UDP_CHECKSUM, 0x1234);
	}
}

void load_frame(struct load *load, uint32_t at, uint64_t flow, uint8_t iface, bool first)
{
	uint8_t *frame = load_frame_at(load, at), *ip = frame + ETHER_BYTES;
	const uint32_t host_be = NAT_HTON32(INSIDE_NET + (uint32_t)(flow / FLOWS_PER_HOST));
	const uint16_t host_port_be = NAT_HTON16(1024 + flow % FLOWS_PER_HOST * 1009);
	const uint32_t remote_be =
		NAT_HTON32(load->one_remote ? REMOTE_NET + 1 : REMOTE_NET + mix(flow) % 131072);
	const uint16_t remote_port_be = NAT_HTON16(443);
	const uint8_t flags =
		first ? (iface == INSIDE ? NAT_TCP_SYN : NAT_TCP_SYN | NAT_TCP_ACK) : NAT_TCP_ACK;

	memset(frame, 0, FRAME_BYTES);
	frame[0] = 0x02;
	frame[12] = 0x08;
	ip[0] = 0x45;
	nat_write16(ip + NAT_IP_LENGTH, FRAME_BYTES - ETHER_BYTES);
	nat_put16(ip + NAT_IP_ID, (uint16_t)flow);
	nat_write16(ip + NAT_IP_FRAGMENT, NAT_IP_DF); /* as nearly all hosts send TCP and UDP */
	ip[NAT_IP_TTL] = 64;
	ip[NAT_IP_PROTOCOL] = load->protocol;
	if (iface == INSIDE) {
		nat_put32(ip + NAT_IP_SOURCE, host_be);
		nat_put32(ip + NAT_IP_DESTINATION, remote_be);
		write_transport(ip + NAT_IP_HEADER_BYTES, load->protocol, flags, host_port_be,
				remote_port_be);
	} else {
		nat_put32(ip + NAT_IP_SOURCE, remote_be);
		nat_put32(ip + NAT_IP_DESTINATION, load->outside[flow].address_be);
		write_transport(ip + NAT_IP_HEADER_BYTES, load->protocol, flags, remote_port_be,
				load->outside[flow].port_be);
	}
}

void load_ring(struct load *load, uint8_t iface)
{
	uint64_t flow[RING];

	for (uint32_t i = 0; i < RING; i++) {
		flow[i] = load_chance(load, load->n_flows);
		/* Straight to the first cache and out of it again: the generator must not take the engine's
		 * place. */
		__builtin_prefetch(&load->outside[flow[i]], 0, 0);
	}
	for (uint32_t i = 0; i < RING; i++)
		load_frame(load, i, flow[i], iface, false);
}

/* ---- the shell's part ---- */

void load_present(struct load *load, uint32_t at, uint8_t iface, struct nat_pkt *pkt)
{
	for (uint32_t i = 0; i < BURST; i++) {
		uint8_t *frame = load_frame_at(load, at + i);

		nat_pkt_present(&pkt[i], frame + ETHER_BYTES, FRAME_BYTES - ETHER_BYTES, frame, iface,
				NAT_PKT_IP_CSUM_GOOD);
	}
}

void load_send(struct load *load, struct nat_pkt *pkt)
{
	struct nat_pkt out;

	for (uint32_t i = 0; i < BURST; i++) {
		uint8_t *frame = pkt[i].cookie;
		const struct neighbour *next;

		if (pkt[i].verdict != NAT_FORWARD)
			continue;
		next = neighbour_slot(load->routes, neighbour_key(pkt[i].hop.iface, pkt[i].hop.next_hop_be));
		memcpy(frame, &next->mac, 6);
		memcpy(frame + 6, &next->key, 6); /* any other six bytes: the port's own address */
	}
	while (nat_engine_next(load->engine, &out))
		;
}

void load_burst(struct load *load, uint32_t at, uint8_t iface, struct nat_pkt *pkt)
{
	load_present(load, at, iface, pkt);
	load->now_ns += BURST_NS;
	nat_engine_run(load->engine, pkt, BURST, load->now_ns);
	load_send(load, pkt);
}

/* ---- life ---- */

static bool all_forwarded(const struct nat_pkt *pkt)
{
	for (uint32_t i = 0; i < BURST; i++)
		if (pkt[i].verdict != NAT_FORWARD)
			return false;
	return true;
}

bool load_create(struct load *load, uint64_t first, uint64_t n)
{
	struct nat_pkt pkt[BURST];

	/* A burst is always full: the last one repeats its last flow. */
	for (uint64_t done = 0; done < n; done += BURST) {
		for (uint32_t i = 0; i < BURST; i++)
			load_frame(load, i, first + (done + i < n ? done + i : n - 1), INSIDE, true);
		load_burst(load, 0, INSIDE, pkt);
		if (!all_forwarded(pkt))
			return false;
		for (uint32_t i = 0; i < BURST && done + i < n; i++) {
			const uint8_t *ip = pkt[i].l3;
			load->outside[first + done + i] = (struct outside){
				nat_get32(ip + NAT_IP_SOURCE), nat_get16(ip + NAT_IP_HEADER_BYTES)};
		}
	}
	return true;
}

static bool answer(struct load *load)
{
	struct nat_pkt pkt[BURST];

	for (uint64_t done = 0; done < load->n_flows; done += BURST) {
		for (uint32_t i = 0; i < BURST; i++)
			load_frame(load, i, done + i < load->n_flows ? done + i : load->n_flows - 1, OUTSIDE,
				   true);
		load_burst(load, 0, OUTSIDE, pkt);
		if (!all_forwarded(pkt))
			return false;
	}
	return true;
}

static bool make_engine(struct load *load, const struct nat_config *config, enum pages wanted, uint64_t seed)
{
	const size_t table_bytes = nat_table_size(config->max_sessions);
	const char *why;
	bool adopted;

	if (!take(load, &load->policy_memory, nat_policy_size(config), wanted) ||
	    !take(load, &load->table_memory, table_bytes, wanted))
		return false;
	struct nat_engine_params params = {
		.table = nat_table_init(load->table_memory.at, table_bytes, config->max_sessions, seed,
					&adopted, &why),
		.policy = nat_policy_init(load->policy_memory.at, config, NULL),
		.world = {.context = load->routes, .route = route, .own_address = own_address},
		.max_sessions = config->max_sessions,
		.seed = seed,
		.now_ns = load->now_ns,
		.worker = 0,
		.n_workers = 1};
	if (!params.table || !take(load, &load->engine_memory, nat_engine_size(&params), wanted))
		return false;
	load->engine = nat_engine_init(load->engine_memory.at, &params);
	return load->engine != NULL;
}

bool load_open(struct load *load, uint8_t protocol, uint64_t n_flows, uint32_t scarce, enum pages wanted,
	       uint64_t seed)
{
	const struct nat_interface_config interfaces[] = {{.name = "inside0", .role = NAT_ROLE_INSIDE},
							  {.name = "outside0", .role = NAT_ROLE_OUTSIDE}};
	const struct nat_range range = {POOL_NET, POOL_NET + (scarce ? scarce : N_ADDRESSES) - 1};
	const struct nat_pool_config pool = {.name = "pool",
					     .ranges = &range,
					     .n_ranges = 1,
					     .port_first = PORT_FIRST,
					     .port_last = PORT_LAST};
	struct nat_zone_config zones[4];
	struct nat_config config = {.workers = 1,
				    .max_sessions = (scarce ? scarce * load_ports() : n_flows) + NEW_MAX,
				    .interfaces = interfaces,
				    .n_interfaces = 2,
				    .pools = &pool,
				    .n_pools = 1,
				    .zones = zones,
				    .n_zones = 4,
				    .timeouts = {.tcp_established_s = 7440,
						 .tcp_opening_s = 240,
						 .tcp_closing_s = 240,
						 .udp_s = 300,
						 .udp_one_way_s = 120,
						 .dns_s = 20,
						 .icmp_s = 60,
						 .hold_s = 120}};

	for (uint32_t i = 0; i < 4; i++)
		zones[i] = (struct nat_zone_config){.source = {INSIDE_NET + (i << 20), 12},
						    .action = NAT_ACTION_POOL};
	*load = (struct load){.protocol = protocol,
			      .one_remote = scarce != 0,
			      .n_flows = n_flows,
			      .now_ns = UINT64_C(1000000000000),
			      .chance = seed,
			      .pages = wanted};
	if (!take(load, &load->outside_memory, (n_flows + NEW_MAX) * sizeof(struct outside), wanted) ||
	    !take(load, &load->frame_memory, RING * (128 + 128 + 2048), wanted) ||
	    !take(load, &load->route_memory, sizeof(struct hop_cache), wanted)) {
		load_close(load);
		return false;
	}
	load->outside = load->outside_memory.at;
	load->frames = load->frame_memory.at;
	load->routes = load->route_memory.at;
	fill_routes(load->routes);
	if (make_engine(load, &config, wanted, seed) && load_create(load, 0, n_flows) && answer(load))
		return true;
	load_close(load);
	return false;
}

void load_close(struct load *load)
{
	give(&load->table_memory);
	give(&load->engine_memory);
	give(&load->policy_memory);
	give(&load->outside_memory);
	give(&load->frame_memory);
	give(&load->route_memory);
}
