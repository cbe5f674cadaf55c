/* Engines, packets, and what became of them.
 *
 * A packet lives in a heap block of its own, so that AddressSanitizer sees a read one byte behind its end.
 * The core may keep it (NAT_HOLD): the block is then the cookie that comes back from nat_engine_next(). All
 * others are freed when the next packet is given.
 *
 * With more than one worker a packet comes to the one that a NIC with RSS would choose, or for --spread to
 * another, and NAT_HANDOVER is followed at once: there are no rings, so nothing is ever in one.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "replay.h"

#define HANDOVERS_MAX 1000u

struct block {                         /* a packet that came in */
	struct block *previous, *next; /* in bench.live or, with next alone, in bench.done */
	uint8_t iface;
	uint32_t len_bytes;
	uint8_t bytes[];
};

struct memory { /* zeroed pages */
	void *at;
	size_t size;
};

struct list {
	struct result *one;
	uint32_t n, room;
};

struct bench {
	struct config *config;
	struct world *world;
	struct nat_table *table;
	struct nat_policy *policy;
	struct memory table_memory, policy_memory, old_policy_memory, workers_memory,
		engine_memory[NAT_WORKERS_MAX];
	struct nat_engine *engine[NAT_WORKERS_MAX];
	struct nat_workers *workers; /* NULL: there is one */
	uint32_t n_workers, turn;
	enum spread spread;
	uint64_t now_ns;
	struct block *live; /* given to the core, and not back yet */
	struct block *done; /* freed before the next packet */
	struct list out, dropped;
	struct outcome outcome;
	struct request_ops ops;
	struct log log;
	struct export_file *nat_log; /* NULL: none */
};

static bool take_memory(struct memory *memory, size_t size)
{
	void *at = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return false;
	*memory = (struct memory){at, size ? size : 1};
	return true;
}

static void give_memory(struct memory *memory)
{
	if (memory->at)
		munmap(memory->at, memory->size);
	*memory = (struct memory){0};
}

static struct nat_policy *make_policy(struct memory *memory, const struct nat_config *config,
				      const struct nat_policy *previous)
{
	if (!take_memory(memory, nat_policy_size(config)))
		return NULL;
	return nat_policy_init(memory->at, config, previous);
}

/* ---- results ---- */

static void add_result(struct list *list, const struct nat_pkt *pkt, uint32_t len_bytes, uint8_t iface)
{
	struct result *result;

	if (list->n == list->room) {
		uint32_t room = list->room ? list->room * 2 : 64;
		struct result *larger = realloc(list->one, room * sizeof(*larger));

		if (!larger)
			abort();
		list->one = larger;
		list->room = room;
	}
	result = &list->one[list->n++];
	*result = (struct result){.len_bytes = len_bytes,
				  .iface = iface,
				  .verdict = pkt->verdict,
				  .reason = pkt->reason,
				  .made = pkt->made};
	/* a copy: what the engine made is gone with its next run */
	result->bytes = malloc(len_bytes ? len_bytes : 1);
	if (!result->bytes)
		abort();
	memcpy(result->bytes, pkt->l3, len_bytes);
}

static void clear_results(struct list *list)
{
	for (uint32_t i = 0; i < list->n; i++)
		free(list->one[i].bytes);
	list->n = 0;
}

/* A packet that is forwarded ends where its IPv4 header says; behind that is padding of the link it came
 * from. */
static uint32_t wire_bytes(const struct nat_pkt *pkt)
{
	uint32_t total = pkt->len_bytes >= 4 ? (uint32_t)pkt->l3[2] << 8 | pkt->l3[3] : 0;

	return total && total < pkt->len_bytes ? total : pkt->len_bytes;
}

static void begin_block(struct bench *bench, struct block *block)
{
	block->previous = NULL;
	block->next = bench->live;
	if (bench->live)
		bench->live->previous = block;
	bench->live = block;
}

static void finish(struct bench *bench, struct block *block)
{
	if (block->previous)
		block->previous->next = block->next;
	else
		bench->live = block->next;
	if (block->next)
		block->next->previous = block->previous;
	block->next = bench->done;
	bench->done = block;
}

/* What a worker's last run or tick left beside the burst. */
static void drain(struct bench *bench, uint32_t worker)
{
	struct nat_pkt pkt;

	while (nat_engine_next(bench->engine[worker], &pkt)) {
		struct block *block = pkt.made ? NULL : pkt.cookie;

		if (pkt.verdict == NAT_FORWARD)
			add_result(&bench->out, &pkt, wire_bytes(&pkt), pkt.hop.iface);
		else if (pkt.verdict == NAT_DROP)
			add_result(&bench->dropped, &pkt, pkt.len_bytes, pkt.iface);
		if (block)
			finish(bench, block);
	}
}

static void begin(struct bench *bench, uint64_t now_ns)
{
	if (now_ns > bench->now_ns)
		bench->now_ns = now_ns;
	clear_results(&bench->out);
	clear_results(&bench->dropped);
	while (bench->done) {
		struct block *next = bench->done->next;

		free(bench->done);
		bench->done = next;
	}
}

static const struct outcome *end(struct bench *bench, uint8_t verdict, uint8_t reason)
{
	bench->outcome = (struct outcome){.verdict = verdict,
					  .reason = reason,
					  .out = bench->out.one,
					  .n_out = bench->out.n,
					  .dropped = bench->dropped.one,
					  .n_dropped = bench->dropped.n};
	if (bench->nat_log)
		export_file_run(bench->nat_log, bench->config, bench->policy);
	return &bench->outcome;
}

/* ---- packets and time ---- */

static void tick_all(struct bench *bench)
{
	for (uint32_t worker = 0; worker < bench->n_workers; worker++) {
		nat_engine_tick(bench->engine[worker], bench->now_ns);
		drain(bench, worker);
	}
	/* every worker has passed: nobody holds the policy of before the reload any more */
	give_memory(&bench->old_policy_memory);
}

const struct outcome *bench_tick(struct bench *bench, uint64_t now_ns)
{
	begin(bench, now_ns);
	tick_all(bench);
	return end(bench, NAT_PASS, NAT_REASON_OK);
}

/* The worker that a packet comes to. */
static uint32_t receiver(struct bench *bench, uint8_t iface, const uint8_t *bytes, uint32_t len_bytes)
{
	if (bench->n_workers == 1 || bench->spread == SPREAD_ONE)
		return 0;
	if (bench->spread == SPREAD_TURNS)
		return bench->turn++ % bench->n_workers;
	return nat_workers_queue(bench->workers,
				 bench->config->nat.interfaces[iface].role == NAT_ROLE_OUTSIDE, bytes,
				 len_bytes);
}

const struct outcome *bench_packet(struct bench *bench, uint64_t now_ns, uint8_t iface, uint16_t flags,
				   int worker, const uint8_t *bytes, uint32_t len_bytes)
{
	struct block *block = malloc(sizeof(*block) + len_bytes);
	uint32_t at =
		worker < 0 ? receiver(bench, iface, bytes, len_bytes) : (uint32_t)worker % bench->n_workers;
	struct nat_pkt pkt = {.len_bytes = len_bytes, .flags = flags, .iface = iface};
	uint32_t handovers = 0;

	if (!block)
		abort();
	begin(bench, now_ns);
	*block = (struct block){.iface = iface, .len_bytes = len_bytes};
	if (len_bytes)
		memcpy(block->bytes, bytes, len_bytes);
	begin_block(bench, block);
	world_learn(bench->world, iface, bytes, len_bytes);
	/* time first, so that what times out now stands before what the packet does */
	tick_all(bench);
	pkt.l3 = block->bytes;
	pkt.cookie = block;
	nat_engine_run(bench->engine[at], &pkt, 1, bench->now_ns);
	while (pkt.verdict == NAT_HANDOVER) {
		if (++handovers > HANDOVERS_MAX)
			abort(); /* the engine's fault: its own limit is lower */
		drain(bench, at);
		at = pkt.owner;
		pkt = (struct nat_pkt){.l3 = block->bytes,
				       .cookie = block,
				       .len_bytes = len_bytes,
				       .flags = pkt.flags | NAT_PKT_TAKEN_OVER,
				       .errand = pkt.errand,
				       .iface = iface};
		nat_engine_run(bench->engine[at], &pkt, 1, bench->now_ns);
	}
	if (pkt.verdict == NAT_FORWARD)
		add_result(&bench->out, &pkt, wire_bytes(&pkt), pkt.hop.iface);
	drain(bench, at);
	/* held: the core owns the block, unless drain() has just had it back */
	if (pkt.verdict != NAT_HOLD)
		finish(bench, block);
	return end(bench, pkt.verdict, pkt.reason);
}

void bench_bypass(struct bench *bench)
{
	nat_engine_bypass(bench->engine[0], NAT_PASS, NAT_REASON_NOT_IPV4);
}

/* ---- requests ---- */

static const struct config *running_config(void *context)
{
	const struct bench *bench = context;

	return bench->config;
}

static const struct nat_policy *running_policy(void *context)
{
	const struct bench *bench = context;

	return bench->policy;
}

static bool on_worker(void *context, uint32_t worker,
		      void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument)
{
	struct bench *bench = context;

	run(bench->engine[worker], bench->now_ns, argument);
	return true;
}

static bool apply(void *context, struct config *next, char *why, size_t why_bytes)
{
	struct bench *bench = context;
	struct memory memory = {0};
	struct nat_policy *policy;

	next->nat.n_workers = bench->n_workers;
	policy = make_policy(&memory, &next->nat, bench->policy);
	if (!policy) {
		snprintf(why, why_bytes, "there is no memory for the new configuration; make it smaller");
		return false;
	}
	for (uint32_t worker = 0; worker < bench->n_workers; worker++)
		nat_engine_set_policy(bench->engine[worker], policy);
	/* two reloads without a packet between them: the older policy was never in use */
	give_memory(&bench->old_policy_memory);
	bench->old_policy_memory = bench->policy_memory;
	bench->policy_memory = memory;
	bench->policy = policy;
	config_free(bench->config);
	bench->config = next;
	world_set_config(bench->world, &next->nat);
	bench_follow_addresses(bench);
	return true;
}

/* ---- life ---- */

struct world *bench_world(struct bench *bench)
{
	return bench->world;
}

const struct nat_config *bench_config(const struct bench *bench)
{
	return &bench->config->nat;
}

uint64_t bench_now_ns(const struct bench *bench)
{
	return bench->now_ns;
}

struct log *bench_log(struct bench *bench)
{
	return &bench->log;
}

const struct request_ops *bench_ops(const struct bench *bench)
{
	return &bench->ops;
}

bool bench_log_to(struct bench *bench, FILE *to)
{
	bench->nat_log = export_file_open(bench->config, bench->n_workers, to);
	for (uint32_t worker = 0; bench->nat_log && worker < bench->n_workers; worker++)
		nat_engine_log_to(bench->engine[worker], export_file_ring(bench->nat_log, worker));
	return bench->nat_log != NULL;
}

bool bench_log_end(struct bench *bench)
{
	struct export_file *nat_log = bench->nat_log;

	if (!nat_log)
		return true;
	export_file_run(nat_log, bench->config, bench->policy);
	bench->nat_log = NULL;
	for (uint32_t worker = 0; worker < bench->n_workers; worker++)
		nat_engine_log_to(bench->engine[worker], NULL);
	return export_file_close(nat_log);
}

void bench_follow_addresses(struct bench *bench)
{
	const struct nat_config *config = &bench->config->nat;

	for (uint32_t i = 0; i < config->n_pools; i++)
		if (config->pools[i].active_while_be)
			nat_policy_set_active(bench->policy, i,
					      world_is_own(bench->world, config->pools[i].active_while_be));
}

static bool make_engines(struct bench *bench, uint64_t seed)
{
	struct nat_config *config = &bench->config->nat;
	size_t table_bytes = nat_table_size(config->max_sessions);
	const char *why;
	bool adopted;

	if (!take_memory(&bench->table_memory, table_bytes))
		return false;
	bench->table = nat_table_init(bench->table_memory.at, table_bytes, config->max_sessions, seed,
				      &adopted, &why);
	config->n_workers = bench->n_workers;
	bench->policy = make_policy(&bench->policy_memory, config, NULL);
	if (!bench->table || !bench->policy)
		return false;
	if (bench->n_workers > 1) {
		if (!take_memory(&bench->workers_memory,
				 nat_workers_size(bench->n_workers, config->max_sessions)))
			return false;
		bench->workers = nat_workers_init(bench->workers_memory.at, bench->n_workers,
						  config->max_sessions, seed, NULL, NULL);
	}
	for (uint32_t worker = 0; worker < bench->n_workers; worker++) {
		struct nat_engine_params params = {.table = bench->table,
						   .policy = bench->policy,
						   .world = world_functions(bench->world),
						   .max_sessions = config->max_sessions,
						   .seed = seed,
						   .worker = worker,
						   .n_workers = bench->n_workers,
						   .workers = bench->workers};

		if (!take_memory(&bench->engine_memory[worker], nat_engine_size(&params)))
			return false;
		bench->engine[worker] = nat_engine_init(bench->engine_memory[worker].at, &params);
		if (!bench->engine[worker])
			return false;
	}
	return true;
}

struct bench *bench_open(struct config *config, uint64_t seed, uint32_t workers, enum spread spread)
{
	struct bench *bench = calloc(1, sizeof(*bench));

	if (!bench)
		return NULL;
	bench->config = config;
	bench->n_workers = workers;
	bench->spread = spread;
	bench->world = world_open(&config->nat);
	bench->ops = (struct request_ops){.context = bench,
					  .n_workers = workers,
					  .config = running_config,
					  .policy = running_policy,
					  .on_worker = on_worker,
					  .apply = apply,
					  .config_flags = CONFIG_WITHOUT_DEVICES,
					  .capture = request_capture_open(),
					  .program = "dsnat-replay"};
	if (bench->world && make_engines(bench, seed))
		return bench;
	bench->config = NULL; /* still the caller's */
	bench_close(bench);
	return NULL;
}

void bench_close(struct bench *bench)
{
	while (bench->live) /* still held: fragments without their first */
		finish(bench, bench->live);
	begin(bench, 0);
	free(bench->out.one);
	free(bench->dropped.one);
	for (uint32_t worker = 0; worker < bench->n_workers; worker++)
		give_memory(&bench->engine_memory[worker]);
	give_memory(&bench->policy_memory);
	give_memory(&bench->old_policy_memory);
	give_memory(&bench->workers_memory);
	give_memory(&bench->table_memory);
	request_capture_close(bench->ops.capture);
	if (bench->world)
		world_close(bench->world);
	config_free(bench->config);
	free(bench);
}
