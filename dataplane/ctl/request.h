/* A request of the control socket and its answer: one line of JSON each.
 *
 * The same function answers clients of dsnatd's socket and the {"ctl":...} lines of dsnat-replay. It knows
 * nothing of threads: struct request_ops is all it may ask of the program around it. Requests:
 *
 *	{"cmd":"show","what":"sessions|pools|zones|counters|ports|workers|config|sync", ...}
 *	{"cmd":"clear", ...filters}   {"cmd":"plan","text":"..."}   {"cmd":"reload"}   {"cmd":"status"}   {"cmd":"version"}
 *
 * An answer is {"ok":true,...} or {"ok":false,"error":"one sentence"}.
 */
#ifndef REQUEST_H
#define REQUEST_H

#include "collector.h"
#include "config.h"
#include "route.h"

struct json_t;

#define REQUEST_BYTES_MAX (4u << 20) /* a longer line is answered with an error */

/* What a worker is doing; the program fills in what it knows and leaves the rest 0. */
struct request_worker {
	int32_t core; /* -1: none of its own */
	uint64_t bursts, packets, idle_ns, busy_ns, sleeps;
	uint64_t longest_job_ns; /* the longest that a request has kept it from packets */
	uint64_t work_ns; /* in rounds that had packets; busy_ns has those that only looked for some, too */
	uint64_t cycles;  /* spent on packets */
	uint64_t handover_sent, handover_received;
};

struct request_port {
	const char *name; /* of the interface */
	const char *twin; /* the kernel's interface that stands for it, or "" */
	char mac[18];     /* "" when unknown */
	bool up;
	uint32_t speed_mbps, mtu_bytes, queues;
	uint64_t rx_packets, rx_bytes, rx_missed, rx_errors;
	uint64_t tx_packets, tx_bytes, tx_errors;
	uint64_t twin_to_packets, twin_from_packets;
};

struct request_collector { /* of the NAT log */
	char collector[32];
	const char *protocol, *transport;
	struct collector_view state;
};

struct request_ops {
	void *context;
	uint32_t n_workers;
	uint64_t started_s; /* wall clock, for the uptime; 0: do not say */

	/* The configuration and policy that run now. Called on the control thread only. */
	const struct config *(*config)(void *context);
	const struct nat_policy *(*policy)(void *context);

	/* Runs `run` between two bursts on the thread that owns the worker's engine, and returns when it is
	 * done. false: the worker did not take it within a second (it hangs or is being stopped). */
	bool (*on_worker)(void *context, uint32_t worker,
			  void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument);

	/* Packets in rings between workers now (handed over and not taken over yet). May be NULL: none. */
	uint64_t (*in_rings)(void *context);

	/* May be NULL: the program has none. Return false past the end. */
	bool (*worker)(void *context, uint32_t worker, struct request_worker *view);
	bool (*port)(void *context, uint32_t i, struct request_port *view);

	/* The peer of the pair. May be NULL. False: none is configured. */
	bool (*sync)(void *context, struct sync_view *view);

	/* The NAT log. May be NULL: there is none. False: past the end; nothing is logged. */
	bool (*collector)(void *context, uint32_t i, struct request_collector *view);
	bool (*events)(void *context, uint32_t worker, struct nat_event_counts *counts);

	/* What is known of the kernel's routes. NULL: the program has none. */
	struct route_figures (*routes)(void *context);

	/* Makes `next` (error-free, config_can_follow() is true) the running configuration and takes
	 * ownership of it. On failure returns false with a sentence in `why`, changes nothing, and `next`
	 * stays the caller's. */
	bool (*apply)(void *context, struct config *next, char *why, size_t why_bytes);
	unsigned config_flags; /* for config_load() at a reload */

	/* request_capture_open(); NULL: nothing can be captured */
	struct request_capture *capture;

	/* The program's name for `version`; the version itself is NAT_VERSION. */
	const char *program;
};

/* What is being captured. Close it when no worker runs any more. */
struct request_capture *request_capture_open(void);
void request_capture_close(struct request_capture *capture);

/* The answer without a newline, allocated with malloc(); NULL only when there is no memory. `line` need not
 * end in a zero. */
char *request_answer(const struct request_ops *ops, const char *line, size_t line_bytes);

/* Before `next` is put into force: addresses that leave a pool while sessions use them stay in it and drain. */
void request_keep_departed(const struct request_ops *ops, struct config *next);

/* The same from and to a JSON value (jansson's json_t); never NULL, the caller owns the answer. */
struct json_t *request_answer_json(const struct request_ops *ops, const struct json_t *request);

#endif
