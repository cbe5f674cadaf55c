/* Events as syslog lines (RFC 5424), one each. No socket: lines go to a function. */
#ifndef DSNAT_SYSLOG_H
#define DSNAT_SYSLOG_H

#include "ipfix.h"

#define SYSLOG_LINE_MAX 1024u

struct syslog {
	void (*emit)(void *context, const struct log_message *message);
	void *context;
	bool octet_count; /* "LENGTH " before each line: RFC 6587 3.4.1, for TCP */
	bool destinations;
	char host[64];     /* HOSTNAME, "-": none */
	uint32_t sequence; /* of the last line, 1 to 2147483647 (RFC 5424 7.3.1) */
	uint64_t second;   /* that `time` was written for */
	char time[24];
};

void syslog_event(struct syslog *s, uint32_t worker, const struct nat_event *event,
		  const struct log_facts *facts);

#endif
