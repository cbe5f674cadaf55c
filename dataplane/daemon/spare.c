/* A second process, prepared, that goes on when this one dies (`engine.spare: on`): it has done all that
 * takes long and disturbs nobody, and waits.
 *
 *	PREPARING  has read the configuration; starts DPDK without a device, gets its memory, maps the sessions
 *	WAITING    may: end.  may not: touch a device, the sessions, or a file of the running process
 *	HEIR       the other one is dead: opens the devices, adopts the sessions, goes on as any dsnatd. When it is ready it
 *	           starts the next spare
 *
 * How it hears of the death is what makes it fast. The kernel needs a tenth of a second to end a process
 * that has packet sockets and memory, and a parent, or a file lock, hears of it after that. But robust
 * mutexes of a dying thread are given up before anything else, when that thread can no longer run in user
 * mode. So each thread that writes to the sessions holds one, in memory of both processes (struct will),
 * and who gets all of them knows that nobody writes any more. One that was unlocked in good order says
 * that dsnatd was stopped: there is nothing to inherit.
 *
 * Three descriptors are handed down, so that at no moment they are nobody's: the will; the session file,
 * whose lock belongs to the open file and keeps a third dsnatd away; the control socket, whose clients
 * wait in its backlog meanwhile. What the dead process may still have open (ports of UDP, netfilter
 * queues, PCI devices) is waited for by its pidfd.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/pidfd.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../io/dpdk/eal.h"
#include "daemon.h"

#define FIRST_S     2u  /* after the start: the first packets come first */
#define AGAIN_S     10u /* after a spare that ended by itself; each time twice as long */
#define AGAIN_MAX_S 640u
#define LOOK_MS     100u /* how often one that waits looks for signals */
#define END_MS      10000
#define MAIN_HOLDS  0u /* worker w holds the one behind it, w + 1 */

enum inherited { WILL_FD = 3, SESSIONS_FD, LISTENER_FD, FIRST_OTHER_FD };

struct will {
	uint32_t n;
	pthread_mutex_t held[1 + NAT_WORKERS_MAX];
};

static struct will *map_will(int fd)
{
	void *at = mmap(NULL, sizeof(struct will), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return at == MAP_FAILED ? NULL : at;
}

/* ---- of the process that may die ---- */

bool daemon_make_will(struct daemon *d)
{
	struct spare *s = &d->spare;
	pthread_mutexattr_t kind;

	s->will_fd = memfd_create("dsnat-will", MFD_CLOEXEC);
	if (s->will_fd < 0 || ftruncate(s->will_fd, sizeof(struct will)) || !(s->will = map_will(s->will_fd)))
		return false;
	s->will->n = 1 + d->n_workers;
	pthread_mutexattr_init(&kind);
	pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
	for (uint32_t i = 0; i < s->will->n; i++)
		pthread_mutex_init(&s->will->held[i], &kind);
	pthread_mutexattr_destroy(&kind);
	pthread_mutex_lock(&s->will->held[MAIN_HOLDS]);
	s->next_ns = thread_clock_ns() + FIRST_S * 1000000000ull;
	return true;
}

int daemon_run_worker(void *worker)
{
	struct worker *w = worker;
	pthread_mutex_t *held = &w->will->held[1 + w->thread.index];
	int status;

	pthread_mutex_lock(held);
	status = worker_run(w);
	pthread_mutex_unlock(held);
	return status;
}

/* Its descriptors at the numbers where it looks for them, and no other: DPDK's own would keep devices open. */
static int spawn(struct daemon *d, char **argv, pid_t *pid)
{
	const int from[] = {d->spare.will_fd, d->sessions.fd, socket_listener(d->socket)};
	int copy[3], status = 0;
	posix_spawn_file_actions_t files;
	posix_spawnattr_t attributes;
	sigset_t none;

	sigemptyset(&none);
	posix_spawn_file_actions_init(&files);
	posix_spawnattr_init(&attributes);
	posix_spawnattr_setsigmask(&attributes, &none);
	posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
	for (int i = 0; i < 3; i++) { /* first out of the way of those that they will be */
		copy[i] = fcntl(from[i], F_DUPFD_CLOEXEC, FIRST_OTHER_FD);
		if (copy[i] < 0)
			status = errno;
		else
			posix_spawn_file_actions_adddup2(&files, copy[i], WILL_FD + i);
	}
	posix_spawn_file_actions_addclosefrom_np(&files, FIRST_OTHER_FD);
	if (!status)
		status = posix_spawn(pid, "/proc/self/exe", &files, &attributes, argv, environ);
	for (int i = 0; i < 3; i++)
		if (copy[i] >= 0)
			close(copy[i]);
	posix_spawn_file_actions_destroy(&files);
	posix_spawnattr_destroy(&attributes);
	return status;
}

static void start_spare(struct daemon *d)
{
	char option[32], **argv;
	int n = 0, status;

	while (d->options.argv[n])
		n++;
	if (!(argv = calloc((size_t)n + 2, sizeof *argv)))
		return;
	n = 0;
	for (char **a = d->options.argv; *a; a++) /* an heir was a spare itself */
		if (strncmp(*a, "--spare=", strlen("--spare=")) != 0)
			argv[n++] = *a;
	snprintf(option, sizeof option, "--spare=%d", getpid());
	argv[n] = option;
	if ((status = spawn(d, argv, &d->spare.pid))) {
		d->spare.pid = 0;
		fprintf(stderr,
			"dsnatd: no second process can be prepared: %s; a restart takes longer without\n",
			strerror(status));
	}
	free(argv);
}

/* An heir goes by the file. One that the running process would not follow is for a restart, not for a death. */
static bool is_file_ours(struct daemon *d)
{
	struct config *file = config_load(d->path, d->ops->config_flags);
	char why[256];
	bool ours;

	if (!file)
		return false;
	ours = !file->n_errors && config_can_follow(d->plan->config, file, why, sizeof why);
	config_free(file);
	if (!ours)
		fprintf(stderr,
			"dsnatd: %s cannot be followed without a restart; no process is prepared until the "
			"next reload\n",
			d->path);
	return ours;
}

void daemon_follow_spare(struct daemon *d)
{
	struct spare *s = &d->spare;
	const uint64_t now_ns = thread_clock_ns();
	const bool wanted = d->plan->config->spare && s->will;
	int status;

	if (s->pid && waitpid(s->pid, &status, WNOHANG) == s->pid) {
		s->refused = WIFEXITED(status) && WEXITSTATUS(status) == INVALID;
		fprintf(stderr, "dsnatd: the prepared process %d has ended%s\n", s->pid,
			s->refused ? "; the next one is prepared after a reload"
				   : "; the next one is prepared");
		s->pid = 0;
		s->again_s = s->again_s == 0                ? AGAIN_S
			     : 2 * s->again_s > AGAIN_MAX_S ? AGAIN_MAX_S
							    : 2 * s->again_s;
		s->next_ns = now_ns + s->again_s * 1000000000ull;
	}
	if (!wanted)
		daemon_end_spare(d);
	else if (!s->pid && !s->refused && now_ns >= s->next_ns) {
		s->next_ns = now_ns + AGAIN_S * 1000000000ull;
		if (is_file_ours(d))
			start_spare(d);
		else
			s->refused = true;
	}
}

/* It has nothing to clean up. */
void daemon_end_spare(struct daemon *d)
{
	struct spare *s = &d->spare;

	if (s->pid) {
		kill(s->pid, SIGKILL);
		(void)waitpid(s->pid, NULL, 0);
	}
	s->pid = 0;
	s->refused = false;
	s->next_ns = s->again_s = 0;
}

void daemon_drop_will(struct daemon *d)
{
	daemon_end_spare(d);
	if (d->spare.will) {
		pthread_mutex_unlock(&d->spare.will->held[MAIN_HOLDS]);
		munmap(d->spare.will, sizeof(struct will));
		close(d->spare.will_fd);
	}
	d->spare.will = NULL;
}

/* ---- of the process that waits ---- */

static enum status prepare(struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	struct eal_options options = {.no_huge = d->options.no_huge || !eal_has_hugepages(),
				      .n_workers = d->n_workers,
				      .memory_mb = ports_memory_mb(config, d->n_workers),
				      .without_devices = true};
	char why[512];

	d->spare.predecessor_fd = pidfd_open(d->options.spare_of, 0);
	if (getppid() != d->options.spare_of &&
	    d->spare.predecessor_fd >= 0) { /* it is dead, this may be another */
		close(d->spare.predecessor_fd);
		d->spare.predecessor_fd = -1;
	}
	if (memory_inherit(&d->sessions, SESSIONS_FD, nat_table_size(config->max_sessions), why,
			   sizeof why)) {
		daemon_say(why);
		return INVALID;
	}
	d->table =
		d->sessions
			.base; /* the running process has made it: how large it is says how large engines are */
	if (eal_start(config, &options, why, sizeof why) ||
	    ports_prepare(&d->ports, config, d->n_workers, why, sizeof why))
		return daemon_fail(NO_DEVICE, why);
	d->eal = true;
	for (uint32_t w = 0; w < d->n_workers; w++)
		if (memory_plain(&d->engine_memory[w], daemon_engine_bytes(d, w), d->options.no_huge))
			return daemon_fail(NO_MEMORY, "no memory to prepare a second process");
	return STOPPED;
}

/* True: its owner died. */
static bool outlive(struct daemon *d, pthread_mutex_t *held)
{
	for (;;) {
		struct signalfd_siginfo info;
		struct timespec until;
		int status;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += LOOK_MS * 1000000l;
		until.tv_sec += until.tv_nsec / 1000000000l;
		until.tv_nsec %= 1000000000l;
		status = pthread_mutex_clocklock(held, CLOCK_MONOTONIC, &until);
		if (status == 0 || status == EOWNERDEAD)
			pthread_mutex_unlock(held); /* nobody else asks for it */
		if (status != ETIMEDOUT)
			return status == EOWNERDEAD;
		while (read(d->signal_fd, &info, sizeof info) == (ssize_t)sizeof info)
			if (info.ssi_signo != SIGHUP)
				return false;
	}
}

void daemon_outwait_predecessor(struct daemon *d)
{
	struct pollfd gone = {.fd = d->spare.predecessor_fd, .events = POLLIN};

	if (gone.fd < 0)
		return;
	if (poll(&gone, 1, END_MS) != 1)
		daemon_say("the dead process does not go away");
	close(gone.fd);
	d->spare.predecessor_fd = -1;
}

enum status daemon_wait_as_spare(struct daemon *d)
{
	struct will *will = map_will(WILL_FD);
	enum status status = will ? prepare(d) : daemon_fail(FAILED, "--spare is for dsnatd's own use");
	bool inherits = true;

	if (status)
		return status;
	fprintf(stderr, "dsnatd: process %d is prepared to go on for process %d\n", getpid(),
		d->options.spare_of);
	for (uint32_t i = 0; i < will->n && inherits; i++)
		inherits = outlive(d, &will->held[i]);
	munmap(will, sizeof *will);
	close(WILL_FD);
	if (!inherits)
		return STOPPED;
	d->listener = LISTENER_FD;
	d->is_heir = true;
	d->started_ns = thread_clock_ns();
	fprintf(stderr, "dsnatd: process %d has died; process %d goes on\n", d->options.spare_of, getpid());
	return STOPPED;
}
