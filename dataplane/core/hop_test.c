/* Next hops that are the kernel's to choose: an interface that the configuration does not name. */
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

int main(void)
{
	test_an_error_may_leave_by_an_interface_that_is_not_configured();
	return 0;
}
