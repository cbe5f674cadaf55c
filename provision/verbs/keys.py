"""The host keys of gateways."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from provision.verbs import (
    FAILED,
    INTERRUPTED,
    INVALID,
    SOME_FAILED,
    Exit,
    Options,
    chosen,
    emit,
    look_at,
    order_of,
    read,
    shared,
)

if TYPE_CHECKING:
    from provision.load import Source
    from provision.model import Fleet


@click.command()
@click.argument("action", required=False, type=click.Choice(["rotate"]))
@click.option("--known-hosts", is_flag=True, help="Print lines for OpenSSH's known_hosts.")
@click.option("--check", is_flag=True, help="Connect, and say whose key is another.")
@click.option("--yes", is_flag=True, help="With rotate: do not ask.")
@shared
def keys(options: Options, action: str | None, known_hosts: bool, check: bool, yes: bool) -> None:
    """The host keys that are pinned in the file, and whether the gateways show them. `keys rotate` gives
    gateways new ones and writes them into the file.
    """
    fleet = read(options)
    names = chosen(fleet, options)
    if action == "rotate":
        _rotate(options, fleet, names, yes=yes)
    elif known_hosts:
        lines = {name: _known_hosts(fleet, name) for name in names}
        if options.json:
            emit(lines)
        else:
            print("\n".join(lines.values()))
    else:
        _list(options, fleet, names, check=check)


def _known_hosts(fleet: Fleet, name: str) -> str:
    address, port = fleet.gateways[name].management.address, fleet.ssh_of(name).port
    place = address if port == 22 else f"[{address}]:{port}"
    return f"{place} {' '.join(fleet.gateways[name].host_key.split()[:2])}"


def _list(options: Options, fleet: Fleet, names: list[str], *, check: bool) -> None:
    from provision import show

    answers = {name: "" for name in names}
    if check:
        _, running, missing = look_at(fleet, names, options)
        answers = {name: "as pinned" if name in running else missing[name].text for name in names}
    pinned = {name: fingerprint(fleet.gateways[name].host_key) for name in names}
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


def _rotate(options: Options, fleet: Fleet, names: list[str], *, yes: bool) -> None:
    """One gateway after the other: a fault stops before the next one has another key too."""
    from provision.load import load
    from provision.rollout import window_of

    if not options.limit and len(names) > 1:
        raise Exit(INVALID, "say whose keys to rotate with --limit ('*' for all)")
    if not yes:
        if options.json or not sys.stdin.isatty():
            raise Exit(INVALID, "nobody to ask whether to go on; rotate with --yes")
        if not click.confirm(f"give {', '.join(names)} new host keys?"):
            raise Exit(FAILED, "nothing was changed")
    owner, window_s = order_of(options, "host key", 60, confirm=True).owner, window_of(fleet)
    _, source = load(options.file)
    done: dict[str, str] = {}
    stop = threading.Event()
    # Between two keys a gateway and the file must not part: an interrupt waits until both have the same.
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        _rotate_all(options, fleet, names, source, owner, window_s, done, stop)
    finally:
        signal.signal(signal.SIGINT, before)
    if options.json:
        emit({"rotated": done})
    if stop.is_set():
        left = [name for name in names if name not in done]
        text = f"interrupted; not begun: {', '.join(left) or 'nobody'}; nothing is left armed"
        raise Exit(INTERRUPTED, text)


def _rotate_all(
    options: Options,
    fleet: Fleet,
    names: list[str],
    source: Source,
    owner: str,
    window_s: int,
    done: dict[str, str],
    stop: threading.Event,
) -> None:
    from provision.ssh import GatewayError

    for name in names:
        if stop.is_set():
            return
        place = Path(source.problem(("gateways", name, "host_key"), "").file)
        try:
            done[name] = _rotate_one(options, fleet, name, place, owner, window_s)
        except (GatewayError, OSError) as error:
            if options.json:
                emit({"rotated": done, "failed": {name: str(error)}})
            raise Exit(SOME_FAILED, f"{name}: {error}; its old host key stays") from error
        if not options.json:
            print(f"{name}: {fingerprint(done[name])}, written to {place}")


def _rotate_one(options: Options, fleet: Fleet, name: str, place: Path, owner: str, window_s: int) -> str:
    from provision.load import replace_text
    from provision.push import FACTS_S, dialer
    from provision.ssh import GatewayError, Unreachable

    common = {"do": "rekey", "owner": owner}
    with dialer(fleet, options.directory)(name) as remote:
        new: str = remote.ask({**common, "step": "make"}, deadline_s=FACTS_S)["public"]
        request = {**common, "step": "use", "public": new, "window_s": window_s}
        remote.ask(request, deadline_s=FACTS_S)
    gateway = fleet.gateways[name].model_copy(update={"host_key": new})
    changed = fleet.model_copy(update={"gateways": {**fleet.gateways, name: gateway}})
    old = " ".join(fleet.gateways[name].host_key.split()[:2])
    before = place.read_text()
    # Written before it is kept: when the tool dies in between, the gateway goes back by itself and version
    # control has the old line; the other way round the only copy of the new key would be lost.
    replace_text(place, before.replace(old, new))
    try:
        end = time.monotonic() + window_s / 2
        while True:
            try:
                with dialer(changed, options.directory)(name) as remote:
                    remote.ask({**common, "step": "keep"}, deadline_s=FACTS_S)
                break
            except Unreachable:  # sshd takes a moment to start anew
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)
    except GatewayError:
        replace_text(place, before)
        raise
    return new


def fingerprint(key: str) -> str:
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
