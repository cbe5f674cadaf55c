/* Packets in JSON: lower-case hexadecimal. */
#ifndef HEX_H
#define HEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct json_t;

/* length / 2 bytes; false when it is not hexadecimal. */
bool hex_read(const char *text, size_t length, uint8_t *bytes);
struct json_t *hex_json(const uint8_t *bytes, uint32_t len_bytes);

#endif
