/* dsnatd: the one daemon. It reads the configuration, starts the shells that the configuration asks for, and
 * waits.
 *
 *     main thread (control)                        workers                         twin thread
 *     signals, control socket, netlink             io/dpdk/worker.c or,            io/dpdk/twin.c
 *     reload, links, announcements, watchdog       without DPDK ports,             frames to and from
 *                                                  io/nfqueue/queue.c:             the kernel
 *                                                  one engine each
 *
 * Without an interface on the DPDK path neither EAL nor hugepages are touched. With interfaces on both, worker 0
 * serves the netfilter queue besides its ports.
 *
 * The control thread hands things to workers by swapping a pointer and raising `generation`; what was swapped
 * out goes on the list of `retired` objects and is freed when every worker has reached that generation
 * (io/thread.h).
 *
 * Exit status (also in --help): 0 stopped on request; 1 failed while running or at start; 2 the configuration
 * or the command line is wrong; 3 a device cannot be used; 4 not enough memory; 5 another dsnatd has our
 * socket or sessions.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <systemd/sd-daemon.h>
#include <time.h>
#include <unistd.h>

#include <rte_cycles.h>
#include <rte_launch.h>
#include <rte_lcore.h>
#include <rte_version.h>

#include "ctl/config.h"
#include "ctl/export.h"
#include "ctl/facts.h"
#include "ctl/journal.h"
#include "ctl/log.h"
#include "ctl/pcp_server.h"
#include "ctl/route.h"
#include "ctl/socket.h"
#include "ctl/sync.h"
#include "io/announce.h"
#include "io/crew.h"
#include "io/dpdk/degrade.h"
#include "io/dpdk/eal.h"
#include "io/dpdk/guard.h"
#include "io/dpdk/port.h"
#include "io/dpdk/twin.h"
#include "io/dpdk/worker.h"
#include "io/memory.h"
#include "io/nfqueue/nft.h"
#include "io/nfqueue/queue.h"
#include "io/rival.h"
#include "io/standing.h"
#include "io/thread.h"
#include "version.h"

#define DEFAULT_CONFIG   "/etc/dsnat/dsnatd.yaml"
#define DEFAULT_SOCKET   "/run/dsnatd/control.sock"
#define LINK_PATIENCE_NS 3000000000u /* at start a port that has no link yet is not reported down */
#define SECOND_NS        1000000000u
#define STALL_S          10u /* a worker without a round for so long hangs */

enum status {
	STOPPED = 0,
	FAILED = 1,
	INVALID = CONFIG_EXIT_INVALID,
	NO_DEVICE = 3,
	NO_MEMORY = 4,
	IN_USE = 5
};

static const char usage[] =
	"usage: dsnatd [--config FILE] [--socket PATH] [--sessions PATH] [--no-huge]\n"
	"       dsnatd --degraded ...\n"
	"       dsnatd --check FILE\n"
	"       dsnatd --facts FILE\n"
	"       dsnatd --version [--json]\n"
	"\n"
	"  --config FILE    the configuration (default " DEFAULT_CONFIG ")\n"
	"  --socket PATH    the control socket (default " DEFAULT_SOCKET ")\n"
	"  --sessions PATH  where sessions outlive the daemon (default: hugetlbfs or /dev/shm, "
	"dsnat/sessions; with\n"
	"                   another --socket: nowhere)\n"
	"  --no-huge        plain pages, also where there are hugepages (or DSNATD_NO_HUGE=1 in the "
	"environment)\n"
	"  --degraded       all ports by the kernel's path; the daemon starts itself so where `degraded: "
	"nfqueue` "
	"allows it\n"
	"  --check FILE     judge a configuration, and end\n"
	"  --facts FILE     print what it says in lines of words, for scripts, and end\n"
	"  --version        print the version, and end; with --json for programs\n"
	"\n"
	"SIGHUP reloads the configuration, SIGTERM stops.\n"
	"Exit status: 0 stopped on request; 1 failed; 2 configuration or command line is wrong; 3 a device "
	"cannot be\n"
	"used; 4 not enough memory; 5 another dsnatd uses the socket or the session memory.\n";

struct options {
	const char *config, *socket, *sessions;
	bool no_huge, degraded;
};

struct retired {
	struct retired *next;
	uint64_t generation; /* free it when every worker has reached this */
	void (*release)(void *object);
	void *object;
};

struct daemon {
	struct options options;
	const char *path; /* of the configuration */
	struct plan *plan;
	/* a reload cannot change them, and ports, routes and queue outlive the plan that they came with */
	struct nat_interface_config interfaces[NAT_INTERFACES_MAX];
	_Atomic uint64_t generation;
	struct retired *retired;
	struct route *route;
	bool eal;
	struct ports ports;
	struct twins twins;
	struct worker *workers;
	uint32_t n_workers;
	struct queue *queue; /* NULL: no interface on the queue path; else worker 0's */
	struct nft_watch rules_watch;
	bool rules_changed;     /* by somebody else: to be put in place again at the next tick */
	pthread_t queue_thread; /* only without DPDK ports */
	bool queue_runs;
	struct memory sessions, *engine_memory;
	struct crew crew;
	struct nat_table *table;
	struct socket_server *socket;
	const struct request_ops *ops;
	const struct plan *port_control_failed; /* said once per configuration */
	struct pcp_server *port_control;        /* NULL: off */
	struct announce announce;
	struct rival rival[NAT_WORKERS_MAX];
	struct standing standing;
	bool translates;    /* all workers made rounds since the last look */
	uint64_t connected; /* digest of the prefixes that announcements were made for */
	int epoll_fd, signal_fd, tick_fd, announce_fd;
	uint64_t started_ns, started_tsc, started_s, watchdog_us;
	struct log log;
	struct export *nat_log;
	struct sync *sync;                   /* NULL: there is no peer */
	uint64_t rounds[NAT_WORKERS_MAX];    /* at the last tick */
	uint32_t stalled_s[NAT_WORKERS_MAX]; /* since when there were none */
	bool stop;
	bool restart; /* the end is not what the operator wanted: status 1, and systemd starts it again */
};

enum source { SIGNALS, TICK, ROUTES, CLIENTS, ANNOUNCE, PORT_CONTROL, RULES, PEER };

static void say(const char *sentence)
{
	fprintf(stderr, "dsnatd: %s\n", sentence);
}

/* ---- what was swapped out ---- */

static void retire(struct daemon *d, void (*release)(void *object), void *object)
{
	struct retired *r = malloc(sizeof *r);

	if (!r)
		return; /* better a leak than a reader of freed memory */
	*r = (struct retired){
		.next = d->retired, .generation = d->generation + 1, .release = release, .object = object};
	d->retired = r;
}

static void wake_workers(struct daemon *d)
{
	for (uint32_t w = 0; w < d->n_workers; w++)
		thread_wake(&d->workers[w].thread);
}

static void next_generation(struct daemon *d)
{
	atomic_fetch_add(&d->generation, 1);
	wake_workers(d);
}

static void free_retired(struct daemon *d)
{
	uint64_t reached = d->generation;

	for (uint32_t w = 0; w < d->n_workers; w++) {
		uint64_t passed = atomic_load_explicit(&d->workers[w].thread.passed, memory_order_acquire);

		reached = passed < reached ? passed : reached;
	}
	for (struct retired **at = &d->retired; *at;) {
		struct retired *r = *at;

		if (r->generation > reached) {
			at = &r->next;
			continue;
		}
		*at = r->next;
		r->release(r->object);
		free(r);
	}
}

/* ---- plans ---- */

static void plan_free(void *object)
{
	struct plan *plan = object;

	if (!plan)
		return;
	free(plan->policy_memory);
	config_free(plan->config);
	free(plan);
}

/* Takes ownership of `config` when it succeeds. */
static struct plan *plan_new(struct config *config, const struct plan *previous)
{
	struct plan *plan = calloc(1, sizeof *plan);
	config->nat.n_workers = previous ? previous->config->nat.n_workers : crew_size(&config->nat);
	size_t bytes = (nat_policy_size(&config->nat) + 63) & ~(size_t)63;

	if (plan)
		plan->policy_memory = aligned_alloc(64, bytes);
	if (!plan || !plan->policy_memory) {
		free(plan);
		return NULL;
	}
	memset(plan->policy_memory, 0, bytes);
	plan->policy = nat_policy_init(plan->policy_memory, &config->nat, previous ? previous->policy : NULL);
	plan->config = config;
	return plan;
}

/* Pools that follow a VRRP address. True when one became ours. */
static bool pools_follow(struct daemon *d, struct plan *plan)
{
	const struct nat_config *config = &plan->config->nat;
	bool won = false;

	for (uint32_t i = 0; i < config->n_pools; i++) {
		uint32_t address_be = config->pools[i].active_while_be;
		bool active = !address_be || route_has_address(d->route, address_be);

		if (active == nat_policy_is_active(plan->policy, i))
			continue;
		nat_policy_set_active(plan->policy, i, active);
		won |= active;
		fprintf(stderr, "dsnatd: pool %s is %s\n", config->pools[i].name,
			active ? "ours" : "no longer ours");
	}
	return won;
}

/* ---- announcements ---- */

static void announce_again(struct daemon *d)
{
	struct itimerspec every = {.it_interval.tv_nsec = ANNOUNCE_EVERY_MS * 1000000, .it_value.tv_nsec = 1};

	announce_all(&d->announce, thread_clock_ns());
	timerfd_settime(d->announce_fd, 0, &every, NULL);
}

static bool send_announcement(void *context, uint8_t iface, uint32_t address_be)
{
	struct daemon *d = context;
	const struct nat_interface_config *interface = &d->plan->config->nat.interfaces[iface];
	uint8_t index, frame[ARP_FRAME_BYTES];

	if (interface->path == NAT_PATH_NFQUEUE)
		return arp_socket_announce(interface->name, address_be);
	index = d->ports.of_iface[iface];
	arp_announcement(frame, d->ports.port[index].mac.addr_bytes, address_be);
	return twins_send(&d->twins, &d->ports.port[index], frame, sizeof frame);
}

static void announce_tick(struct daemon *d)
{
	struct itimerspec never = {0};
	uint64_t ignored;

	(void)!read(d->announce_fd, &ignored, sizeof ignored);
	announce_serve(&d->announce, d->plan, d->route, thread_clock_ns(), send_announcement, d);
	if (!announce_busy(&d->announce))
		timerfd_settime(d->announce_fd, 0, &never, NULL);
}

/* ---- routes ---- */

static void route_changed(void *context)
{
	struct daemon *d = context;

	next_generation(d);
	if (!d->route) /* still being opened */
		return;
	uint64_t connected = route_connected_digest(d->route);
	bool won = pools_follow(d, d->plan);

	if (won || connected != d->connected)
		announce_again(d);
	d->connected = connected;
}

static void route_retire(void *context, void *memory)
{
	retire(context, free, memory);
}

/* ---- control requests ---- */

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
	return d->queue && queue_view(d->queue, d->route, i - d->ports.n, view);
}

static bool on_collector(void *context, uint32_t i, struct request_collector *view)
{
	return export_collector(((struct daemon *)context)->nat_log, i, view);
}

static bool on_sync(void *context, struct sync_view *view)
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

static void follow_logging(struct daemon *d)
{
	char why[256];

	if (!export_follow(d->nat_log, d->ops, why, sizeof why))
		say(why);
}

static struct route_figures on_routes(void *context)
{
	return route_figures(((struct daemon *)context)->route);
}

/* The new plan holds for each worker from its next burst on. The old one is freed when all have passed. */
static bool on_apply(void *context, struct config *next, char *why, size_t why_bytes)
{
	struct daemon *d = context;
	struct plan *plan = plan_new(next, d->plan), *old = d->plan;

	if (!plan) {
		snprintf(why, why_bytes, "no memory for the new configuration; the old one stays");
		return false;
	}
	if (d->queue && nft_update(&next->nat, why, why_bytes)) {
		plan->config = NULL; /* still the caller's */
		plan_free(plan);
		return false;
	}
	(void)pools_follow(d, plan);
	d->plan = plan;
	for (uint32_t w = 0; w < d->n_workers; w++)
		atomic_store_explicit(&d->workers[w].thread.next_plan, plan, memory_order_release);
	retire(d, plan_free, old);
	next_generation(d);
	announce_again(d);
	follow_logging(d);
	return true;
}

static struct request_ops request_ops(struct daemon *d)
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
		.sync = on_sync,
		.routes = on_routes,
		.apply = on_apply,
		.capture = request_capture_open(),
		.config_flags = d->options.degraded ? CONFIG_DEGRADED : 0,
		.program = "dsnatd",
	};
}

static void reload(struct daemon *d)
{
	struct config *next = config_load(d->path, d->ops->config_flags);
	char why[256], message[64];
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	snprintf(message, sizeof message, "RELOADING=1\nMONOTONIC_USEC=%lld",
		 (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000);
	sd_notify(0, message);
	if (!next) {
		say("no memory to read the configuration; the old one stays");
	} else {
		config_print(next, stderr);
		if (next->n_errors)
			say("the configuration is wrong; the old one stays");
		else if (!config_can_follow(d->plan->config, next, why, sizeof why))
			say(why);
		else if (request_keep_departed(d->ops, next), !on_apply(d, next, why, sizeof why))
			say(why);
		else
			next = NULL; /* it is the plan's now */
	}
	if (next)
		config_free(next);
	sd_notify(0, "READY=1");
}

/* ---- the control thread's loop ---- */

static void links(struct daemon *d)
{
	bool patient = thread_clock_ns() - d->started_ns < LINK_PATIENCE_NS, announce = false;

	for (uint32_t i = 0; i < d->ports.n; i++) {
		struct port *port = &d->ports.port[i];

		if (port_is_replaced(port) && !d->stop) {
			fprintf(stderr,
				"dsnatd: the device of port %s is back; ending, to start again with it\n",
				port->name);
			d->stop = d->restart = true;
		}
		if (port_poll_link(port)) {
			announce |= port->up && port->outside;
			fprintf(stderr, "dsnatd: port %s is %s%s\n", port->name, port->up ? "up" : "down",
				port->gone ? ": its device is gone; bring it back, and dsnatd starts again "
					     "with it"
					   : "");
		}
		/* after a restart the link is lost for a moment: the kernel need not know */
		if (port->up != port->told_up && (port->up || !patient)) {
			port->told_up = port->up;
			twin_set_carrier(&d->twins.twin[i], port->up);
		}
	}
	if (announce)
		announce_again(d);
}

/* Alive is a daemon whose workers all make rounds. systemd hears nothing while one hangs, and would end us in the end; without systemd,
 * and sooner, we do it ourselves. Not by stop(), which waits for the workers. The sessions are in memory that stays. */
static void watchdog(struct daemon *d)
{
	bool alive = true;

	for (uint32_t w = 0; w < d->n_workers; w++) {
		if (d->rounds[w] != d->workers[w].thread.rounds) {
			d->rounds[w] = d->workers[w].thread.rounds;
			d->stalled_s[w] = 0;
			continue;
		}
		alive = false;
		if (++d->stalled_s[w] == 1)
			fprintf(stderr, "dsnatd: worker %u makes no rounds\n", w);
		if (d->stalled_s[w] < STALL_S)
			continue;
		fprintf(stderr,
			"dsnatd: worker %u has made no round for %u s: a device or a thread hangs; ending, "
			"so that a new "
			"dsnatd goes on with the sessions\n",
			w, STALL_S);
		abort();
	}
	if (alive && d->watchdog_us)
		sd_notify(0, "WATCHDOG=1");
	d->translates = alive;
}

static bool watch(struct daemon *d, int fd, enum source source)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = source};

	return fd >= 0 && !epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

/* The port is open only while the configuration wants it; that may change with a reload. */
static void follow_port_control(struct daemon *d)
{
	const bool wanted = d->plan->config->nat.port_control;
	char why[256];

	if (wanted == (d->port_control != NULL) || (wanted && d->port_control_failed == d->plan))
		return;
	if (!wanted) {
		pcp_close(d->port_control);
		d->port_control = NULL;
		return;
	}
	d->port_control = pcp_open(d->ops, why, sizeof why);
	if (d->port_control && watch(d, pcp_fd(d->port_control), PORT_CONTROL))
		return;
	d->port_control_failed = d->plan;
	if (!d->port_control)
		say(why);
}

static void say_line(void *context, const char *line)
{
	(void)context;
	say(line);
}

static void say_event(void *context, const struct log_line *line)
{
	if (!journal_send(line))
		say_line(context, line->text);
}

/* ---- rules of ours that somebody else changed ---- */

static void rules_seen(struct daemon *d)
{
	char who[128];

	if (!nft_watch_serve(&d->rules_watch, who, sizeof who) || d->rules_changed)
		return;
	d->rules_changed = true;
	fprintf(stderr, "dsnatd: %s has changed nftables rules of dsnatd; they are put in place again\n",
		who);
}

/* At most ten times a second: two programs that undo each other's work must not eat the machine. */
static void rules_mend(struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	char why[512];

	if (!d->rules_changed)
		return;
	d->rules_changed = false;
	if ((d->queue && nft_install(config, why, sizeof why)) ||
	    (d->eal && guards_install(config, why, sizeof why))) {
		say(why);
		d->rules_changed = true;
	}
}

static void follow_standing(struct daemon *d)
{
	struct sync_view view;

	standing_follow(&d->standing, d->plan, on_sync(d, &view) ? &view : NULL, d->translates);
}

static void rivals(struct daemon *d)
{
	char why[256];

	for (uint32_t w = 0; w < d->n_workers; w++) {
		if (!rival_look(&d->rival[w], &d->workers[w].thread, d->plan, thread_clock_ns(), why,
				sizeof why))
			continue;
		if (*why)
			say(why);
		announce_again(d);
	}
}

static void tick(struct daemon *d)
{
	static unsigned n; /* ten a second */
	uint64_t ignored;

	follow_port_control(d);
	(void)!read(d->tick_fd, &ignored, sizeof ignored);
	links(d);
	rules_mend(d);
	free_retired(d);
	follow_standing(d);
	if (++n % 10)
		return;
	watchdog(d);
	rivals(d);
	log_drain(&d->log, d->ops, say_event, NULL);
	export_tell(d->nat_log, say_line, NULL);
	route_refresh(d->route);
	if (d->eal)
		twins_mend(&d->twins, say);
}

static void signals(struct daemon *d)
{
	struct signalfd_siginfo info;

	while (read(d->signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
		if (info.ssi_signo == SIGHUP)
			reload(d);
		else
			d->stop = true;
	}
}

static void wait_and_serve(struct daemon *d)
{
	struct epoll_event event[8];
	int n = epoll_wait(d->epoll_fd, event, 8, -1);

	for (int i = 0; i < n; i++)
		switch ((enum source)event[i].data.u32) {
		case SIGNALS:
			signals(d);
			break;
		case TICK:
			tick(d);
			break;
		case ROUTES:
			route_serve(d->route);
			break;
		case CLIENTS:
			socket_serve(d->socket);
			break;
		case ANNOUNCE:
			announce_tick(d);
			break;
		case PORT_CONTROL:
			if (d->port_control)
				pcp_serve(d->port_control);
			break;
		case RULES:
			rules_seen(d);
			break;
		case PEER:
			sync_serve(d->sync);
			break;
		}
}

/* ---- start and stop ---- */

static enum status fail(enum status status, const char *sentence)
{
	say(sentence);
	return status;
}

static enum status open_devices(struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	struct eal_options options = {.no_huge = d->options.no_huge || !eal_has_hugepages(),
				      .n_workers = d->n_workers};
	uint32_t n_dpdk = 0;
	char why[512];

	for (uint32_t i = 0; i < config->n_interfaces; i++)
		n_dpdk += config->interfaces[i].path == NAT_PATH_DPDK;
	if (!n_dpdk)
		return STOPPED;
	options.memory_mb = ports_memory_mb(config, d->n_workers);
	if (options.no_huge && !d->options.no_huge)
		say("no hugepages are free: plain pages are used, which costs speed (set vm.nr_hugepages)");
	if (guards_install(config, why, sizeof why) || eal_start(config, &options, why, sizeof why))
		return fail(NO_DEVICE, why);
	d->eal = true;
	if (ports_open(&d->ports, config, d->n_workers, why, sizeof why) ||
	    twins_open(&d->twins, &d->ports, d->n_workers, why, sizeof why))
		return fail(NO_DEVICE, why);
	return STOPPED;
}

/* The queue comes first, so that a second daemon by mistake does not touch the rules of the first; and nothing
 * is forwarded before the rules stand, because it is the worker that turns forwarding on. */
static enum status open_queue(struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	struct queue_params params = {.thread = &d->workers[0].thread,
				      .interfaces = d->interfaces,
				      .n_interfaces = config->n_interfaces,
				      .held_max = config->limits.fragments,
				      .send = d->eal ? worker_send : NULL,
				      .context = &d->workers[0]};
	char why[512];

	if (!nft_wanted(config))
		return STOPPED;
	if (!(d->queue = calloc(1, sizeof *d->queue)))
		return fail(NO_MEMORY, "no memory for the queue path");
	if (queue_open(d->queue, &params, why, sizeof why) || nft_install(config, why, sizeof why))
		return fail(NO_DEVICE, why);
	d->workers[0].queue = d->queue;
	return STOPPED;
}

/* How much all of it is, and what would fit instead. */
static enum status no_room(struct daemon *d, const char *why, uint64_t engine_bytes)
{
	const uint64_t max_sessions = d->plan->config->nat.max_sessions;
	const uint64_t wanted = nat_table_size(max_sessions) + engine_bytes * d->n_workers;
	const uint64_t had = d->sessions.base ? d->sessions.bytes : 0, there = memory_available() + had;

	fprintf(stderr,
		"dsnatd: engine.max_sessions: %llu needs %llu MB in all, %llu MB are free: about %llu would "
		"fit; "
		"lower it, or add memory or hugepages\n",
		(unsigned long long)max_sessions, (unsigned long long)(wanted >> 20),
		(unsigned long long)(there >> 20),
		(unsigned long long)((double)max_sessions * 0.9 * (double)there / (double)wanted / 1000) *
			1000);
	return fail(NO_MEMORY, why);
}

static struct nat_engine_params engine_params(struct daemon *d, uint32_t index, uint64_t seed)
{
	return (struct nat_engine_params){
		.table = d->table,
		.policy = d->plan->policy,
		.world = {.context = d->route, .route = route_lookup, .own_address = route_own_address},
		.max_sessions = crew_share(&d->plan->config->nat, d->plan->policy, index),
		.seed = seed + index,
		.now_ns = thread_clock_ns(),
		.worker = index,
		.n_workers = d->n_workers,
		.replicate = d->plan->config->sync.on,
		.clock_ns = thread_clock_ns,
		.workers = d->crew.workers,
	};
}

static enum status open_sessions(struct daemon *d, uint64_t seed)
{
	uint64_t max_sessions = d->plan->config->nat.max_sessions;
	size_t bytes = nat_table_size(max_sessions);
	char path[256] = "", why[512];
	const char *reason = NULL;
	bool adopted = false;

	if (d->options.sessions)
		snprintf(path, sizeof path, "%s", d->options.sessions);
	else if (!strcmp(d->options.socket, DEFAULT_SOCKET))
		memory_session_path(bytes, d->options.no_huge, path, sizeof path);
	if (memory_sessions(&d->sessions, path, bytes, why, sizeof why))
		return strstr(why, "cannot be had") ? no_room(d, why, max_sessions * 48) : fail(IN_USE, why);
	d->table = nat_table_init(d->sessions.base, d->sessions.bytes, max_sessions, seed, &adopted, &reason);
	if (!d->table) {
		fprintf(stderr, "dsnatd: the sessions in %s cannot be used: %s; starting with none\n", path,
			reason);
		memory_reset(&d->sessions);
		d->table = nat_table_init(d->sessions.base, d->sessions.bytes, max_sessions, seed, &adopted,
					  &reason);
	}
	if (!d->table)
		return fail(NO_MEMORY, reason);
	if (adopted)
		fprintf(stderr, "dsnatd: going on with the sessions in %s\n", path);
	return STOPPED;
}

static enum status open_worker(struct daemon *d, uint32_t index, uint64_t seed)
{
	struct worker *w = &d->workers[index];
	const struct nat_engine_params params = engine_params(d, index, seed);
	char why[256];

	if (thread_init(&w->thread, index, &d->generation, d->plan, d->route))
		return fail(FAILED, "no descriptors for a worker");
	w->thread.core = eal_core_of(index, d->n_workers);
	if (memory_plain(&d->engine_memory[index], nat_engine_size(&params), d->options.no_huge))
		return no_room(d, "no memory for an engine", nat_engine_size(&params));
	w->thread.engine = nat_engine_init(d->engine_memory[index].base, &params);
	if (!w->thread.engine)
		return fail(NO_MEMORY, "an engine cannot be set up; lower engine.max_sessions");
	nat_engine_log_to(w->thread.engine, export_ring(d->nat_log, index));
	if (!d->eal)
		return STOPPED;
	if (worker_open(w, d->workers, d->n_workers, &d->ports, &d->twins, why, sizeof why))
		return fail(NO_MEMORY, why);
	return STOPPED;
}

/* Before any device is touched: a second daemon by mistake must not disturb the first. */
static enum status open_socket(struct daemon *d, struct request_ops *ops)
{
	char why[512];

	if (!strcmp(d->options.socket, DEFAULT_SOCKET))
		(void)mkdir("/run/dsnatd", 0755);
	*ops = request_ops(d);
	d->ops = ops;
	d->socket = socket_open(d->options.socket, ops, why, sizeof why);
	return d->socket ? STOPPED : fail(IN_USE, why);
}

static enum status open_control(struct daemon *d)
{
	struct itimerspec tenth = {.it_interval.tv_nsec = 100000000, .it_value.tv_nsec = 100000000};

	d->tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (d->tick_fd < 0 || timerfd_settime(d->tick_fd, 0, &tenth, NULL) ||
	    !watch(d, d->signal_fd, SIGNALS) || !watch(d, d->tick_fd, TICK) ||
	    !watch(d, d->announce_fd, ANNOUNCE) || !watch(d, route_fd(d->route), ROUTES) ||
	    !watch(d, socket_fd(d->socket), CLIENTS))
		return fail(FAILED, "no descriptors for the control thread");
	if (!watch(d, nft_watch_open(&d->rules_watch), RULES))
		say("changes of its nftables rules by others will not be seen: the kernel does not tell of "
		    "them");
	return STOPPED;
}

static enum status open_sync(struct daemon *d)
{
	const struct config *config = d->plan->config;
	char why[512];

	if (!config->sync.on)
		return STOPPED;
	d->sync = sync_open(&config->sync, d->ops, config->nat.max_sessions, why, sizeof why);
	return d->sync && watch(d, sync_fd(d->sync), PEER) ? STOPPED : fail(FAILED, why);
}

static enum status start(struct daemon *d, struct request_ops *ops)
{
	const struct nat_config *config = &d->plan->config->nat;
	struct route_params routes = {.interfaces = d->interfaces,
				      .n_interfaces = config->n_interfaces,
				      .context = d,
				      .changed = route_changed,
				      .retire = route_retire};
	uint64_t seed;
	char why[256];
	enum status status;

	memcpy(d->interfaces, config->interfaces, config->n_interfaces * sizeof d->interfaces[0]);
	if (getrandom(&seed, sizeof seed, 0) != (ssize_t)sizeof seed)
		return fail(FAILED, "the kernel gives no random numbers");
	if ((status = open_socket(d, ops)) || (status = open_sessions(d, seed)) || (status = open_devices(d)))
		return status;
	if (!(d->route = route_open(&routes, why, sizeof why)))
		return fail(FAILED, why);
	(void)pools_follow(d, d->plan);
	if (!(d->nat_log = export_open(d->n_workers)) || !export_prepare(d->nat_log, d->plan->config))
		return fail(NO_MEMORY, "no memory for the NAT log");
	if (!crew_open(&d->crew, config, &d->ports, seed, d->options.no_huge))
		return fail(NO_MEMORY, "no memory for what workers share; lower engine.max_sessions");
	for (uint32_t w = 0; w < d->n_workers; w++)
		if ((status = open_worker(d, w, seed)))
			return status;
	if ((status = open_queue(d)) || (status = open_control(d)))
		return status;
	for (uint32_t i = 0; i < d->ports.n; i++)
		if (d->ports.port[i].up)
			twin_set_carrier(&d->twins.twin[i], true);
	if (d->eal && twins_start(&d->twins))
		return fail(FAILED, "no thread for the kernel twins");
	for (uint32_t w = 0; w < d->n_workers && d->eal; w++)
		if (rte_eal_remote_launch(worker_run, &d->workers[w], w + 1))
			return fail(FAILED, "a worker does not start");
	if (d->queue && !d->eal) {
		if (pthread_create(&d->queue_thread, NULL, queue_run, d->queue))
			return fail(FAILED, "a worker does not start");
		d->queue_runs = true;
	}
	if ((status = open_sync(d)))
		return status;
	standing_open(&d->standing, d->options.socket, !strcmp(d->options.socket, DEFAULT_SOCKET));
	d->translates = true;
	follow_standing(d);
	announce_again(d);
	follow_port_control(d);
	follow_logging(d);
	return STOPPED;
}

/* In the reverse order, from wherever start() came to. The session file, the twins and the guards stay. */
static void stop(struct daemon *d)
{
	sd_notify(0, "STOPPING=1");
	for (uint32_t w = 0; w < d->n_workers; w++) {
		atomic_store(&d->workers[w].thread.stop, true);
		if (d->workers[w].thread.engine)
			thread_wake(&d->workers[w].thread);
	}
	if (d->eal) {
		rte_eal_mp_wait_lcore();
		twins_stop(&d->twins);
		ports_close(&d->ports);
	}
	if (d->queue_runs)
		pthread_join(d->queue_thread, NULL);
	if (d->queue)
		queue_close(d->queue);
	free(d->queue);
	nft_watch_close(&d->rules_watch);
	for (uint32_t w = 0; w < d->n_workers; w++)
		atomic_store(&d->workers[w].thread.passed, UINT64_MAX);
	pcp_close(d->port_control);
	if (d->socket)
		socket_close(d->socket);
	if (d->ops)
		request_capture_close(d->ops->capture);
	route_close(d->route);
	d->generation = UINT64_MAX;
	free_retired(d);
	export_close(d->nat_log);
	sync_close(d->sync);
	for (uint32_t w = 0; w < d->n_workers; w++) {
		worker_close(&d->workers[w]);
		thread_close(&d->workers[w].thread);
		memory_release(&d->engine_memory[w]);
	}
	crew_close(&d->crew);
	memory_release(&d->sessions);
	plan_free(d->plan);
	if (d->eal)
		eal_stop();
	free(d->engine_memory);
	free(d->workers);
}

static enum status serve(struct daemon *d)
{
	struct request_ops ops;
	struct timespec wall;
	sigset_t mask;
	enum status status;

	/* before any other thread exists, so that none is interrupted */
	sigemptyset(&mask);
	sigaddset(&mask, SIGTERM);
	sigaddset(&mask, SIGINT);
	sigaddset(&mask, SIGHUP);
	pthread_sigmask(SIG_BLOCK, &mask, NULL);
	signal(SIGPIPE, SIG_IGN);
	d->signal_fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
	d->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	d->announce_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	d->generation = 1;
	d->started_ns = thread_clock_ns();
	d->started_tsc = rte_rdtsc();
	clock_gettime(CLOCK_REALTIME, &wall);
	d->started_s = (uint64_t)wall.tv_sec;
	d->n_workers = d->plan->config->nat.n_workers;
	d->workers = aligned_alloc(64, d->n_workers * ((sizeof *d->workers + 63) & ~(size_t)63));
	d->engine_memory = calloc(d->n_workers, sizeof *d->engine_memory);
	if (!d->workers || !d->engine_memory)
		return fail(NO_MEMORY, "no memory for the workers");
	memset(d->workers, 0, d->n_workers * sizeof *d->workers);
	for (uint32_t w = 0; w < d->n_workers; w++) {
		d->workers[w].interrupt_fd = d->workers[w].thread.wake_fd = d->engine_memory[w].fd = -1;
		d->rounds[w] = UINT64_MAX;
	}
	d->sessions.fd = -1;
	status = start(d, &ops);
	if (!status) {
		(void)sd_watchdog_enabled(0, &d->watchdog_us);
		sd_notify(0, "READY=1");
		say("ready");
		while (!d->stop)
			wait_and_serve(d);
		status = d->restart ? FAILED : STOPPED;
	}
	stop(d);
	return status;
}

/* ---- command line ---- */

static enum status check(const char *path, bool facts)
{
	struct config *config = config_load(path, 0);
	enum status status;

	if (!config)
		return fail(NO_MEMORY, "no memory to read the configuration");
	config_print(config, stderr);
	status = config->n_errors ? INVALID : STOPPED;
	if (facts && status == STOPPED)
		facts_print(config, stdout);
	config_free(config);
	return status;
}

static void version(bool json)
{
	if (json)
		printf("{\"program\":\"dsnatd\",\"version\":\"%s\",\"dpdk\":\"%s\"}\n", NAT_VERSION,
		       rte_version());
	else
		printf("dsnatd %s (%s)\n", NAT_VERSION, rte_version());
}

/* As a new process image: EAL cannot be undone. Comes back only when that fails. */
static void start_degraded(int argc, char **argv)
{
	char **again = calloc((size_t)argc + 2, sizeof *again);

	if (!again)
		return;
	memcpy(again, argv, (size_t)argc * sizeof *again);
	again[argc] = (char[]){"--degraded"};
	say("DEGRADED: going on without DPDK; the kernel keeps all ports, which is slower");
	execv("/proc/self/exe", again);
	free(again);
}

int main(int argc, char **argv)
{
	enum { CONFIG = 1, SOCKET, SESSIONS, NO_HUGE, DEGRADED, CHECK, FACTS, VERSION, JSON, HELP };
	static const struct option known[] = {
		{"config", required_argument, NULL, CONFIG},
		{"socket", required_argument, NULL, SOCKET},
		{"sessions", required_argument, NULL, SESSIONS},
		{"no-huge", no_argument, NULL, NO_HUGE},
		{"degraded", no_argument, NULL, DEGRADED},
		{"check", required_argument, NULL, CHECK},
		{"facts", required_argument, NULL, FACTS},
		{"version", no_argument, NULL, VERSION},
		{"json", no_argument, NULL, JSON},
		{"help", no_argument, NULL, HELP},
		{0},
	};
	struct daemon d = {.options = {.config = DEFAULT_CONFIG,
				       .socket = DEFAULT_SOCKET,
				       .no_huge = getenv("DSNATD_NO_HUGE") != NULL}};
	const char *to_check = NULL;
	char why[512];
	enum status status;
	bool may_degrade;
	bool want_version = false, json = false, facts = false;
	int option;
	struct config *config;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
		switch (option) {
		case CONFIG:
			d.options.config = optarg;
			break;
		case SOCKET:
			d.options.socket = optarg;
			break;
		case SESSIONS:
			d.options.sessions = optarg;
			break;
		case NO_HUGE:
			d.options.no_huge = true;
			break;
		case DEGRADED:
			d.options.degraded = true;
			break;
		case CHECK:
		case FACTS:
			to_check = optarg;
			facts = option == FACTS;
			break;
		case VERSION:
			want_version = true;
			break;
		case JSON:
			json = true;
			break;
		case HELP:
			fputs(usage, stdout);
			return STOPPED;
		default:
			fputs(usage, stderr);
			return INVALID;
		}
	if (optind != argc) {
		fprintf(stderr, "dsnatd: \"%s\" is not an option\n%s", argv[optind], usage);
		return INVALID;
	}
	if (want_version) {
		version(json);
		return STOPPED;
	}
	if (to_check)
		return check(to_check, facts);
	config = config_load(d.options.config, d.options.degraded ? CONFIG_DEGRADED : 0);
	if (!config)
		return fail(NO_MEMORY, "no memory to read the configuration");
	config_print(config, stderr);
	if (config->n_errors) {
		config_free(config);
		return INVALID;
	}
	d.path = d.options.config;
	if (!(d.plan = plan_new(config, NULL))) {
		config_free(config);
		return fail(NO_MEMORY, "no memory for the configuration");
	}
	if (d.options.degraded && degrade_interfaces(&config->nat, why, sizeof why))
		return fail(NO_DEVICE, why);
	may_degrade = config->nat.may_degrade && !d.options.degraded;
	status = serve(&d);
	if (status == NO_DEVICE && may_degrade)
		start_degraded(argc, argv);
	return status;
}
