/* The only file of the core that goes beyond C17: prefetch, alignment, byte order, a wide multiply. */
#ifndef NAT_PLATFORM_H
#define NAT_PLATFORM_H

#include <stdint.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define NAT_CACHE_LINE 64

#if defined(__GNUC__)
#define NAT_PREFETCH(address) __builtin_prefetch((address), 1, 3)
#define NAT_LIKELY(x)         __builtin_expect(!!(x), 1)
#define NAT_UNLIKELY(x)       __builtin_expect(!!(x), 0)
#define NAT_ALWAYS_INLINE     static inline __attribute__((always_inline))
#define NAT_ALIGNED           __attribute__((aligned(NAT_CACHE_LINE)))
#define NAT_TRAP()            __builtin_trap()
/* Compiled for several instruction sets; which one is taken is decided when the program is loaded. Where
 * the loader cannot, as with a sanitizer that is not there yet then, or the compiler does not know how,
 * there is one. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define NAT_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define NAT_FOR_EACH_CPU
#endif
#define NAT_CTZ64(x)  ((unsigned)__builtin_ctzll(x))
#define NAT_SWAP16(x) __builtin_bswap16(x)
#define NAT_SWAP32(x) __builtin_bswap32(x)
__extension__ typedef unsigned __int128 nat_u128;
#else
#error "a compiler with GNU builtins is needed"
#endif

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NAT_NTOH16(x) NAT_SWAP16(x)
#define NAT_NTOH32(x) NAT_SWAP32(x)
/* Two values as they stand in memory one behind the other. */
#define NAT_PAIR32(first, second) ((uint64_t)(second) << 32 | (first))
#define NAT_PAIR16(first, second) ((uint32_t)(second) << 16 | (uint32_t)(first))
#define NAT_PAIR8(first, second)  ((uint32_t)(second) << 8 | (uint32_t)(first))
#else
#define NAT_NTOH16(x)             ((uint16_t)(x))
#define NAT_NTOH32(x)             ((uint32_t)(x))
#define NAT_PAIR32(first, second) ((uint64_t)(first) << 32 | (second))
#define NAT_PAIR16(first, second) ((uint32_t)(first) << 16 | (uint32_t)(second))
#define NAT_PAIR8(first, second)  ((uint32_t)(first) << 8 | (uint32_t)(second))
#endif
#define NAT_HTON16(x) NAT_NTOH16((uint16_t)(x))
#define NAT_HTON32(x) NAT_NTOH32((uint32_t)(x))

/* Which of 16 lanes equal `value`, lane 0 in bit 0. `lane` is aligned to 16 bytes. */
static inline uint32_t nat_equal_lanes(const uint16_t lane[16], uint16_t value)
{
#if defined(__SSE2__)
	const __m128i want = _mm_set1_epi16((short)value);
	const __m128i *at = (const __m128i *)(const void *)lane;
	const __m128i low = _mm_cmpeq_epi16(_mm_load_si128(at), want);
	const __m128i high = _mm_cmpeq_epi16(_mm_load_si128(at + 1), want);
	return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(low, high));
#else
	uint32_t equal = 0;
	for (unsigned i = 0; i < 16; i++)
		equal |= (uint32_t)(lane[i] == value) << i;
	return equal;
#endif
}

/* Impossible, unless the core itself is wrong: better dead than translating wrongly. */
#define NAT_ASSERT(condition)                                                                                \
	do {                                                                                                 \
		if (NAT_UNLIKELY(!(condition)))                                                              \
			NAT_TRAP();                                                                          \
	} while (0)

#endif
