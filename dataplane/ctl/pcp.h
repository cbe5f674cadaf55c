/* PCP (RFC 6887) and NAT-PMP (RFC 6886): hosts ask for mappings of their own. Both speak to UDP port 5351
 * of the gateway.
 *
 * This file reads a request and writes the answer; sockets and engines are the program's. Served: PCP MAP,
 * PEER and ANNOUNCE, NAT-PMP public address and both maps. Not served: THIRD_PARTY (a host speaks for
 * itself only), PREFER_FAILURE and FILTER (answered with UNSUPP_OPTION, as RFC 6887 section 7.3 asks). A
 * mapping that was made with a nonce is changed and ended with that nonce only (section 11.3), so not by
 * NAT-PMP, which has none.
 */
#ifndef PCP_H
#define PCP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/nat.h"

#define PCP_PORT             5351u
#define PCP_BYTES_MAX        1100u /* RFC 6887 section 7 */
#define PCP_LIFETIME_LEAST_S 120u  /* RFC 6887 section 15 */
#define PCP_LIFETIME_MOST_S  86400u

struct pcp_ops {
	void *context;
	/* Asks the engine that owns the host. False: it did not answer in time. */
	bool (*map)(void *context, struct nat_map *ask, enum nat_map_result *result);
	bool (*public_address)(void *context, uint32_t host_be, uint32_t *address_be);
};

/* The answer's length; 0: none is due. `epoch_s` counts from when mappings were last lost. */
size_t pcp_answer(const struct pcp_ops *ops, uint32_t client_be, uint32_t epoch_s, const uint8_t *request,
		  size_t request_bytes, uint8_t answer[PCP_BYTES_MAX]);

#endif
