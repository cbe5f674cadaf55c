/* Shared by the files that answer requests (request*.c), by nobody else. */
#ifndef REQUEST_INTERNAL_H
#define REQUEST_INTERNAL_H

#include <jansson.h>

#include "request.h"

/* Records that one step on a worker may look at: about 0.07 us each, so less than 0.1 ms. */
#define REQUEST_STEP_RECORDS 1024u

struct request_context {
	const struct request_ops *ops;
	const json_t *request;
	char why[512]; /* set by request_refuse() */
};

/* The answer becomes an error with this sentence; gives NULL, to be returned. */
json_t *request_refuse(struct request_context *c, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

/* Runs one step on a worker; false and refused when the worker does not answer. */
bool request_on_worker(struct request_context *c, uint32_t worker,
		       void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument);

/* Every key of the request must be one of `keys`: a misspelt filter would otherwise clear everything. */
bool request_only_keys(struct request_context *c, const char *const *keys, size_t n);

/* A key that is not given leaves *out alone; of the wrong type it refuses and gives false. */
bool request_read_text(struct request_context *c, const char *key, const char **out);
/* An empty text is refused too: it is what a script sends whose variable is not set, and no filter would
 * mean all. */
bool request_read_given(struct request_context *c, const char *key, const char **out);
bool request_read_flag(struct request_context *c, const char *key, bool *out);
bool request_read_count(struct request_context *c, const char *key, uint32_t most, uint32_t *out);

json_t *request_number(uint64_t value);
json_t *request_prefix_json(struct nat_prefix prefix);

/* Counters of all workers; *equation: it holds on each of them. */
bool request_sum_counters(struct request_context *c, struct nat_counters *sum, bool *equation);

/* "WORKER:POSITION" of an earlier answer; leaves both alone when there is none. */
bool request_read_cursor(struct request_context *c, uint32_t *worker, uint64_t *position);
void request_add_cursor(json_t *answer, const struct request_ops *ops, uint32_t worker, uint64_t position);

const char *request_protocol_name(uint8_t protocol);

/* For a file with errors: the answer holds all of them, and its sentence is the first. */
json_t *request_refuse_file(struct request_context *c, const struct config *config);
json_t *request_problems_json(const struct config *config);

/* What workers and collectors of the NAT log have done. */
json_t *request_log_json(const struct request_ops *ops);

/* Ends sessions whose public address is in no pool any more; gives how many. */
uint64_t request_cut_departed(struct request_context *c);

/* The handlers. */
json_t *request_show_sessions(struct request_context *c);
json_t *request_show_counters(struct request_context *c);
json_t *request_show_pools(struct request_context *c);
json_t *request_show_zones(struct request_context *c);
json_t *request_show_workers(struct request_context *c);
json_t *request_show_ports(struct request_context *c);
json_t *request_show_config(struct request_context *c);
json_t *request_show_destinations(struct request_context *c);
json_t *request_show_sync(struct request_context *c);
json_t *request_plan(struct request_context *c);
json_t *request_clear(struct request_context *c);
json_t *request_pcp(struct request_context *c);
json_t *request_explain(struct request_context *c);
json_t *request_capture(struct request_context *c);

#endif
