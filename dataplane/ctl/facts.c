/* The configuration in lines of words, for the scripts that prepare a gateway before the engine runs.
 *
 * NIC set-up and the fail-closed rules must know interfaces, pools and zones. A second reader of the YAML
 * file would sooner or later read it differently; so `dsnatd --facts FILE` says what the one reader
 * understood:
 *
 *	interface NAME inside|outside dpdk|nfqueue DEVICE   DEVICE is "-" when there is none
 *	pool NAME FIRST-LAST                                one line per range
 *	zone SOURCE DESTINATION drop|pass|pool              in the file's order; DESTINATION is "any" for all
 *
 * No word contains a space: names and devices cannot. New kinds of lines may be added; readers skip what
 * they do not know.
 */
#include <inttypes.h>

#include "config.h"
#include "facts.h"

static void print_address(FILE *to, uint32_t address)
{
	fprintf(to, "%" PRIu32 ".%" PRIu32 ".%" PRIu32 ".%" PRIu32, address >> 24, (address >> 16) & 0xff,
		(address >> 8) & 0xff, address & 0xff);
}

static void print_prefix(FILE *to, const struct nat_prefix *prefix)
{
	print_address(to, prefix->address);
	fprintf(to, "/%u", (unsigned)prefix->length_bits);
}

static void print_zone(FILE *to, const struct nat_zone_config *zone)
{
	fputs("zone ", to);
	print_prefix(to, &zone->source);
	fputc(' ', to);
	if (zone->destination.length_bits == 0)
		fputs("any", to);
	else
		print_prefix(to, &zone->destination);
	fprintf(to, " %s\n", config_action_word(zone->action));
}

void facts_print(const struct config *config, FILE *to)
{
	const struct nat_config *nat = &config->nat;

	for (uint32_t i = 0; i < nat->n_interfaces; i++) {
		const struct nat_interface_config *interface = &nat->interfaces[i];

		fprintf(to, "interface %s %s %s %s\n", interface->name, config_role_word(interface->role),
			config_path_word(interface->path), interface->device[0] ? interface->device : "-");
		for (uint32_t m = 0; m < interface->n_members; m++)
			fprintf(to, "member %s %s\n", interface->name, interface->member[m]);
	}
	for (uint32_t i = 0; i < nat->n_pools; i++) {
		for (uint32_t j = 0; j < nat->pools[i].n_ranges; j++) {
			fprintf(to, "pool %s ", nat->pools[i].name);
			print_address(to, nat->pools[i].ranges[j].first);
			fputc('-', to);
			print_address(to, nat->pools[i].ranges[j].last);
			fputc('\n', to);
		}
	}
	for (uint32_t i = 0; i < nat->n_zones; i++)
		print_zone(to, &nat->zones[i]);
}
