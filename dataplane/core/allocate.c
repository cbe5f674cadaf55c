/* No session yet: makes one, or says why not.
 *
 * A session of an endpoint-dependent pool takes an address and a port that are free towards its remote. One
 * of an endpoint-independent pool stands under its host's mapping, which is made first if there is none (RFC
 * 4787 REQ-1). A packet from outside makes no session: where the pool's filter admits it, the mapping itself
 * translates it, and also the RST or ICMP error that the host may answer with. Anything else that the host
 * answers begins a session.
 */
#include "engine.h"

/* Tells the operator once, not once per packet (RFC 6888 REQ-11C): an attack must not fill the log. */
static void alarm(struct nat_engine *e, const struct nat_pkt *pkt, enum nat_reason reason)
{
	const bool has_pool =
		pkt->zone != NAT_NO_ZONE && e->policy->zone[pkt->zone].config.action == NAT_ACTION_POOL;
	const struct nat_pool *pool =
		has_pool ? &e->policy->pool[e->policy->zone[pkt->zone].config.pool] : NULL;
	struct nat_event event = {
		.reason = (uint8_t)reason, .pool_id = NAT_NO_ID, .protocol = pkt->tuple.protocol};
	uint32_t *told_s;

	if (!nat_is_inbound(pkt))
		event.inside_be = pkt->tuple.local_be;
	if (has_pool)
		event.pool_id = pool->id;
	if (reason == NAT_REASON_TABLE_FULL) {
		event.kind = NAT_EVENT_TABLE_FULL;
		told_s = &e->events.table_full_s;
	} else if (has_pool && (reason == NAT_REASON_NO_PORT || reason == NAT_REASON_POOL_EMPTY)) {
		event.kind = NAT_EVENT_PORTS_EXHAUSTED;
		told_s = &e->notes->pool[e->policy->zone[pkt->zone].config.pool].exhausted_s;
	} else {
		event.kind = NAT_EVENT_HOST_LIMIT;
		told_s = &e->events.host_limit_s;
	}
	if (*told_s != 0 && e->now_s + 1 - *told_s < NAT_ALARM_S)
		return;
	*told_s = e->now_s + 1;
	nat_event_put(e, &event);
	if (e->log && (!pool || pool->log))
		nat_event_log(e, &event);
}

static void refuse(struct nat_engine *e, struct nat_pkt *pkt, enum nat_reason reason)
{
	if (e->trial == NAT_TRIAL_NONE) {
		if (pkt->zone != NAT_NO_ZONE)
			e->notes->zone[pkt->zone].refused++;
		alarm(e, pkt, reason);
	}
	if (nat_is_inbound(pkt)) {
		nat_drop(pkt, reason); /* whoever knocks from outside is told nothing */
		return;
	}
	if (e->policy->refusal == NAT_REFUSAL_ICMP_ADMIN)
		nat_icmp_make(e, pkt, NAT_ICMP_UNREACHABLE, 13, 0); /* RFC 5508 REQ-8 */
	else if (e->policy->refusal == NAT_REFUSAL_ICMP_HOST)
		nat_icmp_make(e, pkt, NAT_ICMP_UNREACHABLE, 1, 0); /* RFC 6888 REQ-11B */
	nat_drop(pkt, reason);
}

/* No port, or no record: another worker may have one. */
static void refuse_or_ask(struct nat_engine *e, struct nat_pkt *pkt, enum nat_reason reason)
{
	if (!nat_ask_others(e, pkt, reason))
		refuse(e, pkt, reason);
}

/* A free address and port, as a record that is not stored yet. */
static bool draft(struct nat_engine *e, struct nat_pkt *pkt, struct nat_session *want)
{
	const struct nat_zone *zone = &e->policy->zone[pkt->zone];
	const struct nat_pool *pool = &e->policy->pool[zone->config.pool];
	struct nat_choice choice;

	if (pool->n_in_service == 0) {
		refuse(e, pkt, NAT_REASON_POOL_EMPTY);
		return false;
	}
	const enum nat_reason reason = nat_choose(e, pkt, pool, &choice);
	if (reason == NAT_REASON_NO_PORT)
		refuse_or_ask(e, pkt, reason);
	else if (reason != NAT_REASON_OK)
		refuse(e, pkt, reason);
	if (reason != NAT_REASON_OK)
		return false;
	*want = (struct nat_session){.inside = pkt->tuple,
				     .out_addr_be = e->policy->address[choice.address].address_be,
				     .out_port_be = choice.port_be,
				     .zone_id = zone->id,
				     .pool_id = pool->id,
				     .flags = choice.tracked ? NAT_RECORD_TRACKED : 0,
				     .timer = (uint8_t)nat_first_timer(e, pkt)};
	return true;
}

static uint32_t store(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_session *want)
{
	uint32_t record = nat_session_create(e, want);

	if (record != NAT_NO_RECORD)
		return record;
	if (want->flags & NAT_RECORD_TRACKED)
		nat_port_release(e, want);
	nat_block_leave(e, want);
	if (want->flags & NAT_RECORD_STATIC)
		refuse(e, pkt, NAT_REASON_TABLE_FULL);
	else
		refuse_or_ask(e, pkt, NAT_REASON_TABLE_FULL);
	return NAT_NO_RECORD;
}

/* The host's mapping for this inside port, made if need be. */
static uint32_t mapping_for(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_pool *pool)
{
	struct nat_tuple key = pkt->tuple;
	struct nat_session want;

	key.remote_be = 0;
	key.remote_port_be = 0;
	uint32_t mapping = nat_session_find(e, &key, nat_tuple_hash(&e->index.key, &key));
	if (mapping != NAT_NO_RECORD && e->record[mapping].timer == NAT_TIMER_HOLD &&
	    nat_policy_address(e->policy, e->record[mapping].out_addr_be) == UINT32_MAX &&
	    e->trial != NAT_TRIAL_CANDIDATE) {
		nat_session_end(e, mapping); /* a reload has taken its address away meanwhile */
		mapping = NAT_NO_RECORD;
	}
	if (mapping != NAT_NO_RECORD)
		return mapping;
	if (!draft(e, pkt, &want))
		return NAT_NO_RECORD;
	want.inside = key;
	want.flags |= NAT_RECORD_MAPPING;
	/* RFC 6888 REQ-8: a freed port is not used again for a while; exempt are TCP, whose end is seen (8A),
	 * and filters that would not let the old remotes in (8C). */
	if (pool->filtering == NAT_FILTER_ENDPOINT_INDEPENDENT && key.protocol != NAT_PROTO_TCP)
		want.flags |= NAT_RECORD_HOLDS;
	return store(e, pkt, &want);
}

static void begin_under_mapping(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_zone *zone,
				const struct nat_pool *pool)
{
	uint32_t mapping = mapping_for(e, pkt, pool);
	if (mapping == NAT_NO_RECORD)
		return;
	struct nat_session *m = &e->record[mapping];
	const struct nat_session want = {.inside = pkt->tuple,
					 .out_addr_be = m->out_addr_be,
					 .out_port_be = m->out_port_be,
					 .zone_id = zone->id,
					 .pool_id = m->pool_id,
					 .flags = pool->filtering == NAT_FILTER_ADDRESS &&
								  pkt->tuple.protocol != NAT_PROTO_ICMP
							  ? NAT_RECORD_UNDER_MAPPING | NAT_RECORD_PERMITS
							  : NAT_RECORD_UNDER_MAPPING,
					 .timer = (uint8_t)nat_first_timer(e, pkt)};
	/* The pool's kind may have been another when an older session took that port towards this remote. */
	const struct nat_tuple outside = nat_session_outside(&want);
	if (nat_session_find(e, &outside, nat_tuple_hash(&e->index.key, &outside)) != NAT_NO_RECORD)
		refuse(e, pkt, NAT_REASON_NO_PORT);
	else
		pkt->session = store(e, pkt, &want);
	if (pkt->session == NAT_NO_SESSION) {
		if (m->references == 0 && m->timer != NAT_TIMER_HOLD)
			nat_session_end(e, mapping); /* made for this packet */
		return;
	}
	nat_session_resume(e, mapping, (enum nat_timer)want.timer);
	m->references++;
}

/* A session over a static mapping, begun from either side. */
static void begin_static(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_static *mapping)
{
	const bool inbound = nat_is_inbound(pkt), one_to_one = mapping->outside_port_be == 0;
	const uint32_t address = nat_policy_address(e->policy, mapping->outside_be);
	struct nat_session want = {
		.inside = pkt->tuple,
		.out_addr_be = mapping->outside_be,
		.out_port_be = one_to_one ? pkt->tuple.local_port_be : mapping->outside_port_be,
		.zone_id = pkt->zone == NAT_NO_ZONE ? NAT_NO_ID : e->policy->zone[pkt->zone].id,
		.pool_id = e->policy->pool[e->policy->address[address].pool].id,
		.flags = NAT_RECORD_STATIC,
		.timer = (uint8_t)nat_first_timer(e, pkt)};

	want.inside.side = 0;
	want.inside.local_be = mapping->inside_be;
	if (inbound && !one_to_one)
		want.inside.local_port_be = mapping->inside_port_be;
	/* A session that was there before the mapping was configured goes on until it ends. */
	const struct nat_tuple other = inbound ? want.inside : nat_session_outside(&want);
	if (nat_session_find(e, &other, nat_tuple_hash(&e->index.key, &other)) != NAT_NO_RECORD) {
		refuse(e, pkt, NAT_REASON_NO_PORT);
		return;
	}
	pkt->session = store(e, pkt, &want);
	if (pkt->session == NAT_NO_SESSION)
		return;
	e->notes->address[address].created += e->trial == NAT_TRIAL_NONE;
	nat_host_add(e, mapping->inside_be, mapping->outside_be);
	if (inbound)
		nat_route(e, pkt, 1);
}

/* The mapping that stands for this tuple when there is no session: it is in use, and its pool's filter admits
 * the remote. */
static uint32_t open_mapping(struct nat_engine *e, const struct nat_tuple *tuple, enum nat_reason *why)
{
	struct nat_tuple key = *tuple;

	key.remote_be = 0;
	key.remote_port_be = 0;
	*why = NAT_REASON_NO_SESSION;
	const uint32_t mapping = nat_session_find(e, &key, nat_tuple_hash(&e->index.key, &key));
	if (mapping == NAT_NO_RECORD || e->record[mapping].timer == NAT_TIMER_HOLD)
		return NAT_NO_SESSION;
	const struct nat_session *m = &e->record[mapping];
	const uint32_t address = nat_policy_address(e->policy, m->out_addr_be);
	if (address == UINT32_MAX)
		return NAT_NO_SESSION;
	const struct nat_pool *pool = &e->policy->pool[e->policy->address[address].pool];
	if (pool->mapping != NAT_ENDPOINT_INDEPENDENT)
		return NAT_NO_SESSION;
	if (m->state == NAT_MAPPING_OPEN)
		return mapping; /* its host has asked for anybody */
	if (pool->filtering == NAT_FILTER_ADDRESS_AND_PORT ||
	    (pool->filtering == NAT_FILTER_ADDRESS && !nat_session_permits(e, m, tuple->remote_be))) {
		*why = NAT_REASON_FILTERED;
		return NAT_NO_SESSION;
	}
	return mapping;
}

/* The mapping translates the packet itself. False: there is none that may. */
static bool pass_over_mapping(struct nat_engine *e, struct nat_pkt *pkt, enum nat_reason *why)
{
	pkt->session = open_mapping(e, &pkt->tuple, why);
	if (pkt->session == NAT_NO_SESSION)
		return false;
	pkt->stage_flags |= NAT_STAGE_OVER_MAPPING;
	return true;
}

/* May a TCP packet without a session begin one? Adopting is right where sessions were lost and the remote
 * will sort out the rest. */
static bool adopts_midflow(struct nat_engine *e, struct nat_pkt *pkt)
{
	const uint8_t flags = pkt->tcp_flags & (NAT_TCP_SYN | NAT_TCP_ACK | NAT_TCP_FIN | NAT_TCP_RST);

	if (flags == NAT_TCP_SYN)
		return true;
	/* The answer to a SYN that a mapping has let in. */
	if (flags == (NAT_TCP_SYN | NAT_TCP_ACK) || (flags & NAT_TCP_RST)) {
		enum nat_reason why;
		if ((flags & NAT_TCP_RST) && pass_over_mapping(e, pkt, &why))
			return false;
		if (!(flags & NAT_TCP_RST) && open_mapping(e, &pkt->tuple, &why) != NAT_NO_SESSION)
			return true;
	}
	if (e->policy->tcp_midflow == NAT_MIDFLOW_ADOPT && flags == NAT_TCP_ACK)
		return true;
	if (e->policy->tcp_midflow == NAT_MIDFLOW_RESET && !(flags & NAT_TCP_RST))
		nat_tcp_make_reset(e, pkt);
	nat_drop(pkt, NAT_REASON_TCP_NOT_SYN);
	return false;
}

static void begin_from_inside(struct nat_engine *e, struct nat_pkt *pkt)
{
	const struct nat_zone *zone = &e->policy->zone[pkt->zone];
	const struct nat_pool *pool = &e->policy->pool[zone->config.pool];

	if (pkt->tuple.protocol == NAT_PROTO_TCP && !adopts_midflow(e, pkt))
		return;
	enum nat_reason reason = nat_host_admit(e, pkt->tuple.local_be);
	if (reason != NAT_REASON_OK) {
		refuse(e, pkt, reason);
		return;
	}
	const struct nat_static *mapping = nat_policy_static(e->policy, 0, pkt->tuple.local_be,
							     pkt->tuple.local_port_be, pkt->tuple.protocol);
	if (mapping) {
		begin_static(e, pkt, mapping);
		return;
	}
	if (pool->mapping == NAT_ENDPOINT_INDEPENDENT) {
		begin_under_mapping(e, pkt, zone, pool);
	} else {
		struct nat_session want;
		if (draft(e, pkt, &want))
			pkt->session = store(e, pkt, &want);
	}
	if (pkt->session == NAT_NO_SESSION)
		return;
	struct nat_session *s = &e->record[pkt->session];
	uint32_t address = nat_policy_address(e->policy, s->out_addr_be);
	if (address != UINT32_MAX)
		e->notes->address[address].created += e->trial == NAT_TRIAL_NONE;
	e->notes->zone[pkt->zone].created += e->trial == NAT_TRIAL_NONE;
	nat_host_add(e, pkt->tuple.local_be, s->out_addr_be);
	if (pkt->tuple.protocol == NAT_PROTO_TCP && (pkt->tcp_flags & NAT_TCP_ACK)) {
		s->state = NAT_TCP_SAW_SYN_OUT | NAT_TCP_SAW_SYN_IN;
		nat_session_set_timer(e, pkt->session, NAT_TIMER_TCP_ESTABLISHED);
	}
}

static void begin_from_outside(struct nat_engine *e, struct nat_pkt *pkt)
{
	if (pkt->tuple.protocol == NAT_PROTO_TCP &&
	    (pkt->tcp_flags & (NAT_TCP_SYN | NAT_TCP_ACK | NAT_TCP_RST)) != NAT_TCP_SYN) {
		nat_drop(pkt, NAT_REASON_NO_SESSION);
		return;
	}
	const struct nat_static *mapping = nat_policy_static(e->policy, 1, pkt->tuple.local_be,
							     pkt->tuple.local_port_be, pkt->tuple.protocol);
	if (mapping) {
		begin_static(e, pkt, mapping);
		return;
	}
	enum nat_reason why;
	if (pass_over_mapping(e, pkt, &why))
		nat_route(e, pkt, 1);
	else
		nat_drop(pkt, why);
}

/* RFC 5508 REQ-4 and REQ-5 ask for a mapping, not for a session: the quoted packet may be one that the
 * mapping itself has let in. */
static void find_mapping_of_error(struct nat_engine *e, struct nat_pkt *pkt)
{
	enum nat_reason why;

	if (!pass_over_mapping(e, pkt, &why))
		nat_drop(pkt, NAT_REASON_ICMP_NO_SESSION);
	else if (nat_is_inbound(pkt))
		nat_route(e, pkt, 1);
}

/* The wheel was turned for want of a port after packets had been found to pass over mappings: those may
 * have ended with their last session, and their records may be another's by now. */
static void look_again(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	enum nat_reason why;

	for (uint32_t i = 0; i < n; i++) {
		if (pkt[i].settled || !(pkt[i].stage_flags & NAT_STAGE_OVER_MAPPING))
			continue;
		if (!pass_over_mapping(e, &pkt[i], &why))
			nat_drop(&pkt[i], why);
		else if (nat_is_inbound(&pkt[i]))
			nat_route(e, &pkt[i], 1);
	}
}

static bool is_new_from_inside(const struct nat_pkt *pkt)
{
	return !pkt->settled && pkt->session == NAT_NO_SESSION && !nat_is_inbound(pkt) &&
	       !(pkt->stage_flags & NAT_STAGE_ICMP_ERROR);
}

const uint64_t nat_latency_ns[NAT_LATENCY_BUCKETS - 1] = {100,  250,   500,    1000,   2500,
							  5000, 10000, 100000, 1000000};

/* `n` packets of a burst took so long together. */
static void book_latency(struct nat_latency *latency, uint64_t spent_ns, uint32_t n)
{
	uint32_t i = 0;

	while (i < NAT_LATENCY_BUCKETS - 1 && spent_ns > nat_latency_ns[i] * n)
		i++;
	latency->bucket[i] += n;
	latency->sum_ns += spent_ns;
}

/* RFC 3927 section 7: no router forwards what belongs to one link. Asked here, where the known flows are
 * through and what is for the gateway itself has gone to the kernel. */
static bool stays_on_its_link(struct nat_pkt *pkt)
{
	const bool inbound = nat_is_inbound(pkt);
	const uint32_t source_be = inbound ? pkt->tuple.remote_be : pkt->tuple.local_be,
		       destination_be = inbound ? pkt->tuple.local_be : pkt->tuple.remote_be;

	if (NAT_LIKELY(!nat_is_link_local(source_be) && !nat_is_link_local(destination_be)))
		return false;
	nat_drop(pkt, nat_is_link_local(source_be) ? NAT_REASON_BAD_SOURCE : NAT_REASON_BAD_DESTINATION);
	return true;
}

/* `at`, `plan`: those that begin.c has planned, in order. */
static void allocate(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n, const uint32_t *at,
		     const struct nat_plan *plan, uint32_t n_planned)
{
	uint64_t asked = 0; /* a bit per packet from inside that was here already, by its hash */
	const uint32_t overdue_left = e->overdue_left;
	uint32_t planned = 0;

	for (uint32_t i = 0; i < n; i++) {
		const struct nat_plan *of_it = NULL;
		if (planned < n_planned && at[planned] == i)
			of_it = &plan[planned++];
		if (pkt[i].settled || pkt[i].session != NAT_NO_SESSION)
			continue;
		if (pkt[i].stage_flags & NAT_STAGE_ICMP_ERROR) {
			find_mapping_of_error(e, &pkt[i]);
			continue;
		}
		/* An earlier packet of the same burst may have made it. Before that it was not there, as
		 * session.c has just seen. */
		const uint64_t bit = UINT64_C(1) << (pkt[i].hash >> 16) % 64;
		if (NAT_LIKELY(of_it != NULL) &&
		    NAT_LIKELY(nat_begin(e, &pkt[i], of_it, (asked & bit) != 0))) {
			asked |= bit;
			continue;
		}
		if (nat_is_inbound(&pkt[i]) || (asked & bit))
			pkt[i].session = nat_session_find(e, &pkt[i].tuple, pkt[i].hash);
		asked |= bit;
		if (pkt[i].session != NAT_NO_SESSION) {
			if (nat_is_inbound(&pkt[i]))
				nat_route(e, &pkt[i], 1);
		} else if (stays_on_its_link(&pkt[i])) {
			continue;
		} else if (nat_is_inbound(&pkt[i])) {
			begin_from_outside(e, &pkt[i]);
			asked = UINT64_MAX; /* over a static mapping it may have begun one that the inside asks for */
		} else if (!e->workers) {
			begin_from_inside(e, &pkt[i]);
		} else if (!nat_must_wait(e, &pkt[i])) {
			begin_from_inside(e, &pkt[i]);
			nat_answer(e, &pkt[i]);
		}
	}
	if (NAT_UNLIKELY(e->overdue_left != overdue_left))
		look_again(e, pkt, n);
}

static bool is_short_of_records(const struct nat_engine *e, uint32_t wanted)
{
	return e->records_left < wanted ||
	       (e->n_free < wanted &&
		atomic_load_explicit(&e->table->chunks_leased, memory_order_relaxed) >= e->table->n_chunks);
}

/* Never refuse for the sake of sessions whose time is up: they end until there are enough records. Before
 * the first of the burst is looked at, so that no mapping that one has been found to pass over ends here. */
static void make_room(struct nat_engine *e, uint32_t n_new)
{
	enum { AT_ONCE = 128 };
	const uint32_t wanted = n_new * 3; /* a session, its mapping, its permit */

	while (NAT_UNLIKELY(is_short_of_records(e, wanted)) && e->trial != NAT_TRIAL_CANDIDATE)
		if (nat_wheel_turn(e, AT_ONCE))
			return;
}

void nat_allocate(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	struct nat_plan plan[NAT_BURST_MAX];
	uint32_t at[NAT_BURST_MAX], n_new = 0;

	if (e->workers)
		nat_handover(e, pkt, n);
	for (uint32_t i = 0; i < n; i++)
		if (is_new_from_inside(&pkt[i]))
			at[n_new++] = i;
	if (n_new == 0) {
		allocate(e, pkt, n, at, plan, 0);
		return;
	}
	const uint64_t begun_ns = e->clock_ns ? e->clock_ns() : 0;
	make_room(e, n_new);
	nat_begin_plan(e, pkt, at, n_new, plan);
	allocate(e, pkt, n, at, plan, n_new);
	if (e->clock_ns)
		book_latency(&e->counters.allocation, e->clock_ns() - begun_ns, n_new);
}
