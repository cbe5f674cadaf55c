/* The loop of a worker, and what becomes of a packet.
 *
 *     rx burst --frame()--+-- IPv4 for us --> nat_engine_run() --settle()--+-- forward: MAC addresses, tx
 * burst
 *                         +-- ARP for a pool address: answered             +-- pass: twin
 *                         +-- the rest: twin                               +-- hold: the core has it
 *     nat_engine_next() --> settle() as well                               +-- handover: the owner's inbox
 *     inbox of others' handovers --> nat_engine_run()
 *     frames of the kernel (worker 0) --> tx burst
 *     netfilter queue, in a hybrid --> nat_engine_run() --> verdict, or a copy to a tx burst
 *
 * A next hop on an interface that the kernel owns (NAT_HOP_KERNEL) is reached through dsnat0.
 *
 * A busy worker makes no system call and takes no lock for a packet: time is read once a burst (vDSO), frames
 * for the kernel go through a ring, next hops are read from route.c's tables. The exception is a port with
 * fewer queues than there are workers, whose transmit lock is taken once a burst.
 *
 * Accounting: each packet received from a port ends in exactly one counter of the engine. What the shell
 * decides itself is told with nat_engine_bypass(), what it cannot deliver with nat_engine_undo(), what waits
 * for a neighbour with nat_engine_wait(). Frames from the kernel are not part of the equation; ports and
 * twins count them.
 *
 * An idle worker sleeps: after IDLE_ROUNDS empty rounds until a receive interrupt where all ports have them,
 * else for short times that double up to SLEEP_MAX_US. It never sleeps longer, so ageing and heartbeat go on.
 */
#include "worker.h"

#include <errno.h>
#include <rte_epoll.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_interrupts.h>
#include <rte_prefetch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "../arp.h"
#include "../rival.h"
#include "vlan.h"

#define BURST         32u
#define IDLE_ROUNDS   64u
#define SLEEP_MIN_US  20u
#define SLEEP_MAX_US  1000u
#define TICK_NS       1000000u
#define QUEUE_NS      20000u      /* how often a busy worker looks at its netfilter queue */
#define WAIT_NS       1000000000u /* how long a packet waits for a neighbour */
#define WAIT_ASK_NS   200000000u  /* how often the kernel is asked again */
#define WAIT_LOOK_NS  50000000u
#define INBOX_ENTRIES 2048u
#define ETHER_BYTES   ((uint16_t)sizeof(struct rte_ether_hdr))
#define ETHER_IPV4_BE RTE_BE16(RTE_ETHER_TYPE_IPV4)
#define ETHER_ARP_BE  RTE_BE16(RTE_ETHER_TYPE_ARP)

/* ---- out of a port ---- */

/* An advert finds a place also where answers to ARP wait. */
static uint32_t places_for(enum twin_class class)
{
	return class == TWIN_URGENT ? WORKER_LATE_MAX : class == TWIN_CONTROL ? WORKER_LATE_MAX / 2 : 0;
}

/* What a full queue of the port refuses is dropped, but for a few frames of the kernel that others wait
 * for: an advert is not to be lost in a flood that fills the link. They stay, and go before all others
 * next time. */
static void out_refused(struct worker *w, struct port *port, struct out *out, uint32_t sent)
{
	uint32_t kept = 0;

	for (uint32_t i = sent; i < out->n; i++) {
		struct rte_mbuf *m = out->m[i];

		if (out->pkt[i]) {
			nat_engine_undo(w->thread.engine, out->pkt[i], NAT_REASON_TX_FULL);
		} else if (atomic_load(&port->up) && kept < places_for(twin_class_of(m))) {
			out->m[kept] = m;
			out->pkt[kept++] = NULL;
			continue;
		} else {
			atomic_fetch_add(&port->twin_refused, 1);
		}
		rte_pktmbuf_free(m);
	}
	out->n = kept;
	w->late |= kept != 0;
}

static void out_flush(struct worker *w, uint32_t index)
{
	struct port *port = &w->ports->port[w->ports->port[index].first];
	struct out *out = &w->out[index];
	uint16_t queue = (uint16_t)(w->thread.index % port->n_queues), sent;

	if (port->shared_tx)
		rte_spinlock_lock(&port->tx_lock[queue]);
	sent = rte_eth_tx_burst(port->id, queue, out->m, (uint16_t)out->n);
	if (port->shared_tx)
		rte_spinlock_unlock(&port->tx_lock[queue]);
	if (sent < out->n)
		out_refused(w, port, out, sent);
	else
		out->n = 0;
}

/* ---- to other workers ---- */

static void hand_over_flush(struct worker *w, uint32_t index)
{
	struct worker *owner = &w->peers[index];
	struct handed *handed = &w->handed[index];
	void *m[NAT_BURST_MAX];
	uint32_t sent;

	for (uint32_t i = 0; i < handed->n; i++)
		m[i] = handed->pkt[i].cookie;
	sent = rte_ring_mp_enqueue_burst(owner->inbox, m, handed->n, NULL);
	for (uint32_t i = sent; i < handed->n; i++) {
		nat_engine_undo(w->thread.engine, &handed->pkt[i], NAT_REASON_HANDOVER_FULL);
		rte_pktmbuf_free(m[i]);
	}
	handed->n = 0;
	w->thread.handed_over += sent;
	if (owner != w)
		thread_wake(&owner->thread);
}

static void hand_over(struct worker *w, const struct nat_pkt *pkt, struct rte_mbuf *m)
{
	struct handed *handed = &w->handed[pkt->owner];

	*note_of(m) = (struct note){.iface = pkt->iface, .flags = pkt->flags, .errand = pkt->errand};
	handed->pkt[handed->n] = *pkt;
	handed->pkt[handed->n].cookie = m;
	if (++handed->n == NAT_BURST_MAX)
		hand_over_flush(w, pkt->owner);
}

static void flush_all(struct worker *w)
{
	for (uint32_t i = 0; w->n_workers > 1 && i < w->n_workers; i++)
		if (w->handed[i].n)
			hand_over_flush(w, i);
	for (uint32_t i = 0; i < w->ports->n; i++)
		if (w->out[i].n)
			out_flush(w, i);
	if (w->queue)
		queue_flush(w->queue);
}

/* `pkt` must stay until flush_all(). */
static void out_add(struct worker *w, uint32_t index, struct rte_mbuf *m, const struct nat_pkt *pkt)
{
	struct out *out = &w->out[index];

	if (w->ports->port[index].vlan && !vlan_push(m, w->ports->port[index].vlan)) {
		if (pkt)
			nat_engine_undo(w->thread.engine, pkt, NAT_REASON_NO_BUFFER);
		rte_pktmbuf_free(m);
		return;
	}
	out->m[out->n] = m;
	out->pkt[out->n] = pkt;
	if (++out->n == NAT_BURST_MAX)
		out_flush(w, index);
}

/* ---- to the kernel ---- */

static bool to_twin(struct worker *w, struct rte_mbuf *m, uint8_t reason)
{
	if (m->nb_segs > 1 && rte_pktmbuf_linearize(m))
		return false;
	/* a driver may have taken the VLAN tag out of the frame; the kernel's VLAN interfaces want it back */
	if (m->ol_flags & RTE_MBUF_F_RX_VLAN_STRIPPED && rte_vlan_insert(&m))
		return false;
	*note_of(m) = (struct note){.worker = (uint8_t)w->thread.index, .reason = reason};
	w->passed_something = true;
	return twin_pass(w->twins, w->thread.index, m, twin_class_of(m));
}

/* A frame that the core never sees. */
static void bypass(struct worker *w, struct rte_mbuf *m, enum nat_reason reason)
{
	if (to_twin(w, m, (uint8_t)reason)) {
		nat_engine_bypass(w->thread.engine, NAT_PASS, reason);
		return;
	}
	nat_engine_bypass(w->thread.engine, NAT_DROP, NAT_REASON_TWIN_FULL);
	rte_pktmbuf_free(m);
}

/* ---- waiting for a neighbour ---- */

static struct wait *wait_for(struct worker *w, const struct nat_hop *hop, uint64_t now_ns)
{
	struct wait *free_one = NULL;

	for (uint32_t i = 0; i < WORKER_WAITS; i++) {
		struct wait *wait = &w->wait[i];

		if (wait->n && wait->next_hop_be == hop->next_hop_be && wait->iface == hop->iface)
			return wait;
		if (!wait->n && !free_one)
			free_one = wait;
	}
	if (free_one) {
		free_one->next_hop_be = hop->next_hop_be;
		free_one->iface = hop->iface;
		free_one->until_ns = now_ns + WAIT_NS;
		free_one->ask_ns = now_ns + WAIT_ASK_NS;
		route_resolve(w->thread.route, hop->iface, hop->next_hop_be);
	}
	return free_one;
}

static void wait_add(struct worker *w, const struct nat_pkt *pkt, struct rte_mbuf *m, uint64_t now_ns)
{
	struct wait *wait = wait_for(w, &pkt->hop, now_ns);

	if (!wait || wait->n == WORKER_WAIT_EACH) {
		nat_engine_undo(w->thread.engine, pkt, NAT_REASON_NO_NEIGHBOUR);
		rte_pktmbuf_free(m);
		return;
	}
	w->n_waits += wait->n == 0;
	wait->pkt[wait->n] = *pkt;
	wait->pkt[wait->n++].cookie = m;
	nat_engine_wait(w->thread.engine, true);
}

static void transmit(struct worker *w, const struct nat_pkt *pkt, struct rte_mbuf *m, const uint8_t mac[6])
{
	uint32_t index = w->ports->of_iface[pkt->hop.iface];
	struct rte_ether_hdr *ether = rte_pktmbuf_mtod(m, struct rte_ether_hdr *);

	memcpy(&ether->dst_addr, mac, 6);
	ether->src_addr = w->ports->port[index].mac;
	ether->ether_type = ETHER_IPV4_BE;
	out_add(w, index, m, pkt);
}

static void waits_serve(struct worker *w, uint64_t now_ns)
{
	uint32_t generation = route_neighbour_generation(w->thread.route);

	if (generation == w->neighbour_generation && now_ns - w->waits_ns < WAIT_LOOK_NS)
		return;
	w->neighbour_generation = generation;
	w->waits_ns = now_ns;
	for (uint32_t i = 0; i < WORKER_WAITS; i++) {
		struct wait *wait = &w->wait[i];
		uint8_t mac[6];
		bool known;

		if (!wait->n)
			continue;
		known = route_neighbour(w->thread.route, wait->iface, wait->next_hop_be, mac);
		if (!known && now_ns >= wait->ask_ns) {
			wait->ask_ns = now_ns + WAIT_ASK_NS;
			route_resolve(w->thread.route, wait->iface, wait->next_hop_be);
		}
		if (!known && now_ns < wait->until_ns && !w->thread.stop)
			continue;
		for (uint32_t k = 0; k < wait->n; k++) {
			nat_engine_wait(w->thread.engine, false);
			if (known) {
				transmit(w, &wait->pkt[k], wait->pkt[k].cookie, mac);
				continue;
			}
			nat_engine_undo(w->thread.engine, &wait->pkt[k], NAT_REASON_NO_NEIGHBOUR);
			rte_pktmbuf_free(wait->pkt[k].cookie);
		}
		flush_all(w); /* before the packets' copies are reused */
		wait->n = 0;
		w->n_waits--;
	}
}

/* ---- verdicts ---- */

/* Its bytes are the engine's own or lie in a slot of the queue: give it a frame. */
static struct rte_mbuf *frame_for(struct worker *w, const struct nat_pkt *pkt)
{
	struct rte_mbuf *m = rte_pktmbuf_alloc(w->ports->pool);
	char *data = m ? rte_pktmbuf_append(m, (uint16_t)(ETHER_BYTES + pkt->len_bytes)) : NULL;

	if (!data) {
		rte_pktmbuf_free(m);
		return NULL;
	}
	memcpy(data + ETHER_BYTES, pkt->l3, pkt->len_bytes);
	return m;
}

/* In a slot of the queue. What another worker has handed over is a frame. */
static bool is_from_queue(const struct worker *w, const struct nat_pkt *pkt)
{
	return !pkt->made && w->ports->of_iface[pkt->iface] == PORT_NONE &&
	       !(pkt->flags & NAT_PKT_TAKEN_OVER);
}

/* To an interface that the kernel owns. One that the configuration does not name may get errors that the
 * engine made, but nothing translated: a pool belongs outside. */
static void to_kernel(struct worker *w, const struct nat_pkt *pkt)
{
	struct queue *queue = w->peers[0].queue;
	bool may = queue && (pkt->made || pkt->hop.iface < NAT_INTERFACES_MAX);

	if (!may)
		nat_engine_undo(w->thread.engine, pkt, NAT_REASON_NO_ROUTE);
	else if (!queue_inject(queue, pkt))
		nat_engine_undo(w->thread.engine, pkt, NAT_REASON_TX_FULL);
	if (!pkt->made)
		rte_pktmbuf_free(pkt->cookie);
}

static void to_port(struct worker *w, const struct nat_pkt *pkt, uint64_t now_ns)
{
	struct rte_mbuf *m = pkt->made || is_from_queue(w, pkt) ? frame_for(w, pkt) : pkt->cookie;
	enum nat_reason reason = NAT_REASON_OK;
	uint32_t index = pkt->hop.iface < NAT_INTERFACES_MAX ? w->ports->of_iface[pkt->hop.iface] : PORT_NONE;
	uint8_t mac[6];

	/* cut to the MTU: its other fragments follow on their own */
	if (m && rte_pktmbuf_data_len(m) > ETHER_BYTES + pkt->len_bytes)
		rte_pktmbuf_trim(m, (uint16_t)(rte_pktmbuf_data_len(m) - ETHER_BYTES - pkt->len_bytes));
	if (!m)
		reason = NAT_REASON_NO_BUFFER;
	else if (pkt->hop.kind != NAT_HOP_FORWARD || index == PORT_NONE)
		reason = NAT_REASON_NO_ROUTE;
	else if (!atomic_load_explicit(&w->ports->port[index].up, memory_order_relaxed))
		reason = NAT_REASON_LINK_DOWN;
	if (reason != NAT_REASON_OK) {
		nat_engine_undo(w->thread.engine, pkt, reason);
		rte_pktmbuf_free(m);
	} else if (route_neighbour(w->thread.route, pkt->hop.iface, pkt->hop.next_hop_be, mac)) {
		transmit(w, pkt, m, mac);
	} else {
		wait_add(w, pkt, m, now_ns);
	}
}

static void forward(struct worker *w, const struct nat_pkt *pkt, uint64_t now_ns)
{
	if (pkt->hop.kind == NAT_HOP_KERNEL)
		to_kernel(w, pkt);
	else
		to_port(w, pkt, now_ns);
}

/* queue_params.send */
void worker_send(void *worker, const struct nat_pkt *pkt, uint64_t now_ns)
{
	to_port(worker, pkt, now_ns);
}

/* The kernel is told to drop it, and the owner gets a copy. */
static void hand_over_queued(struct worker *w, const struct nat_pkt *pkt, uint64_t now_ns)
{
	struct rte_mbuf *m = frame_for(w, pkt);

	if (m) {
		hand_over(w, pkt, m);
		queue_steal(w->queue, pkt);
	} else {
		queue_settle(w->queue, pkt, now_ns);
	}
}

static void settle(struct worker *w, const struct nat_pkt *pkt, uint64_t now_ns)
{
	if (is_from_queue(w, pkt)) {
		if (pkt->verdict == NAT_HANDOVER)
			hand_over_queued(w, pkt, now_ns);
		else
			queue_settle(w->queue, pkt, now_ns);
		return;
	}
	switch ((enum nat_verdict)pkt->verdict) {
	case NAT_FORWARD:
		forward(w, pkt, now_ns);
		break;
	case NAT_PASS:
		/* what came over the queue path was to be passed there already, before it was handed over */
		if (w->ports->of_iface[pkt->iface] != PORT_NONE && to_twin(w, pkt->cookie, pkt->reason))
			break;
		nat_engine_undo(w->thread.engine, pkt, NAT_REASON_TWIN_FULL);
		/* fall through */
	case NAT_DROP:
		rte_pktmbuf_free(pkt->cookie); /* NULL for a made one: nothing to free */
		break;
	case NAT_HOLD:
		break;
	case NAT_HANDOVER:
		hand_over(w, pkt, pkt->cookie);
		break;
	}
}

/* Packets that the engine made, and held ones that it lets go. */
static void drain(struct worker *w, uint64_t now_ns)
{
	struct nat_pkt pkt[BURST];
	uint32_t n;

	do {
		for (n = 0; n < BURST && nat_engine_next(w->thread.engine, &pkt[n]); n++)
			settle(w, &pkt[n], now_ns);
		flush_all(w);
	} while (n == BURST);
}

static void translate(struct worker *w, struct nat_pkt *pkt, uint32_t n, uint64_t now_ns)
{
	nat_engine_run(w->thread.engine, pkt, n, now_ns);
	w->run_ns = now_ns;
	for (uint32_t i = 0; i < n; i++)
		settle(w, &pkt[i], now_ns);
	flush_all(w);
	drain(w, now_ns);
}

/* ---- in from a port ---- */

static void present(struct nat_pkt *pkt, struct rte_mbuf *m, uint8_t iface, uint16_t flags)
{
	if ((m->ol_flags & RTE_MBUF_F_RX_IP_CKSUM_MASK) == RTE_MBUF_F_RX_IP_CKSUM_GOOD)
		flags |= NAT_PKT_IP_CSUM_GOOD;
	nat_pkt_present(pkt, rte_pktmbuf_mtod_offset(m, uint8_t *, ETHER_BYTES),
			rte_pktmbuf_data_len(m) - ETHER_BYTES, m, iface, flags);
}

static void arp(struct worker *w, struct port *port, struct rte_mbuf *m)
{
	uint8_t *frame = rte_pktmbuf_mtod(m, uint8_t *);
	uint32_t asked_be = arp_asked_for(frame, rte_pktmbuf_data_len(m));

	rival_note(&w->thread, frame, rte_pktmbuf_data_len(m), port->iface, port->mac.addr_bytes);
	if (!asked_be || !arp_is_ours(w->thread.plan, w->thread.route, port->iface, asked_be)) {
		bypass(w, m, NAT_REASON_NOT_IPV4);
		return;
	}
	arp_answer(frame, port->mac.addr_bytes);
	nat_engine_bypass(w->thread.engine, NAT_PASS, NAT_REASON_ARP_ANSWERED);
	out_add(w, port->index, m, NULL);
}

/* One frame: into `pkt` (true), or done with (false). */
static bool frame(struct worker *w, struct port *port, struct rte_mbuf *m, struct nat_pkt *pkt)
{
	const struct rte_ether_hdr *ether = rte_pktmbuf_mtod(m, const struct rte_ether_hdr *);

	if (m->nb_segs > 1 && rte_pktmbuf_linearize(m)) {
		nat_engine_bypass(w->thread.engine, NAT_DROP, NAT_REASON_NO_BUFFER);
		rte_pktmbuf_free(m);
		return false;
	}
	if (rte_pktmbuf_data_len(m) < ETHER_BYTES) { /* from a driver whose other end is a program */
		nat_engine_bypass(w->thread.engine, NAT_DROP, NAT_REASON_TRUNCATED);
		rte_pktmbuf_free(m);
		return false;
	}
	if (port->takes_tags && !(port = vlan_port(w->ports, port, m))) {
		nat_engine_bypass(w->thread.engine, NAT_DROP, NAT_REASON_OTHER_HOST);
		rte_pktmbuf_free(m);
		return false;
	}
	m->port = port->index;
	ether = rte_pktmbuf_mtod(m, const struct rte_ether_hdr *);
	if (ether->ether_type == ETHER_ARP_BE && !(m->ol_flags & RTE_MBUF_F_RX_VLAN_STRIPPED)) {
		arp(w, port, m);
		return false;
	}
	if (ether->ether_type != ETHER_IPV4_BE || m->ol_flags & RTE_MBUF_F_RX_VLAN_STRIPPED) {
		bypass(w, m, NAT_REASON_NOT_IPV4);
		return false;
	}
	if (rte_is_multicast_ether_addr(
		    &ether->dst_addr)) { /* RFC 1812 5.3.4: such a frame is never forwarded */
		bypass(w, m, NAT_REASON_GROUP);
		return false;
	}
	if (!rte_is_same_ether_addr(&ether->dst_addr, &port->mac)) {
		nat_engine_bypass(w->thread.engine, NAT_DROP, NAT_REASON_OTHER_HOST);
		rte_pktmbuf_free(m);
		return false;
	}
	present(pkt, m, port->iface, 0);
	return true;
}

static uint32_t receive(struct worker *w, struct port *port, uint64_t now_ns)
{
	struct rte_mbuf *m[BURST];
	struct nat_pkt pkt[BURST];
	uint32_t n, n_pkt = 0;

	if (port->first != port->index || w->thread.index >= port->n_queues)
		return 0; /* more workers than queues: others receive and hand over */
	n = rte_eth_rx_burst(port->id, (uint16_t)w->thread.index, m, BURST);
	for (uint32_t i = 0; i < n; i++) {
		if (i + 1 < n)
			rte_prefetch0(rte_pktmbuf_mtod(m[i + 1], void *));
		n_pkt += frame(w, port, m[i], &pkt[n_pkt]);
	}
	if (n_pkt)
		translate(w, pkt, n_pkt, now_ns);
	else if (n)
		flush_all(w);
	w->thread.bursts += n != 0;
	w->thread.packets += n;
	return n;
}

static uint32_t take_over(struct worker *w, uint64_t now_ns)
{
	struct rte_mbuf *m[BURST];
	struct nat_pkt pkt[BURST];
	uint32_t n = rte_ring_sc_dequeue_burst(w->inbox, (void **)m, BURST, NULL);

	for (uint32_t i = 0; i < n; i++) {
		const struct note *note = note_of(m[i]);

		present(&pkt[i], m[i], note->iface, note->flags | NAT_PKT_TAKEN_OVER);
		pkt[i].errand = note->errand;
	}
	if (n)
		translate(w, pkt, n, now_ns);
	w->thread.taken_over += n;
	return n;
}

static uint32_t from_kernel(struct worker *w)
{
	struct rte_mbuf *m[BURST];
	uint32_t n = w->thread.index ? 0 : rte_ring_sc_dequeue_burst(w->twins->from, (void **)m, BURST, NULL);

	for (uint32_t i = 0; i < n; i++)
		out_add(w, m[i]->port, m[i], NULL);
	if (n)
		flush_all(w);
	return n;
}

/* To look costs a system call, so while there are frames it is done less often. */
static uint32_t receive_queue(struct worker *w, bool has_frames, uint64_t now_ns)
{
	struct nat_pkt pkt[QUEUE_BURST];
	uint32_t n;

	if (!w->queue || (has_frames && now_ns - w->queue_ns < QUEUE_NS))
		return 0;
	w->queue_ns = now_ns;
	n = queue_receive(w->queue, pkt, now_ns);
	if (n)
		translate(w, pkt, n, now_ns);
	return n;
}

/* ---- the loop ---- */

static uint32_t round_of(struct worker *w, uint64_t now_ns)
{
	uint32_t n = 0;

	thread_between_bursts(&w->thread, now_ns);
	for (uint32_t i = 0; i < w->ports->n; i++)
		n += receive(w, &w->ports->port[i], now_ns);
	n += take_over(w, now_ns);
	n += from_kernel(w);
	if (w->late) {
		w->late = false;
		flush_all(w);
	}
	n += receive_queue(w, n > 0, now_ns);
	if (now_ns - w->run_ns >= TICK_NS) {
		nat_engine_tick(w->thread.engine, now_ns);
		w->run_ns = now_ns;
		drain(w, now_ns);
	}
	if (w->n_waits)
		waits_serve(w, now_ns);
	if (w->passed_something) {
		w->passed_something = false;
		twins_wake(w->twins);
	}
	return n;
}

static bool pending(void *context)
{
	struct worker *w = context;

	return !rte_ring_empty(w->inbox) || (!w->thread.index && !rte_ring_empty(w->twins->from)) ||
	       (w->n_waits && route_neighbour_generation(w->thread.route) != w->neighbour_generation);
}

static void interrupts(struct worker *w, bool on)
{
	for (uint32_t i = 0; i < w->ports->n; i++) {
		const struct port *port = &w->ports->port[i];

		if (!port->interrupts || port->first != i || w->thread.index >= port->n_queues)
			continue;
		if (on)
			rte_eth_dev_rx_intr_enable(port->id, (uint16_t)w->thread.index);
		else
			rte_eth_dev_rx_intr_disable(port->id, (uint16_t)w->thread.index);
	}
}

static void idle(struct worker *w, uint32_t rounds)
{
	uint32_t doubled = (rounds - IDLE_ROUNDS) / 4;
	uint32_t wait_us = doubled < 6 ? SLEEP_MIN_US << doubled : SLEEP_MAX_US;
	uint64_t start_ns = thread_clock_ns();
	int queue_fd = w->queue ? w->queue->epoll_fd : -1;

	if (w->interrupt_fd >= 0) {
		struct rte_epoll_event event[8];

		interrupts(w, true);
		if (!round_of(w, start_ns)) /* what came before the interrupt was on */
			thread_sleep(&w->thread, w->interrupt_fd, queue_fd, wait_us, pending, w);
		(void)rte_epoll_wait(w->interrupt_fd, event, RTE_DIM(event), 0);
		interrupts(w, false);
	} else {
		thread_sleep(&w->thread, -1, queue_fd, wait_us, pending, w);
	}
	w->thread.idle_ns += thread_clock_ns() - start_ns;
}

int worker_run(void *argument)
{
	struct worker *w = argument;
	uint32_t idle_rounds = 0;
	uint64_t worked_ns = 0; /* since when, if the last round had packets */
	uint64_t start_ns = thread_clock_ns();

	prctl(PR_SET_TIMERSLACK, 1000); /* ns: the default of 50 us would be most of a short sleep */
	while (!atomic_load_explicit(&w->thread.stop, memory_order_relaxed)) {
		uint64_t now_ns = thread_clock_ns();

		if (worked_ns)
			w->thread.work_ns += now_ns - worked_ns;
		worked_ns = 0;
		if (round_of(w, now_ns)) {
			idle_rounds = 0;
			worked_ns = now_ns;
		} else if (++idle_rounds > IDLE_ROUNDS) {
			idle(w, idle_rounds);
		}
		w->thread.busy_ns = now_ns - start_ns - w->thread.idle_ns;
	}
	w->waits_ns = 0;
	waits_serve(w, thread_clock_ns()); /* stop is set: all that waits is let go */
	for (uint32_t i = 0; i < w->ports->n; i++)
		rte_pktmbuf_free_bulk(w->out[i].m, w->out[i].n); /* what its port has refused to the end */
	return 0;
}

/* ---- set-up ---- */

static int interrupts_open(struct worker *w)
{
	uint32_t with = 0;

	for (uint32_t i = 0; i < w->ports->n; i++)
		with += w->ports->port[i].interrupts && w->thread.index < w->ports->port[i].n_queues;
	/* a port without them must be polled in short intervals anyway */
	if (!with || with < w->ports->n || (w->interrupt_fd = epoll_create1(EPOLL_CLOEXEC)) < 0)
		return -1;
	for (uint32_t i = 0; i < w->ports->n; i++)
		if (w->ports->port[i].first == i &&
		    rte_eth_dev_rx_intr_ctl_q(w->ports->port[i].id, (uint16_t)w->thread.index,
					      w->interrupt_fd, RTE_INTR_EVENT_ADD, NULL)) {
			close(w->interrupt_fd);
			return -1;
		}
	return w->interrupt_fd;
}

int worker_open(struct worker *w, struct worker *peers, uint32_t n_workers, struct ports *ports,
		struct twins *twins, char *why, size_t why_bytes)
{
	char name[32];

	w->ports = ports;
	w->twins = twins;
	w->peers = peers;
	w->n_workers = n_workers;
	w->interrupt_fd = interrupts_open(w);
	twins->worker[w->thread.index] = &w->thread;
	snprintf(name, sizeof name, "inbox-%u", w->thread.index);
	w->handed = calloc(n_workers, sizeof *w->handed);
	w->inbox = !w->handed ? NULL : rte_ring_create(name, INBOX_ENTRIES, SOCKET_ID_ANY, RING_F_SC_DEQ);
	if (w->inbox)
		return 0;
	snprintf(why, why_bytes, "no memory for the inbox of worker %u: %s", w->thread.index,
		 rte_strerror(rte_errno));
	return -1;
}

void worker_close(struct worker *w)
{
	if (w->interrupt_fd >= 0)
		close(w->interrupt_fd);
	w->interrupt_fd = -1;
	free(w->handed);
	w->handed = NULL;
}
