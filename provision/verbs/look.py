"""Verbs that only look."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from provision.verbs import (
    PENDING,
    SOME_FAILED,
    Exit,
    Options,
    chosen,
    each,
    emit,
    look_at,
    read,
    report_missing,
    shared,
    wanted_files,
)

if TYPE_CHECKING:
    from provision.plan import Running


@click.command()
@shared
def status(options: Options) -> None:
    """One screen: who runs what, who is master, how full the pools are."""
    from provision import show
    from provision.cluster import strangers, twice
    from provision.rollout import vrrp_addresses

    fleet = read(options)
    names = chosen(fleet, options)
    _, running, missing = look_at(fleet, names, options)
    found = {name: _summary(running[name], vrrp_addresses(fleet, name)) for name in running}
    alarms = [*twice(fleet, running), *strangers(fleet, running), *_clocks(running)]
    if options.json:
        unreached = {name: result.text for name, result in missing.items()}
        emit({"gateways": found, "alarms": alarms, "unreached": unreached})
    else:
        heads = (
            "GATEWAY",
            "PAIR",
            "ROLE",
            "STATE",
            "GENERATION",
            "ENGINE",
            "SESSIONS",
            "POOLS",
            "SYNC",
            "BGP",
            "IMAGE",
            "DRIFT",
        )
        away = {head.lower(): "-" for head in heads} | {"state": "not reached"}
        rows = [
            (
                name,
                fleet.gateways[name].pair or fleet.cluster_of(name) or "-",
                *(str(found.get(name, away)[head.lower()]) for head in heads[2:]),
            )
            for name in names
        ]
        show.table(heads, rows)
        for text in alarms:
            print(f"! {text}")
        report_missing(missing)
    if missing:
        raise Exit(SOME_FAILED)


def _summary(running: Running, addresses: list[str]) -> dict[str, Any]:
    engine = running.facts.get("engine", {})
    answer = engine.get("status", {})
    pools = engine.get("pools", {}).get("pools", [])
    met = running.facts.get("routing", {}).get("neighbors", [])
    held = running.holds(addresses)
    role = "-" if not addresses else "master" if held == len(addresses) else "backup" if not held else "split"
    if running.facts.get("drained"):
        role += ", drained"
    pending = running.facts.get("pending")
    state = (
        running.state if pending is None else f"{running.state}, undone in {pending['deadline_in_s']:.0f} s"
    )
    return {
        "role": role,
        "state": state,
        "generation": running.generation,
        "engine": "error" if "error" in engine else "up",
        "sessions": answer.get("sessions", "-"),
        "pools": ", ".join(map(pool_use, pools)) or "-",
        "sync": _sync(engine.get("sync", {})),
        "bgp": f"{sum(n['state'] == 'Established' for n in met)}/{len(met)}" if met else "-",
        "image": running.facts.get("image") or "-",
        "drift": ", ".join(running.drift) or "no",
    }


def pool_use(pool: Mapping[str, Any]) -> str:
    """Sessions, how full it is where a port serves one mapping, and what found no port."""
    notes = []
    ports = pool.get("n_ports", 0)
    if pool.get("mapping") == "endpoint-independent" and ports:
        notes.append(f"{100 * max(pool['mappings'].values()) / ports:.0f}% of ports")
    if pool.get("refused"):
        notes.append(f"{pool['refused']} refused")
    told = f" ({', '.join(notes)})" if notes else ""
    return f"{pool.get('name')}:{pool.get('sessions', '-')}{told}"


def _sync(said: dict[str, Any]) -> str:
    """Is the standby's table equal, and how far is it behind?"""
    if not said.get("configured"):
        return "-"
    if not said["connected"]:
        return "no peer"
    lag = f"{said.get('lag_ms', 0)} ms behind"
    return f"equal, {lag}" if said.get("in_sync") else f"{said.get('differences', '?')} ranges differ, {lag}"


CLOCK_S = 5.0


def _clocks(running: dict[str, Running]) -> list[str]:
    """Gateways whose clock is not ours: their logs and histories cannot be put beside each other."""
    said: list[str] = []
    for name, found in running.items():
        apart = float(found.facts.get("wall", 0.0)) - float(found.facts.get("asked_at", 0.0))
        if "wall" in found.facts and abs(apart) > CLOCK_S:
            which = "ahead of" if apart > 0 else "behind"
            said.append(
                f"{name}: its clock is {abs(apart):.0f} s {which} this machine's; give its site ntp: servers"
            )
    return said


@click.command()
@shared
def drift(options: Options) -> None:
    """Who differs from what was pushed, and in which lines. Exit status 4 when somebody does."""
    from provision import show
    from provision.plan import Plan
    from provision.plan import plan as make_plan

    fleet = read(options)
    names = chosen(fleet, options)
    wanted = wanted_files(fleet, names, options)
    _, running, missing = look_at(fleet, names, options)
    found = make_plan(wanted, running)
    changed = tuple(change for change in found.changes if change.drift)
    edited = {name: list(value.drift) for name, value in running.items() if value.drift}
    if options.json:
        emit({"edited": edited, **Plan(changed, (), found.hash).as_json()})
    elif edited:
        show.plan(Plan(changed, tuple(n for n in running if n not in edited), found.hash))
        for name in sorted(edited.keys() - {change.gateway for change in changed}):
            print(f"{name}: edited on the gateway, and as fleet.yaml wants it: {', '.join(edited[name])}")
    elif running:
        print(f"no drift on {len(running)} gateways")
    report_missing(missing)
    if missing:
        raise Exit(SOME_FAILED)
    if edited:
        raise Exit(PENDING)


@click.command()
@click.option(
    "--last", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Events per gateway."
)
@shared
def history(options: Options, last: int) -> None:
    """What happened to the gateways: who changed what, kept or undone."""
    from provision import show
    from provision.push import FACTS_S, dialer
    from provision.ssh import GatewayError

    fleet = read(options)
    dial = dialer(fleet, options.directory)

    def ask(name: str) -> dict[str, Any] | str:
        try:
            with dial(name) as remote:
                return remote.ask({"do": "history", "last": last}, deadline_s=FACTS_S)
        except GatewayError as error:
            return str(error)

    names = chosen(fleet, options)
    told = dict(zip(names, each(names, ask, options), strict=True))
    events = {name: answer["events"] for name, answer in told.items() if isinstance(answer, dict)}
    missing = {name: answer for name, answer in told.items() if isinstance(answer, str)}
    torn = {n: a["broken_at"] for n, a in told.items() if isinstance(a, dict) and a.get("broken_at")}
    if options.json:
        emit({"gateways": events, "broken_at": torn, "unreached": missing})
    else:
        rows = [
            (
                show.moment(event.get("at")),
                name,
                str(event.get("event")),
                str(event.get("tried")),
                str(event.get("owner")),
                str(event.get("plan")),
                str(event.get("receipt", ""))[:16],
                str(event.get("reason", "")),
            )
            for name, listed in events.items()
            for event in listed
        ]
        show.table(("WHEN", "GATEWAY", "EVENT", "GENERATION", "WHO", "PLAN", "RECEIPT", "WHY"), rows)
        for name, text in missing.items():
            print(f"not reached: {name}: {text}", file=sys.stderr)
        for name, line in torn.items():
            print(f"! {name}: line {line} of its history was changed, or one before it is missing")
    if missing or torn:
        raise Exit(SOME_FAILED)


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED)
@shared
def exec_(options: Options, words: tuple[str, ...]) -> None:
    """Run one of a few commands that only read, on every gateway: `exec -- dsnatctl show pools`."""
    from provision.push import FACTS_S, dialer
    from provision.ssh import GatewayError

    fleet = read(options)
    dial = dialer(fleet, options.directory)

    def one(name: str) -> tuple[int, str]:
        try:
            with dial(name) as remote:
                answer = remote.ask({"do": "exec", "argv": list(words)}, deadline_s=FACTS_S)
        except GatewayError as error:
            return -1, str(error)
        return int(answer["status"]), str(answer["output"])

    names = chosen(fleet, options)
    found = dict(zip(names, each(names, one, options), strict=True))
    if options.json:
        emit({name: {"status": status, "output": text} for name, (status, text) in found.items()})
    else:
        for name, (status, text) in found.items():
            print(
                f"==> {name}{f' (status {status})' if status > 0 else ': not done' if status else ''}\n{text}"
            )
    if any(status for status, _ in found.values()):
        raise Exit(SOME_FAILED)
