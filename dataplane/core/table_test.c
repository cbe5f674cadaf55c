/* A table of another size keeps its sessions, at whatever places they stand; and what has no room is
 * counted. */
#include "testbed.h"

#define MANY 3000u

static uint16_t outside_port[MANY];

static uint32_t host(uint32_t i)
{
	return ADDRESS(100, 64, 0, 1) + i;
}

static struct nat_pkt send(struct testbed *t, uint8_t *bytes, uint32_t i, uint64_t now_ns)
{
	return testbed_udp(t, bytes, 0, host(i), 4000, ADDRESS(198, 51, 100, 1), 443, now_ns);
}

static void begin(struct testbed *t, uint32_t from, uint32_t to)
{
	uint8_t bytes[28];

	for (uint32_t i = from; i < to; i++) {
		const struct nat_pkt pkt = send(t, bytes, i, SECOND_NS);
		assert(pkt.verdict == NAT_FORWARD);
		outside_port[i] = nat_read16(bytes + 20);
	}
}

static void end(struct testbed *t, uint32_t from, uint32_t to)
{
	for (uint32_t record = 0; record < t->params.max_sessions; record++) {
		const struct nat_session *s = &t->e->record[record];
		const uint32_t i = NAT_HTON32(s->inside.local_be) - host(0);
		if (s->timer != NAT_TIMER_FREE && i >= from && i < to)
			assert(nat_engine_clear(t->e, record));
	}
}

/* Each of them is found, and has the outside port that it had. */
static uint32_t found(struct testbed *t, uint32_t from, uint32_t to)
{
	const uint64_t before = nat_engine_counters(t->e)->sessions_created;
	uint8_t bytes[28];
	uint32_t same = 0;

	for (uint32_t i = from; i < to; i++) {
		const struct nat_pkt pkt = send(t, bytes, i, 2 * SECOND_NS);
		same += pkt.verdict == NAT_FORWARD && nat_read16(bytes + 20) == outside_port[i] &&
			nat_engine_counters(t->e)->sessions_created == before;
	}
	return same;
}

static struct nat_resized resize(struct testbed *t, uint64_t max_sessions)
{
	const uint64_t before = t->config.max_sessions,
		       larger = before > max_sessions ? before : max_sessions;
	struct nat_resized done;

	testbed_stop(t, true);
	/* as the shell does it: memory that both fit into */
	void *memory = testbed_memory(nat_table_size(larger));
	memcpy(memory, t->table, nat_table_size(before));
	free(t->table);
	t->table = memory;
	t->config.max_sessions = max_sessions;
	assert(nat_table_resize(t->table, nat_table_size(larger), max_sessions, &done));
	assert(testbed_start(t, SECOND_NS));
	return done;
}

static void test_a_larger_table_has_the_same_sessions(void)
{
	struct testbed t = {0};

	testbed_config(&t, 1, 1024, 65535, 2048);
	testbed_start(&t, SECOND_NS);
	begin(&t, 0, 2000);
	const struct nat_resized done = resize(&t, 8192);
	assert(done.before == 2048 && done.live == 2000 && done.ended == 0);
	assert(found(&t, 0, 2000) == 2000);
	begin(&t, 2000, MANY);
	assert(nat_engine_counters(t.e)->sessions == MANY);
	testbed_stop(&t, false);
}

static void test_a_smaller_table_has_them_too_if_they_fit(void)
{
	struct testbed t = {0};

	testbed_config(&t, 1, 1024, 65535, 4096);
	testbed_start(&t, SECOND_NS);
	begin(&t, 0, MANY);
	end(&t, 0, 1500); /* what stays stands at both ends of the table */
	const struct nat_resized done = resize(&t, 2048);
	assert(done.before == 4096 && done.live == 1500 && done.ended == 0);
	assert(nat_engine_counters(t.e)->sessions == 1500 && nat_engine_not_adopted(t.e) == 0);
	assert(found(&t, 1500, MANY) == 1500);
	testbed_stop(&t, false);
}

static void test_what_has_no_room_is_counted(void)
{
	struct testbed t = {0};

	testbed_config(&t, 1, 1024, 65535, 4096);
	testbed_start(&t, SECOND_NS);
	begin(&t, 0, MANY);
	/* the last ones are established: they stay */
	for (uint32_t record = 0; record < 4096; record++)
		if (t.e->record[record].timer != NAT_TIMER_FREE &&
		    NAT_HTON32(t.e->record[record].inside.local_be) >= host(MANY - 500))
			t.e->record[record].timer = NAT_TIMER_UDP;
	const struct nat_resized done = resize(&t, 1024);
	assert(done.live == MANY && done.ended == MANY - 1024);
	assert(nat_engine_counters(t.e)->sessions == 1024 && nat_engine_not_adopted(t.e) == 0);
	assert(found(&t, MANY - 500, MANY) == 500);
	testbed_stop(&t, false);
}

/* Killed between the two halves of a move: the record stands there twice. */
static void test_a_move_that_was_cut_short_leaves_one_session(void)
{
	struct testbed t = {0};

	testbed_config(&t, 1, 1024, 65535, 2048);
	testbed_start(&t, SECOND_NS);
	begin(&t, 0, 10);
	uint32_t hole = 0, live = 0;
	while (t.e->record[hole].timer != NAT_TIMER_FREE)
		hole++;
	while (t.e->record[live].timer == NAT_TIMER_FREE)
		live++;
	t.e->record[hole] = t.e->record[live];
	testbed_stop(&t, true);
	assert(testbed_start(&t, SECOND_NS));
	assert(nat_engine_counters(t.e)->sessions == 10 && found(&t, 0, 10) == 10);
	testbed_stop(&t, false);
}

static void test_what_is_no_table_of_ours_is_left_alone(void)
{
	const size_t bytes = nat_table_size(2048);
	struct nat_table *table = testbed_memory(bytes);
	struct nat_resized done;
	bool adopted;
	const char *why;

	assert(!nat_table_resize(table, bytes, 1024, &done)); /* empty memory */
	assert(nat_table_init((void *)table, bytes, 2048, 1, &adopted, &why));
	assert(!nat_table_resize(table, bytes, 4096, &done)); /* no room for the larger one */
	table->layout++;
	assert(!nat_table_resize(table, bytes, 1024, &done));
	assert(table->n_records == 2048);
	free(table);
}

int main(void)
{
	test_a_larger_table_has_the_same_sessions();
	test_a_smaller_table_has_them_too_if_they_fit();
	test_what_has_no_room_is_counted();
	test_a_move_that_was_cut_short_leaves_one_session();
	test_what_is_no_table_of_ours_is_left_alone();
	return 0;
}
