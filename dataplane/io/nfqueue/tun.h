/* dsnat0: how a packet that the kernel has not got is given to the kernel's routing. */
#ifndef TUN_H
#define TUN_H

#include <stddef.h>

#define TUN_NAME "dsnat0"

/* Makes dsnat0, up and forwarding; its descriptor, or -1 and a sentence in `why`. It goes when that is
 * closed. */
int tun_open(char *why, size_t why_bytes);

/* Makes the kernel forward what arrives on this interface. 0 or -errno; -ENODEV when it is not there. */
int tun_forward_from(const char *name);

#endif
