/* Events with fields. Whoever looks for the host behind a refusal, or for one pool, need not take
 * sentences apart:
 *
 *	MESSAGE= PRIORITY= (4 refusals, 6 blocks)  DSNAT_EVENT= DSNAT_POOL= DSNAT_HOST= DSNAT_REASON= DSNAT_ADDRESS= DSNAT_PORTS=
 *
 * Only where standard error is the journal (JOURNAL_STREAM names it, systemd.exec(5)): in a terminal the
 * sentence is enough. Other lines of dsnatd go through standard error, which the unit also copies to the
 * console.
 */
#include "journal.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <systemd/sd-journal.h>
#include <unistd.h>

static const char *const events[NAT_EVENT_KINDS] = {
	[NAT_EVENT_PORTS_EXHAUSTED] = "ports_exhausted", [NAT_EVENT_TABLE_FULL] = "table_full",
	[NAT_EVENT_HOST_LIMIT] = "host_limit",           [NAT_EVENT_BLOCK_TAKEN] = "block_allocated",
	[NAT_EVENT_BLOCK_FREED] = "block_freed",
};

static bool is_journal(void)
{
	const char *stream = getenv("JOURNAL_STREAM");
	unsigned long long device, inode;
	struct stat s;

	return stream && sscanf(stream, "%llu:%llu", &device, &inode) == 2 && !fstat(STDERR_FILENO, &s) &&
	       s.st_dev == device && s.st_ino == inode;
}

static const char *address_text(uint32_t address_be, char out[INET_ADDRSTRLEN])
{
	return address_be ? inet_ntop(AF_INET, &address_be, out, INET_ADDRSTRLEN) : "";
}

bool journal_send(const struct log_line *line)
{
	const struct nat_event *e = line->event;
	char host[INET_ADDRSTRLEN], address[INET_ADDRSTRLEN], ports[16] = "";

	if (!e || !events[e->kind] || !is_journal())
		return false;
	const bool refusal = e->kind < NAT_EVENT_BLOCK_TAKEN;
	if (!refusal)
		snprintf(ports, sizeof(ports), "%u-%u", e->port_first, e->port_last);
	return sd_journal_send("MESSAGE=%s", line->text, "PRIORITY=%d", refusal ? 4 : 6,
			       "SYSLOG_IDENTIFIER=dsnatd", "DSNAT_EVENT=%s", events[e->kind], "DSNAT_POOL=%s",
			       line->pool ? line->pool : "", "DSNAT_HOST=%s",
			       address_text(e->inside_be, host), "DSNAT_REASON=%s",
			       refusal ? nat_reason_name((enum nat_reason)e->reason) : "", "DSNAT_ADDRESS=%s",
			       address_text(e->outside_be, address), "DSNAT_PORTS=%s", ports, NULL) == 0;
}
