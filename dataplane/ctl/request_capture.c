/* capture: one client at a time looks at packets before and after translation.
 *
 *	{"cmd":"capture","start":true,"filter":[[40,0,0,12],...],"reasons":["no_port"],"sample":10,"snap":256}  ->  {"id":7,"now_ns":...}
 *	{"cmd":"capture","id":7}                the packets since, at most a page of them, and the figures
 *	{"cmd":"capture","id":7,"stop":true}
 *	{"cmd":"capture"}                       is one running?
 *
 * `filter` is a classic BPF program over the IPv4 packet. The client has compiled it: libpcap's compiler
 * asks name servers, which the control thread must not wait for. Here it is only checked (bpf_validate)
 * and run, by the workers.
 *
 * Each worker has a ring of its own (core/capture.c), which is there as long as the worker may write into
 * it: until it says that it has let go, or has left a client that did not come back for ten seconds. A
 * worker that does not answer keeps its ring, and the others' go; the next start looks again.
 */
#include <jansson.h>
#include <pcap/bpf.h>
#include <stdlib.h>
#include <string.h>

#include "hex.h"
#include "request_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define RING_BYTES   (4u << 20) /* of each worker, about */
#define FILTER_MAX   4096u
#define SNAP_MAX     9216u
#define PAGE_PACKETS 128u

struct request_capture {
	uint32_t id; /* of the one that runs; 0: none */
	uint32_t last_id;
	struct bpf_insn *filter;                   /* there as long as a ring is */
	struct nat_capture *ring[NAT_WORKERS_MAX]; /* NULL: the worker has none */
};

struct request_capture *request_capture_open(void)
{
	return calloc(1, sizeof(struct request_capture));
}

static void drop_ring(struct request_capture *capture, uint32_t w)
{
	free(capture->ring[w]);
	capture->ring[w] = NULL;
}

/* True when no ring is left. */
static bool is_over(struct request_capture *capture)
{
	for (uint32_t w = 0; w < NAT_WORKERS_MAX; w++)
		if (capture->ring[w])
			return false;
	free(capture->filter);
	capture->filter = NULL;
	capture->id = 0;
	return true;
}

void request_capture_close(struct request_capture *capture)
{
	if (!capture)
		return;
	for (uint32_t w = 0; w < NAT_WORKERS_MAX; w++)
		drop_ring(capture, w);
	(void)is_over(capture);
	free(capture);
}

static bool wants(void *context, const uint8_t *packet, uint32_t bytes, uint32_t kept_bytes)
{
	return bpf_filter(context, packet, bytes, kept_bytes) != 0;
}

struct attachment {
	struct nat_capture *ring;
	uint64_t now_ns;
};

static void attach(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct attachment *a = argument;

	nat_engine_tick(e, now_ns); /* the capture's patience counts from now */
	nat_engine_capture(e, a->ring);
	a->now_ns = now_ns;
}

/* False: a worker did not answer; it may still write, and its ring stays. */
static bool end_capture(struct request_context *c)
{
	struct request_capture *capture = c->ops->capture;
	struct attachment none = {0};

	for (uint32_t w = 0; w < NAT_WORKERS_MAX; w++)
		if (capture->ring[w] && request_on_worker(c, w, attach, &none))
			drop_ring(capture, w);
	return is_over(capture);
}

/* ---- start ---- */

/* [code, jt, jf, k]. libpcap's own check takes jumps that go backwards by overflow, and with them loops. */
static bool read_instruction(const json_t *one, size_t left, struct bpf_insn *out)
{
	static const json_int_t most[4] = {UINT16_MAX, UINT8_MAX, UINT8_MAX, UINT32_MAX};
	json_int_t field[4];

	for (size_t k = 0; k < 4; k++) {
		const json_t *value = json_array_get(one, k);

		field[k] = json_is_integer(value) ? json_integer_value(value) : -1;
		if (field[k] < 0 || field[k] > most[k])
			return false;
	}
	*out = (struct bpf_insn){(u_short)field[0], (u_char)field[1], (u_char)field[2],
				 (bpf_u_int32)field[3]};
	return json_array_size(one) == 4 && (out->code != (BPF_JMP | BPF_JA) || out->k < left);
}

static bool read_filter(struct request_context *c, const json_t *list, struct bpf_insn **out)
{
	const size_t n = json_array_size(list);
	struct bpf_insn *filter = n > 0 && n <= FILTER_MAX ? calloc(n, sizeof(*filter)) : NULL;
	bool good = filter != NULL;

	if (!list)
		return true;
	for (size_t i = 0; good && i < n; i++)
		good = read_instruction(json_array_get(list, i), n - i - 1, &filter[i]);
	if (good && bpf_validate(filter, (int)n)) {
		*out = filter;
		return true;
	}
	free(filter);
	request_refuse(c, "\"filter\" must be a BPF program: a list of [code, jt, jf, k], at most %u",
		       FILTER_MAX);
	return false;
}

static bool read_reasons(struct request_context *c, const json_t *list, struct nat_capture_params *params)
{
	size_t i;
	json_t *one;

	if (!list)
		return true;
	params->by_reason = true;
	json_array_foreach((json_t *)(uintptr_t)list, i, one)
	{
		const char *name = json_string_value(one);
		uint32_t r = NAT_REASON_OK + 1;

		while (name && r < NAT_REASON_COUNT && strcmp(name, nat_reason_name((enum nat_reason)r)) != 0)
			r++;
		if (!name || r == NAT_REASON_COUNT) {
			request_refuse(c, "there is no reason \"%.30s\"; see dsnatctl show counters",
				       name ? name : "");
			return false;
		}
		if (r >= NAT_REASON_NOT_IPV4) {
			request_refuse(
				c, "packets that are dropped for %s are not seen by the engine, only counted",
				name);
			return false;
		}
		params->reason[r] = true;
	}
	return true;
}

static bool make_ring(struct nat_capture **ring, const struct nat_capture_params *params)
{
	void *memory = aligned_alloc(64, (nat_capture_size(params) + 63) & ~(size_t)63);

	if (memory)
		*ring = nat_capture_init(memory, params);
	return memory != NULL;
}

/* Somebody's who has gone, or what a start left with a worker that did not answer. */
static bool end_orphan(struct request_context *c)
{
	struct request_capture *capture = c->ops->capture;

	for (uint32_t w = 0; w < NAT_WORKERS_MAX; w++)
		if (capture->ring[w] && nat_capture_look(capture->ring[w]).left)
			drop_ring(capture, w);
	if (is_over(capture))
		return true;
	if (capture->id == 0)
		return end_capture(c);
	request_refuse(c, "somebody else captures; try again when that has ended");
	return false;
}

static json_t *fail(struct request_context *c)
{
	char why[sizeof(c->why)];

	memcpy(why, c->why, sizeof(why));
	(void)end_capture(c);
	memcpy(c->why, why, sizeof(why));
	return NULL;
}

static json_t *start(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "start", "filter", "reasons", "sample", "snap"};
	struct request_capture *capture = c->ops->capture;
	struct nat_capture_params params = {.snap_bytes = SNAP_MAX, .sample = 1, .n_slots = 64};
	struct attachment a = {0};

	if (!request_only_keys(c, keys, COUNT(keys)) ||
	    !request_read_count(c, "sample", 1000000000, &params.sample) ||
	    !request_read_count(c, "snap", SNAP_MAX, &params.snap_bytes) ||
	    !read_reasons(c, json_object_get(c->request, "reasons"), &params) || !end_orphan(c) ||
	    !read_filter(c, json_object_get(c->request, "filter"), &capture->filter))
		return NULL;
	params.wants = capture->filter ? wants : NULL;
	params.context = capture->filter;
	while (params.n_slots * 2 * (2 * params.snap_bytes + 64) <= RING_BYTES)
		params.n_slots *= 2;
	for (uint32_t w = 0; w < c->ops->n_workers; w++) {
		if (!make_ring(&a.ring, &params)) {
			request_refuse(c, "no memory to capture; free some");
			return fail(c);
		}
		if (!request_on_worker(c, w, attach, &a)) {
			free(a.ring);
			return fail(c);
		}
		capture->ring[w] = a.ring;
	}
	capture->id = ++capture->last_id;
	return json_pack("{s:o, s:o}", "id", request_number(capture->id), "now_ns", request_number(a.now_ns));
}

/* ---- packets ---- */

static json_t *packet_json(const struct nat_captured *p, const struct nat_config *nat, uint32_t worker)
{
	static const char *const verdicts[] = {"forward", "pass", "drop", "hold", "hand over"};
	json_t *one = json_pack("{s:o, s:o, s:s, s:s, s:b}", "t_ns", request_number(p->now_ns), "worker",
				request_number(worker), "verdict", verdicts[p->verdict], "reason",
				nat_reason_name((enum nat_reason)p->reason), "made", p->made);

	if (p->before_bytes)
		json_object_set_new(
			one, "before",
			json_pack("{s:s, s:o, s:o}", "if",
				  p->iface < nat->n_interfaces ? nat->interfaces[p->iface].name : "", "bytes",
				  request_number(p->before_bytes), "pkt",
				  hex_json(p->bytes, p->before_kept)));
	if (p->after_bytes)
		json_object_set_new(
			one, "after",
			json_pack("{s:s, s:o, s:o}", "if",
				  p->out_iface < nat->n_interfaces ? nat->interfaces[p->out_iface].name : "",
				  "bytes", request_number(p->after_bytes), "pkt",
				  hex_json(p->bytes + p->before_kept, p->after_kept)));
	return one;
}

static json_t *take(struct request_context *c, bool stop)
{
	struct request_capture *capture = c->ops->capture;
	const struct nat_config *nat = &c->ops->config(c->ops->context)->nat;
	struct nat_capture_figures sum = {0};
	json_t *packets = json_array();
	uint32_t n = 0;

	for (uint32_t w = 0; w < NAT_WORKERS_MAX; w++) {
		if (!capture->ring[w])
			continue; /* it has let go while another did not answer */
		const struct nat_capture_figures one = nat_capture_look(capture->ring[w]);
		const struct nat_captured *p;

		nat_capture_visit(capture->ring[w]);
		sum.seen += one.seen;
		sum.matched += one.matched;
		sum.lost += one.lost;
		sum.left |= one.left;
		while (n < PAGE_PACKETS && (p = nat_capture_peek(capture->ring[w]))) {
			json_array_append_new(packets, packet_json(p, nat, w));
			nat_capture_release(capture->ring[w]);
			n++;
		}
	}
	if (stop && !end_capture(c)) {
		json_decref(packets);
		return NULL;
	}
	return json_pack("{s:o, s:o, s:o, s:o, s:b}", "packets", packets, "seen", request_number(sum.seen),
			 "matched", request_number(sum.matched), "lost", request_number(sum.lost), "ended",
			 stop || sum.left);
}

json_t *request_capture(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "id", "stop"};
	bool starts = false, stop = false;
	uint32_t id = 0;

	if (!c->ops->capture)
		return request_refuse(c, "this program cannot capture");
	if (!request_read_flag(c, "start", &starts))
		return NULL;
	if (starts)
		return start(c);
	if (!request_only_keys(c, keys, COUNT(keys)) || !request_read_flag(c, "stop", &stop) ||
	    !request_read_count(c, "id", INT32_MAX, &id))
		return NULL;
	if (id == 0 && !stop)
		return json_pack("{s:b}", "running", c->ops->capture->id != 0);
	if (id == 0 || id != c->ops->capture->id)
		return request_refuse(c, "this capture has ended; start one with {\"start\":true}");
	return take(c, stop);
}
