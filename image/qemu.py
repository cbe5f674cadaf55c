"""What QEMU is told, and what this host must have for it.

The command line is a function of the machine (boot.py) and of two descriptors, its ends of the monitor and of
the guest's ready port. Nothing is started here; what QEMU needs beside the image, the firmware's variables
and the credentials, is put into the machine's folder.
"""

from __future__ import annotations

import base64
import re
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from image.boot import Machine

QEMU = "qemu-system-x86_64"
FIRMWARE_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
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


class BootError(Exception):
    """A machine that could not be started or did not get ready; the text ends with the console's last
    lines.
    """


class NeedsError(Exception):
    """This host lacks something; the text says what to do."""


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


def command_of(machine: Machine, overlay: Path, qmp_fd: int, ready_fd: int, *, kvm: bool) -> list[str]:
    if kvm:
        accelerator = ["-accel", "kvm", "-cpu", "host"]
        extra_command_line = EXTRA_COMMAND_LINE
    else:
        accelerator = ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", TCG_CPU]
        extra_command_line = EXTRA_COMMAND_LINE + TCG_COMMAND_LINE
    command = [] if machine.outlive_us else ["setpriv", "--pdeathsig", "KILL"]
    command += [
        *machine.qemu,
        "-name",
        machine.folder.name,
        "-M",
        "q35,hpet=off" + (",kernel-irqchip=split" if machine.iommu else ""),
        *accelerator,
        "-smp",
        str(machine.cpus),
        "-m",
        str(machine.memory_mib),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-chardev",
        f"socket,id=qmp,fd={qmp_fd}",
        "-mon",
        "chardev=qmp,mode=control",
        "-chardev",
        f"file,id=serial,path={machine.serial},append=on",
        "-serial",
        "chardev:serial",
        "-global",
        "ICH9-LPC.disable_s3=1",
        "-object",
        "rng-random,id=rng,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng,addr=0x10",
    ]
    if not machine.reboot:
        command.append("-no-reboot")
    if machine.iommu:
        command += ["-device", "intel-iommu,intremap=on,device-iotlb=on"]
    command += first_program(machine, extra_command_line)
    command += [
        "-drive",
        # what a guest has flushed to a disk that is kept survives the end of QEMU
        f"if=none,id=disk,file={overlay},format=qcow2,discard=unmap,cache=unsafe"
        if machine.disk is None
        else f"if=none,id=disk,file={machine.disk},format=raw,discard=unmap,cache=writeback",
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
    if machine.management:
        command += ["-netdev", "user,id=mgmt,restrict=on,hostfwd=tcp:127.0.0.1:0-:22"]
        command += ["-device", f"virtio-net-pci,netdev=mgmt,mac={machine.management_mac},addr=0x2,romfile="]
    command += [*credentials(machine), *data_nics(machine)]
    return [*command, *machine.extra]


def first_program(machine: Machine, extra_command_line: str) -> list[str]:
    """The firmware, with variables of this machine's own; or the kernel itself."""
    if machine.firmware:
        variables = machine.folder / "firmware-vars.fd"
        shutil.copyfile(FIRMWARE_VARS, variables)
        return [
            "-drive",
            f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE_CODE}",
            "-drive",
            f"if=pflash,format=raw,unit=1,file={variables}",
        ]
    stem = machine.image.with_suffix("")
    line = f"{kernel_command_line(Path(f'{stem}.efi'))} {extra_command_line}"
    return ["-kernel", f"{stem}.vmlinuz", "-initrd", f"{stem}.initrd", "-append", line]


def credentials(machine: Machine) -> list[str]:
    """By file: a private host key stands in no list of processes. The files end with the folder, so that
    qemu.sh there can be run again.
    """
    command: list[str] = []
    if machine.identity is None:
        return command
    folder = machine.folder / "credentials"
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, text in machine.identity.credentials().items():
        encoded = base64.b64encode(text.encode()).decode()
        path = folder / name
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(f"io.systemd.credential.binary:{name}={encoded}")  # a line's end would be part of it
        command += ["-smbios", f"type=11,path={str(path).replace(',', ',,')}"]
    return command


def data_nics(machine: Machine) -> list[str]:
    command: list[str] = []
    for number, nic in enumerate(machine.nics):
        fds = f"fd={nic.fds[0]}" if len(nic.fds) == 1 else f"fds={':'.join(map(str, nic.fds))}"
        # the virtual functions of two igb in neighbouring slots would overlap
        slot = 3 + number * (2 if nic.model == "igb" else 1)
        device = f"{nic.model},netdev=data{number},mac={nic.mac},addr={slot:#x},romfile="
        if nic.model == "virtio-net-pci":
            device += ",disable-legacy=on"
            if machine.iommu:
                device += ",iommu_platform=on,ats=on"
            if len(nic.fds) > 1:
                device += f",mq=on,vectors={2 * len(nic.fds) + 2}"
        command += ["-netdev", f"tap,id=data{number},{fds}", "-device", device]
    return command


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


def quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\\''") + "'"
