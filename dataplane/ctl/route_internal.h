/* What the files of route.c share: the stores that the control thread keeps, and the view that workers read. */
#ifndef ROUTE_INTERNAL_H
#define ROUTE_INTERNAL_H

#include <libmnl/libmnl.h>
#include <linux/if.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "route.h"

#define ROOT_ENTRIES   65536u
#define BLOCK_ENTRIES  256u
#define IS_BLOCK       0x80000000u
#define HOPS_MAX       16u /* ECMP: next hops of one route */
#define WANTED_SLOTS   256u
#define NEIGHBOURS_MIN 1024u
#define NO_IFACE       0xffu
#define PACE           4u
#define DUMP_TRIES     20u

struct link {
	int ifindex;
	char name[IFNAMSIZ];
	unsigned flags;
	uint32_t mtu_bytes;
	uint8_t iface; /* index in the configuration, or NO_IFACE */
};

struct address {
	int ifindex;
	uint32_t local_be, prefix; /* prefix in host order, masked */
	uint8_t length_bits;
};

struct path { /* one next hop of a route, as the kernel says it */
	uint32_t gateway_be;
	int ifindex;
	uint16_t weight;
	bool foreign; /* through an IPv6 gateway: the kernel must do it */
};

struct entry {              /* one route */
	struct entry *next; /* in its hash chain */
	uint32_t prefix, priority;
	uint32_t mtu_bytes;
	uint8_t length_bits, rank, type, tos;
	bool duplicate; /* the kernel has another one with the same key behind it */
	uint8_t n_paths;
	struct path path[HOPS_MAX];
};

struct target { /* what a leaf of the trie points to: a group of equal next hops */
	uint32_t first, n;
};

struct prefix {
	uint32_t address, mask;
	uint8_t iface;
};

struct view {
	uint32_t *root;   /* ROOT_ENTRIES: target number, or IS_BLOCK | block number */
	uint32_t *blocks; /* BLOCK_ENTRIES each */
	struct target *targets;
	struct nat_hop *hops;
	struct prefix *connected;
	uint32_t n_blocks, n_targets, n_hops, n_connected;
	uint32_t own_be[NAT_INTERFACES_MAX];
};

struct neighbour {
	_Atomic uint64_t key; /* 0: free. Never changes once set. */
	_Atomic uint64_t mac; /* VALID | 48 bits, or 0 */
	_Atomic bool used;    /* by a worker since the last route_refresh() */
	bool seen;            /* in the dump that is being read */
	uint16_t state;       /* NUD_* */
};
#define MAC_VALID (1ull << 48)

struct neighbours {
	uint32_t mask, n;
	struct neighbour slot[];
};

struct route {
	struct route_params params;
	/* workers */
	struct view *_Atomic view;
	struct neighbours *_Atomic neighbours;
	_Atomic uint32_t neighbour_generation;
	_Atomic uint64_t wanted[WANTED_SLOTS];
	int wanted_fd;
	/* control thread */
	struct mnl_socket *events, *dumps, *pokes;
	int epoll_fd, timer_fd;
	struct link *links;
	struct address *addresses;
	struct entry **chains;
	uint32_t n_links, n_addresses, n_chains, n_routes;
	bool dirty, must_dump, neighbour_changed, dumping;
	uint64_t next_build_ns, next_dump_ns;
	struct route_figures figures;
};

/* route_stores.c: the kernel's messages, into the stores. Memory that is not there ends the process: a
 * gateway that cannot learn routes must be started again, not go on half blind. */
int route_on_message(const struct nlmsghdr *message, void *route);
void route_stores_clear(struct route *r);
void route_chains_grow(struct route *r);
struct link *route_link_find(const struct route *r, int ifindex);
uint8_t route_iface_of(const struct route *r, int ifindex); /* or NO_IFACE */
/* Room for one more item behind the n there are. */
void *route_grown(void *array, uint32_t n, size_t item_bytes);

/* route_view.c: from the stores to a new view, swapped in; the old one is retired. */
void route_rebuild(struct route *r);
void route_view_retire(struct route *r, struct view *v);

/* route_neighbour.c */
struct neighbours *route_neighbours_new(uint32_t entries);
void route_neighbour_set(struct route *r, uint8_t iface, uint32_t address_be, uint16_t state,
			 const uint8_t *mac);

uint64_t route_clock_ns(void);

static inline uint32_t route_mask(uint8_t length_bits)
{
	return length_bits ? UINT32_MAX << (32 - length_bits) : 0;
}

#endif
