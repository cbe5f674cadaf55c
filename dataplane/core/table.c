/* The table: memory that outlives the process, and what another build or another configuration makes of it.
 *
 * Another engine.max_sessions is no reason to lose a session. A larger table has the same records at the
 * same places, and room behind them. For a smaller one the records that stand too far back move into free
 * places before its end; only when more sessions live than it may hold do some end, and how many is told.
 * A process that dies in the midst of that leaves the old size and at worst a record twice, of which the
 * next one keeps one.
 *
 * A table of another layout is never guessed at: it is refused, and the caller says so.
 */
#include <string.h>

#include "engine.h"

#define TABLE_MAGIC  UINT64_C(0x7473657373746e64) /* "dntssest" */
#define TABLE_LAYOUT 2u

/* ---- the table ---- */

static uint64_t chunks_for(uint64_t max_sessions)
{
	return (max_sessions + NAT_CHUNK - 1) / NAT_CHUNK;
}

static uint64_t round_to_line(uint64_t bytes)
{
	return (bytes + NAT_CACHE_LINE - 1) & ~(uint64_t)(NAT_CACHE_LINE - 1);
}

uint64_t nat_table_records_for(uint64_t max_sessions)
{
	return chunks_for(max_sessions) * NAT_CHUNK;
}

size_t nat_table_size(uint64_t max_sessions)
{
	uint64_t chunks = chunks_for(max_sessions);
	return (size_t)(round_to_line(sizeof(struct nat_table)) +
			chunks * NAT_CHUNK * sizeof(struct nat_session));
}

struct nat_table *nat_table_init(void *mem, size_t size_bytes, uint64_t max_sessions, uint64_t seed,
				 bool *adopted, const char **why)
{
	struct nat_table *table = mem;
	const uint64_t n_records = chunks_for(max_sessions) * NAT_CHUNK;

	*adopted = false;
	*why = "";
	if (n_records > NAT_RECORDS_MAX || size_bytes < nat_table_size(max_sessions)) {
		*why = "the memory is too small for max_sessions";
		return NULL;
	}
	if (table->magic == TABLE_MAGIC) {
		if (table->layout != TABLE_LAYOUT || table->record_bytes != sizeof(struct nat_session)) {
			*why = "the session table was written by a build with another record layout";
			return NULL;
		}
		if (table->n_records != n_records) {
			*why = "the session table was made for another max_sessions";
			return NULL;
		}
		table->n_chunks = (uint32_t)(n_records / NAT_CHUNK); /* a resize may have died before this */
		*adopted = true;
		return table;
	}
	if (table->magic != 0) {
		*why = "the session memory holds something that is not a session table";
		return NULL;
	}
	table->layout = TABLE_LAYOUT;
	table->record_bytes = sizeof(struct nat_session);
	table->n_records = n_records;
	table->seed = seed;
	table->n_chunks = (uint32_t)chunks_for(max_sessions);
	table->records_offset = round_to_line(sizeof(*table));
	/* Last: a process that dies before this leaves memory that the next one makes anew. */
	atomic_thread_fence(memory_order_release);
	table->magic = TABLE_MAGIC;
	return table;
}

/* ---- another size ---- */

/* What has to go first when not all have room: what would be over soonest. */
static unsigned rank_of(const struct nat_session *s)
{
	if (s->flags & NAT_RECORD_MAPPING)
		return 3; /* sessions stand under it */
	return s->timer == NAT_TIMER_TCP_ESTABLISHED ? 2 : s->timer == NAT_TIMER_UDP ? 1 : 0;
}

static void set_timer(struct nat_session *s, uint8_t timer)
{
	atomic_signal_fence(memory_order_release);
	*(volatile uint8_t *)&s->timer = timer;
	atomic_signal_fence(memory_order_release);
}

static uint64_t end_some(struct nat_session *record, uint64_t n, uint64_t too_many)
{
	uint64_t ended = 0;

	for (unsigned rank = 0; rank < 4; rank++)
		for (uint64_t i = n; i-- > 0 && ended < too_many;)
			if (record[i].timer != NAT_TIMER_FREE && rank_of(&record[i]) == rank) {
				set_timer(&record[i], NAT_TIMER_FREE);
				ended++;
			}
	return ended;
}

/* What stands behind `end` moves into free places before it. First the copy counts, then the original no
 * longer. */
static void move_before(struct nat_session *record, uint64_t end, uint64_t n)
{
	uint64_t hole = 0;

	for (uint64_t i = end; i < n; i++) {
		if (record[i].timer == NAT_TIMER_FREE)
			continue;
		while (record[hole].timer != NAT_TIMER_FREE)
			hole++;
		const uint8_t timer = record[i].timer;
		record[hole] = record[i];
		record[hole].timer = NAT_TIMER_FREE;
		set_timer(&record[hole], timer);
		set_timer(&record[i], NAT_TIMER_FREE);
	}
}

bool nat_table_resize(void *mem, size_t size_bytes, uint64_t max_sessions, struct nat_resized *done)
{
	struct nat_table *table = mem;
	const uint64_t n_records = chunks_for(max_sessions) * NAT_CHUNK;

	*done = (struct nat_resized){0};
	if (n_records > NAT_RECORDS_MAX || size_bytes < sizeof(*table) || table->magic != TABLE_MAGIC ||
	    table->layout != TABLE_LAYOUT || table->record_bytes != sizeof(struct nat_session) ||
	    table->n_records > NAT_RECORDS_MAX || size_bytes < nat_table_size(table->n_records) ||
	    size_bytes < nat_table_size(max_sessions))
		return false;
	struct nat_session *record = nat_table_records(table);
	uint64_t leased = (uint64_t)atomic_load(&table->chunks_leased) * NAT_CHUNK;
	leased = leased > table->n_records ? table->n_records : leased;
	for (uint64_t i = 0; i < leased; i++)
		done->live += record[i].timer != NAT_TIMER_FREE;
	done->before = table->n_records;
	if (done->live > max_sessions)
		done->ended = end_some(record, leased, done->live - max_sessions);
	if (leased > n_records)
		move_before(record, n_records, leased);
	/* what an earlier, larger table has left there */
	for (uint64_t i = table->n_records; i < n_records; i++)
		record[i].timer = NAT_TIMER_FREE;
	if (leased > n_records)
		atomic_store(&table->chunks_leased, (uint32_t)(n_records / NAT_CHUNK));
	table->n_chunks = (uint32_t)(n_records / NAT_CHUNK);
	atomic_thread_fence(memory_order_release);
	table->n_records = n_records;
	return true;
}

/* ---- stable ids ---- */

static uint16_t pool_id(struct nat_table *table, const char *name, uint32_t guess)
{
	if (guess < table->n_pool_ids && strcmp(table->pool_name[guess], name) == 0)
		return (uint16_t)guess;
	for (uint32_t i = 0; i < table->n_pool_ids; i++)
		if (strcmp(table->pool_name[i], name) == 0)
			return (uint16_t)i;
	if (table->n_pool_ids == NAT_POOL_IDS)
		return NAT_NO_ID;
	memcpy(table->pool_name[table->n_pool_ids], name, NAT_NAME_MAX);
	return (uint16_t)table->n_pool_ids++;
}

static uint16_t new_zone_id(struct nat_table *table, const struct nat_zone_config *zone)
{
	if (table->n_zone_ids == NAT_ZONE_IDS)
		return NAT_NO_ID;
	table->zone_identity[table->n_zone_ids] = (struct nat_zone_identity){zone->source, zone->destination};
	return (uint16_t)table->n_zone_ids++;
}

/* The zones that the table knows find themselves, then the others get new ids. */
static void bind_zones(struct nat_table *table, struct nat_policy *policy)
{
	for (uint32_t i = 0; i < policy->n_zones; i++)
		policy->zone[i].id = NAT_NO_ID;
	for (uint32_t id = 0; id < table->n_zone_ids; id++) {
		const struct nat_zone_identity *known = &table->zone_identity[id];
		const uint32_t i = nat_policy_zone_named(policy, &known->source, &known->destination);
		if (i != NAT_NO_ZONE)
			policy->zone[i].id = (uint16_t)id;
	}
	for (uint32_t i = 0; i < policy->n_zones; i++) {
		const struct nat_zone_config *zone = &policy->zone[i].config;
		const uint32_t first = nat_policy_zone_named(policy, &zone->source, &zone->destination);
		if (policy->zone[first].id == NAT_NO_ID && first == i)
			policy->zone[i].id = new_zone_id(table, zone);
		else
			policy->zone[i].id = policy->zone[first].id;
	}
}

void nat_table_bind(struct nat_table *table, struct nat_policy *policy)
{
	enum { NEW, BINDING, BOUND };
	uint32_t expected = NEW;

	if (!atomic_compare_exchange_strong(&policy->bound, &expected, BINDING)) {
		while (atomic_load(&policy->bound) != BOUND)
			; /* another worker writes the ids at this moment; a reload does this once */
		return;
	}
	for (uint32_t i = 0; i < policy->n_pools; i++)
		policy->pool[i].id = pool_id(table, policy->pool[i].name, i);
	bind_zones(table, policy);
	atomic_store(&policy->bound, BOUND);
}
