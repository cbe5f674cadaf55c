/* The kernel's interfaces that stand for the DPDK ports, and the thread that moves frames to and from them.
 */
#ifndef TWIN_H
#define TWIN_H

#include <pthread.h>
#include <rte_ring.h>

#include "../thread.h"
#include "port.h"

/* Towards the kernel, the more urgent class is emptied first and no class can use up another's room. */
enum twin_class {
	TWIN_URGENT,  /* VRRP, BFD: a late one moves addresses or takes links down */
	TWIN_CONTROL, /* ARP, neighbour discovery, BGP, OSPF */
	TWIN_REST,
	TWIN_CLASSES
};

struct bucket { /* frames allowed towards the kernel */
	uint64_t filled_ns;
	double tokens;
};

struct twin {
	struct port *port;
	_Atomic int fd; /* -1: the interface was taken away; twins_mend() makes it anew */
	struct bucket bucket[TWIN_CLASSES];
};

struct twins {
	struct ports *ports;
	uint32_t n_workers;
	struct twin twin[NAT_INTERFACES_MAX];
	struct rte_ring *to[NAT_WORKERS_MAX][TWIN_CLASSES]; /* one producer each: the worker */
	struct rte_ring *from;                              /* frames for the ports: worker 0 sends them */
	struct rte_mbuf *spare;                             /* what the next read goes to */
	struct thread *worker[NAT_WORKERS_MAX];
	int epoll_fd, wake_fd;
	_Atomic bool asleep, stop;
	bool running;
	pthread_t thread;
};

/* Attaches to the twin of every port, or makes it. `kept`: systemd has a queue of each from an earlier
 * process. 0, or -1 and a sentence in `why`. */
int twins_open(struct twins *t, struct ports *ports, uint32_t n_workers, bool kept, char *why,
	       size_t why_bytes);
int twins_start(struct twins *t);
void twins_stop(struct twins *t); /* ends the thread; the interfaces stay */

/* Control thread: passes the port's link on to the twin. */
void twin_set_carrier(struct twin *twin, bool up);
/* Control thread, now and then: makes twins again that somebody deleted. Says so with a sentence per twin. */
void twins_mend(struct twins *t, void (*say)(const char *sentence));

/* Worker: a frame for the kernel. The note in it says what it was counted as. false: no room, it is still
 * yours. */
bool twin_pass(struct twins *t, uint32_t worker, struct rte_mbuf *m, enum twin_class class);
/* How urgent a frame is, on its way to the kernel or from there; it may have a VLAN tag. */
enum twin_class twin_class_of(const struct rte_mbuf *m);

/* Worker, once a round in which it passed something. */
void twins_wake(struct twins *t);

/* Control thread: a frame to be sent by a port. false: no buffer or no room. */
bool twins_send(struct twins *t, const struct port *port, const void *frame, uint32_t bytes);

#endif
