/* What the files of a netfilter queue share. */
#ifndef QUEUE_INTERNAL_H
#define QUEUE_INTERNAL_H

#include "queue.h"

#define SLOT_BYTES (65536u + 512u) /* the largest packet, and what netlink puts around it */

struct queue_slot {
	struct queue_slot *next;
	uint32_t id_be;
	bool prerouting;
	uint8_t out_iface;
	uint8_t queue; /* whose packet it is, wherever its bytes are read */
	/* handed over: what the core says to its next owner */
	uint8_t iface;
	uint16_t flags;
	uint32_t len_bytes;
	uint8_t *l3;
	struct nat_errand errand;
	_Alignas(8) uint8_t bytes[SLOT_BYTES];
};

/* In nlmsg_seq, which comes back with an error: what the packet was counted as, and in the upper half by
 * whom. */
#define SEQ_DROP    0u
#define SEQ_FORWARD 1u
#define SEQ_PASS    0x100u /* and the reason */

/* bind.c. 0 or -errno */
int queue_bind(struct queue *q);
/* Packets that the kernel dropped because a queue or our socket was full, since the queues were bound. */
uint64_t queue_overruns(uint32_t n_queues);

/* verdict.c */
bool queue_answers_open(struct queue *q);
void queue_answers_close(struct queue *q);
/* `pkt` is given when its changed bytes are to go back. The slot is its queue's again. */
void queue_answer(struct queue *q, struct queue_slot *slot, uint32_t verdict, uint32_t sequence,
		  const struct nat_pkt *pkt);
/* The kernel could not use a verdict with this number. */
void queue_refused(struct queue *q, uint32_t sequence);

/* peers.c */
bool queue_inbox_open(struct queue *q);
void queue_inbox_close(struct queue *q);
void queue_slot_free(struct queue *q, struct queue_slot *slot);
/* A free slot, or NULL. */
struct queue_slot *queue_slot_take(struct queue *q);
void queue_hand_over(struct queue *q, const struct nat_pkt *pkt);
void queue_hand_over_flush(struct queue *q);
/* What others have handed over: up to NAT_BURST_MAX packets. */
uint32_t queue_take_over(struct queue *q, struct nat_pkt pkt[NAT_BURST_MAX]);

#endif
