/* The time stamp counter around bursts. What is timed is all that a worker does with a packet between the
 * receive and the transmit call; frames are written outside the timed part.
 *
 * A window is some hundred rings, each timed on its own, and its figure is their median: a ring takes 50 us,
 * so one in which the kernel or the hypervisor took the core away stands out and does not count. */
#include <stdlib.h>
#include <time.h>
#include <x86intrin.h>

#include "../../core/engine.h"
#include "bench.h"

const char *const stage_name[STAGE_COUNT] = {
	[STAGE_PRESENT] = "present",   [STAGE_AGE] = "age",
	[STAGE_PARSE] = "parse",       [STAGE_ROUTE_AS_SENT] = "route_as_sent",
	[STAGE_CLASSIFY] = "classify", [STAGE_KNOWN] = "known",
	[STAGE_LOOK_UP] = "look_up",   [STAGE_ROUTE] = "route",
	[STAGE_ALLOCATE] = "allocate", [STAGE_REWRITE] = "rewrite",
	[STAGE_SEND] = "send",
};

static uint64_t cycles(void)
{
	unsigned core;
	const uint64_t now = __rdtscp(&core);

	_mm_lfence();
	return now;
}

/* ---- figures ---- */

static int compare(const void *a, const void *b)
{
	const double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

void figure_add(struct figure *figure, double value)
{
	if (figure->n < WINDOWS_MAX)
		figure->window[figure->n++] = value;
}

double figure_median(struct figure *figure)
{
	qsort(figure->window, figure->n, sizeof(figure->window[0]), compare);
	return figure->n ? figure->window[figure->n / 2] : 0;
}

double figure_minimum(const struct figure *figure)
{
	double least = figure->n ? figure->window[0] : 0;

	for (uint32_t i = 1; i < figure->n; i++)
		least = figure->window[i] < least ? figure->window[i] : least;
	return least;
}

/* ---- the machine ---- */

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_RAW, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

double measure_tsc_hz(void)
{
	const double from_s = seconds();
	const uint64_t from = cycles();

	while (seconds() - from_s < 0.05)
		;
	return (double)(cycles() - from) / (seconds() - from_s);
}

double measure_core_per_tsc(void)
{
	double best = 0;

	for (int attempt = 0; attempt < 10; attempt++) {
		const uint32_t adds = 1000000;
		const uint64_t from = cycles();
		uint64_t x = 0;

		for (uint32_t i = 0; i < adds; i++)
			__asm__ volatile("add $1, %0"
					 : "+r"(x)); /* each waits for the one before: one core cycle */
		const double ratio = adds / (double)(cycles() - from);
		best = ratio > best ? ratio : best;
	}
	return best;
}

/* ---- windows ---- */

/* Median of one field of the rings of a window. */
struct rings {
	double value[RINGS_MAX];
	uint32_t n;
};

static void rings_add(struct rings *rings, uint64_t spent, uint32_t units)
{
	if (rings->n < RINGS_MAX)
		rings->value[rings->n++] = (double)spent / units;
}

static double rings_median(struct rings *rings)
{
	qsort(rings->value, rings->n, sizeof(rings->value[0]), compare);
	return rings->n ? rings->value[rings->n / 2] : 0;
}

double measure_packets(struct load *load, uint8_t iface, uint32_t n_rings)
{
	struct nat_pkt pkt[BURST];
	struct rings rings = {.n = 0};

	for (uint32_t ring = 0; ring < n_rings; ring++) {
		load_ring(load, iface);
		const uint64_t from = cycles();
		for (uint32_t at = 0; at < RING; at += BURST)
			load_burst(load, at, iface, pkt);
		rings_add(&rings, cycles() - from, RING);
	}
	return rings_median(&rings);
}

double measure_new_sessions(struct load *load, uint32_t sessions)
{
	static uint32_t record[NEW_MAX]; /* taken away again, so that the next window finds the same table */
	struct nat_pkt pkt[BURST];
	struct rings rings = {.n = 0};

	for (uint32_t done = 0, n; done < sessions; done += n) {
		n = sessions - done < RING ? sessions - done : RING;
		for (uint32_t i = 0; i < n; i++)
			load_frame(load, i, load->n_flows + done + i, INSIDE, true);
		const uint64_t from = cycles();
		for (uint32_t at = 0; at < n; at += BURST) {
			load_burst(load, at, INSIDE, pkt);
			for (uint32_t i = 0; i < BURST; i++)
				record[done + at + i] = pkt[i].session;
		}
		rings_add(&rings, cycles() - from, n);
	}
	for (uint32_t i = 0; i < sessions; i++)
		if (record[i] != NAT_NO_SESSION)
			nat_engine_clear(load->engine, record[i]);
	return rings_median(&rings);
}

/* The stages of nat_engine_run(), in its order; reading the counter between them adds two cycles per
 * packet to each, so their sum is more than the whole. */
static void run_stages(struct load *load, uint32_t at, uint8_t iface, struct nat_pkt *pkt,
		       uint64_t spent[STAGE_COUNT])
{
	struct nat_engine *e = load->engine;
	uint64_t mark[STAGE_COUNT + 1];

	mark[STAGE_PRESENT] = cycles();
	load_present(load, at, iface, pkt);
	mark[STAGE_AGE] = cycles();
	nat_wheel_turn(e, 2 * BURST);
	mark[STAGE_PARSE] = cycles();
	nat_parse(e, pkt, BURST);
	mark[STAGE_ROUTE_AS_SENT] = cycles();
	nat_route_as_sent(e, pkt, BURST);
	mark[STAGE_CLASSIFY] = cycles();
	nat_classify(e, pkt, BURST);
	mark[STAGE_KNOWN] = cycles();
	const bool rest = nat_known(e, pkt, BURST) != BURST;
	mark[STAGE_LOOK_UP] = cycles();
	if (rest)
		nat_session_lookup(e, pkt, BURST);
	mark[STAGE_ROUTE] = cycles();
	if (rest)
		nat_route(e, pkt, BURST);
	mark[STAGE_ALLOCATE] = cycles();
	if (rest)
		nat_allocate(e, pkt, BURST);
	mark[STAGE_REWRITE] = cycles();
	if (rest)
		nat_rewrite(e, pkt, BURST);
	mark[STAGE_SEND] = cycles();
	load_send(load, pkt);
	mark[STAGE_COUNT] = cycles();
	for (uint32_t i = 0; i < STAGE_COUNT; i++)
		spent[i] += mark[i + 1] - mark[i];
}

void measure_stages(struct load *load, uint8_t iface, bool new, uint32_t n_rings, double stage[STAGE_COUNT])
{
	static struct rings rings[STAGE_COUNT];
	static uint32_t record[RING];
	struct nat_pkt pkt[BURST];

	for (uint32_t i = 0; i < STAGE_COUNT; i++)
		rings[i].n = 0;
	for (uint32_t ring = 0; ring < n_rings; ring++) {
		uint64_t spent[STAGE_COUNT] = {0};

		if (new)
			for (uint32_t i = 0; i < RING; i++)
				load_frame(load, i, load->n_flows + ring % (NEW_MAX / RING) * RING + i,
					   INSIDE, true);
		else
			load_ring(load, iface);
		for (uint32_t at = 0; at < RING; at += BURST) {
			run_stages(load, at, iface, pkt, spent);
			for (uint32_t i = 0; i < BURST; i++)
				record[at + i] = pkt[i].session;
		}
		for (uint32_t i = 0; i < RING && new; i++)
			nat_engine_clear(load->engine, record[i]);
		for (uint32_t i = 0; i < STAGE_COUNT; i++)
			rings_add(&rings[i], spent[i], RING);
	}
	for (uint32_t i = 0; i < STAGE_COUNT; i++)
		stage[i] = rings_median(&rings[i]);
}

void measure_expiry(struct load *load, struct figure *figure)
{
	const struct nat_counters *counters = nat_engine_counters(load->engine);
	const uint64_t share = load->n_flows / 11 + 1;
	struct nat_pkt pkt[BURST];

	/* Sessions are refreshed at random over a while, or they would end in the order of their records. */
	for (uint64_t done = 0; done < load->n_flows; done += RING) {
		load->now_ns += UINT64_C(100000000000) / (load->n_flows / RING + 1);
		load_ring(load, INSIDE);
		for (uint32_t at = 0; at < RING; at += BURST)
			load_burst(load, at, INSIDE, pkt);
	}
	load->now_ns += UINT64_C(10000000000000);
	while (counters->sessions > 0) {
		const uint64_t target = counters->sessions > share ? counters->sessions - share : 0;
		const uint64_t before = counters->sessions, from = cycles();
		while (counters->sessions > target)
			nat_engine_tick(load->engine, load->now_ns);
		figure_add(figure, (double)(cycles() - from) / (double)(before - counters->sessions));
	}
}

/* ---- others in the way ---- */

static double at_share(const double *sorted, uint32_t n, double share)
{
	const uint32_t i = (uint32_t)(share * n);

	return sorted[i < n ? i : n - 1];
}

struct latency measure_latency(struct load *load, enum shape shape, uint32_t bursts)
{
	static double spent[1u << 16];
	static uint32_t record[BURST];
	struct nat_pkt pkt[BURST];
	uint32_t n = 0;
	const uint64_t chance = load->chance;

	if (shape ==
	    SHAPE_OVER) { /* one ring of flows is heard of after 200 s, the others are over after 350 */
		load->now_ns += UINT64_C(200000000000);
		load_ring(load, INSIDE);
		for (uint32_t at = 0; at < RING; at += BURST)
			load_burst(load, at, INSIDE, pkt);
		load->now_ns += UINT64_C(150000000000);
	}
	for (uint32_t burst = 0; n < bursts && n < 1u << 16; burst++) {
		const bool new = shape == SHAPE_NEW &&burst % 2;
		if (shape == SHAPE_OVER)
			load->chance = chance; /* the same flows again */
		if (burst % (RING / BURST) == 0)
			load_ring(load, INSIDE);
		const uint32_t at = burst % (RING / BURST) * BURST;
		for (uint32_t i = 0; i < BURST && new; i++)
			load_frame(load, at + i, load->n_flows + i, INSIDE, true);
		const uint64_t from = cycles();
		load_burst(load, at, INSIDE, pkt);
		spent[n++] = (double)(cycles() - from);
		for (uint32_t i = 0; i < BURST; i++)
			record[i] = pkt[i].session;
		for (uint32_t i = 0; i < BURST && new; i++)
			nat_engine_clear(load->engine, record[i]);
	}
	qsort(spent, n, sizeof(spent[0]), compare);
	return (struct latency){at_share(spent, n, 0.5), at_share(spent, n, 0.99), at_share(spent, n, 0.999)};
}

/* One ring of `known` packets in each burst, the rest new; what it took, in cycles per burst. */
static double flooded_ring(struct load *load, uint32_t known)
{
	static uint32_t record[RING];
	struct nat_pkt pkt[BURST];
	uint64_t spent = 0;

	load_ring(load, INSIDE);
	for (uint32_t i = 0; i < RING; i++)
		if (i % BURST >= known)
			load_frame(load, i, load->n_flows + i, INSIDE, true);
	const uint64_t from = cycles();
	for (uint32_t at = 0; at < RING; at += BURST) {
		load_burst(load, at, INSIDE, pkt);
		for (uint32_t i = 0; i < BURST; i++)
			record[at + i] = pkt[i].session;
	}
	spent = cycles() - from;
	for (uint32_t i = 0; i < RING; i++)
		if (i % BURST >= known && record[i] != NAT_NO_SESSION)
			nat_engine_clear(load->engine, record[i]);
	return (double)spent / (RING / BURST);
}

void measure_flood(struct load *load, uint32_t n_rings, double *alone, double *flooded)
{
	static struct rings all, none, half;

	all.n = none.n = half.n = 0;
	for (uint32_t ring = 0; ring < n_rings && ring < RINGS_MAX; ring++) {
		all.value[all.n++] = flooded_ring(load, BURST);
		none.value[none.n++] = flooded_ring(load, 0);
		half.value[half.n++] = flooded_ring(load, BURST / 2);
	}
	*alone = rings_median(&all) / BURST;
	*flooded = (rings_median(&half) - rings_median(&none) / 2) / (BURST / 2);
}
