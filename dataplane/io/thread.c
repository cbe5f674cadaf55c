/* The slow side of a worker's thread: jobs, plans, sleep. thread.h has the theory. */
#include "thread.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

uint64_t thread_clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int thread_init(struct thread *t, uint32_t index, const _Atomic uint64_t *generation, const struct plan *plan,
		struct route *route)
{
	memset(t, 0, sizeof *t);
	t->index = index;
	t->core = -1;
	t->generation = generation;
	t->plan = plan;
	t->route = route;
	atomic_store(&t->next_plan, plan);
	t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return t->wake_fd < 0 ? -errno : 0;
}

void thread_close(struct thread *t)
{
	if (t->wake_fd > 0)
		close(t->wake_fd);
	t->wake_fd = -1;
}

/* Another thread could not deliver what this worker had passed or forwarded: that turns into a drop, here,
 * by the owner. */
static void count_back(struct thread *t)
{
	struct nat_pkt forwarded = {.verdict = NAT_FORWARD, .reason = NAT_REASON_OK};

	for (uint32_t n = atomic_exchange(&t->lost_forwards, 0); n > 0; n--)
		nat_engine_undo(t->engine, &forwarded, NAT_REASON_LINK_DOWN);
	for (uint32_t reason = 0; reason < NAT_REASON_COUNT; reason++) {
		uint32_t n = atomic_load_explicit(&t->lost[reason], memory_order_relaxed);

		if (!n)
			continue;
		struct nat_pkt pkt = {.verdict = NAT_PASS, .reason = (uint8_t)reason};

		atomic_fetch_sub(&t->lost[reason], n);
		while (n--)
			nat_engine_undo(t->engine, &pkt, NAT_REASON_TWIN_FULL);
	}
}

void thread_attend(struct thread *t, uint64_t generation, uint64_t now_ns)
{
	/* In this order: a job was given after the plan that its giver goes by, and must not run under the
	 * one before. */
	struct thread_job *job = atomic_exchange(&t->job, NULL);
	const struct plan *plan = atomic_load_explicit(&t->next_plan, memory_order_acquire);

	if (plan != t->plan) {
		nat_engine_set_policy(t->engine, plan->policy);
		t->plan = plan;
	}
	atomic_store_explicit(&t->passed, generation, memory_order_release);
	if (job) {
		count_back(t); /* what is shown adds up */
		const uint64_t from_ns = thread_clock_ns();
		job->run(t->engine, now_ns, job->argument);
		const uint64_t took_ns = thread_clock_ns() - from_ns;
		if (took_ns > t->longest_job_ns)
			t->longest_job_ns = took_ns;
		sem_post(&job->done);
	}
}

void thread_sleep(struct thread *t, int ports_fd, int queue_fd, uint32_t wait_us,
		  bool (*pending)(void *context), void *context)
{
	struct pollfd fds[3] = {{.fd = t->wake_fd, .events = POLLIN}, /* poll() skips negative ones */
				{.fd = ports_fd, .events = POLLIN},
				{.fd = queue_fd, .events = POLLIN}};
	struct timespec wait = {.tv_sec = wait_us / 1000000, .tv_nsec = wait_us % 1000000 * 1000};
	uint64_t ignored;

	atomic_store(&t->asleep, true); /* sequentially consistent: see thread_wake() */
	if (atomic_load(t->generation) == t->passed && !atomic_load(&t->job) && !atomic_load(&t->stop) &&
	    !pending(context)) {
		t->sleeps++;
		if (ppoll(fds, 3, &wait, NULL) > 0 && fds[0].revents)
			(void)!read(t->wake_fd, &ignored, sizeof ignored);
	}
	atomic_store(&t->asleep, false);
}

void thread_wake(struct thread *t)
{
	uint64_t one = 1;

	/* What we have put into a ring is visible before we look; the sleeper says "asleep" before it looks
	 * into its rings. One of the two sees the other. */
	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load(&t->asleep))
		(void)!write(t->wake_fd, &one, sizeof one);
}

bool thread_run(struct thread *t, void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument),
		void *argument)
{
	struct thread_job job = {.run = run, .argument = argument}, *mine = &job;
	struct timespec until;
	bool done = true;

	sem_init(&job.done, 0, 0);
	atomic_store(&t->job, &job);
	thread_wake(t);
	clock_gettime(CLOCK_MONOTONIC,
		      &until); /* a step of the other clock would end the patience, or prolong it */
	until.tv_sec++;
	while (sem_clockwait(&job.done, CLOCK_MONOTONIC, &until)) {
		if (errno == EINTR)
			continue;
		if (atomic_compare_exchange_strong(&t->job, &mine, NULL)) {
			done = false; /* it never looked */
			break;
		}
		while (sem_wait(&job.done)) /* it is at it: `job` must stay until it is done */
			;
		break;
	}
	sem_destroy(&job.done);
	return done;
}
