/* The queue path's rules in the kernel, and what becomes of them. */
#ifndef NFT_H
#define NFT_H

#include "../../core/nat.h"

/* Puts the table in place, or anew. 0, or -1 and a sentence in `why`. It stays when the daemon ends: without
 * a listener the kernel drops what the rules queue. `dsnatctl release` removes it. */
int nft_install(const struct nat_config *config, char *why, size_t why_bytes);

/* The pools and zones of another configuration, in one step. 0, or -1 and a sentence in `why`. */
int nft_update(const struct nat_config *config, char *why, size_t why_bytes);

/* Is there an interface on the queue path? */
bool nft_wanted(const struct nat_config *config);

/* Watches for others who change tables of ours ("dsnat", "dsnat-*"). */
struct nft_watch {
	struct mnl_socket *socket;
	uint32_t own_pid; /* as the kernel counts, which is not getpid() in a container */
	bool touched;     /* in the transaction whose end has not been read yet */
};
/* A descriptor, or -1. */
int nft_watch_open(struct nft_watch *w);
/* When the descriptor is readable: true when somebody has, with his name in `who`. */
bool nft_watch_serve(struct nft_watch *w, char *who, size_t who_bytes);
void nft_watch_close(struct nft_watch *w);

#endif
