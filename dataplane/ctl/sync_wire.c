/* Sealing, and the order of bytes. See sync_wire.h. Numbers go in network order; addresses and ports stand
 * as they do in packets. */
#include "sync_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(SYNC_KEY_BYTES == crypto_aead_xchacha20poly1305_ietf_KEYBYTES,
	       "the pair's key is libsodium's");
_Static_assert(SYNC_TAG_BYTES == crypto_aead_xchacha20poly1305_ietf_ABYTES, "and so is the tag");
_Static_assert(SYNC_EPOCH_BYTES + 8 == crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
	       "epoch and number are the nonce");

static const uint8_t mark[8] = {'D', 'S', 'N', 'S', SYNC_VERSION, 0, 0, 0};

bool sync_wire_start(void)
{
	return sodium_init() >= 0;
}

static uint8_t *put(uint8_t *at, uint64_t value, unsigned bytes)
{
	for (unsigned i = 0; i < bytes; i++)
		at[i] = (uint8_t)(value >> (8 * (bytes - 1 - i)));
	return at + bytes;
}

static uint64_t get(const uint8_t **at, unsigned bytes)
{
	uint64_t value = 0;

	for (unsigned i = 0; i < bytes; i++)
		value = value << 8 | *(*at)++;
	return value;
}

/* ---- sealing ---- */

static void nonce_of(const struct sync_packet *packet, uint8_t nonce[SYNC_EPOCH_BYTES + 8])
{
	memcpy(nonce, packet->epoch, SYNC_EPOCH_BYTES);
	put(nonce + SYNC_EPOCH_BYTES, packet->number, 8);
}

size_t sync_seal(const struct sync_packet *packet, const uint8_t key[SYNC_KEY_BYTES],
		 uint8_t out[SYNC_BYTES_MAX])
{
	const struct sync_head *head = &packet->head;
	uint8_t plain[SYNC_HEAD_BYTES + SYNC_BODY_BYTES] = {0}, nonce[SYNC_EPOCH_BYTES + 8], *at = plain;
	unsigned long long sealed_bytes;

	memcpy(out, mark, sizeof mark);
	memcpy(out + 8, packet->epoch, SYNC_EPOCH_BYTES);
	put(out + 8 + SYNC_EPOCH_BYTES, packet->number, 8);
	memcpy(at, head->echo, SYNC_EPOCH_BYTES);
	at = put(at + SYNC_EPOCH_BYTES, head->ack, 8);
	for (unsigned i = 0; i < SYNC_ACK_BITS / 64; i++)
		at = put(at, head->ack_bits[i], 8);
	at = put(at, head->kind, 2);
	at = put(at, head->n, 2);
	at = put(at, head->n_records, 4);
	at = put(at, head->waiting, 4);
	at = put(at, head->offer.digest, 8);
	at = put(at, head->offer.addresses, 3);
	put(at, head->offer.exhausted, 1);
	memcpy(plain + SYNC_HEAD_BYTES, packet->body, packet->body_bytes);
	nonce_of(packet, nonce);
	crypto_aead_xchacha20poly1305_ietf_encrypt(out + SYNC_CLEAR_BYTES, &sealed_bytes, plain,
						   SYNC_HEAD_BYTES + packet->body_bytes, out,
						   SYNC_CLEAR_BYTES, NULL, nonce, key);
	return SYNC_CLEAR_BYTES + (size_t)sealed_bytes;
}

bool sync_open_sealed(struct sync_packet *packet, const uint8_t key[SYNC_KEY_BYTES], const uint8_t *in,
		      size_t in_bytes)
{
	struct sync_head *head = &packet->head;
	uint8_t plain[SYNC_BYTES_MAX], nonce[SYNC_EPOCH_BYTES + 8];
	const uint8_t *at = in + 8 + SYNC_EPOCH_BYTES;
	unsigned long long plain_bytes;

	if (in_bytes < SYNC_CLEAR_BYTES + SYNC_HEAD_BYTES + SYNC_TAG_BYTES || in_bytes > SYNC_BYTES_MAX ||
	    memcmp(in, mark, sizeof mark) != 0)
		return false;
	memcpy(packet->epoch, in + 8, SYNC_EPOCH_BYTES);
	packet->number = get(&at, 8);
	nonce_of(packet, nonce);
	if (crypto_aead_xchacha20poly1305_ietf_decrypt(plain, &plain_bytes, NULL, in + SYNC_CLEAR_BYTES,
						       in_bytes - SYNC_CLEAR_BYTES, in, SYNC_CLEAR_BYTES,
						       nonce, key))
		return false;
	at = plain;
	memcpy(head->echo, at, SYNC_EPOCH_BYTES);
	at += SYNC_EPOCH_BYTES;
	head->ack = get(&at, 8);
	for (unsigned i = 0; i < SYNC_ACK_BITS / 64; i++)
		head->ack_bits[i] = get(&at, 8);
	head->kind = (uint8_t)get(&at, 2);
	head->n = (uint16_t)get(&at, 2);
	head->n_records = (uint32_t)get(&at, 4);
	head->waiting = (uint32_t)get(&at, 4);
	head->offer.digest = get(&at, 8);
	head->offer.addresses = (uint32_t)get(&at, 3);
	head->offer.exhausted = get(&at, 1) & 1;
	packet->body_bytes = (size_t)plain_bytes - SYNC_HEAD_BYTES;
	memcpy(packet->body, plain + SYNC_HEAD_BYTES, packet->body_bytes);
	return head->kind < SYNC_KINDS;
}

uint8_t sync_version(const uint8_t *in, size_t in_bytes)
{
	return in_bytes > 4 && memcmp(in, mark, 4) == 0 ? in[4] : 0;
}

/* ---- entries ---- */

bool sync_put(struct sync_packet *packet, const struct nat_replica *r)
{
	const size_t need = r->kind == NAT_REPLICA_SESSION ? SYNC_RECORD_BYTES : SYNC_GONE_BYTES;
	uint8_t *at = packet->body + packet->body_bytes;

	if (packet->body_bytes + need > SYNC_BODY_BYTES)
		return false;
	packet->body_bytes += need;
	packet->head.n++;
	at = put(at, r->kind, 1);
	at = put(at, r->slot, 4);
	if (r->kind != NAT_REPLICA_SESSION)
		return true;
	memcpy(at, &r->inside, 13); /* without side and zeros */
	memcpy(at + 13, &r->out_addr_be, 4);
	memcpy(at + 17, &r->out_port_be, 2);
	at = put(at + 19, r->traits, 1);
	at = put(at, r->timer, 1);
	at = put(at, r->state, 1);
	at = put(at, r->pool, 4);
	at = put(at, r->zone, 4);
	at = put(at, r->idle_s, 4);
	at = put(at, r->age_s, 4);
	put(at, 0, 5);
	return true;
}

bool sync_get(const struct sync_packet *packet, size_t *offset, struct nat_replica *r)
{
	const uint8_t *at = packet->body + *offset;
	const size_t left = packet->body_bytes - *offset;

	*r = (struct nat_replica){0};
	if (left < SYNC_GONE_BYTES)
		return false;
	r->kind = (uint8_t)get(&at, 1);
	r->slot = (uint32_t)get(&at, 4);
	if (r->kind != NAT_REPLICA_SESSION) {
		*offset += SYNC_GONE_BYTES;
		return true;
	}
	if (left < SYNC_RECORD_BYTES)
		return false;
	*offset += SYNC_RECORD_BYTES;
	memcpy(&r->inside, at, 13);
	memcpy(&r->out_addr_be, at + 13, 4);
	memcpy(&r->out_port_be, at + 17, 2);
	at += 19;
	r->traits = (uint8_t)get(&at, 1);
	r->timer = (uint8_t)get(&at, 1);
	r->state = (uint8_t)get(&at, 1);
	r->pool = (uint32_t)get(&at, 4);
	r->zone = (uint32_t)get(&at, 4);
	r->idle_s = (uint32_t)get(&at, 4);
	r->age_s = (uint32_t)get(&at, 4);
	return true;
}

enum { COMPARE_BYTES = 4 + 8 + 8 + 4 + 1 + 8 * NAT_REPLICA_WORDS };
_Static_assert(COMPARE_BYTES <= SYNC_BODY_BYTES, "one range, one datagram");

void sync_put_compare(struct sync_packet *packet, const struct sync_compare *c)
{
	uint8_t *at = packet->body;

	at = put(at, c->range, 4);
	at = put(at, c->number, 8);
	at = put(at, c->sum.sum, 8);
	at = put(at, c->sum.n, 4);
	at = put(at, c->equal, 1);
	for (unsigned i = 0; i < NAT_REPLICA_WORDS; i++)
		at = put(at, c->sum.without[i], 8);
	packet->body_bytes = COMPARE_BYTES;
}

bool sync_get_compare(const struct sync_packet *packet, struct sync_compare *c)
{
	const uint8_t *at = packet->body;

	if (packet->body_bytes != COMPARE_BYTES)
		return false;
	c->range = (uint32_t)get(&at, 4);
	c->number = get(&at, 8);
	c->sum.sum = get(&at, 8);
	c->sum.n = (uint32_t)get(&at, 4);
	c->equal = get(&at, 1) != 0;
	for (unsigned i = 0; i < NAT_REPLICA_WORDS; i++)
		c->sum.without[i] = get(&at, 8);
	return true;
}

/* ---- the key ---- */

bool sync_read_key(const char *path, uint8_t key[SYNC_KEY_BYTES], char *why, size_t why_bytes)
{
	char text[2 * SYNC_KEY_BYTES + 2] = "";
	struct stat st;
	size_t n_key = 0;
	const char *end = NULL;
	const int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = -1;

	if (fd < 0 || fstat(fd, &st)) {
		snprintf(why, why_bytes,
			 "sync: the key %s cannot be read (%s); give both gateways the same file", path,
			 strerror(errno));
	} else if (st.st_mode & 077) {
		snprintf(why, why_bytes,
			 "sync: the key %s can be read by others; chmod 600, and make a new one", path);
	} else if ((got = read(fd, text, sizeof text - 1)) < (ssize_t)(2 * SYNC_KEY_BYTES) ||
		   sodium_hex2bin(key, SYNC_KEY_BYTES, text, (size_t)got, "\n", &n_key, &end) ||
		   n_key != SYNC_KEY_BYTES) {
		snprintf(why, why_bytes,
			 "sync: the key %s is not 64 hexadecimal digits; make one with: openssl rand -hex 32",
			 path);
		got = -1;
	}
	sodium_memzero(text, sizeof text);
	if (fd >= 0)
		close(fd);
	return got > 0;
}
