/* What the workers of both shells have in common: an engine that one thread owns, and how the control thread
 * reaches it without a lock on the packet path.
 *
 * A worker calls thread_between_bursts() once a round. That is the one place where it
 *   - says which *generation* it has reached. The control thread swaps a pointer (plan, routes), raises the
 *     generation, and frees the old object when every worker has reached it: no reader can hold it any more;
 *   - takes the new plan, when there is one;
 *   - runs the control thread's job (show, clear), so that tables are only ever touched by their owner.
 * Nothing here costs a busy worker more than three loads a round.
 */
#ifndef THREAD_H
#define THREAD_H

#include <semaphore.h>
#include <stdatomic.h>

#include "../core/nat.h"
#include "../ctl/config.h"
#include "../ctl/request.h"
#include "../ctl/route.h"

/* A configuration made ready for workers. Immutable but for the pools' activity (nat_policy_set_active). */
struct plan {
	struct config *config;
	struct nat_policy *policy;
	void *policy_memory;
};

struct thread_job {
	void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument);
	void *argument;
	sem_t done;
};

struct handed { /* packets for another worker, given over together at the end of a burst */
	uint32_t n;
	struct nat_pkt pkt[NAT_BURST_MAX]; /* the cookie is a frame, or a slot of a netfilter queue */
};

struct thread {
	/* the worker's own */
	_Alignas(64) struct nat_engine *engine;
	const struct plan *plan;
	struct route *route;
	uint32_t index;
	int32_t core; /* -1: not pinned */
	const _Atomic uint64_t *generation;
	uint64_t rounds, bursts, packets, sleeps, idle_ns, busy_ns, work_ns, longest_job_ns, handed_over,
		taken_over;
	/* written by others */
	_Alignas(64) _Atomic uint64_t passed;
	const struct plan *_Atomic next_plan;
	struct thread_job *_Atomic job;
	_Atomic bool asleep, stop;
	int wake_fd;
	/* packets that were passed to the kernel and then lost by another thread: the worker counts them back
	 */
	_Atomic uint32_t lost[NAT_REASON_COUNT];
	/* packets that were forwarded, and that the kernel then had no use for, as another worker heard */
	_Atomic uint32_t lost_forwards;
	/* who spoke for a pool address of ours (rival.c); 0: nobody */
	_Atomic uint64_t rival_mac;
	_Atomic uint32_t rival_address_be;
};

/* -errno on failure. `generation` and `plan` are the daemon's. */
int thread_init(struct thread *t, uint32_t index, const _Atomic uint64_t *generation, const struct plan *plan,
		struct route *route);
void thread_close(struct thread *t);

uint64_t
thread_clock_ns(void); /* CLOCK_MONOTONIC: goes on over a restart of the daemon, as the sessions do */

/* The slow half of thread_between_bursts(). */
void thread_attend(struct thread *t, uint64_t generation, uint64_t now_ns);

static inline void thread_between_bursts(struct thread *t, uint64_t now_ns)
{
	uint64_t generation = atomic_load_explicit(t->generation, memory_order_acquire);

	t->rounds++;
	if (generation != atomic_load_explicit(&t->passed, memory_order_relaxed) ||
	    atomic_load_explicit(&t->job, memory_order_relaxed))
		thread_attend(t, generation, now_ns);
}

/* Sleeps until thread_wake(), until one of the descriptors (-1: none) is readable, or for `wait_us`.
 * `pending` is asked once more after the worker has said that it sleeps, so that no wake-up is lost. */
void thread_sleep(struct thread *t, int ports_fd, int queue_fd, uint32_t wait_us,
		  bool (*pending)(void *context), void *context);

/* Any thread. Costs a system call only when the worker sleeps. */
void thread_wake(struct thread *t);

/* Control thread: runs `run` between two bursts; false when the worker did not take it within a second. */
bool thread_run(struct thread *t, void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument),
		void *argument);

#endif
