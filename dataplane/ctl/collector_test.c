/* Every record is sent, lost or waiting, whatever a collector does: away, back, slow, gone in mid-stream.
 * Sockets on 127.0.0.1; the clock is the test's. */
#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "collector.h"

#define MS UINT64_C(1000000)

struct side { /* the collector's */
	int listener, fd;
	uint16_t port;
	uint64_t records, hellos;
	uint8_t part[65536]; /* TCP: a message that is not whole yet */
	size_t used;
};

struct bed {
	struct collector *c;
	struct side side;
	enum config_log_transport transport;
	uint32_t sequence;
	uint64_t offered, now_ns;
};

/* A message: length, "hello" or number of records, sequence number. */
enum { MESSAGE_BYTES = 100 };

static void fill(uint8_t *at, uint32_t n_records, uint32_t sequence)
{
	memset(at, 0, MESSAGE_BYTES);
	memcpy(at, &n_records, 4);
	/* where an IPFIX header has them */
	for (int i = 0; i < 4; i++)
		at[8 + i] = (uint8_t)(sequence >> (24 - 8 * i));
	at[15] = 1;
}

static uint32_t hello(void *context, uint32_t worker, uint32_t sequence, uint8_t out[IPFIX_TEMPLATES_MAX])
{
	(void)context;
	(void)worker;
	(void)sequence;
	fill(out, 0, 0);
	out[17] = 2; /* a set of templates */
	return MESSAGE_BYTES;
}

static void listen_again(struct side *s, enum config_log_transport transport)
{
	struct sockaddr_in at = {
		.sin_family = AF_INET, .sin_port = htons(s->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(at);
	const int on = 1, size = 1 << 18;

	s->fd = -1;
	s->used = 0;
	s->listener = socket(AF_INET, transport == CONFIG_LOG_TCP ? SOCK_STREAM : SOCK_DGRAM, 0);
	assert(s->listener >= 0);
	setsockopt(s->listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	setsockopt(s->listener, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	assert(!bind(s->listener, (struct sockaddr *)&at, sizeof(at)));
	assert(!getsockname(s->listener, (struct sockaddr *)&at, &length));
	s->port = ntohs(at.sin_port);
	if (transport == CONFIG_LOG_TCP)
		assert(!listen(s->listener, 1));
	else
		s->fd = s->listener;
}

static void leave(struct side *s)
{
	if (s->fd >= 0 && s->fd != s->listener)
		close(s->fd);
	close(s->listener);
	s->fd = s->listener = -1;
}

static void take(struct side *s, const uint8_t *message)
{
	uint32_t n_records;

	memcpy(&n_records, message, 4);
	s->records += n_records;
	s->hellos += n_records == 0;
}

/* Reads what is there. */
static void serve(struct side *s, enum config_log_transport transport)
{
	if (s->fd < 0 && s->listener >= 0 && transport == CONFIG_LOG_TCP) {
		struct pollfd ready = {.fd = s->listener, .events = POLLIN};

		if (poll(&ready, 1, 1) == 1)
			s->fd = accept(s->listener, NULL, NULL);
	}
	while (s->fd >= 0) {
		const ssize_t got = recv(s->fd, s->part + s->used, sizeof(s->part) - s->used, MSG_DONTWAIT);

		if (got <= 0)
			return;
		s->used += (size_t)got;
		while (s->used >= MESSAGE_BYTES) {
			take(s, s->part);
			s->used -= MESSAGE_BYTES;
			memmove(s->part, s->part + MESSAGE_BYTES, s->used);
		}
	}
}

static void open_bed(struct bed *b, enum config_log_transport transport, bool with_hello,
		     uint32_t queue_bytes)
{
	memset(b, 0, sizeof(*b));
	b->transport = transport;
	listen_again(&b->side, transport);
	b->c = collector_open(&(struct collector_params){.transport = transport,
							 .address = INADDR_LOOPBACK,
							 .port = b->side.port,
							 .queue_bytes = queue_bytes,
							 .n_workers = 1,
							 .hello = with_hello ? hello : NULL});
	assert(b->c);
	b->now_ns = MS;
}

static void offer(struct bed *b, uint32_t messages, uint32_t records)
{
	uint8_t bytes[MESSAGE_BYTES];

	for (uint32_t i = 0; i < messages; i++) {
		fill(bytes, records, b->sequence);
		collector_put(b->c, &(struct log_message){.bytes = bytes,
							  .n_bytes = sizeof(bytes),
							  .n_records = records,
							  .domain = 1,
							  .sequence = b->sequence});
		b->sequence += records;
		b->offered += records;
	}
}

static struct collector_view view(const struct bed *b)
{
	struct collector_view v;

	collector_view(b->c, &v);
	assert(v.records_sent + v.records_lost + v.records_queued == b->offered);
	return v;
}

static void turn(struct bed *b, uint32_t rounds, bool reads)
{
	for (uint32_t i = 0; i < rounds; i++) {
		b->now_ns += 100 * MS;
		collector_run(b->c, b->now_ns);
		if (reads)
			serve(&b->side, b->transport);
		(void)view(b);
	}
}

static void close_bed(struct bed *b)
{
	leave(&b->side);
	collector_close(b->c);
}

static void test_all_arrives(enum config_log_transport transport)
{
	struct bed b;

	open_bed(&b, transport, true, 1 << 20);
	for (int i = 0; i < 50; i++) {
		offer(&b, 97, 7);
		turn(&b, 3, true);
	}
	turn(&b, 20, true);
	assert(b.side.records == b.offered && view(&b).records_sent == b.offered);
	assert(view(&b).records_lost == 0 && view(&b).records_refused == 0 && collector_is_idle(b.c));
	close_bed(&b);
}

/* What arrives and what is counted as lost are together what was offered, exactly. */
static void test_a_restart(enum config_log_transport transport, bool with_hello)
{
	struct bed b;
	const uint32_t records = with_hello ? 7 : 1;

	open_bed(&b, transport, with_hello, 1 << 20);
	offer(&b, 100, records);
	turn(&b, 20, true);
	assert(b.side.records == b.offered && view(&b).up);
	leave(&b.side);
	for (int i = 0; i < 40; i++) {
		offer(&b, 5, records); /* fewer than a receive buffer holds */
		turn(&b, 1, false);
	}
	assert(!view(&b).up && view(&b).why[0]);
	listen_again(&b.side, transport);
	turn(&b, 50, true);
	offer(&b, 100, records);
	turn(&b, 20, true);
	const struct collector_view v = view(&b);
	assert(v.up && v.records_queued == 0 && v.records_lost == 0);
	assert(b.side.records + v.records_refused == b.offered);
	if (transport == CONFIG_LOG_TCP)
		assert(v.records_refused == 0 && v.connections == 2 && b.side.hellos == 2 * with_hello);
	else /* one system call's messages at most */
		assert(v.records_refused > 0 && v.records_refused <= 64 * records);
	close_bed(&b);
}

static void test_a_full_queue_loses_the_newest_and_counts_them(enum config_log_transport transport)
{
	struct bed b;

	open_bed(&b, transport, true, 64 << 10);
	leave(&b.side);
	turn(&b, 2, false);
	for (int i = 0; i < 300; i++) {
		offer(&b, 11, 3);
		turn(&b, 1, false);
	}
	assert(view(&b).records_lost > 0 && view(&b).bytes_queued_max <= 64 << 10);
	listen_again(&b.side, transport);
	turn(&b, 50, true);
	const struct collector_view v = view(&b);
	assert(v.records_queued == 0);
	assert(b.side.records + v.records_lost + v.records_refused == b.offered);
	close_bed(&b);
}

/* A collector that does not read stalls its own queue; nobody waits. */
static void test_back_pressure(void)
{
	struct bed b;

	open_bed(&b, CONFIG_LOG_TCP, true, COLLECTOR_QUEUE_BYTES);
	turn(&b, 5, true);
	for (int i = 0; i < 5000; i++) {
		offer(&b, 50, 3);
		turn(&b, 1, false);
	}
	assert(view(&b).stalls > 0 && view(&b).records_lost > 0 && view(&b).up);
	for (int i = 0; i < 20000 && !collector_is_idle(b.c); i++)
		turn(&b, 1, true);
	turn(&b, 20, true);
	assert(b.side.records + view(&b).records_lost == b.offered);
	close_bed(&b);
}

int main(void)
{
	test_all_arrives(CONFIG_LOG_UDP);
	test_all_arrives(CONFIG_LOG_TCP);
	test_a_restart(CONFIG_LOG_UDP, true);
	test_a_restart(CONFIG_LOG_UDP, false);
	test_a_restart(CONFIG_LOG_TCP, true);
	test_a_restart(CONFIG_LOG_TCP, false);
	test_a_full_queue_loses_the_newest_and_counts_them(CONFIG_LOG_UDP);
	test_a_full_queue_loses_the_newest_and_counts_them(CONFIG_LOG_TCP);
	test_back_pressure();
	return 0;
}
