/* Events to lines.
 *
 * The core decides what is an event and damps what an attacker could cause (RFC 6888 REQ-11C: an alarm is
 * told once a minute); here each becomes one sentence that names pool, host and remedy. Destinations are
 * in none of them (RFC 6888 REQ-12). With port blocks the log answers "who was 203.0.113.1:1030 at that
 * time" in two lines per block instead of two per connection (RFC 6888 REQ-14).
 *
 * Nothing is lost in silence: an engine that has no room for an event counts it, and the count is told.
 */
#include "log.h"

#include <arpa/inet.h>
#include <inttypes.h>
#include <stdio.h>

#define STEP_EVENTS 512u /* copied in one step: some microseconds of a worker */

struct step {
	struct nat_event event[STEP_EVENTS];
	uint32_t n;
	uint64_t lost;
};

static void copy_events(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	step->n = 0;
	while (step->n < STEP_EVENTS && nat_engine_event(e, &step->event[step->n]))
		step->n++;
	step->lost = nat_engine_counters(e)->events_lost;
}

static const char *pool_name(const struct request_ops *ops, uint16_t id)
{
	const struct nat_policy *policy = ops->policy(ops->context);
	const uint32_t n_pools = ops->config(ops->context)->nat.n_pools;

	for (uint32_t i = 0; i < n_pools; i++)
		if (nat_policy_pool_id(policy, i) == id)
			return nat_policy_pool_name(policy, i);
	return NULL; /* none, or one that the configuration has no more */
}

static void write_refusal(char *line, const struct nat_event *event, const char *pool)
{
	char host[32] = "a packet from outside";
	const enum nat_reason reason = (enum nat_reason)event->reason;

	if (event->inside_be)
		inet_ntop(AF_INET, &event->inside_be, host, sizeof(host));
	snprintf(line, LOG_LINE_BYTES, "%s%s%s%s was refused: %s (%s); %s", pool ? "pool " : "",
		 pool ? pool : "", pool ? ": " : "", host, nat_reason_meaning(reason),
		 nat_reason_name(reason), nat_reason_advice(reason));
}

static void write_block(char *line, const struct nat_event *event, const char *pool)
{
	char host[INET_ADDRSTRLEN], address[INET_ADDRSTRLEN];
	const bool taken = event->kind == NAT_EVENT_BLOCK_TAKEN;

	inet_ntop(AF_INET, &event->inside_be, host, sizeof(host));
	inet_ntop(AF_INET, &event->outside_be, address, sizeof(address));
	snprintf(line, LOG_LINE_BYTES, "pool %s: %s %s ports %u-%u of %s", pool ? pool : "?", host,
		 taken ? "took" : "gave back", event->port_first, event->port_last, address);
}

static void write_line(char *line, const struct nat_event *event, const char *pool)
{
	switch ((enum nat_event_kind)event->kind) {
	case NAT_EVENT_BLOCK_TAKEN:
	case NAT_EVENT_BLOCK_FREED:
		write_block(line, event, pool);
		return;
	case NAT_EVENT_PORTS_EXHAUSTED:
	case NAT_EVENT_TABLE_FULL:
	case NAT_EVENT_HOST_LIMIT:
		break;
	case NAT_EVENT_SESSION_CREATED: /* for a log ring only */
	case NAT_EVENT_SESSION_ENDED:
	case NAT_EVENT_MAPPING_CREATED:
	case NAT_EVENT_MAPPING_ENDED:
	case NAT_EVENT_KINDS:
		break;
	}
	write_refusal(line, event, pool);
}

void log_drain(struct log *log, const struct request_ops *ops,
	       void (*say)(void *context, const struct log_line *line), void *context)
{
	char line[LOG_LINE_BYTES];
	struct step step;

	for (uint32_t worker = 0; worker < ops->n_workers; worker++) {
		do {
			step.n = 0;
			step.lost = log->lost[worker];
			if (!ops->on_worker(ops->context, worker, copy_events, &step))
				break;
			for (uint32_t i = 0; i < step.n; i++) {
				const char *pool = pool_name(ops, step.event[i].pool_id);
				write_line(line, &step.event[i], pool);
				say(context, &(struct log_line){line, &step.event[i], pool});
			}
		} while (step.n == STEP_EVENTS);
		if (step.lost <= log->lost[worker])
			continue;
		snprintf(line, sizeof(line),
			 "%" PRIu64 " lines of this log were lost: more happened than could be told",
			 step.lost - log->lost[worker]);
		log->lost[worker] = step.lost;
		say(context, &(struct log_line){.text = line});
	}
}
