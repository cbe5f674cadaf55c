/* The configuration made ready for packets: zones by source interval, addresses by hash, pools as spans of
 * addresses.
 *
 * A policy is built aside, published by one pointer and then never changed, but for two things: the activity
 * of pools (one atomic flag each, for `active_while`) and each worker's own notes (round-robin cursors,
 * counts per address and zone), which lie in lines that no other worker writes.
 */
#ifndef NAT_POLICY_H
#define NAT_POLICY_H

#include <stdatomic.h>

#include "hash.h"
#include "nat.h"

#define NAT_NO_ZONE   UINT32_MAX
#define NAT_NO_SOURCE UINT32_MAX

struct nat_address {
	uint32_t address_be;
	uint32_t pool;
	bool draining;
	bool reserved; /* one to one: no port of it is given out */
};

struct nat_static { /* struct nat_static_config in network order */
	uint32_t inside_be, outside_be;
	uint16_t inside_port_be, outside_port_be;
	uint8_t protocol;
};

struct nat_address_slot {            /* open addressing */
	uint32_t address_be, number; /* number + 1, 0 is empty */
};

struct nat_pool {
	char name[NAT_NAME_MAX];
	uint32_t first_address, n_addresses; /* span in nat_policy.address, in the file's order */
	uint32_t n_in_service;               /* neither draining nor reserved */
	uint32_t first_order, n_order;       /* span in nat_policy.order: round robin with weights */
	uint32_t first_block,
		n_blocks; /* blocks of the first address, and of each address; none: n_blocks is 0 */
	uint16_t block_ports, blocks_per_host;
	uint32_t hosts_first, n_hosts,
		hosts_per_address; /* deterministic: inside prefix; n_hosts is 0 without it */
	uint16_t ports_per_host, dynamic_first;
	uint16_t port_first, port_last;
	uint16_t id; /* stable, from the table's header */
	uint8_t mapping, filtering, select, announce, log;
	uint8_t keeper; /* the worker that has all its packets, or NAT_SPREAD: see workers.h */
	uint32_t active_while_be;
	_Atomic bool active;
};

struct nat_zone {
	struct nat_zone_config config;
	uint32_t source_mask, destination_mask;
	uint16_t id; /* stable, from the table's header */
};

/* See zones.c. */
struct nat_interval {
	uint32_t first;  /* it ends where the next begins */
	uint32_t source; /* the narrowest prefix around it, or NAT_NO_SOURCE */
	uint32_t only;   /* the zone of all its packets, whatever their destination; or NAT_NO_ZONE */
	uint32_t zero;
};

struct nat_source {                      /* a prefix that zones name as their source */
	uint32_t wider;                  /* the next one around it, or NAT_NO_SOURCE */
	uint32_t first_listed, n_listed; /* span in nat_policy.listed */
};

struct nat_address_note {
	uint64_t sessions, created, refused;
	uint64_t mappings[NAT_TRAFFIC_KINDS]; /* live, endpoint-independent */
};

struct nat_pool_note {
	uint32_t exhausted_s; /* when NAT_EVENT_PORTS_EXHAUSTED was last told, + 1 */
};

struct nat_zone_note {
	uint64_t created, refused;
	uint32_t cursor;   /* round robin: offset in the pool's order of the address that is next */
	uint32_t forecast; /* where the cursor will be in the course of a burst, see begin.c */
};

/* A block of ports of one address, given to a host as long as it has mappings or sessions there. */
struct nat_block {
	uint32_t host_be; /* 0: free */
	uint32_t taken;   /* ports in use, each counted as often as sessions use it */
};

struct nat_worker_notes { /* written by one worker only */
	struct nat_address_note *address;
	struct nat_zone_note *zone;
	struct nat_block *block;
	struct nat_pool_note *pool;
};

struct nat_policy {
	uint32_t n_interfaces, n_pools, n_zones, n_addresses, n_intervals, n_workers;
	uint8_t role[NAT_INTERFACES_MAX];
	bool silent[NAT_INTERFACES_MAX];
	struct nat_pool *pool;
	struct nat_zone *zone;
	struct nat_address *address;
	uint32_t *order; /* address numbers, each as often as its weight */
	uint32_t n_blocks;
	struct nat_interval *interval;
	struct nat_source *source;
	uint32_t *listed; /* zone numbers */
	uint64_t *sorted; /* only while it is built */
	uint32_t n_sources, n_listed;
	uint32_t *zone_slot, zone_slots;    /* open addressing by source and destination, number + 1 */
	const struct nat_policy *previous;  /* only to compare: it may be gone */
	uint32_t *zone_before;              /* per zone: its number in `previous`, or NAT_NO_ZONE */
	uint32_t interval_of[257];          /* by the top 8 bits: where a search begins */
	uint32_t address_low, address_span; /* every pool address is in low..low + span, host order */
	struct nat_address_slot *address_slot;
	uint32_t address_slots; /* a power of two */
	struct nat_key address_key;
	struct nat_static *statics;
	uint32_t *static_slot[2]; /* open addressing by inside and by outside, number + 1 */
	uint32_t n_statics, static_slots;
	struct nat_worker_notes notes[NAT_WORKERS_MAX];
	struct nat_timeouts timeouts;
	struct nat_limits limits;
	uint8_t tcp_midflow, refusal;
	bool pass_other_protocols;
	bool has_pass_zone;
	bool from_queue[NAT_INTERFACES_MAX];
	uint64_t places;        /* digest of all that nat_place() depends on */
	_Atomic uint32_t bound; /* 0 new, 1 being bound, 2 stable ids are in */
};

static inline bool nat_pool_is_active(const struct nat_pool *pool)
{
	return atomic_load_explicit(&pool->active, memory_order_relaxed);
}

/* The first of an interval's zones that matches, where there are several. */
uint32_t nat_policy_zone_of(const struct nat_policy *policy, const struct nat_interval *interval,
			    uint32_t destination);

/* First zone that matches, or NAT_NO_ZONE. Host order. */
static inline uint32_t nat_policy_zone(const struct nat_policy *policy, uint32_t source, uint32_t destination)
{
	const uint32_t *bounds = &policy->interval_of[source >> 24];
	const struct nat_interval *low = &policy->interval[bounds[0]];

	/* The number of steps depends on the first 8 bits only and a step has no branch: sources come in any
	 * order, and a mispredicted branch costs more than the whole search. */
	for (uint32_t n = bounds[1] - bounds[0] + 1; n > 1;) {
		const uint32_t half = n / 2;
		low = low[half].first <= source ? low + half : low;
		n -= half;
	}
	return NAT_LIKELY(low->only != NAT_NO_ZONE) ? low->only
						    : nat_policy_zone_of(policy, low, destination);
}

/* The first zone with this source and destination, or NAT_NO_ZONE. */
uint32_t nat_policy_zone_named(const struct nat_policy *policy, const struct nat_prefix *source,
			       const struct nat_prefix *destination);

/* Parts of nat_policy_init() and nat_policy_inherit(). */
void nat_zones_build(struct nat_policy *policy, const struct nat_zone_config *config);
void nat_zones_inherit(struct nat_policy *policy, const struct nat_policy *old, uint32_t worker);

/* Is a packet from outside the answer to one that a pass zone let through? */
bool nat_policy_passes(const struct nat_policy *policy, uint32_t outside_source, uint32_t inside_destination);

/* The search of nat_policy_address(), from its first slot on. */
uint32_t nat_policy_address_from(const struct nat_policy *policy, uint32_t address_be, uint32_t at);

/* May it be a pool address? */
static inline bool nat_policy_spans(const struct nat_policy *policy, uint32_t address_be)
{
	return NAT_NTOH32(address_be) - policy->address_low <= policy->address_span;
}

/* Number of a pool address, or UINT32_MAX. Asked up to three times per packet, mostly for addresses that are
 * no pool's: the span of all of them answers those without a branch that varies, and the slots are so sparse
 * that the first one nearly always answers the rest. */
static inline uint32_t nat_policy_address(const struct nat_policy *policy, uint32_t address_be)
{
	if (!nat_policy_spans(policy, address_be))
		return UINT32_MAX;
	const uint32_t at =
		(uint32_t)nat_multiply_fold(address_be ^ policy->address_key.k0, policy->address_key.k1) &
		(policy->address_slots - 1);
	const struct nat_address_slot *slot = &policy->address_slot[at];
	if (slot->address_be == address_be || slot->number == 0)
		return slot->number - 1; /* that of no number is UINT32_MAX */
	return nat_policy_address_from(policy, address_be, at);
}

/* The static mapping of this inside (side 0) or outside (side 1) address, port and protocol; NULL if there is
 * none. */
const struct nat_static *nat_policy_static(const struct nat_policy *policy, unsigned side,
					   uint32_t address_be, uint16_t port_be, uint8_t protocol);

/* Takes one worker's notes over from the policy that was in force: for that worker's own thread, between
 * bursts. */
void nat_policy_inherit(struct nat_policy *policy, const struct nat_policy *old, uint32_t worker);

#endif
