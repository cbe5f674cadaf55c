/* NAT logging: from the workers' log rings to collectors, on a thread of its own.
 *
 *	struct export *x = export_open(n_workers, start);
 *	nat_engine_log_to(engine, export_ring(x, worker));      before the worker runs
 *	export_follow(x, ops, why)                              at start and after each reload
 *	export_tell(x, say, context)                            once a second: what the operator must hear of
 *	export_close(x)                                         when no worker runs any more: sends what is left
 *
 * dsnat-replay has no thread and no collector: it writes what the first collector of the configuration
 * would get into a file (export_file_*).
 */
#ifndef EXPORT_H
#define EXPORT_H

#include <stdio.h>

#include "collector.h"
#include "config.h"
#include "request.h"

struct export;

/* NULL: no memory. The thread starts with the first collector. */
struct export *export_open(uint32_t n_workers);

/* What the configuration asks for now; `ops` gives configuration, policy and workers. False and a
 * sentence: there is no memory, and nothing more is logged than before. */
bool export_follow(struct export *x, const struct request_ops *ops, char *why, size_t why_bytes);

/* Before the workers run: makes the rings if the configuration has collectors. */
bool export_prepare(struct export *x, const struct config *config);
struct nat_event_ring *export_ring(struct export *x, uint32_t worker); /* NULL: nothing is logged */

void export_tell(struct export *x, void (*say)(void *context, const char *line), void *context);
void export_close(struct export *x);

/* For request_ops. */
bool export_collector(struct export *x, uint32_t i, struct request_collector *view);
bool export_events(struct export *x, uint32_t worker, struct nat_event_counts *counts);

/* ---- into a file, time from the events: the same input gives the same bytes ---- */

struct export_file;

/* NULL: the configuration has no collector, or there is no memory. */
struct export_file *export_file_open(const struct config *config, uint32_t n_workers, FILE *to);
struct nat_event_ring *export_file_ring(struct export_file *f, uint32_t worker);
/* Takes what the workers have told; `config` and `policy` may have changed. */
void export_file_run(struct export_file *f, const struct config *config, const struct nat_policy *policy);
/* False: something could not be written, or was lost. */
bool export_file_close(struct export_file *f);

#endif
