/* The pool addresses are on no interface, so the kernel does not answer ARP for them and we must. A packet
 * socket sees a copy of every ARP frame of its interface; the kernel handles its own addresses as ever and
 * stays silent about ours, so nothing is answered twice. What is neighbour resolution towards others stays
 * with the kernel.
 */
#include "arp_socket.h"

#include "../rival.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netpacket/packet.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define SERVED_AT_ONCE 32u

/* The index of an Ethernet interface and its MAC address; 0: it is not there or has none. */
static int look_up(int fd, const char *name, uint8_t mac[6])
{
	struct ifreq request = {0};
	int ifindex;

	strncpy(request.ifr_name, name, sizeof request.ifr_name - 1);
	if (ioctl(fd, SIOCGIFINDEX, &request))
		return 0;
	ifindex = request.ifr_ifindex;
	if (ioctl(fd, SIOCGIFHWADDR, &request) || request.ifr_hwaddr.sa_family != ARPHRD_ETHER)
		return 0;
	memcpy(mac, request.ifr_hwaddr.sa_data, 6);
	return ifindex;
}

static int listen_on(int ifindex)
{
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET, .sll_protocol = htons(ETHERTYPE_ARP), .sll_ifindex = ifindex};
	/* protocol 0: it hears nothing before it is bound to the one interface */
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address)) {
		close(fd);
		return -1;
	}
	return fd;
}

bool arp_socket_follow(struct arp_socket *s)
{
	int probe = s->fd >= 0 ? s->fd : socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int ifindex = probe < 0 ? 0 : look_up(probe, s->name, s->mac);

	if (probe >= 0 && probe != s->fd)
		close(probe);
	if (ifindex == s->ifindex && (s->fd >= 0 || !ifindex))
		return false;
	arp_socket_close(s);
	if (!ifindex || (s->fd = listen_on(ifindex)) < 0)
		return false;
	s->ifindex = ifindex;
	return true;
}

void arp_socket_close(struct arp_socket *s)
{
	if (s->fd >= 0)
		close(s->fd);
	s->fd = -1;
	s->ifindex = 0;
}

uint32_t arp_socket_serve(struct arp_socket *s, struct thread *t)
{
	uint8_t frame[128];
	uint32_t answered = 0;

	for (uint32_t i = 0; s->fd >= 0 && i < SERVED_AT_ONCE; i++) {
		struct sockaddr_ll from;
		socklen_t from_bytes = sizeof from;
		ssize_t n = recvfrom(s->fd, frame, sizeof frame, 0, (struct sockaddr *)&from, &from_bytes);
		uint32_t asked_be;

		if (n < 0)
			break;
		if (from.sll_pkttype == PACKET_OUTGOING)
			continue; /* our own answer, or the kernel's own question */
		rival_note(t, frame, (uint32_t)n, s->iface, s->mac);
		asked_be = arp_asked_for(frame, (uint32_t)n);
		if (!asked_be || !arp_is_ours(t->plan, t->route, s->iface, asked_be))
			continue;
		arp_answer(frame, s->mac);
		(void)!send(s->fd, frame, ARP_FRAME_BYTES, 0);
		answered++;
	}
	return answered;
}

bool arp_socket_announce(const char *name, uint32_t address_be)
{
	uint8_t frame[ARP_FRAME_BYTES], mac[6];
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_halen = 6};
	ssize_t sent = 0;

	if (fd < 0)
		return false;
	to.sll_ifindex = look_up(fd, name, mac);
	if (to.sll_ifindex) { /* else there is nobody to tell */
		arp_announcement(frame, mac, address_be);
		memset(to.sll_addr, 0xff, 6);
		sent = sendto(fd, frame, sizeof frame, 0, (struct sockaddr *)&to, sizeof to);
	}
	close(fd);
	return sent >= 0 || (errno != ENOBUFS && errno != EAGAIN);
}
