/* Events as IPFIX messages (RFC 7011) with the NAT events of RFC 8158. No socket: messages go to a function. */
#ifndef IPFIX_H
#define IPFIX_H

#include "../core/nat.h"

#define IPFIX_MESSAGE_MAX   8192u
#define IPFIX_DATAGRAM_MAX  1400u /* RFC 7011 10.3.3: no datagram is to be fragmented on the way */
#define IPFIX_TEMPLATES_MAX 320u  /* of one domain, header included */

/* One message, or one line of syslog: what a collector takes or loses as a whole. */
struct log_message {
	const uint8_t *bytes;
	uint32_t n_bytes, n_records;
	uint32_t domain, sequence; /* IPFIX: of its header */
};

/* What the exporter knows beyond the event. */
struct log_facts {
	uint64_t clock_offset_ns; /* wall clock minus the event's clock */
	const char *pool;         /* its name, NULL: none */
	uint32_t limit;           /* the one that was run into */
};

struct ipfix {
	void (*emit)(void *context, const struct log_message *message);
	void *context;
	uint32_t message_bytes;
	bool destinations;
	uint32_t sequence[NAT_WORKERS_MAX]; /* data records so far, by worker */
	/* the open message */
	uint8_t at[IPFIX_MESSAGE_MAX];
	uint32_t used, set, n_records, worker;
	uint16_t template;
	uint64_t wall_ns;
};

/* The observation domain is the worker's number + 1: 0 means the whole exporter (RFC 7011 3.1). */
uint32_t ipfix_domain(uint32_t worker);

/* A message with all templates of a worker; gives its length. `sequence`: data records before it. */
uint32_t ipfix_templates(uint32_t worker, uint32_t sequence, uint64_t wall_ns,
			 uint8_t out[IPFIX_TEMPLATES_MAX]);

/* Adds the event to the open message; a full one, or one of another worker, is emitted first. Events that RFC
 * 8158 has no number for are left out: false. */
bool ipfix_event(struct ipfix *x, uint32_t worker, const struct nat_event *event,
		 const struct log_facts *facts);

/* Emits the open message, if there is one. */
void ipfix_flush(struct ipfix *x);

#endif
