/* net_af_packet and net_pcap read a *copy* of each packet. The kernel goes on with the original: it would
 * forward it untranslated, answer with a TCP reset, or answer ARP beside us. So a netfilter hook at the
 * interface's ingress, which comes after the copy and before everything else, drops the original. Without it
 * we do not start.
 *
 * (net_af_xdp, net_tap and net_memif take their packets for themselves and need nothing.)
 */
#include "guard.h"

#include <errno.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <nftables/libnftables.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

bool guard_needed(const char *device, char *kernel_interface, size_t bytes)
{
	static const char *const copies[] = {"net_af_packet", "eth_af_packet", "net_pcap", "eth_pcap"};
	const char *at = NULL;

	for (size_t i = 0; i < sizeof copies / sizeof *copies; i++)
		if (!strncmp(device, copies[i], strlen(copies[i])))
			at = strstr(device, "iface="); /* also rx_iface= */
	if (!at)
		return false;
	at += strlen("iface=");
	snprintf(kernel_interface, bytes, "%.*s", (int)strcspn(at, ","), at);
	return true;
}

/* Not by IFF_RUNNING, which the kernel updates up to a second later. */
bool guard_has_carrier(const char *name)
{
	struct ethtool_value link = {.cmd = ETHTOOL_GLINK};
	struct ifreq request = {.ifr_data = (char *)&link};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	bool asked;

	if (fd < 0)
		return false;
	strncpy(request.ifr_name, name, sizeof request.ifr_name - 1);
	asked = !ioctl(fd, SIOCETHTOOL, &request);
	close(fd);
	return asked && link.data;
}

static int bring_up(const char *name)
{
	struct ifreq request = {0};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), status;

	if (fd < 0)
		return -errno;
	strncpy(request.ifr_name, name, sizeof request.ifr_name - 1);
	status = ioctl(fd, SIOCGIFFLAGS, &request);
	if (!status && !(request.ifr_flags & IFF_UP)) {
		request.ifr_flags |= IFF_UP;
		status = ioctl(fd, SIOCSIFFLAGS, &request);
	}
	status = status ? -errno : 0;
	close(fd);
	return status;
}

static int guard_install(const char *name, char *why, size_t why_bytes)
{
	struct nft_ctx *nft;
	char rules[1024];
	int status;

	if (!if_nametoindex(name)) {
		snprintf(why, why_bytes, "there is no interface %s; make it before dsnatd starts", name);
		return -1;
	}
	nft = nft_ctx_new(NFT_CTX_DEFAULT);
	if (!nft) {
		snprintf(why, why_bytes, "libnftables does not start");
		return -1;
	}
	nft_ctx_buffer_error(nft);
	nft_ctx_buffer_output(nft);
	/* Made anew each time, in one transaction: an older table may hang on an interface that is gone. */
	snprintf(rules, sizeof rules,
		 "add table netdev dsnat-%1$s; delete table netdev dsnat-%1$s; add table netdev dsnat-%1$s; "
		 "add chain netdev dsnat-%1$s ingress { type filter hook ingress device \"%1$s\" priority "
		 "-500; "
		 "policy drop; }",
		 name);
	status = nft_run_cmd_from_buffer(nft, rules);
	if (status)
		snprintf(why, why_bytes,
			 "the kernel's own copy of what arrives on %s cannot be dropped (%.200s); a kernel "
			 "with "
			 "CONFIG_NF_TABLES_NETDEV and the right to use nftables are needed",
			 name, nft_ctx_get_error_buffer(nft));
	nft_ctx_free(nft);
	if (status)
		return -1;
	if ((status = bring_up(name))) {
		snprintf(why, why_bytes, "interface %s cannot be brought up: %s", name, strerror(-status));
		return -1;
	}
	return 0;
}

void guard_remove(const char *name)
{
	struct nft_ctx *nft = nft_ctx_new(NFT_CTX_DEFAULT);
	char rules[256];

	if (!nft)
		return;
	nft_ctx_buffer_error(nft);
	snprintf(rules, sizeof rules, "add table netdev dsnat-%1$s; delete table netdev dsnat-%1$s", name);
	(void)nft_run_cmd_from_buffer(nft, rules);
	nft_ctx_free(nft);
}

int guards_install(const struct nat_config *config, char *why, size_t why_bytes)
{
	char name[64];

	for (uint32_t i = 0; i < config->n_interfaces; i++) {
		const struct nat_interface_config *c = &config->interfaces[i];

		if (c->path != NAT_PATH_DPDK)
			continue;
		if (guard_needed(c->device, name, sizeof name) && guard_install(name, why, why_bytes))
			return -1;
		for (uint32_t m = 0; m < c->n_members; m++)
			if (guard_needed(c->member[m], name, sizeof name) &&
			    guard_install(name, why, why_bytes))
				return -1;
	}
	return 0;
}
