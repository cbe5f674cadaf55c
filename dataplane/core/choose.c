/* Which public address, and with pool.c and block.c which port of it.
 *
 * Round robin takes the next address of the zone's pool (one step per new session, as dsnat did), paired
 * the one that the host has already (RFC 4787 REQ-2), or else one by its hash, deterministic the one that
 * arithmetic says (RFC 7422). If that has no free port towards this remote the next one is tried, and so
 * on round the pool: NAT_REASON_NO_PORT means that no address had one.
 */
#include "engine.h"

/* Address numbers of the pool in the order of their turns. */
static const uint32_t *turns_of(const struct nat_engine *e, const struct nat_pool *pool)
{
	return &e->policy->order[pool->first_order];
}

/* The turn to start with; round robin moves the cursor on. */
static uint32_t starting_turn(const struct nat_engine *e, const struct nat_pkt *pkt,
			      const struct nat_pool *pool, uint32_t *cursor)
{
	if (pool->select == NAT_SELECT_ROUND_ROBIN) {
		uint32_t turn = *cursor;
		*cursor = turn + 1 == pool->n_order ? 0 : turn + 1;
		return turn;
	}
	uint32_t paired = nat_policy_address(e->policy, nat_host_paired(e, pkt->tuple.local_be));
	if (paired != UINT32_MAX && &e->policy->pool[e->policy->address[paired].pool] == pool &&
	    nat_in_service(e, paired))
		return paired - pool->first_address; /* the first round of turns is the addresses in order */
	return nat_scale32((uint32_t)(nat_hash64(&e->index.key, pkt->tuple.local_be, 2) >> 32),
			   pool->n_order);
}

struct nat_tuple nat_wanted_tuple(const struct nat_engine *e, const struct nat_pkt *pkt,
				  const struct nat_pool *pool, uint32_t address)
{
	struct nat_tuple outside = pkt->tuple;

	outside.side = 1;
	outside.local_be = e->policy->address[address].address_be;
	if (pool->mapping == NAT_ENDPOINT_INDEPENDENT) {
		outside.remote_be = 0;
		outside.remote_port_be = 0;
	}
	return outside;
}

enum nat_reason nat_take_at(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_pool *pool,
			    uint32_t address, uint16_t first, uint16_t last, struct nat_choice *choice)
{
	struct nat_tuple outside = nat_wanted_tuple(e, pkt, pool, address);
	const bool parity = pool->mapping == NAT_ENDPOINT_INDEPENDENT; /* RFC 4787 REQ-4 */
	enum nat_reason reason = NAT_REASON_NO_PORT;

	choice->address = address;
	if (pool->n_blocks != 0) {
		reason = nat_block_take(e, pool, address, pkt->tuple.local_be, &outside, parity,
					pkt->tuple.local_port_be, &choice->tracked, &choice->port_be);
	} else {
		choice->port_be = nat_port_take(e, &outside, first, last, parity, pkt->tuple.local_port_be,
						&choice->tracked);
		if (choice->port_be != 0)
			reason = NAT_REASON_OK;
	}
	if (reason != NAT_REASON_OK)
		e->notes->address[address].refused += e->trial == NAT_TRIAL_NONE;
	return reason;
}

/* RFC 7422: the host's own ports, then the share of its address that is kept for overflow. */
static enum nat_reason choose_by_arithmetic(struct nat_engine *e, const struct nat_pkt *pkt,
					    const struct nat_pool *pool, struct nat_choice *choice)
{
	uint32_t address_be;
	uint16_t first, n_ports;

	if (!nat_policy_deterministic(e->policy, e->policy->zone[pkt->zone].config.pool, pkt->tuple.local_be,
				      &address_be, &first, &n_ports))
		return NAT_REASON_NO_ZONE;
	const uint32_t address = nat_policy_address(e->policy, address_be);
	if (nat_take_at(e, pkt, pool, address, first, (uint16_t)(first + n_ports - 1), choice) ==
	    NAT_REASON_OK)
		return NAT_REASON_OK;
	if (pool->dynamic_first > pool->port_last || pool->dynamic_first <= first)
		return NAT_REASON_HOST_PORTS;
	return nat_take_at(e, pkt, pool, address, pool->dynamic_first, pool->port_last, choice);
}

enum nat_reason nat_choose(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_pool *pool,
			   struct nat_choice *choice)
{
	const uint32_t *turns = turns_of(e, pool);

	if (pool->n_hosts != 0)
		return choose_by_arithmetic(e, pkt, pool, choice);
	uint32_t turn = starting_turn(e, pkt, pool, &e->notes->zone[pkt->zone].cursor);
	for (uint32_t tried = 0; tried < pool->n_order; tried++) {
		const uint32_t address = turns[turn];
		turn = turn + 1 == pool->n_order ? 0 : turn + 1;
		if (!nat_in_service(e, address))
			continue;
		enum nat_reason reason =
			nat_take_at(e, pkt, pool, address, pool->port_first, pool->port_last, choice);
		if (reason == NAT_REASON_OK && pool->select == NAT_SELECT_ROUND_ROBIN && tried != 0)
			/* An address was skipped: go on behind the one that was taken, or it would get its
			 * neighbour's share. */
			e->notes->zone[pkt->zone].cursor = turn;
		if (reason != NAT_REASON_NO_PORT)
			return reason;
	}
	return NAT_REASON_NO_PORT;
}

uint32_t nat_first_choice(const struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_pool *pool,
			  uint32_t *cursor)
{
	return turns_of(e, pool)[starting_turn(e, pkt, pool, cursor)];
}
