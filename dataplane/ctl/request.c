/* Answers one request: check it, look or act through request_ops, write JSON.
 *
 * The tables belong to the workers. What this file wants to know it asks for in steps: a step runs on the
 * worker between two bursts (ops->on_worker), copies at most STEP_RECORDS records into memory of the control
 * thread, and ends. JSON is made afterwards, off the worker. So a worker never waits for a client, and a list
 * of millions of sessions costs each burst no more than a short one: an answer holds one page and a cursor,
 * the client asks again.
 *
 * Policy and configuration change on the control thread only, which is this one: both stand still during a
 * request.
 *
 * A handler returns the answer's fields without "ok" (request_answer_json() adds it), or NULL after refuse().
 */
#include "request.h"

#include <arpa/inet.h>
#include <inttypes.h>
#include <jansson.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "version.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define STEP_RECORDS   2048u   /* looked at in one step: some ten microseconds of a worker */
#define SCAN_RECORDS   262144u /* looked at for one answer; a rare match must not block the control thread */
#define PAGE_SESSIONS  1000u   /* in one answer, unless the request says otherwise */
#define PAGE_MAX       10000u
#define PAGE_ADDRESSES 65536u

struct context {
	const struct request_ops *ops;
	const json_t *request;
	char why[512]; /* set by refuse() */
};

static json_t *refuse(struct context *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
static json_t *refuse(struct context *c, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(c->why, sizeof(c->why), format, args);
	va_end(args);
	return NULL;
}

static json_t *number(uint64_t value)
{
	return json_integer(value > INT64_MAX ? INT64_MAX : (json_int_t)value);
}

/* ---- reading the request ---- */

/* Every key must be one of `keys`: a misspelt filter would otherwise clear everything. */
static bool only_keys(struct context *c, const char *const *keys, size_t n)
{
	const char *key;
	json_t *value;

	json_object_foreach((json_t *)(uintptr_t)c->request, key, value)
	{
		size_t i = 0;

		while (i < n && strcmp(key, keys[i]) != 0)
			i++;
		if (i == n) {
			refuse(c, "the request has the unknown key \"%.40s\"; remove it", key);
			return false;
		}
	}
	return true;
}

static bool read_text(struct context *c, const char *key, const char **out)
{
	const json_t *value = json_object_get(c->request, key);

	if (!value)
		return true;
	if (!json_is_string(value)) {
		refuse(c, "\"%s\" must be a string", key);
		return false;
	}
	*out = json_string_value(value);
	return true;
}

static bool read_flag(struct context *c, const char *key, bool *out)
{
	const json_t *value = json_object_get(c->request, key);

	if (!value)
		return true;
	if (!json_is_boolean(value)) {
		refuse(c, "\"%s\" must be true or false", key);
		return false;
	}
	*out = json_is_true(value);
	return true;
}

static bool read_count(struct context *c, const char *key, uint32_t most, uint32_t *out)
{
	const json_t *value = json_object_get(c->request, key);

	if (!value)
		return true;
	if (!json_is_integer(value) || json_integer_value(value) < 1 || json_integer_value(value) > most) {
		refuse(c, "\"%s\" must be a whole number from 1 to %u", key, most);
		return false;
	}
	*out = (uint32_t)json_integer_value(value);
	return true;
}

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
	bool any; /* something was asked for */
};

static const struct {
	const char *name;
	uint8_t protocol;
} protocols[] = {{"tcp", IPPROTO_TCP}, {"udp", IPPROTO_UDP}, {"icmp", IPPROTO_ICMP}};

static const char *protocol_name(uint8_t protocol)
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

static bool read_end(struct context *c, const char *key, struct filter *filter, struct end_filter *out)
{
	const char *text = NULL;

	if (!read_text(c, key, &text))
		return false;
	if (!text)
		return true;
	filter->any = true;
	if (parse_end(text, out))
		return true;
	refuse(c, "\"%s\" is \"%.40s\"; write ADDRESS, ADDRESS:PORT or ADDRESS/LENGTH", key, text);
	return false;
}

static bool read_filter(struct context *c, struct filter *filter)
{
	const char *protocol = NULL;

	if (!read_end(c, "host", filter, &filter->host) || !read_end(c, "remote", filter, &filter->remote) ||
	    !read_end(c, "outside", filter, &filter->outside) || !read_text(c, "protocol", &protocol) ||
	    !read_text(c, "state", &filter->state) || !read_text(c, "pool", &filter->pool))
		return false;
	if (protocol) {
		for (size_t i = 0; i < COUNT(protocols); i++)
			if (!strcmp(protocol, protocols[i].name))
				filter->protocol = protocols[i].protocol;
		if (!filter->protocol) {
			refuse(c, "\"protocol\" is \"%.20s\"; it must be tcp, udp or icmp", protocol);
			return false;
		}
	}
	filter->any |= protocol || filter->state || filter->pool;
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
	struct nat_session_view view[STEP_RECORDS];
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

	step->more = nat_engine_sessions(e, &step->cursor, STEP_RECORDS, now_ns, visit_session, step);
	/* not while visiting: the table must stand still under the walk */
	for (uint32_t i = 0; step->clear && i < step->n; i++)
		nat_engine_clear(e, step->view[i].record);
}

/* Walks all workers from (*worker, step->cursor) on; calls `each` after every step. Ends at the end (*worker
 * == n_workers), when `limit` sessions were found, or when SCAN_RECORDS were looked at. */
static bool walk(struct context *c, struct step *step, uint32_t *worker, uint32_t limit,
		 void (*each)(void *argument, const struct step *step), void *argument)
{
	uint32_t scanned = 0, found = 0;

	while (*worker < c->ops->n_workers && scanned < SCAN_RECORDS && found < limit) {
		step->n = 0;
		step->room = limit - found < STEP_RECORDS ? limit - found : STEP_RECORDS;
		if (!c->ops->on_worker(c->ops->context, *worker, step_sessions, step)) {
			refuse(c, "worker %u did not answer; it is overloaded or being stopped, try again",
			       *worker);
			return false;
		}
		each(argument, step);
		found += step->n;
		scanned += STEP_RECORDS;
		if (!step->more) {
			step->cursor = 0;
			++*worker;
		}
	}
	return true;
}

static struct step *new_step(struct context *c, const struct filter *filter)
{
	struct step *step = malloc(sizeof(*step));

	if (!step) {
		refuse(c, "no memory to look at sessions; free some");
		return NULL;
	}
	*step = (struct step){.filter = filter,
			      .policy = c->ops->policy(c->ops->context),
			      .n_pools = c->ops->config(c->ops->context)->nat.n_pools};
	return step;
}

/* "WORKER:POSITION", as an earlier answer gave it in "next". */
static bool read_cursor(struct context *c, uint32_t *worker, uint64_t *position)
{
	const char *text = NULL;
	char tail;

	if (!read_text(c, "cursor", &text))
		return false;
	if (!text || sscanf(text, "%" SCNu32 ":%" SCNu64 "%c", worker, position, &tail) == 2)
		return true;
	refuse(c, "\"cursor\" is \"%.40s\"; give back \"next\" of the answer before", text);
	return false;
}

static void add_cursor(json_t *answer, const struct request_ops *ops, uint32_t worker, uint64_t position)
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

static json_t *prefix_json(struct nat_prefix prefix)
{
	char text[INET_ADDRSTRLEN + 4];
	char address[INET_ADDRSTRLEN];
	uint32_t address_be = htonl(prefix.address);

	inet_ntop(AF_INET, &address_be, address, sizeof(address));
	snprintf(text, sizeof(text), "%s/%u", address, prefix.length_bits);
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
	for (uint32_t i = 0; i < STEP_RECORDS; i++) {
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
		json_t *one = json_pack("{s:s, s:o, s:o, s:o, s:s, s:o, s:o, s:o, s:o, s:o}", "protocol",
					protocol_name(v->inside.protocol), "inside",
					end_json(v->inside.local_be, v->inside.local_port_be), "outside",
					end_json(v->out_addr_be, v->out_port_be), "remote",
					end_json(v->inside.remote_be, v->inside.remote_port_be), "state",
					v->state, "age_s", number(v->age_s), "idle_s", number(v->idle_s),
					"expires_s", number(v->expires_s), "bytes_out", number(v->bytes_out),
					"bytes_in", number(v->bytes_in));

		/* null: a reload has removed it, the session drains */
		json_object_set_new(one, "zone",
				    zone && zone <= page->zones->config->n_zones
					    ? prefix_json(page->zones->config->zones[zone - 1].source)
					    : json_null());
		json_object_set_new(one, "pool", pool ? json_string(pool) : json_null());
		json_object_set_new(one, "worker", number(v->worker));
		json_array_append_new(page->list, one);
	}
}

static bool load_zone_ids(struct context *c, struct zone_ids *zones)
{
	zones->config = &c->ops->config(c->ops->context)->nat;
	zones->index_of = calloc(UINT16_MAX + 1, sizeof(*zones->index_of));
	zones->more = zones->index_of != NULL;
	while (zones->more) {
		if (!c->ops->on_worker(c->ops->context, 0, step_zone_ids, zones)) {
			refuse(c, "worker 0 did not answer; it is overloaded or being stopped, try again");
			return false;
		}
	}
	return zones->index_of != NULL;
}

static json_t *show_sessions(struct context *c)
{
	static const char *const keys[] = {"cmd",      "what",  "host", "remote", "outside",
					   "protocol", "state", "pool", "limit",  "cursor"};
	struct filter filter = {0};
	struct zone_ids zones = {0};
	struct page page = {.zones = &zones};
	uint32_t limit = PAGE_SESSIONS, worker = 0;
	uint64_t cursor = 0;
	struct step *step;
	json_t *answer = NULL;

	if (!only_keys(c, keys, COUNT(keys)) || !read_filter(c, &filter) ||
	    !read_count(c, "limit", PAGE_MAX, &limit) || !read_cursor(c, &worker, &cursor))
		return NULL;
	step = new_step(c, &filter);
	if (!step)
		return NULL;
	step->cursor = cursor;
	page.list = json_array();
	if (load_zone_ids(c, &zones) && walk(c, step, &worker, limit, add_sessions, &page)) {
		answer = json_pack("{s:O}", "sessions", page.list);
		add_cursor(answer, c->ops, worker, step->cursor);
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

static json_t *clear(struct context *c)
{
	static const char *const keys[] = {"cmd",   "host", "remote", "outside", "protocol",
					   "state", "pool", "all",    "cursor"};
	struct filter filter = {0};
	uint32_t worker = 0;
	uint64_t cursor = 0, cleared = 0;
	bool all = false;
	struct step *step;
	json_t *answer = NULL;

	if (!only_keys(c, keys, COUNT(keys)) || !read_filter(c, &filter) || !read_flag(c, "all", &all) ||
	    !read_cursor(c, &worker, &cursor))
		return NULL;
	if (!filter.any && !all)
		return refuse(c, "clear needs a filter (host, remote, outside, protocol, state, pool) or "
				 "\"all\": true");
	step = new_step(c, &filter);
	if (!step)
		return NULL;
	step->cursor = cursor;
	step->clear = true;
	if (walk(c, step, &worker, UINT32_MAX, count_cleared, &cleared)) {
		answer = json_pack("{s:o}", "cleared", number(cleared));
		add_cursor(answer, c->ops, worker, step->cursor);
	}
	free(step);
	return answer;
}

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
	sum->made += n->made;
	sum->sessions_created += n->sessions_created;
	sum->sessions_expired += n->sessions_expired;
	sum->sessions_closed += n->sessions_closed;
	sum->sessions += n->sessions;
	sum->bytes_out += n->bytes_out;
	sum->bytes_in += n->bytes_in;
	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		sum->reason[i] += n->reason[i];
}

/* All workers, one after the other; *equation: it holds on each of them. */
static bool sum_counters(struct context *c, struct nat_counters *sum, bool *equation)
{
	struct nat_counters n;

	*sum = (struct nat_counters){0};
	*equation = true;
	for (uint32_t worker = 0; worker < c->ops->n_workers; worker++) {
		if (!c->ops->on_worker(c->ops->context, worker, copy_counters, &n)) {
			refuse(c, "worker %u did not answer; it is overloaded or being stopped, try again",
			       worker);
			return false;
		}
		*equation &= equation_holds(&n);
		add_counters(sum, &n);
	}
	return true;
}

/* Over all workers: handed over = taken over + in rings. Workers are not read at one moment, so while packets
 * are handed over the sums may be apart; only a difference that stands still is a fault. */
static bool handover_holds(struct context *c, const struct nat_counters *sum)
{
	struct nat_counters before = *sum, after;

	for (int attempt = 0; attempt < 5; attempt++) {
		uint64_t in_rings = c->ops->in_rings ? c->ops->in_rings(c->ops->context) : 0;
		bool ignored;

		if (before.handed_over == before.taken_over + in_rings)
			return true;
		if (!sum_counters(c, &after, &ignored))
			return false;
		if (after.handed_over == before.handed_over && after.taken_over == before.taken_over)
			return false;
		before = after;
	}
	return true; /* too busy to tell; each worker's own equation is exact */
}

static json_t *counters_json(const struct nat_counters *n)
{
	json_t *reasons = json_object();

	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		if (i != NAT_REASON_OK)
			json_object_set_new(reasons, nat_reason_name((enum nat_reason)i),
					    number(n->reason[i]));
	return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
			 "received", number(n->received), "taken_over", number(n->taken_over), "forwarded",
			 number(n->forwarded), "passed", number(n->passed), "dropped", number(sum_dropped(n)),
			 "handed_over", number(n->handed_over), "held", number(n->held), "made",
			 number(n->made), "sessions", number(n->sessions), "sessions_created",
			 number(n->sessions_created), "sessions_expired", number(n->sessions_expired),
			 "sessions_closed", number(n->sessions_closed), "bytes_out", number(n->bytes_out),
			 "bytes_in", number(n->bytes_in), "reasons", reasons);
}

/* Only what has dropped something: what an operator looks at first. */
static json_t *dropped_json(const struct nat_counters *n)
{
	json_t *dropped = json_object();

	for (unsigned i = 0; i < NAT_REASON_COUNT; i++)
		if (n->reason[i] && nat_reason_verdict((enum nat_reason)i) == NAT_DROP)
			json_object_set_new(dropped, nat_reason_name((enum nat_reason)i),
					    number(n->reason[i]));
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

static json_t *show_counters(struct context *c)
{
	static const char *const keys[] = {"cmd", "what", "explain"};
	struct nat_counters sum;
	bool equation, explain = false;
	json_t *answer;

	if (!only_keys(c, keys, COUNT(keys)) || !read_flag(c, "explain", &explain) ||
	    !sum_counters(c, &sum, &equation))
		return NULL;
	equation = equation && handover_holds(c, &sum);
	answer = json_pack("{s:o, s:o, s:b}", "counters", counters_json(&sum), "dropped", dropped_json(&sum),
			   "equation", equation);
	if (explain)
		json_object_set_new(answer, "meanings", reasons_json());
	return answer;
}

/* ---- show pools ---- */

struct address_step {
	uint32_t next, n;
	bool more;
	struct nat_address_view view[STEP_RECORDS];
};

static void step_addresses(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct address_step *step = argument;

	(void)now_ns;
	step->n = 0;
	while (step->n < STEP_RECORDS && nat_engine_address(e, step->next + step->n, &step->view[step->n]))
		step->n++;
	step->more = step->n == STEP_RECORDS;
	step->next += step->n;
}

/* The views of all addresses, summed over the workers; the caller frees. */
static struct nat_address_view *sum_addresses(struct context *c, uint32_t *count)
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

			if (!c->ops->on_worker(c->ops->context, worker, step_addresses, step)) {
				refuse(c,
				       "worker %u did not answer; it is overloaded or being stopped, try "
				       "again",
				       worker);
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
			}
		} while (step->more);
	}
	if (!sum || !step) {
		refuse(c, "no memory to show %" PRIu64 " addresses; free some", n);
		free(sum);
		sum = NULL;
	}
	free(step);
	*count = (uint32_t)n;
	return sum;
}

static json_t *address_json(const struct nat_address_view *v)
{
	char address[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &v->address_be, address, sizeof(address));
	return json_pack("{s:s, s:o, s:o, s:o, s:b}", "address", address, "sessions", number(v->sessions),
			 "created", number(v->created), "refused", number(v->refused), "draining",
			 v->draining);
}

static json_t *pool_json(const struct nat_pool_config *pool, const struct nat_policy *policy, uint32_t index,
			 const struct nat_address_view *view, uint32_t n, uint32_t *room)
{
	uint64_t sessions = 0, created = 0, refused = 0, addresses = 0, draining = 0;
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
		if (*room) {
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
	json_object_set_new(one, "sessions", number(sessions));
	json_object_set_new(one, "created", number(created));
	json_object_set_new(one, "refused", number(refused));
	json_object_set_new(one, "n_addresses", number(addresses));
	json_object_set_new(one, "n_draining", number(draining));
	json_object_set_new(one, "addresses", list);
	return one;
}

static json_t *show_pools(struct context *c)
{
	static const char *const keys[] = {"cmd", "what", "pool", "limit"};
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	const struct nat_policy *policy = c->ops->policy(c->ops->context);
	uint32_t n, room = PAGE_ADDRESSES, start = 0;
	struct nat_address_view *view;
	const char *only = NULL;
	json_t *list;

	if (!only_keys(c, keys, COUNT(keys)) || !read_text(c, "pool", &only) ||
	    !read_count(c, "limit", CONFIG_ADDRESSES_MAX, &room))
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
			json_array_append_new(
				list, pool_json(&nat->pools[i], policy, i, view + start, end - start, &room));
		start = end;
	}
	free(view);
	if (only && !json_array_size(list)) {
		json_decref(list);
		return refuse(c, "there is no pool \"%.40s\"", only);
	}
	return json_pack("{s:o}", "pools", list);
}

/* ---- show zones ---- */

struct zone_step {
	uint32_t next, n;
	struct nat_zone_view view[STEP_RECORDS];
};

static void step_zones(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct zone_step *step = argument;

	(void)now_ns;
	step->n = 0;
	while (step->n < STEP_RECORDS && nat_engine_zone(e, step->next + step->n, &step->view[step->n]))
		step->n++;
	step->next += step->n;
}

static json_t *zone_json(const struct nat_config *nat, const struct nat_zone_config *zone)
{
	json_t *one = json_pack("{s:o, s:s}", "source", prefix_json(zone->source), "action",
				config_action_word(zone->action));

	if (zone->destination.length_bits)
		json_object_set_new(one, "destination", prefix_json(zone->destination));
	if (zone->action == NAT_ACTION_POOL)
		json_object_set_new(one, "pool", json_string(nat->pools[zone->pool].name));
	if (zone->mss_clamp_bytes)
		json_object_set_new(one, "mss_clamp", number(zone->mss_clamp_bytes));
	return one;
}

/* created and refused of all zones: [2 * i] and [2 * i + 1] */
static bool sum_zones(struct context *c, uint64_t *sum, uint32_t n_zones)
{
	struct zone_step *step = malloc(sizeof(*step));

	if (!step) {
		refuse(c, "no memory to show the zones; free some");
		return false;
	}
	for (uint32_t worker = 0; worker < c->ops->n_workers; worker++) {
		step->next = 0;
		do {
			uint32_t base = step->next;

			if (!c->ops->on_worker(c->ops->context, worker, step_zones, step)) {
				refuse(c,
				       "worker %u did not answer; it is overloaded or being stopped, try "
				       "again",
				       worker);
				free(step);
				return false;
			}
			for (uint32_t i = 0; i < step->n && base + i < n_zones; i++) {
				sum[2 * (base + i)] += step->view[i].created;
				sum[2 * (base + i) + 1] += step->view[i].refused;
			}
		} while (step->n == STEP_RECORDS);
	}
	free(step);
	return true;
}

static json_t *show_zones(struct context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	uint64_t *sum;
	json_t *list;

	if (!only_keys(c, keys, COUNT(keys)))
		return NULL;
	sum = calloc(2 * (size_t)nat->n_zones + 1, sizeof(*sum));
	if (!sum)
		return refuse(c, "no memory to show the zones; free some");
	if (!sum_zones(c, sum, nat->n_zones)) {
		free(sum);
		return NULL;
	}
	list = json_array();
	for (uint32_t i = 0; i < nat->n_zones; i++) {
		json_t *one = zone_json(nat, &nat->zones[i]);

		json_object_set_new(one, "created", number(sum[2 * i]));
		json_object_set_new(one, "refused", number(sum[2 * i + 1]));
		json_array_append_new(list, one);
	}
	free(sum);
	return json_pack("{s:o}", "zones", list);
}

/* ---- show workers, show ports ---- */

static json_t *show_workers(struct context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	json_t *list;

	if (!only_keys(c, keys, COUNT(keys)))
		return NULL;
	list = json_array();
	for (uint32_t i = 0; i < c->ops->n_workers; i++) {
		struct request_worker w = {.core = -1};
		struct nat_counters n;
		json_t *one;

		if (!c->ops->on_worker(c->ops->context, i, copy_counters, &n)) {
			json_array_append_new(list,
					      json_pack("{s:o, s:b}", "worker", number(i), "answers", 0));
			continue;
		}
		one = json_pack("{s:o, s:b}", "worker", number(i), "answers", 1);
		if (c->ops->worker && c->ops->worker(c->ops->context, i, &w)) {
			json_object_set_new(one, "core", json_integer(w.core));
			json_object_set_new(one, "bursts", number(w.bursts));
			json_object_set_new(one, "packets", number(w.packets));
			json_object_set_new(one, "busy_ns", number(w.busy_ns));
			json_object_set_new(one, "idle_ns", number(w.idle_ns));
			json_object_set_new(one, "sleeps", number(w.sleeps));
			json_object_set_new(one, "cycles", number(w.cycles));
			json_object_set_new(one, "handover_sent", number(w.handover_sent));
			json_object_set_new(one, "handover_received", number(w.handover_received));
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
	json_object_set_new(one, "speed_mbps", number(p->speed_mbps));
	json_object_set_new(one, "mtu", number(p->mtu_bytes));
	json_object_set_new(one, "queues", number(p->queues));
	json_object_set_new(one, "rx_packets", number(p->rx_packets));
	json_object_set_new(one, "rx_bytes", number(p->rx_bytes));
	json_object_set_new(one, "rx_missed", number(p->rx_missed));
	json_object_set_new(one, "rx_errors", number(p->rx_errors));
	json_object_set_new(one, "tx_packets", number(p->tx_packets));
	json_object_set_new(one, "tx_bytes", number(p->tx_bytes));
	json_object_set_new(one, "tx_errors", number(p->tx_errors));
	json_object_set_new(one, "twin_to_packets", number(p->twin_to_packets));
	json_object_set_new(one, "twin_from_packets", number(p->twin_from_packets));
}

static json_t *show_ports(struct context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	json_t *list;

	if (!only_keys(c, keys, COUNT(keys)))
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

/* ---- reload, status, version ---- */

static json_t *problems_json(const struct config *config)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < config->n_problems; i++) {
		const struct config_problem *p = &config->problems[i];

		json_array_append_new(list, json_pack("{s:s, s:o, s:o, s:b, s:s}", "file", config->path,
						      "line", number(p->line), "column", number(p->column),
						      "warning", p->warning, "text", p->text));
	}
	return list;
}

/* The answer of a refused file holds all problems: the operator corrects them in one go. */
static json_t *refuse_file(struct context *c, const struct config *config)
{
	for (uint32_t i = 0; i < config->n_problems; i++) {
		const struct config_problem *p = &config->problems[i];

		if (p->warning)
			continue;
		if (p->line)
			refuse(c, "%s:%u:%u: %s", config->path, p->line, p->column, p->text);
		else
			refuse(c, "%s: %s", config->path, p->text);
		break;
	}
	return json_pack("{s:o}", "problems", problems_json(config));
}

static json_t *reload(struct context *c)
{
	static const char *const keys[] = {"cmd"};
	const struct config *running = c->ops->config(c->ops->context);
	struct config *next;
	json_t *answer;

	if (!only_keys(c, keys, COUNT(keys)))
		return NULL;
	if (!c->ops->apply)
		return refuse(c, "this program cannot reload its configuration");
	next = config_load(running->path, c->ops->config_flags);
	if (next->n_errors) {
		answer = refuse_file(c, next);
		config_free(next);
		return answer;
	}
	if (!config_can_follow(running, next, c->why, sizeof(c->why))) {
		config_free(next);
		return NULL;
	}
	answer = json_pack("{s:o, s:o, s:o}", "pools", number(next->nat.n_pools), "zones",
			   number(next->nat.n_zones), "problems", problems_json(next));
	if (!c->ops->apply(c->ops->context, next, c->why, sizeof(c->why))) {
		if (!c->why[0])
			refuse(c, "the new configuration could not be put into force");
		config_free(next);
		json_decref(answer);
		return NULL;
	}
	return answer;
}

static json_t *version(struct context *c)
{
	static const char *const keys[] = {"cmd"};

	if (!only_keys(c, keys, COUNT(keys)))
		return NULL;
	return json_pack("{s:s, s:s}", "program", c->ops->program, "version", NAT_VERSION);
}

static json_t *status(struct context *c)
{
	static const char *const keys[] = {"cmd"};
	const struct config *config = c->ops->config(c->ops->context);
	struct nat_counters sum;
	bool equation;
	json_t *answer;

	if (!only_keys(c, keys, COUNT(keys)) || !sum_counters(c, &sum, &equation))
		return NULL;
	answer = version(c);
	if (!answer)
		return NULL;
	if (c->ops->started_s)
		json_object_set_new(answer, "uptime_s", number((uint64_t)time(NULL) - c->ops->started_s));
	json_object_set_new(answer, "config", json_string(config->path));
	json_object_set_new(answer, "workers", number(c->ops->n_workers));
	json_object_set_new(answer, "interfaces", number(config->nat.n_interfaces));
	json_object_set_new(answer, "pools", number(config->nat.n_pools));
	json_object_set_new(answer, "zones", number(config->nat.n_zones));
	json_object_set_new(answer, "sessions", number(sum.sessions));
	json_object_set_new(answer, "max_sessions", number(config->nat.max_sessions));
	json_object_set_new(answer, "equation", json_boolean(equation));
	json_object_set_new(answer, "problems", problems_json(config));
	return answer;
}

/* ---- dispatch ---- */

static json_t *show(struct context *c)
{
	static const struct {
		const char *what;
		json_t *(*answer)(struct context *c);
	} whats[] = {
		{"sessions", show_sessions}, {"pools", show_pools},     {"zones", show_zones},
		{"counters", show_counters}, {"workers", show_workers}, {"ports", show_ports},
	};
	const char *what = json_string_value(json_object_get(c->request, "what"));

	for (size_t i = 0; what && i < COUNT(whats); i++)
		if (!strcmp(what, whats[i].what))
			return whats[i].answer(c);
	return refuse(c, "\"what\" must be sessions, pools, zones, counters, workers or ports");
}

static json_t *dispatch(struct context *c)
{
	static const struct {
		const char *cmd;
		json_t *(*answer)(struct context *c);
	} cmds[] = {{"show", show},
		    {"clear", clear},
		    {"reload", reload},
		    {"status", status},
		    {"version", version}};
	const char *cmd;

	if (!json_is_object(c->request))
		return refuse(c, "a request must be a JSON object such as {\"cmd\":\"status\"}");
	cmd = json_string_value(json_object_get(c->request, "cmd"));
	for (size_t i = 0; cmd && i < COUNT(cmds); i++)
		if (!strcmp(cmd, cmds[i].cmd))
			return cmds[i].answer(c);
	return refuse(c, "\"cmd\" must be show, clear, reload, status or version");
}

json_t *request_answer_json(const struct request_ops *ops, const json_t *request)
{
	struct context c = {.ops = ops, .request = request};
	json_t *fields = dispatch(&c), *answer = json_object();

	json_object_set_new(answer, "ok", json_boolean(fields && !c.why[0]));
	if (c.why[0]) {
		/* a name cut in the middle of a character is not UTF-8 */
		json_t *text = json_string(c.why);

		json_object_set_new(answer, "error",
				    text ? text : json_string("the request cannot be answered"));
	}
	if (fields)
		json_object_update(answer, fields);
	json_decref(fields);
	return answer;
}

char *request_answer(const struct request_ops *ops, const char *line, size_t line_bytes)
{
	json_error_t error;
	json_t *request, *answer;
	char *text;

	if (line_bytes > REQUEST_BYTES_MAX)
		return strdup(
			"{\"ok\":false,\"error\":\"the request is too long; at most 65536 bytes are read\"}");
	request = json_loadb(line, line_bytes, JSON_REJECT_DUPLICATES, &error);
	if (!request)
		return strdup("{\"ok\":false,\"error\":\"the request is not JSON; send one object per line, "
			      "such as "
			      "{\\\"cmd\\\":\\\"status\\\"}\"}");
	answer = request_answer_json(ops, request);
	text = json_dumps(answer, JSON_COMPACT);
	json_decref(answer);
	json_decref(request);
	return text;
}
