/* One gateway's end of the sync, and a peer that says what this test wants it to say. */
#include <arpa/inet.h>
#include <assert.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../core/testbed.h"
#include "request.h"
#include "sync.h"
#include "sync_wire.h"

enum { SESSIONS = 8192, PLACES = 2048, DEADLINE_S = 20 };

static const char key_text[] = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n";

struct stage {
	struct testbed t;
	struct request_ops ops;
	struct sync *sync;
	char key_file[32];
	uint8_t key[SYNC_KEY_BYTES];
	/* the peer */
	int fd;
	struct sockaddr_in gateway;
	uint8_t epoch[SYNC_EPOCH_BYTES], gateway_epoch[SYNC_EPOCH_BYTES];
	uint64_t number;
};

struct datagram {
	uint8_t bytes[SYNC_BYTES_MAX];
	size_t n;
};

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

static bool on_worker(void *context, uint32_t worker,
		      void (*run)(struct nat_engine *e, uint64_t now_ns, void *argument), void *argument)
{
	(void)worker;
	run(((struct stage *)context)->t.e, clock_ns(), argument);
	return true;
}

static int loopback(struct sockaddr_in *here)
{
	const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	socklen_t bytes = sizeof *here;

	*here = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	assert(fd >= 0 && !bind(fd, (struct sockaddr *)here, bytes) &&
	       !getsockname(fd, (struct sockaddr *)here, &bytes));
	return fd;
}

static void be_born(struct stage *s, uint8_t epoch)
{
	memset(s->epoch, epoch, sizeof s->epoch);
	s->number = 0;
}

static void stage_open_with(struct stage *s, uint64_t max_sessions)
{
	struct sockaddr_in peer;
	char why[256];

	memset(s, 0, sizeof *s);
	strcpy(s->key_file, "/tmp/sync-test-XXXXXX");
	const int file = mkstemp(s->key_file);
	assert(file >= 0 && write(file, key_text, sizeof key_text - 1) == sizeof key_text - 1);
	close(file);
	assert(sync_wire_start() && sync_read_key(s->key_file, s->key, why, sizeof why));
	close(loopback(&s->gateway)); /* a free port */
	s->fd = loopback(&peer);
	be_born(s, 1);
	testbed_config(&s->t, 4, 1024, 65535, max_sessions);
	s->t.params.replicate = true;
	testbed_start(&s->t, clock_ns());
	s->ops = (struct request_ops){.context = s, .n_workers = 1, .on_worker = on_worker};
	struct sync_settings settings = {.on = true,
					 .listen_be = s->gateway.sin_addr.s_addr,
					 .listen_port_be = s->gateway.sin_port,
					 .peer_be = peer.sin_addr.s_addr,
					 .peer_port_be = peer.sin_port,
					 .hold_back_ms = 2000};
	snprintf(settings.key, sizeof settings.key, "%s", s->key_file);
	s->sync = sync_open(&settings, &s->ops, max_sessions, why, sizeof why);
	assert(s->sync);
}

static void stage_open(struct stage *s)
{
	stage_open_with(s, SESSIONS);
}

static void stage_close(struct stage *s)
{
	sync_close(s->sync);
	testbed_stop(&s->t, false);
	close(s->fd);
	unlink(s->key_file);
}

static void send_datagram(struct stage *s, const struct datagram *d)
{
	assert(sendto(s->fd, d->bytes, d->n, 0, (struct sockaddr *)&s->gateway, sizeof s->gateway) ==
	       (ssize_t)d->n);
	struct pollfd fd = {.fd = sync_fd(s->sync), .events = POLLIN};
	for (unsigned i = 0; i < 3; i++)
		if (poll(&fd, 1, 20) > 0)
			sync_serve(s->sync);
}

static struct datagram seal(struct stage *s, struct sync_packet *packet)
{
	struct datagram d;

	memcpy(packet->epoch, s->epoch, sizeof packet->epoch);
	memcpy(packet->head.echo, s->gateway_epoch, sizeof packet->head.echo);
	packet->number = ++s->number;
	packet->head.n_records = PLACES;
	d.n = sync_seal(packet, s->key, d.bytes);
	return d;
}

/* Until the gateway has said who it is. */
static void meet(struct stage *s)
{
	static const uint8_t nobody[SYNC_EPOCH_BYTES];
	const uint64_t until_ns = clock_ns() + DEADLINE_S * SECOND_NS;
	struct sync_packet heard;
	uint8_t bytes[2048];

	while (memcmp(s->gateway_epoch, nobody, sizeof nobody) == 0) {
		struct sync_packet hello = {.head.kind = SYNC_HELLO};
		const struct datagram d = seal(s, &hello);

		assert(clock_ns() < until_ns);
		send_datagram(s, &d);
		const ssize_t n = recv(s->fd, bytes, sizeof bytes, MSG_DONTWAIT);
		if (n > 0 && sync_open_sealed(&heard, s->key, bytes, (size_t)n))
			memcpy(s->gateway_epoch, heard.epoch, sizeof s->gateway_epoch);
	}
}

/* Of that host, and of the ones behind it in the places behind it. */
static struct datagram session_of_each(struct stage *s, uint32_t slot, uint32_t host, uint32_t n)
{
	struct sync_packet packet = {.head.kind = SYNC_DATA};

	for (uint32_t i = 0; i < n; i++) {
		const struct nat_replica replica = {
			.inside = {.local_be = NAT_HTON32(ADDRESS(100, 64, 0, 0) + host + i),
				   .remote_be = NAT_HTON32(ADDRESS(198, 51, 100, 1)),
				   .local_port_be = NAT_HTON16(4000),
				   .remote_port_be = NAT_HTON16(443),
				   .protocol = NAT_PROTO_UDP},
			.out_addr_be = NAT_HTON32(ADDRESS(203, 0, 113, 1)),
			.out_port_be = NAT_HTON16(2000 + host + i),
			.kind = NAT_REPLICA_SESSION,
			.timer = 4, /* NAT_TIMER_UDP */
			.slot = slot + i};

		assert(sync_put(&packet, &replica));
	}
	return seal(s, &packet);
}

static struct datagram session(struct stage *s, uint32_t slot, uint32_t host)
{
	return session_of_each(s, slot, host, 1);
}

static uint64_t heard(struct stage *s)
{
	struct sync_view view;

	sync_look(s->sync, &view);
	return view.heard;
}

static uint64_t sessions(const struct stage *s)
{
	return nat_engine_counters(s->t.e)->sessions;
}

/* The peer's next session takes the place of one that has ended, and it tells only what stands there now. */
static void test_a_place_that_has_a_new_session_has_the_old_one_no_longer(void)
{
	struct stage s;

	stage_open(&s);
	meet(&s);
	for (uint32_t host = 1; host <= 20; host++) {
		const struct datagram d = session(&s, 7, host);

		send_datagram(&s, &d);
		send_datagram(&s, &d); /* twice is once */
		assert(heard(&s) == host);
		assert(sessions(&s) == 1);
	}
	stage_close(&s);
}

/* Somebody has recorded the peer's datagrams, and the peer was restarted since. */
static void test_what_a_peer_said_before_it_was_restarted_is_not_taken_again(void)
{
	struct stage s;

	stage_open(&s);
	meet(&s);
	const struct datagram before = session(&s, 7, 1);
	send_datagram(&s, &before);
	assert(heard(&s) == 1);
	be_born(&s, 2);
	const struct datagram after = session(&s, 7, 2);
	send_datagram(&s, &after);
	assert(heard(&s) == 2);
	send_datagram(&s, &before);
	assert(heard(&s) == 2);
	send_datagram(&s, &after); /* it has not been forgotten either */
	assert(heard(&s) == 2);
	stage_close(&s);
}

static struct sync_view view(const struct stage *s)
{
	struct sync_view v;

	sync_look(s->sync, &v);
	return v;
}

/* One of the two was upgraded to a release with another wire; or got another key. */
static void test_another_version_and_another_key_are_told_apart_and_harm_nothing(void)
{
	struct sync_packet hello = {.head.kind = SYNC_HELLO};
	struct stage s;

	stage_open(&s);
	struct datagram d = seal(&s, &hello);
	d.bytes[4] = SYNC_VERSION + 1;
	send_datagram(&s, &d);
	assert(view(&s).other_version == 1 && view(&s).peer_version == SYNC_VERSION + 1);
	assert(view(&s).dropped == 0 && !view(&s).connected);
	s.key[0] ^= 1;
	d = seal(&s, &hello);
	send_datagram(&s, &d);
	assert(view(&s).other_version == 1 && view(&s).dropped == 1 && !view(&s).connected);
	s.key[0] ^= 1;
	meet(&s);
	d = session(&s, 7, 1);
	send_datagram(&s, &d);
	assert(heard(&s) == 1 && sessions(&s) == 1);
	stage_close(&s);
}

/* Its table is twice as large as ours. */
static void test_a_peer_that_tells_more_than_our_table_holds_is_counted_and_harms_nothing(void)
{
	struct stage s;

	stage_open_with(&s, 1024);
	meet(&s);
	for (uint32_t slot = 0; slot < PLACES; slot += 16) {
		const struct datagram d = session_of_each(&s, slot, 1 + slot, 16);

		send_datagram(&s, &d);
	}
	const uint64_t kept = sessions(&s);
	assert(heard(&s) == PLACES && kept > 0 && kept < PLACES && view(&s).full == PLACES - kept);
	stage_close(&s);
}

int main(void)
{
	test_a_place_that_has_a_new_session_has_the_old_one_no_longer();
	test_what_a_peer_said_before_it_was_restarted_is_not_taken_again();
	test_another_version_and_another_key_are_told_apart_and_harm_nothing();
	test_a_peer_that_tells_more_than_our_table_holds_is_counted_and_harms_nothing();
	return 0;
}
