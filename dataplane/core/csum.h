/* The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
 *
 * All sums are over 16-bit words as they stand in memory: one's complement addition does not care for byte
 * order (RFC 1071 section 2B). A `nat_sum` collects what a rewrite takes out and puts in; it is applied to
 * each checksum that covers those bytes. Equation 3 of RFC 1624, HC' = ~(~HC + ~m + m'), is used because
 * equation 2 of RFC 1141 is wrong for HC = 0.
 */
#ifndef NAT_CSUM_H
#define NAT_CSUM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

typedef uint64_t nat_sum; /* room for any number of 16-bit and 32-bit terms that a packet can have */

static inline nat_sum nat_sum_replace16(nat_sum sum, uint16_t old, uint16_t new)
{
	return sum + (uint16_t)~old + new;
}

/* A 32-bit word is two 16-bit ones, which folding adds up. */
static inline nat_sum nat_sum_replace32(nat_sum sum, uint32_t old, uint32_t new)
{
	return sum + (uint32_t)~old + new;
}

/* Adding a word to itself with its halves swapped leaves the sum of the halves, end-around carry included,
 * in the upper half. */
static inline uint16_t nat_sum_fold(nat_sum sum)
{
	const uint32_t half = (uint32_t)((sum + (sum << 32 | sum >> 32)) >> 32);
	return (uint16_t)((half + (half << 16 | half >> 16)) >> 16);
}

/* RFC 1624 equation 3. */
static inline uint16_t nat_csum_update(uint16_t checksum, nat_sum change)
{
	return (uint16_t)~nat_sum_fold((uint16_t)~checksum + change);
}

/* Sum of `n` bytes at `p`; an odd last byte counts as if followed by a zero. Valid to 64 KiB: 32768 words of
 * 16 bits fit. */
static inline nat_sum nat_sum_bytes(nat_sum sum, const uint8_t *p, size_t n)
{
	for (; n >= 2; n -= 2, p += 2)
		sum += nat_get16(p);
	if (n) {
		uint8_t last[2] = {*p, 0};
		sum += nat_get16(last);
	}
	return sum;
}

/* Is the checksum of an IPv4 header without options right? Its ten words at once. */
static inline bool nat_csum_header_good(const uint8_t *ip)
{
	uint64_t first, second;

	memcpy(&first, ip, sizeof(first));
	memcpy(&second, ip + 8, sizeof(second));
	const nat_sum sum = (first & UINT32_MAX) + (first >> 32) + (second & UINT32_MAX) + (second >> 32) +
			    nat_get32(ip + 16);
	return nat_sum_fold(sum) == UINT16_MAX;
}

static inline uint16_t nat_csum_bytes(const uint8_t *p, size_t n)
{
	return (uint16_t)~nat_sum_fold(nat_sum_bytes(0, p, n));
}

#endif
