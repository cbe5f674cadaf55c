/* Routes and own addresses without a kernel.
 *
 * Where a packet goes, first match:
 *	1. an address of the gateway itself (--address): local
 *	2. the longest --route prefix: its interface, nowhere, or prohibited
 *	3. a zone's source prefix that holds the destination: the inside interface where this host was last seen,
 *	   else the first one. The zone 0.0.0.0/0 counts only for hosts that were seen, or nothing were outside
 *	4. the first outside interface
 * All of it on-link: the next hop is the destination.
 *
 * ICMP errors need a source address. Without --address interface number i (from 0) answers as 192.0.2.(i+1).
 * That address is only a source: packets to it are routed like any other.
 */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

#include "replay.h"

#define STAND_IN 0xc0000201u /* 192.0.2.1 */

struct route {
	struct nat_prefix to;
	struct nat_hop hop;
};

struct own {
	uint32_t address_be;
	uint8_t iface;
};

struct host {                /* an inside address and where it was last seen */
	uint32_t address_be; /* 0: free slot */
	uint8_t iface;
};

struct world {
	const struct nat_config *config;
	struct route *routes; /* longest prefix first; of equal ones the last given first */
	uint32_t n_routes;
	struct own *own; /* in the order given: the first of an interface is its source address */
	uint32_t n_own;
	struct host *hosts; /* open addressing, at most half full */
	uint32_t hosts_mask, n_hosts;
};

static bool matches(struct nat_prefix prefix, uint32_t address)
{
	uint32_t mask = prefix.length_bits ? UINT32_MAX << (32 - prefix.length_bits) : 0;

	return (address & mask) == prefix.address;
}

struct world *world_open(const struct nat_config *config)
{
	struct world *world = calloc(1, sizeof(*world));

	if (!world)
		return NULL;
	world->config = config;
	world->hosts_mask = 1023;
	world->hosts = calloc(world->hosts_mask + 1, sizeof(*world->hosts));
	if (!world->hosts) {
		free(world);
		return NULL;
	}
	return world;
}

void world_close(struct world *world)
{
	free(world->routes);
	free(world->own);
	free(world->hosts);
	free(world);
}

void world_set_config(struct world *world, const struct nat_config *config)
{
	world->config = config;
}

int world_interface(const struct world *world, const char *name)
{
	for (uint32_t i = 0; i < world->config->n_interfaces; i++)
		if (!strcmp(world->config->interfaces[i].name, name))
			return (int)i;
	return -1;
}

/* ---- what the command line and the input say ---- */

static bool parse_prefix(const char *text, size_t length, struct nat_prefix *out)
{
	char copy[32], *slash;
	struct in_addr address;
	unsigned long bits = 32;

	if (length >= sizeof(copy))
		return false;
	memcpy(copy, text, length);
	copy[length] = 0;
	slash = strchr(copy, '/');
	if (slash) {
		char *end;

		*slash++ = 0;
		bits = strtoul(slash, &end, 10);
		if (*end || end == slash || bits > 32)
			return false;
	}
	if (inet_pton(AF_INET, copy, &address) != 1)
		return false;
	*out = (struct nat_prefix){ntohl(address.s_addr), (uint8_t)bits};
	return matches(*out, out->address);
}

bool world_add_route(struct world *world, const char *text)
{
	const char *where = strchr(text, '=');
	struct route route = {0}, *routes;
	int iface;
	uint32_t at = 0;

	if (!where || !parse_prefix(text, (size_t)(where - text), &route.to))
		return false;
	where++;
	iface = world_interface(world, where);
	if (iface >= 0)
		route.hop = (struct nat_hop){.kind = NAT_HOP_FORWARD,
					     .iface = (uint8_t)iface,
					     .mtu_bytes = world->config->interfaces[iface].mtu_bytes};
	else if (!strcmp(where, "none"))
		route.hop.kind = NAT_HOP_NONE;
	else if (!strcmp(where, "prohibit"))
		route.hop.kind = NAT_HOP_PROHIBIT;
	else
		return false;
	routes = realloc(world->routes, (world->n_routes + 1) * sizeof(*routes));
	if (!routes)
		return false;
	world->routes = routes;
	while (at < world->n_routes && routes[at].to.length_bits > route.to.length_bits)
		at++;
	memmove(&routes[at + 1], &routes[at], (world->n_routes - at) * sizeof(*routes));
	routes[at] = route;
	world->n_routes++;
	return true;
}

bool world_add_address(struct world *world, const char *text)
{
	const char *equals = strchr(text, '=');
	char name[NAT_NAME_MAX];
	struct in_addr address;
	struct own *own;
	int iface;

	if (!equals || (size_t)(equals - text) >= sizeof(name) ||
	    inet_pton(AF_INET, equals + 1, &address) != 1)
		return false;
	memcpy(name, text, (size_t)(equals - text));
	name[equals - text] = 0;
	iface = world_interface(world, name);
	own = realloc(world->own, (world->n_own + 1) * sizeof(*own));
	if (!own)
		return false;
	world->own = own;
	if (iface < 0)
		return false;
	own[world->n_own++] = (struct own){address.s_addr, (uint8_t)iface};
	return true;
}

void world_clear_addresses(struct world *world, uint8_t iface)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < world->n_own; i++)
		if (world->own[i].iface != iface)
			world->own[n++] = world->own[i];
	world->n_own = n;
}

bool world_is_own(const struct world *world, uint32_t address_be)
{
	for (uint32_t i = 0; i < world->n_own; i++)
		if (world->own[i].address_be == address_be)
			return true;
	return false;
}

/* ---- hosts ---- */

static struct host *find_host(const struct world *world, uint32_t address_be)
{
	uint32_t i = (uint32_t)(address_be * UINT64_C(0x9e3779b97f4a7c15) >> 32);

	while (world->hosts[i & world->hosts_mask].address_be &&
	       world->hosts[i & world->hosts_mask].address_be != address_be)
		i++;
	return &world->hosts[i & world->hosts_mask];
}

/* On a failed allocation the table stays as it is, and a full one learns no more. */
static void grow_hosts(struct world *world)
{
	struct host *old = world->hosts;
	uint32_t size = world->hosts_mask + 1;
	struct host *larger = calloc((size_t)size * 2, sizeof(*larger));

	if (!larger)
		return;
	world->hosts = larger;
	world->hosts_mask = size * 2 - 1;
	for (uint32_t i = 0; i < size; i++)
		if (old[i].address_be)
			*find_host(world, old[i].address_be) = old[i];
	free(old);
}

void world_learn(struct world *world, uint8_t iface, const uint8_t *l3, uint32_t len_bytes)
{
	uint32_t source_be;
	struct host *host;

	if (world->config->interfaces[iface].role != NAT_ROLE_INSIDE || len_bytes < 20)
		return;
	memcpy(&source_be, l3 + 12, sizeof(source_be));
	if (!source_be)
		return;
	if (world->n_hosts * 2 > world->hosts_mask)
		grow_hosts(world);
	host = find_host(world, source_be);
	if (!host->address_be) {
		if (world->n_hosts * 4 > world->hosts_mask * UINT64_C(3))
			return;
		world->n_hosts++;
	}
	*host = (struct host){source_be, iface};
}

/* ---- what the engine asks ---- */

static struct nat_hop hop_to(const struct world *world, uint8_t iface)
{
	return (struct nat_hop){.kind = NAT_HOP_FORWARD,
				.iface = iface,
				.mtu_bytes = world->config->interfaces[iface].mtu_bytes};
}

static uint8_t first_of(const struct world *world, enum nat_role role)
{
	for (uint32_t i = 0; i < world->config->n_interfaces; i++)
		if (world->config->interfaces[i].role == role)
			return (uint8_t)i;
	return 0; /* cannot be: a configuration has both */
}

static struct nat_hop route_one(const struct world *world, uint32_t destination_be)
{
	uint32_t destination = ntohl(destination_be);

	if (world_is_own(world, destination_be))
		return (struct nat_hop){.kind = NAT_HOP_LOCAL};
	for (uint32_t i = 0; i < world->n_routes; i++)
		if (matches(world->routes[i].to, destination))
			return world->routes[i].hop;
	for (uint32_t i = 0; i < world->config->n_zones; i++) {
		const struct host *host;

		if (!matches(world->config->zones[i].source, destination))
			continue;
		host = find_host(world, destination_be);
		if (host->address_be)
			return hop_to(world, host->iface);
		if (world->config->zones[i].source.length_bits)
			return hop_to(world, first_of(world, NAT_ROLE_INSIDE));
	}
	return hop_to(world, first_of(world, NAT_ROLE_OUTSIDE));
}

static void route(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		hop[i] = route_one(context, destination_be[i]);
		hop[i].next_hop_be = destination_be[i];
	}
}

static uint32_t own_address(void *context, uint8_t iface)
{
	const struct world *world = context;

	for (uint32_t i = 0; i < world->n_own; i++)
		if (world->own[i].iface == iface)
			return world->own[i].address_be;
	return htonl(STAND_IN + iface);
}

struct nat_world world_functions(struct world *world)
{
	return (struct nat_world){.context = world, .route = route, .own_address = own_address};
}
