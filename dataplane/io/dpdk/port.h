/* DPDK ports: set-up, link, what a worker must know of one. */
#ifndef PORT_H
#define PORT_H

#include <rte_ether.h>
#include <rte_mbuf.h>
#include <rte_spinlock.h>
#include <stdatomic.h>

#include "../../core/nat.h"
#include "../../ctl/request.h"
#include "bond.h"

#define PORT_NONE 0xffu

struct twin;

struct port {
	/* read by workers for each packet */
	uint16_t id;   /* DPDK's number; several ports have the same when they are VLANs of one device */
	uint16_t vlan; /* 0: its frames have no tag */
	uint8_t iface;
	uint8_t index; /* in ports.port[]; rte_mbuf.port, once a frame is ours */
	uint8_t first; /* index of the first port of the device, which opens and closes it, receives, has the locks */
	bool outside;
	bool takes_tags;   /* some interface of the device has a VLAN */
	uint16_t n_queues; /* pairs; worker w uses queue w % n_queues */
	bool shared_tx;    /* fewer queues than workers: tx_lock is taken per burst */
	bool interrupts;
	struct rte_ether_addr mac;
	_Atomic bool up;
	/* the rest */
	bool has_rss; /* it hashes addresses and ports as `rss` says, one queue for each worker */
	struct nat_rss rss;
	struct twin *twin;
	char name[NAT_NAME_MAX];
	char device[128];
	char copies[32]; /* the kernel interface that a net_af_packet or net_pcap device listens to, or "" */
	unsigned copies_index;
	struct bond bond;
	bool told_up;      /* the carrier that the twin shows */
	_Atomic bool gone; /* the device has been taken away; it does not come back in this process */
	uint16_t mtu_bytes;
	uint32_t speed_mbps;
	rte_spinlock_t tx_lock[NAT_WORKERS_MAX];
	_Atomic uint64_t twin_to, twin_from, twin_lost;
	_Atomic uint64_t twin_refused; /* frames of the kernel that the device had no room for */
};

struct ports {
	struct rte_mempool *pool;
	uint32_t n;
	struct port port[NAT_INTERFACES_MAX];
	uint8_t of_iface[NAT_INTERFACES_MAX]; /* index into port[], or PORT_NONE */
	bool tagged;                          /* some port has a VLAN */
};

/* What an mbuf carries beside the packet (its private area). */
struct note {
	uint8_t worker; /* who counted it */
	uint8_t reason; /* as what (NAT_PASS) */
	/* handed over: what the core says to its next owner */
	uint8_t iface, zero;
	uint16_t flags, zero2;
	struct nat_errand errand;
	uint32_t zero3;
};
_Static_assert(sizeof(struct note) % RTE_MBUF_PRIV_ALIGN == 0, "as DPDK wants it");

static inline struct note *note_of(struct rte_mbuf *m)
{
	return rte_mbuf_to_priv(m);
}

/* Megabytes of plain memory that ports_open() needs for this configuration. */
uint32_t ports_memory_mb(const struct nat_config *config, uint32_t n_workers);

/* Makes the packet buffers; ports_open() does it by itself otherwise. 0, or -1 and a sentence in `why`. */
int ports_prepare(struct ports *ports, const struct nat_config *config, uint32_t n_workers, char *why,
		  size_t why_bytes);
/* Opens, configures and starts every port of the configuration. 0, or -1 and a sentence in `why`. */
int ports_open(struct ports *ports, const struct nat_config *config, uint32_t n_workers, char *why,
	       size_t why_bytes);
void ports_close(struct ports *ports);

/* How the ports of one role choose the worker of a packet. False: not all of them do, or not in the same
 * way; `why` is the beginning of a sentence. */
bool ports_rss(const struct ports *ports, uint32_t n_workers, bool outside, struct nat_rss *rss, char *why,
	       size_t why_bytes);

/* Control thread: reads the link; true when it changed. A port whose device is gone is down. */
bool port_poll_link(struct port *port);

/* Control thread: another member of the bond sends from now on; its name, mostly NULL. */
const char *port_follow_bond(struct port *port);

/* Control thread: the device went, and there is one of its name again. Only a new start can take it. */
bool port_is_replaced(const struct port *port);
void port_view(const struct port *port, struct request_port *view);

#endif
