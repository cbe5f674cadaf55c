/* The section `pools` of dsnatd.yaml: public addresses, and how they are given out. See config_keys.c.
 */
#include <inttypes.h>

#include "config_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const char *const mapping_words[] = {
	[NAT_ENDPOINT_DEPENDENT] = "endpoint-dependent", [NAT_ENDPOINT_INDEPENDENT] = "endpoint-independent"};
static const char *const filtering_words[] = {[NAT_FILTER_ENDPOINT_INDEPENDENT] = "endpoint-independent",
					      [NAT_FILTER_ADDRESS] = "address-dependent",
					      [NAT_FILTER_ADDRESS_AND_PORT] = "address-and-port-dependent"};
static const char *const select_words[] = {
	[NAT_SELECT_ROUND_ROBIN] = "round-robin", [NAT_SELECT_PAIRED] = "paired"};
static const char *const announce_words[] = {
	[NAT_ANNOUNCE_AUTO] = "auto", [NAT_ANNOUNCE_ARP] = "arp", [NAT_ANNOUNCE_NONE] = "none"};

const char *config_mapping_word(enum nat_mapping_kind mapping)
{
	return mapping_words[mapping];
}

const char *config_filtering_word(enum nat_filtering filtering)
{
	return filtering_words[filtering];
}

const char *config_select_word(enum nat_select select)
{
	return select_words[select];
}

const char *config_announce_word(enum nat_announce announce)
{
	return announce_words[announce];
}

/* How a host's ports are kept together: blocks, or arithmetic. Both keep a host on one address. */
static void read_shares(struct config *config, struct nat_pool_config *out, const struct node *block_ports,
			const struct node *blocks_per_host, const struct node *deterministic,
			const struct node *dynamic_ports)
{
	const uint32_t n_ports = (uint32_t)out->port_last - out->port_first + 1;
	uint64_t n_addresses = 0, hosts;

	config_read_u16(config, block_ports, "block_ports", 16, 32768, &out->block_ports);
	out->blocks_per_host = 4;
	config_read_u16(config, blocks_per_host, "blocks_per_host", 1, 4096, &out->blocks_per_host);
	config_read_u16(config, dynamic_ports, "dynamic_ports", 0, 65535, &out->dynamic_ports);
	if (blocks_per_host && !block_ports)
		config_error(config, blocks_per_host,
			     "blocks_per_host needs \"block_ports\"; add it, or remove this");
	if (dynamic_ports && !deterministic)
		config_error(config, dynamic_ports,
			     "dynamic_ports needs \"deterministic\"; add it, or remove this");
	if (block_ports && deterministic)
		config_error(config, block_ports,
			     "a pool has blocks or a deterministic mapping; remove one of the two");
	if (block_ports && out->block_ports > n_ports)
		config_error(config, block_ports,
			     "a block of %u ports is larger than the pool's %u ports; make it smaller",
			     out->block_ports, n_ports);
	if ((block_ports || deterministic) && out->select != NAT_SELECT_PAIRED)
		config_error(config, block_ports ? block_ports : deterministic,
			     "a host whose ports are kept together has one address; add \"select: paired\"");
	if (!deterministic ||
	    !config_read_prefix(config, deterministic, "deterministic", &out->deterministic))
		return;
	for (uint32_t i = 0; i < out->n_ranges; i++)
		n_addresses += (uint64_t)out->ranges[i].last - out->ranges[i].first + 1;
	hosts = UINT64_C(1) << (32 - out->deterministic.length_bits);
	if (out->deterministic.length_bits == 0)
		config_error(config, deterministic,
			     "\"deterministic\" is every address there is; write the prefix of the hosts");
	else if (n_addresses &&
		 (out->dynamic_ports >= n_ports ||
		  (n_ports - out->dynamic_ports) / ((hosts + n_addresses - 1) / n_addresses) == 0))
		config_error(config, deterministic,
			     "%" PRIu64 " hosts on %" PRIu64
			     " addresses leave no port for each; add addresses, or shorten the prefix",
			     hosts, n_addresses);
}

static bool read_pool(struct config *config, const struct node *node, struct nat_pool_config *out,
		      struct pool_places *places)
{
	enum {
		NAME,
		ADDRESSES,
		DRAIN,
		PORTS,
		MAPPING,
		FILTERING,
		SELECT,
		ANNOUNCE,
		ACTIVE_WHILE,
		BLOCK_PORTS,
		BLOCKS_PER_HOST,
		DETERMINISTIC,
		DYNAMIC_PORTS
	};
	static const struct key keys[] = {
		[NAME] = {"name", true},
		[ADDRESSES] = {"addresses", true},
		[DRAIN] = {"drain", false},
		[PORTS] = {"ports", false},
		[MAPPING] = {"mapping", false},
		[FILTERING] = {"filtering", false},
		[SELECT] = {"select", false},
		[ANNOUNCE] = {"announce", false},
		[ACTIVE_WHILE] = {"active_while", false},
		[BLOCK_PORTS] = {"block_ports", false},
		[BLOCKS_PER_HOST] = {"blocks_per_host", false},
		[DETERMINISTIC] = {"deterministic", false},
		[DYNAMIC_PORTS] = {"dynamic_ports", false},
	};
	const struct node *value[COUNT(keys)];
	uint32_t address;
	unsigned word;

	if (!config_fields(config, node, "the pool", keys, COUNT(keys), value))
		return false;
	places->pool = node;
	config_read_name(config, value[NAME], "name", NAT_NAME_MAX - 1, out->name);
	if (value[ADDRESSES]) {
		if (value[ADDRESSES]->kind == NODE_LIST && value[ADDRESSES]->n == 0)
			config_error(config, value[ADDRESSES], "pool %s has no address; give it at least one",
				     config_shown(config, out->name));
		out->n_ranges = config_read_ranges(config, value[ADDRESSES], "addresses", &out->ranges,
						   &out->weights, &places->range);
	}
	if (value[DRAIN])
		out->n_drain =
			config_read_ranges(config, value[DRAIN], "drain", &out->drain, NULL, &places->drain);
	config_read_ports(config, value[PORTS], &out->port_first, &out->port_last);
	if (config_read_word(config, value[MAPPING], "mapping", mapping_words, COUNT(mapping_words), &word))
		out->mapping = (enum nat_mapping_kind)word;
	if (out->mapping == NAT_ENDPOINT_DEPENDENT)
		out->filtering = NAT_FILTER_ADDRESS_AND_PORT;
	/* one address per host is what an endpoint-independent pool is for (RFC 4787 REQ-2) */
	out->select = out->mapping == NAT_ENDPOINT_INDEPENDENT ? NAT_SELECT_PAIRED : NAT_SELECT_ROUND_ROBIN;
	if (config_read_word(config, value[SELECT], "select", select_words, COUNT(select_words), &word))
		out->select = (enum nat_select)word;
	if (config_read_word(config, value[FILTERING], "filtering", filtering_words, COUNT(filtering_words),
			     &word)) {
		out->filtering = (enum nat_filtering)word;
		if (out->mapping == NAT_ENDPOINT_DEPENDENT && out->filtering != NAT_FILTER_ADDRESS_AND_PORT)
			config_error(config, value[FILTERING],
				     "an endpoint-dependent mapping always filters by address and port; "
				     "remove \"filtering\" or set mapping: endpoint-independent");
	}
	if (config_read_word(config, value[ANNOUNCE], "announce", announce_words, COUNT(announce_words),
			     &word))
		out->announce = (enum nat_announce)word;
	read_shares(config, out, value[BLOCK_PORTS], value[BLOCKS_PER_HOST], value[DETERMINISTIC],
		    value[DYNAMIC_PORTS]);
	if (config_read_address(config, value[ACTIVE_WHILE], "active_while", &address)) {
		places->active_while = value[ACTIVE_WHILE];
		out->active_while_be = __builtin_bswap32(address);
	}
	return true;
}

void config_pools(struct config *config, const struct node *node, struct places *places,
		  const struct nat_pool_config *defaults)
{
	struct nat_pool_config *list;
	uint32_t n = 0;

	if (!node || !config_as_list(config, node, "pools"))
		return;
	if (node->n > CONFIG_POOLS_MAX) {
		config_error(config, node, "%u pools; at most %u are possible, put more addresses into each",
			     node->n, CONFIG_POOLS_MAX);
		return;
	}
	list = config_take(config, node->n, sizeof(*list));
	places->pool = config_take(config, node->n, sizeof(*places->pool));
	for (const struct node *element = node->first; element; element = element->next) {
		list[n] = *defaults;
		n += read_pool(config, element, &list[n], &places->pool[n]);
	}
	config->nat.pools = list;
	config->nat.n_pools = n;
}
