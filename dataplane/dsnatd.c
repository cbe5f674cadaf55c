/* dsnatd: the one daemon. It reads the configuration, starts the shells that the configuration asks for, and
 * waits.
 *
 *     main thread (control)                        workers                         twin thread
 *     signals, control socket, netlink             io/dpdk/worker.c or,            io/dpdk/twin.c
 *     reload, links, announcements, watchdog       without DPDK ports,             frames to and from
 *                                                  io/nfqueue/queue.c:             the kernel
 *                                                  one engine each
 *
 * Without an interface on the DPDK path neither EAL nor hugepages are touched. With interfaces on both,
 * worker 0 serves the netfilter queue besides its ports.
 *
 * The control thread hands things to workers by swapping a pointer and raising `generation`; what was
 * swapped out goes on the list of `retired` objects and is freed when every worker has reached that
 * generation (io/thread.h).
 *
 *     dsnatd.c          command line
 *     daemon/life.c     start and stop
 *     daemon/loop.c     the control thread
 *     daemon/spare.c    a second process, prepared to go on
 *     daemon/plan.c     what runs now, and how it is swapped
 *     daemon/vrrp.c     what VRRP is told, and what of it is believed
 *     daemon/answer.c   requests of the control socket
 *
 * Exit status (also in --help): 0 stopped on request; 1 failed while running or at start; 2 the
 * configuration or the command line is wrong; 3 a device cannot be used; 4 not enough memory; 5 another
 * dsnatd has our socket or sessions.
 */
#include <getopt.h>
#include <rte_version.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ctl/facts.h"
#include "daemon/daemon.h"
#include "io/dpdk/degrade.h"
#include "version.h"

#define DEFAULT_CONFIG "/etc/dsnat/dsnatd.yaml"

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

static enum status check(const char *path, bool facts)
{
	struct config *config = config_load(path, 0);
	enum status status;

	if (!config)
		return daemon_fail(NO_MEMORY, "no memory to read the configuration");
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
	int n = 0;

	if (!again)
		return;
	for (int i = 0; i < argc; i++) /* an heir was a spare, and is not any more */
		if (strncmp(argv[i], "--spare=", strlen("--spare=")) != 0)
			again[n++] = argv[i];
	again[n] = (char[]){"--degraded"};
	daemon_say("DEGRADED: going on without DPDK; the kernel keeps all ports, which is slower");
	execv("/proc/self/exe", again);
	free(again);
}

int main(int argc, char **argv)
{
	enum { CONFIG = 1, SOCKET, SESSIONS, NO_HUGE, DEGRADED, SPARE, CHECK, FACTS, VERSION, JSON, HELP };
	static const struct option known[] = {
		{"config", required_argument, NULL, CONFIG},
		{"socket", required_argument, NULL, SOCKET},
		{"sessions", required_argument, NULL, SESSIONS},
		{"no-huge", no_argument, NULL, NO_HUGE},
		{"degraded", no_argument, NULL, DEGRADED},
		{"spare", required_argument, NULL, SPARE}, /* only by dsnatd itself: daemon/spare.c */
		{"check", required_argument, NULL, CHECK},
		{"facts", required_argument, NULL, FACTS},
		{"version", no_argument, NULL, VERSION},
		{"json", no_argument, NULL, JSON},
		{"help", no_argument, NULL, HELP},
		{0},
	};
	struct daemon d = {.listener = -1,
			   .spare = {.predecessor_fd = -1},
			   .options = {.argv = argv,
				       .config = DEFAULT_CONFIG,
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
		case SPARE:
			d.options.spare_of = (pid_t)atol(optarg);
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
		return daemon_fail(NO_MEMORY, "no memory to read the configuration");
	config_print(config, stderr);
	if (config->n_errors) {
		config_free(config);
		return INVALID;
	}
	d.path = d.options.config;
	if (!(d.plan = daemon_plan_new(config, NULL))) {
		config_free(config);
		return daemon_fail(NO_MEMORY, "no memory for the configuration");
	}
	if (d.options.degraded && degrade_interfaces(&config->nat, why, sizeof why))
		return daemon_fail(NO_DEVICE, why);
	may_degrade = config->nat.may_degrade && !d.options.degraded;
	status = daemon_serve(&d);
	if (status == NO_DEVICE && may_degrade && (!d.options.spare_of || d.is_heir))
		start_degraded(argc, argv);
	return status;
}
