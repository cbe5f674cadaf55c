/* From `interfaces:` to the arguments of rte_eal_init(), so that nobody has to write those.
 *
 * Nothing is shared with other DPDK programs of the machine: no files and no locks are left, the file prefix
 * is unique, only the PCI devices that the configuration names are opened (and none without one). Session
 * memory is never in here: it must outlive this process, and EAL memory does not.
 *
 * Workers are pinned only to isolated CPUs (isolcpus, or a systemd slice that the image makes): pinning to a
 * CPU that others use gives no speed and makes two daemons of one machine fight for the same one.
 */
#include "eal.h"

#include <ctype.h>
#include <dirent.h>
#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_lcore.h>
#include <rte_log.h>
#include <rte_version.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ARGUMENTS_MAX (32 + (1 + NAT_MEMBERS_MAX) * NAT_INTERFACES_MAX)

struct arguments {
	char *text[ARGUMENTS_MAX];
	char kept[ARGUMENTS_MAX][1024]; /* what to free: rte_eal_init() may reorder text[] */
	int n;
};

__attribute__((format(printf, 2, 3))) static void argument(struct arguments *a, const char *format, ...)
{
	va_list list;

	if (a->n + 1 >= (int)ARGUMENTS_MAX)
		abort(); /* NAT_INTERFACES_MAX bounds them */
	va_start(list, format);
	vsnprintf(a->kept[a->n], sizeof a->kept[0], format, list);
	va_end(list);
	a->text[a->n] = a->kept[a->n];
	a->n++;
}

bool eal_is_pci(const char *device)
{
	unsigned domain, bus, slot, function;
	int end = 0;

	return sscanf(device, "%x:%x:%x.%x%n", &domain, &bus, &slot, &function, &end) == 4 && end > 0 &&
	       (device[end] == '\0' || device[end] == ',');
}

void eal_device_name(const char *device, char *name, size_t name_bytes)
{
	snprintf(name, name_bytes, "%.*s", (int)strcspn(device, ","), device);
}

static unsigned long number_in(const char *path)
{
	FILE *file = fopen(path, "re");
	unsigned long number = 0;

	if (file && fscanf(file, "%lu", &number) != 1)
		number = 0;
	if (file)
		fclose(file);
	return number;
}

bool eal_has_hugepages(void)
{
	const char *base = "/sys/kernel/mm/hugepages";
	DIR *dir = opendir(base);
	struct dirent *entry;
	bool any = false;

	while (dir && !any && (entry = readdir(dir))) {
		char path[512];

		snprintf(path, sizeof path, "%s/%s/free_hugepages", base, entry->d_name);
		any = entry->d_name[0] != '.' && number_in(path) > 0;
	}
	if (dir)
		closedir(dir);
	return any;
}

/* The isolated CPUs that this process may use, in order. */
static uint32_t isolated(int32_t *core, uint32_t max)
{
	FILE *file = fopen("/sys/devices/system/cpu/isolated", "re");
	cpu_set_t allowed;
	int first, last;
	uint32_t n = 0;

	if (!file)
		return 0;
	if (sched_getaffinity(0, sizeof allowed, &allowed))
		CPU_ZERO(&allowed);
	while (fscanf(file, "%d", &first) == 1) {
		int mark = fgetc(file);

		last = first;
		if (mark == '-') {
			if (fscanf(file, "%d", &last) != 1)
				break;
			mark = fgetc(file);
		}
		for (int cpu = first; cpu <= last && n < max; cpu++)
			if (CPU_ISSET((size_t)cpu, &allowed))
				core[n++] = cpu;
		if (mark != ',')
			break;
	}
	fclose(file);
	return n;
}

uint32_t eal_isolated_cores(void)
{
	int32_t core[NAT_WORKERS_MAX];

	return isolated(core, NAT_WORKERS_MAX);
}

int32_t eal_core_of(uint32_t worker, uint32_t n_workers)
{
	int32_t core[NAT_WORKERS_MAX];
	uint32_t n = isolated(core, NAT_WORKERS_MAX);

	return n >= n_workers && worker < n ? core[worker] : -1;
}

/* "(0,1)": any CPU that we may use */
static void floating(char *text, size_t text_bytes)
{
	cpu_set_t allowed;
	size_t used = 0;

	if (sched_getaffinity(0, sizeof allowed, &allowed))
		CPU_SET(0, &allowed);
	text[0] = '\0';
	for (int cpu = 0; cpu < CPU_SETSIZE && used + 8 < text_bytes; cpu++)
		if (CPU_ISSET((size_t)cpu, &allowed))
			used += (size_t)snprintf(text + used, text_bytes - used, "%s%d", used ? "," : "(",
						 cpu);
	snprintf(text + used, text_bytes - used, ")");
}

static void lcores(struct arguments *a, uint32_t n_workers)
{
	char any[128], text[256];
	size_t used;

	floating(any, sizeof any);
	used = (size_t)snprintf(text, sizeof text, "0@%s", any);
	for (uint32_t w = 0; w < n_workers && used < sizeof text; w++) {
		int32_t core = eal_core_of(w, n_workers);

		used += core < 0 ? (size_t)snprintf(text + used, sizeof text - used, ",%u@%s", w + 1, any)
				 : (size_t)snprintf(text + used, sizeof text - used, ",%u@%d", w + 1, core);
	}
	argument(a, "--lcores=%s", text);
}

/* The defaults of net_af_packet suit a demonstration: 512 frames, which a sleeping worker loses at once. */
static void vdev(struct arguments *a, const char *device, uint16_t mtu_bytes, uint32_t n_workers)
{
	char more[96] = "";
	size_t used = 0;

	if (!strncmp(device, "net_af_packet", strlen("net_af_packet"))) {
		if (!strstr(device, "frame") && !strstr(device, "blocksz"))
			used = (size_t)snprintf(more, sizeof more, ",blocksz=65536,framesz=%u,framecnt=%u",
						mtu_bytes > 1900 ? 16384 : 2048,
						mtu_bytes > 1900 ? 1024 : 4096);
		if (!strstr(device, "qpairs"))
			snprintf(more + used, sizeof more - used, ",qpairs=%u", n_workers);
	}
	argument(a, "--vdev=%s%s", device, more);
	if (!strncmp(device, "net_memif", strlen("net_memif")) && strstr(device, "zero-copy=yes"))
		argument(a, "--single-file-segments"); /* the peer maps our buffers, by one descriptor */
}

/* True: a PCI device. */
static bool add_device(struct arguments *a, const char *device, const struct nat_interface_config *c,
		       uint32_t n_workers)
{
	if (eal_is_pci(device)) {
		argument(a, "--allow=%s", device);
		return true;
	}
	vdev(a, device, c->mtu_bytes, n_workers);
	return false;
}

/* DPDK 23.11 changed the word. */
#if RTE_VERSION >= RTE_VERSION_NUM(23, 11, 0, 0)
#define MEMBER "member"
#else
#define MEMBER "slave"
#endif

/* Members come first, the driver looks for them. True: one is a PCI device. */
static bool add_bond(struct arguments *a, const struct nat_interface_config *c, uint32_t n_workers)
{
	char members[NAT_MEMBERS_MAX * 140] = "", name[128];
	size_t used = 0;
	bool pci = false;

	for (uint32_t m = 0; m < c->n_members; m++) {
		pci |= add_device(a, c->member[m], c, n_workers);
		eal_device_name(c->member[m], name, sizeof name);
		used += (size_t)snprintf(members + used, sizeof members - used, "," MEMBER "=%s", name);
	}
	argument(a, "--vdev=%s%s", c->device, members);
	return pci;
}

/* VLANs of one device */
static bool is_named_before(const struct nat_config *config, uint32_t interface)
{
	for (uint32_t i = 0; i < interface; i++)
		if (!strcmp(config->interfaces[i].device, config->interfaces[interface].device))
			return true;
	return false;
}

/* Returns how many PCI devices there are. */
static uint32_t devices(struct arguments *a, const struct nat_config *config, uint32_t n_workers)
{
	uint32_t n_pci = 0;

	for (uint32_t i = 0; i < config->n_interfaces; i++) {
		const struct nat_interface_config *c = &config->interfaces[i];

		if (c->path != NAT_PATH_DPDK || is_named_before(config, i))
			continue;
		n_pci += c->n_members ? add_bond(a, c, n_workers) : add_device(a, c->device, c, n_workers);
	}
	return n_pci;
}

/* The text behind `option`, or NULL. */
static const char *value_of(const char *text, const char *option)
{
	return strncmp(text, option, strlen(option)) ? NULL : text + strlen(option);
}

/* What devices() says, without the devices themselves: the PCI bus is there, with one allowed that cannot
 * be. */
static void without_devices(struct arguments *a, uint32_t first, uint32_t n_pci)
{
	uint32_t n = first;

	for (uint32_t i = first; i < (uint32_t)a->n; i++)
		if (!value_of(a->kept[i], "--vdev=") && !value_of(a->kept[i], "--allow="))
			memmove(a->kept[n++], a->kept[i], sizeof a->kept[0]);
	a->n = (int)n;
	for (uint32_t i = 0; i < n; i++)
		a->text[i] = a->kept[i];
	if (n_pci)
		argument(a, "--allow=ffff:ff:1f.7");
}

int eal_add_devices(const struct nat_config *config, uint32_t n_workers, char *why, size_t why_bytes)
{
	struct arguments *a = calloc(1, sizeof *a);
	int status = 0;

	if (!a)
		abort();
	(void)devices(a, config, n_workers);
	for (int i = 0; i < a->n && !status; i++) {
		const char *device = value_of(a->text[i], "--vdev=");

		if (device || (device = value_of(a->text[i], "--allow=")))
			status = rte_dev_probe(device);
		if (status)
			snprintf(why, why_bytes, "DPDK does not take device %.300s: %s", device,
				 rte_strerror(-status));
	}
	free(a);
	return status ? -1 : 0;
}

int eal_start(const struct nat_config *config, const struct eal_options *options, char *why, size_t why_bytes)
{
	struct arguments *a = calloc(1, sizeof *a);
	uint32_t n_pci = 0;

	if (!a)
		abort();
	argument(a, "dsnatd");
	argument(a, "%s",
		 options->no_huge ? "--no-shconf" : "--in-memory"); /* the latter excludes plain pages */
	argument(a, "--no-telemetry");
	argument(a, "--file-prefix=dsnat%d", getpid());
	argument(a, "--log-level=warning");
	lcores(a, options->n_workers);
	const uint32_t first = (uint32_t)a->n;

	n_pci = devices(a, config, options->n_workers);
	if (options->without_devices)
		without_devices(a, first, n_pci);
	if (!n_pci)
		argument(a, "--no-pci");
	if (options->no_huge) {
		argument(a, "--no-huge");
		argument(a, "-m");
		argument(a, "%u", options->memory_mb);
	}

	int status = rte_eal_init(a->n, a->text);

	free(a);
	(void)rmdir(rte_eal_get_runtime_dir()); /* EAL makes it always; we share no files, so it is empty */
	if (status >= 0)
		return 0;
	snprintf(why, why_bytes, "DPDK does not start (%s); its own words are above%s",
		 rte_strerror(rte_errno),
		 n_pci ? "; is each PCI device bound to vfio-pci or uio_pci_generic, and are there hugepages?"
		       : "");
	return -1;
}

void eal_stop(void)
{
	rte_eal_cleanup();
}
