/* A line of the log with its parts, for journalctl: `journalctl -u dsnatd DSNAT_EVENT=ports_exhausted`. */
#ifndef JOURNAL_H
#define JOURNAL_H

#include "log.h"

/* False: standard error is not the journal, or the journal did not take it; say it there instead. */
bool journal_send(const struct log_line *line);

#endif
