/* show sessions, clear: filters, and a walk over the tables of all workers in bounded steps. */
#include <arpa/inet.h>
#include <inttypes.h>
#include <jansson.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include "request_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define SCAN_RECORDS  262144u /* looked at for one answer; a rare match must not block the control thread */
#define PAGE_SESSIONS 500u    /* in one answer, unless the request says otherwise */
#define PAGE_MAX      1000u   /* some 10 ms of the control thread, which also follows routes and neighbours */

/* ---- sessions: filters ---- */

struct end_filter { /* ADDRESS[/LENGTH][:PORT]; all zero: anything */
	uint32_t address_be, mask_be;
	uint16_t port_be;
};

struct filter {
	struct end_filter host, remote, outside;
	uint8_t protocol;
	const char *state;
	const char *pool;
	uint32_t older_s, younger_s; /* age at least, less than; 0: any */
	bool any;                    /* something was asked for */
};

static const struct {
	const char *name;
	uint8_t protocol;
} protocols[] = {{"tcp", IPPROTO_TCP}, {"udp", IPPROTO_UDP}, {"icmp", IPPROTO_ICMP}};

const char *request_protocol_name(uint8_t protocol)
{
	for (size_t i = 0; i < COUNT(protocols); i++)
		if (protocols[i].protocol == protocol)
			return protocols[i].name;
	return "other";
}

static bool parse_end(const char *text, struct end_filter *out)
{
	char address[INET_ADDRSTRLEN];
	size_t length = strcspn(text, "/:");
	unsigned long bits = 32, port = 0;
	char *end = (char *)(uintptr_t)(text + length);
	struct in_addr parsed;

	if (length >= sizeof(address))
		return false;
	memcpy(address, text, length);
	address[length] = 0;
	if (length && inet_pton(AF_INET, address, &parsed) != 1)
		return false;
	if (*end == '/') {
		if (!length || end[1] < '0' || end[1] > '9')
			return false;
		bits = strtoul(end + 1, &end, 10);
		if (bits > 32)
			return false;
	}
	if (*end == ':') {
		if (end[1] < '0' || end[1] > '9')
			return false;
		port = strtoul(end + 1, &end, 10);
		if (port < 1 || port > 65535)
			return false;
	}
	if (*end)
		return false;
	if (length) {
		out->mask_be = htonl(bits ? UINT32_MAX << (32 - bits) : 0);
		out->address_be = parsed.s_addr & out->mask_be;
	}
	out->port_be = htons((uint16_t)port);
	return true;
}

static bool read_end(struct request_context *c, const char *key, struct filter *filter,
		     struct end_filter *out)
{
	const char *text = NULL;

	if (!request_read_given(c, key, &text))
		return false;
	if (!text)
		return true;
	filter->any = true;
	if (parse_end(text, out))
		return true;
	request_refuse(c, "\"%s\" is \"%.40s\"; write ADDRESS, ADDRESS:PORT or ADDRESS/LENGTH", key, text);
	return false;
}

static bool read_filter(struct request_context *c, struct filter *filter)
{
	const char *protocol = NULL;

	if (!read_end(c, "host", filter, &filter->host) || !read_end(c, "remote", filter, &filter->remote) ||
	    !read_end(c, "outside", filter, &filter->outside) ||
	    !request_read_given(c, "protocol", &protocol) ||
	    !request_read_given(c, "state", &filter->state) ||
	    !request_read_given(c, "pool", &filter->pool) ||
	    !request_read_count(c, "older_s", UINT32_MAX, &filter->older_s) ||
	    !request_read_count(c, "younger_s", UINT32_MAX, &filter->younger_s))
		return false;
	if (protocol) {
		for (size_t i = 0; i < COUNT(protocols); i++)
			if (!strcmp(protocol, protocols[i].name))
				filter->protocol = protocols[i].protocol;
		if (!filter->protocol) {
			request_refuse(c, "\"protocol\" is \"%.20s\"; it must be tcp, udp or icmp", protocol);
			return false;
		}
	}
	filter->any |= protocol || filter->state || filter->pool || filter->older_s || filter->younger_s;
	return true;
}

static bool end_matches(const struct end_filter *filter, uint32_t address_be, uint16_t port_be)
{
	return (address_be & filter->mask_be) == filter->address_be &&
	       (!filter->port_be || filter->port_be == port_be);
}

/* ---- sessions: steps on the worker ---- */

struct step {
	const struct filter *filter;
	const struct nat_policy *policy;
	uint32_t n_pools;
	uint64_t cursor;
	bool more; /* the worker has records behind the cursor */
	bool clear;
	uint32_t room, n;
	struct nat_session_view view[REQUEST_STEP_RECORDS];
};

static const char *pool_name(const struct step *step, uint16_t id)
{
	for (uint32_t i = 0; i < step->n_pools; i++)
		if (nat_policy_pool_id(step->policy, i) == id)
			return nat_policy_pool_name(step->policy, i);
	return NULL;
}

static bool visit_session(void *argument, const struct nat_session_view *view)
{
	struct step *step = argument;
	const struct filter *f = step->filter;

	if (f->protocol && f->protocol != view->inside.protocol)
		return true;
	if (!end_matches(&f->host, view->inside.local_be, view->inside.local_port_be) ||
	    !end_matches(&f->remote, view->inside.remote_be, view->inside.remote_port_be) ||
	    !end_matches(&f->outside, view->out_addr_be, view->out_port_be))
		return true;
	if (f->state && strcmp(f->state, view->state) != 0)
		return true;
	if (view->age_s < f->older_s || (f->younger_s && view->age_s >= f->younger_s))
		return true;
	if (f->pool) {
		const char *name = pool_name(step, view->pool_id);

		if (!name || strcmp(name, f->pool) != 0)
			return true;
	}
	step->view[step->n++] = *view;
	return step->n < step->room;
}

static void step_sessions(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	step->more = nat_engine_sessions(e, &step->cursor, REQUEST_STEP_RECORDS, now_ns, visit_session, step);
	/* not while visiting: the table must stand still under the walk */
	for (uint32_t i = 0; step->clear && i < step->n; i++)
		nat_engine_clear(e, step->view[i].record);
}

/* Walks all workers from (*worker, step->cursor) on; calls `each` after every step. Ends at the end (*worker
 * == n_workers), when `limit` sessions were found, or when SCAN_RECORDS were looked at. */
static bool walk(struct request_context *c, struct step *step, uint32_t *worker, uint32_t limit,
		 void (*each)(void *argument, const struct step *step), void *argument)
{
	uint32_t scanned = 0, found = 0;

	while (*worker < c->ops->n_workers && scanned < SCAN_RECORDS && found < limit) {
		step->n = 0;
		step->room = limit - found < REQUEST_STEP_RECORDS ? limit - found : REQUEST_STEP_RECORDS;
		if (!request_on_worker(c, *worker, step_sessions, step))
			return false;
		each(argument, step);
		found += step->n;
		scanned += REQUEST_STEP_RECORDS;
		if (!step->more) {
			step->cursor = 0;
			++*worker;
		}
	}
	return true;
}

static struct step *new_step(struct request_context *c, const struct filter *filter)
{
	struct step *step = malloc(sizeof(*step));

	if (!step) {
		request_refuse(c, "no memory to look at sessions; free some");
		return NULL;
	}
	*step = (struct step){.filter = filter,
			      .policy = c->ops->policy(c->ops->context),
			      .n_pools = c->ops->config(c->ops->context)->nat.n_pools};
	return step;
}

/* "WORKER:POSITION", as an earlier answer gave it in "next". */
bool request_read_cursor(struct request_context *c, uint32_t *worker, uint64_t *position)
{
	const char *text = NULL;
	char tail;

	if (!request_read_text(c, "cursor", &text))
		return false;
	if (!text || sscanf(text, "%" SCNu32 ":%" SCNu64 "%c", worker, position, &tail) == 2)
		return true;
	request_refuse(c, "\"cursor\" is \"%.40s\"; give back \"next\" of the answer before", text);
	return false;
}

void request_add_cursor(json_t *answer, const struct request_ops *ops, uint32_t worker, uint64_t position)
{
	char text[64];

	if (worker >= ops->n_workers)
		return;
	snprintf(text, sizeof(text), "%" PRIu32 ":%" PRIu64, worker, position);
	json_object_set_new(answer, "next", json_string(text));
}

/* ---- show sessions ---- */

static json_t *end_json(uint32_t address_be, uint16_t port_be)
{
	char text[INET_ADDRSTRLEN + 6];
	char address[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &address_be, address, sizeof(address));
	snprintf(text, sizeof(text), "%s:%u", address, ntohs(port_be));
	return json_string(text);
}

/* Zone ids -> the zone's source prefix. The ids are the engine's; they are asked for once per answer. */
struct zone_ids {
	const struct nat_config *config;
	uint32_t *index_of; /* by id: index in config + 1 */
	uint32_t next;
	bool more;
};

static void step_zone_ids(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct zone_ids *zones = argument;
	struct nat_zone_view view;

	(void)now_ns;
	zones->more = false;
	for (uint32_t i = 0; i < REQUEST_STEP_RECORDS; i++) {
		if (!nat_engine_zone(e, zones->next, &view))
			return;
		zones->index_of[view.id] = ++zones->next;
	}
	zones->more = true;
}

struct page {
	json_t *list;
	const struct zone_ids *zones;
};

static void add_sessions(void *argument, const struct step *step)
{
	struct page *page = argument;

	for (uint32_t i = 0; i < step->n; i++) {
		const struct nat_session_view *v = &step->view[i];
		uint32_t zone = page->zones->index_of[v->zone_id];
		const char *pool = pool_name(step, v->pool_id);
		json_t *one =
			json_pack("{s:s, s:o, s:o, s:o, s:s, s:o, s:o, s:o, s:o, s:o}", "protocol",
				  request_protocol_name(v->inside.protocol), "inside",
				  end_json(v->inside.local_be, v->inside.local_port_be), "outside",
				  end_json(v->out_addr_be, v->out_port_be), "remote",
				  end_json(v->inside.remote_be, v->inside.remote_port_be), "state", v->state,
				  "age_s", request_number(v->age_s), "idle_s", request_number(v->idle_s),
				  "expires_s", request_number(v->expires_s), "bytes_out",
				  request_number(v->bytes_out), "bytes_in", request_number(v->bytes_in));

		/* null: a reload has removed it, the session drains */
		json_object_set_new(one, "zone",
				    zone && zone <= page->zones->config->n_zones
					    ? request_prefix_json(page->zones->config->zones[zone - 1].source)
					    : json_null());
		json_object_set_new(one, "pool", pool ? json_string(pool) : json_null());
		json_object_set_new(one, "worker", request_number(v->worker));
		json_array_append_new(page->list, one);
	}
}

static bool load_zone_ids(struct request_context *c, struct zone_ids *zones)
{
	zones->config = &c->ops->config(c->ops->context)->nat;
	zones->index_of = calloc(UINT16_MAX + 1, sizeof(*zones->index_of));
	zones->more = zones->index_of != NULL;
	while (zones->more) {
		if (!request_on_worker(c, 0, step_zone_ids, zones))
			return false;
	}
	return zones->index_of != NULL;
}

json_t *request_show_sessions(struct request_context *c)
{
	static const char *const keys[] = {"cmd",   "what", "host",    "remote",    "outside", "protocol",
					   "state", "pool", "older_s", "younger_s", "limit",   "cursor"};
	struct filter filter = {0};
	struct zone_ids zones = {0};
	struct page page = {.zones = &zones};
	uint32_t limit = PAGE_SESSIONS, worker = 0;
	uint64_t cursor = 0;
	struct step *step;
	json_t *answer = NULL;

	if (!request_only_keys(c, keys, COUNT(keys)) || !read_filter(c, &filter) ||
	    !request_read_count(c, "limit", PAGE_MAX, &limit) || !request_read_cursor(c, &worker, &cursor))
		return NULL;
	step = new_step(c, &filter);
	if (!step)
		return NULL;
	step->cursor = cursor;
	page.list = json_array();
	if (load_zone_ids(c, &zones) && walk(c, step, &worker, limit, add_sessions, &page)) {
		answer = json_pack("{s:O}", "sessions", page.list);
		request_add_cursor(answer, c->ops, worker, step->cursor);
	}
	json_decref(page.list);
	free(zones.index_of);
	free(step);
	return answer;
}

/* ---- clear ---- */

static void count_cleared(void *argument, const struct step *step)
{
	*(uint64_t *)argument += step->n;
}

json_t *request_clear(struct request_context *c)
{
	static const char *const keys[] = {"cmd",  "host",    "remote",    "outside", "protocol", "state",
					   "pool", "older_s", "younger_s", "all",     "cursor"};
	struct filter filter = {0};
	uint32_t worker = 0;
	uint64_t cursor = 0, cleared = 0;
	bool all = false;
	struct step *step;
	json_t *answer = NULL;

	if (!request_only_keys(c, keys, COUNT(keys)) || !read_filter(c, &filter) ||
	    !request_read_flag(c, "all", &all) || !request_read_cursor(c, &worker, &cursor))
		return NULL;
	if (!filter.any && !all)
		return request_refuse(c, "clear needs a filter (host, remote, outside, protocol, state, "
					 "pool, older_s, younger_s) or "
					 "\"all\": true");
	step = new_step(c, &filter);
	if (!step)
		return NULL;
	step->cursor = cursor;
	step->clear = true;
	if (walk(c, step, &worker, UINT32_MAX, count_cleared, &cleared)) {
		answer = json_pack("{s:o}", "cleared", request_number(cleared));
		request_add_cursor(answer, c->ops, worker, step->cursor);
	}
	free(step);
	return answer;
}
