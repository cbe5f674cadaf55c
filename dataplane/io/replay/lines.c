/* --stdio: one JSON object in, one out, line by line.
 *
 *	{"t_ns":5,"if":"inside0","pkt":"45..."}       a packet; also "flags":["csum_partial"], "worker":0
 *	{"t_ns":9}                                    only the clock moves
 *	{"addresses":{"outside0":["198.51.100.2"]}}   from now on the gateway's own addresses there
 *	{"ctl":{"cmd":"show","what":"pools"}}         a request of the control socket
 *
 *	{"verdict":"forward","reason":"ok","out":[{"if":"outside0","pkt":"45...","origin":"packet"}]}
 *
 * "out" also holds what the engine made ("origin":"engine") and held packets that it now lets go; held
 * packets that it now drops stand in "dropped", and what dsnatd would have written to its log in "log". A
 * line that cannot be read is answered with {"error":"..."} and changes nothing. Time never runs
 * backwards: an earlier t_ns is such an error.
 */
#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../ctl/hex.h"
#include "replay.h"

#define LINE_BYTES_MAX (1u << 20)

static json_t *error_json(const char *format, ...) __attribute__((format(printf, 1, 2)));
static json_t *error_json(const char *format, ...)
{
	char text[256];
	va_list args;
	json_t *value;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	value = json_string(text); /* NULL when a cut left half a character */
	return json_pack("{s:o}", "error", value ? value : json_string("the line cannot be read"));
}

/* ---- answers ---- */

static const char *verdict_word(uint8_t verdict)
{
	static const char *const words[] = {
		[NAT_FORWARD] = "forward", [NAT_PASS] = "pass", [NAT_DROP] = "drop", [NAT_HOLD] = "hold"};

	return words[verdict];
}

static void add_line(void *lines, const struct log_line *line)
{
	json_array_append_new(lines, json_string(line->text));
}

static void add_log(struct bench *bench, json_t *answer)
{
	json_t *lines = json_array();

	log_drain(bench_log(bench), bench_ops(bench), add_line, lines);
	if (json_array_size(lines))
		json_object_set_new(answer, "log", lines);
	else
		json_decref(lines);
}

static json_t *outcome_json(const struct bench *bench, const struct outcome *outcome, bool of_packet)
{
	const struct nat_interface_config *interfaces = bench_config(bench)->interfaces;
	json_t *answer = json_object(), *out = json_array(), *dropped = json_array();

	if (of_packet) {
		json_object_set_new(answer, "verdict", json_string(verdict_word(outcome->verdict)));
		json_object_set_new(answer, "reason",
				    json_string(nat_reason_name((enum nat_reason)outcome->reason)));
	}
	for (uint32_t i = 0; i < outcome->n_out; i++) {
		const struct result *one = &outcome->out[i];

		json_array_append_new(out, json_pack("{s:s, s:o, s:s}", "if", interfaces[one->iface].name,
						     "pkt", hex_json(one->bytes, one->len_bytes), "origin",
						     one->made ? "engine" : "packet"));
	}
	json_object_set_new(answer, "out", out);
	for (uint32_t i = 0; i < outcome->n_dropped; i++) {
		const struct result *one = &outcome->dropped[i];

		json_array_append_new(dropped,
				      json_pack("{s:s, s:o, s:s}", "if", interfaces[one->iface].name, "pkt",
						hex_json(one->bytes, one->len_bytes), "reason",
						nat_reason_name((enum nat_reason)one->reason)));
	}
	if (outcome->n_dropped)
		json_object_set_new(answer, "dropped", dropped);
	else
		json_decref(dropped);
	return answer;
}

/* ---- lines ---- */

static bool read_flags(const json_t *value, uint16_t *flags)
{
	static const struct {
		const char *name;
		uint16_t flag;
	} names[] = {{"ip_csum_good", NAT_PKT_IP_CSUM_GOOD},
		     {"csum_partial", NAT_PKT_CSUM_PARTIAL},
		     {"kernel_routes", NAT_PKT_KERNEL_ROUTES}};
	size_t i;
	json_t *one;

	if (!json_is_array(value))
		return false;
	json_array_foreach((json_t *)(uintptr_t)value, i, one)
	{
		const char *text = json_string_value(one);
		bool known = false;

		for (size_t j = 0; text && j < sizeof(names) / sizeof(names[0]); j++) {
			if (!strcmp(text, names[j].name)) {
				*flags |= names[j].flag;
				known = true;
			}
		}
		if (!known)
			return false;
	}
	return true;
}

static json_t *answer_packet(struct bench *bench, const json_t *line, uint64_t now_ns)
{
	const char *name = json_string_value(json_object_get(line, "if"));
	const json_t *pkt = json_object_get(line, "pkt"), *given_flags = json_object_get(line, "flags"),
		     *given_worker = json_object_get(line, "worker");
	int iface = name ? world_interface(bench_world(bench), name) : -1, worker = -1;
	size_t length = json_string_length(pkt);
	uint16_t flags = 0;
	uint8_t *bytes;
	json_t *answer;

	if (iface < 0)
		return error_json("\"if\" must name an interface of the configuration");
	if (!json_is_string(pkt) || length > 2 * REPLAY_PACKET_MAX)
		return error_json("\"pkt\" must be a packet in hexadecimal, at most %u bytes",
				  REPLAY_PACKET_MAX);
	if (given_flags && !read_flags(given_flags, &flags))
		return error_json("\"flags\" must be a list of ip_csum_good, csum_partial, kernel_routes");
	if (given_worker) {
		if (!json_is_integer(given_worker) || json_integer_value(given_worker) < 0 ||
		    json_integer_value(given_worker) >= NAT_WORKERS_MAX)
			return error_json("\"worker\" must be a worker's number");
		worker = (int)json_integer_value(given_worker);
	}
	bytes = malloc(length / 2 + 1);
	if (!bytes)
		abort();
	if (hex_read(json_string_value(pkt), length, bytes))
		answer = outcome_json(bench,
				      bench_packet(bench, now_ns, (uint8_t)iface, flags, worker, bytes,
						   (uint32_t)(length / 2)),
				      true);
	else
		answer = error_json("\"pkt\" is not hexadecimal");
	free(bytes);
	return answer;
}

/* Checked in full before anything changes. */
static json_t *answer_addresses(struct bench *bench, const json_t *interfaces)
{
	const char *name;
	json_t *list, *one;
	size_t i;

	if (!json_is_object(interfaces))
		return error_json("\"addresses\" must be an object of interfaces, each with a list");
	json_object_foreach((json_t *)(uintptr_t)interfaces, name, list)
	{
		if (world_interface(bench_world(bench), name) < 0 || !json_is_array(list))
			return error_json("\"addresses\" must be an object of interfaces, each with a list");
		world_clear_addresses(bench_world(bench), (uint8_t)world_interface(bench_world(bench), name));
		json_array_foreach(list, i, one)
		{
			char text[128];

			snprintf(text, sizeof(text), "%s=%s", name,
				 json_is_string(one) ? json_string_value(one) : "");
			if (!world_add_address(bench_world(bench), text))
				return error_json("\"addresses\" of %s holds what is not an IPv4 address",
						  name);
		}
	}
	bench_follow_addresses(bench);
	return NULL;
}

static const char *unknown_key(const json_t *line)
{
	static const char *const keys[] = {"t_ns", "if", "pkt", "flags", "worker", "addresses"};
	const char *key;
	json_t *value;

	json_object_foreach((json_t *)(uintptr_t)line, key, value)
	{
		size_t i = 0;

		while (i < sizeof(keys) / sizeof(keys[0]) && strcmp(key, keys[i]) != 0)
			i++;
		if (i == sizeof(keys) / sizeof(keys[0]))
			return key;
	}
	return NULL;
}

static json_t *answer_line(struct bench *bench, const json_t *line)
{
	const json_t *t_ns = json_object_get(line, "t_ns"), *ctl = json_object_get(line, "ctl"),
		     *addresses = json_object_get(line, "addresses");
	uint64_t now_ns = bench_now_ns(bench);
	json_t *error, *answer;

	if (!json_is_object(line))
		return error_json("a line must be a JSON object");
	if (ctl)
		return json_object_size(line) == 1 ? request_answer_json(bench_ops(bench), ctl)
						   : error_json("\"ctl\" must be the only key of its line");
	if (unknown_key(line))
		return error_json("unknown key \"%.40s\"", unknown_key(line));
	if (t_ns) {
		if (!json_is_integer(t_ns) || json_integer_value(t_ns) < 0)
			return error_json("\"t_ns\" must be a time in nanoseconds");
		if ((uint64_t)json_integer_value(t_ns) < now_ns)
			return error_json(
				"\"t_ns\" is earlier than a line before; time does not run backwards");
		now_ns = (uint64_t)json_integer_value(t_ns);
	}
	if (addresses) {
		error = answer_addresses(bench, addresses);
		if (error)
			return error;
	}
	if (json_object_get(line, "pkt") || json_object_get(line, "if"))
		answer = answer_packet(bench, line, now_ns);
	else
		answer = outcome_json(bench, bench_tick(bench, now_ns), false);
	add_log(bench, answer);
	return answer;
}

static json_t *answer_text(struct bench *bench, const char *text, size_t length)
{
	json_error_t why;
	json_t *line = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why), *answer;

	if (!line)
		return error_json("the line is not JSON: %.150s", why.text);
	answer = answer_line(bench, line);
	json_decref(line);
	return answer;
}

/* ---- standard input, and the control socket beside it ---- */

struct reader {
	int fd;
	struct socket_server *server; /* NULL: none */
	char *text;
	size_t used, room;
	bool skips; /* the rest of a line that was too long */
};

/* Waits for input, and serves the control socket meanwhile. */
static bool wait_input(const struct reader *r)
{
	struct pollfd fds[2] = {{.fd = r->fd, .events = POLLIN}, {.fd = -1, .events = POLLIN}};

	if (!r->server)
		return true;
	fds[1].fd = socket_fd(r->server);
	for (;;) {
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			return false;
		if (fds[1].revents)
			socket_serve(r->server);
		if (fds[0].revents)
			return true;
	}
}

/* More input behind r->used; false at the end. */
static bool fill(struct reader *r)
{
	ssize_t got;

	if (r->room - r->used < 65536) {
		char *larger = realloc(r->text, r->room + 65536);

		if (!larger)
			abort();
		r->text = larger;
		r->room += 65536;
	}
	do
		got = wait_input(r) ? read(r->fd, r->text + r->used, r->room - r->used) : 0;
	while (got < 0 && errno == EINTR);
	if (got <= 0)
		return false;
	r->used += (size_t)got;
	return true;
}

static bool write_answer(json_t *answer, FILE *out)
{
	bool good = json_dumpf(answer, out, JSON_COMPACT) == 0 && fputc('\n', out) != EOF && fflush(out) == 0;

	json_decref(answer);
	if (!good)
		fputs("dsnat-replay: an answer could not be written; is the reader gone?\n", stderr);
	return good;
}

/* Answers the whole lines in the buffer. At the end of input a line without newline is one too. */
static bool answer_all(struct bench *bench, struct reader *r, bool last, FILE *out)
{
	size_t start = 0;
	bool good = true;

	while (good && start < r->used) {
		char *end = memchr(r->text + start, '\n', r->used - start);
		size_t length = end ? (size_t)(end - r->text) - start : r->used - start;

		if (!end && !last && length <= LINE_BYTES_MAX)
			break;
		if (r->skips)
			r->skips = false;
		else if (length > LINE_BYTES_MAX)
			good = write_answer(error_json("the line is longer than %u bytes", LINE_BYTES_MAX),
					    out);
		else
			good = write_answer(answer_text(bench, r->text + start, length), out);
		r->skips |= !end;
		start += length + (end ? 1 : 0);
	}
	memmove(r->text, r->text + start, r->used - start);
	r->used -= start;
	return good;
}

int lines_run(struct bench *bench, struct socket_server *server, FILE *out)
{
	struct reader r = {.fd = STDIN_FILENO, .server = server};
	bool good = true;

	while (good && fill(&r))
		good = answer_all(bench, &r, false, out);
	if (good && r.used)
		good = answer_all(bench, &r, true, out);
	free(r.text);
	return good ? 0 : 1;
}
