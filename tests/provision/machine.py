"""A gateway in a directory, with a clock that only moves when told, and power that can be cut at any step."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provision.agent import PROTOCOL, Json, Refused, undo
from provision.agent.command import reply
from provision.agent.machine import Machine
from provision.agent.state import State


class PowerCutError(BaseException):
    """Everything stops between two steps. Not an Exception: nothing may handle it."""


class FakeMachine(Machine):
    """Services are strings: which generation's file each of them read last."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (root / "generations/0").mkdir(parents=True)
        (root / "generations/current").symlink_to("0")
        self.now = 100.0
        self.boot = 0
        self.connection: float | None = None
        self.armed: list[str] = []
        self.running: dict[str, str] = {}
        self.broken: set[str] = set()  # services that do not start
        self.unwell: set[int] = set()  # generations whose engine does not answer
        self.said: list[str] = []
        self.drained = False
        self.image = self.written = "0.1.0"
        self.bad_images: set[str] = set()
        self.updates = root.with_name(f"{root.name}-updates")
        self.silent = False  # nothing outside answers
        self.deaf: set[int] = set()  # VRRP ids whose adverts do not come in
        self.trial_s = 0.0  # since its boot, until a new image is found well
        self.full = False  # nothing more fits into the history
        self.steps_left: int | None = None
        self._snapshot: Path | None = None
        self.source: Callable[[], float] | None = None

    def real_time(self) -> None:
        """For machines behind a real network: the clock goes by itself."""
        self.source = time.monotonic

    # -- what the agent asks of a machine --

    def clock(self) -> float:
        return self.now if self.source is None else self.source()

    def wall(self) -> float:
        return 1_800_000_000.0 + self.now

    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    def sleep(self, seconds: float) -> None:
        if self.source is not None:
            time.sleep(seconds)
        self.now += seconds

    def step(self, name: str) -> None:
        if self.full and name.startswith("record "):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.steps_left is None:
            return
        self.steps_left -= 1
        if self.steps_left < 0:
            self.steps_left = None
            # What the unwinding of this process would still tidy up does not happen when power goes.
            self._snapshot = self.root.with_name("snapshot")
            shutil.copytree(self.root, self._snapshot, symlinks=True)
            raise PowerCutError(name)

    def run(self, argv: list[str], timeout_s: float = 150.0) -> tuple[int, str]:
        match argv:
            case ["dsnatd", "--check", path]:
                return (2, f"{path}:1:1: broken; mend it") if "BROKEN" in Path(path).read_text() else (0, "")
            case ["systemctl", "is-active", *units]:
                names = [unit.removesuffix(".service") for unit in units]
                return 0, "\n".join("active" if name in self.running else "inactive" for name in names)
            case ["systemctl", "reboot", "--no-block"]:
                if self.written not in self.bad_images:
                    self.image = self.written
                self.boot_up()
                return 0, ""
            case ["systemctl", verb, unit]:
                return self._service(verb, unit.removesuffix(".service"))
            case ["dsnat-image", "update", version]:
                parts = sorted(
                    path.name.removeprefix(f"gateway_{version}.")[:4]
                    for path in self.updates.glob("gateway_*")
                )
                if parts != ["efi", "root", "root"]:
                    return 1, "parts are missing"
                self.written = version
                return 0, ""
            case ["uptime"]:
                return 0, "up 1 day"
            case ["unshare", *_] | ["ip", *_] | ["networkctl", *_] | ["chronyc", *_]:
                return 0, ""
        raise AssertionError(argv)

    def arm(self, identity: str, verb: str = "undo") -> None:
        if "systemd-run" in self.broken:
            raise Refused("failed", "no units today")
        self.armed.append(identity)

    def connected_at(self) -> float | None:
        return self.connection

    def engine(self, request: Json, timeout_s: float = 5.0) -> Json:
        if "dsnatd" not in self.running or self.live() in self.unwell:
            raise OSError("connection refused")
        if request == {"cmd": "reload"}:
            self._read("dsnatd")
        return {"ok": True}

    def pings(self, address: str, tries: int = 3, wait_s: float = 1.0) -> bool:
        return not self.silent

    def write_drain(self, on: bool) -> None:
        self.drained = on

    def is_drained(self) -> bool:
        return self.drained

    def adverts(self, ids: set[int], wait_s: float) -> dict[int, str]:
        return dict.fromkeys(ids - self.deaf, "192.0.2.99")

    def on_trial(self) -> bool:
        return self.image != "0.1.0" and self.now < 10.0 + self.trial_s

    def image_version(self) -> str:
        return self.image

    def announce(self, text: str) -> None:
        self.said.append(text)

    def log(self, text: str) -> None:
        pass

    def fsync(self, descriptor: int) -> None:
        pass

    # -- what happens to it --

    def live(self) -> int:
        return int((self.root / "generations/current").readlink().name)

    def _service(self, verb: str, name: str) -> tuple[int, str]:
        if verb == "stop":
            self.running.pop(name, None)
        elif name in self.broken:
            return 1, f"{name} failed"
        else:
            self._read(name)
        return 0, ""

    def _read(self, name: str) -> None:
        file = {"dsnatd": "dsnatd.yaml", "keepalived": "keepalived.conf"}.get(name)
        if file is None:
            return
        path = self.root / "generations/current" / file
        if path.exists():
            self.running[name] = path.read_text()
        else:
            self.running.pop(name, None)

    def after_power_cut(self) -> None:
        """The disk is as it was at the cut."""
        assert self._snapshot is not None
        shutil.rmtree(self.root)
        self._snapshot.rename(self.root)
        self._snapshot = None

    def boot_up(self) -> None:
        self.boot += 1
        self.now, self.armed, self.running, self.connection = 10.0, [], {}, None
        if (self.root / "pending").exists():  # ConditionPathExists= of the unit
            undo.boot(State(self))
        for service in ("dsnatd", "keepalived"):
            self._read(service)

    def undo_runs(self) -> None:
        """What the armed units do between two moments: they look, and act when it is time."""
        for identity in list(self.armed):
            pending = State(self).pending()
            if pending is None or pending.get("id") != identity:
                self.armed.remove(identity)
            elif pending["state"] == "armed" or self.now >= pending["deadline"]:
                undo.undo(State(self), identity)
                self.armed.remove(identity)


def files(marker: str, **more: str) -> dict[str, dict[str, Any]]:
    texts = {"dsnatd.yaml": f"engine: {marker}\n", "keepalived.conf": f"# {marker}\n"} | more
    return {name: {"text": text} for name, text in texts.items()}


class Client:
    """What an operator's tool says to the agent."""

    def __init__(self, machine: FakeMachine, owner: str) -> None:
        self.machine, self.owner = machine, owner

    def ask(self, **request: Any) -> Json:
        return reply(State(self.machine), {"protocol": PROTOCOL, "owner": self.owner, **request})

    def stage(self, marker: str, *, base: int | None = None, hardware: str = "h", **more: str) -> Json:
        live = self.machine.live() if base is None else base
        return self.ask(do="stage", base=live, files=files(marker, **more), hardware=hardware, plan=marker)

    def apply(self, staged: Json, window_s: int = 60) -> Json:
        return self.ask(
            do="apply",
            base=staged["base"],
            generation=staged["generation"],
            digest=staged["digest"],
            window_s=window_s,
        )

    def confirm(self, generation: int, *, fresh: bool = True) -> Json:
        self.machine.connection = self.machine.now + 0.01 if fresh else 0.0
        self.machine.now += 0.02
        return self.ask(do="confirm", generation=generation)

    def push(self, marker: str, **more: Any) -> Json:
        staged = self.stage(marker, **more)
        self.apply(staged)
        return self.confirm(staged["generation"])


def snapshot_of(root: Path) -> dict[str, str]:
    """Every file and link, for "this changed nothing"."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name != "lock":
            found[name] = (
                str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else ""
            )
    return found
