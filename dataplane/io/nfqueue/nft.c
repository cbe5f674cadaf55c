/* Which packets the kernel asks us about. One table, ours alone:
 *
 *     prerouting, before defragmentation and conntrack (-450)
 *         from dsnat0                          translated already: let it be
 *         from a twin                          the engine has passed it to the kernel: let it be
 *         to a pool address                    queue: a reply, or one inside host to another (hairpin)
 *         from outside to a zone's source      queue: nothing but answers to `pass` zones may go there
 *         from outside, sent by a pool address queue: a route loop or a lie, dropped and counted there
 *         from inside, to be routed outside    no conntrack: it is to be translated below
 *     postrouting (srcnat, 100)
 *         from inside to outside               queue: a request, routed, TTL and MTU seen to by the kernel
 *
 * Everything else is untouched. "inside" and "outside" are roles of the configuration; the inside ones here
 * are those that the kernel keeps, the outside ones also twins of DPDK ports. Replies are taken before the
 * route look-up because a pool address is on no interface, requests after it because their destination is
 * final. Both are notrack, so fragments are not put together and conntrack has no entry to confirm.
 *
 * It fails closed: a queue without a listener drops, and the rule behind the queue rule drops too. The table
 * is made in one transaction, and the queue rule is what is added to it last where the kernel has no
 * nft_queue: there the rule is iptables' NFQUEUE, which nft has no words for, so it is sent as bytes.
 *
 * Somebody else's `nft flush ruleset` is seen as it happens: the kernel tells every member of the nftables
 * group what was changed, then by whom.
 */
#include "nft.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <libmnl/libmnl.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nf_tables_compat.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/xt_NFQUEUE.h>
#include <nftables/libnftables.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "queue.h"
#include "tun.h"

#define TABLE "dsnat"
#define CHAIN "to_engine"

/* ---- text ---- */

static void put_elements(FILE *to, bool *any, uint32_t first, uint32_t last)
{
	struct in_addr a = {htonl(first)}, b = {htonl(last)};
	char left[INET_ADDRSTRLEN], right[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &a, left, sizeof left);
	inet_ntop(AF_INET, &b, right, sizeof right);
	fprintf(to, "%s%s", *any ? ", " : "", left);
	if (first != last)
		fprintf(to, "-%s", right);
	*any = true;
}

static void put_pools(FILE *to, const struct nat_config *config)
{
	bool any = false;

	for (uint32_t i = 0; i < config->n_pools; i++)
		for (uint32_t k = 0; k < config->pools[i].n_ranges; k++)
			put_elements(to, &any, config->pools[i].ranges[k].first,
				     config->pools[i].ranges[k].last);
}

static void put_zones(FILE *to, const struct nat_config *config)
{
	bool any = false;

	for (uint32_t i = 0; i < config->n_zones; i++) {
		const struct nat_prefix *source = &config->zones[i].source;
		uint32_t rest =
			source->length_bits ? UINT32_MAX >> 1 >> (source->length_bits - 1) : UINT32_MAX;

		put_elements(to, &any, source->address & ~rest, source->address | rest);
	}
}

enum which { KERNEL_INSIDE, KERNEL_OUTSIDE, ANY_OUTSIDE, TWINS };

static bool is_one(const struct nat_interface_config *i, enum which which)
{
	switch (which) {
	case KERNEL_INSIDE:
		return i->path == NAT_PATH_NFQUEUE && i->role == NAT_ROLE_INSIDE;
	case KERNEL_OUTSIDE:
		return i->path == NAT_PATH_NFQUEUE && i->role == NAT_ROLE_OUTSIDE;
	case ANY_OUTSIDE:
		return i->role == NAT_ROLE_OUTSIDE;
	case TWINS:
		return i->path == NAT_PATH_DPDK;
	}
	return false;
}

static void put_interfaces(FILE *to, const struct nat_config *config, const char *set, enum which which)
{
	bool any = false;

	fprintf(to, "  set %s { type ifname;", set);
	for (uint32_t i = 0; i < config->n_interfaces; i++)
		if (is_one(&config->interfaces[i], which)) {
			fprintf(to, "%s\"%s\"", any ? ", " : " elements = { ", config->interfaces[i].name);
			any = true;
		}
	fputs(any ? " }; }\n" : " }\n", to);
}

static void put_set(FILE *to, const struct nat_config *config, const char *set,
		    void (*put)(FILE *to, const struct nat_config *config))
{
	fprintf(to, "  set %s { type ipv4_addr; flags interval; auto-merge; elements = { ", set);
	put(to, config);
	fputs(" }; }\n", to);
}

/* nft takes no empty list of elements. */
static bool has_ranges(const struct nat_config *config)
{
	for (uint32_t i = 0; i < config->n_pools; i++)
		if (config->pools[i].n_ranges)
			return true;
	return false;
}

static void put_table(FILE *to, const struct nat_config *config, bool with_queue)
{
	fputs("add table ip " TABLE "\ndelete table ip " TABLE "\ntable ip " TABLE " {\n", to);
	if (has_ranges(config))
		put_set(to, config, "pools", put_pools);
	else
		fputs("  set pools { type ipv4_addr; flags interval; auto-merge; }\n", to);
	if (config->n_zones)
		put_set(to, config, "zones", put_zones);
	else
		fputs("  set zones { type ipv4_addr; flags interval; auto-merge; }\n", to);
	put_interfaces(to, config, "inside", KERNEL_INSIDE);
	put_interfaces(to, config, "kernel_outside", KERNEL_OUTSIDE);
	put_interfaces(to, config, "outside", ANY_OUTSIDE);
	put_interfaces(to, config, "twins", TWINS);
	fputs("  chain " CHAIN " {\n", to);
	if (with_queue && config->n_workers == 1)
		fprintf(to, "    queue num %u\n", QUEUE_FIRST);
	else if (with_queue)
		fprintf(to, "    queue num %u-%u\n", QUEUE_FIRST, QUEUE_FIRST + config->n_workers - 1);
	fputs("    counter drop comment \"no queue: nothing leaves untranslated\"\n  }\n"
	      "  chain replies {\n"
	      "    type filter hook prerouting priority -450; policy accept;\n"
	      "    iifname \"" TUN_NAME "\" notrack accept\n"
	      "    iifname @twins accept\n"
	      "    ip daddr @pools notrack goto " CHAIN "\n"
	      "    iifname @kernel_outside ip daddr @zones notrack goto " CHAIN "\n"
	      "    iifname @kernel_outside ip saddr @pools notrack goto " CHAIN "\n",
	      to);
	/* one rule each: a set of names does not compare with what fib says */
	for (uint32_t i = 0; i < config->n_interfaces; i++)
		if (is_one(&config->interfaces[i], ANY_OUTSIDE))
			fprintf(to, "    iifname @inside fib daddr oifname \"%s\" notrack\n",
				config->interfaces[i].name);
	fputs("  }\n"
	      "  chain requests {\n"
	      "    type filter hook postrouting priority srcnat; policy accept;\n"
	      "    iifname @inside oifname @outside goto " CHAIN "\n"
	      "  }\n"
	      "}\n",
	      to);
}

/* ---- to the kernel ---- */

/* Runs `text`, which it frees. */
static int run(char *text, char *why, size_t why_bytes)
{
	struct nft_ctx *nft = text ? nft_ctx_new(NFT_CTX_DEFAULT) : NULL;
	int status;

	if (!nft) {
		snprintf(why, why_bytes, "libnftables does not start");
		free(text);
		return -1;
	}
	nft_ctx_buffer_error(nft);
	nft_ctx_buffer_output(nft);
	status = nft_run_cmd_from_buffer(nft, text);
	if (status) {
		const char *error = nft_ctx_get_error_buffer(nft);

		snprintf(why, why_bytes, "%.*s", (int)strcspn(error, "\n"), error);
	}
	nft_ctx_free(nft);
	free(text);
	return status ? -1 : 0;
}

static char *table_text(const struct nat_config *config, bool with_queue)
{
	char *text = NULL;
	size_t bytes;
	FILE *to = open_memstream(&text, &bytes);

	if (!to)
		return NULL;
	put_table(to, config, with_queue);
	return fclose(to) ? NULL : text;
}

static struct nlmsghdr *batch_mark(char *at, uint16_t type)
{
	struct nlmsghdr *message = mnl_nlmsg_put_header(at);
	struct nfgenmsg *info = mnl_nlmsg_put_extra_header(message, sizeof *info);

	message->nlmsg_type = type;
	message->nlmsg_flags = NLM_F_REQUEST;
	info->nfgen_family = AF_UNSPEC;
	info->res_id = htons(NFNL_SUBSYS_NFTABLES);
	return message;
}

/* The rule "-j NFQUEUE --queue-balance N:M" in front of the chain's drop. */
static struct nlmsghdr *xtables_rule(char *at, uint16_t n_queues)
{
	const struct xt_NFQ_info_v3 target = {.queuenum = QUEUE_FIRST, .queues_total = n_queues};
	char padded[8] = {0}; /* xtables rounds sizes up to 8 */
	struct nlmsghdr *message = mnl_nlmsg_put_header(at);
	struct nfgenmsg *info = mnl_nlmsg_put_extra_header(message, sizeof *info);
	struct nlattr *expressions, *expression, *data;

	_Static_assert(sizeof target <= sizeof padded, "one word");
	memcpy(padded, &target, sizeof target);
	message->nlmsg_type = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE;
	message->nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK; /* without NLM_F_APPEND: first */
	message->nlmsg_seq = 1;
	info->nfgen_family = NFPROTO_IPV4;
	mnl_attr_put_strz(message, NFTA_RULE_TABLE, TABLE);
	mnl_attr_put_strz(message, NFTA_RULE_CHAIN, CHAIN);
	expressions = mnl_attr_nest_start(message, NFTA_RULE_EXPRESSIONS);
	expression = mnl_attr_nest_start(message, NFTA_LIST_ELEM);
	mnl_attr_put_strz(message, NFTA_EXPR_NAME, "target");
	data = mnl_attr_nest_start(message, NFTA_EXPR_DATA);
	mnl_attr_put_strz(message, NFTA_TARGET_NAME, "NFQUEUE");
	mnl_attr_put_u32(message, NFTA_TARGET_REV, htonl(3));
	mnl_attr_put(message, NFTA_TARGET_INFO, sizeof padded, padded);
	mnl_attr_nest_end(message, data);
	mnl_attr_nest_end(message, expression);
	mnl_attr_nest_end(message, expressions);
	return message;
}

static int add_xtables_rule(uint16_t n_queues)
{
	char buffer[4096];
	struct mnl_socket *s = mnl_socket_open2(NETLINK_NETFILTER, SOCK_CLOEXEC);
	size_t bytes = 0;
	ssize_t n;
	int status = 0;

	if (!s || mnl_socket_bind(s, 0, MNL_SOCKET_AUTOPID))
		status = -errno;
	if (!status) {
		bytes += batch_mark(buffer, NFNL_MSG_BATCH_BEGIN)->nlmsg_len;
		bytes += xtables_rule(buffer + bytes, n_queues)->nlmsg_len;
		bytes += batch_mark(buffer + bytes, NFNL_MSG_BATCH_END)->nlmsg_len;
		if (mnl_socket_sendto(s, buffer, bytes) < 0)
			status = -errno;
	}
	if (!status) {
		n = mnl_socket_recvfrom(s, buffer, sizeof buffer);
		if (n < 0 || mnl_cb_run(buffer, (size_t)n, 0, mnl_socket_get_portid(s), NULL, NULL) < 0)
			status = -errno;
	}
	if (s)
		mnl_socket_close(s);
	return status;
}

int nft_install(const struct nat_config *config, char *why, size_t why_bytes)
{
	char first[256], second[256];
	int status;

	if (!run(table_text(config, true), first, sizeof first))
		return 0;
	/* no nft_queue, then; or something else is missing, and this fails as well */
	if (run(table_text(config, false), second, sizeof second)) {
		snprintf(why, why_bytes, "the queue path's nftables table cannot be made: %s", second);
		return -1;
	}
	status = add_xtables_rule((uint16_t)config->n_workers);
	if (!status)
		return 0;
	snprintf(why, why_bytes,
		 "this kernel queues packets neither by nftables (%s) nor by the NFQUEUE target (%s); load "
		 "nft_queue or nft_compat and xt_NFQUEUE",
		 first, strerror(-status));
	return -1;
}

int nft_update(const struct nat_config *config, char *why, size_t why_bytes)
{
	char *text = NULL, error[256];
	size_t bytes;
	FILE *to = open_memstream(&text, &bytes);

	if (to) {
		fputs("flush set ip " TABLE " pools\nflush set ip " TABLE " zones\n", to);
		if (has_ranges(config)) {
			fputs("add element ip " TABLE " pools { ", to);
			put_pools(to, config);
			fputs(" }\n", to);
		}
		if (config->n_zones) {
			fputs("add element ip " TABLE " zones { ", to);
			put_zones(to, config);
			fputs(" }\n", to);
		}
		if (!fclose(to) && !run(text, error, sizeof error))
			return 0;
	}
	snprintf(why, why_bytes, "the queue path's nftables table cannot be changed: %s",
		 to ? error : "no memory");
	return -1;
}

bool nft_wanted(const struct nat_config *config)
{
	for (uint32_t i = 0; i < config->n_interfaces; i++)
		if (config->interfaces[i].path == NAT_PATH_NFQUEUE)
			return true;
	return false;
}

/* ---- who else changes it ---- */

struct change {
	struct nft_watch *watch;
	bool by_others;
	char *who;
	size_t who_bytes;
};

static bool is_ours(const struct nlattr *name)
{
	const char *text = mnl_attr_get_str(name);
	const size_t bytes = strlen(TABLE);

	return mnl_attr_get_payload_len(name) > bytes && !strncmp(text, TABLE, bytes) &&
	       (text[bytes] == '\0' || text[bytes] == '-');
}

/* mnl_attr_for_each() without its sign conversions. */
static bool attribute_is_in(const struct nlmsghdr *message, const struct nlattr *a)
{
	const char *tail = mnl_nlmsg_get_payload_tail(message);

	return mnl_attr_ok(a, (int)(tail - (const char *)a));
}

/* The name of the table stands in the first attribute of every kind of message but NEWGEN, which ends a
 * transaction and says who made it. */
static int on_change(const struct nlmsghdr *message, void *data)
{
	struct change *change = data;
	const struct nlattr *a;
	const char *name = "somebody";
	uint32_t pid = 0;
	bool end = (message->nlmsg_type & 0xff) == NFT_MSG_NEWGEN;

	for (a = mnl_nlmsg_get_payload_offset(message, sizeof(struct nfgenmsg)); attribute_is_in(message, a);
	     a = mnl_attr_next(a)) {
		if (!end && mnl_attr_get_type(a) == NFTA_TABLE_NAME)
			change->watch->touched |= is_ours(a);
		else if (end && mnl_attr_get_type(a) == NFTA_GEN_PROC_PID)
			pid = ntohl(mnl_attr_get_u32(a));
		else if (end && mnl_attr_get_type(a) == NFTA_GEN_PROC_NAME)
			name = mnl_attr_get_str(a);
	}
	if (!end)
		return MNL_CB_OK;
	if (!change->watch->own_pid) { /* the answer to what nft_watch_open() asked */
		change->watch->own_pid = pid;
	} else if (change->watch->touched && pid != change->watch->own_pid) {
		change->by_others = true;
		snprintf(change->who, change->who_bytes, "%s (process %" PRIu32 ")", name, pid);
	}
	change->watch->touched = false;
	return MNL_CB_OK;
}

static int watch_ask(struct nft_watch *w)
{
	_Alignas(8) char buffer[8192];
	struct nlmsghdr *message = mnl_nlmsg_put_header(buffer);
	struct change change = {.watch = w};
	ssize_t n;

	(void)mnl_nlmsg_put_extra_header(message, sizeof(struct nfgenmsg));
	message->nlmsg_type = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN;
	message->nlmsg_flags = NLM_F_REQUEST;
	if (mnl_socket_sendto(w->socket, message, message->nlmsg_len) < 0 ||
	    (n = mnl_socket_recvfrom(w->socket, buffer, sizeof buffer)) < 0 ||
	    mnl_cb_run(buffer, (size_t)n, 0, 0, on_change, &change) < 0)
		return -1;
	return 0;
}

int nft_watch_open(struct nft_watch *w)
{
	int group = NFNLGRP_NFTABLES, bytes = 4 << 20;

	*w = (struct nft_watch){.socket = mnl_socket_open2(NETLINK_NETFILTER, SOCK_CLOEXEC | SOCK_NONBLOCK)};
	if (!w->socket || mnl_socket_bind(w->socket, 0, MNL_SOCKET_AUTOPID) || watch_ask(w) ||
	    mnl_socket_setsockopt(w->socket, NETLINK_ADD_MEMBERSHIP, &group, sizeof group)) {
		nft_watch_close(w);
		return -1;
	}
	(void)setsockopt(mnl_socket_get_fd(w->socket), SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
	return mnl_socket_get_fd(w->socket);
}

void nft_watch_close(struct nft_watch *w)
{
	if (w->socket)
		mnl_socket_close(w->socket);
	w->socket = NULL;
}

bool nft_watch_serve(struct nft_watch *w, char *who, size_t who_bytes)
{
	_Alignas(8) char buffer[65536];
	struct change change = {.watch = w, .who = who, .who_bytes = who_bytes};

	for (;;) {
		ssize_t n = mnl_socket_recvfrom(w->socket, buffer, sizeof buffer);

		if (n < 0 && errno == ENOBUFS) { /* too much to be told: assume the worst */
			change.by_others = true;
			snprintf(who, who_bytes, "somebody who changed very much at once");
			continue;
		}
		if (n < 0)
			return change.by_others;
		(void)mnl_cb_run(buffer, (size_t)n, 0, 0, on_change, &change);
	}
}
