/* Where sessions and engines live. Never in EAL's memory: sessions outlive the process. */
#ifndef MEMORY_H
#define MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct memory {
	void *base;
	size_t bytes;
	int fd;
	bool huge;
	char path[256]; /* "" for memory without a name */
};

/* The default place of the session file: on hugetlbfs when it has room for `bytes`, else in /dev/shm. */
void memory_session_path(size_t bytes, bool no_huge, char *path, size_t path_bytes);

/* Maps the session file, made if it is not there, and touches every page. A smaller one grows, by zeros; a
 * larger one is mapped as it is, until memory_trim(). An empty path: memory that ends with the process. 0,
 * or -1 and a sentence in `why`. */
int memory_sessions(struct memory *m, const char *path, size_t bytes, char *why, size_t why_bytes);
/* The same for a descriptor of it that another process has opened, locked and given the right size. */
int memory_inherit(struct memory *m, int fd, size_t bytes, char *why, size_t why_bytes);
/* Cuts it down to that size. */
void memory_trim(struct memory *m, size_t bytes);
/* Empties it again: all zero. */
int memory_reset(struct memory *m);

/* Memory for an engine or a policy: huge pages where there are some, touched. NULL: none. */
int memory_plain(struct memory *m, size_t bytes, bool no_huge);

/* What the kernel could give in plain pages without swapping. */
uint64_t memory_available(void);

void memory_release(struct memory *m);

#endif
