/* show config, plan: what runs, and what another file would change.
 *
 * show config gives every value that is in force, defaults included, in the words of the file. It is what
 * tools build on (dsnatctl rfc, ipvsadm): none of them reads YAML, for a second reader would sooner or
 * later read it differently.
 *
 * plan takes the text of a candidate file and changes nothing. It answers with its errors, or with what
 * would change and with the live sessions whose public address would be gone or drain. Those are counted
 * page by page, as sessions are listed; the client adds up.
 */
#include <arpa/inet.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "request_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define SCAN_RECORDS 262144u
#define HOSTS_MAX    4096u /* named in one page; every session is counted */

/* ---- show config ---- */

static json_t *address_json(uint32_t address)
{
	uint32_t address_be = htonl(address);
	char text[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &address_be, text, sizeof(text));
	return json_string(text);
}

static json_t *range_json(struct nat_range range)
{
	uint32_t first_be = htonl(range.first), last_be = htonl(range.last);
	char first[INET_ADDRSTRLEN], last[INET_ADDRSTRLEN], text[2 * INET_ADDRSTRLEN + 1];

	if (range.first == range.last)
		return address_json(range.first);
	inet_ntop(AF_INET, &first_be, first, sizeof(first));
	inet_ntop(AF_INET, &last_be, last, sizeof(last));
	snprintf(text, sizeof(text), "%s-%s", first, last);
	return json_string(text);
}

static json_t *ranges_json(const struct nat_range *ranges, uint32_t n)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < n; i++)
		json_array_append_new(list, range_json(ranges[i]));
	return list;
}

/* A range with a weight of its own is a map, as in the file. */
static json_t *weighted_json(const struct nat_pool_config *pool)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < pool->n_ranges; i++)
		if (pool->weights && pool->weights[i] != 1)
			json_array_append_new(list,
					      json_pack("{s:o, s:o}", "range", range_json(pool->ranges[i]),
							"weight", request_number(pool->weights[i])));
		else
			json_array_append_new(list, range_json(pool->ranges[i]));
	return list;
}

static json_t *interface_json(const struct nat_interface_config *i)
{
	json_t *one = json_pack("{s:s, s:s, s:s}", "name", i->name, "role", config_role_word(i->role), "path",
				config_path_word(i->path));

	if (i->device[0])
		json_object_set_new(one, "device", json_string(i->device));
	if (i->n_members) {
		json_t *members = json_array();

		for (uint32_t m = 0; m < i->n_members; m++)
			json_array_append_new(members, json_string(i->member[m]));
		json_object_set_new(one, "members", members);
	}
	if (i->vlan)
		json_object_set_new(one, "vlan", request_number(i->vlan));
	if (i->mtu_bytes)
		json_object_set_new(one, "mtu", request_number(i->mtu_bytes));
	if (i->silent)
		json_object_set_new(one, "icmp_errors", json_string("off"));
	return one;
}

static json_t *pool_json(const struct nat_pool_config *p)
{
	char ports[16];
	json_t *one;

	snprintf(ports, sizeof(ports), "%u-%u", p->port_first, p->port_last);
	one = json_pack("{s:s, s:o, s:s, s:s, s:s, s:s}", "name", p->name, "addresses", weighted_json(p),
			"ports", ports, "mapping", config_mapping_word(p->mapping), "select",
			config_select_word(p->select), "announce", config_announce_word(p->announce));
	if (p->n_drain)
		json_object_set_new(one, "drain", ranges_json(p->drain, p->n_drain));
	if (p->mapping == NAT_ENDPOINT_INDEPENDENT)
		json_object_set_new(one, "filtering", json_string(config_filtering_word(p->filtering)));
	if (p->block_ports) {
		json_object_set_new(one, "block_ports", request_number(p->block_ports));
		json_object_set_new(one, "blocks_per_host", request_number(p->blocks_per_host));
	}
	if (p->deterministic.length_bits) {
		json_object_set_new(one, "deterministic", request_prefix_json(p->deterministic));
		json_object_set_new(one, "dynamic_ports", request_number(p->dynamic_ports));
	}
	if (p->active_while_be)
		json_object_set_new(one, "active_while", address_json(ntohl(p->active_while_be)));
	return one;
}

static json_t *zone_json(const struct nat_config *nat, const struct nat_zone_config *z)
{
	json_t *one = json_pack("{s:o}", "source", request_prefix_json(z->source));

	if (z->destination.length_bits)
		json_object_set_new(one, "destination", request_prefix_json(z->destination));
	if (z->action == NAT_ACTION_POOL)
		json_object_set_new(one, "pool", json_string(nat->pools[z->pool].name));
	else
		json_object_set_new(one, "action", json_string(config_action_word(z->action)));
	if (z->mss_clamp_bytes)
		json_object_set_new(one, "mss_clamp", request_number(z->mss_clamp_bytes));
	return one;
}

static json_t *static_json(const struct nat_static_config *s)
{
	json_t *one = json_pack("{s:o, s:o}", "inside", address_json(s->inside), "outside",
				address_json(s->outside));

	if (s->outside_port) {
		json_object_set_new(one, "protocol", json_string(request_protocol_name(s->protocol)));
		json_object_set_new(one, "port", request_number(s->outside_port));
		json_object_set_new(one, "inside_port", request_number(s->inside_port));
	}
	return one;
}

static json_t *seconds_json(uint32_t seconds)
{
	char text[16];

	snprintf(text, sizeof(text), "%us", seconds);
	return json_string(text);
}

static json_t *timeouts_json(const struct nat_timeouts *t)
{
	return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "tcp_established",
			 seconds_json(t->tcp_established_s), "tcp_opening", seconds_json(t->tcp_opening_s),
			 "tcp_closing", seconds_json(t->tcp_closing_s), "udp", seconds_json(t->udp_s),
			 "udp_one_way", seconds_json(t->udp_one_way_s), "dns", seconds_json(t->dns_s), "icmp",
			 seconds_json(t->icmp_s), "hold", seconds_json(t->hold_s));
}

static json_t *collector_json(const struct nat_config *nat, const struct config_collector *c)
{
	const uint32_t address_be = htonl(c->address);
	char address[INET_ADDRSTRLEN], endpoint[INET_ADDRSTRLEN + 8];
	json_t *one, *pools;

	inet_ntop(AF_INET, &address_be, address, sizeof(address));
	snprintf(endpoint, sizeof(endpoint), "%s:%u", address, c->port);
	one = json_pack("{s:s, s:s, s:s, s:s}", "collector", endpoint, "protocol",
			config_log_protocol_word(c->protocol), "transport",
			config_log_transport_word(c->transport), "destinations",
			c->destinations ? "on" : "off");
	if (!c->pools)
		return one;
	pools = json_array();
	for (uint32_t i = 0; i < nat->n_pools; i++)
		if (c->pools[i])
			json_array_append_new(pools, json_string(nat->pools[i].name));
	json_object_set_new(one, "pools", pools);
	return one;
}

static json_t *sync_json(const struct sync_settings *sync)
{
	char peer[INET_ADDRSTRLEN], listen[INET_ADDRSTRLEN], peer_end[INET_ADDRSTRLEN + 8],
		listen_end[INET_ADDRSTRLEN + 8], key[sizeof(sync->key) + 8];

	inet_ntop(AF_INET, &sync->peer_be, peer, sizeof(peer));
	inet_ntop(AF_INET, &sync->listen_be, listen, sizeof(listen));
	snprintf(peer_end, sizeof(peer_end), "%s:%u", peer, ntohs(sync->peer_port_be));
	snprintf(listen_end, sizeof(listen_end), "%s:%u", listen, ntohs(sync->listen_port_be));
	snprintf(key, sizeof(key), "file:%s", sync->key);
	return json_pack("{s:s, s:s, s:s, s:o}", "peer", peer_end, "listen", listen_end, "key", key,
			 "hold_back", seconds_json(sync->hold_back_ms / 1000));
}

static json_t *config_json(const struct config *config)
{
	const struct nat_config *nat = &config->nat;
	json_t *interfaces = json_array(), *pools = json_array(), *zones = json_array(),
	       *statics = json_array(), *logging = json_array();

	for (uint32_t i = 0; i < nat->n_interfaces; i++)
		json_array_append_new(interfaces, interface_json(&nat->interfaces[i]));
	for (uint32_t i = 0; i < nat->n_pools; i++)
		json_array_append_new(pools, pool_json(&nat->pools[i]));
	for (uint32_t i = 0; i < nat->n_zones; i++)
		json_array_append_new(zones, zone_json(nat, &nat->zones[i]));
	for (uint32_t i = 0; i < nat->n_statics; i++)
		json_array_append_new(statics, static_json(&nat->statics[i]));
	for (uint32_t i = 0; i < config->n_collectors; i++)
		json_array_append_new(logging, collector_json(nat, &config->collectors[i]));
	json_t *all = json_pack(
		"{s:{s:o, s:o, s:s}, s:o, s:o, s:o, s:o, s:o, s:{s:o, s:o, s:o, s:o, s:o}, s:o, s:s, s:s, "
		"s:s, "
		"s:s}",
		"engine", "workers", nat->workers ? request_number(nat->workers) : json_string("auto"),
		"max_sessions", request_number(nat->max_sessions), "spare", config->spare ? "on" : "off",
		"interfaces", interfaces, "pools", pools, "zones", zones, "static", statics, "logging",
		logging, "limits", "sessions_per_host", request_number(nat->limits.sessions_per_host),
		"new_per_host_per_s", request_number(nat->limits.new_per_host_per_s), "icmp_errors_per_s",
		request_number(nat->limits.icmp_errors_per_s), "held_ports",
		request_number(nat->limits.held_ports), "fragments", request_number(nat->limits.fragments),
		"timeouts", timeouts_json(&nat->timeouts), "tcp_midflow",
		config_midflow_word(nat->tcp_midflow), "refusal", config_refusal_word(nat->refusal),
		"other_protocols", nat->pass_other_protocols ? "pass" : "drop", "port_control",
		nat->port_control ? "on" : "off");
	json_object_set_new(all, "degraded", json_string(nat->may_degrade ? "nfqueue" : "off"));
	if (config->sync.on)
		json_object_set_new(all, "sync", sync_json(&config->sync));
	return all;
}

json_t *request_show_config(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	const struct config *config = c->ops->config(c->ops->context);

	if (!request_only_keys(c, keys, COUNT(keys)))
		return NULL;
	return json_pack("{s:s, s:o}", "file", config->path, "config", config_json(config));
}

/* ---- plan: sessions that would lose their address ---- */

/* Outside addresses that take no new sessions after the change: not in the candidate, or draining there. */
struct fate {
	const struct nat_config *next;
	struct nat_range *kept, *drained; /* sorted, disjoint */
	uint32_t n_kept, n_drained;
	uint64_t cursor;
	bool more;
	uint64_t gone, draining; /* sessions */
	uint32_t drained_s;      /* until the last of them ends, if no packet comes any more */
	uint32_t n_hosts;
	uint32_t host_be
		[HOSTS_MAX]; /* of sessions that are counted; an open-addressed set would cost more than it saves */
};

static int by_first(const void *a, const void *b)
{
	const struct nat_range *x = a, *y = b;

	return (x->first > y->first) - (x->first < y->first);
}

static bool holds(const struct nat_range *ranges, uint32_t n, uint32_t address)
{
	uint32_t low = 0, high = n;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (ranges[middle].last < address)
			low = middle + 1;
		else
			high = middle;
	}
	return low < n && ranges[low].first <= address;
}

static bool visit_fate(void *argument, const struct nat_session_view *view)
{
	struct fate *fate = argument;
	uint32_t outside = ntohl(view->out_addr_be);
	bool gone = !holds(fate->kept, fate->n_kept, outside);

	if (!gone && !holds(fate->drained, fate->n_drained, outside))
		return true;
	fate->gone += gone;
	fate->draining += !gone;
	if (view->expires_s > fate->drained_s)
		fate->drained_s = view->expires_s;
	/* neighbours in the table are often one host's: a look at the last few removes most doubles */
	for (uint32_t i = fate->n_hosts; i > 0 && i + 8 > fate->n_hosts; i--)
		if (fate->host_be[i - 1] == view->inside.local_be)
			return true;
	if (fate->n_hosts < HOSTS_MAX)
		fate->host_be[fate->n_hosts++] = view->inside.local_be;
	return fate->n_hosts < HOSTS_MAX;
}

static void step_fate(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct fate *fate = argument;

	fate->more = nat_engine_sessions(e, &fate->cursor, REQUEST_STEP_RECORDS, now_ns, visit_fate, fate);
}

static struct nat_range *all_ranges(const struct nat_config *nat, bool drained, uint32_t *count)
{
	struct nat_range *list;
	uint32_t n = 0;

	for (uint32_t i = 0; i < nat->n_pools; i++)
		n += drained ? nat->pools[i].n_drain : nat->pools[i].n_ranges;
	list = calloc(n + 1, sizeof(*list));
	*count = 0;
	for (uint32_t i = 0; list && i < nat->n_pools; i++) {
		const struct nat_pool_config *pool = &nat->pools[i];
		const struct nat_range *ranges = drained ? pool->drain : pool->ranges;

		for (uint32_t j = 0; j < (drained ? pool->n_drain : pool->n_ranges); j++)
			list[(*count)++] = ranges[j];
	}
	if (list)
		qsort(list, *count, sizeof(*list), by_first);
	return list;
}

static json_t *count_sessions(struct request_context *c, struct fate *fate, uint32_t worker)
{
	uint32_t scanned = 0;
	json_t *hosts, *answer;

	while (worker < c->ops->n_workers && scanned < SCAN_RECORDS && fate->n_hosts < HOSTS_MAX) {
		if (!request_on_worker(c, worker, step_fate, fate))
			return NULL;
		scanned += REQUEST_STEP_RECORDS;
		if (!fate->more) {
			fate->cursor = 0;
			worker++;
		}
	}
	hosts = json_array();
	for (uint32_t i = 0; i < fate->n_hosts; i++)
		json_array_append_new(hosts, address_json(ntohl(fate->host_be[i])));
	answer = json_pack("{s:o, s:o, s:o, s:o}", "sessions_gone", request_number(fate->gone),
			   "sessions_draining", request_number(fate->draining), "drained_s",
			   request_number(fate->drained_s), "hosts", hosts);
	request_add_cursor(answer, c->ops, worker, fate->cursor);
	return answer;
}

json_t *request_plan(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "file", "text", "cursor"};
	const struct config *running = c->ops->config(c->ops->context);
	const char *file = "candidate", *text = NULL;
	struct config *next;
	struct fate *fate;
	uint64_t position = 0;
	uint32_t worker = 0;
	char why[256] = "";
	json_t *answer = NULL;

	if (!request_only_keys(c, keys, COUNT(keys)) || !request_read_text(c, "file", &file) ||
	    !request_read_text(c, "text", &text) || !request_read_cursor(c, &worker, &position))
		return NULL;
	if (!text)
		return request_refuse(c, "plan needs the \"text\" of a configuration file");
	next = config_parse(file, text, strlen(text), c->ops->config_flags);
	fate = calloc(1, sizeof(*fate));
	if (next->n_errors) {
		answer = request_refuse_file(c, next);
	} else if (fate) {
		fate->next = &next->nat;
		fate->cursor = position;
		fate->kept = all_ranges(&next->nat, false, &fate->n_kept);
		fate->drained = all_ranges(&next->nat, true, &fate->n_drained);
		if (fate->kept && fate->drained)
			answer = count_sessions(c, fate, worker);
		if (answer && !position && !worker) { /* the first page */
			json_object_set_new(
				answer, "restart",
				json_boolean(!config_can_follow(running, next, why, sizeof(why))));
			json_object_set_new(answer, "why_restart", json_string(why));
			json_object_set_new(answer, "problems", request_problems_json(next));
			json_object_set_new(answer, "running", config_json(running));
			json_object_set_new(answer, "candidate", config_json(next));
		}
		free(fate->kept);
		free(fate->drained);
	}
	if (!answer && !c->why[0])
		request_refuse(c, "no memory to judge the file; free some");
	free(fate);
	config_free(next);
	return answer;
}
