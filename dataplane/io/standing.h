/* How this gateway stands in its pair, for keepalived: a number in a file that it adds to its priority
 * (track_file).
 *
 *	   0   well
 *	 -80   a pool had no port left within the last 30 s, and the peer holds the same sessions with more
 *	       addresses, or at least no fewer
 *	 -90   a backup whose pools or zones are not the master's: another generation
 *	-100   a backup whose engine has just begun, or that does not have all of the master's sessions: it must
 *	       not become master while that one lives
 *	-254   nothing is translated: a worker makes no rounds, or a whole side has no link. keepalived takes that
 *	       as a fault, and gives the addresses away at once, also without preemption
 *
 * The master's own word is the truth about its sessions, so it is never lowered for the sync's sake: when
 * the link between the two breaks nothing moves. Nor does anything move when the engine dies, because then
 * nobody writes; it is back in a moment. A peer with the same addresses lowers itself together with an
 * exhausted master: it could do no better, and the address would go to and fro.
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

struct standing_facts {
	bool translates; /* all workers make rounds */
	bool linked;     /* both sides have a link */
	bool begins;     /* an address that came now would be doubted: tenure.h */
	struct offer offer;
	const struct sync_view *sync; /* NULL: no peer */
};

/* `socket` is the control socket's path: with the usual one the file is /run/dsnatd/vrrp, else it stands
 * beside it. */
void standing_open(struct standing *s, const char *socket, bool usual);

/* Control thread, now and then. A file that cannot be written is said once. */
void standing_follow(struct standing *s, const struct plan *plan, const struct standing_facts *facts);

#endif
