/* What the control socket may ask of the daemon (struct request_ops), and the reload.
 */
#include <rte_cycles.h>
#include <stdio.h>
#include <systemd/sd-daemon.h>
#include <time.h>

#include "daemon.h"

static const struct config *on_config(void *context)
{
	return ((struct daemon *)context)->plan->config;
}

static const struct nat_policy *on_policy(void *context)
{
	return ((struct daemon *)context)->plan->policy;
}

static bool on_worker(void *context, uint32_t worker,
		      void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument)
{
	struct daemon *d = context;

	return worker < d->n_workers && thread_run(&d->workers[worker].thread, run, argument);
}

static uint64_t on_rings(void *context)
{
	struct daemon *d = context;
	uint64_t n = 0;

	for (uint32_t w = 0; w < d->n_workers; w++)
		n += d->workers[w].inbox ? rte_ring_count(d->workers[w].inbox) : 0;
	return n;
}

/* At the pace of this machine's counter since the start. */
static uint64_t cycles_of(const struct daemon *d, uint64_t ns)
{
	const uint64_t past_ns = thread_clock_ns() - d->started_ns;

	return past_ns ? (uint64_t)((double)(rte_rdtsc() - d->started_tsc) / (double)past_ns * (double)ns)
		       : 0;
}

static bool on_worker_view(void *context, uint32_t worker, struct request_worker *view)
{
	struct daemon *d = context;

	if (worker >= d->n_workers)
		return false;
	const struct thread *t = &d->workers[worker].thread;

	*view = (struct request_worker){
		.core = t->core,
		.bursts = t->bursts,
		.packets = t->packets,
		.idle_ns = t->idle_ns,
		.busy_ns = t->busy_ns,
		.work_ns = t->work_ns,
		.longest_job_ns = t->longest_job_ns,
		.cycles = cycles_of(d, t->work_ns),
		.sleeps = t->sleeps,
		.handover_sent = t->handed_over,
		.handover_received = t->taken_over,
	};
	return true;
}

static bool on_port_view(void *context, uint32_t i, struct request_port *view)
{
	struct daemon *d = context;

	if (i < d->ports.n) {
		port_view(&d->ports.port[i], view);
		return true;
	}
	return d->queues && queue_view(d->queues, d->route, i - d->ports.n, view);
}

static bool on_collector(void *context, uint32_t i, struct request_collector *view)
{
	return export_collector(((struct daemon *)context)->nat_log, i, view);
}

bool daemon_on_sync(void *context, struct sync_view *view)
{
	struct daemon *d = context;

	if (d->sync)
		sync_look(d->sync, view);
	return d->sync != NULL;
}

static bool on_events(void *context, uint32_t worker, struct nat_event_counts *counts)
{
	return export_events(((struct daemon *)context)->nat_log, worker, counts);
}

void daemon_follow_logging(struct daemon *d)
{
	char why[256];

	if (!export_follow(d->nat_log, d->ops, why, sizeof why))
		daemon_say(why);
}

static struct route_figures on_routes(void *context)
{
	return route_figures(((struct daemon *)context)->route);
}

/* The new plan holds for each worker from its next burst on. The old one is freed when all have passed. */
static bool on_apply(void *context, struct config *next, char *why, size_t why_bytes)
{
	struct daemon *d = context;
	struct plan *plan = daemon_plan_new(next, d->plan), *old = d->plan;

	if (!plan) {
		snprintf(why, why_bytes, "no memory for the new configuration; the old one stays");
		return false;
	}
	if (d->queues && nft_update(&next->nat, why, why_bytes)) {
		plan->config = NULL; /* still the caller's */
		daemon_plan_free(plan);
		return false;
	}
	(void)daemon_pools_follow(d, plan);
	nat_table_bind(d->table, plan->policy);
	d->plan = plan;
	daemon_end_spare(d); /* the next one reads the new file */
	for (uint32_t w = 0; w < d->n_workers; w++)
		atomic_store_explicit(&d->workers[w].thread.next_plan, plan, memory_order_release);
	daemon_retire(d, daemon_plan_free, old);
	daemon_next_generation(d);
	daemon_announce_again(d);
	daemon_follow_logging(d);
	return true;
}

struct request_ops daemon_request_ops(struct daemon *d)
{
	return (struct request_ops){
		.context = d,
		.n_workers = d->n_workers,
		.started_s = d->started_s,
		.config = on_config,
		.policy = on_policy,
		.on_worker = on_worker,
		.in_rings = on_rings,
		.worker = on_worker_view,
		.port = on_port_view,
		.collector = on_collector,
		.events = on_events,
		.sync = daemon_on_sync,
		.routes = on_routes,
		.apply = on_apply,
		.capture = request_capture_open(),
		.config_flags = d->options.degraded ? CONFIG_DEGRADED : 0,
		.program = "dsnatd",
	};
}

void daemon_reload(struct daemon *d)
{
	struct config *next = config_load(d->path, d->ops->config_flags);
	char why[256], message[64];
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	snprintf(message, sizeof message, "RELOADING=1\nMONOTONIC_USEC=%lld",
		 (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000);
	sd_notify(0, message);
	if (!next) {
		daemon_say("no memory to read the configuration; the old one stays");
	} else {
		config_print(next, stderr);
		if (next->n_errors)
			daemon_say("the configuration is wrong; the old one stays");
		else if (!config_can_follow(d->plan->config, next, why, sizeof why))
			daemon_say(why);
		else if (request_keep_departed(d->ops, next), !on_apply(d, next, why, sizeof why))
			daemon_say(why);
		else
			next = NULL; /* it is the plan's now */
		daemon_end_spare(d); /* also where the file was refused: it may be another one now */
	}
	if (next)
		config_free(next);
	sd_notify(0, "READY=1");
}
