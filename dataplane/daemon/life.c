/* Start, in the order in which one thing needs the other, and stop, in the reverse.
 */
#include <pthread.h>
#include <rte_cycles.h>
#include <rte_launch.h>
#include <rte_lcore.h>
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

#include "../io/dpdk/eal.h"
#include "../io/dpdk/guard.h"
#include "daemon.h"

enum status daemon_fail(enum status status, const char *sentence)
{
	daemon_say(sentence);
	return status;
}

static bool is_usual(const struct daemon *d)
{
	return !strcmp(d->options.socket, DEFAULT_SOCKET);
}

static enum status open_devices(struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	struct eal_options options = {.no_huge = d->options.no_huge || !eal_has_hugepages(),
				      .n_workers = d->n_workers};
	uint32_t n_dpdk = 0, n_pci = 0;
	char why[512];

	for (uint32_t i = 0; i < config->n_interfaces; i++) {
		n_dpdk += config->interfaces[i].path == NAT_PATH_DPDK;
		n_pci += eal_is_pci(config->interfaces[i].device);
	}
	if (!n_dpdk)
		return STOPPED;
	if (d->is_heir && (n_pci || nft_wanted(config)))
		daemon_outwait_predecessor(d);
	options.memory_mb = ports_memory_mb(config, d->n_workers);
	if (options.no_huge && !d->options.no_huge)
		daemon_say("no hugepages are free: plain pages are used, which costs speed (set "
			   "vm.nr_hugepages)");
	/* an heir finds the guards in place; they are looked at as soon as packets go */
	d->rules_changed = d->is_heir;
	if (d->is_heir
		    ? eal_add_devices(config, d->n_workers, why, sizeof why)
		    : guards_install(config, why, sizeof why) || eal_start(config, &options, why, sizeof why))
		return daemon_fail(NO_DEVICE, why);
	d->eal = true;
	d->moment_ns[START_DPDK] = thread_clock_ns();
	if (ports_open(&d->ports, config, d->n_workers, why, sizeof why) ||
	    twins_open(&d->twins, &d->ports, d->n_workers, d->is_heir, why, sizeof why))
		return daemon_fail(NO_DEVICE, why);
	return STOPPED;
}

/* The queues come first, so that a second daemon by mistake does not touch the rules of the first; and
 * nothing is forwarded before the rules stand, because it is the worker that turns forwarding on. */
static enum status open_queues(struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	char why[512];

	if (!nft_wanted(config))
		return STOPPED;
	if (!(d->queues = calloc(d->n_workers, sizeof *d->queues)))
		return daemon_fail(NO_MEMORY, "no memory for the queue path");
	for (uint32_t w = 0; w < d->n_workers; w++) {
		struct queue_params params = {.thread = &d->workers[w].thread,
					      .peers = d->queues,
					      .n_peers = d->n_workers,
					      .interfaces = d->interfaces,
					      .n_interfaces = config->n_interfaces,
					      .held_max = config->limits.fragments,
					      .send = d->eal ? worker_send : NULL,
					      .context = &d->workers[w]};

		d->n_queues++;
		if (queue_open(&d->queues[w], &params, why, sizeof why))
			return daemon_fail(NO_DEVICE, why);
		d->workers[w].queue = &d->queues[w];
		if (!d->eal)
			d->workers[w].inbox = d->queues[w].inbox;
	}
	return nft_install(config, why, sizeof why) ? daemon_fail(NO_DEVICE, why) : STOPPED;
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
	return daemon_fail(NO_MEMORY, why);
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

/* The sessions of a table that was made for another max_sessions stay. */
static void resize(struct daemon *d, const char *path)
{
	const uint64_t max_sessions = d->plan->config->nat.max_sessions;
	struct nat_resized done;

	if (!nat_table_resize(d->sessions.base, d->sessions.bytes, max_sessions, &done))
		return;
	if (done.before != nat_table_records_for(max_sessions))
		fprintf(stderr,
			"dsnatd: engine.max_sessions is %llu now, the table %s had room for %llu: %llu "
			"sessions and mappings "
			"of it go on\n",
			(unsigned long long)max_sessions, path, (unsigned long long)done.before,
			(unsigned long long)(done.live - done.ended));
	if (done.ended)
		fprintf(stderr,
			"dsnatd: LOST: %llu of %llu sessions have no room in engine.max_sessions: %llu; what "
			"is over soonest ended first. Raise it\n",
			(unsigned long long)done.ended, (unsigned long long)done.live,
			(unsigned long long)max_sessions);
}

size_t daemon_engine_bytes(struct daemon *d, uint32_t worker)
{
	const struct nat_engine_params params = engine_params(d, worker, 0);

	return nat_engine_size(&params);
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
	if (!d->is_heir && memory_sessions(&d->sessions, path, bytes, why, sizeof why))
		return strstr(why, "cannot be had") ? no_room(d, why, max_sessions * 48)
						    : daemon_fail(IN_USE, why);
	resize(d, path);
	d->table = nat_table_init(d->sessions.base, d->sessions.bytes, max_sessions, seed, &adopted, &reason);
	if (!d->table) {
		fprintf(stderr, "dsnatd: the sessions in %s cannot be used: %s; starting with none\n", path,
			reason);
		memory_reset(&d->sessions);
		d->table = nat_table_init(d->sessions.base, d->sessions.bytes, max_sessions, seed, &adopted,
					  &reason);
	}
	if (!d->table)
		return daemon_fail(NO_MEMORY, reason);
	memory_trim(&d->sessions, bytes);
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
		return daemon_fail(FAILED, "no descriptors for a worker");
	w->thread.core = eal_core_of(index, d->n_workers);
	if (!d->engine_memory[index].base &&
	    memory_plain(&d->engine_memory[index], nat_engine_size(&params), d->options.no_huge))
		return no_room(d, "no memory for an engine", nat_engine_size(&params));
	w->thread.engine = nat_engine_init(d->engine_memory[index].base, &params);
	if (!w->thread.engine)
		return daemon_fail(NO_MEMORY, "an engine cannot be set up; lower engine.max_sessions");
	if (nat_engine_not_adopted(w->thread.engine))
		fprintf(stderr,
			"dsnatd: LOST: worker %u found no room for %llu sessions of the table, or they were "
			"damaged; is engine.max_sessions large enough?\n",
			index, (unsigned long long)nat_engine_not_adopted(w->thread.engine));
	nat_engine_log_to(w->thread.engine, export_ring(d->nat_log, index));
	if (!d->eal)
		return STOPPED;
	if (worker_open(w, d->workers, d->n_workers, &d->ports, &d->twins, why, sizeof why))
		return daemon_fail(NO_MEMORY, why);
	return STOPPED;
}

/* Before any device is touched: a second daemon by mistake must not disturb the first. */
static enum status open_socket(struct daemon *d, struct request_ops *ops)
{
	char why[512];

	if (!strcmp(d->options.socket, DEFAULT_SOCKET))
		(void)mkdir("/run/dsnatd", 0755);
	*ops = daemon_request_ops(d);
	d->ops = ops;
	d->socket = socket_open(d->options.socket, d->listener, ops, why, sizeof why);
	return d->socket ? STOPPED : daemon_fail(IN_USE, why);
}

static enum status open_control(struct daemon *d)
{
	struct itimerspec tenth = {.it_interval.tv_nsec = 100000000, .it_value.tv_nsec = 100000000};

	d->tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (d->tick_fd < 0 || timerfd_settime(d->tick_fd, 0, &tenth, NULL) ||
	    !daemon_watch(d, d->signal_fd, SIGNALS) || !daemon_watch(d, d->tick_fd, TICK) ||
	    !daemon_watch(d, d->announce_fd, ANNOUNCE) || !daemon_watch(d, route_fd(d->route), ROUTES) ||
	    !daemon_watch(d, socket_fd(d->socket), CLIENTS))
		return daemon_fail(FAILED, "no descriptors for the control thread");
	if (!daemon_watch(d, nft_watch_open(&d->rules_watch), RULES))
		daemon_say("changes of its nftables rules by others will not be seen: the kernel does not "
			   "tell of "
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
	return d->sync && daemon_watch(d, sync_fd(d->sync), PEER) ? STOPPED : daemon_fail(FAILED, why);
}

static enum status start(struct daemon *d, struct request_ops *ops)
{
	const struct nat_config *config = &d->plan->config->nat;
	struct route_params routes = {.interfaces = d->interfaces,
				      .n_interfaces = config->n_interfaces,
				      .context = d,
				      .changed = daemon_route_changed,
				      .retire = daemon_route_retire};
	uint64_t seed;
	char why[256];
	enum status status;

	memcpy(d->interfaces, config->interfaces, config->n_interfaces * sizeof d->interfaces[0]);
	if (getrandom(&seed, sizeof seed, 0) != (ssize_t)sizeof seed)
		return daemon_fail(FAILED, "the kernel gives no random numbers");
	if ((status = open_socket(d, ops)) || (status = open_sessions(d, seed)))
		return status;
	d->moment_ns[START_SESSIONS] = d->moment_ns[START_DPDK] = thread_clock_ns();
	if ((status = open_devices(d)))
		return status;
	d->moment_ns[START_PORTS] = thread_clock_ns();
	tenure_open(&d->tenure, d->options.socket, is_usual(d));
	if (!(d->route = route_open(&routes, why, sizeof why)))
		return daemon_fail(FAILED, why);
	(void)daemon_pools_follow(d, d->plan);
	if (!(d->nat_log = export_open(d->n_workers)) || !export_prepare(d->nat_log, d->plan->config))
		return daemon_fail(NO_MEMORY, "no memory for the NAT log");
	if (!crew_open(&d->crew, config, &d->ports, seed, d->options.no_huge))
		return daemon_fail(NO_MEMORY, "no memory for what workers share; lower engine.max_sessions");
	for (uint32_t w = 0; w < d->n_workers; w++)
		if ((status = open_worker(d, w, seed)))
			return status;
	d->moment_ns[START_ENGINES] = thread_clock_ns();
	if ((status = open_queues(d)) || (status = open_control(d)))
		return status;
	for (uint32_t i = 0; i < d->ports.n; i++)
		if (d->ports.port[i].up)
			twin_set_carrier(&d->twins.twin[i], true);
	if (d->eal && twins_start(&d->twins))
		return daemon_fail(FAILED, "no thread for the kernel twins");
	if (d->eal && !daemon_make_will(d))
		return daemon_fail(NO_MEMORY, "no memory to share with a second process");
	for (uint32_t w = 0; w < d->n_workers && d->eal; w++) {
		d->workers[w].will = d->spare.will;
		if (rte_eal_remote_launch(daemon_run_worker, &d->workers[w], w + 1))
			return daemon_fail(FAILED, "a worker does not start");
	}
	for (; !d->eal && d->n_queue_threads < d->n_queues; d->n_queue_threads++)
		if (pthread_create(&d->queue_thread[d->n_queue_threads], NULL, queue_run,
				   &d->queues[d->n_queue_threads]))
			return daemon_fail(FAILED, "a worker does not start");
	d->moment_ns[START_FORWARDING] = thread_clock_ns();
	daemon_outwait_predecessor(d);
	if ((status = open_sync(d)))
		return status;
	standing_open(&d->standing, d->options.socket, is_usual(d));
	d->translates = true;
	tenure_begins(&d->tenure, thread_clock_ns());
	daemon_follow_offer(d);
	daemon_follow_standing(d);
	daemon_announce_again(d);
	daemon_follow_port_control(d);
	daemon_follow_logging(d);
	return STOPPED;
}

/* In the reverse order, from wherever start() came to. The session file, the twins and the guards stay. */
static void stop(struct daemon *d)
{
	sd_notify(0, "STOPPING=1");
	daemon_end_spare(d);
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
	daemon_drop_will(d);
	for (uint32_t w = 0; w < d->n_queue_threads; w++)
		pthread_join(d->queue_thread[w], NULL);
	for (uint32_t w = 0; w < d->n_queues; w++)
		queue_close(&d->queues[w]);
	free(d->queues);
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
	daemon_free_retired(d);
	export_close(d->nat_log);
	sync_close(d->sync);
	for (uint32_t w = 0; w < d->n_workers; w++) {
		worker_close(&d->workers[w]);
		thread_close(&d->workers[w].thread);
		memory_release(&d->engine_memory[w]);
	}
	crew_close(&d->crew);
	memory_release(&d->sessions);
	daemon_plan_free(d->plan);
	if (d->eal)
		eal_stop();
	free(d->engine_memory);
	free(d->workers);
}

/* How long a hot restart is dark is seen here: all of this, and what the kernel needs to end the process
 * before. */
static void say_ready(const struct daemon *d)
{
	const uint64_t *at = d->moment_ns, now_ns = thread_clock_ns();
	const double ms = 1e6;

	fprintf(stderr,
		"dsnatd: ready after %.0f ms: sessions %.0f, DPDK itself %.0f, ports %.0f, engines %.0f, "
		"forwarding %.0f, the rest %.0f\n",
		(double)(now_ns - d->started_ns) / ms, (double)(at[START_SESSIONS] - d->started_ns) / ms,
		(double)(at[START_DPDK] - at[START_SESSIONS]) / ms,
		(double)(at[START_PORTS] - at[START_DPDK]) / ms,
		(double)(at[START_ENGINES] - at[START_PORTS]) / ms,
		(double)(at[START_FORWARDING] - at[START_ENGINES]) / ms,
		(double)(now_ns - at[START_FORWARDING]) / ms);
}

enum status daemon_serve(struct daemon *d)
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
		return daemon_fail(NO_MEMORY, "no memory for the workers");
	memset(d->workers, 0, d->n_workers * sizeof *d->workers);
	for (uint32_t w = 0; w < d->n_workers; w++) {
		d->workers[w].interrupt_fd = d->workers[w].thread.wake_fd = d->engine_memory[w].fd = -1;
		d->rounds[w] = UINT64_MAX;
	}
	d->sessions.fd = -1;
	if (d->options.spare_of && ((status = daemon_wait_as_spare(d)) || !d->is_heir))
		return status;
	status = start(d, &ops);
	if (!status) {
		if (d->is_heir && getenv("WATCHDOG_PID")) { /* it was the predecessor's duty */
			char own[16];

			snprintf(own, sizeof own, "%d", getpid());
			setenv("WATCHDOG_PID", own, 1);
		}
		(void)sd_watchdog_enabled(0, &d->watchdog_us);
		sd_notifyf(0, "MAINPID=%d\nREADY=1", getpid());
		say_ready(d);
		while (!d->stop)
			daemon_wait_and_serve(d);
		status = d->restart ? FAILED : STOPPED;
	}
	stop(d);
	return status;
}
