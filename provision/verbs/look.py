"""Verbs that only look."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from provision.verbs import (
    PENDING,
    SOME_FAILED,
    Exit,
    Options,
    chosen,
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
    from provision.rollout import vrrp_addresses

    fleet = read(options)
    names = chosen(fleet, options)
    _, running, missing = look_at(fleet, names, options)
    found = {name: _summary(running[name], vrrp_addresses(fleet, name)) for name in running}
    if options.json:
        emit({"gateways": found, "unreached": {name: result.text for name, result in missing.items()}})
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
            "IMAGE",
            "DRIFT",
        )
        rows = [
            (name, fleet.gateways[name].pair or "-", *(str(found[name][head.lower()]) for head in heads[2:]))
            if name in found
            else (name, fleet.gateways[name].pair or "-", "-", "not reached", "-", "-", "-", "-", "-", "-")
            for name in names
        ]
        show.table(heads, rows)
        report_missing(missing)
    if missing:
        raise Exit(SOME_FAILED)


def _summary(running: Running, addresses: list[str]) -> dict[str, Any]:
    engine = running.facts.get("engine", {})
    answer = engine.get("status", {})
    pools = engine.get("pools", {}).get("pools", [])
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
        "pools": " ".join(f"{p.get('name')}:{p.get('sessions', '-')}" for p in pools) or "-",
        "image": running.facts.get("image") or "-",
        "drift": ", ".join(running.drift) or "no",
    }


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
    else:
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
    events: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for name in chosen(fleet, options):
        try:
            with dial(name) as remote:
                events[name] = remote.ask({"do": "history", "last": last}, deadline_s=FACTS_S)["events"]
        except GatewayError as error:
            missing[name] = str(error)
    if options.json:
        emit({"gateways": events, "unreached": missing})
    else:
        rows = [
            (
                show.moment(event.get("at")),
                name,
                str(event.get("event")),
                str(event.get("tried")),
                str(event.get("owner")),
                str(event.get("plan")),
                str(event.get("reason", "")),
            )
            for name, listed in events.items()
            for event in listed
        ]
        show.table(("WHEN", "GATEWAY", "EVENT", "GENERATION", "WHO", "PLAN", "WHY"), rows)
        for name, text in missing.items():
            print(f"not reached: {name}: {text}", file=sys.stderr)
    if missing:
        raise Exit(SOME_FAILED)


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED)
@shared
def exec_(options: Options, words: tuple[str, ...]) -> None:
    """Run one of a few commands that only read, on every gateway: `exec -- dsnatctl show pools`."""
    from concurrent.futures import ThreadPoolExecutor

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
    with ThreadPoolExecutor(max_workers=max(1, min(options.jobs, len(names)))) as pool:
        found = dict(zip(names, pool.map(one, names), strict=True))
    if options.json:
        emit({name: {"status": status, "output": text} for name, (status, text) in found.items()})
    else:
        for name, (status, text) in found.items():
            print(
                f"==> {name}{f' (status {status})' if status > 0 else ': not done' if status else ''}\n{text}"
            )
    if any(status for status, _ in found.values()):
        raise Exit(SOME_FAILED)
