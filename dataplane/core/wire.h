/* Bytes on the wire: unaligned access and the offsets of IPv4, TCP, UDP and ICMP fields.
 *
 * nat_get16/32 and nat_put16/32 move a field as it stands (network byte order); the value's name then ends in
 * _be.
 */
#ifndef NAT_WIRE_H
#define NAT_WIRE_H

#include <stdint.h>
#include <string.h>

#include "platform.h"

enum {
	NAT_PROTO_ICMP = 1,
	NAT_PROTO_TCP = 6,
	NAT_PROTO_UDP = 17,

	NAT_IP_TOS = 1,
	NAT_IP_LENGTH = 2,
	NAT_IP_ID = 4,
	NAT_IP_FRAGMENT = 6,
	NAT_IP_TTL = 8,
	NAT_IP_PROTOCOL = 9,
	NAT_IP_CHECKSUM = 10,
	NAT_IP_SOURCE = 12,
	NAT_IP_DESTINATION = 16,
	NAT_IP_HEADER_BYTES = 20,

	NAT_IP_DF = 0x4000, /* of the fragment field, host order */
	NAT_IP_MF = 0x2000,
	NAT_IP_OFFSET_MASK = 0x1fff, /* in units of 8 bytes */

	NAT_L4_SOURCE_PORT = 0, /* TCP and UDP */
	NAT_L4_DESTINATION_PORT = 2,

	NAT_UDP_LENGTH = 4,
	NAT_UDP_CHECKSUM = 6,
	NAT_UDP_HEADER_BYTES = 8,

	NAT_TCP_SEQUENCE = 4,
	NAT_TCP_ACKNOWLEDGE = 8,
	NAT_TCP_OFFSET = 12,
	NAT_TCP_FLAGS = 13,
	NAT_TCP_CHECKSUM = 16,
	NAT_TCP_HEADER_BYTES = 20,
	NAT_TCP_FIN = 0x01,
	NAT_TCP_SYN = 0x02,
	NAT_TCP_RST = 0x04,
	NAT_TCP_ACK = 0x10,

	NAT_ICMP_TYPE = 0,
	NAT_ICMP_CODE = 1,
	NAT_ICMP_CHECKSUM = 2,
	NAT_ICMP_ID = 4,
	NAT_ICMP_MTU = 6,
	NAT_ICMP_HEADER_BYTES = 8,
	NAT_ICMP_ECHO_REPLY = 0,
	NAT_ICMP_UNREACHABLE = 3,
	NAT_ICMP_QUENCH = 4,
	NAT_ICMP_REDIRECT = 5,
	NAT_ICMP_ECHO = 8,
	NAT_ICMP_TIME_EXCEEDED = 11,
	NAT_ICMP_PARAMETER = 12,
};

static inline uint16_t nat_get16(const uint8_t *p)
{
	uint16_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint32_t nat_get32(const uint8_t *p)
{
	uint32_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline void nat_put16(uint8_t *p, uint16_t v_be)
{
	memcpy(p, &v_be, sizeof(v_be));
}

static inline void nat_put32(uint8_t *p, uint32_t v_be)
{
	memcpy(p, &v_be, sizeof(v_be));
}

/* The same, turned into host order. */
static inline uint16_t nat_read16(const uint8_t *p)
{
	return NAT_NTOH16(nat_get16(p));
}

static inline uint32_t nat_read32(const uint8_t *p)
{
	return NAT_NTOH32(nat_get32(p));
}

static inline void nat_write16(uint8_t *p, unsigned v)
{
	nat_put16(p, NAT_HTON16(v));
}

#endif
