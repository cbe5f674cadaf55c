/* Next hops that are the kernel's to choose: an interface that the configuration does not name, an MTU
 * that no link has. */
#include <assert.h>

#include "testbed.h"

static struct nat_hop back, out;

static void route(void *context, const uint32_t *destination_be, struct nat_hop *hop, uint32_t n)
{
	(void)context;
	for (uint32_t i = 0; i < n; i++) {
		hop[i] = NAT_NTOH32(destination_be[i]) >> 22 == ADDRESS(100, 64, 0, 0) >> 22 ? back : out;
		hop[i].next_hop_be = destination_be[i];
	}
}

static void start(struct testbed *t)
{
	back = (struct nat_hop){0, 1500, 0, NAT_HOP_FORWARD};
	out = (struct nat_hop){0, 1500, 1, NAT_HOP_FORWARD};
	testbed_config(t, 1, 1024, 65535, 1024);
	testbed_start(t, SECOND_NS);
	t->e->world.route = route;
}

/* The way back to a host may lead over an interface of the kernel's alone. */
static void test_an_error_may_leave_by_an_interface_that_is_not_configured(void)
{
	struct testbed t;
	uint8_t bytes[28];
	struct nat_pkt made;

	start(&t);
	/* where the engine would look for that interface's setting there is something else, not 0 */
	memset(t.policy->from_queue, 1, sizeof(t.policy->from_queue));
	t.policy->places = UINT64_MAX;
	memset(&t.policy->timeouts, 0xff, sizeof(t.policy->timeouts));
	back = (struct nat_hop){0, 1500, 0xff, NAT_HOP_KERNEL};
	out = (struct nat_hop){.kind = NAT_HOP_NONE};
	assert(testbed_udp(&t, bytes, 0, ADDRESS(100, 64, 0, 2), 4000, ADDRESS(198, 51, 100, 1), 9, SECOND_NS)
		       .reason == NAT_REASON_NO_ROUTE);
	assert(nat_engine_next(t.e, &made) && made.made && made.hop.iface == 0xff);
	testbed_stop(&t, false);
}

/* `ip route add ... mtu 20` is taken by the kernel. What cannot be cut into anything is dropped. */
static void test_a_route_with_an_mtu_below_all_sense_drops_and_goes_on(void)
{
	static uint8_t bytes[1500];

	for (uint16_t mtu_bytes = 1; mtu_bytes <= 80; mtu_bytes++)
		for (uint32_t header_bytes = 20; header_bytes <= 60; header_bytes += 40) {
			struct testbed t;
			struct nat_pkt pkt, piece;
			uint64_t pieces = 0;

			start(&t);
			out.mtu_bytes = mtu_bytes;
			testbed_write_udp(bytes, ADDRESS(100, 64, 0, 2), 4000, ADDRESS(198, 51, 100, 1), 9);
			memmove(bytes + header_bytes, bytes + 20, 8);
			memset(bytes + 20, 1, header_bytes - 20);
			bytes[0] = (uint8_t)(0x40 | header_bytes / 4);
			nat_write16(bytes + NAT_IP_LENGTH, sizeof(bytes));
			nat_put16(bytes + NAT_IP_CHECKSUM, 0);
			nat_put16(bytes + NAT_IP_CHECKSUM, nat_csum_bytes(bytes, header_bytes));
			pkt = (struct nat_pkt){.l3 = bytes, .len_bytes = sizeof(bytes), .iface = 0};
			nat_engine_run(t.e, &pkt, 1, SECOND_NS);
			while (nat_engine_next(t.e, &piece))
				pieces += piece.made;
			if (mtu_bytes < header_bytes + 8)
				assert(pkt.verdict == NAT_DROP && pieces == 0);
			else
				assert(pkt.verdict == NAT_FORWARD && pieces > 0 &&
				       pkt.len_bytes <= mtu_bytes);
			const struct nat_counters *c = nat_engine_counters(t.e);
			assert(c->received == c->forwarded + (pkt.verdict == NAT_DROP));
			testbed_stop(&t, false);
		}
}

int main(void)
{
	test_an_error_may_leave_by_an_interface_that_is_not_configured();
	test_a_route_with_an_mtu_below_all_sense_drops_and_goes_on();
	return 0;
}
