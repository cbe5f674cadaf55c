/* MAC addresses of next hops: one open-addressed table of atomics. The control thread alone writes it,
 * workers read it for each packet; a new MAC address is used by the next one.
 */
#include <linux/neighbour.h>
#include <stdlib.h>
#include <unistd.h>

#include "route_internal.h"

static uint64_t neighbour_key(uint8_t iface, uint32_t address_be)
{
	return 1ull << 63 | (uint64_t)iface << 32 | address_be;
}

static uint32_t neighbour_hash(uint64_t key)
{
	key *= 0x9e3779b97f4a7c15u;
	return (uint32_t)(key >> 40);
}

/* The slot of this key, or the free one where it belongs. Safe against the one writer: keys never move. */
static struct neighbour *neighbour_slot(struct neighbours *t, uint64_t key)
{
	for (uint32_t i = neighbour_hash(key);; i++) {
		struct neighbour *slot = &t->slot[i & t->mask];
		uint64_t there = atomic_load_explicit(&slot->key, memory_order_acquire);

		if (there == key || !there)
			return slot;
	}
}

struct neighbours *route_neighbours_new(uint32_t entries)
{
	struct neighbours *t = calloc(1, sizeof *t + entries * sizeof t->slot[0]);

	if (!t)
		abort();
	t->mask = entries - 1;
	return t;
}

/* Half full: make room, and leave behind what the kernel has forgotten. */
static void neighbours_grow(struct route *r)
{
	struct neighbours *old = r->neighbours;
	uint32_t live = 0;

	for (uint32_t i = 0; i <= old->mask; i++)
		live += old->slot[i].mac != 0;

	uint32_t entries = NEIGHBOURS_MIN;

	while (entries < live * 4)
		entries *= 2;
	struct neighbours *t = route_neighbours_new(entries);

	for (uint32_t i = 0; i <= old->mask; i++) {
		struct neighbour *from = &old->slot[i];

		if (!from->mac)
			continue;
		struct neighbour *to = neighbour_slot(t, from->key);

		to->mac = from->mac;
		to->used = from->used;
		to->seen = from->seen;
		to->state = from->state;
		to->key = from->key;
		t->n++;
	}
	atomic_store(&r->neighbours, t);
	r->params.retire(r->params.context, old);
}

void route_neighbour_set(struct route *r, uint8_t iface, uint32_t address_be, uint16_t state,
			 const uint8_t *mac)
{
	uint64_t key = neighbour_key(iface, address_be), value = 0;
	struct neighbour *slot = neighbour_slot(r->neighbours, key);

	if (mac && state & (NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_PERMANENT | NUD_NOARP)) {
		value = MAC_VALID;
		for (unsigned i = 0; i < 6; i++)
			value |= (uint64_t)mac[i] << (8 * i);
	}
	if (!slot->key) {
		if (!value)
			return;
		if (r->neighbours->n >= r->neighbours->mask / 2) {
			neighbours_grow(r);
			slot = neighbour_slot(r->neighbours, key);
		}
		r->neighbours->n++;
	}
	slot->state = state;
	slot->seen = true;
	if (atomic_load(&slot->mac) != value) {
		atomic_store(&slot->mac, value);
		r->neighbour_changed = true;
	}
	atomic_store_explicit(&slot->key, key, memory_order_release);
}

/* ---- for workers ---- */

bool route_neighbour(const struct route *r, uint8_t iface, uint32_t next_hop_be, uint8_t mac[6])
{
	struct neighbours *t = atomic_load_explicit(&r->neighbours, memory_order_acquire);
	struct neighbour *slot = neighbour_slot(t, neighbour_key(iface, next_hop_be));
	uint64_t value = atomic_load_explicit(&slot->mac, memory_order_acquire);

	if (!(value & MAC_VALID))
		return false;
	/* the line is shared by all workers: write it once a second, not once a packet */
	if (!atomic_load_explicit(&slot->used, memory_order_relaxed))
		atomic_store_explicit(&slot->used, true, memory_order_relaxed);
	for (unsigned i = 0; i < 6; i++)
		mac[i] = (uint8_t)(value >> (8 * i));
	return true;
}

uint32_t route_neighbour_generation(const struct route *r)
{
	return atomic_load_explicit(&r->neighbour_generation, memory_order_acquire);
}

void route_resolve(struct route *r, uint8_t iface, uint32_t next_hop_be)
{
	uint64_t key = neighbour_key(iface, next_hop_be), one = 1;
	uint32_t start = neighbour_hash(key);

	for (uint32_t i = 0; i < 8; i++) {
		_Atomic uint64_t *slot = &r->wanted[(start + i) % WANTED_SLOTS];
		uint64_t there = 0;

		if (atomic_load(slot) == key)
			return; /* asked already, not served yet */
		if (atomic_compare_exchange_strong(slot, &there, key)) {
			(void)!write(r->wanted_fd, &one, sizeof one);
			return;
		}
	}
}
