/* The sessions of a pair, kept equal over UDP: each gateway tells the other one its own (core/replica.h).
 *
 * Runs on the control thread, and asks the workers between two bursts, as all that looks at tables does.
 * What it needs of memory is allocated at start, or when a peer has said how large its table is, and does
 * not grow with the backlog.
 */
#ifndef SYNC_H
#define SYNC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "offer.h"

struct request_ops;

struct sync_settings {
	bool on;
	uint32_t peer_be, listen_be;
	uint16_t peer_port_be, listen_port_be;
	uint32_t hold_back_ms;
	char key[256]; /* path of the file */
};

#define SYNC_DIFFERS_MAX 16u

struct sync_view {
	bool connected, in_sync;
	bool told_all, heard_all; /* every session of ours to the peer; every one of the peer's to us */
	uint64_t waiting, on_the_way, lag_ms,
		heard_ms; /* changes; age of the oldest; since the last word of the peer */
	uint64_t told, heard, bytes_out, bytes_in, again, dropped;
	uint64_t other_version; /* datagrams; the version of the last one */
	uint8_t peer_version;
	uint64_t conflicts, kept, full, invalid;
	uint64_t compared, repaired; /* ranges */
	uint32_t ranges, differ, differs[SYNC_DIFFERS_MAX];
	uint64_t round_ms; /* since all ranges were last compared; UINT64_MAX: not yet */
	uint64_t peer_waiting;
	struct offer peer;
	char conflict[160]; /* the last one */
};

struct sync;

/* `max_sessions` as configured. NULL and a sentence on failure. */
struct sync *sync_open(const struct sync_settings *settings, const struct request_ops *ops,
		       uint64_t max_sessions, char *why, size_t why_bytes);
void sync_close(struct sync *s);

/* Readable when there is something to do. */
int sync_fd(const struct sync *s);
void sync_serve(struct sync *s);

/* What the peer is told of us from now on. */
void sync_offer(struct sync *s, const struct offer *offer);

void sync_look(const struct sync *s, struct sync_view *view);

#endif
