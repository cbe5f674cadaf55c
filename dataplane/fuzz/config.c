/* Any text as dsnatd.yaml: it is read or refused with a line and column, and what was read makes a policy. */
#include <stdio.h>
#include <stdlib.h>

#include "../ctl/config.h"

static void check(bool condition, const char *what)
{
	if (condition)
		return;
	fprintf(stderr, "not true: %s\n", what);
	abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct config *config =
		config_parse("fuzz.yaml", (const char *)data, size, size & 1 ? CONFIG_WITHOUT_DEVICES : 0);

	check(config, "there is memory");
	for (uint32_t i = 0; i < config->n_problems; i++)
		check(config->problems[i].text && config->problems[i].text[0], "each problem has a sentence");
	if (config->n_errors == 0) {
		const size_t bytes = (nat_policy_size(&config->nat) + 63) & ~(size_t)63;
		void *mem = aligned_alloc(64, bytes);
		check(mem, "there is memory for the policy");
		struct nat_policy *policy = nat_policy_init(mem, &config->nat, NULL);
		check(policy, "what is read makes a policy");
		for (uint32_t i = 0; i < config->nat.n_pools; i++) {
			const struct nat_pool_config *pool = &config->nat.pools[i];
			check(pool->n_ranges > 0 && pool->port_first != 0 &&
				      pool->port_first <= pool->port_last,
			      "a pool has addresses and ports");
			for (uint32_t k = 0; k < pool->n_ranges; k++) {
				const uint32_t first = pool->ranges[k].first;
				const uint32_t first_be = __builtin_bswap32(first);
				check(first <= pool->ranges[k].last, "ranges run forwards");
				check(nat_policy_pool_of(policy, first_be) == (int32_t)i,
				      "an address belongs to its pool and to no other");
			}
		}
		free(mem);
	}
	config_free(config);
	return 0;
}
