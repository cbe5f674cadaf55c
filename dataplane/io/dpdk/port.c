/* A port is configured for what the NAT needs and no more: one queue pair per worker where the device has so
 * many, the device's own MAC, all multicast (VRRP, OSPF, LLDP), no promiscuous mode, and of the offloads the
 * check of the IPv4 header checksum on receive. The engine updates checksums incrementally, so transmit
 * offloads would only hide errors.
 *
 * Interfaces with a `vlan` share a device: the first of them opens it, the others are ports with a tag.
 * Tags are put on and taken off here (vlan.h), so the kernel twins and the engine never see one.
 *
 * With several workers all ports get the same RSS key, and redirection tables that lead to worker after
 * worker; what a port then really has is read back (core/workers.h follows it).
 *
 * One pool of packet buffers serves all ports: a packet crosses from one to another without a copy. Its size
 * is reckoned from what can be outstanding at once; a worker that leaks shows soon as `no_buffer`.
 */
#include "port.h"

#include <net/if.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <stdio.h>
#include <string.h>

#include "eal.h"
#include "guard.h"

#define DESCRIPTORS  512u
#define CACHE        128u
#define RINGS_HOLD   4096u /* towards the twins and back */
#define INBOX_HOLD   2048u /* per worker: handed over by others */
#define WAITING_HOLD 1024u /* per worker: for neighbours and first fragments */
#define LINK_BYTES   (RTE_ETHER_HDR_LEN + 2 * 4)

/* Microsoft's, and some more for NICs that hash longer inputs. */
static uint8_t rss_key[NAT_RSS_KEY_BYTES] = {0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25,
					     0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b,
					     0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a,
					     0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa, 0x4d, 0x8c, 0x13, 0xe9,
					     0x72, 0xb5, 0x0f, 0xd6, 0x39, 0xa2, 0x5c, 0x81};

static uint32_t dpdk_interfaces(const struct nat_config *config, uint16_t *mtu_max)
{
	uint32_t n = 0;

	*mtu_max = 1500;
	for (uint32_t i = 0; i < config->n_interfaces; i++) {
		n += config->interfaces[i].path == NAT_PATH_DPDK;
		if (config->interfaces[i].mtu_bytes > *mtu_max)
			*mtu_max = config->interfaces[i].mtu_bytes;
	}
	return n;
}

static uint32_t buffers(uint32_t n_ports, uint32_t n_workers)
{
	return n_ports * n_workers * 2 * DESCRIPTORS + RINGS_HOLD + n_workers * (WAITING_HOLD + 2 * CACHE) +
	       (n_workers > 1 ? n_workers * INBOX_HOLD : 0) - 1;
}

static uint16_t room_bytes(uint16_t mtu_bytes)
{
	uint32_t bytes = mtu_bytes + LINK_BYTES;

	return (uint16_t)((bytes < 2048 ? 2048 : (bytes + 63) & ~63u) + RTE_PKTMBUF_HEADROOM);
}

uint32_t ports_memory_mb(const struct nat_config *config, uint32_t n_workers)
{
	uint16_t mtu;
	uint32_t n_ports = dpdk_interfaces(config, &mtu);
	uint64_t each = sizeof(struct rte_mbuf) + sizeof(struct note) + room_bytes(mtu) + 128;

	return (uint32_t)(buffers(n_ports, n_workers) * each >> 20) + 32 + 4 * n_workers;
}

static int queues_set_up(struct port *p, const struct rte_eth_dev_info *info, struct rte_mempool *pool)
{
	uint16_t rx = DESCRIPTORS, tx = DESCRIPTORS;
	int status = rte_eth_dev_adjust_nb_rx_tx_desc(p->id, &rx, &tx);

	for (uint16_t q = 0; q < p->n_queues && !status; q++) {
		status = rte_eth_rx_queue_setup(p->id, q, rx, (unsigned)rte_eth_dev_socket_id(p->id), NULL,
						pool);
		if (!status)
			status = rte_eth_tx_queue_setup(p->id, q, tx, (unsigned)rte_eth_dev_socket_id(p->id),
							NULL);
	}
	(void)info;
	return status;
}

/* One try: with receive interrupts or without. */
static int start_with(struct port *p, const struct rte_eth_dev_info *info, struct rte_mempool *pool,
		      bool interrupts)
{
	struct rte_eth_conf conf = {
		.rxmode = {.mtu = p->mtu_bytes,
			   .offloads = info->rx_offload_capa & RTE_ETH_RX_OFFLOAD_IPV4_CKSUM},
		.txmode = {.offloads = info->tx_offload_capa & RTE_ETH_TX_OFFLOAD_MBUF_FAST_FREE},
		.intr_conf = {.rxq = interrupts},
	};
	int status;

	if (p->takes_tags) /* a device may filter all of them by itself */
		conf.rxmode.offloads |= info->rx_offload_capa & RTE_ETH_RX_OFFLOAD_VLAN_FILTER;
	if (p->n_queues > 1 && info->flow_type_rss_offloads) {
		conf.rxmode.mq_mode = RTE_ETH_MQ_RX_RSS;
		conf.rx_adv_conf.rss_conf.rss_hf =
			info->flow_type_rss_offloads & (RTE_ETH_RSS_IPV4 | RTE_ETH_RSS_NONFRAG_IPV4_TCP |
							RTE_ETH_RSS_NONFRAG_IPV4_UDP | RTE_ETH_RSS_FRAG_IPV4);
		if (info->hash_key_size != 0 && info->hash_key_size <= sizeof rss_key) {
			conf.rx_adv_conf.rss_conf.rss_key = rss_key;
			conf.rx_adv_conf.rss_conf.rss_key_len = info->hash_key_size;
		}
	}
	if (*info->dev_flags & RTE_ETH_DEV_INTR_RMV)
		conf.intr_conf.rmv = 1;
	status = rte_eth_dev_configure(p->id, p->n_queues, p->n_queues, &conf);
	if (!status)
		status = queues_set_up(p, info, pool);
	if (!status)
		status = rte_eth_dev_start(p->id);
	if (status || !interrupts)
		return status;
	/* Some drivers take the setting and cannot do it (uio has one interrupt for everything). Is there
	 * one at all comes first: vmxnet3 takes its number for a place in the device's memory, without a
	 * look at it. */
	for (uint16_t q = 0; q < p->n_queues; q++)
		if (rte_eth_dev_rx_intr_ctl_q_get_fd(p->id, q) < 0 || rte_eth_dev_rx_intr_enable(p->id, q) ||
		    rte_eth_dev_rx_intr_disable(p->id, q)) {
			rte_eth_dev_stop(p->id);
			return -ENOTSUP;
		}
	return 0;
}

/* ---- RSS ---- */

static bool read_key(const struct port *p, struct nat_rss *rss)
{
	const uint64_t wanted = RTE_ETH_RSS_NONFRAG_IPV4_TCP | RTE_ETH_RSS_NONFRAG_IPV4_UDP;
	struct rte_eth_rss_conf conf = {.rss_key = rss->key, .rss_key_len = sizeof rss->key};

	return rte_eth_dev_rss_hash_conf_get(p->id, &conf) == 0 && (conf.rss_hf & wanted) == wanted;
}

/* One class after the other to one queue after the other; and what the port says that it has now. */
static bool set_classes(const struct port *p, const struct rte_eth_dev_info *info, struct nat_rss *rss)
{
	struct rte_eth_rss_reta_entry64 entry[NAT_RSS_CLASSES_MAX / RTE_ETH_RETA_GROUP_SIZE] = {0};
	const uint16_t n = info->reta_size;

	if (n < RTE_ETH_RETA_GROUP_SIZE || n > NAT_RSS_CLASSES_MAX || n % RTE_ETH_RETA_GROUP_SIZE)
		return false;
	for (uint32_t i = 0; i < n; i++) {
		entry[i / RTE_ETH_RETA_GROUP_SIZE].mask = UINT64_MAX;
		entry[i / RTE_ETH_RETA_GROUP_SIZE].reta[i % RTE_ETH_RETA_GROUP_SIZE] =
			(uint16_t)(i % p->n_queues);
	}
	(void)rte_eth_dev_rss_reta_update(p->id, entry, n);
	if (rte_eth_dev_rss_reta_query(p->id, entry, n))
		return false;
	rss->n_classes = n;
	for (uint32_t i = 0; i < n; i++)
		rss->worker[i] =
			(uint8_t)entry[i / RTE_ETH_RETA_GROUP_SIZE].reta[i % RTE_ETH_RETA_GROUP_SIZE];
	return true;
}

static void rss_open(struct port *p, const struct rte_eth_dev_info *info, uint32_t n_workers)
{
	p->has_rss = n_workers > 1 && p->n_queues == n_workers && info->flow_type_rss_offloads != 0 &&
		     read_key(p, &p->rss) && set_classes(p, info, &p->rss) &&
		     nat_rss_is_usable(&p->rss, n_workers);
}

bool ports_rss(const struct ports *ports, uint32_t n_workers, bool outside, struct nat_rss *rss, char *why,
	       size_t why_bytes)
{
	const struct port *first = NULL;

	for (uint32_t i = 0; i < ports->n; i++) {
		const struct port *p = &ports->port[i];

		if (p->outside != outside)
			continue;
		if (p->n_queues < n_workers) {
			snprintf(why, why_bytes, "interface %s has %u queues for %u workers", p->name,
				 p->n_queues, n_workers);
			return false;
		}
		if (!p->has_rss) {
			snprintf(why, why_bytes, "interface %s has no RSS whose key and table can be read",
				 p->name);
			return false;
		}
		if (first && memcmp(&first->rss, &p->rss, sizeof p->rss) != 0) {
			snprintf(why, why_bytes,
				 "interfaces %s and %s do not have the same RSS key and table", first->name,
				 p->name);
			return false;
		}
		first = p;
	}
	if (!first) {
		snprintf(why, why_bytes, "no %s interface is on the DPDK path",
			 outside ? "outside" : "inside");
		return false;
	}
	*rss = first->rss;
	return true;
}

static uint16_t mtu_for(const struct rte_eth_dev_info *info, const struct nat_interface_config *c,
			uint16_t id)
{
	uint16_t own = 1500;

	if (c->mtu_bytes)
		return c->mtu_bytes;
	if (rte_eth_dev_get_mtu(id, &own) || own < RTE_ETHER_MIN_MTU || own > RTE_ETHER_MTU)
		own = RTE_ETHER_MTU; /* more only on request: it costs buffers */
	return info->max_mtu && own > info->max_mtu ? info->max_mtu : own;
}

static int on_removal(uint16_t id, enum rte_eth_event_type event, void *port, void *unused)
{
	(void)id, (void)event, (void)unused;
	atomic_store(&((struct port *)port)->gone, true);
	return 0;
}

static int port_open(struct port *p, const struct nat_interface_config *c, uint32_t n_workers,
		     struct rte_mempool *pool, char *why, size_t why_bytes)
{
	struct rte_eth_dev_info info;
	char name[128];
	int status;

	snprintf(p->name, sizeof p->name, "%s", c->name);
	p->outside = c->role == NAT_ROLE_OUTSIDE;
	snprintf(p->device, sizeof p->device, "%s", c->device);
	if (guard_needed(c->device, p->copies, sizeof p->copies))
		p->copies_index = if_nametoindex(p->copies);
	eal_device_name(c->device, name, sizeof name);
	if (rte_eth_dev_get_port_by_name(name, &p->id) || rte_eth_dev_info_get(p->id, &info)) {
		snprintf(why, why_bytes,
			 "interface %s: DPDK found no device %s; is it bound to vfio-pci or uio_pci_generic, "
			 "and is the driver's package installed?",
			 c->name, name);
		return -1;
	}
	p->n_queues = info.max_rx_queues < info.max_tx_queues ? info.max_rx_queues : info.max_tx_queues;
	if (p->n_queues > n_workers)
		p->n_queues = (uint16_t)n_workers;
	p->shared_tx = p->n_queues < n_workers;
	p->mtu_bytes = mtu_for(&info, c, p->id);
	status = start_with(p, &info, pool, true);
	p->interrupts = status == 0;
	if (status)
		status = start_with(p, &info, pool, false);
	if (status || rte_eth_macaddr_get(p->id, &p->mac)) {
		snprintf(why, why_bytes,
			 "interface %s: device %s cannot be started with %u queues and an MTU of %u: %s",
			 c->name, name, p->n_queues, p->mtu_bytes, rte_strerror(-status));
		return -1;
	}
	(void)rte_eth_dev_set_mtu(p->id,
				  p->mtu_bytes); /* vdevs that have no such call take frames as they come */
	rss_open(p, &info, n_workers);
	(void)rte_eth_allmulticast_enable(p->id);
	(void)rte_eth_dev_callback_register(p->id, RTE_ETH_EVENT_INTR_RMV, on_removal, p);
	if (p->vlan)
		(void)rte_eth_dev_vlan_filter(p->id, p->vlan, 1);
	bond_open(&p->bond, p->id, c);
	(void)port_poll_link(p);
	p->told_up = true; /* which is how a new twin begins */
	return 0;
}

static bool takes_tags(const struct nat_config *config, const char *device)
{
	for (uint32_t i = 0; i < config->n_interfaces; i++)
		if (config->interfaces[i].vlan && !strcmp(config->interfaces[i].device, device))
			return true;
	return false;
}

/* Is the device open already, for another VLAN of it? */
static bool port_join(struct ports *ports, struct port *p, const struct nat_interface_config *c)
{
	for (uint32_t i = 0; i < ports->n; i++) {
		const struct port *first = &ports->port[i];

		const uint8_t iface = p->iface, index = p->index;
		const uint16_t vlan = p->vlan;

		if (first->first != first->index || strcmp(first->device, c->device))
			continue;

		*p = *first;
		p->iface = iface;
		p->index = index;
		p->vlan = vlan;
		p->outside = c->role == NAT_ROLE_OUTSIDE;
		snprintf(p->name, sizeof p->name, "%s", c->name);
		if (c->mtu_bytes && c->mtu_bytes < p->mtu_bytes)
			p->mtu_bytes = c->mtu_bytes;
		(void)rte_eth_dev_vlan_filter(p->id, p->vlan, 1);
		return true;
	}
	return false;
}

int ports_prepare(struct ports *ports, const struct nat_config *config, uint32_t n_workers, char *why,
		  size_t why_bytes)
{
	uint16_t mtu;
	uint32_t n = dpdk_interfaces(config, &mtu);

	memset(ports, 0, sizeof *ports);
	memset(ports->of_iface, PORT_NONE, sizeof ports->of_iface);
	ports->pool = rte_pktmbuf_pool_create("packets", buffers(n, n_workers), CACHE, sizeof(struct note),
					      room_bytes(mtu), SOCKET_ID_ANY);
	if (ports->pool)
		return 0;
	snprintf(why, why_bytes, "no memory for %u packet buffers (%u MB): %s; raise vm.nr_hugepages",
		 buffers(n, n_workers), ports_memory_mb(config, n_workers), rte_strerror(rte_errno));
	return -1;
}

int ports_open(struct ports *ports, const struct nat_config *config, uint32_t n_workers, char *why,
	       size_t why_bytes)
{
	char detail[384];

	if (!ports->pool && ports_prepare(ports, config, n_workers, why, why_bytes))
		return -1;
	for (uint32_t i = 0; i < config->n_interfaces; i++) {
		struct port *p = &ports->port[ports->n];

		if (config->interfaces[i].path != NAT_PATH_DPDK)
			continue;
		p->iface = (uint8_t)i;
		p->index = p->first = (uint8_t)ports->n;
		p->vlan = config->interfaces[i].vlan;
		ports->tagged |= p->vlan != 0;
		if (port_join(ports, p, &config->interfaces[i])) {
			ports->of_iface[i] = p->index;
			ports->n++;
			continue;
		}
		p->takes_tags = takes_tags(config, config->interfaces[i].device);
		if (port_open(p, &config->interfaces[i], n_workers, ports->pool, detail, sizeof detail)) {
			snprintf(why, why_bytes, "%s", detail);
			return -1;
		}
		ports->of_iface[i] = p->index;
		ports->n++;
	}
	return 0;
}

void ports_close(struct ports *ports)
{
	for (uint32_t i = 0; i < ports->n; i++)
		if (ports->port[i].first == i) {
			rte_eth_dev_stop(ports->port[i].id);
			rte_eth_dev_close(ports->port[i].id);
		}
	ports->n = 0;
}

bool port_is_replaced(const struct port *p)
{
	return p->gone && p->copies[0] && if_nametoindex(p->copies);
}

const char *port_follow_bond(struct port *p)
{
	return bond_follow(&p->bond, p->id);
}

bool port_poll_link(struct port *p)
{
	struct rte_eth_link link = {0};
	bool up = rte_eth_link_get_nowait(p->id, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;

	if (p->copies[0]) { /* these drivers say "up" whatever happens to the interface */
		if (if_nametoindex(p->copies) != p->copies_index)
			p->gone = true;
		up = guard_has_carrier(p->copies);
	}
	if (p->bond.n)
		up = up && bond_links(&p->bond) > 0;
	up = up && !p->gone;
	p->speed_mbps = up && link.link_speed != RTE_ETH_SPEED_NUM_UNKNOWN ? link.link_speed : 0;
	return atomic_exchange(&p->up, up) != up;
}

void port_view(const struct port *p, struct request_port *view)
{
	struct rte_eth_stats stats = {0};

	(void)rte_eth_stats_get(p->id, &stats);
	*view = (struct request_port){
		.name = p->name,
		.twin = p->name,
		.up = p->up,
		.speed_mbps = p->speed_mbps,
		.mtu_bytes = p->mtu_bytes,
		.queues = p->n_queues,
		.rx_packets = stats.ipackets,
		.rx_bytes = stats.ibytes,
		.rx_missed = stats.imissed + stats.rx_nombuf,
		.rx_errors = stats.ierrors,
		.tx_packets = stats.opackets,
		.tx_bytes = stats.obytes,
		.tx_errors = stats.oerrors + p->twin_refused,
		.twin_to_packets = p->twin_to,
		.twin_from_packets = p->twin_from,
	};
	snprintf(view->mac, sizeof view->mac, "%02x:%02x:%02x:%02x:%02x:%02x", p->mac.addr_bytes[0],
		 p->mac.addr_bytes[1], p->mac.addr_bytes[2], p->mac.addr_bytes[3], p->mac.addr_bytes[4],
		 p->mac.addr_bytes[5]);
}
