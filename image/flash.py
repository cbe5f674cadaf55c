"""Write the image to a disk: `python -m image.flash /dev/sdX`.

In order, each step only when the one before went well:

1. refuse: what is not a whole disk, is too small, read-only, mounted, used for swap, or under this running
   system;
2. show model, serial and size, and ask once: the last four characters of the serial (of the name, without a
   serial);
3. write with bmaptool by the block map, so that only blocks with data travel, showing rate and time left;
4. read back from the device and compare every mapped range with the checksum in the block map;
5. with --gateway: write that gateway's identity (image/identity.py) as credentials to the ESP, and its
   public host key into fleet.yaml, so that the fleet tool knows the gateway before it first boots.

The old partition table is destroyed first and the new one counts only when all is there, so an interrupted
run leaves a disk that does not boot instead of half a gateway; run it again. `--image FILE.zst` streams;
the .bmap is beside it.

Exit status: 0 written and compared, 1 failed, 2 wrong usage, 3 refused or something is missing, 130
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from image.build import PROFILES, BuildError, image_path, tool
from image.identity import Identity, make_identity
from provision.load import replace_text

BLKFLSBUF = 0x1261
BLKRRPART = 0x125F
ESP_TYPE = bytes.fromhex(
    "28732ac11ff8d211ba4b00a0c93ec93b"
)  # c12a7328-f81f-11d2-ba4b-00a0c93ec93b, as on the disk
SECTOR = 512
GROW_BYTES = 512 << 20  # room that /var gets at least

EXIT_FAILED = 1
EXIT_REFUSED = 3


class FlashError(BuildError):
    """As there: one sentence, and the exit status it deserves."""


def refused(message: str) -> FlashError:
    return FlashError(message, status=EXIT_REFUSED)


# --- the disk -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    path: Path
    model: str
    serial: str
    bytes: int

    @property
    def confirmation(self) -> str:
        return (self.serial or self.path.name)[-4:]

    def __str__(self) -> str:
        model, serial = self.model or "no model name", self.serial or "unknown"
        return f"{self.path}: {model}, serial {serial}, {self.bytes / 1e9:.1f} GB"


def lsblk(path: Path) -> dict[str, Any]:
    columns = "NAME,TYPE,SIZE,RO,MODEL,SERIAL,MOUNTPOINTS,FSTYPE"
    done = subprocess.run(
        ["lsblk", "--json", "--bytes", "--paths", "-o", columns, str(path)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise refused(f"{path} is not a block device; lsblk lists the disks of this machine")
    device: dict[str, Any] = json.loads(done.stdout)["blockdevices"][0]
    return device


def tree(device: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield device
    for child in device.get("children", ()):
        yield from tree(child)


def examine(path: Path, wanted_bytes: int) -> Disk:
    """The disk, if it may be overwritten; otherwise FlashError says why not."""
    path = path.resolve()
    device = lsblk(path)
    if device["type"] not in ("disk", "loop"):
        raise refused(f"{path} is a {device['type']}, not a whole disk; name the disk that it is on")
    if device["ro"]:
        raise refused(f"{path} is read-only; is there a switch on it?")
    for part in tree(device):
        mounts = [mount for mount in part.get("mountpoints") or () if mount]
        if mounts:
            raise refused(
                f"{part['name']} is in use at {mounts[0]}; unmount it if it really is the disk you mean"
            )
        if part is not device and part["type"] not in ("part",):
            raise refused(
                f"{part['name']} ({part['type']}) is active on {path}; "
                "stop it if this really is the disk you mean"
            )
    if list(Path(f"/sys/class/block/{path.name}/holders").glob("*")):
        raise refused(
            f"{path} is part of another device (RAID or mapper); it looks like a disk of this system"
        )
    size = int(device["size"])
    if size < wanted_bytes:
        raise refused(
            f"{path} has {size / 1e9:.2f} GB, the image needs {wanted_bytes / 1e9:.2f} GB; take a larger disk"
        )
    return Disk(path, (device.get("model") or "").strip(), (device.get("serial") or "").strip(), size)


# --- the block map --------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockMap:
    path: Path
    image_bytes: int
    block_bytes: int
    ranges: tuple[tuple[int, int, str], ...]  # first block, last block, SHA-256

    @property
    def mapped_bytes(self) -> int:
        return sum(last - first + 1 for first, last, _ in self.ranges) * self.block_bytes


def read_block_map(path: Path) -> BlockMap:
    try:
        top = ET.parse(path).getroot()
        if (top.findtext("ChecksumType") or "").strip() != "sha256":
            raise ValueError("its checksums are not SHA-256")
        ranges = []
        for element in top.iterfind("BlockMap/Range"):
            first, _, last = (element.text or "").strip().partition("-")
            ranges.append((int(first), int(last or first), element.attrib["chksum"]))
        sizes = [int((top.findtext(name) or "").strip()) for name in ("ImageSize", "BlockSize")]
    except (OSError, ET.ParseError, ValueError, KeyError) as error:
        raise refused(
            f"{path} is not a usable block map ({error}); `make image` writes one beside the image"
        ) from error
    return BlockMap(path, sizes[0], sizes[1], tuple(ranges))


def find_block_map(image: Path) -> BlockMap:
    stem = image.name.removesuffix(".zst")
    for name in (f"{stem.removesuffix('.raw')}.bmap", f"{stem}.bmap", f"{image.name}.bmap"):
        if (image.parent / name).exists():
            return read_block_map(image.parent / name)
    raise refused(f"{image} has no block map beside it; copy the .bmap file along with the image")


# --- writing and comparing ------------------------------------------------------------------------


class Progress:
    """One line on a terminal, a line now and then in a log."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.start, self.shown = what, total, time.monotonic(), 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        every = 0.2 if sys.stdout.isatty() else 10.0
        if done < self.total and now - self.shown < every:
            return
        self.shown = now
        rate = done / max(now - self.start, 0.001)
        left = (self.total - done) / rate if rate else 0
        end = "\r" if sys.stdout.isatty() and done < self.total else "\n"
        print(
            f"flash: {self.what} {100 * done / max(self.total, 1):5.1f} %  {rate / 1e6:6.1f} MB/s"
            f"  {left:4.0f} s left ",
            end=end,
            flush=True,
        )


def erase_ends(disk: Disk) -> None:
    """No old table at either end: a half-written disk must not boot, neither as this nor as what it was."""
    with disk.path.open("r+b", buffering=0) as device:
        for at in (0, disk.bytes - (1 << 20)):
            device.seek(at)
            device.write(bytes(1 << 20))
        os.fsync(device.fileno())


def write(image: Path, block_map: BlockMap, disk: Disk) -> None:
    """bmaptool writes; how far it is we ask the kernel (its own progress pipe is broken in Debian 12)."""
    progress = Progress("writing", block_map.mapped_bytes)
    erase_ends(disk)
    command = ["bmaptool", "--quiet", "copy", "--bmap", str(block_map.path), str(image), str(disk.path)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,
    ):
        try:
            while process.poll() is None:
                progress(min(written(process.pid), block_map.mapped_bytes - 1))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        except BaseException:
            process.terminate()
            raise
        log.seek(0)
        said = log.read().strip().splitlines()
    if process.returncode != 0:
        raise FlashError(
            f"bmaptool could not write {disk.path}: {said[-1] if said else 'it gave no reason'}; "
            "the disk does not boot now, run this again"
        )
    progress(block_map.mapped_bytes)


def written(pid: int) -> int:
    """Bytes that a process has handed to write() so far."""
    with contextlib.suppress(OSError):
        match = re.search(r"^wchar: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
        return int(match[1]) if match else 0
    return 0


def compare(block_map: BlockMap, disk: Disk) -> None:
    """Read every mapped range back from the device itself and compare it with the image's checksum."""
    progress, done = Progress("comparing", block_map.mapped_bytes), 0
    with disk.path.open("rb", buffering=0) as device:
        fcntl.ioctl(device, BLKFLSBUF)
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for first, last, wanted in block_map.ranges:
            digest = hashlib.sha256()
            at, end = (
                first * block_map.block_bytes,
                min((last + 1) * block_map.block_bytes, block_map.image_bytes),
            )
            device.seek(at)
            while at < end:
                data = device.read(min(4 << 20, end - at))
                if not data:
                    raise FlashError(f"{disk.path} cannot be read at byte {at}; take another disk")
                digest.update(data)
                at, done = at + len(data), done + len(data)
                progress(done)
            if digest.hexdigest() != wanted:
                raise FlashError(
                    f"{disk.path} gives back other data than was written in blocks {first}-{last}; "
                    "take another disk"
                )


# --- identity -------------------------------------------------------------------------------------


def esp_offset(path: Path) -> int:
    """Where the ESP begins on the disk, in bytes, from its GPT."""
    with path.open("rb") as device:
        device.seek(SECTOR)
        header = device.read(92)
        if header[:8] != b"EFI PART":
            raise FlashError(f"{path} has no GPT; was it flashed?")
        entries, count, size = struct.unpack_from("<QII", header, 72)
        device.seek(entries * SECTOR)
        table = device.read(count * size)
    for at in range(0, count * size, size):
        if table[at : at + 16] == ESP_TYPE:
            (first,) = struct.unpack_from("<Q", table, at + 32)
            return int(first) * SECTOR
    raise FlashError(f"{path} has no EFI system partition; was it flashed?")


def write_identity(path: Path, identity: Identity) -> None:
    """Credentials go to /loader/credentials on the ESP; the boot stub hands them to systemd.

    They are files of systemd-creds without a key of their own: whoever holds the disk can read them, as
    they could a key on any disk that is not encrypted. With Secure Boot, systemd takes none that is not
    sealed to the TPM.
    """
    target = f"{path}@@{esp_offset(path)}"
    with tempfile.TemporaryDirectory(prefix="dsnat-identity-") as folder:
        for name, text in identity.credentials().items():
            plain, sealed = Path(folder) / "plain", Path(folder) / f"{name}.cred"
            plain.write_text(text)
            run(
                tool("systemd-creds", "encrypt", "--with-key=null", f"--name={name}", str(plain), str(sealed))
            )
            plain.unlink()
        environment = os.environ | {"MTOOLS_SKIP_CHECK": "1"}
        for folder_name in ("::/loader", "::/loader/credentials"):
            subprocess.run(
                tool("mmd", "-i", target, "-D", "s", folder_name),
                env=environment,
                capture_output=True,
                stdin=subprocess.DEVNULL,
            )
        files = [str(file) for file in sorted(Path(folder).glob("*.cred"))]
        run(tool("mcopy", "-o", "-i", target, *files, "::/loader/credentials/"), env=environment)
    with path.open("rb") as device:
        os.fsync(device.fileno())


def run(command: Sequence[str], *, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip().splitlines()
        raise FlashError(f"the identity could not be written: {said[-1] if said else command[0]}")


def record_host_key(fleet: Path, gateway: str, public: str, *, only_check: bool = False) -> None:
    """Put the public host key into fleet.yaml, keeping comments and layout."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    try:
        document = yaml.load(fleet.read_text())
        entry = document["gateways"][gateway]
    except OSError as error:
        raise refused(f"{fleet}: {error.strerror}; name the fleet file with --fleet") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise refused(f"{fleet} is not valid YAML; dsnat-fleet validate says where") from error
    except (KeyError, TypeError) as error:
        raise refused(
            f"{fleet} has no gateway {gateway}; add it first, its host_key is filled in by this command"
        ) from error
    if only_check:
        return
    entry["host_key"] = " ".join(public.split()[:2])
    text = io.StringIO()
    yaml.dump(document, text)
    replace_text(fleet, text.getvalue())


# --- the command ----------------------------------------------------------------------------------


def confirm(disk: Disk, given: str | None) -> None:
    print(f"flash: {disk}")
    if given is None:
        if not sys.stdin.isatty():
            raise refused(
                f"nobody is there to ask; say --confirm {disk.confirmation} if this is the disk you mean"
            )
        given = input(f"flash: everything on it will be lost. Type {disk.confirmation} to go on: ")
    if given.strip() != disk.confirmation:
        raise refused(f"that was not {disk.confirmation}; nothing was written")


def flash(options: argparse.Namespace) -> None:
    if os.geteuid() != 0:
        raise refused("writing to a disk needs root; run it with sudo")
    for program, package in {"bmaptool": "bmap-tools", "lsblk": "util-linux"}.items():
        if not shutil.which(program):
            raise refused(f"{program} is missing; run: apt-get install -y --no-install-recommends {package}")
    image = options.image or Path(f"{image_path(options.profile)}.zst")
    if not image.exists():
        raise refused(f"{image} is not there; run `make image` first")
    block_map = find_block_map(image)
    identity = None
    if options.gateway:
        if not (options.fleet and options.authorized_keys and options.management_mac):
            raise FlashError(
                "--gateway needs --fleet, --authorized-keys and --management-mac as well", status=2
            )
        record_host_key(options.fleet, options.gateway, "", only_check=True)
        identity = make_identity(
            options.gateway,
            options.authorized_keys.read_text(),
            management=options.management_mac,
            address=options.address,
            gateway=options.via,
        )
    disk = examine(options.device, block_map.image_bytes + GROW_BYTES)
    confirm(disk, options.confirm)
    write(image, block_map, disk)
    compare(block_map, disk)
    if identity is not None:
        write_identity(disk.path, identity)
        record_host_key(options.fleet, options.gateway, identity.host_key_public)
        print(
            f"flash: {options.gateway} will show host key {' '.join(identity.host_key_public.split()[:2])}, "
            f"as {options.fleet} says now"
        )
    # It fails on a loop device without partitions, and when somebody reads the new table already: no harm.
    with disk.path.open("rb") as device, contextlib.suppress(OSError):
        fcntl.ioctl(device, BLKRRPART)
    print(f"flash: {disk.path} is a gateway; {block_map.mapped_bytes / 1e6:.0f} MB were written and compared")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m image.flash", description="Write the gateway image to a disk."
    )
    parser.add_argument("device", type=Path, help="the whole disk, such as /dev/sdX")
    parser.add_argument(
        "--image", type=Path, help="image to write, .raw or .raw.zst (default: what make image built)"
    )
    parser.add_argument("--profile", choices=PROFILES, default="cloud", help="which built image")
    parser.add_argument("--confirm", metavar="TEXT", help="answer to the question, for scripts")
    parser.add_argument("--gateway", metavar="NAME", help="write the identity of this gateway of the fleet")
    parser.add_argument("--fleet", type=Path, help="fleet.yaml, which gets the gateway's host key")
    parser.add_argument("--authorized-keys", type=Path, help="public keys that may log in")
    parser.add_argument("--management-mac", default="", help="MAC address of the management NIC")
    parser.add_argument(
        "--address", default="", metavar="A.B.C.D/N", help="management address (default: DHCP)"
    )
    parser.add_argument("--via", default="", metavar="A.B.C.D", help="router on the management network")
    parser.add_argument("--debug", action="store_true", help="show a traceback")
    options = parser.parse_args(arguments)
    try:
        flash(options)
    except KeyboardInterrupt:
        print("\nflash: interrupted; the disk does not boot now, run this again", file=sys.stderr)
        return 130
    except BuildError as error:
        if options.debug:
            raise
        print(f"flash: {error}", file=sys.stderr)
        return error.status
    except (OSError, subprocess.SubprocessError) as error:
        if options.debug:
            raise
        print(f"flash: {error}; the disk may not boot now, mend this and run it again", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
