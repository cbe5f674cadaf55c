/* See pcp_server.h. Requests arrive over the kernel: addressed to the gateway itself, they pass the engine
 * like SSH does. */
#include "pcp_server.h"

#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SERVED_AT_ONCE = 16 };

struct pcp_server {
	const struct request_ops *ops;
	int fd;
};

struct map_job {
	struct nat_map *ask;
	enum nat_map_result result;
	uint32_t host_be, address_be;
	bool known;
};

static void run_map(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct map_job *job = argument;
	job->result = nat_engine_map(e, job->ask, now_ns);
}

static void run_address(struct nat_engine *e, uint64_t now_ns, void *argument)
{
	struct map_job *job = argument;
	(void)now_ns;
	job->known = nat_engine_public_address(e, job->host_be, &job->address_be);
}

static uint32_t worker_of(const struct request_ops *ops, uint32_t host_be)
{
	return nat_policy_worker_of_host(ops->policy(ops->context), host_be);
}

static bool map(void *context, struct nat_map *ask, enum nat_map_result *result)
{
	const struct request_ops *ops = context;
	struct map_job job = {.ask = ask};

	if (!ops->on_worker(ops->context, worker_of(ops, ask->host_be), run_map, &job))
		return false;
	*result = job.result;
	return true;
}

static bool public_address(void *context, uint32_t host_be, uint32_t *address_be)
{
	const struct request_ops *ops = context;
	struct map_job job = {.host_be = host_be};

	if (!ops->on_worker(ops->context, worker_of(ops, host_be), run_address, &job) || !job.known)
		return false;
	*address_be = job.address_be;
	return true;
}

struct pcp_ops pcp_over(const struct request_ops *ops)
{
	return (struct pcp_ops){(void *)(uintptr_t)ops, map, public_address};
}

/* Mappings outlive the daemon and end with the machine, so that is what the epoch counts (RFC 6887 section
 * 8.5). */
static uint32_t epoch_s(void)
{
	struct timespec now;
	clock_gettime(CLOCK_BOOTTIME, &now);
	return (uint32_t)now.tv_sec;
}

struct pcp_server *pcp_open(const struct request_ops *ops, char *why, size_t why_bytes)
{
	const struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(PCP_PORT)};
	const int on = 1;
	struct pcp_server *server = calloc(1, sizeof(*server));

	if (!server)
		return NULL;
	server->ops = ops;
	server->fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (server->fd < 0 || setsockopt(server->fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on)) ||
	    bind(server->fd, (const struct sockaddr *)&any, sizeof(any))) {
		snprintf(why, why_bytes,
			 "UDP port %u for PCP and NAT-PMP cannot be had: %s; end the program that has it, or "
			 "set "
			 "port_control: off",
			 PCP_PORT, strerror(errno));
		pcp_close(server);
		return NULL;
	}
	return server;
}

void pcp_close(struct pcp_server *server)
{
	if (!server)
		return;
	if (server->fd >= 0)
		close(server->fd);
	free(server);
}

int pcp_fd(const struct pcp_server *server)
{
	return server->fd;
}

static bool is_inside(const struct pcp_server *server, unsigned ifindex)
{
	const struct nat_config *config = &server->ops->config(server->ops->context)->nat;
	char name[IF_NAMESIZE];

	if (!if_indextoname(ifindex, name))
		return false;
	for (uint32_t i = 0; i < config->n_interfaces; i++)
		if (!strcmp(config->interfaces[i].name, name))
			return config->interfaces[i].role == NAT_ROLE_INSIDE;
	return false;
}

static const struct in_pktinfo *arrival(struct msghdr *message)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c))
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO)
			return (const struct in_pktinfo *)(const void *)CMSG_DATA(c);
	return NULL;
}

static bool serve_one(struct pcp_server *server)
{
	uint8_t request[PCP_BYTES_MAX + 4], answer[PCP_BYTES_MAX + 4];
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(struct in_pktinfo))];
	struct sockaddr_in client;
	struct iovec vector = {request, sizeof(request)};
	struct msghdr message = {.msg_name = &client,
				 .msg_namelen = sizeof(client),
				 .msg_iov = &vector,
				 .msg_iovlen = 1,
				 .msg_control = control,
				 .msg_controllen = sizeof(control)};
	const ssize_t got = recvmsg(server->fd, &message, 0);

	if (got < 0)
		return false;
	const struct in_pktinfo *info = arrival(&message);
	if (!info || !is_inside(server, (unsigned)info->ipi_ifindex))
		return true;
	const struct pcp_ops ops = pcp_over(server->ops);
	const size_t length =
		pcp_answer(&ops, client.sin_addr.s_addr, epoch_s(), request, (size_t)got, answer);
	if (length == 0)
		return true;
	/* From the address that was asked: the control data goes back as it came, but for the interface,
	 * which the route decides. */
	struct in_pktinfo from = {.ipi_spec_dst = info->ipi_spec_dst};
	memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &from, sizeof(from));
	vector = (struct iovec){answer, length};
	(void)sendmsg(server->fd, &message, 0);
	return true;
}

void pcp_serve(struct pcp_server *server)
{
	for (int i = 0; i < SERVED_AT_ONCE && serve_one(server); i++)
		;
}
