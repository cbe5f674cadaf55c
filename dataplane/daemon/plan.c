/* What runs now: the plan (configuration and policy) and the routes, each swapped in by one pointer; what
 * was swapped out is freed when every worker has passed. Announcements follow, since a new plan may own
 * other addresses.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "daemon.h"

void daemon_say(const char *sentence)
{
	fprintf(stderr, "dsnatd: %s\n", sentence);
}

/* ---- what was swapped out ---- */

void daemon_retire(struct daemon *d, void (*release)(void *object), void *object)
{
	struct retired *r = malloc(sizeof *r);

	if (!r)
		return; /* better a leak than a reader of freed memory */
	*r = (struct retired){
		.next = d->retired, .generation = d->generation + 1, .release = release, .object = object};
	d->retired = r;
}

static void wake_workers(struct daemon *d)
{
	for (uint32_t w = 0; w < d->n_workers; w++)
		thread_wake(&d->workers[w].thread);
}

void daemon_next_generation(struct daemon *d)
{
	atomic_fetch_add(&d->generation, 1);
	wake_workers(d);
}

void daemon_free_retired(struct daemon *d)
{
	uint64_t reached = d->generation;

	for (uint32_t w = 0; w < d->n_workers; w++) {
		uint64_t passed = atomic_load_explicit(&d->workers[w].thread.passed, memory_order_acquire);

		reached = passed < reached ? passed : reached;
	}
	for (struct retired **at = &d->retired; *at;) {
		struct retired *r = *at;

		if (r->generation > reached) {
			at = &r->next;
			continue;
		}
		*at = r->next;
		r->release(r->object);
		free(r);
	}
}

/* ---- plans ---- */

void daemon_plan_free(void *object)
{
	struct plan *plan = object;

	if (!plan)
		return;
	free(plan->policy_memory);
	config_free(plan->config);
	free(plan);
}

/* Takes ownership of `config` when it succeeds. */
struct plan *daemon_plan_new(struct config *config, const struct plan *previous)
{
	struct plan *plan = calloc(1, sizeof *plan);
	config->nat.n_workers = previous ? previous->config->nat.n_workers : crew_size(&config->nat);
	size_t bytes = (nat_policy_size(&config->nat) + 63) & ~(size_t)63;

	if (plan)
		plan->policy_memory = aligned_alloc(64, bytes);
	if (!plan || !plan->policy_memory) {
		free(plan);
		return NULL;
	}
	memset(plan->policy_memory, 0, bytes);
	plan->policy = nat_policy_init(plan->policy_memory, &config->nat, previous ? previous->policy : NULL);
	plan->config = config;
	return plan;
}

/* Pools that follow a VRRP address. True when one became ours. */
bool daemon_pools_follow(struct daemon *d, struct plan *plan)
{
	const struct nat_config *config = &plan->config->nat;
	bool won = false;

	for (uint32_t i = 0; i < config->n_pools; i++) {
		uint32_t address_be = config->pools[i].active_while_be;
		bool active = !address_be || route_has_address(d->route, address_be);

		if (address_be && tenure_doubts(&d->tenure, address_be, active, thread_clock_ns()))
			active = false;

		if (active == nat_policy_is_active(plan->policy, i))
			continue;
		nat_policy_set_active(plan->policy, i, active);
		won |= active;
		fprintf(stderr, "dsnatd: pool %s is %s\n", config->pools[i].name,
			active ? "ours" : "no longer ours");
	}
	tenure_note(&d->tenure, plan);
	return won;
}

/* ---- announcements ---- */

void daemon_announce_again(struct daemon *d)
{
	struct itimerspec every = {.it_interval.tv_nsec = ANNOUNCE_EVERY_MS * 1000000, .it_value.tv_nsec = 1};

	announce_all(&d->announce, thread_clock_ns());
	timerfd_settime(d->announce_fd, 0, &every, NULL);
}

static bool send_announcement(void *context, uint8_t iface, uint32_t address_be)
{
	struct daemon *d = context;
	const struct nat_interface_config *interface = &d->plan->config->nat.interfaces[iface];
	uint8_t index, frame[ARP_FRAME_BYTES];

	if (interface->path == NAT_PATH_NFQUEUE)
		return arp_socket_announce(interface->name, address_be);
	index = d->ports.of_iface[iface];
	arp_announcement(frame, d->ports.port[index].mac.addr_bytes, address_be);
	return twins_send(&d->twins, &d->ports.port[index], frame, sizeof frame);
}

void daemon_announce_tick(struct daemon *d)
{
	struct itimerspec never = {0};
	uint64_t ignored;

	(void)!read(d->announce_fd, &ignored, sizeof ignored);
	announce_serve(&d->announce, d->plan, d->route, thread_clock_ns(), send_announcement, d);
	if (!announce_busy(&d->announce))
		timerfd_settime(d->announce_fd, 0, &never, NULL);
}

/* ---- routes ---- */

void daemon_route_changed(void *context)
{
	struct daemon *d = context;

	daemon_next_generation(d);
	if (!d->route) /* still being opened */
		return;
	uint64_t connected = route_connected_digest(d->route);
	bool won = daemon_pools_follow(d, d->plan);

	if (won || connected != d->connected)
		daemon_announce_again(d);
	d->connected = connected;
}

void daemon_route_retire(void *context, void *memory)
{
	daemon_retire(context, free, memory);
}
