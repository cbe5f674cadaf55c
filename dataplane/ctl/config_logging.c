/* The section `logging`: to whom the life of mappings is told, of which pools, and how much.
 *
 * One element is one collector. What each pool must tell is what its collectors want together; it goes into
 * nat_pool_config.log, which is all that the core knows of logging.
 */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

#include "config_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const char *const protocol_words[] = {[CONFIG_LOG_IPFIX] = "ipfix", [CONFIG_LOG_SYSLOG] = "syslog"};
static const char *const transport_words[] = {[CONFIG_LOG_UDP] = "udp", [CONFIG_LOG_TCP] = "tcp"};
static const char *const switch_words[] = {"off", "on"};
static const uint16_t default_port[] = {[CONFIG_LOG_IPFIX] = 4739, [CONFIG_LOG_SYSLOG] = 514};

const char *config_log_protocol_word(enum config_log_protocol protocol)
{
	return protocol_words[protocol];
}

const char *config_log_transport_word(enum config_log_transport transport)
{
	return transport_words[transport];
}

/* ADDRESS or ADDRESS:PORT */
static bool read_endpoint(struct config *config, const struct node *node, struct config_collector *out)
{
	char address[INET_ADDRSTRLEN];
	const char *colon, *text;
	char *end = NULL;
	struct in_addr parsed;
	unsigned long port = out->port;
	size_t length;
	bool good;

	if (!node || !config_as_scalar(config, node, "collector"))
		return false;
	text = node->text;
	colon = strchr(text, ':');
	length = colon ? (size_t)(colon - text) : strlen(text);
	good = length < sizeof(address);
	if (good) {
		memcpy(address, text, length);
		address[length] = 0;
		good = inet_pton(AF_INET, address, &parsed) == 1;
	}
	if (good && colon) {
		port = colon[1] >= '1' && colon[1] <= '9' ? strtoul(colon + 1, &end, 10) : 0;
		good = end && !*end && port >= 1 && port <= 65535;
	}
	if (!good) {
		config_error(config, node,
			     "\"collector\" is %s; write an IPv4 address and a port, such as "
			     "\"192.0.2.10:4739\"",
			     config_shown(config, text));
		return false;
	}
	out->address = ntohl(parsed.s_addr);
	out->port = (uint16_t)port;
	if (out->address >> 24 != 127 && config_martian((struct nat_range){out->address, out->address})) {
		config_error(config, node, "\"collector\" is %s; nothing can be sent to one host there",
			     config_martian((struct nat_range){out->address, out->address}));
		return false;
	}
	return true;
}

static void read_pool_names(struct config *config, const struct node *node, bool *pools)
{
	const char **names, *meant;

	if (!config_as_list(config, node, "pools of a collector"))
		return;
	if (!node->first)
		config_error(config, node,
			     "the collector names no pool; remove \"pools\" to log all of them");
	for (const struct node *element = node->first; element; element = element->next) {
		uint32_t i = 0;

		if (!config_as_scalar(config, element, "pools"))
			continue;
		while (i < config->nat.n_pools && strcmp(config->nat.pools[i].name, element->text) != 0)
			i++;
		if (i < config->nat.n_pools) {
			pools[i] = true;
			continue;
		}
		names = config_take(config, config->nat.n_pools + 1, sizeof(*names));
		for (i = 0; i < config->nat.n_pools; i++)
			names[i] = config->nat.pools[i].name;
		meant = config_nearest(element->text, names, config->nat.n_pools);
		if (meant)
			config_error(config, element, "there is no pool %s; did you mean \"%s\"?",
				     config_shown(config, element->text), meant);
		else
			config_error(config, element,
				     "there is no pool %s; add it under pools, or name one that is there",
				     config_shown(config, element->text));
	}
}

static bool same_collector(const struct config_collector *a, const struct config_collector *b)
{
	return a->protocol == b->protocol && a->transport == b->transport && a->address == b->address &&
	       a->port == b->port;
}

/* Pools tell what any of their collectors wants to hear. */
static void tell_pools(struct config *config, const struct node *node, const struct config_collector *c)
{
	/* the list is the configuration's own; it is constant for those who read it */
	struct nat_pool_config *pool = (struct nat_pool_config *)(uintptr_t)config->nat.pools;

	for (uint32_t i = 0; i < config->nat.n_pools; i++) {
		if (c->pools && !c->pools[i])
			continue;
		pool[i].log |= c->destinations ? NAT_LOG_PORTS | NAT_LOG_SESSIONS : NAT_LOG_PORTS;
		if (!c->destinations && pool[i].mapping == NAT_ENDPOINT_DEPENDENT && !pool[i].block_ports &&
		    !pool[i].deterministic.length_bits && !config_is_full(config))
			config_warning(
				config, node,
				"pool %s is endpoint-dependent: hosts share its ports at the same time, "
				"and only the destination tells them apart; set destinations: on, or "
				"give the pool block_ports or mapping: endpoint-independent",
				config_shown(config, pool[i].name));
	}
}

static bool read_collector(struct config *config, const struct node *node, struct config_collector *out)
{
	enum { PROTOCOL, TRANSPORT, COLLECTOR, POOLS, DESTINATIONS };
	static const struct key keys[] = {[PROTOCOL] = {"protocol", true},
					  [TRANSPORT] = {"transport", false},
					  [COLLECTOR] = {"collector", true},
					  [POOLS] = {"pools", false},
					  [DESTINATIONS] = {"destinations", false}};
	const struct node *value[COUNT(keys)];
	unsigned word = 0;

	if (!config_fields(config, node, "the collector", keys, COUNT(keys), value))
		return false;
	if (config_read_word(config, value[PROTOCOL], "protocol", protocol_words, COUNT(protocol_words),
			     &word))
		out->protocol = (enum config_log_protocol)word;
	out->port = default_port[out->protocol];
	if (config_read_word(config, value[TRANSPORT], "transport", transport_words, COUNT(transport_words),
			     &word))
		out->transport = (enum config_log_transport)word;
	if (config_read_word(config, value[DESTINATIONS], "destinations", switch_words, COUNT(switch_words),
			     &word))
		out->destinations = word == 1;
	if (value[POOLS]) {
		out->pools = config_take(config, config->nat.n_pools + 1, sizeof(*out->pools));
		read_pool_names(config, value[POOLS], out->pools);
	}
	return read_endpoint(config, value[COLLECTOR], out);
}

void config_logging(struct config *config, const struct node *node, struct places *places)
{
	struct config_collector *list;
	uint32_t n = 0;

	if (!node || !config_as_list(config, node, "logging"))
		return;
	if (node->n > CONFIG_COLLECTORS_MAX) {
		config_error(config, node, "%u collectors; at most %u are possible, let one pass records on",
			     node->n, CONFIG_COLLECTORS_MAX);
		return;
	}
	list = config_take(config, node->n, sizeof(*list));
	places->collector = config_take(config, node->n, sizeof(struct node *));
	for (const struct node *element = node->first; element; element = element->next) {
		list[n] = (struct config_collector){0};
		if (!read_collector(config, element, &list[n]))
			continue;
		for (uint32_t i = 0; i < n; i++)
			if (same_collector(&list[i], &list[n]))
				config_error(
					config, element,
					"this collector is there twice, and would get each record twice; "
					"keep one, with the pools of both");
		tell_pools(config, element, &list[n]);
		places->collector[n] = element;
		n++;
	}
	config->collectors = list;
	config->n_collectors = n;
}
