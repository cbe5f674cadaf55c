/* How this gateway stands in its pair, for keepalived: a number in a file that it adds to its priority (track_file).
 *
 *	   0   well
 *	-100   a backup that does not have all of the master's sessions: it must not become master while that one lives
 *	-150   a worker makes no rounds, so nothing is translated
 *
 * The master's own word is the truth about its sessions, so it is never lowered for the sync's sake: when the link between the two breaks
 * nothing moves. Nor does anything move when the engine dies, because then nobody writes; it is back in a moment.
 */
#ifndef STANDING_H
#define STANDING_H

#include <stdbool.h>

#include "../ctl/sync.h"
#include "thread.h"

struct standing {
	char path[128];
	int written;
	bool has_written;
};

/* `socket` is the control socket's path: with the usual one the file is /run/dsnatd/vrrp, else it stands beside it. */
void standing_open(struct standing *s, const char *socket, bool usual);

/* Control thread, now and then. `sync` is NULL without a peer. A file that cannot be written is said once. */
void standing_follow(struct standing *s, const struct plan *plan, const struct sync_view *sync,
		     bool translates);

#endif
