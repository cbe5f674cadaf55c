/* Syslog: everything an event holds stands in structured data, so that no collector has to take a sentence
 * apart.
 *
 *	<134>1 2026-11-23T07:00:00.000123Z gw1 dsnatd - session-create [nat@32473 pool="g1" protocol="tcp"
 *	host="100.64.0.2" hostPort="40000" public="203.0.113.1" publicPort="5000" worker="0"][meta sequenceId="7"]
 *
 * Facility local0; severity info for the life of mappings, warning for refusals. The enterprise number is
 * the one reserved for documentation (RFC 5612). sequenceId counts lines of this collector, lost ones
 * included, so a gap is a loss.
 *
 * Lines are put together by hand: at some hundred thousand a second printf would be the larger half of the
 * work.
 */
#include "syslog.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { PREFIX_BYTES = 8, INFO = 134, WARNING = 132, SEQUENCE_MAX = 2147483647 };

static char *put_text(char *at, const char *text)
{
	const size_t length = strlen(text);

	memcpy(at, text, length);
	return at + length;
}

static char *put_number(char *at, uint32_t value)
{
	char digit[10];
	int n = 0;

	do
		digit[n++] = (char)('0' + value % 10);
	while ((value /= 10) != 0);
	while (n > 0)
		*at++ = digit[--n];
	return at;
}

static char *put_address(char *at, uint32_t address_be)
{
	const uint32_t address = ntohl(address_be);

	for (int shift = 24; shift >= 0; shift -= 8) {
		at = put_number(at, address >> shift & 255);
		*at++ = '.';
	}
	return at - 1;
}

static char *put_word(char *at, const char *name, const char *value)
{
	return put_text(put_text(put_text(put_text(put_text(at, " "), name), "=\""), value), "\"");
}

static char *put_count(char *at, const char *name, uint32_t value)
{
	return put_text(put_number(put_text(put_text(put_text(at, " "), name), "=\""), value), "\"");
}

static char *put_host(char *at, const char *name, uint32_t address_be)
{
	return put_text(put_address(put_text(put_text(put_text(at, " "), name), "=\""), address_be), "\"");
}

static char *put_time(struct syslog *s, char *at, uint64_t wall_ns)
{
	const uint64_t second = wall_ns / UINT64_C(1000000000);
	uint32_t us = (uint32_t)(wall_ns % UINT64_C(1000000000)) / 1000;

	if (second != s->second || s->time[0] == 0) {
		const time_t t = (time_t)second;
		struct tm tm;

		gmtime_r(&t, &tm);
		strftime(s->time, sizeof(s->time), "%Y-%m-%dT%H:%M:%S", &tm);
		s->second = second;
	}
	at = put_text(at, s->time);
	*at = '.';
	for (int i = 6; i > 0; i--, us /= 10)
		at[i] = (char)('0' + us % 10);
	at[7] = 'Z';
	return at + 8;
}

static const char *message_id(const struct nat_event *e)
{
	switch ((enum nat_event_kind)e->kind) {
	case NAT_EVENT_SESSION_CREATED:
		return "session-create";
	case NAT_EVENT_SESSION_ENDED:
		return "session-delete";
	case NAT_EVENT_MAPPING_CREATED:
		return "mapping-create";
	case NAT_EVENT_MAPPING_ENDED:
		return "mapping-delete";
	case NAT_EVENT_BLOCK_TAKEN:
		return "block-allocate";
	case NAT_EVENT_BLOCK_FREED:
		return "block-free";
	case NAT_EVENT_PORTS_EXHAUSTED:
		return e->reason == NAT_REASON_POOL_EMPTY ? "addresses-exhausted" : "ports-exhausted";
	case NAT_EVENT_TABLE_FULL:
	case NAT_EVENT_HOST_LIMIT:
	case NAT_EVENT_KINDS:
		break;
	}
	return "quota-exceeded";
}

static const char *protocol_word(uint8_t protocol)
{
	return protocol == 6 ? "tcp" : protocol == 17 ? "udp" : "icmp";
}

static char *put_refusal(char *at, const struct nat_event *e, const struct log_facts *facts)
{
	at = put_word(at, "reason", nat_reason_name((enum nat_reason)e->reason));
	if (e->inside_be != 0)
		at = put_host(at, "host", e->inside_be);
	return facts->limit ? put_count(at, "limit", facts->limit) : at;
}

static char *put_fields(const struct syslog *s, char *at, const struct nat_event *e,
			const struct log_facts *facts)
{
	if (facts->pool)
		at = put_word(at, "pool", facts->pool);
	if (e->kind == NAT_EVENT_BLOCK_TAKEN || e->kind == NAT_EVENT_BLOCK_FREED) {
		at = put_host(put_host(at, "host", e->inside_be), "public", e->outside_be);
		return put_count(put_count(at, "portFirst", e->port_first), "portLast", e->port_last);
	}
	if (e->kind < NAT_EVENT_SESSION_CREATED)
		return put_refusal(at, e, facts);
	at = put_word(at, "protocol", protocol_word(e->protocol));
	at = put_count(put_host(at, "host", e->inside_be), "hostPort", ntohs(e->inside_port_be));
	at = put_count(put_host(at, "public", e->outside_be), "publicPort", ntohs(e->outside_port_be));
	if (!s->destinations || e->kind >= NAT_EVENT_MAPPING_CREATED)
		return at;
	return put_count(put_host(at, "remote", e->remote_be), "remotePort", ntohs(e->remote_port_be));
}

void syslog_event(struct syslog *s, uint32_t worker, const struct nat_event *event,
		  const struct log_facts *facts)
{
	char line[PREFIX_BYTES + SYSLOG_LINE_MAX], count[PREFIX_BYTES];
	char *first = line + PREFIX_BYTES, *at = first;
	const bool refusal = event->kind < NAT_EVENT_BLOCK_TAKEN;

	s->sequence = s->sequence % SEQUENCE_MAX + 1;
	at = put_text(put_number(put_text(at, "<"), refusal ? WARNING : INFO), ">1 ");
	at = put_text(put_time(s, at, event->now_ns + facts->clock_offset_ns), " ");
	at = put_text(put_text(at, s->host), " dsnatd - ");
	at = put_text(put_text(at, message_id(event)), " [nat@32473");
	at = put_count(put_fields(s, at, event, facts), "worker", worker);
	at = put_text(put_number(put_text(at, "][meta sequenceId=\""), s->sequence), "\"]");
	if (s->octet_count) {
		const int n = snprintf(count, sizeof(count), "%u ", (unsigned)(at - first));

		first -= n;
		memcpy(first, count, (size_t)n);
	}
	const struct log_message message = {.bytes = (const uint8_t *)first,
					    .n_bytes = (uint32_t)(at - first),
					    .n_records = 1,
					    .sequence = s->sequence};
	s->emit(s->context, &message);
}
