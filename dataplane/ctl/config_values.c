/* How a value is read: tree -> numbers, words, times, names, addresses.
 *
 * Each reader returns false after it has reported what is wrong, and then leaves *out alone, so that the
 * caller's default stands. A node that is NULL (the key is not given) is no error: false, and nothing
 * reported.
 *
 * Strict on purpose. YAML 1.1 reads 0000:00:03 as a number of seconds, 010 as eight and no as false; here a
 * value is its text, and the reader of the key decides.
 */
#include <ctype.h>
#include <string.h>

#include "config_internal.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- maps ---- */

/* Edit distance with transpositions, of short words; enough to suggest the key that was meant. */
static unsigned distance(const char *a, const char *b)
{
	enum { WORD = 32 };
	unsigned d[WORD + 1][WORD + 1];
	size_t n = strlen(a), m = strlen(b);

	if (n > WORD || m > WORD)
		return WORD;
	for (size_t i = 0; i <= n; i++)
		d[i][0] = (unsigned)i;
	for (size_t j = 0; j <= m; j++)
		d[0][j] = (unsigned)j;
	for (size_t i = 1; i <= n; i++) {
		for (size_t j = 1; j <= m; j++) {
			char x = a[i - 1] == '-' ? '_' : (char)tolower((unsigned char)a[i - 1]);
			char y = b[j - 1] == '-' ? '_' : b[j - 1];
			unsigned best = d[i - 1][j - 1] + (x != y);

			if (d[i - 1][j] + 1 < best)
				best = d[i - 1][j] + 1;
			if (d[i][j - 1] + 1 < best)
				best = d[i][j - 1] + 1;
			if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
			    d[i - 2][j - 2] + 1 < best)
				best = d[i - 2][j - 2] + 1;
			d[i][j] = best;
		}
	}
	return d[n][m];
}

const char *config_nearest(const char *word, const char *const *words, size_t n)
{
	const char *best = NULL;
	unsigned least = (unsigned)strlen(word) / 3 + 2; /* one slip in a short word, more in a long one */

	for (size_t i = 0; i < n; i++) {
		unsigned far = distance(word, words[i]);

		if (far < least) {
			least = far;
			best = words[i];
		}
	}
	return best;
}

/* "a, b or c", "a, b and c" */
static const char *list_words(struct config *config, const char *const *words, size_t n, const char *last)
{
	size_t length = 1;
	char *out;

	if (config_is_full(config))
		return "";
	for (size_t i = 0; i < n; i++)
		length += strlen(words[i]) + sizeof(", and ");
	out = config_take(config, length, 1);
	for (size_t i = 0; i < n; i++) {
		strcat(out, words[i]);
		if (i + 2 < n)
			strcat(out, ", ");
		else if (i + 2 == n)
			strcat(strcat(strcat(out, " "), last), " ");
	}
	return out;
}

static bool is_nothing(const struct node *node)
{
	return node->kind == NODE_SCALAR && node->plain &&
	       (!node->text[0] || !strcmp(node->text, "~") || !strcmp(node->text, "null"));
}

static void complain_unknown(struct config *config, const struct node *key, const char *where,
			     const struct key *keys, size_t n)
{
	const char *words[CONFIG_KEYS_MAX], *meant;

	for (size_t i = 0; i < n; i++)
		words[i] = keys[i].name;
	meant = config_is_full(config) ? NULL : config_nearest(key->text, words, n);
	if (meant)
		config_error(config, key, "unknown key %s in %s; did you mean \"%s\"?",
			     config_shown(config, key->text), where, meant);
	else
		config_error(config, key, "unknown key %s in %s; its keys are %s",
			     config_shown(config, key->text), where, list_words(config, words, n, "and"));
}

/* Puts the value of keys[i] into value[i], NULL when it is not given. `where` names the map in messages. */
bool config_fields(struct config *config, const struct node *map, const char *where, const struct key *keys,
		   size_t n, const struct node **value)
{
	const struct node *seen[CONFIG_KEYS_MAX] = {0};

	memset(value, 0, n * sizeof(*value));
	if (map->kind != NODE_MAP) {
		config_error(config, map, "%s must be a map of keys and values; write \"key: value\"", where);
		return false;
	}
	for (const struct node *key = map->first; key; key = key->next->next) {
		size_t i = 0;

		if (key->kind != NODE_SCALAR) {
			config_error(config, key, "a key of %s must be a single word; remove the brackets",
				     where);
			continue;
		}
		while (i < n && strcmp(key->text, keys[i].name) != 0)
			i++;
		if (i == n) {
			complain_unknown(config, key, where, keys, n);
		} else if (seen[i]) {
			config_error(config, key, "\"%s\" is given twice in %s (first in line %u); keep one",
				     keys[i].name, where, seen[i]->line);
		} else {
			seen[i] = key;
			if (is_nothing(key->next))
				config_error(config, key, "\"%s\" has no value; give one or remove the key",
					     keys[i].name);
			else
				value[i] = key->next;
		}
	}
	for (size_t i = 0; i < n; i++)
		if (keys[i].required && !seen[i])
			config_error(config, map, "%s has no \"%s\"; add it", where, keys[i].name);
	return true;
}

/* A section that is a list; NULL (reported) when it is something else. */
const struct node *config_as_list(struct config *config, const struct node *node, const char *where)
{
	if (node->kind == NODE_LIST)
		return node;
	config_error(config, node, "%s must be a list; write \"- \" before each element, or [a, b]", where);
	return NULL;
}

/* ---- values ---- */

bool config_as_scalar(struct config *config, const struct node *node, const char *key)
{
	if (node->kind == NODE_SCALAR)
		return true;
	config_error(config, node, "\"%s\" takes one value, not a %s; write \"%s: value\"", key,
		     node->kind == NODE_LIST ? "list" : "map", key);
	return false;
}

/* Decimal digits only, no leading zero (YAML 1.1 and C read those as octal). Sets *end behind them. */
static bool parse_digits(const char *text, const char **end, uint64_t *value)
{
	uint64_t sum = 0;
	const char *p = text;

	if (!isdigit((unsigned char)*p) || (p[0] == '0' && isdigit((unsigned char)p[1])))
		return false;
	for (; isdigit((unsigned char)*p); p++) {
		if (sum > (UINT64_MAX - 9) / 10)
			return false;
		sum = sum * 10 + (uint64_t)(*p - '0');
	}
	*end = p;
	*value = sum;
	return true;
}

bool config_read_number(struct config *config, const struct node *node, const char *key, uint64_t least,
			uint64_t most, uint64_t *out)
{
	const char *end;
	uint64_t value;

	if (!config_as_scalar(config, node, key))
		return false;
	if (!node->plain) {
		config_error(config, node, "\"%s\" is text; write the number without quotes", key);
		return false;
	}
	if (!parse_digits(node->text, &end, &value) || *end) {
		config_error(config, node, "\"%s\" is %s; write a whole number from %llu to %llu", key,
			     config_shown(config, node->text), (unsigned long long)least,
			     (unsigned long long)most);
		return false;
	}
	if (value < least || value > most) {
		config_error(config, node, "\"%s\" is %llu; it must be from %llu to %llu", key,
			     (unsigned long long)value, (unsigned long long)least, (unsigned long long)most);
		return false;
	}
	*out = value;
	return true;
}

bool config_read_u32(struct config *config, const struct node *node, const char *key, uint32_t least,
		     uint32_t most, uint32_t *out)
{
	uint64_t value;

	if (!node || !config_read_number(config, node, key, least, most, &value))
		return false;
	*out = (uint32_t)value;
	return true;
}

bool config_read_u16(struct config *config, const struct node *node, const char *key, uint16_t least,
		     uint16_t most, uint16_t *out)
{
	uint64_t value;

	if (!node || !config_read_number(config, node, key, least, most, &value))
		return false;
	*out = (uint16_t)value;
	return true;
}

/* One of `words`; gives its index. */
bool config_read_word(struct config *config, const struct node *node, const char *key,
		      const char *const *words, size_t n, unsigned *out)
{
	const char *meant;

	if (!node || !config_as_scalar(config, node, key))
		return false;
	for (size_t i = 0; i < n; i++) {
		if (!strcmp(node->text, words[i])) {
			*out = (unsigned)i;
			return true;
		}
	}
	meant = config_nearest(node->text, words, n);
	config_error(config, node, "\"%s\" is %s; %s%s", key, config_shown(config, node->text),
		     meant ? "did you mean " : "it must be ",
		     meant ? meant : list_words(config, words, n, "or"));
	return false;
}

/* "7440s", "2m", "1h30m" is not known: one number, one unit. The core counts whole seconds, so a part of a
 * second is rounded up, never down to "off". */
bool config_read_duration(struct config *config, const struct node *node, const char *key, uint32_t least_s,
			  uint32_t *out_s)
{
	static const struct {
		const char *unit;
		uint64_t ms;
	} units[] = {{"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}, {"d", 86400000}};
	uint64_t value, ms = 0;
	const char *end;

	if (!node || !config_as_scalar(config, node, key))
		return false;
	if (!parse_digits(node->text, &end, &value)) {
		config_error(config, node, "\"%s\" is %s; write a time with its unit, such as 300s or 5m",
			     key, config_shown(config, node->text));
		return false;
	}
	if (!*end) {
		config_error(config, node, "\"%s\" has no unit; write %llus for seconds (or ms, m, h, d)",
			     key, (unsigned long long)value);
		return false;
	}
	for (size_t i = 0; i < COUNT(units); i++)
		if (!strcmp(end, units[i].unit))
			ms = units[i].ms;
	if (!ms) {
		config_error(config, node, "\"%s\" has the unknown unit %s; use ms, s, m, h or d", key,
			     config_shown(config, end));
		return false;
	}
	if (value > (uint64_t)CONFIG_TIMEOUT_MAX_S * 1000 / ms || (value * ms + 999) / 1000 < least_s) {
		config_error(config, node, "\"%s\" is %s; it must be from %us to 30d", key, node->text,
			     least_s);
		return false;
	}
	if (value * ms % 1000)
		config_warning(config, node,
			       "\"%s\" is %s and timers count whole seconds; it is rounded up to %llus", key,
			       node->text, (unsigned long long)(value * ms + 999) / 1000);
	*out_s = (uint32_t)((value * ms + 999) / 1000);
	return true;
}

/* Names end up in file names, nft rules and the kernel's interface table, so they are what Linux allows for
 * an interface, without the characters that only make trouble. */
bool config_read_name(struct config *config, const struct node *node, const char *key, size_t longest,
		      char *out)
{
	size_t length;

	if (!node || !config_as_scalar(config, node, key))
		return false;
	length = strlen(node->text);
	if (length == 0 || length > longest) {
		config_error(config, node, "\"%s\" is %zu characters long; it must be 1 to %zu", key, length,
			     longest);
		return false;
	}
	for (const char *p = node->text; *p; p++) {
		if (!isalnum((unsigned char)*p) && !strchr("_.-", *p)) {
			config_error(config, node,
				     "\"%s\" is %s; use letters, digits, \"_\", \"-\" and \".\" only", key,
				     config_shown(config, node->text));
			return false;
		}
	}
	if (!isalnum((unsigned char)node->text[0])) {
		config_error(config, node, "\"%s\" is %s; it must begin with a letter or a digit", key,
			     config_shown(config, node->text));
		return false;
	}
	memcpy(out, node->text, length + 1);
	return true;
}

/* ---- addresses ---- */

/* a.b.c.d, decimal, no leading zeros (inet_aton takes those as octal). Sets *end behind it. */
static bool parse_address(const char *text, const char **end, uint32_t *address)
{
	uint32_t sum = 0;
	const char *p = text;

	for (int i = 0; i < 4; i++) {
		uint64_t octet;

		if (i && *p++ != '.')
			return false;
		if (!parse_digits(p, &p, &octet) || octet > 255)
			return false;
		sum = sum << 8 | (uint32_t)octet;
	}
	*end = p;
	*address = sum;
	return true;
}

static uint32_t mask_of(unsigned length_bits)
{
	return length_bits ? UINT32_MAX << (32 - length_bits) : 0;
}

/* Behind an address: "/len". */
static bool parse_length(const char *text, uint8_t *length_bits)
{
	uint64_t value;
	const char *end;

	if (*text != '/' || !parse_digits(text + 1, &end, &value) || *end || value > 32)
		return false;
	*length_bits = (uint8_t)value;
	return true;
}

static bool has_host_bits(struct config *config, const struct node *node, const char *key,
			  struct nat_prefix prefix)
{
	uint32_t network = prefix.address & mask_of(prefix.length_bits);

	if (network == prefix.address)
		return false;
	config_error(config, node, "\"%s\" is %s, which has bits set behind its prefix length; write %s", key,
		     config_shown(config, node->text),
		     config_shown_prefix(config, (struct nat_prefix){network, prefix.length_bits}));
	return true;
}

bool config_read_prefix(struct config *config, const struct node *node, const char *key,
			struct nat_prefix *out)
{
	struct nat_prefix prefix = {.length_bits = 32};
	const char *end;

	if (!node || !config_as_scalar(config, node, key))
		return false;
	if (!parse_address(node->text, &end, &prefix.address) ||
	    (*end && !parse_length(end, &prefix.length_bits))) {
		config_error(config, node, "\"%s\" is %s; write an IPv4 prefix such as 100.64.0.0/16", key,
			     config_shown(config, node->text));
		return false;
	}
	if (has_host_bits(config, node, key, prefix))
		return false;
	*out = prefix;
	return true;
}

bool config_read_address(struct config *config, const struct node *node, const char *key, uint32_t *out)
{
	const char *end, *martian;
	uint32_t address;

	if (!node || !config_as_scalar(config, node, key))
		return false;
	if (!parse_address(node->text, &end, &address) || *end) {
		config_error(config, node, "\"%s\" is %s; write one IPv4 address such as 203.0.113.1", key,
			     config_shown(config, node->text));
		return false;
	}
	martian = config_martian((struct nat_range){address, address});
	if (martian) {
		config_error(config, node, "\"%s\" is %s, %s; give an address that an interface can have",
			     key, node->text, martian);
		return false;
	}
	*out = address;
	return true;
}

/* Address, first-last or prefix. */
static bool read_range(struct config *config, const struct node *node, const char *key, struct nat_range *out)
{
	struct nat_range range;
	struct nat_prefix prefix;
	const char *end, *rest, *martian;
	uint64_t octet;

	if (!config_as_scalar(config, node, key))
		return false;
	if (!parse_address(node->text, &end, &range.first))
		goto malformed;
	prefix = (struct nat_prefix){.address = range.first};
	if (!*end) {
		range.last = range.first;
	} else if (parse_length(end, &prefix.length_bits)) {
		if (has_host_bits(config, node, key, prefix))
			return false;
		range.last = range.first | ~mask_of(prefix.length_bits);
	} else if (*end == '-' && parse_address(end + 1, &rest, &range.last) && !*rest) {
		if (range.last < range.first) {
			config_error(config, node, "range %s is reversed; write the lower address first",
				     config_shown(config, node->text));
			return false;
		}
	} else if (*end == '-' && parse_digits(end + 1, &rest, &octet) && !*rest && octet <= 255) {
		/* dsnat and keepalived write ranges so; two ways to write one thing is one too many */
		range.last = (range.first & 0xffffff00u) | (uint32_t)octet;
		config_error(config, node, "range %s is cut short; write %s-%s",
			     config_shown(config, node->text), config_shown_address(config, range.first),
			     config_shown_address(config, range.last));
		return false;
	} else {
		goto malformed;
	}
	martian = config_martian(range);
	if (martian) {
		config_error(config, node,
			     "%s holds %s; a public address must be one that hosts can reply to",
			     config_shown(config, node->text), martian);
		return false;
	}
	*out = range;
	return true;
malformed:
	config_error(config, node,
		     "\"%s\" has %s; write an IPv4 address, a range a.b.c.d-e.f.g.h or a prefix a.b.c.d/len",
		     key, config_shown(config, node->text));
	return false;
}

/* A range, or {range: RANGE, weight: N} where weights are wanted. */
static bool read_weighted(struct config *config, const struct node *node, const char *key,
			  struct nat_range *out, uint32_t *weight)
{
	static const struct key keys[] = {{"range", true}, {"weight", false}};
	const struct node *value[2];

	if (!weight || node->kind != NODE_MAP)
		return read_range(config, node, key, out);
	if (!config_fields(config, node, key, keys, 2, value))
		return false;
	config_read_u32(config, value[1], "weight", 1, 100, weight);
	return value[0] && read_range(config, value[0], key, out);
}

/* A list of ranges, or one of them without a list; what cannot be read is left out. */
uint32_t config_read_ranges(struct config *config, const struct node *node, const char *key,
			    const struct nat_range **out, const uint32_t **weights,
			    const struct node ***places)
{
	const struct node *element = node->kind == NODE_LIST ? node->first : node;
	uint32_t n = node->kind == NODE_LIST ? node->n : 1, used = 0;
	struct nat_range *ranges = config_take(config, n ? n : 1, sizeof(*ranges));
	const struct node **where = config_take(config, n ? n : 1, sizeof(struct node *));
	uint32_t *turns = weights ? config_take(config, n ? n : 1, sizeof(*turns)) : NULL;
	for (uint32_t i = 0; i < n; i++, element = element->next) {
		if (turns)
			turns[used] = 1;
		if (!read_weighted(config, element, key, &ranges[used], turns ? &turns[used] : NULL))
			continue;
		where[used++] = element;
	}
	*out = ranges;
	if (weights)
		*weights = turns;
	*places = where;
	return used;
}

/* "1024-65535" or one port. */
void config_read_ports(struct config *config, const struct node *node, uint16_t *port_first,
		       uint16_t *port_last)
{
	uint64_t first, last;
	const char *end;

	if (!node || !config_as_scalar(config, node, "ports"))
		return;
	if (!parse_digits(node->text, &end, &first))
		goto malformed;
	last = first;
	if (*end == '-' && !parse_digits(end + 1, &end, &last))
		goto malformed;
	if (*end)
		goto malformed;
	if (first > 65535 || last > 65535) {
		config_error(config, node, "ports %s go beyond 65535; write a range such as 1024-65535",
			     node->text);
	} else if (first == 0) {
		config_error(config, node, "ports %s begin with 0, which is not a port; begin with 1 or more",
			     node->text);
	} else if (first > last) {
		config_error(config, node, "ports %s are reversed; write the lower port first", node->text);
	} else {
		*port_first = (uint16_t)first;
		*port_last = (uint16_t)last;
	}
	return;
malformed:
	config_error(config, node, "\"ports\" is %s; write a range such as 1024-65535",
		     config_shown(config, node->text));
}
