/* See crew.h. `auto` takes the CPUs that were isolated for this purpose; where there are none, one in two
 * of those that the daemon may use, and not more than AUTO_MAX, because the machine has other work too. */
#include "crew.h"

#include <sched.h>
#include <stdio.h>

#include "dpdk/eal.h"

#define AUTO_MAX 8u

static uint32_t automatic(void)
{
	uint32_t n = eal_isolated_cores();
	cpu_set_t allowed;

	if (n == 0 && sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
		n = (uint32_t)CPU_COUNT(&allowed) / 2;
		n = n > AUTO_MAX ? AUTO_MAX : n;
	}
	return n == 0 ? 1 : n;
}

uint32_t crew_size(const struct nat_config *config)
{
	return config->workers ? config->workers : automatic();
}

uint64_t crew_share(const struct nat_config *config, const struct nat_policy *policy, uint32_t worker)
{
	if (config->n_workers == 1 || nat_policy_keeps(policy, worker))
		return config->max_sessions; /* a pool that one worker keeps may have all of them */
	/* hosts do not spread evenly: each may hold half as much again as its share */
	return config->max_sessions / config->n_workers * 3 / 2 + 1;
}

bool crew_open(struct crew *crew, const struct nat_config *config, const struct ports *ports, uint64_t seed,
	       bool no_huge)
{
	const uint32_t n = config->n_workers;
	struct nat_rss rss[2];
	bool follow[2];
	char why[256];

	if (n == 1)
		return true;
	for (unsigned outside = 0; outside < 2; outside++) {
		follow[outside] = ports_rss(ports, n, outside, &rss[outside], why, sizeof why);
		if (!follow[outside] && ports->n) /* the kernel's queues have their own rule */
			fprintf(stderr,
				"dsnatd: %s; packets are handed over between workers, which costs speed\n",
				why);
	}
	if (memory_plain(&crew->memory, nat_workers_size(n, config->max_sessions), no_huge))
		return false;
	crew->workers = nat_workers_init(crew->memory.base, n, config->max_sessions, seed,
					 follow[0] ? &rss[0] : NULL, follow[1] ? &rss[1] : NULL);
	return true;
}

void crew_close(struct crew *crew)
{
	if (crew->workers)
		memory_release(&crew->memory);
	crew->workers = NULL;
}
