/* A trial: what would the engine do with this packet? Asked with `dsnatctl explain`.
 *
 * There is no second implementation that could disagree. The packet goes through the stages of engine.c
 * one after the other, for real: a session that it would begin is begun, the bytes are rewritten. Between
 * stages the trial looks what has become of it, and afterwards takes everything back:
 *
 *   begun session, its mapping and port     ended; they never were in a burst
 *   session and mapping that it used        written back and hung up again
 *   host, round-robin cursor, random state  written back, so that the next packet gets what the trial foretold
 *   counters, events, packets made          written back; `trial` keeps alarms and refusals from being counted at all
 *
 * Sessions whose time is over may be ended on the way, as any packet may do at this moment. Under a
 * candidate policy not even that: live sessions are counted by the policy in force, so they must not end
 * under another. Port sets describe the policy in force too, so a candidate's ports are looked up one by
 * one (pool.c). A trial holds the worker up for as long as the packet would.
 *
 * Fragments are not tried: what becomes of one depends on others. Nor is the cutting of large packets,
 * which only is foretold.
 */
#include <string.h>

#include "engine.h"

/* What one pass through the stages may change. */
struct undo {
	uint32_t touched; /* record, or NAT_NO_RECORD */
	struct nat_session touched_was;
	uint32_t begun; /* record, or NAT_NO_RECORD */
	struct nat_tuple mapping_key;
	uint32_t mapping; /* that was there, or NAT_NO_RECORD */
	struct nat_session mapping_was;
	bool has_host, host_was_there;
	uint32_t host_be;
	struct nat_host host_was;
	uint32_t zone, cursor;
};

/* Whose host record would a session of this packet change? */
static uint32_t host_of(const struct nat_engine *e, const struct nat_pkt *pkt)
{
	if (!nat_is_inbound(pkt))
		return pkt->tuple.local_be;
	const struct nat_static *mapping = nat_policy_static(e->policy, 1, pkt->tuple.local_be,
							     pkt->tuple.local_port_be, pkt->tuple.protocol);
	return mapping ? mapping->inside_be : 0;
}

static void before_allocate(struct nat_engine *e, const struct nat_pkt *pkt, struct undo *undo)
{
	if (pkt->settled || pkt->session != NAT_NO_SESSION)
		return;
	undo->host_be = host_of(e, pkt);
	undo->has_host = undo->host_be != 0;
	if (undo->has_host)
		undo->host_was_there = nat_host_copy(e, undo->host_be, &undo->host_was);
	if (nat_is_inbound(pkt) || pkt->zone == NAT_NO_ZONE)
		return;
	undo->zone = pkt->zone;
	undo->cursor = e->notes->zone[pkt->zone].cursor;
	undo->mapping_key = pkt->tuple;
	undo->mapping_key.remote_be = 0;
	undo->mapping_key.remote_port_be = 0;
	undo->mapping =
		nat_session_find(e, &undo->mapping_key, nat_tuple_hash(&e->index.key, &undo->mapping_key));
	if (undo->mapping != NAT_NO_RECORD) {
		undo->mapping_was = e->record[undo->mapping];
		e->record[undo->mapping].references++; /* it stays, whatever happens */
	}
}

static void after_allocate(struct nat_engine *e, const struct nat_pkt *pkt, struct undo *undo,
			   struct nat_trial *trial, uint64_t created_before)
{
	if (pkt->session == NAT_NO_SESSION)
		return;
	if (e->counters.sessions_created != created_before)
		undo->begun = pkt->session;
	else {
		undo->touched = pkt->session;
		undo->touched_was = e->record[pkt->session];
	}
	trial->begun |= undo->begun != NAT_NO_RECORD;
	trial->over_mapping = (e->record[pkt->session].flags & NAT_RECORD_MAPPING) != 0;
	nat_session_show(e, pkt->session, &trial->session);
}

static void look(struct nat_trial *trial, enum nat_trial_stage stage)
{
	const struct nat_pkt *pkt = &trial->pkt;

	if (stage == NAT_TRIED_SENT && !(pkt->stage_flags & NAT_STAGE_SECOND))
		trial->routed = pkt->hop;
	if (stage == NAT_TRIED_CLASSIFY && !(pkt->stage_flags & NAT_STAGE_SECOND)) {
		trial->zone = pkt->zone;
		trial->inbound = nat_is_inbound(pkt);
		trial->hairpin = (pkt->stage_flags & NAT_STAGE_HAIRPIN) != 0;
		trial->icmp_error = (pkt->stage_flags & NAT_STAGE_ICMP_ERROR) != 0;
		trial->tuple = pkt->tuple;
	}
	if (stage == NAT_TRIED_LOOK_UP)
		trial->found = pkt->session != NAT_NO_SESSION;
	if (pkt->settled && trial->settled_in == NAT_TRIED_NOTHING)
		trial->settled_in = stage;
}

static void try_stages(struct nat_engine *e, struct nat_trial *trial, struct undo *undo)
{
	struct nat_pkt *pkt = &trial->pkt;
	const uint64_t created = e->counters.sessions_created;

	*undo = (struct undo){.touched = NAT_NO_RECORD,
			      .begun = NAT_NO_RECORD,
			      .mapping = NAT_NO_RECORD,
			      .zone = NAT_NO_ZONE};
	trial->settled_in = NAT_TRIED_NOTHING;
#define TRY(stage, name)                                                                                     \
	if (NAT_TRIED_##name == NAT_TRIED_ALLOCATE)                                                          \
		before_allocate(e, pkt, undo);                                                               \
	stage(e, pkt, 1);                                                                                    \
	if (NAT_TRIED_##name == NAT_TRIED_ALLOCATE)                                                          \
		after_allocate(e, pkt, undo, trial, created);                                                \
	look(trial, NAT_TRIED_##name);
	NAT_STAGES(TRY)
#undef TRY
}

static void end_begun(struct nat_engine *e, const struct undo *undo)
{
	if (undo->begun != NAT_NO_RECORD) {
		if (e->trial == NAT_TRIAL_CANDIDATE) /* the sets know nothing of its port */
			e->record[undo->begun].flags &= (uint8_t)~NAT_RECORD_TRACKED;
		nat_session_end(e, undo->begun);
	}
	if (undo->zone == NAT_NO_ZONE || undo->mapping != NAT_NO_RECORD)
		return;
	const uint32_t made = nat_index_find(&e->index, &undo->mapping_key,
					     nat_tuple_hash(&e->index.key, &undo->mapping_key));
	if (made != NAT_NO_RECORD && e->trial == NAT_TRIAL_CANDIDATE)
		e->record[made].flags &= (uint8_t)~NAT_RECORD_TRACKED;
	if (made != NAT_NO_RECORD)
		nat_session_end(e, made); /* on hold, if it is one that would be */
}

/* The record's old content, in its place on the wheel. */
static void write_back(struct nat_engine *e, uint32_t record, const struct nat_session *was)
{
	struct nat_session *s = &e->record[record];

	nat_wheel_take(e, record);
	*s = *was;
	s->slot = NAT_OFF_WHEEL;
	if (was->slot != NAT_OFF_WHEEL)
		nat_wheel_hang(e, record);
}

/* A hairpin may use on its second time what it has begun on the first: that is gone (`ended`). */
static void take_back(struct nat_engine *e, const struct undo *undo, uint32_t ended)
{
	if (undo->touched != NAT_NO_RECORD && undo->touched != ended &&
	    !(undo->touched_was.flags & NAT_RECORD_MAPPING))
		write_back(e, undo->touched, &undo->touched_was);
	if (undo->mapping != NAT_NO_RECORD) {
		struct nat_session was = undo->mapping_was;
		const struct nat_session *now = &e->record[undo->mapping];
		e->mappings_held += was.timer == NAT_TIMER_HOLD && now->timer != NAT_TIMER_HOLD;
		was.references = now->references - 1; /* sessions of it may have ended meanwhile */
		write_back(e, undo->mapping, &was);
		if (was.references == 0 && was.timer != NAT_TIMER_HOLD)
			nat_session_leave(e, undo->mapping);
	}
	if (undo->has_host)
		nat_host_restore(e, undo->host_be, undo->host_was_there ? &undo->host_was : NULL);
}

static void keep_made(const struct nat_engine *e, struct nat_trial *trial, uint32_t first)
{
	if (e->outbox.n == first)
		return;
	const struct nat_pkt *made = &e->outbox.pkt[first];
	trial->made_bytes = made->len_bytes;
	trial->made_iface = made->hop.iface;
	memcpy(trial->made, made->l3, made->len_bytes);
}

static void run_passes(struct nat_engine *e, struct nat_trial *trial, struct undo undo[2])
{
	struct nat_pkt *pkt = &trial->pkt;

	try_stages(e, trial, &undo[0]);
	if (!trial->hairpin || pkt->verdict != NAT_FORWARD)
		return;
	const uint32_t source_be = trial->session.inside.local_be,
		       destination_be = nat_get32(pkt->l3 + NAT_IP_DESTINATION);
	trial->first_tuple = trial->tuple;
	nat_parse(e, pkt, 1);
	pkt->stage_flags |= NAT_STAGE_SECOND;
	nat_errand_second(pkt, source_be, destination_be, nat_get16(pkt->l3 + NAT_IP_ID));
	nat_session_fetch_bucket(e, pkt);
	if (pkt->settled)
		return;
	const struct nat_session_view first = trial->session;
	const bool begun = trial->begun, found = trial->found;
	try_stages(e, trial, &undo[1]);
	trial->behind = trial->session;
	trial->session = first;
	trial->begun = begun;
	trial->found = found;
}

/* The policy that is tried, in force for this worker as long as the trial lasts. */
static void swap_policy(struct nat_engine *e, struct nat_policy *policy)
{
	e->policy = policy;
	e->notes = &policy->notes[e->worker];
	nat_engine_set_timeouts(e);
}

void nat_engine_try(struct nat_engine *e, struct nat_trial *trial, uint64_t now_ns)
{
	struct nat_policy *const in_force = e->policy;
	struct undo undo[2] = {{.touched = NAT_NO_RECORD,
				.begun = NAT_NO_RECORD,
				.mapping = NAT_NO_RECORD,
				.zone = NAT_NO_ZONE}};
	undo[1] = undo[0];

	nat_engine_tick(e, now_ns);
	if (trial->candidate) {
		nat_wheel_turn(e, UINT32_MAX);
		nat_policy_inherit(trial->candidate, in_force, e->worker);
		swap_policy(e, trial->candidate);
	}
	nat_portsets_begin_trial(e);
	const struct nat_random random = e->random;
	const struct nat_counters counters = e->counters;
	const uint32_t n_out = e->outbox.n, n_made = e->outbox.n_made, n_events = e->events.n;
	const uint64_t credit_ns = e->outbox.credit_ns, credited_ns = e->outbox.credited_ns;

	e->trial = trial->candidate ? NAT_TRIAL_CANDIDATE : NAT_TRIAL_LIVE;
	trial->settled_in = NAT_TRIED_PARSE;
	trial->zone = NAT_NO_ZONE;
	nat_parse(e, &trial->pkt, 1);
	if (e->workers)
		nat_errands_begin(e, &trial->pkt, 1);
	trial->tuple = trial->pkt.tuple;
	trial->whole = (trial->pkt.stage_flags & (NAT_STAGE_FRAGMENT | NAT_STAGE_LATER)) == 0;
	if (!trial->pkt.settled && trial->whole)
		run_passes(e, trial, undo);
	keep_made(e, trial, n_out);
	trial->cut = trial->pkt.settled && trial->pkt.verdict == NAT_FORWARD &&
		     trial->pkt.hop.mtu_bytes != 0 && trial->pkt.total_bytes > trial->pkt.hop.mtu_bytes;
	trial->policy = e->policy;
	if (undo[0].zone != NAT_NO_ZONE)
		e->notes->zone[undo[0].zone].cursor = undo[0].cursor;
	end_begun(e, &undo[1]);
	end_begun(e, &undo[0]);
	if (trial->candidate)
		swap_policy(e, in_force);
	take_back(e, &undo[1], undo[0].begun);
	take_back(e, &undo[0], NAT_NO_RECORD);

	e->trial = NAT_TRIAL_NONE;
	e->random = random;
	e->outbox.n = n_out;
	e->outbox.n_made = n_made;
	e->outbox.credit_ns = credit_ns;
	e->outbox.credited_ns = credited_ns;
	e->events.n = n_events;
	/* Not the whole of them: sessions whose time was over may have been ended and counted. */
	e->counters.made = counters.made;
	e->counters.events_lost = counters.events_lost;
	e->counters.sessions_created = counters.sessions_created;
	for (uint32_t i = 0; i < NAT_TRAFFIC_KINDS; i++)
		e->counters.traffic[i].sessions_created = counters.traffic[i].sessions_created;
}
