/* show destinations: remotes towards which ports become scarce, the fullest first.
 *
 * The engine keeps a set of ports for each pair of address and remote that has turned down draws at random
 * (core/pool.c): in practice for every pair that is half full or more. So this list costs nothing to keep,
 * and it holds every destination that an operator must care about. A set knows the words of 64 ports that
 * somebody has looked at; the rest are taken to be as full.
 */
#include <arpa/inet.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "request_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define STEP_SETS    32u /* of 8 kB each */
#define HOT_MAX      1048576u

struct hot_list {
	struct nat_hot_view *view;
	uint32_t n, room, cursor;
	bool more, failed;
};

static void step_hot(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct hot_list *list = argument;

	(void)now_ns;
	for (uint32_t i = 0; i < STEP_SETS; i++) {
		list->more = list->n < list->room && nat_engine_hot(e, &list->cursor, &list->view[list->n]);
		if (!list->more)
			return;
		list->n++;
	}
}

/* Room is made here, not on the worker. */
static bool make_room(struct hot_list *list)
{
	struct nat_hot_view *larger;
	const uint32_t room = list->room ? 2 * list->room : 1024;

	if (list->n + STEP_SETS <= list->room)
		return true;
	larger = list->room < HOT_MAX ? realloc(list->view, room * sizeof(*larger)) : NULL;
	if (!larger)
		return false;
	list->view = larger;
	list->room = room;
	return true;
}

static bool collect(struct request_context *c, struct hot_list *list)
{
	for (uint32_t w = 0; w < c->ops->n_workers; w++) {
		list->cursor = 0;
		do {
			if (!make_room(list)) {
				request_refuse(c, "no memory to list destinations; free some");
				return false;
			}
			if (!request_on_worker(c, w, step_hot, list))
				return false;
		} while (list->more);
	}
	return true;
}

/* ---- addresses of one pool towards one remote belong together ---- */

static int by_remote(const void *a, const void *b)
{
	const struct nat_hot_view *x = a, *y = b;

	if (x->pool != y->pool)
		return x->pool < y->pool ? -1 : 1;
	if (x->remote_be != y->remote_be)
		return x->remote_be < y->remote_be ? -1 : 1;
	if (x->remote_port_be != y->remote_port_be)
		return x->remote_port_be < y->remote_port_be ? -1 : 1;
	return (x->protocol > y->protocol) - (x->protocol < y->protocol);
}

struct destination {
	struct nat_hot_view of;
	uint64_t used, ports;
	uint32_t addresses;
};

static int by_use(const void *a, const void *b)
{
	const struct destination *x = a, *y = b;
	const uint64_t left = x->used * y->ports, right = y->used * x->ports;

	return (left < right) - (left > right);
}

static uint32_t join(const struct hot_list *list, struct destination *to)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < list->n; i++) {
		const struct nat_hot_view *v = &list->view[i];

		if (i == 0 || by_remote(v, &list->view[i - 1]) != 0)
			to[n++] = (struct destination){.of = *v};
		struct destination *d = &to[n - 1];
		d->used += v->known ? (uint64_t)v->taken * v->ports / v->known : 0;
		d->ports += v->ports;
		d->addresses++;
	}
	qsort(to, n, sizeof(*to), by_use);
	return n;
}

static json_t *destination_json(const struct request_context *c, const struct destination *d)
{
	const struct nat_policy *policy = c->ops->policy(c->ops->context);
	char address[INET_ADDRSTRLEN], remote[INET_ADDRSTRLEN + 6];

	inet_ntop(AF_INET, &d->of.remote_be, address, sizeof(address));
	snprintf(remote, sizeof(remote), "%s:%u", address, ntohs(d->of.remote_port_be));
	return json_pack("{s:s, s:s, s:s, s:o, s:o, s:o}", "pool", nat_policy_pool_name(policy, d->of.pool),
			 "protocol", request_protocol_name(d->of.protocol), "remote",
			 d->of.remote_be ? remote : "any", "used", request_number(d->used), "ports",
			 request_number(d->ports), "addresses", request_number(d->addresses));
}

json_t *request_show_destinations(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what", "limit"};
	struct hot_list list = {0};
	struct destination *joined;
	uint32_t limit = 20;
	json_t *answer = NULL;

	if (!request_only_keys(c, keys, COUNT(keys)) || !request_read_count(c, "limit", 1000, &limit))
		return NULL;
	if (collect(c, &list)) {
		qsort(list.view, list.n, sizeof(*list.view), by_remote);
		joined = calloc(list.n + 1, sizeof(*joined));
		if (!joined) {
			request_refuse(c, "no memory to list destinations; free some");
		} else {
			const uint32_t n = join(&list, joined);
			json_t *rows = json_array();

			for (uint32_t i = 0; i < n && i < limit; i++)
				json_array_append_new(rows, destination_json(c, &joined[i]));
			answer = json_pack("{s:o, s:o}", "destinations", rows, "of", request_number(n));
		}
		free(joined);
	}
	free(list.view);
	return answer;
}
