/* Two workers, of which one does not always answer, and a client that captures. */
#include <assert.h>
#include <jansson.h>
#include <string.h>

#include "../core/testbed.h"
#include "request.h"

static const uint64_t second_ns = 1000000000;

struct stage {
	struct testbed t[2];
	struct request_ops ops;
	uint32_t answers[2]; /* so often, and then it is silent */
	uint64_t now_ns;
};

static bool on_worker(void *context, uint32_t worker,
		      void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument)
{
	struct stage *s = context;

	if (s->answers[worker] == 0)
		return false;
	s->answers[worker]--;
	run(s->t[worker].e, s->now_ns, argument);
	return true;
}

static const struct config *config(void *context)
{
	static struct config none;

	(void)context;
	return &none;
}

static void stage_open(struct stage *s)
{
	memset(s, 0, sizeof(*s));
	s->now_ns = second_ns;
	for (unsigned w = 0; w < 2; w++) {
		testbed_config(&s->t[w], 4, 1024, 65535, 1024);
		(void)testbed_start(&s->t[w], s->now_ns);
		s->answers[w] = UINT32_MAX;
	}
	s->ops = (struct request_ops){.context = s,
				      .n_workers = 2,
				      .config = config,
				      .on_worker = on_worker,
				      .capture = request_capture_open()};
}

static void stage_close(struct stage *s)
{
	request_capture_close(s->ops.capture);
	for (unsigned w = 0; w < 2; w++)
		testbed_stop(&s->t[w], false);
}

/* The id of a capture that was begun or ended; 0: it was refused, and `why` is in the answer. */
static bool ask(struct stage *s, json_t *request, const char *why, json_int_t *id)
{
	json_t *answer = request_answer_json(&s->ops, request);
	const bool ok = json_is_true(json_object_get(answer, "ok"));

	assert(ok || strstr(json_string_value(json_object_get(answer, "error")), why));
	if (id)
		*id = json_integer_value(json_object_get(answer, "id"));
	json_decref(answer);
	json_decref(request);
	return ok;
}

static bool begins(struct stage *s, const char *why, json_int_t *id)
{
	return ask(s, json_pack("{s:s, s:b}", "cmd", "capture", "start", 1), why, id);
}

static bool ends(struct stage *s, json_int_t id, const char *why)
{
	return ask(s, json_pack("{s:s, s:I, s:b}", "cmd", "capture", "id", id, "stop", 1), why, NULL);
}

static void time_passes(struct stage *s, uint64_t s_)
{
	s->now_ns += s_ * second_ns;
	for (unsigned w = 0; w < 2; w++)
		if (s->answers[w])
			nat_engine_tick(s->t[w].e, s->now_ns);
}

static void a_start_that_a_worker_did_not_hear_leaves_nothing_behind(void)
{
	struct stage s;
	json_int_t id;

	stage_open(&s);
	s.answers[1] = 0;
	assert(!begins(&s, "worker 1 did not answer", &id));
	s.answers[1] = UINT32_MAX;
	assert(begins(&s, "", &id));
	assert(ends(&s, id, ""));
	stage_close(&s);
}

/* The first worker has its ring when the second is asked, and does not hear that it is to let go. */
static void a_worker_that_keeps_a_ring_is_asked_again_by_the_next_start(void)
{
	struct stage s;
	json_int_t id;

	stage_open(&s);
	s.answers[0] = 1;
	s.answers[1] = 0;
	assert(!begins(&s, "worker 1 did not answer", NULL));
	assert(!begins(&s, "worker 0 did not answer", NULL));
	s.answers[0] = s.answers[1] = UINT32_MAX;
	assert(begins(&s, "", &id));
	assert(ends(&s, id, ""));
	stage_close(&s);
}

static void a_stop_that_a_worker_did_not_hear_can_be_said_again(void)
{
	struct stage s;
	json_int_t id;

	stage_open(&s);
	assert(begins(&s, "", &id));
	s.answers[0] = 0;
	assert(!ends(&s, id, "worker 0 did not answer"));
	assert(!begins(&s, "somebody else captures", NULL));
	s.answers[0] = UINT32_MAX;
	assert(ends(&s, id, ""));
	assert(begins(&s, "", &id));
	stage_close(&s);
}

static void a_client_that_gave_up_on_a_silent_worker_is_left_like_any_other(void)
{
	struct stage s;
	json_int_t id;

	stage_open(&s);
	assert(begins(&s, "", &id));
	s.answers[1] = 0;
	assert(!ends(&s, id, "worker 1 did not answer"));
	time_passes(&s, 2 * NAT_CAPTURE_PATIENCE_S);
	assert(!begins(&s, "somebody else captures", NULL)); /* its ring may be written at any moment */
	s.answers[1] = UINT32_MAX;
	time_passes(&s, 1); /* it hears of the client's last visit only now */
	time_passes(&s, NAT_CAPTURE_PATIENCE_S);
	assert(begins(&s, "", &id));
	stage_close(&s);
}

int main(void)
{
	a_start_that_a_worker_did_not_hear_leaves_nothing_behind();
	a_worker_that_keeps_a_ring_is_asked_again_by_the_next_start();
	a_stop_that_a_worker_did_not_hear_can_be_said_again();
	a_client_that_gave_up_on_a_silent_worker_is_left_like_any_other();
	return 0;
}
