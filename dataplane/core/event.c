/* What happened, as records; readers outside turn them into lines and messages.
 *
 * Two ways out. The engine's own list holds what an operator must hear of: damped, few, taken by the
 * control thread on the worker's thread. A log ring holds the life of every session or mapping of the
 * pools that are logged: hundreds of thousands a second, taken by a thread of its own, so it is a ring
 * with one writer and one reader that never wait for each other. It lies in memory of the shell's and is
 * there only while something is logged.
 *
 * A record remembers that its beginning was told (NAT_RECORD_LOGGED), so its end is told too, whatever a
 * reload has done to its pool meanwhile: every create has one delete.
 */
#include "engine.h"

#include <string.h>

struct nat_event_ring {
	uint32_t mask;
	/* the writer's */
	NAT_ALIGNED _Atomic uint32_t head;
	uint32_t tail_seen; /* the reader was there at least */
	_Atomic uint64_t put[NAT_EVENT_KINDS], lost[NAT_EVENT_KINDS];
	/* the reader's */
	NAT_ALIGNED _Atomic uint32_t tail;
	NAT_ALIGNED struct nat_event event[];
};

void nat_event_put(struct nat_engine *e, const struct nat_event *event)
{
	struct nat_events *events = &e->events;

	if (events->n == NAT_EVENTS) {
		e->counters.events_lost++;
		return;
	}
	struct nat_event *slot = &events->event[(events->first + events->n++) % NAT_EVENTS];
	*slot = *event;
	slot->now_ns = e->now_ns;
}

bool nat_engine_event(struct nat_engine *e, struct nat_event *event)
{
	struct nat_events *events = &e->events;

	if (events->n == 0)
		return false;
	*event = events->event[events->first];
	events->first = (events->first + 1) % NAT_EVENTS;
	events->n--;
	return true;
}

/* ---- the log ring ---- */

size_t nat_event_ring_size(uint32_t n_events)
{
	return sizeof(struct nat_event_ring) + n_events * sizeof(struct nat_event);
}

struct nat_event_ring *nat_event_ring_init(void *mem, uint32_t n_events)
{
	struct nat_event_ring *ring = mem;

	NAT_ASSERT(n_events != 0 && (n_events & (n_events - 1)) == 0);
	memset(ring, 0, sizeof(*ring));
	ring->mask = n_events - 1;
	return ring;
}

/* Only one thread writes it, so it need not be an atomic addition. */
static void count_one(_Atomic uint64_t *counter)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1,
			      memory_order_relaxed);
}

void nat_event_log(struct nat_engine *e, const struct nat_event *event)
{
	struct nat_event_ring *ring = e->log;
	const uint32_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);

	if (NAT_UNLIKELY(head - ring->tail_seen > ring->mask)) {
		ring->tail_seen = atomic_load_explicit(&ring->tail, memory_order_acquire);
		if (head - ring->tail_seen > ring->mask) {
			count_one(&ring->lost[event->kind]);
			return;
		}
	}
	struct nat_event *slot = &ring->event[head & ring->mask];
	*slot = *event;
	slot->now_ns = e->now_ns;
	count_one(&ring->put[event->kind]);
	atomic_store_explicit(&ring->head, head + 1, memory_order_release);
}

uint32_t nat_event_ring_take(struct nat_event_ring *ring, struct nat_event *event, uint32_t n)
{
	const uint32_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
	const uint32_t ready = atomic_load_explicit(&ring->head, memory_order_acquire) - tail;

	if (n > ready)
		n = ready;
	for (uint32_t i = 0; i < n; i++)
		event[i] = ring->event[(tail + i) & ring->mask];
	atomic_store_explicit(&ring->tail, tail + n, memory_order_release);
	return n;
}

void nat_event_ring_counts(const struct nat_event_ring *ring, struct nat_event_counts *counts)
{
	for (uint32_t kind = 0; kind < NAT_EVENT_KINDS; kind++) {
		counts->put[kind] = atomic_load_explicit(&ring->put[kind], memory_order_relaxed);
		counts->lost[kind] = atomic_load_explicit(&ring->lost[kind], memory_order_relaxed);
	}
}

void nat_engine_log_to(struct nat_engine *e, struct nat_event_ring *ring)
{
	e->log = ring;
}

/* ---- the life of a record ---- */

/* Does a block or arithmetic tell already whose this port is? */
static bool port_is_told(const struct nat_pool *pool, const struct nat_session *s)
{
	const uint16_t port = NAT_NTOH16(s->out_port_be);

	if (s->flags & NAT_RECORD_STATIC)
		return false;
	if (s->flags & NAT_RECORD_UNDER_MAPPING)
		return true;
	if (pool->n_blocks != 0)
		return port >= pool->port_first &&
		       port < pool->port_first + pool->n_blocks * pool->block_ports;
	return pool->n_hosts != 0 && port < pool->dynamic_first;
}

static void tell(struct nat_engine *e, const struct nat_session *s, bool begins, bool implied)
{
	const bool mapping = (s->flags & NAT_RECORD_MAPPING) != 0;
	const struct nat_event event = {
		.inside_be = s->inside.local_be,
		.outside_be = s->out_addr_be,
		.remote_be = s->inside.remote_be,
		.inside_port_be = s->inside.local_port_be,
		.outside_port_be = s->out_port_be,
		.remote_port_be = s->inside.remote_port_be,
		.pool_id = s->pool_id,
		.kind = mapping ? (begins ? NAT_EVENT_MAPPING_CREATED : NAT_EVENT_MAPPING_ENDED)
				: (begins ? NAT_EVENT_SESSION_CREATED : NAT_EVENT_SESSION_ENDED),
		.protocol = s->inside.protocol,
		.implied = implied};
	nat_event_log(e, &event);
}

void nat_event_begins(struct nat_engine *e, struct nat_session *s)
{
	const uint32_t address = nat_policy_address(e->policy, s->out_addr_be);

	if (address == UINT32_MAX || s->inside.zero[0] != 0 || (s->flags & NAT_RECORD_LOGGED))
		return;
	const struct nat_pool *pool = &e->policy->pool[e->policy->address[address].pool];
	const bool implied = port_is_told(pool, s);
	if (!(pool->log & (implied ? NAT_LOG_SESSIONS : NAT_LOG_PORTS)))
		return;
	s->flags |= NAT_RECORD_LOGGED;
	tell(e, s, true, implied);
}

void nat_event_ends(struct nat_engine *e, const struct nat_session *s)
{
	const uint32_t address = nat_policy_address(e->policy, s->out_addr_be);
	const bool known = address != UINT32_MAX;

	tell(e, s, false,
	     (s->flags & NAT_RECORD_UNDER_MAPPING) ||
		     (known && port_is_told(&e->policy->pool[e->policy->address[address].pool], s)));
}
