/* From worker to worker. workers.h says who owns what; this file has what they tell each other about a
 * packet.
 *
 * A packet without a session goes to the place of its tuple. The place has the last word about an inside
 * tuple: it makes the session, or has it made, so that no tuple ever gets two. It looks at its mark for
 * the tuple:
 *
 *	mark          errand     what the other does
 *	0             -          nobody else has such a session: the place makes it
 *	a worker      GO         has the session: translates the packet. Has it not: back home, NOT_THERE
 *	several       LOOK       has it not: on to the next worker; home is the last: NOWHERE
 *
 * and makes the session when the answer is NOT_THERE or NOWHERE.
 *
 * Never refuse while a port is free: when the place has no port of its own left, or no record, it asks the
 * others:
 *
 *	MAKE   -->    makes the session with a port of its own, marks it, sends the packet back: FOUND, and home lets it
 *	              GO there. Cannot: on to the next; home is the last: REFUSED
 *
 * While that is on its way the tuple is *asked* for, and its other packets wait: they are handed over by
 * home to home, which looks at them again one round later. An answer that got lost in a full ring is not
 * waited for longer than ASKED_S. The replies to such a session need nothing of this: its port leads them
 * to the worker that lent it.
 *
 * Two more errands belong to single packets. A hairpin goes on to its destination's place for its SECOND
 * time, half translated. A first fragment goes where its datagram is brought together
 * (nat_fragment_place()) when it has its verdict: LEAD.
 *
 * Configurations may differ between workers for a moment while a new one is put into force, so a packet
 * may be sent round in a circle: `hops` ends that.
 */
#include <string.h>

#include "engine.h"

enum kind { PLAIN, GO, NOT_THERE, LOOK, NOWHERE, MAKE, FOUND, REFUSED, LEAD };
enum { SECOND = 1, INBOUND = 2, REFUSED_LEAD = 4 }; /* nat_errand.flags */
enum { ASKED_S = 1 };

const char *nat_cause_name(enum nat_cause cause)
{
	static const char *const name[NAT_CAUSE_COUNT] = {
		[NAT_CAUSE_NO_RSS] = "no_rss",     [NAT_CAUSE_ICMP] = "icmp",
		[NAT_CAUSE_FRAGMENT] = "fragment", [NAT_CAUSE_HAIRPIN] = "hairpin",
		[NAT_CAUSE_KEPT] = "kept",         [NAT_CAUSE_AWAY] = "away",
		[NAT_CAUSE_BORROWED] = "borrowed", [NAT_CAUSE_QUEUE] = "queue",
	};
	return name[cause];
}

/* ---- places ---- */

static bool static_outside(const struct nat_policy *policy, const struct nat_tuple *tuple,
			   struct nat_tuple *outside)
{
	const struct nat_static *mapping =
		nat_policy_static(policy, 0, tuple->local_be, tuple->local_port_be, tuple->protocol);

	if (NAT_LIKELY(!mapping))
		return false;
	*outside = *tuple;
	outside->side = 1;
	outside->local_be = mapping->outside_be;
	if (mapping->outside_port_be != 0)
		outside->local_port_be = mapping->outside_port_be;
	return true;
}

uint32_t nat_workers_place(const struct nat_workers *workers, const struct nat_policy *policy,
			   const struct nat_tuple *tuple)
{
	struct nat_tuple outside;

	if (tuple->side == 0) {
		if (static_outside(policy, tuple, &outside))
			return nat_workers_place(workers, policy, &outside);
		const uint32_t zone =
			nat_policy_zone(policy, NAT_NTOH32(tuple->local_be), NAT_NTOH32(tuple->remote_be));
		if (zone != NAT_NO_ZONE && policy->zone[zone].config.action == NAT_ACTION_POOL &&
		    policy->pool[policy->zone[zone].config.pool].keeper != NAT_SPREAD)
			return policy->pool[policy->zone[zone].config.pool].keeper;
	} else {
		const uint32_t address = nat_policy_address(policy, tuple->local_be);
		if (address != UINT32_MAX && policy->pool[policy->address[address].pool].keeper != NAT_SPREAD)
			return policy->pool[policy->address[address].pool].keeper;
	}
	return nat_spread_place(workers, tuple);
}

uint32_t nat_place(const struct nat_engine *e, const struct nat_tuple *tuple)
{
	return nat_workers_place(e->workers, e->policy, tuple);
}

/* ---- sessions that live away from the place of their inside tuple ---- */

void nat_away_count(struct nat_engine *e, const struct nat_session *s, enum nat_away away)
{
	struct nat_tuple tuple[2] = {s->inside, nat_session_outside(s)};

	for (unsigned side = 0; side < 2; side++) {
		const uint32_t place = nat_place(e, &tuple[side]);
		if (NAT_LIKELY(place == e->worker))
			continue;
		if (away == NAT_AWAY_ENDS)
			nat_away_end(e->workers, place);
		else
			nat_away_begin(e->workers, place, &tuple[side], e->worker, away == NAT_AWAY_BORROWED);
	}
}

void nat_away_count_all(struct nat_engine *e, enum nat_away away)
{
	uint32_t leased = atomic_load(&e->table->chunks_leased);

	if (leased > e->table->n_chunks)
		leased = e->table->n_chunks;
	for (uint32_t record = 0; record < leased * NAT_CHUNK; record++) {
		const struct nat_session *s = &e->record[record];
		if (s->timer != NAT_TIMER_FREE && s->worker == e->worker && !(s->flags & NAT_RECORD_MAPPING))
			nat_away_count(e, s, away);
	}
}

/* ---- handing over ---- */

static enum nat_cause cause_of(const struct nat_engine *e, const struct nat_pkt *pkt)
{
	if (pkt->stage_flags & NAT_STAGE_SECOND)
		return NAT_CAUSE_HAIRPIN;
	if (pkt->stage_flags & NAT_STAGE_FRAGMENT)
		return NAT_CAUSE_FRAGMENT;
	if (pkt->l3[NAT_IP_PROTOCOL] == NAT_PROTO_ICMP)
		return NAT_CAUSE_ICMP;
	if (pkt->zone != NAT_NO_ZONE && e->policy->zone[pkt->zone].config.action == NAT_ACTION_POOL &&
	    e->policy->pool[e->policy->zone[pkt->zone].config.pool].keeper != NAT_SPREAD)
		return NAT_CAUSE_KEPT;
	if (nat_is_inbound(pkt)) {
		const uint32_t address = nat_policy_address(e->policy, pkt->tuple.local_be);
		if (address != UINT32_MAX &&
		    e->policy->pool[e->policy->address[address].pool].keeper != NAT_SPREAD)
			return NAT_CAUSE_KEPT;
	}
	return e->policy->from_queue[pkt->iface] ? NAT_CAUSE_QUEUE : NAT_CAUSE_NO_RSS;
}

static void hand(struct nat_engine *e, struct nat_pkt *pkt, uint32_t to, enum kind kind, enum nat_cause cause)
{
	if (pkt->errand.hops >= UINT8_MAX - 1) {
		nat_drop(pkt, NAT_REASON_HANDOVER_LOST);
		return;
	}
	pkt->errand.hops = (uint8_t)(pkt->errand.hops + (to != e->worker));
	pkt->errand.kind = (uint8_t)kind;
	pkt->errand.from = (uint8_t)e->worker;
	pkt->errand.cause = (uint8_t)cause;
	pkt->owner = (uint8_t)to;
	nat_settle(pkt, NAT_HANDOVER, NAT_REASON_OK);
}

static uint32_t next_worker(const struct nat_engine *e)
{
	return e->worker + 1 == e->n_workers ? 0 : e->worker + 1;
}

/* On to the next worker; the last one is the one that asked, which hears `answer`. */
static void pass_on(struct nat_engine *e, struct nat_pkt *pkt, enum kind answer, enum nat_cause cause)
{
	const uint32_t next = next_worker(e);
	hand(e, pkt, next, next == pkt->errand.home ? answer : (enum kind)pkt->errand.kind, cause);
}

/* ---- tuples that others have been asked for ---- */

static uint32_t find_asked(struct nat_engine *e, const struct nat_tuple *tuple)
{
	struct nat_asked *asked = &e->asked;

	for (uint32_t i = asked->n; i-- > 0;) {
		if (e->now_s - asked->since_s[i] > ASKED_S) {
			asked->n--;
			asked->tuple[i] = asked->tuple[asked->n];
			asked->since_s[i] = asked->since_s[asked->n];
		} else if (memcmp(&asked->tuple[i], tuple, sizeof(*tuple)) == 0) {
			return i;
		}
	}
	return NAT_ASKED_MAX;
}

static void forget_asked(struct nat_engine *e, const struct nat_tuple *tuple)
{
	const uint32_t i = find_asked(e, tuple);

	if (i == NAT_ASKED_MAX)
		return;
	e->asked.n--;
	e->asked.tuple[i] = e->asked.tuple[e->asked.n];
	e->asked.since_s[i] = e->asked.since_s[e->asked.n];
}

bool nat_must_wait(struct nat_engine *e, struct nat_pkt *pkt)
{
	if (NAT_LIKELY(e->asked.n == 0) || pkt->tuple.side != 0 ||
	    (pkt->stage_flags & NAT_STAGE_ICMP_ERROR) || find_asked(e, &pkt->tuple) == NAT_ASKED_MAX)
		return false;
	hand(e, pkt, e->worker, PLAIN, NAT_CAUSE_BORROWED);
	return true;
}

bool nat_ask_others(struct nat_engine *e, struct nat_pkt *pkt, enum nat_reason reason)
{
	if (!e->workers || nat_is_inbound(pkt) || pkt->errand.kind == REFUSED)
		return false;
	if (pkt->errand.kind == MAKE) {
		pkt->errand.reason = (uint8_t)reason;
		pass_on(e, pkt, REFUSED, NAT_CAUSE_BORROWED);
		return true;
	}
	const struct nat_pool *pool = &e->policy->pool[e->policy->zone[pkt->zone].config.pool];
	if (pool->keeper != NAT_SPREAD)
		return false;
	pkt->errand.home = (uint8_t)e->worker;
	if (e->trial != NAT_TRIAL_NONE) {
		hand(e, pkt, next_worker(e), MAKE, NAT_CAUSE_BORROWED);
		return true;
	}
	if (e->asked.n == NAT_ASKED_MAX) {
		hand(e, pkt, e->worker, PLAIN,
		     NAT_CAUSE_BORROWED); /* one round later, when some are answered */
		return true;
	}
	e->asked.tuple[e->asked.n] = pkt->tuple;
	e->asked.since_s[e->asked.n++] = e->now_s;
	hand(e, pkt, next_worker(e), MAKE, NAT_CAUSE_BORROWED);
	return true;
}

void nat_answer(struct nat_engine *e, struct nat_pkt *pkt)
{
	if (pkt->errand.kind != MAKE || e->trial != NAT_TRIAL_NONE)
		return; /* of a trial the packet is translated here: home will do as we say */
	if (pkt->session == NAT_NO_SESSION) {
		NAT_ASSERT(pkt->settled);
		if (pkt->verdict == NAT_HANDOVER)
			return; /* on to the next */
		pkt->errand.reason = pkt->reason;
	}
	hand(e, pkt, pkt->errand.home, pkt->session == NAT_NO_SESSION ? REFUSED : FOUND, NAT_CAUSE_BORROWED);
}

/* ---- packets without a session ---- */

/* At the place of its tuple. `looked`: who, it is known, has no session for it (the mark of a worker, or
 * MANY). */
static void at_place(struct nat_engine *e, struct nat_pkt *pkt, uint8_t looked)
{
	if (nat_must_wait(e, pkt))
		return;
	const uint8_t mark =
		atomic_load_explicit(nat_mark_of(e->workers, e->worker, &pkt->tuple), memory_order_acquire);
	pkt->errand.kind = PLAIN;
	pkt->errand.home = (uint8_t)e->worker;
	if (mark == 0 || (mark == NAT_MARK_MANY ? mark : mark & ~NAT_MARK_BORROWED) == looked)
		return; /* allocate.c goes on */
	if (mark != NAT_MARK_MANY) {
		hand(e, pkt, (mark & ~NAT_MARK_BORROWED) - 1u, GO,
		     mark & NAT_MARK_BORROWED ? NAT_CAUSE_BORROWED : NAT_CAUSE_AWAY);
		return;
	}
	hand(e, pkt, next_worker(e), LOOK, NAT_CAUSE_AWAY);
}

static void without_session(struct nat_engine *e, struct nat_pkt *pkt)
{
	uint8_t looked = 0;

	switch ((enum kind)pkt->errand.kind) {
	case MAKE:
		return; /* allocate.c tries */
	case GO:
		hand(e, pkt, pkt->errand.home, NOT_THERE, (enum nat_cause)pkt->errand.cause);
		return;
	case LOOK:
		pass_on(e, pkt, NOWHERE, NAT_CAUSE_AWAY);
		return;
	case NOT_THERE:
		looked = (uint8_t)(pkt->errand.from + 1);
		break;
	case NOWHERE:
		looked = NAT_MARK_MANY;
		break;
	default:
		break;
	}
	const uint32_t place = nat_place(e, &pkt->tuple);
	if (place != e->worker)
		hand(e, pkt, place, PLAIN, cause_of(e, pkt));
	else
		at_place(e, pkt, looked);
}

/* What others have answered about a tuple that we have asked for. */
static void take_answer(struct nat_engine *e, struct nat_pkt *pkt)
{
	forget_asked(e, &pkt->tuple);
	if (pkt->session != NAT_NO_SESSION)
		return;
	if (pkt->errand.kind == FOUND)
		hand(e, pkt, pkt->errand.from, GO, NAT_CAUSE_BORROWED);
}

void nat_handover(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (pkt[i].settled)
			continue;
		if (NAT_UNLIKELY(pkt[i].errand.kind == FOUND || pkt[i].errand.kind == REFUSED))
			take_answer(e, &pkt[i]);
		else if (NAT_UNLIKELY(pkt[i].session == NAT_NO_SESSION))
			without_session(e, &pkt[i]);
		else if (NAT_UNLIKELY(pkt[i].errand.kind == MAKE))
			nat_answer(e, &pkt[i]);
	}
}

/* ---- fragments and hairpins ---- */

bool nat_handover_fragment(struct nat_engine *e, struct nat_pkt *pkt)
{
	const uint32_t place = nat_fragment_place(e->workers, nat_get32(pkt->l3 + NAT_IP_SOURCE),
						  nat_get32(pkt->l3 + NAT_IP_DESTINATION),
						  nat_get16(pkt->l3 + NAT_IP_ID), pkt->tuple.protocol);

	if (place == e->worker)
		return false;
	hand(e, pkt, place, PLAIN, NAT_CAUSE_FRAGMENT);
	return true;
}

static void keep_origin(struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be, uint16_t id_be)
{
	pkt->errand.source_be = source_be;
	pkt->errand.destination_be = destination_be;
	pkt->errand.id_be = id_be;
}

bool nat_handover_lead(struct nat_engine *e, struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be,
		       uint16_t id_be)
{
	const uint32_t place =
		nat_fragment_place(e->workers, source_be, destination_be, id_be, pkt->tuple.protocol);

	if (place == e->worker || pkt->verdict == NAT_HANDOVER)
		return place != e->worker;
	keep_origin(pkt, source_be, destination_be, id_be);
	pkt->errand.flags = nat_is_inbound(pkt) ? INBOUND : 0;
	if (pkt->verdict == NAT_DROP)
		pkt->errand.flags |= REFUSED_LEAD;
	pkt->errand.reason = pkt->reason;
	hand(e, pkt, place, LEAD, NAT_CAUSE_FRAGMENT);
	return true;
}

void nat_errand_second(struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be, uint16_t id_be)
{
	pkt->errand.kind = PLAIN;
	pkt->errand.flags = SECOND;
	keep_origin(pkt, source_be, destination_be, id_be);
}

void nat_errand_lead(struct nat_engine *e, struct nat_pkt *pkt)
{
	if ((pkt->stage_flags & NAT_STAGE_FRAGMENT) && pkt->verdict != NAT_HANDOVER)
		nat_frags_lead(e, pkt, pkt->errand.source_be, pkt->errand.destination_be, pkt->errand.id_be);
}

bool nat_was_led(const struct nat_pkt *pkt)
{
	return pkt->errand.kind == LEAD;
}

/* Translated already, by another worker: it waits only for the others of its datagram to be told. */
static void lead(struct nat_engine *e, struct nat_pkt *pkt)
{
	const struct nat_errand errand = pkt->errand;
	const uint32_t destination_be = nat_get32(pkt->l3 + NAT_IP_DESTINATION);

	if (errand.flags & INBOUND)
		pkt->stage_flags |= NAT_STAGE_INBOUND;
	if (errand.flags & REFUSED_LEAD) {
		nat_drop(pkt, (enum nat_reason)errand.reason);
	} else {
		e->world.route(e->world.context, &destination_be, &pkt->hop, 1);
		nat_settle(pkt, NAT_FORWARD, NAT_REASON_OK);
	}
	nat_frags_lead(e, pkt, errand.source_be, errand.destination_be, errand.id_be);
}

void nat_errands_begin(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (!(pkt[i].flags & NAT_PKT_TAKEN_OVER)) {
			pkt[i].errand = (struct nat_errand){0};
			continue;
		}
		if (pkt[i].settled)
			continue;
		if (pkt[i].errand.kind == LEAD) {
			lead(e, &pkt[i]);
		} else if (pkt[i].errand.flags & SECOND) {
			pkt[i].stage_flags |= NAT_STAGE_SECOND;
			nat_session_fetch_bucket(e, &pkt[i]);
		}
	}
}
