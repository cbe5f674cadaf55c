"""Carrying out a plan that moves addresses within a cluster: drain, move, announce.

    drain       who loses addresses keeps them, and announces them, but gives them to no new session
    wait        until their sessions have run out, at most as long as the cluster's `grace`
    move        it no longer has them, and announces them no more; what is left of their sessions is ended
    announce    everybody else gets what fleet.yaml wants, the new owners among them

Each step is a plan of its own with the same net below it as any other. When one fails the next is not begun:
at worst an address is announced by nobody, never by two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from provision import cluster, slices
from provision.cluster import Move
from provision.plan import Plan, Running
from provision.plan import plan as make_plan
from provision.push import FACTS_S, Result, gather
from provision.render import BGP, ENGINE, File, Rendered
from provision.rollout import Rollout
from provision.ssh import GatewayError
from provision.values import milliseconds

LOOK_S = 1.0


def carry_out(
    rollout: Rollout, plan: Plan, wanted: Mapping[str, Rendered], running: Mapping[str, Running]
) -> list[Result]:
    """As Rollout.carry_out, with the steps that moving addresses need."""
    leaving = cluster.moves(rollout.fleet, running)
    if not leaving:
        return rollout.carry_out(plan, wanted, running)
    sources = list(dict.fromkeys(move.source for move in leaving))
    empty = [name for name in sources if not rollout.fleet.pools_of(name)]
    for name in empty:  # it could give hosts no address any more: routers inside must know first
        _ask(rollout, name, {"do": "drain", "on": True})
    steps = {name: _between(wanted[name], running[name], leaving) for name in sources}
    results = _step(rollout, "drain", steps, running, last=False)
    if all(result.good for result in results) and not rollout.stop.is_set():
        now = _await_empty(rollout, leaving, running)
        results = _step(rollout, "move", {name: wanted[name] for name in sources}, now)
        if all(result.good for result in results) and not rollout.stop.is_set():
            _end_sessions(rollout, leaving)
            for name in empty:  # bird.conf announces nothing now; it may come back with a share
                _ask(rollout, name, {"do": "drain", "on": False})
            rest = {name: wanted[name] for name in wanted if name not in sources}
            return [*results, *_step(rollout, "announce", rest, running)]
    told = {result.gateway for result in results}
    stopped = rollout.stop.is_set()
    why = "interrupted before it was begun" if stopped else "an address did not leave its old owner"
    skipped = [Result(c.gateway, "skipped", why) for c in plan.changes if c.gateway not in told]
    for result in skipped:
        rollout.ended(result)
    return [*results, *skipped]


def _step(
    rollout: Rollout,
    name: str,
    wanted: Mapping[str, Rendered],
    running: Mapping[str, Running],
    *,
    last: bool = True,
) -> list[Result]:
    here = {gateway: running[gateway] for gateway in wanted if gateway in running}
    plan = make_plan(wanted, here)
    if plan.changes:
        rollout.say("step", f"{name}: {', '.join(change.gateway for change in plan.changes)}")
    return rollout.carry_out(plan, wanted, here, last=last)


def _between(wanted: Rendered, running: Running, leaving: list[Move]) -> Rendered:
    """What runs, with the addresses that leave given to no new session."""
    own = [move for move in leaving if move.source == running.gateway]
    files = dict(wanted.files)
    files[ENGINE] = File(cluster.draining(running, own))
    if BGP in running.files:
        files[BGP] = File(running.files[BGP]["text"])
    hardware = str(running.facts.get("manifest", {}).get("hardware", ""))
    return replace(wanted, files=files, hardware=hardware)


def _await_empty(rollout: Rollout, leaving: list[Move], running: Mapping[str, Running]) -> dict[str, Running]:
    """Until the last session on these addresses has ended, or time is over. Gives what runs now."""
    fleet = rollout.fleet
    grace_s = max(milliseconds(c.grace) for c in fleet.clusters.values()) / 1000
    sources = list(dict.fromkeys(move.source for move in leaving))
    end, latest = rollout.now() + grace_s, dict(running)
    while True:
        found = gather(sources, rollout.dial, jobs=rollout.jobs)
        latest.update({name: r for name, r in found.items() if isinstance(r, Running)})
        left = sum(cluster.sessions_on(latest[m.source], m.ranges) for m in leaving)
        if not left or rollout.now() >= end or rollout.stop.is_set():
            if left:
                rollout.say("step", f"{left} sessions did not run out in {grace_s:.0f} s and are ended")
            return latest
        try:
            rollout.nap(LOOK_S)
        except KeyboardInterrupt:
            rollout.stop.set()


def _end_sessions(rollout: Rollout, leaving: list[Move]) -> None:
    for source in dict.fromkeys(move.source for move in leaving):
        ranges = [r for move in leaving if move.source == source for r in move.ranges]
        _ask(rollout, source, {"do": "clear", "outside": slices.prefixes(ranges)})


def _ask(rollout: Rollout, name: str, request: dict[str, object]) -> None:
    """A step that may fail without harm to what is announced, but not unheard."""
    try:
        with rollout.dial(name) as remote:
            remote.ask({**request, "owner": rollout.order.owner}, deadline_s=FACTS_S)
    except GatewayError as error:
        rollout.say(name, f"{request['do']} failed: {error}")
