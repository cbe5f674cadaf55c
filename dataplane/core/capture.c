/* A look at packets before and after translation (dsnatctl capture).
 *
 * The engine copies what a burst looks like before it is translated, and puts those packets that are
 * wanted into a ring with one writer (the worker) and one reader (the control thread) that never wait for
 * each other: what does not fit is lost and counted. Ring and copies lie in memory of the shell's that is
 * there only while somebody captures; without it a burst costs one branch.
 *
 * Which packets: the reasons that were asked for, then `wants` (the shell's filter) on the packet as it
 * came and as it left, then one in `sample`. Seen here is everything that the core decides: packets, what
 * the engine makes itself, held fragments when they are let go. What a shell loses afterwards (a full
 * transmit queue) is counted by reason, but no longer seen here. A packet that is handed over is shown by
 * its owner.
 *
 * A reader that is gone must not cost the worker for ever: `beats` counts its visits, and when it has not
 * come for NAT_CAPTURE_PATIENCE_S the worker lets go of the capture.
 */
#include <string.h>

#include "engine.h"

struct nat_capture {
	struct nat_capture_params params;
	uint32_t mask, slot_bytes;
	/* the worker's */
	NAT_ALIGNED _Atomic uint32_t head;
	uint32_t tail_seen, turn, beat_seen;
	uint64_t beat_ns;
	_Atomic uint64_t seen, matched, lost;
	_Atomic bool left;
	uint32_t length[NAT_BURST_MAX]; /* of the burst's packets when they came */
	/* the reader's */
	NAT_ALIGNED _Atomic uint32_t tail;
	_Atomic uint32_t beats;
	/* then a burst of copies, then the slots */
	NAT_ALIGNED uint8_t memory[];
};

static size_t slot_bytes(const struct nat_capture_params *params)
{
	return (sizeof(struct nat_captured) + 2 * params->snap_bytes + NAT_CACHE_LINE - 1) &
	       ~(size_t)(NAT_CACHE_LINE - 1);
}

static size_t copies_bytes(const struct nat_capture_params *params)
{
	return ((size_t)NAT_BURST_MAX * params->snap_bytes + NAT_CACHE_LINE - 1) &
	       ~(size_t)(NAT_CACHE_LINE - 1);
}

size_t nat_capture_size(const struct nat_capture_params *params)
{
	return sizeof(struct nat_capture) + copies_bytes(params) + params->n_slots * slot_bytes(params);
}

struct nat_capture *nat_capture_init(void *mem, const struct nat_capture_params *params)
{
	struct nat_capture *c = mem;

	NAT_ASSERT(params->n_slots != 0 && (params->n_slots & (params->n_slots - 1)) == 0);
	memset(c, 0, sizeof(*c));
	c->params = *params;
	c->mask = params->n_slots - 1;
	c->slot_bytes = (uint32_t)slot_bytes(params);
	return c;
}

static struct nat_captured *slot(struct nat_capture *c, uint32_t number)
{
	return (struct nat_captured *)(void *)(c->memory + copies_bytes(&c->params) +
					       (size_t)(number & c->mask) * c->slot_bytes);
}

void nat_engine_capture(struct nat_engine *e, struct nat_capture *c)
{
	e->capture = c;
	if (c)
		c->beat_ns = e->now_ns;
}

/* ---- the worker's side ---- */

/* Only one thread writes it, so it need not be an atomic addition. */
static void count_one(_Atomic uint64_t *counter)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1,
			      memory_order_relaxed);
}

bool nat_capture_wanted(struct nat_engine *e)
{
	struct nat_capture *c = e->capture;
	const uint32_t beats = atomic_load_explicit(&c->beats, memory_order_relaxed);

	if (beats != c->beat_seen) {
		c->beat_seen = beats;
		c->beat_ns = e->now_ns;
	}
	if (e->now_ns - c->beat_ns < NAT_CAPTURE_PATIENCE_S * UINT64_C(1000000000))
		return true;
	e->capture = NULL;
	atomic_store_explicit(&c->left, true, memory_order_release);
	return false;
}

void nat_capture_before(struct nat_engine *e, const struct nat_pkt *pkt, uint32_t n)
{
	struct nat_capture *c = e->capture;
	const uint32_t snap_bytes = c->params.snap_bytes;

	if (!nat_capture_wanted(e))
		return;
	for (uint32_t i = 0; i < n; i++) {
		c->length[i] = pkt[i].len_bytes;
		memcpy(c->memory + (size_t)i * snap_bytes, pkt[i].l3,
		       pkt[i].len_bytes < snap_bytes ? pkt[i].len_bytes : snap_bytes);
	}
}

static uint32_t least(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* `before` is NULL, or holds the first bytes of the packet as it came. */
static void put(struct nat_engine *e, const struct nat_pkt *pkt, const uint8_t *before, uint32_t before_bytes)
{
	struct nat_capture *c = e->capture;
	const uint32_t snap_bytes = c->params.snap_bytes;
	const bool leaves = pkt->verdict == NAT_FORWARD;
	/* behind the packet there may be padding of the link */
	const uint32_t total_bytes = pkt->made || pkt->total_bytes == 0 ? pkt->len_bytes : pkt->total_bytes;
	const uint32_t after_bytes = leaves ? least(total_bytes, pkt->len_bytes) : 0;

	count_one(&c->seen);
	if (c->params.by_reason && (leaves || !c->params.reason[pkt->reason]))
		return;
	if (c->params.wants &&
	    !(before &&
	      c->params.wants(c->params.context, before, before_bytes, least(before_bytes, snap_bytes))) &&
	    !(leaves && c->params.wants(c->params.context, pkt->l3, after_bytes, after_bytes)))
		return;
	if (++c->turn < c->params.sample)
		return;
	c->turn = 0;
	count_one(&c->matched);
	const uint32_t head = atomic_load_explicit(&c->head, memory_order_relaxed);
	if (head - c->tail_seen > c->mask) {
		c->tail_seen = atomic_load_explicit(&c->tail, memory_order_acquire);
		if (head - c->tail_seen > c->mask) {
			count_one(&c->lost);
			return;
		}
	}
	struct nat_captured *to = slot(c, head);
	*to = (struct nat_captured){.now_ns = e->now_ns,
				    .before_bytes = before_bytes,
				    .after_bytes = after_bytes,
				    .before_kept = least(before_bytes, snap_bytes),
				    .after_kept = least(after_bytes, snap_bytes),
				    .iface = pkt->iface,
				    .out_iface = leaves ? pkt->hop.iface : UINT8_MAX,
				    .verdict = pkt->verdict,
				    .reason = pkt->reason,
				    .made = pkt->made};
	if (before)
		memcpy(to->bytes, before, to->before_kept);
	memcpy(to->bytes + to->before_kept, pkt->l3, to->after_kept);
	atomic_store_explicit(&c->head, head + 1, memory_order_release);
}

void nat_capture_after(struct nat_engine *e, const struct nat_pkt *pkt, uint32_t n)
{
	struct nat_capture *c = e->capture;

	for (uint32_t i = 0; i < n; i++)
		if (pkt[i].verdict != NAT_HANDOVER)
			put(e, &pkt[i], c->memory + (size_t)i * c->params.snap_bytes, c->length[i]);
}

void nat_capture_late(struct nat_engine *e, const struct nat_pkt *pkt)
{
	/* a held fragment that is dropped still is as it came */
	if (pkt->verdict == NAT_DROP)
		put(e, pkt, pkt->l3, pkt->len_bytes);
	else
		put(e, pkt, NULL, 0);
}

/* ---- the reader's side ---- */

const struct nat_captured *nat_capture_peek(struct nat_capture *c)
{
	const uint32_t tail = atomic_load_explicit(&c->tail, memory_order_relaxed);

	if (atomic_load_explicit(&c->head, memory_order_acquire) == tail)
		return NULL;
	return slot(c, tail);
}

void nat_capture_release(struct nat_capture *c)
{
	atomic_store_explicit(&c->tail, atomic_load_explicit(&c->tail, memory_order_relaxed) + 1,
			      memory_order_release);
}

void nat_capture_visit(struct nat_capture *c)
{
	atomic_fetch_add_explicit(&c->beats, 1, memory_order_relaxed);
}

struct nat_capture_figures nat_capture_look(const struct nat_capture *c)
{
	return (struct nat_capture_figures){.seen = atomic_load_explicit(&c->seen, memory_order_relaxed),
					    .matched =
						    atomic_load_explicit(&c->matched, memory_order_relaxed),
					    .lost = atomic_load_explicit(&c->lost, memory_order_relaxed),
					    .left = atomic_load_explicit(&c->left, memory_order_acquire)};
}
