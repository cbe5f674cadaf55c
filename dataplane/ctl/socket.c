/* The control socket: accept, read a line, answer it, write; never wait.
 *
 * One epoll set holds the listening socket and all clients. A client is in one of two states:
 *
 *	READING   its input is read; lines are answered as they come
 *	WRITING   an answer is not written yet; nothing more is read: a client that sends and never reads
 *	          costs one answer of memory, not one per request
 *
 * A client that takes no byte of its answer for STALL_S seconds is dropped, and so is one beyond
 * CLIENTS_MAX that would make others wait. A line longer than REQUEST_BYTES_MAX is answered with an error
 * and the connection closed: where the next request begins cannot be known.
 *
 * Who may connect is a matter of file permissions: the socket has mode 0660, its group is `dsnat` where
 * there is such a group, else the daemon's own.
 */
#include "socket.h"

#include <errno.h>
#include <grp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SOCKET_GROUP "dsnat" /* or DSNATD_GROUP of the environment */
#define CLIENTS_MAX  64
#define STALL_S      10
#define EVENTS       32
#define LINE_BYTES   4096 /* what a client costs that asks short questions */

struct client {
	int fd;       /* -1: free */
	bool ends;    /* close when the answer is written */
	char *answer; /* NULL: READING */
	size_t answer_bytes, written;
	time_t moved_s; /* when the client last took a byte */
	char *line;     /* grows with the request */
	size_t used, room;
};

struct socket_server {
	const struct request_ops *ops;
	int listener, epoll, timer;
	bool timer_armed;
	struct sockaddr_un address;
	struct client *clients[CLIENTS_MAX]; /* NULL: free */
};

/* Event data: the client's slot, or one of these. */
enum { EVENT_LISTENER = CLIENTS_MAX, EVENT_TIMER };

static time_t monotonic_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec;
}

static bool watch(const struct socket_server *s, int operation, int fd, uint32_t slot, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.u32 = slot};

	return epoll_ctl(s->epoll, operation, fd, &event) == 0;
}

/* A timer beside the clients, because the thread only calls when something happens: a stalled client is
 * silent. */
static void arm_timer(struct socket_server *s, bool on)
{
	struct itimerspec every = {.it_interval.tv_sec = on, .it_value.tv_sec = on};

	if (s->timer_armed != on)
		timerfd_settime(s->timer, 0, &every, NULL);
	s->timer_armed = on;
}

/* ---- clients ---- */

static void drop(struct socket_server *s, uint32_t slot)
{
	struct client *client = s->clients[slot];

	close(client->fd); /* leaves the epoll set with it */
	free(client->answer);
	free(client->line);
	free(client);
	s->clients[slot] = NULL;
}

static void accept_all(struct socket_server *s)
{
	for (;;) {
		int fd = accept4(s->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		uint32_t slot = 0;

		if (fd < 0)
			return; /* EAGAIN; and when descriptors are short the client waits in the backlog */
		while (slot < CLIENTS_MAX && s->clients[slot])
			slot++;
		if (slot < CLIENTS_MAX)
			s->clients[slot] = calloc(1, sizeof(struct client));
		if (slot == CLIENTS_MAX || !s->clients[slot]) {
			static const char busy[] =
				"{\"ok\":false,\"error\":\"too many clients are connected; try again\"}\n";

			(void)!send(fd, busy, sizeof(busy) - 1, MSG_NOSIGNAL);
			close(fd);
			continue;
		}
		s->clients[slot]->fd = fd;
		if (!watch(s, EPOLL_CTL_ADD, fd, slot, EPOLLIN))
			drop(s, slot);
	}
}

/* Writes what the socket takes. false: the client is gone. */
static bool write_answer(struct socket_server *s, uint32_t slot)
{
	struct client *client = s->clients[slot];

	while (client->written < client->answer_bytes) {
		ssize_t put = send(client->fd, client->answer + client->written,
				   client->answer_bytes - client->written, MSG_NOSIGNAL);

		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0 && errno == EAGAIN) {
			arm_timer(s, true);
			return watch(s, EPOLL_CTL_MOD, client->fd, slot, EPOLLOUT);
		}
		if (put < 0)
			return false;
		client->written += (size_t)put;
		client->moved_s = monotonic_s();
	}
	free(client->answer);
	client->answer = NULL;
	return !client->ends;
}

static bool give_answer(struct socket_server *s, uint32_t slot, const char *line, size_t line_bytes)
{
	struct client *client = s->clients[slot];
	char *answer = request_answer(s->ops, line, line_bytes);
	size_t length;
	char *with_newline;

	if (!answer)
		return false;
	length = strlen(answer);
	with_newline = realloc(answer, length + 1);
	if (!with_newline) {
		free(answer);
		return false;
	}
	with_newline[length] = '\n'; /* the closing zero is not sent */
	client->answer = with_newline;
	client->answer_bytes = length + 1;
	client->written = 0;
	client->moved_s = monotonic_s();
	return write_answer(s, slot);
}

/* Answers whole lines until one answer cannot be written at once. */
static bool answer_lines(struct socket_server *s, uint32_t slot)
{
	struct client *client = s->clients[slot];
	size_t start = 0;

	while (!client->answer) {
		char *end = memchr(client->line + start, '\n', client->used - start);
		size_t length;

		if (!end)
			break;
		length = (size_t)(end - client->line) - start;
		if (!give_answer(s, slot, client->line + start, length))
			return false;
		start += length + 1;
	}
	memmove(client->line, client->line + start, client->used - start);
	client->used -= start;
	if (!client->answer && client->used > REQUEST_BYTES_MAX) {
		client->ends = true;
		return give_answer(s, slot, client->line, client->used);
	}
	return true;
}

/* At least one free byte behind what is there. A request that ends gives the memory back. */
static bool make_room(struct client *client)
{
	size_t room = client->used ? client->used * 2 : LINE_BYTES;
	char *line;

	if (client->room > client->used && (client->used || client->room == LINE_BYTES))
		return true;
	line = realloc(client->line, room);
	if (!line)
		return false;
	client->line = line;
	client->room = room;
	return true;
}

static bool read_lines(struct socket_server *s, uint32_t slot)
{
	struct client *client = s->clients[slot];
	ssize_t got;

	if (!make_room(client))
		return false;
	got = recv(client->fd, client->line + client->used, client->room - client->used, 0);
	if (got < 0)
		return errno == EAGAIN || errno == EINTR;
	if (got == 0)
		return false;
	client->used += (size_t)got;
	return answer_lines(s, slot);
}

static void serve_client(struct socket_server *s, uint32_t slot, uint32_t events)
{
	struct client *client = s->clients[slot];
	bool alive = true;

	if (client->answer) {
		alive = !(events & (EPOLLERR | EPOLLHUP)) && write_answer(s, slot);
		if (alive && !client->answer) {
			/* lines that came with the one just answered wait in the buffer */
			alive = watch(s, EPOLL_CTL_MOD, client->fd, slot, EPOLLIN) && answer_lines(s, slot);
		}
	} else if (events & EPOLLIN) {
		alive = read_lines(s, slot);
	} else {
		alive = !(events & (EPOLLERR | EPOLLHUP));
	}
	if (!alive)
		drop(s, slot);
}

static void drop_stalled(struct socket_server *s)
{
	time_t now_s = monotonic_s();
	bool waiting = false;
	uint64_t ticks;

	(void)!read(s->timer, &ticks, sizeof(ticks));
	for (uint32_t slot = 0; slot < CLIENTS_MAX; slot++) {
		if (!s->clients[slot] || !s->clients[slot]->answer)
			continue;
		if (now_s - s->clients[slot]->moved_s >= STALL_S)
			drop(s, slot);
		else
			waiting = true;
	}
	arm_timer(s, waiting);
}

/* ---- server ---- */

int socket_listener(const struct socket_server *s)
{
	return s->listener;
}

int socket_fd(const struct socket_server *s)
{
	return s->epoll;
}

void socket_serve(struct socket_server *s)
{
	struct epoll_event events[EVENTS];
	int n = epoll_wait(s->epoll, events, EVENTS, 0);

	for (int i = 0; i < n; i++) {
		uint32_t slot = events[i].data.u32;

		if (slot == EVENT_LISTENER)
			accept_all(s);
		else if (slot == EVENT_TIMER)
			drop_stalled(s);
		else if (s->clients[slot]) /* not dropped by an event before this one */
			serve_client(s, slot, events[i].events);
	}
}

/* Does somebody listen on the path? A socket file stays behind when a daemon is killed. */
static bool is_live(const struct sockaddr_un *address)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	bool live = fd >= 0 && connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0;

	if (fd >= 0)
		close(fd);
	return live;
}

/* Members of the group may do what the daemon's owner may. Without the group, or the right to give it,
 * only he may. */
static void give_to_group(const char *path)
{
	const char *name = getenv("DSNATD_GROUP");
	const struct group *group = getgrnam(name ? name : SOCKET_GROUP);

	if (group)
		(void)!chown(path, (uid_t)-1, group->gr_gid);
}

static int open_listener(const struct sockaddr_un *address)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	mode_t before;
	int error;

	if (fd < 0)
		return -errno;
	before = umask(0117); /* 0660 from the first moment: no window with wider permissions */
	error = bind(fd, (const struct sockaddr *)address, sizeof(*address)) || listen(fd, CLIENTS_MAX)
			? -errno
			: 0;
	umask(before);
	give_to_group(address->sun_path);
	if (!error)
		return fd;
	close(fd);
	return error;
}

struct socket_server *socket_open(const char *path, int listener, const struct request_ops *ops, char *why,
				  size_t why_bytes)
{
	struct socket_server *s = calloc(1, sizeof(*s));
	struct stat found;

	if (!s || strlen(path) >= sizeof(s->address.sun_path)) {
		snprintf(why, why_bytes,
			 "the control socket's path %s is longer than %zu characters; choose a shorter one",
			 path, sizeof(s->address.sun_path) - 1);
		free(s);
		return NULL;
	}
	s->ops = ops;
	s->address.sun_family = AF_UNIX;
	memcpy(s->address.sun_path, path, strlen(path) + 1);
	if (listener < 0 && stat(path, &found) == 0) {
		if (!S_ISSOCK(found.st_mode)) {
			snprintf(why, why_bytes,
				 "%s exists and is not a socket; remove it or choose another path", path);
			free(s);
			return NULL;
		}
		if (is_live(&s->address)) {
			snprintf(why, why_bytes,
				 "another dsnatd listens on %s; stop it or give --socket another path", path);
			free(s);
			return NULL;
		}
		unlink(path);
	}
	s->listener = listener < 0 ? open_listener(&s->address) : listener;
	s->epoll = epoll_create1(EPOLL_CLOEXEC);
	s->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (s->listener >= 0 && s->epoll >= 0 && s->timer >= 0 &&
	    watch(s, EPOLL_CTL_ADD, s->listener, EVENT_LISTENER, EPOLLIN) &&
	    watch(s, EPOLL_CTL_ADD, s->timer, EVENT_TIMER, EPOLLIN))
		return s;
	snprintf(why, why_bytes,
		 "the control socket %s cannot be opened (%s); check its directory and permissions", path,
		 strerror(s->listener < 0 ? -s->listener : errno));
	socket_close(s);
	return NULL;
}

void socket_close(struct socket_server *s)
{
	for (uint32_t slot = 0; slot < CLIENTS_MAX; slot++)
		if (s->clients[slot])
			drop(s, slot);
	if (s->listener >= 0) {
		close(s->listener);
		unlink(s->address.sun_path);
	}
	if (s->epoll >= 0)
		close(s->epoll);
	if (s->timer >= 0)
		close(s->timer);
	free(s);
}
