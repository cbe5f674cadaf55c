/* New sessions of a burst, told beforehand and made by a short way.
 *
 * A session waits for four lines of memory: its host, both buckets, its record. Which ones can be told
 * before the first is made: cursors step by one, random numbers are those of a counter, free records lie
 * in a list. So every packet gets a *plan*, and what it names is sent for; when the last one is planned
 * the first one's lines have come.
 *
 * Most plans are *plain*: whole TCP or UDP, and an endpoint-dependent pool that takes its addresses in
 * turn. If nothing has come in between (a packet was refused, a port was taken: then the next number is
 * another one) the session is made of its plan, without asking anything twice. All others go through
 * allocate.c, which decides the same for any packet; known_test.c compares the two ways.
 */
#include "engine.h"

static const struct nat_pool *pool_of(const struct nat_engine *e, const struct nat_pkt *pkt)
{
	return &e->policy->pool[e->policy->zone[pkt->zone].config.pool];
}

static uint64_t fetch_bucket(const struct nat_engine *e, const struct nat_tuple *tuple)
{
	const uint64_t hash = nat_tuple_hash(&e->index.key, tuple);
	NAT_PREFETCH(nat_index_bucket(&e->index, hash));
	return hash;
}

/* An entry that finds its first bucket full goes to the other one, and one that may be there is looked for
 * there. */
static void fetch_other_bucket(const struct nat_engine *e, uint64_t hash)
{
	const struct nat_bucket *bucket = nat_index_bucket(&e->index, hash);
	const uint32_t number = (uint32_t)(bucket - e->index.bucket);

	if (NAT_UNLIKELY(bucket->strangers != 0 || !nat_bucket_ways(bucket, 0)))
		NAT_PREFETCH(&e->index.bucket[nat_index_alternate(&e->index, number, nat_index_tag(hash))]);
}

/* ---- which are plain ---- */

static bool is_engine_plain(const struct nat_engine *e)
{
	return e->trial == NAT_TRIAL_NONE && e->policy->n_statics == 0 &&
	       e->policy->limits.sessions_per_host == 0 && e->policy->limits.new_per_host_per_s == 0;
}

static bool is_pool_plain(const struct nat_pool *pool)
{
	return pool->mapping == NAT_ENDPOINT_DEPENDENT && pool->select == NAT_SELECT_ROUND_ROBIN &&
	       pool->n_blocks == 0 && pool->n_hosts == 0 && pool->n_in_service != 0;
}

static bool is_packet_plain(const struct nat_pkt *pkt)
{
	const uint8_t flags = pkt->tcp_flags & (NAT_TCP_SYN | NAT_TCP_ACK | NAT_TCP_FIN | NAT_TCP_RST);

	return pkt->stage_flags == 0 && !(pkt->flags & NAT_PKT_TAKEN_OVER) &&
	       (pkt->tuple.protocol == NAT_PROTO_UDP ||
		(pkt->tuple.protocol == NAT_PROTO_TCP && flags == NAT_TCP_SYN)) &&
	       !nat_is_link_local(pkt->tuple.local_be) && !nat_is_link_local(pkt->tuple.remote_be);
}

/* ---- plans ---- */

/* Address, port and hash of the outside tuple, which is sent for; where that is wrong, a line was fetched
 * for nothing. */
static void plan_outside(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_pool *pool,
			 uint32_t ahead, struct nat_plan *plan)
{
	uint32_t *forecast = &e->notes->zone[pkt->zone].forecast;
	const bool alike = pool->mapping == NAT_ENDPOINT_INDEPENDENT;
	bool of_set;

	plan->hash = pkt->hash;
	plan->turn = *forecast;
	if (pool->n_blocks != 0 || pool->n_hosts != 0 || pool->n_order == 0) {
		plan->plain = false;
		return; /* the host's own ports: few, and near each other */
	}
	plan->address = nat_first_choice(e, pkt, pool, forecast);
	plan->next_turn = *forecast;
	struct nat_tuple outside = nat_wanted_tuple(e, pkt, pool, plan->address);
	outside.local_port_be = nat_port_forecast(e, &outside, ahead, pool->port_first, pool->port_last,
						  alike, pkt->tuple.local_port_be, &of_set);
	plan->address_be = outside.local_be;
	plan->port_be = outside.local_port_be;
	plan->plain &= plan->port_be != 0 && !of_set && nat_in_service(e, plan->address);
	plan->hash = fetch_bucket(e, &outside);
}

void nat_begin_plan(struct nat_engine *e, struct nat_pkt *pkt, const uint32_t *at, uint32_t n_new,
		    struct nat_plan *plan)
{
	const bool engine_plain = is_engine_plain(e);

	nat_session_fetch_free(e, n_new);
	nat_port_look_ahead(e, n_new);
	for (uint32_t i = 0; i < n_new; i++) {
		const struct nat_pkt *p = &pkt[at[i]];
		struct nat_zone_note *note = &e->notes->zone[p->zone];
		note->forecast = note->cursor;
		plan[i].host = nat_host_fetch(e, p->tuple.local_be);
		plan[i].counter = e->random.counter + i;
		plan[i].n_sets_made = e->portsets.n_made;
		plan[i].plain = engine_plain && is_packet_plain(p) && is_pool_plain(pool_of(e, p));
		fetch_other_bucket(e, p->hash);
		if (pool_of(e, p)->mapping == NAT_ENDPOINT_DEPENDENT)
			continue;
		struct nat_tuple mapping = p->tuple;
		mapping.remote_be = 0;
		mapping.remote_port_be = 0;
		fetch_bucket(e, &mapping);
	}
	for (uint32_t i = 0; i < n_new; i++)
		plan_outside(e, &pkt[at[i]], pool_of(e, &pkt[at[i]]), i, &plan[i]);
	for (uint32_t i = 0; i < n_new; i++)
		fetch_other_bucket(e, plan[i].hash);
}

/* ---- the short way ---- */

static bool is_port_free(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_plan *plan)
{
	const struct nat_bucket *bucket = nat_index_bucket(&e->index, plan->hash);

	if (NAT_LIKELY(nat_bucket_ways(bucket, nat_index_tag(plan->hash)) == 0 && bucket->strangers == 0))
		return true;
	struct nat_tuple outside = pkt->tuple;
	outside.side = 1;
	outside.local_be = plan->address_be;
	outside.local_port_be = plan->port_be;
	return nat_session_find(e, &outside, plan->hash) == NAT_NO_RECORD;
}

bool nat_begin(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_plan *plan, bool again)
{
	struct nat_zone_note *note = &e->notes->zone[pkt->zone];
	const struct nat_bucket *bucket = nat_index_bucket(&e->index, pkt->hash);

	if (!plan->plain || e->random.counter != plan->counter || note->cursor != plan->turn ||
	    e->portsets.n_made != plan->n_sets_made || (e->workers && e->asked.n != 0))
		return false;
	if (nat_bucket_ways(bucket, nat_index_tag(pkt->hash)) != 0 || (again && bucket->strangers != 0))
		return false;
	if (!is_port_free(e, pkt, plan))
		return false;
	pkt->session = nat_session_begin(e, pkt, plan);
	if (NAT_UNLIKELY(pkt->session == NAT_NO_SESSION))
		return false;
	e->random.counter++;
	note->cursor = plan->next_turn;
	note->created++;
	e->notes->address[plan->address].created++;
	nat_host_add_at(e, plan->host, pkt->tuple.local_be, plan->address_be);
	return true;
}
