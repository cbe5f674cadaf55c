"""A new generation: written beside the others, judged by the gateway's own programs. Changes nothing live."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path

from .disk import digest, digest_of_files, sync_directory, write
from .protocol import Json, Refused, files_in, line_in, number_in
from .services import BGP, ENGINE, VRRP, actions_between
from .state import State
from .undo import alone

SCHEMA = 1


def stage(state: State, request: Json) -> Json:
    """Writes a generation beside the others and lets the image's own programs judge it. Changes
    nothing live.
    """
    files = files_in(request)
    with alone(state, request) as owner:
        base = state.unchanged(request)
        number = max(state.numbers()) + 1
        directory = state.generations / f".new-{secrets.token_hex(4)}"
        sums = {name: digest(data) for name, (data, _) in files.items()}
        manifest: Json = {
            "schema": SCHEMA,
            "base": base,
            "owner": owner,
            "plan": line_in(request, "plan"),
            "staged_at": state.machine.wall(),
            "hardware": line_in(request, "hardware"),
            "vrrp": [str(a) for a in request.get("vrrp", [])],
            "interfaces": [str(i) for i in request.get("interfaces", [])],
            "by_hand": [str(n) for n in request.get("by_hand", [])],  # files that no fleet.yaml asked for
            "health_s": number_in(request, "health_s", 30, 1, 180),
            "files": sums,
        }
        try:
            write_generation(state, directory, files, manifest)
            judge(state, directory, sums, manifest["interfaces"])
            state.machine.step("rename generation")
            directory.rename(state.generations / str(number))
            sync_directory(state.machine, state.generations)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        state.hold_lease(owner)
        state.prune({base, number})
        return {
            "generation": number,
            "base": base,
            "digest": digest_of_files(sums),
            "files": sums,
            "actions": actions_between(state.manifest(base), manifest),
        }


def write_generation(
    state: State, directory: Path, files: dict[str, tuple[bytes, int]], manifest: Json
) -> None:
    directory.mkdir(mode=0o755)
    (directory / "network").mkdir()  # networkd is led here, also when there is nothing in it
    for name, (data, mode) in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        write(state.machine, path, data, mode)
    write(
        state.machine,
        directory / "generation.json",
        json.dumps(manifest, indent=1, sort_keys=True).encode(),
    )
    for below in directory.iterdir():
        if below.is_dir():
            sync_directory(state.machine, below)


def judge(state: State, directory: Path, files: dict[str, str], interfaces: list[str]) -> None:
    problems: list[str] = []
    if ENGINE in files:
        status, text = state.machine.run(["dsnatd", "--check", str(directory / ENGINE)], 60.0)
        if status != 0:
            problems.append(text or f"dsnatd --check ended with {status}")
    if VRRP in files:
        # keepalived calls a missing and an empty file valid, and wants the interfaces to be there:
        # they are, as
        # taps of a network namespace that ends with the command.
        path = directory / VRRP
        script = 'for i in "$@"; do ip tuntap add "$i" mode tap || exit 90; done; exec keepalived -t -f "$0"'
        status, text = state.machine.run(["unshare", "-n", "sh", "-c", script, str(path), *interfaces], 30.0)
        if status != 0 or path.stat().st_size == 0:
            problems.append(text or f"keepalived -t ended with {status}")
    if BGP in files:
        status, text = state.machine.run(["bird", "-p", "-c", str(directory / BGP)], 30.0)
        if status != 0:
            problems.append(text or f"bird -p ended with {status}")
    if problems:
        text = "\n".join(problems).replace(f"{directory}/", "")
        raise Refused("invalid", f"the gateway's own programs refuse the configuration:\n{text}")


def describe(state: State, request: Json) -> Json:
    """A generation that is on this gateway, live or not."""
    generation = number_in(request, "generation", -1, 0, 1 << 31)
    manifest = state.whole(generation)
    return {"generation": generation, "digest": digest_of_files(manifest["files"]), "manifest": manifest}
