/* `show sync`: is the peer's table equal to ours? */
#include <jansson.h>

#include "offer.h"
#include "request_internal.h"

json_t *request_show_sync(struct request_context *c)
{
	static const char *const keys[] = {"cmd", "what"};
	struct sync_view v;
	json_t *answer, *differs = json_array();

	if (!request_only_keys(c, keys, 2) || !c->ops->sync || !c->ops->sync(c->ops->context, &v)) {
		json_decref(differs);
		return c->why[0] ? NULL : json_pack("{s:b}", "configured", false);
	}
	for (uint32_t i = 0; i < v.differ && i < SYNC_DIFFERS_MAX; i++)
		json_array_append_new(differs, request_number(v.differs[i]));
	answer = json_pack("{s:b, s:b, s:b, s:b, s:b, s:o, s:o, s:s}", "configured", true, "connected",
			   v.connected, "in_sync", v.in_sync, "told_all", v.told_all, "heard_all",
			   v.heard_all, "differences", request_number(v.differ), "differing_ranges", differs,
			   "last_conflict", v.conflict);
	const struct {
		const char *key;
		uint64_t value;
	} numbers[] = {{"waiting", v.waiting},
		       {"on_the_way", v.on_the_way},
		       {"peer_waiting", v.peer_waiting},
		       {"lag_ms", v.lag_ms},
		       {"ranges", v.ranges},
		       {"compared", v.compared},
		       {"repaired", v.repaired},
		       {"told", v.told},
		       {"heard", v.heard},
		       {"bytes_out", v.bytes_out},
		       {"bytes_in", v.bytes_in},
		       {"told_again", v.again},
		       {"not_authentic", v.dropped},
		       {"other_version", v.other_version},
		       {"peer_version", v.peer_version},
		       {"conflicts", v.conflicts},
		       {"kept", v.kept},
		       {"table_full", v.full},
		       {"invalid", v.invalid}};
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
		json_object_set_new(answer, numbers[i].key, request_number(numbers[i].value));
	if (v.peer.digest) {
		const struct offer ours = offer_of(&c->ops->config(c->ops->context)->nat);

		json_object_set_new(answer, "same_pools", json_boolean(v.peer.digest == ours.digest));
		json_object_set_new(answer, "peer_exhausted", json_boolean(v.peer.exhausted));
	}
	if (v.heard_ms != UINT64_MAX)
		json_object_set_new(answer, "heard_ms", request_number(v.heard_ms));
	if (v.round_ms != UINT64_MAX)
		json_object_set_new(answer, "compared_all_ms", request_number(v.round_ms));
	return answer;
}
