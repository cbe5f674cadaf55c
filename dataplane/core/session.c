/* Records: making, finding, booking and ending them. See session.h. */
#include "session.h"

#include <string.h>

#include "engine.h"

/* ---- free records ---- */

/* A list of the records that this worker has too many of, for whoever has too few. */
static void share_free(struct nat_engine *e)
{
	struct nat_workers *workers = e->workers;
	const uint32_t n = workers->free_list_records, first = e->free_record[e->n_free - n];
	uint64_t head = atomic_load(&workers->free_lists), next;

	for (uint32_t i = 0; i < n; i++) {
		const uint32_t record = e->free_record[e->n_free - n + i];
		e->record[record].next = i + 1 < n ? e->free_record[e->n_free - n + i + 1] : NAT_NO_RECORD;
	}
	e->n_free -= n;
	do {
		e->record[first].previous = (uint32_t)head;
		next = ((head >> 32) + 1) << 32 | (first + 1);
	} while (!atomic_compare_exchange_weak(&workers->free_lists, &head, next));
}

static bool take_shared(struct nat_engine *e)
{
	struct nat_workers *workers = e->workers;
	uint64_t head = atomic_load(&workers->free_lists), next;
	uint32_t record;

	do {
		if ((uint32_t)head == 0)
			return false;
		record = (uint32_t)head - 1;
		/* may be in use again by now: then the count has moved on, and the exchange fails */
		next = ((head >> 32) + 1) << 32 | e->record[record].previous;
	} while (!atomic_compare_exchange_weak(&workers->free_lists, &head, next));
	for (; record != NAT_NO_RECORD && e->n_free < e->free_room; record = e->record[record].next)
		e->free_record[e->n_free++] = record;
	return true;
}

static void give_back(struct nat_engine *e, uint32_t record)
{
	/* More than this worker may use: after a restart with more workers one can own too many. */
	if (e->n_free < e->free_room)
		e->free_record[e->n_free++] = record;
	if (e->workers && e->n_free >= 2 * e->workers->free_list_records)
		share_free(e);
}

static bool lease_chunk(struct nat_engine *e)
{
	if (e->workers && take_shared(e))
		return true;
	uint32_t chunk = atomic_fetch_add(&e->table->chunks_leased, 1);
	if (chunk >= e->table->n_chunks) {
		atomic_store(&e->table->chunks_leased, e->table->n_chunks);
		return false;
	}
	for (uint32_t i = NAT_CHUNK; i-- > 0;)
		give_back(e, chunk * NAT_CHUNK + i);
	return true;
}

void nat_session_fetch_free(const struct nat_engine *e, uint32_t n)
{
	for (uint32_t i = 1; i <= n && i <= e->n_free; i++)
		NAT_PREFETCH(&e->record[e->free_record[e->n_free - i]]);
}

/* ---- making and ending ---- */

static bool under_mapping(const struct nat_session *s)
{
	return (s->flags & (NAT_RECORD_MAPPING | NAT_RECORD_UNDER_MAPPING)) == NAT_RECORD_UNDER_MAPPING;
}

uint32_t nat_session_mapping(struct nat_engine *e, const struct nat_session *s)
{
	struct nat_tuple key = s->inside;
	key.remote_be = 0;
	key.remote_port_be = 0;
	return nat_index_find(&e->index, &key, nat_tuple_hash(&e->index.key, &key));
}

/* Counts the sessions of a mapping towards one remote address, in a record of its own. Without room for that
 * record the address is not permitted: strict, and never wrong. */
static struct nat_tuple permit_key(const struct nat_tuple *inside, uint32_t remote_be)
{
	struct nat_tuple key = *inside;
	key.remote_be = remote_be;
	key.remote_port_be = 0;
	key.zero[0] = 1;
	return key;
}

static uint32_t find_permit(struct nat_engine *e, const struct nat_tuple *inside, uint32_t remote_be)
{
	const struct nat_tuple key = permit_key(inside, remote_be);
	return nat_index_find(&e->index, &key, nat_tuple_hash(&e->index.key, &key));
}

static void add_permit(struct nat_engine *e, uint32_t record)
{
	struct nat_session *s = &e->record[record];
	uint32_t permit = find_permit(e, &s->inside, s->inside.remote_be);

	if (permit == NAT_NO_RECORD) {
		struct nat_session want = {.inside = permit_key(&s->inside, s->inside.remote_be),
					   .out_addr_be = s->out_addr_be,
					   .out_port_be = s->out_port_be,
					   .zone_id = s->zone_id,
					   .pool_id = s->pool_id,
					   .flags = NAT_RECORD_MAPPING,
					   .timer = s->timer};
		permit = nat_session_create(e, &want);
	}
	if (permit != NAT_NO_RECORD)
		e->record[permit].references++;
	else
		s->flags &= (uint8_t)~NAT_RECORD_PERMITS;
}

static void remove_permit(struct nat_engine *e, const struct nat_session *s)
{
	uint32_t permit = find_permit(e, &s->inside, s->inside.remote_be);
	if (permit != NAT_NO_RECORD && --e->record[permit].references == 0)
		nat_session_end(e, permit);
}

bool nat_session_permits(struct nat_engine *e, const struct nat_session *mapping, uint32_t remote_be)
{
	return find_permit(e, &mapping->inside, remote_be) != NAT_NO_RECORD;
}

static void count_session(struct nat_engine *e, const struct nat_session *s, int by)
{
	uint32_t address = nat_policy_address(e->policy, s->out_addr_be);

	e->counters.sessions += (uint64_t)(int64_t)by;
	if (address != UINT32_MAX)
		e->notes->address[address].sessions += (uint64_t)(int64_t)by;
}

/* A mapping that owns a port: not a count of permits. */
static void count_mapping(struct nat_engine *e, const struct nat_session *s, int by)
{
	const uint32_t address = nat_policy_address(e->policy, s->out_addr_be);

	if (address != UINT32_MAX && s->inside.zero[0] == 0)
		e->notes->address[address].mappings[nat_traffic_kind(s->inside.protocol)] +=
			(uint64_t)(int64_t)by;
}

static bool insert(struct nat_index *index, uint64_t hash, uint32_t record, uint8_t side)
{
	return NAT_LIKELY(nat_bucket_put(nat_index_bucket(index, hash), nat_index_tag(hash),
					 record << 1 | side, false)) ||
	       nat_index_insert(index, hash, record, side);
}

static bool index_under(struct nat_engine *e, uint32_t record, uint64_t inside_hash, uint64_t outside_hash)
{
	if (!insert(&e->index, inside_hash, record, 0))
		return false;
	if (insert(&e->index, outside_hash, record, 1))
		return true;
	nat_index_remove(&e->index, inside_hash, record, 0);
	return false;
}

static bool index_both(struct nat_engine *e, uint32_t record)
{
	const struct nat_session *s = &e->record[record];
	const struct nat_tuple outside = nat_session_outside(s);

	return index_under(e, record, nat_tuple_hash(&e->index.key, &s->inside),
			   nat_tuple_hash(&e->index.key, &outside));
}

/* All but what makes it count. */
NAT_ALWAYS_INLINE void fill(const struct nat_engine *e, struct nat_session *s, const struct nat_session *want)
{
	/* Field by field, as `want` was just written: a copy in large words would wait for all of those
	 * stores. */
	s->inside = want->inside;
	s->out_addr_be = want->out_addr_be;
	s->out_port_be = want->out_port_be;
	s->zone_id = want->zone_id;
	s->pool_id = want->pool_id;
	s->slot = NAT_OFF_WHEEL;
	s->flags = want->flags;
	s->state = want->state;
	s->worker = (uint8_t)e->worker;
	s->created_s = s->last_seen_s = e->now_s;
	s->bytes_out = want->bytes_out;
	s->bytes_in = want->bytes_in;
}

/* From here on the record, which is the next free one, counts, also for a process that comes after this one. */
NAT_ALWAYS_INLINE void publish(struct nat_engine *e, struct nat_session *s, uint8_t timer)
{
	e->n_free--;
	e->records_left--;
	atomic_signal_fence(memory_order_release);
	*(volatile uint8_t *)&s->timer = timer;
	e->counters.records++;
}

static void count_created(struct nat_engine *e, const struct nat_session *s)
{
	e->counters.sessions_created++;
	e->counters.traffic[nat_traffic_kind(s->inside.protocol)].sessions_created++;
}

uint32_t nat_session_create(struct nat_engine *e, const struct nat_session *want)
{
	if (e->records_left == 0 || (e->n_free == 0 && !lease_chunk(e)))
		return NAT_NO_RECORD;
	const uint32_t record = e->free_record[e->n_free - 1];
	struct nat_session *s = &e->record[record];

	fill(e, s, want);
	if (!index_both(e, record))
		return NAT_NO_RECORD;
	publish(e, s, want->timer);
	if (nat_session_owns_port(s))
		nat_block_count(e, s, true);
	if (NAT_UNLIKELY(e->log) && e->trial == NAT_TRIAL_NONE && !(s->state & NAT_STATE_FOREIGN))
		nat_event_begins(e, s);
	if (s->flags & NAT_RECORD_MAPPING) {
		count_mapping(e, s, 1);
		return record;
	}
	if (NAT_UNLIKELY(e->replicas.n_words) && e->trial == NAT_TRIAL_NONE)
		nat_replica_begins(e, record);
	nat_wheel_hang(e, record);
	count_session(e, s, 1);
	if (e->workers)
		nat_away_count(e, s, s->state & NAT_STATE_FOREIGN ? NAT_AWAY_ADOPTED : NAT_AWAY_BORROWED);
	count_created(e, s);
	if (s->flags & NAT_RECORD_PERMITS)
		add_permit(e, record);
	return record;
}

uint32_t nat_session_begin(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_plan *plan)
{
	const struct nat_zone *zone = &e->policy->zone[pkt->zone];
	const struct nat_session want = {.inside = pkt->tuple,
					 .out_addr_be = plan->address_be,
					 .out_port_be = plan->port_be,
					 .zone_id = zone->id,
					 .pool_id = e->policy->pool[zone->config.pool].id};

	if (NAT_UNLIKELY(e->records_left == 0 || e->n_free == 0))
		return NAT_NO_RECORD;
	const uint32_t record = e->free_record[e->n_free - 1];
	struct nat_session *s = &e->record[record];

	fill(e, s, &want);
	if (NAT_UNLIKELY(!index_under(e, record, pkt->hash, plan->hash)))
		return NAT_NO_RECORD;
	publish(e, s, (uint8_t)nat_first_timer(e, pkt));
	if (NAT_UNLIKELY(e->log))
		nat_event_begins(e, s);
	if (NAT_UNLIKELY(e->replicas.n_words))
		nat_replica_begins(e, record);
	nat_wheel_hang(e, record);
	e->counters.sessions++;
	e->notes->address[plan->address].sessions++;
	count_created(e, s);
	return record;
}

void nat_session_leave(struct nat_engine *e, uint32_t mapping)
{
	struct nat_session *m = &e->record[mapping];

	if (m->references > 0)
		return;
	const uint32_t most = e->policy->limits.held_ports;
	const bool ours = nat_policy_address(e->policy, m->out_addr_be) != UINT32_MAX;
	if (ours && (m->flags & NAT_RECORD_HOLDS) && e->timeout_s[NAT_TIMER_HOLD] > 0 &&
	    (most == 0 || e->mappings_held < most)) {
		e->mappings_held++;
		m->timer = NAT_TIMER_HOLD;
		m->last_seen_s = e->now_s;
		nat_wheel_hang(e, mapping);
	} else {
		nat_session_end(e, mapping);
	}
}

void nat_session_resume(struct nat_engine *e, uint32_t mapping, enum nat_timer timer)
{
	if (e->record[mapping].timer != NAT_TIMER_HOLD)
		return;
	e->mappings_held--;
	nat_wheel_take(e, mapping);
	e->record[mapping].timer = (uint8_t)timer;
}

void nat_session_lapse(struct nat_engine *e, uint32_t mapping)
{
	struct nat_session *m = &e->record[mapping];

	m->flags &= (uint8_t)~NAT_RECORD_ASKED;
	m->state = 0;
	m->nonce = 0;
	m->last_seen_s = e->now_s;
	nat_wheel_take(e, mapping);
	nat_host_remove(e, m->inside.local_be, m->out_addr_be);
	m->references--;
	nat_session_leave(e, mapping);
}

void nat_session_end(struct nat_engine *e, uint32_t record)
{
	struct nat_session *s = &e->record[record];
	const struct nat_session gone = *s;
	const struct nat_tuple outside = nat_session_outside(&gone);

	NAT_ASSERT(gone.timer != NAT_TIMER_FREE);
	e->mappings_held -= gone.timer == NAT_TIMER_HOLD;
	*(volatile uint8_t *)&s->timer = NAT_TIMER_FREE;
	atomic_signal_fence(memory_order_release);
	nat_index_remove(&e->index, nat_tuple_hash(&e->index.key, &gone.inside), record, 0);
	nat_index_remove(&e->index, nat_tuple_hash(&e->index.key, &outside), record, 1);
	nat_wheel_take(e, record);
	give_back(e, record);
	e->records_left++;
	if (gone.flags & NAT_RECORD_TRACKED)
		nat_port_release(e, &gone);
	if (NAT_UNLIKELY(e->log) && (gone.flags & NAT_RECORD_LOGGED) && !(gone.state & NAT_STATE_FOREIGN))
		nat_event_ends(e, &gone);
	if (nat_session_owns_port(&gone))
		nat_block_count(e, &gone, false);
	e->counters.records--;
	if (gone.flags & NAT_RECORD_MAPPING) {
		count_mapping(e, &gone, -1);
		return;
	}
	if (NAT_UNLIKELY(e->replicas.n_words))
		nat_replica_ends(e, record);
	count_session(e, &gone, -1);
	if (e->workers)
		nat_away_count(e, &gone, NAT_AWAY_ENDS);
	nat_host_remove(e, gone.inside.local_be, gone.out_addr_be);
	if (gone.flags & NAT_RECORD_PERMITS)
		remove_permit(e, &gone);
	if (under_mapping(&gone)) {
		uint32_t mapping = nat_session_mapping(e, &gone);
		NAT_ASSERT(mapping != NAT_NO_RECORD && e->record[mapping].references > 0);
		e->record[mapping].references--;
		nat_session_leave(e, mapping);
	}
}

/* ---- finding ---- */

uint32_t nat_session_find(struct nat_engine *e, const struct nat_tuple *tuple, uint64_t hash)
{
	uint32_t record = nat_index_find(&e->index, tuple, hash);

	if (record == NAT_NO_RECORD || NAT_LIKELY(!nat_session_over(e, &e->record[record])))
		return record;
	if (e->trial == NAT_TRIAL_CANDIDATE)
		return NAT_NO_RECORD;
	if (e->record[record].flags & NAT_RECORD_ASKED) {
		nat_session_lapse(e, record);
		return nat_session_find(e, tuple, hash);
	}
	e->counters.sessions_expired += !(e->record[record].flags & NAT_RECORD_MAPPING);
	nat_session_end(e, record);
	return NAT_NO_RECORD;
}

void nat_session_lookup(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (pkt[i].settled)
			continue;
		const struct nat_session *s = &e->record[pkt[i].guess];
		if (NAT_LIKELY(pkt[i].guess != NAT_NO_RECORD && nat_session_holds(s, &pkt[i].tuple) &&
			       !nat_session_over(e, s)))
			pkt[i].session = pkt[i].guess;
		else if (pkt[i].guess != NAT_NO_RECORD || (pkt[i].stage_flags & NAT_STAGE_ICMP_ERROR) ||
			 nat_index_bucket(&e->index, pkt[i].hash)->strangers != 0)
			/* another tuple with the same tag, one whose time is up, one that stands
			 * elsewhere, or nothing was fetched */
			pkt[i].session = nat_session_find(e, &pkt[i].tuple, pkt[i].hash);
	}
}

/* ---- booking ---- */

void nat_session_set_timer(struct nat_engine *e, uint32_t record, enum nat_timer timer)
{
	struct nat_session *s = &e->record[record];

	if (s->timer == timer)
		return;
	bool sooner = e->timeout_s[timer] < e->timeout_s[s->timer];
	s->timer = (uint8_t)timer;
	if (sooner && s->slot != NAT_OFF_WHEEL) {
		nat_wheel_take(e, record);
		nat_wheel_hang(e, record);
	}
}

void nat_session_touch(struct nat_engine *e, struct nat_pkt *pkt)
{
	struct nat_session *s = &e->record[pkt->session];
	const bool inbound = nat_is_inbound(pkt);

	/* RFC 7857 section 7.1: neither a packet from outside nor what the inside answers with (a RST, an
	 * ICMP error) keeps a mapping. */
	if (NAT_UNLIKELY((s->flags & NAT_RECORD_MAPPING) | (s->state & NAT_STATE_FOREIGN))) {
		if (s->flags & NAT_RECORD_MAPPING)
			return;
		nat_replica_take_over(e, pkt->session);
	}
	if (inbound)
		s->bytes_in += pkt->total_bytes;
	else
		s->bytes_out += pkt->total_bytes;
	/* RFC 4787 REQ-6: what the inside sends refreshes. What the outside sends does too, except over an
	 * endpoint-independent mapping, where anybody could hold it open for ever (RFC 7857 section 7); TCP
	 * has its own states for that. */
	if (!inbound || !(s->flags & NAT_RECORD_UNDER_MAPPING) || s->inside.protocol == NAT_PROTO_TCP)
		s->last_seen_s = e->now_s;
	if (s->inside.protocol == NAT_PROTO_TCP) {
		uint8_t state = nat_tcp_next(s->state, pkt->tcp_flags, inbound);
		if (NAT_UNLIKELY(state != s->state)) {
			s->state = state;
			nat_session_set_timer(e, pkt->session, nat_tcp_timer(state));
			if (NAT_UNLIKELY(e->replicas.n_words))
				nat_replica_changes(e, pkt->session);
		}
	} else if (NAT_UNLIKELY(inbound && s->timer == NAT_TIMER_UDP_ONE_WAY)) {
		nat_session_set_timer(e, pkt->session, NAT_TIMER_UDP);
		if (NAT_UNLIKELY(e->replicas.n_words))
			nat_replica_changes(e, pkt->session);
	}
}

/* ---- after a restart ---- */

static bool is_sound(const struct nat_session *s)
{
	const uint8_t protocol = s->inside.protocol;

	return s->timer < NAT_TIMER_COUNT && s->inside.side == 0 && s->inside.zero[0] == 0 &&
	       s->inside.zero[1] == 0 &&
	       (protocol == NAT_PROTO_TCP || protocol == NAT_PROTO_UDP || protocol == NAT_PROTO_ICMP) &&
	       s->inside.local_be != 0 && s->out_addr_be != 0;
}

static void adopt_record(struct nat_engine *e, uint32_t record, bool mappings)
{
	struct nat_session *s = &e->record[record];
	const bool is_mapping = (s->flags & NAT_RECORD_MAPPING) != 0;

	if (s->timer == NAT_TIMER_FREE || is_mapping != mappings)
		return;
	const struct nat_tuple outside = nat_session_outside(s);
	if (is_sound(s) && e->workers && nat_place(e, &outside) != e->worker)
		return; /* another's, now if not before */
	if (!is_sound(s) ||
	    nat_index_find(&e->index, &s->inside, nat_tuple_hash(&e->index.key, &s->inside)) !=
		    NAT_NO_RECORD ||
	    nat_index_find(&e->index, &outside, nat_tuple_hash(&e->index.key, &outside)) != NAT_NO_RECORD ||
	    e->records_left == 0 || !index_both(e, record)) {
		e->not_adopted++;
		s->timer = NAT_TIMER_FREE;
		if (e->worker != 0)
			give_back(e, record);
		return;
	}
	e->records_left--;
	e->counters.records++;
	s->worker = (uint8_t)e->worker;
	/* The process may have died between the two: a connection must not be timed as one that is opening. */
	if (s->inside.protocol == NAT_PROTO_TCP && !is_mapping)
		s->timer = (uint8_t)nat_tcp_timer(s->state);
	s->flags &= (uint8_t)~NAT_RECORD_TRACKED;
	s->slot = NAT_OFF_WHEEL;
	if (nat_session_owns_port(s))
		nat_block_count(e, s, true);
	if (is_mapping) {
		count_mapping(e, s, 1);
		s->references = (s->flags & NAT_RECORD_ASKED) != 0;
		if (s->references != 0)
			nat_host_add(e, s->inside.local_be, s->out_addr_be);
		e->mappings_held += s->timer == NAT_TIMER_HOLD;
		if (s->timer == NAT_TIMER_HOLD || s->references != 0)
			nat_wheel_hang(e, record);
		return;
	}
	nat_wheel_hang(e, record);
	count_session(e, s, 1);
	if (e->workers)
		nat_away_count(e, s, NAT_AWAY_ADOPTED);
	uint32_t mapping = under_mapping(s) ? nat_session_mapping(e, s) : NAT_NO_RECORD;
	if (mapping == NAT_NO_RECORD)
		s->flags &= (uint8_t)~NAT_RECORD_UNDER_MAPPING;
	nat_host_add(e, s->inside.local_be, s->out_addr_be);
	if (s->flags & NAT_RECORD_PERMITS)
		add_permit(e, record);
	if (mapping != NAT_NO_RECORD) {
		struct nat_session *m = &e->record[mapping];
		nat_session_resume(e, mapping, (enum nat_timer)s->timer);
		m->references++;
	}
}

/* Sends for the lines that adopt_record() will wait for: a million sessions take 95 ms so, 230 without. */
static void fetch_for(const struct nat_engine *e, const struct nat_session *s, bool mappings)
{
	if (s->timer == NAT_TIMER_FREE || ((s->flags & NAT_RECORD_MAPPING) != 0) != mappings)
		return;
	const struct nat_tuple outside = nat_session_outside(s);

	NAT_PREFETCH(nat_index_bucket(&e->index, nat_tuple_hash(&e->index.key, &s->inside)));
	NAT_PREFETCH(nat_index_bucket(&e->index, nat_tuple_hash(&e->index.key, &outside)));
	(void)nat_host_fetch(e, s->inside.local_be);
}

void nat_session_adopt(struct nat_engine *e)
{
	enum { AHEAD = 12 };
	const uint32_t leased = atomic_load(&e->table->chunks_leased);

	/* Mappings first: sessions look for theirs. Free records last, when those that were refused are
	 * known: the first worker finds them, and shares what it has too many of. */
	for (int pass = 0; pass < 3; pass++)
		for (uint32_t chunk = 0; chunk < leased && chunk < e->table->n_chunks; chunk++)
			for (uint32_t i = NAT_CHUNK; i-- > 0;) {
				uint32_t record = chunk * NAT_CHUNK + i;
				struct nat_session *s = &e->record[record];
				if (pass < 2 && i >= AHEAD)
					fetch_for(e, s - AHEAD, pass == 0);
				if (pass < 2) {
					adopt_record(e, record, pass == 0);
				} else if (s->timer == NAT_TIMER_FREE) {
					if (e->worker == 0)
						give_back(e, record);
				} else if (s->worker == e->worker && (s->flags & NAT_RECORD_MAPPING) &&
					   s->timer != NAT_TIMER_HOLD) {
					nat_session_leave(e, record);
				}
			}
}
