/* What VRRP is told of us, and what of VRRP is believed: our standing in the pair (io/standing.h), whose
 * an address is that was there before us (io/tenure.h), and a second master (io/rival.h).
 */
#include "daemon.h"

#define EXHAUSTED_NS UINT64_C(30000000000) /* since the last refusal */

/* ---- does every side have a link? ---- */

static bool is_linked(const struct daemon *d)
{
	const struct nat_config *config = &d->plan->config->nat;
	bool has_port[2] = {false}, up[2] = {false};

	for (uint32_t i = 0; i < config->n_interfaces; i++)
		up[config->interfaces[i].role == NAT_ROLE_OUTSIDE] |=
			config->interfaces[i].path == NAT_PATH_NFQUEUE; /* keepalived sees those itself */
	for (uint32_t i = 0; i < d->ports.n; i++) {
		has_port[d->ports.port[i].outside] = true;
		up[d->ports.port[i].outside] |= d->ports.port[i].told_up;
	}
	return (up[0] || !has_port[0]) && (up[1] || !has_port[1]);
}

/* ---- does a pool refuse? ---- */

static void add_refused(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	const struct nat_counters *c = nat_engine_counters(e);

	(void)now_ns;
	*(uint64_t *)argument += c->reason[NAT_REASON_NO_PORT] + c->reason[NAT_REASON_POOL_EMPTY];
}

static void look_for_refusals(struct daemon *d)
{
	uint64_t refused = 0;

	for (uint32_t w = 0; w < d->n_workers; w++)
		if (!d->ops->on_worker(d, w, add_refused, &refused))
			return;
	if (refused > d->refused)
		d->refused_ns = thread_clock_ns();
	d->refused = refused;
}

void daemon_follow_offer(struct daemon *d)
{
	if (!d->sync)
		return;
	look_for_refusals(d);
	d->offer = offer_of(&d->plan->config->nat);
	d->offer.exhausted = d->refused_ns != 0 && thread_clock_ns() - d->refused_ns < EXHAUSTED_NS;
	sync_offer(d->sync, &d->offer);
}

/* ---- standing and tenure ---- */

void daemon_follow_standing(struct daemon *d)
{
	struct sync_view view;
	const struct standing_facts facts = {.translates = d->translates,
					     .linked = is_linked(d),
					     .begins = tenure_is_young(&d->tenure, thread_clock_ns()),
					     .offer = d->offer,
					     .sync = daemon_on_sync(d, &view) ? &view : NULL};

	standing_follow(&d->standing, d->plan, &facts);
}

void daemon_follow_tenure(struct daemon *d)
{
	if (d->tenure.ended)
		return;
	(void)tenure_ends(&d->tenure, thread_clock_ns());
	if (daemon_pools_follow(d, d->plan))
		daemon_announce_again(d);
}

/* ---- two masters ---- */

void daemon_look_for_rivals(struct daemon *d)
{
	char why[256];

	for (uint32_t w = 0; w < d->n_workers; w++) {
		if (!rival_look(&d->rival[w], &d->workers[w].thread, d->plan, thread_clock_ns(), why,
				sizeof why))
			continue;
		if (*why)
			daemon_say(why);
		daemon_announce_again(d);
	}
}
