/* ARP for pool addresses, which no interface of the kernel has: the frames, and whether one is ours to
 * answer. */
#ifndef ARP_H
#define ARP_H

#include "thread.h"

#define ARP_FRAME_BYTES 42u

/* May this interface speak ARP for the address? Its pool is active, the interface faces outside, and the
 * pool's `announce` agrees: `arp` always, `none` never, `auto` when a connected prefix of the interface holds
 * it. */
bool arp_is_ours(const struct plan *plan, const struct route *route, uint8_t iface, uint32_t address_be);

/* A request for an address that is ours (also a probe or the sender's own announcement are requests): its
 * target. 0 when the frame is anything else. */
uint32_t arp_asked_for(const uint8_t *frame, uint32_t bytes);

/* Who speaks for which address in an ARP frame of any kind; `mac` are the six bytes first. False: it is
 * none. */
bool arp_sender(const uint8_t *frame, uint32_t bytes, uint32_t *address_be, uint64_t *mac);

/* Turns the request in `frame` into its answer. */
void arp_answer(uint8_t *frame, const uint8_t mac[6]);

/* A gratuitous request: updates the entries of those who have one (RFC 5227 section 3). */
void arp_announcement(uint8_t frame[ARP_FRAME_BYTES], const uint8_t mac[6], uint32_t address_be);

/* A reverse request, as hypervisors send it after a move: hosts leave it alone, switches learn where the
 * MAC address is. */
void arp_presence(uint8_t frame[ARP_FRAME_BYTES], const uint8_t mac[6]);

#endif
