/* ARP for pool addresses on interfaces that the kernel keeps. */
#ifndef ARP_SOCKET_H
#define ARP_SOCKET_H

#include "../arp.h"

struct arp_socket {
	int fd; /* -1: the interface is not there, or is not Ethernet */
	int ifindex;
	uint8_t iface;
	uint8_t mac[6];
	const char *name;
};

/* Listens on the interface; called again it follows one that was made anew or got another MAC address. True
 * when the descriptor is a new one. */
bool arp_socket_follow(struct arp_socket *s);
void arp_socket_close(struct arp_socket *s);

/* Answers up to a few dozen requests for addresses that are ours; the number answered. */
uint32_t arp_socket_serve(struct arp_socket *s, struct thread *t);

/* Control thread: sends a gratuitous request from the interface's MAC address. False only when there was no
 * room. */
bool arp_socket_announce(const char *name, uint32_t address_be);

#endif
