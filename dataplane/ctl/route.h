/* Routes, neighbours, addresses and links as the kernel has them, for workers that must not wait.
 *
 * One thread (the control thread) owns `struct route`: it polls route_fd() and calls route_serve(). Workers
 * only call the functions of the last block; those take no lock and make no system call but the rare write
 * that wakes the control thread. No DPDK here: the queue path uses it without EAL.
 */
#ifndef ROUTE_H
#define ROUTE_H

#include "../core/nat.h"

struct route;

struct route_params {
	const struct nat_interface_config *interfaces;
	uint32_t n_interfaces;
	void *context;
	/* The view that workers use was swapped, a neighbour changed, or an address came or went. */
	void (*changed)(void *context);
	/* `memory` was reachable by workers: release it with free() when each has passed between two bursts.
	 */
	void (*retire)(void *context, void *memory);
};

/* Reads everything once before it returns. On failure NULL and a sentence in `why`. */
struct route *route_open(const struct route_params *params, char *why, size_t why_bytes);
void route_close(struct route *r);

/* Readable when route_serve() has something to do (an epoll descriptor). */
int route_fd(const struct route *r);
void route_serve(struct route *r);

/* Once a second: asks the kernel to confirm neighbours that workers use but the kernel itself does not. */
void route_refresh(struct route *r);

/* Control thread: is this address on any interface of this host? */
bool route_has_address(const struct route *r, uint32_t address_be);
/* Control thread: is the kernel's interface there and up? */
bool route_interface_up(const struct route *r, uint8_t iface);

/* Control thread: changes when the prefixes configured on the interfaces change. */
uint64_t route_connected_digest(const struct route *r);

struct route_figures {
	uint64_t routes, neighbours, addresses;
	uint64_t rebuilds, overruns, dumps;
	uint64_t rebuild_us; /* the last one took so long */
};
struct route_figures route_figures(const struct route *r);

/* ---- for workers ---- */

/* nat_world.route and nat_world.own_address; `context` is the struct route. */
void route_lookup(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n);
uint32_t route_own_address(void *context, uint8_t iface);

/* Does a prefix configured on this interface hold the address? */
bool route_connected(const struct route *r, uint8_t iface, uint32_t address_be);

/* The MAC address of a next hop. false: not known yet; ask with route_resolve(). */
bool route_neighbour(const struct route *r, uint8_t iface, uint32_t next_hop_be, uint8_t mac[6]);

/* Changes whenever any neighbour changed: a reason to look again for what is waiting. */
uint32_t route_neighbour_generation(const struct route *r);

/* Makes the kernel resolve a neighbour; repeating it is harmless. */
void route_resolve(struct route *r, uint8_t iface, uint32_t next_hop_be);

#endif
