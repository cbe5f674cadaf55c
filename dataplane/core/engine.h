/* A worker's engine, as its stages share it. engine.c has the path of a burst on one screen.
 *
 * Everything here is private to one worker and is carved from the memory that the shell hands to
 * nat_engine_init(); only the records (nat_table) and the policy are shared, and of those a worker writes
 * only what is its own.
 */
#ifndef NAT_ENGINE_H
#define NAT_ENGINE_H

#include "csum.h"
#include "hash.h"
#include "nat.h"
#include "policy.h"
#include "pool.h"
#include "session.h"
#include "wire.h"
#include "workers.h"

/* nat_pkt.stage_flags */
enum {
	NAT_STAGE_INBOUND = 0x01,  /* from outside: towards a pool address */
	NAT_STAGE_FRAGMENT = 0x02, /* a fragment, first or not */
	NAT_STAGE_LATER = 0x04,    /* a fragment without the transport header */
	NAT_STAGE_ICMP_ERROR =
		0x08, /* tuple is that of the quoted packet, seen from the sender of the error's side */
	NAT_STAGE_HAIRPIN = 0x10, /* from inside to a pool address: goes through the engine a second time */
	NAT_STAGE_SECOND = 0x20,  /* is on that second time: TTL is paid already */
	NAT_STAGE_OVER_MAPPING = 0x40, /* has no session: the mapping itself translates it */
};

/* The timer wheel: one slot per second, several chains per slot so that their records can be fetched
 * together. A record hangs in the slot of its deadline, or in the farthest one; when the slot comes up and
 * the record was refreshed meanwhile, it is hung up again. Refreshing a session therefore costs nothing here.
 */
#define NAT_WHEEL_SLOTS  1024u
#define NAT_WHEEL_CHAINS 16u
#define NAT_OVERDUE_MAX  8192u /* see nat_engine.overdue_left: half a millisecond */
struct nat_wheel {
	uint32_t head[NAT_WHEEL_SLOTS][NAT_WHEEL_CHAINS];
	uint32_t done_s; /* every slot up to this second has been emptied */
};

/* Fragments: see frag.c. */
#define NAT_FRAG_HELD_PER_DATAGRAM 16u
#define NAT_FRAG_SOURCES           256u
#define NAT_FRAG_IDS               1024u
struct nat_frag_entry {
	uint32_t source_be, destination_be; /* before translation */
	uint16_t id_be, new_id_be;
	uint8_t protocol, iface, state, n_held;
	uint32_t new_source_be, new_destination_be;
	struct nat_hop hop;
	uint32_t seen_s;
	uint32_t first_held; /* chain in nat_frags.held, in order of arrival */
	uint32_t next;       /* hash chain */
	uint8_t reason;
	uint8_t stage_flags;
};
struct nat_frag_held {
	struct nat_pkt pkt;
	uint32_t next;
};
struct nat_frags {
	struct nat_frag_entry *entry;
	struct nat_frag_held *held;
	uint32_t *bucket;
	uint32_t n_entries, n_used, n_held, bucket_mask;
	uint32_t free_entry, free_held;
	uint16_t waiting_of[NAT_FRAG_SOURCES]; /* entries without a first fragment, by hash of the source */
	uint32_t n_waiting;                    /* their sum */
	uint32_t hand;                         /* the next entry that ageing looks at */
	uint32_t eviction_hand;
	uint16_t next_id[NAT_FRAG_IDS]; /* identifications, by hash of the addresses and protocol */
};

/* Packets that nat_engine_next() will give out: made by the engine, or let go by frag.c. */
#define NAT_OUTBOX         4096u /* more than one burst of first fragments can let go, and NAT_CUT_MAX */
#define NAT_CUT_MAX        2048u
#define NAT_MADE_PER_BURST 64u
#define NAT_CUT_BYTES      (NAT_BURST_MAX * 9216u) /* a burst of jumbo frames */
struct nat_outbox {
	struct nat_pkt pkt[NAT_OUTBOX];
	uint32_t head, n; /* pkt[head..n) are not given out yet */
	uint8_t made[NAT_MADE_PER_BURST][NAT_MADE_BYTES_MAX];
	uint32_t n_made;
	uint8_t cut[NAT_CUT_BYTES]; /* fragments that frag.c has cut off */
	uint32_t cut_bytes, n_cut;
	uint64_t credit_ns, credited_ns; /* of the rate limit, see icmp.c */
};

/* What is known of an inside host while it has sessions: for limits, and for the paired address. See host.c.
 */
struct nat_host {
	uint32_t address_be; /* 0: empty */
	uint32_t sessions;
	uint32_t paired_be, elsewhere_be; /* its address, and one more that it has sessions on */
	uint32_t at_paired, at_elsewhere; /* how many */
	uint32_t tokens_s;                /* second of the last refill */
	uint32_t tokens;
};
_Static_assert(sizeof(struct nat_host) == NAT_CACHE_LINE / 2, "a host is in one cache line");
struct nat_hosts {
	struct nat_host *slot;
	uint32_t n_slots, used;
};

/* Events for logs and alarms, oldest first. */
#define NAT_EVENTS 4096u
struct nat_events {
	struct nat_event event[NAT_EVENTS];
	uint32_t first, n;
	uint32_t table_full_s, host_limit_s; /* when each was last told, + 1 */
};

/* Is this a real packet, or one that trial.c sends through? */
enum nat_trial_mode { NAT_TRIAL_NONE, NAT_TRIAL_LIVE, NAT_TRIAL_CANDIDATE };

/* What a peer is told: see replica.h. Bits per record of the table; a summary has one per word. */
#define NAT_REPLICA_YOUNG   (1u << 18) /* sessions held back at once; one more is told early */
#define NAT_REPLICA_NAMES   64u
#define NAT_REPLICA_GRACE_S 60u
struct nat_replica_young {
	uint32_t record, since_ms;
};
struct nat_replica_name {
	uint32_t key;
	uint16_t id;
};
struct nat_replicas {
	uint32_t n_words, n_records; /* 0: there is no peer */
	uint32_t hold_back_ms;
	uint64_t *dirty[2], *summary[2]; /* to be told: established sessions, the rest */
	uint64_t *known;
	uint32_t hand[2];
	struct nat_replica_young *young;
	uint32_t first_young, n_young;
	_Atomic uint64_t waiting;
	struct nat_replica_name pool[NAT_REPLICA_NAMES], zone[NAT_REPLICA_NAMES]; /* found last */
};

/* Tuples that another worker has been asked to make a session for; their other packets wait. See handover.c. */
#define NAT_ASKED_MAX 256u
struct nat_asked {
	struct nat_tuple tuple[NAT_ASKED_MAX];
	uint32_t since_s[NAT_ASKED_MAX];
	uint32_t n;
};

/* Packets of a burst whose records, if they have one, do not stand in the first bucket. */
struct nat_elsewhere {
	uint32_t n;
	uint8_t at[NAT_BURST_MAX];
};

/* Random numbers that a burst is going to draw: to know where it will look it has made them before (pool.c). */
struct nat_ahead {
	uint64_t first, n; /* of the counter */
	uint64_t value[NAT_BURST_MAX];
};

struct nat_engine {
	struct nat_policy *policy;
	struct nat_workers *workers; /* NULL: this is the only one */
	struct nat_worker_notes *notes;
	struct nat_table *table;
	struct nat_session *record;
	uint64_t now_ns;
	uint32_t now_s;
	uint32_t worker, n_workers;
	struct nat_tidying tidying; /* of the marks */
	uint32_t timeout_s[NAT_TIMER_COUNT];
	uint32_t overdue_left; /* records that the wheel may still look at in this burst for want of a port */
	struct nat_index index;
	uint32_t *free_record; /* the last one is taken first: it is the one still in the cache */
	uint32_t n_free, free_room;
	uint32_t n_records;    /* the table's */
	uint64_t records_left; /* of params.max_sessions */
	uint64_t not_adopted;
	uint32_t mappings_held; /* in NAT_TIMER_HOLD */
	struct nat_world world;
	struct nat_random random;
	struct nat_elsewhere elsewhere;
	struct nat_ahead ahead;
	struct nat_counters counters;
	struct nat_portsets portsets;
	struct nat_hosts hosts;
	struct nat_frags frags;
	struct nat_wheel wheel;
	struct nat_outbox outbox;
	struct nat_asked asked;
	struct nat_events events;
	struct nat_replicas replicas;
	uint64_t (*clock_ns)(void);  /* NULL: allocation is not measured */
	struct nat_event_ring *log;  /* NULL: nothing is logged */
	struct nat_capture *capture; /* NULL: nobody looks */
	enum nat_trial_mode trial;
};

/* 169.254/16 */
static inline bool nat_is_link_local(uint32_t address_be)
{
	return NAT_NTOH32(address_be) >> 16 == 0xa9fe;
}

/* ---- verdicts ---- */

/* nat_pkt.settled: known.c has counted it already */
#define NAT_SETTLED_COUNTED 2u

static inline void nat_settle(struct nat_pkt *pkt, enum nat_verdict verdict, enum nat_reason reason)
{
	pkt->verdict = (uint8_t)verdict;
	pkt->reason = (uint8_t)reason;
	pkt->settled = 1;
}

static inline void nat_drop(struct nat_pkt *pkt, enum nat_reason reason)
{
	nat_settle(pkt, NAT_DROP, reason);
}

static inline void nat_pass(struct nat_pkt *pkt, enum nat_reason reason)
{
	nat_settle(pkt, NAT_PASS, reason);
}

static inline bool nat_is_inbound(const struct nat_pkt *pkt)
{
	return (pkt->stage_flags & NAT_STAGE_INBOUND) != 0;
}

/* Only the three protocols that are translated ever get here. */
static inline uint32_t nat_traffic_kind(uint8_t protocol)
{
	return protocol == 6 ? NAT_TRAFFIC_TCP : protocol == 17 ? NAT_TRAFFIC_UDP : NAT_TRAFFIC_ICMP;
}

/* A packet that is forwarded; its first bytes have just been written, so they are in the cache. */
static inline void nat_count_traffic(struct nat_counters *c, const struct nat_pkt *pkt)
{
	struct nat_traffic *traffic = &c->traffic[nat_traffic_kind(pkt->l3[NAT_IP_PROTOCOL])];

	if (nat_is_inbound(pkt)) {
		traffic->packets_in++;
		traffic->bytes_in += pkt->total_bytes;
	} else {
		traffic->packets_out++;
		traffic->bytes_out += pkt->total_bytes;
	}
}

/* Does the inside's zone decide, or does a pool's session? On its second time a hairpin comes from outside. */
static inline bool nat_is_from_inside(const struct nat_engine *e, const struct nat_pkt *pkt)
{
	return e->policy->role[pkt->iface] == NAT_ROLE_INSIDE && !(pkt->stage_flags & NAT_STAGE_SECOND);
}

/* The tuple as the outside side of a session sees it. An ICMP query has one identifier, which is the local
 * port on both ways.
 *
 * Two words are written, because the hash reads two words at once: a load that spans several fresh stores
 * waits until they have left the store buffer (measured: 25 cycles per packet). */
static inline void nat_tuple_turn(struct nat_tuple *tuple)
{
	static const struct nat_tuple outside = {.side = 1};
	const bool icmp = tuple->protocol == NAT_PROTO_ICMP;
	uint32_t ports, rest, side;
	uint64_t addresses;

	memcpy(&addresses, &tuple->local_be, sizeof(addresses));
	memcpy(&ports, &tuple->local_port_be, sizeof(ports));
	memcpy(&rest, &tuple->protocol, sizeof(rest));
	memcpy(&side, &outside.protocol, sizeof(side));
	const uint64_t word[2] = {addresses << 32 | addresses >> 32,
				  NAT_PAIR32(icmp ? ports : ports << 16 | ports >> 16, rest | side)};
	memcpy(tuple, word, sizeof(word));
}

/* What a new session will look like, told while its burst is waiting for memory (begin.c). */
struct nat_plan {
	uint64_t counter;                   /* of the random number that it will draw */
	uint64_t hash;                      /* of its outside tuple */
	uint32_t n_sets_made;               /* by then: a later one may hold its port */
	uint32_t turn, next_turn;           /* where its zone's cursor must stand, and where it will */
	uint32_t address, address_be, host; /* the address's number, the host's home */
	uint16_t port_be;
	bool plain;
};

/* Makes the plans of those packets of a burst that will begin a session, and sends for what they will touch. */
void nat_begin_plan(struct nat_engine *e, struct nat_pkt *pkt, const uint32_t *at, uint32_t n_new,
		    struct nat_plan *plan);
/* Makes a session by its plan. `again`: one with this tuple may have been made since. False: it is for the
 * general way. */
bool nat_begin(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_plan *plan, bool again);

/* ---- stages, in the order of the path ---- */

void nat_parse(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);
void nat_route_as_sent(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);
void nat_classify(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);
/* Settles, and counts, the plain packets of sessions that are there (known.c). How many. */
uint32_t nat_known(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);
void nat_session_lookup(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);
void nat_route(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);
void nat_allocate(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);
void nat_rewrite(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);

/* All of them behind the first, for those that go through them one after the other; known.c comes in
 * between. */
#define NAT_STAGES_TO_KNOWN(STAGE)                                                                           \
	STAGE(nat_route_as_sent, SENT)                                                                       \
	STAGE(nat_classify, CLASSIFY)
#define NAT_STAGES_BEHIND(STAGE)                                                                             \
	STAGE(nat_session_lookup, LOOK_UP)                                                                   \
	STAGE(nat_route, ROUTE)                                                                              \
	STAGE(nat_allocate, ALLOCATE)                                                                        \
	STAGE(nat_rewrite, REWRITE)
#define NAT_STAGES(STAGE) NAT_STAGES_TO_KNOWN(STAGE) NAT_STAGES_BEHIND(STAGE)

/* Only the addresses and the TTL: for packets whose ports are elsewhere (rewrite.c). */
void nat_rewrite_addresses(struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be);

/* Memory answers in its own time, and only so many questions at once: it is asked early, evenly, and the
 * answers are read late. While packets are parsed their buckets are sent for, while they are classified
 * the records that their tags point to, and session.c finds all in the cache. */
static inline bool nat_has_own_tuple(const struct nat_pkt *pkt)
{
	return !pkt->settled && !(pkt->stage_flags & (NAT_STAGE_LATER | NAT_STAGE_ICMP_ERROR));
}

static inline void nat_session_fetch_bucket(const struct nat_engine *e, struct nat_pkt *pkt)
{
	struct nat_tuple tuple = pkt->tuple;

	if (!nat_is_from_inside(e, pkt))
		nat_tuple_turn(&tuple); /* as classify.c will, if it is a pool's */
	pkt->hash = nat_tuple_hash_words(&e->index.key, &tuple);
	NAT_PREFETCH(nat_index_bucket(&e->index, pkt->hash));
}

static inline const struct nat_bucket *nat_session_other_bucket(const struct nat_engine *e,
								const struct nat_pkt *pkt)
{
	const struct nat_bucket *bucket = nat_index_bucket(&e->index, pkt->hash);

	return &e->index.bucket[nat_index_alternate(&e->index, (uint32_t)(bucket - e->index.bucket),
						    nat_index_tag(pkt->hash))];
}

/* False: if there is one it stands elsewhere, and that bucket was sent for. */
static inline bool nat_session_fetch_record(const struct nat_engine *e, struct nat_pkt *pkt)
{
	const struct nat_bucket *bucket = nat_index_bucket(&e->index, pkt->hash);
	const uint32_t ways = nat_bucket_ways(bucket, nat_index_tag(pkt->hash));

	if (NAT_LIKELY(ways)) {
		pkt->guess = bucket->entry[NAT_CTZ64(ways)] >> 1;
		NAT_PREFETCH(&e->record[pkt->guess]);
		return true;
	}
	if (bucket->strangers == 0)
		return true;
	NAT_PREFETCH(nat_session_other_bucket(e, pkt));
	return false;
}

/* ---- many workers (handover.c): only where e->workers is set ---- */

/* The worker that packets with this tuple belong to. */
uint32_t nat_place(const struct nat_engine *e, const struct nat_tuple *tuple);

/* Takes up what the worker that handed the packet over has begun; right behind nat_parse(). */
void nat_errands_begin(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);

/* Packets without a session here: hands over those that belong elsewhere, and leaves the others to
 * nat_allocate(). */
void nat_handover(struct nat_engine *e, struct nat_pkt *pkt, uint32_t n);

/* Hands over a later fragment whose datagram is brought together elsewhere. */
bool nat_handover_fragment(struct nat_engine *e, struct nat_pkt *pkt);

/* The first fragment has its verdict: to the place where the others wait for it. False: that is here. */
bool nat_handover_lead(struct nat_engine *e, struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be,
		       uint16_t id_be);

/* The packet goes through the engine for the second time, maybe another one. It came with these. */
void nat_errand_second(struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be, uint16_t id_be);
/* Of such a packet that was taken over: tells the datagram's other fragments. */
void nat_errand_lead(struct nat_engine *e, struct nat_pkt *pkt);
/* Was it taken over for nothing else than that? */
bool nat_was_led(const struct nat_pkt *pkt);

/* Another worker is being asked for a session of this tuple: the packet comes again in the next round. */
bool nat_must_wait(struct nat_engine *e, struct nat_pkt *pkt);

/* There is no port or record for it here: asks the next worker. False: all have been asked, or none may be. */
bool nat_ask_others(struct nat_engine *e, struct nat_pkt *pkt, enum nat_reason reason);
/* The session that another worker has asked for is made, or cannot be for a reason that is nobody's lack. */
void nat_answer(struct nat_engine *e, struct nat_pkt *pkt);

/* Counts a session that lives away from the place of one of its tuples, from its beginning (or adoption)
 * to its end. */
enum nat_away { NAT_AWAY_BORROWED, NAT_AWAY_ADOPTED, NAT_AWAY_ENDS };
void nat_away_count(struct nat_engine *e, const struct nat_session *s, enum nat_away away);
/* The same of all of them, when nat_place() begins to say something else. */
void nat_away_count_all(struct nat_engine *e, enum nat_away away);

/* ---- sessions (session.c) ---- */

static inline uint32_t nat_session_deadline(const struct nat_engine *e, const struct nat_session *s)
{
	_Static_assert((int)NAT_RECORD_ASKED == (int)NAT_STATE_FOREIGN, "asked in one test");
	if (NAT_UNLIKELY((s->flags | s->state) & NAT_RECORD_ASKED)) {
		if (s->flags & NAT_RECORD_ASKED)
			return s->asked_until_s;
		return s->last_seen_s + e->timeout_s[s->timer] + 1 + NAT_REPLICA_GRACE_S;
	}
	return s->last_seen_s + e->timeout_s[s->timer] + 1;
}

/* Time is up, whether the wheel has noticed or not. A mapping in use has no deadline. */
static inline bool nat_session_over(const struct nat_engine *e, const struct nat_session *s)
{
	if ((s->flags & NAT_RECORD_MAPPING) && !(s->flags & NAT_RECORD_ASKED) && s->timer != NAT_TIMER_HOLD)
		return false;
	return (int32_t)(e->now_s - nat_session_deadline(e, s)) >= 0;
}

/* A live record with this tuple, or NAT_NO_RECORD. One whose time is up is ended on the way. */
uint32_t nat_session_find(struct nat_engine *e, const struct nat_tuple *tuple, uint64_t hash);

/* Fills a new record, puts it under both tuples and on the wheel. NAT_NO_RECORD: table or index is full. */
uint32_t nat_session_create(struct nat_engine *e, const struct nat_session *want);
/* The same of a session that was planned. Needs none of what only the general way knows: mappings, blocks,
 * permits. */
uint32_t nat_session_begin(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_plan *plan);
/* Prefetches the records that the next n sessions will get. */
void nat_session_fetch_free(const struct nat_engine *e, uint32_t n);
void nat_session_end(struct nat_engine *e, uint32_t record);

/* The mapping that a session of an endpoint-independent pool stands under, or NAT_NO_RECORD. */
uint32_t nat_session_mapping(struct nat_engine *e, const struct nat_session *s);

/* Has the inside sent to this remote address over this mapping (RFC 4787 address-dependent filtering)? */
bool nat_session_permits(struct nat_engine *e, const struct nat_session *mapping, uint32_t remote_be);

/* A mapping on hold is in use again; others stay as they are. */
void nat_session_resume(struct nat_engine *e, uint32_t mapping, enum nat_timer timer);

/* The time that the host asked for is over, or it needs the mapping no longer: from now on only sessions
 * keep it. */
void nat_session_lapse(struct nat_engine *e, uint32_t mapping);

/* A session has left its mapping. The last one ends it, or puts it on hold. */
void nat_session_leave(struct nat_engine *e, uint32_t mapping);

/* Is its port taken by itself, and not by a mapping or the configuration? A permit owns none. */
static inline bool nat_session_owns_port(const struct nat_session *s)
{
	return (s->flags & (NAT_RECORD_UNDER_MAPPING | NAT_RECORD_STATIC)) == 0 && s->inside.zero[0] == 0;
}

/* Indexes again what the table already holds for this worker. */
void nat_session_adopt(struct nat_engine *e);

/* Counts the sessions of addresses that the policy in force has and `old` had not (recount.c). */
void nat_notes_recount(struct nat_engine *e, const struct nat_policy *old);

/* The record's time-out is now that of `timer`, counted from its last packet. */
void nat_session_set_timer(struct nat_engine *e, uint32_t record, enum nat_timer timer);

/* A record as the control socket shows it (engine.c). */
void nat_session_show(const struct nat_engine *e, uint32_t record, struct nat_session_view *view);

/* Books a packet of the session: state, timer, time, bytes. */
void nat_session_touch(struct nat_engine *e, struct nat_pkt *pkt);

/* ---- the wheel (wheel.c) ---- */

void nat_wheel_init(struct nat_engine *e);
void nat_wheel_hang(struct nat_engine *e, uint32_t record);
void nat_wheel_take(struct nat_engine *e, uint32_t record);

/* Ends what is over; looks at no more than `budget` records. True when it is up to date. */
bool nat_wheel_turn(struct nat_engine *e, uint32_t budget);

/* ---- TCP (tcp.c) ---- */

/* The state after a segment, and the timer that goes with it. */
uint8_t nat_tcp_next(uint8_t state, uint8_t tcp_flags, bool inbound);
enum nat_timer nat_tcp_timer(uint8_t state);

/* ---- ICMP (icmp.c) ---- */

/* Reads the quoted packet of an ICMP error into pkt->tuple. */
void nat_icmp_parse_error(struct nat_pkt *pkt);
/* From inside: to whom the quoted packet went; if it cannot be read, who sent the error. */
uint32_t nat_icmp_quoted_host(const struct nat_pkt *pkt);
void nat_icmp_rewrite_error(struct nat_engine *e, struct nat_pkt *pkt, const struct nat_session *s);

/* An error about pkt (whose bytes are still the original ones), to its sender. Rate-limited; silent where RFC
 * 1122 3.2.2 wants silence. `mtu_bytes` counts for 3/4 only. */
void nat_icmp_make(struct nat_engine *e, const struct nat_pkt *pkt, uint8_t type, uint8_t code,
		   uint16_t mtu_bytes);

/* The answer to a TCP segment in mid-flow without a session: a reset to its sender (RFC 9293 3.5.2). */
void nat_tcp_make_reset(struct nat_engine *e, const struct nat_pkt *pkt);

/* ---- fragments (frag.c) ---- */

size_t nat_frags_size(const struct nat_policy *policy);
void nat_frags_init(struct nat_engine *e, void *mem);

/* Later fragments: gives them what their first fragment got, or holds them. */
void nat_frags_follow(struct nat_engine *e, struct nat_pkt *pkt);

/* A first fragment, which came with these addresses and this identification, has its verdict: remembers it,
 * and lets go those that came before it. */
void nat_frags_lead(struct nat_engine *e, struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be,
		    uint16_t id_be);

/* The next identification from one address to another, in network order (RFC 6864). */
uint16_t nat_frags_id(struct nat_engine *e, uint32_t source_be, uint32_t destination_be, uint8_t protocol);

/* Cuts a packet that is forwarded, may be fragmented and is larger than its next hop takes (RFC 791): it
 * becomes the first fragment, the others go to the outbox. Dropped if there is no room for them. */
void nat_frags_cut(struct nat_engine *e, struct nat_pkt *pkt);
void nat_frags_age(struct nat_engine *e);

/* ---- hosts (host.c) ---- */

/* May this host have one more session? The reason if not. */
enum nat_reason nat_host_admit(struct nat_engine *e, uint32_t address_be);
void nat_host_add(struct nat_engine *e, uint32_t address_be, uint32_t paired_be);
/* Prefetches what the two above will look at: `at`, the host's home, which does not change. */
uint32_t nat_host_fetch(const struct nat_engine *e, uint32_t address_be);
void nat_host_add_at(struct nat_engine *e, uint32_t at, uint32_t address_be, uint32_t paired_be);
void nat_host_remove(struct nat_engine *e, uint32_t address_be, uint32_t paired_be);

/* The public address that this host's next session should use, 0 if it has none. */
uint32_t nat_host_paired(const struct nat_engine *e, uint32_t address_be);

/* A host's record as it is, and put back as it was (NULL: there was none). False: there is none. */
bool nat_host_copy(const struct nat_engine *e, uint32_t address_be, struct nat_host *copy);
void nat_host_restore(struct nat_engine *e, uint32_t address_be, const struct nat_host *was);

/* ---- choosing address and port (choose.c) ---- */

struct nat_choice {
	uint32_t address; /* number in the policy */
	uint16_t port_be;
	bool tracked; /* the record must carry NAT_RECORD_TRACKED */
};

static inline bool nat_in_service(const struct nat_engine *e, uint32_t address)
{
	return !e->policy->address[address].draining && !e->policy->address[address].reserved;
}

/* An address and port for the packet's tuple, or why there is none. */
enum nat_reason nat_choose(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_pool *pool,
			   struct nat_choice *choice);

/* The same of one address and part of its ports. */
enum nat_reason nat_take_at(struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_pool *pool,
			    uint32_t address, uint16_t first, uint16_t last, struct nat_choice *choice);

/* The address (its number) that is tried first; round robin moves `cursor` on. */
uint32_t nat_first_choice(const struct nat_engine *e, const struct nat_pkt *pkt, const struct nat_pool *pool,
			  uint32_t *cursor);

/* The outside tuple that is to be free: towards this remote only, or towards all. */
struct nat_tuple nat_wanted_tuple(const struct nat_engine *e, const struct nat_pkt *pkt,
				  const struct nat_pool *pool, uint32_t address);

/* The time-out that a new session of this packet begins with. */
static inline enum nat_timer nat_first_timer(const struct nat_engine *e, const struct nat_pkt *pkt)
{
	if (pkt->tuple.protocol == NAT_PROTO_TCP)
		return NAT_TIMER_TCP_OPENING;
	if (pkt->tuple.protocol == NAT_PROTO_ICMP)
		return NAT_TIMER_ICMP;
	if (pkt->tuple.remote_port_be == NAT_HTON16(53) && e->timeout_s[NAT_TIMER_DNS] != 0)
		return NAT_TIMER_DNS;
	return NAT_TIMER_UDP_ONE_WAY;
}

/* ---- port blocks (block.c) ---- */

/* A free port of one of the host's blocks of this address, or of a new block: in *port_be, network order.
 * NAT_REASON_HOST_PORTS: the host has all the blocks it may have; NAT_REASON_NO_PORT: the address has none
 * left for it. */
enum nat_reason nat_block_take(struct nat_engine *e, const struct nat_pool *pool, uint32_t address,
			       uint32_t host_be, struct nat_tuple *outside, bool parity, uint16_t like_be,
			       bool *tracked, uint16_t *port_be);

/* A record that owns a port begins or ends. */
void nat_block_count(struct nat_engine *e, const struct nat_session *s, bool begins);
/* The record that a port was taken for found no room: a block that was taken with it is free again. */
void nat_block_leave(struct nat_engine *e, const struct nat_session *want);

/* ---- events (event.c) ---- */

/* For the operator, or for the log ring, which must be there (e->log). Both fill in the time. */
void nat_event_put(struct nat_engine *e, const struct nat_event *event);
void nat_event_log(struct nat_engine *e, const struct nat_event *event);

/* A record has begun; one whose beginning was logged ends. With a log ring only. */
void nat_event_begins(struct nat_engine *e, struct nat_session *s);
void nat_event_ends(struct nat_engine *e, const struct nat_session *s);

/* The time-outs of the policy in force (engine.c). */
void nat_engine_set_time(struct nat_engine *e, uint64_t now_ns);
void nat_engine_set_timeouts(struct nat_engine *e);

/* ---- capture (capture.c), only when e->capture is there ---- */

/* Is the reader still there? If not, the capture is let go. */
bool nat_capture_wanted(struct nat_engine *e);
/* A burst as it comes; then as the engine has judged it. */
void nat_capture_before(struct nat_engine *e, const struct nat_pkt *pkt, uint32_t n);
void nat_capture_after(struct nat_engine *e, const struct nat_pkt *pkt, uint32_t n);
/* What nat_engine_next() gives out. */
void nat_capture_late(struct nat_engine *e, const struct nat_pkt *pkt);

/* ---- outbox ---- */

/* Room for one packet made by the engine, NULL when this burst has made enough. */
uint8_t *nat_outbox_buffer(struct nat_engine *e);
void nat_outbox_put(struct nat_engine *e, const struct nat_pkt *pkt);
bool nat_outbox_has_room(const struct nat_engine *e);

/* ---- a peer (replica.c): what is to be told; only with e->replicas.n_words ---- */

size_t nat_replicas_size(uint64_t n_records);
void nat_replicas_init(struct nat_engine *e, void *mem, uint64_t n_records);
void nat_replica_begins(struct nat_engine *e, uint32_t record);
void nat_replica_changes(struct nat_engine *e, uint32_t record);
void nat_replica_ends(struct nat_engine *e, uint32_t record);

/* A packet of a session of the peer's has come by here: it is ours. */
void nat_replica_take_over(struct nat_engine *e, uint32_t record);

#endif
