/* Names and explanations of the reasons. */
#include "nat.h"

#define ROW(id, name, kind, meaning, advice) {name, meaning, advice, NAT_##kind},
static const struct {
	const char *name, *meaning, *advice;
	uint8_t verdict;
} table[] = {NAT_REASONS(ROW)};
_Static_assert(sizeof(table) / sizeof(table[0]) == NAT_REASON_COUNT, "one row per reason");

const char *nat_reason_name(enum nat_reason reason)
{
	return table[reason].name;
}

const char *nat_reason_meaning(enum nat_reason reason)
{
	return table[reason].meaning;
}

const char *nat_reason_advice(enum nat_reason reason)
{
	return table[reason].advice;
}

enum nat_verdict nat_reason_verdict(enum nat_reason reason)
{
	return (enum nat_verdict)table[reason].verdict;
}
