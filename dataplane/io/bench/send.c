/* dsnat-send-bench: flows for the kernel's own NAT, and what a packet costs the core
 * (tests/bench/kernel.py drives it).
 *
 *	dsnat-send-bench INTERFACE MAC FLOWS WINDOWS [PID]
 *
 * Sends 64-byte UDP frames to MAC from a packet socket: first one of each flow, in order, then flows drawn
 * at random, in windows of 65,536 frames. On a veth the receiving end's work (forwarding, NAT) is done in
 * the sender's own time, before the system call ends; what the kernel puts off is done by the core's
 * ksoftirqd, whose process id is PID. So a frame costs what both have used, in nanoseconds of processor
 * time. Prints "new NS" and "window NS", a frame each.
 *
 * Exit status: 0 done, 1 the kernel refused something, 2 usage.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define BURST       64u
#define FRAME_BYTES 60u
#define WINDOW      65536u
#define INSIDE_NET  0x64400000u /* 100.64.0.0 */
#define REMOTE_NET  0xc6120000u /* 198.18.0.0 */

struct sender {
	int fd;
	const char *ksoftirqd;
	uint8_t frame[BURST][64];
	struct iovec vector[BURST];
	struct mmsghdr message[BURST];
	uint64_t chance;
};

static uint64_t chance(uint64_t *state)
{
	uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15); /* splitmix64 */

	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static void put16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
	put16(at, value >> 16);
	put16(at + 2, value & 0xffff);
}

static void write_flow(uint8_t *frame, uint32_t flow)
{
	uint8_t *ip = frame + 14;
	const uint32_t remote = (uint32_t)(flow * UINT64_C(0x9e3779b97f4a7c15) >> 32) % 131072;
	uint32_t sum = 0;

	put32(ip + 12, INSIDE_NET + flow / 32);
	put32(ip + 16, REMOTE_NET + remote);
	put16(ip + 20, 1024 + flow % 32 * 1009);
	put16(ip + 10, 0);
	for (uint32_t i = 0; i < 20; i += 2)
		sum += (uint32_t)ip[i] << 8 | ip[i + 1];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	put16(ip + 10, ~sum & 0xffff);
}

static uint64_t spent_ns(const struct sender *s)
{
	unsigned long long behind = 0;
	char path[64];
	struct timespec t;
	FILE *file;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	snprintf(path, sizeof path, "/proc/%s/schedstat", s->ksoftirqd);
	if (*s->ksoftirqd && (file = fopen(path, "re"))) {
		if (fscanf(file, "%llu", &behind) != 1)
			behind = 0;
		fclose(file);
	}
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec + behind;
}

/* All of them: what the device does not take at once is offered again. */
static int send_burst(struct sender *s, uint32_t n)
{
	for (uint32_t done = 0; done < n;) {
		int sent = sendmmsg(s->fd, s->message + done, n - done, 0);

		if (sent < 0 && errno != ENOBUFS && errno != EAGAIN)
			return -1;
		done += sent > 0 ? (uint32_t)sent : 0;
	}
	return 0;
}

static int sender_open(struct sender *s, const char *interface, const char *mac)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET,
				 .sll_protocol = htons(ETH_P_IP),
				 .sll_ifindex = (int)if_nametoindex(interface)};
	unsigned byte[6];
	int yes = 1;

	if (sscanf(mac, "%x:%x:%x:%x:%x:%x", &byte[0], &byte[1], &byte[2], &byte[3], &byte[4], &byte[5]) !=
	    6) {
		errno = EINVAL;
		return -1;
	}
	s->fd = socket(AF_PACKET, SOCK_RAW, 0); /* protocol 0: it receives nothing */
	if (s->fd < 0 || setsockopt(s->fd, SOL_PACKET, PACKET_QDISC_BYPASS, &yes, sizeof yes) ||
	    bind(s->fd, (struct sockaddr *)&to, sizeof to))
		return -1;
	for (uint32_t i = 0; i < BURST; i++) {
		uint8_t *frame = s->frame[i], *ip = frame + 14;

		for (uint32_t b = 0; b < 6; b++)
			frame[b] = (uint8_t)byte[b];
		frame[6] = 2;
		put16(frame + 12, ETH_P_IP);
		ip[0] = 0x45;
		put16(ip + 2, FRAME_BYTES - 14);
		put16(ip + 6, 0x4000);
		ip[8] = 64;
		ip[9] = IPPROTO_UDP;
		put16(ip + 22, 443);
		put16(ip + 24, FRAME_BYTES - 34);
		s->vector[i] = (struct iovec){.iov_base = frame, .iov_len = FRAME_BYTES};
		s->message[i].msg_hdr = (struct msghdr){.msg_iov = &s->vector[i], .msg_iovlen = 1};
	}
	return 0;
}

static int run(struct sender *s, uint32_t flows, uint32_t windows)
{
	uint64_t start_ns = spent_ns(s);

	for (uint32_t done = 0; done < flows; done += BURST) {
		const uint32_t n = flows - done < BURST ? flows - done : BURST;

		for (uint32_t i = 0; i < n; i++)
			write_flow(s->frame[i], done + i);
		if (send_burst(s, n))
			return -1;
	}
	printf("new %.1f\n", (double)(spent_ns(s) - start_ns) / flows);
	for (uint32_t w = 0; w < windows; w++) {
		start_ns = spent_ns(s);
		for (uint32_t done = 0; done < WINDOW; done += BURST) {
			for (uint32_t i = 0; i < BURST; i++)
				write_flow(s->frame[i], (uint32_t)((chance(&s->chance) >> 32) * flows >> 32));
			if (send_burst(s, BURST))
				return -1;
		}
		printf("window %.1f\n", (double)(spent_ns(s) - start_ns) / WINDOW);
	}
	return 0;
}

int main(int argc, char **argv)
{
	static struct sender sender;

	if (argc < 5 || argc > 6 || atol(argv[3]) < 1) {
		fputs("usage: dsnat-send-bench INTERFACE MAC FLOWS WINDOWS [PID of ksoftirqd]\n", stderr);
		return 2;
	}
	sender.ksoftirqd = argc == 6 ? argv[5] : "";
	if (sender_open(&sender, argv[1], argv[2]) ||
	    run(&sender, (uint32_t)atol(argv[3]), (uint32_t)atol(argv[4]))) {
		fprintf(stderr, "dsnat-send-bench: %s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	return 0;
}
