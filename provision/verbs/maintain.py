"""Work on gateways that a push has left as they should be: keep, go back, stand aside, a new image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from provision.verbs import (
    FAILED,
    INVALID,
    SOME_FAILED,
    Exit,
    Options,
    chosen,
    each,
    emit,
    look_at,
    no_gateway,
    order_of,
    read,
    report_missing,
    shared,
    wanted_files,
)
from provision.verbs.push import finish, with_companions

if TYPE_CHECKING:
    from provision.plan import Running
    from provision.push import Result


@click.command()
@shared
def confirm(options: Options) -> None:
    """Keep the changes that wait to be confirmed."""
    from provision.push import FACTS_S, AgentRefused, Result
    from provision.ssh import GatewayError

    fleet = read(options)
    names = chosen(fleet, options)
    dial, running, missing = look_at(fleet, names, options)

    def one(name: str) -> Result:
        pending = running[name].facts.get("pending")
        if pending is None:
            return Result(name, "unchanged", "nothing waits to be confirmed")
        try:
            with dial(name) as remote:
                remote.ask({"do": "confirm", "generation": pending["generation"]}, deadline_s=FACTS_S)
        except AgentRefused as refused:
            return Result(name, "reverted" if refused.word == "reverted" else "failed", str(refused))
        except GatewayError as error:
            return Result(name, "unreached", str(error))
        return Result(name, "confirmed", "", pending["generation"])

    finish(options, (each(list(running), one, options), False), missing)


@click.command()
@click.option("--to", "target", type=click.IntRange(0), help="The generation to go back to (see `history`).")
@click.option("--yes", is_flag=True, help="Do not ask.")
@shared
def rollback(options: Options, target: int | None, yes: bool) -> None:
    """Undo the pending change, or make an older generation live again."""
    from provision.push import APPLY_S, FACTS_S, AgentRefused, Attempt, Result
    from provision.rollout import window_of
    from provision.ssh import GatewayError
    from provision.witness import witnesses

    fleet = read(options)
    names = chosen(fleet, options)
    if not options.limit and len(names) > 1:
        raise Exit(INVALID, "say which gateways to roll back with --limit ('*' for all)")
    dial, running, missing = look_at(fleet, names, options)
    if not yes:
        if options.json or not sys.stdin.isatty():
            raise Exit(INVALID, "nobody to ask whether to go on; roll back with --yes")
        if not click.confirm(f"roll {', '.join(running)} back?"):
            raise Exit(FAILED, "nothing was changed")
    wanted = wanted_files(fleet, names, options)

    def one(name: str) -> Result:
        found = running[name]
        try:
            if found.state != "idle" and target is None:
                with dial(name) as remote:
                    answer = remote.ask(
                        {"do": "revert", "reason": "rolled back by an operator"}, deadline_s=APPLY_S
                    )
                return Result(
                    name, "confirmed", f"generation {answer['generation']} is live", answer["generation"]
                )
            to = target if target is not None else _generation_before(found)
            with dial(name) as remote:
                digest = remote.ask({"do": "describe", "generation": to}, deadline_s=FACTS_S)["digest"]
        except AgentRefused as refused:
            return Result(name, "locked" if refused.word == "locked" else "failed", str(refused))
        except GatewayError as error:
            return Result(name, "unreached", str(error))
        order = order_of(options, f"rollback to {to}", window_of(fleet), confirm=True)
        attempt = Attempt(name, dial, order, witnesses(fleet, found, wanted[name], dial))
        return attempt.roll_back(found, to, digest)

    def pair(members: list[str]) -> list[Result]:
        """Of a pair one after the other: never both at once."""
        return [one(name) for name in members]

    groups: dict[str, list[str]] = {}
    for name in running:
        groups.setdefault(fleet.gateways[name].pair or f"gateway {name}", []).append(name)
    rolled = each(list(groups), lambda group: pair(groups[group]), options)
    finish(options, ([result for results in rolled for result in results], False), missing)


def _generation_before(running: Running) -> int:
    """The one that was live before: what the live one was made on top of."""
    base = running.facts.get("manifest", {}).get("base")
    return int(base) if base is not None else 0


@click.command()
@click.argument("gateway")
@click.option("--undo", is_flag=True, help="Take part again.")
@shared
def drain(options: Options, gateway: str, undo: bool) -> None:
    """Hand GATEWAY's traffic over, for work on it: to its peer, or to the others of its cluster."""
    from provision.cluster import bill
    from provision.handover import drain as drain_one
    from provision.push import dialer
    from provision.ssh import GatewayError

    fleet = read(options)
    if gateway not in fleet.gateways:
        raise no_gateway(options, fleet, gateway)
    if not undo and fleet.cluster_of(gateway) and fleet.peer_of(gateway) is None and not options.json:
        _, running, _ = look_at(fleet, with_companions(fleet, [gateway]), options)
        for line in bill(fleet, running, drained=[gateway]):
            print(f"! {line}")
    try:
        text = drain_one(fleet, gateway, dialer(fleet, options.directory), on=not undo)
    except GatewayError as error:
        raise Exit(SOME_FAILED, f"{gateway}: {error}") from error
    if options.json:
        emit({"gateway": gateway, "drained": not undo, "text": text})
    else:
        print(f"{gateway}: {text}")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--version", help="Which of the versions in FOLDER.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@shared
def update(options: Options, folder: Path, version: str | None, yes: bool) -> None:
    """Give gateways the image in FOLDER (made by `make image`), pair by pair, the backup first."""
    import threading

    from provision.handover import with_failover
    from provision.plan import Change
    from provision.rollout import Budget, push_all, units, waves
    from provision.update import BadImage, find_image, update_one
    from provision.values import milliseconds

    fleet = read(options)
    names = chosen(fleet, options)
    try:
        image = find_image(folder, version)
    except BadImage as error:
        raise Exit(INVALID, str(error)) from error
    dial, running, missing = look_at(fleet, names, options)
    changes = [
        Change(name, running[name].generation, "", (), ("engine-stop",))
        for name in running
        if running[name].facts.get("image") != image.version
    ]
    if not options.json:
        for change in changes:
            print(f"{change.gateway}: {running[change.gateway].facts.get('image') or '?'} -> {image.version}")
        report_missing(missing)
    if changes and not yes:
        if options.json or not sys.stdin.isatty():
            raise Exit(INVALID, "nobody to ask whether to go on; update with --yes")
        if not click.confirm(f"update {len(changes)} gateways to {image.version}, restarting each?"):
            raise Exit(FAILED, "nothing was changed")
    owner = order_of(options, f"image {image.version}", 60, confirm=True).owner

    def say(gateway: str, text: str) -> None:
        if not options.json:
            print(f"{gateway}: {text}", file=sys.stderr)

    def one(change: Any) -> Result:
        found = running[change.gateway]
        return with_failover(
            fleet, change, found, dial, lambda: update_one(found, image, dial, owner, say=say), say=say
        )

    stop = threading.Event()
    rollout = fleet.defaults.rollout
    ordered = waves(units(fleet, changes, running), rollout.first_wave_percent)
    budget = Budget(rollout.failures, len(missing))
    soak_s = milliseconds(rollout.soak) / 1000
    results = push_all(ordered, one, jobs=min(options.jobs, 8), budget=budget, soak_s=soak_s, stop=stop)
    finish(options, (results, stop.is_set()), missing)
