/* The incremental checksum equals the full one (RFC 1624), for every old value of a word and many new ones.
 */
#include <assert.h>

#include "csum.h"
#include "hash.h"

static uint16_t full(const uint8_t *header)
{
	uint8_t copy[20];
	memcpy(copy, header, sizeof(copy));
	nat_put16(copy + 10, 0);
	return nat_csum_bytes(copy, sizeof(copy));
}

int main(void)
{
	struct nat_random random = {nat_key_from_seed(7, 't'), 0};

	for (uint32_t round = 0; round < 300000; round++) {
		uint8_t header[20];
		for (int i = 0; i < 20; i += 4) {
			uint32_t word = (uint32_t)nat_random_next(&random);
			/* zeros and ones are where one's complement arithmetic has two names for one number
			 */
			if (round % 4 == 0)
				word = word & 1 ? UINT32_MAX : 0;
			nat_put32(header + i, word);
		}
		header[0] |= 0x40; /* an IPv4 header is never all zeros */
		nat_put16(header + 10, full(header));
		const uint32_t old = nat_get32(header + 12),
			       new = round % 3 == 0 ? ~old : (uint32_t)nat_random_next(&random);
		nat_put32(header + 12, new);
		assert(nat_csum_update(nat_get16(header + 10), nat_sum_replace32(0, old, new)) ==
		       full(header));
	}
	const uint8_t odd[3] = {0x12, 0x34, 0x56};
	assert(nat_csum_bytes(odd, 3) == (uint16_t)~NAT_HTON16(0x1234 + 0x5600));
	return 0;
}
