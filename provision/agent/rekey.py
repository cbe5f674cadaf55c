"""Another SSH host key, with the same net below it as a configuration.

    make    a new key beside the old one, on disk; nothing shows it yet
    use     sshd shows it from now on; the undo is armed, and /run still has the old key, so a restart of the
            machine brings that back too
    keep    said over a connection that was opened since, so by a client that has seen the new key: from here
            on it is this gateway's, also after a restart

A gateway whose key was given with its identity keeps the new one only as long as that same identity is given:
`replaces` names the key that it stands for (/usr/lib/dsnat/identity looks).
"""

from __future__ import annotations

import contextlib
import json
import secrets
from pathlib import Path

from .disk import read_json, sync_directory, write
from .protocol import Json, Refused, line_in, number_in
from .state import State
from .undo import alone

KEY = "ssh_host_ed25519_key"


def rekey(state: State, request: Json) -> Json:
    steps = {"make": _make, "use": _use, "keep": _keep}
    step = steps.get(str(request.get("step")))
    if step is None:
        raise Refused("usage", f'"step" must be one of {", ".join(steps)}')
    return step(state, request)


def _make(state: State, request: Json) -> Json:
    machine = state.machine
    with alone(state, request):
        if _trial(state) is not None:
            raise Refused("locked", "a new host key is being tried already; wait until it is kept or undone")
        machine.kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = machine.kept / "next"
        for left in (new, new.with_suffix(".pub")):
            left.unlink(missing_ok=True)
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(new)]
        status, text = machine.run(argv, 30.0)
        if status != 0:
            raise Refused("failed", f"no new host key could be made: {text}")
        sync_directory(machine, machine.kept)
        return {"public": new.with_suffix(".pub").read_text().strip()}


def _use(state: State, request: Json) -> Json:
    machine = state.machine
    window_s = number_in(request, "window_s", 60, 5, 3600)
    with alone(state, request) as owner:
        new = machine.kept / "next"
        if not new.exists() or new.with_suffix(".pub").read_text().strip() != request.get("public"):
            raise Refused("stale", "the new host key is not the one that was made; begin again")
        old = machine.identity / KEY
        trial: Json = {
            "id": secrets.token_hex(4),
            "owner": owner,
            "boot_id": machine.boot_id(),
            "deadline": machine.clock() + window_s,
            "replaces": old.with_suffix(".pub").read_text().strip(),
        }
        write(machine, machine.identity / "previous", old.read_bytes(), 0o600)
        write(machine, machine.identity / "previous.pub", old.with_suffix(".pub").read_bytes())
        write(machine, machine.identity / "trial", json.dumps(trial).encode(), 0o600)
        machine.arm(trial["id"], "unkey")
        _show(state, new)
        trial["used_at"] = machine.clock()
        write(machine, machine.identity / "trial", json.dumps(trial).encode(), 0o600)
        return {"window_s": window_s}


def _keep(state: State, request: Json) -> Json:
    machine = state.machine
    with state.locked():
        trial = _trial(state)
        if trial is None or "used_at" not in trial or machine.clock() >= trial["deadline"]:
            raise Refused("reverted", "no new host key is being tried; the old one is shown again")
        opened = machine.connected_at()
        if opened is None or opened <= trial["used_at"]:
            raise Refused("usage", "a host key is kept by a new connection, which has seen it; dial again")
        new = machine.kept / "next"
        if not (machine.kept / "rotated").exists():  # a second rotation still stands for the given key
            write(machine, machine.kept / "replaces", trial["replaces"].encode() + b"\n")
        new.replace(machine.kept / "rotated")  # from here on it stays
        sync_directory(machine, machine.kept)
        public = (machine.identity / f"{KEY}.pub").read_text().strip()
        _forget(state)
        pending: Json = {"owner": line_in(request, "owner"), "plan": "host key"}
        receipt = state.note("rekeyed", pending, reason=public.split()[1][-16:])
        return {"public": public, "receipt": receipt}


def unkey(state: State, identity: str) -> Json:
    """Waits for the deadline of one trial, and shows the old key again when nobody kept the new one."""
    machine = state.machine
    while True:
        trial = _trial(state)
        if trial is None or trial["id"] != identity:
            return {"state": "settled"}
        if machine.clock() >= trial["deadline"]:
            with contextlib.suppress(Refused), state.locked(wait_s=1.0):
                if (_trial(state) or {}).get("id") == identity:
                    _show(state, machine.identity / "previous")
                    _forget(state)
                    machine.announce("a new SSH host key was not kept in time; the old one is shown again")
                    return {"state": "reverted"}
        machine.sleep(min(1.0, max(0.05, trial["deadline"] - machine.clock())))


def _trial(state: State) -> Json | None:
    """/run is empty after a restart: then there is none, and the old key is shown."""
    return read_json(state.machine.identity / "trial")


def _show(state: State, key: Path) -> None:
    machine = state.machine
    write(machine, machine.identity / KEY, key.read_bytes(), 0o600)
    write(machine, machine.identity / f"{KEY}.pub", key.with_name(f"{key.name}.pub").read_bytes())
    status, text = machine.run(["systemctl", "reload", "ssh.service"], 30.0)
    if status != 0:
        raise Refused("failed", f"sshd did not take the host key: {text}")


def _forget(state: State) -> None:
    for name in ("trial", "previous", "previous.pub"):
        (state.machine.identity / name).unlink(missing_ok=True)
