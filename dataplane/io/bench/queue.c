/* dsnat-queue-bench: the two ends of the queue path's benchmark (tests/bench/queue.py drives it).
 *
 *	flood ADDRESS FLOWS SECONDS   sends UDP datagrams of 22 bytes to ADDRESS:9 from so many ports, as fast as
 *	                              one core can
 *	accept QUEUE one|batch        accepts everything that the kernel queues, unread and unchanged, until SIGTERM:
 *	                              the floor of every program behind a netfilter queue. With `one`, a system call
 *	                              for each packet and each verdict; with `batch`, 32 packets a recvmmsg() and one
 *	                              verdict for all of them
 *
 * Exit status: 0 done, 1 the kernel refused something, 2 usage.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <libmnl/libmnl.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BURST        32u
#define PACKET_BYTES 4096u
#define FLOWS_MAX    1024u

static int refused(const char *what)
{
	fprintf(stderr, "dsnat-queue-bench: %s: %s\n", what, strerror(errno));
	return 1;
}

/* ---- flood ---- */

static double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int flood(const char *address, uint32_t flows, double seconds)
{
	static int fd[FLOWS_MAX];
	static char payload[22];
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
	struct iovec vector = {.iov_base = payload, .iov_len = sizeof payload};
	struct mmsghdr message[BURST];
	double until_s = now_s() + seconds;

	if (inet_pton(AF_INET, address, &to.sin_addr) != 1 || !flows || flows > FLOWS_MAX)
		return 2;
	for (uint32_t i = 0; i < flows; i++)
		if ((fd[i] = socket(AF_INET, SOCK_DGRAM, 0)) < 0 ||
		    connect(fd[i], (struct sockaddr *)&to, sizeof to))
			return refused("socket");
	memset(message, 0, sizeof message);
	for (uint32_t i = 0; i < BURST; i++)
		message[i].msg_hdr = (struct msghdr){.msg_iov = &vector, .msg_iovlen = 1};
	for (uint32_t i = 0; now_s() < until_s; i = (i + 1) % flows)
		(void)sendmmsg(fd[i], message, BURST, 0); /* what is refused is not sent: no harm */
	return 0;
}

/* ---- accept ---- */

static void send_to_kernel(int fd, const struct nlmsghdr *message)
{
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};

	(void)!sendto(fd, message, message->nlmsg_len, 0, (struct sockaddr *)&kernel, sizeof kernel);
}

static struct nlmsghdr *put_message(void *buffer, uint16_t type, uint16_t queue)
{
	struct nlmsghdr *message = mnl_nlmsg_put_header(buffer);
	struct nfgenmsg *info = mnl_nlmsg_put_extra_header(message, sizeof *info);

	message->nlmsg_type = (uint16_t)(NFNL_SUBSYS_QUEUE << 8 | type);
	message->nlmsg_flags = NLM_F_REQUEST;
	info->res_id = htons(queue);
	return message;
}

static int bind_queue(uint16_t queue)
{
	const struct nfqnl_msg_config_cmd command = {.command = NFQNL_CFG_CMD_BIND};
	const struct nfqnl_msg_config_params copy = {.copy_range = htonl(65535),
						     .copy_mode = NFQNL_COPY_PACKET};
	const uint32_t length_be = htonl(8192);
	const int bytes = 32 << 20;
	char buffer[512];
	struct sockaddr_nl any = {.nl_family = AF_NETLINK};
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER), yes = 1;
	struct nlmsghdr *message;

	if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof any))
		return -1;
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
	(void)setsockopt(fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, &yes, sizeof yes);
	message = put_message(buffer, NFQNL_MSG_CONFIG, queue);
	mnl_attr_put(message, NFQA_CFG_CMD, sizeof command, &command);
	send_to_kernel(fd, message);
	message = put_message(buffer, NFQNL_MSG_CONFIG, queue);
	mnl_attr_put(message, NFQA_CFG_QUEUE_MAXLEN, sizeof length_be, &length_be);
	mnl_attr_put(message, NFQA_CFG_PARAMS, sizeof copy, &copy);
	send_to_kernel(fd, message);
	return fd;
}

/* The packet's number; false when the message is none of a packet. */
static bool id_of(const void *buffer, uint32_t *id_be)
{
	const struct nlmsghdr *message = buffer;
	const struct nlattr *a = mnl_nlmsg_get_payload_offset(message, sizeof(struct nfgenmsg));

	if (message->nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET) ||
	    mnl_attr_get_type(a) != NFQA_PACKET_HDR) /* the kernel puts it first */
		return false;
	*id_be = ((const struct nfqnl_msg_packet_hdr *)mnl_attr_get_payload(a))->packet_id;
	return true;
}

static int accept_all(uint16_t queue, bool batch)
{
	static _Alignas(8) char packet[BURST][PACKET_BYTES];
	char buffer[256];
	struct iovec vector[BURST];
	struct mmsghdr message[BURST];
	int fd = bind_queue(queue);

	if (fd < 0)
		return refused("netlink");
	memset(message, 0, sizeof message);
	for (uint32_t i = 0; i < BURST; i++) {
		vector[i] = (struct iovec){.iov_base = packet[i], .iov_len = PACKET_BYTES};
		message[i].msg_hdr = (struct msghdr){.msg_iov = &vector[i], .msg_iovlen = 1};
	}
	for (;;) { /* SIGTERM ends it */
		int n = recvmmsg(fd, message, batch ? BURST : 1, MSG_WAITFORONE, NULL);
		uint32_t id_be;

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return refused("recvmmsg");
		if (!id_of(packet[n - 1], &id_be))
			continue;
		/* a verdict for all up to the last one, or for the only one */
		struct nlmsghdr *answer =
			put_message(buffer, batch ? NFQNL_MSG_VERDICT_BATCH : NFQNL_MSG_VERDICT, queue);
		const struct nfqnl_msg_verdict_hdr verdict = {.verdict = htonl(NF_ACCEPT), .id = id_be};

		mnl_attr_put(answer, NFQA_VERDICT_HDR, sizeof verdict, &verdict);
		send_to_kernel(fd, answer);
	}
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "flood"))
		return flood(argv[2], (uint32_t)atoi(argv[3]), atof(argv[4]));
	if (argc == 4 && !strcmp(argv[1], "accept"))
		return accept_all((uint16_t)atoi(argv[2]), !strcmp(argv[3], "batch"));
	fputs("usage: dsnat-queue-bench flood ADDRESS FLOWS SECONDS | accept QUEUE one|batch\n", stderr);
	return 2;
}
