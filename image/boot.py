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

/dev/kvm may exist and not work (it opens, then hangs), so once per machine something tiny is booted with it.

Exit status: 0 ended by the operator or, with --check, ready; 1 did not get ready; 2 wrong usage; 3
something is missing.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from image.build import BUILD, PROFILES, BuildError, image_path
from image.identity import Identity, make_identity

QEMU = "qemu-system-x86_64"
FIRMWARE_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
MANAGEMENT_MAC = "52:54:00:d5:00:02"
READY_PORT = "org.dsnat.ready"

# Progress on the console in place of silence, and time enough for an emulated CPU. A signed UKI under
# Secure Boot ignores this; elsewhere the stub adds it to the command line.
EXTRA_COMMAND_LINE = (
    "systemd.show_status=yes systemd.default_timeout_start_sec=300 systemd.default_device_timeout_sec=300 "
    "mitigations=off"
)
# An emulated guest's TSC is that of the host and good, but the kernel measures it against ticks that come
# late and gives it up for the ACPI timer. That one wraps every 4.7 s: guests of a host that was busy for
# longer were seen with a clock that went in circles, for good.
TCG_COMMAND_LINE = " tsc=reliable"
# Without cmpxchg16b: the guest's kernel was seen to fault twice in kmem_cache_alloc right behind one, the low
# bits of its pointer in place of the flags. The emulation is the suspect; the kernel can do without.
TCG_CPU = "max,-cx16"
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
KVM_S = 5.0  # a working KVM needs far less for seven instructions

EXIT_FAILED = 1
EXIT_NEEDS = 3


class BootError(Exception):
    """A machine that could not be started or did not get ready; the text ends with the console's last
    lines.
    """


class NeedsError(Exception):
    """This host lacks something; the text says what to do."""


# --- KVM or not -----------------------------------------------------------------------------------


def kvm_works(memory: Path = BUILD / "kvm.json") -> bool:
    """Boot seven instructions with KVM, at most once for a kernel and a QEMU: on some hosts the first one
    hangs.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    qemu = shutil.which(QEMU)
    if qemu is None:
        return False
    key = f"{os.uname().release} {Path(qemu).stat().st_mtime_ns}"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memory.read_text())
        if known["key"] == key:
            return bool(known["works"])
    # mov al,42; out 0xf4,al; hlt; jmp back. The debug device makes QEMU exit with 2 * 42 + 1.
    sector = bytes.fromhex("b02ae6f4f4ebfd").ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile(prefix="dsnat-kvm-") as disk:
        disk.write(sector)
        disk.flush()
        command = [
            QEMU,
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            "32",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-device",
            "isa-debug-exit,iobase=0xf4",
            "-drive",
            f"file={disk.name},format=raw,readonly=on",
        ]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as vm:
            try:
                works = vm.wait(KVM_S) == 85
            except subprocess.TimeoutExpired:
                vm.kill()
                works = False
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps({"key": key, "works": works}) + "\n")
    return works


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
            command = self._command(overlay, qmp_end.fileno(), ready_end.fileno())
            fds = [qmp_end.fileno(), ready_end.fileno(), *(fd for nic in self.nics for fd in nic.fds)]
            (self.folder / "qemu.sh").write_text(
                "#!/bin/sh\n# how it was started; file descriptors are the starter's\nexec "
                + " \\\n\t".join(map(_quoted, command))
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

    def _command(self, overlay: Path, qmp_fd: int, ready_fd: int) -> list[str]:
        if kvm_works():
            accelerator = ["-accel", "kvm", "-cpu", "host"]
            extra_command_line = EXTRA_COMMAND_LINE
        else:
            accelerator = ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", TCG_CPU]
            extra_command_line = EXTRA_COMMAND_LINE + TCG_COMMAND_LINE
        command = [] if self.outlive_us else ["setpriv", "--pdeathsig", "KILL"]
        command += [
            *self.qemu,
            "-name",
            self.folder.name,
            "-M",
            "q35,hpet=off" + (",kernel-irqchip=split" if self.iommu else ""),
            *accelerator,
            "-smp",
            str(self.cpus),
            "-m",
            str(self.memory_mib),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-chardev",
            f"socket,id=qmp,fd={qmp_fd}",
            "-mon",
            "chardev=qmp,mode=control",
            "-chardev",
            f"file,id=serial,path={self.serial},append=on",
            "-serial",
            "chardev:serial",
            "-global",
            "ICH9-LPC.disable_s3=1",
            "-object",
            "rng-random,id=rng,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=rng,addr=0x10",
        ]
        if not self.reboot:
            command.append("-no-reboot")
        if self.iommu:
            command += ["-device", "intel-iommu,intremap=on,device-iotlb=on"]
        if self.firmware:
            variables = self.folder / "firmware-vars.fd"
            shutil.copyfile(FIRMWARE_VARS, variables)
            command += [
                "-drive",
                f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE_CODE}",
                "-drive",
                f"if=pflash,format=raw,unit=1,file={variables}",
            ]
        else:
            stem = self.image.with_suffix("")
            line = f"{kernel_command_line(Path(f'{stem}.efi'))} {extra_command_line}"
            command += ["-kernel", f"{stem}.vmlinuz", "-initrd", f"{stem}.initrd", "-append", line]
        command += [
            "-drive",
            # what a guest has flushed to a disk that is kept survives the end of QEMU
            f"if=none,id=disk,file={overlay},format=qcow2,discard=unmap,cache=unsafe"
            if self.disk is None
            else f"if=none,id=disk,file={self.disk},format=raw,discard=unmap,cache=writeback",
            "-device",
            "virtio-blk-pci,drive=disk,bootindex=1,addr=0x11",
            "-device",
            "virtio-serial-pci,addr=0x12",
            "-chardev",
            f"socket,id=ready,fd={ready_fd}",
            "-device",
            f"virtserialport,chardev=ready,name={READY_PORT}",
            "-smbios",
            f"type=11,value=io.systemd.stub.kernel-cmdline-extra={extra_command_line}",
        ]
        if self.management:
            command += ["-netdev", "user,id=mgmt,restrict=on,hostfwd=tcp:127.0.0.1:0-:22"]
            command += ["-device", f"virtio-net-pci,netdev=mgmt,mac={MANAGEMENT_MAC},addr=0x2,romfile="]
        if self.identity is not None:
            for name, text in self.identity.credentials().items():
                encoded = base64.b64encode(text.encode()).decode()
                command += ["-smbios", f"type=11,value=io.systemd.credential.binary:{name}={encoded}"]
        for number, nic in enumerate(self.nics):
            fds = f"fd={nic.fds[0]}" if len(nic.fds) == 1 else f"fds={':'.join(map(str, nic.fds))}"
            # the virtual functions of two igb in neighbouring slots would overlap
            slot = 3 + number * (2 if nic.model == "igb" else 1)
            device = f"{nic.model},netdev=data{number},mac={nic.mac},addr={slot:#x},romfile="
            if nic.model == "virtio-net-pci":
                device += ",disable-legacy=on"
                if self.iommu:
                    device += ",iommu_platform=on,ats=on"
                if len(nic.fds) > 1:
                    device += f",mq=on,vectors={2 * len(nic.fds) + 2}"
            command += ["-netdev", f"tap,id=data{number},{fds}", "-device", device]
        return [*command, *self.extra]

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


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\\''") + "'"


def kernel_command_line(uki: Path) -> str:
    """The .cmdline section of a UKI, which is a PE file."""
    data = uki.read_bytes()
    (pe,) = struct.unpack_from("<I", data, 0x3C)
    sections, optional = struct.unpack_from("<H", data, pe + 6)[0], struct.unpack_from("<H", data, pe + 20)[0]
    for number in range(sections):
        at = pe + 24 + optional + 40 * number
        name = data[at : at + 8].rstrip(b"\0")
        size, _, _, offset = struct.unpack_from("<IIII", data, at + 8)
        if name == b".cmdline":
            return data[offset : offset + size].decode().strip("\0\n ")
    raise BootError(f"{uki} has no .cmdline section; it is not a unified kernel image")


def check_needs(image: Path, *, firmware: bool) -> None:
    wanted = {
        QEMU: "qemu-system-x86",
        "qemu-img": "qemu-utils",
        "setpriv": "util-linux",
        "ssh-keygen": "openssh-client",
    }
    missing = [package for program, package in wanted.items() if not shutil.which(program)]
    if firmware and not FIRMWARE_CODE.exists():
        missing.append("ovmf")
    if missing:
        raise NeedsError(
            f"missing tools; run: apt-get install -y --no-install-recommends {' '.join(missing)}"
        )
    if not image.exists():
        raise NeedsError(f"{image} is not there; run `make image` first")


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
        print(f"boot: log in with: {' '.join(map(_quoted, machine.ssh_command(key)))}")
        print("boot: Ctrl-C ends the machine; its changes are thrown away", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while machine._process is not None and machine._process.poll() is None:
                time.sleep(1)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m image.boot", description="Boot the gateway image in QEMU."
    )
    parser.add_argument(
        "image", nargs="?", type=Path, help="raw image (default: the one that make image built)"
    )
    parser.add_argument("--profile", choices=PROFILES, default="cloud", help="which built image")
    parser.add_argument("--folder", type=Path, help="where overlay, logs and key go (default: .build/boot)")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--cpus", type=int, default=2)
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


if __name__ == "__main__":
    sys.exit(main())
