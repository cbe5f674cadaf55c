/* Telling sessions to a peer, and taking what it tells. See replica.h. */
#include "replica.h"

#include "engine.h"

#define KEY_OF_NOTHING 0u

/* ---- bits ---- */

static bool has(const uint64_t *bits, uint32_t record)
{
	return bits[record / 64] >> (record % 64) & 1;
}

static void set(uint64_t *bits, uint32_t record)
{
	bits[record / 64] |= UINT64_C(1) << (record % 64);
}

static void clear(uint64_t *bits, uint32_t record)
{
	bits[record / 64] &= ~(UINT64_C(1) << (record % 64));
}

static bool is_dirty(const struct nat_replicas *r, uint32_t record)
{
	return has(r->dirty[0], record) || has(r->dirty[1], record);
}

static void waiting(struct nat_replicas *r, int64_t by)
{
	/* one writer; the control thread only wants to know whether to ask */
	atomic_store_explicit(&r->waiting,
			      atomic_load_explicit(&r->waiting, memory_order_relaxed) + (uint64_t)by,
			      memory_order_relaxed);
}

static bool is_told_soon(const struct nat_session *s)
{
	return s->timer == NAT_TIMER_TCP_ESTABLISHED || s->timer == NAT_TIMER_UDP;
}

static void mark(struct nat_engine *e, uint32_t record)
{
	struct nat_replicas *r = &e->replicas;

	if (is_dirty(r, record))
		return;
	const unsigned class = is_told_soon(&e->record[record]) ? 0 : 1;
	set(r->dirty[class], record);
	set(r->summary[class], record / 64);
	waiting(r, 1);
}

/* ---- memory ---- */

static size_t words_for(uint64_t bits)
{
	return (size_t)((bits + 63) / 64);
}

size_t nat_replicas_size(uint64_t n_records)
{
	const size_t words = words_for(n_records);
	return (3 * words + 2 * words_for(words)) * sizeof(uint64_t) +
	       NAT_REPLICA_YOUNG * sizeof(struct nat_replica_young);
}

void nat_replicas_init(struct nat_engine *e, void *mem, uint64_t n_records)
{
	struct nat_replicas *r = &e->replicas;
	uint64_t *at = mem;

	r->n_words = (uint32_t)words_for(n_records);
	r->n_records = (uint32_t)n_records;
	r->hold_back_ms = 2000;
	for (unsigned class = 0; class < 2; class ++) {
		r->dirty[class] = at;
		at += r->n_words;
		r->summary[class] = at;
		at += words_for(r->n_words);
	}
	r->known = at;
	r->young = (struct nat_replica_young *)(void *)(at + r->n_words);
}

void nat_engine_hold_back(struct nat_engine *e, uint32_t hold_back_ms)
{
	e->replicas.hold_back_ms = hold_back_ms;
}

/* ---- what the engine says ---- */

static uint32_t now_ms(const struct nat_engine *e)
{
	return (uint32_t)(e->now_ns / 1000000);
}

void nat_replica_begins(struct nat_engine *e, uint32_t record)
{
	struct nat_replicas *r = &e->replicas;

	if (e->record[record].state & NAT_STATE_FOREIGN)
		return;
	if (r->n_young == NAT_REPLICA_YOUNG || r->hold_back_ms == 0) {
		/* sooner than asked for, but not lost: what is known is not held back, and nobody would
		 * remind us of it */
		set(r->known, record);
		mark(e, record);
		return;
	}
	r->young[(r->first_young + r->n_young++) % NAT_REPLICA_YOUNG] =
		(struct nat_replica_young){record, now_ms(e)};
}

void nat_replica_changes(struct nat_engine *e, uint32_t record)
{
	if (!(e->record[record].state & NAT_STATE_FOREIGN) && !(e->record[record].flags & NAT_RECORD_MAPPING))
		mark(e, record);
}

void nat_replica_ends(struct nat_engine *e, uint32_t record)
{
	if (has(e->replicas.known, record))
		mark(e, record);
}

void nat_replica_take_over(struct nat_engine *e, uint32_t record)
{
	e->record[record].state &= (uint8_t)~NAT_STATE_FOREIGN;
	nat_wheel_take(e, record); /* a minute earlier */
	nat_wheel_hang(e, record);
	if (e->replicas.n_words)
		mark(e, record);
}

/* ---- telling ---- */

static uint32_t fnv(uint32_t hash, const void *bytes, size_t n)
{
	const uint8_t *at = bytes;

	while (n-- > 0)
		hash = (hash ^ *at++) * 16777619u;
	return hash;
}

static uint32_t key_of_pool(const struct nat_table *table, uint16_t id)
{
	if (id >= table->n_pool_ids)
		return KEY_OF_NOTHING;
	return fnv(2166136261u, table->pool_name[id], strlen(table->pool_name[id]));
}

static uint32_t key_of_zone(const struct nat_table *table, uint16_t id)
{
	if (id >= table->n_zone_ids)
		return KEY_OF_NOTHING;
	const struct nat_zone_identity *zone = &table->zone_identity[id];
	const uint32_t words[4] = {NAT_HTON32(zone->source.address), NAT_HTON32(zone->source.length_bits),
				   NAT_HTON32(zone->destination.address),
				   NAT_HTON32(zone->destination.length_bits)};
	return fnv(2166136261u, words, sizeof(words));
}

static bool is_ours(const struct nat_engine *e, uint32_t record)
{
	const struct nat_session *s = &e->record[record];

	return s->timer != NAT_TIMER_FREE && !(s->flags & NAT_RECORD_MAPPING) &&
	       !(s->state & NAT_STATE_FOREIGN) && s->worker == e->worker;
}

/* So young that it may be over soon; its turn comes by itself (nat_replicas.young). */
static bool is_held_back(const struct nat_engine *e, uint32_t record)
{
	const struct nat_session *s = &e->record[record];

	return !has(e->replicas.known, record) && !is_told_soon(s) &&
	       (uint64_t)(e->now_s - s->created_s + 1) * 1000 < e->replicas.hold_back_ms;
}

static void tell(const struct nat_engine *e, uint32_t record, struct nat_replica *out)
{
	const struct nat_session *s = &e->record[record];

	*out = (struct nat_replica){
		.inside = s->inside,
		.out_addr_be = s->out_addr_be,
		.out_port_be = s->out_port_be,
		.kind = NAT_REPLICA_SESSION,
		.traits = (uint8_t)((s->flags & NAT_RECORD_UNDER_MAPPING ? NAT_REPLICA_UNDER_MAPPING : 0) |
				    (s->flags & NAT_RECORD_STATIC ? NAT_REPLICA_STATIC : 0) |
				    (s->flags & NAT_RECORD_PERMITS ? NAT_REPLICA_PERMITS : 0) |
				    (s->flags & NAT_RECORD_LOGGED ? NAT_REPLICA_LOGGED : 0)),
		.timer = s->timer,
		.state = s->state,
		.slot = record,
		.pool = key_of_pool(e->table, s->pool_id),
		.zone = key_of_zone(e->table, s->zone_id),
		.idle_s = e->now_s - s->last_seen_s,
		.age_s = e->now_s - s->created_s,
	};
}

/* One place that was marked. False: the peer need not hear of it. */
static bool export_one(struct nat_engine *e, uint32_t record, struct nat_replica *out)
{
	struct nat_replicas *r = &e->replicas;

	if (is_ours(e, record) && !is_held_back(e, record) && !nat_session_over(e, &e->record[record])) {
		set(r->known, record);
		tell(e, record, out);
		return true;
	}
	if (!has(r->known, record))
		return false;
	const struct nat_session *s = &e->record[record];
	const bool lives = s->timer != NAT_TIMER_FREE && !(s->flags & NAT_RECORD_MAPPING);
	clear(r->known, record);
	if (s->timer != NAT_TIMER_FREE && s->worker != e->worker)
		return false; /* another worker has the record now, and tells what stands there */
	*out = (struct nat_replica){.kind = lives && (s->state & NAT_STATE_FOREIGN) ? NAT_REPLICA_YOURS
										    : NAT_REPLICA_GONE,
				    .slot = record};
	return true;
}

static void grow_up(struct nat_engine *e)
{
	struct nat_replicas *r = &e->replicas;

	while (r->n_young > 0) {
		const struct nat_replica_young young = r->young[r->first_young];
		if (now_ms(e) - young.since_ms < r->hold_back_ms)
			return;
		r->first_young = (r->first_young + 1) % NAT_REPLICA_YOUNG;
		r->n_young--;
		if (is_ours(e, young.record) && !has(r->known, young.record))
			mark(e, young.record);
	}
}

uint32_t nat_engine_export(struct nat_engine *e, struct nat_replica *out, uint32_t most)
{
	struct nat_replicas *r = &e->replicas;
	const uint32_t n_summary = (uint32_t)words_for(r->n_words);
	uint32_t n = 0;

	grow_up(e);
	for (unsigned class = 0; class < 2; class ++)
		for (uint32_t step = 0; step < n_summary && n < most; step++) {
			const uint32_t group = (r->hand[class] + step) % n_summary;
			while (r->summary[class][group] != 0 && n < most) {
				const uint32_t word = group * 64 + NAT_CTZ64(r->summary[class][group]);
				while (r->dirty[class][word] != 0 && n < most) {
					const uint32_t record = word * 64 + NAT_CTZ64(r->dirty[class][word]);
					clear(r->dirty[class], record);
					waiting(r, -1);
					n += export_one(e, record, &out[n]);
				}
				if (r->dirty[class][word] == 0)
					clear(r->summary[class], word);
			}
			if (n == most)
				r->hand[class] = group; /* go on there: nobody waits for ever */
		}
	return n;
}

uint64_t nat_engine_export_waiting(const struct nat_engine *e)
{
	return atomic_load_explicit(&e->replicas.waiting, memory_order_relaxed) + (e->replicas.n_young > 0);
}

void nat_engine_export_again(struct nat_engine *e, const uint32_t *slot, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (slot[i] >= e->replicas.n_records || e->record[slot[i]].worker != e->worker)
			continue;
		set(e->replicas.known,
		    slot[i]); /* as far as we know: so it hears also that there is nothing */
		mark(e, slot[i]);
	}
}

bool nat_engine_export_all(struct nat_engine *e, uint64_t *cursor, uint32_t budget)
{
	struct nat_replicas *r = &e->replicas;
	uint32_t leased = atomic_load(&e->table->chunks_leased);

	if (leased > e->table->n_chunks)
		leased = e->table->n_chunks;
	for (; *cursor < (uint64_t)leased * NAT_CHUNK && budget > 0; (*cursor)++, budget--) {
		const uint32_t record = (uint32_t)*cursor;
		clear(r->known, record);
		if (is_ours(e, record))
			mark(e, record);
	}
	return *cursor < (uint64_t)leased * NAT_CHUNK;
}

/* ---- are both sides equal? ---- */

static uint64_t sum_of(const struct nat_key *key, uint32_t slot, const struct nat_session *s)
{
	uint64_t word[2];

	memcpy(word, &s->inside, sizeof(word));
	uint64_t sum = nat_sip64(key, word[0] ^ slot);
	sum = nat_sip64(key, sum ^ word[1]);
	sum = nat_sip64(key,
			sum ^ ((uint64_t)s->out_addr_be << 32 | (uint64_t)s->out_port_be << 16 | s->timer));
	return nat_sip64(key, sum ^ ((uint64_t)(s->state & ~NAT_STATE_FOREIGN) << 8 |
				     (s->flags & (NAT_RECORD_STATIC | NAT_RECORD_UNDER_MAPPING))));
}

/* Does its turn to be refreshed lie between the last look and now? Four times in its time-out, each at its
 * own moments. */
static bool is_refreshed(const struct nat_engine *e, uint32_t record, uint32_t since_s)
{
	const struct nat_session *s = &e->record[record];
	const uint32_t every_s = e->timeout_s[s->timer] / 4 + 1, shift_s = record % every_s;

	return (e->now_s + shift_s) / every_s != (since_s + shift_s) / every_s &&
	       e->now_s - s->last_seen_s <= every_s + 1;
}

void nat_engine_export_sum(struct nat_engine *e, uint32_t range, const struct nat_key *key, uint32_t since_s,
			   struct nat_replica_sum *sum)
{
	struct nat_replicas *r = &e->replicas;

	for (uint32_t i = 0; i < NAT_REPLICA_RANGE; i++) {
		const uint32_t record = range * NAT_REPLICA_RANGE + i;
		if (record >= r->n_records)
			return;
		if (!is_dirty(r, record) && has(r->known, record) && !has(sum->without, i)) {
			if (is_refreshed(e, record, since_s)) {
				mark(e, record);
			} else if (is_ours(e, record)) {
				sum->sum += sum_of(key, record, &e->record[record]);
				sum->n++;
			}
		}
		if (is_dirty(r, record))
			set(sum->without, i);
	}
}

void nat_engine_import_sum(struct nat_engine *e, const struct nat_key *key, const uint32_t *record,
			   const uint32_t *slot, uint32_t n, struct nat_replica_sum *sum)
{
	for (uint32_t i = 0; i < n; i++) {
		const struct nat_session *s = &e->record[record[i]];
		if (s->timer == NAT_TIMER_FREE || s->worker != e->worker || !(s->state & NAT_STATE_FOREIGN))
			continue;
		sum->sum += sum_of(key, slot[i], s);
		sum->n++;
	}
}

/* ---- taking ---- */

static uint16_t pool_of_key(struct nat_engine *e, const struct nat_replica *replica)
{
	struct nat_replicas *r = &e->replicas;
	struct nat_replica_name *name = &r->pool[replica->pool % NAT_REPLICA_NAMES];

	if (name->key == replica->pool && name->id < e->table->n_pool_ids && name->key != KEY_OF_NOTHING)
		return name->id;
	for (uint32_t id = 0; id < e->table->n_pool_ids; id++)
		if (key_of_pool(e->table, (uint16_t)id) == replica->pool) {
			*name = (struct nat_replica_name){replica->pool, (uint16_t)id};
			return name->id;
		}
	/* Its name is not known here: then the pool that has the address. */
	const uint32_t address = nat_policy_address(e->policy, replica->out_addr_be);
	return address == UINT32_MAX ? NAT_NO_ID : e->policy->pool[e->policy->address[address].pool].id;
}

static uint16_t zone_of_key(struct nat_engine *e, const struct nat_replica *replica)
{
	struct nat_replicas *r = &e->replicas;
	struct nat_replica_name *name = &r->zone[replica->zone % NAT_REPLICA_NAMES];

	if (name->key == replica->zone && name->id < e->table->n_zone_ids && name->key != KEY_OF_NOTHING)
		return name->id;
	/* Nearly always the one that it would be here. */
	const uint32_t zone = nat_policy_zone(e->policy, NAT_NTOH32(replica->inside.local_be),
					      NAT_NTOH32(replica->inside.remote_be));
	if (zone != NAT_NO_ZONE && key_of_zone(e->table, e->policy->zone[zone].id) == replica->zone)
		return e->policy->zone[zone].id;
	for (uint32_t id = 0; id < e->table->n_zone_ids; id++)
		if (key_of_zone(e->table, (uint16_t)id) == replica->zone) {
			*name = (struct nat_replica_name){replica->zone, (uint16_t)id};
			return name->id;
		}
	return NAT_NO_ID;
}

static uint32_t find(struct nat_engine *e, const struct nat_tuple *tuple)
{
	return nat_session_find(e, tuple, nat_tuple_hash(&e->index.key, tuple));
}

/* Which of two that cannot both be stays: the one that was used last. */
static bool gives_way(const struct nat_engine *e, const struct nat_session *s,
		      const struct nat_replica *replica, bool yields)
{
	const uint32_t idle_s = e->now_s - s->last_seen_s;

	if (s->state & NAT_STATE_FOREIGN)
		return true; /* the peer's own, earlier word */
	return idle_s == replica->idle_s ? yields : idle_s > replica->idle_s;
}

/* Something that stands in the way of a new session ends, if it may. */
static bool make_way(struct nat_engine *e, uint32_t record, const struct nat_replica *replica, bool yields)
{
	struct nat_session *s = &e->record[record];

	if (s->flags & NAT_RECORD_MAPPING) {
		if (s->timer != NAT_TIMER_HOLD)
			return false; /* with sessions under it */
	} else if (!gives_way(e, s, replica, yields)) {
		nat_replica_changes(e, record);
		return false;
	}
	nat_session_end(e, record);
	return true;
}

static bool is_valid(const struct nat_replica *replica)
{
	const uint8_t protocol = replica->inside.protocol;

	return replica->kind == NAT_REPLICA_SESSION && replica->timer > NAT_TIMER_FREE &&
	       replica->timer < NAT_TIMER_HOLD && replica->inside.side == 0 && replica->inside.zero[0] == 0 &&
	       replica->inside.zero[1] == 0 && replica->inside.local_be != 0 && replica->out_addr_be != 0 &&
	       replica->inside.remote_be != 0 && !(replica->state & NAT_STATE_FOREIGN) &&
	       (protocol == NAT_PROTO_TCP || protocol == NAT_PROTO_UDP || protocol == NAT_PROTO_ICMP);
}

/* Times are compared by their difference, so half of all values lie in the future: a session last seen
 * there would live for years. */
static struct nat_replica within_time(const struct nat_replica *said)
{
	struct nat_replica replica = *said;

	if (replica.idle_s > INT32_MAX)
		replica.idle_s = 0;
	if (replica.age_s > INT32_MAX)
		replica.age_s = 0;
	return replica;
}

static void refresh(struct nat_engine *e, uint32_t record, const struct nat_replica *replica)
{
	struct nat_session *s = &e->record[record];

	s->state = replica->state | NAT_STATE_FOREIGN;
	s->timer = replica->timer;
	s->last_seen_s = e->now_s - replica->idle_s;
	s->created_s = e->now_s - replica->age_s;
	nat_wheel_take(e, record);
	nat_wheel_hang(e, record);
}

/* The mapping that the session stands under, made if need be. */
static enum nat_import_result mapping_for(struct nat_engine *e, const struct nat_replica *replica,
					  uint16_t zone_id, uint16_t pool_id, bool yields, uint32_t *mapping)
{
	struct nat_session want = {.inside = replica->inside,
				   .out_addr_be = replica->out_addr_be,
				   .out_port_be = replica->out_port_be,
				   .zone_id = zone_id,
				   .pool_id = pool_id,
				   .flags = NAT_RECORD_MAPPING,
				   .timer = replica->timer};

	want.inside.remote_be = 0;
	want.inside.remote_port_be = 0;
	*mapping = find(e, &want.inside);
	if (*mapping != NAT_NO_RECORD && e->record[*mapping].out_addr_be == replica->out_addr_be &&
	    e->record[*mapping].out_port_be == replica->out_port_be)
		return NAT_IMPORT_DONE;
	if (*mapping != NAT_NO_RECORD && !make_way(e, *mapping, replica, yields))
		return NAT_IMPORT_CONFLICT;
	const struct nat_tuple outside = nat_session_outside(&want);
	const uint32_t holder = find(e, &outside);
	if (holder != NAT_NO_RECORD && !make_way(e, holder, replica, yields))
		return NAT_IMPORT_CONFLICT;
	const uint32_t address = nat_policy_address(e->policy, replica->out_addr_be);
	if (address != UINT32_MAX && want.inside.protocol != NAT_PROTO_TCP &&
	    e->policy->pool[e->policy->address[address].pool].filtering == NAT_FILTER_ENDPOINT_INDEPENDENT)
		want.flags |= NAT_RECORD_HOLDS; /* as allocate.c does */
	if (nat_port_claim(e, &outside))
		want.flags |= NAT_RECORD_TRACKED;
	*mapping = nat_session_create(e, &want);
	if (*mapping != NAT_NO_RECORD)
		return NAT_IMPORT_DONE;
	if (want.flags & NAT_RECORD_TRACKED)
		nat_port_release(e, &want);
	return NAT_IMPORT_FULL;
}

static enum nat_import_result create(struct nat_engine *e, const struct nat_replica *replica, bool yields,
				     uint32_t *record)
{
	struct nat_session want = {.inside = replica->inside,
				   .out_addr_be = replica->out_addr_be,
				   .out_port_be = replica->out_port_be,
				   .zone_id = zone_of_key(e, replica),
				   .pool_id = pool_of_key(e, replica),
				   .flags = replica->traits & NAT_REPLICA_STATIC ? NAT_RECORD_STATIC : 0,
				   .state = NAT_STATE_FOREIGN,
				   .timer = replica->timer};
	const struct nat_tuple outside = nat_session_outside(&want);
	uint32_t mapping = NAT_NO_RECORD;

	if (replica->traits & NAT_REPLICA_LOGGED)
		want.flags |= NAT_RECORD_LOGGED;
	if (replica->traits & NAT_REPLICA_UNDER_MAPPING) {
		const enum nat_import_result result =
			mapping_for(e, replica, want.zone_id, want.pool_id, yields, &mapping);
		if (result != NAT_IMPORT_DONE)
			return result;
		want.flags |= NAT_RECORD_UNDER_MAPPING;
		if (replica->traits & NAT_REPLICA_PERMITS)
			want.flags |= NAT_RECORD_PERMITS;
	} else if (!(want.flags & NAT_RECORD_STATIC) && nat_port_claim(e, &outside)) {
		want.flags |= NAT_RECORD_TRACKED;
	}
	*record = nat_session_create(e, &want);
	if (*record == NAT_NO_RECORD) {
		if (want.flags & NAT_RECORD_TRACKED)
			nat_port_release(e, &want);
		if (mapping != NAT_NO_RECORD && e->record[mapping].references == 0 &&
		    e->record[mapping].timer != NAT_TIMER_HOLD)
			nat_session_end(e, mapping);
		return NAT_IMPORT_FULL;
	}
	if (mapping != NAT_NO_RECORD) {
		nat_session_resume(e, mapping, (enum nat_timer)want.timer);
		e->record[mapping].references++;
	}
	nat_host_add(e, want.inside.local_be, want.out_addr_be);
	refresh(e, *record, replica);
	return NAT_IMPORT_DONE;
}

enum nat_import_result nat_engine_import(struct nat_engine *e, const struct nat_replica *said, bool yields,
					 uint32_t *record)
{
	*record = NAT_NO_RECORD;
	if (!is_valid(said))
		return NAT_IMPORT_INVALID;
	const struct nat_replica sane = within_time(said), *const replica = &sane;
	const struct nat_session as = {.inside = replica->inside,
				       .out_addr_be = replica->out_addr_be,
				       .out_port_be = replica->out_port_be};
	const struct nat_tuple outside = nat_session_outside(&as);
	uint32_t there = find(e, &replica->inside);

	if (there != NAT_NO_RECORD && !(e->record[there].flags & NAT_RECORD_MAPPING) &&
	    e->record[there].out_addr_be == replica->out_addr_be &&
	    e->record[there].out_port_be == replica->out_port_be) {
		if (!gives_way(e, &e->record[there], replica, yields)) {
			mark(e, there);
			return NAT_IMPORT_OURS;
		}
		if (!(e->record[there].state & NAT_STATE_FOREIGN) && has(e->replicas.known, there))
			mark(e, there); /* no longer our place to tell of */
		refresh(e, there, replica);
		*record = there;
		return NAT_IMPORT_DONE;
	}
	if (there != NAT_NO_RECORD && !make_way(e, there, replica, yields))
		return NAT_IMPORT_CONFLICT;
	there = find(e, &outside);
	if (there != NAT_NO_RECORD && !make_way(e, there, replica, yields))
		return NAT_IMPORT_CONFLICT;
	return create(e, replica, yields, record);
}

uint32_t nat_engine_import_place(const struct nat_engine *e, const struct nat_replica *replica)
{
	const struct nat_session as = {.inside = replica->inside,
				       .out_addr_be = replica->out_addr_be,
				       .out_port_be = replica->out_port_be};
	const struct nat_tuple outside = nat_session_outside(&as);

	return e->workers ? nat_place(e, &outside) : e->worker;
}

void nat_engine_import_end(struct nat_engine *e, uint32_t record)
{
	const struct nat_session *s = &e->record[record];

	if (record >= e->table->n_records || s->worker != e->worker || s->timer == NAT_TIMER_FREE ||
	    (s->flags & NAT_RECORD_MAPPING) || !(s->state & NAT_STATE_FOREIGN))
		return;
	e->counters.sessions_closed++;
	nat_session_end(e, record);
}

void nat_engine_import_ours(struct nat_engine *e, uint32_t record)
{
	const struct nat_session *s = &e->record[record];

	if (record < e->table->n_records && s->worker == e->worker && s->timer != NAT_TIMER_FREE &&
	    !(s->flags & NAT_RECORD_MAPPING) && (s->state & NAT_STATE_FOREIGN))
		nat_replica_take_over(e, record);
}

bool nat_engine_take_orphans(struct nat_engine *e, const uint32_t *origin, uint64_t *cursor, uint32_t budget)
{
	uint32_t leased = atomic_load(&e->table->chunks_leased);

	if (leased > e->table->n_chunks)
		leased = e->table->n_chunks;
	for (; *cursor < (uint64_t)leased * NAT_CHUNK && budget > 0; (*cursor)++, budget--) {
		const uint32_t record = (uint32_t)*cursor;
		const struct nat_session *s = &e->record[record];
		if (s->timer != NAT_TIMER_FREE && !(s->flags & NAT_RECORD_MAPPING) &&
		    s->worker == e->worker && (s->state & NAT_STATE_FOREIGN) &&
		    origin[record] == NAT_NO_SESSION)
			nat_replica_take_over(e, record);
	}
	return *cursor < (uint64_t)leased * NAT_CHUNK;
}
