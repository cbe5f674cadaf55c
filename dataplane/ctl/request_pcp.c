/* {"cmd":"pcp","client":"100.64.0.2","request":"HEX"}: what would a host at that address be answered, and
 * with the same effect. For tests of the port control protocols without a network, and for asking on a
 * host's behalf.
 */
#include <arpa/inet.h>
#include <string.h>

#include "pcp_server.h"
#include "request_internal.h"

static int nibble(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

json_t *request_pcp(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "client", "request"};
	static const char digits[] = "0123456789abcdef";
	const char *client = "", *hex = "";
	uint8_t request[PCP_BYTES_MAX + 4], answer[PCP_BYTES_MAX + 4];
	char shown[2 * sizeof(answer) + 1];
	struct in_addr address;
	size_t n = 0, length;

	if (!request_only_keys(c, keys, sizeof(keys) / sizeof(keys[0])) ||
	    !request_read_text(c, "client", &client) || !request_read_text(c, "request", &hex))
		return NULL;
	if (inet_pton(AF_INET, client, &address) != 1)
		return request_refuse(c, "\"client\" is not an IPv4 address");
	for (; hex[0] && n < sizeof(request); hex += 2) {
		if (nibble(hex[0]) < 0 || nibble(hex[1]) < 0)
			return request_refuse(c, "\"request\" is not bytes in lower-case hexadecimal");
		request[n++] = (uint8_t)(nibble(hex[0]) << 4 | nibble(hex[1]));
	}
	const struct pcp_ops ops = pcp_over(c->ops);
	length = pcp_answer(&ops, address.s_addr, 0, request, n, answer);
	for (size_t i = 0; i < length; i++) {
		shown[2 * i] = digits[answer[i] >> 4];
		shown[2 * i + 1] = digits[answer[i] & 15];
	}
	shown[2 * length] = 0;
	return json_pack("{s:s}", "answer", shown);
}
