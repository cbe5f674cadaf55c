/* The link between the two gateways of a pair.
 *
 *	HELLO, each a fifth of a second: who I am (epoch), and whom I hear. A gateway that hears an epoch for the first time
 *	answers; when the other one names our epoch in return, it lives now, and is a new peer: everything is told to it.
 *
 *	DATA        what has changed (core/replica.h). At most SYNC_WINDOW datagrams are on their way. One that is not
 *	            acknowledged in time is not sent again: its places are marked again, and told as they are by then.
 *	END         all that is ours has been told once. The peer takes over what it has of us and was not named.
 *	COMPARE     one range of places after the other is summed up, without those on their way. The peer answers with
 *	RESULT      whether its sum is the same. If not, and nothing of the range was told meanwhile, all of the range is told again.
 *
 * Every datagram acknowledges what has come. Numbers, times and memory are bounded whatever the peer
 * sends: places beyond the size that it has announced are left alone, and what is not sealed with the
 * pair's key is counted and forgotten.
 */
#include "sync.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "sync_internal.h"

#define TICK_NS       10000000u
#define HELLO_NS      200000000u
#define SILENCE_NS    1000000000u /* then the peer is not there */
#define WAIT_MIN_NS   60000000u
#define WAIT_MAX_NS   1000000000u
#define ROUND_NS      (10 * SYNC_SECOND_NS) /* in which all ranges are compared */
#define OVERTAKEN     24u                   /* so many later ones are there: it is lost */
#define RECORDS_MAX   (1u << 28)            /* of a peer's table: 2 GB of memory here */
#define SOCKET_BUFFER (8 << 20)

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * SYNC_SECOND_NS + (uint64_t)t.tv_nsec;
}

/* ---- sending ---- */

static void packet_begin(struct sync_packet *packet, enum sync_kind kind)
{
	packet->body_bytes = 0;
	packet->head = (struct sync_head){.kind = (uint8_t)kind};
}

static void send_packet(struct sync *s, struct sync_packet *packet)
{
	uint8_t sealed[SYNC_BYTES_MAX];
	const struct sockaddr_in to = {.sin_family = AF_INET,
				       .sin_addr.s_addr = s->settings.peer_be,
				       .sin_port = s->settings.peer_port_be};

	memcpy(packet->epoch, s->epoch, SYNC_EPOCH_BYTES);
	packet->number = ++s->number;
	memcpy(packet->head.echo, s->peer_epoch, SYNC_EPOCH_BYTES);
	packet->head.ack = s->taken;
	memcpy(packet->head.ack_bits, s->taken_bits, sizeof packet->head.ack_bits);
	packet->head.n_records = s->n_records;
	packet->head.offer = s->offer;
	packet->head.waiting = (uint32_t)(s->seen.waiting > UINT32_MAX ? UINT32_MAX : s->seen.waiting);
	const size_t bytes = sync_seal(packet, s->key, sealed);
	/* what the kernel does not take is lost like any other */
	(void)!sendto(s->socket_fd, sealed, bytes, MSG_DONTWAIT, (const struct sockaddr *)&to, sizeof to);
	s->seen.bytes_out += bytes;
	s->said_ns = clock_ns();
	s->ack_due = false;
}

static void send_hello(struct sync *s)
{
	struct sync_packet packet;

	packet_begin(&packet, SYNC_HELLO);
	send_packet(s, &packet);
	s->hello_ns = s->said_ns;
}

static struct sync_flight *free_flight(struct sync *s)
{
	for (uint32_t i = 0; i < SYNC_WINDOW; i++)
		if (s->flight[i].kind == SYNC_HELLO)
			return &s->flight[i];
	return NULL;
}

/* `flight` has the places. */
static void send_flight(struct sync *s, struct sync_packet *packet, struct sync_flight *flight)
{
	send_packet(s, packet);
	flight->number = packet->number;
	flight->sent_ns = s->said_ns;
	flight->kind = packet->head.kind;
	s->n_flight++;
	for (uint32_t i = 0; i < flight->n; i++)
		s->range[flight->slot[i] / NAT_REPLICA_RANGE].touched = packet->number;
}

static void tell(struct sync *s, const struct nat_replica *replica, uint32_t n)
{
	struct sync_packet packet;
	struct sync_flight *flight = NULL;

	for (uint32_t i = 0; i < n; i++) {
		if (flight && !sync_put(&packet, &replica[i])) {
			send_flight(s, &packet, flight);
			flight = NULL;
		}
		if (!flight) {
			flight = free_flight(s); /* there are enough: see tell_all() */
			flight->n = 0;
			packet_begin(&packet, SYNC_DATA);
			sync_put(&packet, &replica[i]);
		}
		flight->slot[flight->n++] = replica[i].slot;
	}
	if (flight)
		send_flight(s, &packet, flight);
	s->seen.told += n;
}

/* What the workers have to tell, as far as the window goes. */
static void tell_changes(struct sync *s)
{
	const uint32_t per_packet = SYNC_BODY_BYTES / SYNC_RECORD_BYTES;
	struct nat_replica replica[SYNC_EXPORT];
	bool all = true;

	s->seen.waiting = 0;
	for (uint32_t worker = 0; worker < s->ops->n_workers; worker++)
		for (;;) {
			const uint32_t room = (SYNC_WINDOW - s->n_flight) * per_packet;
			uint32_t n = room < SYNC_EXPORT ? room : SYNC_EXPORT;
			const uint32_t asked = n;
			if (n == 0) {
				all = false;
				break;
			}
			if (!sync_export(s, worker, replica, &n)) {
				all = false;
				break;
			}
			tell(s, replica, n);
			if (n < asked)
				break;
		}
	if (!all)
		for (uint32_t worker = 0; worker < s->ops->n_workers; worker++)
			s->seen.waiting += sync_waiting(s, worker);
	if (s->bulk == BULK_TELLING && all) {
		s->bulk = BULK_SETTLING;
		s->bulk_number = s->number;
	}
}

static void send_end(struct sync *s)
{
	struct sync_flight *flight = free_flight(s);
	struct sync_packet packet;

	if (!flight)
		return;
	packet_begin(&packet, SYNC_END);
	flight->n = 0;
	send_flight(s, &packet, flight);
	s->bulk = BULK_ENDING;
}

/* Is all that was told up to the end of the full transfer acknowledged? */
static bool is_settled(const struct sync *s)
{
	for (uint32_t i = 0; i < SYNC_WINDOW; i++)
		if (s->flight[i].kind != SYNC_HELLO && s->flight[i].number <= s->bulk_number)
			return false;
	return true;
}

/* ---- acknowledged, or lost ---- */

static void flight_done(struct sync *s, struct sync_flight *flight)
{
	if (flight->kind == SYNC_END)
		s->bulk = BULK_DONE;
	flight->kind = SYNC_HELLO;
	s->n_flight--;
}

static void flight_lost(struct sync *s, struct sync_flight *flight)
{
	if (flight->kind == SYNC_END)
		s->bulk = BULK_SETTLING;
	else if (!sync_again(s, flight->slot, flight->n))
		return; /* the worker is busy: at the next tick */
	else if (s->bulk == BULK_SETTLING || s->bulk == BULK_ENDING)
		s->bulk = BULK_TELLING;
	s->seen.again++;
	flight->kind = SYNC_HELLO;
	s->n_flight--;
}

static void take_acks(struct sync *s, const struct sync_head *head)
{
	for (uint32_t i = 0; i < SYNC_WINDOW; i++) {
		struct sync_flight *flight = &s->flight[i];
		if (flight->kind == SYNC_HELLO || flight->number > head->ack)
			continue;
		const uint64_t behind = head->ack - flight->number;
		if (behind < SYNC_ACK_BITS && (head->ack_bits[behind / 64] >> (behind % 64) & 1)) {
			/* a peer that is short of CPU answers late: what it has need not be told twice */
			s->answer_ns = (7 * s->answer_ns + (clock_ns() - flight->sent_ns)) / 8;
			s->wait_ns = 4 * s->answer_ns < WAIT_MIN_NS   ? WAIT_MIN_NS
				     : 4 * s->answer_ns > WAIT_MAX_NS ? WAIT_MAX_NS
								      : 4 * s->answer_ns;
			flight_done(s, flight);
		} else if (behind >= OVERTAKEN) {
			flight_lost(s, flight);
		}
	}
}

static void give_up_late(struct sync *s, uint64_t now_ns)
{
	bool late = false;

	for (uint32_t i = 0; i < SYNC_WINDOW; i++) {
		struct sync_flight *flight = &s->flight[i];
		if (flight->kind == SYNC_HELLO || now_ns - flight->sent_ns < s->wait_ns)
			continue;
		late = true;
		flight_lost(s, flight);
	}
	if (late && s->wait_ns < WAIT_MAX_NS)
		s->wait_ns *= 2;
}

/* ---- comparing ---- */

static void mark_range(struct sync *s, uint32_t range, bool differs)
{
	s->seen.differ += (uint32_t)differs - (uint32_t)s->range[range].differs;
	s->range[range].differs = differs;
}

static void repair(struct sync *s, uint32_t range)
{
	uint32_t slot[NAT_REPLICA_RANGE];

	for (uint32_t i = 0; i < NAT_REPLICA_RANGE; i++)
		slot[i] = range * NAT_REPLICA_RANGE + i;
	if (sync_again(s, slot, NAT_REPLICA_RANGE))
		s->seen.repaired++;
}

static void ask_range(struct sync *s, uint64_t now_ns)
{
	struct sync_packet packet;
	uint32_t i = 0;

	while (i < SYNC_RANGES_OPEN && s->open[i].number != 0 && now_ns - s->opened_ns[i] < SYNC_SECOND_NS)
		i++;
	if (i == SYNC_RANGES_OPEN)
		return;
	struct sync_compare *compare = &s->open[i];
	*compare = (struct sync_compare){.range = s->next_range};
	if (!sync_sum_ours(s, compare->range, &compare->sum))
		return;
	s->range[compare->range].looked_s = (uint32_t)(now_ns / SYNC_SECOND_NS);
	packet_begin(&packet, SYNC_COMPARE);
	compare->number = s->number + 1;
	sync_put_compare(&packet, compare);
	send_packet(s, &packet);
	s->opened_ns[i] = now_ns;
	if (++s->next_range < s->n_ranges)
		return;
	s->next_range = 0;
	s->round_ns = s->round_began_ns; /* all that changed before it has been compared */
	s->round_began_ns = now_ns;
	s->rounds++;
}

static void take_result(struct sync *s, const struct sync_compare *result)
{
	for (uint32_t i = 0; i < SYNC_RANGES_OPEN; i++) {
		if (s->open[i].number != result->number || s->open[i].range != result->range)
			continue;
		s->open[i].number = 0;
		s->seen.compared++;
		if (result->equal) {
			mark_range(s, result->range, false);
		} else if (s->range[result->range].touched < result->number) {
			mark_range(s, result->range, true);
			repair(s, result->range);
		}
		return;
	}
}

static void answer_compare(struct sync *s, struct sync_compare *asked)
{
	struct nat_replica_sum sum = asked->sum;
	struct sync_packet packet;

	if (!sync_sum_theirs(s, asked->range, &sum))
		return;
	asked->equal = sum.sum == asked->sum.sum && sum.n == asked->sum.n;
	packet_begin(&packet, SYNC_RESULT);
	sync_put_compare(&packet, asked);
	send_packet(s, &packet);
}

/* ---- a new peer ---- */

static bool is_connected(const struct sync *s, uint64_t now_ns)
{
	return s->has_peer && now_ns - s->heard_ns < SILENCE_NS;
}

static void meet(struct sync *s, const struct sync_packet *packet)
{
	if (packet->head.n_records > RECORDS_MAX || !sync_forget_peer(s, packet->head.n_records)) {
		fprintf(stderr, "dsnatd: sync: the peer's table is too large for this gateway (%u records)\n",
			packet->head.n_records);
		return;
	}
	if (s->has_peer)
		memcpy(s->past_epoch[s->n_past++ % SYNC_PAST], s->peer_epoch, SYNC_EPOCH_BYTES);
	memcpy(s->peer_epoch, packet->epoch, SYNC_EPOCH_BYTES);
	s->has_peer = true;
	s->heard_all = s->end_due = false;
	s->taken = 0;
	memset(s->taken_bits, 0, sizeof s->taken_bits);
	memset(s->flight, 0, sizeof s->flight);
	memset(s->open, 0, sizeof s->open);
	for (uint32_t range = 0; range < s->n_ranges; range++)
		s->range[range] = (struct sync_range){.looked_s = (uint32_t)(clock_ns() / SYNC_SECOND_NS)};
	s->seen.differ = 0;
	s->n_flight = s->n_items = s->n_batch = s->n_asked = 0;
	s->next_range = s->rounds = 0;
	s->round_began_ns = clock_ns();
	s->bulk = BULK_MARKING;
	s->bulk_cursor = s->bulk_worker = 0;
	s->wait_ns = WAIT_MIN_NS;
	sync_refuse_no_more(s);
	(void)sync_set_hold_back(s);
}

/* ---- receiving ---- */

static bool is_taken(const struct sync *s, uint64_t number)
{
	if (number > s->taken)
		return false;
	const uint64_t behind = s->taken - number;
	return behind >= SYNC_ACK_BITS || (s->taken_bits[behind / 64] >> (behind % 64) & 1);
}

static void set_taken(struct sync *s, uint64_t number)
{
	uint64_t *bits = s->taken_bits;

	for (; s->taken < number; s->taken++) {
		if (number - s->taken > SYNC_ACK_BITS) {
			memset(bits, 0, sizeof s->taken_bits);
			s->taken = number - SYNC_ACK_BITS;
		}
		for (unsigned i = SYNC_ACK_BITS / 64 - 1; i > 0; i--)
			bits[i] = bits[i] << 1 | bits[i - 1] >> 63;
		bits[0] <<= 1;
	}
	const uint64_t behind = s->taken - number;
	if (behind < SYNC_ACK_BITS)
		bits[behind / 64] |= UINT64_C(1) << (behind % 64);
}

static void take_entries(struct sync *s, const struct sync_packet *packet)
{
	size_t at = 0;
	struct nat_replica replica;

	while (s->n_items < SYNC_BATCH * SYNC_ENTRIES_MAX && sync_get(packet, &at, &replica)) {
		/* numbers are compared over half their range: a place that is quiet for longer takes any
		 * word */
		s->item[s->n_items++] = (struct sync_item){
			.replica = replica, .number = (uint32_t)packet->number | (packet->number == 0)};
		s->seen.heard++;
	}
}

/* An epoch never comes again: who says so has recorded it, and would have us forget the peer that lives. */
static bool is_past(const struct sync *s, const uint8_t epoch[SYNC_EPOCH_BYTES])
{
	for (uint32_t i = 0; i < s->n_past && i < SYNC_PAST; i++)
		if (memcmp(s->past_epoch[i], epoch, SYNC_EPOCH_BYTES) == 0)
			return true;
	return false;
}

static void take_packet(struct sync *s, const uint8_t *bytes, size_t n_bytes)
{
	struct sync_packet packet;

	if (!sync_open_sealed(&packet, s->key, bytes, n_bytes)) {
		sync_refuse(s, bytes, n_bytes, is_connected(s, clock_ns()));
		return;
	}
	if (memcmp(packet.epoch, s->epoch, SYNC_EPOCH_BYTES) == 0 || is_past(s, packet.epoch)) {
		s->seen.dropped++;
		return;
	}
	if (memcmp(packet.head.echo, s->epoch, SYNC_EPOCH_BYTES) != 0) {
		/* It does not know us yet, or this was recorded before we began: it gets our epoch, which
		 * only one that lives can send back. */
		uint8_t known[SYNC_EPOCH_BYTES];
		if (clock_ns() - s->hello_ns < 50000000u)
			return;
		memcpy(known, s->peer_epoch, SYNC_EPOCH_BYTES);
		memcpy(s->peer_epoch, packet.epoch, SYNC_EPOCH_BYTES);
		send_hello(s);
		memcpy(s->peer_epoch, known, SYNC_EPOCH_BYTES);
		return;
	}
	if (!s->has_peer || memcmp(packet.epoch, s->peer_epoch, SYNC_EPOCH_BYTES) != 0)
		meet(s, &packet);
	if (!s->has_peer || is_taken(s, packet.number))
		return;
	s->heard_ns = clock_ns();
	s->peer_waiting = packet.head.waiting;
	s->seen.peer = packet.head.offer;
	take_acks(s, &packet.head);
	s->batch[s->n_batch++] = packet.number;
	struct sync_compare compare;
	switch ((enum sync_kind)packet.head.kind) {
	case SYNC_DATA:
		take_entries(s, &packet);
		s->ack_due = true;
		break;
	case SYNC_END:
		s->end_due = s->ack_due = true;
		break;
	case SYNC_COMPARE:
		if (sync_get_compare(&packet, &compare))
			s->asked[s->n_asked++] = compare;
		break;
	case SYNC_RESULT:
		if (sync_get_compare(&packet, &compare))
			take_result(s, &compare);
		break;
	case SYNC_HELLO:
	case SYNC_KINDS:
		break;
	}
}

/* What a batch of datagrams said is done; then, and only then, it is acknowledged. */
static void finish_batch(struct sync *s)
{
	bool done = sync_import(s);

	if (done && s->end_due) {
		done = sync_take_orphans(s);
		s->heard_all |= done;
		s->end_due = !done;
	}
	for (uint32_t i = 0; i < s->n_batch && done; i++)
		set_taken(s, s->batch[i]);
	s->n_batch = 0;
	for (uint32_t i = 0; i < s->n_asked && done; i++)
		answer_compare(s, &s->asked[i]);
	s->n_asked = 0;
}

static void receive(struct sync *s)
{
	uint8_t bytes[2048];
	uint32_t n = 0;

	while (n < SYNC_BATCH) {
		struct sockaddr_in from;
		socklen_t from_bytes = sizeof from;
		const ssize_t got = recvfrom(s->socket_fd, bytes, sizeof bytes, MSG_DONTWAIT,
					     (struct sockaddr *)&from, &from_bytes);
		if (got < 0)
			break;
		n++;
		s->seen.bytes_in += (uint64_t)got;
		if (from.sin_addr.s_addr == s->settings.peer_be)
			take_packet(s, bytes, (size_t)got);
		else
			s->seen.dropped++;
	}
	if (n == 0)
		return;
	finish_batch(s);
	if (s->n_flight < SYNC_WINDOW / 2 && s->seen.waiting > 0 && s->bulk != BULK_MARKING)
		tell_changes(s); /* room was made: go on at once */
	if (s->ack_due)
		send_hello(s);
}

/* ---- time ---- */

static void tick(struct sync *s)
{
	const uint64_t now_ns = clock_ns();
	uint64_t ignored;

	(void)!read(s->timer_fd, &ignored, sizeof ignored);
	if (now_ns - s->said_ns >= HELLO_NS)
		send_hello(s);
	if (!is_connected(s, now_ns)) {
		s->seen.waiting = 0;
		for (uint32_t worker = 0; worker < s->ops->n_workers && now_ns - s->range_due_ns > HELLO_NS;
		     worker++)
			s->seen.waiting += sync_waiting(s, worker);
		s->range_due_ns = now_ns;
		return;
	}
	give_up_late(s, now_ns);
	for (unsigned i = 0; i < 16 && s->bulk == BULK_MARKING; i++)
		if (!sync_mark_all(s))
			return;
	if (s->bulk == BULK_MARKING)
		return;
	tell_changes(s);
	if (s->bulk == BULK_SETTLING && is_settled(s))
		send_end(s);
	if (s->bulk != BULK_DONE)
		return;
	const uint64_t every_ns =
		ROUND_NS / s->n_ranges > TICK_NS * 10 ? TICK_NS * 10 : ROUND_NS / s->n_ranges;
	if (now_ns - s->range_due_ns > SYNC_SECOND_NS)
		s->range_due_ns = now_ns;
	for (unsigned i = 0; i < SYNC_RANGES_OPEN && s->range_due_ns <= now_ns;
	     i++, s->range_due_ns += every_ns)
		ask_range(s, now_ns);
}

void sync_serve(struct sync *s)
{
	struct epoll_event event[2];
	const int n = epoll_wait(s->epoll_fd, event, 2, 0);

	for (int i = 0; i < n; i++)
		if (event[i].data.fd == s->timer_fd)
			tick(s);
		else
			receive(s);
}

int sync_fd(const struct sync *s)
{
	return s->epoll_fd;
}

/* ---- looking ---- */

void sync_offer(struct sync *s, const struct offer *offer)
{
	s->offer = *offer;
}

void sync_look(const struct sync *s, struct sync_view *view)
{
	const uint64_t now_ns = clock_ns();
	uint64_t oldest_ns = now_ns;

	*view = s->seen;
	view->connected = is_connected(s, now_ns);
	view->told_all = s->bulk == BULK_DONE;
	view->heard_all = s->heard_all;
	view->heard_ms = s->has_peer ? (now_ns - s->heard_ns) / 1000000 : UINT64_MAX;
	view->on_the_way = 0;
	for (uint32_t i = 0; i < SYNC_WINDOW; i++) {
		if (s->flight[i].kind == SYNC_HELLO)
			continue;
		view->on_the_way += s->flight[i].n;
		oldest_ns = s->flight[i].sent_ns < oldest_ns ? s->flight[i].sent_ns : oldest_ns;
	}
	view->lag_ms = (now_ns - oldest_ns) / 1000000;
	view->ranges = s->n_ranges;
	view->peer_waiting = s->peer_waiting;
	view->round_ms = s->rounds > 0 ? (now_ns - s->round_ns) / 1000000 : UINT64_MAX;
	for (uint32_t range = 0, n = 0; range < s->n_ranges && n < SYNC_DIFFERS_MAX; range++)
		if (s->range[range].differs)
			view->differs[n++] = range;
	view->in_sync = view->connected && view->told_all && view->heard_all && view->differ == 0;
}

/* ---- opening ---- */

static bool open_socket(struct sync *s, char *why, size_t why_bytes)
{
	const struct sockaddr_in here = {.sin_family = AF_INET,
					 .sin_addr.s_addr = s->settings.listen_be,
					 .sin_port = s->settings.listen_port_be};
	const int size = SOCKET_BUFFER, on = 1;
	char text[INET_ADDRSTRLEN];

	s->socket_fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (s->socket_fd >= 0) {
		/* the address may come up later than we do */
		(void)setsockopt(s->socket_fd, IPPROTO_IP, IP_FREEBIND, &on, sizeof on);
		if (setsockopt(s->socket_fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size))
			(void)setsockopt(s->socket_fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
		if (setsockopt(s->socket_fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size))
			(void)setsockopt(s->socket_fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
	}
	if (s->socket_fd >= 0 && !bind(s->socket_fd, (const struct sockaddr *)&here, sizeof here))
		return true;
	inet_ntop(AF_INET, &here.sin_addr, text, sizeof text);
	snprintf(why, why_bytes, "sync: cannot listen on %s:%u (%s); choose another sync.listen", text,
		 ntohs(here.sin_port), strerror(errno));
	return false;
}

static bool watch(const struct sync *s, int fd)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

	return epoll_ctl(s->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

struct sync *sync_open(const struct sync_settings *settings, const struct request_ops *ops,
		       uint64_t max_sessions, char *why, size_t why_bytes)
{
	const struct itimerspec every = {.it_interval.tv_nsec = TICK_NS, .it_value.tv_nsec = TICK_NS};
	struct sync *s = calloc(1, sizeof *s);

	snprintf(why, why_bytes, "sync: no memory, or no descriptors");
	if (!s)
		return NULL;
	s->settings = *settings;
	s->ops = ops;
	s->n_ranges = (uint32_t)((max_sessions + NAT_REPLICA_RANGE - 1) / NAT_REPLICA_RANGE);
	s->n_records = s->n_ranges * NAT_REPLICA_RANGE;
	s->wait_ns = WAIT_MIN_NS;
	s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	s->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	s->socket_fd = -1;
	s->range = calloc(s->n_ranges, sizeof *s->range);
	s->origin = malloc(s->n_records * sizeof *s->origin);
	s->item = malloc(SYNC_BATCH * SYNC_ENTRIES_MAX * sizeof *s->item);
	if (s->range && s->origin && s->item && s->epoll_fd >= 0 && s->timer_fd >= 0 && sync_wire_start() &&
	    getrandom(s->epoch, sizeof s->epoch, 0) == (ssize_t)sizeof s->epoch &&
	    sync_read_key(settings->key, s->key, why, why_bytes) && open_socket(s, why, why_bytes) &&
	    watch(s, s->socket_fd) && watch(s, s->timer_fd) && !timerfd_settime(s->timer_fd, 0, &every, NULL))
		return s;
	sync_close(s);
	return NULL;
}

void sync_close(struct sync *s)
{
	if (!s)
		return;
	if (s->socket_fd >= 0)
		close(s->socket_fd);
	if (s->timer_fd >= 0)
		close(s->timer_fd);
	if (s->epoll_fd >= 0)
		close(s->epoll_fd);
	free(s->range);
	free(s->origin);
	free(s->shadow);
	free(s->item);
	explicit_bzero(s, sizeof *s);
	free(s);
}
