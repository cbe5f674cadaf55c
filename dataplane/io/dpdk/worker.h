/* A worker of the DPDK shell: one core, one engine, one queue pair of each port. */
#ifndef WORKER_H
#define WORKER_H

#include <rte_ring.h>

#include "../nfqueue/queue.h"
#include "../thread.h"
#include "port.h"
#include "twin.h"

#define WORKER_WAITS     32u /* next hops that packets wait for at once */
#define WORKER_WAIT_EACH 16u /* packets for each */
#define WORKER_LATE_MAX  8u  /* frames of the kernel that a full port may still owe */

struct out { /* frames for one port, sent together at the end of a burst */
	uint32_t n;
	struct rte_mbuf *m[NAT_BURST_MAX];
	const struct nat_pkt *pkt[NAT_BURST_MAX]; /* NULL: the kernel's own frame */
};

struct wait { /* packets for a next hop whose MAC address is not known yet */
	uint64_t until_ns, ask_ns;
	uint32_t next_hop_be;
	uint8_t iface;
	uint8_t n; /* 0: free */
	struct nat_pkt pkt[WORKER_WAIT_EACH];
};

struct worker {
	struct thread thread; /* first: the control thread sees workers of both shells as threads */
	struct ports *ports;
	struct twins *twins;
	struct worker *peers; /* all workers, by number */
	uint32_t n_workers;
	struct queue *queue;    /* NULL: no interface on the queue path */
	struct rte_ring *inbox; /* from other workers */
	struct will *will;      /* says when this thread dies (daemon/spare.c) */
	bool passed_something;
	bool late; /* some port has refused a frame that is kept: see out_refused() */
	uint32_t n_waits, neighbour_generation;
	uint64_t run_ns, waits_ns, queue_ns; /* when the engine last ran, and what was last looked at */
	int interrupt_fd;                    /* epoll of all receive interrupts; -1: no port has them */
	struct out out[NAT_INTERFACES_MAX];
	struct handed *handed; /* by worker */
	struct wait wait[WORKER_WAITS];
};

/* After thread_init(); on the control thread. 0, or -1 and a sentence in `why`. */
int worker_open(struct worker *w, struct worker *peers, uint32_t n_workers, struct ports *ports,
		struct twins *twins, char *why, size_t why_bytes);
void worker_close(struct worker *w);

/* queue_params.send: a packet of the netfilter queue leaves by a port. `worker` is a struct worker. */
void worker_send(void *worker, const struct nat_pkt *pkt, uint64_t now_ns);

/* The loop, until thread.stop. For rte_eal_remote_launch(). */
int worker_run(void *worker);

#endif
