/* The kernel is the control plane: this file turns what it knows into something a worker reads without
 * waiting.
 *
 * Three stores belong to the control thread: links, addresses and routes, as netlink gave them. From them it
 * builds a *view*: an immutable longest-prefix trie (16-8-8 bits, so one to three loads) with next hops, and
 * what a worker asks of addresses. The view is swapped by one pointer; the old one goes to params.retire(),
 * which frees it when every worker has passed between two bursts. Neighbours are not in the view, because
 * they change too often: they sit in one open-addressed table of atomics that the control thread alone
 * writes, so a new MAC address is used by the next packet.
 *
 *     kernel --events--> stores --build()--> view --------> route_lookup()      workers
 *            --events--> neighbour table -----------------> route_neighbour()
 *            <-NTF_USE-- route_serve() <--wanted[], eventfd-- route_resolve()
 *
 * First everything is dumped, then events are followed. The kernel removes routes without a word when an
 * interface goes down or an address is removed, and drops events when we are slow (ENOBUFS): all three lead
 * to a new dump. Events that arrive during a dump are applied after it; since they end in the kernel's newest
 * state, so do we.
 *
 * Rebuilding costs time in proportion to the number of routes, so it is paced: after a rebuild that took t,
 * the next one waits 4t. With a few thousand routes that is nothing; with a full table a flapping peer cannot
 * eat the control core.
 *
 * Looked at: the tables local, main and default, in that order, as the kernel does without further rules. Not
 * looked at: other tables, policy rules, TOS.
 */
#include "route.h"

#include <arpa/inet.h>
#include <errno.h>
#include <libmnl/libmnl.h>
#include <linux/if.h>
#include <linux/if_link.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

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

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint32_t mask_of(uint8_t length_bits)
{
	return length_bits ? UINT32_MAX << (32 - length_bits) : 0;
}

/* ---- the stores ---- */

static void *grown(void *array, uint32_t n, size_t item_bytes)
{
	/* to the next power of two: callers grow one by one */
	if (n & (n - 1))
		return array;
	void *more = realloc(array, (n ? (size_t)n * 2 : 1) * item_bytes);
	if (!more)
		abort(); /* a gateway that cannot learn routes must be restarted, not go on half blind */
	return more;
}

static struct link *link_find(const struct route *r, int ifindex)
{
	for (uint32_t i = 0; i < r->n_links; i++)
		if (r->links[i].ifindex == ifindex)
			return &r->links[i];
	return NULL;
}

static uint8_t iface_of(const struct route *r, int ifindex)
{
	const struct link *link = link_find(r, ifindex);

	return link ? link->iface : NO_IFACE;
}

static uint32_t chain_of(const struct route *r, uint32_t prefix, uint8_t length_bits)
{
	return ((prefix ^ length_bits) * 2654435761u >> 8) & (r->n_chains - 1);
}

static struct entry **entry_find(const struct route *r, const struct entry *like)
{
	struct entry **at = &r->chains[chain_of(r, like->prefix, like->length_bits)];

	while (*at &&
	       ((*at)->prefix != like->prefix || (*at)->length_bits != like->length_bits ||
		(*at)->rank != like->rank || (*at)->priority != like->priority || (*at)->tos != like->tos))
		at = &(*at)->next;
	return at;
}

static void chains_grow(struct route *r)
{
	struct entry **old = r->chains;
	uint32_t n = r->n_chains;

	r->n_chains = n ? n * 2 : 256;
	r->chains = calloc(r->n_chains, sizeof *r->chains);
	if (!r->chains)
		abort();
	for (uint32_t i = 0; i < n; i++)
		for (struct entry *e = old[i], *next; e; e = next) {
			struct entry **at = &r->chains[chain_of(r, e->prefix, e->length_bits)];

			next = e->next;
			e->next = *at;
			*at = e;
		}
	free(old);
}

static void stores_clear(struct route *r)
{
	for (uint32_t i = 0; i < r->n_chains; i++)
		for (struct entry *e = r->chains[i], *next; e; e = next) {
			next = e->next;
			free(e);
		}
	if (r->chains)
		memset(r->chains, 0, r->n_chains * sizeof *r->chains);
	r->n_routes = r->n_addresses = r->n_links = 0;
}

/* ---- the view ---- */

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
	const struct link *link = link_find(r, path->ifindex);

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
		v->hops = grown(v->hops, v->n_hops, sizeof *v->hops);
		v->hops[v->n_hops++] = hop[i];
	}
	v->targets = grown(v->targets, v->n_targets, sizeof *v->targets);
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
		hop[0].iface = e->n_paths ? iface_of(r, e->path[0].ifindex) : NO_IFACE;
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
		uint8_t iface = iface_of(r, a->ifindex);

		if (iface == NO_IFACE)
			continue;
		v->connected = grown(v->connected, v->n_connected, sizeof *v->connected);
		v->connected[v->n_connected++] = (struct prefix){
			.address = a->prefix, .mask = mask_of(a->length_bits), .iface = iface};
		/* a /32 is a VRRP address, which may leave: only if there is nothing better */
		if (!v->own_be[iface] && a->length_bits < 32)
			v->own_be[iface] = a->local_be;
	}
	for (uint32_t i = 0; i < r->n_addresses; i++) {
		uint8_t iface = iface_of(r, r->addresses[i].ifindex);

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

static void view_retire(struct route *r, struct view *v)
{
	if (!v)
		return;
	void *part[] = {v->root, v->blocks, v->targets, v->hops, v->connected, v};

	for (size_t i = 0; i < sizeof part / sizeof *part; i++)
		if (part[i])
			r->params.retire(r->params.context, part[i]);
}

static void rebuild(struct route *r)
{
	uint64_t start_ns = clock_ns();
	struct view *old = atomic_exchange_explicit(&r->view, view_build(r), memory_order_seq_cst);
	uint64_t took_ns = clock_ns() - start_ns;

	view_retire(r, old);
	r->dirty = false;
	r->next_build_ns = start_ns + took_ns + PACE * took_ns;
	r->figures.rebuilds++;
	r->figures.rebuild_us = took_ns / 1000;
}

/* ---- neighbours ---- */

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

static struct neighbours *neighbours_new(uint32_t entries)
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
	struct neighbours *t = neighbours_new(entries);

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

static void neighbour_set(struct route *r, uint8_t iface, uint32_t address_be, uint16_t state,
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

/* ---- netlink: reading ---- */

struct attributes {
	const struct nlattr *at[RTA_MAX > IFLA_MAX ? RTA_MAX + 1 : IFLA_MAX + 1];
	uint16_t max;
};

static int attribute_note(const struct nlattr *attr, void *data)
{
	struct attributes *a = data;

	if (mnl_attr_get_type(attr) <= a->max)
		a->at[mnl_attr_get_type(attr)] = attr;
	return MNL_CB_OK;
}

static struct attributes attributes_of(const struct nlmsghdr *message, size_t header_bytes, uint16_t max)
{
	struct attributes a = {.max = max};

	mnl_attr_parse(message, (unsigned)header_bytes, attribute_note, &a);
	return a;
}

static uint32_t u32_of(const struct nlattr *attr)
{
	return attr && mnl_attr_get_payload_len(attr) >= 4 ? mnl_attr_get_u32(attr) : 0;
}

static void on_link(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct ifinfomsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, IFLA_MAX);
	struct link *link = link_find(r, info->ifi_index),
		    fresh = {.ifindex = info->ifi_index, .iface = NO_IFACE};

	if (info->ifi_family != AF_UNSPEC) /* a bridge speaks of its ports: nothing of ours */
		return;
	if (gone) {
		if (link) {
			*link = r->links[--r->n_links];
			r->must_dump = true;
		}
		return;
	}
	if (!a.at[IFLA_IFNAME])
		return;
	snprintf(fresh.name, sizeof fresh.name, "%s", mnl_attr_get_str(a.at[IFLA_IFNAME]));
	fresh.flags = info->ifi_flags;
	fresh.mtu_bytes = u32_of(a.at[IFLA_MTU]);
	for (uint32_t i = 0; i < r->params.n_interfaces; i++)
		if (!strcmp(r->params.interfaces[i].name, fresh.name))
			fresh.iface = (uint8_t)i;
	if (!link) {
		r->links = grown(r->links, r->n_links, sizeof *r->links);
		link = &r->links[r->n_links++];
		if (fresh.iface != NO_IFACE &&
		    !r->dumping) /* it may have addresses that came before its name */
			r->must_dump = true;
	} else if (strcmp(link->name, fresh.name) || (link->flags & IFF_UP && !(fresh.flags & IFF_UP))) {
		r->must_dump = true;
	} else if (link->flags == fresh.flags && link->mtu_bytes == fresh.mtu_bytes) {
		return; /* statistics, wireless events */
	}
	*link = fresh;
	r->dirty = true;
}

static void on_address(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct ifaddrmsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, IFA_MAX);

	if (info->ifa_family != AF_INET || !a.at[IFA_LOCAL])
		return;
	uint32_t local_be = u32_of(a.at[IFA_LOCAL]);
	uint32_t peer_be = a.at[IFA_ADDRESS] ? u32_of(a.at[IFA_ADDRESS]) : local_be;
	struct address fresh = {
		.ifindex = (int)info->ifa_index,
		.local_be = local_be,
		.prefix = ntohl(peer_be) & mask_of(info->ifa_prefixlen),
		.length_bits = info->ifa_prefixlen,
	};

	r->dirty = true;
	for (uint32_t i = 0; i < r->n_addresses; i++) {
		struct address *old = &r->addresses[i];

		if (old->ifindex != fresh.ifindex || old->local_be != local_be ||
		    old->prefix != fresh.prefix || old->length_bits != fresh.length_bits)
			continue;
		if (gone) {
			memmove(old, old + 1, (--r->n_addresses - i) * sizeof *old);
			r->must_dump = true;
		}
		return;
	}
	if (gone)
		return;
	r->addresses = grown(r->addresses, r->n_addresses, sizeof *r->addresses);
	r->addresses[r->n_addresses++] = fresh;
}

static void path_add(struct entry *e, int ifindex, uint8_t flags, uint16_t weight,
		     const struct nlattr *gateway, const struct nlattr *via)
{
	if (flags & RTNH_F_DEAD || e->n_paths == HOPS_MAX)
		return;
	e->path[e->n_paths++] = (struct path){
		.ifindex = ifindex,
		.weight = weight,
		.gateway_be = u32_of(gateway),
		.foreign = via != NULL,
	};
}

static void paths_of(struct entry *e, const struct rtmsg *info, const struct attributes *a)
{
	const struct nlattr *many = a->at[RTA_MULTIPATH];

	if (!many) {
		path_add(e, (int)u32_of(a->at[RTA_OIF]), (uint8_t)info->rtm_flags, 1, a->at[RTA_GATEWAY],
			 a->at[RTA_VIA]);
		return;
	}
	const struct rtnexthop *hop = mnl_attr_get_payload(many);
	int left = mnl_attr_get_payload_len(many);

	while (left >= (int)sizeof *hop && hop->rtnh_len >= sizeof *hop && hop->rtnh_len <= left) {
		struct attributes inner = {.max = RTA_MAX};

		mnl_attr_parse_payload(hop + 1, hop->rtnh_len - sizeof *hop, attribute_note, &inner);
		path_add(e, hop->rtnh_ifindex, hop->rtnh_flags, (uint16_t)(hop->rtnh_hops + 1),
			 inner.at[RTA_GATEWAY], inner.at[RTA_VIA]);
		left -= (int)RTNH_ALIGN(hop->rtnh_len);
		hop = RTNH_NEXT(hop);
	}
}

static uint32_t metric_mtu(const struct nlattr *metrics)
{
	struct attributes inner = {.max = RTAX_MAX};

	if (!metrics)
		return 0;
	mnl_attr_parse_nested(metrics, attribute_note, &inner);
	return u32_of(inner.at[RTAX_MTU]);
}

static void on_route(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct rtmsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, RTA_MAX);
	uint32_t table = a.at[RTA_TABLE] ? u32_of(a.at[RTA_TABLE]) : info->rtm_table;

	if (info->rtm_family != AF_INET || info->rtm_flags & RTM_F_CLONED || info->rtm_dst_len > 32)
		return;
	if (table != RT_TABLE_LOCAL && table != RT_TABLE_MAIN && table != RT_TABLE_DEFAULT)
		return;
	struct entry fresh = {
		.prefix = ntohl(u32_of(a.at[RTA_DST])) & mask_of(info->rtm_dst_len),
		.length_bits = info->rtm_dst_len,
		.rank = table == RT_TABLE_LOCAL ? 2 : table == RT_TABLE_MAIN,
		.type = info->rtm_type,
		.tos = info->rtm_tos,
		.priority = u32_of(a.at[RTA_PRIORITY]),
		.mtu_bytes = metric_mtu(a.at[RTA_METRICS]),
	};
	paths_of(&fresh, info, &a);

	struct entry **at = entry_find(r, &fresh), *old = *at;

	r->dirty = true;
	if (gone) {
		if (!old || old->duplicate) {
			r->must_dump = true;
			return;
		}
		*at = old->next;
		free(old);
		r->n_routes--;
		return;
	}
	if (old && r->dumping) { /* same key twice: the kernel uses the first */
		old->duplicate = true;
		return;
	}
	if (old && !(message->nlmsg_flags & NLM_F_REPLACE)) {
		r->must_dump = true; /* appended or prepended: the order counts, ask again */
		return;
	}
	if (old) {
		fresh.next = old->next;
		*old = fresh;
		return;
	}
	if (r->n_routes >= r->n_chains) {
		chains_grow(r);
		at = entry_find(r, &fresh);
	}
	struct entry *e = malloc(sizeof *e);

	if (!e)
		abort();
	*e = fresh;
	*at = e;
	r->n_routes++;
}

static void on_neighbour(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct ndmsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, NDA_MAX);
	uint8_t iface = iface_of(r, info->ndm_ifindex);

	if (info->ndm_family != AF_INET || info->ndm_flags & NTF_PROXY || iface == NO_IFACE || !a.at[NDA_DST])
		return;
	const struct nlattr *lladdr = a.at[NDA_LLADDR];
	const uint8_t *mac =
		lladdr && mnl_attr_get_payload_len(lladdr) == 6 ? mnl_attr_get_payload(lladdr) : NULL;

	neighbour_set(r, iface, u32_of(a.at[NDA_DST]), gone ? NUD_NONE : info->ndm_state, gone ? NULL : mac);
}

static int on_message(const struct nlmsghdr *message, void *data)
{
	switch (message->nlmsg_type) {
	case RTM_NEWLINK:
	case RTM_DELLINK:
		on_link(data, message, message->nlmsg_type == RTM_DELLINK);
		break;
	case RTM_NEWADDR:
	case RTM_DELADDR:
		on_address(data, message, message->nlmsg_type == RTM_DELADDR);
		break;
	case RTM_NEWROUTE:
	case RTM_DELROUTE:
		on_route(data, message, message->nlmsg_type == RTM_DELROUTE);
		break;
	case RTM_NEWNEIGH:
	case RTM_DELNEIGH:
		on_neighbour(data, message, message->nlmsg_type == RTM_DELNEIGH);
		break;
	}
	return MNL_CB_OK;
}

/* ---- netlink: asking ---- */

static int dump_one(struct route *r, uint16_t type, size_t header_bytes, uint8_t family)
{
	_Alignas(8) char buffer[65536];
	struct nlmsghdr *request = mnl_nlmsg_put_header(buffer);
	uint8_t *header = mnl_nlmsg_put_extra_header(request, header_bytes);
	static uint32_t sequence;
	uint32_t mine = ++sequence;
	int status = 1;

	request->nlmsg_type = type;
	request->nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
	request->nlmsg_seq = mine;
	header[0] = family; /* first byte of every rtnetlink header */
	if (mnl_socket_sendto(r->dumps, request, request->nlmsg_len) < 0)
		return -errno;
	while (status > 0) {
		ssize_t n = mnl_socket_recvfrom(r->dumps, buffer, sizeof buffer);

		if (n < 0)
			return -errno;
		status = mnl_cb_run(buffer, (size_t)n, mine, mnl_socket_get_portid(r->dumps), on_message, r);
		if (status < 0 && errno == ESRCH) /* the rest of a dump that was given up */
			status = 1;
	}
	return status < 0 ? -errno : 0;
}

static int dump_try(struct route *r)
{
	struct neighbours *t = r->neighbours;
	int status;

	stores_clear(r);
	for (uint32_t i = 0; i <= t->mask; i++)
		t->slot[i].seen = false;
	if ((status = dump_one(r, RTM_GETLINK, sizeof(struct ifinfomsg), AF_UNSPEC)) ||
	    (status = dump_one(r, RTM_GETADDR, sizeof(struct ifaddrmsg), AF_INET)) ||
	    (status = dump_one(r, RTM_GETROUTE, sizeof(struct rtmsg), AF_INET)) ||
	    (status = dump_one(r, RTM_GETNEIGH, sizeof(struct ndmsg), AF_INET)))
		return status;
	t = r->neighbours; /* may have grown */
	for (uint32_t i = 0; i <= t->mask; i++)
		if (t->slot[i].key && !t->slot[i].seen && atomic_exchange(&t->slot[i].mac, 0))
			r->neighbour_changed = true;
	return 0;
}

static int dump_all(struct route *r)
{
	uint64_t start_ns = clock_ns();
	int status = -EINTR;

	r->dumping = true;
	for (unsigned i = 0; i < DUMP_TRIES && status == -EINTR; i++) /* EINTR: changed while we read */
		status = dump_try(r);
	r->dumping = false;
	r->must_dump = status != 0;
	r->dirty = true;
	r->figures.dumps++;
	r->next_dump_ns = start_ns + (PACE + 1) * (clock_ns() - start_ns);
	return status;
}

static void poke(struct route *r, uint8_t iface, uint32_t address_be)
{
	char buffer[256];
	struct nlmsghdr *request = mnl_nlmsg_put_header(buffer);
	struct ndmsg *info = mnl_nlmsg_put_extra_header(request, sizeof *info);
	const struct link *link = NULL;

	for (uint32_t i = 0; i < r->n_links; i++)
		if (r->links[i].iface == iface)
			link = &r->links[i];
	if (!link)
		return;
	request->nlmsg_type = RTM_NEWNEIGH;
	request->nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE;
	info->ndm_family = AF_INET;
	info->ndm_ifindex = link->ifindex;
	info->ndm_state = NUD_NONE;
	info->ndm_flags = NTF_USE; /* "somebody wants to send there": resolve or confirm it */
	mnl_attr_put_u32(request, NDA_DST, address_be);
	(void)mnl_socket_sendto(r->pokes, request, request->nlmsg_len);
	while (mnl_socket_recvfrom(r->pokes, buffer, sizeof buffer) > 0)
		; /* only errors come back; the workers ask again */
}

static void serve_wanted(struct route *r)
{
	uint64_t n;

	if (read(r->wanted_fd, &n, sizeof n) < 0)
		return;
	for (uint32_t i = 0; i < WANTED_SLOTS; i++) {
		uint64_t key = atomic_exchange(&r->wanted[i], 0);

		if (key)
			poke(r, (uint8_t)(key >> 32), (uint32_t)key);
	}
}

static void serve_events(struct route *r)
{
	_Alignas(8) char buffer[65536];

	for (unsigned i = 0; i < 4096; i++) {
		ssize_t n = mnl_socket_recvfrom(r->events, buffer, sizeof buffer);

		if (n < 0 && errno == ENOBUFS) {
			r->figures.overruns++;
			r->must_dump = true;
			continue;
		}
		if (n < 0)
			return;
		(void)mnl_cb_run(buffer, (size_t)n, 0, 0, on_message, r);
	}
}

/* ---- the control thread's side ---- */

static void timer_at(struct route *r, uint64_t at_ns)
{
	struct itimerspec when = {.it_value = {.tv_sec = (time_t)(at_ns / 1000000000u),
					       .tv_nsec = (long)(at_ns % 1000000000u)}};

	timerfd_settime(r->timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

void route_serve(struct route *r)
{
	uint64_t ignored, now_ns = clock_ns();
	bool changed = false;

	(void)!read(r->timer_fd, &ignored, sizeof ignored);
	serve_events(r);
	if (r->must_dump && now_ns >= r->next_dump_ns)
		(void)dump_all(r);
	if (r->dirty && now_ns >= r->next_build_ns) {
		rebuild(r);
		changed = true;
	}
	serve_wanted(r);
	if (r->neighbour_changed) {
		r->neighbour_changed = false;
		atomic_fetch_add(&r->neighbour_generation, 1);
		changed = true;
	}
	if (r->must_dump || r->dirty)
		timer_at(r, r->must_dump && r->next_dump_ns > r->next_build_ns ? r->next_dump_ns
									       : r->next_build_ns);
	if (changed)
		r->params.changed(r->params.context);
}

void route_refresh(struct route *r)
{
	struct neighbours *t = r->neighbours;

	for (uint32_t i = 0; i <= t->mask; i++) {
		struct neighbour *slot = &t->slot[i];
		uint64_t key = slot->key;

		/* The kernel sees none of the packets that we forward, so to it the neighbour looks idle: it
		 * would keep a MAC address that moved long ago, or throw away one that is in use. */
		if (key && atomic_exchange(&slot->used, false) && slot->state == NUD_STALE)
			poke(r, (uint8_t)(key >> 32), (uint32_t)key);
	}
}

bool route_has_address(const struct route *r, uint32_t address_be)
{
	for (uint32_t i = 0; i < r->n_addresses; i++)
		if (r->addresses[i].local_be == address_be)
			return true;
	return false;
}

bool route_interface_up(const struct route *r, uint8_t iface)
{
	for (uint32_t i = 0; i < r->n_links; i++)
		if (r->links[i].iface == iface)
			return r->links[i].flags & IFF_UP;
	return false;
}

uint64_t route_connected_digest(const struct route *r)
{
	const struct view *v = r->view;
	uint64_t digest = 0;

	for (uint32_t i = 0; i < v->n_connected; i++) {
		const struct prefix *p = &v->connected[i];

		/* a sum: the order does not matter */
		digest += (((uint64_t)p->address << 32 | p->mask) + p->iface) * 0x9e3779b97f4a7c15u;
	}
	return digest;
}

struct route_figures route_figures(const struct route *r)
{
	struct route_figures f = r->figures;

	f.routes = r->n_routes;
	f.addresses = r->n_addresses;
	f.neighbours = r->neighbours->n;
	return f;
}

int route_fd(const struct route *r)
{
	return r->epoll_fd;
}

static struct mnl_socket *socket_new(unsigned groups, int flags)
{
	struct mnl_socket *s = mnl_socket_open2(NETLINK_ROUTE, SOCK_CLOEXEC | flags);
	int bytes = 8 << 20;

	if (s && mnl_socket_bind(s, groups, MNL_SOCKET_AUTOPID) < 0) {
		mnl_socket_close(s);
		return NULL;
	}
	if (s && setsockopt(mnl_socket_get_fd(s), SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes))
		(void)setsockopt(mnl_socket_get_fd(s), SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
	return s;
}

static bool watch(struct route *r, int fd)
{
	struct epoll_event event = {.events = EPOLLIN};

	return fd >= 0 && !epoll_ctl(r->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

struct route *route_open(const struct route_params *params, char *why, size_t why_bytes)
{
	struct route *r = calloc(1, sizeof *r);
	int status;

	if (!r) {
		snprintf(why, why_bytes, "no memory for the routing table");
		return NULL;
	}
	r->params = *params;
	r->neighbours = neighbours_new(NEIGHBOURS_MIN);
	chains_grow(r);
	r->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	r->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	r->wanted_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	r->events = socket_new(RTMGRP_LINK | RTMGRP_NEIGH | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE,
			       SOCK_NONBLOCK);
	r->dumps = socket_new(0, 0);
	r->pokes = socket_new(0, SOCK_NONBLOCK);
	if (!r->events || !r->dumps || !r->pokes || !watch(r, mnl_socket_get_fd(r->events)) ||
	    !watch(r, r->timer_fd) || !watch(r, r->wanted_fd)) {
		snprintf(why, why_bytes, "netlink cannot be opened: %s", strerror(errno));
	} else if ((status = dump_all(r))) {
		snprintf(why, why_bytes, "the kernel's routes cannot be read: %s", strerror(-status));
	} else {
		rebuild(r);
		return r;
	}
	route_close(r);
	return NULL;
}

static void release_now(void *context, void *memory)
{
	(void)context;
	free(memory);
}

void route_close(struct route *r)
{
	if (!r)
		return;
	struct mnl_socket *sockets[] = {r->events, r->dumps, r->pokes};
	int fds[] = {r->epoll_fd, r->timer_fd, r->wanted_fd};

	r->params.retire = release_now;
	for (size_t i = 0; i < 3; i++) {
		if (sockets[i])
			mnl_socket_close(sockets[i]);
		if (fds[i] >= 0)
			close(fds[i]);
	}
	view_retire(r, r->view);
	stores_clear(r);
	free(r->neighbours);
	free(r->chains);
	free(r->links);
	free(r->addresses);
	free(r);
}

/* ---- the workers' side ---- */

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
