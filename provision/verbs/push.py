"""From a plan to gateways that run it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from provision.verbs import (
    DONE,
    FAILED,
    INTERRUPTED,
    INVALID,
    LOCKED,
    PENDING,
    REVERTED,
    SOME_FAILED,
    STALE,
    STOPPED,
    Exit,
    Options,
    chosen,
    emit,
    look_at,
    order_of,
    read,
    report_missing,
    shared,
    wanted_files,
)

if TYPE_CHECKING:
    from provision.model import Fleet
    from provision.plan import Plan, Running
    from provision.push import Dial, Order, Result
    from provision.render import Rendered
    from provision.rollout import Budget


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Save the plan, for `push --plan`.")
@shared
def plan(options: Options, out: Path | None) -> None:
    """Show what a push would change, and what hosts would notice. Exit status 4 when there is something."""
    from provision import cluster, show
    from provision.plan import plan as make_plan

    fleet = read(options)
    names = chosen(fleet, options)
    wanted = wanted_files(fleet, names, options)
    _, running, missing = look_at(fleet, with_companions(fleet, names), options)
    found = make_plan(wanted, running)
    if out is not None:
        try:
            out.write_text(json.dumps({"hash": found.hash, "limit": list(options.limit)}) + "\n")
        except OSError as error:
            text = f"{out} cannot be written ({error.strerror}); give another --out"
            raise Exit(FAILED, text) from error
    if options.json:
        moves = [move.as_json() for move in cluster.moves(fleet, running)]
        unreached = {name: result.text for name, result in missing.items()}
        told = {"bill": cluster.bill(fleet, running), "alarms": _alarms(fleet, running)}
        emit({**found.as_json(), "moves": moves, **told, "unreached": unreached})
    else:
        _show_moves(fleet, running)
        show.plan(found)
        report_missing(missing)
    if missing:
        raise Exit(SOME_FAILED)
    if found.changes:
        raise Exit(PENDING)


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--plan", "saved", type=click.Path(path_type=Path), help="Only if the plan is still the one saved here."
)
@click.option("--no-confirm", is_flag=True, help="Leave the change to be confirmed by `confirm`.")
@click.option("--window", type=click.IntRange(5, 3600), help="Seconds until an unconfirmed change is undone.")
@shared
def push(options: Options, yes: bool, saved: Path | None, no_confirm: bool, window: int | None) -> None:
    """Carry the plan out: shown, asked about, and undone by each gateway that it would cut off."""
    fleet = read(options)
    expected = None
    if saved is not None:
        kept = _saved_plan(saved)
        expected = str(kept.get("hash"))
        options = replace(options, limit=tuple(kept.get("limit", ())) or options.limit)
    names = chosen(fleet, options)
    wanted = wanted_files(fleet, names, options)
    _push(options, fleet, wanted, yes=yes, confirm=not no_confirm, window_s=window, expected=expected)


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@shared
def resume(options: Options, yes: bool) -> None:
    """Go on with the last push where it ended: with those gateways that did not get its change."""
    from provision.journal import JournalError, last_run
    from provision.plan import digest_of

    fleet = read(options)
    try:
        run = last_run(options.directory)
    except JournalError as error:
        raise Exit(INVALID, str(error)) from error
    gone = [name for name in run.left if name not in fleet.gateways]
    if gone:
        raise Exit(STALE, f"the run was about {', '.join(gone)}, no longer in {options.file}; plan again")
    wanted = wanted_files(fleet, run.left, options)
    moved = [name for name in wanted if digest_of(wanted[name]) != run.wanted[name]]
    if moved:
        raise Exit(
            STALE, f"{options.file} wants something else of {', '.join(moved)} than the run did; plan again"
        )
    if not options.json:
        print(f"plan {run.plan}: {len(run.wanted) - len(wanted)} done, {len(wanted)} left")
    _push(options, fleet, wanted, yes=yes)


def _push(
    options: Options,
    fleet: Fleet,
    wanted: Mapping[str, Rendered],
    *,
    yes: bool,
    confirm: bool = True,
    window_s: int | None = None,
    expected: str | None = None,
) -> NoReturn:
    """Looks, plans, asks, carries out. `expected`: the only plan that may be carried out."""
    from provision import show
    from provision.plan import plan as make_plan
    from provision.rollout import Budget, window_of

    dial, running, missing = look_at(fleet, with_companions(fleet, list(wanted)), options)
    found = make_plan(wanted, running)
    if expected is not None and expected != found.hash:
        raise Exit(STALE, "the saved plan is stale: fleet.yaml or a gateway has changed since; plan again")
    if not options.json:
        _show_moves(fleet, running)
        show.plan(found)
        report_missing(missing)
    _moves_are_safe(fleet, wanted, running)
    for name in running if not options.json else ():
        if running[name].state != "idle":
            print(f"{name}: a change waits to be confirmed (dsnat-fleet status)", file=sys.stderr)
    if found.changes and not yes:
        if options.json or not sys.stdin.isatty():
            raise Exit(INVALID, "nobody to ask whether to go on; look at `plan` and push with --yes")
        if not click.confirm(f"push plan {found.hash} to {len(found.changes)} gateways?"):
            raise Exit(FAILED, "not pushed")
    order = order_of(options, found.hash, window_s or window_of(fleet), confirm=confirm)
    budget = Budget(fleet.defaults.rollout.failures, len(missing))
    finish(options, _roll_out(fleet, found, wanted, running, dial, order, budget, options), missing)


def with_companions(fleet: Fleet, names: Sequence[str]) -> list[str]:
    """With all of their clusters: who has which address now decides what can be given."""
    clusters = {fleet.cluster_of(name) for name in names} - {None}
    return [n for n in fleet.gateways if n in names or fleet.cluster_of(n) in clusters]


def _alarms(fleet: Fleet, running: Mapping[str, Running]) -> list[str]:
    from provision import cluster

    return [*cluster.twice(fleet, running), *cluster.unsafe(fleet, running)]


def _show_moves(fleet: Fleet, running: Mapping[str, Running]) -> None:
    """Before the plan: what moves in a cluster, and what hosts will notice of it."""
    from provision import cluster

    for text in _alarms(fleet, running):
        print(f"! {text}")
    for text in cluster.bill(fleet, running):
        print(f"! {text}")
    found = cluster.moves(fleet, running)
    for move in found:
        print(f"drain, move, announce: {move}")
    if found:
        total = sum(move.sessions for move in found)
        grace = ", ".join(f"{c.grace} in {name}" for name, c in fleet.clusters.items())
        print(
            f"! {total} sessions are on addresses that move; those that do not end within {grace} are ended"
        )


def _moves_are_safe(fleet: Fleet, wanted: Mapping[str, Rendered], running: Mapping[str, Running]) -> None:
    """Nothing is announced that may still be somebody else's."""
    from provision import cluster

    danger = cluster.unsafe(fleet, running)
    if danger:
        raise Exit(STOPPED, "; ".join(danger))
    for move in cluster.moves(fleet, running):
        for name in (move.source, move.target):
            if name not in wanted:
                raise Exit(
                    INVALID,
                    f"--limit leaves {name} out, and addresses move from {move.source} to {move.target}; "
                    "name both",
                )


def _saved_plan(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise Exit(INVALID, f"{path} cannot be read ({error.strerror}); name a saved plan") from error
    except ValueError as error:
        raise Exit(INVALID, f"{path} is not a saved plan; make one with plan --out") from error
    limit = value.get("limit", []) if isinstance(value, dict) else None
    if not isinstance(limit, list) or not all(isinstance(name, str) for name in limit):
        raise Exit(INVALID, f"{path} is not a saved plan; make one with plan --out")
    return dict(value)


def _roll_out(
    fleet: Fleet,
    found: Plan,
    wanted: Mapping[str, Rendered],
    running: Mapping[str, Running],
    dial: Dial,
    order: Order,
    budget: Budget,
    options: Options,
) -> tuple[list[Result], bool]:
    from provision import moving, show
    from provision.cluster import keep_slices
    from provision.journal import Journal
    from provision.load import slices_file
    from provision.plan import digest_of
    from provision.rollout import Rollout

    quiet = options.json or len(found.changes) > 20

    def say(gateway: str, text: str) -> None:
        if not quiet:
            print(f"{gateway}: {text}", file=sys.stderr)

    if keep_slices(slices_file(options.file), fleet) and not options.json:
        print(f"{slices_file(options.file)}: written; commit it with {options.file}", file=sys.stderr)
    journal = Journal(options.directory, found.hash, {n: digest_of(r) for n, r in wanted.items()})
    for name in found.unchanged:
        journal.add({"gateway": name, "outcome": "unchanged"})
    with show.progress(len(found.changes), quiet=options.json) as advance:

        def ended(result: Result) -> None:
            if not options.json:
                text = f": {result.text}" if result.text else ""
                print(f"{result.gateway}: {result.outcome} ({result.seconds} s){text}", file=sys.stderr)
            advance(result.gateway)

        rollout = Rollout(fleet, dial, order, budget, options.jobs, journal, say, ended)
        results = moving.carry_out(rollout, found, wanted, running)
    return results, rollout.stop.is_set()


def finish(options: Options, outcome: tuple[list[Result], bool], missing: Mapping[str, Result]) -> NoReturn:
    """Prints what became of everything and ends with the status that says so."""
    from provision import show

    results, interrupted = outcome
    everything = [*results, *missing.values()]
    if options.json:
        emit(
            {
                "results": [
                    {
                        "gateway": r.gateway,
                        "outcome": r.outcome,
                        "text": r.text,
                        "generation": r.generation,
                        "seconds": r.seconds,
                    }
                    for r in everything
                ]
            }
        )
    elif everything:
        show.results(everything)
    armed = [r.gateway for r in results if r.outcome == "pending"]
    if interrupted:
        what = f"still armed: {', '.join(armed)}" if armed else "nothing is left armed"
        raise Exit(INTERRUPTED, f"interrupted; {what}")
    raise Exit(status_of(everything))


def status_of(results: Sequence[Result]) -> int:
    bad = {r.outcome for r in results if not r.good}
    if not bad:
        return DONE
    if "skipped" in bad:
        return STOPPED
    if len(bad) == 1:
        return {"reverted": REVERTED, "locked": LOCKED, "stale": STALE}.get(bad.pop(), SOME_FAILED)
    return SOME_FAILED
