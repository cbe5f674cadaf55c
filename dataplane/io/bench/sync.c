/* dsnat-sync: two engines in two processes, kept equal over loopback by the real ctl/sync.c, and what that
 * costs.
 *
 *	active  --127.0.0.1--\                        /--127.0.0.2--  standby
 *	                      relay 127.0.0.3 | .4, with --loss
 *
 * The active side begins sessions at a rate (--rate, two-way UDP, so that none is held back), or has
 * --fill of them before the standby appears (a full transfer). At the end both must say that they are in
 * sync, by their sums, and the standby must have as many sessions. With --restart the standby is killed in
 * the midst of it and comes back with an empty table.
 */
#include <arpa/inet.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/testbed.h"
#include "ctl/request.h"
#include "ctl/sync.h"

#define HOSTS    65536u
#define DEADLINE (120 * SECOND_NS)

struct side {
	struct testbed t;
	struct request_ops ops;
	struct sync *sync;
};

struct shared { /* what the two sides and the parent tell each other */
	struct sync_view view[2];
	_Atomic uint64_t sessions[2], cpu_us[2], sync_us[2], made, most_waiting, most_lag_ms;
	_Atomic bool all_made, stop;
	_Atomic uint64_t equal_ns, began_ns;
};

static struct {
	uint64_t fill, rate, seconds, max_sessions;
	uint32_t loss;
	uint16_t port;
	bool restart;
	char key[64];
} options = {.rate = 0, .seconds = 5, .max_sessions = 1 << 20, .port = 3781};
static struct shared *shared;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

/* Of the CPU: what others did meanwhile does not count. */
static uint64_t thread_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

static uint64_t cpu_us(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return (uint64_t)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000 +
	       (uint64_t)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

static bool on_worker(void *context, uint32_t worker,
		      void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument)
{
	struct side *side = context;

	(void)worker;
	run(side->t.e, now_ns(), argument);
	return true;
}

static void open_side(struct side *side, unsigned number)
{
	struct sync_settings settings = {
		.on = true,
		.listen_be = htonl(0x7f000001 + number),
		.peer_be = htonl(options.loss ? 0x7f000003 + number : 0x7f000002 - number),
		.listen_port_be = htons(options.port),
		.peer_port_be = htons(options.port),
		.hold_back_ms = 2000};
	char why[512];

	memset(side, 0, sizeof(*side));
	testbed_config(&side->t, 64, 1024, 65535, options.max_sessions);
	side->t.config.timeouts.udp_s = 3000;
	side->t.params.replicate = true;
	testbed_start(&side->t, now_ns());
	side->ops = (struct request_ops){.context = side, .n_workers = 1, .on_worker = on_worker};
	snprintf(settings.key, sizeof(settings.key), "%s", options.key);
	side->sync = sync_open(&settings, &side->ops, options.max_sessions, why, sizeof(why));
	if (!side->sync) {
		fprintf(stderr, "dsnat-sync: %s\n", why);
		_exit(2);
	}
}

static void make_sessions(struct side *side, uint64_t n)
{
	static uint64_t made;
	uint8_t bytes[28];

	for (uint64_t i = 0; i < n; i++, made++) {
		const uint32_t host = ADDRESS(100, 64, 0, 1) + (uint32_t)(made % HOSTS);
		const uint32_t remote = ADDRESS(198, 51, 100, 1) + (uint32_t)(made / HOSTS % 200);
		const uint16_t port = (uint16_t)(2000 + made / HOSTS / 200);

		testbed_udp(&side->t, bytes, 0, host, port, remote, 443, now_ns());
		const struct nat_pkt pkt =
			testbed_udp(&side->t, bytes, 1, remote, 443, nat_read32(bytes + NAT_IP_SOURCE),
				    nat_read16(bytes + 20), now_ns());
		if (pkt.verdict != NAT_FORWARD)
			_exit(3);
	}
	shared->made = made;
}

/* One side's life: sync when there is something to do, and sessions by the clock. */
static void run_side(unsigned number)
{
	struct side side;
	uint64_t sync_ns = 0;

	open_side(&side, number);
	if (number == 0)
		make_sessions(&side, options.fill);
	const uint64_t began_ns = now_ns(), base = shared->made;
	if (number == 0)
		shared->began_ns = began_ns;
	const uint64_t cpu_before = cpu_us();
	while (!shared->stop) {
		struct pollfd fd = {.fd = sync_fd(side.sync), .events = POLLIN};
		const uint64_t now = now_ns();
		const bool making = number == 0 && options.rate > 0 && !shared->all_made;

		if (making) {
			const uint64_t all = options.rate * options.seconds;
			uint64_t due = (uint64_t)((double)(now - began_ns) / 1e9 * (double)options.rate);
			due = due > all ? all : due;
			const uint64_t missing = due - (shared->made - base);
			make_sessions(&side, missing > 256 ? 256 : missing);
			shared->all_made = shared->made - base == all;
		} else if (number == 0) {
			shared->all_made = true;
		}
		if (poll(&fd, 1, making ? 0 : 1) > 0) {
			const uint64_t before = thread_ns();
			sync_serve(side.sync);
			sync_ns += thread_ns() - before;
		}
		nat_engine_tick(side.t.e, now_ns());
		sync_look(side.sync, &shared->view[number]);
		shared->sessions[number] = nat_engine_counters(side.t.e)->sessions;
		shared->cpu_us[number] = cpu_us() - cpu_before;
		shared->sync_us[number] = sync_ns / 1000;
		const struct sync_view *view = &shared->view[number];
		if (number == 0 && view->waiting > shared->most_waiting)
			shared->most_waiting = view->waiting;
		if (number == 0 && view->lag_ms > shared->most_lag_ms)
			shared->most_lag_ms = view->lag_ms;
		/* not the first answer, but one to sums that were made when all was told */
		if (number == 0 && !shared->equal_ns && shared->all_made && view->in_sync &&
		    view->waiting == 0 && view->on_the_way == 0 && shared->sessions[1] == shared->sessions[0])
			shared->equal_ns = now_ns();
	}
	_exit(0);
}

static int open_end(uint32_t address)
{
	const struct sockaddr_in here = {
		.sin_family = AF_INET, .sin_addr.s_addr = htonl(address), .sin_port = htons(options.port)};
	const int fd = socket(AF_INET, SOCK_DGRAM, 0);
	const int size = 8 << 20;

	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	if (bind(fd, (const struct sockaddr *)&here, sizeof(here))) {
		perror("dsnat-sync: bind");
		_exit(2);
	}
	return fd;
}

/* Passes datagrams on, but for `loss` of a hundred. */
static void run_relay(void)
{
	struct pollfd end[2] = {{.fd = open_end(0x7f000003), .events = POLLIN},
				{.fd = open_end(0x7f000004), .events = POLLIN}};
	uint64_t random = 88172645463325252u;
	uint8_t bytes[2048];

	while (!shared->stop && poll(end, 2, 100) >= 0)
		for (unsigned i = 0; i < 2; i++) {
			const struct sockaddr_in to = {.sin_family = AF_INET,
						       .sin_addr.s_addr = htonl(0x7f000002 - i),
						       .sin_port = htons(options.port)};
			if (!(end[i].revents & POLLIN))
				continue;
			const ssize_t n = recv(end[i].fd, bytes, sizeof(bytes), 0);
			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			if (n > 0 && random % 100 >= options.loss)
				(void)!sendto(end[1 - i].fd, bytes, (size_t)n, 0,
					      (const struct sockaddr *)&to, sizeof(to));
		}
	_exit(0);
}

static pid_t start(unsigned number)
{
	const pid_t child = fork();

	if (child == 0) {
		if (number < 2)
			run_side(number);
		run_relay();
	}
	return child;
}

static bool wait_for(bool (*reached)(void), const pid_t *child)
{
	const uint64_t until = now_ns() + DEADLINE;

	while (!reached()) {
		siginfo_t info = {0};
		if (now_ns() > until || waitid(P_PID, (id_t)child[0], &info, WEXITED | WNOHANG | WNOWAIT) ||
		    info.si_pid != 0)
			return false;
		usleep(2000);
	}
	return true;
}

static bool is_equal(void)
{
	return shared->equal_ns != 0;
}

/* Every range was compared once more since, and none differed. */
static bool is_compared(void)
{
	return shared->view[0].in_sync && shared->view[0].round_ms != UINT64_MAX &&
	       now_ns() - shared->view[0].round_ms * 1000000 > shared->equal_ns;
}

static bool is_under_way(void)
{
	return shared->view[1].heard > 0;
}

static bool read_options(int argc, char **argv)
{
	static const struct option known[] = {
		{"fill", required_argument, NULL, 'f'},    {"rate", required_argument, NULL, 'r'},
		{"seconds", required_argument, NULL, 's'}, {"sessions", required_argument, NULL, 'm'},
		{"loss", required_argument, NULL, 'l'},    {"port", required_argument, NULL, 'p'},
		{"restart", no_argument, NULL, 'k'},       {0}};
	int option;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
		const uint64_t value = optarg ? strtoull(optarg, NULL, 0) : 0;

		switch (option) {
		case 'f':
			options.fill = value;
			break;
		case 'r':
			options.rate = value;
			break;
		case 's':
			options.seconds = value;
			break;
		case 'm':
			options.max_sessions = value;
			break;
		case 'l':
			options.loss = (uint32_t)value;
			break;
		case 'p':
			options.port = (uint16_t)value;
			break;
		case 'k':
			options.restart = true;
			break;
		default:
			return false;
		}
	}
	return true;
}

static bool make_key(void)
{
	strcpy(options.key, "/tmp/dsnat-sync-XXXXXX");
	const int fd = mkstemp(options.key);
	static const char key[] = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n";

	if (fd < 0)
		return false;
	const bool well = write(fd, key, sizeof(key) - 1) == (ssize_t)sizeof(key) - 1;
	close(fd);
	return well;
}

static void stop(pid_t *child)
{
	shared->stop = true;
	for (unsigned i = 0; i < 3; i++)
		if (child[i] > 0)
			waitpid(child[i], NULL, 0);
	unlink(options.key);
}

static int report(bool well)
{
	const struct sync_view *a = &shared->view[0], *b = &shared->view[1];
	const double took_s = (double)(shared->equal_ns - shared->began_ns) / 1e9;

	printf("{\"well\":%s,\"sessions\":%lu,\"standby\":%lu,\"equal_after_s\":%.3f,\"told\":%lu,\"per_s\":%"
	       ".0f,"
	       "\"bytes_per_session\":%.1f,\"again\":%lu,\"most_waiting\":%lu,\"most_lag_ms\":%lu,\"differ\":"
	       "%u,"
	       "\"repaired\":%lu,\"conflicts\":%lu,\"active_sync_cpu_s\":%.2f,\"standby_cpu_s\":%.2f}\n",
	       well ? "true" : "false", shared->sessions[0], shared->sessions[1], took_s, a->told,
	       (double)a->told / took_s, (double)a->bytes_out / (double)(a->told ? a->told : 1), a->again,
	       shared->most_waiting, shared->most_lag_ms, a->differ, a->repaired, b->conflicts,
	       (double)shared->sync_us[0] / 1e6, (double)shared->cpu_us[1] / 1e6);
	return well ? 0 : 1;
}

int main(int argc, char **argv)
{
	pid_t child[3] = {0};

	if (!read_options(argc, argv) || !make_key()) {
		fputs("usage: dsnat-sync [--fill N] [--rate N --seconds N] [--loss PERCENT] [--restart] "
		      "[--sessions N] "
		      "[--port N]\n",
		      stderr);
		return 2;
	}
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		return 2;
	if (options.loss)
		child[2] = start(2);
	child[0] = start(0);
	while (shared->began_ns == 0 && waitpid(child[0], NULL, WNOHANG) == 0)
		usleep(1000); /* it has its first sessions */
	shared->began_ns = now_ns();
	child[1] = start(1);
	if (options.restart && wait_for(is_under_way, child)) {
		kill(child[1], SIGKILL);
		waitpid(child[1], NULL, 0);
		memset(&shared->view[1], 0, sizeof(shared->view[1]));
		shared->sessions[1] = 0;
		shared->equal_ns = 0;
		child[1] = start(1);
	}
	const bool well = wait_for(is_equal, child) && wait_for(is_compared, child) &&
			  shared->sessions[0] == shared->sessions[1];
	const int status = report(well);
	stop(child);
	return status;
}
