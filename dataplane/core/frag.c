/* Fragments: only the first one has ports, so the others go where the first one went.
 *
 * An entry follows one datagram, known by (source, destination, identification, protocol) before translation:
 *
 *   FREE     on the free list
 *   WAITING  a later fragment came first: up to NAT_FRAG_HELD_PER_DATAGRAM are held, for WAIT_S at most
 *        may not: fill more than a sixteenth of the table for sources of one hash, nor more than half of it
 * for all: a flood of fragments without a first one hurts its own kind only (RFC 4787 REQ-14a) KNOWN    the
 * first fragment was translated: later ones get its addresses and go on, for KNOWN_S REFUSED  the first
 * fragment was dropped: so are the others may:     both of them be thrown away when a new entry is wanted and
 * none is free; the refused first, then the oldest
 *
 * Fragments are forwarded as they come, never put together. The identification that the first one got on the
 * way out (rewrite.c) holds for all.
 *
 * A packet that is larger than its next hop takes, and may be fragmented, is cut here (RFC 4787 REQ-13a).
 */
#include <string.h>

#include "engine.h"

enum { FREE, WAITING, KNOWN, REFUSED };
enum { WAIT_S = 3, KNOWN_S = 30, AGED_PER_RUN = 8, LOOKED_AT = 32 };
#define NO_ENTRY UINT32_MAX

static uint32_t entries_for(const struct nat_policy *policy)
{
	uint32_t n = policy->limits.fragments == 0 ? 64 : policy->limits.fragments;
	return n > 65536 ? 65536 : n;
}

static uint32_t buckets_for(uint32_t n)
{
	uint32_t buckets = 64;
	while (buckets < n)
		buckets *= 2;
	return buckets;
}

size_t nat_frags_size(const struct nat_policy *policy)
{
	const size_t n = entries_for(policy);
	return n * (sizeof(struct nat_frag_entry) + sizeof(struct nat_frag_held)) +
	       buckets_for((uint32_t)n) * sizeof(uint32_t);
}

/* A number that leaves this worker's remainder. */
static uint16_t first_id(const struct nat_engine *e, uint16_t chance)
{
	const uint32_t id = chance - chance % e->n_workers + e->worker;
	return (uint16_t)(id > UINT16_MAX ? e->worker : id);
}

void nat_frags_init(struct nat_engine *e, void *mem)
{
	struct nat_frags *f = &e->frags;

	f->n_entries = f->n_held = entries_for(e->policy);
	f->held = mem;
	f->entry = (struct nat_frag_entry *)(void *)(f->held + f->n_held);
	f->bucket = (uint32_t *)(void *)(f->entry + f->n_entries);
	f->bucket_mask = buckets_for(f->n_entries) - 1;
	memset(f->bucket, 0xff, (f->bucket_mask + 1) * sizeof(*f->bucket));
	f->free_entry = f->free_held = NO_ENTRY;
	for (uint32_t i = f->n_entries; i-- > 0;) {
		f->entry[i].state = FREE;
		f->entry[i].next = f->free_entry;
		f->free_entry = i;
		f->held[i].next = f->free_held;
		f->free_held = i;
	}
	for (uint32_t i = 0; i < NAT_FRAG_IDS; i++)
		f->next_id[i] = first_id(e, (uint16_t)nat_random_next(&e->random));
}

static uint64_t hash_of(const struct nat_engine *e, uint32_t source_be, uint32_t destination_be,
			uint16_t id_be, uint8_t protocol)
{
	return nat_hash64(&e->index.key, (uint64_t)source_be << 32 | destination_be,
			  (uint64_t)id_be << 16 | protocol);
}

static uint16_t *waiting_of(struct nat_engine *e, uint32_t source_be)
{
	return &e->frags.waiting_of[nat_hash64(&e->index.key, source_be, 3) % NAT_FRAG_SOURCES];
}

static uint32_t find(struct nat_engine *e, uint32_t source_be, uint32_t destination_be, uint16_t id_be,
		     uint8_t protocol)
{
	struct nat_frags *f = &e->frags;
	uint32_t i = f->bucket[hash_of(e, source_be, destination_be, id_be, protocol) & f->bucket_mask];

	for (; i != NO_ENTRY; i = f->entry[i].next) {
		const struct nat_frag_entry *entry = &f->entry[i];
		if (entry->source_be == source_be && entry->destination_be == destination_be &&
		    entry->id_be == id_be && entry->protocol == protocol)
			break;
	}
	return i;
}

static void remove_entry(struct nat_engine *e, uint32_t i)
{
	struct nat_frags *f = &e->frags;
	struct nat_frag_entry *entry = &f->entry[i];
	uint32_t *link = &f->bucket[hash_of(e, entry->source_be, entry->destination_be, entry->id_be,
					    entry->protocol) &
				    f->bucket_mask];

	while (*link != i)
		link = &f->entry[*link].next;
	*link = entry->next;
	entry->state = FREE;
	entry->next = f->free_entry;
	f->free_entry = i;
	f->n_used--;
}

/* None of them holds a packet: those of a datagram are let go when its first fragment is there. */
static void evict_one(struct nat_engine *e)
{
	struct nat_frags *f = &e->frags;
	uint32_t victim = NO_ENTRY;

	for (uint32_t k = 0; k < LOOKED_AT && k < f->n_entries; k++) {
		const uint32_t i = f->eviction_hand;
		const struct nat_frag_entry *entry = &f->entry[i];
		f->eviction_hand = i + 1 == f->n_entries ? 0 : i + 1;
		if (entry->state == REFUSED) {
			victim = i;
			break;
		}
		if (entry->state == KNOWN &&
		    (victim == NO_ENTRY || (int32_t)(entry->seen_s - f->entry[victim].seen_s) < 0))
			victim = i;
	}
	if (victim != NO_ENTRY)
		remove_entry(e, victim);
}

static uint32_t add(struct nat_engine *e, uint32_t source_be, uint32_t destination_be, uint16_t id_be,
		    uint8_t protocol)
{
	struct nat_frags *f = &e->frags;

	if (f->free_entry == NO_ENTRY)
		evict_one(e);
	const uint32_t i = f->free_entry;
	if (i == NO_ENTRY)
		return NO_ENTRY;
	f->free_entry = f->entry[i].next;
	f->n_used++;
	uint32_t *bucket =
		&f->bucket[hash_of(e, source_be, destination_be, id_be, protocol) & f->bucket_mask];
	f->entry[i] = (struct nat_frag_entry){.source_be = source_be,
					      .destination_be = destination_be,
					      .id_be = id_be,
					      .protocol = protocol,
					      .seen_s = e->now_s,
					      .first_held = NO_ENTRY,
					      .next = *bucket};
	*bucket = i;
	return i;
}

static void stop_waiting(struct nat_engine *e, const struct nat_frag_entry *entry)
{
	if (entry->state != WAITING)
		return;
	(*waiting_of(e, entry->source_be))--;
	e->frags.n_waiting--;
}

/* What the first fragment's verdict means for a later one. */
static void apply(struct nat_engine *e, const struct nat_frag_entry *entry, struct nat_pkt *pkt)
{
	if (entry->state == REFUSED) {
		nat_drop(pkt, (enum nat_reason)entry->reason);
		return;
	}
	if (pkt->l3[NAT_IP_TTL] <= 1 && !(pkt->flags & NAT_PKT_KERNEL_ROUTES)) {
		nat_drop(pkt, NAT_REASON_TTL_EXPIRED);
		return;
	}
	const uint16_t mtu_bytes = entry->hop.mtu_bytes;
	if (mtu_bytes != 0 && pkt->total_bytes > mtu_bytes &&
	    (nat_read16(pkt->l3 + NAT_IP_FRAGMENT) & NAT_IP_DF)) {
		nat_drop(pkt, NAT_REASON_TOO_BIG);
		return;
	}
	pkt->hop = entry->hop;
	nat_rewrite_addresses(pkt, entry->new_source_be, entry->new_destination_be);
	if (entry->new_id_be != entry->id_be) {
		uint8_t *checksum = pkt->l3 + NAT_IP_CHECKSUM;
		nat_put16(pkt->l3 + NAT_IP_ID, entry->new_id_be);
		nat_put16(checksum, nat_csum_update(nat_get16(checksum),
						    nat_sum_replace16(0, entry->id_be, entry->new_id_be)));
	}
	nat_settle(pkt, NAT_FORWARD, NAT_REASON_OK);
	nat_count_traffic(&e->counters, pkt);
}

static void hold(struct nat_engine *e, struct nat_frag_entry *entry, struct nat_pkt *pkt)
{
	struct nat_frags *f = &e->frags;
	const uint32_t i = f->free_held;

	if (i == NO_ENTRY || entry->n_held == NAT_FRAG_HELD_PER_DATAGRAM) {
		nat_drop(pkt, NAT_REASON_FRAG_FULL);
		return;
	}
	f->free_held = f->held[i].next;
	f->held[i].pkt = *pkt;
	f->held[i].next = NO_ENTRY;
	uint32_t *tail = &entry->first_held;
	while (*tail != NO_ENTRY)
		tail = &f->held[*tail].next;
	*tail = i;
	entry->n_held++;
	nat_settle(pkt, NAT_HOLD, NAT_REASON_OK);
}

void nat_frags_follow(struct nat_engine *e, struct nat_pkt *pkt)
{
	const uint32_t source_be = nat_get32(pkt->l3 + NAT_IP_SOURCE),
		       destination_be = nat_get32(pkt->l3 + NAT_IP_DESTINATION);
	const uint16_t id_be = nat_get16(pkt->l3 + NAT_IP_ID);

	if (e->workers && nat_handover_fragment(e, pkt))
		return;
	uint32_t i = find(e, source_be, destination_be, id_be, pkt->tuple.protocol);

	if (i == NO_ENTRY) {
		uint16_t *waiting = waiting_of(e, source_be);
		if (*waiting >= e->frags.n_entries / 16 + 1 || e->frags.n_waiting >= e->frags.n_entries / 2) {
			nat_drop(pkt, NAT_REASON_FRAG_FULL);
			return;
		}
		i = add(e, source_be, destination_be, id_be, pkt->tuple.protocol);
		if (i == NO_ENTRY) {
			nat_drop(pkt, NAT_REASON_FRAG_FULL);
			return;
		}
		e->frags.entry[i].state = WAITING;
		(*waiting)++;
		e->frags.n_waiting++;
	}
	if (e->frags.entry[i].state == WAITING)
		hold(e, &e->frags.entry[i], pkt);
	else
		apply(e, &e->frags.entry[i], pkt);
}

/* Lets go what an entry holds: as its state says, or with FRAG_TIMEOUT while it still waits. */
static void let_go(struct nat_engine *e, struct nat_frag_entry *entry)
{
	struct nat_frags *f = &e->frags;

	while (entry->first_held != NO_ENTRY) {
		const uint32_t i = entry->first_held;
		struct nat_pkt pkt = f->held[i].pkt;
		entry->first_held = f->held[i].next;
		f->held[i].next = f->free_held;
		f->free_held = i;
		if (entry->state == WAITING)
			nat_drop(&pkt, NAT_REASON_FRAG_TIMEOUT);
		else
			apply(e, entry, &pkt);
		e->counters.held--;
		if (pkt.verdict == NAT_FORWARD)
			e->counters.forwarded++;
		else
			e->counters.reason[pkt.reason]++;
		nat_outbox_put(e, &pkt);
		nat_frags_cut(e, &e->outbox.pkt[e->outbox.n - 1]);
	}
	entry->n_held = 0;
}

void nat_frags_lead(struct nat_engine *e, struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be,
		    uint16_t id_be)
{
	if (e->workers && nat_handover_lead(e, pkt, source_be, destination_be, id_be))
		return;
	uint32_t i = find(e, source_be, destination_be, id_be, pkt->tuple.protocol);

	if (i == NO_ENTRY)
		i = add(e, source_be, destination_be, id_be, pkt->tuple.protocol);
	if (i == NO_ENTRY)
		return; /* the rest of the datagram will be held and time out; counted there */
	struct nat_frag_entry *entry = &e->frags.entry[i];
	stop_waiting(e, entry);
	entry->seen_s = e->now_s;
	entry->reason = pkt->reason;
	entry->state = pkt->verdict == NAT_FORWARD ? KNOWN : REFUSED;
	entry->hop = pkt->hop;
	entry->new_source_be = nat_get32(pkt->l3 + NAT_IP_SOURCE);
	entry->new_destination_be = nat_get32(pkt->l3 + NAT_IP_DESTINATION);
	entry->new_id_be = nat_get16(pkt->l3 + NAT_IP_ID);
	let_go(e, entry);
}

void nat_frags_age(struct nat_engine *e)
{
	struct nat_frags *f = &e->frags;

	for (uint32_t k = 0; f->n_used != 0 && k < AGED_PER_RUN && k < f->n_entries && nat_outbox_has_room(e);
	     k++) {
		struct nat_frag_entry *entry = &f->entry[f->hand];
		const uint32_t limit_s = entry->state == WAITING ? WAIT_S : KNOWN_S;
		if (entry->state != FREE && e->now_s - entry->seen_s > limit_s) {
			let_go(e, entry);
			stop_waiting(e, entry);
			remove_entry(e, f->hand);
		}
		f->hand = f->hand + 1 == f->n_entries ? 0 : f->hand + 1;
	}
}

/* ---- cutting
 * ---------------------------------------------------------------------------------------------------------
 */

uint16_t nat_frags_id(struct nat_engine *e, uint32_t source_be, uint32_t destination_be, uint8_t protocol)
{
	const uint64_t hash = nat_hash64(&e->index.key, (uint64_t)source_be << 32 | destination_be, protocol);
	uint16_t *next = &e->frags.next_id[hash % NAT_FRAG_IDS];
	const uint16_t id = *next;

	/* Each worker has numbers of its own: those that leave the same remainder. */
	*next = (uint16_t)(id + e->n_workers);
	if (NAT_UNLIKELY(*next < id))
		*next = (uint16_t)e->worker;
	return id;
}

static bool must_be_cut(const struct nat_pkt *pkt)
{
	return pkt->verdict == NAT_FORWARD && pkt->hop.kind == NAT_HOP_FORWARD && pkt->hop.mtu_bytes != 0 &&
	       pkt->total_bytes > pkt->hop.mtu_bytes && !(pkt->flags & NAT_PKT_KERNEL_ROUTES) &&
	       !(nat_read16(pkt->l3 + NAT_IP_FRAGMENT) & NAT_IP_DF);
}

/* Nobody behind us can finish a checksum over several packets. */
static void finish_checksum(struct nat_pkt *pkt)
{
	uint8_t *l4 = pkt->l3 + pkt->l4_offset;
	uint8_t *field = l4 + (pkt->tuple.protocol == NAT_PROTO_TCP ? NAT_TCP_CHECKSUM : NAT_UDP_CHECKSUM);

	if (!(pkt->flags & NAT_PKT_CSUM_PARTIAL))
		return;
	pkt->flags &= (uint16_t)~NAT_PKT_CSUM_PARTIAL;
	const uint16_t sum = nat_csum_bytes(l4, (size_t)pkt->total_bytes - pkt->l4_offset);
	nat_put16(field, sum == 0 ? UINT16_MAX : sum);
}

/* RFC 791: options whose first bit is not set stand in the first fragment only; here their room stays. */
static void blank_options(uint8_t *ip, unsigned header_bytes)
{
	for (unsigned at = NAT_IP_HEADER_BYTES; at < header_bytes;) {
		const uint8_t kind = ip[at];
		unsigned bytes = kind <= 1 || at + 1 == header_bytes ? 1 : ip[at + 1];
		if (kind == 0)
			return;
		if (bytes == 0 || at + bytes > header_bytes)
			bytes = header_bytes - at;
		if (!(kind & 0x80))
			memset(ip + at, 1, bytes);
		at += bytes;
	}
}

static void write_cut(uint8_t *ip, unsigned header_bytes, unsigned payload_bytes, unsigned fragment)
{
	nat_write16(ip + NAT_IP_LENGTH, header_bytes + payload_bytes);
	nat_write16(ip + NAT_IP_FRAGMENT, fragment);
	nat_put16(ip + NAT_IP_CHECKSUM, 0);
	nat_put16(ip + NAT_IP_CHECKSUM, nat_csum_bytes(ip, header_bytes));
}

void nat_frags_cut(struct nat_engine *e, struct nat_pkt *pkt)
{
	struct nat_outbox *box = &e->outbox;

	if (NAT_LIKELY(!must_be_cut(pkt)))
		return;
	const unsigned header_bytes = pkt->l4_offset, payload_bytes = pkt->total_bytes - header_bytes;
	const unsigned fragment = nat_read16(pkt->l3 + NAT_IP_FRAGMENT);
	if (pkt->hop.mtu_bytes < header_bytes + 8) { /* the kernel takes a route with any MTU */
		nat_engine_undo(e, pkt, NAT_REASON_TOO_BIG);
		nat_drop(pkt, NAT_REASON_TOO_BIG);
		return;
	}
	const unsigned each_bytes = (pkt->hop.mtu_bytes - header_bytes) & ~7u;
	const unsigned n = (payload_bytes + each_bytes - 1) / each_bytes - 1;
	if (box->n_cut + n > NAT_CUT_MAX ||
	    box->cut_bytes + n * header_bytes + payload_bytes > NAT_CUT_BYTES) {
		nat_engine_undo(e, pkt, NAT_REASON_FRAG_FULL);
		nat_drop(pkt, NAT_REASON_FRAG_FULL);
		return;
	}
	finish_checksum(pkt);
	/* On the way out our numbers, as for the fragments of others; a remote's packet has the remote's. */
	if (!(pkt->stage_flags & NAT_STAGE_FRAGMENT) &&
	    (!nat_is_inbound(pkt) || (pkt->stage_flags & NAT_STAGE_SECOND)))
		nat_put16(pkt->l3 + NAT_IP_ID,
			  nat_frags_id(e, nat_get32(pkt->l3 + NAT_IP_SOURCE),
				       nat_get32(pkt->l3 + NAT_IP_DESTINATION), pkt->tuple.protocol));
	for (unsigned at = each_bytes; at < payload_bytes; at += each_bytes) {
		const bool last = at + each_bytes >= payload_bytes;
		const unsigned bytes = last ? payload_bytes - at : each_bytes;
		uint8_t *ip = box->cut + box->cut_bytes;
		struct nat_pkt piece = *pkt;

		memcpy(ip, pkt->l3, header_bytes);
		memcpy(ip + header_bytes, pkt->l3 + header_bytes + at, bytes);
		blank_options(ip, header_bytes);
		write_cut(ip, header_bytes, bytes, (fragment + at / 8) | (last ? 0 : NAT_IP_MF));
		piece.l3 = ip;
		piece.cookie = NULL;
		piece.made = 1;
		piece.len_bytes = piece.total_bytes = (uint16_t)(header_bytes + bytes);
		box->cut_bytes += piece.total_bytes;
		box->n_cut++;
		e->counters.made++;
		nat_outbox_put(e, &piece);
	}
	write_cut(pkt->l3, header_bytes, each_bytes, fragment | NAT_IP_MF);
	pkt->len_bytes = pkt->total_bytes = (uint16_t)(header_bytes + each_bytes);
}
