/* What workers read of the routes: an immutable longest-prefix trie (16-8-8 bits, so one to three loads)
 * with next hops, and the addresses and prefixes of the interfaces. Built anew from the stores, swapped in
 * by one pointer.
 */
#include <arpa/inet.h>
#include <linux/rtnetlink.h>
#include <stdlib.h>
#include <string.h>

#include "route_internal.h"

/* ---- building ---- */

struct build {
	struct view *view;
	const struct route *route;
};

static uint32_t block_new(struct view *v, uint32_t fill)
{
	if (!(v->n_blocks & (v->n_blocks - 1))) {
		size_t n = v->n_blocks ? (size_t)v->n_blocks * 2 : 1;

		v->blocks = realloc(v->blocks, n * BLOCK_ENTRIES * sizeof *v->blocks);
		if (!v->blocks)
			abort();
	}
	uint32_t *entry = v->blocks + (size_t)v->n_blocks * BLOCK_ENTRIES;

	for (uint32_t i = 0; i < BLOCK_ENTRIES; i++)
		entry[i] = fill;
	return IS_BLOCK | v->n_blocks++;
}

/* Later paint covers earlier paint, whole subtrees of it too. */
static void paint(struct view *v, uint32_t prefix, uint8_t length_bits, uint32_t target)
{
	uint32_t high = prefix >> 16, middle = prefix >> 8 & 0xff, low = prefix & 0xff;

	if (length_bits <= 16) {
		for (uint32_t i = 0; i < 1u << (16 - length_bits); i++)
			v->root[high + i] = target;
		return;
	}
	if (!(v->root[high] & IS_BLOCK))
		v->root[high] = block_new(v, v->root[high]);

	size_t second = (size_t)(v->root[high] & ~IS_BLOCK) * BLOCK_ENTRIES;

	if (length_bits <= 24) {
		for (uint32_t i = 0; i < 1u << (24 - length_bits); i++)
			v->blocks[second + middle + i] = target;
		return;
	}
	if (!(v->blocks[second + middle] & IS_BLOCK)) {
		uint32_t block = block_new(v, v->blocks[second + middle]); /* may move v->blocks */

		v->blocks[second + middle] = block;
	}
	size_t third = (size_t)(v->blocks[second + middle] & ~IS_BLOCK) * BLOCK_ENTRIES;

	for (uint32_t i = 0; i < 1u << (32 - length_bits); i++)
		v->blocks[third + low + i] = target;
}

static uint32_t find(const struct view *v, uint32_t address)
{
	uint32_t at = v->root[address >> 16];

	if (at & IS_BLOCK)
		at = v->blocks[(size_t)(at & ~IS_BLOCK) * BLOCK_ENTRIES + (address >> 8 & 0xff)];
	if (at & IS_BLOCK)
		at = v->blocks[(size_t)(at & ~IS_BLOCK) * BLOCK_ENTRIES + (address & 0xff)];
	return at;
}

static bool path_hop(const struct route *r, const struct entry *e, const struct path *path,
		     struct nat_hop *hop)
{
	const struct link *link = route_link_find(r, path->ifindex);

	if (!link || !(link->flags & IFF_UP))
		return false;
	uint32_t mtu = e->mtu_bytes && e->mtu_bytes < link->mtu_bytes ? e->mtu_bytes : link->mtu_bytes;
	bool ours = link->iface != NO_IFACE && !path->foreign &&
		    r->params.interfaces[link->iface].path == NAT_PATH_DPDK;

	*hop = (struct nat_hop){
		.next_hop_be = path->gateway_be, /* 0: directly connected, the destination itself */
		.mtu_bytes = mtu > UINT16_MAX ? UINT16_MAX : (uint16_t)mtu,
		.iface = link->iface,
		.kind = ours ? NAT_HOP_FORWARD : NAT_HOP_KERNEL,
	};
	return true;
}

/* The number of a target with exactly these hops. Most routes share a few next hops, so the newest targets
 * are looked through first. */
static uint32_t target_of(struct view *v, const struct nat_hop *hop, uint32_t n)
{
	for (uint32_t i = v->n_targets, tries = 64; i-- > 0 && tries; tries--)
		if (v->targets[i].n == n &&
		    (!n || !memcmp(v->hops + v->targets[i].first, hop, n * sizeof *hop)))
			return i;
	for (uint32_t i = 0; i < n; i++) {
		v->hops = route_grown(v->hops, v->n_hops, sizeof *v->hops);
		v->hops[v->n_hops++] = hop[i];
	}
	v->targets = route_grown(v->targets, v->n_targets, sizeof *v->targets);
	v->targets[v->n_targets] = (struct target){.first = v->n_hops - n, .n = n};
	return v->n_targets++;
}

static uint32_t entry_target(const struct route *r, struct view *v, const struct entry *e)
{
	struct nat_hop hop[HOPS_MAX];
	uint32_t n = 0;

	memset(hop, 0, sizeof hop);
	switch (e->type) {
	case RTN_UNICAST:
		for (uint32_t i = 0; i < e->n_paths; i++)
			if (path_hop(r, e, &e->path[i], &hop[n]))
				n++;
		return target_of(v, hop, n);
	case RTN_LOCAL:
	case RTN_BROADCAST:
	case RTN_ANYCAST:
	case RTN_MULTICAST:
		hop[0].kind = NAT_HOP_LOCAL;
		hop[0].iface = e->n_paths ? route_iface_of(r, e->path[0].ifindex) : NO_IFACE;
		return target_of(v, hop, 1);
	default:
		hop[0].kind = NAT_HOP_PROHIBIT;
		return target_of(v, hop, 1);
	}
}

/* local covers main covers default; then longer covers shorter; then a lower metric covers a higher one. */
static int painted_later(const void *left, const void *right)
{
	const struct entry *a = *(struct entry *const *)left, *b = *(struct entry *const *)right;

	if (a->rank != b->rank)
		return a->rank < b->rank ? -1 : 1;
	if (a->length_bits != b->length_bits)
		return a->length_bits < b->length_bits ? -1 : 1;
	if (a->priority != b->priority)
		return a->priority > b->priority ? -1 : 1;
	return 0;
}

static void view_addresses(const struct route *r, struct view *v)
{
	for (uint32_t i = 0; i < r->n_addresses; i++) {
		const struct address *a = &r->addresses[i];
		uint8_t iface = route_iface_of(r, a->ifindex);

		if (iface == NO_IFACE)
			continue;
		v->connected = route_grown(v->connected, v->n_connected, sizeof *v->connected);
		v->connected[v->n_connected++] = (struct prefix){
			.address = a->prefix, .mask = route_mask(a->length_bits), .iface = iface};
		/* a /32 is a VRRP address, which may leave: only if there is nothing better */
		if (!v->own_be[iface] && a->length_bits < 32)
			v->own_be[iface] = a->local_be;
	}
	for (uint32_t i = 0; i < r->n_addresses; i++) {
		uint8_t iface = route_iface_of(r, r->addresses[i].ifindex);

		if (iface != NO_IFACE && !v->own_be[iface])
			v->own_be[iface] = r->addresses[i].local_be;
	}
}

static struct view *view_build(const struct route *r)
{
	struct view *v = calloc(1, sizeof *v);
	struct entry **sorted = malloc((r->n_routes + 1) * sizeof *sorted);
	uint32_t n = 0;

	if (!v || !sorted || !(v->root = calloc(ROOT_ENTRIES, sizeof *v->root)))
		abort();
	(void)target_of(v, NULL, 0); /* target 0: no route */
	for (uint32_t i = 0; i < r->n_chains; i++)
		for (struct entry *e = r->chains[i]; e; e = e->next)
			sorted[n++] = e;
	qsort(sorted, n, sizeof *sorted, painted_later);
	for (uint32_t i = 0; i < n; i++) {
		if (sorted[i]->tos || sorted[i]->type == RTN_THROW)
			continue;
		uint32_t target = entry_target(r, v, sorted[i]);

		if (target ||
		    sorted[i]->type != RTN_UNICAST) /* no live next hop: a worse route may have one */
			paint(v, sorted[i]->prefix, sorted[i]->length_bits, target);
	}
	free(sorted);
	view_addresses(r, v);
	return v;
}

void route_view_retire(struct route *r, struct view *v)
{
	if (!v)
		return;
	void *part[] = {v->root, v->blocks, v->targets, v->hops, v->connected, v};

	for (size_t i = 0; i < sizeof part / sizeof *part; i++)
		if (part[i])
			r->params.retire(r->params.context, part[i]);
}

void route_rebuild(struct route *r)
{
	uint64_t start_ns = route_clock_ns();
	struct view *old = atomic_exchange_explicit(&r->view, view_build(r), memory_order_seq_cst);
	uint64_t took_ns = route_clock_ns() - start_ns;

	route_view_retire(r, old);
	r->dirty = false;
	r->next_build_ns = start_ns + took_ns + PACE * took_ns;
	r->figures.rebuilds++;
	r->figures.rebuild_us = took_ns / 1000;
}

/* ---- for workers ---- */

void route_lookup(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n)
{
	const struct route *r = context;
	const struct view *v = atomic_load_explicit(&r->view, memory_order_acquire);

	for (uint32_t i = 0; i < n; i++)
		__builtin_prefetch(&v->root[ntohl(destination_be[i]) >> 16]);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t address = ntohl(destination_be[i]);
		const struct target *target = &v->targets[find(v, address)];

		if (!target->n) {
			hop[i] = (struct nat_hop){.kind = NAT_HOP_NONE};
			continue;
		}
		/* ECMP by destination: all packets of a session, and all sessions to one remote, take one
		 * path */
		uint32_t pick = target->n == 1
					? 0
					: (uint32_t)(((uint64_t)(address * 2654435761u) * target->n) >> 32);

		hop[i] = v->hops[target->first + pick];
		if (!hop[i].next_hop_be)
			hop[i].next_hop_be = destination_be[i];
	}
}

uint32_t route_own_address(void *context, uint8_t iface)
{
	const struct route *r = context;
	const struct view *v = atomic_load_explicit(&r->view, memory_order_acquire);

	return iface < NAT_INTERFACES_MAX ? v->own_be[iface] : 0;
}

bool route_connected(const struct route *r, uint8_t iface, uint32_t address_be)
{
	const struct view *v = atomic_load_explicit(&r->view, memory_order_acquire);

	for (uint32_t i = 0; i < v->n_connected; i++)
		if (v->connected[i].iface == iface &&
		    (ntohl(address_be) & v->connected[i].mask) == v->connected[i].address)
			return true;
	return false;
}
