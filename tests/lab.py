"""A lab: network namespaces, the wires between them, and the programs that run inside.

Everything a lab makes has a name with the process id in it and goes on one ExitStack, which unwinds in
reverse, also when set-up fails half-way. No namespace has a route out, so nothing a test sends can leave the
machine. A lab whose process was killed with SIGKILL leaves its namespaces behind; `sweep` removes those (and
only those: the process id is dead).

Programs in a namespace belong to the lab: they log to a file, and end with it. Nothing here naps for luck:
`wait_until` polls a state against a deadline and says what it waited for.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


class LabError(Exception):
    """One sentence: what did not work, and where its log is."""


def run(argv: Sequence[str], *, timeout_s: float = 30, check: bool = True, stdin: str = "") -> str:
    """Runs a command and returns what it printed. A failure shows the command and the end of its errors."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, input=stdin, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{shlex.join(argv)}` did not end within {timeout_s:g} s") from error
    except FileNotFoundError as error:
        raise LabError(f"`{argv[0]}` is not installed; run `make setup`") from error
    if check and done.returncode:
        text = (done.stderr or done.stdout).strip()[-2000:]
        raise LabError(f"`{shlex.join(argv)}` ended with status {done.returncode}: {text}")
    return done.stdout


def wait_until(what: str, ready: Callable[[], T | None], *, deadline_s: float = 20) -> T:
    """Returns the first value of `ready()` that is true; after the deadline says what it waited for."""
    end = time.monotonic() + deadline_s
    while True:
        value = ready()
        if value:
            return value
        if time.monotonic() > end:
            raise LabError(f"waited {deadline_s:g} s in vain for {what}")
        time.sleep(0.05)


class Program:
    """A program of the lab in its own process group, with everything it says in `log`."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        errors: Path | None = None,
        pass_fds: Sequence[int] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.argv, self.log = list(argv), log
        with log.open("wb") as out, (errors or Path(os.devnull)).open("wb") as err:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err if errors else out,
                start_new_session=True,
                pass_fds=pass_fds,
                env=env,
            )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, *, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"`{self.argv[0]}` did not end within {timeout_s:g} s; log: {self.log}") from error

    def stop(self, *, grace_s: float = 10) -> None:
        """Asks with SIGTERM, insists with SIGKILL after `grace_s`. The whole group: nginx has children."""
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
                break
        with suppress(ProcessLookupError):  # children that outlived their parent
            os.killpg(self.process.pid, signal.SIGKILL)


class Netns:
    """One network namespace. `run` and `start` are `ip netns exec` with a deadline and a log."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name

    def argv(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *argv]

    def ip(self, line: str) -> str:
        return run(["ip", "-n", self.name, *line.split()])

    def run(self, *argv: str, timeout_s: float = 30, check: bool = True) -> str:
        return run(self.argv(*argv), timeout_s=timeout_s, check=check)

    def start(self, *argv: str, log: str, errors: str = "") -> Program:
        directory = self.lab.directory
        program = Program(self.argv(*argv), directory / log, errors=directory / errors if errors else None)
        self.lab.undo.callback(program.stop)
        return program

    def addresses(self) -> list[dict[str, Any]]:
        parsed: list[dict[str, Any]] = json.loads(self.run("ip", "-j", "address"))
        return parsed

    def wait_for_listener(self, program: Program, port: int, *, udp: bool = False) -> None:
        """Until somebody listens on `port`, or `program` has ended."""

        def ready() -> bool:
            if not program.running:
                raise LabError(f"`{shlex.join(program.argv)}` ended at once: {program.text()[-1000:]}")
            return bool(self.run("ss", "-Hln", "-u" if udp else "-t", f"sport = :{port}").strip())

        wait_until(f"a listener on port {port} in {self.name}", ready)

    def inside(self, job: Callable[[], T]) -> T:
        """Calls `job` on a thread that has entered this namespace (a thread has its own)."""
        result: list[T] = []
        failure: list[BaseException] = []

        def body() -> None:
            try:
                with Path("/run/netns", self.name).open() as handle:
                    if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), f"cannot enter network namespace {self.name}")
                result.append(job())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def open_tap(self, name: str, *, flags: int = IFF_VNET_HDR) -> int:
        """Makes a tap device here; its descriptor works from any namespace, so QEMU can stay outside."""

        def job() -> int:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | flags)
            fcntl.ioctl(fd, TUNSETIFF, request)
            return fd

        fd = self.inside(job)
        self.lab.undo.callback(os.close, fd)
        return fd


class Lab:
    """Makes namespaces and wires. `directory` takes the logs of its programs."""

    def __init__(self, undo: ExitStack, directory: Path, *, tag: str = "dsnat") -> None:
        self.undo, self.directory = undo, directory
        self.prefix = f"{tag}-{os.getpid()}-{next(_serial)}"
        directory.mkdir(parents=True, exist_ok=True)

    def netns(self, side: str) -> Netns:
        name = f"{self.prefix}-{side}"
        run(["ip", "netns", "add", name])
        self.undo.callback(run, ["ip", "netns", "delete", name], check=False)
        space = Netns(self, name)
        space.ip("link set lo up")
        # quiet wires: the kernel's own IPv6 chatter would be packets that no test sent
        space.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        return space

    def wire(self, left: Netns, left_name: str, right: Netns, right_name: str) -> None:
        """A veth pair, both ends up. Checksums are finished before a packet enters: what copies packets sees
        them whole.
        """
        ends = f"name {left_name} netns {left.name} type veth peer name {right_name} netns {right.name}"
        run(["ip", "link", "add", *ends.split()])
        for space, name in ((left, left_name), (right, right_name)):
            space.run(
                "ethtool", "-K", name, "tx", "off", "tso", "off", "gso", "off", "gro", "off", check=False
            )
            space.ip(f"link set {name} up")

    def bridge(self, space: Netns, name: str, *ports: str) -> None:
        space.ip(f"link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
        for port in ports:
            space.ip(f"link set {port} master {name}")
            space.ip(f"link set {port} up")
        space.ip(f"link set {name} up")


@contextmanager
def new_lab(directory: Path) -> Iterator[Lab]:
    sweep()
    with ExitStack() as undo:
        yield Lab(undo, directory)


def sweep() -> None:
    """Removes namespaces of labs whose process is dead (SIGKILL, power): nobody else can."""
    for line in run(["ip", "netns", "list"]).splitlines():
        name = line.split()[0] if line.strip() else ""
        match = re.fullmatch(r"dsnat-(\d+)-\d+-[a-z]+", name)
        if match and not Path("/proc", match[1]).exists():
            for pid in run(["ip", "netns", "pids", name], check=False).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run(["ip", "netns", "delete", name], check=False)


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


_serial = _count()
