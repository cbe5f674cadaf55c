"""All that the agent needs of the gateway it runs on: clock, commands, power, who connected.

A test replaces this class and nothing else; what the others do is then exactly what a gateway does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from .protocol import Json, Refused


class Machine:
    """All that the agent needs of the gateway it runs on."""

    drain_file = Path(os.environ.get("DSNAT_DRAIN", "/run/dsnat-drain"))  # keepalived and announce look here
    kept = Path(os.environ.get("DSNAT_KEPT", "/var/lib/dsnat/identity"))  # SSH host keys, on disk
    identity = Path(os.environ.get("DSNAT_IDENTITY", "/run/dsnat-identity"))  # and the one that sshd shows
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

    def arm(self, identity: str, verb: str = "undo") -> None:
        """Starts the undo as a unit of its own: no timer that a daemon-reload could fire twice, no child
        of ours.
        """
        argv = ["systemd-run", "--quiet", "--collect", f"--unit=dsnat-{verb}-{identity}"]
        argv += ["--property=Restart=on-failure", "--property=RestartSec=1", "--property=KillMode=process"]
        ours = str(Path(__file__).resolve().with_name("__main__.py"))
        status, text = self.run([*argv, sys.executable or "/usr/bin/python3", ours, verb, identity])
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

    def adverts(self, ids: set[int], wait_s: float) -> dict[int, str]:
        """Who says that it is master: the sender of a VRRP advert for each of these ids, if one came in time.
        Read beside keepalived, so that it is evidence and not what keepalived believes.
        """
        heard: dict[int, str] = {}
        end = time.monotonic() + wait_s
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 112) as s:
            while ids - heard.keys() and (left := end - time.monotonic()) > 0:
                s.settimeout(left)
                try:
                    packet, (source, _) = s.recvfrom(1500)
                except TimeoutError:
                    break
                body = packet[(packet[0] & 15) * 4 :]
                if len(body) >= 8 and body[0] in (0x21, 0x31) and body[1] in ids:  # type 1, version 2 or 3
                    heard[body[1]] = source
        return heard

    def on_trial(self) -> bool:
        """A new image that its own health check has not found well yet."""
        return self.run(["/usr/lib/systemd/systemd-bless-boot", "status"], 10.0)[1] == "indeterminate"

    def image_version(self) -> str:
        with contextlib.suppress(OSError):
            for line in Path("/etc/os-release").read_text().splitlines():
                if line.startswith("IMAGE_VERSION="):
                    return line.partition("=")[2].strip('"')
        return ""

    def write_drain(self, on: bool) -> None:
        self.drain_file.write_text("1\n" if on else "0\n")

    def is_drained(self) -> bool:
        with contextlib.suppress(OSError):
            return self.drain_file.read_text().strip() not in ("", "0")
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
