/* dsnat-bench: what one core costs, without any I/O.
 *
 *     load.c     memory, a configuration, flows, and frames as a port would have received them
 *     measure.c  frames -> engine -> MAC addresses, with the time stamp counter around it
 *     main.c     which measurements, at which sizes; one JSON row each
 *
 * Flows are numbered. All of a flow follows from its number, but for the outside address and port, which the
 * engine chose and the load remembers. Packets take flows at random, so in another order than that of their
 * creation: walking a table in the order in which it was filled looks twice as fast.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../core/nat.h"

#define BURST       32u
#define RING        1024u /* frames in memory: more than the first cache holds, as with a real port */
#define INSIDE      0u    /* interfaces */
#define OUTSIDE     1u
#define FRAME_BYTES 60u /* 64 on the wire, with the checksum that the port takes off */
#define ETHER_BYTES 14u
#define NEW_MAX     16384u /* sessions that one window of new ones makes, beyond those that are there */

enum pages { PAGES_HUGE, PAGES_PLAIN };

struct outside { /* what the engine gave to a flow */
	uint32_t address_be;
	uint16_t port_be;
};

struct memory {
	void *at;
	size_t bytes, used_bytes; /* mapped, asked for */
	enum pages pages;
};

struct hop_cache; /* routes and neighbours, as ctl/route.c keeps them for workers */

struct load {
	uint8_t protocol;
	bool one_remote; /* all flows talk to one remote endpoint */
	uint64_t n_flows;
	uint64_t now_ns;
	uint64_t chance; /* state of the generator behind the order of packets */
	struct memory table_memory, engine_memory, policy_memory, outside_memory, frame_memory, route_memory;
	struct nat_engine *engine;
	struct outside *outside; /* by flow */
	uint8_t *frames;
	struct hop_cache *routes;
	enum pages pages; /* the worst of its memories */
};

struct nat_pkt;

/* An engine with room for n_flows and NEW_MAX sessions more, with n_flows sessions in it: for TCP
 * established, for UDP answered. `scarce`: 0, or all flows go to one remote over so many pool addresses, in
 * a table for all their ports.
 * False when there is no memory. */
bool load_open(struct load *load, uint8_t protocol, uint64_t n_flows, uint32_t scarce, enum pages wanted,
	       uint64_t seed);
void load_close(struct load *load);

/* The ports of one pool address. */
uint32_t load_ports(void);

/* A number below n. */
uint64_t load_chance(struct load *load, uint64_t n);

/* Writes frame `at` of the ring: the next packet of a flow, from inside or from outside. `first`: it opens
 * the flow. */
void load_frame(struct load *load, uint32_t at, uint64_t flow, uint8_t iface, bool first);

/* Fills the ring with packets of flows taken at random. */
void load_ring(struct load *load, uint8_t iface);

static inline uint8_t *load_frame_at(const struct load *load, uint32_t at)
{
	/* A DPDK buffer: 128 bytes of its own, 128 of headroom, 2048 of data. */
	return load->frames + (size_t)at * (128 + 128 + 2048) + 256;
}

/* One burst of the ring through the shell's part and the engine's. `pkt` has room for BURST. */
void load_present(struct load *load, uint32_t at, uint8_t iface, struct nat_pkt *pkt);
void load_send(struct load *load, struct nat_pkt *pkt);

/* The whole burst; BURST * 62.5 ns (16 million packets a second) pass. */
void load_burst(struct load *load, uint32_t at, uint8_t iface, struct nat_pkt *pkt);

/* Makes flows first .. first + n - 1 known to the engine. False when it refuses one. */
bool load_create(struct load *load, uint64_t first, uint64_t n);

/* ---- measure.c ---- */

#define WINDOWS_MAX 101u
#define RINGS_MAX   1024u

struct figure { /* cycles per packet or session, one per window */
	double window[WINDOWS_MAX];
	uint32_t n;
};

enum stage {
	STAGE_PRESENT,
	STAGE_AGE,
	STAGE_PARSE,
	STAGE_ROUTE_AS_SENT,
	STAGE_CLASSIFY,
	STAGE_KNOWN,
	STAGE_LOOK_UP,
	STAGE_ROUTE,
	STAGE_ALLOCATE,
	STAGE_REWRITE,
	STAGE_SEND,
	STAGE_COUNT
};
extern const char *const stage_name[STAGE_COUNT];

double figure_minimum(const struct figure *figure);
double figure_median(struct figure *figure);
void figure_add(struct figure *figure, double value);

double measure_tsc_hz(void);
double measure_core_per_tsc(void); /* core cycles in one TSC cycle, right now */

/* One window each. */
double measure_packets(struct load *load, uint8_t iface, uint32_t n_rings);
double measure_new_sessions(struct load *load, uint32_t sessions);
void measure_stages(struct load *load, uint8_t iface, bool new, uint32_t n_rings, double stage[STAGE_COUNT]);
/* Everything expires; several windows come of it. */
void measure_expiry(struct load *load, struct figure *figure);

/* Cycles from the receive to the transmit call of single bursts: every packet of a burst waits for the
 * whole of it. */
struct latency {
	double p50, p99, p999;
};

/* `shape` says what is in the way: bursts of known sessions only; every packet a new one every other
 * burst; a backlog of sessions whose time is over, of which each burst ends its share. */
enum shape { SHAPE_KNOWN, SHAPE_NEW, SHAPE_OVER };
struct latency measure_latency(struct load *load, enum shape shape, uint32_t bursts);

/* Cycles of one packet of a known session while the other half of its burst is a SYN flood, the flood's
 * own share taken off; and alone. */
void measure_flood(struct load *load, uint32_t n_rings, double *alone, double *flooded);

#endif
