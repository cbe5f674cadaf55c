#!/usr/bin/python3
"""The gateway's side of the fleet tool: one request in, one answer out, and nothing that keeps running.

`dsnat-fleet` opens an SSH connection, starts this program and writes one line of JSON to it; the answer
is one line of JSON. Standard library only, so that it runs on a gateway as it is. The rest of the world
(clock, commands, who connected) is `Machine`, which a test replaces.

    /var/lib/dsnat/generations/N/        an immutable configuration, with generation.json about it
    /var/lib/dsnat/generations/current   link to the live one; /etc/dsnat is here; one rename switches
    /var/lib/dsnat/pending               a change is live, or on its way, and nobody has confirmed it
    /var/lib/dsnat/lease                 who may change this gateway, until when
    /var/lib/dsnat/history.jsonl         what happened, one line each, never rewritten

The life of a change:

    idle     no `pending`
             may:     stage a generation (a directory beside the others; nothing leads to it)
    armed    `pending` is on disk and the undo runs, then the link moves and services reload
             may:     become live; be undone, at once when the process that applies it has died
             may not: be confirmed
    live     services run with it, local health was good, the clock runs
             may:     be confirmed, by a connection that was opened after it went live; be undone
             may not: outlive its deadline, a reboot or a power cut
    confirmed | reverted      `pending` is gone, history says which and why

`pending` is removed last when a change is undone, and its removal is what confirms one. So at every
instant a crash leaves either no `pending` (nothing to do) or a `pending` whose undo is safe to repeat.
Reading verbs write nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PROTOCOL = 1
SCHEMA = 1
VERSION = "0.1.0"
REQUEST_MAX = 16 << 20
FILE_NAMES = re.compile(
    r"dsnatd\.yaml|keepalived\.conf|bird\.conf|network/[A-Za-z0-9_.-]{1,64}\.network"
    r"|chrony/[a-z-]{1,32}\.sources|authorized_keys/[a-z][a-z0-9-]{0,30}"
)
ENGINE, VRRP = "dsnatd.yaml", "keepalived.conf"
UPDATE_FILES = r"gateway_[0-9A-Za-z.~+-]{1,64}\.(efi|root-x86-64(-verity)?\.[0-9a-f]{32}\.raw(\.zst)?)"
KEEP = 50  # generations
APPLY_MAX_S = 240.0  # the longest that services may take to come up; the deadline of a live change is its own
WINDOW_S = (5.0, 3600.0)
LEASE_S = 300.0

WORD = r"[A-Za-z0-9_.:/@=,-]+"
READING = (
    rf"dsnatctl (show|who|explain|rfc)( {WORD})*",
    rf"ip( -[a-z0-9]+)* (address|addr|route|rule|neigh|neighbour|link)( show( {WORD})*)?",
    rf"systemctl (status|is-active|is-failed|show|list-units|list-timers)( {WORD})*",
    rf"networkctl (list|status)( {WORD})*",
    r"journalctl( (-b|-k|--no-pager|-n \d+|-u [A-Za-z0-9_.@-]+))*",
    r"(dsnatd|keepalived) --version",
    r"uptime|uname -a|df|free|nproc",
)

Json = dict[str, Any]


class Refused(Exception):
    """A request that is answered with an error. `kind` is for programs, the sentence for people."""

    def __init__(self, kind: str, text: str, **more: Any) -> None:
        super().__init__(text)
        self.kind, self.more = kind, more


class Machine:
    """All that the agent needs of the gateway it runs on."""

    updates = Path(os.environ.get("DSNAT_UPDATES", "/var/updates"))  # where systemd-sysupdate looks

    def __init__(self, root: Path, socket_path: str = "/run/dsnatd/control.sock") -> None:
        self.root = root
        self.socket_path = socket_path
        self.payload: BinaryIO = sys.stdin.buffer  # what follows a request

    def clock(self) -> float:
        """Seconds since boot, suspended time included: no one can set it."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        return time.time()

    def boot_id(self) -> str:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def step(self, name: str) -> None:
        """Called before each durable step; a test cuts the power here."""

    def run(self, argv: list[str], timeout_s: float = 150.0) -> tuple[int, str]:
        """Status and output of a command; 127 if there is none, 124 if it did not end."""
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
            )
        except FileNotFoundError:
            return 127, f"{argv[0]}: not installed"
        except subprocess.TimeoutExpired:
            return 124, f"{argv[0]}: no end after {timeout_s:.0f} s"
        return done.returncode, done.stdout.decode(errors="replace")[-4000:].strip()

    def arm(self, identity: str) -> None:
        """Starts the undo as a unit of its own: no timer that a daemon-reload could fire twice, no child
        of ours.
        """
        argv = ["systemd-run", "--quiet", "--collect", f"--unit=dsnat-undo-{identity}"]
        argv += ["--property=Restart=on-failure", "--property=RestartSec=1", "--property=KillMode=process"]
        status, text = self.run(
            [*argv, sys.executable or "/usr/bin/python3", str(Path(__file__).resolve()), "undo", identity]
        )
        if status != 0:
            raise Refused("failed", f"the undo could not be armed, so nothing was changed: {text}")

    def connected_at(self) -> float | None:
        """When the SSH connection that brought us was opened, in seconds of `clock`; None if there is none.

        The nearest sshd among our ancestors serves this connection alone, and the kernel says when it began:
        nothing that a client could send."""
        pid, ticks = os.getppid(), os.sysconf("SC_CLK_TCK")
        while pid > 1:
            try:
                text = Path(f"/proc/{pid}/stat").read_text()
            except OSError:
                return None
            name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            if name.startswith("sshd"):
                return int(rest[19]) / ticks
            pid = int(rest[1])
        return None

    def engine(self, request: Json, timeout_s: float = 5.0) -> Json:
        """One request to dsnatd's control socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(timeout_s)
            s.connect(self.socket_path)
            s.sendall(json.dumps(request).encode() + b"\n")
            with s.makefile("rb") as lines:
                answer = json.loads(lines.readline(64 << 20) or b"{}")
        if not isinstance(answer, dict) or not answer.get("ok"):
            raise OSError(str(answer.get("error", "no answer")) if isinstance(answer, dict) else "no answer")
        return answer

    def pings(self, address: str, tries: int = 3, wait_s: float = 1.0) -> bool:
        """An ICMP echo and its answer. By hand: the image has no ping, and needs none for this."""
        ours = os.getpid() & 0xFFFF
        for number in range(1, tries + 1):
            body = struct.pack("!BBHHH", 8, 0, 0, ours, number) + b"dsnat-probe "
            total = sum(struct.unpack(f"!{len(body) // 2}H", body))
            total = (total & 0xFFFF) + (total >> 16)
            request = body[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + body[4:]
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s,
            ):
                end = time.monotonic() + wait_s
                s.sendto(request, (address, 0))
                while (left := end - time.monotonic()) > 0:
                    s.settimeout(left)
                    packet, (source, _) = s.recvfrom(1500)
                    start = (packet[0] & 15) * 4
                    if (
                        source == address
                        and packet[start : start + 1] == b"\0"
                        and packet[start + 4 :] == body[4:]
                    ):
                        return True
        return False

    def image_version(self) -> str:
        with contextlib.suppress(OSError):
            for line in Path("/etc/os-release").read_text().splitlines():
                if line.startswith("IMAGE_VERSION="):
                    return line.partition("=")[2].strip('"')
        return ""

    def write_drain(self, on: bool) -> None:
        Path("/run/dsnat-drain").write_text("1\n" if on else "0\n")

    def is_drained(self) -> bool:
        with contextlib.suppress(OSError):
            return Path("/run/dsnat-drain").read_text().strip() not in ("", "0")
        return False

    def announce(self, text: str) -> None:
        """A change was undone: whoever looks at this gateway must see it."""
        for place in ("/dev/console", "/run/motd.d/dsnat"):
            with contextlib.suppress(OSError):
                if place.startswith("/run"):
                    Path(place).parent.mkdir(exist_ok=True)
                Path(place).write_text(f"\ndsnat: {text}\n")

    def log(self, text: str) -> None:
        with contextlib.suppress(OSError):
            import syslog

            syslog.openlog("dsnat-agent", syslog.LOG_PID, syslog.LOG_AUTH)
            syslog.syslog(syslog.LOG_NOTICE, text)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)


# ---- files that survive a power cut
# ----------------------------------------------------------------------------


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
    with os.fdopen(descriptor, "wb") as out:
        os.fchmod(out.fileno(), mode)  # the umask does not decide
        out.write(data)
        out.flush()
        machine.fsync(out.fileno())
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


# ---- what a change asks of the services
# -------------------------------------------------------------------------


def actions_between(old: Json, new: Json) -> list[str]:
    """What has to be done to go from one generation to another, in order. The same list undoes it.

    A manifest says `files` (name -> SHA-256) and `hardware`, a digest of what the engine takes only at its
    start."""
    before, after = old.get("files", {}), new.get("files", {})

    def differs(*starts: str) -> bool:
        return any(
            before.get(n) != after.get(n) for n in before.keys() | after.keys() if n.startswith(starts)
        )

    restart = differs(ENGINE) and (old.get("hardware") != new.get("hardware") or ENGINE not in before)
    actions: list[str] = []
    if differs(ENGINE):
        actions.append("failclosed")  # before anything may forward by the new rules
    if restart:
        actions += ["engine-stop", "nic"]  # a NIC changes its driver only when nobody uses it
    if differs("network/"):
        actions.append("network")
    if restart:
        actions.append("engine-start")
    elif differs(ENGINE):
        actions.append("engine-reload")
    if differs(VRRP):
        actions.append("keepalived")
    if differs("bird.conf"):
        actions.append("bird")
    if differs("chrony/"):
        actions.append("time")
    return actions


class Agent:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.root = machine.root
        self.generations = machine.root / "generations"
        self.pending_file = machine.root / "pending"
        self.lease_file = machine.root / "lease"
        self.history_file = machine.root / "history.jsonl"

    # ---- what is there ----

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
        with contextlib.suppress(OSError):
            for line in self.history_file.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a machine that lost power
                    events.append(json.loads(line))
        return events

    def lease(self) -> Json | None:
        lease = read_json(self.lease_file)
        if lease is None or lease.get("boot_id") != self.machine.boot_id():
            return None
        return lease if lease.get("until", 0) > self.machine.clock() else None

    # ---- requests ----

    def answer(self, request: Json) -> Json:
        if request.get("protocol") != PROTOCOL:
            raise Refused(
                "protocol",
                f"this gateway speaks protocol {PROTOCOL} and was asked in {request.get('protocol')}; "
                f"use a dsnat-fleet that fits its image",
            )
        verbs: dict[str, Callable[[Json], Json]] = {
            "facts": self.facts,
            "stage": self.stage,
            "apply": self.apply,
            "confirm": self.confirm,
            "revert": self.revert,
            "status": self.status,
            "history": lambda r: {"events": self.history()[-_number(r, "last", 20, 1, 10_000) :]},
            "release": self.release,
            "describe": self.describe,
            "drain": self.drain,
            "exec": self.execute,
            "probe": self.probe,
            "receive": self.receive,
            "update": self.update,
            "restart": self.restart,
        }
        verb = verbs.get(str(request.get("do")))
        if verb is None:
            raise Refused("usage", f"there is no request {request.get('do')!r}; there are {', '.join(verbs)}")
        return verb(request)

    def status(self, request: Json) -> Json:
        machine, pending, lease = self.machine, self.pending(), self.lease()
        state: Json = {
            "generation": self.current(),
            "state": "idle" if pending is None else pending.get("state", "unreadable"),
            "boot_id": machine.boot_id(),
            "digest": digest_of_files(self.manifest(self.current()).get("files", {})),
        }
        if pending is not None:
            left = pending.get("deadline", 0) - machine.clock()
            state["pending"] = {k: pending.get(k) for k in ("generation", "base", "owner", "plan")}
            state["pending"]["deadline_in_s"] = (
                round(left, 1) if pending.get("boot_id") == state["boot_id"] else 0
            )
        if lease is not None:
            state["lease"] = {
                "owner": lease["owner"],
                "ends_in_s": round(lease["until"] - machine.clock(), 1),
            }
        last = next(
            (e for e in reversed(self.history()) if e.get("event") in ("confirmed", "reverted")), None
        )
        state["last"] = last
        return state

    def facts(self, request: Json) -> Json:
        """All that a plan, a status page and a health gate need, in one round trip."""
        machine = self.machine
        state = self.status(request)
        manifest = self.manifest(state["generation"])
        here = self.generations / str(state["generation"])
        files: Json = {}
        for name in sorted(manifest.get("files", {}).keys() | _files_below(here)):
            try:
                data = (here / name).read_bytes()
            except OSError:
                continue
            files[name] = {"sha256": digest(data), "text": _without_secrets(data.decode(errors="replace"))}
        said = manifest.get("files", {})
        drift = sorted(n for n in said.keys() | files.keys() if said.get(n) != files.get(n, {}).get("sha256"))
        units = ("dsnatd", "dsnat-nic", "dsnat-failclosed", "keepalived", "bird", "systemd-networkd")
        _, active = machine.run(["systemctl", "is-active", *(f"{u}.service" for u in units)], 10.0)
        state.update(
            agent=VERSION,
            host=os.uname().nodename,
            uptime_s=round(machine.clock(), 1),
            image=machine.image_version(),
            manifest={k: v for k, v in manifest.items() if k != "files"},
            files=files,
            drift=drift,
            units=dict(zip(units, active.split(), strict=False)),
            addresses=self._addresses(),
            drained=machine.is_drained(),
            engine=self._engine_facts(request.get("shows", ["pools"])),
        )
        return state

    def _engine_facts(self, shows: Any) -> Json:
        """Never fails: what the engine does not say is missing, and `error` says why."""
        found: Json = {}
        try:
            found["status"] = self.machine.engine({"cmd": "status"})
            for what in shows if isinstance(shows, list) else []:
                found[str(what)] = self.machine.engine({"cmd": "show", "what": str(what)})
        except (OSError, ValueError) as error:
            found["error"] = str(error)
        return found

    def _addresses(self) -> Json:
        status, text = self.machine.run(["ip", "-j", "address", "show"], 10.0)
        found: Json = {}
        if status == 0:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                for link in json.loads(text):
                    found[link["ifname"]] = [a["local"] for a in link.get("addr_info", []) if "local" in a]
        return found

    def stage(self, request: Json) -> Json:
        """Writes a generation beside the others and lets the image's own programs judge it. Changes
        nothing live.
        """
        files = _files(request)
        with self._alone(request) as owner:
            base = self._unchanged(request)
            number = max(self.numbers()) + 1
            directory = self.generations / f".new-{secrets.token_hex(4)}"
            sums = {name: digest(data) for name, (data, _) in files.items()}
            manifest: Json = {
                "schema": SCHEMA,
                "base": base,
                "owner": owner,
                "plan": _text(request, "plan"),
                "staged_at": self.machine.wall(),
                "hardware": _text(request, "hardware"),
                "vrrp": [str(a) for a in request.get("vrrp", [])],
                "interfaces": [str(i) for i in request.get("interfaces", [])],
                "by_hand": [str(n) for n in request.get("by_hand", [])],  # files that no fleet.yaml asked for
                "health_s": _number(request, "health_s", 30, 1, 180),
                "files": sums,
            }
            try:
                self._write_generation(directory, files, manifest)
                self._validate(directory, sums, manifest["interfaces"])
                self.machine.step("rename generation")
                directory.rename(self.generations / str(number))
                sync_directory(self.machine, self.generations)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
            self._hold_lease(owner)
            self._prune({base, number})
            return {
                "generation": number,
                "base": base,
                "digest": digest_of_files(sums),
                "files": sums,
                "actions": actions_between(self.manifest(base), manifest),
            }

    def apply(self, request: Json) -> Json:
        """Arms the undo, then makes a staged (or older) generation the live one."""
        machine = self.machine
        with self._alone(request) as owner:
            base = self._unchanged(request)
            generation = _number(request, "generation", -1, 0, 1 << 31)
            window_s = float(_number(request, "window_s", 60, *map(int, WINDOW_S)))
            manifest = self._whole(generation)
            if digest_of_files(manifest["files"]) != request.get("digest"):
                raise Refused("stale", f"generation {generation} is not the one that was planned; plan again")
            if generation == base:
                raise Refused("usage", f"generation {generation} is live already")
            pending: Json = {
                "id": secrets.token_hex(4),
                "state": "armed",
                "generation": generation,
                "base": base,
                "owner": owner,
                "plan": _text(request, "plan"),
                "actions": actions_between(self.manifest(base), manifest),
                "boot_id": machine.boot_id(),
                "deadline": machine.clock() + APPLY_MAX_S + window_s,
            }
            self._write_pending(pending)
            try:
                machine.arm(pending["id"])
            except Refused:
                self._forget_pending()
                raise
            self._record("applied", pending, to=generation)
            self._point_at(generation)
            done = self._act(pending["actions"], manifest)
            health = self._health(manifest) if all(a["ok"] for a in done) else []
            failed = [a for a in done if not a["ok"]] + [h for h in health if not h["ok"]]
            if failed:
                reason = f"{failed[0]['name']}: {failed[0]['text']}"
                self._undo(pending, reason)
                return {
                    "state": "reverted",
                    "generation": base,
                    "reason": reason,
                    "actions": done,
                    "health": health,
                }
            pending.update(state="live", live_at=machine.clock(), deadline=machine.clock() + window_s)
            self._write_pending(pending)
            self._hold_lease(owner)
            return {
                "state": "live",
                "generation": generation,
                "window_s": window_s,
                "actions": done,
                "health": health,
            }

    def confirm(self, request: Json) -> Json:
        """Keeps the change. Only a connection that the change itself let in may say so."""
        machine = self.machine
        generation = _number(request, "generation", -1, 0, 1 << 31)
        with self._locked():
            pending = self.pending()
            if pending is None:
                last = self.status({})["last"] or {}
                if last.get("event") == "reverted" and last.get("tried") == generation:
                    raise Refused("reverted", f"generation {generation} was undone: {last.get('reason')}")
                if self.current() == generation:
                    return {"state": "confirmed", "generation": generation, "again": True}
                raise Refused("stale", f"no change to generation {generation} is pending")
            if pending.get("generation") != generation:
                raise Refused("stale", f"generation {pending.get('generation')} is pending, not {generation}")
            if pending.get("state") != "live" or self.current() != generation:
                raise Refused("busy", f"generation {generation} is not live yet")
            if pending["boot_id"] != machine.boot_id() or machine.clock() >= pending["deadline"]:
                raise Refused("reverted", f"too late: the time to confirm generation {generation} is over")
            opened = machine.connected_at()
            if opened is None or opened <= pending["live_at"]:
                raise Refused(
                    "usage",
                    "a change is confirmed by a new connection, opened after it went live; dial again",
                )
            witnesses = request.get("witnesses", {})
            return self._keep(pending, witnesses if isinstance(witnesses, dict) else {})

    def _keep(self, pending: Json, witnesses: Json) -> Json:
        self._forget_pending()  # from here on it stays
        self._record("confirmed", pending, witnesses=witnesses)
        self._drop_lease()
        with contextlib.suppress(OSError):
            Path("/run/motd.d/dsnat").unlink()
        return {"state": "confirmed", "generation": pending["generation"]}

    def change(self, request: Json) -> Json:
        """Some files of the live generation, changed by a command on the gateway itself (ipvsadm): staged,
        applied and kept in one go. No connection is at stake that could fail to come back; a service that
        does not take the change undoes it as ever.
        """
        base = self.current()
        live, here = self.manifest(base), self.generations / str(base)
        files: Json = {
            name: {"text": (here / name).read_text(), "mode": (here / name).stat().st_mode & 0o777}
            for name in live["files"]
        }
        given = request.get("files", {})
        common: Json = {"owner": request.get("owner"), "base": base, "plan": "by hand"}
        kept: Json = {key: live[key] for key in ("hardware", "vrrp", "interfaces", "health_s") if key in live}
        by_hand = sorted({*live.get("by_hand", []), *given})
        staged = self.stage({**common, **kept, "files": files | given, "by_hand": by_hand})
        wanted = {"generation": staged["generation"], "digest": staged["digest"]}
        try:
            applied = self.apply({**common, **wanted})
        except Refused:
            self.release(request)
            raise
        if applied["state"] != "live":
            self.release(request)
            return applied
        with self._locked():
            pending = self.pending()
            if pending is None or pending.get("generation") != staged["generation"]:
                raise Refused("reverted", "the change was undone before it could be kept")
            return self._keep(pending, {})

    def revert(self, request: Json) -> Json:
        """Undoes the pending change now."""
        with self._locked():
            pending = self.pending()
            if pending is None:
                raise Refused("usage", "no change is pending; to go back further, apply an older generation")
            wanted = request.get("generation")
            if wanted is not None and pending.get("generation") != wanted:
                raise Refused("stale", f"generation {pending.get('generation')} is pending, not {wanted}")
            return self._undo(pending, _text(request, "reason") or "an operator asked for it")

    def describe(self, request: Json) -> Json:
        """A generation that is on this gateway, live or not."""
        generation = _number(request, "generation", -1, 0, 1 << 31)
        manifest = self._whole(generation)
        return {"generation": generation, "digest": digest_of_files(manifest["files"]), "manifest": manifest}

    def drain(self, request: Json) -> Json:
        """keepalived watches a file: anything but 0 in it is a fault, and the peer takes over. Gone after
        a reboot.
        """
        on = request.get("on")
        if not isinstance(on, bool):
            raise Refused("usage", '"on" must be true or false')
        self.machine.write_drain(on)
        self.machine.log(f"{'drained' if on else 'no longer drained'} owner={_text(request, 'owner')}")
        return {"drained": on}

    # ---- a new image ----

    def receive(self, request: Json) -> Json:
        """A part of an image, which follows the request as it is. It counts only when it arrived whole."""
        name, size = request.get("name"), _number(request, "size", -1, 1, 8 << 30)
        if not isinstance(name, str) or not re.fullmatch(UPDATE_FILES, name):
            raise Refused("usage", f"{name!r} is not a part of an image")
        with self._alone(request):
            folder = self.machine.updates
            folder.mkdir(mode=0o755, exist_ok=True)
            for old in folder.glob(".*.part"):
                old.unlink()  # of a transfer that was cut; we hold the lock
            free = shutil.disk_usage(folder).free
            if free < size + (64 << 20):
                raise Refused(
                    "failed", f"{folder} has {free >> 20} MiB free and {name} needs {size >> 20} MiB"
                )
            part, sha256, left = folder / f".{name}.part", hashlib.sha256(), size
            with part.open("wb") as out:
                while left and (data := self.machine.payload.read(min(left, 1 << 20))):
                    out.write(data)
                    sha256.update(data)
                    left -= len(data)
                out.flush()
                self.machine.fsync(out.fileno())
            if left or sha256.hexdigest() != request.get("sha256"):
                part.unlink()
                raise Refused("failed", f"{name} did not arrive whole; send it again")
            part.replace(folder / name)
            sync_directory(self.machine, folder)
            return {"name": name}

    def update(self, request: Json) -> Json:
        """Writes the received version to the slot that does not run."""
        version = _text(request, "version")
        if not re.fullmatch(r"[0-9A-Za-z.~+-]{1,64}", version):
            raise Refused("usage", f"{version!r} is not a version")
        with self._alone(request):
            status, text = self.machine.run(["systemd-sysupdate", "update", version], 850.0)
            if status == 0:
                status, text = self.machine.run(["systemd-sysupdate", "list", version], 60.0)
            for part in self.machine.updates.glob(f"gateway_{version}.*"):
                part.unlink()
            if status != 0:
                raise Refused("failed", f"systemd-sysupdate could not write {version}: {text}")
            self.machine.log(f"image {version} written owner={request['owner']}")
            return {"version": version}

    def restart(self, request: Json) -> Json:
        """Restarts the machine, not while a change waits to be confirmed: that would undo it."""
        with self._alone(request) as owner:
            self._drop_lease()
            self.machine.log(f"restart owner={owner}")
            status, text = self.machine.run(["systemctl", "reboot", "--no-block"], 30.0)
            if status != 0:
                raise Refused("failed", f"it could not be restarted: {text}")
            return {}

    def probe(self, request: Json) -> Json:
        """Which of these addresses answer a ping: out by the engine's ports and back in, as hosts'
        packets go.
        """
        found: Json = {}
        for text in request.get("addresses", []):
            if not isinstance(text, str) or not re.fullmatch(r"[0-9.]{7,15}", text):
                raise Refused("usage", f"{text!r} is not an address to ping")
            found[text] = self.machine.pings(text)
        return {"answers": found}

    def execute(self, request: Json) -> Json:
        """A command that only reads, from a list; nothing of it goes through a shell."""
        argv = request.get("argv")
        if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv) or not argv:
            raise Refused("usage", "the request holds no command")
        if not any(re.fullmatch(pattern, " ".join(argv)) for pattern in READING):
            raise Refused("usage", f"{' '.join(argv)} is not one of the commands that only read")
        status, output = self.machine.run(argv, 20.0)
        return {"status": status, "output": output}

    def release(self, request: Json) -> Json:
        """Gives the lease back, when nothing is pending."""
        with self._locked():
            lease = self.lease()
            if lease is not None and lease["owner"] == request.get("owner") and self.pending() is None:
                self._drop_lease()
            return {}

    # ---- the undo ----

    def boot(self) -> Json:
        """Before any service starts: an unconfirmed change does not survive a restart of the machine."""
        with self._locked():
            pending = self.pending()
            if pending is None:
                return {"state": "idle"}
            return self._undo(pending, "the gateway restarted before the change was confirmed", act=False)

    def undo(self, identity: str) -> Json:
        """Waits for the deadline of one change. Ends at once when that change is no longer pending."""
        machine = self.machine
        while True:
            pending = self.pending()
            if pending is None or pending.get("id") != identity:
                return {"state": "settled"}
            late = machine.clock() >= pending["deadline"]
            if late or pending["state"] == "armed":
                # Whoever applies holds the lock until the change is live: with the lock and still armed,
                # it died.
                with contextlib.suppress(Refused), self._locked(wait_s=1.0):
                    pending = self.pending()
                    if pending is not None and pending.get("id") == identity:
                        if pending["state"] == "armed":
                            return self._undo(pending, "the agent died while it applied the change")
                        if machine.clock() >= pending["deadline"]:
                            return self._undo(pending, "nobody confirmed it in time")
            machine.sleep(min(1.0, max(0.05, pending["deadline"] - machine.clock())) if pending else 0.05)

    def _undo(self, pending: Json, reason: str, *, act: bool = True) -> Json:
        """Safe to repeat from any point: the link, the services, the record, and `pending` last."""
        numbers = self.numbers()
        base = pending.get("base")
        if (
            base not in numbers
        ):  # an unreadable `pending`: the newest that somebody confirmed, else the image's own
            kept = [e["generation"] for e in self.history() if e.get("event") == "confirmed"]
            base = next((n for n in reversed(kept) if n in numbers), min(numbers))
        manifest = self.manifest(base)
        self._point_at(base)
        done: list[Json] = []
        if act:
            actions = pending.get("actions") or actions_between({"files": {}}, manifest)
            done = self._act(actions, manifest)
            ill = [a for a in done if not a["ok"]] or [h for h in self._health(manifest) if not h["ok"]]
            bad = ill[0]["text"] if ill else None
        else:
            bad = None
        more = {"after": bad} if bad else {}
        self._record("reverted", pending, to=base, reason=reason, **more)
        self._forget_pending()
        self._drop_lease()
        self.machine.announce(
            f"generation {pending.get('generation')} was undone, generation {base} is live again: {reason}"
        )
        return {"state": "reverted", "generation": base, "reason": reason, "actions": done, **more}

    # ---- steps ----

    def _write_generation(self, directory: Path, files: dict[str, tuple[bytes, int]], manifest: Json) -> None:
        directory.mkdir(mode=0o755)
        (directory / "network").mkdir()  # networkd is led here, also when there is nothing in it
        for name, (data, mode) in files.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            write(self.machine, path, data, mode)
        write(
            self.machine,
            directory / "generation.json",
            json.dumps(manifest, indent=1, sort_keys=True).encode(),
        )
        for below in directory.iterdir():
            if below.is_dir():
                sync_directory(self.machine, below)

    def _validate(self, directory: Path, files: dict[str, str], interfaces: list[str]) -> None:
        problems: list[str] = []
        if ENGINE in files:
            status, text = self.machine.run(["dsnatd", "--check", str(directory / ENGINE)], 60.0)
            if status != 0:
                problems.append(text or f"dsnatd --check ended with {status}")
        if VRRP in files:
            # keepalived calls a missing and an empty file valid, and wants the interfaces to be there:
            # they are, as
            # taps of a network namespace that ends with the command.
            path = directory / VRRP
            script = (
                'for i in "$@"; do ip tuntap add "$i" mode tap || exit 90; done; exec keepalived -t -f "$0"'
            )
            status, text = self.machine.run(
                ["unshare", "-n", "sh", "-c", script, str(path), *interfaces], 30.0
            )
            if status != 0 or path.stat().st_size == 0:
                problems.append(text or f"keepalived -t ended with {status}")
        if "bird.conf" in files:
            status, text = self.machine.run(["bird", "-p", "-c", str(directory / "bird.conf")], 30.0)
            if status != 0:
                problems.append(text or f"bird -p ended with {status}")
        if problems:
            text = "\n".join(problems).replace(f"{directory}/", "")
            raise Refused("invalid", f"the gateway's own programs refuse the configuration:\n{text}")

    def _whole(self, generation: int) -> Json:
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

    def _point_at(self, generation: int) -> None:
        new = self.generations / f".current-{secrets.token_hex(4)}"
        new.symlink_to(str(generation))
        self.machine.step("switch")
        new.replace(self.generations / "current")
        sync_directory(self.machine, self.generations)

    def _act(self, actions: list[str], target: Json) -> list[Json]:
        """Plays a list of actions so that the services run what `target` says. All of it, also after a
        failure.
        """
        has = target.get("files", {})

        def service(verb: str, unit: str) -> tuple[int, str]:
            return self.machine.run(["systemctl", verb, f"{unit}.service"])

        def engine_reload() -> tuple[int, str]:
            if ENGINE not in has:
                return service("stop", "dsnatd")
            _, text = service("is-active", "dsnatd")
            if text != "active":
                return service("restart", "dsnatd")
            try:
                self.machine.engine({"cmd": "reload"}, 30.0)
            except (OSError, ValueError) as error:
                return 1, str(error)
            return 0, ""

        todo: dict[str, Callable[[], tuple[int, str]]] = {
            "failclosed": lambda: service("reload-or-restart", "dsnat-failclosed"),
            "engine-stop": lambda: service("stop", "dsnatd"),
            "nic": lambda: service("reload-or-restart", "dsnat-nic"),
            "network": lambda: self.machine.run(["networkctl", "reload"], 30.0),
            "engine-start": lambda: service("restart" if ENGINE in has else "stop", "dsnatd"),
            "engine-reload": engine_reload,
            # Reloaded, never restarted while it runs: a restart lets the addresses go.
            "keepalived": lambda: service("reload-or-restart" if VRRP in has else "stop", "keepalived"),
            "bird": lambda: service("reload-or-restart" if "bird.conf" in has else "stop", "bird"),
            "time": lambda: (0, self.machine.run(["chronyc", "reload", "sources"], 10.0)[1]),
        }
        done: list[Json] = []
        for name in actions:
            self.machine.step(f"act {name}")
            status, text = todo[name]() if name in todo else (1, f"this agent knows no action {name}")
            done.append({"name": name, "ok": status == 0, "text": text or f"exit status {status}"})
        return done

    def _health(self, target: Json) -> list[Json]:
        """Waits for the services to be well, not longer than the generation says."""
        files = target.get("files", {})
        end = self.machine.clock() + float(target.get("health_s", 30))
        checks: dict[str, Callable[[], str | None]] = {}
        if ENGINE in files:
            checks["engine"] = self._engine_ill
        if VRRP in files:
            checks["keepalived"] = lambda: self._unit_ill("keepalived")
        if "bird.conf" in files:
            checks["bird"] = lambda: self._unit_ill("bird")
        found: list[Json] = []
        for name, ill in checks.items():
            while (text := ill()) is not None and self.machine.clock() < end:
                self.machine.sleep(0.25)
            found.append({"name": f"health of {name}", "ok": text is None, "text": text or "well"})
        return found

    def _engine_ill(self) -> str | None:
        try:
            self.machine.engine({"cmd": "status"})
        except (OSError, ValueError) as error:
            return f"dsnatd does not answer on its control socket ({error})"
        return None

    def _unit_ill(self, unit: str) -> str | None:
        _, text = self.machine.run(["systemctl", "is-active", f"{unit}.service"], 10.0)
        return None if text == "active" else f"{unit}.service is {text}"

    def _prune(self, keep: set[int]) -> None:
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

    # ---- who may ----

    @contextlib.contextmanager
    def _locked(self, wait_s: float = 10.0) -> Iterator[None]:
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

    @contextlib.contextmanager
    def _alone(self, request: Json) -> Iterator[str]:
        """Locked, nothing pending, and the lease is ours or nobody's."""
        owner = _text(request, "owner")
        if not owner:
            raise Refused("usage", "the request does not say who asks (owner)")
        with self._locked():
            pending = self.pending()
            if pending is not None:
                over = pending.get("boot_id") != self.machine.boot_id()
                if over or self.machine.clock() >= pending.get("deadline", 0):
                    self._undo(pending, "nobody confirmed it in time")  # its own undo was lost
                else:
                    raise Refused(
                        "locked",
                        f"generation {pending.get('generation')} of {pending.get('owner')} "
                        "waits to be confirmed",
                        owner=pending.get("owner"),
                    )
            lease = self.lease()
            if lease is not None and lease["owner"] != owner:
                left = round(lease["until"] - self.machine.clock())
                raise Refused(
                    "locked",
                    f"{lease['owner']} is changing this gateway (for {left} s more)",
                    owner=lease["owner"],
                )
            yield owner

    def _unchanged(self, request: Json) -> int:
        base = self.current()
        if request.get("base") != base:
            raise Refused(
                "stale", f"generation {base} is live, the plan was made for {request.get('base')}; plan again"
            )
        return base

    def _hold_lease(self, owner: str) -> None:
        lease = {"owner": owner, "until": self.machine.clock() + LEASE_S, "boot_id": self.machine.boot_id()}
        write(self.machine, self.lease_file, json.dumps(lease).encode(), 0o600)

    def _drop_lease(self) -> None:
        self.lease_file.unlink(missing_ok=True)

    def _write_pending(self, pending: Json) -> None:
        write(self.machine, self.pending_file, json.dumps(pending, sort_keys=True).encode(), 0o600)

    def _forget_pending(self) -> None:
        self.machine.step("forget pending")
        self.pending_file.unlink(missing_ok=True)
        sync_directory(self.machine, self.root)

    def _record(self, event: str, pending: Json, *, to: int | None = None, **more: Any) -> None:
        """A line of history, and the audit line in the journal."""
        tried = pending.get("generation")
        line = {
            "event": event,
            "generation": tried if to is None else to,
            "tried": tried,
            "base": pending.get("base"),
            "owner": pending.get("owner"),
            "plan": pending.get("plan"),
            "at": self.machine.wall(),
            **more,
        }
        self.machine.step(f"record {event}")
        descriptor = os.open(self.history_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, json.dumps(line, sort_keys=True).encode() + b"\n")
            self.machine.fsync(descriptor)
        finally:
            os.close(descriptor)
        why = f": {more['reason']}" if "reason" in more else ""
        self.machine.log(
            f"{event} generation {line['generation']} owner={line['owner']} "
            f"plan={line['plan']} tried={tried}{why}"
        )


# ---- requests as values
# -----------------------------------------------------------------------------------------


def _number(request: Json, key: str, default: int, low: int, high: int) -> int:
    value = request.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused("usage", f'"{key}" must be a whole number from {low} to {high}')
    return value


def _text(request: Json, key: str) -> str:
    """One printable line: it goes into the journal."""
    value = request.get(key, "")
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise Refused("usage", f'"{key}" must be a line of text')
    return value


def _files(request: Json) -> dict[str, tuple[bytes, int]]:
    given = request.get("files")
    if not isinstance(given, dict) or not given:
        raise Refused("usage", "the request holds no files")
    files: dict[str, tuple[bytes, int]] = {}
    for name, file in given.items():
        if not FILE_NAMES.fullmatch(name) or not isinstance(file, dict):
            raise Refused("usage", f"{name!r} is not a file of a generation")
        text, mode = file.get("text"), file.get("mode", 0o644)
        if not isinstance(text, str) or mode not in (0o600, 0o640, 0o644):
            raise Refused("usage", f"{name}: the text or the mode is missing or wrong")
        files[name] = (text.encode(), mode)
    return files


def _files_below(directory: Path) -> set[str]:
    names = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    return {name for name in names if FILE_NAMES.fullmatch(name)}


def _without_secrets(text: str) -> str:
    return re.sub(r"(?m)^(\s*auth_pass\s+)\S.*$", r"\1(secret)", text)


def _read_request() -> Json:
    """One line; what follows it, if anything, is the request's payload."""
    raw = sys.stdin.buffer.readline(REQUEST_MAX + 1)
    try:
        request = json.loads(raw) if len(raw) <= REQUEST_MAX else None
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise Refused("usage", "a request is one line with a JSON object on standard input")
    return request


def main() -> int:
    """Without arguments: a request on standard input. With one: for units of the gateway and for its
    console.
    """
    # The change must not stop half-way because it cut the connection that ordered it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.umask(0o022)
    root = Path(os.environ.get("DSNAT_ROOT", "/var/lib/dsnat"))
    agent = Agent(Machine(root, os.environ.get("DSNAT_SOCKET", "/run/dsnatd/control.sock")))
    local: dict[str, Callable[[], Json]] = {
        "status": lambda: agent.status({}),
        "history": lambda: {"events": agent.history()},
        "revert": lambda: agent.revert({"reason": "asked for on the console"}),
        "boot": agent.boot,
        "change": lambda: agent.change(_read_request()),
    }
    try:
        arguments = sys.argv[1:]
        if not arguments:
            result = agent.answer(_read_request())
        elif arguments[0] == "undo" and len(arguments) == 2:
            result = agent.undo(arguments[1])
        elif arguments[0] in local and len(arguments) == 1:
            result = local[arguments[0]]()
        else:
            raise Refused(
                "usage", f"usage: agent [{' | '.join(local)} | undo ID], or a request on standard input"
            )
        answer = {"protocol": PROTOCOL, "ok": True, "result": result}
    except Refused as refused:
        answer = {
            "protocol": PROTOCOL,
            "ok": False,
            "error": {"kind": refused.kind, "text": str(refused), **refused.more},
        }
    except OSError as error:
        answer = {
            "protocol": PROTOCOL,
            "ok": False,
            "error": {"kind": "failed", "text": f"on the gateway: {error}"},
        }
    with contextlib.suppress(OSError):  # nobody may be listening any more
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
