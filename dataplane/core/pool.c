/* Free ports. pool.h tells how; here is the arithmetic. */
#include "pool.h"

#include <string.h>

#include "engine.h"

#define WELL_KNOWN 1024u /* RFC 4787 REQ-3a: ports below this one are a class of their own */

/* One set per 16384 sessions is enough for every pair that is really hot (a quarter of its ports taken). */
static uint32_t sets_for(uint64_t max_sessions)
{
	uint64_t n = max_sessions / 16384 + 16;
	return n > 65536 ? 65536 : (uint32_t)n;
}

static uint32_t buckets_for(uint32_t n_sets)
{
	uint32_t n = 16;
	while (n < n_sets * 2)
		n *= 2;
	return n;
}

size_t nat_portsets_size(uint64_t max_sessions)
{
	uint32_t n = sets_for(max_sessions);
	return (n + 1) * sizeof(struct nat_portset) + buckets_for(n) * sizeof(uint32_t);
}

void nat_portsets_forget(struct nat_engine *e)
{
	memset(e->portsets.bucket, 0, (e->portsets.bucket_mask + 1) * sizeof(uint32_t));
	e->portsets.n_used = 0;
	e->portsets.hand = 0;
}

void nat_portsets_init(struct nat_engine *e, void *mem, uint64_t max_sessions)
{
	e->portsets.n_sets = sets_for(max_sessions);
	e->portsets.set = mem;
	e->portsets.bucket =
		(uint32_t *)(void *)((uint8_t *)mem + (e->portsets.n_sets + 1) * sizeof(struct nat_portset));
	e->portsets.bucket_mask = buckets_for(e->portsets.n_sets) - 1;
	nat_portsets_forget(e);
}

/* ---- finding and making sets ---- */

static uint32_t *chain_of(const struct nat_engine *e, uint32_t address_be, uint32_t remote_be,
			  uint16_t remote_port_be, uint8_t protocol)
{
	uint64_t hash = nat_hash64(&e->index.key, (uint64_t)address_be << 32 | remote_be,
				   (uint64_t)remote_port_be << 8 | protocol);
	return &e->portsets.bucket[hash & e->portsets.bucket_mask];
}

static struct nat_portset *find_set(const struct nat_engine *e, uint32_t address_be, uint32_t remote_be,
				    uint16_t remote_port_be, uint8_t protocol)
{
	if (e->portsets.n_used == 0)
		return NULL;
	uint32_t number = *chain_of(e, address_be, remote_be, remote_port_be, protocol);
	while (number != 0) {
		struct nat_portset *set = &e->portsets.set[number - 1];
		if (set->address_be == address_be && set->remote_be == remote_be &&
		    set->remote_port_be == remote_port_be && set->protocol == protocol)
			return set;
		number = set->next;
	}
	return NULL;
}

static void unchain(struct nat_engine *e, struct nat_portset *set)
{
	uint32_t *link = chain_of(e, set->address_be, set->remote_be, set->remote_port_be, set->protocol);
	while (*link != (uint32_t)(set - e->portsets.set) + 1)
		link = &e->portsets.set[*link - 1].next;
	*link = set->next;
}

/* The least recently touched of eight under the hand, which moves on. */
static struct nat_portset *oldest_set(const struct nat_portsets *sets, uint32_t *hand)
{
	struct nat_portset *oldest = NULL;
	for (int i = 0; i < 8; i++) {
		struct nat_portset *set = &sets->set[*hand];
		*hand = *hand + 1 == sets->n_sets ? 0 : *hand + 1;
		if (!oldest || (int32_t)(set->touched - oldest->touched) < 0)
			oldest = set;
	}
	return oldest;
}

static struct nat_portset *spare_set(struct nat_engine *e)
{
	struct nat_portsets *sets = &e->portsets;
	if (sets->n_used < sets->n_sets)
		return &sets->set[sets->n_used++];
	struct nat_portset *oldest = oldest_set(sets, &sets->hand);
	unchain(e, oldest);
	return oldest;
}

static struct nat_portset *make_set(struct nat_engine *e, const struct nat_tuple *outside)
{
	struct nat_portset *set = spare_set(e);
	uint32_t *chain = chain_of(e, outside->local_be, outside->remote_be, outside->remote_port_be,
				   outside->protocol);

	e->portsets.n_made++;
	set->address_be = outside->local_be;
	set->remote_be = outside->remote_be;
	set->remote_port_be = outside->remote_port_be;
	set->protocol = outside->protocol;
	set->next = *chain;
	*chain = (uint32_t)(set - e->portsets.set) + 1;
	memset(set->known, 0, sizeof(set->known));
	memset(set->full, 0, sizeof(set->full));
	return set;
}

/* ---- sets of a trial ---- */

/* A trial makes no set that others would find: it has one of its own, behind the others. It only notes
 * which address would have got one, and whose set would have made room for it, because the packet's
 * further draws depend on that. */
static struct nat_portset *trial_set(struct nat_engine *e)
{
	struct nat_portset *set = &e->portsets.set[e->portsets.n_sets];
	memset(set->known, 0, sizeof(set->known));
	memset(set->full, 0, sizeof(set->full));
	return set;
}

static struct nat_portset *make_trial_set(struct nat_engine *e, uint32_t address_be)
{
	struct nat_portsets *sets = &e->portsets;

	if (sets->n_trial < NAT_TRIAL_SETS) {
		struct nat_trial_set *note = &sets->trial[sets->n_trial++];
		note->address_be = address_be;
		note->instead_of = sets->n_used + sets->n_trial > sets->n_sets && e->trial == NAT_TRIAL_LIVE
					   ? oldest_set(sets, &sets->trial_hand)
					   : NULL;
	}
	return trial_set(e);
}

/* What the packet itself would find. */
static struct nat_portset *find_trial_set(struct nat_engine *e, struct nat_portset *set, uint32_t address_be)
{
	for (uint32_t i = 0; i < e->portsets.n_trial; i++) {
		if (e->portsets.trial[i].address_be == address_be)
			return trial_set(e);
		if (set && e->portsets.trial[i].instead_of == set)
			set = NULL;
	}
	return set;
}

void nat_portsets_begin_trial(struct nat_engine *e)
{
	e->portsets.n_trial = 0;
	e->portsets.trial_hand = e->portsets.hand;
}

/* ---- classes ---- */

struct span { /* of ports, both ends included */
	uint16_t first, last;
};

/* The part of `all` that is below 1024 if `like_be` is, else the part above; all of it if it has only one. */
static struct span class_of(struct span all, uint16_t like_be)
{
	if (all.first >= WELL_KNOWN || all.last < WELL_KNOWN)
		return all;
	if (NAT_NTOH16(like_be) < WELL_KNOWN)
		return (struct span){all.first, WELL_KNOWN - 1};
	return (struct span){WELL_KNOWN, all.last};
}

/* ---- ports that lead back to this worker (workers.h) ---- */

struct ours {
	const struct nat_spread *spread; /* NULL: all of them */
	uint32_t rest;                   /* of the replies' hash: all but the port */
	uint32_t worker;
};

NAT_ALWAYS_INLINE struct ours ours_of(const struct nat_engine *e, const struct nat_tuple *outside)
{
	struct ours ours = {.worker = e->worker};

	if (NAT_LIKELY(!e->workers))
		return ours;
	const uint32_t address = nat_policy_address(e->policy, outside->local_be);
	if (e->policy->pool[e->policy->address[address].pool].keeper != NAT_SPREAD)
		return ours;
	ours.spread = &e->workers->spread[1];
	ours.rest = nat_spread_rest(ours.spread, outside);
	return ours;
}

static bool is_ours(const struct ours *ours, uint32_t port)
{
	return NAT_LIKELY(!ours->spread) ||
	       nat_spread_worker(ours->spread, ours->rest ^ nat_spread_port(ours->spread, 1, port)) ==
		       ours->worker;
}

/* ---- words ---- */

static bool has_bit(const uint64_t *bits, uint32_t i)
{
	return bits[i / 64] >> (i % 64) & 1;
}

static uint32_t count_bits(uint64_t bits)
{
	uint32_t n = 0;
	for (; bits; bits &= bits - 1)
		n++;
	return n;
}

static void set_bit(uint64_t *bits, uint32_t i)
{
	bits[i / 64] |= UINT64_C(1) << (i % 64);
}

static void clear_bit(uint64_t *bits, uint32_t i)
{
	bits[i / 64] &= ~(UINT64_C(1) << (i % 64));
}

/* The ports of a word that lie in first..last. */
static uint64_t ports_in_range(uint32_t word, uint16_t first, uint16_t last)
{
	uint64_t inside = UINT64_MAX;
	if (word == first / 64u)
		inside &= UINT64_MAX << first % 64;
	if (word == last / 64u)
		inside &= UINT64_MAX >> (63 - last % 64);
	return inside;
}

/* A port that the configuration forwards is nobody else's. */
static bool is_forwarded(const struct nat_engine *e, const struct nat_tuple *outside, uint16_t port_be)
{
	return nat_policy_static(e->policy, 1, outside->local_be, port_be, outside->protocol) != NULL;
}

/* Looks up the word's 64 ports. The hashes come first, so that the look-ups wait for memory together. */
static void learn_word(struct nat_engine *e, struct nat_portset *set, uint32_t word,
		       const struct nat_tuple *outside)
{
	const struct ours ours = ours_of(e, outside);
	struct nat_tuple tuple = *outside;
	uint64_t hash[64], taken = 0; /* a port that is not ours is as good as taken */

	for (uint32_t bit = 0; bit < 64 && ours.spread; bit++)
		if (!is_ours(&ours, word * 64 + bit))
			taken |= UINT64_C(1) << bit;
	for (uint32_t bit = 0; bit < 64; bit++) {
		if (taken >> bit & 1)
			continue;
		tuple.local_port_be = NAT_HTON16(word * 64 + bit);
		hash[bit] = nat_tuple_hash(&e->index.key, &tuple);
		NAT_PREFETCH(nat_index_bucket(&e->index, hash[bit]));
	}
	for (uint32_t bit = 0; bit < 64 && e->policy->n_statics != 0; bit++)
		if (is_forwarded(e, outside, NAT_HTON16(word * 64 + bit)))
			taken |= UINT64_C(1) << bit;
	for (uint32_t bit = 0; bit < 64; bit++) {
		if (taken >> bit & 1)
			continue;
		tuple.local_port_be = NAT_HTON16(word * 64 + bit);
		uint32_t record = nat_session_find(e, &tuple, hash[bit]);
		if (record == NAT_NO_RECORD)
			continue;
		taken |= UINT64_C(1) << bit;
		e->record[record].flags |= NAT_RECORD_TRACKED;
	}
	set->taken[word] = taken;
	set_bit(set->known, word);
	if (taken == UINT64_MAX)
		set_bit(set->full, word);
}

/* The next word at or behind `from`, up to `last`, that is not known to be full; NAT_PORT_WORDS if there is
 * none. */
static uint32_t next_open_word(const struct nat_portset *set, uint32_t from, uint32_t last)
{
	for (uint32_t group = from / 64; group <= last / 64; group++) {
		uint64_t open = ~set->full[group];
		if (group == from / 64)
			open &= UINT64_MAX << from % 64;
		if (open) {
			uint32_t word = group * 64 + NAT_CTZ64(open);
			return word <= last ? word : NAT_PORT_WORDS;
		}
	}
	return NAT_PORT_WORDS;
}

/* One of the `open` bits, chosen by chance. */
static uint32_t choose_bit(uint64_t open, uint64_t chance)
{
	const unsigned turn = (unsigned)(chance & 63);
	const uint64_t turned = turn ? open >> turn | open << (64 - turn) : open;

	return (NAT_CTZ64(turned) + turn) % 64;
}

static uint16_t take_from_word(struct nat_portset *set, uint32_t word, uint64_t open, uint64_t chance)
{
	const uint32_t bit = choose_bit(open, chance);

	set->taken[word] |= UINT64_C(1) << bit;
	if (set->taken[word] == UINT64_MAX)
		set_bit(set->full, word);
	return NAT_HTON16(word * 64 + bit);
}

/* A port of `span` that fits `pattern` (for each word of 64), out of `budget` words with room at most. */
static uint16_t take_pattern(struct nat_engine *e, struct nat_portset *set, const struct nat_tuple *outside,
			     struct span span, uint64_t pattern, uint32_t budget)
{
	const uint32_t first_word = span.first / 64u, last_word = span.last / 64u;
	const uint64_t chance = nat_random_next(&e->random);
	const uint32_t start = first_word + nat_scale32((uint32_t)(chance >> 32), last_word - first_word + 1);

	for (int half = 0; half < 2; half++) {
		uint32_t from = half == 0 ? start : first_word, end = half == 0 ? last_word : start;
		for (uint32_t word; from <= end && (word = next_open_word(set, from, end)) != NAT_PORT_WORDS;
		     from = word + 1) {
			if (budget-- == 0)
				return 0;
			if (!has_bit(set->known, word))
				learn_word(e, set, word, outside);
			const uint64_t open =
				~set->taken[word] & pattern & ports_in_range(word, span.first, span.last);
			if (open)
				return take_from_word(set, word, open, chance);
		}
	}
	return 0;
}

static uint16_t take_from_set(struct nat_engine *e, struct nat_portset *set, const struct nat_tuple *outside,
			      struct span span, bool alike, uint16_t like_be)
{
	set->touched = ++e->portsets.clock;
	if (alike) {
		const uint64_t parity = UINT64_C(0x5555555555555555) << (NAT_NTOH16(like_be) & 1);
		uint16_t port_be =
			take_pattern(e, set, outside, class_of(span, like_be), parity, NAT_ALIKE_WORDS);
		if (port_be)
			return port_be;
	}
	return take_pattern(e, set, outside, span, UINT64_MAX, UINT32_MAX);
}

/* ---- the two ways ---- */

/* 0: the drawn port has the wrong parity, and the one beside it is not ours. */
static uint32_t port_by(uint32_t chance, struct span span, bool parity, uint16_t like_be)
{
	uint32_t port = span.first + nat_scale32(chance, (uint32_t)span.last - span.first + 1);

	if (parity && ((port ^ NAT_NTOH16(like_be)) & 1)) {
		port ^= 1;
		if (port < span.first || port > span.last)
			return 0;
	}
	return port;
}

/* The same, and one of this worker's: further numbers are made of the first, which nobody knows. 0: none
 * was met. */
static uint32_t port_of_ours(const struct ours *ours, uint32_t chance, struct span span, bool parity,
			     uint16_t like_be)
{
	uint32_t port = port_by(chance, span, parity, like_be);

	if (NAT_LIKELY(!ours->spread) || port == 0)
		return port;
	uint64_t more = chance;
	for (uint32_t try = 0; !is_ours(ours, port); try++) {
		if (try == NAT_PORT_TRIES)
			return 0;
		more = nat_multiply_fold(more ^ UINT64_C(0x2545f4914f6cdd1d), UINT64_C(0x9e3779b97f4a7c15));
		port = port_by((uint32_t)more, span, parity, like_be);
	}
	return port;
}

/* Several at once, in as many lanes as the processor has. `n` is a multiple of 8. */
NAT_FOR_EACH_CPU static void make_numbers(const struct nat_random *random, uint64_t *value, uint32_t n)
{
	const struct nat_key key = random->key;
	const uint64_t first = random->counter;

	for (uint32_t i = 0; i < n / 8 * 8; i++)
		value[i] = nat_sip64(&key, first + i);
}

void nat_port_look_ahead(struct nat_engine *e, uint32_t n)
{
	_Static_assert(NAT_BURST_MAX % 8 == 0, "rounded up, they fit");
	e->ahead.first = e->random.counter;
	e->ahead.n = n;
	make_numbers(&e->random, e->ahead.value, (n + 7) / 8 * 8);
}

/* The number of a counter is the same whenever it is made. */
static uint64_t random_at(const struct nat_engine *e, uint64_t counter)
{
	const uint64_t i = counter - e->ahead.first;

	return NAT_LIKELY(i < e->ahead.n) ? e->ahead.value[i] : nat_sip64(&e->random.key, counter);
}

/* What take_pattern() would take from the first word with room that it comes by; 0 if it has to look on. */
static uint32_t port_of_set(const struct nat_portset *set, struct span span, uint64_t chance)
{
	const uint32_t first_word = span.first / 64u, last_word = span.last / 64u;
	const uint32_t start = first_word + nat_scale32((uint32_t)(chance >> 32), last_word - first_word + 1);
	const uint32_t word = next_open_word(set, start, last_word);

	if (word == NAT_PORT_WORDS || !has_bit(set->known, word))
		return 0;
	const uint64_t open = ~set->taken[word] & ports_in_range(word, span.first, span.last);
	return open ? word * 64 + choose_bit(open, chance) : 0;
}

uint16_t nat_port_forecast(const struct nat_engine *e, const struct nat_tuple *outside, uint32_t ahead,
			   uint16_t first, uint16_t last, bool alike, uint16_t like_be, bool *of_set)
{
	const struct span all = {first, last}, span = alike ? class_of(all, like_be) : all;
	const struct ours ours = ours_of(e, outside);
	const uint64_t chance = random_at(e, e->random.counter + ahead);
	const struct nat_portset *set = find_set(e, outside->local_be, outside->remote_be,
						 outside->remote_port_be, outside->protocol);

	*of_set = set != NULL;
	if (NAT_UNLIKELY(set != NULL) && !alike)
		return NAT_HTON16(port_of_set(set, all, chance));
	return NAT_HTON16(port_of_ours(&ours, (uint32_t)chance, span, alike, like_be));
}

static uint16_t draw(struct nat_engine *e, struct nat_tuple *outside, struct span span, bool parity,
		     uint16_t like_be)
{
	const struct ours ours = ours_of(e, outside);
	uint64_t chance = 0;

	for (uint32_t probe = 0; probe < NAT_PORT_PROBES; probe++) {
		chance = probe % 2 == 0 ? random_at(e, e->random.counter++) : chance >> 32;
		const uint32_t port = port_of_ours(&ours, (uint32_t)chance, span, parity, like_be);
		if (port == 0)
			continue;
		outside->local_port_be = NAT_HTON16(port);
		if (e->policy->n_statics != 0 && is_forwarded(e, outside, outside->local_port_be))
			continue;
		if (nat_session_find(e, outside, nat_tuple_hash(&e->index.key, outside)) == NAT_NO_RECORD)
			return outside->local_port_be;
	}
	return 0;
}

/* Sessions whose time is up may still hold ports: ends them, which tells the set. All that are due, and
 * not only until there is a port, so that what follows does not depend on how far the wheel was. False:
 * none is, or this burst has ended its share. */
static bool end_overdue(struct nat_engine *e)
{
	const uint32_t budget = e->overdue_left;

	if (e->wheel.done_s == e->now_s || budget == 0 || e->trial == NAT_TRIAL_CANDIDATE)
		return false;
	e->overdue_left = 0;
	nat_wheel_turn(e, budget);
	return true;
}

uint16_t nat_port_take(struct nat_engine *e, struct nat_tuple *outside, uint16_t first, uint16_t last,
		       bool alike, uint16_t like_be, bool *tracked)
{
	const struct span all = {first, last};
	const struct nat_random random = e->random;
	struct nat_portset *set = e->trial == NAT_TRIAL_CANDIDATE
					  ? NULL
					  : find_set(e, outside->local_be, outside->remote_be,
						     outside->remote_port_be, outside->protocol);

	if (e->trial != NAT_TRIAL_NONE)
		set = find_trial_set(e, set, outside->local_be);
	*tracked = false;
	if (!set) {
		uint16_t port_be = draw(e, outside, alike ? class_of(all, like_be) : all, alike, like_be);
		if (port_be)
			return port_be;
		set = e->trial == NAT_TRIAL_NONE ? make_set(e, outside)
						 : make_trial_set(e, outside->local_be);
	}
	*tracked = true;
	uint16_t port_be = take_from_set(e, set, outside, all, alike, like_be);
	if (port_be == 0 && end_overdue(e)) {     /* never refuse while a port is free */
		if (e->trial != NAT_TRIAL_NONE) { /* the packet itself will find them ended */
			e->random = random;
			nat_portsets_begin_trial(e);
			return nat_port_take(e, outside, first, last, alike, like_be, tracked);
		}
		port_be = take_from_set(e, set, outside, all, alike, like_be);
	}
	return port_be;
}

bool nat_port_claim(struct nat_engine *e, const struct nat_tuple *outside)
{
	struct nat_portset *set = find_set(e, outside->local_be, outside->remote_be, outside->remote_port_be,
					   outside->protocol);
	const uint32_t port = NAT_NTOH16(outside->local_port_be);

	if (!set || !has_bit(set->known, port / 64))
		return false;
	set_bit(set->taken, port);
	if (set->taken[port / 64] == UINT64_MAX)
		set_bit(set->full, port / 64);
	return true;
}

bool nat_engine_hot(const struct nat_engine *e, uint32_t *cursor, struct nat_hot_view *view)
{
	while (*cursor < e->portsets.n_used) {
		const struct nat_portset *set = &e->portsets.set[(*cursor)++];
		const uint32_t address = nat_policy_address(e->policy, set->address_be);
		if (address == UINT32_MAX)
			continue;
		const struct nat_pool *pool = &e->policy->pool[e->policy->address[address].pool];
		*view = (struct nat_hot_view){.address_be = set->address_be,
					      .pool = e->policy->address[address].pool,
					      .remote_be = set->remote_be,
					      .remote_port_be = set->remote_port_be,
					      .protocol = set->protocol,
					      .ports = (uint32_t)pool->port_last - pool->port_first + 1};
		for (uint32_t word = pool->port_first / 64u; word <= pool->port_last / 64u; word++) {
			const uint64_t ours = ports_in_range(word, pool->port_first, pool->port_last);
			if (!has_bit(set->known, word))
				continue;
			view->known += count_bits(ours);
			view->taken += count_bits(ours & set->taken[word]);
		}
		return true;
	}
	return false;
}

void nat_port_release(struct nat_engine *e, const struct nat_session *s)
{
	const bool mapping = (s->flags & NAT_RECORD_MAPPING) != 0;
	struct nat_portset *set = find_set(e, s->out_addr_be, mapping ? 0 : s->inside.remote_be,
					   mapping ? 0 : s->inside.remote_port_be, s->inside.protocol);
	const uint32_t port = NAT_NTOH16(s->out_port_be);

	if (!set || !has_bit(set->known, port / 64))
		return;
	const struct nat_tuple outside = nat_session_outside(s);
	if (is_forwarded(e, &outside, s->out_port_be))
		return; /* since a reload */
	clear_bit(set->taken, port);
	clear_bit(set->full, port / 64);
}
