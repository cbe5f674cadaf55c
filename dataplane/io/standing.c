/* See standing.h. Written anew and renamed, so that nobody reads half a number. */
#include "standing.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

struct word {
	int priority;
	const char *why;
};

static const struct word well = {0, "all is well"}, exhausted = {-80, "a pool has no port left"},
			 differs = {-90, "the peer is master with other pools or zones"},
			 lacks = {-100, "the peer's sessions are not all here"},
			 begins = {-100, "the engine has just begun"},
			 stalled = {-254, "a worker makes no rounds"},
			 unlinked = {-254, "one side has no link"};

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

static const struct word *word_of(const struct plan *plan, const struct standing_facts *f)
{
	const struct offer *ours = &f->offer;

	if (!f->translates)
		return &stalled;
	if (!f->linked)
		return &unlinked;
	if (!f->sync)
		return &well;
	const struct offer *theirs = &f->sync->peer;
	const bool told = f->sync->connected && theirs->digest != 0,
		   relieves = told && theirs->exhausted && ours->addresses > theirs->addresses;
	if (is_master(plan))
		return f->sync->in_sync && ours->exhausted ? &exhausted : &well;
	if (!f->sync->connected || !f->sync->heard_all)
		return &lacks;
	if (f->begins) /* who took over now would be dark until the doubt ends */
		return &begins;
	if (told && theirs->digest != ours->digest)
		return relieves ? &well : &differs;
	return told && theirs->exhausted ? &exhausted : &well;
}

void standing_follow(struct standing *s, const struct plan *plan, const struct standing_facts *facts)
{
	const struct word *word = word_of(plan, facts);
	char aside[sizeof s->path + 8];
	FILE *file;

	if (s->has_written && s->written == word->priority)
		return;
	snprintf(aside, sizeof aside, "%s.new", s->path);
	file = fopen(aside, "we");
	const bool written = file && fprintf(file, "%d\n", word->priority) > 0;
	if ((file && fclose(file)) || !written || rename(aside, s->path)) {
		if (!s->has_written)
			fprintf(stderr,
				"dsnatd: %s cannot be written (%s); VRRP will not hear how the engine is\n",
				s->path, strerror(errno));
	} else if (s->has_written || word->priority != 0) {
		fprintf(stderr, "dsnatd: VRRP priority %+d: %s\n", word->priority, word->why);
	}
	s->has_written = true;
	s->written = word->priority;
}
