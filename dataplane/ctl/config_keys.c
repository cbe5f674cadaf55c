/* The keys of dsnatd.yaml: which there are, what they take, what they are when not given.
 *
 * One function per section; some have a file of their own (config_interfaces.c, config_pools.c,
 * config_logging.c, config_sync.c). Each has a table of its keys (struct key) and an enum of the same
 * order; config_fields() finds the values, the readers of config_values.c judge them.
 *
 * All keys, their values and defaults are documented in dataplane/README.md, "Configuration";
 * tests/dataplane/test_config.py holds that table and this file together.
 */
#include <ctype.h>
#include <string.h>

#include "config_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define MAX_SESSIONS_DEFAULT 1000000u /* about 100 MB: fits the smallest gateway */

/* ---- words ---- */

const char *const config_switch_words[2] = {"off", "on"};

static const char *const action_words[] = {
	[NAT_ACTION_POOL] = "pool", [NAT_ACTION_DROP] = "drop", [NAT_ACTION_PASS] = "pass"};
static const char *const midflow_words[] = {
	[NAT_MIDFLOW_DROP] = "drop", [NAT_MIDFLOW_RESET] = "reset", [NAT_MIDFLOW_ADOPT] = "adopt"};
static const char *const refusal_words[] = {[NAT_REFUSAL_SILENT] = "silent",
					    [NAT_REFUSAL_ICMP_ADMIN] = "icmp-admin",
					    [NAT_REFUSAL_ICMP_HOST] = "icmp-host"};

const char *config_action_word(enum nat_action action)
{
	return action_words[action];
}

const char *config_midflow_word(enum nat_midflow midflow)
{
	return midflow_words[midflow];
}

const char *config_refusal_word(enum nat_refusal refusal)
{
	return refusal_words[refusal];
}

/* ---- sections ---- */

static void read_engine(struct config *config, const struct node *node)
{
	enum { WORKERS, MAX_SESSIONS, SPARE };
	static const struct key keys[] = {[WORKERS] = {"workers", false},
					  [MAX_SESSIONS] = {"max_sessions", false},
					  [SPARE] = {"spare", false}};
	const struct node *value[COUNT(keys)];
	unsigned word;

	if (!node || !config_fields(config, node, "engine", keys, COUNT(keys), value))
		return;
	if (value[WORKERS] && config_as_scalar(config, value[WORKERS], "workers") &&
	    strcmp(value[WORKERS]->text, "auto") != 0) {
		if (isdigit((unsigned char)value[WORKERS]->text[0]))
			config_read_u32(config, value[WORKERS], "workers", 1, NAT_WORKERS_MAX,
					&config->nat.workers);
		else
			config_error(config, value[WORKERS],
				     "\"workers\" is %s; write auto or a number from 1 to %u",
				     config_shown(config, value[WORKERS]->text), NAT_WORKERS_MAX);
	}
	if (value[MAX_SESSIONS])
		config_read_number(config, value[MAX_SESSIONS], "max_sessions", 1024, CONFIG_SESSIONS_MAX,
				   &config->nat.max_sessions);
	if (config_read_word(config, value[SPARE], "spare", config_switch_words, 2, &word))
		config->spare = word == 1;
}

/* Pool names are looked up by hand: a zone is read once, and most gateways have a handful of pools. With
 * thousands of both, the last hit is nearly always the next one too. */
static bool find_pool(const struct config *config, const char *name, uint32_t *pool)
{
	uint32_t n = config->nat.n_pools;

	for (uint32_t i = 0; i < n; i++) {
		uint32_t at = *pool + i < n ? *pool + i : *pool + i - n;

		if (!strcmp(config->nat.pools[at].name, name)) {
			*pool = at;
			return true;
		}
	}
	return false;
}

static void read_zone_pool(struct config *config, const struct node *node, uint32_t *pool)
{
	const char **names, *meant;

	if (!config_as_scalar(config, node, "pool") || find_pool(config, node->text, pool))
		return;
	if (config_is_full(config)) {
		config_error(config, node, "there is no such pool");
		return;
	}
	names = config_take(config, config->nat.n_pools + 1, sizeof(*names));
	for (uint32_t i = 0; i < config->nat.n_pools; i++)
		names[i] = config->nat.pools[i].name;
	meant = config_nearest(node->text, names, config->nat.n_pools);
	if (meant)
		config_error(config, node, "there is no pool %s; did you mean \"%s\"?",
			     config_shown(config, node->text), meant);
	else
		config_error(config, node,
			     "there is no pool %s; add it under pools, or name one that is there",
			     config_shown(config, node->text));
}

/* *pool: the last pool named, in and out. */
static bool read_zone(struct config *config, const struct node *node, struct nat_zone_config *out,
		      uint32_t *pool)
{
	enum { SOURCE, DESTINATION, POOL, ACTION, MSS_CLAMP };
	static const struct key keys[] = {[SOURCE] = {"source", true},
					  [DESTINATION] = {"destination", false},
					  [POOL] = {"pool", false},
					  [ACTION] = {"action", false},
					  [MSS_CLAMP] = {"mss_clamp", false}};
	const struct node *value[COUNT(keys)];
	bool complete, has_action;
	unsigned word = NAT_ACTION_POOL;

	if (!config_fields(config, node, "the zone", keys, COUNT(keys), value))
		return false;
	complete = config_read_prefix(config, value[SOURCE], "source", &out->source);
	if (value[DESTINATION])
		complete &= config_read_prefix(config, value[DESTINATION], "destination", &out->destination);
	has_action =
		config_read_word(config, value[ACTION], "action", action_words, COUNT(action_words), &word);
	out->action = (enum nat_action)word;
	if (value[POOL])
		read_zone_pool(config, value[POOL], pool);
	if (out->action == NAT_ACTION_POOL)
		out->pool = *pool;
	if (value[POOL] && has_action && out->action != NAT_ACTION_POOL)
		config_error(config, value[POOL],
			     "a zone with action %s uses no pool; remove \"pool\" or \"action\"",
			     action_words[out->action]);
	if (!value[POOL] && out->action == NAT_ACTION_POOL && (has_action || !value[ACTION]))
		config_error(config, node,
			     "the zone says neither pool nor action; add \"pool: NAME\" or \"action: drop\"");
	if (config_read_u16(config, value[MSS_CLAMP], "mss_clamp", 536, 9176, &out->mss_clamp_bytes) &&
	    out->action != NAT_ACTION_POOL)
		config_error(config, value[MSS_CLAMP],
			     "mss_clamp acts on translated packets only; remove it from this zone");
	return complete;
}

static void read_zones(struct config *config, const struct node *node, struct places *places)
{
	struct nat_zone_config *list;
	uint32_t n = 0, pool = 0;

	if (!node || !config_as_list(config, node, "zones"))
		return;
	if (node->n > CONFIG_ZONES_MAX) {
		config_error(config, node, "%u zones; at most %u are possible, use shorter prefixes", node->n,
			     CONFIG_ZONES_MAX);
		return;
	}
	list = config_take(config, node->n, sizeof(*list));
	places->zone = config_take(config, node->n, sizeof(struct node *));
	for (const struct node *element = node->first; element; element = element->next) {
		list[n] = (struct nat_zone_config){0};
		places->zone[n] = element;
		n += read_zone(config, element, &list[n], &pool);
	}
	config->nat.zones = list;
	config->nat.n_zones = n;
}

static bool read_static(struct config *config, const struct node *node, struct nat_static_config *out)
{
	enum { INSIDE, OUTSIDE, PROTOCOL, PORT, INSIDE_PORT };
	static const struct key keys[] = {[INSIDE] = {"inside", true},
					  [OUTSIDE] = {"outside", true},
					  [PROTOCOL] = {"protocol", false},
					  [PORT] = {"port", false},
					  [INSIDE_PORT] = {"inside_port", false}};
	static const char *const words[] = {"tcp", "udp"};
	static const uint8_t protocols[] = {6, 17};
	const struct node *value[COUNT(keys)];
	unsigned word;

	if (!config_fields(config, node, "the static mapping", keys, COUNT(keys), value))
		return false;
	if (config_read_word(config, value[PROTOCOL], "protocol", words, COUNT(words), &word))
		out->protocol = protocols[word];
	if (config_read_u16(config, value[PORT], "port", 1, 65535, &out->outside_port))
		out->inside_port = out->outside_port;
	config_read_u16(config, value[INSIDE_PORT], "inside_port", 1, 65535, &out->inside_port);
	if (!value[PROTOCOL] != !value[PORT] || (value[INSIDE_PORT] && !value[PORT]))
		config_error(config, node,
			     "a static mapping gives \"protocol\" and \"port\" together (one port is "
			     "forwarded) or "
			     "neither (the whole address is the host's)");
	/* Both are read whatever the first one says, so that both errors are told. */
	const bool inside = config_read_address(config, value[INSIDE], "inside", &out->inside);
	const bool outside = config_read_address(config, value[OUTSIDE], "outside", &out->outside);
	return inside && outside;
}

static void read_statics(struct config *config, const struct node *node, struct places *places)
{
	struct nat_static_config *list;
	uint32_t n = 0;

	if (!node || !config_as_list(config, node, "static"))
		return;
	if (node->n > CONFIG_STATICS_MAX) {
		config_error(config, node, "%u static mappings; at most %u are possible", node->n,
			     CONFIG_STATICS_MAX);
		return;
	}
	list = config_take(config, node->n, sizeof(*list));
	places->statics = config_take(config, node->n, sizeof(struct node *));
	for (const struct node *element = node->first; element; element = element->next) {
		places->statics[n] = element;
		n += read_static(config, element, &list[n]);
	}
	config->nat.statics = list;
	config->nat.n_statics = n;
}

static void read_limits(struct config *config, const struct node *node)
{
	enum { SESSIONS, NEW, ICMP_ERRORS, HELD, FRAGMENTS };
	static const struct key keys[] = {[SESSIONS] = {"sessions_per_host", false},
					  [NEW] = {"new_per_host_per_s", false},
					  [ICMP_ERRORS] = {"icmp_errors_per_s", false},
					  [HELD] = {"held_ports", false},
					  [FRAGMENTS] = {"fragments", false}};
	struct nat_limits *limits = &config->nat.limits;
	const struct node *value[COUNT(keys)];

	if (!node || !config_fields(config, node, "limits", keys, COUNT(keys), value))
		return;
	config_read_u32(config, value[SESSIONS], keys[SESSIONS].name, 0, CONFIG_SESSIONS_MAX,
			&limits->sessions_per_host);
	config_read_u32(config, value[NEW], keys[NEW].name, 0, 1000000, &limits->new_per_host_per_s);
	config_read_u32(config, value[ICMP_ERRORS], keys[ICMP_ERRORS].name, 1, 1000000,
			&limits->icmp_errors_per_s);
	config_read_u32(config, value[HELD], keys[HELD].name, 0, CONFIG_SESSIONS_MAX, &limits->held_ports);
	config_read_u32(config, value[FRAGMENTS], keys[FRAGMENTS].name, 16, 1u << 20, &limits->fragments);
}

static void read_timeouts(struct config *config, const struct node *node)
{
	enum { ESTABLISHED, OPENING, CLOSING, UDP, UDP_ONE_WAY, DNS, ICMP, HOLD };
	static const struct key keys[] = {
		[ESTABLISHED] = {"tcp_established", false},
		[OPENING] = {"tcp_opening", false},
		[CLOSING] = {"tcp_closing", false},
		[UDP] = {"udp", false},
		[UDP_ONE_WAY] = {"udp_one_way", false},
		[DNS] = {"dns", false},
		[ICMP] = {"icmp", false},
		[HOLD] = {"hold", false},
	};
	struct nat_timeouts *t = &config->nat.timeouts;
	uint32_t *seconds[COUNT(keys)] = {
		&t->tcp_established_s, &t->tcp_opening_s, &t->tcp_closing_s, &t->udp_s,
		&t->udp_one_way_s,     &t->dns_s,         &t->icmp_s,        &t->hold_s};
	const struct node *value[COUNT(keys)];

	if (!node || !config_fields(config, node, "timeouts", keys, COUNT(keys), value))
		return;
	for (unsigned i = 0; i < COUNT(keys); i++)
		config_read_duration(config, value[i], keys[i].name, i == DNS || i == HOLD ? 0 : 1,
				     seconds[i]);
}

/* ---- all of it ---- */

/* Never below what RFC 4787, 5382, 5508 and 6888 ask; the table is in README.md, "Configuration". */
static void set_defaults(struct nat_config *nat, struct nat_pool_config *pool, bool original)
{
	nat->max_sessions = MAX_SESSIONS_DEFAULT;
	nat->limits = (struct nat_limits){.icmp_errors_per_s = 100, .fragments = 4096};
	nat->timeouts = (struct nat_timeouts){.tcp_established_s = 7440,
					      .tcp_opening_s = 240,
					      .tcp_closing_s = 240,
					      .udp_s = 300,
					      .udp_one_way_s = 120,
					      .dns_s = 20,
					      .icmp_s = 60,
					      .hold_s = 120};
	*pool = (struct nat_pool_config){.port_first = 1024, .port_last = 65535};
	if (!original)
		return;
	/* what dsnat's kernel of 2013 did, for networks that rely on it */
	nat->timeouts.tcp_established_s = 900;
	nat->timeouts.tcp_closing_s = 120;
	nat->timeouts.udp_s = 300;
	pool->port_first = 5000;
}

/* The kernel has no interface that would be a VLAN or a bond like ours. */
static void can_degrade(struct config *config, const struct node *node)
{
	for (uint32_t i = 0; i < config->nat.n_interfaces; i++) {
		const struct nat_interface_config *one = &config->nat.interfaces[i];

		if (one->vlan || one->n_members)
			config_error(config, node,
				     "interface %s has a vlan or members, which the kernel's path cannot "
				     "take over; "
				     "remove \"degraded\"",
				     one->name);
	}
}

void config_keys(struct config *config, const struct node *root, struct places *places, unsigned flags)
{
	enum {
		PROFILE,
		ENGINE,
		INTERFACES,
		POOLS,
		ZONES,
		STATIC,
		LIMITS,
		TIMEOUTS,
		MIDFLOW,
		REFUSAL,
		OTHER,
		CONTROL,
		LOGGING,
		SYNC,
		DEGRADED
	};
	static const struct key keys[] = {
		[PROFILE] = {"profile", false},       [ENGINE] = {"engine", false},
		[INTERFACES] = {"interfaces", true},  [POOLS] = {"pools", false},
		[ZONES] = {"zones", false},           [STATIC] = {"static", false},
		[LIMITS] = {"limits", false},         [TIMEOUTS] = {"timeouts", false},
		[MIDFLOW] = {"tcp_midflow", false},   [REFUSAL] = {"refusal", false},
		[OTHER] = {"other_protocols", false}, [CONTROL] = {"port_control", false},
		[LOGGING] = {"logging", false},       [SYNC] = {"sync", false},
		[DEGRADED] = {"degraded", false},
	};
	static const char *const profiles[] = {"default", "dsnat"};
	static const char *const other_words[] = {"drop", "pass"};
	static const char *const degraded_words[] = {"off", "nfqueue"};
	const struct node *value[COUNT(keys)];
	struct nat_pool_config pool;
	unsigned word = 0;

	places->root = root;
	if (!config_fields(config, root, "the file", keys, COUNT(keys), value))
		return;
	config_read_word(config, value[PROFILE], "profile", profiles, COUNT(profiles), &word);
	set_defaults(&config->nat, &pool, word == 1);
	read_engine(config, value[ENGINE]);
	config_interfaces(config, value[INTERFACES], places, flags);
	config_pools(config, value[POOLS], places, &pool);
	read_zones(config, value[ZONES], places);
	read_statics(config, value[STATIC], places);
	config_logging(config, value[LOGGING], places);
	config_sync(config, value[SYNC]);
	read_limits(config, value[LIMITS]);
	read_timeouts(config, value[TIMEOUTS]);
	if (config_read_word(config, value[MIDFLOW], "tcp_midflow", midflow_words, COUNT(midflow_words),
			     &word))
		config->nat.tcp_midflow = (enum nat_midflow)word;
	if (config_read_word(config, value[OTHER], "other_protocols", other_words, COUNT(other_words), &word))
		config->nat.pass_other_protocols = word == 1;
	if (config_read_word(config, value[CONTROL], "port_control", config_switch_words, 2, &word))
		config->nat.port_control = word == 1;
	if (config_read_word(config, value[DEGRADED], "degraded", degraded_words, COUNT(degraded_words),
			     &word))
		config->nat.may_degrade = word == 1;
	if (config->nat.may_degrade)
		can_degrade(config, value[DEGRADED]);
	if (config_read_word(config, value[REFUSAL], "refusal", refusal_words, COUNT(refusal_words), &word))
		config->nat.refusal = (enum nat_refusal)word;
}
