/* Zones by interval agree with the list read from top to bottom, for random lists of overlapping prefixes. */
#include <assert.h>
#include <time.h>

#include "testbed.h"

static uint32_t by_reading(const struct nat_config *config, uint32_t source, uint32_t destination)
{
	for (uint32_t z = 0; z < config->n_zones; z++) {
		const struct nat_zone_config *zone = &config->zones[z];
		uint64_t source_step = UINT64_C(1) << (32 - zone->source.length_bits);
		uint64_t destination_step = UINT64_C(1) << (32 - zone->destination.length_bits);
		if (source / source_step == zone->source.address / source_step &&
		    destination / destination_step == zone->destination.address / destination_step)
			return z;
	}
	return NAT_NO_ZONE;
}

/* A thousand destinations of one source are one list, not one for each. */
static void zones_of_one_source_cost_their_number(void)
{
	static struct nat_zone_config zone[1000];
	struct testbed t;
	testbed_config(&t, 4, 1024, 65535, 1024);
	const size_t without_bytes = nat_policy_size(&t.config);
	for (uint32_t z = 0; z < 1000; z++)
		zone[z] = (struct nat_zone_config){.source = {ADDRESS(100, 64, 0, 0), 10},
						   .destination = {ADDRESS(192, 0, 2, 0) + z, 32},
						   .action = NAT_ACTION_PASS};
	t.config.zones = zone;
	t.config.n_zones = 1000;
	assert(nat_policy_size(&t.config) < without_bytes + 1000 * 256);
	struct nat_policy *policy =
		nat_policy_init(testbed_memory(nat_policy_size(&t.config)), &t.config, NULL);
	for (uint32_t z = 0; z < 1000; z++)
		assert(nat_policy_zone(policy, ADDRESS(100, 64, 1, 2), ADDRESS(192, 0, 2, 0) + z) == z);
	assert(nat_policy_zone(policy, ADDRESS(100, 64, 1, 2), ADDRESS(192, 0, 2, 0) + 1000) == NAT_NO_ZONE);
	free(policy);
}

static struct nat_policy *next_policy(const struct testbed *t, const struct nat_policy *previous)
{
	return nat_policy_init(testbed_memory(nat_policy_size(&t->config)), &t->config, previous);
}

static void reverse(struct nat_zone_config *zone, uint32_t n)
{
	for (uint32_t i = 0; i < n / 2; i++) {
		const struct nat_zone_config swap = zone[i];
		zone[i] = zone[n - 1 - i];
		zone[n - 1 - i] = swap;
	}
}

/* As many zones as a configuration may have, in another order at each reload, also when a worker never saw
 * the policy between. Five seconds of a processor, with sanitizers, are a hundred times what it takes;
 * squared it would be minutes. */
static void a_reload_of_65535_zones_is_no_pause(void)
{
	enum { N = 65535, SEEN = 40000 };
	static struct nat_zone_config zone[N];
	struct testbed t = {0};
	uint8_t bytes[64];
	const clock_t begun = clock();

	testbed_config(&t, 4, 1024, 65535, 1024);
	for (uint32_t z = 0; z < N; z++)
		zone[z] = (struct nat_zone_config){.source = {ADDRESS(100, 64, 0, 0) + z * 2, 32},
						   .action = NAT_ACTION_POOL};
	t.config.zones = zone;
	t.config.n_zones = N;
	(void)testbed_start(&t, 1000000000);
	assert(testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 0) + SEEN * 2, 1000, ADDRESS(198, 51, 100, 1),
			   53, 2000000000)
		       .verdict == NAT_FORWARD);
	const uint16_t id = t.policy->zone[SEEN].id;
	reverse(zone, N);
	struct nat_policy *second = next_policy(&t, t.policy);
	nat_engine_set_policy(t.e, second);
	assert(second->zone[N - 1 - SEEN].id == id);
	assert(second->notes[0].zone[N - 1 - SEEN].created == 1);
	struct nat_policy *unseen = next_policy(&t, second);
	reverse(zone, N);
	struct nat_policy *last = next_policy(&t, unseen);
	nat_engine_set_policy(t.e, last);
	assert(last->zone[SEEN].id == id);
	assert(last->notes[0].zone[SEEN].created == 1 && last->notes[0].zone[SEEN - 1].created == 0);
	assert((double)(clock() - begun) / CLOCKS_PER_SEC < 5);
	free(second);
	free(unseen);
	free(last);
	testbed_stop(&t, false);
}

/* What only comes after a zone with the same source and destination never matches, and has nothing to
 * inherit. */
static void a_zone_that_is_there_twice_has_one_id_and_goes_on(void)
{
	struct nat_zone_config zone[] = {
		{.source = {ADDRESS(100, 64, 0, 0), 10}, .action = NAT_ACTION_POOL},
		{.source = {ADDRESS(100, 64, 7, 7), 10}, .action = NAT_ACTION_DROP},
	};
	struct testbed t = {0};
	uint8_t bytes[64];

	testbed_config(&t, 4, 1024, 65535, 1024);
	t.config.zones = zone;
	t.config.n_zones = 2;
	(void)testbed_start(&t, 1000000000);
	assert(testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1), 1000, ADDRESS(198, 51, 100, 1), 53,
			   2000000000)
		       .verdict == NAT_FORWARD);
	assert(t.policy->zone[0].id == t.policy->zone[1].id);
	reverse(zone, 2); /* now it is refused: a zone of another kind, that begins to count */
	struct nat_policy *second = next_policy(&t, t.policy);
	nat_engine_set_policy(t.e, second);
	assert(second->zone[0].id == t.policy->zone[0].id && second->notes[0].zone[0].created == 0);
	free(second);
	testbed_stop(&t, false);
}

int main(void)
{
	zones_of_one_source_cost_their_number();
	a_reload_of_65535_zones_is_no_pause();
	a_zone_that_is_there_twice_has_one_id_and_goes_on();
	struct nat_random random = {nat_key_from_seed(3, 't'), 0};

	for (uint32_t round = 0; round < 60; round++) {
		static struct nat_zone_config zone[400];
		struct testbed t;
		testbed_config(&t, 4, 1024, 65535, 1024);
		const uint32_t n = round % 4 == 0 ? round : (uint32_t)(nat_random_next(&random) % 400);
		for (uint32_t z = 0; z < n; z++) {
			const uint64_t r = nat_random_next(&random);
			/* few addresses, so that zones overlap, nest and touch; also the ends of the address
			 * space */
			const uint32_t base = r & 1 ? UINT32_MAX << 8 : (r & 2 ? 0 : ADDRESS(100, 64, 0, 0));
			zone[z] = (struct nat_zone_config){
				.source = {base + (uint32_t)(r >> 32) % 2048,
					   (uint8_t)(r % 5 == 0 ? r >> 8 & 15 : 20 + (r >> 8) % 13)},
				.destination = {ADDRESS(192, 0, 2, 0) + (uint32_t)(r >> 16) % 512,
						(uint8_t)(r % 3 ? 0 : 24 + (r >> 12) % 9)},
				.action = NAT_ACTION_POOL,
			};
		}
		t.config.zones = zone;
		t.config.n_zones = n;
		struct nat_policy *policy =
			nat_policy_init(testbed_memory(nat_policy_size(&t.config)), &t.config, NULL);
		for (uint32_t probe = 0; probe < 4000; probe++) {
			const uint64_t r = nat_random_next(&random);
			uint32_t source =
				probe % 2 ? (uint32_t)r : ADDRESS(100, 64, 0, 0) - 1024 + (uint32_t)r % 4096;
			if (n && probe % 3 == 0) {
				/* just inside or just outside a boundary */
				const struct nat_prefix *edge = &zone[r % n].source;
				source =
					(edge->address & (uint32_t)(UINT64_MAX << (32 - edge->length_bits))) +
					(uint32_t)(r >> 40) % 3 - 1;
			}
			const uint32_t destination = ADDRESS(192, 0, 2, 0) + (uint32_t)(r >> 32) % 512;
			assert(nat_policy_zone(policy, source, destination) ==
			       by_reading(&t.config, source, destination));
		}
		assert(nat_policy_pool_of(policy, NAT_HTON32(ADDRESS(203, 0, 113, 4))) == 0);
		assert(nat_policy_pool_of(policy, NAT_HTON32(ADDRESS(203, 0, 113, 5))) == -1);
		free(policy);
	}
	return 0;
}
