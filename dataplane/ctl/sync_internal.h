/* Shared by sync*.c, by nobody else. */
#ifndef SYNC_INTERNAL_H
#define SYNC_INTERNAL_H

#include "request.h"
#include "sync.h"
#include "sync_wire.h"

#define SYNC_WINDOW      192u /* datagrams on their way: fewer than SYNC_ACK_BITS */
#define SYNC_BATCH       64u  /* datagrams read at once */
#define SYNC_PAST        256u /* starts of the peer that are remembered */
#define SYNC_EXPORT      512u /* changes taken from a worker at once, about 50 us */
#define SYNC_IMPORT      256u /* changes given to one at once */
#define SYNC_SECOND_NS   UINT64_C(1000000000)
#define SYNC_RANGES_OPEN 8u /* ranges being compared */

struct sync_flight { /* told, and not acknowledged yet */
	uint64_t number, sent_ns;
	uint16_t n;
	uint8_t kind; /* 0: free (a HELLO is never waited for) */
	uint32_t slot[SYNC_ENTRIES_MAX];
};

struct sync_range {
	uint64_t touched; /* number of the last datagram that told of it */
	uint32_t looked_s;
	bool differs;
};

struct sync_item { /* one entry that the peer told */
	struct nat_replica replica;
	uint32_t number;
};

enum sync_bulk {
	BULK_MARKING, /* all that is ours is marked */
	BULK_TELLING,
	BULK_SETTLING, /* told; waits until all of it is acknowledged */
	BULK_ENDING,   /* END is on its way */
	BULK_DONE
};

struct sync {
	struct sync_settings settings;
	const struct request_ops *ops;
	uint8_t key[SYNC_KEY_BYTES];
	int epoll_fd, socket_fd, timer_fd;
	uint32_t n_records, n_ranges;
	/* the peer */
	uint8_t epoch[SYNC_EPOCH_BYTES], peer_epoch[SYNC_EPOCH_BYTES];
	uint8_t past_epoch[SYNC_PAST][SYNC_EPOCH_BYTES]; /* of the peer, before it was started again */
	uint32_t n_past;
	bool has_peer;
	uint64_t heard_ns, said_ns, hello_ns;
	uint32_t peer_records;
	uint64_t peer_waiting;
	bool said_key; /* what is wrong with the peer, since one lived */
	uint8_t said_version;
	/* told by us */
	uint64_t number;
	struct sync_flight flight[SYNC_WINDOW];
	uint32_t n_flight;
	enum sync_bulk bulk;
	uint64_t bulk_cursor, bulk_number;
	uint32_t bulk_worker;
	uint64_t wait_ns, answer_ns; /* for an acknowledgement; how long one takes, smoothed */
	struct sync_range *range;
	uint32_t next_range, n_open, rounds;
	struct sync_compare open[SYNC_RANGES_OPEN]; /* number 0: free */
	uint64_t opened_ns[SYNC_RANGES_OPEN], range_due_ns, round_ns, round_began_ns;
	/* told by the peer */
	uint64_t taken;                          /* the highest number */
	uint64_t taken_bits[SYNC_ACK_BITS / 64]; /* bit i: taken - i */
	bool ack_due, heard_all, end_due;
	uint32_t *shadow, *shadow_number; /* per place of the peer's: our record; the last word's number */
	uint32_t *origin;                 /* per record of ours: the peer's place */
	struct sync_item *item;
	uint32_t n_items;
	uint64_t batch[SYNC_BATCH]; /* numbers taken with the next flush */
	uint32_t n_batch;
	struct sync_compare asked[SYNC_BATCH];
	uint32_t n_asked;
	struct offer offer;
	struct sync_view seen; /* counters */
};

/* sync_refuse.c: a datagram that came from the peer's address and cannot be read */
void sync_refuse(struct sync *s, const uint8_t *bytes, size_t n_bytes, bool connected);
void sync_refuse_no_more(struct sync *s); /* a peer lives */

/* sync_table.c: what is asked of the workers. False: one did not answer in time, nothing is lost by that. */
bool sync_export(struct sync *s, uint32_t worker, struct nat_replica *out, uint32_t *n);
bool sync_again(struct sync *s, const uint32_t *slot, uint32_t n);
bool sync_mark_all(struct sync *s); /* one step; s->bulk moves on when it is the last */
bool sync_import(struct sync *s);   /* s->item */
bool sync_take_orphans(struct sync *s);
bool sync_sum_ours(struct sync *s, uint32_t range, struct nat_replica_sum *sum);
bool sync_sum_theirs(struct sync *s, uint32_t range, struct nat_replica_sum *sum);
uint64_t sync_waiting(struct sync *s, uint32_t worker);
bool sync_set_hold_back(struct sync *s);
/* A new peer: nothing of it is known. False: no memory for a table of that size. */
bool sync_forget_peer(struct sync *s, uint32_t peer_records);

#endif
