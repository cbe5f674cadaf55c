/* A session is refused only when no port of no address is free, and a freed port is found again: at 100 %, on
 * one address and on several, with the wheel behind, for ranges that begin and end anywhere. */
#include <assert.h>

#include "testbed.h"

static const uint32_t remote = ADDRESS(198, 51, 100, 1);

static struct nat_pkt open_session(struct testbed *t, uint32_t i, uint64_t now_ns)
{
	uint8_t bytes[28];
	struct nat_pkt pkt = testbed_udp(t, bytes, 0, ADDRESS(100, 64, 0, 1) + i / 60000,
					 (uint16_t)(1 + i % 60000), remote, 443, now_ns);
	pkt.l3 = NULL;
	return pkt;
}

static void fill_and_refill(uint32_t n_addresses, uint16_t first, uint16_t last)
{
	const uint32_t capacity = n_addresses * ((uint32_t)last - first + 1);
	struct testbed t;
	uint64_t now_ns = SECOND_NS;

	testbed_config(&t, n_addresses, first, last, capacity + 4096);
	testbed_start(&t, now_ns);
	for (uint32_t i = 0; i < capacity; i++)
		assert(open_session(&t, i, now_ns).verdict == NAT_FORWARD);
	struct nat_pkt refused = open_session(&t, capacity, now_ns);
	assert(refused.verdict == NAT_DROP && refused.reason == NAT_REASON_NO_PORT);

	/* Every port of every address is in use exactly once. */
	static uint8_t seen[16][65536];
	memset(seen, 0, sizeof(seen));
	for (uint32_t i = 0, found = 0; found < capacity; i++) {
		const struct nat_session *s = &t.e->record[i];
		if (s->timer == NAT_TIMER_FREE)
			continue;
		const uint32_t address = NAT_NTOH32(s->out_addr_be) - ADDRESS(203, 0, 113, 1),
			       port = NAT_NTOH16(s->out_port_be);
		assert(address < n_addresses && port >= first && port <= last && !seen[address][port]);
		seen[address][port] = 1;
		found++;
	}
	/* One ends, one begins; never two. */
	for (uint32_t round = 0; round < 200; round++) {
		uint32_t record = (uint32_t)(nat_random_next(&t.e->random) % capacity);
		assert(nat_engine_clear(t.e, record));
		assert(open_session(&t, capacity + 1 + round, now_ns).verdict == NAT_FORWARD);
		assert(open_session(&t, capacity + 1000 + round, now_ns).reason == NAT_REASON_NO_PORT);
	}
	/* All are over, and the wheel has not turned: nobody is refused. */
	now_ns += 400 * SECOND_NS;
	for (uint32_t i = 0; i < capacity && i < 3000; i++)
		assert(open_session(&t, 2 * capacity + i, now_ns).verdict == NAT_FORWARD);
	testbed_stop(&t, false);
}

/* Chi-square of 100,000 ports over 256 classes: 255 degrees of freedom, mean 255, deviation 22.6; 6
 * deviations either way. */
static void test_ports_are_uniform(void)
{
	struct testbed t;
	uint32_t count[256] = {0};
	const uint32_t n = 100000;

	testbed_config(&t, 1, 1024, 65535, n + 1024);
	testbed_start(&t, SECOND_NS);
	for (uint32_t i = 0; i < n; i++) {
		uint8_t bytes[28];
		struct nat_pkt pkt = testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 1), 5000,
						 ADDRESS(198, 18, 0, 0) + i, 443, SECOND_NS);
		assert(pkt.verdict == NAT_FORWARD);
		count[(nat_read16(bytes + 20) - 1024u) / 252u]++;
	}
	double chi_square = 0, expected = n / 256.0;
	for (uint32_t i = 0; i < 256; i++)
		chi_square += (count[i] - expected) * (count[i] - expected) / expected;
	assert(chi_square > 255 - 6 * 22.6 && chi_square < 255 + 6 * 22.6);
	testbed_stop(&t, false);
}

int main(void)
{
	fill_and_refill(1, 40000, 40009);
	fill_and_refill(3, 1024, 1024);
	fill_and_refill(5, 1087, 1215);
	fill_and_refill(1, 1024, 65535);
	fill_and_refill(16, 1024, 65535);
	test_ports_are_uniform();
	return 0;
}
