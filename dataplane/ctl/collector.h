/* One collector: a bounded queue of messages and the socket behind it. Used by one thread; never blocks. */
#ifndef COLLECTOR_H
#define COLLECTOR_H

#include "config.h"
#include "ipfix.h"

#define COLLECTOR_QUEUE_BYTES (8u << 20)

struct collector;

struct collector_params {
	enum config_log_transport transport;
	uint32_t address; /* host order */
	uint16_t port;
	uint32_t queue_bytes;
	uint32_t n_workers;
	/* What a collector must have before data (IPFIX: the templates of a worker), with the number of data
	 * records that went before; NULL: nothing. Gives its length. */
	uint32_t (*hello)(void *context, uint32_t worker, uint32_t sequence,
			  uint8_t out[IPFIX_TEMPLATES_MAX]);
	void *context;
};

/* records offered = sent + lost + queued. */
struct collector_view {
	bool up;
	char why[64];             /* the last error, "" when there was none */
	uint64_t records_sent;    /* over TCP: that the other side has acknowledged */
	uint64_t records_lost;    /* the queue was full */
	uint64_t records_refused; /* of those sent, over UDP: the collector's host said that nobody listens */
	uint64_t messages_sent, bytes_sent;
	uint64_t records_queued, bytes_queued, bytes_queued_max;
	uint64_t stalls; /* times that the network took less than there was */
	uint64_t connections;
};

struct collector *collector_open(const struct collector_params *params);
void collector_close(struct collector *c);

/* Queued, or lost when the queue is full. */
void collector_put(struct collector *c, const struct log_message *message);

/* Sends what the network takes, follows errors, connects again. To be called some times a second at least. */
void collector_run(struct collector *c, uint64_t now_ns);

/* Everything queued has gone out (over TCP: and was acknowledged). */
bool collector_is_idle(const struct collector *c);

void collector_view(const struct collector *c, struct collector_view *view);

#endif
