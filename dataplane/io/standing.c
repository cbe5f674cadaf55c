/* See standing.h. Written anew and renamed, so that nobody reads half a number. */
#include "standing.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

void standing_open(struct standing *s, const char *socket, bool usual)
{
	snprintf(s->path, sizeof s->path, usual ? "/run/dsnatd/vrrp" : "%s.vrrp", socket);
}

/* Some pool follows a VRRP address, and that is here. */
static bool is_master(const struct plan *plan)
{
	const struct nat_config *config = &plan->config->nat;

	for (uint32_t i = 0; i < config->n_pools; i++)
		if (config->pools[i].active_while_be && nat_policy_is_active(plan->policy, i))
			return true;
	return false;
}

static int standing_of(const struct plan *plan, const struct sync_view *sync, bool translates)
{
	if (!translates)
		return -150;
	if (!sync || is_master(plan))
		return 0;
	return sync->connected && sync->heard_all ? 0 : -100;
}

void standing_follow(struct standing *s, const struct plan *plan, const struct sync_view *sync,
		     bool translates)
{
	const int standing = standing_of(plan, sync, translates);
	char aside[sizeof s->path + 8];
	FILE *file;

	if (s->has_written && s->written == standing)
		return;
	snprintf(aside, sizeof aside, "%s.new", s->path);
	file = fopen(aside, "we");
	const bool well = file && fprintf(file, "%d\n", standing) > 0;
	if ((file && fclose(file)) || !well || rename(aside, s->path)) {
		if (!s->has_written)
			fprintf(stderr,
				"dsnatd: %s cannot be written (%s); VRRP will not hear how the engine is\n",
				s->path, strerror(errno));
	} else if (s->has_written || standing != 0) {
		fprintf(stderr, "dsnatd: VRRP priority %+d: %s\n", standing,
			standing == 0      ? "all is well"
			: standing == -100 ? "the peer's sessions are not all here"
					   : "a worker makes no rounds");
	}
	s->has_written = true;
	s->written = standing;
}
