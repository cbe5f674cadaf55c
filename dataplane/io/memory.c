/* Session memory is a file that a later process can map again: on hugetlbfs where there are huge pages (a
 * session is then one TLB entry away), else in /dev/shm. It is gone after a reboot, which is right: the peer
 * has the sessions. It is locked while a daemon uses it, left out of core dumps (whom a host talks to is
 * nobody's business), and every page is touched at start, because a page fault in service would be a pause of
 * hundreds of packets.
 */
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define HUGE_BYTES ((size_t)2 << 20)

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static size_t rounded(size_t bytes, size_t to)
{
	return (bytes + to - 1) / to * to;
}

static void touch(void *base, size_t bytes)
{
	if (!madvise(base, bytes, MADV_POPULATE_WRITE))
		return;
	for (size_t at = 0; at < bytes; at += 4096) { /* before Linux 5.14 */
		volatile char *page = (volatile char *)base + at;

		*page = *page;
	}
}

/* Maps what others write to: nothing is written. */
static void look_through(void *base, size_t bytes)
{
	if (!madvise(base, bytes, MADV_POPULATE_READ))
		return;
	for (size_t at = 0; at < bytes; at += 4096) /* before Linux 5.14 */
		(void)*((volatile char *)base + at);
}

/* Bytes of free huge pages of this size. (statfs of hugetlbfs counts only mounts that have a limit.) */
static size_t huge_free(size_t page_bytes)
{
	char path[96];
	size_t pages = 0;
	FILE *file;

	snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/hugepages-%zukB/free_hugepages",
		 page_bytes >> 10);
	if (!(file = fopen(path, "re")))
		return 0;
	if (fscanf(file, "%zu", &pages) != 1)
		pages = 0;
	fclose(file);
	return pages * page_bytes;
}

void memory_session_path(size_t bytes, bool no_huge, char *path, size_t path_bytes)
{
	FILE *mounts = no_huge ? NULL : setmntent("/proc/self/mounts", "re");
	struct mntent *mount;
	bool found = false;

	while (mounts && !found && (mount = getmntent(mounts))) {
		struct statfs fs;

		if (strcmp(mount->mnt_type, "hugetlbfs") || statfs(mount->mnt_dir, &fs))
			continue;
		snprintf(path, path_bytes, "%s/dsnat/sessions", mount->mnt_dir);
		/* one that an earlier run made has its pages already */
		found = !access(path, F_OK) || huge_free((size_t)fs.f_bsize) >= bytes;
	}
	if (mounts)
		endmntent(mounts);
	if (!found)
		snprintf(path, path_bytes, "/dev/shm/dsnat/sessions");
}

static int file_open(const char *path)
{
	char directory[256];
	char *slash;
	int fd;

	if (!*path)
		return memfd_create("dsnat-sessions", MFD_CLOEXEC);
	snprintf(directory, sizeof directory, "%s", path);
	if ((slash = strrchr(directory, '/')) && slash != directory) {
		*slash = '\0';
		if (mkdir(directory, 0700) && errno != EEXIST)
			return -1;
	}
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB)) {
		close(fd);
		errno = EBUSY;
		return -1;
	}
	return fd;
}

uint64_t memory_available(void)
{
	FILE *file = fopen("/proc/meminfo", "re");
	unsigned long long kb = 0;
	char line[128];

	while (file && fgets(line, sizeof line, file))
		if (sscanf(line, "MemAvailable: %llu kB", &kb) == 1)
			break;
	if (file)
		fclose(file);
	return kb ? kb << 10 : UINT64_MAX; /* not known: try */
}

/* Plain pages are promised freely and missing when they are touched: then the kernel kills somebody, or
 * sends SIGBUS. So ask before. */
static bool is_there(uint64_t bytes)
{
	if (bytes <= memory_available())
		return true;
	errno = ENOMEM;
	return false;
}

int memory_sessions(struct memory *m, const char *path, size_t bytes, char *why, size_t why_bytes)
{
	struct stat st;
	struct statfs fs;

	*m = (struct memory){.fd = file_open(path)};
	snprintf(m->path, sizeof m->path, "%s", path);
	if (m->fd < 0) {
		if (errno == EBUSY)
			snprintf(why, why_bytes,
				 "session memory %s is in use by another dsnatd; stop that one, or give this "
				 "one --sessions",
				 path);
		else
			snprintf(why, why_bytes, "session memory %s cannot be opened: %s", path,
				 strerror(errno));
		return -1;
	}
	if (fstatfs(m->fd, &fs) || fstat(m->fd, &st))
		goto fail;
	m->huge = fs.f_bsize >= (long)HUGE_BYTES;
	m->bytes = rounded(bytes, m->huge ? (size_t)fs.f_bsize : 4096);
	if ((size_t)st.st_size > m->bytes)
		m->bytes = (size_t)st.st_size;
	else if ((size_t)st.st_size < m->bytes && ftruncate(m->fd, (off_t)m->bytes))
		goto fail;
	if (!m->huge && fstat(m->fd, &st) == 0 && m->bytes > (uint64_t)st.st_blocks * 512 &&
	    (!is_there(m->bytes - (uint64_t)st.st_blocks * 512) ||
	     (fallocate(m->fd, 0, 0, (off_t)m->bytes) && errno != EOPNOTSUPP)))
		goto fail;
	m->base = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
	if (m->base == MAP_FAILED)
		goto fail;
	(void)madvise(m->base, m->bytes, MADV_DONTDUMP);
	touch(m->base, m->bytes);
	return 0;
fail:
	snprintf(why, why_bytes,
		 "session memory %s of %zu MB cannot be had: %s; lower engine.max_sessions or add memory",
		 *path ? path : "(memfd)", m->bytes >> 20, strerror(errno));
	close(m->fd);
	m->fd = -1;
	return -1;
}

int memory_inherit(struct memory *m, int fd, size_t bytes, char *why, size_t why_bytes)
{
	struct stat st = {0};
	struct statfs fs = {0};

	*m = (struct memory){.fd = fd};
	(void)fcntl(fd, F_SETFD, FD_CLOEXEC);
	if (!fstatfs(fd, &fs) && !fstat(fd, &st)) {
		m->huge = fs.f_bsize >= (long)HUGE_BYTES;
		m->bytes = rounded(bytes, m->huge ? (size_t)fs.f_bsize : 4096);
		if ((size_t)st.st_size != m->bytes) {
			snprintf(why, why_bytes,
				 "engine.max_sessions is another one now than that of the running dsnatd; "
				 "restart dsnatd for that");
			return -1;
		}
		m->base = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (m->base != MAP_FAILED) {
			(void)madvise(m->base, m->bytes, MADV_DONTDUMP);
			look_through(m->base, m->bytes);
			return 0;
		}
	}
	m->base = NULL;
	snprintf(why, why_bytes, "the session memory cannot be mapped: %s", strerror(errno));
	return -1;
}

void memory_trim(struct memory *m, size_t bytes)
{
	struct statfs fs;

	if (fstatfs(m->fd, &fs))
		return;
	bytes = rounded(bytes, m->huge ? (size_t)fs.f_bsize : 4096);
	if (bytes >= m->bytes || munmap((uint8_t *)m->base + bytes, m->bytes - bytes))
		return;
	m->bytes = bytes;
	(void)!ftruncate(m->fd, (off_t)bytes); /* what stays is only room that is not used */
}

int memory_reset(struct memory *m)
{
	/* not by ftruncate: the pages are mapped, and hugetlbfs may not give them back */
	memset(m->base, 0, m->bytes);
	return 0;
}

int memory_plain(struct memory *m, size_t bytes, bool no_huge)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;

	*m = (struct memory){
		.fd = -1, .bytes = rounded(bytes, HUGE_BYTES), .huge = !no_huge && bytes >= HUGE_BYTES};
	m->base = MAP_FAILED;
	if (m->huge)
		m->base = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, flags | MAP_HUGETLB, -1, 0);
	if (m->base == MAP_FAILED) {
		m->huge = false;
		m->bytes = rounded(bytes, 4096);
		if (is_there(m->bytes))
			m->base = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
		if (m->base == MAP_FAILED) {
			m->base = NULL;
			return -errno;
		}
		if (!no_huge)
			(void)madvise(m->base, m->bytes, MADV_HUGEPAGE);
	}
	(void)madvise(m->base, m->bytes, MADV_DONTDUMP);
	touch(m->base, m->bytes);
	return 0;
}

void memory_release(struct memory *m)
{
	if (m->base)
		munmap(m->base, m->bytes);
	if (m->fd >= 0)
		close(m->fd); /* the file stays, and with it the sessions */
	m->base = NULL;
	m->fd = -1;
}
