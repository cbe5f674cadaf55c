/* A worker's netfilter queue: the kernel keeps the interface, and asks us about its packets. */
#ifndef QUEUE_H
#define QUEUE_H

#include <rte_ring.h>
#include <sys/socket.h>

#include "../thread.h"
#include "arp_socket.h"

#define QUEUE_BURST 32u /* packets taken from the kernel at once */

struct queue_slot;

struct queue_params {
	struct thread *thread; /* whose engine it is */
	struct queue *peers;   /* the queues of all workers, by number; this one is thread->index */
	uint32_t n_peers;
	const struct nat_interface_config *interfaces;
	uint32_t n_interfaces;
	uint32_t held_max; /* packets that the core may hold at once */
	/* Sends a copy of a translated packet by a DPDK port and accounts for it. NULL: there are no such
	 * ports. */
	void (*send)(void *context, const struct nat_pkt *pkt, uint64_t now_ns);
	void *context;
};

struct queue_answers { /* verdicts on the packets of one queue that are not sent yet */
	uint8_t *text; /* the messages, one behind the other */
	uint32_t n, used, at[QUEUE_BURST];
	struct iovec *vector;
	uint32_t n_vectors;
	size_t bytes;             /* with what the vectors lead to */
	struct queue_slot *slots; /* whose bytes they lead to */
};

struct queue {
	struct queue_params params;
	int fd;
	int tun_fd;   /* of dsnat0, which all queues share: the first one has it open */
	int epoll_fd; /* readable when queue_receive() has something to do */
	struct queue_slot *slots, *free;
	size_t slots_bytes;
	/* slots of ours that other workers have done with: a list, which they add to and we take whole */
	struct queue_slot *_Atomic returned;
	struct rte_ring *inbox; /* slots of other workers; NULL: there are none, or they have frames */
	struct handed *handed;  /* by worker */
	uint8_t fallback;       /* the interface that a packet from an unknown one is said to come from */
	uint8_t iface_cache[64];
	int ifindex_cache[64];
	uint64_t looked_ns, arp_ns;
	/* what the next recvmmsg() writes to */
	struct queue_slot *in[QUEUE_BURST];
	struct mmsghdr in_message[QUEUE_BURST];
	struct iovec in_vector[QUEUE_BURST];
	uint32_t n_in;
	struct queue_answers answers[NAT_WORKERS_MAX]; /* by the queue whose packets they are about */
	struct arp_socket arp[NAT_INTERFACES_MAX];
	uint32_t n_arp;
	/* for show ports; written by the worker, read by anybody */
	uint64_t received[NAT_INTERFACES_MAX], sent[NAT_INTERFACES_MAX];
	uint64_t received_bytes[NAT_INTERFACES_MAX], sent_bytes[NAT_INTERFACES_MAX];
};

/* The number of the first worker's queue in the kernel, those of the others follow: also in nft.c's rules.
 * One set of queues for each network namespace. */
#define QUEUE_FIRST 27400u

/* Binds the queue and makes dsnat0; the first worker's queue is opened first. 0, or -1 and a sentence in
 * `why`. */
int queue_open(struct queue *q, const struct queue_params *params, char *why, size_t why_bytes);
/* When no worker runs any more. */
void queue_close(struct queue *q);

/* Answers ARP, and takes up to QUEUE_BURST packets from the kernel into `pkt`: the caller runs the engine and
 * settles each. */
uint32_t queue_receive(struct queue *q, struct nat_pkt pkt[QUEUE_BURST], uint64_t now_ns);

/* Carries out the verdict on one of the queue's own packets, also on one that was held. queue_flush() sends
 * it. */
void queue_settle(struct queue *q, const struct nat_pkt *pkt, uint64_t now_ns);
void queue_flush(struct queue *q);

/* The packet goes on as a copy: the kernel forgets it, and it is counted elsewhere. */
void queue_steal(struct queue *q, const struct nat_pkt *pkt);

/* Gives a packet that the kernel never had, or that the engine made, to the kernel's routing. false: it did
 * not take it. */
bool queue_inject(struct queue *q, const struct nat_pkt *pkt);

/* The loop of a worker without DPDK ports, until thread.stop. For pthread_create(). */
void *queue_run(void *queue);

/* Any thread: the i-th interface of the queue path, for show ports; false past the end. `q` is the first
 * queue. */
bool queue_view(const struct queue *q, const struct route *route, uint32_t i, struct request_port *view);

#endif
