/* Two masters at once: somebody else speaks for a pool address that is ours. */
#ifndef RIVAL_H
#define RIVAL_H

#include "thread.h"

struct rival {
	uint64_t mac, said_ns; /* mac: of the one that was seen a second ago; 0: none */
	uint32_t address_be;
};

/* Worker: an ARP frame came in on the interface with this MAC address. */
void rival_note(struct thread *t, const uint8_t *frame, uint32_t bytes, uint8_t iface, const uint8_t mac[6]);

/* Control thread, once a second: true when there is one still, so that the addresses must be announced
 * again. `why` is then a sentence, or empty when it was said within the last minute. */
bool rival_look(struct rival *r, struct thread *t, const struct plan *plan, uint64_t now_ns, char *why,
		size_t why_bytes);

#endif
