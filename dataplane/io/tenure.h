/* Whose are the VRRP addresses that stand in the kernel when the engine starts?
 *
 * While no engine ran, nothing was heard of the peer, because adverts come by the engine: keepalived may
 * have made itself master. To serve at once would take the traffic away from the real master, until VRRP
 * has settled it. So a small file beside the control socket tells which addresses were ours when the
 * engine before this one died: those are ours still. Any other that is here already, or comes in the first
 * moments, is doubted for TENURE_DOUBT_NS, in which the peer's next advert makes keepalived step back.
 */
#ifndef TENURE_H
#define TENURE_H

#include "thread.h"

#define TENURE_DOUBT_NS  UINT64_C(1500000000) /* an advert comes each second, or more often */
#define TENURE_CLEAR_NS  UINT64_C(400000000)  /* an election that was under way is over */
#define TENURE_ADDRESSES 256u

struct tenure {
	char path[128];
	uint64_t clear_from_ns, until_ns;           /* UINT64_MAX until tenure_begins() */
	uint32_t n_ours, ours_be[TENURE_ADDRESSES]; /* of the engine before; then as written */
	uint32_t n_clear, clear_be[TENURE_ADDRESSES];
	bool ended;
};

void tenure_open(struct tenure *t, const char *socket, bool usual);
/* From now on adverts come through. */
void tenure_begins(struct tenure *t, uint64_t now_ns);

/* Is this address doubted? `here`: the kernel has it. */
bool tenure_doubts(struct tenure *t, uint32_t address_be, bool here, uint64_t now_ns);

/* The first moments: an address that came now would be doubted. */
bool tenure_is_young(const struct tenure *t, uint64_t now_ns);

/* True once, when the time of doubt is over. */
bool tenure_ends(struct tenure *t, uint64_t now_ns);

/* Writes down what is ours now, when that has changed. */
void tenure_note(struct tenure *t, const struct plan *plan);

#endif
