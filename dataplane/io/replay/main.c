/* dsnat-replay: the test bench. Packets from lines or captures through the real core, time from the input.
 *
 *	dsnat-replay --config FILE --seed N --stdio
 *	dsnat-replay --config FILE --seed N --read inside0=in.pcap --write outside0=out.pcap
 *
 * It is a shell like io/dpdk, with nothing behind it: no thread, no clock, no kernel. Everything the
 * engine may ask of the world is answered from the command line and the input, so the same seed and the
 * same input give the same output, byte for byte.
 *
 *	main.c     arguments, and what is read and written
 *	bench.c    engines, packets and what became of them
 *	world.c    routes and own addresses
 *	lines.c    --stdio
 *	capture.c  --read and --write
 *
 * Exit status: 0 done, 1 failed (a file cannot be read or written, or the accounting equation is broken),
 * 2 wrong usage or configuration.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "replay.h"
#include "version.h"

static const char usage[] =
	"usage: dsnat-replay --config FILE [--seed N] [--workers N] --stdio\n"
	"       dsnat-replay --config FILE [--seed N] [--workers N] --read IFACE=FILE... --write "
	"IFACE=FILE...\n"
	"       dsnat-replay --check FILE\n"
	"\n"
	"  --config FILE         dsnatd.yaml; its interfaces need no device\n"
	"  --seed N              ports are drawn from it; the same seed gives the same output (default 1)\n"
	"  --workers N           engines, 1 to 64 (default: engine.workers, or 1)\n"
	"  --spread HOW          to which of them a packet comes: \"rss\", as a NIC would do (default), "
	"\"turns\" or "
	"\"one\"\n"
	"  --stdio               answer each line of standard input with one line\n"
	"  --socket PATH         also answer on a control socket, for dsnatctl\n"
	"  --read IFACE=FILE     packets that come in on an interface; captures are merged by time\n"
	"  --write IFACE=FILE    packets that leave by it (raw IP, nanoseconds)\n"
	"  --route PREFIX=WHERE  WHERE is an interface, \"none\" or \"prohibit\"; the longest prefix wins\n"
	"  --address IFACE=ADDR  an address of the gateway itself\n"
	"  --log FILE            write the NAT log there: what the first collector under logging would get\n"
	"  --check FILE          judge a configuration as dsnatd would, and end\n"
	"  --version             print the version, and end\n";

enum {
	OPT_CONFIG = 1,
	OPT_SEED,
	OPT_WORKERS,
	OPT_SPREAD,
	OPT_STDIO,
	OPT_SOCKET,
	OPT_READ,
	OPT_WRITE,
	OPT_ROUTE,
	OPT_ADDRESS,
	OPT_LOG,
	OPT_CHECK,
	OPT_VERSION,
	OPT_HELP
};

static const struct option options[] = {
	{"config", required_argument, NULL, OPT_CONFIG},
	{"seed", required_argument, NULL, OPT_SEED},
	{"workers", required_argument, NULL, OPT_WORKERS},
	{"spread", required_argument, NULL, OPT_SPREAD},
	{"stdio", no_argument, NULL, OPT_STDIO},
	{"socket", required_argument, NULL, OPT_SOCKET},
	{"read", required_argument, NULL, OPT_READ},
	{"write", required_argument, NULL, OPT_WRITE},
	{"route", required_argument, NULL, OPT_ROUTE},
	{"address", required_argument, NULL, OPT_ADDRESS},
	{"log", required_argument, NULL, OPT_LOG},
	{"check", required_argument, NULL, OPT_CHECK},
	{"version", no_argument, NULL, OPT_VERSION},
	{"help", no_argument, NULL, OPT_HELP},
	{NULL, 0, NULL, 0},
};

/* Options that name an interface can only be read when the configuration is known: they are kept as text. */
struct arguments {
	const char *config;
	uint64_t seed;
	uint32_t workers; /* 0: as the configuration says */
	enum spread spread;
	bool stdio;
	const char *socket, *log;
	const char **read, **write, **route, **address; /* argc long each */
	int n_read, n_write, n_route, n_address;
};

static int fail_usage(const char *what, const char *value)
{
	fprintf(stderr, "dsnat-replay: %s%s%s; see dsnat-replay --help\n", what, value ? ": " : "",
		value ? value : "");
	return CONFIG_EXIT_INVALID;
}

static bool parse_number(const char *text, uint64_t least, uint64_t most, uint64_t *out)
{
	char *end;

	if (*text < '0' || *text > '9')
		return false;
	*out = strtoull(text, &end, 0);
	return !*end && *out >= least && *out <= most;
}

static bool parse_spread(const char *text, enum spread *out)
{
	static const char *const names[] = {
		[SPREAD_RSS] = "rss", [SPREAD_TURNS] = "turns", [SPREAD_ONE] = "one"};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (!strcmp(text, names[i])) {
			*out = (enum spread)i;
			return true;
		}
	return false;
}

static int check(const char *path)
{
	struct config *config = config_load(path, 0);
	int status = config->n_errors ? CONFIG_EXIT_INVALID : 0;

	config_print(config, stderr);
	config_free(config);
	return status;
}

/* -1: go on; else the exit status. */
static int parse(int argc, char **argv, struct arguments *a)
{
	uint64_t number;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case OPT_CONFIG:
			a->config = optarg;
			break;
		case OPT_SEED:
			if (!parse_number(optarg, 0, UINT64_MAX, &a->seed))
				return fail_usage("--seed takes a number", optarg);
			break;
		case OPT_WORKERS:
			if (!parse_number(optarg, 1, NAT_WORKERS_MAX, &number))
				return fail_usage("--workers takes a number from 1 to 64", optarg);
			a->workers = (uint32_t)number;
			break;
		case OPT_SPREAD:
			if (!parse_spread(optarg, &a->spread))
				return fail_usage("--spread takes rss, turns or one", optarg);
			break;
		case OPT_STDIO:
			a->stdio = true;
			break;
		case OPT_SOCKET:
			a->socket = optarg;
			break;
		case OPT_READ:
			a->read[a->n_read++] = optarg;
			break;
		case OPT_WRITE:
			a->write[a->n_write++] = optarg;
			break;
		case OPT_ROUTE:
			a->route[a->n_route++] = optarg;
			break;
		case OPT_ADDRESS:
			a->address[a->n_address++] = optarg;
			break;
		case OPT_LOG:
			a->log = optarg;
			break;
		case OPT_CHECK:
			return check(optarg);
		case OPT_VERSION:
			puts("dsnat-replay " NAT_VERSION);
			return 0;
		case OPT_HELP:
			fputs(usage, stdout);
			return 0;
		default:
			return CONFIG_EXIT_INVALID; /* getopt_long has said why */
		}
	}
	if (optind < argc)
		return fail_usage("what is this argument for", argv[optind]);
	if (!a->config)
		return fail_usage("--config is missing", NULL);
	if (a->stdio == (a->n_read > 0))
		return fail_usage("give either --stdio or --read", NULL);
	if (a->stdio && a->n_write)
		return fail_usage("--write goes with --read; --stdio answers with the packets", NULL);
	if (!a->stdio && a->socket)
		return fail_usage("--socket goes with --stdio", NULL);
	return -1;
}

static int run_lines(const struct arguments *a, struct bench *bench)
{
	struct socket_server *server = NULL;
	char why[256];
	int status;

	if (a->socket) {
		server = socket_open(a->socket, -1, bench_ops(bench), why, sizeof(why));
		if (!server) {
			fprintf(stderr, "dsnat-replay: %s\n", why);
			return 1;
		}
	}
	status = lines_run(bench, server, stdout);
	if (server)
		socket_close(server);
	return status;
}

static FILE *open_log(const struct arguments *a, struct bench *bench)
{
	FILE *to = fopen(a->log, "w");

	if (!to) {
		fprintf(stderr, "dsnat-replay: %s cannot be written: %s\n", a->log, strerror(errno));
		return NULL;
	}
	if (bench_log_to(bench, to))
		return to;
	fputs("dsnat-replay: --log needs a collector; add one under logging\n", stderr);
	fclose(to);
	return NULL;
}

static int run(const struct arguments *a, struct config *config)
{
	const uint32_t configured = config->nat.workers ? config->nat.workers : 1;
	struct bench *bench = bench_open(config, a->seed, a->workers ? a->workers : configured, a->spread);
	FILE *nat_log = NULL;
	int status = 0;

	if (!bench) {
		fprintf(stderr,
			"dsnat-replay: there is no memory for %" PRIu64
			" sessions; lower engine.max_sessions\n",
			config->nat.max_sessions);
		config_free(config);
		return 1;
	}
	for (int i = 0; i < a->n_route && !status; i++)
		if (!world_add_route(bench_world(bench), a->route[i]))
			status = fail_usage("--route takes PREFIX=IFACE, PREFIX=none or PREFIX=prohibit",
					    a->route[i]);
	for (int i = 0; i < a->n_address && !status; i++)
		if (!world_add_address(bench_world(bench), a->address[i]))
			status = fail_usage("--address takes IFACE=ADDRESS", a->address[i]);
	if (!status && a->log && !(nat_log = open_log(a, bench)))
		status = CONFIG_EXIT_INVALID;
	if (!status) {
		bench_follow_addresses(bench);
		status = a->stdio ? run_lines(a, bench)
				  : capture_run(bench, a->read, a->n_read, a->write, a->n_write, stdout);
	}
	if (nat_log && (!bench_log_end(bench) || fclose(nat_log))) {
		fprintf(stderr, "dsnat-replay: the NAT log in %s is not complete\n", a->log);
		status = 1;
	}
	bench_close(bench);
	return status;
}

int main(int argc, char **argv)
{
	struct arguments a = {.seed = 1};
	const char **texts = calloc((size_t)argc * 4, sizeof(*texts));
	struct config *config;
	int status;

	if (!texts)
		return 1;
	a.read = texts;
	a.write = texts + argc;
	a.route = texts + 2 * argc;
	a.address = texts + 3 * argc;
	status = parse(argc, argv, &a);
	if (status < 0) {
		config = config_load(a.config, CONFIG_WITHOUT_DEVICES);
		config_print(config, stderr);
		if (config->n_errors) {
			config_free(config);
			status = CONFIG_EXIT_INVALID;
		} else {
			status = run(&a, config);
		}
	}
	free(texts);
	return status;
}
