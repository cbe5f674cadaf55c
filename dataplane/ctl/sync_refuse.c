/* What came in our peer's name and is not taken: of another version of these datagrams, or not sealed with
 * our key. It is counted, and said once to the operator while there is no peer; both gateways serve
 * meanwhile, each with its own sessions.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

#include "sync_internal.h"

static void say(const struct sync *s, const char *sentence)
{
	char text[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &s->settings.peer_be, text, sizeof text);
	fprintf(stderr, "dsnatd: sync: %s %s\n", text, sentence);
}

void sync_refuse(struct sync *s, const uint8_t *bytes, size_t n_bytes, bool connected)
{
	const uint8_t version = sync_version(bytes, n_bytes);
	char sentence[192];

	if (version == 0 || version == SYNC_VERSION) {
		s->seen.dropped++;
		if (!connected && !s->said_key)
			say(s, "sends what is not sealed with our key; give both gateways the same sync.key");
		s->said_key |= !connected;
		return;
	}
	s->seen.other_version++;
	s->seen.peer_version = version;
	snprintf(sentence, sizeof sentence,
		 "speaks version %u of the sync, we speak %u; both serve, but no session of one is known to "
		 "the "
		 "other: give both the same release",
		 version, SYNC_VERSION);
	if (!connected && s->said_version != version)
		say(s, sentence);
	if (!connected)
		s->said_version = version;
}

void sync_refuse_no_more(struct sync *s)
{
	s->said_key = false;
	s->said_version = 0;
}
