"""The life of a change: from a staged generation to one that is kept, or undone.

    idle     no `pending`
             may:     stage a generation (a directory beside the others; nothing leads to it)
    armed    `pending` is on disk and the undo runs, then the link moves and services reload
             may:     become live; be undone, at once when the process that applies it has died
             may not: be confirmed
    live     services run with it, local health was good, the clock runs
             may:     be confirmed, by a connection that was opened after it went live; be undone
             may not: outlive its deadline, a reboot or a power cut
    confirmed | reverted      `pending` is gone, history says which and why

`pending` is removed last when a change is undone, and its removal is what confirms one. So at every
instant a crash leaves either no `pending` (nothing to do) or a `pending` whose undo is safe to repeat.
"""

from __future__ import annotations

import contextlib
import secrets
from ipaddress import IPv4Network
from pathlib import Path

from .disk import digest_of_files
from .look import status
from .protocol import Json, Refused, line_in, number_in
from .services import ENGINE, actions_between, await_health, play, pool_addresses
from .stage import stage
from .state import State
from .undo import alone, put_back

APPLY_MAX_S = 240.0  # the longest that services may take to come up; the deadline of a live change is its own
WINDOW_S = (5.0, 3600.0)


def apply(state: State, request: Json) -> Json:
    """Arms the undo, then makes a staged (or older) generation the live one."""
    machine = state.machine
    with alone(state, request) as owner:
        base = state.unchanged(request)
        generation = number_in(request, "generation", -1, 0, 1 << 31)
        window_s = float(number_in(request, "window_s", 60, *map(int, WINDOW_S)))
        manifest = state.whole(generation)
        if digest_of_files(manifest["files"]) != request.get("digest"):
            raise Refused("stale", f"generation {generation} is not the one that was planned; plan again")
        if generation == base:
            raise Refused("usage", f"generation {generation} is live already")
        pending: Json = {
            "id": secrets.token_hex(4),
            "state": "armed",
            "generation": generation,
            "base": base,
            "owner": owner,
            "plan": line_in(request, "plan"),
            "actions": actions_between(state.manifest(base), manifest),
            "boot_id": machine.boot_id(),
            "deadline": machine.clock() + APPLY_MAX_S + window_s,
        }
        state.write_pending(pending)
        try:
            machine.arm(pending["id"])
            state.record("applied", pending, to=generation)
        except (Refused, OSError):  # no unit, no space: nothing has moved, so there is nothing to undo
            state.forget_pending()
            raise
        state.point_at(generation)
        done = play(state, pending["actions"], manifest)
        well = await_health(state, manifest) if all(a["ok"] for a in done) else []
        failed = [a for a in done if not a["ok"]] + [h for h in well if not h["ok"]]
        if failed:
            reason = f"{failed[0]['name']}: {failed[0]['text']}"
            put_back(state, pending, reason)
            return {
                "state": "reverted",
                "generation": base,
                "reason": reason,
                "actions": done,
                "health": well,
            }
        pending.update(state="live", live_at=machine.clock(), deadline=machine.clock() + window_s)
        state.write_pending(pending)
        state.hold_lease(owner)
        return {
            "state": "live",
            "generation": generation,
            "window_s": window_s,
            "actions": done,
            "health": well,
        }


def confirm(state: State, request: Json) -> Json:
    """Keeps the change. Only a connection that the change itself let in may say so."""
    machine = state.machine
    generation = number_in(request, "generation", -1, 0, 1 << 31)
    with state.locked():
        pending = state.pending()
        if pending is None:
            last = status(state, {})["last"] or {}
            if last.get("event") == "reverted" and last.get("tried") == generation:
                raise Refused("reverted", f"generation {generation} was undone: {last.get('reason')}")
            if state.current() == generation:
                return {"state": "confirmed", "generation": generation, "again": True}
            raise Refused("stale", f"no change to generation {generation} is pending")
        if pending.get("generation") != generation:
            raise Refused("stale", f"generation {pending.get('generation')} is pending, not {generation}")
        if pending.get("state") != "live" or state.current() != generation:
            raise Refused("busy", f"generation {generation} is not live yet")
        if pending["boot_id"] != machine.boot_id() or machine.clock() >= pending["deadline"]:
            raise Refused("reverted", f"too late: the time to confirm generation {generation} is over")
        opened = machine.connected_at()
        if opened is None or opened <= pending["live_at"]:
            raise Refused(
                "usage",
                "a change is confirmed by a new connection, opened after it went live; dial again",
            )
        witnesses = request.get("witnesses", {})
        return keep(state, pending, witnesses if isinstance(witnesses, dict) else {})


def keep(state: State, pending: Json, witnesses: Json) -> Json:
    state.forget_pending()  # from here on it stays
    receipt = state.note("confirmed", pending, witnesses=witnesses)
    state.drop_lease()
    with contextlib.suppress(OSError):
        Path("/run/motd.d/dsnat").unlink()
    return {"state": "confirmed", "generation": pending["generation"], "receipt": receipt}


def by_hand(state: State, request: Json) -> Json:
    """Some files of the live generation, changed by a command on the gateway itself (ipvsadm): staged,
    applied and kept in one go. No connection is at stake that could fail to come back; a service that
    does not take the change undoes it as ever.
    """
    base = state.current()
    live, here = state.manifest(base), state.generations / str(base)
    files: Json = {
        name: {"text": (here / name).read_text(), "mode": (here / name).stat().st_mode & 0o777}
        for name in live["files"]
    }
    given = request.get("files", {})
    common: Json = {"owner": request.get("owner"), "base": base, "plan": "by hand"}
    kept: Json = {key: live[key] for key in ("hardware", "vrrp", "interfaces", "health_s") if key in live}
    by_hand = sorted({*live.get("by_hand", []), *given})
    staged = stage(state, {**common, **kept, "files": files | given, "by_hand": by_hand})
    wanted = {"generation": staged["generation"], "digest": staged["digest"]}
    try:
        applied = apply(state, {**common, **wanted})
    except Refused:
        release(state, request)
        raise
    if applied["state"] != "live":
        release(state, request)
        return applied
    with state.locked():
        pending = state.pending()
        if pending is None or pending.get("generation") != staged["generation"]:
            raise Refused("reverted", "the change was undone before it could be kept")
        return keep(state, pending, {})


def release(state: State, request: Json) -> Json:
    """Gives the lease back, when nothing is pending."""
    with state.locked():
        lease = state.lease()
        if lease is not None and lease["owner"] == request.get("owner") and state.pending() is None:
            state.drop_lease()
        return {}


def clear(state: State, request: Json) -> Json:
    """Ends the sessions on addresses that have left this gateway: their replies go elsewhere. Hosts are
    told so with their next packet (`tcp_midflow: reset`). Addresses that it still owns are refused.
    """
    wanted = request.get("outside")
    if not isinstance(wanted, list) or not all(isinstance(text, str) for text in wanted):
        raise Refused("usage", '"outside" must be a list of prefixes')
    try:
        gone = [IPv4Network(text) for text in wanted]
    except ValueError as error:
        raise Refused("usage", str(error)) from error
    own = pool_addresses(state.generations / "current" / ENGINE)
    for net in gone:
        if any(low <= int(net.broadcast_address) and int(net.network_address) <= high for low, high in own):
            raise Refused("usage", f"{net} has addresses of this gateway; only those that left are ended")
    ended = [state.machine.engine({"cmd": "clear", "outside": str(net)}, 30.0) for net in gone]
    total = sum(int(answer["cleared"]) for answer in ended)
    state.machine.log(f"ended {total} sessions on {', '.join(wanted)} owner={line_in(request, 'owner')}")
    return {"cleared": total}


def drain(state: State, request: Json) -> Json:
    """keepalived watches a file: anything but 0 in it is a fault, and the peer takes over. Gone after
    a reboot.
    """
    on = request.get("on")
    if not isinstance(on, bool):
        raise Refused("usage", '"on" must be true or false')
    state.machine.write_drain(on)
    state.machine.log(f"{'drained' if on else 'no longer drained'} owner={line_in(request, 'owner')}")
    return {"drained": on}
