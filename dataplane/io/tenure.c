/* See tenure.h. */
#include "tenure.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

static bool holds(const uint32_t *address_be, uint32_t n, uint32_t wanted_be)
{
	for (uint32_t i = 0; i < n; i++)
		if (address_be[i] == wanted_be)
			return true;
	return false;
}

void tenure_open(struct tenure *t, const char *socket, bool usual)
{
	char text[INET_ADDRSTRLEN + 1];
	FILE *file;

	snprintf(t->path, sizeof t->path, usual ? "/run/dsnatd/master" : "%s.master", socket);
	t->clear_from_ns = t->until_ns = UINT64_MAX;
	if (!(file = fopen(t->path, "re")))
		return;
	while (t->n_ours < TENURE_ADDRESSES && fscanf(file, "%16s", text) == 1)
		t->n_ours += inet_pton(AF_INET, text, &t->ours_be[t->n_ours]) == 1;
	fclose(file);
	t->n_clear = t->n_ours;
	memcpy(t->clear_be, t->ours_be, sizeof t->clear_be);
}

void tenure_begins(struct tenure *t, uint64_t now_ns)
{
	t->clear_from_ns = now_ns + TENURE_CLEAR_NS;
	t->until_ns = now_ns + TENURE_DOUBT_NS;
}

bool tenure_doubts(struct tenure *t, uint32_t address_be, bool here, uint64_t now_ns)
{
	if (t->ended || now_ns >= t->until_ns || holds(t->clear_be, t->n_clear, address_be))
		return false;
	/* It is not here: when it comes, it comes because VRRP has heard nobody. */
	if (!here && now_ns >= t->clear_from_ns && t->n_clear < TENURE_ADDRESSES)
		t->clear_be[t->n_clear++] = address_be;
	return here;
}

bool tenure_is_young(const struct tenure *t, uint64_t now_ns)
{
	return now_ns < t->clear_from_ns;
}

bool tenure_ends(struct tenure *t, uint64_t now_ns)
{
	if (t->ended || now_ns < t->until_ns)
		return false;
	t->ended = true;
	return true;
}

void tenure_note(struct tenure *t, const struct plan *plan)
{
	const struct nat_config *config = &plan->config->nat;
	uint32_t ours_be[TENURE_ADDRESSES] = {0}, n = 0;
	char aside[sizeof t->path + 8], text[INET_ADDRSTRLEN];
	FILE *file;

	for (uint32_t i = 0; i < config->n_pools && n < TENURE_ADDRESSES; i++) {
		const uint32_t address_be = config->pools[i].active_while_be;

		if (address_be && nat_policy_is_active(plan->policy, i) && !holds(ours_be, n, address_be))
			ours_be[n++] = address_be;
	}
	if (n == t->n_ours && memcmp(ours_be, t->ours_be, n * sizeof ours_be[0]) == 0)
		return;
	t->n_ours = n;
	memcpy(t->ours_be, ours_be, sizeof ours_be);
	snprintf(aside, sizeof aside, "%s.new", t->path);
	if (!(file = fopen(aside, "we")))
		return; /* then the next engine doubts, for a moment */
	for (uint32_t i = 0; i < n; i++)
		fprintf(file, "%s\n", inet_ntop(AF_INET, &ours_be[i], text, sizeof text));
	if (!fclose(file))
		(void)rename(aside, t->path);
}
