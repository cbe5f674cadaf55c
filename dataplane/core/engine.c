/* The path of a burst. Each stage walks the burst once, skips packets that have their verdict, and fetches
 * what the next stage will touch; what a stage does is told in its file.
 *
 *   parse -> classify -> known -> look up -> route -> allocate -> rewrite -> count
 *
 * Most packets leave that line at `known`, which does for a plain packet of a session that is there what
 * the stages behind it do for all.
 *
 * A packet from inside to a pool address (hairpin, RFC 4787 REQ-9) comes out of that path with the source
 * that the outside would see, and goes through it once more as if from outside.
 */
#include "engine.h"

#include <string.h>

#define AGED_PER_PACKET 2u /* records that the wheel may look at per packet: ends faster than begins */
#define AGED_PER_RUN    32u

#define RUN(stage, name) stage(e, pkt, n);

static void run_to_known(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	NAT_STAGES_TO_KNOWN(RUN)
}

static void run_behind(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	NAT_STAGES_BEHIND(RUN)
}

static void run_second_time(struct nat_engine *e, struct nat_pkt *pkt)
{
	const uint32_t source_be = e->record[pkt->session].inside.local_be,
		       destination_be = nat_get32(pkt->l3 + NAT_IP_DESTINATION);
	const uint16_t id_be = nat_get16(pkt->l3 + NAT_IP_ID);

	nat_parse(e, pkt, 1);
	pkt->stage_flags |= NAT_STAGE_SECOND;
	nat_errand_second(pkt, source_be, destination_be, id_be);
	nat_session_fetch_bucket(e, pkt); /* from the other side now */
	if (!pkt->settled) {
		run_to_known(e, pkt, 1);
		run_behind(e, pkt, 1);
	}
	if ((pkt->stage_flags & NAT_STAGE_FRAGMENT) && pkt->verdict != NAT_HANDOVER)
		nat_frags_lead(e, pkt, source_be, destination_be, id_be);
}

/* A first fragment that was refused takes the others with it. */
static void refuse_rest(struct nat_engine *e, struct nat_pkt *pkt)
{
	if ((pkt->stage_flags & (NAT_STAGE_FRAGMENT | NAT_STAGE_LATER)) != NAT_STAGE_FRAGMENT ||
	    pkt->verdict != NAT_DROP)
		return;
	if (pkt->reason == NAT_REASON_FRAG_BAD || (pkt->stage_flags & NAT_STAGE_SECOND))
		return;
	if (e->workers && nat_was_led(pkt))
		return;
	nat_frags_lead(e, pkt, nat_get32(pkt->l3 + NAT_IP_SOURCE), nat_get32(pkt->l3 + NAT_IP_DESTINATION),
		       nat_get16(pkt->l3 + NAT_IP_ID));
}

/* The sums of a burst are made in registers: a counter in memory waits for its own last value. */
static void count(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	struct nat_counters *c = &e->counters;
	uint32_t counted = 0, taken_over = 0, forwarded = 0;

	for (uint32_t i = 0; i < n; i++) {
		NAT_ASSERT(pkt[i].settled);
		if (pkt[i].settled == NAT_SETTLED_COUNTED) {
			counted++;
			continue;
		}
		taken_over += (pkt[i].flags & NAT_PKT_TAKEN_OVER) != 0;
		if (NAT_LIKELY(pkt[i].verdict == NAT_FORWARD)) {
			forwarded++;
			if (!(pkt[i].stage_flags & NAT_STAGE_LATER)) /* frag.c has counted its bytes */
				nat_count_traffic(c, &pkt[i]);
			continue;
		}
		c->passed += pkt[i].verdict == NAT_PASS;
		c->held += pkt[i].verdict == NAT_HOLD;
		if (pkt[i].verdict == NAT_HANDOVER) {
			c->handed_over++;
			c->cause[pkt[i].errand.cause]++;
		}
		if (pkt[i].verdict == NAT_PASS || pkt[i].verdict == NAT_DROP)
			c->reason[pkt[i].reason]++;
	}
	c->taken_over += taken_over;
	c->received += n - counted - taken_over;
	c->forwarded += forwarded;
}

void nat_engine_set_time(struct nat_engine *e, uint64_t now_ns)
{
	const uint32_t before_s = e->now_s;

	if (now_ns > e->now_ns)
		e->now_ns = now_ns;
	e->overdue_left = NAT_OVERDUE_MAX;
	e->now_s = (uint32_t)(e->now_ns / UINT64_C(1000000000));
	if (NAT_UNLIKELY(e->now_s != before_s || e->tidying.left != 0) && e->workers)
		nat_marks_tidy(e->workers, e->worker, &e->tidying);
	if (e->outbox.head == e->outbox.n)
		e->outbox.head = e->outbox.n = e->outbox.n_made = e->outbox.cut_bytes = e->outbox.n_cut = 0;
}

/* What known.c has left: the general way, and what may follow from a verdict. Are there any to be cut? */
static bool run_rest(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n)
{
	uint8_t seen = 0;
	bool large = false;

	run_behind(e, pkt, n);
	for (uint32_t i = 0; i < n; i++) {
		seen |= pkt[i].stage_flags;
		large |= pkt[i].hop.mtu_bytes != 0 && pkt[i].total_bytes > pkt[i].hop.mtu_bytes;
	}
	for (uint32_t i = 0; i < n && NAT_UNLIKELY(seen & (NAT_STAGE_HAIRPIN | NAT_STAGE_FRAGMENT)); i++) {
		if ((pkt[i].stage_flags & NAT_STAGE_HAIRPIN) && pkt[i].verdict == NAT_FORWARD &&
		    !(pkt[i].stage_flags & NAT_STAGE_LATER)) {
			run_second_time(e, &pkt[i]);
			large = true; /* it has another hop now */
		} else if (pkt[i].stage_flags & NAT_STAGE_SECOND) {
			nat_errand_lead(e, &pkt[i]);
		}
		if (pkt[i].stage_flags & NAT_STAGE_FRAGMENT)
			refuse_rest(e, &pkt[i]);
	}
	count(e, pkt, n);
	return large;
}

void nat_engine_run(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n, uint64_t now_ns)
{
	nat_engine_set_time(e, now_ns);
	nat_wheel_turn(e, AGED_PER_RUN + n * AGED_PER_PACKET);
	if (NAT_UNLIKELY(e->capture))
		nat_capture_before(e, pkt, n);
	nat_parse(e, pkt, n);
	if (e->workers)
		nat_errands_begin(e, pkt, n);
	run_to_known(e, pkt, n);
	const bool large = nat_known(e, pkt, n) != n && run_rest(e, pkt, n);
	if (NAT_UNLIKELY(e->capture))
		nat_capture_after(e, pkt, n);
	for (uint32_t i = 0; i < n && NAT_UNLIKELY(large); i++)
		nat_frags_cut(e, &pkt[i]);
	nat_frags_age(e);
}

void nat_engine_tick(struct nat_engine *e, uint64_t now_ns)
{
	nat_engine_set_time(e, now_ns);
	nat_wheel_turn(e, AGED_PER_RUN + NAT_BURST_MAX * AGED_PER_PACKET);
	if (NAT_UNLIKELY(e->capture))
		(void)nat_capture_wanted(e);
	nat_frags_age(e);
}

/* ---- outbox ---- */

uint8_t *nat_outbox_buffer(struct nat_engine *e)
{
	if (e->outbox.n_made == NAT_MADE_PER_BURST || e->outbox.n == NAT_OUTBOX)
		return NULL;
	return e->outbox.made[e->outbox.n_made++];
}

bool nat_outbox_has_room(const struct nat_engine *e)
{
	return e->outbox.n + NAT_FRAG_HELD_PER_DATAGRAM <= NAT_OUTBOX;
}

void nat_outbox_put(struct nat_engine *e, const struct nat_pkt *pkt)
{
	NAT_ASSERT(e->outbox.n < NAT_OUTBOX);
	e->outbox.pkt[e->outbox.n++] = *pkt;
}

bool nat_engine_next(struct nat_engine *e, struct nat_pkt *out)
{
	if (e->outbox.head == e->outbox.n)
		return false;
	*out = e->outbox.pkt[e->outbox.head++];
	if (NAT_UNLIKELY(e->capture))
		nat_capture_late(e, out);
	return true;
}

/* ---- memory ---- */

/* Per session that the configuration allows: its record, its place among the free ones, two index entries,
 * a share of a port set. Besides, half a line for each inside host, of which room is for one in four
 * sessions and a million at most; what does not grow comes to about 2 MB. */
_Static_assert((sizeof(struct nat_session) + sizeof(uint32_t)) * 1000 +
			       sizeof(struct nat_bucket) * 2 * 1000 * 20 / (NAT_WAYS * 13) +
			       sizeof(struct nat_portset) * 1000 / 16384 <=
		       91 * 1000,
	       "a session costs at most 91 bytes");

struct layout {
	size_t buckets, free_records, portsets, hosts, frags, replicas, total;
	uint32_t n_buckets, n_free_records, n_hosts;
};

static size_t lines(size_t bytes)
{
	return (bytes + NAT_CACHE_LINE - 1) & ~(size_t)(NAT_CACHE_LINE - 1);
}

static struct layout lay_out(const struct nat_engine_params *params)
{
	const uint64_t hosts = params->max_sessions / 4 + 64;
	struct layout l;

	l.n_buckets = (uint32_t)nat_index_buckets(params->max_sessions);
	l.n_hosts = hosts > (1u << 20) ? 1u << 20 : (uint32_t)hosts;
	l.buckets = lines(sizeof(struct nat_engine));
	l.n_free_records = (uint32_t)params->max_sessions + NAT_CHUNK;
	l.free_records = l.buckets + lines(l.n_buckets * sizeof(struct nat_bucket));
	l.portsets = l.free_records + lines(l.n_free_records * sizeof(uint32_t));
	l.hosts = l.portsets + lines(nat_portsets_size(params->max_sessions));
	l.frags = l.hosts + lines(l.n_hosts * sizeof(struct nat_host));
	l.replicas = l.frags + lines(nat_frags_size(params->policy));
	l.total = l.replicas;
	if (params->replicate)
		l.total += lines(nat_replicas_size(params->table->n_records));
	return l;
}

size_t nat_engine_size(const struct nat_engine_params *params)
{
	return lay_out(params).total;
}

void nat_engine_set_timeouts(struct nat_engine *e)
{
	const struct nat_timeouts *t = &e->policy->timeouts;

	e->timeout_s[NAT_TIMER_FREE] = 0;
	e->timeout_s[NAT_TIMER_TCP_OPENING] = t->tcp_opening_s;
	e->timeout_s[NAT_TIMER_TCP_ESTABLISHED] = t->tcp_established_s;
	e->timeout_s[NAT_TIMER_TCP_CLOSING] = t->tcp_closing_s;
	e->timeout_s[NAT_TIMER_UDP] = t->udp_s;
	e->timeout_s[NAT_TIMER_UDP_ONE_WAY] = t->udp_one_way_s;
	e->timeout_s[NAT_TIMER_DNS] = t->dns_s;
	e->timeout_s[NAT_TIMER_ICMP] = t->icmp_s;
	e->timeout_s[NAT_TIMER_HOLD] = t->hold_s;
}

struct nat_engine *nat_engine_init(void *mem, const struct nat_engine_params *params)
{
	const struct layout l = lay_out(params);
	struct nat_engine *e = mem;

	memset(mem, 0, l.total);
	e->policy = params->policy;
	e->table = params->table;
	e->record = nat_table_records(params->table);
	e->world = params->world;
	e->worker = params->worker;
	e->n_workers = params->n_workers;
	e->workers = params->n_workers > 1 ? params->workers : NULL;
	e->records_left = params->max_sessions;
	e->clock_ns = params->clock_ns;
	e->free_record = (uint32_t *)(void *)((uint8_t *)mem + l.free_records);
	e->free_room = l.n_free_records;
	e->index = (struct nat_index){.bucket = (struct nat_bucket *)(void *)((uint8_t *)mem + l.buckets),
				      .n_buckets = l.n_buckets,
				      .key = nat_key_from_seed(params->seed, 'i'),
				      .record = e->record};
	e->random.key = nat_key_from_seed(params->seed, 'p' + (uint64_t)params->worker * 256);
	/* A restarted engine must not draw the same ports in the same order again. */
	e->random.counter = params->now_ns;
	e->outbox.credit_ns = UINT64_C(1000000000);
	e->outbox.credited_ns = params->now_ns;
	nat_engine_set_time(e, params->now_ns);
	nat_portsets_init(e, (uint8_t *)mem + l.portsets, params->max_sessions);
	e->hosts.slot = (struct nat_host *)(void *)((uint8_t *)mem + l.hosts);
	e->hosts.n_slots = l.n_hosts;
	nat_frags_init(e, (uint8_t *)mem + l.frags);
	if (params->replicate)
		nat_replicas_init(e, (uint8_t *)mem + l.replicas, params->table->n_records);
	nat_wheel_init(e);
	e->notes = &params->policy->notes[params->worker];
	nat_table_bind(e->table, e->policy);
	nat_engine_set_timeouts(e);
	nat_session_adopt(e);
	return e;
}

void nat_engine_set_policy(struct nat_engine *e, struct nat_policy *policy)
{
	const struct nat_policy *const old = e->policy;
	const bool moves = e->workers && policy->places != old->places;

	nat_table_bind(e->table, policy);
	nat_policy_inherit(policy, old, e->worker);
	if (moves)
		nat_away_count_all(e, NAT_AWAY_ENDS);
	e->policy = policy;
	if (moves)
		nat_away_count_all(e, NAT_AWAY_ADOPTED);
	e->notes = &policy->notes[e->worker];
	nat_notes_recount(e, old);
	nat_engine_set_timeouts(e);
	nat_portsets_forget(e); /* other ports may be forwarded now */
}

/* ---- counters ---- */

const struct nat_counters *nat_engine_counters(const struct nat_engine *e)
{
	return &e->counters;
}

void nat_engine_undo(struct nat_engine *e, const struct nat_pkt *pkt, enum nat_reason reason)
{
	if (pkt->made) {
		e->counters.made--;
		return;
	}
	if (pkt->verdict == NAT_FORWARD) {
		e->counters.forwarded--;
	} else if (pkt->verdict == NAT_HANDOVER) {
		e->counters.handed_over--;
		e->counters.cause[pkt->errand.cause]--;
	} else {
		NAT_ASSERT(pkt->verdict == NAT_PASS);
		e->counters.passed--;
		e->counters.reason[pkt->reason]--;
	}
	e->counters.reason[reason]++;
}

void nat_engine_wait(struct nat_engine *e, bool waits)
{
	if (waits) {
		e->counters.forwarded--;
		e->counters.held++;
	} else {
		e->counters.held--;
		e->counters.forwarded++;
	}
}

void nat_engine_bypass(struct nat_engine *e, enum nat_verdict verdict, enum nat_reason reason)
{
	e->counters.received++;
	if (verdict == NAT_PASS)
		e->counters.passed++;
	e->counters.reason[reason]++;
}
