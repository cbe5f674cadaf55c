/* dsnat-bench: measures the core and prints one JSON row per measurement. tests/bench runs it and draws the
 * table.
 *
 *     dsnat-bench [--sessions N[,N...]] [--windows N] [--rings N] [--seed N] [--plain-pages] [--only PART]
 *     PART: packets, new, stages, latency, flood, expiry, allocation
 *
 * Figures are cycles of the time stamp counter, per packet or, for new_session, allocation and expiry, per
 * session: minimum and median over the windows. Each window of inside_to_outside is followed by one of
 * outside_to_inside, and so on, so that a disturbance meets all alike. Sizes at which there is not enough
 * memory are left out, with a line on stderr. Huge pages must have been reserved (vm.nr_hugepages); without
 * them plain ones are used, which every row says ("pages").
 *
 * Exit status: 0 done, 1 a measurement could not be made, 2 usage.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/engine.h"
#include "bench.h"

struct options {
	uint64_t sessions[16];
	uint32_t n_sessions, windows, rings;
	uint64_t seed;
	enum pages pages;
	const char *only;
};

static const char *page_name(enum pages pages)
{
	return pages == PAGES_HUGE ? "2M" : "4k";
}

static const char *protocol_name(uint8_t protocol)
{
	return protocol == NAT_PROTO_TCP ? "tcp" : "udp";
}

static bool wanted(const struct options *options, const char *part)
{
	return !options->only || strcmp(options->only, part) == 0;
}

static void print_row(const char *what, const struct load *load, uint64_t sessions, struct figure *figure,
		      const char *more)
{
	const double least = figure_minimum(figure), median = figure_median(figure);

	printf("{\"what\": \"core.%s.%s\", \"sessions\": %llu, \"cycles_min\": %.1f, \"cycles_median\": "
	       "%.1f, "
	       "\"windows\": %u, \"pages\": \"%s\"%s}\n",
	       what, protocol_name(load->protocol), (unsigned long long)sessions, least, median, figure->n,
	       page_name(load->pages), more);
	fflush(stdout);
}

static void print_machine(void)
{
	printf("{\"what\": \"machine\", \"tsc_hz\": %.0f, \"core_per_tsc\": %.2f}\n", measure_tsc_hz(),
	       measure_core_per_tsc());
}

/* What an operator pays for max_sessions, all of it reserved at start: records, index, port sets; hosts
 * apart. */
static void print_memory(uint64_t sessions, const struct load *load)
{
	const double hosts = (double)load->engine->hosts.n_slots * sizeof(struct nat_host);
	const double bytes =
		(double)load->table_memory.used_bytes + (double)load->engine_memory.used_bytes - hosts;

	printf("{\"what\": \"core.memory\", \"sessions\": %llu, \"bytes_per_session\": %.1f, "
	       "\"record_bytes\": %zu, \"host_bytes\": %zu}\n",
	       (unsigned long long)sessions, bytes / (double)(sessions + NEW_MAX), sizeof(struct nat_session),
	       sizeof(struct nat_host));
}

static void print_stages(const struct options *options, struct load *load, uint8_t iface, bool new)
{
	static struct figure stage[STAGE_COUNT];

	memset(stage, 0, sizeof(stage));
	for (uint32_t window = 0; window < options->windows; window++) {
		double one[STAGE_COUNT];
		measure_stages(load, iface, new, options->rings, one);
		for (uint32_t i = 0; i < STAGE_COUNT; i++)
			figure_add(&stage[i], one[i]);
	}
	for (uint32_t i = 0; i < STAGE_COUNT; i++) {
		char what[64];
		snprintf(what, sizeof(what), "stage.%s.%s", stage_name[i],
			 new               ? "new_session"
			 : iface == INSIDE ? "inside_to_outside"
					   : "outside_to_inside");
		print_row(what, load, load->n_flows, &stage[i], "");
	}
}

static void print_latency(const struct options *options, struct load *load)
{
	static const char *const name[] = {"latency", "latency_beside_new", "latency_beside_expiry"};
	const double us = 1e6 / measure_tsc_hz();

	for (enum shape shape = SHAPE_KNOWN; shape <= SHAPE_OVER; shape++) {
		struct latency least = {0};
		for (uint32_t window = 0; window < (shape == SHAPE_OVER ? 1 : options->windows); window++) {
			const struct latency one =
				measure_latency(load, shape, shape == SHAPE_OVER ? 100 : 20000);
			if (window == 0 || one.p99 < least.p99)
				least = one;
		}
		printf("{\"what\": \"core.%s.%s\", \"sessions\": %llu, \"p50_us\": %.2f, \"p99_us\": %.2f, "
		       "\"p999_us\": %.2f, \"burst\": %u, \"windows\": %u}\n",
		       name[shape], protocol_name(load->protocol), (unsigned long long)load->n_flows,
		       least.p50 * us, least.p99 * us, least.p999 * us, BURST, options->windows);
	}
	fflush(stdout);
}

/* A difference of two figures has no minimum that means anything: medians, and the median of the windows'
 * ratios. */
static void print_flood(const struct options *options, struct load *load)
{
	static struct figure alone, flooded, slowed;

	alone.n = flooded.n = slowed.n = 0;
	for (uint32_t window = 0; window < options->windows; window++) {
		double one, other;
		measure_flood(load, options->rings, &one, &other);
		figure_add(&alone, one);
		figure_add(&flooded, other);
		figure_add(&slowed, 100 * (other / one - 1));
	}
	printf("{\"what\": \"core.syn_flood.%s\", \"sessions\": %llu, \"alone_median\": %.1f, "
	       "\"flooded_median\": "
	       "%.1f, \"slowed_percent\": %.1f, \"windows\": %u, \"pages\": \"%s\"}\n",
	       protocol_name(load->protocol), (unsigned long long)load->n_flows, figure_median(&alone),
	       figure_median(&flooded), figure_median(&slowed), slowed.n, page_name(load->pages));
	fflush(stdout);
}

static bool run_size(const struct options *options, uint8_t protocol, uint64_t sessions)
{
	static struct figure outbound, inbound, new, expiry;
	struct load load;

	if (!load_open(&load, protocol, sessions, 0, options->pages, options->seed))
		return false;
	if (protocol == NAT_PROTO_UDP && sessions >= 100000) /* below, the fixed part is all there is */
		print_memory(sessions, &load);
	outbound.n = inbound.n = new.n = expiry.n = 0;
	for (uint32_t window = 0; window < options->windows; window++) {
		if (wanted(options, "packets")) {
			figure_add(&outbound, measure_packets(&load, INSIDE, options->rings));
			figure_add(&inbound, measure_packets(&load, OUTSIDE, options->rings));
		}
		if (wanted(options, "new"))
			figure_add(&new, measure_new_sessions(&load, NEW_MAX));
	}
	if (outbound.n) {
		print_row("inside_to_outside", &load, sessions, &outbound, "");
		print_row("outside_to_inside", &load, sessions, &inbound, "");
	}
	if (new.n)
		print_row("new_session", &load, sessions, &new, "");
	if (wanted(options, "stages")) {
		print_stages(options, &load, INSIDE, false);
		print_stages(options, &load, OUTSIDE, false);
		print_stages(options, &load, INSIDE, true);
	}
	if (wanted(options, "flood") && protocol == NAT_PROTO_TCP)
		print_flood(options, &load);
	if (wanted(options, "latency") && protocol == NAT_PROTO_UDP)
		print_latency(options, &load);
	if (wanted(options, "expiry") && sessions >= 10000) {
		measure_expiry(&load, &expiry);
		print_row("expiry", &load, sessions, &expiry, "");
	}
	load_close(&load);
	return true;
}

/* One remote, towards which the ports of so many addresses run out: the cost of finding a free one must not. */
static bool run_allocation(const struct options *options, uint32_t addresses)
{
	static const uint32_t used_percent[] = {0, 50, 90, 99};

	for (uint32_t i = 0; i < sizeof(used_percent) / sizeof(used_percent[0]); i++) {
		static struct figure figure;
		const uint64_t used = (uint64_t)load_ports() * addresses * used_percent[i] / 100;
		struct load load;
		char more[64], what[32];

		if (!load_open(&load, NAT_PROTO_UDP, used, addresses, options->pages, options->seed))
			return false;
		figure.n = 0;
		for (uint32_t window = 0; window < options->windows; window++)
			figure_add(&figure, measure_new_sessions(&load, 512));
		snprintf(more, sizeof(more), ", \"used_percent\": %u", used_percent[i]);
		snprintf(what, sizeof(what), "allocation.on_%u", addresses);
		print_row(what, &load, used, &figure, more);
		load_close(&load);
	}
	return true;
}

static int usage(const char *what)
{
	fprintf(stderr,
		"dsnat-bench: %s\n"
		"usage: dsnat-bench [--sessions N[,N...]] [--windows 1-%u] [--rings N] [--seed N] "
		"[--plain-pages]\n"
		"                   [--only packets|new|stages|latency|flood|expiry|allocation]\n",
		what, WINDOWS_MAX);
	return 2;
}

static bool parse_sessions(struct options *options, char *text)
{
	options->n_sessions = 0;
	for (char *item = strtok(text, ","); item; item = strtok(NULL, ",")) {
		char *end;
		const unsigned long long n = strtoull(item, &end, 10);
		if (*end || n == 0 || n > UINT64_C(100000000) || options->n_sessions == 16)
			return false;
		options->sessions[options->n_sessions++] = n;
	}
	return options->n_sessions > 0;
}

int main(int argc, char **argv)
{
	static const struct option long_options[] = {{"sessions", required_argument, NULL, 's'},
						     {"windows", required_argument, NULL, 'w'},
						     {"rings", required_argument, NULL, 'p'},
						     {"seed", required_argument, NULL, 'r'},
						     {"plain-pages", no_argument, NULL, 'n'},
						     {"only", required_argument, NULL, 'o'},
						     {NULL, 0, NULL, 0}};
	struct options options = {.sessions = {1, 10000, 100000, 1000000, 4000000, 8000000},
				  .n_sessions = 6,
				  .windows = 9,
				  .rings = 128,
				  .seed = 1,
				  .pages = PAGES_HUGE};
	int status = 0;

	for (int option; (option = getopt_long(argc, argv, "", long_options, NULL)) != -1;)
		switch (option) {
		case 's':
			if (!parse_sessions(&options, optarg))
				return usage(
					"--sessions wants up to 16 numbers from 1 to 100000000, with commas");
			break;
		case 'w':
			options.windows = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'p':
			options.rings = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'r':
			options.seed = strtoull(optarg, NULL, 10);
			break;
		case 'n':
			options.pages = PAGES_PLAIN;
			break;
		case 'o':
			options.only = optarg;
			break;
		default:
			return usage("unknown option");
		}
	if (optind < argc)
		return usage("unknown argument");
	if (options.windows < 1 || options.windows > WINDOWS_MAX || options.rings < 1 ||
	    options.rings > RINGS_MAX)
		return usage("--windows or --rings is out of range");
	print_machine();
	for (uint32_t i = 0; i < options.n_sessions; i++)
		if (!run_size(&options, NAT_PROTO_UDP, options.sessions[i]) ||
		    !run_size(&options, NAT_PROTO_TCP, options.sessions[i])) {
			fprintf(stderr, "dsnat-bench: %llu sessions: not enough memory; left out\n",
				(unsigned long long)options.sessions[i]);
			status = 1;
		}
	if (wanted(&options, "allocation") &&
	    !(run_allocation(&options, 1) && run_allocation(&options, 16))) {
		fprintf(stderr, "dsnat-bench: allocation: not enough memory; left out\n");
		status = 1;
	}
	return status;
}
