"""Putting back what was live before: at the deadline, at boot, on request, and before anybody else's turn.

Every step may be repeated: the link, the services, the record, and `pending` last, so that whatever
interrupts an undo leaves the reason to begin it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .protocol import Json, Refused, line_in
from .services import actions_between, await_health, play
from .state import State


def revert(state: State, request: Json) -> Json:
    """Undoes the pending change now."""
    with state.locked():
        pending = state.pending()
        if pending is None:
            raise Refused("usage", "no change is pending; to go back further, apply an older generation")
        wanted = request.get("generation")
        if wanted is not None and pending.get("generation") != wanted:
            raise Refused("stale", f"generation {pending.get('generation')} is pending, not {wanted}")
        return put_back(state, pending, line_in(request, "reason") or "an operator asked for it")


def boot(state: State) -> Json:
    """Before any service starts: an unconfirmed change does not survive a restart of the machine."""
    with state.locked():
        pending = state.pending()
        if pending is None:
            return {"state": "idle"}
        return put_back(state, pending, "the gateway restarted before the change was confirmed", act=False)


def undo(state: State, identity: str) -> Json:
    """Waits for the deadline of one change. Ends at once when that change is no longer pending."""
    machine = state.machine
    while True:
        pending = state.pending()
        if pending is None or pending.get("id") != identity:
            return {"state": "settled"}
        late = machine.clock() >= pending["deadline"]
        if late or pending["state"] == "armed":
            # Whoever applies holds the lock until the change is live: with the lock and still armed,
            # it died.
            with contextlib.suppress(Refused), state.locked(wait_s=1.0):
                pending = state.pending()
                if pending is not None and pending.get("id") == identity:
                    if pending["state"] == "armed":
                        return put_back(state, pending, "the agent died while it applied the change")
                    if machine.clock() >= pending["deadline"]:
                        return put_back(state, pending, "nobody confirmed it in time")
        machine.sleep(min(1.0, max(0.05, pending["deadline"] - machine.clock())) if pending else 0.05)


def put_back(state: State, pending: Json, reason: str, *, act: bool = True) -> Json:
    """Safe to repeat from any point: the link, the services, the record, and `pending` last."""
    numbers = state.numbers()
    base = pending.get("base")
    if (
        base not in numbers
    ):  # an unreadable `pending`: the newest that somebody confirmed, else the image's own
        kept = [e["generation"] for e in state.history() if e.get("event") == "confirmed"]
        base = next((n for n in reversed(kept) if n in numbers), min(numbers))
    manifest = state.manifest(base)
    state.point_at(base)
    done: list[Json] = []
    if act:
        actions = pending.get("actions") or actions_between({"files": {}}, manifest)
        done = play(state, actions, manifest)
        ill = [a for a in done if not a["ok"]] or [h for h in await_health(state, manifest) if not h["ok"]]
        bad = ill[0]["text"] if ill else None
    else:
        bad = None
    more = {"after": bad} if bad else {}
    state.note("reverted", pending, to=base, reason=reason, **more)
    state.forget_pending()
    state.drop_lease()
    state.machine.announce(
        f"generation {pending.get('generation')} was undone, generation {base} is live again: {reason}"
    )
    return {"state": "reverted", "generation": base, "reason": reason, "actions": done, **more}


@contextlib.contextmanager
def alone(state: State, request: Json) -> Iterator[str]:
    """Locked, nothing pending, and the lease is ours or nobody's."""
    owner = line_in(request, "owner")
    if not owner:
        raise Refused("usage", "the request does not say who asks (owner)")
    with state.locked():
        pending = state.pending()
        if pending is not None:
            over = pending.get("boot_id") != state.machine.boot_id()
            if over or state.machine.clock() >= pending.get("deadline", 0):
                put_back(state, pending, "nobody confirmed it in time")  # its own undo was lost
            else:
                raise Refused(
                    "locked",
                    f"generation {pending.get('generation')} of {pending.get('owner')} waits to be confirmed",
                    owner=pending.get("owner"),
                )
        lease = state.lease()
        if lease is not None and lease["owner"] != owner:
            left = round(lease["until"] - state.machine.clock())
            raise Refused(
                "locked",
                f"{lease['owner']} is changing this gateway (for {left} s more)",
                owner=lease["owner"],
            )
        yield owner
