/* show counters, pools, zones, workers, ports: what is summed over the workers. */
#include <arpa/inet.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "request_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define PAGE_ADDRESSES 65536u /* in one answer, unless the request says otherwise */

/* ---- show counters ---- */

static void copy_counters(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	(void)now_ns;
	*(struct nat_counters *)argument = *nat_engine_counters(e);
}

static uint64_t sum_dropped(const struct nat_counters *n)
{
	uint64_t sum = 0;

	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		if (nat_reason_verdict((enum nat_reason)i) == NAT_DROP)
			sum += n->reason[i];
	return sum;
}

static bool equation_holds(const struct nat_counters *n)
{
	return n->received + n->taken_over ==
	       n->forwarded + n->passed + sum_dropped(n) + n->handed_over + n->held;
}

static void add_counters(struct nat_counters *sum, const struct nat_counters *n)
{
	sum->received += n->received;
	sum->taken_over += n->taken_over;
	sum->forwarded += n->forwarded;
	sum->passed += n->passed;
	sum->handed_over += n->handed_over;
	sum->held += n->held;
	for (unsigned i = 0; i < NAT_CAUSE_COUNT; i++)
		sum->cause[i] += n->cause[i];
	sum->made += n->made;
	sum->events_lost += n->events_lost;
	sum->records += n->records;
	sum->allocation.sum_ns += n->allocation.sum_ns;
	for (unsigned i = 0; i < NAT_LATENCY_BUCKETS; i++)
		sum->allocation.bucket[i] += n->allocation.bucket[i];
	sum->sessions_created += n->sessions_created;
	sum->sessions_expired += n->sessions_expired;
	sum->sessions_closed += n->sessions_closed;
	sum->sessions += n->sessions;
	for (unsigned i = 0; i < NAT_TRAFFIC_KINDS; i++) {
		sum->traffic[i].sessions_created += n->traffic[i].sessions_created;
		sum->traffic[i].packets_out += n->traffic[i].packets_out;
		sum->traffic[i].packets_in += n->traffic[i].packets_in;
		sum->traffic[i].bytes_out += n->traffic[i].bytes_out;
		sum->traffic[i].bytes_in += n->traffic[i].bytes_in;
	}
	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		sum->reason[i] += n->reason[i];
}

bool request_sum_counters(struct request_context *c, struct nat_counters *sum, bool *equation)
{
	struct nat_counters n;

	*sum = (struct nat_counters){0};
	*equation = true;
	for (uint32_t worker = 0; worker < c->ops->n_workers; worker++) {
		if (!request_on_worker(c, worker, copy_counters, &n))
			return false;
		*equation &= equation_holds(&n);
		add_counters(sum, &n);
	}
	return true;
}

/* Over all workers: handed over = taken over + in rings. Workers are not read at one moment, so while packets
 * are handed over the sums may be apart; only a difference that stands still is a fault. */
static bool handover_holds(struct request_context *c, const struct nat_counters *sum)
{
	struct nat_counters before = *sum, after;

	for (int attempt = 0; attempt < 5; attempt++) {
		uint64_t in_rings = c->ops->in_rings ? c->ops->in_rings(c->ops->context) : 0;
		bool ignored;

		if (before.handed_over == before.taken_over + in_rings)
			return true;
		if (!request_sum_counters(c, &after, &ignored))
			return false;
		if (after.handed_over == before.handed_over && after.taken_over == before.taken_over)
			return false;
		before = after;
	}
	return true; /* too busy to tell; each worker's own equation is exact */
}

static json_t *traffic_json(const struct nat_traffic *t)
{
	return json_pack("{s:o, s:o, s:o, s:o, s:o}", "sessions_created", request_number(t->sessions_created),
			 "packets_out", request_number(t->packets_out), "packets_in",
			 request_number(t->packets_in), "bytes_out", request_number(t->bytes_out), "bytes_in",
			 request_number(t->bytes_in));
}

/* Upper ends in nanoseconds; the last bucket has none. */
static json_t *latency_json(const struct nat_latency *l)
{
	json_t *buckets = json_array();

	for (unsigned i = 0; i < NAT_LATENCY_BUCKETS; i++)
		json_array_append_new(buckets, json_pack("[o, o]",
							 i + 1 < NAT_LATENCY_BUCKETS
								 ? request_number(nat_latency_ns[i])
								 : json_null(),
							 request_number(l->bucket[i])));
	return json_pack("{s:o, s:o}", "buckets", buckets, "sum_ns", request_number(l->sum_ns));
}

static json_t *counters_json(const struct nat_counters *n)
{
	uint64_t bytes_out = 0, bytes_in = 0;
	json_t *reasons = json_object(), *causes, *all;

	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		if (i != NAT_REASON_OK)
			json_object_set_new(reasons, nat_reason_name((enum nat_reason)i),
					    request_number(n->reason[i]));
	for (unsigned kind = 0; kind < NAT_TRAFFIC_KINDS; kind++) {
		bytes_out += n->traffic[kind].bytes_out;
		bytes_in += n->traffic[kind].bytes_in;
	}
	all = json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
			"received", request_number(n->received), "taken_over", request_number(n->taken_over),
			"forwarded", request_number(n->forwarded), "passed", request_number(n->passed),
			"dropped", request_number(sum_dropped(n)), "handed_over",
			request_number(n->handed_over), "held", request_number(n->held), "made",
			request_number(n->made), "sessions", request_number(n->sessions), "sessions_created",
			request_number(n->sessions_created), "sessions_expired",
			request_number(n->sessions_expired), "sessions_closed",
			request_number(n->sessions_closed), "bytes_out", request_number(bytes_out),
			"bytes_in", request_number(bytes_in), "reasons", reasons);
	causes = json_object();
	for (unsigned i = 0; i < NAT_CAUSE_COUNT; i++)
		json_object_set_new(causes, nat_cause_name((enum nat_cause)i), request_number(n->cause[i]));
	json_object_set_new(all, "handed_over_by_cause", causes);
	json_object_set_new(all, "traffic",
			    json_pack("{s:o, s:o, s:o}", "tcp", traffic_json(&n->traffic[NAT_TRAFFIC_TCP]),
				      "udp", traffic_json(&n->traffic[NAT_TRAFFIC_UDP]), "icmp",
				      traffic_json(&n->traffic[NAT_TRAFFIC_ICMP])));
	json_object_set_new(all, "records", request_number(n->records));
	json_object_set_new(all, "events_lost", request_number(n->events_lost));
	json_object_set_new(all, "allocation", latency_json(&n->allocation));
	return all;
}

/* Only what has dropped something: what an operator looks at first. */
static json_t *dropped_json(const struct nat_counters *n)
{
	json_t *dropped = json_object();

	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		if (n->reason[i] && nat_reason_verdict((enum nat_reason)i) == NAT_DROP)
			json_object_set_new(dropped, nat_reason_name((enum nat_reason)i),
					    request_number(n->reason[i]));
	return dropped;
}

static json_t *reasons_json(void)
{
	static const char *const verdicts[] = {
		[NAT_FORWARD] = "forward", [NAT_PASS] = "pass", [NAT_DROP] = "drop", [NAT_HOLD] = "hold"};
	json_t *table = json_object();

	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		json_object_set_new(table, nat_reason_name((enum nat_reason)i),
				    json_pack("{s:s, s:s, s:s}", "verdict",
					      verdicts[nat_reason_verdict((enum nat_reason)i)], "meaning",
					      nat_reason_meaning((enum nat_reason)i), "advice",
					      nat_reason_advice((enum nat_reason)i)));
	return table;
}

json_t *request_show_counters(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what", "explain"};
	struct nat_counters sum;
	bool equation, explain = false;
	json_t *answer;

	if (!request_only_keys(c, keys, COUNT(keys)) || !request_read_flag(c, "explain", &explain) ||
	    !request_sum_counters(c, &sum, &equation))
		return NULL;
	equation = equation && handover_holds(c, &sum);
	answer = json_pack("{s:o, s:o, s:b, s:o}", "counters", counters_json(&sum), "dropped",
			   dropped_json(&sum), "equation", equation, "nat_log", request_log_json(c->ops));
	if (explain)
		json_object_set_new(answer, "meanings", reasons_json());
	return answer;
}

/* ---- show pools ---- */

struct address_step {
	uint32_t next, n;
	bool more;
	struct nat_address_view view[REQUEST_STEP_RECORDS];
};

static void step_addresses(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct address_step *step = argument;

	(void)now_ns;
	step->n = 0;
	while (step->n < REQUEST_STEP_RECORDS &&
	       nat_engine_address(e, step->next + step->n, &step->view[step->n]))
		step->n++;
	step->more = step->n == REQUEST_STEP_RECORDS;
	step->next += step->n;
}

/* The views of all addresses, summed over the workers; the caller frees. */
static struct nat_address_view *sum_addresses(struct request_context *c, uint32_t *count)
{
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	struct nat_address_view *sum;
	struct address_step *step;
	uint64_t n = 0;

	for (uint32_t i = 0; i < nat->n_pools; i++)
		for (uint32_t j = 0; j < nat->pools[i].n_ranges; j++)
			n += (uint64_t)nat->pools[i].ranges[j].last - nat->pools[i].ranges[j].first + 1;
	sum = calloc(n ? n : 1, sizeof(*sum));
	step = malloc(sizeof(*step));
	for (uint32_t worker = 0; sum && step && worker < c->ops->n_workers; worker++) {
		step->next = 0;
		do {
			uint32_t base = step->next;

			if (!request_on_worker(c, worker, step_addresses, step)) {
				free(sum);
				free(step);
				return NULL;
			}
			for (uint32_t i = 0; i < step->n && base + i < n; i++) {
				struct nat_address_view before = sum[base + i];

				sum[base + i] = step->view[i];
				sum[base + i].sessions += before.sessions;
				sum[base + i].created += before.created;
				sum[base + i].refused += before.refused;
				for (uint32_t kind = 0; kind < NAT_TRAFFIC_KINDS; kind++)
					sum[base + i].mappings[kind] += before.mappings[kind];
			}
		} while (step->more);
	}
	if (!sum || !step) {
		request_refuse(c, "no memory to show %" PRIu64 " addresses; free some", n);
		free(sum);
		sum = NULL;
	}
	free(step);
	*count = (uint32_t)n;
	return sum;
}

static json_t *address_text(uint32_t address_be)
{
	char address[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &address_be, address, sizeof(address));
	return json_string(address);
}

static json_t *mappings_json(const uint64_t mappings[NAT_TRAFFIC_KINDS])
{
	return json_pack("{s:o, s:o, s:o}", "tcp", request_number(mappings[NAT_TRAFFIC_TCP]), "udp",
			 request_number(mappings[NAT_TRAFFIC_UDP]), "icmp",
			 request_number(mappings[NAT_TRAFFIC_ICMP]));
}

static json_t *address_json(const struct nat_address_view *v)
{
	char address[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &v->address_be, address, sizeof(address));
	return json_pack("{s:s, s:o, s:o, s:o, s:o, s:b, s:b}", "address", address, "sessions",
			 request_number(v->sessions), "mappings", mappings_json(v->mappings), "created",
			 request_number(v->created), "refused", request_number(v->refused), "draining",
			 v->draining, "reserved", v->reserved);
}

static json_t *pool_json(const struct nat_pool_config *pool, const struct nat_policy *policy, uint32_t index,
			 const struct nat_address_view *view, uint32_t n, uint32_t addresses_max,
			 uint32_t *room)
{
	uint64_t sessions = 0, created = 0, refused = 0, addresses = 0, draining = 0,
		 mappings[NAT_TRAFFIC_KINDS] = {0};
	json_t *list = json_array(), *one;
	char ports[16];

	for (uint32_t i = 0; i < n; i++) {
		if (view[i].pool != index)
			continue;
		addresses++;
		draining += view[i].draining;
		sessions += view[i].sessions;
		created += view[i].created;
		refused += view[i].refused;
		for (uint32_t kind = 0; kind < NAT_TRAFFIC_KINDS; kind++)
			mappings[kind] += view[i].mappings[kind];
		if (*room && n <= addresses_max) {
			json_array_append_new(list, address_json(&view[i]));
			--*room;
		}
	}
	snprintf(ports, sizeof(ports), "%u-%u", pool->port_first, pool->port_last);
	one = json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:b}", "name", pool->name, "mapping",
			config_mapping_word(pool->mapping), "filtering",
			config_filtering_word(pool->filtering), "select", config_select_word(pool->select),
			"announce", config_announce_word(pool->announce), "ports", ports, "active",
			nat_policy_is_active(policy, index));
	json_object_set_new(one, "id", request_number(nat_policy_pool_id(policy, index)));
	if (pool->active_while_be)
		json_object_set_new(one, "active_while", address_text(pool->active_while_be));
	json_object_set_new(one, "n_ports",
			    request_number(addresses * (pool->port_last - pool->port_first + 1u)));
	json_object_set_new(one, "mappings", mappings_json(mappings));
	json_object_set_new(one, "sessions", request_number(sessions));
	json_object_set_new(one, "created", request_number(created));
	json_object_set_new(one, "refused", request_number(refused));
	json_object_set_new(one, "n_addresses", request_number(addresses));
	json_object_set_new(one, "n_draining", request_number(draining));
	json_object_set_new(one, "addresses", list);
	return one;
}

json_t *request_show_pools(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what", "pool", "limit", "small"};
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	const struct nat_policy *policy = c->ops->policy(c->ops->context);
	/* small: only pools of at most so many addresses list them */
	uint32_t n, room = PAGE_ADDRESSES, small = UINT32_MAX, start = 0;
	struct nat_address_view *view;
	const char *only = NULL;
	json_t *list;

	if (!request_only_keys(c, keys, COUNT(keys)) || !request_read_given(c, "pool", &only) ||
	    !request_read_count(c, "limit", CONFIG_ADDRESSES_MAX, &room) ||
	    !request_read_count(c, "small", CONFIG_ADDRESSES_MAX, &small))
		return NULL;
	view = sum_addresses(c, &n);
	if (!view)
		return NULL;
	list = json_array();
	for (uint32_t i = 0; i < nat->n_pools; i++) {
		uint32_t end = start;

		while (end < n && view[end].pool == i)
			end++;
		if (!only || !strcmp(only, nat->pools[i].name))
			json_array_append_new(list, pool_json(&nat->pools[i], policy, i, view + start,
							      end - start, small, &room));
		start = end;
	}
	free(view);
	if (only && !json_array_size(list)) {
		json_decref(list);
		return request_refuse(c, "there is no pool \"%.40s\"", only);
	}
	return json_pack("{s:o}", "pools", list);
}

/* ---- show zones ---- */

struct zone_step {
	uint32_t next, n;
	struct nat_zone_view view[REQUEST_STEP_RECORDS];
};

static void step_zones(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct zone_step *step = argument;

	(void)now_ns;
	step->n = 0;
	while (step->n < REQUEST_STEP_RECORDS &&
	       nat_engine_zone(e, step->next + step->n, &step->view[step->n]))
		step->n++;
	step->next += step->n;
}

static json_t *zone_json(const struct nat_config *nat, const struct nat_zone_config *zone)
{
	json_t *one = json_pack("{s:o, s:s}", "source", request_prefix_json(zone->source), "action",
				config_action_word(zone->action));

	if (zone->destination.length_bits)
		json_object_set_new(one, "destination", request_prefix_json(zone->destination));
	if (zone->action == NAT_ACTION_POOL)
		json_object_set_new(one, "pool", json_string(nat->pools[zone->pool].name));
	if (zone->mss_clamp_bytes)
		json_object_set_new(one, "mss_clamp", request_number(zone->mss_clamp_bytes));
	return one;
}

/* created and refused of all zones: [2 * i] and [2 * i + 1] */
static bool sum_zones(struct request_context *c, uint64_t *sum, uint32_t n_zones)
{
	struct zone_step *step = malloc(sizeof(*step));

	if (!step) {
		request_refuse(c, "no memory to show the zones; free some");
		return false;
	}
	for (uint32_t worker = 0; worker < c->ops->n_workers; worker++) {
		step->next = 0;
		do {
			uint32_t base = step->next;

			if (!request_on_worker(c, worker, step_zones, step)) {
				free(step);
				return false;
			}
			for (uint32_t i = 0; i < step->n && base + i < n_zones; i++) {
				sum[2 * (base + i)] += step->view[i].created;
				sum[2 * (base + i) + 1] += step->view[i].refused;
			}
		} while (step->n == REQUEST_STEP_RECORDS);
	}
	free(step);
	return true;
}

json_t *request_show_zones(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	uint64_t *sum;
	json_t *list;

	if (!request_only_keys(c, keys, COUNT(keys)))
		return NULL;
	sum = calloc(2 * (size_t)nat->n_zones + 1, sizeof(*sum));
	if (!sum)
		return request_refuse(c, "no memory to show the zones; free some");
	if (!sum_zones(c, sum, nat->n_zones)) {
		free(sum);
		return NULL;
	}
	list = json_array();
	for (uint32_t i = 0; i < nat->n_zones; i++) {
		json_t *one = zone_json(nat, &nat->zones[i]);

		json_object_set_new(one, "created", request_number(sum[2 * i]));
		json_object_set_new(one, "refused", request_number(sum[2 * i + 1]));
		json_array_append_new(list, one);
	}
	free(sum);
	return json_pack("{s:o}", "zones", list);
}

/* ---- show workers, show ports ---- */

json_t *request_show_workers(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	json_t *list;

	if (!request_only_keys(c, keys, COUNT(keys)))
		return NULL;
	list = json_array();
	for (uint32_t i = 0; i < c->ops->n_workers; i++) {
		struct request_worker w = {.core = -1};
		struct nat_counters n;
		json_t *one;

		if (!c->ops->on_worker(c->ops->context, i, copy_counters, &n)) {
			json_array_append_new(
				list, json_pack("{s:o, s:b}", "worker", request_number(i), "answers", 0));
			continue;
		}
		one = json_pack("{s:o, s:b}", "worker", request_number(i), "answers", 1);
		if (c->ops->worker && c->ops->worker(c->ops->context, i, &w)) {
			json_object_set_new(one, "core", json_integer(w.core));
			json_object_set_new(one, "bursts", request_number(w.bursts));
			json_object_set_new(one, "packets", request_number(w.packets));
			json_object_set_new(one, "busy_ns", request_number(w.busy_ns));
			json_object_set_new(one, "idle_ns", request_number(w.idle_ns));
			json_object_set_new(one, "work_ns", request_number(w.work_ns));
			json_object_set_new(one, "longest_job_ns", request_number(w.longest_job_ns));
			json_object_set_new(one, "sleeps", request_number(w.sleeps));
			json_object_set_new(one, "cycles", request_number(w.cycles));
			json_object_set_new(one, "handover_sent", request_number(w.handover_sent));
			json_object_set_new(one, "handover_received", request_number(w.handover_received));
		}
		json_object_set_new(one, "equation", json_boolean(equation_holds(&n)));
		json_object_set_new(one, "counters", counters_json(&n));
		json_array_append_new(list, one);
	}
	return json_pack("{s:o}", "workers", list);
}

static void add_port(json_t *one, const struct request_port *p)
{
	json_object_set_new(one, "twin", json_string(p->twin ? p->twin : ""));
	json_object_set_new(one, "mac", json_string(p->mac));
	json_object_set_new(one, "up", json_boolean(p->up));
	json_object_set_new(one, "speed_mbps", request_number(p->speed_mbps));
	json_object_set_new(one, "mtu", request_number(p->mtu_bytes));
	json_object_set_new(one, "queues", request_number(p->queues));
	json_object_set_new(one, "rx_packets", request_number(p->rx_packets));
	json_object_set_new(one, "rx_bytes", request_number(p->rx_bytes));
	json_object_set_new(one, "rx_missed", request_number(p->rx_missed));
	json_object_set_new(one, "rx_errors", request_number(p->rx_errors));
	json_object_set_new(one, "tx_packets", request_number(p->tx_packets));
	json_object_set_new(one, "tx_bytes", request_number(p->tx_bytes));
	json_object_set_new(one, "tx_errors", request_number(p->tx_errors));
	json_object_set_new(one, "twin_to_packets", request_number(p->twin_to_packets));
	json_object_set_new(one, "twin_from_packets", request_number(p->twin_from_packets));
}

json_t *request_show_ports(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	json_t *list;

	if (!request_only_keys(c, keys, COUNT(keys)))
		return NULL;
	list = json_array();
	for (uint32_t i = 0; i < nat->n_interfaces; i++) {
		const struct nat_interface_config *interface = &nat->interfaces[i];
		json_t *one = json_pack("{s:s, s:s, s:s, s:s}", "name", interface->name, "role",
					config_role_word(interface->role), "path",
					config_path_word(interface->path), "device", interface->device);
		struct request_port port = {0};

		for (uint32_t j = 0; c->ops->port && c->ops->port(c->ops->context, j, &port); j++) {
			if (!strcmp(port.name, interface->name)) {
				add_port(one, &port);
				break;
			}
			port = (struct request_port){0};
		}
		json_array_append_new(list, one);
	}
	return json_pack("{s:o}", "ports", list);
}
