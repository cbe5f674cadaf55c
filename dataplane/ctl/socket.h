/* The control socket: a UNIX stream socket that many clients may use at once, one JSON request per line.
 *
 * It belongs to one thread and never blocks it. The thread polls socket_fd() together with whatever else it
 * waits for, and calls socket_serve() when that is readable.
 */
#ifndef SOCKET_H
#define SOCKET_H

#include "request.h"

struct socket_server;

/* `listener`: of an earlier process, which listens on `path` already; -1: none.
 *
 * Makes `path` (a stale socket that nobody listens on is replaced; a live one is an error) with mode 0660. On
 * failure returns NULL and a sentence in `why`. `ops` must outlive the server. */
struct socket_server *socket_open(const char *path, int listener, const struct request_ops *ops, char *why,
				  size_t why_bytes);

/* What a later process may be given. */
int socket_listener(const struct socket_server *server);

/* Readable whenever socket_serve() has something to do (an epoll descriptor). */
int socket_fd(const struct socket_server *server);

/* Accepts, reads, answers and writes what it can without waiting. */
void socket_serve(struct socket_server *server);

/* Closes every client and removes the path. */
void socket_close(struct socket_server *server);

#endif
