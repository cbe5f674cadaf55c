/* The section `sync`: the other gateway of the pair, and how it is told of sessions. */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

#include "config_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define DEFAULT_PORT     3781u
#define HOLD_BACK_MAX_MS 60000u

/* ADDRESS or ADDRESS:PORT */
static bool read_endpoint(struct config *config, const struct node *node, const char *key,
			  uint32_t *address_be, uint16_t *port_be)
{
	char address[INET_ADDRSTRLEN];
	struct in_addr parsed;
	unsigned long port = DEFAULT_PORT;
	char *end = NULL;

	if (!config_as_scalar(config, node, key))
		return false;
	const char *colon = strchr(node->text, ':');
	const size_t length = colon ? (size_t)(colon - node->text) : strlen(node->text);
	bool good = length < sizeof(address);
	if (good) {
		memcpy(address, node->text, length);
		address[length] = 0;
		good = inet_pton(AF_INET, address, &parsed) == 1 && parsed.s_addr != 0;
	}
	if (good && colon) {
		port = colon[1] >= '1' && colon[1] <= '9' ? strtoul(colon + 1, &end, 10) : 0;
		good = end && !*end && port >= 1 && port <= 65535;
	}
	if (!good) {
		config_error(config, node,
			     "\"%s\" is %s; write an IPv4 address and a port, such as \"192.0.2.2:3781\"",
			     key, config_shown(config, node->text));
		return false;
	}
	*address_be = parsed.s_addr;
	*port_be = htons((uint16_t)port);
	return true;
}

void config_sync(struct config *config, const struct node *node)
{
	enum { PEER, LISTEN, KEY, HOLD_BACK };
	static const struct key keys[] = {[PEER] = {"peer", true},
					  [LISTEN] = {"listen", true},
					  [KEY] = {"key", true},
					  [HOLD_BACK] = {"hold_back", false}};
	struct sync_settings *sync = &config->sync;
	const struct node *value[COUNT(keys)];
	uint32_t hold_back_s = 2;

	if (!node || !config_fields(config, node, "sync", keys, COUNT(keys), value))
		return;
	if (value[PEER] && value[LISTEN] &&
	    read_endpoint(config, value[PEER], "peer", &sync->peer_be, &sync->peer_port_be) &&
	    read_endpoint(config, value[LISTEN], "listen", &sync->listen_be, &sync->listen_port_be)) {
		if (sync->peer_be == sync->listen_be)
			config_error(config, value[PEER],
				     "\"peer\" and \"listen\" are the same address; name the other gateway's "
				     "as \"peer\"");
		sync->on = true;
	}
	if (value[KEY] && config_as_scalar(config, value[KEY], "key")) {
		const char *text = value[KEY]->text;
		/* what stands there otherwise may be the key itself: it is not shown */
		if (strncmp(text, "file:/", 6) != 0 || strlen(text + 5) >= sizeof(sync->key))
			config_error(config, value[KEY],
				     "\"key\" names no file; write \"file:/etc/dsnat/sync.key\", the key "
				     "itself stands in it");
		else
			strcpy(sync->key, text + 5);
	}
	if (value[HOLD_BACK] &&
	    config_read_duration(config, value[HOLD_BACK], "hold_back", 0, &hold_back_s) &&
	    hold_back_s > HOLD_BACK_MAX_MS / 1000) {
		config_error(config, value[HOLD_BACK],
			     "\"hold_back\" is longer than a minute; a failover would lose what began since");
		hold_back_s = 0;
	}
	sync->hold_back_ms = hold_back_s * 1000;
}
