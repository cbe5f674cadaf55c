/* What happened in the engines, as lines for the operator's log. */
#ifndef LOG_H
#define LOG_H

#include "request.h"

#define LOG_LINE_BYTES 256u

struct log {                            /* zeroed at the start */
	uint64_t lost[NAT_WORKERS_MAX]; /* events, as far as told */
};

struct log_line {
	const char *text;              /* without the line's end */
	const struct nat_event *event; /* NULL: about the log itself */
	const char *pool;              /* NULL: none */
};

/* Takes the events of all workers and says each in one line. Call about once a second, on the control
 * thread. */
void log_drain(struct log *log, const struct request_ops *ops,
	       void (*say)(void *context, const struct log_line *line), void *context);

#endif
