/* Fragments: only the first one has ports, so the others go where the first one went.
 *
 * An entry follows one datagram, known by (source, destination, identification, protocol) before translation:
 *
 *   FREE     on the free list
 *   WAITING  a later fragment came first: up to NAT_FRAG_HELD_PER_DATAGRAM are held, for WAIT_S at most
 *        may not: exist in more than a sixteenth of the table for sources of one hash (a flood hurts its own
 * kind only) KNOWN    the first fragment was translated: later ones get its address and go on, for KNOWN_S
 *   REFUSED  the first fragment was dropped: so are the others
 *
 * Fragments are forwarded as they come, never put together. On the way out the identification is replaced:
 * two hosts behind one public address may use the same at once (RFC 7857 section 10, RFC 6864).
 */
#include <string.h>

#include "engine.h"

enum { FREE, WAITING, KNOWN, REFUSED };
enum { WAIT_S = 3, KNOWN_S = 30, AGED_PER_RUN = 8 };
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
	f->next_id = (uint16_t)nat_random_next(&e->random);
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

static uint32_t add(struct nat_engine *e, uint32_t source_be, uint32_t destination_be, uint16_t id_be,
		    uint8_t protocol)
{
	struct nat_frags *f = &e->frags;
	const uint32_t i = f->free_entry;

	if (i == NO_ENTRY)
		return NO_ENTRY;
	f->free_entry = f->entry[i].next;
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
	pkt->hop = entry->hop;
	nat_rewrite_addresses(pkt, entry->local_be);
	if (entry->new_id_be != entry->id_be) {
		uint8_t *checksum = pkt->l3 + NAT_IP_CHECKSUM;
		nat_put16(pkt->l3 + NAT_IP_ID, entry->new_id_be);
		nat_put16(checksum, nat_csum_update(nat_get16(checksum),
						    nat_sum_replace16(0, entry->id_be, entry->new_id_be)));
	}
	nat_settle(pkt, NAT_FORWARD, NAT_REASON_OK);
	if (nat_is_inbound(pkt))
		e->counters.bytes_in += pkt->total_bytes;
	else
		e->counters.bytes_out += pkt->total_bytes;
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
	uint32_t i = find(e, source_be, destination_be, id_be, pkt->tuple.protocol);

	if (i == NO_ENTRY) {
		uint16_t *waiting = waiting_of(e, source_be);
		if (*waiting >= e->frags.n_entries / 16 + 1) {
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
		/* A hairpin's first fragment is through for the first time only: these wait for it again. */
		if ((pkt.stage_flags & NAT_STAGE_HAIRPIN) && pkt.verdict == NAT_FORWARD)
			nat_engine_second_time(e, &pkt);
		if (pkt.verdict == NAT_HOLD)
			continue;
		e->counters.held--;
		if (pkt.verdict == NAT_FORWARD)
			e->counters.forwarded++;
		else
			e->counters.reason[pkt.reason]++;
		nat_outbox_put(e, &pkt);
	}
	entry->n_held = 0;
}

void nat_frags_lead(struct nat_engine *e, struct nat_pkt *pkt, uint32_t source_be, uint32_t destination_be,
		    uint16_t id_be)
{
	uint32_t i = find(e, source_be, destination_be, id_be, pkt->tuple.protocol);

	if (i == NO_ENTRY)
		i = add(e, source_be, destination_be, id_be, pkt->tuple.protocol);
	if (i == NO_ENTRY)
		return; /* the rest of the datagram will be held and time out; counted there */
	struct nat_frag_entry *entry = &e->frags.entry[i];
	if (entry->state == WAITING)
		(*waiting_of(e, source_be))--;
	entry->seen_s = e->now_s;
	entry->reason = pkt->reason;
	entry->state = pkt->verdict == NAT_FORWARD ? KNOWN : REFUSED;
	entry->new_id_be = id_be;
	if (entry->state == KNOWN) {
		const bool inbound = nat_is_inbound(pkt);
		entry->hop = pkt->hop;
		entry->local_be = nat_get32(pkt->l3 + (inbound ? NAT_IP_DESTINATION : NAT_IP_SOURCE));
		if (!inbound) {
			uint8_t *checksum = pkt->l3 + NAT_IP_CHECKSUM;
			entry->new_id_be = e->frags.next_id++;
			nat_put16(pkt->l3 + NAT_IP_ID, entry->new_id_be);
			nat_put16(checksum, nat_csum_update(nat_get16(checksum),
							    nat_sum_replace16(0, id_be, entry->new_id_be)));
		}
	}
	let_go(e, entry);
}

void nat_frags_age(struct nat_engine *e)
{
	struct nat_frags *f = &e->frags;

	for (uint32_t k = 0; k < AGED_PER_RUN && k < f->n_entries && nat_outbox_has_room(e); k++) {
		struct nat_frag_entry *entry = &f->entry[f->hand];
		const uint32_t limit_s = entry->state == WAITING ? WAIT_S : KNOWN_S;
		if (entry->state != FREE && e->now_s - entry->seen_s > limit_s) {
			let_go(e, entry);
			if (entry->state == WAITING)
				(*waiting_of(e, entry->source_be))--;
			remove_entry(e, f->hand);
		}
		f->hand = f->hand + 1 == f->n_entries ? 0 : f->hand + 1;
	}
}
