/* The log thread. Every 5 ms it empties the workers' rings, makes messages of what each collector wants to
 * hear, and lets the collectors send. It shares a mutex with the control thread and nothing at all with
 * the workers, who write into their rings whether it runs or not: an event that finds its ring full is
 * counted there and lost.
 *
 *	worker 0 ──ring──┐                  ┌─ wants? ─ IPFIX ── queue ── socket
 *	worker 1 ──ring──┼── export thread ─┤
 *	worker n ──ring──┘                  └─ wants? ─ syslog ─ queue ── socket
 *
 * A pool is known by its stable id, also when a reload has removed it and its sessions still end: a
 * collector keeps what it wanted of a pool that is gone.
 */
#include "export.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "syslog.h"

#define RING_EVENTS   131072u /* 4 MiB: 0.6 s of 100,000 new sessions a second, which end as fast */
#define STEP_EVENTS   512u
#define STEPS         256u /* of one worker before the next has its turn */
#define ROUND_MS      5
#define TEMPLATES_NS  UINT64_C(10000000000)
#define TELL_NS       UINT64_C(60000000000)
#define LAST_WORDS_NS UINT64_C(1000000000)
#define POOL_IDS      4096u
#define MEGABYTE      (1u << 20)

/* ---- what is known of pools ---- */

struct pool_fact {
	char name[NAT_NAME_MAX];
	uint32_t ports_per_host; /* in blocks */
};

struct facts {
	struct pool_fact pool[POOL_IDS];
	uint32_t sessions_per_host;
	uint32_t max_sessions;
	uint64_t clock_offset_ns;
};

static void learn(struct facts *facts, const struct config *config, const struct nat_policy *policy)
{
	facts->sessions_per_host = config->nat.limits.sessions_per_host;
	facts->max_sessions = (uint32_t)config->nat.max_sessions;
	for (uint32_t i = 0; i < config->nat.n_pools; i++) {
		const uint16_t id = nat_policy_pool_id(policy, i);
		const struct nat_pool_config *pool = &config->nat.pools[i];

		if (id >= POOL_IDS)
			continue;
		memcpy(facts->pool[id].name, pool->name, NAT_NAME_MAX);
		facts->pool[id].ports_per_host = (uint32_t)pool->block_ports * pool->blocks_per_host;
	}
}

static struct log_facts facts_of(const struct facts *facts, const struct nat_event *event)
{
	const struct pool_fact *pool = event->pool_id < POOL_IDS ? &facts->pool[event->pool_id] : NULL;
	struct log_facts f = {.clock_offset_ns = facts->clock_offset_ns,
			      .pool = pool && pool->name[0] ? pool->name : NULL};

	if (event->reason == NAT_REASON_TABLE_FULL)
		f.limit = facts->max_sessions;
	else if (event->reason == NAT_REASON_HOST_SESSIONS)
		f.limit = facts->sessions_per_host;
	else if (event->reason == NAT_REASON_HOST_PORTS && pool)
		f.limit = pool->ports_per_host;
	return f;
}

/* ---- one collector's messages ---- */

struct writer {
	struct config_collector spec; /* `pools` is not kept */
	bool wants[POOL_IDS];
	bool wants_all;
	struct ipfix ipfix;
	struct syslog syslog;
};

static void writer_init(struct writer *w, const struct config_collector *spec,
			void (*emit)(void *context, const struct log_message *message), void *context)
{
	const bool tcp = spec->transport == CONFIG_LOG_TCP;

	w->spec = *spec;
	w->spec.pools = NULL;
	w->ipfix.emit = w->syslog.emit = emit;
	w->ipfix.context = w->syslog.context = context;
	w->ipfix.message_bytes = tcp ? IPFIX_MESSAGE_MAX : IPFIX_DATAGRAM_MAX;
	w->syslog.octet_count = tcp;
	strcpy(w->syslog.host, "-");
}

static void writer_follow(struct writer *w, const struct config_collector *spec, const struct config *config,
			  const struct nat_policy *policy)
{
	w->spec.destinations = w->ipfix.destinations = w->syslog.destinations = spec->destinations;
	w->wants_all = !spec->pools;
	for (uint32_t i = 0; spec->pools && i < config->nat.n_pools; i++) {
		const uint16_t id = nat_policy_pool_id(policy, i);

		if (id < POOL_IDS)
			w->wants[id] = spec->pools[i];
	}
}

static bool same(const struct config_collector *a, const struct config_collector *b)
{
	return a->protocol == b->protocol && a->transport == b->transport && a->address == b->address &&
	       a->port == b->port;
}

static bool wanted(const struct writer *w, const struct nat_event *event)
{
	if (event->implied && !w->spec.destinations)
		return false; /* its public port has been told */
	return w->wants_all || event->pool_id >= POOL_IDS || w->wants[event->pool_id];
}

static void write_event(struct writer *w, uint32_t worker, const struct nat_event *event,
			const struct log_facts *facts)
{
	if (!wanted(w, event))
		return;
	if (w->spec.protocol == CONFIG_LOG_IPFIX)
		ipfix_event(&w->ipfix, worker, event, facts);
	else
		syslog_event(&w->syslog, worker, event, facts);
}

/* ---- the thread ---- */

struct target {
	struct writer writer;
	struct collector *collector;
	uint64_t templates_ns[NAT_WORKERS_MAX]; /* when they were last sent over UDP */
	/* what the operator has been told */
	bool told_up;
	uint64_t told_lost, told_ns, told_state_ns;
};

struct export
{
	uint32_t n_workers;
	struct nat_event_ring *ring[NAT_WORKERS_MAX];
	pthread_t thread;
	bool runs;
	int wake_fd;
	_Atomic bool stop;
	uint64_t told_lost, told_ns; /* of the rings */
	pthread_mutex_t lock;        /* for what is below, and the collectors' */
	struct facts facts;
	struct target *target[CONFIG_COLLECTORS_MAX];
	uint32_t n_targets;
};

static uint64_t clock_of(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static void queue_message(void *context, const struct log_message *message)
{
	collector_put(((struct target *)context)->collector, message);
}

static uint32_t say_hello(void *context, uint32_t worker, uint32_t sequence, uint8_t out[IPFIX_TEMPLATES_MAX])
{
	const struct target *t = context;

	return ipfix_templates(worker, sequence == UINT32_MAX ? t->writer.ipfix.sequence[worker] : sequence,
			       clock_of(CLOCK_REALTIME), out);
}

/* RFC 7011 8.4: over UDP a collector that has just started must not wait for long. */
static void repeat_templates(struct target *t, uint32_t worker, uint64_t now_ns)
{
	uint8_t out[IPFIX_TEMPLATES_MAX];
	struct log_message message = {.bytes = out, .domain = ipfix_domain(worker)};

	if (t->writer.spec.protocol != CONFIG_LOG_IPFIX || t->writer.spec.transport != CONFIG_LOG_UDP ||
	    (t->templates_ns[worker] && now_ns - t->templates_ns[worker] < TEMPLATES_NS))
		return;
	t->templates_ns[worker] = now_ns;
	message.sequence = t->writer.ipfix.sequence[worker];
	message.n_bytes = say_hello(t, worker, UINT32_MAX, out);
	collector_put(t->collector, &message);
}

/* True: the ring was not empty at the end. */
static bool drain(struct export *x, uint32_t worker, uint64_t now_ns)
{
	struct nat_event event[STEP_EVENTS];
	uint32_t n = 0;

	for (uint32_t step = 0; step < STEPS; step++) {
		n = nat_event_ring_take(x->ring[worker], event, STEP_EVENTS);
		for (uint32_t k = 0; k < x->n_targets && n > 0; k++) {
			repeat_templates(x->target[k], worker, now_ns);
			for (uint32_t i = 0; i < n; i++) {
				const struct log_facts facts = facts_of(&x->facts, &event[i]);
				write_event(&x->target[k]->writer, worker, &event[i], &facts);
			}
		}
		if (n < STEP_EVENTS)
			break;
	}
	for (uint32_t k = 0; k < x->n_targets; k++)
		ipfix_flush(&x->target[k]->writer.ipfix);
	return n == STEP_EVENTS;
}

static bool run_once(struct export *x)
{
	const uint64_t now_ns = clock_of(CLOCK_MONOTONIC);
	bool more = false;

	pthread_mutex_lock(&x->lock);
	x->facts.clock_offset_ns = clock_of(CLOCK_REALTIME) - now_ns;
	for (uint32_t worker = 0; worker < x->n_workers; worker++)
		more |= drain(x, worker, now_ns);
	for (uint32_t k = 0; k < x->n_targets; k++)
		collector_run(x->target[k]->collector, now_ns);
	pthread_mutex_unlock(&x->lock);
	return more;
}

static void *run(void *argument)
{
	struct export *x = argument;
	struct pollfd woken = {.fd = x->wake_fd, .events = POLLIN};

	while (!x->stop)
		if (!run_once(x))
			poll(&woken, 1, ROUND_MS);
	return NULL;
}

/* ---- rings and targets ---- */

struct export *export_open(uint32_t n_workers)
{
	struct export *x = calloc(1, sizeof(*x));

	if (!x)
		return NULL;
	x->n_workers = n_workers;
	x->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_init(&x->lock, NULL);
	return x;
}

static bool make_rings(struct export *x)
{
	for (uint32_t worker = 0; worker < x->n_workers; worker++) {
		const size_t bytes = (nat_event_ring_size(RING_EVENTS) + 63) & ~(size_t)63;
		void *memory;

		if (x->ring[worker])
			continue;
		memory = aligned_alloc(64, bytes);
		if (!memory)
			return false;
		memset(memory, 0, bytes); /* here, so that no worker waits for a page */
		x->ring[worker] = nat_event_ring_init(memory, RING_EVENTS);
	}
	return true;
}

bool export_prepare(struct export *x, const struct config *config)
{
	return config->n_collectors == 0 || make_rings(x);
}

struct nat_event_ring *export_ring(struct export *x, uint32_t worker)
{
	return x->ring[worker];
}

static void attach(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	(void)now_ns;
	nat_engine_log_to(e, argument);
}

static void target_free(struct target *t)
{
	if (!t)
		return;
	collector_close(t->collector);
	free(t);
}

static struct target *target_new(const struct export *x, const struct config_collector *spec)
{
	const bool ipfix = spec->protocol == CONFIG_LOG_IPFIX;
	struct target *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	const struct collector_params params = {.transport = spec->transport,
						.address = spec->address,
						.port = spec->port,
						.queue_bytes = COLLECTOR_QUEUE_BYTES,
						.n_workers = x->n_workers,
						.hello = ipfix ? say_hello : NULL,
						.context = t};
	writer_init(&t->writer, spec, queue_message, t);
	if (gethostname(t->writer.syslog.host, sizeof(t->writer.syslog.host) - 1) ||
	    !t->writer.syslog.host[0])
		strcpy(t->writer.syslog.host, "-");
	t->told_up = true;
	t->collector = collector_open(&params);
	if (t->collector)
		return t;
	free(t);
	return NULL;
}

/* The targets of the new configuration: those that stay keep queue, connection and numbers. */
static bool make_targets(struct export *x, const struct config *config, struct target **next)
{
	for (uint32_t i = 0; i < config->n_collectors; i++) {
		for (uint32_t k = 0; k < x->n_targets; k++)
			if (same(&x->target[k]->writer.spec, &config->collectors[i]))
				next[i] = x->target[k];
		if (!next[i] && !(next[i] = target_new(x, &config->collectors[i])))
			return false;
	}
	return true;
}

static bool is_in(const struct target *t, struct target *const *list, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (list[i] == t)
			return true;
	return false;
}

static bool start_thread(struct export *x)
{
	if (x->runs)
		return true;
	x->runs = !pthread_create(&x->thread, NULL, run, x);
	if (x->runs)
		pthread_setname_np(x->thread, "dsnat-log");
	return x->runs;
}

bool export_follow(struct export *x, const struct request_ops *ops, char *why, size_t why_bytes)
{
	const struct config *config = ops->config(ops->context);
	const struct nat_policy *policy = ops->policy(ops->context);
	struct target *next[CONFIG_COLLECTORS_MAX] = {0}, *gone[CONFIG_COLLECTORS_MAX];
	uint32_t n_gone = 0;

	if (config->n_collectors == 0 && x->n_targets == 0)
		return true;
	if (!make_rings(x) || !make_targets(x, config, next)) {
		for (uint32_t i = 0; i < config->n_collectors; i++)
			if (!is_in(next[i], x->target, x->n_targets))
				target_free(next[i]);
		snprintf(why, why_bytes, "no memory for the collectors under logging; free some and reload");
		return false;
	}
	/* On the workers' threads, which have the new policy then, and so its pools their stable ids. */
	for (uint32_t worker = 0; worker < x->n_workers; worker++)
		if (!ops->on_worker(ops->context, worker, attach,
				    config->n_collectors ? x->ring[worker] : NULL))
			fprintf(stderr, "dsnatd: worker %u does not answer; its log stays as it was\n",
				worker);
	pthread_mutex_lock(&x->lock);
	learn(&x->facts, config, policy);
	for (uint32_t k = 0; k < x->n_targets; k++)
		if (!is_in(x->target[k], next, config->n_collectors))
			gone[n_gone++] = x->target[k];
	for (uint32_t i = 0; i < config->n_collectors; i++) {
		writer_follow(&next[i]->writer, &config->collectors[i], config, policy);
		x->target[i] = next[i];
	}
	x->n_targets = config->n_collectors;
	pthread_mutex_unlock(&x->lock);
	while (n_gone > 0)
		target_free(gone[--n_gone]);
	if (x->n_targets && !start_thread(x)) {
		snprintf(why, why_bytes, "no thread for the collectors under logging: %s", strerror(errno));
		return false;
	}
	return true;
}

/* What is left goes out for as long as that is quick. */
static void last_words(struct export *x)
{
	const uint64_t end_ns = clock_of(CLOCK_MONOTONIC) + LAST_WORDS_NS;
	bool idle = false;

	while (!idle && clock_of(CLOCK_MONOTONIC) < end_ns) {
		idle = !run_once(x);
		for (uint32_t k = 0; k < x->n_targets; k++)
			idle &= collector_is_idle(x->target[k]->collector);
		if (!idle)
			poll(NULL, 0, 1);
	}
}

void export_close(struct export *x)
{
	if (!x)
		return;
	if (x->runs) {
		x->stop = true;
		(void)!write(x->wake_fd, &(uint64_t){1}, sizeof(uint64_t));
		pthread_join(x->thread, NULL);
		last_words(x);
	}
	for (uint32_t k = 0; k < x->n_targets; k++)
		target_free(x->target[k]);
	for (uint32_t worker = 0; worker < x->n_workers; worker++)
		free(x->ring[worker]);
	if (x->wake_fd >= 0)
		close(x->wake_fd);
	pthread_mutex_destroy(&x->lock);
	free(x);
}

/* ---- what is told and shown ---- */

static void name_of(const struct config_collector *spec, char *out, size_t n)
{
	const uint32_t a = spec->address;

	snprintf(out, n, "%u.%u.%u.%u:%u", a >> 24, a >> 16 & 255, a >> 8 & 255, a & 255, spec->port);
}

bool export_collector(struct export *x, uint32_t i, struct request_collector *view)
{
	bool there;

	if (!x)
		return false;
	pthread_mutex_lock(&x->lock);
	there = i < x->n_targets;
	if (there) {
		const struct target *t = x->target[i];

		name_of(&t->writer.spec, view->collector, sizeof(view->collector));
		view->protocol = config_log_protocol_word(t->writer.spec.protocol);
		view->transport = config_log_transport_word(t->writer.spec.transport);
		collector_view(t->collector, &view->state);
	}
	pthread_mutex_unlock(&x->lock);
	return there;
}

bool export_events(struct export *x, uint32_t worker, struct nat_event_counts *counts)
{
	if (!x || worker >= x->n_workers || !x->ring[worker])
		return false;
	nat_event_ring_counts(x->ring[worker], counts);
	return true;
}

static void tell_target(struct target *t, uint64_t now_ns, void (*say)(void *context, const char *line),
			void *context)
{
	struct collector_view view;
	char name[32], line[256];

	collector_view(t->collector, &view);
	name_of(&t->writer.spec, name, sizeof(name));
	if (view.up != t->told_up && (view.up || view.why[0]) &&
	    (!t->told_state_ns || now_ns - t->told_state_ns > TELL_NS / 6)) {
		if (view.up)
			snprintf(line, sizeof(line), "collector %s is there again", name);
		else
			snprintf(line, sizeof(line),
				 "collector %s cannot be reached: %s; up to %u MiB of log wait for it", name,
				 view.why, COLLECTOR_QUEUE_BYTES / MEGABYTE);
		t->told_up = view.up;
		t->told_state_ns = now_ns;
		say(context, line);
	}
	const uint64_t lost = view.records_lost + view.records_refused;
	if (lost == t->told_lost || (t->told_ns && now_ns - t->told_ns < TELL_NS))
		return;
	snprintf(line, sizeof(line), "collector %s has missed %" PRIu64 " records of the NAT log", name,
		 lost - t->told_lost);
	t->told_lost = lost;
	t->told_ns = now_ns;
	say(context, line);
}

void export_tell(struct export *x, void (*say)(void *context, const char *line), void *context)
{
	const uint64_t now_ns = clock_of(CLOCK_MONOTONIC);
	uint64_t lost = 0;
	char line[160];

	if (!x || !x->runs)
		return;
	pthread_mutex_lock(&x->lock);
	for (uint32_t k = 0; k < x->n_targets; k++)
		tell_target(x->target[k], now_ns, say, context);
	pthread_mutex_unlock(&x->lock);
	for (uint32_t worker = 0; worker < x->n_workers; worker++) {
		struct nat_event_counts counts;

		nat_event_ring_counts(x->ring[worker], &counts);
		for (uint32_t kind = 0; kind < NAT_EVENT_KINDS; kind++)
			lost += counts.lost[kind];
	}
	if (lost == x->told_lost || (x->told_ns && now_ns - x->told_ns < TELL_NS))
		return;
	snprintf(line, sizeof(line),
		 "%" PRIu64 " events of the NAT log were lost: the log thread was too slow; give it a core",
		 lost - x->told_lost);
	x->told_lost = lost;
	x->told_ns = now_ns;
	say(context, line);
}

/* ---- into a file ---- */

struct export_file {
	FILE *to;
	struct writer writer;
	struct facts facts;
	uint32_t n_workers;
	bool failed;
	struct nat_event_ring *ring[NAT_WORKERS_MAX];
};

static void write_message(void *context, const struct log_message *message)
{
	struct export_file *f = context;

	f->failed |= fwrite(message->bytes, 1, message->n_bytes, f->to) != message->n_bytes;
	if (f->writer.spec.protocol == CONFIG_LOG_SYSLOG)
		f->failed |= fputc('\n', f->to) == EOF;
}

struct export_file *export_file_open(const struct config *config, uint32_t n_workers, FILE *to)
{
	struct export_file *f = config->n_collectors ? calloc(1, sizeof(*f)) : NULL;
	uint8_t templates[IPFIX_TEMPLATES_MAX];

	if (!f)
		return NULL;
	f->to = to;
	f->n_workers = n_workers;
	writer_init(&f->writer, &config->collectors[0], write_message, f);
	f->writer.syslog.octet_count = false; /* lines */
	for (uint32_t worker = 0; worker < n_workers; worker++) {
		void *memory = aligned_alloc(64, (nat_event_ring_size(RING_EVENTS) + 63) & ~(size_t)63);

		if (!memory) {
			export_file_close(f);
			return NULL;
		}
		f->ring[worker] = nat_event_ring_init(memory, RING_EVENTS);
		const uint32_t n_bytes = ipfix_templates(worker, 0, 0, templates);
		if (f->writer.spec.protocol == CONFIG_LOG_IPFIX)
			f->failed |= fwrite(templates, 1, n_bytes, to) != n_bytes;
	}
	return f;
}

struct nat_event_ring *export_file_ring(struct export_file *f, uint32_t worker)
{
	return f->ring[worker];
}

void export_file_run(struct export_file *f, const struct config *config, const struct nat_policy *policy)
{
	struct nat_event event;

	learn(&f->facts, config, policy);
	if (config->n_collectors)
		writer_follow(&f->writer, &config->collectors[0], config, policy);
	for (uint32_t worker = 0; worker < f->n_workers; worker++)
		while (nat_event_ring_take(f->ring[worker], &event, 1)) {
			const struct log_facts facts = facts_of(&f->facts, &event);
			write_event(&f->writer, worker, &event, &facts);
		}
}

bool export_file_close(struct export_file *f)
{
	bool good = true;

	for (uint32_t worker = 0; worker < f->n_workers; worker++) {
		struct nat_event_counts counts = {0};

		if (f->ring[worker])
			nat_event_ring_counts(f->ring[worker], &counts);
		for (uint32_t kind = 0; kind < NAT_EVENT_KINDS; kind++)
			good &= counts.lost[kind] == 0;
		free(f->ring[worker]);
	}
	ipfix_flush(&f->writer.ipfix);
	good &= !f->failed && !fflush(f->to);
	free(f);
	return good;
}
