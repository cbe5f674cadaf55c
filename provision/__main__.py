"""dsnat-fleet: the verbs. Parses arguments, prints, exits; what a verb does is in the module it imports.

Imports of those modules stand inside the verbs, so that `--help` answers at once.

Exit status: 0 done or nothing to do, 1 failed, 2 invalid input or usage, 3 some gateways failed or were
not reached, 4 changes pending (`plan`, `drift`), 5 a gate stopped the roll-out, 6 reverted by the
gateway, 7 locked by another operator, 8 the plan is stale, 130 interrupted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from provision.dsnat import Known
    from provision.load import Problem, Source
    from provision.model import Fleet
    from provision.plan import Plan, Running
    from provision.push import Budget, Dial, Order, Result
    from provision.render import Rendered

DONE, FAILED, INVALID, SOME_FAILED, PENDING, STOPPED, REVERTED, LOCKED, STALE = range(9)
INTERRUPTED = 130


class Exit(Exception):
    """Ends the program with a status and a sentence."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Options:
    """What every verb is told."""

    file: Path
    json: bool
    limit: tuple[str, ...]
    jobs: int

    @property
    def directory(self) -> Path:
        return self.file.parent


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """--json, --limit and --jobs, the same on every verb."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @click.option(
        "--limit", multiple=True, metavar="NAME", help="Only this gateway, pair or site (repeatable; globs)."
    )
    @click.option(
        "--jobs", default=32, show_default=True, type=click.IntRange(1, 256), help="Gateways at a time."
    )
    @click.pass_context
    def wrapped(
        context: click.Context, /, as_json: bool, limit: tuple[str, ...], jobs: int, **rest: Any
    ) -> None:
        command(Options(context.obj["file"], as_json, limit, jobs), **rest)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = [*getattr(command, "__click_params__", []), *wrapped.__click_params__]  # type: ignore[attr-defined]
    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    default=Path("fleet.yaml"),
    show_default=True,
    help="The file that describes the fleet.",
)
@click.option("--debug", is_flag=True, help="Show a traceback for an internal error.")
@click.version_option("0.1.0", prog_name="dsnat-fleet")
@click.pass_context
def cli(context: click.Context, file: Path, debug: bool) -> None:
    """Gateways described in one file: checked, planned, pushed, and undone if they cut themselves off.

    \b
    Exit status: 0 done or nothing to do, 1 failed, 2 invalid input or usage, 3 some gateways failed
    or were not reached, 4 changes pending, 5 a gate stopped the roll-out, 6 reverted by the gateway,
    7 locked by another operator, 8 the plan is stale, 130 interrupted.
    """
    context.obj = {"file": file, "debug": debug}


# ---- what several verbs need
# ------------------------------------------------------------------------------------


def emit(value: object) -> None:
    print(json.dumps(value, indent=1))


def read(options: Options) -> Fleet:
    """The fleet, valid in itself. Warnings go to standard error."""
    from provision.load import InvalidFleet, load
    from provision.validate import validate as rules

    fleet, source = load(options.file)
    problems = rules(fleet, source)
    if any(not problem.warning for problem in problems):
        raise InvalidFleet(problems)
    if not options.json:
        for problem in problems:
            print(problem, file=sys.stderr)
    return fleet


def chosen(fleet: Fleet, options: Options) -> list[str]:
    """The gateways that --limit names: by their own name, their pair's or their site's."""
    from fnmatch import fnmatchcase

    if not options.limit:
        return list(fleet.gateways)
    found: list[str] = []
    for pattern in options.limit:
        matching = [
            name
            for name, gateway in fleet.gateways.items()
            if any(
                fnmatchcase(n, pattern)
                for n in (name, gateway.pair or "", fleet.service_of(name).site or "")
                if n
            )
        ]
        if not matching:
            raise Exit(INVALID, f"--limit {pattern}: no gateway, pair or site has this name")
        found += matching
    return [name for name in fleet.gateways if name in found]


def wanted_files(fleet: Fleet, names: Sequence[str], options: Options) -> dict[str, Rendered]:
    from provision.render import RenderError, render
    from provision.secret import SecretError, vrrp_password

    try:
        return {n: render(fleet, n, secret=lambda ref: vrrp_password(ref, options.directory)) for n in names}
    except (RenderError, SecretError) as error:
        raise Exit(INVALID, f"{options.file}: {error}") from error


def look(
    fleet: Fleet, names: Sequence[str], options: Options
) -> tuple[Dial, dict[str, Running], dict[str, Result]]:
    """What runs, and who was not reached."""
    from provision.plan import Running
    from provision.push import Result, dialer, gather

    dial = dialer(fleet, options.directory)
    found = gather(names, dial, jobs=options.jobs)
    running = {name: value for name, value in found.items() if isinstance(value, Running)}
    missing = {
        name: Result(name, "unreached", str(value))
        for name, value in found.items()
        if not isinstance(value, Running)
    }
    return dial, running, missing


def report_missing(missing: Mapping[str, Result]) -> None:
    for result in missing.values():
        print(f"not reached: {result.gateway}: {result.text}", file=sys.stderr)


def order_of(options: Options, plan_hash: str, window_s: int, *, confirm: bool) -> Order:
    import getpass
    import secrets
    import socket

    from provision.push import Order

    owner = f"{getpass.getuser()}@{socket.gethostname()}.{secrets.token_hex(3)}"
    return Order(owner, plan_hash, window_s, confirm)


# ---- the verbs, in the order of the work
# ------------------------------------------------------------------------


@cli.command()
@shared
def validate(options: Options) -> None:
    """Check the file: form, names, and rules over the whole fleet."""
    from provision.load import InvalidFleet, load
    from provision.validate import validate as rules

    problems: list[Problem] = []
    fleet: Fleet | None = None
    source: Source
    try:
        fleet, source = load(options.file)
        problems = rules(fleet, source)
        if not any(problem.warning is False for problem in problems):
            wanted_files(fleet, list(fleet.gateways), options)
    except InvalidFleet as error:
        problems = error.problems
    bad = sum(not problem.warning for problem in problems)
    if options.json:
        emit({"ok": not bad, "problems": [problem.as_json() for problem in problems]})
    else:
        for problem in problems:
            print(problem, file=sys.stderr)
        if not bad and fleet is not None:
            pools = sum(pool.size() for pool in fleet.pools.values())
            print(
                f"{options.file}: valid; {len(fleet.gateways)} gateways, {len(fleet.pairs)} pairs, "
                f"{len(fleet.pools)} pools with {pools} addresses"
            )
    if bad:
        raise Exit(INVALID, "" if options.json else f"{options.file}: {bad} error{'s' * (bad > 1)}")


@cli.command()
@click.argument("gateway")
@shared
def render(options: Options, gateway: str) -> None:
    """Print the files that GATEWAY should have. Needs no network."""
    fleet = read(options)
    if gateway not in fleet.gateways:
        raise Exit(INVALID, f"there is no gateway {gateway} in {options.file}")
    from provision.plan import shown

    rendered = wanted_files(fleet, [gateway], options)[gateway]
    if options.json:
        emit({name: shown(file.text) for name, file in rendered.files.items()})
        return
    for name, file in rendered.files.items():
        print(f"==> {name}\n{shown(file.text)}")


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), help="Save the plan, for `push --plan`.")
@shared
def plan(options: Options, out: Path | None) -> None:
    """Show what a push would change, and what hosts would notice. Exit status 4 when there is something."""
    from provision import show
    from provision.plan import plan as make_plan

    fleet = read(options)
    names = chosen(fleet, options)
    wanted = wanted_files(fleet, names, options)
    _, running, missing = look(fleet, names, options)
    found = make_plan(wanted, running)
    if out is not None:
        out.write_text(json.dumps({"hash": found.hash, "limit": list(options.limit)}) + "\n")
    if options.json:
        emit({**found.as_json(), "unreached": {name: result.text for name, result in missing.items()}})
    else:
        show.plan(found)
        report_missing(missing)
    if missing:
        raise Exit(SOME_FAILED)
    if found.changes:
        raise Exit(PENDING)


@cli.command()
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
    from provision.push import Budget, window_of

    dial, running, missing = look(fleet, list(wanted), options)
    found = make_plan(wanted, running)
    if expected is not None and expected != found.hash:
        raise Exit(STALE, "the saved plan is stale: fleet.yaml or a gateway has changed since; plan again")
    if not options.json:
        show.plan(found)
        report_missing(missing)
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
    _finish(options, _roll_out(fleet, found, wanted, running, dial, order, budget, options), missing)


def _saved_plan(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Exit(INVALID, f"{path} is not a saved plan: {error}") from error
    return value if isinstance(value, dict) else {}


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
    import threading

    from provision import show
    from provision.journal import Journal
    from provision.model import milliseconds
    from provision.plan import digest_of
    from provision.push import push_all, push_one, units, waves, with_failover, witnesses

    quiet = options.json or len(found.changes) > 20

    def say(gateway: str, text: str) -> None:
        if not quiet:
            print(f"{gateway}: {text}", file=sys.stderr)

    journal = Journal(options.directory, found.hash, {n: digest_of(r) for n, r in wanted.items()})
    for name in found.unchanged:
        journal.add({"gateway": name, "outcome": "unchanged"})

    def done(result: Result) -> None:
        journal.add({"gateway": result.gateway, "outcome": result.outcome, "text": result.text})
        if not options.json:
            text = f": {result.text}" if result.text else ""
            print(f"{result.gateway}: {result.outcome} ({result.seconds} s){text}", file=sys.stderr)

    def one(change: Any) -> Result:
        name = change.gateway
        witness = witnesses(fleet, name, wanted[name], dial)

        def push() -> Result:
            return push_one(change, wanted[name], dial, order, witness=witness, say=say)

        return with_failover(fleet, change, running[name], dial, push, say=say)

    stop = threading.Event()
    rollout = fleet.defaults.rollout
    ordered = waves(units(fleet, found.changes, running), rollout.first_wave_percent)
    soak_s = milliseconds(rollout.soak) / 1000
    with show.progress(len(found.changes), quiet=options.json) as advance:

        def ended(result: Result) -> None:
            done(result)
            advance(result.gateway)

        results = push_all(
            ordered, one, jobs=options.jobs, budget=budget, soak_s=soak_s, stop=stop, done=ended
        )
    return results, stop.is_set()


def _finish(options: Options, outcome: tuple[list[Result], bool], missing: Mapping[str, Result]) -> NoReturn:
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


@cli.command()
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


@cli.command()
@shared
def confirm(options: Options) -> None:
    """Keep the changes that wait to be confirmed."""
    from provision.push import FACTS_S, AgentRefused, Result
    from provision.ssh import GatewayError

    fleet = read(options)
    names = chosen(fleet, options)
    dial, running, missing = look(fleet, names, options)

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

    _finish(options, ([one(name) for name in running], False), missing)


@cli.command()
@click.option("--to", "target", type=click.IntRange(0), help="The generation to go back to (see `history`).")
@click.option("--yes", is_flag=True, help="Do not ask.")
@shared
def rollback(options: Options, target: int | None, yes: bool) -> None:
    """Undo the pending change, or make an older generation live again."""
    from provision.push import (
        APPLY_S,
        FACTS_S,
        AgentRefused,
        Result,
        roll_back_one,
        window_of,
        witnesses,
    )
    from provision.ssh import GatewayError

    fleet = read(options)
    names = chosen(fleet, options)
    if not options.limit and len(names) > 1:
        raise Exit(INVALID, "say which gateways to roll back with --limit ('*' for all)")
    dial, running, missing = look(fleet, names, options)
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
        return roll_back_one(
            found, to, digest, dial, order, witness=witnesses(fleet, name, wanted[name], dial)
        )

    _finish(options, ([one(name) for name in running], False), missing)


def _generation_before(running: Running) -> int:
    """The one that was live before: what the live one was made on top of."""
    base = running.facts.get("manifest", {}).get("base")
    return int(base) if base is not None else 0


@cli.command()
@click.argument("gateway")
@click.option("--undo", is_flag=True, help="Take part in the pair again.")
@shared
def drain(options: Options, gateway: str, undo: bool) -> None:
    """Hand GATEWAY's VRRP addresses to its peer, for work on it. Its sessions go where the addresses go."""
    from provision.push import dialer
    from provision.push import drain as drain_one
    from provision.ssh import GatewayError

    fleet = read(options)
    if gateway not in fleet.gateways:
        raise Exit(INVALID, f"there is no gateway {gateway} in {options.file}")
    try:
        text = drain_one(fleet, gateway, dialer(fleet, options.directory), on=not undo)
    except GatewayError as error:
        raise Exit(SOME_FAILED, f"{gateway}: {error}") from error
    if options.json:
        emit({"gateway": gateway, "drained": not undo, "text": text})
    else:
        print(f"{gateway}: {text}")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--version", help="Which of the versions in FOLDER.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@shared
def update(options: Options, folder: Path, version: str | None, yes: bool) -> None:
    """Give gateways the image in FOLDER (made by `make image`), pair by pair, the backup first."""
    import threading

    from provision.model import milliseconds
    from provision.plan import Change
    from provision.push import Budget, push_all, units, waves, with_failover
    from provision.update import BadImage, find_image, update_one

    fleet = read(options)
    names = chosen(fleet, options)
    try:
        image = find_image(folder, version)
    except BadImage as error:
        raise Exit(INVALID, str(error)) from error
    dial, running, missing = look(fleet, names, options)
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
    _finish(options, (results, stop.is_set()), missing)


@cli.command("exec", context_settings={"ignore_unknown_options": True})
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


@cli.command()
@shared
def status(options: Options) -> None:
    """One screen: who runs what, who is master, how full the pools are."""
    from provision import show
    from provision.push import vrrp_addresses

    fleet = read(options)
    names = chosen(fleet, options)
    _, running, missing = look(fleet, names, options)
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


@cli.command()
@shared
def drift(options: Options) -> None:
    """Who differs from what was pushed, and in which lines. Exit status 4 when somebody does."""
    from provision import show
    from provision.plan import Plan
    from provision.plan import plan as make_plan

    fleet = read(options)
    names = chosen(fleet, options)
    wanted = wanted_files(fleet, names, options)
    _, running, missing = look(fleet, names, options)
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


@cli.command()
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


@cli.command()
@click.option("--known-hosts", is_flag=True, help="Print lines for OpenSSH's known_hosts.")
@click.option("--check", is_flag=True, help="Connect, and say whose key is another.")
@shared
def keys(options: Options, known_hosts: bool, check: bool) -> None:
    """The host keys that are pinned in the file, and whether the gateways show them."""
    from provision import show

    fleet = read(options)
    names = chosen(fleet, options)
    if known_hosts:
        for name in names:
            address, port = fleet.gateways[name].management.address, fleet.ssh_of(name).port
            place = address if port == 22 else f"[{address}]:{port}"
            print(f"{place} {' '.join(fleet.gateways[name].host_key.split()[:2])}")
        return
    answers = {name: "" for name in names}
    if check:
        _, running, missing = look(fleet, names, options)
        answers = {name: "as pinned" if name in running else missing[name].text for name in names}
    pinned = {name: _fingerprint(fleet.gateways[name].host_key) for name in names}
    if options.json:
        emit(
            {
                n: {"fingerprint": pinned[n], "check": answers[n]} if check else {"fingerprint": pinned[n]}
                for n in names
            }
        )
    else:
        rows = [
            (name, fleet.gateways[name].management.address, pinned[name], answers[name]) for name in names
        ]
        show.table(("GATEWAY", "ADDRESS", "HOST KEY", "CHECK" if check else ""), rows)
    if check and any(answer != "as pinned" for answer in answers.values()):
        raise Exit(SOME_FAILED)


def _fingerprint(key: str) -> str:
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@cli.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--management", multiple=True, metavar="[GW=]ADDRESS", help="Management address of a gateway.")
@click.option("--host-key", multiple=True, metavar="[GW=]KEY", help="Its SSH host key.")
@click.option(
    "--interface",
    multiple=True,
    metavar="[GW:]NAME=ADDRESS/LEN[,PCI]",
    help="An interface's own address and device.",
)
def import_(
    files: tuple[Path, ...],
    management: tuple[str, ...],
    host_key: tuple[str, ...],
    interface: tuple[str, ...],
) -> None:
    """Print fleet.yaml for dsnat's own files: keepalived.conf (both nodes'), rc.local, ipvsadm -S.

    What could not be carried over is named on standard error. Gateways are called gw1, gw2 in the
    order of files.
    """
    from provision.dsnat import import_files

    texts: list[tuple[str, str]] = []
    for file in files:
        try:
            texts.append((str(file), file.read_text(errors="replace")))
        except OSError as error:
            raise Exit(INVALID, f"{file} cannot be read: {error.strerror}") from error
    imported = import_files(texts, _known(management, host_key, interface))
    for remark in imported.remarks:
        print(remark, file=sys.stderr)
    print(imported.text, end="")


def _known(management: Sequence[str], host_key: Sequence[str], interface: Sequence[str]) -> dict[str, Known]:
    """What the options say about each gateway; without a name they mean gw1."""
    from provision.dsnat import CHANGE, Known

    def by_gateway(given: Sequence[str], mark: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for text in given:
            name, rest = text.split(mark, 1) if re.match(rf"gw\d+{mark}", text) else ("gw1", text)
            found.setdefault(name, []).append(rest)
        return found

    addresses, names = by_gateway(interface, ":"), by_gateway(management, "=")
    keys = by_gateway(host_key, "=")
    known: dict[str, Known] = {}
    for gateway in addresses.keys() | names.keys() | keys.keys():
        own: list[tuple[str, str]] = []
        devices: list[tuple[str, str]] = []
        for text in addresses.get(gateway, []):
            name, sign, rest = text.partition("=")
            address, _, device = rest.partition(",")
            if not sign or "/" not in address:
                raise Exit(
                    INVALID,
                    f"--interface {text}: write it as eth0=100.64.0.2/24 or eth0=100.64.0.2/24,0000:00:03.0",
                )
            own.append((name, address))
            if device:
                devices.append((name, device))
        known[gateway] = Known(
            names.get(gateway, [CHANGE])[-1], keys.get(gateway, [CHANGE])[-1], tuple(own), tuple(devices)
        )
    return known


@cli.command()
def schema() -> None:
    """Print the JSON schema of fleet.yaml, for editors."""
    from provision.model import Fleet

    emit({"$schema": "https://json-schema.org/draft/2020-12/schema", **Fleet.model_json_schema()})


def main() -> NoReturn:
    """The one place where an exception becomes a sentence and an exit status."""
    debug = "--debug" in sys.argv
    try:
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else DONE)
    except Exit as end:
        if str(end):
            print(f"dsnat-fleet: {end}", file=sys.stderr)
        sys.exit(end.status)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(INVALID)
    except (KeyboardInterrupt, click.Abort):
        print("dsnat-fleet: interrupted; nothing was left armed", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(DONE)
    except Exception as error:
        from provision.load import InvalidFleet

        if isinstance(error, InvalidFleet):
            bad = sum(not problem.warning for problem in error.problems)
            print(f"{error}\ndsnat-fleet: {bad} error{'s' * (bad > 1)}; nothing was done", file=sys.stderr)
            sys.exit(INVALID)
        if debug:
            raise
        print(
            f"dsnat-fleet: internal error: {error!r}; run it with --debug for the whole story",
            file=sys.stderr,
        )
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
