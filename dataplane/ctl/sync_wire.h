/* What goes over the wire between two gateways of a pair: sealed datagrams, and what is in them.
 *
 *	"DSNS" version 0 0 0 | epoch 16 | number 8 |  sealed: head, entries | tag 16
 *
 * Sealed by XChaCha20-Poly1305 (libsodium) with the pair's key; what stands before the seal is
 * authenticated with it. The nonce is epoch and number: an epoch is drawn at random at each start, a
 * number is used once in it. What was recorded in an earlier epoch of ours is not taken, because a packet
 * must name our epoch (`echo`); what was recorded in this one is not taken twice, neither from the peer
 * that lives nor from what it was before its last starts.
 */
#ifndef SYNC_WIRE_H
#define SYNC_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/replica.h"
#include "offer.h"

#define SYNC_VERSION      1u
#define SYNC_KEY_BYTES    32u
#define SYNC_EPOCH_BYTES  16u
#define SYNC_BYTES_MAX    1400u /* of a datagram: no link of a gateway has less than 1428 */
#define SYNC_CLEAR_BYTES  32u
#define SYNC_TAG_BYTES    16u
#define SYNC_HEAD_BYTES   80u
#define SYNC_BODY_BYTES   (SYNC_BYTES_MAX - SYNC_CLEAR_BYTES - SYNC_TAG_BYTES - SYNC_HEAD_BYTES)
#define SYNC_ACK_BITS     256u
#define SYNC_GONE_BYTES   5u
#define SYNC_RECORD_BYTES 48u
#define SYNC_ENTRIES_MAX  (SYNC_BODY_BYTES / SYNC_GONE_BYTES)

enum sync_kind {
	SYNC_HELLO,   /* I am here; acknowledges */
	SYNC_DATA,    /* places */
	SYNC_END,     /* you have heard of all my places */
	SYNC_COMPARE, /* this is the sum of one range of them */
	SYNC_RESULT,  /* yours is another one, or the same */
	SYNC_KINDS
};

struct sync_head {
	uint8_t echo[SYNC_EPOCH_BYTES]; /* the epoch of the one that it is sent to, zeros: not known */
	uint64_t ack;                   /* the highest number taken, and of the 256 up to it which */
	uint64_t ack_bits[SYNC_ACK_BITS / 64];
	uint8_t kind;
	uint16_t n; /* entries */
	uint32_t n_records, waiting;
	struct offer offer; /* zeros from one that does not tell */
};

struct sync_compare { /* COMPARE; RESULT has range, number and equal */
	uint32_t range;
	uint64_t number; /* of the datagram that asked */
	struct nat_replica_sum sum;
	bool equal;
};

struct sync_packet {
	uint8_t epoch[SYNC_EPOCH_BYTES];
	uint64_t number;
	struct sync_head head;
	uint8_t body[SYNC_BODY_BYTES];
	size_t body_bytes;
};

/* False: libsodium cannot be used. */
bool sync_wire_start(void);

/* Seals into `out`; gives the bytes. */
size_t sync_seal(const struct sync_packet *packet, const uint8_t key[SYNC_KEY_BYTES],
		 uint8_t out[SYNC_BYTES_MAX]);

/* False: not sealed with this key, or damaged. */
bool sync_open_sealed(struct sync_packet *packet, const uint8_t key[SYNC_KEY_BYTES], const uint8_t *in,
		      size_t in_bytes);

/* Of a datagram, sealed or not; 0: it is none of ours. */
uint8_t sync_version(const uint8_t *in, size_t in_bytes);

/* One entry at the end of the body; false when it has no room. */
bool sync_put(struct sync_packet *packet, const struct nat_replica *replica);
/* The entry at *at, moved on; false at the end, or where it makes no sense. */
bool sync_get(const struct sync_packet *packet, size_t *at, struct nat_replica *replica);

void sync_put_compare(struct sync_packet *packet, const struct sync_compare *compare);
bool sync_get_compare(const struct sync_packet *packet, struct sync_compare *compare);

/* The pair's key: 64 hexadecimal digits in a file that only its owner can read. False and a sentence that
 * does not hold it. */
bool sync_read_key(const char *path, uint8_t key[SYNC_KEY_BYTES], char *why, size_t why_bytes);

#endif
