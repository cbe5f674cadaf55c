/* Answers one request: check it, look or act through request_ops, write JSON.
 *
 *	request.c            which requests there are; reload, status, version
 *	request_sessions.c   show sessions, clear: filters and pages
 *	request_show.c       counters, pools, zones, workers, ports
 *	request_config.c     show config, plan
 *	request_explain.c    what would become of a packet
 *	request_capture.c    packets before and after
 *	request_hot.c        remotes towards which ports are scarce
 *
 * The tables belong to the workers. What is wanted of them is asked in steps: a step runs on the worker
 * between two bursts (request_on_worker), copies a bounded number of records into memory of the control
 * thread, and ends. JSON is made afterwards, off the worker. So a worker never waits for a client, and a
 * list of millions of sessions costs each burst no more than a short one: an answer holds one page and a
 * cursor, the client asks again.
 *
 * Policy and configuration change on the control thread only, which is this one: both stand still during a
 * request.
 *
 * A handler returns the answer's fields without "ok" (request_answer_json() adds it), or NULL after
 * request_refuse().
 */
#include <arpa/inet.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "request_internal.h"
#include "version.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- for all handlers ---- */

json_t *request_refuse(struct request_context *c, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(c->why, sizeof(c->why), format, args);
	va_end(args);
	return NULL;
}

json_t *request_number(uint64_t value)
{
	return json_integer(value > INT64_MAX ? INT64_MAX : (json_int_t)value);
}

json_t *request_prefix_json(struct nat_prefix prefix)
{
	char text[INET_ADDRSTRLEN + 4];
	char address[INET_ADDRSTRLEN];
	uint32_t address_be = htonl(prefix.address);

	inet_ntop(AF_INET, &address_be, address, sizeof(address));
	snprintf(text, sizeof(text), "%s/%u", address, prefix.length_bits);
	return json_string(text);
}

bool request_on_worker(struct request_context *c, uint32_t worker,
		       void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument)
{
	if (c->ops->on_worker(c->ops->context, worker, run, argument))
		return true;
	request_refuse(c, "worker %u did not answer; it is overloaded or being stopped, try again", worker);
	return false;
}

/* ---- reading the request ---- */

bool request_only_keys(struct request_context *c, const char *const *keys, size_t n)
{
	const char *key;
	json_t *value;

	json_object_foreach((json_t *)(uintptr_t)c->request, key, value)
	{
		size_t i = 0;

		while (i < n && strcmp(key, keys[i]) != 0)
			i++;
		if (i == n) {
			request_refuse(c, "the request has the unknown key \"%.40s\"; remove it", key);
			return false;
		}
	}
	return true;
}

bool request_read_text(struct request_context *c, const char *key, const char **out)
{
	const json_t *value = json_object_get(c->request, key);

	if (!value)
		return true;
	if (!json_is_string(value)) {
		request_refuse(c, "\"%s\" must be a string", key);
		return false;
	}
	*out = json_string_value(value);
	return true;
}

bool request_read_given(struct request_context *c, const char *key, const char **out)
{
	const char *text = NULL;

	if (!request_read_text(c, key, &text))
		return false;
	if (text && !*text) {
		request_refuse(c, "\"%s\" is empty; give it a value, or leave it out", key);
		return false;
	}
	if (text)
		*out = text;
	return true;
}

bool request_read_flag(struct request_context *c, const char *key, bool *out)
{
	const json_t *value = json_object_get(c->request, key);

	if (!value)
		return true;
	if (!json_is_boolean(value)) {
		request_refuse(c, "\"%s\" must be true or false", key);
		return false;
	}
	*out = json_is_true(value);
	return true;
}

bool request_read_count(struct request_context *c, const char *key, uint32_t most, uint32_t *out)
{
	const json_t *value = json_object_get(c->request, key);

	if (!value)
		return true;
	if (!json_is_integer(value) || json_integer_value(value) < 1 || json_integer_value(value) > most) {
		request_refuse(c, "\"%s\" must be a whole number from 1 to %u", key, most);
		return false;
	}
	*out = (uint32_t)json_integer_value(value);
	return true;
}

/* ---- reload, status, version ---- */

json_t *request_problems_json(const struct config *config)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < config->n_problems; i++) {
		const struct config_problem *p = &config->problems[i];

		json_array_append_new(list,
				      json_pack("{s:s, s:o, s:o, s:b, s:s}", "file", config->path, "line",
						request_number(p->line), "column", request_number(p->column),
						"warning", p->warning, "text", p->text));
	}
	return list;
}

/* The answer of a refused file holds all problems: the operator corrects them in one go. */
json_t *request_refuse_file(struct request_context *c, const struct config *config)
{
	for (uint32_t i = 0; i < config->n_problems; i++) {
		const struct config_problem *p = &config->problems[i];

		if (p->warning)
			continue;
		if (p->line)
			request_refuse(c, "%s:%u:%u: %s", config->path, p->line, p->column, p->text);
		else
			request_refuse(c, "%s: %s", config->path, p->text);
		break;
	}
	return json_pack("{s:o}", "problems", request_problems_json(config));
}

static json_t *reload(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "cut"};
	const struct config *running = c->ops->config(c->ops->context);
	struct config *next;
	bool cut = false;
	json_t *answer;

	if (!request_only_keys(c, keys, COUNT(keys)) || !request_read_flag(c, "cut", &cut))
		return NULL;
	if (!c->ops->apply)
		return request_refuse(c, "this program cannot reload its configuration");
	next = config_load(running->path, c->ops->config_flags);
	if (next->n_errors) {
		answer = request_refuse_file(c, next);
		config_free(next);
		return answer;
	}
	if (!config_can_follow(running, next, c->why, sizeof(c->why))) {
		config_free(next);
		return NULL;
	}
	if (!cut)
		request_keep_departed(c->ops, next);
	answer = json_pack("{s:o, s:o, s:o}", "pools", request_number(next->nat.n_pools), "zones",
			   request_number(next->nat.n_zones), "problems", request_problems_json(next));
	if (!c->ops->apply(c->ops->context, next, c->why, sizeof(c->why))) {
		if (!c->why[0])
			request_refuse(c, "the new configuration could not be put into force");
		config_free(next);
		json_decref(answer);
		return NULL;
	}
	if (cut)
		json_object_set_new(answer, "cut", request_number(request_cut_departed(c)));
	return answer;
}

static json_t *version(struct request_context *c)
{
	static const char *const keys[] = {"cmd"};

	if (!request_only_keys(c, keys, COUNT(keys)))
		return NULL;
	return json_pack("{s:s, s:s}", "program", c->ops->program, "version", NAT_VERSION);
}

static json_t *routes(struct route_figures f)
{
	return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "routes", request_number(f.routes),
			 "neighbours", request_number(f.neighbours), "addresses", request_number(f.addresses),
			 "rebuilds", request_number(f.rebuilds), "rebuild_us", request_number(f.rebuild_us),
			 "dumps", request_number(f.dumps), "overruns", request_number(f.overruns));
}

static json_t *status(struct request_context *c)
{
	static const char *const keys[] = {"cmd"};
	const struct config *config = c->ops->config(c->ops->context);
	struct nat_counters sum;
	bool equation;
	json_t *answer;

	if (!request_only_keys(c, keys, COUNT(keys)) || !request_sum_counters(c, &sum, &equation))
		return NULL;
	answer = version(c);
	if (!answer)
		return NULL;
	if (c->ops->started_s)
		json_object_set_new(answer, "uptime_s",
				    request_number((uint64_t)time(NULL) - c->ops->started_s));
	json_object_set_new(answer, "config", json_string(config->path));
	json_object_set_new(answer, "workers", request_number(c->ops->n_workers));
	json_object_set_new(answer, "interfaces", request_number(config->nat.n_interfaces));
	json_object_set_new(answer, "pools", request_number(config->nat.n_pools));
	json_object_set_new(answer, "zones", request_number(config->nat.n_zones));
	json_object_set_new(answer, "sessions", request_number(sum.sessions));
	json_object_set_new(answer, "max_sessions", request_number(config->nat.max_sessions));
	json_object_set_new(answer, "equation", json_boolean(equation));
	json_object_set_new(answer, "degraded", json_boolean(c->ops->config_flags & CONFIG_DEGRADED));
	if (c->ops->routes)
		json_object_set_new(answer, "routes", routes(c->ops->routes(c->ops->context)));
	json_object_set_new(answer, "problems", request_problems_json(config));
	return answer;
}

/* ---- dispatch ---- */

static json_t *show(struct request_context *c)
{
	static const struct {
		const char *what;
		json_t *(*answer)(struct request_context *c);
	} whats[] = {
		{"sessions", request_show_sessions}, {"pools", request_show_pools},
		{"zones", request_show_zones},       {"counters", request_show_counters},
		{"workers", request_show_workers},   {"ports", request_show_ports},
		{"config", request_show_config},     {"destinations", request_show_destinations},
		{"sync", request_show_sync},
	};
	const char *what = json_string_value(json_object_get(c->request, "what"));

	for (size_t i = 0; what && i < COUNT(whats); i++)
		if (!strcmp(what, whats[i].what))
			return whats[i].answer(c);
	return request_refuse(c, "\"what\" must be sessions, pools, destinations, zones, counters, workers, "
				 "ports, config or sync");
}

static json_t *dispatch(struct request_context *c)
{
	static const struct {
		const char *cmd;
		json_t *(*answer)(struct request_context *c);
	} cmds[] = {{"show", show},       {"clear", request_clear},     {"plan", request_plan},
		    {"reload", reload},   {"status", status},           {"version", version},
		    {"pcp", request_pcp}, {"explain", request_explain}, {"capture", request_capture}};
	const char *cmd;

	if (!json_is_object(c->request))
		return request_refuse(c, "a request must be a JSON object such as {\"cmd\":\"status\"}");
	cmd = json_string_value(json_object_get(c->request, "cmd"));
	for (size_t i = 0; cmd && i < COUNT(cmds); i++)
		if (!strcmp(cmd, cmds[i].cmd))
			return cmds[i].answer(c);
	return request_refuse(
		c, "\"cmd\" must be show, clear, plan, explain, capture, reload, status or version");
}

json_t *request_answer_json(const struct request_ops *ops, const json_t *request)
{
	struct request_context c = {.ops = ops, .request = request};
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
		return strdup("{\"ok\":false,\"error\":\"the request is too long; at most 4 MiB are read\"}");
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
