/* See pcp.h. Offsets are those of the figures in RFC 6887 sections 7, 11, 12 and RFC 6886 section 3. */
#include "pcp.h"

#include <netinet/in.h>
#include <string.h>

enum { PMP_VERSION = 0, PCP_VERSION = 2 };
enum { RESPONSE = 0x80 };
enum { ANNOUNCE = 0, MAP = 1, PEER = 2 };
enum { HEADER_BYTES = 24, MAP_BYTES = 36, PEER_BYTES = 56 };

enum pcp_result {
	SUCCESS = 0,
	UNSUPP_VERSION = 1,
	NOT_AUTHORIZED = 2,
	MALFORMED_REQUEST = 3,
	UNSUPP_OPCODE = 4,
	UNSUPP_OPTION = 5,
	NETWORK_FAILURE = 7,
	NO_RESOURCES = 8,
	UNSUPP_PROTOCOL = 9,
	USER_EX_QUOTA = 10,
	ADDRESS_MISMATCH = 12,
};

static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void put32(uint8_t *p, uint32_t v)
{
	p[0] = (uint8_t)(v >> 24);
	p[1] = (uint8_t)(v >> 16);
	p[2] = (uint8_t)(v >> 8);
	p[3] = (uint8_t)v;
}

static uint32_t granted_lifetime(uint32_t asked_s)
{
	if (asked_s == 0)
		return 0;
	if (asked_s < PCP_LIFETIME_LEAST_S)
		return PCP_LIFETIME_LEAST_S;
	return asked_s > PCP_LIFETIME_MOST_S ? PCP_LIFETIME_MOST_S : asked_s;
}

/* ---- PCP ---- */

/* IPv4 addresses stand as ::ffff:a.b.c.d. */
static bool is_mapped_ipv4(const uint8_t *p)
{
	static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};
	return memcmp(p, prefix, sizeof(prefix)) == 0;
}

static void put_mapped_ipv4(uint8_t *p, uint32_t address_be)
{
	memset(p, 0, 10);
	p[10] = p[11] = 0xff;
	memcpy(p + 12, &address_be, 4);
}

static enum pcp_result result_of(enum nat_map_result result)
{
	switch (result) {
	case NAT_MAP_OK:
		return SUCCESS;
	case NAT_MAP_NOT_AUTHORIZED:
	case NAT_MAP_NOT_THEIRS:
		return NOT_AUTHORIZED;
	case NAT_MAP_NO_RESOURCES:
		return NO_RESOURCES;
	case NAT_MAP_QUOTA:
		return USER_EX_QUOTA;
	}
	return NETWORK_FAILURE;
}

/* Options behind the opcode's own data: those that must be understood are refused (none is), the others
 * passed over. */
static enum pcp_result check_options(const uint8_t *option, size_t bytes)
{
	while (bytes >= 4) {
		const size_t length = ((size_t)option[2] << 8 | option[3]) + 4,
			     padded = (length + 3) & ~(size_t)3;
		if (padded > bytes)
			return MALFORMED_REQUEST;
		if (option[0] < 128)
			return UNSUPP_OPTION;
		option += padded;
		bytes -= padded;
	}
	return SUCCESS;
}

/* The 96 bits of a nonce in 64, never 0: a guess is as good as hopeless still. */
static uint64_t nonce_of(const uint8_t *data)
{
	const uint64_t low = (uint64_t)get32(data) << 32 | get32(data + 4);
	const uint64_t nonce = low ^ get32(data + 8) * UINT64_C(0x9e3779b97f4a7c15);

	return nonce ? nonce : 1;
}

static enum pcp_result serve_map(const struct pcp_ops *ops, uint32_t client_be, bool peer,
				 uint32_t *lifetime_s, uint32_t *error_s, uint8_t *data)
{
	struct nat_map ask = {.host_be = client_be,
			      .protocol = data[12],
			      .open = !peer,
			      .lifetime_s = granted_lifetime(*lifetime_s),
			      .nonce = nonce_of(data)};
	enum nat_map_result result;

	memcpy(&ask.port_be, data + 16, 2);
	memcpy(&ask.outside_port_be, data + 18, 2);
	if (is_mapped_ipv4(data + 20))
		memcpy(&ask.outside_be, data + 32, 4);
	/* "All ports" and "all protocols" would be a whole address. */
	if (ask.protocol != IPPROTO_TCP && ask.protocol != IPPROTO_UDP)
		return UNSUPP_PROTOCOL;
	if (ask.port_be == 0)
		return ask.lifetime_s == 0 ? MALFORMED_REQUEST : UNSUPP_PROTOCOL;
	if (!ops->map(ops->context, &ask, &result))
		return NETWORK_FAILURE;
	if (result == NAT_MAP_NOT_THEIRS)
		*error_s = ask.lifetime_s;
	if (result != NAT_MAP_OK)
		return result_of(result);
	*lifetime_s = ask.lifetime_s;
	memcpy(data + 18, &ask.outside_port_be, 2);
	put_mapped_ipv4(data + 20, ask.outside_be);
	return SUCCESS;
}

static size_t answer_pcp(const struct pcp_ops *ops, uint32_t client_be, uint32_t epoch_s,
			 const uint8_t *request, size_t bytes, uint8_t *answer)
{
	const uint8_t opcode = request[1] & 0x7f;
	const size_t data_bytes = opcode == MAP ? MAP_BYTES : opcode == PEER ? PEER_BYTES : 0;
	uint32_t lifetime_s = bytes >= 8 ? get32(request + 4) : 0, error_s = 0;
	enum pcp_result result = SUCCESS;

	memset(answer, 0, HEADER_BYTES);
	if (bytes < HEADER_BYTES || bytes % 4 != 0 || bytes > PCP_BYTES_MAX) {
		bytes = HEADER_BYTES;
		result = MALFORMED_REQUEST;
	} else if (opcode > PEER) {
		memcpy(answer, request, bytes);
		result = UNSUPP_OPCODE;
	} else {
		memcpy(answer, request, bytes);
		if (bytes < HEADER_BYTES + data_bytes)
			result = MALFORMED_REQUEST;
		else if (!is_mapped_ipv4(request + 8) || memcmp(request + 20, &client_be, 4) != 0)
			result = ADDRESS_MISMATCH; /* another NAT stands in between: section 8.1 */
		else
			result = check_options(request + HEADER_BYTES + data_bytes,
					       bytes - HEADER_BYTES - data_bytes);
		if (result == SUCCESS && opcode != ANNOUNCE)
			result = serve_map(ops, client_be, opcode == PEER, &lifetime_s, &error_s,
					   answer + HEADER_BYTES);
	}
	answer[0] = PCP_VERSION;
	answer[1] = RESPONSE | opcode;
	answer[2] = 0;
	answer[3] = (uint8_t)result;
	/* Of an error: how long it holds. Short for what may pass by itself (section 7.4). */
	if (result != SUCCESS)
		lifetime_s = error_s                                               ? error_s
			     : result == NO_RESOURCES || result == NETWORK_FAILURE ? 30
										   : 1800;
	put32(answer + 4, opcode == ANNOUNCE && result == SUCCESS ? 0 : lifetime_s);
	put32(answer + 8, epoch_s);
	memset(answer + 12, 0, 12);
	return bytes;
}

static size_t answer_version(uint8_t opcode, uint32_t epoch_s, uint8_t *answer)
{
	memset(answer, 0, HEADER_BYTES);
	answer[0] = PCP_VERSION;
	answer[1] = RESPONSE | opcode;
	answer[3] = UNSUPP_VERSION;
	put32(answer + 4, 1800);
	put32(answer + 8, epoch_s);
	return HEADER_BYTES;
}

/* ---- NAT-PMP ---- */

enum { PMP_ADDRESS = 0, PMP_UDP = 1, PMP_TCP = 2 };
enum { PMP_SUCCESS = 0, PMP_REFUSED = 2, PMP_NETWORK = 3, PMP_RESOURCES = 4, PMP_OPCODE = 5 };

static size_t pmp_head(uint8_t *answer, uint8_t opcode, uint8_t result, uint32_t epoch_s)
{
	answer[0] = PMP_VERSION;
	answer[1] = RESPONSE | opcode;
	answer[2] = 0;
	answer[3] = result;
	put32(answer + 4, epoch_s);
	return 8;
}

static size_t answer_pmp_map(const struct pcp_ops *ops, uint32_t client_be, uint32_t epoch_s,
			     const uint8_t *request, uint8_t *answer)
{
	struct nat_map ask = {.host_be = client_be,
			      .protocol = request[1] == PMP_TCP ? IPPROTO_TCP : IPPROTO_UDP,
			      .open = true,
			      .lifetime_s = granted_lifetime(get32(request + 8))};
	enum nat_map_result result = NAT_MAP_NOT_AUTHORIZED;
	uint8_t code = PMP_SUCCESS;

	memcpy(&ask.port_be, request + 4, 2);
	memcpy(&ask.outside_port_be, request + 6, 2);
	/* Section 3.4: port 0 would delete all of the host's mappings at once; they are deleted one by one
	 * here. */
	if (ask.port_be == 0)
		code = PMP_REFUSED;
	else if (!ops->map(ops->context, &ask, &result))
		code = PMP_NETWORK;
	else if (result != NAT_MAP_OK)
		code = result == NAT_MAP_NOT_AUTHORIZED || result == NAT_MAP_NOT_THEIRS ? PMP_REFUSED
											: PMP_RESOURCES;
	pmp_head(answer, request[1], code, epoch_s);
	memcpy(answer + 8, &ask.port_be, 2);
	memset(answer + 10, 0, 6);
	if (code == PMP_SUCCESS && ask.lifetime_s != 0) {
		memcpy(answer + 10, &ask.outside_port_be, 2);
		put32(answer + 12, ask.lifetime_s);
	}
	return 16;
}

static size_t answer_pmp(const struct pcp_ops *ops, uint32_t client_be, uint32_t epoch_s,
			 const uint8_t *request, size_t bytes, uint8_t *answer)
{
	const uint8_t opcode = request[1];
	uint32_t address_be = 0;

	if (opcode == PMP_ADDRESS) {
		const bool known = ops->public_address(ops->context, client_be, &address_be);
		pmp_head(answer, opcode, known ? PMP_SUCCESS : PMP_REFUSED, epoch_s);
		memcpy(answer + 8, &address_be, 4);
		return 12;
	}
	if ((opcode != PMP_UDP && opcode != PMP_TCP) || bytes < 12)
		return pmp_head(answer, opcode, PMP_OPCODE, epoch_s);
	return answer_pmp_map(ops, client_be, epoch_s, request, answer);
}

size_t pcp_answer(const struct pcp_ops *ops, uint32_t client_be, uint32_t epoch_s, const uint8_t *request,
		  size_t request_bytes, uint8_t answer[PCP_BYTES_MAX])
{
	if (request_bytes < 2 || (request[1] & RESPONSE))
		return 0; /* section 8.3: what is not a request is passed over in silence */
	if (request[0] == PMP_VERSION)
		return answer_pmp(ops, client_be, epoch_s, request, request_bytes, answer);
	if (request[0] == PCP_VERSION)
		return answer_pcp(ops, client_be, epoch_s, request, request_bytes, answer);
	return answer_version(request[1] & 0x7f, epoch_s, answer);
}
