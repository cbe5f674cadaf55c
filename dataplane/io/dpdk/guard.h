/* Keeps the kernel's hands off packets that a DPDK port only copies. */
#ifndef GUARD_H
#define GUARD_H

#include <stddef.h>

/* For net_af_packet and net_pcap: the kernel interface behind this vdev string; false when it has none or
 * takes its packets away from the kernel by itself. */
_Bool guard_needed(const char *device, char *kernel_interface, size_t bytes);

/* Drops all that arrives on the interface before the kernel's own stack sees it, and brings it up. 0, or -1
 * and a sentence in `why`. It stays when the daemon ends: what comes in must not be routed untranslated. */
int guard_install(const char *kernel_interface, char *why, size_t why_bytes);

#endif
