/* capture: one client at a time looks at packets before and after translation.
 *
 *	{"cmd":"capture","start":true,"filter":[[40,0,0,12],...],"reasons":["no_port"],"sample":10,"snap":256}  ->  {"id":7,"now_ns":...}
 *	{"cmd":"capture","id":7}                the packets since, at most a page of them, and the figures
 *	{"cmd":"capture","id":7,"stop":true}
 *	{"cmd":"capture"}                       is one running?
 *
 * `filter` is a classic BPF program over the IPv4 packet. The client has compiled it: libpcap's compiler asks name servers, which the
 * control thread must not wait for. Here it is only checked (bpf_validate) and run, by the workers.
 *
 * Each worker has a ring of its own (core/capture.c). A client that does not come back is left after ten seconds, and its memory is
 * given back by the next start.
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
	struct bpf_insn *filter;
	struct nat_capture *ring[NAT_WORKERS_MAX];
	uint32_t n_workers;
};

struct request_capture *request_capture_open(void)
{
	return calloc(1, sizeof(struct request_capture));
}

static void let_go(struct request_capture *capture)
{
	for (uint32_t w = 0; w < capture->n_workers; w++)
		free(capture->ring[w]);
	memset(capture->ring, 0, sizeof(capture->ring));
	free(capture->filter);
	capture->filter = NULL;
	capture->n_workers = 0;
	capture->id = 0;
}

void request_capture_close(struct request_capture *capture)
{
	if (capture)
		let_go(capture);
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

static bool end_capture(struct request_context *c)
{
	struct request_capture *capture = c->ops->capture;
	struct attachment none = {0};

	for (uint32_t w = 0; w < capture->n_workers; w++)
		if (!request_on_worker(c, w, attach, &none))
			return false; /* it may still write: the ring must stay */
	let_go(capture);
	return true;
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

static bool make_rings(struct request_capture *capture, const struct nat_capture_params *params, uint32_t n)
{
	const size_t bytes = (nat_capture_size(params) + 63) & ~(size_t)63;

	for (uint32_t w = 0; w < n; w++) {
		void *memory = aligned_alloc(64, bytes);

		capture->n_workers = w + 1;
		if (!memory)
			return false;
		capture->ring[w] = nat_capture_init(memory, params);
	}
	return true;
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
	    !read_reasons(c, json_object_get(c->request, "reasons"), &params))
		return NULL;
	for (uint32_t w = 0; w < capture->n_workers; w++)
		if (!nat_capture_look(capture->ring[w]).left)
			return request_refuse(c, "somebody else captures; try again when that has ended");
	let_go(capture);
	if (!read_filter(c, json_object_get(c->request, "filter"), &capture->filter))
		return NULL;
	params.wants = capture->filter ? wants : NULL;
	params.context = capture->filter;
	while (params.n_slots * 2 * (2 * params.snap_bytes + 64) <= RING_BYTES)
		params.n_slots *= 2;
	if (!make_rings(capture, &params, c->ops->n_workers)) {
		let_go(capture);
		return request_refuse(c, "no memory to capture; free some");
	}
	for (uint32_t w = 0; w < capture->n_workers; w++) {
		a.ring = capture->ring[w];
		if (!request_on_worker(c, w, attach, &a)) {
			char why[sizeof(c->why)];

			memcpy(why, c->why, sizeof(why));
			(void)end_capture(c);
			memcpy(c->why, why, sizeof(why));
			return NULL;
		}
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

	for (uint32_t w = 0; w < capture->n_workers; w++) {
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
