/* The control thread: it waits for signals, ticks, netlink, clients, the peer, and serves them one after
 * another.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "../ctl/journal.h"
#include "../io/dpdk/guard.h"
#include "daemon.h"

#define LINK_PATIENCE_NS 3000000000u /* at start a port that has no link yet is not reported down */
#define STALL_S          10u         /* a worker without a round for so long hangs */

/* The switches must hear from us on the other wire before they send there. */
static void bond_moved(struct daemon *d, const struct port *bond, const char *member)
{
	uint8_t frame[ARP_FRAME_BYTES];

	fprintf(stderr, "dsnatd: port %s sends by %s from now on; members with a link: %u of %u\n",
		bond->name, member, bond_links(&bond->bond), bond->bond.n);
	for (uint32_t i = 0; i < d->ports.n; i++) { /* itself, or all VLANs of it */
		const struct port *port = &d->ports.port[i];

		if (port->first != bond->first)
			continue;
		arp_presence(frame, port->mac.addr_bytes);
		(void)twins_send(&d->twins, port, frame, sizeof frame);
	}
}

static void links(struct daemon *d)
{
	bool patient = thread_clock_ns() - d->started_ns < LINK_PATIENCE_NS, announce = false;

	for (uint32_t i = 0; i < d->ports.n; i++) {
		struct port *port = &d->ports.port[i];
		const char *member = port_follow_bond(port);

		if (member) {
			bond_moved(d, port, member);
			announce |= port->outside;
		}
		if (port_is_replaced(port) && !d->stop) {
			fprintf(stderr,
				"dsnatd: the device of port %s is back; ending, to start again with it\n",
				port->name);
			d->stop = d->restart = true;
		}
		if (port_poll_link(port)) {
			announce |= port->up && port->outside;
			fprintf(stderr, "dsnatd: port %s is %s%s\n", port->name, port->up ? "up" : "down",
				port->gone ? ": its device is gone; bring it back, and dsnatd starts again "
					     "with it"
					   : "");
		}
		/* after a restart the link is lost for a moment: the kernel need not know */
		if (port->up != port->told_up && (port->up || !patient)) {
			port->told_up = port->up;
			twin_set_carrier(&d->twins.twin[i], port->up);
		}
	}
	if (announce)
		daemon_announce_again(d);
}

/* Alive is a daemon whose workers all make rounds. systemd hears nothing while one hangs, and would end us
 * in the end; without systemd, and sooner, we do it ourselves. Not by stop(), which waits for the workers.
 * The sessions are in memory that stays. */
static void watchdog(struct daemon *d)
{
	bool alive = true;

	for (uint32_t w = 0; w < d->n_workers; w++) {
		if (d->rounds[w] != d->workers[w].thread.rounds) {
			d->rounds[w] = d->workers[w].thread.rounds;
			d->stalled_s[w] = 0;
			continue;
		}
		alive = false;
		if (++d->stalled_s[w] == 1)
			fprintf(stderr, "dsnatd: worker %u makes no rounds\n", w);
		if (d->stalled_s[w] < STALL_S)
			continue;
		fprintf(stderr,
			"dsnatd: worker %u has made no round for %u s: a device or a thread hangs; ending, "
			"so that a new "
			"dsnatd goes on with the sessions\n",
			w, STALL_S);
		abort();
	}
	if (alive && d->watchdog_us)
		sd_notify(0, "WATCHDOG=1");
	d->translates = alive;
}

bool daemon_watch(struct daemon *d, int fd, enum source source)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = source};

	return fd >= 0 && !epoll_ctl(d->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

/* The port is open only while the configuration wants it; that may change with a reload. */
void daemon_follow_port_control(struct daemon *d)
{
	const bool wanted = d->plan->config->nat.port_control;
	char why[256];

	if (wanted == (d->port_control != NULL) || (wanted && d->port_control_failed == d->plan))
		return;
	if (!wanted) {
		pcp_close(d->port_control);
		d->port_control = NULL;
		return;
	}
	d->port_control = pcp_open(d->ops, why, sizeof why);
	if (d->port_control && daemon_watch(d, pcp_fd(d->port_control), PORT_CONTROL))
		return;
	d->port_control_failed = d->plan;
	if (!d->port_control)
		daemon_say(why);
}

static void say_line(void *context, const char *line)
{
	(void)context;
	daemon_say(line);
}

static void say_event(void *context, const struct log_line *line)
{
	if (!journal_send(line))
		say_line(context, line->text);
}

/* ---- rules of ours that somebody else changed ---- */

static void rules_seen(struct daemon *d)
{
	char who[128];

	if (!nft_watch_serve(&d->rules_watch, who, sizeof who) || d->rules_changed)
		return;
	d->rules_changed = true;
	fprintf(stderr, "dsnatd: %s has changed nftables rules of dsnatd; they are put in place again\n",
		who);
}

/* At most ten times a second: two programs that undo each other's work must not eat the machine. */
static void rules_mend(struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	char why[512];

	if (!d->rules_changed)
		return;
	d->rules_changed = false;
	if ((d->queues && nft_install(config, why, sizeof why)) ||
	    (d->eal && guards_install(config, why, sizeof why))) {
		daemon_say(why);
		d->rules_changed = true;
	}
}

static void tick(struct daemon *d)
{
	static unsigned n; /* ten a second */
	uint64_t ignored;

	daemon_follow_port_control(d);
	(void)!read(d->tick_fd, &ignored, sizeof ignored);
	links(d);
	rules_mend(d);
	daemon_free_retired(d);
	daemon_follow_tenure(d); /* first: what it no longer doubts may be asked for */
	daemon_follow_standing(d);
	if (++n % 10)
		return;
	watchdog(d);
	daemon_look_for_rivals(d);
	daemon_follow_spare(d);
	daemon_follow_offer(d);
	log_drain(&d->log, d->ops, say_event, NULL);
	export_tell(d->nat_log, say_line, NULL);
	route_refresh(d->route);
	if (d->eal)
		twins_mend(&d->twins, daemon_say);
}

static void signals(struct daemon *d)
{
	struct signalfd_siginfo info;

	while (read(d->signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
		if (info.ssi_signo == SIGHUP)
			daemon_reload(d);
		else
			d->stop = true;
	}
}

void daemon_wait_and_serve(struct daemon *d)
{
	struct epoll_event event[8];
	int n = epoll_wait(d->epoll_fd, event, 8, -1);

	for (int i = 0; i < n; i++)
		switch ((enum source)event[i].data.u32) {
		case SIGNALS:
			signals(d);
			break;
		case TICK:
			tick(d);
			break;
		case ROUTES:
			route_serve(d->route);
			break;
		case CLIENTS:
			socket_serve(d->socket);
			break;
		case ANNOUNCE:
			daemon_announce_tick(d);
			break;
		case PORT_CONTROL:
			if (d->port_control)
				pcp_serve(d->port_control);
			break;
		case RULES:
			rules_seen(d);
			break;
		case PEER:
			sync_serve(d->sync);
			break;
		}
}
