/* A netfilter queue and its socket in the kernel. NFQA_CFG_F_GSO is not taken, so the kernel finishes
 * checksums and splits what segmentation offload joined before it asks us; NFQA_CFG_F_FAIL_OPEN is off: a
 * full queue drops.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <libmnl/libmnl.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <stdio.h>

#include "queue_internal.h"

#define QUEUE_LENGTH 8192u /* packets that the kernel keeps for us, beside held ones */
#define SOCKET_BYTES (32 << 20)

static int configure(struct queue *q, uint16_t attribute, const void *data, uint16_t bytes, const void *more,
		     uint16_t more_attribute)
{
	/* The copy mode comes last and lets packets in, which would stand before its acknowledgement. */
	const bool last = attribute == NFQA_CFG_PARAMS;
	char buffer[512];
	struct nlmsghdr *message = mnl_nlmsg_put_header(buffer);
	struct nfgenmsg *info = mnl_nlmsg_put_extra_header(message, sizeof *info);
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	const struct nlmsgerr *error;

	message->nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG;
	message->nlmsg_flags = last ? NLM_F_REQUEST : NLM_F_REQUEST | NLM_F_ACK;
	info->version = NFNETLINK_V0;
	info->res_id = htons((uint16_t)(QUEUE_FIRST + q->params.thread->index));
	mnl_attr_put(message, attribute, bytes, data);
	if (more)
		mnl_attr_put(message, more_attribute, 4, more);
	if (sendto(q->fd, message, message->nlmsg_len, 0, (struct sockaddr *)&kernel, sizeof kernel) < 0)
		return -errno;
	if (last)
		return 0;
	if (recv(q->fd, buffer, sizeof buffer, 0) < (ssize_t)(sizeof *message + sizeof *error))
		return -EIO;
	error = mnl_nlmsg_get_payload(message);
	return message->nlmsg_type == NLMSG_ERROR ? error->error : -EIO;
}

int queue_bind(struct queue *q)
{
	const struct nfqnl_msg_config_cmd bind_it = {.command = NFQNL_CFG_CMD_BIND};
	const struct nfqnl_msg_config_params copy = {.copy_range = htonl(65535),
						     .copy_mode = NFQNL_COPY_PACKET};
	const uint32_t length_be = htonl(QUEUE_LENGTH + q->params.held_max), off_be = 0,
		       mask_be = htonl(NFQA_CFG_F_FAIL_OPEN | NFQA_CFG_F_CONNTRACK | NFQA_CFG_F_GSO |
				       NFQA_CFG_F_UID_GID | NFQA_CFG_F_SECCTX);
	const int bytes = SOCKET_BYTES, yes = 1;
	struct sockaddr_nl any = {.nl_family = AF_NETLINK};
	int status;

	q->fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
	if (q->fd < 0 || bind(q->fd, (struct sockaddr *)&any, sizeof any))
		return -errno;
	if (setsockopt(q->fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes))
		(void)setsockopt(q->fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
	if (setsockopt(q->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes))
		(void)setsockopt(q->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
	/* what overruns is counted by the kernel, and must not end a recvmmsg() */
	(void)setsockopt(q->fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &yes, sizeof yes);
	if ((status = configure(q, NFQA_CFG_CMD, &bind_it, sizeof bind_it, NULL, 0)) ||
	    (status = configure(q, NFQA_CFG_QUEUE_MAXLEN, &length_be, sizeof length_be, NULL, 0)) ||
	    (status = configure(q, NFQA_CFG_FLAGS, &off_be, sizeof off_be, &mask_be, NFQA_CFG_MASK)))
		return status;
	return configure(q, NFQA_CFG_PARAMS, &copy, sizeof copy, NULL, 0);
}

/* ---- the kernel's figures ---- */

/* Columns: queue number, listener, waiting, copy mode, copy range, dropped because full, dropped because our
 * socket was full, last id, 1. */
uint64_t queue_overruns(uint32_t n_queues)
{
	FILE *file = fopen("/proc/self/net/netfilter/nfnetlink_queue", "re");
	unsigned number;
	unsigned long long full, socket_full, total = 0;

	while (file &&
	       fscanf(file, "%u %*u %*u %*u %*u %llu %llu %*u %*u", &number, &full, &socket_full) == 3)
		if (number >= QUEUE_FIRST && number < QUEUE_FIRST + n_queues)
			total += full + socket_full;
	if (file)
		fclose(file);
	return total;
}
