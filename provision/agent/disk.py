"""Files that survive a power cut, and the numbers by which they are known."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path

from .machine import Machine
from .protocol import Json


def sync_directory(machine: Machine, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        machine.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(machine: Machine, path: Path, data: bytes, mode: int = 0o644) -> None:
    """The whole file or none of it."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as out:
            os.fchmod(out.fileno(), mode)  # the umask does not decide
            out.write(data)
            out.flush()
            machine.fsync(out.fileno())
    except OSError:  # a full disk gets no fuller by each try
        new.unlink(missing_ok=True)
        raise
    machine.step(f"write {path.name}")
    new.replace(path)
    sync_directory(machine, path.parent)


def read_json(path: Path) -> Json | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of_files(files: dict[str, str]) -> str:
    """One number for a whole configuration: name and SHA-256 of every file."""
    return digest(json.dumps(sorted(files.items())).encode())
