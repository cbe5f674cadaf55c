/* The section `interfaces` of dsnatd.yaml: ports of DPDK, and interfaces that the kernel keeps. See
 * config_keys.c.
 */
#include <ctype.h>
#include <string.h>

#include "config_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const char *const role_words[] = {[NAT_ROLE_INSIDE] = "inside", [NAT_ROLE_OUTSIDE] = "outside"};
static const char *const path_words[] = {[NAT_PATH_DPDK] = "dpdk", [NAT_PATH_NFQUEUE] = "nfqueue"};

const char *config_role_word(enum nat_role role)
{
	return role_words[role];
}

const char *config_path_word(enum nat_path path)
{
	return path_words[path];
}

static bool is_hex(const char *text, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (!isdigit((unsigned char)text[i]) && (text[i] < 'a' || text[i] > 'f'))
			return false;
	return true;
}

/* 0000:00:03.0 as sysfs writes it, or a vdev: net_DRIVER[,argument=value...]. */
static void read_device(struct config *config, const struct node *node, char *out, size_t out_bytes)
{
	const char *text = node->text;
	size_t length;

	if (!config_as_scalar(config, node, "device"))
		return;
	length = strlen(text);
	if (length >= out_bytes) {
		config_error(config, node, "\"device\" is %zu characters long; at most %zu are possible",
			     length, out_bytes - 1);
		return;
	}
	for (const char *p = text; *p; p++) {
		if ((unsigned char)*p <= 0x20 || (unsigned char)*p >= 0x7f) {
			config_error(config, node, "\"device\" is %s; it may hold no blanks and only ASCII",
				     config_shown(config, text));
			return;
		}
	}
	if (!strncmp(text, "net_", 4) && length > 4) {
		memcpy(out, text, length + 1);
		return;
	}
	if (length == 12 && is_hex(text, 4) && text[4] == ':' && is_hex(text + 5, 2) && text[7] == ':' &&
	    is_hex(text + 8, 2) && text[10] == '.' && text[11] >= '0' && text[11] <= '7') {
		memcpy(out, text, length + 1);
		return;
	}
	if (length == 7 && is_hex(text, 2) && text[2] == ':')
		config_error(config, node, "\"device\" is %s without its PCI domain; write \"0000:%s\"",
			     config_shown(config, text), text);
	else
		config_error(config, node,
			     "\"device\" is %s; write a PCI address such as \"0000:00:03.0\" (lower case) or "
			     "a DPDK "
			     "device such as net_tap0",
			     config_shown(config, text));
}

/* A device that drives others, by DPDK's bonding driver. */
static void read_members(struct config *config, const struct node *interface, const struct node *list,
			 struct nat_interface_config *out)
{
	const bool bonds = !strncmp(out->device, "net_bonding", strlen("net_bonding"));

	if (list && !bonds)
		config_error(config, list,
			     "only a device such as \"net_bonding0,mode=1\" has members; remove them");
	else if (bonds && !list)
		config_error(config, interface, "the device bonds others; name them in \"members\"");
	if (!list || !bonds || !config_as_list(config, list, "\"members\""))
		return;
	if (list->n < 2 || list->n > NAT_MEMBERS_MAX)
		config_error(config, list, "%u members; a bond has 2 to %u", list->n, NAT_MEMBERS_MAX);
	for (const struct node *one = list->first; one && out->n_members < NAT_MEMBERS_MAX; one = one->next)
		read_device(config, one, out->member[out->n_members++], sizeof(out->member[0]));
}

static bool read_interface(struct config *config, const struct node *node, struct nat_interface_config *out,
			   unsigned flags)
{
	enum { NAME, ROLE, PATH, DEVICE, MEMBERS, VLAN, MTU, ICMP_ERRORS };
	static const struct key keys[] = {
		[NAME] = {"name", true},        [ROLE] = {"role", true},
		[PATH] = {"path", false},       [DEVICE] = {"device", false},
		[MEMBERS] = {"members", false}, [VLAN] = {"vlan", false},
		[MTU] = {"mtu", false},         [ICMP_ERRORS] = {"icmp_errors", false}};
	static const char *const taken[] = {"all", "default", "lo", "dsnat0"};
	const struct node *value[COUNT(keys)];
	bool has_path = true;
	unsigned word;

	if (!config_fields(config, node, "the interface", keys, COUNT(keys), value))
		return false;
	/* IFNAMSIZ is 16 with the closing zero */
	if (config_read_name(config, value[NAME], "name", 15, out->name)) {
		for (size_t i = 0; i < COUNT(taken); i++)
			if (!strcmp(out->name, taken[i]))
				config_error(config, value[NAME],
					     "the name \"%s\" is taken by Linux or by dsnatd itself; choose "
					     "another",
					     out->name);
	}
	if (config_read_word(config, value[ROLE], "role", role_words, COUNT(role_words), &word))
		out->role = (enum nat_role)word;
	if (value[PATH])
		has_path =
			config_read_word(config, value[PATH], "path", path_words, COUNT(path_words), &word);
	if (value[PATH] && has_path)
		out->path = (enum nat_path)word;
	config_read_u16(config, value[MTU], "mtu", 576, 65535, &out->mtu_bytes);
	config_read_u16(config, value[VLAN], "vlan", 1, 4094, &out->vlan);
	if (value[VLAN] && has_path && out->path == NAT_PATH_NFQUEUE)
		config_error(
			config, value[VLAN],
			"an interface with path nfqueue is the kernel's; name its VLAN interface, and remove "
			"\"vlan\"");
	if (config_read_word(config, value[ICMP_ERRORS], "icmp_errors", config_switch_words, 2, &word))
		out->silent = word == 0;
	if (value[DEVICE] && has_path && out->path == NAT_PATH_NFQUEUE)
		config_error(config, value[DEVICE],
			     "an interface with path nfqueue has no device, the kernel keeps it; remove "
			     "\"device\" or use path dpdk");
	else if (value[DEVICE])
		read_device(config, value[DEVICE], out->device, sizeof(out->device));
	else if (has_path && out->path == NAT_PATH_DPDK && !(flags & CONFIG_WITHOUT_DEVICES))
		config_error(config, node,
			     "the interface has path dpdk and no \"device\"; add its PCI address, or a DPDK "
			     "device such as net_tap0");
	read_members(config, node, value[MEMBERS], out);
	return true;
}

void config_interfaces(struct config *config, const struct node *node, struct places *places, unsigned flags)
{
	struct nat_interface_config *list;
	uint32_t n = 0, errors = config->n_errors;

	if (!node || !config_as_list(config, node, "interfaces"))
		return;
	list = config_take(config, node->n, sizeof(*list));
	places->interface = config_take(config, node->n, sizeof(struct node *));
	for (const struct node *element = node->first; element; element = element->next) {
		places->interface[n] = element;
		n += read_interface(config, element, &list[n], flags);
	}
	if (n > NAT_INTERFACES_MAX)
		config_error(config, node, "%u interfaces; at most %u are possible", n, NAT_INTERFACES_MAX);
	places->interfaces_good = config->n_errors == errors;
	for (uint32_t i = 0; i < n && flags & CONFIG_DEGRADED; i++)
		list[i].path = NAT_PATH_NFQUEUE;
	config->nat.interfaces = list;
	config->nat.n_interfaces = n;
}
