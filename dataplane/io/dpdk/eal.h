/* DPDK's environment layer, started from the configuration alone. */
#ifndef EAL_H
#define EAL_H

#include "../../core/nat.h"

struct eal_options {
	bool no_huge;         /* plain pages even where there are hugepages */
	uint32_t n_workers;   /* lcores beside the main one */
	uint32_t memory_mb;   /* of packet buffers and rings, without hugepages only */
	bool without_devices; /* eal_add_devices() comes later */
};

/* Starts EAL with the devices of all interfaces on the DPDK path. Worker w runs on lcore w + 1. Several
 * daemons may run on one machine. Returns 0, or -1 and a sentence in `why`. */
int eal_start(const struct nat_config *config, const struct eal_options *options, char *why,
	      size_t why_bytes);
/* After a start without devices. 0, or -1 and a sentence in `why`. */
int eal_add_devices(const struct nat_config *config, uint32_t n_workers, char *why, size_t why_bytes);
void eal_stop(void);

bool eal_has_hugepages(void);

/* CPUs that are isolated and that this process may use. */
uint32_t eal_isolated_cores(void);
/* The CPU that a worker is pinned to; -1: it may run on any CPU of the daemon. */
int32_t eal_core_of(uint32_t worker, uint32_t n_workers);

/* "net_tap0,iface=x" -> "net_tap0"; a PCI address stays as it is. */
void eal_device_name(const char *device, char *name, size_t name_bytes);
bool eal_is_pci(const char *device);

#endif
