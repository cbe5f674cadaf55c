/* Ageing: the timer wheel of engine.h, turned a bounded bit per burst. */
#include "engine.h"

void nat_wheel_init(struct nat_engine *e)
{
	for (uint32_t slot = 0; slot < NAT_WHEEL_SLOTS; slot++)
		for (uint32_t chain = 0; chain < NAT_WHEEL_CHAINS; chain++)
			e->wheel.head[slot][chain] = NAT_NO_RECORD;
	e->wheel.done_s = e->now_s;
}

static uint32_t *head_of(struct nat_engine *e, uint16_t slot)
{
	return &e->wheel.head[slot / NAT_WHEEL_CHAINS][slot % NAT_WHEEL_CHAINS];
}

void nat_wheel_hang(struct nat_engine *e, uint32_t record)
{
	struct nat_session *s = &e->record[record];
	uint32_t deadline_s = nat_session_deadline(e, s), wait_s = deadline_s - e->wheel.done_s;

	if ((int32_t)wait_s < 1)
		wait_s = 1;
	if (wait_s > NAT_WHEEL_SLOTS - 1)
		wait_s = NAT_WHEEL_SLOTS - 1;
	uint32_t slot = (e->wheel.done_s + wait_s) % NAT_WHEEL_SLOTS;
	s->slot = (uint16_t)(slot * NAT_WHEEL_CHAINS + record % NAT_WHEEL_CHAINS);
	uint32_t *head = head_of(e, s->slot);
	s->next = *head;
	s->previous = NAT_NO_RECORD;
	if (*head != NAT_NO_RECORD)
		e->record[*head].previous = record;
	*head = record;
}

void nat_wheel_take(struct nat_engine *e, uint32_t record)
{
	struct nat_session *s = &e->record[record];

	if (s->slot == NAT_OFF_WHEEL)
		return;
	if (s->next != NAT_NO_RECORD)
		e->record[s->next].previous = s->previous;
	if (s->previous != NAT_NO_RECORD)
		e->record[s->previous].next = s->next;
	else
		*head_of(e, s->slot) = s->next;
	s->slot = NAT_OFF_WHEEL;
}

static void settle_one(struct nat_engine *e, uint32_t record)
{
	struct nat_session *s = &e->record[record];
	if ((s->flags & NAT_RECORD_ASKED) && nat_session_over(e, s)) {
		nat_session_lapse(e, record);
		return;
	}
	if (nat_session_over(e, s)) {
		e->counters.sessions_expired += !(s->flags & NAT_RECORD_MAPPING);
		nat_session_end(e, record);
		return;
	}
	nat_wheel_take(e, record);
	nat_wheel_hang(e, record);
}

/* What settle_one() will touch, and the record behind this one, which is next. */
static void fetch_for_one(struct nat_engine *e, uint32_t record)
{
	const struct nat_session *s = &e->record[record];

	if (s->next != NAT_NO_RECORD)
		NAT_PREFETCH(&e->record[s->next]);
	if (!nat_session_over(e, s))
		return;
	const struct nat_tuple outside = nat_session_outside(s);
	NAT_PREFETCH(nat_index_bucket(&e->index, nat_tuple_hash(&e->index.key, &s->inside)));
	NAT_PREFETCH(nat_index_bucket(&e->index, nat_tuple_hash(&e->index.key, &outside)));
	nat_host_fetch(e, s->inside.local_be);
}

bool nat_wheel_turn(struct nat_engine *e, uint32_t budget)
{
	struct nat_wheel *wheel = &e->wheel;

	if (wheel->done_s == e->now_s)
		return true;
	/* After a pause longer than the wheel each slot needs to come up only once. */
	if (e->now_s - wheel->done_s > NAT_WHEEL_SLOTS)
		wheel->done_s = e->now_s - NAT_WHEEL_SLOTS;
	while (wheel->done_s != e->now_s) {
		uint32_t *head = wheel->head[(wheel->done_s + 1) % NAT_WHEEL_SLOTS];
		uint32_t busy = 0;
		for (uint32_t chain = 0; chain < NAT_WHEEL_CHAINS; chain++)
			if (head[chain] != NAT_NO_RECORD) {
				NAT_PREFETCH(&e->record[head[chain]]);
				busy++;
			}
		if (busy == 0) {
			wheel->done_s++;
			continue;
		}
		if (busy > budget)
			return false;
		budget -= busy;
		for (uint32_t chain = 0; chain < NAT_WHEEL_CHAINS; chain++)
			if (head[chain] != NAT_NO_RECORD)
				fetch_for_one(e, head[chain]);
		/* hang() counts from done_s: move on first, so that a record hung up again does not land in
		 * the slot being emptied. */
		wheel->done_s++;
		for (uint32_t chain = 0; chain < NAT_WHEEL_CHAINS; chain++)
			if (head[chain] != NAT_NO_RECORD)
				settle_one(e, head[chain]);
		wheel->done_s--;
	}
	return true;
}
