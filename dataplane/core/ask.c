/* Mappings that hosts ask for (PCP, NAT-PMP; the protocols themselves are ctl/pcp.c).
 *
 * Such a mapping is one like any other of an endpoint-independent pool, but that its host's wish counts as
 * a reference until its time is over (NAT_RECORD_ASKED), and that it may let anybody in whatever the pool
 * filters (NAT_MAPPING_OPEN). Until then only requests with the nonce that it was made with change it (RFC
 * 6887 section 11.3): who forges the host's address does not know it.
 */
#include "engine.h"

/* Where does the host go that has named no destination? Zones with one do not count, so ask for an address
 * in none. */
static const struct nat_zone *zone_of_host(const struct nat_engine *e, uint32_t host_be, uint32_t *number)
{
	*number = nat_policy_zone(e->policy, NAT_NTOH32(host_be), 0);
	if (*number == NAT_NO_ZONE || e->policy->zone[*number].config.action != NAT_ACTION_POOL)
		return NULL;
	return &e->policy->zone[*number];
}

static enum nat_map_result make_asked(struct nat_engine *e, const struct nat_map *ask,
				      const struct nat_zone *zone, uint32_t zone_number, uint32_t *mapping)
{
	const struct nat_pool *pool = &e->policy->pool[zone->config.pool];
	struct nat_pkt pkt = {.zone = zone_number,
			      .tuple = {.local_be = ask->host_be,
					.local_port_be = ask->port_be,
					.protocol = ask->protocol}};
	const uint32_t suggested = nat_policy_address(e->policy, ask->outside_be);
	const uint16_t suggested_port = NAT_NTOH16(ask->outside_port_be);
	enum nat_reason reason = NAT_REASON_NO_PORT;
	struct nat_choice choice;

	if (nat_host_admit(e, ask->host_be) != NAT_REASON_OK)
		return NAT_MAP_QUOTA;
	if (suggested != UINT32_MAX && &e->policy->pool[e->policy->address[suggested].pool] == pool &&
	    nat_in_service(e, suggested) && pool->n_blocks == 0 && pool->n_hosts == 0 &&
	    suggested_port >= pool->port_first && suggested_port <= pool->port_last)
		reason = nat_take_at(e, &pkt, pool, suggested, suggested_port, suggested_port, &choice);
	if (reason != NAT_REASON_OK && pool->n_in_service != 0)
		reason = nat_choose(e, &pkt, pool, &choice);
	if (reason != NAT_REASON_OK)
		return reason == NAT_REASON_HOST_PORTS ? NAT_MAP_QUOTA : NAT_MAP_NO_RESOURCES;
	struct nat_session want = {.inside = pkt.tuple,
				   .out_addr_be = e->policy->address[choice.address].address_be,
				   .out_port_be = choice.port_be,
				   .zone_id = zone->id,
				   .pool_id = pool->id,
				   .flags = NAT_RECORD_MAPPING | NAT_RECORD_HOLDS,
				   .timer = (uint8_t)nat_first_timer(e, &pkt)};
	if (choice.tracked)
		want.flags |= NAT_RECORD_TRACKED;
	*mapping = nat_session_create(e, &want);
	if (*mapping != NAT_NO_RECORD)
		return NAT_MAP_OK;
	if (choice.tracked)
		nat_port_release(e, &want);
	nat_block_leave(e, &want);
	return NAT_MAP_NO_RESOURCES;
}

/* A mapping that was asked for without a nonce, by NAT-PMP, gets one from the first who has one. */
static bool may_change(const struct nat_engine *e, const struct nat_session *mapping, struct nat_map *ask)
{
	if (!(mapping->flags & NAT_RECORD_ASKED) || mapping->nonce == 0 || mapping->nonce == ask->nonce)
		return true;
	ask->lifetime_s = mapping->asked_until_s - e->now_s;
	return false;
}

enum nat_map_result nat_engine_map(struct nat_engine *e, struct nat_map *ask, uint64_t now_ns)
{
	const struct nat_tuple key = {
		.local_be = ask->host_be, .local_port_be = ask->port_be, .protocol = ask->protocol};
	uint32_t zone_number;

	nat_engine_tick(e, now_ns);
	const struct nat_zone *zone = zone_of_host(e, ask->host_be, &zone_number);
	if (!zone || e->policy->pool[zone->config.pool].mapping != NAT_ENDPOINT_INDEPENDENT ||
	    !nat_policy_is_active(e->policy, zone->config.pool))
		return NAT_MAP_NOT_AUTHORIZED;
	uint32_t mapping = nat_session_find(e, &key, nat_tuple_hash(&e->index.key, &key));
	if (mapping != NAT_NO_RECORD && !may_change(e, &e->record[mapping], ask))
		return NAT_MAP_NOT_THEIRS;
	if (ask->lifetime_s == 0) {
		if (mapping != NAT_NO_RECORD && (e->record[mapping].flags & NAT_RECORD_ASKED))
			nat_session_lapse(e, mapping);
		return NAT_MAP_OK;
	}
	if (mapping == NAT_NO_RECORD) {
		enum nat_map_result result = make_asked(e, ask, zone, zone_number, &mapping);
		if (result != NAT_MAP_OK)
			return result;
	}
	struct nat_session *m = &e->record[mapping];
	nat_session_resume(e, mapping,
			   ask->protocol == NAT_PROTO_TCP ? NAT_TIMER_TCP_OPENING : NAT_TIMER_UDP);
	nat_wheel_take(e, mapping);
	if (!(m->flags & NAT_RECORD_ASKED)) {
		m->references++;
		nat_host_add(e, ask->host_be, m->out_addr_be);
	}
	m->flags |= NAT_RECORD_ASKED;
	m->nonce = ask->nonce;
	m->asked_until_s = e->now_s + ask->lifetime_s;
	if (ask->open)
		m->state = NAT_MAPPING_OPEN;
	nat_wheel_hang(e, mapping);
	ask->outside_be = m->out_addr_be;
	ask->outside_port_be = m->out_port_be;
	return NAT_MAP_OK;
}

bool nat_engine_public_address(struct nat_engine *e, uint32_t host_be, uint32_t *address_be)
{
	uint32_t zone_number;
	const struct nat_zone *zone = zone_of_host(e, host_be, &zone_number);

	if (!zone)
		return false;
	const struct nat_pool *pool = &e->policy->pool[zone->config.pool];
	const struct nat_pkt pkt = {.zone = zone_number, .tuple = {.local_be = host_be}};
	if (pool->mapping != NAT_ENDPOINT_INDEPENDENT || pool->select != NAT_SELECT_PAIRED)
		return false;
	*address_be = e->policy->address[nat_first_choice(e, &pkt, pool, &e->notes->zone[pkt.zone].cursor)]
			      .address_be;
	return true;
}
