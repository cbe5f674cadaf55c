/* libdsnat-inject.so: traffic for a DPDK program that knows nothing of it (tests/bench/ports.py drives it).
 *
 * Preloaded into dsnatd or dpdk-testpmd, it hangs callbacks on the ports that it is told of: what they
 * receive becomes the next packets of so many flows, written over whatever the device gave; what they send
 * is looked at. So both programs run unchanged, get the same packets at the same cost, and differ only in
 * what they do with them. On net_null, which always has a burst, a packet then costs the worker's
 * processor time in a window divided by its packets.
 *
 *	DSNAT_INJECT_INSIDE   the device that hosts are behind, as "net_null0"
 *	DSNAT_INJECT_OUTSIDE  the device that answers come from; without it, there are none
 *	DSNAT_INJECT_FLOWS    how many
 *	DSNAT_INJECT_TO       the destination MAC address, where it is not the device's own
 *	DSNAT_INJECT_LATENCY  1: stamp each burst, and tell how long packets stayed
 *	DSNAT_INJECT_WATCH    a device whose packets are only counted, with the cycles from each burst to the next look
 *	                      for one: what they cost where a port is not always full
 *
 * First each flow speaks once, in order, again and again until all have been seen leaving (only then is it
 * known where answers must go). Then flows are drawn at random. A line on stderr for each window of a
 * queue tells cycles for a packet (TSC), or with LATENCY quantiles. With several queues a flow's requests
 * come to the queue that the port's own RSS key and table lead to, its answers to the queue whose worker
 * sent the request, which is where RSS would bring them if the engine chose the port for it.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <rte_cycles.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>
#include <rte_prefetch.h>
#include <rte_thash.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define QUEUES_MAX     16u
#define BURST_MAX      64u
#define WINDOW         (1u << 17)  /* packets */
#define INSIDE_NET     0x64400000u /* 100.64.0.0 */
#define REMOTE_NET     0xc6120000u /* 198.18.0.0 */
#define FLOWS_PER_HOST 8u
#define FRAME_BYTES    60u
#define BUCKETS        (1u << 16) /* of latency, 16 cycles each */

struct frame {
	uint8_t destination[6], source[6];
	uint16_t type_be;
	uint8_t version, tos;
	uint16_t length_be, id_be, fragment_be;
	uint8_t ttl, protocol;
	uint16_t checksum;
	uint32_t source_be, destination_be;
	uint16_t sport_be, dport_be, udp_length_be, udp_checksum;
	uint32_t flow; /* the payload, which no NAT changes */
	uint64_t stamp;
	uint8_t rest[10]; /* of 64 bytes, that a copy is one of a cache line */
} __attribute__((packed));
_Static_assert(sizeof(struct frame) == 64, "one line");

struct outside { /* where a flow's answers go */
	uint32_t address_be;
	uint16_t port_be, unused; /* port 0: not seen yet */
};

struct side { /* of a queue: the flows of its next burst are drawn one burst ahead */
	uint64_t chance;
	uint32_t next[BURST_MAX];
};

struct queue {
	struct side side[2];
	uint32_t *flow, n_flows; /* its own; NULL: all are */
	uint32_t at;             /* in the rounds before all are known */
	uint64_t packets, window_packets, window_ns;
	uint32_t *bucket;
	uint64_t stamped;
} __rte_cache_aligned;

struct watched {
	uint64_t since, cycles, packets, bursts; /* since: the last look found some */
};

static struct {
	uint32_t n_flows, n_queues;
	bool answers, latency, attached[2], watching;
	struct frame template[2];
	struct outside *outside;
	struct queue queue[QUEUES_MAX];
	_Atomic uint32_t n_known;
	pthread_once_t once;
	uint16_t inside_port;
	uint32_t sum[2];
	struct watched watched;
} world = {.once = PTHREAD_ONCE_INIT};

static uint64_t chance(uint64_t *state)
{
	uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15); /* splitmix64 */

	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static uint32_t below(uint64_t *state, uint32_t n)
{
	return (uint32_t)((chance(state) >> 32) * n >> 32);
}

static uint32_t host(uint32_t flow)
{
	return INSIDE_NET + flow / FLOWS_PER_HOST;
}

static uint16_t host_port(uint32_t flow)
{
	return (uint16_t)(1024 + flow % FLOWS_PER_HOST * 1009);
}

static uint32_t remote(uint32_t flow)
{
	return REMOTE_NET + (uint32_t)(flow * UINT64_C(0x9e3779b97f4a7c15) >> 32) % 131072;
}

static void *memory(size_t bytes)
{
	const size_t page = 2 << 20;
	void *at = mmap(NULL, (bytes + page) & ~(page - 1), PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		abort();
	(void)madvise(at, (bytes + page) & ~(page - 1), MADV_HUGEPAGE);
	memset(at, 0, bytes);
	return at;
}

/* Which queue the port's own RSS brings a flow's requests to. */
static void divide(void)
{
	struct rte_eth_rss_reta_entry64 entry[8] = {0};
	struct rte_eth_dev_info info;
	uint8_t key[64] = {0};
	struct rte_eth_rss_conf conf = {.rss_key = key, .rss_key_len = sizeof key};

	for (uint32_t i = 0; i < 8; i++)
		entry[i].mask = UINT64_MAX;
	if (rte_eth_dev_info_get(world.inside_port, &info) || info.reta_size > 512 ||
	    rte_eth_dev_rss_hash_conf_get(world.inside_port, &conf) ||
	    rte_eth_dev_rss_reta_query(world.inside_port, entry, info.reta_size)) {
		fputs("inject: the inside port has no RSS to follow\n", stderr);
		abort();
	}
	for (uint32_t q = 0; q < world.n_queues; q++)
		world.queue[q].flow = memory((size_t)world.n_flows * sizeof(uint32_t));
	for (uint32_t flow = 0; flow < world.n_flows; flow++) {
		union rte_thash_tuple tuple = {.v4 = {.src_addr = host(flow),
						      .dst_addr = remote(flow),
						      .sport = host_port(flow),
						      .dport = 443}};
		const uint32_t at =
			rte_softrss((uint32_t *)&tuple, RTE_THASH_V4_L4_LEN, key) % info.reta_size;
		struct queue *queue = &world.queue[entry[at / 64].reta[at % 64]];

		queue->flow[queue->n_flows++] = flow;
	}
}

static uint32_t flow_of(const struct queue *queue, uint32_t i)
{
	return queue->flow ? queue->flow[i] : i;
}

/* At the first packet: by then the program has set the port's key and table. */
static void begin(void)
{
	struct rte_eth_dev_info info;

	if (rte_eth_dev_info_get(world.inside_port, &info) || info.nb_rx_queues > QUEUES_MAX)
		abort();
	world.n_queues = info.nb_rx_queues;
	if (world.n_queues > 1)
		divide();
	for (uint32_t q = 0; q < world.n_queues; q++) {
		struct queue *queue = &world.queue[q];

		if (!queue->flow)
			queue->n_flows = world.n_flows;
		if (world.latency)
			queue->bucket = memory(BUCKETS * sizeof(uint32_t));
		for (uint32_t side = 0; side < 2; side++) {
			queue->side[side].chance = q * 2 + side;
			for (uint32_t i = 0; queue->n_flows && i < BURST_MAX; i++)
				queue->side[side].next[i] = flow_of(queue, 0);
		}
	}
}

static uint32_t halves(uint32_t word)
{
	return (word & 0xffff) + (word >> 16);
}

static uint32_t folded(uint32_t sum)
{
	return halves(halves(sum));
}

static void write_frame(struct rte_mbuf *m, uint32_t side, uint32_t flow, uint64_t stamp)
{
	struct frame *frame = rte_pktmbuf_mtod(m, struct frame *);

	*frame = world.template[side];
	frame->flow = flow;
	frame->stamp = stamp;
	if (side == 0) {
		frame->source_be = rte_cpu_to_be_32(host(flow));
		frame->destination_be = rte_cpu_to_be_32(remote(flow));
		frame->sport_be = rte_cpu_to_be_16(host_port(flow));
	} else {
		frame->source_be = rte_cpu_to_be_32(remote(flow));
		frame->destination_be = world.outside[flow].address_be;
		frame->dport_be = world.outside[flow].port_be;
	}
	frame->checksum =
		(uint16_t)~folded(world.sum[side] + halves(frame->source_be) + halves(frame->destination_be));
	m->data_len = FRAME_BYTES;
	m->pkt_len = FRAME_BYTES;
	m->ol_flags = RTE_MBUF_F_RX_IP_CKSUM_GOOD; /* as a port says that has looked */
}

/* Of a window's latencies, those that so many of a million stay below, in cycles. */
static uint64_t quantile(const struct queue *queue, uint64_t millionths)
{
	uint64_t wanted = queue->stamped * millionths / 1000000, seen = 0;
	uint32_t i = 0;

	while (i < BUCKETS - 1 && (seen += queue->bucket[i]) <= wanted)
		i++;
	return i * UINT64_C(16) + 8;
}

/* Of this thread's processor time: others that take the core in between do not count. */
static uint64_t spent_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void window(struct queue *queue)
{
	const double hz = (double)rte_get_tsc_hz();
	const unsigned number = (unsigned)(queue - world.queue);
	const uint64_t packets = queue->packets - queue->window_packets;

	if (queue->window_ns && world.latency) {
		fprintf(stderr, "inject: queue %u p50_us %.2f p99_us %.2f p999_us %.2f\n", number,
			(double)quantile(queue, 500000) * 1e6 / hz,
			(double)quantile(queue, 990000) * 1e6 / hz,
			(double)quantile(queue, 999000) * 1e6 / hz);
		memset(queue->bucket, 0, BUCKETS * sizeof *queue->bucket);
		queue->stamped = 0;
	} else if (queue->window_ns) {
		fprintf(stderr, "inject: queue %u cycles %.1f at_s %.6f packets %llu\n", number,
			(double)(spent_ns() - queue->window_ns) * hz / 1e9 / (double)packets,
			(double)rte_rdtsc() / hz, (unsigned long long)queue->packets);
	}
	queue->window_ns = spent_ns();
	queue->window_packets = queue->packets;
}

/* In order, those that have not been seen leaving; without answers each once. */
static uint16_t introduce(struct queue *queue, struct rte_mbuf **m, uint16_t n)
{
	uint16_t done = 0;

	for (uint32_t looked = 0; done < n && looked < 4096; looked++) {
		const uint32_t flow = flow_of(queue, queue->at);

		queue->at = queue->at + 1 < queue->n_flows ? queue->at + 1 : 0;
		if (world.answers && world.outside[flow].port_be)
			continue;
		write_frame(m[done++], 0, flow, 0);
		if (!world.answers)
			world.n_known++;
	}
	for (uint16_t i = done; i < n; i++)
		rte_pktmbuf_free(m[i]);
	return done;
}

static uint16_t receive(uint16_t port, uint16_t q, struct rte_mbuf **m, uint16_t n, uint16_t max, void *side_)
{
	const uint32_t side = (uint32_t)(uintptr_t)side_;
	struct queue *queue = &world.queue[q];
	struct side *own = &queue->side[side];
	const uint64_t stamp = world.latency ? rte_rdtsc() : 0;

	(void)port, (void)max;
	if (unlikely(world.n_known < world.n_flows)) {
		pthread_once(&world.once, begin);
		if (side == 0)
			return queue->n_flows ? introduce(queue, m, n) : 0;
		for (uint16_t i = 0; i < n; i++)
			rte_pktmbuf_free(m[i]);
		return 0;
	}
	while (n > BURST_MAX) /* testpmd empties its ports first */
		rte_pktmbuf_free(m[--n]);
	for (uint16_t i = 0; i < n; i++) {
		write_frame(m[i], side, own->next[i], stamp);
		own->next[i] = flow_of(queue, below(&own->chance, queue->n_flows));
		rte_prefetch0(&world.outside[own->next[i]]);
	}
	queue->packets += n;
	if (side == 0 && (!queue->window_ns || queue->packets - queue->window_packets >= WINDOW))
		window(queue);
	return n;
}

static uint16_t leave(uint16_t port, uint16_t q, struct rte_mbuf **m, uint16_t n, void *side_)
{
	const bool known = world.n_known >= world.n_flows;
	struct queue *queue = &world.queue[q];

	(void)port;
	if (likely(known && !world.latency))
		return n;
	for (uint16_t i = 0; i < n; i++) {
		const struct frame *frame = rte_pktmbuf_mtod(m[i], const struct frame *);

		if (frame->type_be != RTE_BE16(RTE_ETHER_TYPE_IPV4) || frame->flow >= world.n_flows)
			continue;
		if (known && frame->stamp) {
			const uint64_t bucket = (rte_rdtsc() - frame->stamp) / 16;

			queue->bucket[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
			queue->stamped++;
		} else if (!known && side_ && !world.outside[frame->flow].port_be) {
			world.outside[frame->flow] = (struct outside){frame->source_be, frame->sport_be, 0};
			world.n_known++;
		}
	}
	return n;
}

/* On one queue. */
static uint16_t watch(uint16_t port, uint16_t q, struct rte_mbuf **m, uint16_t n, uint16_t max, void *unused)
{
	struct watched *w = &world.watched;
	const uint64_t now = rte_rdtsc();

	(void)port, (void)q, (void)m, (void)max, (void)unused;
	if (w->since)
		w->cycles += now - w->since;
	w->since = n ? now : 0;
	w->packets += n;
	w->bursts += n != 0;
	if (w->packets >= WINDOW) {
		fprintf(stderr, "inject: queue 0 cycles %.1f at_s %.6f packets %llu burst %.1f\n",
			(double)w->cycles / (double)w->packets, (double)now / (double)rte_get_tsc_hz(),
			(unsigned long long)w->packets, (double)w->packets / (double)w->bursts);
		w->packets = w->bursts = w->cycles = w->since = 0;
	}
	return n;
}

static void prepare(uint16_t port, uint32_t side)
{
	struct rte_ether_addr mac;
	struct frame *frame = &world.template[side];
	const char *to = getenv("DSNAT_INJECT_TO");

	(void)rte_eth_macaddr_get(port, &mac);
	*frame = (struct frame){.source = {2, 0, 0, 0, 0, 9},
				.type_be = RTE_BE16(RTE_ETHER_TYPE_IPV4),
				.version = 0x45,
				.length_be = RTE_BE16(FRAME_BYTES - 14),
				.fragment_be = RTE_BE16(0x4000), /* as nearly all hosts send */
				.ttl = 64,
				.protocol = 17,
				.sport_be = RTE_BE16(443),
				.dport_be = RTE_BE16(443),
				.udp_length_be = RTE_BE16(FRAME_BYTES - 34),
				.udp_checksum = 0x1234}; /* updated by a NAT, verified by nobody */
	if (to)
		(void)rte_ether_unformat_addr(to, &mac);
	memcpy(frame->destination, &mac, 6);
	world.sum[side] = 0; /* of the header without addresses and checksum */
	for (uint32_t i = 0; i < 5; i++) {
		uint16_t word;

		memcpy(&word, &frame->version + i * sizeof word, sizeof word);
		world.sum[side] += word;
	}
}

static void attach(uint16_t port, uint32_t side)
{
	struct rte_eth_dev_info info;

	if (world.attached[side]) /* a second start: callbacks stay */
		return;
	world.attached[side] = true;
	if (rte_eth_dev_info_get(port, &info))
		abort();
	if (!world.outside) {
		const char *flows = getenv("DSNAT_INJECT_FLOWS");

		world.n_flows = flows ? (uint32_t)atol(flows) : 1;
		world.latency = getenv("DSNAT_INJECT_LATENCY") != NULL;
		world.answers = getenv("DSNAT_INJECT_OUTSIDE") != NULL;
		world.outside = memory((size_t)world.n_flows * sizeof *world.outside);
	}
	if (side == 0)
		world.inside_port = port;
	prepare(port, side);
	for (uint16_t q = 0; q < info.nb_rx_queues; q++)
		(void)rte_eth_add_rx_callback(port, q, receive, (void *)(uintptr_t)side);
	for (uint16_t q = 0; q < info.nb_tx_queues; q++)
		(void)rte_eth_add_tx_callback(port, q, leave, (void *)(uintptr_t)side);
}

/* In place of DPDK's own, which it calls. */
int rte_eth_dev_start(uint16_t port)
{
	int (*start)(uint16_t) = (int (*)(uint16_t))dlsym(RTLD_NEXT, "rte_eth_dev_start");
	const char *device[] = {getenv("DSNAT_INJECT_INSIDE"), getenv("DSNAT_INJECT_OUTSIDE")};
	const char *watched = getenv("DSNAT_INJECT_WATCH");
	char name[RTE_ETH_NAME_MAX_LEN];
	int status;

	if (!start)
		abort();
	status = start(port);
	if (status || rte_eth_dev_get_name_by_port(port, name))
		return status;
	if (watched && !strcmp(watched, name) && !world.watching) {
		world.watching = true;
		(void)rte_eth_add_rx_callback(port, 0, watch, NULL);
	}
	for (uint32_t side = 0; side < 2; side++)
		if (device[side] && !strcmp(device[side], name))
			attach(port, side);
	return status;
}
