"""Letting another gateway carry the traffic: before work on one, or before its engine must restart."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from provision.model import Fleet
from provision.plan import Change, Running
from provision.push import FACTS_S, PAUSE_S, Dial, Result, nothing
from provision.rollout import vrrp_addresses
from provision.ssh import GatewayError

HAND_OVER_S = 30.0
CATCH_UP_S = 300.0  # for a peer that has just been restarted to learn the sessions


class NoHandOver(GatewayError):
    word = "hand-over"


def drain(
    fleet: Fleet,
    name: str,
    dial: Dial,
    *,
    on: bool,
    now: Callable[[], float] = time.monotonic,
    nap: Callable[[float], None] = time.sleep,
) -> str:
    """Lets the peer have the VRRP addresses, when it is well enough to; waits until it has them. A gateway of
    a cluster without a peer is withdrawn from the routers inside.
    """
    peer, addresses = fleet.peer_of(name), vrrp_addresses(fleet, name)
    clustered = peer is None and fleet.cluster_of(name) in fleet.clusters

    def ask(gateway: str, request: dict[str, Any]) -> dict[str, Any]:
        with dial(gateway) as remote:
            return remote.ask(request, deadline_s=FACTS_S)

    if not on:
        ask(name, {"do": "drain", "on": False})
        return "is announced again" if clustered else "takes part in VRRP again"
    if clustered:
        return _withdraw(fleet, name, ask)
    if peer is None or not addresses:
        raise NoHandOver("has no peer to hand over to; only one of a pair or a cluster can be drained")
    other = Running(peer, ask(peer, {"do": "facts", "shows": []}))
    if other.facts.get("drained"):
        raise NoHandOver(f"its peer {peer} is drained itself; end that first with drain {peer} --undo")
    if "error" in other.facts.get("engine", {}) or other.facts.get("units", {}).get("keepalived") != "active":
        raise NoHandOver(f"its peer {peer} is not well (see status); nothing was handed over")
    _await_sessions(name, peer, ask, now, nap)
    ask(name, {"do": "drain", "on": True})
    end = now() + HAND_OVER_S
    try:
        while now() < end:
            if Running(peer, ask(peer, {"do": "facts", "shows": []})).holds(addresses) == len(addresses):
                return f"{peer} has the VRRP addresses now"
            nap(PAUSE_S)
    except KeyboardInterrupt:  # half handed over is not a state to leave behind
        ask(name, {"do": "drain", "on": False})
        raise
    ask(name, {"do": "drain", "on": False})
    raise NoHandOver(
        f"{peer} did not take the addresses within {HAND_OVER_S:.0f} s; the hand-over was undone"
    )


def _await_sessions(
    name: str,
    peer: str,
    ask: Callable[[str, dict[str, Any]], dict[str, Any]],
    now: Callable[[], float],
    nap: Callable[[float], None],
) -> None:
    """Two that tell each other their sessions hand over when the peer has them: a connection that it does not
    know would be reset. A peer that has just come up is given a moment to connect; where the two do not talk
    to each other at all there is nothing more to wait for.
    """
    begun = now()
    while True:
        said = ask(name, {"do": "facts", "shows": ["sync"]}).get("engine", {}).get("sync", {})
        connected = bool(said.get("connected"))
        if not said.get("configured") or (connected and said.get("in_sync")):
            return
        if not connected and now() >= begun + HAND_OVER_S:
            return
        if now() >= begun + CATCH_UP_S:
            raise NoHandOver(
                f"its peer {peer} still does not have its sessions after {CATCH_UP_S:.0f} s "
                f"({said.get('differences', '?')} ranges differ, see status); nothing was handed over"
            )
        nap(PAUSE_S)


def _withdraw(fleet: Fleet, name: str, ask: Callable[[str, dict[str, Any]], dict[str, Any]]) -> str:
    """A member without a standby: routers inside send nothing more; its slice stays announced, so that what
    still comes back finds it. Not the last one: hosts would have no way out.
    """
    others = [n for n in fleet.gateways if n != name and fleet.cluster_of(n) == fleet.cluster_of(name)]
    for other in others:
        with suppress(GatewayError):
            facts = ask(other, {"do": "facts", "shows": []})
            if not facts.get("drained") and "error" not in facts.get("engine", {}):
                break
    else:
        raise NoHandOver(
            f"is the last well gateway of cluster {fleet.cluster_of(name)}; hosts would have no way out"
        )
    ask(name, {"do": "drain", "on": True})
    return f"is no longer announced inside; {other} and {len(others) - 1} others carry the traffic"


def with_failover(
    fleet: Fleet,
    change: Change,
    running: Running,
    dial: Dial,
    push: Callable[[], Result],
    *,
    say: Callable[[str, str], None] = nothing,
) -> Result:
    """A change that restarts the engine of a pair's master: its peer carries the traffic meanwhile."""
    name = change.gateway
    addresses = vrrp_addresses(fleet, name)
    needed = "engine-stop" in change.actions and fleet.peer_of(name) is not None and running.holds(addresses)
    if not needed:
        return push()
    try:
        say(name, f"handing over: {drain(fleet, name, dial, on=True)}")
    except GatewayError as error:
        return Result(name, "failed", f"its engine must restart, but {error}")
    try:
        return push()
    finally:
        with suppress(GatewayError):
            drain(fleet, name, dial, on=False)
