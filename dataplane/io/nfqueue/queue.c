/* netlink batch -> engine -> verdicts.
 *
 *     kernel --recvmmsg--> slots --queue_receive()--> engine --queue_settle()--> verdicts --sendmsg--> kernel
 *                                                        |          |\--> a DPDK port (params.send)
 *                                                        |          \--> another worker (peers.c)
 *                                                        \--queue_inject()--> dsnat0
 *
 * There is a queue for each worker, and the kernel chooses one by a packet's addresses and protocol, in
 * either direction the same for the same pair. The reply's pair is another one, so it comes to its
 * session's worker only by chance: who has no session for a packet hands it over.
 *
 * Each packet sits in a *slot* from the moment it is received until its verdict is sent, which for one that
 * the core holds (NAT_HOLD) may be seconds. There are as many slots as the core may hold, and a burst more.
 *
 * Where a packet was queued says who sees to its TTL and MTU:
 *   postrouting  a request. The kernel has routed it and decremented the TTL (NAT_PKT_KERNEL_ROUTES).
 *   prerouting   a reply, or a hairpin. The kernel will route it after us; but should it be too big for the
 *                inside, the ICMP error must quote the packet as the remote sent it, which only the core can
 *                do. So the core checks and decrements, and the TTL is put back before the kernel decrements
 *                it again.
 *
 * A translated packet whose next hop is on a DPDK port is *stolen*: the kernel is told to drop it, and the
 * port sends a copy. Not so one that is larger than that link's MTU: the kernel sends it to the twin, in
 * fragments.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "queue_internal.h"
#include "tun.h"

#define TICK_NS         1000000u
#define LOOK_NS         1000000000u
#define SLEEP_US        10000u
#define SLOTS_AWAY      2048u
#define UNKNOWN_IFACE   0xffu
#define ATTRIBUTE       ((uint32_t)sizeof(struct nlattr)) /* bytes before its value */
#define FIRST_ATTRIBUTE ((uint32_t)(sizeof(struct nlmsghdr) + sizeof(struct nfgenmsg)))

/* ---- slots ---- */

static bool slots_open(struct queue *q)
{
	/* each worker's core may hold some of ours, and some may be on the way to them */
	const uint32_t n = 2 * QUEUE_BURST + q->params.held_max + (q->inbox ? SLOTS_AWAY : 0);

	/* address space; a page becomes memory when a packet is written to it */
	q->slots_bytes = (size_t)n * sizeof(struct queue_slot);
	q->slots = mmap(NULL, q->slots_bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (q->slots == MAP_FAILED) {
		q->slots = NULL;
		return false;
	}
	(void)madvise(q->slots, q->slots_bytes, MADV_NOHUGEPAGE); /* 64 KiB slots, of which 2 KiB are used */
	for (uint32_t i = n; i-- > 0;) {
		q->slots[i].queue = (uint8_t)q->params.thread->index;
		queue_slot_free(q, &q->slots[i]);
	}
	return true;
}

/* ---- interfaces ---- */

/* The kernel knows interfaces by index, and gives a new one to one that is made anew. A direct-mapped cache
 * saves a system call for each packet; it is emptied once a second. */
static uint8_t iface_of(struct queue *q, int ifindex)
{
	uint32_t at = (uint32_t)ifindex % (sizeof q->iface_cache / sizeof q->iface_cache[0]);
	char name[IF_NAMESIZE];

	if (!ifindex)
		return UNKNOWN_IFACE;
	if (q->ifindex_cache[at] == ifindex)
		return q->iface_cache[at];
	q->ifindex_cache[at] = ifindex;
	q->iface_cache[at] = UNKNOWN_IFACE;
	if (!if_indextoname((unsigned)ifindex, name))
		return UNKNOWN_IFACE;
	for (uint32_t i = 0; i < q->params.n_interfaces; i++)
		if (!strcmp(q->params.interfaces[i].name, name))
			q->iface_cache[at] = (uint8_t)i;
	return q->iface_cache[at];
}

static bool is_queued(const struct queue *q, uint8_t iface)
{
	return iface < q->params.n_interfaces && q->params.interfaces[iface].path == NAT_PATH_NFQUEUE;
}

/* What comes to a pool address from an interface that the configuration does not name is from outside. */
static uint8_t fallback_of(const struct queue_params *p)
{
	uint8_t found = UNKNOWN_IFACE;

	for (uint8_t i = 0; i < p->n_interfaces; i++)
		if (p->interfaces[i].path == NAT_PATH_NFQUEUE &&
		    (found == UNKNOWN_IFACE || (p->interfaces[found].role == NAT_ROLE_INSIDE &&
						p->interfaces[i].role == NAT_ROLE_OUTSIDE)))
			found = i;
	return found;
}

static void watch(struct queue *q, int fd)
{
	struct epoll_event event = {.events = EPOLLIN};

	(void)epoll_ctl(q->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

/* Interfaces come and go: WireGuard tunnels, PPP sessions. */
static void look_at_interfaces(struct queue *q, uint64_t now_ns)
{
	q->looked_ns = now_ns;
	memset(q->ifindex_cache, 0, sizeof q->ifindex_cache);
	for (uint32_t i = 0; i < q->n_arp; i++)
		if (arp_socket_follow(&q->arp[i]))
			watch(q, q->arp[i].fd);
	for (uint32_t i = 0; i < q->params.n_interfaces && q->params.thread->index == 0; i++)
		if (q->params.interfaces[i].path == NAT_PATH_NFQUEUE)
			(void)tun_forward_from(q->params.interfaces[i].name);
}

/* ---- verdicts ---- */

/* One more hop: undoes the core's decrement (RFC 1624; the TTL is the high byte of its word). */
static void put_ttl_back(uint8_t *l3)
{
	uint32_t sum = (uint32_t)(l3[10] << 8 | l3[11]) + 0xfeffu;

	sum = (sum & 0xffffu) + (sum >> 16);
	l3[8]++;
	l3[10] = (uint8_t)(sum >> 8);
	l3[11] = (uint8_t)sum;
}

/* The next hop is on a DPDK port, and that is where the kernel would send it, or has not decided. */
static bool may_steal(const struct queue *q, const struct queue_slot *slot, const struct nat_pkt *pkt)
{
	return q->params.send && pkt->hop.kind == NAT_HOP_FORWARD &&
	       (slot->prerouting || slot->out_iface == pkt->hop.iface) &&
	       (!pkt->hop.mtu_bytes || pkt->len_bytes <= pkt->hop.mtu_bytes);
}

static void forward(struct queue *q, struct queue_slot *slot, const struct nat_pkt *pkt, uint64_t now_ns)
{
	uint8_t out = slot->prerouting ? pkt->hop.iface : slot->out_iface;

	if (may_steal(q, slot, pkt)) {
		q->params.send(q->params.context, pkt, now_ns);
		queue_answer(q, slot, NF_DROP, SEQ_DROP, NULL);
		return;
	}
	if (slot->prerouting)
		put_ttl_back(pkt->l3);
	if (is_queued(q, out)) {
		q->sent[out]++;
		q->sent_bytes[out] += pkt->len_bytes;
	}
	queue_answer(q, slot, NF_ACCEPT, SEQ_FORWARD, pkt);
}

void queue_steal(struct queue *q, const struct nat_pkt *pkt)
{
	queue_answer(q, pkt->cookie, NF_DROP, SEQ_DROP, NULL);
}

void queue_settle(struct queue *q, const struct nat_pkt *pkt, uint64_t now_ns)
{
	struct queue_slot *slot = pkt->cookie;

	switch ((enum nat_verdict)pkt->verdict) {
	case NAT_FORWARD:
		forward(q, slot, pkt, now_ns);
		break;
	case NAT_PASS:
		queue_answer(q, slot, NF_ACCEPT, SEQ_PASS | pkt->reason, NULL);
		break;
	case NAT_HOLD:
		break;
	case NAT_HANDOVER:
		if (q->inbox) {
			queue_hand_over(q, pkt);
			break;
		}
		/* worker.c could not copy it */
		nat_engine_undo(q->params.thread->engine, pkt, NAT_REASON_HANDOVER_FULL);
		/* fall through */
	case NAT_DROP:
		queue_answer(q, slot, NF_DROP, SEQ_DROP, NULL);
		break;
	}
}

bool queue_inject(struct queue *q, const struct nat_pkt *pkt)
{
	/* The kernel counts itself as a hop, and the core has counted us already. */
	if (pkt->l3[8] < UINT8_MAX)
		put_ttl_back(pkt->l3);
	return write(q->tun_fd, pkt->l3, pkt->len_bytes) == (ssize_t)pkt->len_bytes;
}

/* ---- in ---- */

struct found { /* the attributes of one message */
	const struct nfqnl_msg_packet_hdr *header;
	uint8_t *payload;
	uint32_t payload_bytes;
	int in, out;
	bool cut;
};

static uint32_t value_of(const uint8_t *attribute)
{
	uint32_t value_be;

	memcpy(&value_be, attribute + ATTRIBUTE, sizeof value_be);
	return ntohl(value_be);
}

/* By hand: libmnl's five calls for each of ten attributes would be a third of our own share of a packet. */
static struct found attributes_of(uint8_t *message, uint32_t bytes)
{
	struct found f = {0};
	struct nlattr a;

	for (uint32_t at = FIRST_ATTRIBUTE; at + ATTRIBUTE <= bytes; at += (a.nla_len + 3u) & ~3u) {
		memcpy(&a, message + at, sizeof a);
		if (a.nla_len < ATTRIBUTE || a.nla_len > bytes - at)
			break;
		const uint32_t value_bytes = a.nla_len - ATTRIBUTE;

		switch (a.nla_type & NLA_TYPE_MASK) {
		case NFQA_PACKET_HDR:
			if (value_bytes >= sizeof *f.header)
				f.header = (const void *)(message + at + ATTRIBUTE);
			break;
		case NFQA_IFINDEX_INDEV:
			f.in = value_bytes >= 4 ? (int)value_of(message + at) : 0;
			break;
		case NFQA_IFINDEX_OUTDEV:
			f.out = value_bytes >= 4 ? (int)value_of(message + at) : 0;
			break;
		case NFQA_PAYLOAD:
			f.payload = message + at + ATTRIBUTE;
			f.payload_bytes = value_bytes;
			break;
		case NFQA_CAP_LEN:
			f.cut = true;
			break;
		default:
			break;
		}
	}
	return f;
}

/* A verdict that the kernel could not use. */
static void on_error(struct queue *q, const struct nlmsghdr *message)
{
	const struct nlmsgerr *error = NLMSG_DATA(message);

	if (message->nlmsg_len >= sizeof *message + sizeof *error && error->error)
		queue_refused(q, error->msg.nlmsg_seq);
}

/* One message, in `slot`. False: there is no packet in it, and the slot is free. */
static bool take(struct queue *q, struct queue_slot *slot, uint32_t bytes, struct nat_pkt *pkt)
{
	const struct nlmsghdr *message = (const struct nlmsghdr *)(const void *)slot->bytes;
	struct found f = {0};
	uint8_t iface;

	if (bytes >= sizeof *message && message->nlmsg_len <= bytes) {
		if (message->nlmsg_type == NLMSG_ERROR)
			on_error(q, message);
		else if (message->nlmsg_type == (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
			f = attributes_of(slot->bytes, message->nlmsg_len);
	}
	if (!f.header) {
		queue_slot_free(q, slot);
		return false;
	}
	slot->id_be = f.header->packet_id;
	slot->prerouting = f.header->hook == NF_INET_PRE_ROUTING;
	if (!f.payload || f.cut) {
		nat_engine_bypass(q->params.thread->engine, NAT_DROP, NAT_REASON_TRUNCATED);
		queue_answer(q, slot, NF_DROP, SEQ_DROP, NULL);
		return false;
	}
	slot->out_iface = iface_of(q, f.out);
	if (!is_queued(q, iface = iface_of(q, f.in)))
		iface = q->fallback;
	/* the kernel has looked at the header's checksum before any hook */
	nat_pkt_present(pkt, f.payload, f.payload_bytes, slot, iface,
			NAT_PKT_IP_CSUM_GOOD | (slot->prerouting ? 0 : NAT_PKT_KERNEL_ROUTES));
	q->received[iface]++;
	q->received_bytes[iface] += f.payload_bytes;
	return true;
}

static void refill(struct queue *q)
{
	struct queue_slot *slot;

	while (q->n_in < QUEUE_BURST && (slot = queue_slot_take(q))) {
		q->in_vector[q->n_in] = (struct iovec){.iov_base = slot->bytes, .iov_len = SLOT_BYTES};
		q->in[q->n_in++] = slot;
	}
}

static void serve_arp(struct queue *q)
{
	for (uint32_t i = 0; i < q->n_arp; i++)
		for (uint32_t n = arp_socket_serve(&q->arp[i], q->params.thread); n > 0; n--)
			nat_engine_bypass(q->params.thread->engine, NAT_PASS, NAT_REASON_ARP_ANSWERED);
}

uint32_t queue_receive(struct queue *q, struct nat_pkt pkt[QUEUE_BURST], uint64_t now_ns)
{
	uint32_t n_pkt = 0;
	int n;

	if (now_ns - q->looked_ns >= LOOK_NS)
		look_at_interfaces(q, now_ns);
	refill(q);
	n = q->n_in ? recvmmsg(q->fd, q->in_message, q->n_in, MSG_DONTWAIT, NULL) : 0;
	if (n <= 0 || now_ns - q->arp_ns >= TICK_NS) { /* else it can wait a little */
		q->arp_ns = now_ns;
		serve_arp(q);
	}
	for (int i = 0; i < n; i++)
		n_pkt += take(q, q->in[i], q->in_message[i].msg_len, &pkt[n_pkt]);
	if (n > 0) {
		q->n_in -= (uint32_t)n;
		memmove(q->in, q->in + n, q->n_in * sizeof q->in[0]);
		memmove(q->in_vector, q->in_vector + n, q->n_in * sizeof q->in_vector[0]);
		q->params.thread->bursts++;
		q->params.thread->packets += (uint64_t)n;
	}
	return n_pkt;
}

/* ---- the loop ---- */

/* A packet that the engine made has no verdict to wait for it. */
static void made(struct queue *q, const struct nat_pkt *pkt)
{
	if (pkt->verdict == NAT_FORWARD && !queue_inject(q, pkt))
		nat_engine_undo(q->params.thread->engine, pkt, NAT_REASON_TX_FULL);
}

static void drain(struct queue *q, uint64_t now_ns)
{
	struct nat_pkt pkt;

	while (nat_engine_next(q->params.thread->engine, &pkt)) {
		if (pkt.made)
			made(q, &pkt);
		else
			queue_settle(q, &pkt, now_ns);
	}
	queue_flush(q);
}

static void translate(struct queue *q, struct nat_pkt *pkt, uint32_t n, uint64_t now_ns)
{
	if (!n)
		return;
	nat_engine_run(q->params.thread->engine, pkt, n, now_ns);
	for (uint32_t i = 0; i < n; i++)
		queue_settle(q, &pkt[i], now_ns);
}

static bool pending(void *context)
{
	const struct queue *q = context;

	return q->inbox && !rte_ring_empty(q->inbox);
}

/* One of the isolated CPUs, where there are enough of them. */
static void pin(int32_t core)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	if (core < 0)
		return;
	CPU_SET((size_t)core, &set);
	(void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

void *queue_run(void *argument)
{
	struct queue *q = argument;
	struct thread *t = q->params.thread;
	uint64_t run_ns = 0, start_ns = thread_clock_ns();

	prctl(PR_SET_NAME, "dsnat-queue");
	pin(t->core);
	while (!atomic_load_explicit(&t->stop, memory_order_relaxed)) {
		struct nat_pkt pkt[NAT_BURST_MAX];
		uint64_t now_ns = thread_clock_ns();
		uint32_t n, taken;

		thread_between_bursts(t, now_ns);
		n = queue_receive(q, pkt, now_ns);
		translate(q, pkt, n, now_ns);
		taken = queue_take_over(q, pkt);
		translate(q, pkt, taken, now_ns);
		n += taken;
		if (!n && now_ns - run_ns >= TICK_NS)
			nat_engine_tick(t->engine, now_ns);
		run_ns = now_ns;
		drain(q, now_ns);
		if (n) {
			t->work_ns += thread_clock_ns() - now_ns;
		} else {
			uint64_t sleep_ns = thread_clock_ns();

			thread_sleep(t, -1, q->epoll_fd, SLEEP_US, pending, q);
			t->idle_ns += thread_clock_ns() - sleep_ns;
		}
		t->busy_ns = now_ns - start_ns - t->idle_ns;
	}
	return NULL;
}

/* ---- set-up ---- */

static void arp_open(struct queue *q)
{
	for (uint8_t i = 0; i < q->params.n_interfaces; i++)
		if (q->params.interfaces[i].path == NAT_PATH_NFQUEUE &&
		    q->params.interfaces[i].role == NAT_ROLE_OUTSIDE)
			q->arp[q->n_arp++] = (struct arp_socket){
				.fd = -1, .iface = i, .name = q->params.interfaces[i].name};
}

int queue_open(struct queue *q, const struct queue_params *params, char *why, size_t why_bytes)
{
	const bool first = params->thread->index == 0;
	int status;

	*q = (struct queue){.params = *params, .fd = -1, .tun_fd = -1, .fallback = fallback_of(params)};
	q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (q->epoll_fd < 0 || !queue_answers_open(q) || !queue_inbox_open(q) || !slots_open(q)) {
		snprintf(why, why_bytes, "no memory for the packets of the queue path");
		return -1;
	}
	for (uint32_t i = 0; i < QUEUE_BURST; i++)
		q->in_message[i].msg_hdr = (struct msghdr){.msg_iov = &q->in_vector[i], .msg_iovlen = 1};
	q->tun_fd = first ? tun_open(why, why_bytes) : params->peers[0].tun_fd;
	if (q->tun_fd < 0)
		return -1;
	if ((status = queue_bind(q))) {
		snprintf(why, why_bytes, "netfilter queue %u cannot be used: %s; %s",
			 QUEUE_FIRST + params->thread->index, strerror(-status),
			 status == -EPERM || status == -EBUSY
				 ? "another program has it, or the right to use it is missing"
				 : "a kernel with nfnetlink_queue is needed");
		return -1;
	}
	watch(q, q->fd);
	if (first)
		arp_open(q);
	return 0;
}

void queue_close(struct queue *q)
{
	for (uint32_t i = 0; i < q->n_arp; i++)
		arp_socket_close(&q->arp[i]);
	if (q->fd >= 0)
		close(q->fd);
	if (q->tun_fd >= 0 && q->params.thread->index == 0)
		close(q->tun_fd);
	if (q->epoll_fd >= 0)
		close(q->epoll_fd);
	if (q->slots)
		munmap(q->slots, q->slots_bytes);
	queue_answers_close(q);
	queue_inbox_close(q);
	*q = (struct queue){.fd = -1, .tun_fd = -1, .epoll_fd = -1};
}

/* All queues' packets of an interface. The figures belong to their workers: they are a moment old. */
static void add_up(const struct queue *q, uint8_t iface, struct request_port *view)
{
	for (uint32_t i = 0; i < q->params.n_peers; i++) {
		const struct queue *one = &q->params.peers[i];

		view->rx_packets += one->received[iface];
		view->rx_bytes += one->received_bytes[iface];
		view->tx_packets += one->sent[iface];
		view->tx_bytes += one->sent_bytes[iface];
	}
}

bool queue_view(const struct queue *q, const struct route *route, uint32_t i, struct request_port *view)
{
	for (uint8_t iface = 0; iface < q->params.n_interfaces; iface++) {
		if (!is_queued(q, iface) || i-- > 0)
			continue;
		*view = (struct request_port){.name = q->params.interfaces[iface].name,
					      .up = route_interface_up(route, iface),
					      .queues = (uint16_t)q->params.n_peers};
		add_up(q, iface, view);
		/* the kernel does not say for which interface: told with the first */
		if (iface == q->fallback)
			view->rx_missed = queue_overruns(q->params.n_peers);
		return true;
	}
	return false;
}
