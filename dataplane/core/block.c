/* Port blocks: a host's ports come in blocks, so that one log line tells who had an address and port, not one
 * per session (RFC 6888 REQ-14, RFC 7422 section 1).
 *
 * A block belongs to the host for as long as one of its ports is in use, for any protocol and, in
 * endpoint-dependent pools, towards any remote; then it is free for another. Each port-owning record counts
 * once. A session whose port lies in a block that is not its host's (it is older than the configuration of
 * blocks) is not counted.
 */
#include "engine.h"

static struct nat_block *blocks_of(const struct nat_engine *e, const struct nat_pool *pool, uint32_t address)
{
	return &e->notes->block[pool->first_block + (address - pool->first_address) * pool->n_blocks];
}

static uint16_t first_port(const struct nat_pool *pool, uint32_t block)
{
	return (uint16_t)(pool->port_first + block * pool->block_ports);
}

static uint16_t take_in(struct nat_engine *e, const struct nat_pool *pool, uint32_t block,
			struct nat_tuple *outside, bool parity, uint16_t like_be, bool *tracked)
{
	const uint16_t first = first_port(pool, block);
	return nat_port_take(e, outside, first, (uint16_t)(first + pool->block_ports - 1), parity, like_be,
			     tracked);
}

static void tell(struct nat_engine *e, enum nat_event_kind kind, const struct nat_pool *pool, uint32_t block,
		 uint32_t host_be, uint32_t address_be)
{
	const uint16_t first = first_port(pool, block);
	const struct nat_event event = {.kind = (uint8_t)kind,
					.inside_be = host_be,
					.outside_be = address_be,
					.port_first = first,
					.port_last = (uint16_t)(first + pool->block_ports - 1),
					.pool_id = pool->id};

	if (e->trial != NAT_TRIAL_NONE)
		return;
	nat_event_put(e, &event);
	if (e->log && pool->log)
		nat_event_log(e, &event);
}

enum nat_reason nat_block_take(struct nat_engine *e, const struct nat_pool *pool, uint32_t address,
			       uint32_t host_be, struct nat_tuple *outside, bool parity, uint16_t like_be,
			       bool *tracked, uint16_t *port_be)
{
	struct nat_block *block = blocks_of(e, pool, address);
	uint32_t owned = 0;

	for (uint32_t i = 0; i < pool->n_blocks; i++) {
		if (block[i].host_be != host_be)
			continue;
		owned++;
		*port_be = take_in(e, pool, i, outside, parity, like_be, tracked);
		if (*port_be != 0)
			return NAT_REASON_OK;
	}
	if (owned >= pool->blocks_per_host)
		return NAT_REASON_HOST_PORTS;
	const uint32_t start = nat_scale32((uint32_t)nat_random_next(&e->random), pool->n_blocks);
	for (uint32_t k = 0; k < pool->n_blocks; k++) {
		const uint32_t i = start + k < pool->n_blocks ? start + k : start + k - pool->n_blocks;
		if (block[i].host_be != 0)
			continue;
		*port_be = take_in(e, pool, i, outside, parity, like_be, tracked);
		if (*port_be == 0)
			continue; /* all its ports are held by sessions older than the blocks */
		block[i] =
			(struct nat_block){host_be, 0}; /* told when the record is there: nat_block_count() */
		return NAT_REASON_OK;
	}
	return owned > 0 ? NAT_REASON_HOST_PORTS : NAT_REASON_NO_PORT;
}

/* The block that a record's port lies in, and its number; NULL: in none. */
static struct nat_block *block_of(const struct nat_engine *e, const struct nat_session *s,
				  const struct nat_pool **pool, uint32_t *number)
{
	if (e->policy->n_blocks == 0)
		return NULL;
	const uint32_t address = nat_policy_address(e->policy, s->out_addr_be);

	if (address == UINT32_MAX)
		return NULL;
	*pool = &e->policy->pool[e->policy->address[address].pool];
	const uint32_t offset = (uint32_t)NAT_NTOH16(s->out_port_be) - (*pool)->port_first;
	if ((*pool)->n_blocks == 0 || offset >= (*pool)->n_blocks * (*pool)->block_ports)
		return NULL;
	*number = offset / (*pool)->block_ports;
	return &blocks_of(e, *pool, address)[*number];
}

void nat_block_count(struct nat_engine *e, const struct nat_session *s, bool begins)
{
	const struct nat_pool *pool;
	uint32_t i;
	struct nat_block *block = block_of(e, s, &pool, &i);

	if (!block)
		return;
	if (begins) {
		if (block->host_be == 0)
			block->host_be = s->inside.local_be; /* after a restart */
		else if (block->host_be == s->inside.local_be && block->taken == 0)
			tell(e, NAT_EVENT_BLOCK_TAKEN, pool, i, s->inside.local_be, s->out_addr_be);
		block->taken += block->host_be == s->inside.local_be;
		return;
	}
	if (block->host_be != s->inside.local_be || block->taken == 0)
		return;
	if (--block->taken == 0) {
		block->host_be = 0;
		tell(e, NAT_EVENT_BLOCK_FREED, pool, i, s->inside.local_be, s->out_addr_be);
	}
}

void nat_block_leave(struct nat_engine *e, const struct nat_session *want)
{
	const struct nat_pool *pool;
	uint32_t i;
	struct nat_block *block = block_of(e, want, &pool, &i);

	if (block && block->host_be == want->inside.local_be && block->taken == 0)
		block->host_be = 0;
}
