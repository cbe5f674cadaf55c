"""Boot the image in QEMU, without a window: `python -m image.boot [IMAGE]`, or class Machine in a test or
the demo.

A machine is a throw-away: the disk is a qcow2 overlay of the image, everything it writes is in its own
folder, and it ends with the process that started it. It has

* a management NIC (PCI slot 2) on QEMU's user network, closed to the outside (restrict=on), whose port 22
  is forwarded from a free port of 127.0.0.1;
* data NICs from PCI slot 3 on (0000:00:03.0, 0000:00:04.0, ...), each a TAP device given as open file
  descriptors, so that QEMU needs no rights in the network namespace where the other end lives;
* an identity, as SMBIOS strings; its serial console in serial.log; a virtio-serial port on which the guest
  itself says that it is ready. Nothing else counts as ready: not a banner, not a prompt.

Waiting is by progress and not by the clock alone: a boot fails at once when the console shows a panic,
emergency mode or a unit that failed, and otherwise after 120 s without a sign of life; the error carries
the console's last lines.

Exit status: 0 ended by the operator or, with --check, ready; 1 did not get ready; 2 wrong usage; 3
something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from image.build import BUILD, PROFILES, BuildError, image_path
from image.identity import Identity, make_identity
from image.kvm import kvm_works
from image.qemu import QEMU, BootError, NeedsError, check_needs, command_of, quoted

MANAGEMENT_MAC = "52:54:00:d5:00:02"

HOPELESS = re.compile(
    r"Kernel panic|You are in emergency mode|Failed to start|Failed to mount|\[FAILED\]"
    r"|verity: .*corrupted|BdsDxe: No bootable option|No bootable device"
)
# A CPU of QEMU 7.2's parallel emulation was seen to run an int3 that was no longer there: the kernel had put
# it into code that it was changing, had taken it out again, and knew nothing of it any more. The bytes that
# the panic shows are the new ones. No real CPU does that, so such a machine is started again, once.
STALE_CODE = "Oops: int3"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|[\r\x00-\x08\x0b-\x1f]")

LOOK_S = 1.0  # between two looks at a guest's console

EXIT_FAILED = 1
EXIT_NEEDS = 3


# --- a data NIC -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nic:
    """A data NIC: one open TAP descriptor per queue pair. `model` is a QEMU device, such as e1000e or
    vmxnet3.
    """

    fds: tuple[int, ...]
    mac: str
    model: str = "virtio-net-pci"


def open_tap(name: str, *, queues: int = 1) -> tuple[int, ...]:
    """Make TAP device `name` here and give its descriptors. It may then be moved to another network
    namespace with `ip link set NAME netns ...`; the descriptors stay its other end, and it ends when they
    are closed.
    """
    iff_tap, iff_no_pi, iff_vnet_hdr, iff_multi_queue, tunsetiff = 0x0002, 0x1000, 0x4000, 0x0100, 0x400454CA
    flags = iff_tap | iff_no_pi | iff_vnet_hdr | (iff_multi_queue if queues > 1 else 0)
    fds = []
    try:
        for _ in range(queues):
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            fcntl.ioctl(fds[-1], tunsetiff, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise BootError(
            f"TAP device {name} cannot be made: {error.strerror}; is there another one of that name?"
        ) from error
    return tuple(fds)


# --- the machine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """What the guest said when it was up, and how long it took since QEMU was started."""

    seconds: float
    report: Mapping[str, Any]


@dataclass
class Machine:
    """One QEMU. Use it in a `with` statement: leaving ends the QEMU (by process id) and the TAP descriptors
    are the caller's to close.
    """

    image: Path
    folder: Path
    identity: Identity | None = None
    nics: Sequence[Nic] = ()
    memory_mib: int = 1024
    cpus: int = 2
    firmware: bool = (
        True  # False: kernel and initrd are given to QEMU, which saves the firmware's ten seconds
    )
    iommu: bool = False  # True: vfio-pci in the guest; False: uio_pci_generic
    disk_gib: int = 4
    disk: Path | None = None  # boot this disk or file and keep what is written; no overlay of `image`
    management: bool = True  # False: no management NIC, nobody can log in
    management_mac: str = MANAGEMENT_MAC
    reboot: bool = False  # False: QEMU ends when the guest reboots, so that a panic is seen
    outlive_us: bool = False
    extra: Sequence[str] = ()
    qemu: Sequence[str] = (QEMU,)  # another one than the machine's own
    ssh_port: int = field(default=0, init=False)
    started: float = field(default=0.0, init=False)
    _heard: bytes = field(default=b"", init=False)  # from the guest, not looked at yet
    _seen: int = field(default=0, init=False)  # of the console, at the last word of the guest
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _qmp: socket.socket | None = field(default=None, init=False)
    _ready: socket.socket | None = field(default=None, init=False)
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def serial(self) -> Path:
        return self.folder / "serial.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        check_needs(self.image, firmware=self.firmware)
        self.folder.mkdir(parents=True, exist_ok=True)
        overlay = self.folder / "disk.qcow2"
        if self.disk is None:
            overlay.unlink(missing_ok=True)
            backing = ("-F", "raw", "-b", str(self.image.resolve()))
            argv = ("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay), f"{self.disk_gib}G")
            subprocess.run(argv, check=True)
        self.serial.write_bytes(b"")
        with contextlib.ExitStack() as undo:
            self._qmp, qmp_end = socket.socketpair()
            self._ready, ready_end = socket.socketpair()
            for ours in (self._qmp, self._ready):
                undo.callback(ours.close)
            command = command_of(self, overlay, qmp_end.fileno(), ready_end.fileno(), kvm=kvm_works())
            fds = [qmp_end.fileno(), ready_end.fileno(), *(fd for nic in self.nics for fd in nic.fds)]
            (self.folder / "qemu.sh").write_text(
                "#!/bin/sh\n# how it was started; file descriptors are the starter's\nexec "
                + " \\\n\t".join(map(quoted, command))
                + "\n"
            )
            self.started = time.monotonic()
            with (self.folder / "qemu.log").open("wb") as log:
                # A Ctrl-C is for us: we end QEMU, so it is in a session of its own.
                self._process = subprocess.Popen(
                    command,
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            undo.callback(self._end_process)
            qmp_end.close()
            ready_end.close()
            self._qmp.settimeout(30)
            self._handshake()
            if self.management:
                self.ssh_port = self._forwarded_port()
            self._undo = undo.pop_all()

    # -- talking to QEMU --

    def _handshake(self) -> None:
        try:
            self._receive()  # the greeting
            self.qmp("qmp_capabilities")
        except OSError as error:
            raise BootError(f"QEMU did not start: {self._qemu_said()}") from error

    def _receive(self) -> dict[str, Any]:
        assert self._qmp is not None
        line = b""
        while not line.endswith(b"\n"):
            got = self._qmp.recv(65536)
            if not got:
                raise ConnectionError("QEMU closed its monitor")
            line += got
        answer: dict[str, Any] = json.loads(line.splitlines()[-1])
        return answer

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run one monitor command and give its result; events in between are skipped."""
        assert self._qmp is not None
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._receive()
            if "error" in answer:
                raise BootError(f"QEMU refused {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def _forwarded_port(self) -> int:
        table = self.qmp("human-monitor-command", **{"command-line": "info usernet"})
        match = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", table)
        if not match:
            raise BootError(f"QEMU shows no forwarded port: {table}")
        return int(match[1])

    def _qemu_said(self) -> str:
        said = (self.folder / "qemu.log").read_text(errors="replace").strip()
        return said.splitlines()[-1] if said else f"it ended without a word; see {self.folder / 'qemu.sh'}"

    # -- waiting --

    def wait_ready(self, *, silence_s: float = 120, deadline_s: float = 900, forgive: bool = False) -> Ready:
        """Wait for the guest's own word: the first, or after a restart (`reboot`) the next.

        Raises BootError as soon as it is clear that it will not come; with `forgive`, a panic or a failed
        unit on the way is not such a sign.
        """
        assert self._ready is not None
        assert self._process is not None
        asked = last_progress = time.monotonic()
        seen = self._seen
        again = not kvm_works()
        while True:
            if select.select([self._ready], [], [], LOOK_S)[0]:
                self._heard += self._ready.recv(65536)
            if b"\n" in self._heard:
                line, _, self._heard = self._heard.partition(b"\n")
                report = json.loads(line)
                if not report["ready"]:
                    raise self._failure(f"the gateway is up but not well: {report['reason']}")
                self._seen = len(self.console())
                return Ready(round(time.monotonic() - self.started, 1), report)
            now = time.monotonic()
            console = self.console()
            if len(console) > seen:
                if not forgive and (match := HOPELESS.search(console, max(self._seen, seen - 80))):
                    if again and STALE_CODE in console[self._seen : match.start()]:
                        print(
                            f"boot: {self.folder.name} ran code of before a change; started again", flush=True
                        )
                        self.qmp("set-action", reboot="reset")
                        self.qmp("system_reset")
                        again, self._seen = False, len(self.console())
                    else:
                        whole = console[console.rfind("\n", 0, match.start()) + 1 :].split("\n", 1)[0]
                        raise self._failure(f"the console says: {whole.strip()}")
                seen, last_progress = len(console), now
            if self._process.poll() is not None:
                raise self._failure(f"QEMU ended with status {self._process.returncode}: {self._qemu_said()}")
            if now - last_progress > silence_s:
                raise self._failure(f"nothing on the console for {silence_s:.0f} s")
            if now - asked > deadline_s:
                raise self._failure(f"not ready after {deadline_s:.0f} s")

    def console(self) -> str:
        return ESCAPES.sub("", self.serial.read_text(errors="replace"))

    def _failure(self, what: str) -> BootError:
        lines = [line for line in self.console().splitlines() if line.strip()][-20:]
        shown = "\n".join(f"    {line}" for line in lines) or "    (nothing at all)"
        return BootError(
            f"{self.folder.name} did not get ready: {what}; the whole console is {self.serial}, "
            f"its end:\n{shown}"
        )

    # -- the end --

    def stop(self) -> None:
        self._undo.close()

    def _end_process(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()  # QEMU ends cleanly on SIGTERM
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def detach(self) -> int:
        """Leave the machine running after us (needs outlive_us); gives its process id."""
        pid = self.pid
        self._undo.pop_all()
        return pid

    # -- SSH --

    def ssh_command(self, key: Path, *words: str) -> list[str]:
        """An ssh command that knows the host key from the identity and never asks."""
        assert self.identity is not None
        known = self.folder / "known_hosts"
        known.write_text(self.identity.known_hosts("127.0.0.1", self.ssh_port))
        return [
            "ssh",
            "-q",
            "-F",
            "none",
            "-i",
            str(key),
            "-p",
            str(self.ssh_port),
            "-o",
            f"UserKnownHostsFile={known}",
            "-o",
            "StrictHostKeyChecking=yes",
            "-o",
            "BatchMode=yes",
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "ConnectTimeout=30",
            "root@127.0.0.1",
            *words,
        ]

    def ssh(self, key: Path, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.ssh_command(key, *words), capture_output=True, text=True, timeout=timeout_s
        )


@contextlib.contextmanager
def one_boot_at_a_time(lock: Path = Path("/run/lock/dsnat-boot.lock")) -> Iterator[None]:
    """Two emulated cold boots on a small host starve each other's timers and may wedge a guest."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- by hand --------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    image = options.image or image_path(options.profile)
    folder = options.folder or BUILD / "boot"
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "id_ed25519"
    if not key.exists():
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "make boot", "-f", str(key)], check=True
        )
    identity = make_identity("gateway", key.with_suffix(".pub").read_text(), management=MANAGEMENT_MAC)
    machine = Machine(
        image,
        folder,
        identity,
        memory_mib=options.memory,
        cpus=options.cpus,
        firmware=not options.direct,
        iommu=options.iommu,
    )
    with machine:
        how = "KVM" if kvm_works() else "emulated (TCG)"
        print(f"boot: QEMU is process {machine.pid}, {how}; console in {machine.serial}", flush=True)
        ready = machine.wait_ready()
        print(f"boot: ready after {ready.seconds} s: {json.dumps(ready.report)}")
        if options.check:
            return 0
        print(f"boot: log in with: {' '.join(map(quoted, machine.ssh_command(key)))}")
        print("boot: Ctrl-C ends the machine; its changes are thrown away", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while machine._process is not None and machine._process.poll() is None:
                time.sleep(1)
    return 0


def positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m image.boot", description="Boot the gateway image in QEMU."
    )
    parser.add_argument(
        "image", nargs="?", type=Path, help="raw image (default: the one that make image built)"
    )
    parser.add_argument("--profile", choices=PROFILES, default="cloud", help="which built image")
    parser.add_argument("--folder", type=Path, help="where overlay, logs and key go (default: .build/boot)")
    parser.add_argument("--memory", type=positive, default=1024, metavar="MIB")
    parser.add_argument("--cpus", type=positive, default=2)
    parser.add_argument(
        "--direct", action="store_true", help="kernel and initrd straight to QEMU, no firmware"
    )
    parser.add_argument("--iommu", action="store_true", help="with an emulated IOMMU")
    parser.add_argument("--check", action="store_true", help="exit 0 as soon as it is ready")
    parser.add_argument("--debug", action="store_true", help="show a traceback")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("boot: interrupted; the machine has ended", file=sys.stderr)
        return 130
    except (BootError, NeedsError, BuildError) as error:
        if options.debug:
            raise
        print(f"boot: {error}", file=sys.stderr)
        return EXIT_NEEDS if isinstance(error, NeedsError) else EXIT_FAILED
    except (OSError, subprocess.SubprocessError) as error:  # a full disk, a folder that is not ours
        if options.debug:
            raise
        print(f"boot: {error}; mend this, or name another --folder", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
