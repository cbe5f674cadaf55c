#include "hex.h"

#include <jansson.h>
#include <stdlib.h>

static int nibble(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return -1;
}

bool hex_read(const char *text, size_t length, uint8_t *bytes)
{
	for (size_t i = 0; i < length / 2; i++) {
		int high = nibble(text[2 * i]), low = nibble(text[2 * i + 1]);

		if (high < 0 || low < 0)
			return false;
		bytes[i] = (uint8_t)(high << 4 | low);
	}
	return length % 2 == 0;
}

json_t *hex_json(const uint8_t *bytes, uint32_t len_bytes)
{
	static const char digits[] = "0123456789abcdef";
	char *text = malloc((size_t)len_bytes * 2 + 1);
	json_t *value;

	if (!text)
		abort();
	for (uint32_t i = 0; i < len_bytes; i++) {
		text[2 * i] = digits[bytes[i] >> 4];
		text[2 * i + 1] = digits[bytes[i] & 15];
	}
	value = json_stringn_nocheck(text, (size_t)len_bytes * 2);
	free(text);
	return value;
}
