/* The UDP socket of PCP and NAT-PMP: one for the gateway, answering on inside interfaces only. */
#ifndef PCP_SERVER_H
#define PCP_SERVER_H

#include "pcp.h"
#include "request.h"

struct pcp_server;

/* NULL, with a sentence in `why`, when port 5351 cannot be had. `ops` must outlive the server. */
struct pcp_server *pcp_open(const struct request_ops *ops, char *why, size_t why_bytes);
void pcp_close(struct pcp_server *server);
int pcp_fd(const struct pcp_server *server);

/* Answers what has come in, at most a handful at a time. */
void pcp_serve(struct pcp_server *server);

/* How a request reaches the engines. */
struct pcp_ops pcp_over(const struct request_ops *ops);

#endif
