/* When the DPDK side cannot start: the same interfaces on the kernel's path. */
#ifndef DEGRADE_H
#define DEGRADE_H

#include "../../core/nat.h"

/* Gives the kernel back the devices of all interfaces that had `path: dpdk` (they are on the queue path in
 * `config` already, and still name their device): the kernel's own driver, no guard, the interface's name,
 * which the twin had. Addresses and routes are the network manager's to set again. Repeating it is
 * harmless. 0, or -1 and a sentence in `why`. */
int degrade_interfaces(const struct nat_config *config, char *why, size_t why_bytes);

#endif
