/* What the control thread sees of an engine's tables: sessions, addresses, zones; and the two ways in
 * which it ends sessions. All of it from the worker's own thread, a bounded number of records at a time.
 */
#include "engine.h"

static const char *state_name(const struct nat_session *s)
{
	static const char *const name[NAT_TIMER_COUNT] = {
		[NAT_TIMER_FREE] = "free",
		[NAT_TIMER_TCP_OPENING] = "opening",
		[NAT_TIMER_TCP_ESTABLISHED] = "established",
		[NAT_TIMER_TCP_CLOSING] = "closing",
		[NAT_TIMER_UDP] = "two_way",
		[NAT_TIMER_UDP_ONE_WAY] = "one_way",
		[NAT_TIMER_DNS] = "dns",
		[NAT_TIMER_ICMP] = "query",
		[NAT_TIMER_HOLD] = "hold",
	};
	return name[s->timer];
}

void nat_session_show(const struct nat_engine *e, uint32_t record, struct nat_session_view *view)
{
	const struct nat_session *s = &e->record[record];
	const uint32_t deadline_s = nat_session_deadline(e, s);

	*view = (struct nat_session_view){.inside = s->inside,
					  .out_addr_be = s->out_addr_be,
					  .out_port_be = s->out_port_be,
					  .zone_id = s->zone_id,
					  .pool_id = s->pool_id,
					  .state = state_name(s),
					  .age_s = e->now_s - s->created_s,
					  .idle_s = e->now_s - s->last_seen_s,
					  .expires_s = deadline_s > e->now_s ? deadline_s - e->now_s : 0,
					  .bytes_out = s->bytes_out,
					  .bytes_in = s->bytes_in,
					  .record = record,
					  .worker = s->worker};
}

bool nat_engine_sessions(struct nat_engine *e, uint64_t *cursor, uint32_t budget, uint64_t now_ns,
			 bool (*visit)(void *context, const struct nat_session_view *view), void *context)
{
	uint32_t leased = atomic_load(&e->table->chunks_leased);

	nat_engine_set_time(e, now_ns);
	if (leased > e->table->n_chunks)
		leased = e->table->n_chunks;
	while (*cursor < (uint64_t)leased * NAT_CHUNK) {
		const uint32_t record = (uint32_t)*cursor;
		if (budget-- == 0)
			return true;
		(*cursor)++;
		const struct nat_session *s = &e->record[record];
		struct nat_session_view view;
		if (s->timer == NAT_TIMER_FREE || s->worker != e->worker || (s->flags & NAT_RECORD_MAPPING) ||
		    nat_session_over(e, s))
			continue;
		nat_session_show(e, record, &view);
		if (!visit(context, &view))
			return true;
	}
	return false;
}

uint64_t nat_engine_not_adopted(const struct nat_engine *e)
{
	return e->not_adopted;
}

bool nat_engine_clear(struct nat_engine *e, uint32_t record)
{
	if (record >= e->table->n_records || e->record[record].worker != e->worker ||
	    e->record[record].timer == NAT_TIMER_FREE || (e->record[record].flags & NAT_RECORD_MAPPING))
		return false;
	e->counters.sessions_closed++;
	nat_session_end(e, record);
	return true;
}

bool nat_engine_cut(struct nat_engine *e, uint64_t *cursor, uint32_t budget, uint64_t now_ns, uint64_t *ended)
{
	uint64_t end = (uint64_t)atomic_load(&e->table->chunks_leased) * NAT_CHUNK;

	nat_engine_set_time(e, now_ns);
	if (end > e->table->n_records)
		end = e->table->n_records;
	for (; *cursor < end && budget-- > 0; (*cursor)++) {
		const uint32_t record = (uint32_t)*cursor;
		struct nat_session *s = &e->record[record];
		if (s->timer == NAT_TIMER_FREE || s->worker != e->worker ||
		    nat_policy_address(e->policy, s->out_addr_be) != UINT32_MAX)
			continue;
		if (!(s->flags & NAT_RECORD_MAPPING)) {
			e->counters.sessions_closed++;
			++*ended;
			nat_session_end(e, record);
		} else if (s->flags & NAT_RECORD_ASKED) {
			nat_session_lapse(e, record);
		} else if (s->timer == NAT_TIMER_HOLD) {
			nat_session_end(e, record);
		}
	}
	return *cursor < end;
}

bool nat_engine_address(const struct nat_engine *e, uint32_t i, struct nat_address_view *view)
{
	if (i >= e->policy->n_addresses)
		return false;
	*view = (struct nat_address_view){.address_be = e->policy->address[i].address_be,
					  .pool = e->policy->address[i].pool,
					  .sessions = e->notes->address[i].sessions,
					  .created = e->notes->address[i].created,
					  .refused = e->notes->address[i].refused,
					  .mappings = {e->notes->address[i].mappings[NAT_TRAFFIC_TCP],
						       e->notes->address[i].mappings[NAT_TRAFFIC_UDP],
						       e->notes->address[i].mappings[NAT_TRAFFIC_ICMP]},
					  .draining = e->policy->address[i].draining,
					  .reserved = e->policy->address[i].reserved};
	return true;
}

bool nat_engine_zone(const struct nat_engine *e, uint32_t i, struct nat_zone_view *view)
{
	if (i >= e->policy->n_zones)
		return false;
	*view = (struct nat_zone_view){.config = e->policy->zone[i].config,
				       .id = e->policy->zone[i].id,
				       .created = e->notes->zone[i].created,
				       .refused = e->notes->zone[i].refused};
	return true;
}
