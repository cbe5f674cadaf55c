/* A write to a TUN descriptor is a packet that arrives on that interface, so the kernel routes it, finds
 * the neighbour, fragments, shapes, exactly as for any other. The rules of nft.c let what comes from
 * dsnat0 pass: it is translated already.
 *
 * Its settings are made by netlink (IFLA_INET_CONF), not under /proc/sys, which is often read-only:
 *   forwarding    on: else the kernel drops what is not for itself
 *   accept_local  on: ICMP errors that the engine makes come from the gateway's own address
 *   rp_filter     loose where the host filters at all: the way back to a source is by another interface. The
 *                 kernel takes the greater of this and conf.all, so 2 here turns a strict host loose, and with
 *                 no filter anywhere (0) a source without a route, such as a pool address, is right too
 */
#include "tun.h"

#include <errno.h>
#include <fcntl.h>
#include <libmnl/libmnl.h>
#include <linux/if_link.h>
#include <linux/if_tun.h>
#include <linux/ip.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

struct setting { /* IPV4_DEVCONF_* */
	uint16_t what;
	uint32_t value;
};

static int talk(struct nlmsghdr *request)
{
	char buffer[8192];
	struct mnl_socket *s = mnl_socket_open2(NETLINK_ROUTE, SOCK_CLOEXEC);
	ssize_t n = -1;

	if (s && !mnl_socket_bind(s, 0, MNL_SOCKET_AUTOPID) &&
	    mnl_socket_sendto(s, request, request->nlmsg_len) > 0)
		n = mnl_socket_recvfrom(s, buffer, sizeof buffer);
	if (n > 0)
		n = mnl_cb_run(buffer, (size_t)n, request->nlmsg_seq, mnl_socket_get_portid(s), NULL, NULL);
	n = n < 0 ? -errno : 0;
	if (s)
		mnl_socket_close(s);
	return (int)n;
}

/* Settings of one interface, and up if asked. */
static int set(const char *name, const struct setting *settings, size_t n, bool up, uint32_t mtu_bytes)
{
	char buffer[1024];
	struct nlmsghdr *request = mnl_nlmsg_put_header(buffer);
	struct ifinfomsg *info = mnl_nlmsg_put_extra_header(request, sizeof *info);
	struct nlattr *families, *inet, *conf;
	unsigned ifindex = if_nametoindex(name);

	if (!ifindex)
		return -ENODEV;
	request->nlmsg_type = RTM_SETLINK;
	request->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	request->nlmsg_seq = 1;
	info->ifi_index = (int)ifindex;
	info->ifi_flags = info->ifi_change = up ? IFF_UP : 0;
	if (mtu_bytes)
		mnl_attr_put_u32(request, IFLA_MTU, mtu_bytes);
	families = mnl_attr_nest_start(request, IFLA_AF_SPEC);
	inet = mnl_attr_nest_start(request, AF_INET);
	conf = mnl_attr_nest_start(request, IFLA_INET_CONF);
	for (size_t i = 0; i < n; i++)
		mnl_attr_put_u32(request, settings[i].what, settings[i].value);
	mnl_attr_nest_end(request, conf);
	mnl_attr_nest_end(request, inet);
	mnl_attr_nest_end(request, families);
	return talk(request);
}

int tun_forward_from(const char *name)
{
	static const struct setting forward[] = {{IPV4_DEVCONF_FORWARDING, 1}};

	return set(name, forward, 1, false, 0);
}

/* Does the host filter by reverse path? 1 and 2 of conf.all count for every interface. */
static bool filters(void)
{
	FILE *file = fopen("/proc/sys/net/ipv4/conf/all/rp_filter", "re");
	int value = 1;

	if (file) {
		if (fscanf(file, "%d", &value) != 1)
			value = 1;
		fclose(file);
	}
	return value != 0;
}

/* No router solicitations and no link-local address: nobody is at the other end. */
static void without_ipv6(void)
{
	FILE *file = fopen("/proc/sys/net/ipv6/conf/" TUN_NAME "/disable_ipv6", "we");

	if (file) {
		fputs("1", file);
		fclose(file);
	}
}

int tun_open(char *why, size_t why_bytes)
{
	struct setting settings[] = {{IPV4_DEVCONF_FORWARDING, 1},
				     {IPV4_DEVCONF_ACCEPT_LOCAL, 1},
				     {IPV4_DEVCONF_RP_FILTER, filters() ? 2 : 0},
				     {IPV4_DEVCONF_SEND_REDIRECTS, 0}};
	struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK), status;

	strncpy(request.ifr_name, TUN_NAME, sizeof request.ifr_name - 1);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &request)) {
		snprintf(why, why_bytes, "%s cannot be made (%s); %s", TUN_NAME, strerror(errno),
			 errno == EBUSY ? "another dsnatd in this network namespace has it"
					: "the queue path needs /dev/net/tun and the right to use it");
		if (fd >= 0)
			close(fd);
		return -1;
	}
	without_ipv6();
	status = set(TUN_NAME, settings, sizeof settings / sizeof settings[0], true, 65535);
	if (status) {
		snprintf(why, why_bytes, "%s cannot be set up: %s", TUN_NAME, strerror(-status));
		close(fd);
		return -1;
	}
	return fd;
}
