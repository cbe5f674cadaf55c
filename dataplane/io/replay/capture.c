/* --read and --write: captures in, captures out.
 *
 * Packets of all inputs are taken in the order of their time stamps; of equal ones the interface given first
 * goes first. A stamp earlier than one before (a capture out of order) is taken as that one, for time does
 * not run backwards. Link headers are removed (Ethernet with VLAN tags, Linux cooked, raw IP); frames that
 * are not IPv4 count as passed to the kernel. Output is raw IP, stamped with the time at which the engine let
 * the packet go, and ends in a summary: the counters, as the control socket shows them.
 */
#include <jansson.h>
#include <pcap/pcap.h>
#include <stdlib.h>
#include <string.h>

#include "replay.h"

struct input {
	pcap_t *pcap;
	const char *path;
	uint8_t iface;
	int link;
	struct pcap_pkthdr *header; /* of the packet that is next; NULL at the end */
	const u_char *data;
	uint64_t t_ns;
};

struct output {
	pcap_t *pcap;
	pcap_dumper_t *dumper;
	const char *path;
};

struct capture {
	struct bench *bench;
	struct input *in;
	int n_in;
	struct output out[NAT_INTERFACES_MAX];
};

static int fail(const char *path, const char *what)
{
	fprintf(stderr, "dsnat-replay: %s: %s; check the file\n", path, what);
	return 1;
}

/* "inside0=FILE" */
static int split(const struct bench *bench, const char *text, const char **path)
{
	const struct nat_config *config = bench_config(bench);
	const char *equals = strchr(text, '=');

	for (uint32_t i = 0; equals && i < config->n_interfaces; i++) {
		size_t length = strlen(config->interfaces[i].name);

		if ((size_t)(equals - text) == length && !memcmp(text, config->interfaces[i].name, length)) {
			*path = equals + 1;
			return (int)i;
		}
	}
	fprintf(stderr,
		"dsnat-replay: %s does not begin with an interface of the configuration; write IFACE=FILE\n",
		text);
	return -1;
}

/* ---- input ---- */

/* 1: there is a packet, 0: the end, -1: broken (reported). */
static int advance(struct input *in)
{
	int got = pcap_next_ex(in->pcap, &in->header, &in->data);

	if (got == 1) {
		/* opened with nanosecond precision: tv_usec holds nanoseconds */
		in->t_ns = (uint64_t)in->header->ts.tv_sec * 1000000000u + (uint64_t)in->header->ts.tv_usec;
		return 1;
	}
	in->header = NULL;
	if (got == PCAP_ERROR_BREAK)
		return 0;
	fail(in->path, pcap_geterr(in->pcap));
	return -1;
}

static bool open_input(struct capture *c, const char *text)
{
	struct input *in = &c->in[c->n_in];
	char why[PCAP_ERRBUF_SIZE];
	int iface = split(c->bench, text, &in->path);

	if (iface < 0)
		return false;
	in->iface = (uint8_t)iface;
	in->pcap = pcap_open_offline_with_tstamp_precision(in->path, PCAP_TSTAMP_PRECISION_NANO, why);
	if (!in->pcap) {
		fprintf(stderr, "dsnat-replay: the capture cannot be opened: %s\n", why);
		return false;
	}
	c->n_in++;
	in->link = pcap_datalink(in->pcap);
	switch (in->link) {
	case DLT_EN10MB:
	case DLT_RAW:
	case DLT_IPV4:
	case DLT_LINUX_SLL:
		return advance(in) >= 0;
	default:
		fail(in->path, "its link type is neither Ethernet, Linux cooked nor raw IP");
		return false;
	}
}

static uint32_t ether_type(const u_char *at)
{
	return (uint32_t)at[0] << 8 | at[1];
}

/* Bytes of link header before the IPv4 header; -1: not IPv4. */
static int link_bytes(const struct input *in)
{
	uint32_t length = in->header->caplen, at = 12;

	switch (in->link) {
	case DLT_EN10MB:
		while (at + 2 <= length &&
		       (ether_type(in->data + at) == 0x8100 || ether_type(in->data + at) == 0x88a8))
			at += 4;
		return at + 2 <= length && ether_type(in->data + at) == 0x0800 ? (int)at + 2 : -1;
	case DLT_LINUX_SLL:
		return length >= 16 && ether_type(in->data + 14) == 0x0800 ? 16 : -1;
	default:
		return 0;
	}
}

static struct input *earliest(const struct capture *c)
{
	struct input *first = NULL;

	for (int i = 0; i < c->n_in; i++)
		if (c->in[i].header && (!first || c->in[i].t_ns < first->t_ns))
			first = &c->in[i];
	return first;
}

/* ---- output ---- */

static bool open_output(struct capture *c, const char *text)
{
	const char *path;
	int iface = split(c->bench, text, &path);
	struct output *out;

	if (iface < 0)
		return false;
	out = &c->out[iface];
	if (out->pcap) {
		fprintf(stderr, "dsnat-replay: %s: this interface is written already; give it one file\n",
			text);
		return false;
	}
	out->path = path;
	out->pcap = pcap_open_dead_with_tstamp_precision(DLT_RAW, 65535, PCAP_TSTAMP_PRECISION_NANO);
	out->dumper = out->pcap ? pcap_dump_open(out->pcap, path) : NULL;
	if (!out->dumper) {
		fail(path, out->pcap ? pcap_geterr(out->pcap) : "no memory");
		return false;
	}
	return true;
}

static void write_out(struct capture *c, const struct outcome *outcome)
{
	uint64_t now_ns = bench_now_ns(c->bench);

	for (uint32_t i = 0; i < outcome->n_out; i++) {
		const struct result *one = &outcome->out[i];
		struct pcap_pkthdr header = {.caplen = one->len_bytes, .len = one->len_bytes};

		if (!c->out[one->iface].dumper)
			continue;
		header.ts.tv_sec = (time_t)(now_ns / 1000000000u);
		header.ts.tv_usec = (suseconds_t)(now_ns % 1000000000u);
		pcap_dump((u_char *)c->out[one->iface].dumper, &header, one->bytes);
	}
}

static bool close_output(struct output *out)
{
	bool good = true;

	if (out->dumper) {
		good = pcap_dump_flush(out->dumper) == 0;
		if (!good)
			fail(out->path, "it could not be written to the end");
		pcap_dump_close(out->dumper);
	}
	if (out->pcap)
		pcap_close(out->pcap);
	return good;
}

/* ---- all of it ---- */

static int replay(struct capture *c)
{
	struct input *in;

	while ((in = earliest(c))) {
		int skip = link_bytes(in);

		if (skip < 0)
			bench_bypass(c->bench);
		else
			write_out(c, bench_packet(c->bench, in->t_ns, in->iface, 0, -1, in->data + skip,
						  in->header->caplen - (uint32_t)skip));
		if (advance(in) < 0)
			return 1;
	}
	return 0;
}

static int summarise(struct capture *c, FILE *summary)
{
	json_t *request = json_pack("{s:s, s:s}", "cmd", "show", "what", "counters");
	json_t *answer = request_answer_json(bench_ops(c->bench), request);
	int status = json_is_true(json_object_get(answer, "equation")) ? 0 : 1;

	json_dumpf(answer, summary, JSON_COMPACT);
	fputc('\n', summary);
	if (status)
		fputs("dsnat-replay: the accounting equation does not hold; this is a fault of the engine\n",
		      stderr);
	json_decref(answer);
	json_decref(request);
	return status;
}

int capture_run(struct bench *bench, const char *const *read, int n_read, const char *const *write,
		int n_write, FILE *summary)
{
	struct capture c = {.bench = bench, .in = calloc((size_t)n_read, sizeof(struct input))};
	int status = c.in ? 0 : 1;

	for (int i = 0; i < n_read && !status; i++)
		status = open_input(&c, read[i]) ? 0 : 1;
	for (int i = 0; i < n_write && !status; i++)
		status = open_output(&c, write[i]) ? 0 : 1;
	if (!status)
		status = replay(&c);
	if (!status)
		status = summarise(&c, summary);
	for (int i = 0; i < c.n_in; i++)
		pcap_close(c.in[i].pcap);
	for (size_t i = 0; i < NAT_INTERFACES_MAX; i++)
		if (!close_output(&c.out[i]))
			status = 1;
	free(c.in);
	return status;
}
