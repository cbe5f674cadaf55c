"""What a gateway keeps on disk, and who may change it.

    /var/lib/dsnat/generations/N/        an immutable configuration, with generation.json about it
    /var/lib/dsnat/generations/current   link to the live one; /etc/dsnat is here; one rename switches
    /var/lib/dsnat/pending               a change is live, or on its way, and nobody has confirmed it
    /var/lib/dsnat/lease                 who may change this gateway, until when
    /var/lib/dsnat/history.jsonl         what happened, one line each, never rewritten
    /var/lib/dsnat/lock                  held by the one agent that changes something

Reading touches none of them. Whatever writes holds the lock, and writes a whole file or none of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from .disk import digest, read_json, sync_directory, write
from .machine import Machine
from .protocol import Json, Refused

KEEP = 50  # generations
LEASE_S = 300.0


class State:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.root = machine.root
        self.generations = machine.root / "generations"
        self.pending_file = machine.root / "pending"
        self.lease_file = machine.root / "lease"
        self.history_file = machine.root / "history.jsonl"

    def current(self) -> int:
        try:
            return int((self.generations / "current").readlink().name)
        except (OSError, ValueError):
            raise Refused(
                "failed",
                f"{self.generations}/current leads to no generation; restore the link to one of them",
            ) from None

    def manifest(self, generation: int) -> Json:
        """Generation 0 may have none: it is what an image ships, with no file in it."""
        return read_json(self.generations / str(generation) / "generation.json") or {"files": {}}

    def pending(self) -> Json | None:
        try:
            raw = self.pending_file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            value = json.loads(raw)
            return value if isinstance(value, dict) else {}
        except ValueError:
            return {}  # it is there, so a change is unconfirmed, whatever it says

    def numbers(self) -> list[int]:
        return sorted(int(p.name) for p in self.generations.iterdir() if p.name.isdigit())

    def history(self) -> list[Json]:
        events: list[Json] = []
        for line in self.history_lines():
            with contextlib.suppress(ValueError):  # the last line of a machine that lost power
                events.append({**json.loads(line), "receipt": digest(line)})
        return events

    def history_lines(self) -> list[bytes]:
        try:
            return self.history_file.read_bytes().splitlines()
        except FileNotFoundError:
            return []

    def last_receipt(self) -> str:
        lines = self.history_lines()
        return digest(lines[-1]) if lines else ""

    def broken_at(self) -> int | None:
        """The first line of history that does not follow from the one before it."""
        before = ""
        for number, line in enumerate(self.history_lines(), 1):
            with contextlib.suppress(ValueError, AttributeError):  # a torn line says nothing, and is followed
                if json.loads(line).get("after", before) != before:
                    return number
            before = digest(line)
        return None

    def lease(self) -> Json | None:
        lease = read_json(self.lease_file)
        if lease is None or lease.get("boot_id") != self.machine.boot_id():
            return None
        return lease if lease.get("until", 0) > self.machine.clock() else None

    def whole(self, generation: int) -> Json:
        """The manifest of a generation whose every file is as it was staged."""
        directory = self.generations / str(generation)
        if not directory.is_dir():
            raise Refused("stale", f"there is no generation {generation} on this gateway; stage it again")
        manifest = self.manifest(generation)
        for name, sha256 in manifest["files"].items():
            try:
                good = digest((directory / name).read_bytes()) == sha256
            except OSError:
                good = False
            if not good:
                raise Refused(
                    "failed", f"{name} of generation {generation} was changed on the gateway; stage it again"
                )
        return manifest

    def point_at(self, generation: int) -> None:
        new = self.generations / f".current-{secrets.token_hex(4)}"
        new.symlink_to(str(generation))
        self.machine.step("switch")
        new.replace(self.generations / "current")
        sync_directory(self.machine, self.generations)

    def prune(self, keep: set[int]) -> None:
        """Old generations that nobody can need: never the live one, the image's own, or what history
        confirmed last.
        """
        keep = keep | {0, self.current()} | set(self.numbers()[-KEEP:])
        for number in self.numbers():
            if number not in keep:
                shutil.rmtree(self.generations / str(number), ignore_errors=True)
        for left in [*self.generations.glob(".new-*"), *self.generations.glob(".current-*")]:
            if left.is_symlink():
                left.unlink(missing_ok=True)
            else:
                shutil.rmtree(left, ignore_errors=True)  # of an agent that died; we hold the lock

    @contextlib.contextmanager
    def locked(self, wait_s: float = 10.0) -> Iterator[None]:
        """One agent at a time changes anything. The kernel lets go of the lock when a process dies."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = self.machine.clock() + wait_s
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self.machine.clock() >= end:
                        raise Refused(
                            "busy", "another change of this gateway is being made; try again"
                        ) from None
                    self.machine.sleep(0.1)
            yield
        finally:
            os.close(descriptor)

    def unchanged(self, request: Json) -> int:
        base = self.current()
        if request.get("base") != base:
            raise Refused(
                "stale", f"generation {base} is live, the plan was made for {request.get('base')}; plan again"
            )
        return base

    def hold_lease(self, owner: str) -> None:
        lease = {"owner": owner, "until": self.machine.clock() + LEASE_S, "boot_id": self.machine.boot_id()}
        write(self.machine, self.lease_file, json.dumps(lease).encode(), 0o600)

    def drop_lease(self) -> None:
        self.lease_file.unlink(missing_ok=True)

    def write_pending(self, pending: Json) -> None:
        write(self.machine, self.pending_file, json.dumps(pending, sort_keys=True).encode(), 0o600)

    def forget_pending(self) -> None:
        self.machine.step("forget pending")
        self.pending_file.unlink(missing_ok=True)
        sync_directory(self.machine, self.root)

    def record(self, event: str, pending: Json, *, to: int | None = None, **more: Any) -> str:
        """A line of history, and the audit line in the journal. Gives its receipt, the line's SHA-256; the
        next line names it, so a line cannot be changed or taken out without a trace.
        """
        tried = pending.get("generation")
        line = {
            "event": event,
            "generation": tried if to is None else to,
            "tried": tried,
            "base": pending.get("base"),
            "owner": pending.get("owner"),
            "plan": pending.get("plan"),
            "at": self.machine.wall(),
            "after": self.last_receipt(),
            **more,
        }
        self.machine.step(f"record {event}")
        data = json.dumps(line, sort_keys=True).encode()
        descriptor = os.open(self.history_file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # power went while a line was written
            whole = b"\n" * bool(torn) + data + b"\n"
            if os.write(descriptor, whole) < len(whole):  # the last block of the disk takes a part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.history_file))
            self.machine.fsync(descriptor)
        finally:
            os.close(descriptor)
        receipt = digest(data)
        why = f": {more['reason']}" if "reason" in more else ""
        self.machine.log(
            f"{event} generation {line['generation']} owner={line['owner']} "
            f"plan={line['plan']} tried={tried} receipt={receipt}{why}"
        )
        return receipt

    def note(self, event: str, pending: Json, *, to: int | None = None, **more: Any) -> str:
        """As `record`, for what has happened already: on a full disk the line is lost and not the deed. An
        undo would begin again, restarts included; a change would be called failed that is kept. No receipt
        then: "".
        """
        try:
            return self.record(event, pending, to=to, **more)
        except OSError as error:
            tried, owner = pending.get("generation"), pending.get("owner")
            why = f": {more['reason']}" if "reason" in more else ""
            self.machine.log(f"{event} tried={tried} owner={owner}, not in the history ({error}){why}")
            return ""
