/* Frames of any length come to the port of their tag, or to none; what is handed on always has an Ethernet
 * header. */
#include <assert.h>

#include "vlan.h"

static struct ports ports;

static void begin(void)
{
	ports = (struct ports){.n = 3};
	for (uint8_t i = 0; i < 3; i++)
		ports.port[i] = (struct port){.index = i, .takes_tags = true};
	ports.port[1].vlan = 100;
	ports.port[2].vlan = 200;
}

int main(void)
{
	static const uint8_t tagged[] = {2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x81, 0, 0, 100, 8, 0};

	begin();
	for (uint16_t bytes = 0; bytes <= 60; bytes++) {
		uint8_t room[256] = {0};
		struct rte_mbuf m = {.buf_addr = room,
				     .buf_len = sizeof(room),
				     .data_off = 128,
				     .data_len = bytes,
				     .pkt_len = bytes,
				     .nb_segs = 1};

		memcpy(room + 128, tagged,
		       sizeof(tagged)); /* also behind the frame: of one that was here before */
		const struct port *port = vlan_port(&ports, &ports.port[0], &m);

		assert(port == (bytes < sizeof(tagged) ? &ports.port[0] : &ports.port[1]));
		assert(m.data_len == bytes - (bytes < sizeof(tagged) ? 0 : 4));
	}
	return 0;
}
