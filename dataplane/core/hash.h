/* Hash of a tuple, and the random numbers behind ports.
 *
 * nat_tuple_hash() spreads keys over buckets. It is keyed, so that remotes cannot aim their packets at one
 * bucket, and costs two multiplications. nat_random() is SipHash-1-3 of a counter (Aumasson, Bernstein 2012):
 * whoever sees any number of ports cannot tell the next one without the key (RFC 6056, RFC 6888 REQ-15).
 */
#ifndef NAT_HASH_H
#define NAT_HASH_H

#include <stdint.h>
#include <string.h>

#include "nat.h"
#include "platform.h"

struct nat_key {
	uint64_t k0, k1;
};

struct nat_random {
	struct nat_key key;
	uint64_t counter;
};

static inline uint64_t nat_multiply_fold(uint64_t a, uint64_t b)
{
	nat_u128 product = (nat_u128)a * b;
	return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t nat_hash64(const struct nat_key *key, uint64_t a, uint64_t b)
{
	uint64_t h = nat_multiply_fold(a ^ key->k0, b ^ key->k1);
	return nat_multiply_fold(h ^ key->k1, UINT64_C(0x9e3779b97f4a7c15));
}

/* Of a tuple that was written as two words, or some time ago. */
static inline uint64_t nat_tuple_hash_words(const struct nat_key *key, const struct nat_tuple *tuple)
{
	uint64_t word[2];
	memcpy(word, tuple, sizeof(word));
	return nat_hash64(key, word[0], word[1]);
}

/* The same of one that was just put together: each field is read as it was written, because a load that spans
 * several fresh stores waits until they have left the store buffer. */
static inline uint64_t nat_tuple_hash(const struct nat_key *key, const struct nat_tuple *tuple)
{
	const uint32_t ports = NAT_PAIR16(tuple->local_port_be, tuple->remote_port_be);
	const uint32_t kind = NAT_PAIR16(NAT_PAIR8(tuple->protocol, tuple->side),
					 NAT_PAIR8(tuple->zero[0], tuple->zero[1]));
	return nat_hash64(key, NAT_PAIR32(tuple->local_be, tuple->remote_be), NAT_PAIR32(ports, kind));
}

/* A number below n without division: Lemire's multiply-shift. */
static inline uint32_t nat_scale32(uint32_t x, uint32_t n)
{
	return (uint32_t)(((uint64_t)x * n) >> 32);
}

static inline uint64_t nat_rotate64(uint64_t x, unsigned bits)
{
	return x << bits | x >> (64 - bits);
}

static inline void nat_sip_round(uint64_t v[4])
{
	v[0] += v[1];
	v[1] = nat_rotate64(v[1], 13) ^ v[0];
	v[0] = nat_rotate64(v[0], 32);
	v[2] += v[3];
	v[3] = nat_rotate64(v[3], 16) ^ v[2];
	v[0] += v[3];
	v[3] = nat_rotate64(v[3], 21) ^ v[0];
	v[2] += v[1];
	v[1] = nat_rotate64(v[1], 17) ^ v[2];
	v[2] = nat_rotate64(v[2], 32);
}

/* SipHash-1-3 of one 8-byte message. */
static inline uint64_t nat_sip64(const struct nat_key *key, uint64_t message)
{
	const uint64_t length_word = UINT64_C(8) << 56;
	uint64_t v[4] = {key->k0 ^ UINT64_C(0x736f6d6570736575), key->k1 ^ UINT64_C(0x646f72616e646f6d),
			 key->k0 ^ UINT64_C(0x6c7967656e657261), key->k1 ^ UINT64_C(0x7465646279746573)};
	v[3] ^= message;
	nat_sip_round(v);
	v[0] ^= message;
	v[3] ^= length_word;
	nat_sip_round(v);
	v[0] ^= length_word;
	v[2] ^= 0xff;
	nat_sip_round(v);
	nat_sip_round(v);
	nat_sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static inline uint64_t nat_random_next(struct nat_random *random)
{
	return nat_sip64(&random->key, random->counter++);
}

static inline struct nat_key nat_key_from_seed(uint64_t seed, uint64_t purpose)
{
	const struct nat_key from = {seed ^ UINT64_C(0x243f6a8885a308d3), UINT64_C(0x13198a2e03707344)};
	return (struct nat_key){nat_sip64(&from, purpose * 2), nat_sip64(&from, purpose * 2 + 1)};
}

#endif
