"""The verbs, and what all of them need: their options, how they end, and the look at the fleet.

Each module holds the verbs of one kind; what a verb does is in the module of `provision` that it imports,
inside the verb, so that `--help` answers at once.

    describe.py    validate, render, import, schema, slices: no gateway is asked
    push.py        plan, push, resume
    maintain.py    confirm, rollback, drain, update
    look.py        status, drift, history, exec
    keys.py        keys
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from provision.model import Fleet
    from provision.plan import Running
    from provision.push import Dial, Order, Result
    from provision.render import Rendered

T = TypeVar("T")

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


def no_gateway(options: Options, fleet: Fleet, name: str) -> Exit:
    import difflib

    near = difflib.get_close_matches(name, fleet.gateways, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "`dsnat-fleet keys` lists them"
    return Exit(INVALID, f"there is no gateway {name} in {options.file}; {hint}")


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
    from provision.secret import SecretError, of_fleet

    try:
        return {n: render(fleet, n, secret=lambda ref: of_fleet(ref, options.directory)) for n in names}
    except (RenderError, SecretError) as error:
        raise Exit(INVALID, f"{options.file}: {error}") from error


def look_at(
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


def each(names: Sequence[str], one: Callable[[str], T], options: Options) -> list[T]:
    """`one` for every gateway, --jobs at a time, results in order. Ctrl-C begins no further one and lets what
    is in flight end: each in a known state.
    """
    from concurrent.futures import ThreadPoolExecutor, wait

    with ThreadPoolExecutor(max_workers=max(1, min(options.jobs, len(names) or 1))) as pool:
        futures = [pool.submit(one, name) for name in names]
        try:
            wait(futures)
        except KeyboardInterrupt:
            left = [name for name, future in zip(names, futures, strict=True) if future.cancel()]
            wait(futures)
            begun = ", ".join(name for name in names if name not in left) or "nobody"
            text = f"interrupted; begun and ended: {begun}; not begun: {', '.join(left) or 'nobody'}"
            raise Exit(INTERRUPTED, f"{text}; nothing is left armed (see status)") from None
        return [future.result() for future in futures]


def order_of(options: Options, plan_hash: str, window_s: int, *, confirm: bool) -> Order:
    import getpass
    import secrets
    import socket

    from provision.push import Order

    owner = f"{getpass.getuser()}@{socket.gethostname()}.{secrets.token_hex(3)}"
    return Order(owner, plan_hash, window_s, confirm)
