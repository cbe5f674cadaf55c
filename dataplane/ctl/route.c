/* The kernel is the control plane: what it knows becomes something that a worker reads without waiting.
 *
 *     route.c            asks the kernel, paces the work, opens and closes
 *     route_stores.c     links, addresses and routes, out of the kernel's messages
 *     route_view.c       what workers read of them
 *     route_neighbour.c  MAC addresses of next hops
 *
 * Three stores belong to the control thread: links, addresses and routes, as netlink gave them. From them it
 * builds a *view*: an immutable longest-prefix trie (16-8-8 bits, so one to three loads) with next hops, and
 * what a worker asks of addresses. The view is swapped by one pointer; the old one goes to params.retire(),
 * which frees it when every worker has passed between two bursts. Neighbours are not in the view, because
 * they change too often: they sit in one open-addressed table of atomics that the control thread alone
 * writes, so a new MAC address is used by the next packet.
 *
 *     kernel --events--> stores --rebuild-> view ---------> route_lookup()      workers
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
#include <errno.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "route_internal.h"

uint64_t route_clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
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
		status = mnl_cb_run(buffer, (size_t)n, mine, mnl_socket_get_portid(r->dumps),
				    route_on_message, r);
		if (status < 0 && errno == ESRCH) /* the rest of a dump that was given up */
			status = 1;
	}
	return status < 0 ? -errno : 0;
}

static int dump_try(struct route *r)
{
	struct neighbours *t = r->neighbours;
	int status;

	route_stores_clear(r);
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
	uint64_t start_ns = route_clock_ns();
	int status = -EINTR;

	r->dumping = true;
	for (unsigned i = 0; i < DUMP_TRIES && status == -EINTR; i++) /* EINTR: changed while we read */
		status = dump_try(r);
	r->dumping = false;
	r->must_dump = status != 0;
	r->dirty = true;
	r->figures.dumps++;
	r->next_dump_ns = start_ns + (PACE + 1) * (route_clock_ns() - start_ns);
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
		(void)mnl_cb_run(buffer, (size_t)n, 0, 0, route_on_message, r);
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
	uint64_t ignored, now_ns = route_clock_ns();
	bool changed = false;

	(void)!read(r->timer_fd, &ignored, sizeof ignored);
	serve_events(r);
	if (r->must_dump && now_ns >= r->next_dump_ns)
		(void)dump_all(r);
	if (r->dirty && now_ns >= r->next_build_ns) {
		route_rebuild(r);
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
	r->neighbours = route_neighbours_new(NEIGHBOURS_MIN);
	route_chains_grow(r);
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
		route_rebuild(r);
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
	route_view_retire(r, r->view);
	route_stores_clear(r);
	free(r->neighbours);
	free(r->chains);
	free(r->links);
	free(r->addresses);
	free(r);
}
