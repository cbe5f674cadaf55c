/* The NAT core: packets in, verdicts and changed bytes out. This is all that a shell (io/) may include.
 *
 * The core is pure. Memory, time, seed and what is known of the world outside (routes, own addresses) are
 *arguments; there is no heap, no clock, no system call, no global. A shell owns packets and time, the core
 *owns the decision:
 *
 *	struct nat_policy *policy = nat_policy_init(mem, &config, NULL);        what to do (immutable, swapped
 *by reload) struct nat_table *table = nat_table_init(shared, size, ...);            session records (outlive
 *the process) struct nat_engine *e = nat_engine_init(mem, &params);                   one per worker
 *
 *	nat_engine_run(e, pkt, n, now_ns);        one burst: each packet gets exactly one verdict
 *	while (nat_engine_next(e, &out))          then: packets the engine made, and held packets it lets go
 *		...
 *
 * Addresses and ports are in network byte order and end in _be, or in host order and have no such ending.
 * Terms (mapping, session, inside, outside, zone, pool) are those of RFC 4787, RFC 6888 and
 *dataplane/README.md.
 */
#ifndef NAT_H
#define NAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "reason.h"

#define NAT_BURST_MAX       64u /* packets in one nat_engine_run() */
#define NAT_INTERFACES_MAX  64u
#define NAT_WORKERS_MAX     64u
#define NAT_MEMBERS_MAX     4u   /* devices that are one by bonding */
#define NAT_NAME_MAX        32u  /* interface, pool; with the closing zero */
#define NAT_RSS_CLASSES_MAX 512u /* entries of a port's redirection table */
#define NAT_RSS_KEY_BYTES   52u  /* the longest key of any port */
#define NAT_MADE_BYTES_MAX                                                                                   \
	576u /* RFC 1812 4.3.2.3: an ICMP error that the engine makes is at most this long */

/* ---- configuration: what ctl/config.c reads out of dsnatd.yaml ---- */

enum nat_role { NAT_ROLE_INSIDE, NAT_ROLE_OUTSIDE };
enum nat_path { NAT_PATH_DPDK, NAT_PATH_NFQUEUE };
enum nat_mapping_kind { NAT_ENDPOINT_DEPENDENT, NAT_ENDPOINT_INDEPENDENT };
enum nat_filtering { NAT_FILTER_ENDPOINT_INDEPENDENT, NAT_FILTER_ADDRESS, NAT_FILTER_ADDRESS_AND_PORT };
enum nat_select { NAT_SELECT_ROUND_ROBIN, NAT_SELECT_PAIRED };
enum nat_announce { NAT_ANNOUNCE_AUTO, NAT_ANNOUNCE_ARP, NAT_ANNOUNCE_NONE };
enum nat_action { NAT_ACTION_POOL, NAT_ACTION_DROP, NAT_ACTION_PASS };
enum nat_midflow { NAT_MIDFLOW_DROP, NAT_MIDFLOW_RESET, NAT_MIDFLOW_ADOPT };
enum nat_refusal { NAT_REFUSAL_SILENT, NAT_REFUSAL_ICMP_ADMIN, NAT_REFUSAL_ICMP_HOST }; /* none, 3/13, 3/1 */

struct nat_interface_config {
	char name[NAT_NAME_MAX];
	char device[128];                  /* PCI address or vdev ("net_tap0,iface=..."); empty: none */
	char member[NAT_MEMBERS_MAX][128]; /* devices of a net_bonding device */
	uint32_t n_members;
	uint16_t vlan; /* 802.1Q tag of its frames on the device; 0: none */
	enum nat_role role;
	enum nat_path path;
	uint16_t mtu_bytes; /* 0: the device's own */
	bool silent;        /* no ICMP error that the engine makes leaves by it (RFC 5508 REQ-9) */
};

struct nat_range { /* addresses first..last inclusive, host order */
	uint32_t first, last;
};

struct nat_prefix { /* host order; 0.0.0.0/0 matches all */
	uint32_t address;
	uint8_t length_bits;
};

struct nat_pool_config {
	char name[NAT_NAME_MAX];
	const struct nat_range *ranges; /* in the file's order, which is the round-robin order */
	uint32_t n_ranges;
	const uint32_t *weights; /* per range: turns of each of its addresses in a round; NULL: one each */
	const struct nat_range *drain; /* addresses of the pool that take no new sessions */
	uint32_t n_drain;
	uint16_t port_first, port_last;
	enum nat_mapping_kind mapping;
	enum nat_filtering filtering; /* endpoint-independent mapping only */
	enum nat_select select;
	enum nat_announce announce;
	uint32_t active_while_be; /* 0: always active */
	/* Port blocks (RFC 6888 REQ-14): a host's ports come in blocks of this many, 0: off. */
	uint16_t block_ports, blocks_per_host;
	/* Deterministic mapping (RFC 7422): the hosts of this prefix share the pool by arithmetic; length 0:
	 * off. The last `dynamic_ports` of each address serve hosts whose own ports are spent. */
	struct nat_prefix deterministic;
	uint16_t dynamic_ports;
	uint8_t log; /* NAT_LOG_* */
};

/* What of a pool goes to a log ring. A public port is told once: with its block, its mapping or its
 * session, and not at all where arithmetic tells it. */
#define NAT_LOG_PORTS    0x1u /* who is given which public port; refusals */
#define NAT_LOG_SESSIONS 0x2u /* every session with its remote besides (RFC 6888 REQ-12 advises against it) */

struct nat_zone_config {
	struct nat_prefix source, destination;
	enum nat_action action;
	uint32_t pool;            /* index into pools, for NAT_ACTION_POOL */
	uint16_t mss_clamp_bytes; /* 0: off */
};

/* A mapping by configuration: it never expires, and anybody may use it from outside. `outside` is an address
 * of a pool. With port 0 (one to one) the address is the host's alone, ports and ICMP identifiers stay as
 * they are; else one port is forwarded. */
struct nat_static_config { /* host order */
	uint32_t inside, outside;
	uint16_t inside_port, outside_port;
	uint8_t protocol; /* IPPROTO_TCP or IPPROTO_UDP; 0 with port 0 */
};

struct nat_timeouts { /* seconds */
	uint32_t tcp_established_s, tcp_opening_s, tcp_closing_s, udp_s, udp_one_way_s, dns_s, icmp_s, hold_s;
};

struct nat_limits { /* 0: none */
	uint32_t sessions_per_host, new_per_host_per_s;
	uint32_t icmp_errors_per_s; /* made by the gateway, per worker */
	uint32_t held_ports;        /* ports that rest after use, per worker (RFC 6888 REQ-8) */
	uint32_t fragments;         /* datagrams in fragments followed at once, per worker */
};

struct nat_config {
	uint32_t workers; /* 0: auto */
	uint32_t
		n_workers; /* the number that really is, set by the program before nat_policy_init(); 0: as `workers` says */
	uint64_t max_sessions;
	const struct nat_interface_config *interfaces;
	uint32_t n_interfaces;
	const struct nat_pool_config *pools;
	uint32_t n_pools;
	const struct nat_zone_config *zones;
	uint32_t n_zones;
	const struct nat_static_config *statics;
	uint32_t n_statics;
	struct nat_limits limits;
	struct nat_timeouts timeouts;
	enum nat_midflow tcp_midflow;
	bool may_degrade;  /* without DPDK the kernel keeps all ports, rather than nothing is served */
	bool port_control; /* hosts may ask for mappings by PCP and NAT-PMP */
	bool pass_other_protocols; /* neither TCP, UDP nor ICMP: to the kernel untranslated, else dropped */
	enum nat_refusal refusal;  /* what the host is told when no session can be made (RFC 5508 REQ-8, RFC
				      6888 REQ-11B) */
};

/* ---- policy: the configuration made ready for packets ---- */

struct nat_policy;

/* Bytes that nat_policy_init() needs. */
size_t nat_policy_size(const struct nat_config *config);

/* `mem` is aligned to 64 bytes and at least nat_policy_size() long. `previous` (may be NULL) gives
 * round-robin cursors and pool activity to zones and pools of the same content and name, so that a reload
 * does not start again at the first address. `config` and what it points to are not needed afterwards. */
struct nat_policy *nat_policy_init(void *mem, const struct nat_config *config,
				   const struct nat_policy *previous);

/* For the pool key `active_while`; may be called while workers run. */
void nat_policy_set_active(struct nat_policy *policy, uint32_t pool, bool active);
bool nat_policy_is_active(const struct nat_policy *policy, uint32_t pool);

/* Is the pool's traffic spread over all workers, or kept by one? One worker, or many, makes no other
 * difference. */
bool nat_config_spreads(const struct nat_config *config, const struct nat_pool_config *pool);

/* Is there a pool that this worker keeps? */
bool nat_policy_keeps(const struct nat_policy *policy, uint32_t worker);

/* The worker that keeps the mappings of this host, for nat_engine_map(). */
uint32_t nat_policy_worker_of_host(const struct nat_policy *policy, uint32_t host_be);

/* Is this an address of a pool? Gives the pool's index, or -1. */
int32_t nat_policy_pool_of(const struct nat_policy *policy, uint32_t address_be);

/* ---- packets ---- */

enum nat_verdict {
	NAT_FORWARD, /* send it: bytes are final, `hop` says where; in the made packets too. When it was too
			large and has been cut, `len_bytes` is less than it was, and the other fragments come
			from nat_engine_next() */
	NAT_PASS,    /* give it to the kernel unchanged */
	NAT_DROP,    /* free it */
	NAT_HOLD, /* the core keeps `l3` and `cookie` until nat_engine_next() gives them back: do not touch or
		     free */
	NAT_HANDOVER, /* give it, unchanged and with its `flags` and `errand`, to worker `owner`, which may be the one
			 that said so: it is to look again in its next round. In order: what is handed over from one
			 worker to another first must arrive first */
};

/* Why a packet was handed over; counted apart. */
enum nat_cause {
	NAT_CAUSE_NO_RSS,   /* the port brought it to another worker than its hash says */
	NAT_CAUSE_ICMP,     /* RSS does not look at identifiers, nor into errors */
	NAT_CAUSE_FRAGMENT, /* nor for ports in fragments */
	NAT_CAUSE_HAIRPIN,  /* from one host's worker to another's */
	NAT_CAUSE_KEPT,     /* its pool is kept by one worker (endpoint-independent mapping, limits ...) */
	NAT_CAUSE_AWAY,     /* its session was begun under another number of workers, or came from a peer */
	NAT_CAUSE_BORROWED, /* its session has a port of another worker, or wants one */
	NAT_CAUSE_QUEUE,    /* it came over the queue path */
	NAT_CAUSE_COUNT
};
const char *nat_cause_name(enum nat_cause cause);

/* What the shell knows of a packet, `flags` in. */
#define NAT_PKT_IP_CSUM_GOOD 0x0001u /* the port has verified the IPv4 header checksum */
#define NAT_PKT_CSUM_PARTIAL                                                                                 \
	0x0002u /* the TCP/UDP checksum field holds only the pseudo-header sum (the kernel's                 \
		   CHECKSUM_PARTIAL, seen on tap and nfqueue): keep it partial */
#define NAT_PKT_KERNEL_ROUTES                                                                                \
	0x0004u /* the kernel forwards it: it decrements TTL and checks the MTU, the core does not */
#define NAT_PKT_TAKEN_OVER 0x0008u /* another worker handed it over: `errand` is what that one left there */

/* What one worker tells another about a packet that it hands over: handover.c. The shell carries it. */
struct nat_errand {
	uint8_t kind, home, from, hops;
	uint8_t reason, flags, cause, zero;
	uint16_t id_be; /* of a fragment, as it came, like its addresses */
	uint16_t zero2;
	uint32_t source_be, destination_be;
};

/* Where a packet goes next. The shell fills it in nat_world.route(); the core copies it into the packet. */
enum nat_hop_kind {
	NAT_HOP_NONE,    /* no route */
	NAT_HOP_FORWARD, /* over `iface` to `next_hop_be` */
	NAT_HOP_LOCAL,   /* an address of the gateway itself */
	NAT_HOP_KERNEL,  /* over an interface that the kernel owns: the translated packet is handed to the
			    kernel */
	NAT_HOP_PROHIBIT /* blackhole, unreachable or prohibit route */
};
struct nat_hop {
	uint32_t next_hop_be;
	uint16_t mtu_bytes; /* 0: not known, no check */
	uint8_t iface; /* index into nat_config.interfaces; of an interface that is not there: 0xff, taken as outside */
	uint8_t kind; /* enum nat_hop_kind */
};

struct nat_tuple { /* of one direction of one flow, as the side that looks it up sees it */
	uint32_t local_be, remote_be;
	uint16_t local_port_be, remote_port_be; /* ICMP echo: the identifier, and 0 */
	uint8_t protocol;                       /* IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMP */
	uint8_t side; /* 0: the inside tuple, local is the host; 1: the outside tuple, local is the pool's */
	uint8_t zero[2];
};
_Static_assert(sizeof(struct nat_tuple) == 16, "hashed as bytes: no hidden padding");

struct nat_pkt {
	/* in */
	uint8_t *l3;        /* first byte of the IPv4 header; writable */
	void *cookie;       /* the shell's own; carried, never read */
	uint32_t len_bytes; /* readable bytes at l3; more than the IPv4 total length is link padding */
	uint16_t flags;     /* NAT_PKT_* */
	uint8_t iface;      /* where it came in: index into nat_config.interfaces */
	/* out */
	uint8_t verdict;    /* enum nat_verdict */
	uint8_t reason;     /* enum nat_reason */
	uint8_t owner;      /* NAT_HANDOVER: the worker */
	uint8_t made;       /* 1: made by the engine itself (nat_engine_next() only) */
	uint8_t settled;    /* the core's: a verdict is in, later stages skip it */
	struct nat_hop hop; /* NAT_FORWARD: where to */
	/* between the core's stages */
	uint32_t zone;
	struct nat_tuple tuple; /* read as two words of 8 bytes, so aligned to them */
	uint64_t hash;
	uint32_t session;     /* record number, or NAT_NO_SESSION */
	uint32_t guess;       /* a record that may be it, on its way to the cache, or NAT_NO_SESSION */
	uint16_t total_bytes; /* IPv4 total length */
	uint16_t l4_offset;
	uint8_t stage_flags;
	uint8_t tcp_flags;
	uint16_t l4_bytes;
	struct nat_errand errand; /* NAT_HANDOVER: for the owner; in with NAT_PKT_TAKEN_OVER */
};

_Static_assert(offsetof(struct nat_pkt, tuple) % 8 == 0, "hashed as two words");

#define NAT_NO_SESSION UINT32_MAX

/* A packet from outside, as the shell has it. All else is the core's to write: a shell that clears the
 * whole spends as much on that as the core on parsing. */
static inline void nat_pkt_present(struct nat_pkt *pkt, uint8_t *l3, uint32_t len_bytes, void *cookie,
				   uint8_t iface, uint16_t flags)
{
	pkt->l3 = l3;
	pkt->cookie = cookie;
	pkt->len_bytes = len_bytes;
	pkt->flags = flags;
	pkt->iface = iface;
	pkt->errand = (struct nat_errand){0};
}

/* ---- what the shell tells the core about the world ---- */

struct nat_world {
	void *context;
	/* Routes for n destinations (network order), n <= NAT_BURST_MAX. Must not block. */
	void (*route)(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n);
	/* The gateway's own address on an interface, 0 if it has none: the source of the ICMP errors it
	 * makes. */
	uint32_t (*own_address)(void *context, uint8_t iface);
};

/* ---- session records: memory that outlives the process ---- */

struct nat_table;

/* Bytes for a table of `max_sessions` records. The memory is position-independent (record numbers, no
 * pointers) and carries its layout's version. */
size_t nat_table_size(uint64_t max_sessions);

/* Makes a new table, or adopts the one that is in `mem` already (`adopted` says which). Returns NULL when
 * `mem` holds a table of another layout version or size: `why` then points to a constant sentence. `mem` is
 * aligned to 64 bytes; fresh memory must be zero. */
struct nat_table *nat_table_init(void *mem, size_t size_bytes, uint64_t max_sessions, uint64_t seed,
				 bool *adopted, const char **why);

/* Gives the policy's pools and zones their stable ids, new ones where the table has none yet. Each engine
 * does this with its first policy and with the next; done before by another thread, that costs its packets
 * nothing. */
void nat_table_bind(struct nat_table *table, struct nat_policy *policy);

/* A table that was made for another max_sessions becomes one for this, and keeps its sessions; to be
 * called before nat_table_init(), with memory that both sizes fit into. False: `mem` holds nothing that
 * could be kept. */
struct nat_resized {
	uint64_t before;      /* records that it had room for */
	uint64_t live, ended; /* records in use; of them, those that have no room any more */
};
uint64_t nat_table_records_for(uint64_t max_sessions);
bool nat_table_resize(void *mem, size_t size_bytes, uint64_t max_sessions, struct nat_resized *done);

/* ---- several workers: see workers.h ---- */

struct nat_rss {                        /* how a port chooses the queue, and so the worker, of a packet */
	uint8_t key[NAT_RSS_KEY_BYTES]; /* Toeplitz */
	uint32_t n_classes;
	uint8_t worker[NAT_RSS_CLASSES_MAX]; /* by the low bits of the hash */
};

/* Does some port lead to each class and each worker? Else it cannot be followed. */
bool nat_rss_is_usable(const struct nat_rss *rss, uint32_t n_workers);

struct nat_workers;

/* What all engines of one gateway share, when there is more than one. `mem` is aligned to 64 bytes.
 * `inside` and `outside` say how the ports of that role spread packets; NULL: in no way worth following. */
size_t nat_workers_size(uint32_t n, uint64_t max_sessions);
struct nat_workers *nat_workers_init(void *mem, uint32_t n, uint64_t max_sessions, uint64_t seed,
				     const struct nat_rss *inside, const struct nat_rss *outside);

/* The worker that packets with this tuple belong to; a session lives with that of its outside tuple. */
uint32_t nat_workers_place(const struct nat_workers *workers, const struct nat_policy *policy,
			   const struct nat_tuple *tuple);

/* The worker to which a port of that side with this RSS brings a packet. For programs without ports. */
uint32_t nat_workers_queue(const struct nat_workers *workers, bool outside, const uint8_t *ip,
			   uint32_t bytes);

/* ---- the engine ---- */

struct nat_engine;

struct nat_engine_params {
	struct nat_table *table;
	struct nat_policy *policy;
	struct nat_world world;
	uint64_t max_sessions; /* of this worker's index; the table's, divided as the shell likes */
	uint64_t seed;         /* ports and hashes: same seed, same input, same output */
	uint64_t now_ns;
	uint32_t worker, n_workers;
	bool replicate;              /* there is a peer to tell: see replica.h */
	struct nat_workers *workers; /* NULL with one worker */
	/* How long allocation takes is measured with it, for nat_counters.allocation only. May be NULL: not
	 * measured. No decision depends on it. */
	uint64_t (*clock_ns)(void);
};

size_t nat_engine_size(const struct nat_engine_params *params);

/* `mem` is aligned to 64 bytes. Sessions that the table already holds for this worker are indexed again.
 * Engines of one table are made in the order of their numbers, before any of them runs. */
struct nat_engine *nat_engine_init(void *mem, const struct nat_engine_params *params);
/* Sessions of the table that nat_engine_init() could not adopt: damaged, or no room. */
uint64_t nat_engine_not_adopted(const struct nat_engine *e);

/* One burst, n <= NAT_BURST_MAX. On return every packet has a verdict. now_ns never runs backwards. */
void nat_engine_run(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n, uint64_t now_ns);

/* Time without packets: ageing, held fragments that timed out. nat_engine_run() includes it. */
void nat_engine_tick(struct nat_engine *e, uint64_t now_ns);

/* What the last run or tick left to send or free beside the burst: packets that the engine made (made = 1,
 * cookie NULL; len_bytes at l3, at most the MTU of `hop`, stay valid until the next run or tick: copy them),
 * and held packets that are now forwarded or dropped (cookie and l3 are the shell's own again).
 * Returns false when there is none. Call until it does, after each run and tick. */
bool nat_engine_next(struct nat_engine *e, struct nat_pkt *out);

/* The new policy holds from the next burst on. The shell frees the old one when every worker has passed. */
void nat_engine_set_policy(struct nat_engine *e, struct nat_policy *policy);

/* ---- trials: what would become of a packet, with everything taken back afterwards (trial.c) ---- */

enum nat_trial_stage {
	NAT_TRIED_NOTHING,
	NAT_TRIED_PARSE,
	NAT_TRIED_SENT,
	NAT_TRIED_CLASSIFY,
	NAT_TRIED_LOOK_UP,
	NAT_TRIED_ROUTE,
	NAT_TRIED_ALLOCATE,
	NAT_TRIED_REWRITE
};

struct nat_session_view {        /* a session as others see it */
	struct nat_tuple inside; /* host and remote */
	uint32_t out_addr_be;
	uint16_t out_port_be;
	uint16_t zone_id, pool_id; /* stable ids: nat_policy_zone_id(), nat_policy_pool_id() */
	const char *state;         /* "opening", "established", "closing", "one_way", "two_way" */
	uint32_t age_s, idle_s, expires_s;
	uint64_t bytes_out, bytes_in;
	uint32_t record;
	uint8_t worker;
};

struct nat_trial {
	/* in */
	struct nat_policy
		*candidate; /* judge by this one, of the same interfaces; NULL: by the one in force */
	/* in and out: l3 is the caller's own copy, rewritten as the packet would be; verdict, reason, hop */
	struct nat_pkt pkt;
	/* out: how it came to that */
	bool whole; /* false: a fragment, which is not tried; there is no verdict */
	enum nat_trial_stage settled_in;
	const struct nat_policy *policy; /* by which it was judged */
	struct nat_hop routed;           /* to the destination that the packet names */
	uint32_t zone;                   /* number in the policy, or UINT32_MAX */
	bool inbound, hairpin, icmp_error;
	struct nat_tuple tuple, first_tuple;     /* looked up; hairpin: that of the first time */
	bool found, begun;                       /* a session that was there, a new one */
	bool over_mapping;                       /* translated by the mapping itself */
	struct nat_session_view session, behind; /* hairpin: behind is that of the second time */
	bool cut;                                /* it would leave in fragments */
	uint32_t made_bytes;                     /* of the packet that the engine would send, 0: none */
	uint8_t made_iface;
	uint8_t made[NAT_MADE_BYTES_MAX];
};

/* From the worker's own thread. */
void nat_engine_try(struct nat_engine *e, struct nat_trial *trial, uint64_t now_ns);

/* ---- capture: packets before and after translation, for somebody who looks (capture.c) ---- */

#define NAT_CAPTURE_PATIENCE_S 10u /* a reader that has not come for so long is gone */

struct nat_capture;

struct nat_capture_params {
	uint32_t snap_bytes; /* kept of each packet, on each side */
	uint32_t n_slots;    /* packets that wait for the reader; a power of two */
	uint32_t sample;     /* one in so many */
	bool by_reason;      /* only packets that do not leave, for these reasons */
	bool reason[NAT_REASON_COUNT];
	/* On the worker's thread. NULL: all. `packet` may be cut at `kept_bytes`. */
	bool (*wants)(void *context, const uint8_t *packet, uint32_t bytes, uint32_t kept_bytes);
	void *context;
};

struct nat_captured {
	uint64_t now_ns;
	uint32_t before_bytes, after_bytes; /* of the packet; 0: the engine made it, it does not leave */
	uint32_t before_kept, after_kept;
	uint8_t iface, out_iface; /* out_iface: 0xff when it does not leave */
	uint8_t verdict, reason, made;
	uint8_t bytes[]; /* before, then after */
};

struct nat_capture_figures {
	uint64_t seen, matched, lost;
	bool left; /* the worker has let go: nobody had come */
};

size_t nat_capture_size(const struct nat_capture_params *params);
/* `mem` is aligned to 64 bytes. */
struct nat_capture *nat_capture_init(void *mem, const struct nat_capture_params *params);
/* From the worker's own thread; NULL ends it. */
void nat_engine_capture(struct nat_engine *e, struct nat_capture *capture);

/* One reader: the oldest packet that waits (NULL: none), which stays until it is released. */
const struct nat_captured *nat_capture_peek(struct nat_capture *capture);
void nat_capture_release(struct nat_capture *capture);
void nat_capture_visit(struct nat_capture *capture); /* the reader is still there */
struct nat_capture_figures nat_capture_look(const struct nat_capture *capture);

/* ---- mappings that hosts ask for (PCP, RFC 6887; NAT-PMP, RFC 6886) ---- */

enum nat_map_result {
	NAT_MAP_OK,
	NAT_MAP_NOT_AUTHORIZED, /* no zone, or its pool is not endpoint-independent, or not in service */
	NAT_MAP_NO_RESOURCES,   /* no port, or the table is full */
	NAT_MAP_QUOTA,          /* the host is at one of its limits */
	NAT_MAP_NOT_THEIRS,     /* there is one with another nonce; lifetime_s says for how long */
};

struct nat_map {
	uint32_t host_be;
	uint16_t port_be;
	uint8_t protocol;    /* IPPROTO_TCP or IPPROTO_UDP */
	bool open;           /* let anybody in (MAP), or only whom the pool's filter lets in (PEER) */
	uint32_t lifetime_s; /* 0: the host needs it no longer; its sessions go on */
	uint32_t outside_be; /* in: suggested, 0 for any; out: given */
	uint16_t outside_port_be;
	uint64_t nonce; /* who asks, in 64 bits; 0: the protocol has none (NAT-PMP) */
};

/* From the worker's own thread. */
enum nat_map_result nat_engine_map(struct nat_engine *e, struct nat_map *ask, uint64_t now_ns);

/* The public address that a host's next mapping will have. False: the host's pool does not keep hosts on
 * one address. */
bool nat_engine_public_address(struct nat_engine *e, uint32_t host_be, uint32_t *address_be);

/* ---- counters ---- */

/* received + taken_over = forwarded + passed + sum(dropped) + handed_over + held, at any moment between
 * bursts. The shell that cannot send what the core forwarded says so with nat_engine_undo(), so that the
 * equation holds to the wire. */
struct nat_traffic {
	uint64_t sessions_created;
	uint64_t packets_out, packets_in, bytes_out, bytes_in; /* out: inside -> outside; IPv4 bytes */
};
enum { NAT_TRAFFIC_TCP, NAT_TRAFFIC_UDP, NAT_TRAFFIC_ICMP, NAT_TRAFFIC_KINDS };

/* From a packet without a session to its address and port, refusals included: how often it took up to so
 * long, by burst. */
#define NAT_LATENCY_BUCKETS 10u
extern const uint64_t nat_latency_ns[NAT_LATENCY_BUCKETS - 1]; /* upper ends; the last bucket has none */
struct nat_latency {
	uint64_t bucket[NAT_LATENCY_BUCKETS];
	uint64_t sum_ns;
};

struct nat_counters {
	uint64_t received, taken_over;
	uint64_t forwarded, passed, handed_over, held;
	uint64_t cause[NAT_CAUSE_COUNT];   /* of what was handed over */
	uint64_t made;                     /* packets that the engine made itself */
	uint64_t reason[NAT_REASON_COUNT]; /* drops by reason; passes by reason too (not part of `dropped`) */
	uint64_t sessions_created, sessions_expired, sessions_closed;
	uint64_t sessions; /* live now */
	uint64_t records;  /* of the table in use: sessions, mappings, permits */
	uint64_t events_lost;
	struct nat_latency allocation;
	struct nat_traffic traffic[NAT_TRAFFIC_KINDS]; /* forwarded */
};
const struct nat_counters *nat_engine_counters(const struct nat_engine *e);

/* A packet with verdict NAT_FORWARD, NAT_PASS or NAT_HANDOVER was not delivered after all: it is counted as
 * dropped for `reason`. */
void nat_engine_undo(struct nat_engine *e, const struct nat_pkt *pkt, enum nat_reason reason);

/* A packet with verdict NAT_FORWARD waits in the shell for its neighbour: it counts as held from waits = true
 * until waits = false, and as forwarded again from then on (so that it can be sent, or undone). */
void nat_engine_wait(struct nat_engine *e, bool waits);

/* A packet that the shell receives but the core never sees (not IPv4, given to the twin): counted received
 * and passed. */
void nat_engine_bypass(struct nat_engine *e, enum nat_verdict verdict, enum nat_reason reason);

const char *nat_reason_name(enum nat_reason reason);
const char *nat_reason_meaning(enum nat_reason reason);
const char *nat_reason_advice(enum nat_reason reason);
enum nat_verdict nat_reason_verdict(enum nat_reason reason);

/* ---- events: what an operator or a log wants to hear of ---- */

enum nat_event_kind {
	NAT_EVENT_PORTS_EXHAUSTED, /* a session was refused with no_port: once per pool in NAT_ALARM_S (RFC
				      6888 REQ-11C) */
	NAT_EVENT_TABLE_FULL,      /* once per worker in NAT_ALARM_S */
	NAT_EVENT_HOST_LIMIT,      /* a host ran into a limit: once per worker in NAT_ALARM_S */
	NAT_EVENT_BLOCK_TAKEN,     /* a host was given a block of ports */
	NAT_EVENT_BLOCK_FREED,
	/* The life of what is translated: for a log ring only. */
	NAT_EVENT_SESSION_CREATED,
	NAT_EVENT_SESSION_ENDED,
	NAT_EVENT_MAPPING_CREATED, /* endpoint-independent */
	NAT_EVENT_MAPPING_ENDED,
	NAT_EVENT_KINDS
};
#define NAT_ALARM_S 60u

struct nat_event {
	uint64_t now_ns;
	uint32_t inside_be, outside_be; /* host; public address */
	uint32_t remote_be;             /* session: towards whom */
	union {
		uint16_t port_first; /* of the block, host order */
		uint16_t inside_port_be;
	};
	union {
		uint16_t port_last;
		uint16_t outside_port_be;
	};
	uint16_t remote_port_be;
	uint16_t pool_id;
	uint8_t kind;     /* enum nat_event_kind */
	uint8_t reason;   /* enum nat_reason of the refusal */
	uint8_t protocol; /* session, mapping, refusal */
	uint8_t implied;  /* session: a mapping, a block or arithmetic tells its public port already */
};
_Static_assert(sizeof(struct nat_event) == 32, "two to a cache line: a busy worker writes many");

/* Takes the oldest event; false when there is none. From the worker's own thread. When nobody takes them the
 * newest are lost and counted in nat_counters.events_lost: the engine never waits. */
bool nat_engine_event(struct nat_engine *e, struct nat_event *event);

/* A log ring: what a worker tells of pools with nat_pool_config.log, to one reader on a thread of its own.
 * What the reader is too slow for is lost, and counted by kind; the worker never waits. */
struct nat_event_ring;

struct nat_event_counts {
	uint64_t put[NAT_EVENT_KINDS], lost[NAT_EVENT_KINDS]; /* put: into the ring, without the lost ones */
};

size_t nat_event_ring_size(uint32_t n_events); /* a power of two */
/* `mem` is aligned to 64 bytes. */
struct nat_event_ring *nat_event_ring_init(void *mem, uint32_t n_events);
/* Up to n of the oldest events; gives how many. The reader only. */
uint32_t nat_event_ring_take(struct nat_event_ring *ring, struct nat_event *event, uint32_t n);
/* Any thread. */
void nat_event_ring_counts(const struct nat_event_ring *ring, struct nat_event_counts *counts);

/* From the worker's own thread; NULL: no log, which costs a new session one branch. */
void nat_engine_log_to(struct nat_engine *e, struct nat_event_ring *ring);

/* The deterministic mapping's answer (RFC 7422): address and first port of a host, and how many ports it has.
 * False for a host outside the prefix or a pool without it. */
bool nat_policy_deterministic(const struct nat_policy *policy, uint32_t pool, uint32_t host_be,
			      uint32_t *address_be, uint16_t *port_first, uint16_t *n_ports);

/* ---- looking at the tables (control socket; from the worker's own thread, or stopped) ---- */

/* Visits up to `budget` records of this worker from *cursor on (start with 0); `visit` returns false to stop
 * early. Returns false when the end was reached. Sessions that begin or end meanwhile may be seen or not. */
bool nat_engine_sessions(struct nat_engine *e, uint64_t *cursor, uint32_t budget, uint64_t now_ns,
			 bool (*visit)(void *context, const struct nat_session_view *view), void *context);

/* Ends a session (dsnatctl clear). False when the record holds none. */
bool nat_engine_clear(struct nat_engine *e, uint32_t record);

/* Ends sessions and mappings whose public address is no longer a pool's (reload --cut): up to `budget`
 * records from *cursor on. Returns false when the end was reached; *ended counts sessions. */
bool nat_engine_cut(struct nat_engine *e, uint64_t *cursor, uint32_t budget, uint64_t now_ns,
		    uint64_t *ended);

/* A remote towards which ports of an address are scarce: there is one for every address that has turned
 * down draws at random. */
struct nat_hot_view {
	uint32_t address_be, pool;
	uint32_t remote_be; /* 0: all remotes (endpoint-independent mapping) */
	uint16_t remote_port_be;
	uint8_t protocol;
	uint32_t taken, known,
		ports; /* of the pool's ports there: in use, among so many looked at, of so many */
};
/* Visits the next one that belongs to a pool, from *cursor on (start with 0); false past the end. */
bool nat_engine_hot(const struct nat_engine *e, uint32_t *cursor, struct nat_hot_view *view);

struct nat_address_view {
	uint32_t address_be;
	uint32_t pool;                        /* index in the policy */
	uint64_t sessions;                    /* live, of this worker */
	uint64_t created;                     /* since the policy first had the address */
	uint64_t mappings[NAT_TRAFFIC_KINDS]; /* endpoint-independent: ports in use */
	uint64_t refused; /* times the address had no free port for the remote that was asked */
	bool draining;
	bool reserved; /* by a one-to-one static mapping */
};
/* The i-th address over all pools of the current policy, in configuration order; false past the end. */
bool nat_engine_address(const struct nat_engine *e, uint32_t i, struct nat_address_view *view);

struct nat_zone_view {
	struct nat_zone_config config;
	uint16_t id;
	uint64_t created, refused; /* sessions, of this worker */
};
bool nat_engine_zone(const struct nat_engine *e, uint32_t i, struct nat_zone_view *view);

uint16_t nat_policy_pool_id(const struct nat_policy *policy, uint32_t pool);
const char *nat_policy_pool_name(const struct nat_policy *policy, uint32_t pool);

#endif
