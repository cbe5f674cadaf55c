/* explain: what would become of a packet, and why, step by step.
 *
 *	{"cmd":"explain","if":"inside0","pkt":"45..."}                      by the configuration in force
 *	{"cmd":"explain","if":"inside0","pkt":"45...","text":"engine: ..."} by a candidate file, with the sessions that live now
 *
 * The engine tries the packet and takes everything back (core/trial.c); this file only puts into words
 * what it saw. The worker that has the packet's session answers, else the first one.
 */
#include <arpa/inet.h>
#include <jansson.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "../core/policy.h"
#include "hex.h"
#include "request_internal.h"

#define COUNT(array)   (sizeof(array) / sizeof((array)[0]))
#define PACKET_MAX     9216u
#define END_CHARACTERS (INET_ADDRSTRLEN + 6)

struct explanation {
	struct nat_trial trial;
	uint8_t given[PACKET_MAX], bytes[PACKET_MAX];
	uint32_t len_bytes;
	uint32_t worker;
	bool half_way;
	const struct nat_config *config; /* in force, or the candidate */
	json_t *steps;
};

static const char *end_text(uint32_t address_be, uint16_t port_be, char text[END_CHARACTERS])
{
	char address[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &address_be, address, sizeof(address));
	if (port_be)
		snprintf(text, END_CHARACTERS, "%s:%u", address, ntohs(port_be));
	else
		snprintf(text, END_CHARACTERS, "%s", address);
	return text;
}

static void step(struct explanation *x, const char *stage, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
static void step(struct explanation *x, const char *stage, const char *format, ...)
{
	char text[640];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	json_array_append_new(x->steps, json_pack("{s:s, s:s}", "stage", stage, "text", text));
}

/* ---- the steps in words ---- */

static const char *verdict_word(uint8_t verdict)
{
	static const char *const words[] = {[NAT_FORWARD] = "forward",
					    [NAT_PASS] = "pass",
					    [NAT_DROP] = "drop",
					    [NAT_HOLD] = "hold",
					    [NAT_HANDOVER] = "hand over"};

	return words[verdict];
}

static void say_stop(struct explanation *x, const char *stage)
{
	const enum nat_reason reason = (enum nat_reason)x->trial.pkt.reason;
	const char *advice = nat_reason_advice(reason);

	step(x, stage, "%s, %s: %s%s%s", x->trial.pkt.verdict == NAT_PASS ? "to the kernel" : "dropped",
	     nat_reason_name(reason), nat_reason_meaning(reason), *advice ? "; " : "", advice);
}

static const char *protocol_text(uint8_t protocol, char text[16])
{
	if (!strcmp(request_protocol_name(protocol), "other"))
		snprintf(text, 16, "protocol %u", protocol);
	else
		snprintf(text, 16, "%s", request_protocol_name(protocol));
	return text;
}

static const struct nat_pool *pool_of_address(const struct nat_policy *policy, uint32_t address_be)
{
	const uint32_t number = nat_policy_address(policy, address_be);

	return number == UINT32_MAX ? NULL : &policy->pool[policy->address[number].pool];
}

static void say_parse(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	uint32_t from_be = 0, to_be = 0;
	char from[END_CHARACTERS], to[END_CHARACTERS], protocol[16];

	if (t->settled_in == NAT_TRIED_PARSE || x->len_bytes < 20) {
		say_stop(x, "parse");
		return;
	}
	memcpy(&from_be, x->given + 12, sizeof(from_be));
	memcpy(&to_be, x->given + 16, sizeof(to_be));
	step(x, "parse", "%s, %u bytes, from %s to %s%s", protocol_text(x->given[9], protocol), x->len_bytes,
	     end_text(from_be, 0, from), end_text(to_be, 0, to),
	     t->icmp_error ? ", an ICMP error: the packet that it quotes decides" : "");
}

static void say_inside(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	const struct nat_zone_config *zone = &t->policy->zone[t->zone].config;
	char source[END_CHARACTERS], destination[END_CHARACTERS];

	step(x, "classify", "zone %u (source %s/%u%s%s) is the first that matches: pool %s%s", t->zone + 1,
	     end_text(htonl(zone->source.address), 0, source), zone->source.length_bits,
	     zone->destination.length_bits ? ", destination " : "",
	     zone->destination.length_bits ? end_text(htonl(zone->destination.address), 0, destination) : "",
	     t->policy->pool[zone->pool].name,
	     t->hairpin ? "; the destination is a pool's address, so it comes back in (hairpin)" : "");
}

static void say_classify(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	char end[END_CHARACTERS];

	if (t->settled_in == NAT_TRIED_CLASSIFY || t->settled_in == NAT_TRIED_SENT) {
		if (t->zone != NAT_NO_ZONE && t->policy->zone[t->zone].config.action == NAT_ACTION_POOL)
			say_inside(x);
		say_stop(x, "classify");
	} else if (t->inbound) {
		const struct nat_pool *pool = pool_of_address(t->policy, t->tuple.local_be);
		step(x, "classify", "%s is an address of pool %s", end_text(t->tuple.local_be, 0, end),
		     pool ? pool->name : "?");
	} else if (t->zone != NAT_NO_ZONE) {
		say_inside(x);
	}
}

static void say_lookup(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	const struct nat_session_view *s = &t->session;
	char inside[END_CHARACTERS], outside[END_CHARACTERS], remote[END_CHARACTERS];

	if (!t->found) {
		step(x, "look up", "%s session has this tuple", "no");
		return;
	}
	step(x, "look up", "a session of worker %u: %s is %s towards %s, %s, %u s old, ends in %u s if idle",
	     x->worker, end_text(s->inside.local_be, s->inside.local_port_be, inside),
	     end_text(s->out_addr_be, s->out_port_be, outside),
	     end_text(s->inside.remote_be, s->inside.remote_port_be, remote), s->state, s->age_s,
	     s->expires_s);
}

static void say_route(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	const struct nat_hop *hop = t->hairpin ? &t->routed : &t->pkt.hop;
	char next[END_CHARACTERS];

	if (t->settled_in == NAT_TRIED_ROUTE)
		say_stop(x, "route");
	else if (t->hairpin)
		return;
	else if (hop->kind == NAT_HOP_FORWARD && hop->iface < x->config->n_interfaces)
		step(x, "route", "by %s to next hop %s%s", x->config->interfaces[hop->iface].name,
		     end_text(hop->next_hop_be, 0, next),
		     t->cut ? "; larger than its MTU, so it leaves in fragments" : "");
	else if (hop->kind == NAT_HOP_KERNEL)
		step(x, "route", "by an interface of the kernel's, which sends it");
}

static void say_choice(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	const struct nat_session_view *s = &t->session;
	const struct nat_pool *pool = pool_of_address(t->policy, s->out_addr_be);
	char outside[END_CHARACTERS];
	const char *how = "";

	if (t->zone != NAT_NO_ZONE && pool)
		how = pool->n_hosts                            ? ", by arithmetic"
		      : pool->select == NAT_SELECT_ROUND_ROBIN ? ", the next address in turn that has a port"
							       : ", the host's own address";
	if (t->begun)
		step(x, "allocate", "a new session gets %s of pool %s%s; it ends after %u s without a packet",
		     end_text(s->out_addr_be, s->out_port_be, outside), pool ? pool->name : "?", how,
		     s->expires_s ? s->expires_s - 1 : 0);
	else if (t->over_mapping)
		step(x, "allocate", "no new session: the host's mapping %s lets it in",
		     end_text(s->out_addr_be, s->out_port_be, outside));
}

static void say_rewrite(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	const struct nat_session_view *s = &t->session;
	char end[END_CHARACTERS];

	if (t->inbound)
		step(x, "rewrite", "the destination becomes %s",
		     end_text(s->inside.local_be, s->inside.local_port_be, end));
	else
		step(x, "rewrite", "the source becomes %s", end_text(s->out_addr_be, s->out_port_be, end));
	if (t->hairpin && t->pkt.verdict == NAT_FORWARD)
		step(x, "again from outside", "the destination becomes %s",
		     end_text(t->behind.inside.local_be, t->behind.inside.local_port_be, end));
	else if (t->hairpin)
		say_stop(x, "again from outside");
}

static void say(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	/* the second time of a hairpin may have ended anywhere */
	const bool first_went_through = t->hairpin && t->settled_in != NAT_TRIED_NOTHING &&
					(t->pkt.verdict == NAT_FORWARD || t->first_tuple.protocol != 0);

	say_parse(x);
	if (t->settled_in == NAT_TRIED_PARSE && !first_went_through)
		return;
	if (first_went_through) {
		say_inside(x);
		say_choice(x);
		say_rewrite(x);
		return;
	}
	say_classify(x);
	if (t->settled_in <= NAT_TRIED_CLASSIFY)
		return;
	say_lookup(x);
	say_route(x);
	if (t->settled_in <= NAT_TRIED_ROUTE)
		return;
	if (t->settled_in == NAT_TRIED_ALLOCATE) {
		say_stop(x, "allocate");
		return;
	}
	say_choice(x);
	if (t->pkt.verdict == NAT_FORWARD)
		say_rewrite(x);
	else
		say_stop(x, "rewrite");
}

/* ---- the trial ---- */

static void try_packet(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct explanation *x = argument;

	nat_engine_try(e, &x->trial, now_ns);
}

static bool ask_worker(struct request_context *c, struct explanation *x, uint32_t worker, uint8_t iface,
		       uint16_t flags, struct nat_policy *candidate)
{
	const struct nat_errand errand = x->trial.pkt.errand;

	/* a hairpin goes on to other workers half translated */
	x->half_way |= x->trial.hairpin && x->trial.pkt.verdict == NAT_HANDOVER &&
		       x->trial.first_tuple.protocol != 0;
	if (!x->half_way)
		memcpy(x->bytes, x->given, x->len_bytes);
	x->trial = (struct nat_trial){.candidate = candidate,
				      .pkt = {.l3 = x->bytes,
					      .len_bytes = x->len_bytes,
					      .iface = iface,
					      .flags = flags,
					      .errand = errand}};
	x->worker = worker;
	return request_on_worker(c, worker, try_packet, x);
}

/* The packet may come to any worker: each knows who is the right one, as it would of the packet itself. */
static bool try_on_workers(struct request_context *c, struct explanation *x, uint8_t iface, uint16_t flags,
			   struct nat_policy *candidate)
{
	uint32_t worker = 0;

	do {
		if (!ask_worker(c, x, worker, iface, flags, candidate))
			return false;
		worker = x->trial.pkt.owner;
		flags |= NAT_PKT_TAKEN_OVER;
	} while (x->trial.pkt.verdict == NAT_HANDOVER && worker != x->worker);
	return true;
}

static json_t *packet_json(const struct explanation *x, uint8_t iface, const uint8_t *bytes,
			   uint32_t len_bytes)
{
	return json_pack("{s:s, s:o}", "if",
			 iface < x->config->n_interfaces ? x->config->interfaces[iface].name : "", "pkt",
			 hex_json(bytes, len_bytes));
}

static json_t *answer_json(struct explanation *x)
{
	const struct nat_trial *t = &x->trial;
	const enum nat_reason reason = (enum nat_reason)t->pkt.reason;
	json_t *answer;
	char outside[END_CHARACTERS];

	x->steps = json_array();
	say(x);
	answer = json_pack("{s:s, s:s, s:s, s:s, s:o, s:o, s:b}", "verdict", verdict_word(t->pkt.verdict),
			   "reason", nat_reason_name(reason), "meaning", nat_reason_meaning(reason), "advice",
			   nat_reason_advice(reason), "worker", request_number(x->worker), "steps", x->steps,
			   "new_session", t->begun);
	if (t->zone != NAT_NO_ZONE)
		json_object_set_new(answer, "zone", request_number(t->zone + 1));
	if (t->pkt.verdict == NAT_FORWARD) {
		json_object_set_new(
			answer, "outside",
			json_string(end_text(t->session.out_addr_be, t->session.out_port_be, outside)));
		json_object_set_new(answer, "out",
				    packet_json(x, t->pkt.hop.iface, x->bytes, t->pkt.total_bytes));
		json_object_set_new(answer, "fragmented", json_boolean(t->cut));
	}
	if (t->made_bytes)
		json_object_set_new(answer, "engine_sends",
				    packet_json(x, t->made_iface, t->made, t->made_bytes));
	return answer;
}

/* ---- the request ---- */

static bool read_packet(struct request_context *c, struct explanation *x)
{
	const char *hex = NULL;

	if (!request_read_text(c, "pkt", &hex))
		return false;
	if (!hex || strlen(hex) > 2 * PACKET_MAX || !hex_read(hex, strlen(hex), x->given)) {
		request_refuse(c, "\"pkt\" must be an IPv4 packet in hexadecimal, at most %u bytes",
			       PACKET_MAX);
		return false;
	}
	x->len_bytes = (uint32_t)(strlen(hex) / 2);
	return true;
}

static int interface_named(const struct nat_config *nat, const char *name)
{
	for (uint32_t i = 0; name && i < nat->n_interfaces; i++)
		if (!strcmp(nat->interfaces[i].name, name))
			return (int)i;
	return -1;
}

static struct nat_policy *candidate_policy(struct request_context *c, struct config *next)
{
	next->nat.n_workers = c->ops->n_workers;
	const size_t bytes = (nat_policy_size(&next->nat) + 63) & ~(size_t)63;
	void *memory = aligned_alloc(64, bytes);

	if (!memory) {
		request_refuse(c, "no memory to judge the file; free some");
		return NULL;
	}
	memset(memory, 0, bytes);
	return nat_policy_init(memory, &next->nat, c->ops->policy(c->ops->context));
}

static json_t *explain_by(struct request_context *c, struct explanation *x, int iface,
			  struct nat_policy *candidate)
{
	const struct nat_interface_config *in = &x->config->interfaces[iface];
	/* what the kernel forwards it has routed itself, and its TTL is paid */
	const uint16_t flags =
		in->path == NAT_PATH_NFQUEUE && in->role == NAT_ROLE_INSIDE ? NAT_PKT_KERNEL_ROUTES : 0;

	if (!try_on_workers(c, x, (uint8_t)iface, flags, candidate))
		return NULL;
	if (!x->trial.whole && !x->trial.pkt.settled)
		return request_refuse(
			c, "a fragment's fate depends on others of its datagram; give a whole packet");
	return answer_json(x);
}

json_t *request_explain(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "if", "pkt", "file", "text"};
	const struct config *running = c->ops->config(c->ops->context);
	const char *name = NULL, *file = "candidate", *text = NULL;
	struct explanation *x;
	struct config *next = NULL;
	struct nat_policy *candidate = NULL;
	json_t *answer = NULL;
	int iface;

	if (!request_only_keys(c, keys, COUNT(keys)) || !request_read_text(c, "if", &name) ||
	    !request_read_text(c, "file", &file) || !request_read_text(c, "text", &text))
		return NULL;
	iface = interface_named(&running->nat, name);
	if (iface < 0)
		return request_refuse(c, "there is no interface \"%.20s\"; see dsnatctl show ports",
				      name ? name : "");
	x = calloc(1, sizeof(*x));
	if (!x)
		return request_refuse(c, "no memory to explain; free some");
	x->config = &running->nat;
	if (!read_packet(c, x)) {
		free(x);
		return NULL;
	}
	if (!text) {
		answer = explain_by(c, x, iface, NULL);
	} else {
		next = config_parse(file, text, strlen(text), c->ops->config_flags);
		if (next->n_errors)
			answer = request_refuse_file(c, next);
		else if (config_can_follow(running, next, c->why, sizeof(c->why))) {
			request_keep_departed(c->ops, next);
			candidate = candidate_policy(c, next);
			x->config = &next->nat;
			if (candidate)
				answer = explain_by(c, x, iface, candidate);
		}
	}
	free(candidate);
	if (next)
		config_free(next);
	free(x);
	return answer;
}
