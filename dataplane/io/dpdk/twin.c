/* A twin is a persistent multi-queue TAP with the configured name, the port's MAC address and MTU. To the
 * kernel it is the port: addresses, ARP, VRRP, BGP and tcpdump live there.
 *
 *     worker --to[worker][class]--> twin thread --write--> TAP --> kernel
 *     worker 0 <-------from-------- twin thread <--read--- TAP <-- kernel
 *
 * One thread does all the system calls, so that no worker ever makes one for the kernel's sake. It sleeps in
 * epoll; a worker that finds it asleep writes one eventfd.
 *
 * The twin outlives us. It is persistent, so it keeps its ifindex, addresses and routes; but a TAP without
 * any queue loses its carrier, and keepalived faults at once. So a second queue is attached, *detached* with
 * TUNSETQUEUE (the kernel sends nothing to it) and given to systemd's file descriptor store under the name
 * twin-NAME. As long as systemd holds it the carrier stays, also through kill -9.
 *
 * Towards the kernel each class has a rate of its own. Beyond it frames are dropped and counted (twin_full),
 * so that a flood to the gateway's own address costs the kernel a bounded time and adverts still get through.
 */
#include "twin.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <rte_errno.h>
#include <rte_lcore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#define BATCH 32u

static const struct {
	unsigned ring_entries;
	double per_s, at_once;
} class_limit[TWIN_CLASSES] = {
	[TWIN_URGENT] = {256, 20000, 500},
	[TWIN_CONTROL] = {512, 20000, 1000},
	[TWIN_REST] = {1024, 100000, 4000},
};

/* ---- the interface ---- */

static int tap_open(const char *name)
{
	struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE};
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), error;

	if (fd < 0)
		return -errno;
	strncpy(request.ifr_name, name, sizeof request.ifr_name - 1);
	if (!ioctl(fd, TUNSETIFF, &request) && !ioctl(fd, TUNSETPERSIST, 1))
		return fd;
	error = errno;
	close(fd);
	return -error;
}

/* The MAC address and MTU of the port. Setting what is there already would send a useless event to everybody.
 */
static int tap_dress(const struct port *port)
{
	struct ifreq request = {0};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), status;

	if (fd < 0)
		return -errno;
	memcpy(request.ifr_name, port->name, strnlen(port->name, sizeof request.ifr_name - 1));
	status = ioctl(fd, SIOCGIFHWADDR, &request);
	if (!status && memcmp(request.ifr_hwaddr.sa_data, port->mac.addr_bytes, 6)) {
		request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
		memcpy(request.ifr_hwaddr.sa_data, port->mac.addr_bytes, 6);
		status = ioctl(fd, SIOCSIFHWADDR, &request);
	}
	if (!status)
		status = ioctl(fd, SIOCGIFMTU, &request);
	if (!status && request.ifr_mtu != port->mtu_bytes) {
		request.ifr_mtu = port->mtu_bytes;
		status = ioctl(fd, SIOCSIFMTU, &request);
	}
	status = status ? -errno : 0;
	close(fd);
	return status;
}

static bool belongs_to(int fd, const char *name)
{
	struct ifreq request = {0};

	return !ioctl(fd, TUNGETIFF, &request) && !strcmp(request.ifr_name, name);
}

/* Is a queue of this twin in systemd's store since an earlier run? A stale one (the twin was deleted) is
 * removed. */
static bool is_kept(const char *name)
{
	char **names = NULL, wanted[64], message[96];
	int n = sd_listen_fds_with_names(0, &names);
	bool found = false;

	snprintf(wanted, sizeof wanted, "twin-%s", name);
	for (int i = 0; i < n; i++) {
		if (!strcmp(names[i], wanted)) {
			if (belongs_to(SD_LISTEN_FDS_START + i, name)) {
				found = true;
			} else {
				snprintf(message, sizeof message, "FDSTOREREMOVE=1\nFDNAME=%s", wanted);
				sd_notify(0, message);
			}
		}
		free(names[i]);
	}
	free(names);
	return found;
}

static void keep(const char *name)
{
	struct ifreq request = {.ifr_flags = IFF_DETACH_QUEUE};
	char message[128];
	int fd;

	if (!getenv("NOTIFY_SOCKET") || (fd = tap_open(name)) < 0)
		return;
	/* FDPOLL=0: a detached queue polls as an error, and systemd would throw it away for that */
	snprintf(message, sizeof message, "FDSTORE=1\nFDNAME=twin-%s\nFDPOLL=0", name);
	if (!ioctl(fd, TUNSETQUEUE, &request))
		sd_pid_notify_with_fds(0, 0, message, &fd, 1);
	close(fd);
}

static int twin_attach(struct twins *t, struct twin *twin, bool kept, char *why, size_t why_bytes)
{
	const char *name = twin->port->name;
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = twin};
	int fd, status;

	if (!kept && !is_kept(name))
		keep(name);
	fd = tap_open(name);
	if (fd == -EINVAL || fd == -EBUSY)
		snprintf(why, why_bytes,
			 "interface %s is there but is not a multi-queue TAP; remove it (ip link delete %s) "
			 "or make it with: "
			 "ip tuntap add %s mode tap multi_queue",
			 name, name, name);
	else if (fd < 0)
		snprintf(why, why_bytes,
			 "the kernel twin %s cannot be made: %s; /dev/net/tun and CAP_NET_ADMIN are needed",
			 name, strerror(-fd));
	if (fd < 0)
		return -1;
	status = tap_dress(twin->port);
	if (status || epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, fd, &event)) {
		snprintf(why, why_bytes, "the kernel twin %s does not take the port's MAC address or MTU: %s",
			 name, strerror(status ? -status : errno));
		close(fd);
		return -1;
	}
	atomic_store(&twin->fd, fd);
	return 0;
}

void twin_set_carrier(struct twin *twin, bool up)
{
	int carrier = up, fd = twin->fd;

	if (fd >= 0)
		(void)ioctl(fd, TUNSETCARRIER, &carrier);
}

void twins_mend(struct twins *t, void (*say)(const char *sentence))
{
	char why[256], sentence[384];

	for (uint32_t i = 0; i < t->ports->n; i++) {
		struct twin *twin = &t->twin[i];

		if (twin->fd >= 0)
			continue;
		if (twin_attach(t, twin, false, why, sizeof why)) {
			say(why);
			continue;
		}
		twin_set_carrier(twin, twin->port->up);
		snprintf(sentence, sizeof sentence,
			 "the kernel twin %s had been deleted and is made anew; its addresses must be set "
			 "again",
			 twin->port->name);
		say(sentence);
	}
}

/* ---- workers and control thread ---- */

enum twin_class twin_class_of(const struct rte_mbuf *m)
{
	const uint8_t *frame = rte_pktmbuf_mtod(m, const uint8_t *), *l3 = frame + RTE_ETHER_HDR_LEN, *l4;
	uint32_t bytes = rte_pktmbuf_data_len(m);
	uint16_t type_be = ((const struct rte_ether_hdr *)frame)->ether_type, sport, dport;
	const uint8_t *end = frame + bytes;
	uint8_t protocol;

	if (type_be == RTE_BE16(RTE_ETHER_TYPE_VLAN) && l3 + 4 <= end) { /* of a VLAN interface on the twin */
		memcpy(&type_be, l3 + 2, sizeof type_be);
		l3 += 4;
	}
	if (type_be == RTE_BE16(RTE_ETHER_TYPE_ARP))
		return TWIN_CONTROL;
	if (type_be == RTE_BE16(RTE_ETHER_TYPE_IPV4) && l3 + 20 <= end) {
		protocol = l3[9];
		l4 = l3 + (l3[0] & 15) * 4;
	} else if (type_be == RTE_BE16(RTE_ETHER_TYPE_IPV6) && l3 + 40 <= end) {
		protocol = l3[6];
		l4 = l3 + 40;
	} else {
		return TWIN_REST;
	}
	if (protocol == 112) /* VRRP, both versions */
		return TWIN_URGENT;
	if (protocol == 89) /* OSPF */
		return TWIN_CONTROL;
	if (l4 + 4 > end)
		return TWIN_REST;
	if (protocol == IPPROTO_ICMPV6)
		return l4[0] >= 133 && l4[0] <= 137 ? TWIN_CONTROL : TWIN_REST;
	sport = (uint16_t)(l4[0] << 8 | l4[1]);
	dport = (uint16_t)(l4[2] << 8 | l4[3]);
	if (protocol == IPPROTO_UDP && (dport == 3784 || dport == 3785 || dport == 4784)) /* BFD */
		return TWIN_URGENT;
	if (protocol == IPPROTO_TCP && (dport == 179 || sport == 179)) /* BGP */
		return TWIN_CONTROL;
	return TWIN_REST;
}

bool twin_pass(struct twins *t, uint32_t worker, struct rte_mbuf *m, enum twin_class class)
{
	return rte_ring_sp_enqueue(t->to[worker][class], m) == 0;
}

void twins_wake(struct twins *t)
{
	uint64_t one = 1;

	atomic_thread_fence(memory_order_seq_cst); /* pairs with sleep_until_work() */
	if (atomic_load(&t->asleep))
		(void)!write(t->wake_fd, &one, sizeof one);
}

bool twins_send(struct twins *t, const struct port *port, const void *frame, uint32_t bytes)
{
	struct rte_mbuf *m = rte_pktmbuf_alloc(t->ports->pool);
	char *data = m ? rte_pktmbuf_append(m, (uint16_t)bytes) : NULL;

	if (data) {
		memcpy(data, frame, bytes);
		m->port = port->index;
		if (rte_ring_mp_enqueue(t->from, m) == 0) {
			thread_wake(t->worker[0]);
			return true;
		}
	}
	rte_pktmbuf_free(m);
	return false;
}

/* ---- the twin thread ---- */

static bool allowed(struct bucket *b, enum twin_class class, uint64_t now_ns)
{
	b->tokens += (double)(now_ns - b->filled_ns) * class_limit[class].per_s / 1e9;
	b->filled_ns = now_ns;
	if (b->tokens > class_limit[class].at_once)
		b->tokens = class_limit[class].at_once;
	if (b->tokens < 1)
		return false;
	b->tokens--;
	return true;
}

static void give(struct twins *t, struct rte_mbuf *m, enum twin_class class, uint64_t now_ns)
{
	struct port *port = &t->ports->port[m->port];
	const struct note *note = note_of(m);
	bool given = false;

	if (port->twin->fd >= 0 && allowed(&port->twin->bucket[class], class, now_ns))
		given = write(port->twin->fd, rte_pktmbuf_mtod(m, void *), rte_pktmbuf_data_len(m)) >= 0;
	if (given) {
		port->twin_to++;
	} else { /* the owner of the counters takes it back: see thread.c */
		port->twin_lost++;
		atomic_fetch_add(&t->worker[note->worker]->lost[note->reason], 1);
	}
	rte_pktmbuf_free(m);
}

static unsigned to_kernel(struct twins *t)
{
	uint64_t now_ns = thread_clock_ns();
	unsigned total = 0;

	for (int class = 0; class < TWIN_CLASSES; class ++)
		for (uint32_t w = 0; w < t->n_workers; w++) {
			struct rte_mbuf *m[BATCH];
			unsigned n = rte_ring_sc_dequeue_burst(t->to[w][class], (void **)m, BATCH, NULL);

			for (unsigned i = 0; i < n; i++)
				give(t, m[i], (enum twin_class) class, now_ns);
			total += n;
		}
	return total;
}

static void twin_lose(struct twins *t, struct twin *twin)
{
	int fd = atomic_exchange(&twin->fd, -1);

	(void)epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
	close(fd);
}

static unsigned from_kernel(struct twins *t, struct twin *twin)
{
	unsigned n = 0;

	for (; n < BATCH && twin->fd >= 0; n++) {
		struct rte_mbuf *m = t->spare ? t->spare : rte_pktmbuf_alloc(t->ports->pool);
		ssize_t bytes;

		t->spare = NULL;
		if (!m)
			return n;
		bytes = read(twin->fd, rte_pktmbuf_mtod(m, void *), rte_pktmbuf_tailroom(m));
		if (bytes <= 0) {
			t->spare = m; /* for the next time: mostly there is nothing to read */
			if (bytes < 0 && errno == EBADFD)
				twin_lose(t, twin);
			return n;
		}
		m->data_len = (uint16_t)bytes;
		m->pkt_len = (uint32_t)bytes;
		m->port = twin->port->index;
		if (rte_ring_mp_enqueue(t->from, m)) {
			rte_pktmbuf_free(m);
			continue;
		}
		twin->port->twin_from++;
	}
	return n;
}

static bool anything(const struct twins *t)
{
	for (uint32_t w = 0; w < t->n_workers; w++)
		for (int class = 0; class < TWIN_CLASSES; class ++)
			if (!rte_ring_empty(t->to[w][class]))
				return true;
	return t->stop;
}

static void sleep_until_work(struct twins *t)
{
	struct epoll_event event;
	uint64_t ignored;

	atomic_store(&t->asleep, true);
	if (!anything(t) && epoll_wait(t->epoll_fd, &event, 1, 1000) == 1) {
		struct twin *twin = event.data.ptr;

		if (!twin)
			(void)!read(t->wake_fd, &ignored, sizeof ignored);
		else if (event.events & (EPOLLERR | EPOLLHUP))
			twin_lose(t, twin);
	}
	atomic_store(&t->asleep, false);
}

static void *twin_thread(void *argument)
{
	struct twins *t = argument;

	(void)rte_thread_register(); /* for a buffer cache of its own */
	while (!t->stop) {
		unsigned to = to_kernel(t), from = 0;

		for (uint32_t i = 0; i < t->ports->n; i++)
			from += from_kernel(t, &t->twin[i]);
		if (from)
			thread_wake(t->worker[0]);
		if (!to && !from)
			sleep_until_work(t);
	}
	rte_thread_unregister();
	return NULL;
}

/* ---- set-up ---- */

static int rings_open(struct twins *t, char *why, size_t why_bytes)
{
	char name[32];

	t->from = rte_ring_create("twin-from", 2048, SOCKET_ID_ANY, RING_F_SC_DEQ);
	for (uint32_t w = 0; w < t->n_workers; w++)
		for (int class = 0; class < TWIN_CLASSES; class ++) {
			snprintf(name, sizeof name, "twin-to-%u-%d", w, class);
			t->to[w][class] = rte_ring_create(name, class_limit[class].ring_entries,
							  SOCKET_ID_ANY, RING_F_SP_ENQ | RING_F_SC_DEQ);
			if (!t->to[w][class])
				t->from = NULL;
		}
	if (t->from)
		return 0;
	snprintf(why, why_bytes, "no memory for the rings of the kernel twins: %s", rte_strerror(rte_errno));
	return -1;
}

int twins_open(struct twins *t, struct ports *ports, uint32_t n_workers, bool kept, char *why,
	       size_t why_bytes)
{
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};

	memset(t, 0, sizeof *t);
	t->ports = ports;
	t->n_workers = n_workers;
	t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (t->epoll_fd < 0 || t->wake_fd < 0 || epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, t->wake_fd, &event)) {
		snprintf(why, why_bytes, "no descriptors for the kernel twins: %s", strerror(errno));
		return -1;
	}
	if (rings_open(t, why, why_bytes))
		return -1;
	for (uint32_t i = 0; i < ports->n; i++) {
		t->twin[i].port = &ports->port[i];
		t->twin[i].fd = -1;
		ports->port[i].twin = &t->twin[i];
		if (twin_attach(t, &t->twin[i], kept, why, why_bytes))
			return -1;
	}
	return 0;
}

int twins_start(struct twins *t)
{
	int status = pthread_create(&t->thread, NULL, twin_thread, t);

	if (!status)
		pthread_setname_np(t->thread, "twins");
	t->running = status == 0;
	return -status;
}

void twins_stop(struct twins *t)
{
	uint64_t one = 1;

	atomic_store(&t->stop, true);
	if (t->running) {
		(void)!write(t->wake_fd, &one, sizeof one);
		pthread_join(t->thread, NULL);
	}
	t->running = false;
	for (uint32_t i = 0; t->ports && i < t->ports->n; i++) /* none, when there are no ports either */
		if (t->twin[i].fd >= 0)
			close(atomic_exchange(&t->twin[i].fd, -1));
}
