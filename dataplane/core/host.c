/* Inside hosts: how many sessions each has, how fast it opens them, which public address it is paired with.
 *
 * A host is in the table while it has sessions (or an unfilled bucket of tokens), found by its address
 * with linear probing; removal shifts followers back, so there are no tombstones. A host of a paired pool
 * stays while half of the table is free, so that it finds its address again (RFC 4787 REQ-2), also when
 * the pool has changed meanwhile. Only the opening and the end of a session come here. When the table is
 * full a new host is not followed: it is served without a limit rather than refused.
 */
#include "engine.h"

static uint32_t home(const struct nat_engine *e, uint32_t address_be)
{
	return nat_scale32((uint32_t)nat_hash64(&e->index.key, address_be, 1), e->hosts.n_slots);
}

uint32_t nat_host_fetch(const struct nat_engine *e, uint32_t address_be)
{
	const uint32_t at = home(e, address_be);

	NAT_PREFETCH(&e->hosts.slot[at]);
	return at;
}

static uint32_t next_slot(const struct nat_engine *e, uint32_t slot)
{
	return slot + 1 == e->hosts.n_slots ? 0 : slot + 1;
}

/* The slot of this host, or the empty one where its search ends. */
static struct nat_host *search(const struct nat_engine *e, uint32_t at, uint32_t address_be)
{
	while (e->hosts.slot[at].address_be != address_be && e->hosts.slot[at].address_be != 0)
		at = next_slot(e, at);
	return &e->hosts.slot[at];
}

static struct nat_host *find(const struct nat_engine *e, uint32_t address_be)
{
	struct nat_host *host = search(e, home(e, address_be), address_be);

	return host->address_be == address_be ? host : NULL;
}

static bool is_stale(const struct nat_engine *e, const struct nat_host *host)
{
	return host->sessions == 0 && host->tokens_s != e->now_s;
}

static bool is_crowded(const struct nat_engine *e)
{
	return e->hosts.used > e->hosts.n_slots / 2;
}

/* `at`: its home. */
static struct nat_host *find_or_add(struct nat_engine *e, uint32_t at, uint32_t address_be)
{
	struct nat_host *host = search(e, at, address_be);
	if (NAT_LIKELY(host->address_be == address_be))
		return host;
	/* Where it is crowded a stale entry on the way is written over: the slot stays in use, so no other
	 * host's search is cut short. */
	if (NAT_UNLIKELY(is_crowded(e))) {
		for (host = &e->hosts.slot[at]; host->address_be != 0 && !is_stale(e, host);
		     host = &e->hosts.slot[at])
			at = next_slot(e, at);
	}
	if (host->address_be == 0) {
		if (e->hosts.used >= e->hosts.n_slots - e->hosts.n_slots / 8)
			return NULL;
		e->hosts.used++;
	}
	*host = (struct nat_host){.address_be = address_be,
				  .tokens = e->policy->limits.new_per_host_per_s,
				  .tokens_s = e->now_s};
	return host;
}

static void remove_slot(struct nat_engine *e, uint32_t hole)
{
	for (uint32_t slot = next_slot(e, hole); e->hosts.slot[slot].address_be != 0;
	     slot = next_slot(e, slot)) {
		uint32_t want = home(e, e->hosts.slot[slot].address_be);
		/* May the entry at `slot` move to `hole`? Only if its home is not between them. */
		bool between = hole < slot ? want > hole && want <= slot : want > hole || want <= slot;
		if (between)
			continue;
		e->hosts.slot[hole] = e->hosts.slot[slot];
		hole = slot;
	}
	e->hosts.slot[hole].address_be = 0;
	e->hosts.used--;
}

enum nat_reason nat_host_admit(struct nat_engine *e, uint32_t address_be)
{
	const struct nat_limits *limits = &e->policy->limits;

	if (limits->sessions_per_host == 0 && limits->new_per_host_per_s == 0)
		return NAT_REASON_OK;
	struct nat_host *host = find_or_add(e, home(e, address_be), address_be);
	if (!host)
		return NAT_REASON_OK;
	if (limits->sessions_per_host != 0 && host->sessions >= limits->sessions_per_host)
		return NAT_REASON_HOST_SESSIONS;
	if (limits->new_per_host_per_s == 0)
		return NAT_REASON_OK;
	if (host->tokens_s != e->now_s) {
		host->tokens = limits->new_per_host_per_s;
		host->tokens_s = e->now_s;
	}
	if (host->tokens == 0)
		return NAT_REASON_HOST_RATE;
	host->tokens--;
	return NAT_REASON_OK;
}

static bool serves(const struct nat_engine *e, uint32_t address_be)
{
	const uint32_t address = nat_policy_address(e->policy, address_be);
	return address != UINT32_MAX && nat_in_service(e, address);
}

/* RFC 4787 REQ-2: a host's address is the one that its first session got. A session that finds no port there
 * gets another address, which takes the first one's place when no session is left there, or when one begins
 * elsewhere while the first one drains. (Of a host on three addresses at once the latest two are known.) */
static void move(struct nat_host *host)
{
	const uint32_t paired_be = host->paired_be, at_paired = host->at_paired;

	host->paired_be = host->elsewhere_be;
	host->at_paired = host->at_elsewhere;
	host->elsewhere_be = at_paired ? paired_be : 0;
	host->at_elsewhere = at_paired;
}

void nat_host_add(struct nat_engine *e, uint32_t address_be, uint32_t paired_be)
{
	nat_host_add_at(e, home(e, address_be), address_be, paired_be);
}

void nat_host_add_at(struct nat_engine *e, uint32_t at, uint32_t address_be, uint32_t paired_be)
{
	struct nat_host *host = find_or_add(e, at, address_be);
	if (!host)
		return;
	if (host->sessions++ == 0)
		host->at_paired = host->elsewhere_be = host->at_elsewhere = 0;
	if (host->at_paired == 0) {
		host->paired_be = paired_be;
		host->at_paired = 1;
		return;
	}
	if (host->paired_be == paired_be) {
		host->at_paired++;
		return;
	}
	if (host->elsewhere_be != paired_be) {
		host->elsewhere_be = paired_be;
		host->at_elsewhere = 0;
	}
	host->at_elsewhere++;
	if (!serves(e, host->paired_be))
		move(host);
}

/* An idle host of a paired pool is remembered while there is room. */
static bool is_remembered(const struct nat_engine *e, const struct nat_host *host)
{
	const uint32_t address = nat_policy_address(e->policy, host->paired_be);

	return !is_crowded(e) && address != UINT32_MAX &&
	       e->policy->pool[e->policy->address[address].pool].select == NAT_SELECT_PAIRED;
}

void nat_host_remove(struct nat_engine *e, uint32_t address_be, uint32_t paired_be)
{
	struct nat_host *host = find(e, address_be);
	if (!host || host->sessions == 0)
		return;
	if (--host->sessions == 0) {
		if ((host->tokens_s != e->now_s || e->policy->limits.new_per_host_per_s == 0) &&
		    !is_remembered(e, host))
			remove_slot(e, (uint32_t)(host - e->hosts.slot));
		return;
	}
	host->at_paired -= host->paired_be == paired_be && host->at_paired != 0;
	host->at_elsewhere -= host->elsewhere_be == paired_be && host->at_elsewhere != 0;
	if (host->at_paired == 0 && host->at_elsewhere != 0)
		move(host);
}

bool nat_host_copy(const struct nat_engine *e, uint32_t address_be, struct nat_host *copy)
{
	const struct nat_host *host = find(e, address_be);
	if (host)
		*copy = *host;
	return host != NULL;
}

void nat_host_restore(struct nat_engine *e, uint32_t address_be, const struct nat_host *was)
{
	struct nat_host *host = was ? find_or_add(e, home(e, address_be), address_be) : find(e, address_be);

	if (host && was && host->sessions == was->sessions) {
		*host = *was;
	} else if (host && was) { /* one whose time was over has ended meanwhile */
		host->tokens = was->tokens;
		host->tokens_s = was->tokens_s;
	} else if (host && host->sessions == 0) {
		remove_slot(e, (uint32_t)(host - e->hosts.slot));
	}
}

uint32_t nat_host_paired(const struct nat_engine *e, uint32_t address_be)
{
	const struct nat_host *host = find(e, address_be);
	return host ? host->paired_be : 0;
}
