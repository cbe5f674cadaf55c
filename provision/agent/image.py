"""A new image: its parts received, written to the slot that does not run, and the restart into it."""

from __future__ import annotations

import hashlib
import re
import shutil

from .disk import sync_directory
from .protocol import Json, Refused, line_in, number_in
from .state import State
from .undo import alone

PARTS = r"gateway_[0-9A-Za-z.~+-]{1,64}\.(efi|root-x86-64(-verity)?\.[0-9a-f]{32}\.raw(\.gz)?)"
UPDATE_FILES = rf"{PARTS}|SHA256SUMS(\.gpg)?"


def receive(state: State, request: Json) -> Json:
    """A part of an image, which follows the request as it is. It counts only when it arrived whole."""
    name, size = request.get("name"), number_in(request, "size", -1, 1, 8 << 30)
    if not isinstance(name, str) or not re.fullmatch(UPDATE_FILES, name):
        raise Refused("usage", f"{name!r} is not a part of an image")
    with alone(state, request):
        folder = state.machine.updates
        folder.mkdir(mode=0o755, exist_ok=True)
        for old in folder.glob(".*.part"):
            old.unlink()  # of a transfer that was cut; we hold the lock
        free = shutil.disk_usage(folder).free
        if free < size + (64 << 20):
            raise Refused("failed", f"{folder} has {free >> 20} MiB free and {name} needs {size >> 20} MiB")
        part, sha256, left = folder / f".{name}.part", hashlib.sha256(), size
        with part.open("wb") as out:
            while left and (data := state.machine.payload.read(min(left, 1 << 20))):
                out.write(data)
                sha256.update(data)
                left -= len(data)
            out.flush()
            state.machine.fsync(out.fileno())
        if left or sha256.hexdigest() != request.get("sha256"):
            part.unlink()
            raise Refused("failed", f"{name} did not arrive whole; send it again")
        part.replace(folder / name)
        sync_directory(state.machine, folder)
        return {"name": name}


def update(state: State, request: Json) -> Json:
    """Writes the received version to the slot that does not run."""
    version = line_in(request, "version")
    if not re.fullmatch(r"[0-9A-Za-z.~+-]{1,64}", version):
        raise Refused("usage", f"{version!r} is not a version")
    with alone(state, request):
        status, text = state.machine.run(["dsnat-image", "update", version], 850.0)
        for pattern in (f"gateway_{version}.*", "SHA256SUMS*"):
            for part in state.machine.updates.glob(pattern):
                part.unlink()
        if status != 0:
            raise Refused("failed", f"{version} was not written: {text}")
        state.machine.log(f"image {version} written owner={request['owner']}")
        return {"version": version}


def restart(state: State, request: Json) -> Json:
    """Restarts the machine, not while a change waits to be confirmed: that would undo it."""
    with alone(state, request) as owner:
        state.drop_lease()
        state.machine.log(f"restart owner={owner}")
        status, text = state.machine.run(["systemctl", "reboot", "--no-block"], 30.0)
        if status != 0:
            raise Refused("failed", f"it could not be restarted: {text}")
        return {}
