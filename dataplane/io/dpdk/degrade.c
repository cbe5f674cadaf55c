/* A twin and the kernel's interface of its port cannot both have the configured name, so the twin goes and
 * the interface is renamed. To keepalived and the network manager it is one that went and came back.
 *
 * The way back is a start without --degraded: dsnat-nic binds the devices to their DPDK driver, which
 * removes the kernel's interfaces, and the twins are made anew.
 */
#include "degrade.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <libmnl/libmnl.h>
#include <linux/ethtool.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "eal.h"
#include "guard.h"

#define PCI       "/sys/bus/pci/"
#define PROBE_MS  50
#define PROBE_MAX 60 /* a NIC's driver takes a second or two */

static int ask(unsigned long request, struct ifreq *argument)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), status;

	if (fd < 0)
		return -errno;
	status = ioctl(fd, request, argument) ? -errno : 0;
	close(fd);
	return status;
}

/* A longer one names no interface: what is asked of it then fails. */
static void put_name(char to[IFNAMSIZ], const char *name)
{
	memset(to, 0, IFNAMSIZ);
	memcpy(to, name, strnlen(name, IFNAMSIZ - 1));
}

static bool is_twin(const char *name)
{
	struct ethtool_drvinfo driver = {.cmd = ETHTOOL_GDRVINFO};
	struct ifreq request = {.ifr_data = (char *)&driver};

	put_name(request.ifr_name, name);
	return !ask(SIOCETHTOOL, &request) && !strcmp(driver.driver, "tun");
}

static int remove_link(const char *name)
{
	char buffer[4096];
	struct nlmsghdr *message = mnl_nlmsg_put_header(buffer);
	struct ifinfomsg *link = mnl_nlmsg_put_extra_header(message, sizeof *link);
	struct mnl_socket *s = mnl_socket_open2(NETLINK_ROUTE, SOCK_CLOEXEC);
	ssize_t n = -1;
	int status;

	message->nlmsg_type = RTM_DELLINK;
	message->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	link->ifi_index = (int)if_nametoindex(name);
	if (s && !mnl_socket_bind(s, 0, MNL_SOCKET_AUTOPID) &&
	    mnl_socket_sendto(s, message, message->nlmsg_len) > 0)
		n = mnl_socket_recvfrom(s, buffer, sizeof buffer);
	if (n > 0)
		n = mnl_cb_run(buffer, (size_t)n, 0, mnl_socket_get_portid(s), NULL, NULL);
	status = n < 0 ? -errno : 0;
	if (s)
		mnl_socket_close(s);
	return status;
}

/* The kernel renames only what is down. */
static int rename_link(const char *from, const char *to)
{
	struct ifreq request = {0};
	int status;

	put_name(request.ifr_name, from);
	if ((status = ask(SIOCGIFFLAGS, &request)))
		return status;
	request.ifr_flags &= (short)~IFF_UP;
	if ((status = ask(SIOCSIFFLAGS, &request)))
		return status;
	put_name(request.ifr_newname, to);
	if ((status = ask(SIOCSIFNAME, &request)))
		return status;
	memset(&request, 0, sizeof request);
	put_name(request.ifr_name, to);
	if ((status = ask(SIOCGIFFLAGS, &request)))
		return status;
	request.ifr_flags |= IFF_UP;
	return ask(SIOCSIFFLAGS, &request);
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	(void)!write(fd, text, strlen(text));
	close(fd);
}

static bool interface_of_pci(const char *device, char *name, size_t bytes)
{
	static const char *const where[] = {"net", "virtio*/net"};
	bool found = false;

	for (size_t i = 0; i < sizeof where / sizeof *where && !found; i++) {
		char pattern[256];
		glob_t files;

		snprintf(pattern, sizeof pattern, PCI "devices/%s/%s/*", device, where[i]);
		found = !glob(pattern, 0, NULL, &files);
		if (found)
			snprintf(name, bytes, "%s", strrchr(files.gl_pathv[0], '/') + 1);
		globfree(&files);
	}
	return found;
}

/* Away from vfio or uio, to the driver that the kernel would choose. */
static bool give_back(const char *device, char *name, size_t bytes)
{
	static const struct timespec nap = {.tv_nsec = PROBE_MS * 1000000};
	char path[256];

	if (interface_of_pci(device, name, bytes))
		return true;
	snprintf(path, sizeof path, PCI "devices/%s/driver_override", device);
	put(path, "\n");
	snprintf(path, sizeof path, PCI "devices/%s/driver/unbind", device);
	put(path, device);
	put(PCI "drivers_probe", device);
	for (int i = 0; i < PROBE_MAX; i++) {
		if (interface_of_pci(device, name, bytes))
			return true;
		nanosleep(&nap, NULL);
	}
	return false;
}

static int degrade_one(const struct nat_interface_config *c, char *why, size_t why_bytes)
{
	char name[256] = "", device[128];
	bool copies = guard_needed(c->device, name, sizeof name);
	int status = 0;

	eal_device_name(c->device, device, sizeof device);
	if (copies)
		guard_remove(name);
	else if (!eal_is_pci(c->device) || !give_back(device, name, sizeof name)) {
		snprintf(why, why_bytes,
			 "interface %s cannot be degraded: the kernel has no interface for %s", c->name,
			 device);
		return -1;
	}
	if (!strcmp(name, c->name))
		return 0;
	if (!if_nametoindex(name) && if_nametoindex(c->name) && !is_twin(c->name))
		return 0; /* renamed at an earlier start */
	if (is_twin(c->name))
		status = remove_link(c->name);
	if (!status)
		status = rename_link(name, c->name);
	if (status)
		snprintf(why, why_bytes,
			 "interface %s cannot be degraded: the kernel's %s cannot take its name: %s", c->name,
			 name, strerror(-status));
	return status;
}

int degrade_interfaces(const struct nat_config *config, char *why, size_t why_bytes)
{
	for (uint32_t i = 0; i < config->n_interfaces; i++)
		if (config->interfaces[i].device[0] && degrade_one(&config->interfaces[i], why, why_bytes))
			return -1;
	return 0;
}
