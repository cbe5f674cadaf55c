/* What the sync asks of the workers, in short steps between their bursts. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sync_internal.h"

struct step {
	struct sync *s;
	uint32_t worker;
	const uint32_t *slot;
	struct nat_replica *out;
	uint32_t n, first, range, since_s;
	uint64_t cursor, waiting;
	bool more, last;
	uint32_t left[SYNC_IMPORT], n_left; /* records whose place has another session now */
	struct nat_replica_sum *sum;
	uint32_t *records, *slots;
};

static bool on_worker(struct sync *s, uint32_t worker,
		      void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), struct step *step)
{
	step->s = s;
	step->worker = worker;
	return s->ops->on_worker(s->ops->context, worker, run, step);
}

static bool on_all(struct sync *s, void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument),
		   struct step *step)
{
	for (uint32_t worker = 0; worker < s->ops->n_workers; worker++) {
		step->last = worker + 1 == s->ops->n_workers;
		if (!on_worker(s, worker, run, step))
			return false;
	}
	return true;
}

/* ---- telling ---- */

static void export_some(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	step->n = nat_engine_export(e, step->out, step->n);
}

bool sync_export(struct sync *s, uint32_t worker, struct nat_replica *out, uint32_t *n)
{
	struct step step = {.out = out, .n = *n};
	const bool done = on_worker(s, worker, export_some, &step);

	*n = done ? step.n : 0;
	return done;
}

static void look_waiting(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	(void)now_ns;
	((struct step *)argument)->waiting = nat_engine_export_waiting(e);
}

uint64_t sync_waiting(struct sync *s, uint32_t worker)
{
	struct step step = {0};

	return on_worker(s, worker, look_waiting, &step) ? step.waiting : 0;
}

static void again(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	nat_engine_export_again(e, step->slot, step->n);
}

bool sync_again(struct sync *s, const uint32_t *slot, uint32_t n)
{
	struct step step = {.slot = slot, .n = n};

	return on_all(s, again, &step);
}

static void mark_all(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	step->more = nat_engine_export_all(e, &step->cursor, 4096);
}

bool sync_mark_all(struct sync *s)
{
	struct step step = {.cursor = s->bulk_cursor};

	if (!on_worker(s, s->bulk_worker, mark_all, &step))
		return false;
	s->bulk_cursor = step.cursor;
	if (step.more)
		return true;
	s->bulk_cursor = 0;
	if (++s->bulk_worker < s->ops->n_workers)
		return true;
	s->bulk = BULK_TELLING;
	return true;
}

static void hold_back(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	(void)now_ns;
	nat_engine_hold_back(e, ((struct step *)argument)->s->settings.hold_back_ms);
}

bool sync_set_hold_back(struct sync *s)
{
	struct step step = {0};

	return on_all(s, hold_back, &step);
}

/* ---- taking ---- */

bool sync_forget_peer(struct sync *s, uint32_t peer_records)
{
	uint32_t *shadow = malloc(2 * (size_t)peer_records * sizeof *shadow);

	if (!shadow && peer_records > 0)
		return false;
	free(s->shadow);
	s->shadow = shadow;
	s->shadow_number = shadow + peer_records;
	s->peer_records = peer_records;
	memset(s->shadow, 0xff, peer_records * sizeof *s->shadow);
	memset(s->shadow_number, 0, peer_records * sizeof *s->shadow_number);
	memset(s->origin, 0xff, s->n_records * sizeof *s->origin);
	return true;
}

static void name_conflict(struct sync *s, const struct nat_replica *r)
{
	char inside[INET_ADDRSTRLEN], remote[INET_ADDRSTRLEN], outside[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &r->inside.local_be, inside, sizeof inside);
	inet_ntop(AF_INET, &r->inside.remote_be, remote, sizeof remote);
	inet_ntop(AF_INET, &r->out_addr_be, outside, sizeof outside);
	snprintf(s->seen.conflict, sizeof s->seen.conflict, "%s:%u to %s:%u as %s:%u, protocol %u", inside,
		 ntohs(r->inside.local_port_be), remote, ntohs(r->inside.remote_port_be), outside,
		 ntohs(r->out_port_be), r->inside.protocol);
}

/* `record` stands for the place from now on. What stood for it before has ended at the peer: it had no
 * word of its own, because a place is told as it is by then. */
static void stand_for(struct step *step, uint32_t slot, uint32_t record)
{
	struct sync *s = step->s;
	const uint32_t before = s->shadow[slot];

	if (before != NAT_NO_SESSION && before != record && s->origin[before] == slot) {
		s->origin[before] = NAT_NO_SESSION;
		step->left[step->n_left++] = before;
	}
	s->shadow[slot] = record;
}

static void import_session(struct nat_engine *e, struct step *step, const struct nat_replica *r)
{
	struct sync *s = step->s;
	/* so that both sides decide alike when both used it in the same second */
	const bool yields = memcmp(s->epoch, s->peer_epoch, SYNC_EPOCH_BYTES) < 0;
	uint32_t record;

	switch (nat_engine_import(e, r, yields, &record)) {
	case NAT_IMPORT_DONE:
		stand_for(step, r->slot, record);
		s->origin[record] = r->slot;
		return;
	case NAT_IMPORT_OURS:
		s->seen.kept++;
		break;
	case NAT_IMPORT_CONFLICT:
		s->seen.conflicts++;
		name_conflict(s, r);
		break;
	case NAT_IMPORT_FULL:
		s->seen.full++;
		break;
	case NAT_IMPORT_INVALID:
	case NAT_IMPORT_RESULTS:
		s->seen.invalid++;
		break;
	}
	stand_for(step, r->slot, NAT_NO_SESSION);
}

static void import_some(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;
	struct sync *s = step->s;

	(void)now_ns;
	for (uint32_t i = step->first; i < step->first + step->n; i++) {
		const struct nat_replica *r = &s->item[i].replica;
		if (s->shadow_number[r->slot] != s->item[i].number)
			continue; /* there is a later word */
		if (r->kind == NAT_REPLICA_SESSION) {
			if (nat_engine_import_place(e, r) == step->worker)
				import_session(e, step, r);
			continue;
		}
		const uint32_t record = s->shadow[r->slot];
		if (record == NAT_NO_SESSION)
			continue;
		if (s->origin[record] == r->slot && r->kind == NAT_REPLICA_YOURS)
			nat_engine_import_ours(e, record);
		else if (s->origin[record] == r->slot)
			nat_engine_import_end(e, record);
		if (!step->last)
			continue;
		if (s->origin[record] == r->slot)
			s->origin[record] = NAT_NO_SESSION;
		s->shadow[r->slot] = NAT_NO_SESSION;
	}
}

static void end_left(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	for (uint32_t i = 0; i < step->n_left; i++)
		if (step->s->origin[step->left[i]] ==
		    NAT_NO_SESSION) /* else it stands for another place again */
			nat_engine_import_end(e, step->left[i]);
}

bool sync_import(struct sync *s)
{
	struct step step = {0};
	uint32_t n = 0;

	for (uint32_t i = 0; i < s->n_items; i++) {
		const struct sync_item item = s->item[i];
		if (item.replica.slot >= s->peer_records) {
			s->seen.invalid++;
			continue;
		}
		uint32_t *last = &s->shadow_number[item.replica.slot];
		if (*last != 0 && (int32_t)(item.number - *last) < 0)
			continue;
		*last = item.number;
		s->item[n++] = item;
	}
	s->n_items = 0;
	for (step.first = 0; step.first < n; step.first += SYNC_IMPORT) {
		step.n = n - step.first < SYNC_IMPORT ? n - step.first : SYNC_IMPORT;
		step.n_left = 0;
		const bool done = on_all(s, import_some, &step);
		for (uint32_t worker = 0; step.n_left > 0 && worker < s->ops->n_workers; worker++)
			(void)on_worker(s, worker, end_left,
					&step); /* one that is busy ends it by its time */
		if (!done)
			return false;
	}
	return true;
}

static void take_orphans(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	step->more = nat_engine_take_orphans(e, step->s->origin, &step->cursor, 4096);
}

bool sync_take_orphans(struct sync *s)
{
	for (uint32_t worker = 0; worker < s->ops->n_workers; worker++) {
		struct step step = {.more = true};
		while (step.more)
			if (!on_worker(s, worker, take_orphans, &step))
				return false;
	}
	return true;
}

/* ---- comparing ---- */

/* A sum is keyed by the epoch of the one that tells: nobody can choose sessions whose sums cancel each
 * other out. */
static struct nat_key key_of(const uint8_t epoch[SYNC_EPOCH_BYTES])
{
	struct nat_key key;

	memcpy(&key.k0, epoch, 8);
	memcpy(&key.k1, epoch + 8, 8);
	return key;
}

static void sum_ours(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	const struct nat_key key = key_of(step->s->epoch);
	nat_engine_export_sum(e, step->range, &key, step->since_s, step->sum);
}

bool sync_sum_ours(struct sync *s, uint32_t range, struct nat_replica_sum *sum)
{
	struct step step = {.range = range, .since_s = s->range[range].looked_s, .sum = sum};

	*sum = (struct nat_replica_sum){0};
	for (uint32_t i = 0; i < SYNC_WINDOW; i++)
		for (uint32_t k = 0; s->flight[i].kind == SYNC_DATA && k < s->flight[i].n; k++) {
			const uint32_t slot = s->flight[i].slot[k];
			if (slot / NAT_REPLICA_RANGE == range)
				sum->without[slot % NAT_REPLICA_RANGE / 64] |= UINT64_C(1) << (slot % 64);
		}
	return on_all(s, sum_ours, &step);
}

static void sum_theirs(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct step *step = argument;

	(void)now_ns;
	const struct nat_key key = key_of(step->s->peer_epoch);
	nat_engine_import_sum(e, &key, step->records, step->slots, step->n, step->sum);
}

bool sync_sum_theirs(struct sync *s, uint32_t range, struct nat_replica_sum *sum)
{
	uint32_t records[NAT_REPLICA_RANGE], slots[NAT_REPLICA_RANGE];
	struct step step = {.sum = sum, .records = records, .slots = slots};

	sum->sum = 0;
	sum->n = 0;
	for (uint32_t i = 0; i < NAT_REPLICA_RANGE; i++) {
		const uint32_t slot = range * NAT_REPLICA_RANGE + i;
		if (slot >= s->peer_records || (sum->without[i / 64] >> (i % 64) & 1) ||
		    s->shadow[slot] == NAT_NO_SESSION)
			continue;
		records[step.n] = s->shadow[slot];
		slots[step.n++] = slot;
	}
	return on_all(s, sum_theirs, &step);
}
