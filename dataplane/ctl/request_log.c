/* The NAT log in `show counters`: what workers told, what each collector got, and what neither did. */
#include <jansson.h>

#include "request_internal.h"

static const char *const kinds[NAT_EVENT_KINDS] = {
	[NAT_EVENT_PORTS_EXHAUSTED] = "ports_exhausted", [NAT_EVENT_TABLE_FULL] = "table_full",
	[NAT_EVENT_HOST_LIMIT] = "host_limit",           [NAT_EVENT_BLOCK_TAKEN] = "block_allocated",
	[NAT_EVENT_BLOCK_FREED] = "block_freed",         [NAT_EVENT_SESSION_CREATED] = "session_created",
	[NAT_EVENT_SESSION_ENDED] = "session_ended",     [NAT_EVENT_MAPPING_CREATED] = "mapping_created",
	[NAT_EVENT_MAPPING_ENDED] = "mapping_ended",
};

static json_t *counts_json(const uint64_t count[NAT_EVENT_KINDS])
{
	json_t *all = json_object();

	for (uint32_t kind = 0; kind < NAT_EVENT_KINDS; kind++)
		json_object_set_new(all, kinds[kind], request_number(count[kind]));
	return all;
}

static json_t *collector_json(const struct request_collector *c)
{
	const struct collector_view *v = &c->state;

	return json_pack("{s:s, s:s, s:s, s:b, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
			 "collector", c->collector, "protocol", c->protocol, "transport", c->transport, "up",
			 v->up, "why", v->why, "records_sent", request_number(v->records_sent),
			 "records_lost", request_number(v->records_lost), "records_refused",
			 request_number(v->records_refused), "records_queued",
			 request_number(v->records_queued), "bytes_queued", request_number(v->bytes_queued),
			 "bytes_queued_max", request_number(v->bytes_queued_max), "messages_sent",
			 request_number(v->messages_sent), "bytes_sent", request_number(v->bytes_sent),
			 "stalls", request_number(v->stalls), "connections", request_number(v->connections));
}

json_t *request_log_json(const struct request_ops *ops)
{
	json_t *workers = json_array(), *collectors = json_array();
	struct request_collector collector;
	struct nat_event_counts counts;

	for (uint32_t worker = 0; ops->events && worker < ops->n_workers; worker++)
		if (ops->events(ops->context, worker, &counts))
			json_array_append_new(workers,
					      json_pack("{s:o, s:o, s:o}", "worker", request_number(worker),
							"told", counts_json(counts.put), "lost",
							counts_json(counts.lost)));
	for (uint32_t i = 0; ops->collector && ops->collector(ops->context, i, &collector); i++)
		json_array_append_new(collectors, collector_json(&collector));
	return json_pack("{s:o, s:o}", "workers", workers, "collectors", collectors);
}
