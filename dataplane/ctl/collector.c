/* A collector that is slow or away must cost memory that is bounded, and records that are counted.
 *
 * Messages wait in a ring of bytes. What does not fit is lost, whole messages, counted in records: the
 * newest, so that what waits stays in order.
 *
 *	head ............ next ............ tail
 *	  sent, not        to be sent
 *	  acknowledged
 *
 * TCP. A message is kept until the kernel says that the other side has acknowledged it (SIOCOUTQ); a new
 * connection begins with the templates and goes on with the first message that was not. So a broken
 * connection loses nothing here, and may send a few messages twice (their sequence numbers say so). What
 * the collector had taken from the network and not read when it died only its own gap in the sequence
 * numbers tells.
 *
 * UDP. A message is sent once. Where the collector's host answers that nobody listens there (ICMP port
 * unreachable), the error queue gives that message's first bytes back, and its records are counted as
 * refused. From then on nothing but a probe a second goes out, templates or a copy of the first line that
 * waits; when no error comes back for PROBE_PATIENCE_NS the queue goes on. So a collector that is
 * restarted misses next to nothing, also over UDP.
 */
#include "collector.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define AT_ONCE           64u /* messages in one system call */
#define ROUNDS            64u /* system calls in one run */
#define RETRY_NS          UINT64_C(1000000000)
#define PROBE_PATIENCE_NS UINT64_C(200000000)
#define CONNECT_NS        UINT64_C(5000000000)
#define SILENT_MS         30000 /* TCP: without an acknowledgement for so long the other side is gone */
#define HISTORY           1024u
/* Over UDP nothing says that the collector is too slow: what has waited must not come down on it at once.
 * A burst fits into the receive buffer that Linux gives a socket by default. */
#define UDP_BURST_BYTES  98304u
#define UDP_BYTES_PER_MS 16384u /* 600,000 IPFIX records a second, 80,000 lines of syslog */
#define QUOTED_BYTES     18u    /* of a message: its IPFIX header, and the number of its first set */
#define TEMPLATE_SET     2u

enum state { DOWN, TRYING, UP }; /* TRYING: a connection is on its way, or a probe is out */

struct entry { /* in front of each message in the ring */
	uint32_t n_bytes, n_records, domain, sequence;
};

struct sent { /* over UDP, so that a refusal can be counted in records */
	uint32_t domain, sequence, n_records;
};

struct collector {
	struct collector_params params;
	enum state state;
	int fd; /* -1: none */
	uint64_t retry_ns, tried_ns;
	uint8_t *ring;
	uint64_t head, next, tail; /* positions; the place in the ring is the remainder */
	uint32_t next_done;        /* TCP: bytes of the message at `next` that are out */
	uint64_t out_bytes;        /* TCP: in this connection, templates included */
	uint64_t released_bytes;   /* of those, of messages that are gone from the ring, and the templates */
	uint8_t *hello;
	uint32_t hello_bytes, hello_done;
	struct sent *history;
	uint32_t n_history;
	uint64_t credit_bytes, credited_ns; /* UDP */
	uint32_t copies_out;                /* probes that were copies of a line, and did not come back */
	struct collector_view view;
};

/* ---- the ring ---- */

static struct entry *entry_at(const struct collector *c, uint64_t position)
{
	return (struct entry *)(void *)(c->ring + position % c->params.queue_bytes);
}

static uint64_t entry_bytes(const struct entry *e)
{
	return sizeof(*e) + ((e->n_bytes + 15u) & ~15u);
}

/* An entry without records and bytes fills the end of the ring where the next message does not fit. */
static uint64_t skip(const struct collector *c, uint64_t position)
{
	const uint64_t left = c->params.queue_bytes - position % c->params.queue_bytes;

	if (position != c->tail && entry_at(c, position)->n_bytes == 0)
		return position + left;
	return position;
}

static uint64_t behind(const struct collector *c, uint64_t position)
{
	return skip(c, position + entry_bytes(entry_at(c, position)));
}

void collector_put(struct collector *c, const struct log_message *m)
{
	const struct entry entry = {m->n_bytes, m->n_records, m->domain, m->sequence};
	const uint64_t size = entry_bytes(&entry),
		       left = c->params.queue_bytes - c->tail % c->params.queue_bytes;
	const uint64_t needed = size + (left < size ? left : 0);

	if (c->tail + needed - c->head > c->params.queue_bytes) {
		c->view.records_lost += m->n_records;
		return;
	}
	if (left < size) {
		const bool nothing_waits = c->next == c->tail, empty = c->head == c->tail;

		*entry_at(c, c->tail) = (struct entry){0};
		c->tail += left;
		c->next = nothing_waits ? c->tail : c->next;
		c->head = empty ? c->tail : c->head;
	}
	*entry_at(c, c->tail) = entry;
	memcpy(entry_at(c, c->tail) + 1, m->bytes, m->n_bytes);
	c->tail += size;
	c->view.records_queued += m->n_records;
	if (c->tail - c->head > c->view.bytes_queued_max)
		c->view.bytes_queued_max = c->tail - c->head;
}

/* The first message is out for good. */
static void release(struct collector *c)
{
	const struct entry *e = entry_at(c, c->head);

	c->view.records_queued -= e->n_records;
	c->view.records_sent += e->n_records;
	c->view.messages_sent++;
	c->view.bytes_sent += e->n_bytes;
	c->head = behind(c, c->head);
}

/* ---- what goes before data ---- */

static uint32_t sequence_of(const struct collector *c, uint32_t worker)
{
	for (uint64_t at = c->next; at != c->tail; at = behind(c, at))
		if (entry_at(c, at)->domain == ipfix_domain(worker))
			return entry_at(c, at)->sequence;
	return UINT32_MAX; /* nothing waits: the encoder knows */
}

static uint32_t hello_of(const struct collector *c, uint32_t worker, uint8_t *out)
{
	return c->params.hello(c->params.context, worker, sequence_of(c, worker), out);
}

/* ---- sockets ---- */

static void note_error(struct collector *c, int error)
{
	strncpy(c->view.why, strerror(error), sizeof(c->view.why) - 1);
}

static void go_down(struct collector *c, uint64_t now_ns, int error)
{
	if (error)
		note_error(c, error);
	c->state = DOWN;
	c->retry_ns = now_ns + RETRY_NS;
	if (c->params.transport == CONFIG_LOG_UDP && c->fd >= 0)
		return; /* the same socket will do */
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
	c->next = c->head; /* once more from the first that was not acknowledged */
	c->next_done = 0;
}

static int new_socket(const struct collector *c)
{
	const bool tcp = c->params.transport == CONFIG_LOG_TCP;
	const int fd = socket(AF_INET, (tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	const int on = 1, size = 4 << 20, silent_ms = SILENT_MS;

	if (fd < 0)
		return -1;
	if (tcp) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &silent_ms, sizeof(silent_ms));
	} else {
		/* refused messages come back into the receive buffer */
		setsockopt(fd, IPPROTO_IP, IP_RECVERR, &on, sizeof(on));
		if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
			setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
		if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)))
			setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	}
	return fd;
}

static void say_hello_tcp(struct collector *c)
{
	c->hello_bytes = c->hello_done = 0;
	for (uint32_t worker = 0; c->params.hello && worker < c->params.n_workers; worker++)
		c->hello_bytes += hello_of(c, worker, c->hello + c->hello_bytes);
	c->out_bytes = 0;
	c->released_bytes = c->hello_bytes;
}

static void come_up(struct collector *c)
{
	c->state = UP;
	c->view.connections++;
	c->view.why[0] = 0;
	if (c->params.transport == CONFIG_LOG_TCP)
		say_hello_tcp(c);
}

static void start(struct collector *c, uint64_t now_ns)
{
	const struct sockaddr_in to = {.sin_family = AF_INET,
				       .sin_port = htons(c->params.port),
				       .sin_addr.s_addr = htonl(c->params.address)};

	if (c->fd < 0)
		c->fd = new_socket(c);
	if (c->fd < 0) {
		go_down(c, now_ns, errno);
		return;
	}
	c->tried_ns = now_ns;
	if (!connect(c->fd, (const struct sockaddr *)&to, sizeof(to)))
		come_up(c);
	else if (errno == EINPROGRESS)
		c->state = TRYING;
	else
		go_down(c, now_ns, errno);
}

/* ---- TCP ---- */

static void follow_connect(struct collector *c, uint64_t now_ns)
{
	struct sockaddr_in peer;
	socklen_t length = sizeof(peer);
	int error = 0;

	if (!getpeername(c->fd, (struct sockaddr *)&peer, &length)) {
		come_up(c);
		return;
	}
	length = sizeof(error);
	getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
	if (error || now_ns - c->tried_ns > CONNECT_NS)
		go_down(c, now_ns, error ? error : ETIMEDOUT);
}

static bool failed(struct collector *c, uint64_t now_ns, ssize_t got)
{
	if (got >= 0 || errno == EAGAIN || errno == EINTR)
		return false;
	go_down(c, now_ns, errno);
	return true;
}

static void release_acknowledged(struct collector *c)
{
	int waiting = 0;

	if (ioctl(c->fd, SIOCOUTQ, &waiting))
		return;
	const uint64_t acknowledged = c->out_bytes - (uint64_t)waiting;
	while (c->head != c->next && c->released_bytes + entry_at(c, c->head)->n_bytes <= acknowledged) {
		c->released_bytes += entry_at(c, c->head)->n_bytes;
		release(c);
	}
}

/* `n` bytes more are out. */
static void advance(struct collector *c, size_t n)
{
	c->out_bytes += n;
	while (n > 0) {
		const uint32_t left = entry_at(c, c->next)->n_bytes - c->next_done;

		if (n < left) {
			c->next_done += (uint32_t)n;
			return;
		}
		n -= left;
		c->next_done = 0;
		c->next = behind(c, c->next);
	}
}

static uint32_t gather(const struct collector *c, struct iovec iov[AT_ONCE], size_t most_bytes,
		       size_t *n_bytes)
{
	uint32_t n = 0, done = c->next_done;

	*n_bytes = 0;
	for (uint64_t at = c->next; at != c->tail && n < AT_ONCE && *n_bytes < most_bytes;
	     at = behind(c, at), done = 0, n++) {
		struct entry *e = entry_at(c, at);

		iov[n] = (struct iovec){(uint8_t *)(e + 1) + done, e->n_bytes - done};
		*n_bytes += iov[n].iov_len;
	}
	return n;
}

static void run_tcp(struct collector *c, uint64_t now_ns)
{
	uint8_t ignored[512];
	ssize_t got = recv(c->fd, ignored, sizeof(ignored), 0);

	if (got == 0) {
		go_down(c, now_ns, ECONNRESET); /* a collector that closes has gone */
		return;
	}
	if (failed(c, now_ns, got))
		return;
	if (c->hello_done < c->hello_bytes) {
		got = send(c->fd, c->hello + c->hello_done, c->hello_bytes - c->hello_done, MSG_NOSIGNAL);
		if (failed(c, now_ns, got) || got < 0)
			return;
		c->hello_done += (uint32_t)got;
		c->out_bytes += (uint64_t)got;
		if (c->hello_done < c->hello_bytes)
			return;
	}
	for (uint32_t round = 0; round < ROUNDS && c->next != c->tail; round++) {
		struct iovec iov[AT_ONCE];
		struct msghdr message = {.msg_iov = iov};
		size_t offered;

		message.msg_iovlen = gather(c, iov, SIZE_MAX, &offered);
		got = sendmsg(c->fd, &message, MSG_NOSIGNAL);
		if (failed(c, now_ns, got))
			return;
		if (got > 0)
			advance(c, (size_t)got);
		if (got < 0 || (size_t)got < offered) {
			c->view.stalls++;
			break;
		}
	}
	release_acknowledged(c);
}

/* ---- UDP ---- */

static void remember(struct collector *c, const struct entry *e)
{
	c->history[c->n_history++ % HISTORY] = (struct sent){e->domain, e->sequence, e->n_records};
}

static uint32_t get32(const uint8_t *at)
{
	return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

/* Records of a message that came back. Templates hold none; nor does the copy of a line that still waits. */
static uint32_t records_of(struct collector *c, const uint8_t *quoted, size_t n_bytes)
{
	if (!c->params.hello) {
		if (c->copies_out == 0)
			return 1;
		c->copies_out--;
		return 0;
	}
	/* templates have the sequence number of the data behind them */
	if (n_bytes < QUOTED_BYTES || ((uint32_t)quoted[16] << 8 | quoted[17]) == TEMPLATE_SET)
		return 0;
	for (uint32_t i = 0; i < HISTORY && i < c->n_history; i++) {
		const struct sent *sent = &c->history[(c->n_history - 1 - i) % HISTORY];

		if (sent->n_records && sent->sequence == get32(quoted + 8) &&
		    sent->domain == get32(quoted + 12))
			return sent->n_records;
	}
	return 0;
}

/* True when the collector's host has said that it does not listen. */
static bool read_errors(struct collector *c)
{
	bool refused = false;

	for (;;) {
		uint8_t quoted[QUOTED_BYTES], control[512];
		struct iovec iov = {quoted, sizeof(quoted)};
		struct msghdr message = {.msg_iov = &iov,
					 .msg_iovlen = 1,
					 .msg_control = control,
					 .msg_controllen = sizeof(control)};
		const ssize_t got = recvmsg(c->fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT);

		if (got < 0)
			return refused;
		for (struct cmsghdr *h = CMSG_FIRSTHDR(&message); h; h = CMSG_NXTHDR(&message, h)) {
			struct sock_extended_err error;

			if (h->cmsg_level != IPPROTO_IP || h->cmsg_type != IP_RECVERR)
				continue;
			memcpy(&error, CMSG_DATA(h), sizeof(error));
			note_error(c, (int)error.ee_errno);
			c->view.records_refused += records_of(c, quoted, (size_t)got);
			refused = true;
		}
	}
}

static void probe(struct collector *c, uint64_t now_ns)
{
	uint8_t hello[IPFIX_TEMPLATES_MAX];
	ssize_t got = 0;

	c->state = TRYING;
	c->tried_ns = now_ns;
	for (uint32_t worker = 0; c->params.hello && worker < c->params.n_workers; worker++) {
		const uint32_t n_bytes = hello_of(c, worker, hello);
		got = send(c->fd, hello, n_bytes, 0);
		if (got < 0)
			break;
	}
	if (!c->params.hello && c->next != c->tail) {
		got = send(c->fd, entry_at(c, c->next) + 1, entry_at(c, c->next)->n_bytes, 0);
		c->copies_out += got >= 0;
	}
	if (read_errors(c) || (got < 0 && errno != EAGAIN))
		go_down(c, now_ns, got < 0 ? errno : 0);
}

static void follow_probe(struct collector *c, uint64_t now_ns)
{
	if (read_errors(c)) {
		go_down(c, now_ns, 0);
	} else if (now_ns - c->tried_ns > PROBE_PATIENCE_NS) {
		come_up(c);
		if (c->copies_out != 0) { /* the last of them has arrived */
			c->next = behind(c, c->next);
			release(c);
		}
		c->copies_out = 0;
	}
}

static void earn_credit(struct collector *c, uint64_t now_ns)
{
	const uint64_t earned = (now_ns - c->credited_ns) * UDP_BYTES_PER_MS / 1000000;

	if (earned == 0)
		return;
	c->credit_bytes += earned < UDP_BURST_BYTES ? earned : UDP_BURST_BYTES;
	if (c->credit_bytes > UDP_BURST_BYTES)
		c->credit_bytes = UDP_BURST_BYTES;
	c->credited_ns = now_ns;
}

static void run_udp(struct collector *c, uint64_t now_ns)
{
	if (read_errors(c)) {
		go_down(c, now_ns, 0);
		return;
	}
	earn_credit(c, now_ns);
	while (c->credit_bytes > 0 && c->next != c->tail) {
		struct iovec iov[AT_ONCE];
		struct mmsghdr message[AT_ONCE];
		size_t offered;
		const uint32_t n = gather(c, iov, c->credit_bytes, &offered);

		for (uint32_t i = 0; i < n; i++)
			message[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &iov[i], .msg_iovlen = 1}};
		const int got = sendmmsg(c->fd, message, n, 0);
		const int error = errno;
		for (int i = 0; i < got; i++) {
			remember(c, entry_at(c, c->next));
			c->next = behind(c, c->next);
			release(c);
			c->credit_bytes -=
				c->credit_bytes < iov[i].iov_len ? c->credit_bytes : iov[i].iov_len;
		}
		if (read_errors(c)) {
			go_down(c, now_ns, 0);
			return;
		}
		if (got < 0 && error != EAGAIN && error != EINTR && error != ENOBUFS) {
			go_down(c, now_ns, error);
			return;
		}
		if (got < (int)n) {
			c->view.stalls++;
			return;
		}
	}
}

/* ---- all of it ---- */

void collector_run(struct collector *c, uint64_t now_ns)
{
	const bool udp = c->params.transport == CONFIG_LOG_UDP;

	if (c->state == DOWN && now_ns >= c->retry_ns) {
		if (c->fd < 0)
			start(c, now_ns);
		else
			probe(c, now_ns);
	}
	if (c->state == TRYING && udp)
		follow_probe(c, now_ns);
	else if (c->state == TRYING)
		follow_connect(c, now_ns);
	if (c->state == UP && udp)
		run_udp(c, now_ns);
	else if (c->state == UP)
		run_tcp(c, now_ns);
}

bool collector_is_idle(const struct collector *c)
{
	return c->head == c->tail;
}

void collector_view(const struct collector *c, struct collector_view *view)
{
	*view = c->view;
	view->up = c->state == UP;
	view->bytes_queued = c->tail - c->head;
}

struct collector *collector_open(const struct collector_params *params)
{
	struct collector *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->params = *params;
	c->fd = -1;
	c->ring = aligned_alloc(16, params->queue_bytes);
	c->hello = malloc((size_t)params->n_workers * IPFIX_TEMPLATES_MAX + 1);
	c->history = calloc(HISTORY, sizeof(*c->history));
	if (c->ring && c->hello && c->history)
		return c;
	collector_close(c);
	return NULL;
}

void collector_close(struct collector *c)
{
	if (!c)
		return;
	if (c->fd >= 0)
		close(c->fd);
	free(c->ring);
	free(c->hello);
	free(c->history);
	free(c);
}
