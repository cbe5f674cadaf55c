/* dsnat-kill: SIGKILL at a random moment, thousands of times, and what the next engine finds.
 *
 * The session table lies in shared memory, as the daemon's does in its file. A child runs the real core on
 * it under load; the parent kills it at a random moment, anywhere between its first instruction and the
 * middle of a burst, and forks the next one, which adopts the table, audits it, and goes on with the load.
 * Every other run has another pool.
 *
 * What the outside has seen is written down in the *ledger*, shared as well, behind the engine's back: the
 * outside address and port of each flow when its packet has left, crossed out before the packets that may
 * end the flow. So whenever the child dies the ledger says less than the engine has promised, never more.
 * The audit asks for
 *
 *   - each flow of the ledger whose time is not over: a session under its tuple, with that outside address and port;
 *   - each live record: found by the index under both of its tuples, and only it (so no two share one);
 *   - records, free list, hosts, mappings' references and port blocks: the same numbers, counted from the records.
 *
 * Then the load itself compares every packet that leaves with the ledger. `--damage` changes a port in the
 * table between two lives, to show that the audit sees it.
 */
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/testbed.h"

#define FLOWS        3000u
#define MAX_SESSIONS 8192u
#define BURST        32u
#define BURST_NS     UINT64_C(3000000) /* of the engine's time, which only the load moves */
#define POLICIES     2u

enum stage { NONE, OPENED, ANSWERED };

struct flow {
	uint32_t out_addr_be, seen_s;
	uint16_t out_port_be;
	uint8_t stage; /* written after what it promises */
};

enum phase { ADOPTING, AUDITING, LOADED };

struct ledger {
	_Atomic uint64_t now_ns;
	_Atomic uint32_t phase;
	uint64_t packets, opened, ended, audited, lives;
	struct flow flow[FLOWS];
	char complaint[256];
};

struct bench {
	struct ledger *ledger;
	void *table;
	struct nat_config config[POLICIES];
	struct nat_policy *policy[POLICIES];
	struct nat_engine *e;
	void *engine;
	uint64_t random;
};

static uint64_t draw(struct bench *b)
{
	uint64_t x = b->random += UINT64_C(0x9e3779b97f4a7c15);

	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static void complain(struct bench *b, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(b->ledger->complaint, sizeof(b->ledger->complaint), format, args);
	va_end(args);
	_exit(1);
}

/* ---- flows: number -> tuple ---- */

/* A third each to an endpoint-dependent pool, to mappings, and to mappings with filters and port blocks.
 * Four flows share an inside port, so that mappings have more than one session. */
static struct nat_tuple tuple_of(uint32_t flow)
{
	const uint32_t kind = flow % 3, number = flow / 3;

	return (struct nat_tuple){
		.local_be = NAT_HTON32(ADDRESS(100, 64 + kind, 0, 1) + number % 40),
		.remote_be = NAT_HTON32(ADDRESS(198, 51, 100, 1) + number / 40 % 4),
		.local_port_be = NAT_HTON16(2000 + number / 160),
		.remote_port_be = NAT_HTON16(443),
		.protocol = number % 2 ? NAT_PROTO_TCP : NAT_PROTO_UDP,
	};
}

static void packet_of(uint8_t *bytes, const struct nat_tuple *t, const struct flow *flow, bool inbound,
		      uint8_t tcp_flags)
{
	const bool tcp = t->protocol == NAT_PROTO_TCP;
	const uint16_t length = tcp ? 40 : 28;

	memset(bytes, 0, 40);
	bytes[0] = 0x45;
	nat_write16(bytes + NAT_IP_LENGTH, length);
	bytes[NAT_IP_TTL] = 64;
	bytes[NAT_IP_PROTOCOL] = t->protocol;
	nat_put32(bytes + NAT_IP_SOURCE, inbound ? t->remote_be : t->local_be);
	nat_put32(bytes + NAT_IP_DESTINATION, inbound ? flow->out_addr_be : t->remote_be);
	nat_put16(bytes + NAT_IP_CHECKSUM, nat_csum_bytes(bytes, 20));
	nat_put16(bytes + 20, inbound ? t->remote_port_be : t->local_port_be);
	nat_put16(bytes + 22, inbound ? flow->out_port_be : t->remote_port_be);
	if (tcp) {
		bytes[32] = 0x50;
		bytes[33] = tcp_flags;
	} else {
		nat_write16(bytes + 24, 8);
	}
}

/* ---- the engine of one life ---- */

static void configure(struct nat_config *config, uint32_t variant)
{
	static struct nat_range ranges[POLICIES][3], drains[3];
	static struct nat_pool_config pools[POLICIES][3];
	static struct nat_zone_config zones[3];
	static struct nat_interface_config interfaces[2] = {{.name = "inside0", .role = NAT_ROLE_INSIDE},
							    {.name = "outside0", .role = NAT_ROLE_OUTSIDE}};
	static const char *const names[3] = {"dependent", "independent", "blocks"};

	for (uint32_t i = 0; i < 3; i++) {
		const uint32_t first = ADDRESS(203, 0, 113, 1) + 16 * i;

		ranges[variant][i] = (struct nat_range){first, first + 3};
		/* in every other life one address less takes new sessions, and fewer ports do */
		drains[i] = (struct nat_range){first + 3, first + 3};
		pools[variant][i] = (struct nat_pool_config){.ranges = &ranges[variant][i],
							     .n_ranges = 1,
							     .drain = &drains[i],
							     .n_drain = variant,
							     .port_first = 1024,
							     .port_last = 3071};
		strcpy(pools[variant][i].name, names[i]);
		zones[i] = (struct nat_zone_config){
			.source = {ADDRESS(100, 64 + i, 0, 0), 16}, .action = NAT_ACTION_POOL, .pool = i};
	}
	pools[variant][1].mapping = pools[variant][2].mapping = NAT_ENDPOINT_INDEPENDENT;
	pools[variant][1].select = pools[variant][2].select = NAT_SELECT_PAIRED;
	pools[variant][0].port_last = variant ? 2047 : 3071;
	pools[variant][2].filtering = NAT_FILTER_ADDRESS;
	pools[variant][2].block_ports = 64;
	pools[variant][2].blocks_per_host = 8;
	*config = (struct nat_config){.workers = 1,
				      .max_sessions = MAX_SESSIONS,
				      .interfaces = interfaces,
				      .n_interfaces = 2,
				      .pools = pools[variant],
				      .n_pools = 3,
				      .zones = zones,
				      .n_zones = 3,
				      .limits = {.fragments = 16, .sessions_per_host = 4000},
				      .timeouts = {7440, 4, 2, 60, 4, 20, 60, 2}};
}

static struct nat_engine_params params_of(struct bench *b, uint32_t variant)
{
	bool adopted;
	const char *why;
	const size_t bytes = nat_table_size(MAX_SESSIONS);
	struct nat_table *table = nat_table_init(b->table, bytes, MAX_SESSIONS, 1, &adopted, &why);

	if (!table)
		complain(b, "the table is refused: %s", why);
	if (!adopted && b->ledger->lives > 1)
		complain(b, "the table was made anew");
	return (struct nat_engine_params){.table = table,
					  .policy = b->policy[variant],
					  .world = {NULL, testbed_route, testbed_own_address},
					  .max_sessions = MAX_SESSIONS,
					  .seed = draw(b),
					  .now_ns = b->ledger->now_ns,
					  .n_workers = 1};
}

/* ---- the audit ---- */

static uint32_t record_under(struct bench *b, const struct nat_tuple *tuple)
{
	return nat_index_find(&b->e->index, tuple, nat_tuple_hash(&b->e->index.key, tuple));
}

static void audit_flows(struct bench *b)
{
	const uint32_t now_s = (uint32_t)(b->ledger->now_ns / SECOND_NS);

	for (uint32_t i = 0; i < FLOWS; i++) {
		const struct flow *flow = &b->ledger->flow[i];
		const struct nat_tuple tuple = tuple_of(i);
		const bool tcp = tuple.protocol == NAT_PROTO_TCP;
		const uint32_t lives_s = flow->stage == OPENED ? 4 : tcp ? 7440 : 60;

		if (flow->stage == NONE || now_s - flow->seen_s >= lives_s)
			continue;
		const uint32_t record = record_under(b, &tuple);
		if (record == NAT_NO_RECORD)
			complain(b, "flow %u (stage %u, seen %u s ago) has lost its session", i, flow->stage,
				 now_s - flow->seen_s);
		const struct nat_session *s = &b->e->record[record];
		if (s->out_addr_be != flow->out_addr_be || s->out_port_be != flow->out_port_be)
			complain(b, "flow %u has another outside address or port", i);
		if (tcp && flow->stage == ANSWERED && s->timer != NAT_TIMER_TCP_ESTABLISHED)
			complain(b, "flow %u is established and has timer %u", i, s->timer);
	}
}

static void audit_records(struct bench *b)
{
	struct nat_engine *e = b->e;
	uint64_t live = 0, sessions = 0, entries = 0, hosts = 0, of_hosts = 0, in_blocks = 0, references = 0,
		 under = 0;
	uint32_t leased = e->table->chunks_leased;

	for (uint32_t i = 0; i < leased * NAT_CHUNK; i++) {
		const struct nat_session *s = &e->record[i];
		const struct nat_tuple outside = nat_session_outside(s);

		if (s->timer == NAT_TIMER_FREE)
			continue;
		live++;
		if (record_under(b, &s->inside) != i || record_under(b, &outside) != i)
			complain(b, "record %u shares a tuple with another one, or is not indexed", i);
		if (s->flags & NAT_RECORD_MAPPING) {
			references += s->references;
			continue;
		}
		sessions++;
		if (s->inside.protocol == NAT_PROTO_TCP && s->timer != nat_tcp_timer(s->state))
			complain(b, "record %u has state %u and timer %u", i, s->state, s->timer);
		under += (s->flags & NAT_RECORD_UNDER_MAPPING) != 0;
		under += (s->flags & NAT_RECORD_PERMITS) != 0;
		if (s->flags & NAT_RECORD_UNDER_MAPPING) {
			const uint32_t mapping = nat_session_mapping(e, s);
			if (mapping == NAT_NO_RECORD || e->record[mapping].out_port_be != s->out_port_be ||
			    e->record[mapping].out_addr_be != s->out_addr_be)
				complain(b, "record %u does not fit its mapping", i);
		}
	}
	for (uint32_t i = 0; i < e->index.n_buckets; i++)
		entries += NAT_WAYS - (uint32_t)__builtin_popcount(nat_bucket_ways(&e->index.bucket[i], 0));
	for (uint32_t i = 0; i < e->hosts.n_slots; i++) {
		hosts += e->hosts.slot[i].address_be != 0;
		of_hosts += e->hosts.slot[i].address_be != 0 ? e->hosts.slot[i].sessions : 0;
	}
	for (uint32_t i = 0; i < 4 * e->policy->pool[2].n_blocks; i++)
		in_blocks += e->notes->block[e->policy->pool[2].first_block + i].taken;
	uint64_t owning = 0;
	for (uint32_t i = 0; i < leased * NAT_CHUNK; i++) {
		const struct nat_session *s = &e->record[i];
		const uint32_t address = nat_policy_address(e->policy, s->out_addr_be);

		owning += s->timer != NAT_TIMER_FREE && s->inside.zero[0] == 0 &&
			  (s->flags & NAT_RECORD_MAPPING) && address != UINT32_MAX &&
			  e->policy->address[address].pool == 2;
	}
	if (entries != 2 * live)
		complain(b, "%lu records live, the index has %lu entries", live, entries);
	if (sessions != e->counters.sessions || of_hosts != sessions)
		complain(b, "%lu sessions live, counted %lu, of hosts %lu", sessions, e->counters.sessions,
			 of_hosts);
	if (e->records_left != MAX_SESSIONS - live || e->n_free != leased * NAT_CHUNK - live)
		complain(b, "%lu live of %u, %lu left, %u free", live, leased * NAT_CHUNK, e->records_left,
			 e->n_free);
	if (references != under)
		complain(b, "mappings and filters are referred to %lu times, and count %lu", under,
			 references);
	if (in_blocks != owning)
		complain(b, "%lu ports of blocks are in use, %lu counted", owning, in_blocks);
	if (hosts > 120)
		complain(b, "%lu hosts are known, there are 120", hosts);
	b->ledger->audited += live;
}

/* ---- the load ---- */

struct step {
	uint32_t flow;
	bool inbound, opens, answers;
};

static void choose_step(struct bench *b, struct step *step, uint8_t *bytes)
{
	struct flow *flow = &b->ledger->flow[step->flow];
	const struct nat_tuple tuple = tuple_of(step->flow);
	const uint32_t now_s = (uint32_t)(b->ledger->now_ns / SECOND_NS);
	const bool tcp = tuple.protocol == NAT_PROTO_TCP;
	uint8_t flags = NAT_TCP_ACK;

	if (flow->stage != NONE && now_s - flow->seen_s + 1 >= (flow->stage == OPENED ? 4u
								: tcp                 ? 7440u
										      : 60u))
		flow->stage = NONE; /* its time is over, or nearly */
	if (flow->stage == NONE) {
		step->opens = true;
		flags = NAT_TCP_SYN;
	} else if (flow->stage == OPENED) {
		step->inbound = step->answers = true;
		flags = NAT_TCP_SYN | NAT_TCP_ACK;
	} else if (tcp && draw(b) % 8 == 0) {
		flow->stage = NONE; /* before the packet that ends it */
		flags = NAT_TCP_RST;
		b->ledger->ended++;
	} else {
		step->inbound = draw(b) % 2;
	}
	packet_of(bytes, &tuple, flow, step->inbound, flags);
}

static void note_step(struct bench *b, const struct step *step, const struct nat_pkt *pkt)
{
	struct flow *flow = &b->ledger->flow[step->flow];
	const struct nat_tuple tuple = tuple_of(step->flow);
	const uint32_t address_be = nat_get32(pkt->l3 + NAT_IP_SOURCE);
	const uint16_t port_be = nat_get16(pkt->l3 + 20);

	if (pkt->verdict != NAT_FORWARD)
		complain(b, "flow %u: a packet was dropped: %s", step->flow, nat_reason_name(pkt->reason));
	if (step->opens) {
		flow->out_addr_be = address_be;
		flow->out_port_be = port_be;
		b->ledger->opened++;
	} else if (step->inbound) {
		if (nat_get32(pkt->l3 + NAT_IP_DESTINATION) != tuple.local_be ||
		    nat_get16(pkt->l3 + 22) != tuple.local_port_be)
			complain(b, "flow %u: its reply went to somebody else", step->flow);
	} else if (flow->stage != NONE && (address_be != flow->out_addr_be || port_be != flow->out_port_be)) {
		complain(b, "flow %u: its address or port has changed", step->flow);
	}
	flow->seen_s = b->e->now_s;
	atomic_signal_fence(memory_order_release);
	if (step->opens)
		*(volatile uint8_t *)&flow->stage = OPENED;
	else if (step->answers)
		*(volatile uint8_t *)&flow->stage = ANSWERED;
}

static void load(struct bench *b)
{
	for (;;) {
		static uint8_t bytes[BURST][64];
		struct nat_pkt pkt[BURST];
		struct step step[BURST];
		const uint32_t first = (uint32_t)(draw(b) % FLOWS);

		for (uint32_t i = 0; i < BURST; i++) {
			step[i] = (struct step){.flow = (first + i * 89) % FLOWS};
			choose_step(b, &step[i], bytes[i]);
			pkt[i] = (struct nat_pkt){.l3 = bytes[i],
						  .len_bytes = nat_read16(bytes[i] + NAT_IP_LENGTH),
						  .iface = step[i].inbound};
		}
		nat_engine_run(b->e, pkt, BURST, b->ledger->now_ns);
		for (uint32_t i = 0; i < BURST; i++)
			note_step(b, &step[i], &pkt[i]);
		b->ledger->packets += BURST;
		b->ledger->now_ns += BURST_NS;
	}
}

static void live(struct bench *b, uint32_t variant, bool once)
{
	struct nat_engine_params params = params_of(b, variant);

	b->e = nat_engine_init(b->engine, &params);
	b->ledger->phase = AUDITING;
	audit_flows(b);
	audit_records(b);
	b->ledger->phase = LOADED;
	if (!once)
		load(b);
	_exit(0);
}

/* ---- the parent ---- */

static void *shared(size_t bytes)
{
	void *mem = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED) {
		perror("dsnat-kill: mmap");
		exit(2);
	}
	return mem;
}

/* Something that lives gets another port, as a defect might do. */
static void damage(struct bench *b)
{
	struct nat_table *table = b->table;
	struct nat_session *record = nat_table_records(table);

	for (uint32_t i = 0; i < table->n_records; i++)
		if (record[i].timer == NAT_TIMER_TCP_ESTABLISHED && !(record[i].flags & NAT_RECORD_MAPPING)) {
			record[i].out_port_be ^= NAT_HTON16(1);
			return;
		}
}

static bool is_dead(pid_t child)
{
	siginfo_t info = {0};

	return waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid != 0;
}

/* True when it was killed, as it should be. */
static bool one_life(struct bench *b, uint32_t wait_us, bool once)
{
	const uint32_t variant = (uint32_t)(b->ledger->lives++ % POLICIES);
	int status;

	b->ledger->phase = ADOPTING;
	const pid_t child = fork();
	if (child < 0) {
		perror("dsnat-kill: fork");
		exit(2);
	}
	if (child == 0)
		live(b, variant, once);
	if (!once) {
		/* every other one in the midst of the load, however long that took to come */
		while (b->ledger->lives % 4 > 1 && b->ledger->phase != LOADED && !is_dead(child))
			usleep(50);
		usleep(wait_us);
		kill(child, SIGKILL);
	}
	waitpid(child, &status, 0);
	if (once)
		return WIFEXITED(status) && WEXITSTATUS(status) == 0;
	return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

int main(int argc, char **argv)
{
	static const struct option known[] = {{"kills", required_argument, NULL, 'k'},
					      {"seed", required_argument, NULL, 's'},
					      {"wait-us", required_argument, NULL, 'w'},
					      {"damage", no_argument, NULL, 'd'},
					      {0}};
	struct bench b = {.random = 1};
	uint32_t kills = 300, wait_us = 6000, in_phase[3] = {0};
	bool damages = false, well = true;
	int option;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
		switch (option) {
		case 'k':
			kills = (uint32_t)strtoul(optarg, NULL, 0);
			break;
		case 's':
			b.random = strtoull(optarg, NULL, 0);
			break;
		case 'w':
			wait_us = (uint32_t)strtoul(optarg, NULL, 0);
			break;
		case 'd':
			damages = true;
			break;
		default:
			fputs("usage: dsnat-kill [--kills N] [--seed N] [--wait-us N] [--damage]\n", stderr);
			return 2;
		}
	const uint64_t seed = b.random;
	b.ledger = shared(sizeof(*b.ledger));
	b.ledger->now_ns = 5 * SECOND_NS;
	b.table = shared(nat_table_size(MAX_SESSIONS));
	for (uint32_t i = 0; i < POLICIES; i++) {
		configure(&b.config[i], i);
		b.policy[i] =
			nat_policy_init(testbed_memory(nat_policy_size(&b.config[i])), &b.config[i], NULL);
	}
	const struct nat_engine_params params = params_of(&b, 0);
	b.engine = testbed_memory(nat_engine_size(&params));
	for (uint32_t i = 0; i < kills && well; i++) {
		well = one_life(&b, (uint32_t)(draw(&b) % wait_us), false);
		in_phase[b.ledger->phase]++;
		if (damages && i == kills / 2)
			damage(&b);
	}
	well = well && one_life(&b, 0, true);
	printf("{\"kills\":%u,\"adopting\":%u,\"auditing\":%u,\"loaded\":%u,\"packets\":%lu,\"opened\":%lu,"
	       "\"ended\":%lu,"
	       "\"audited\":%lu,\"seed\":%lu,\"well\":%s,\"complaint\":\"%s\"}\n",
	       in_phase[0] + in_phase[1] + in_phase[2], in_phase[ADOPTING], in_phase[AUDITING],
	       in_phase[LOADED], b.ledger->packets, b.ledger->opened, b.ledger->ended, b.ledger->audited,
	       seed, well ? "true" : "false",
	       well || b.ledger->complaint[0] ? b.ledger->complaint
					      : "a life ended by itself, as by an assertion");
	free(b.engine);
	for (uint32_t i = 0; i < POLICIES; i++)
		free(b.policy[i]);
	return well ? 0 : 1;
}
