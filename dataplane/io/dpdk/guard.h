/* Keeps the kernel's hands off packets that a DPDK port only copies. */
#ifndef GUARD_H
#define GUARD_H

#include "../../core/nat.h"

/* The kernel interface of which this device gets only copies; false when it has none or takes its packets
 * away by itself. */
bool guard_needed(const char *device, char *kernel_interface, size_t bytes);

/* Is that interface there, with a link? The drivers of such devices do not know. */
bool guard_has_carrier(const char *kernel_interface);

/* Takes the drop away again: the kernel is to have what arrives. */
void guard_remove(const char *kernel_interface);

/* For every net_af_packet and net_pcap device of the configuration: drops all that arrives on the kernel
 * interface behind it before the kernel's own stack sees it, and brings that interface up. 0, or -1 and a
 * sentence in `why`. The drop stays when the daemon ends: what comes in must not be routed untranslated. */
int guards_install(const struct nat_config *config, char *why, size_t why_bytes);

#endif
