/* dsnatd in one process: what its files share. dsnatd.c has the drawing.
 */
#ifndef DAEMON_H
#define DAEMON_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "../ctl/config.h"
#include "../ctl/export.h"
#include "../ctl/log.h"
#include "../ctl/pcp_server.h"
#include "../ctl/route.h"
#include "../ctl/socket.h"
#include "../ctl/sync.h"
#include "../io/announce.h"
#include "../io/crew.h"
#include "../io/dpdk/port.h"
#include "../io/dpdk/twin.h"
#include "../io/dpdk/worker.h"
#include "../io/memory.h"
#include "../io/nfqueue/nft.h"
#include "../io/nfqueue/queue.h"
#include "../io/rival.h"
#include "../io/standing.h"
#include "../io/tenure.h"
#include "../io/thread.h"

#define DEFAULT_SOCKET "/run/dsnatd/control.sock"

enum status {
	STOPPED = 0,
	FAILED = 1,
	INVALID = CONFIG_EXIT_INVALID,
	NO_DEVICE = 3,
	NO_MEMORY = 4,
	IN_USE = 5
};

struct options {
	const char *config, *socket, *sessions;
	bool no_huge, degraded;
	pid_t spare_of; /* the process that this one is prepared to go on for; 0: none */
	char **argv;
};

/* what a start takes its time for, in this order */
enum start { START_SESSIONS, START_DPDK, START_PORTS, START_ENGINES, START_FORWARDING, STARTS };

struct retired {
	struct retired *next;
	uint64_t generation; /* free it when every worker has reached this */
	void (*release)(void *object);
	void *object;
};

struct will;
struct spare {
	struct will *will; /* NULL: there is nothing to inherit */
	int will_fd, predecessor_fd;
	pid_t pid;        /* who waits for our end; 0: nobody */
	uint64_t next_ns; /* not before that one is started */
	uint32_t again_s; /* after one that ended by itself */
	bool refused;     /* with the configuration that is there it would not be ours */
};

struct daemon {
	struct options options;
	const char *path; /* of the configuration */
	struct plan *plan;
	/* a reload cannot change them, and ports, routes and queue outlive the plan that they came with */
	struct nat_interface_config interfaces[NAT_INTERFACES_MAX];
	_Atomic uint64_t generation;
	struct retired *retired;
	struct route *route;
	bool eal;
	struct ports ports;
	struct twins twins;
	struct worker *workers;
	uint32_t n_workers;
	struct queue *queues; /* one of each worker; NULL: no interface on the queue path */
	uint32_t n_queues, n_queue_threads;
	struct nft_watch rules_watch;
	bool rules_changed; /* by somebody else: to be put in place again at the next tick */
	pthread_t queue_thread[NAT_WORKERS_MAX]; /* only without DPDK ports */
	struct memory sessions, *engine_memory;
	struct crew crew;
	struct nat_table *table;
	struct socket_server *socket;
	const struct request_ops *ops;
	const struct plan *port_control_failed; /* said once per configuration */
	struct pcp_server *port_control;        /* NULL: off */
	struct announce announce;
	struct rival rival[NAT_WORKERS_MAX];
	struct standing standing;
	struct tenure tenure;
	struct offer offer;           /* of the plan that runs */
	uint64_t refused, refused_ns; /* for want of a port: how many, and when the last one */
	bool translates;              /* all workers made rounds since the last look */
	uint64_t connected;           /* digest of the prefixes that announcements were made for */
	int epoll_fd, signal_fd, tick_fd, announce_fd;
	uint64_t moment_ns[STARTS]; /* when that step of the start was done */
	uint64_t started_ns, started_tsc, started_s, watchdog_us;
	struct log log;
	struct export *nat_log;
	struct sync *sync;                   /* NULL: there is no peer */
	uint64_t rounds[NAT_WORKERS_MAX];    /* at the last tick */
	uint32_t stalled_s[NAT_WORKERS_MAX]; /* since when there were none */
	struct spare spare;
	bool is_heir; /* was a spare itself */
	int listener; /* inherited; -1: none */
	bool stop;
	bool restart; /* the end is not what the operator wanted: status 1, and systemd starts it again */
};

enum source { SIGNALS, TICK, ROUTES, CLIENTS, ANNOUNCE, PORT_CONTROL, RULES, PEER };

/* plan.c: what runs, and what was swapped out */
void daemon_say(const char *sentence);
void daemon_retire(struct daemon *d, void (*release)(void *object), void *object);
void daemon_next_generation(struct daemon *d);
void daemon_free_retired(struct daemon *d);
void daemon_plan_free(void *object);
struct plan *daemon_plan_new(struct config *config, const struct plan *previous);
bool daemon_pools_follow(struct daemon *d, struct plan *plan);
void daemon_announce_again(struct daemon *d);
void daemon_announce_tick(struct daemon *d);
void daemon_route_changed(void *context);
void daemon_route_retire(void *context, void *memory);

/* answer.c: requests of the control socket */
bool daemon_on_sync(void *context, struct sync_view *view);
void daemon_follow_logging(struct daemon *d);
struct request_ops daemon_request_ops(struct daemon *d);
void daemon_reload(struct daemon *d);

/* loop.c: the control thread */
bool daemon_watch(struct daemon *d, int fd, enum source source);
void daemon_follow_port_control(struct daemon *d);
void daemon_wait_and_serve(struct daemon *d);

/* vrrp.c: what VRRP is told of us, and what of it is believed */
void daemon_follow_standing(struct daemon *d);
void daemon_follow_tenure(struct daemon *d);
void daemon_follow_offer(struct daemon *d);
void daemon_look_for_rivals(struct daemon *d);

/* spare.c: a second process, prepared to go on */
bool daemon_make_will(struct daemon *d);
void daemon_drop_will(struct daemon *d);
int daemon_run_worker(void *worker);
void daemon_follow_spare(struct daemon *d);
void daemon_end_spare(struct daemon *d);
enum status daemon_wait_as_spare(struct daemon *d);
void daemon_outwait_predecessor(struct daemon *d);

/* life.c: start and stop */
size_t daemon_engine_bytes(struct daemon *d, uint32_t worker);
enum status daemon_fail(enum status status, const char *sentence);
enum status daemon_serve(struct daemon *d);

#endif
