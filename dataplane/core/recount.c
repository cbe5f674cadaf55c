/* Addresses that a new policy brings, and that have sessions already: begun before a restart under a
 * configuration that had them, or told by a peer whose configuration was changed first. Nobody counted
 * those sessions, but their ends will be. So they are counted now, and their blocks are their hosts'.
 * Records are looked through only when there are some that the old policy's addresses do not explain. */
#include "engine.h"

static bool is_new(const struct nat_policy *old, uint32_t address_be)
{
	return nat_policy_address(old, address_be) == UINT32_MAX;
}

static bool has_new_addresses(const struct nat_policy *policy, const struct nat_policy *old)
{
	for (uint32_t i = 0; i < policy->n_addresses; i++)
		if (is_new(old, policy->address[i].address_be))
			return true;
	return false;
}

/* Permits count as well; they only make us look for nothing. */
static bool has_uncounted(const struct nat_engine *e, const struct nat_policy *old)
{
	const struct nat_worker_notes *notes = &old->notes[e->worker];
	uint64_t counted = 0;

	for (uint32_t i = 0; i < old->n_addresses; i++) {
		counted += notes->address[i].sessions;
		for (uint32_t kind = 0; kind < NAT_TRAFFIC_KINDS; kind++)
			counted += notes->address[i].mappings[kind];
	}
	return e->counters.records > counted;
}

static void count(struct nat_engine *e, const struct nat_session *s, const struct nat_policy *old)
{
	const uint32_t address = nat_policy_address(e->policy, s->out_addr_be);

	if (address == UINT32_MAX || !is_new(old, s->out_addr_be) || s->inside.zero[0] != 0)
		return;
	if (s->flags & NAT_RECORD_MAPPING)
		e->notes->address[address].mappings[nat_traffic_kind(s->inside.protocol)]++;
	else
		e->notes->address[address].sessions++;
	if (nat_session_owns_port(s))
		nat_block_count(e, s, true);
}

void nat_notes_recount(struct nat_engine *e, const struct nat_policy *old)
{
	uint32_t leased = atomic_load(&e->table->chunks_leased);

	if (!has_new_addresses(e->policy, old) || !has_uncounted(e, old))
		return;
	if (leased > e->table->n_chunks)
		leased = e->table->n_chunks;
	for (uint32_t record = 0; record < leased * NAT_CHUNK; record++) {
		const struct nat_session *s = &e->record[record];
		if (s->timer != NAT_TIMER_FREE && s->worker == e->worker)
			count(e, s, old);
	}
}
