/* dsnat-eal-bench: DPDK's own start, and nothing else: milliseconds that rte_eal_init() takes with the
 * arguments given. What a restart of dsnatd takes is judged beside that (tests/restarts.py).
 */
#include <rte_eal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

int main(int argc, char **argv)
{
	const double began_ms = now_ms();
	const int status = rte_eal_init(argc, argv);
	const double took_ms = now_ms() - began_ms;

	if (status < 0)
		return 1;
	(void)rmdir(rte_eal_get_runtime_dir());
	printf("%.1f\n", took_ms);
	return 0;
}
