/* dsnat-queue-bench: the two ends of the queue path's benchmark (tests/bench/queue.py drives it).
 *
 *	flood ADDRESS FLOWS SECONDS [COUNT [RATE]]  sends UDP datagrams of 22 bytes to ADDRESS:9 from so many ports; so
 *	                              many of them; as fast as one core can, or so many a second, 192 at a time
 *	accept QUEUE one|batch|back   accepts everything that the kernel queues, unread and unchanged, until SIGTERM.
 *	                              With `one`, a system call for each packet and each verdict; with `batch`, 32
 *	                              packets a recvmmsg() and one verdict for all of them, which nobody who changes
 *	                              packets can use: the floor of every program behind a netfilter queue; with `back`,
 *	                              32 verdicts in a sendmsg(), each with its packet's bytes: the floor of one that
 *	                              changes them. The socket and the queue are as long as dsnatd's
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
#define AT_ONCE      (6 * BURST) /* with a rate: fewer than a veth has places for */

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

static void sleep_s(double seconds)
{
	struct timespec t = {.tv_sec = (time_t)seconds,
			     .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};

	if (seconds > 0)
		nanosleep(&t, NULL);
}

static int flood(const char *address, uint32_t flows, double seconds, uint32_t count, double rate)
{
	static int fd[FLOWS_MAX];
	static char payload[22];
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
	struct iovec vector = {.iov_base = payload, .iov_len = sizeof payload};
	struct mmsghdr message[BURST];
	double start_s = now_s();

	if (inet_pton(AF_INET, address, &to.sin_addr) != 1 || !flows || flows > FLOWS_MAX)
		return 2;
	for (uint32_t i = 0; i < flows; i++)
		if ((fd[i] = socket(AF_INET, SOCK_DGRAM, 0)) < 0 ||
		    connect(fd[i], (struct sockaddr *)&to, sizeof to))
			return refused("socket");
	memset(message, 0, sizeof message);
	for (uint32_t i = 0; i < BURST; i++)
		message[i].msg_hdr = (struct msghdr){.msg_iov = &vector, .msg_iovlen = 1};
	for (uint32_t i = 0, sent = 0; sent < count && now_s() < start_s + seconds;
	     i = (i + 1) % flows, sent += BURST) {
		if (rate > 0 && sent % AT_ONCE == 0)
			sleep_s(start_s + sent / rate - now_s());
		(void)sendmmsg(fd[i], message, BURST, 0); /* what is refused is not sent: no harm */
	}
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

/* A verdict with all bytes of the packet in `buffer`, as two vectors. */
static size_t send_back(uint16_t queue, void *buffer, void *message, uint32_t id_be, struct iovec *vector)
{
	const struct nfqnl_msg_verdict_hdr verdict = {.verdict = htonl(NF_ACCEPT), .id = id_be};
	struct nlmsghdr *answer = put_message(message, NFQNL_MSG_VERDICT, queue);
	struct nlattr *a;

	mnl_attr_put(answer, NFQA_VERDICT_HDR, sizeof verdict, &verdict);
	vector[0] = (struct iovec){.iov_base = message, .iov_len = answer->nlmsg_len};
	for (a = mnl_nlmsg_get_payload_offset(buffer, sizeof(struct nfgenmsg));
	     mnl_attr_ok(a, (int)((char *)mnl_nlmsg_get_payload_tail(buffer) - (char *)a));
	     a = mnl_attr_next(a))
		if (mnl_attr_get_type(a) == NFQA_PAYLOAD) { /* as it came: header, bytes, padding */
			vector[1] = (struct iovec){.iov_base = a, .iov_len = MNL_ALIGN(a->nla_len)};
			answer->nlmsg_len += (uint32_t)vector[1].iov_len;
			return 2;
		}
	return 1;
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

/* One verdict for all up to the last one, or for the only one. */
static void answer_last(int fd, uint16_t queue, void *last, bool batch)
{
	char buffer[256];
	uint32_t id_be;

	if (!id_of(last, &id_be))
		return;
	struct nlmsghdr *answer =
		put_message(buffer, batch ? NFQNL_MSG_VERDICT_BATCH : NFQNL_MSG_VERDICT, queue);
	const struct nfqnl_msg_verdict_hdr verdict = {.verdict = htonl(NF_ACCEPT), .id = id_be};

	mnl_attr_put(answer, NFQA_VERDICT_HDR, sizeof verdict, &verdict);
	send_to_kernel(fd, answer);
}

static void answer_each(int fd, uint16_t queue, char packet[BURST][PACKET_BYTES], uint32_t n)
{
	static _Alignas(8) char message[BURST][64];
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	struct iovec vector[2 * BURST];
	struct msghdr all = {.msg_name = &kernel, .msg_namelen = sizeof kernel, .msg_iov = vector};
	uint32_t id_be;

	for (uint32_t i = 0; i < n; i++)
		if (id_of(packet[i], &id_be))
			all.msg_iovlen +=
				send_back(queue, packet[i], message[i], id_be, &vector[all.msg_iovlen]);
	(void)!sendmsg(fd, &all, 0);
}

static int accept_all(uint16_t queue, const char *how)
{
	static _Alignas(8) char packet[BURST][PACKET_BYTES];
	const bool one = !strcmp(how, "one"), back = !strcmp(how, "back");
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
		int n = recvmmsg(fd, message, one ? 1 : BURST, MSG_WAITFORONE, NULL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return refused("recvmmsg");
		if (back)
			answer_each(fd, queue, packet, (uint32_t)n);
		else
			answer_last(fd, queue, packet[n - 1], !one);
	}
}

int main(int argc, char **argv)
{
	if (argc >= 5 && argc <= 7 && !strcmp(argv[1], "flood"))
		return flood(argv[2], (uint32_t)atoi(argv[3]), atof(argv[4]),
			     argc > 5 ? (uint32_t)atoi(argv[5]) : UINT32_MAX, argc > 6 ? atof(argv[6]) : 0);
	if (argc == 4 && !strcmp(argv[1], "accept"))
		return accept_all((uint16_t)atoi(argv[2]), argv[3]);
	fputs("usage: dsnat-queue-bench flood ADDRESS FLOWS SECONDS [COUNT [RATE]] | accept QUEUE "
	      "one|batch|back\n",
	      stderr);
	return 2;
}
