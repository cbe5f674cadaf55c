/* From worker to worker, without DPDK ports: a slot goes to its packet's owner, and the verdict that the
 * owner sends goes to the queue that the packet came from. The kernel wants it from the socket that has
 * bound that queue, and takes it from any thread. So nothing is copied and nothing enters the kernel
 * twice.
 *
 *     queue 0 --slot--> worker 0 --inbox--> worker 2 --verdict, by the socket of queue 0--> kernel
 *        ^                                     |
 *        +---------- returned (a list) --------+
 *
 * With DPDK ports what is handed over is a frame (worker.c), and slots stay with their worker.
 */
#include <rte_ring.h>
#include <stdlib.h>

#include "queue_internal.h"

#define INBOX_ENTRIES 2048u

/* ---- slots ---- */

void queue_slot_free(struct queue *q, struct queue_slot *slot)
{
	struct queue *owner = &q->params.peers[slot->queue];

	if (owner == q) {
		slot->next = q->free;
		q->free = slot;
		return;
	}
	/* only its owner takes from this list, and takes all of it: nothing can come back meanwhile (no ABA) */
	slot->next = atomic_load_explicit(&owner->returned, memory_order_relaxed);
	while (!atomic_compare_exchange_weak_explicit(&owner->returned, &slot->next, slot,
						      memory_order_release, memory_order_relaxed))
		;
}

struct queue_slot *queue_slot_take(struct queue *q)
{
	struct queue_slot *slot = q->free;

	if (!slot)
		slot = atomic_exchange_explicit(&q->returned, NULL, memory_order_acquire);
	if (slot)
		q->free = slot->next;
	return slot;
}

/* ---- inboxes ---- */

bool queue_inbox_open(struct queue *q)
{
	ssize_t bytes = rte_ring_get_memsize(INBOX_ENTRIES);

	if (q->params.n_peers == 1 || q->params.send)
		return true;
	q->handed = calloc(q->params.n_peers, sizeof *q->handed);
	q->inbox = aligned_alloc(RTE_CACHE_LINE_SIZE, (size_t)bytes);
	return q->handed && q->inbox && !rte_ring_init(q->inbox, "inbox", INBOX_ENTRIES, RING_F_SC_DEQ);
}

void queue_inbox_close(struct queue *q)
{
	free(q->handed);
	free(q->inbox);
}

static void flush_to(struct queue *q, uint32_t index)
{
	struct queue *owner = &q->params.peers[index];
	struct handed *handed = &q->handed[index];
	void *slot[NAT_BURST_MAX];
	uint32_t sent;

	for (uint32_t i = 0; i < handed->n; i++)
		slot[i] = handed->pkt[i].cookie;
	sent = rte_ring_mp_enqueue_burst(owner->inbox, slot, handed->n, NULL);
	for (uint32_t i = sent; i < handed->n; i++) {
		nat_engine_undo(q->params.thread->engine, &handed->pkt[i], NAT_REASON_HANDOVER_FULL);
		queue_answer(q, slot[i], 0 /* NF_DROP */, SEQ_DROP, NULL);
	}
	handed->n = 0;
	q->params.thread->handed_over += sent;
	if (owner != q)
		thread_wake(owner->params.thread);
}

void queue_hand_over_flush(struct queue *q)
{
	for (uint32_t i = 0; q->handed && i < q->params.n_peers; i++)
		if (q->handed[i].n)
			flush_to(q, i);
}

void queue_hand_over(struct queue *q, const struct nat_pkt *pkt)
{
	struct handed *handed = &q->handed[pkt->owner];
	struct queue_slot *slot = pkt->cookie;

	slot->l3 = pkt->l3;
	slot->len_bytes = pkt->len_bytes;
	slot->iface = pkt->iface;
	slot->flags = pkt->flags;
	slot->errand = pkt->errand;
	handed->pkt[handed->n] = *pkt;
	if (++handed->n == NAT_BURST_MAX)
		flush_to(q, pkt->owner);
}

uint32_t queue_take_over(struct queue *q, struct nat_pkt pkt[NAT_BURST_MAX])
{
	struct queue_slot *slot[NAT_BURST_MAX];
	uint32_t n = !q->inbox ? 0 : rte_ring_sc_dequeue_burst(q->inbox, (void **)slot, NAT_BURST_MAX, NULL);

	for (uint32_t i = 0; i < n; i++) {
		nat_pkt_present(&pkt[i], slot[i]->l3, slot[i]->len_bytes, slot[i], slot[i]->iface,
				slot[i]->flags | NAT_PKT_TAKEN_OVER);
		pkt[i].errand = slot[i]->errand;
	}
	q->params.thread->taken_over += n;
	return n;
}
