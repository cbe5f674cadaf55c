/* netlink batch -> engine -> verdicts.
 *
 *     kernel --recvmmsg--> slots --queue_receive()--> engine --queue_settle()--> verdicts --sendmsg--> kernel
 *                                                        |          \--> a DPDK port (params.send)
 *                                                        \--queue_inject()--> dsnat0
 *
 * Each packet sits in a *slot* from the moment it is received until its verdict is sent, which for one that
 * the core holds (NAT_HOLD) may be seconds. There are as many slots as the core may hold, and a burst more.
 * A verdict that changes a packet carries all of it; many of them go to the kernel in one sendmsg().
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
 *
 * Checksums: the kernel finishes them and splits what segmentation offload joined, before it asks us, because
 * we do not take NFQA_CFG_F_GSO. NFQA_CFG_F_FAIL_OPEN is off: a full queue drops.
 */
#include "queue.h"

#include <arpa/inet.h>
#include <errno.h>
#include <libmnl/libmnl.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "tun.h"

#define SLOT_BYTES    (65536u + 512u) /* the largest packet, and what netlink puts around it */
#define QUEUE_LENGTH  8192u           /* packets that the kernel keeps for us, beside held ones */
#define SOCKET_BYTES  (32 << 20)
#define FLUSH_BYTES   65536u /* of verdicts in one message: the kernel must find memory for it in one piece */
#define TICK_NS       1000000u
#define LOOK_NS       1000000000u
#define SLEEP_US      10000u
#define VECTORS_EACH  2u
#define UNKNOWN_IFACE 0xffu

struct queue_slot {
	struct queue_slot *next;
	uint32_t id_be;
	bool prerouting;
	uint8_t out_iface;
	_Alignas(8) uint8_t bytes[SLOT_BYTES];
};

struct queue_answer { /* a message of NFQNL_MSG_VERDICT, up to the payload's bytes */
	struct nlmsghdr header;
	struct nfgenmsg info;
	struct nlattr verdict_header;
	struct nfqnl_msg_verdict_hdr verdict;
	struct nlattr payload_header;
};
_Static_assert(sizeof(struct queue_answer) == 16 + 4 + 4 + 8 + 4, "no padding between attributes");
#define BARE_BYTES ((uint32_t)offsetof(struct queue_answer, payload_header))

/* In nlmsg_seq, which comes back with an error: what the packet was counted as. */
#define SEQ_DROP    0u
#define SEQ_FORWARD 1u
#define SEQ_PASS    0x100u /* and the reason */

/* ---- slots ---- */

static void slot_free(struct queue *q, struct queue_slot *slot)
{
	slot->next = q->free;
	q->free = slot;
}

static bool slots_open(struct queue *q)
{
	uint32_t n = 2 * QUEUE_BURST + q->params.held_max;

	/* address space; a page becomes memory when a packet is written to it */
	q->slots_bytes = (size_t)n * sizeof(struct queue_slot);
	q->slots = mmap(NULL, q->slots_bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (q->slots == MAP_FAILED) {
		q->slots = NULL;
		return false;
	}
	(void)madvise(q->slots, q->slots_bytes, MADV_NOHUGEPAGE); /* 64 KiB slots, of which 2 KiB are used */
	for (uint32_t i = n; i-- > 0;)
		slot_free(q, &q->slots[i]);
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
	for (uint32_t i = 0; i < q->params.n_interfaces; i++)
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

static void undo(struct queue *q, uint32_t sequence, enum nat_reason reason)
{
	struct nat_pkt pkt = {.verdict = sequence & SEQ_PASS ? NAT_PASS : NAT_FORWARD,
			      .reason = (uint8_t)(sequence & SEQ_PASS ? sequence : NAT_REASON_OK)};

	if (sequence != SEQ_DROP)
		nat_engine_undo(q->params.thread->engine, &pkt, reason);
}

static ssize_t send_vectors(struct queue *q)
{
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	struct msghdr message = {.msg_name = &kernel,
				 .msg_namelen = sizeof kernel,
				 .msg_iov = q->out_vector,
				 .msg_iovlen = q->n_out_vectors};
	ssize_t n;

	do
		n = sendmsg(q->fd, &message, 0);
	while (n < 0 && errno == EINTR);
	return n;
}

/* The kernel has no memory for a batch: what is in it is dropped, by messages that need next to none. */
static void give_up(struct queue *q)
{
	for (uint32_t i = 0; i < q->n_answers; i++) {
		undo(q, q->answer[i].header.nlmsg_seq, NAT_REASON_NO_BUFFER);
		q->answer[i].header.nlmsg_seq = SEQ_DROP;
		q->answer[i].header.nlmsg_len = BARE_BYTES;
		q->answer[i].verdict.verdict = htonl(NF_DROP);
		q->out_vector[0] = (struct iovec){.iov_base = &q->answer[i], .iov_len = BARE_BYTES};
		q->n_out_vectors = 1;
		(void)send_vectors(q);
	}
}

void queue_flush(struct queue *q)
{
	if (!q->n_answers)
		return;
	if (send_vectors(q) < 0)
		give_up(q);
	q->n_answers = q->n_out_vectors = 0;
	q->answer_bytes = 0;
	/* slots whose bytes were still being sent */
	while (q->sent_slots) {
		struct queue_slot *slot = q->sent_slots;

		q->sent_slots = slot->next;
		slot_free(q, slot);
	}
}

static void vector_add(struct queue *q, void *base, size_t bytes)
{
	q->out_vector[q->n_out_vectors++] = (struct iovec){.iov_base = base, .iov_len = bytes};
}

static uint32_t padded(uint32_t bytes) /* as netlink attributes are */
{
	return (bytes + 3) & ~3u;
}

/* `pkt` is given when its changed bytes are to go back. The slot is the queue's again. */
static void answer(struct queue *q, struct queue_slot *slot, uint32_t verdict, uint32_t sequence,
		   const struct nat_pkt *pkt)
{
	uint32_t payload_bytes = pkt ? pkt->len_bytes : 0;
	uint32_t bytes = pkt ? (uint32_t)sizeof(struct queue_answer) + padded(payload_bytes) : BARE_BYTES;

	if (q->n_answers == QUEUE_BURST || (q->n_answers && q->answer_bytes + bytes > FLUSH_BYTES))
		queue_flush(q);
	struct queue_answer *a = &q->answer[q->n_answers++];

	*a = (struct queue_answer){
		.header = {.nlmsg_len = bytes,
			   .nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_VERDICT,
			   .nlmsg_flags = NLM_F_REQUEST,
			   .nlmsg_seq = sequence},
		.info = {.nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0, .res_id = htons(QUEUE_FIRST)},
		.verdict_header = {.nla_len = sizeof a->verdict_header + sizeof a->verdict,
				   .nla_type = NFQA_VERDICT_HDR},
		.verdict = {.verdict = htonl(verdict), .id = slot->id_be},
		.payload_header = {.nla_len = (uint16_t)(sizeof a->payload_header + payload_bytes),
				   .nla_type = NFQA_PAYLOAD},
	};
	vector_add(q, a, pkt ? sizeof *a : BARE_BYTES);
	if (pkt) /* up to three bytes behind the packet are sent too; the slot has them, the kernel skips them */
		vector_add(q, pkt->l3, padded(payload_bytes));
	q->answer_bytes += bytes;
	slot->next = q->sent_slots;
	q->sent_slots = slot;
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
		answer(q, slot, NF_DROP, SEQ_DROP, NULL);
		return;
	}
	if (slot->prerouting)
		put_ttl_back(pkt->l3);
	if (is_queued(q, out)) {
		q->sent[out]++;
		q->sent_bytes[out] += pkt->len_bytes;
	}
	answer(q, slot, NF_ACCEPT, SEQ_FORWARD, pkt);
}

void queue_steal(struct queue *q, const struct nat_pkt *pkt)
{
	answer(q, pkt->cookie, NF_DROP, SEQ_DROP, NULL);
}

void queue_settle(struct queue *q, const struct nat_pkt *pkt, uint64_t now_ns)
{
	struct queue_slot *slot = pkt->cookie;

	switch ((enum nat_verdict)pkt->verdict) {
	case NAT_FORWARD:
		forward(q, slot, pkt, now_ns);
		break;
	case NAT_PASS:
		answer(q, slot, NF_ACCEPT, SEQ_PASS | pkt->reason, NULL);
		break;
	case NAT_HOLD:
		break;
	case NAT_HANDOVER: /* worker.c could not copy it */
		nat_engine_undo(q->params.thread->engine, pkt, NAT_REASON_HANDOVER_FULL);
		/* fall through */
	case NAT_DROP:
		answer(q, slot, NF_DROP, SEQ_DROP, NULL);
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

/* mnl_attr_for_each() without its sign conversions. */
static bool attribute_is_in(const struct nlmsghdr *message, const struct nlattr *a)
{
	const char *tail = mnl_nlmsg_get_payload_tail(message);

	return mnl_attr_ok(a, (int)(tail - (const char *)a));
}

static struct found attributes_of(const struct nlmsghdr *message)
{
	struct found f = {0};
	const struct nlattr *a;

	for (a = mnl_nlmsg_get_payload_offset(message, sizeof(struct nfgenmsg)); attribute_is_in(message, a);
	     a = mnl_attr_next(a)) {
		switch (mnl_attr_get_type(a)) {
		case NFQA_PACKET_HDR:
			f.header = mnl_attr_get_payload(a);
			break;
		case NFQA_IFINDEX_INDEV:
			f.in = (int)ntohl(mnl_attr_get_u32(a));
			break;
		case NFQA_IFINDEX_OUTDEV:
			f.out = (int)ntohl(mnl_attr_get_u32(a));
			break;
		case NFQA_PAYLOAD:
			f.payload = mnl_attr_get_payload(a);
			f.payload_bytes = mnl_attr_get_payload_len(a);
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

/* A verdict that the kernel could not use: the packet's interface went down, and the kernel threw away what
 * was queued for it. */
static void on_error(struct queue *q, const struct nlmsghdr *message)
{
	const struct nlmsgerr *error = mnl_nlmsg_get_payload(message);

	if (message->nlmsg_len >= sizeof *message + sizeof *error && error->error)
		undo(q, error->msg.nlmsg_seq, NAT_REASON_LINK_DOWN);
}

/* One message, in `slot`. False: there is no packet in it, and the slot is free. */
static bool take(struct queue *q, struct queue_slot *slot, uint32_t bytes, struct nat_pkt *pkt)
{
	const struct nlmsghdr *message = (const struct nlmsghdr *)(const void *)slot->bytes;
	struct found f = {0};

	if (mnl_nlmsg_ok(message, (int)bytes)) {
		if (message->nlmsg_type == NLMSG_ERROR)
			on_error(q, message);
		else if (message->nlmsg_type == (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
			f = attributes_of(message);
	}
	if (!f.header) {
		slot_free(q, slot);
		return false;
	}
	slot->id_be = f.header->packet_id;
	slot->prerouting = f.header->hook == NF_INET_PRE_ROUTING;
	if (!f.payload || f.cut) {
		nat_engine_bypass(q->params.thread->engine, NAT_DROP, NAT_REASON_TRUNCATED);
		answer(q, slot, NF_DROP, SEQ_DROP, NULL);
		return false;
	}
	slot->out_iface = iface_of(q, f.out);
	memset(pkt, 0, sizeof *pkt);
	pkt->l3 = f.payload;
	pkt->len_bytes = f.payload_bytes;
	pkt->cookie = slot;
	pkt->iface = iface_of(q, f.in);
	if (!is_queued(q, pkt->iface))
		pkt->iface = q->fallback;
	/* the kernel has looked at the header's checksum before any hook */
	pkt->flags = NAT_PKT_IP_CSUM_GOOD | (slot->prerouting ? 0 : NAT_PKT_KERNEL_ROUTES);
	q->received[pkt->iface]++;
	q->received_bytes[pkt->iface] += pkt->len_bytes;
	return true;
}

static void refill(struct queue *q)
{
	while (q->n_in < QUEUE_BURST && q->free) {
		struct queue_slot *slot = q->free;

		q->free = slot->next;
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
	if (n < (int)QUEUE_BURST) /* else others can wait a little */
		serve_arp(q);
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

static bool pending(void *context)
{
	(void)context;
	return false;
}

void *queue_run(void *argument)
{
	struct queue *q = argument;
	struct thread *t = q->params.thread;
	uint64_t run_ns = 0, start_ns = thread_clock_ns();

	prctl(PR_SET_NAME, "dsnat-queue");
	while (!atomic_load_explicit(&t->stop, memory_order_relaxed)) {
		struct nat_pkt pkt[QUEUE_BURST];
		uint64_t now_ns = thread_clock_ns();

		thread_between_bursts(t, now_ns);
		uint32_t n = queue_receive(q, pkt, now_ns);

		if (n) {
			nat_engine_run(t->engine, pkt, n, now_ns);
			for (uint32_t i = 0; i < n; i++)
				queue_settle(q, &pkt[i], now_ns);
		} else if (now_ns - run_ns >= TICK_NS) {
			nat_engine_tick(t->engine, now_ns);
		}
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

static int configure(struct queue *q, uint16_t attribute, const void *data, uint16_t bytes, const void *more,
		     uint16_t more_attribute)
{
	/* The copy mode comes last and lets packets in, which would stand before its acknowledgement. */
	const bool last = attribute == NFQA_CFG_PARAMS;
	char buffer[512];
	struct nlmsghdr *message = mnl_nlmsg_put_header(buffer);
	struct nfgenmsg *info = mnl_nlmsg_put_extra_header(message, sizeof *info);
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	const struct nlmsgerr *error;

	message->nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG;
	message->nlmsg_flags = last ? NLM_F_REQUEST : NLM_F_REQUEST | NLM_F_ACK;
	info->version = NFNETLINK_V0;
	info->res_id = htons(QUEUE_FIRST);
	mnl_attr_put(message, attribute, bytes, data);
	if (more)
		mnl_attr_put(message, more_attribute, 4, more);
	if (sendto(q->fd, message, message->nlmsg_len, 0, (struct sockaddr *)&kernel, sizeof kernel) < 0)
		return -errno;
	if (last)
		return 0;
	if (recv(q->fd, buffer, sizeof buffer, 0) < (ssize_t)(sizeof *message + sizeof *error))
		return -EIO;
	error = mnl_nlmsg_get_payload(message);
	return message->nlmsg_type == NLMSG_ERROR ? error->error : -EIO;
}

static int bind_queue(struct queue *q)
{
	const struct nfqnl_msg_config_cmd bind_it = {.command = NFQNL_CFG_CMD_BIND};
	const struct nfqnl_msg_config_params copy = {.copy_range = htonl(65535),
						     .copy_mode = NFQNL_COPY_PACKET};
	const uint32_t length_be = htonl(QUEUE_LENGTH + q->params.held_max), off_be = 0,
		       mask_be = htonl(NFQA_CFG_F_FAIL_OPEN | NFQA_CFG_F_CONNTRACK | NFQA_CFG_F_GSO |
				       NFQA_CFG_F_UID_GID | NFQA_CFG_F_SECCTX);
	const int bytes = SOCKET_BYTES, yes = 1;
	struct sockaddr_nl any = {.nl_family = AF_NETLINK};
	int status;

	q->fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
	if (q->fd < 0 || bind(q->fd, (struct sockaddr *)&any, sizeof any))
		return -errno;
	if (setsockopt(q->fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes))
		(void)setsockopt(q->fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
	if (setsockopt(q->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes))
		(void)setsockopt(q->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
	/* what overruns is counted by the kernel, and must not end a recvmmsg() */
	(void)setsockopt(q->fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &yes, sizeof yes);
	if ((status = configure(q, NFQA_CFG_CMD, &bind_it, sizeof bind_it, NULL, 0)) ||
	    (status = configure(q, NFQA_CFG_QUEUE_MAXLEN, &length_be, sizeof length_be, NULL, 0)) ||
	    (status = configure(q, NFQA_CFG_FLAGS, &off_be, sizeof off_be, &mask_be, NFQA_CFG_MASK)))
		return status;
	return configure(q, NFQA_CFG_PARAMS, &copy, sizeof copy, NULL, 0);
}

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
	int status;

	*q = (struct queue){.params = *params, .fd = -1, .tun_fd = -1, .fallback = fallback_of(params)};
	q->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	q->answer = calloc(QUEUE_BURST, sizeof *q->answer);
	q->out_vector = calloc(QUEUE_BURST * VECTORS_EACH, sizeof *q->out_vector);
	if (q->epoll_fd < 0 || !q->answer || !q->out_vector || !slots_open(q)) {
		snprintf(why, why_bytes, "no memory for the packets of the queue path");
		return -1;
	}
	for (uint32_t i = 0; i < QUEUE_BURST; i++)
		q->in_message[i].msg_hdr = (struct msghdr){.msg_iov = &q->in_vector[i], .msg_iovlen = 1};
	if ((q->tun_fd = tun_open(why, why_bytes)) < 0)
		return -1;
	if ((status = bind_queue(q))) {
		snprintf(why, why_bytes, "netfilter queue %u cannot be used: %s; %s", QUEUE_FIRST,
			 strerror(-status),
			 status == -EPERM || status == -EBUSY
				 ? "another program has it, or the right to use it is missing"
				 : "a kernel with nfnetlink_queue is needed");
		return -1;
	}
	watch(q, q->fd);
	arp_open(q);
	return 0;
}

void queue_close(struct queue *q)
{
	for (uint32_t i = 0; i < q->n_arp; i++)
		arp_socket_close(&q->arp[i]);
	if (q->fd >= 0)
		close(q->fd);
	if (q->tun_fd >= 0)
		close(q->tun_fd);
	if (q->epoll_fd >= 0)
		close(q->epoll_fd);
	if (q->slots)
		munmap(q->slots, q->slots_bytes);
	free(q->answer);
	free(q->out_vector);
	*q = (struct queue){.fd = -1, .tun_fd = -1, .epoll_fd = -1};
}

bool queue_view(const struct queue *q, const struct route *route, uint32_t i, struct request_port *view)
{
	for (uint8_t iface = 0; iface < q->params.n_interfaces; iface++) {
		if (!is_queued(q, iface) || i-- > 0)
			continue;
		*view = (struct request_port){.name = q->params.interfaces[iface].name,
					      .up = route_interface_up(route, iface),
					      .queues = 1,
					      .rx_packets = q->received[iface],
					      .rx_bytes = q->received_bytes[iface],
					      .tx_packets = q->sent[iface],
					      .tx_bytes = q->sent_bytes[iface]};
		/* the kernel does not say for which interface: told with the first */
		if (iface == q->fallback)
			view->rx_missed = queue_overruns();
		return true;
	}
	return false;
}

/* Columns: queue number, listener, waiting, copy mode, copy range, dropped because full, dropped because our
 * socket was full, last id, 1. */
uint64_t queue_overruns(void)
{
	FILE *file = fopen("/proc/self/net/netfilter/nfnetlink_queue", "re");
	unsigned number;
	unsigned long long full, socket_full, total = 0;

	while (file &&
	       fscanf(file, "%u %*u %*u %*u %*u %llu %llu %*u %*u", &number, &full, &socket_full) == 3)
		if (number == QUEUE_FIRST)
			total = full + socket_full;
	if (file)
		fclose(file);
	return total;
}
