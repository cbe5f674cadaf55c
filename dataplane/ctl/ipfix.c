/* IPFIX: a message is a header, then sets of records that look alike.
 *
 *	header 16 bytes   version 10, length, export time, sequence number, observation domain
 *	set               template number, length, records one behind the other
 *
 * A template says which information elements a record holds; a collector that has missed it can read
 * nothing, so over UDP templates are sent again and again (RFC 7011 8.4), over TCP once in a connection.
 *
 * The sequence number counts data records before the message, those included that were lost on our side: a
 * collector sees each loss as a gap, and it goes on over reconnections, so a collector that was away can
 * tell what it has missed.
 *
 * All numbers are from IANA's registry of IPFIX information elements and RFC 8158 section 5.
 */
#include "ipfix.h"

#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum { VERSION = 10, HEADER_BYTES = 16, SET_HEADER_BYTES = 4, TEMPLATE_SET = 2 };

/* information elements */
enum {
	PROTOCOL_IDENTIFIER = 4,
	SOURCE_TRANSPORT_PORT = 7,
	SOURCE_IPV4_ADDRESS = 8,
	DESTINATION_TRANSPORT_PORT = 11,
	DESTINATION_IPV4_ADDRESS = 12,
	POST_NAT_SOURCE_IPV4_ADDRESS = 225,
	POST_NAPT_SOURCE_TRANSPORT_PORT = 227,
	NAT_EVENT = 230,
	NAT_POOL_ID = 283,
	OBSERVATION_TIME_MILLISECONDS = 323,
	PORT_RANGE_START = 361,
	PORT_RANGE_END = 362,
	NAT_QUOTA_EXCEEDED_EVENT = 466,
	MAX_SESSION_ENTRIES = 471,
	MAX_ENTRIES_PER_USER = 473,
};

/* values of natEvent and natQuotaExceededEvent */
enum {
	ADDRESSES_EXHAUSTED = 3,
	SESSION_CREATE = 4,
	SESSION_DELETE = 5,
	BIB_CREATE = 8,
	BIB_DELETE = 9,
	PORTS_EXHAUSTED = 12,
	QUOTA_EXCEEDED = 13,
	BLOCK_ALLOCATE = 16,
	BLOCK_FREE = 17,
};
enum { QUOTA_SESSIONS = 1, QUOTA_PER_USER = 3 };

struct element {
	uint16_t id, n_bytes;
};

enum { PORT, SESSION, BLOCK, ADDRESSES_OUT, PORTS_OUT, TABLE_FULL, USER_FULL, TEMPLATES };

#define FIRST_TEMPLATE 256u
#define WHEN_AND_WHAT                                                                                        \
	{OBSERVATION_TIME_MILLISECONDS, 8},                                                                  \
	{                                                                                                    \
		NAT_EVENT, 1                                                                                 \
	}
#define TRANSLATION                                                                                          \
	{NAT_POOL_ID, 4}, {SOURCE_IPV4_ADDRESS, 4}, {POST_NAT_SOURCE_IPV4_ADDRESS, 4},                       \
		{PROTOCOL_IDENTIFIER, 1}, {SOURCE_TRANSPORT_PORT, 2},                                        \
	{                                                                                                    \
		POST_NAPT_SOURCE_TRANSPORT_PORT, 2                                                           \
	}

static const struct element port_elements[] = {WHEN_AND_WHAT, TRANSLATION};
static const struct element session_elements[] = {
	WHEN_AND_WHAT, TRANSLATION, {DESTINATION_IPV4_ADDRESS, 4}, {DESTINATION_TRANSPORT_PORT, 2}};
static const struct element block_elements[] = {WHEN_AND_WHAT,
						{NAT_POOL_ID, 4},
						{SOURCE_IPV4_ADDRESS, 4},
						{POST_NAT_SOURCE_IPV4_ADDRESS, 4},
						{PORT_RANGE_START, 2},
						{PORT_RANGE_END, 2}};
static const struct element addresses_out_elements[] = {WHEN_AND_WHAT, {NAT_POOL_ID, 4}};
static const struct element ports_out_elements[] = {
	WHEN_AND_WHAT, {NAT_POOL_ID, 4}, {POST_NAT_SOURCE_IPV4_ADDRESS, 4}, {PROTOCOL_IDENTIFIER, 1}};
static const struct element table_full_elements[] = {
	WHEN_AND_WHAT, {NAT_QUOTA_EXCEEDED_EVENT, 4}, {MAX_SESSION_ENTRIES, 4}};
static const struct element user_full_elements[] = {
	WHEN_AND_WHAT, {NAT_QUOTA_EXCEEDED_EVENT, 4}, {MAX_ENTRIES_PER_USER, 4}, {SOURCE_IPV4_ADDRESS, 4}};

static const struct {
	const struct element *element;
	size_t n;
} templates[TEMPLATES] = {
	[PORT] = {port_elements, COUNT(port_elements)},
	[SESSION] = {session_elements, COUNT(session_elements)},
	[BLOCK] = {block_elements, COUNT(block_elements)},
	[ADDRESSES_OUT] = {addresses_out_elements, COUNT(addresses_out_elements)},
	[PORTS_OUT] = {ports_out_elements, COUNT(ports_out_elements)},
	[TABLE_FULL] = {table_full_elements, COUNT(table_full_elements)},
	[USER_FULL] = {user_full_elements, COUNT(user_full_elements)},
};
_Static_assert(HEADER_BYTES + SET_HEADER_BYTES + TEMPLATES * 4 +
			       4 * (COUNT(port_elements) + COUNT(session_elements) + COUNT(block_elements) +
				    COUNT(addresses_out_elements) + COUNT(ports_out_elements) +
				    COUNT(table_full_elements) + COUNT(user_full_elements)) <=
		       IPFIX_TEMPLATES_MAX,
	       "one message holds all templates");

/* ---- bytes ---- */

static uint8_t *put8(uint8_t *at, uint32_t value)
{
	*at = (uint8_t)value;
	return at + 1;
}

static uint8_t *put16(uint8_t *at, uint32_t value)
{
	return put8(put8(at, value >> 8), value);
}

static uint8_t *put32(uint8_t *at, uint32_t value)
{
	return put16(put16(at, value >> 16), value);
}

static uint8_t *put64(uint8_t *at, uint64_t value)
{
	return put32(put32(at, (uint32_t)(value >> 32)), (uint32_t)value);
}

/* What is in network order already. */
static uint8_t *put_be(uint8_t *at, const void *value, size_t n_bytes)
{
	memcpy(at, value, n_bytes);
	return at + n_bytes;
}

/* ---- messages ---- */

uint32_t ipfix_domain(uint32_t worker)
{
	return worker + 1;
}

static void write_header(uint8_t *at, uint32_t n_bytes, uint64_t wall_ns, uint32_t sequence, uint32_t worker)
{
	at = put16(at, VERSION);
	at = put16(at, n_bytes);
	at = put32(at, (uint32_t)(wall_ns / UINT64_C(1000000000)));
	at = put32(at, sequence);
	put32(at, ipfix_domain(worker));
}

uint32_t ipfix_templates(uint32_t worker, uint32_t sequence, uint64_t wall_ns,
			 uint8_t out[IPFIX_TEMPLATES_MAX])
{
	uint8_t *at = out + HEADER_BYTES + SET_HEADER_BYTES;

	for (uint32_t i = 0; i < TEMPLATES; i++) {
		at = put16(at, FIRST_TEMPLATE + i);
		at = put16(at, (uint32_t)templates[i].n);
		for (size_t k = 0; k < templates[i].n; k++) {
			at = put16(at, templates[i].element[k].id);
			at = put16(at, templates[i].element[k].n_bytes);
		}
	}
	const uint32_t n_bytes = (uint32_t)(at - out);
	put16(put16(out + HEADER_BYTES, TEMPLATE_SET), n_bytes - HEADER_BYTES);
	write_header(out, n_bytes, wall_ns, sequence, worker);
	return n_bytes;
}

static void close_set(struct ipfix *x)
{
	if (x->set != 0)
		put16(x->at + x->set + 2, x->used - x->set);
	x->set = 0;
}

void ipfix_flush(struct ipfix *x)
{
	if (x->n_records == 0)
		return;
	close_set(x);
	write_header(x->at, x->used, x->wall_ns, x->sequence[x->worker], x->worker);
	const struct log_message message = {.bytes = x->at,
					    .n_bytes = x->used,
					    .n_records = x->n_records,
					    .domain = ipfix_domain(x->worker),
					    .sequence = x->sequence[x->worker]};
	x->sequence[x->worker] += x->n_records;
	x->n_records = 0;
	x->emit(x->context, &message);
}

/* Room for a record of this template in the open message. */
static uint8_t *begin_record(struct ipfix *x, uint32_t worker, uint32_t template)
{
	uint32_t n_bytes = 0;

	for (size_t k = 0; k < templates[template].n; k++)
		n_bytes += templates[template].element[k].n_bytes;
	if (x->worker != worker || x->used + SET_HEADER_BYTES + n_bytes > x->message_bytes)
		ipfix_flush(x);
	if (x->n_records == 0) {
		x->used = HEADER_BYTES;
		x->set = 0;
		x->worker = worker;
	}
	if (x->set == 0 || x->template != template) {
		close_set(x);
		x->set = x->used;
		x->template = (uint16_t) template;
		put16(x->at + x->set, FIRST_TEMPLATE + template);
		x->used += SET_HEADER_BYTES;
	}
	uint8_t *at = x->at + x->used;
	x->used += n_bytes;
	x->n_records++;
	return at;
}

static uint8_t *begin(struct ipfix *x, uint32_t worker, uint32_t template, const struct nat_event *event,
		      const struct log_facts *facts, uint32_t nat_event)
{
	uint8_t *at = begin_record(x, worker, template);

	x->wall_ns = event->now_ns + facts->clock_offset_ns;
	return put8(put64(at, x->wall_ns / 1000000), nat_event);
}

static void add_translation(struct ipfix *x, uint32_t worker, const struct nat_event *e,
			    const struct log_facts *facts, uint32_t nat_event)
{
	const bool session = e->kind == NAT_EVENT_SESSION_CREATED || e->kind == NAT_EVENT_SESSION_ENDED;
	const bool destination = session && x->destinations;
	uint8_t *at = begin(x, worker, destination ? SESSION : PORT, e, facts, nat_event);

	at = put32(at, e->pool_id);
	at = put_be(at, &e->inside_be, 4);
	at = put_be(at, &e->outside_be, 4);
	at = put8(at, e->protocol);
	at = put_be(at, &e->inside_port_be, 2);
	at = put_be(at, &e->outside_port_be, 2);
	if (destination)
		put_be(put_be(at, &e->remote_be, 4), &e->remote_port_be, 2);
}

static void add_block(struct ipfix *x, uint32_t worker, const struct nat_event *e,
		      const struct log_facts *facts, uint32_t nat_event)
{
	uint8_t *at = begin(x, worker, BLOCK, e, facts, nat_event);

	at = put32(at, e->pool_id);
	at = put_be(at, &e->inside_be, 4);
	at = put_be(at, &e->outside_be, 4);
	put16(put16(at, e->port_first), e->port_last);
}

static bool add_user_full(struct ipfix *x, uint32_t worker, const struct nat_event *e,
			  const struct log_facts *facts)
{
	if (e->reason != NAT_REASON_HOST_SESSIONS && e->reason != NAT_REASON_HOST_PORTS)
		return false; /* RFC 8158 knows limits on how many, none on how fast */
	uint8_t *at = begin(x, worker, USER_FULL, e, facts, QUOTA_EXCEEDED);
	at = put32(put32(at, QUOTA_PER_USER), facts->limit);
	put_be(at, &e->inside_be, 4);
	return true;
}

bool ipfix_event(struct ipfix *x, uint32_t worker, const struct nat_event *e, const struct log_facts *facts)
{
	uint8_t *at;

	switch ((enum nat_event_kind)e->kind) {
	case NAT_EVENT_SESSION_CREATED:
		add_translation(x, worker, e, facts, SESSION_CREATE);
		return true;
	case NAT_EVENT_SESSION_ENDED:
		add_translation(x, worker, e, facts, SESSION_DELETE);
		return true;
	case NAT_EVENT_MAPPING_CREATED:
		add_translation(x, worker, e, facts, BIB_CREATE);
		return true;
	case NAT_EVENT_MAPPING_ENDED:
		add_translation(x, worker, e, facts, BIB_DELETE);
		return true;
	case NAT_EVENT_BLOCK_TAKEN:
		add_block(x, worker, e, facts, BLOCK_ALLOCATE);
		return true;
	case NAT_EVENT_BLOCK_FREED:
		add_block(x, worker, e, facts, BLOCK_FREE);
		return true;
	case NAT_EVENT_PORTS_EXHAUSTED:
		if (e->reason == NAT_REASON_POOL_EMPTY) {
			put32(begin(x, worker, ADDRESSES_OUT, e, facts, ADDRESSES_EXHAUSTED), e->pool_id);
			return true;
		}
		at = begin(x, worker, PORTS_OUT, e, facts, PORTS_EXHAUSTED);
		at = put_be(put32(at, e->pool_id), &e->outside_be, 4); /* 0.0.0.0: all of the pool */
		put8(at, e->protocol);
		return true;
	case NAT_EVENT_TABLE_FULL:
		at = begin(x, worker, TABLE_FULL, e, facts, QUOTA_EXCEEDED);
		put32(put32(at, QUOTA_SESSIONS), facts->limit);
		return true;
	case NAT_EVENT_HOST_LIMIT:
		return add_user_full(x, worker, e, facts);
	case NAT_EVENT_KINDS:
		break;
	}
	return false;
}
