"""Look into the built image without booting it: `python -m image.audit`.

Every check answers "would an operator want to know this before flashing it": are the programs built with
the usual protections, does every library and symbol version exist, are the NIC drivers of the fleet there,
is a key or a password baked in, does anything run that should not, does it fit the budget. The root file
system is unpacked out of its own partition, so what is looked at is what would be booted.

Two measures: `OURS` (the engine) must have everything; Debian's programs must have what all of Debian has.

Writes audit.json beside the image: all that was looked at, and what was wrong. Exit status: 0 all well, 1
something is wrong (each on a line of its own), 2 wrong usage, 3 there is no image or no tools tree.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection, GNUVerNeedSection
from elftools.elf.sections import NoteSection, SymbolTableSection

from image.build import BUILD, PROFILES, BuildError, Paths, image_path, tool

OURS = ("usr/bin/dsnatd", "usr/bin/dsnat-replay")
LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib64", "usr/lib/x86_64-linux-gnu/systemd")
DRIVERS = (
    *("bus_pci", "bus_vdev", "mempool_ring", "net_af_packet", "net_bnxt", "net_e1000", "net_ena", "net_gve"),
    *(
        "net_i40e",
        "net_iavf",
        "net_ice",
        "net_igc",
        "net_ixgbe",
        "net_memif",
        "net_mlx5",
        "net_ring",
        "net_tap",
    ),
    *("net_virtio", "net_vmxnet3"),
)
MODULES = (
    *(
        "vfio-pci",
        "uio_pci_generic",
        "nfnetlink_queue",
        "nft_queue",
        "tun",
        "vhost_net",
        "wireguard",
        "erofs",
    ),
    *("dm-verity", "overlay", "virtio_net", "vmxnet3", "i6300esb"),
)
MODULES_HARDWARE = ("ixgbe", "i40e", "ice", "igb", "igc", "mlx5_core", "megaraid_sas", "e1000e")
UNWANTED = (
    "usr/bin/gcc",
    "usr/bin/cc",
    "usr/bin/make",
    "usr/bin/apt",
    "usr/bin/dpkg",
    "usr/bin/perl",
    "usr/sbin/irqbalance",
)
ENABLED = (
    *("bird", "chrony", "dbus-broker", "dsnat-failclosed", "dsnat-healthy", "dsnat-identity", "dsnat-nic"),
    *(
        "dsnat-metrics",
        "dsnat-nic-watch",
        "dsnat-unconfirmed",
        "dsnatd",
        "keepalived",
        "ssh",
        "systemd-network-generator",
    ),
    *("systemd-networkd",),
)
OUR_UNITS = (
    "dsnatd",
    "dsnat-failclosed",
    "dsnat-healthy",
    "dsnat-identity",
    "dsnat-metrics",
    "dsnat-nic",
    "dsnat-nic-watch",
    "dsnat-ready",
)
DOWNLOAD_BYTES = 250_000_000
SECRET = re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----|openssh-key-v1\0")
# Private libraries of Debian's own packages: on the read-only root, so nobody can put another one there.
RUNPATHS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/systemd")
# Debian builds it so, for speed; everything that starts it runs as root already.
NOT_POSITION_INDEPENDENT = ("usr/bin/python3.13",)


@dataclass
class Report:
    """What was looked at, and what is wrong with it."""

    image: str
    facts: dict[str, object] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        self.findings.append(what)


# --- one ELF file ---------------------------------------------------------------------------------


@dataclass
class Elf:
    """The facts about one program or library that decide whether it is sound."""

    path: str
    kind: str = ""
    pie: bool = False
    relro: bool = False
    bind_now: bool = False
    executable_stack: bool = True
    writable_code: bool = False
    text_relocations: bool = False
    runpath: str = ""
    stack_protector: bool = False
    fortified: int = 0
    debug_link: bool = False
    debug_info: bool = False
    build_id: str = ""
    isa: str = "baseline"
    needed: tuple[str, ...] = ()
    interpreter: bool = False
    wants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defines: frozenset[str] = frozenset()


def read_elf(path: Path, name: str) -> Elf | None:
    """None for anything that is not a 64-bit program or library."""
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        file.seek(0)
        try:
            elf = ELFFile(file)
            if elf["e_type"] not in ("ET_DYN", "ET_EXEC") or elf.elfclass != 64:
                return None
            return _facts(elf, Elf(name, kind=elf["e_type"]))
        except ELFError as error:
            raise BuildError(f"{name} in the image is not a readable ELF file: {error}") from error


def text_of(tag: object, name: str) -> str:
    """pyelftools gives a tag the attributes that its kind has, which no type can say."""
    return str(getattr(tag, name))


def _facts(elf: ELFFile, facts: Elf) -> Elf:
    for segment in elf.iter_segments():
        match segment["p_type"]:
            case "PT_GNU_RELRO":
                facts.relro = True
            case "PT_GNU_STACK":
                facts.executable_stack = bool(segment["p_flags"] & 1)
            case "PT_LOAD" if segment["p_flags"] & 3 == 3:
                facts.writable_code = True
            case "PT_INTERP":
                facts.interpreter = True
    needed = []
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                match tag.entry.d_tag:
                    case "DT_NEEDED":
                        needed.append(text_of(tag, "needed"))
                    case "DT_RPATH" | "DT_RUNPATH":
                        name = "rpath" if tag.entry.d_tag == "DT_RPATH" else "runpath"
                        facts.runpath = text_of(tag, name)
                    case "DT_TEXTREL":
                        facts.text_relocations = True
                    case "DT_BIND_NOW":
                        facts.bind_now = True
                    case "DT_FLAGS":
                        facts.bind_now |= bool(tag.entry.d_val & 8)
                        facts.text_relocations |= bool(tag.entry.d_val & 4)
                    case "DT_FLAGS_1":
                        facts.bind_now |= bool(tag.entry.d_val & 1)
                        facts.pie = bool(tag.entry.d_val & 0x08000000)
        elif isinstance(section, GNUVerNeedSection):
            facts.wants = {
                str(lib.name): tuple(str(aux.name) for aux in versions)
                for lib, versions in section.iter_versions()
            }
        elif isinstance(section, GNUVerDefSection):
            facts.defines = frozenset(str(next(iter(names)).name) for _, names in section.iter_versions())
        elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
            names = [symbol.name for symbol in section.iter_symbols()]
            facts.stack_protector = "__stack_chk_fail" in names
            facts.fortified = sum(
                1 for symbol in names if symbol.endswith("_chk") and symbol != "__stack_chk_fail"
            )
        elif isinstance(section, NoteSection):
            for note in section.iter_notes():
                if note["n_type"] == "NT_GNU_BUILD_ID":
                    facts.build_id = str(note["n_desc"])
                elif note["n_type"] == "NT_GNU_PROPERTY_TYPE_0":
                    facts.isa = _isa(note) or facts.isa
        facts.debug_link |= section.name == ".gnu_debuglink"
        facts.debug_info |= section.name.startswith((".debug_", ".zdebug_"))
    facts.needed = tuple(needed)
    return facts


def _isa(note: object) -> str:
    for entry in note["n_desc"]:  # type: ignore[index]  # pyelftools has no types for notes
        if entry.pr_type == 0xC0008002:  # GNU_PROPERTY_X86_ISA_1_NEEDED
            level = int(entry.pr_data)
            return "baseline" if level <= 1 else f"x86-64-v{level.bit_length()}"
    return ""


# --- the root of the image ------------------------------------------------------------------------


@dataclass(frozen=True)
class Root:
    """The unpacked root file system."""

    path: Path

    def files(self) -> Iterator[tuple[str, Path]]:
        for folder, _, names in os.walk(self.path):
            for name in names:
                path = Path(folder) / name
                if path.is_file() and not path.is_symlink():
                    yield str(path.relative_to(self.path)), path

    @cached_property
    def elves(self) -> dict[str, Elf]:
        found = {}
        for name, path in self.files():
            if not name.startswith(("usr/lib/modules/", "usr/lib/firmware/")) and (
                elf := read_elf(path, name)
            ):
                found[name] = elf
        return found

    def resolve(self, name: str) -> Path:
        """A path of the image, links followed inside the image."""
        path = self.path
        for part in Path(name).parts:
            path = path / part
            for _ in range(10):
                if not path.is_symlink():
                    break
                target = str(path.readlink())
                path = self.path / target.lstrip("/") if target.startswith("/") else path.parent / target
        return path


def unpack(image: Path) -> Root:
    """Unpack the root partition, once per image."""
    split = [path for path in image.parent.glob(f"{image.stem}.root-x86-64.*.raw")]
    if len(split) != 1:
        raise BuildError(
            f"{image.parent} has no root partition beside the image; run `python -m image.build --force`",
            status=3,
        )
    folder = BUILD / "audit" / split[0].name.removesuffix(".raw")
    if not folder.exists():
        shutil.rmtree(BUILD / "audit", ignore_errors=True)
        fresh = folder.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            tool("fsck.erofs", f"--extract={fresh}", str(split[0])), capture_output=True, text=True
        )
        if done.returncode != 0:
            raise BuildError(
                f"{split[0].name} cannot be unpacked: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
            )
        fresh.rename(folder)
    return Root(folder)


# --- checks ---------------------------------------------------------------------------------------


def check_elves(root: Root, report: Report) -> None:
    for name, elf in root.elves.items():
        strict = name in OURS
        faults = {
            "its stack is executable": elf.executable_stack,
            "it has memory that is writable and executable": elf.writable_code,
            "it has text relocations": elf.text_relocations,
            "it is not position independent": (elf.kind == "ET_EXEC" and name not in NOT_POSITION_INDEPENDENT)
            or (strict and not elf.pie),
            f"it looks for libraries in {elf.runpath}": bool(elf.runpath)
            and (strict or not elf.runpath.startswith(RUNPATHS)),
            "its relocations stay writable (no RELRO)": not elf.relro and bool(elf.needed),
            "its relocations are not bound at start": strict and not elf.bind_now,
            "no stack protector": strict and not elf.stack_protector,
            "no fortified function": strict and not elf.fortified,
            "no build id": not elf.build_id and strict,
            "no link to its debug symbols": strict and not elf.debug_link,
            "debug symbols are in it": strict and elf.debug_info,
        }
        for fault, present in faults.items():
            if present:
                report.wrong(f"{name}: {fault}")
    report.facts["elf_files"] = len(root.elves)
    report.facts["ours"] = {
        name: asdict(elf) | {"defines": len(elf.defines)} for name, elf in root.elves.items() if name in OURS
    }
    report.facts["isa_above_baseline"] = sorted(
        name for name, elf in root.elves.items() if elf.isa != "baseline"
    )


def check_libraries(root: Root, report: Report) -> None:
    """Every library that a program asks for is there, with every symbol version that it asks for."""
    libraries: dict[str, Elf] = {}
    for folder in reversed(LIBRARY_FOLDERS):
        for path in (root.path / folder).glob("*.so*"):
            real = root.resolve(str(path.relative_to(root.path)))
            if elf := root.elves.get(str(real.relative_to(root.path))):
                libraries[path.name] = elf
    for name, elf in root.elves.items():
        near = {path.name for path in (root.path / name).parent.glob("*.so*")}
        for wanted in elf.needed:
            if wanted not in libraries and wanted not in near:
                report.wrong(f"{name}: library {wanted} is not in the image")
        for library, versions in elf.wants.items():
            if library in libraries:
                for version in set(versions) - libraries[library].defines:
                    report.wrong(f"{name}: {library} of the image does not have {version}")


def check_drivers(root: Root, report: Report, profile: str) -> None:
    folder = root.path / "usr/lib/x86_64-linux-gnu"
    loaded = {path.name for path in folder.glob("dpdk/pmds-*/librte_*.so*")}
    for driver in DRIVERS:
        if not any(name.startswith(f"librte_{driver}.so") for name in loaded):
            report.wrong(
                f"DPDK driver {driver} is not in the image; add its package to mkosi.conf.d/20-engine.conf"
            )
    present = {
        path.name.split(".ko")[0].replace("_", "-") for path in (root.path / "usr/lib/modules").rglob("*.ko*")
    }
    builtin = "".join(path.read_text() for path in (root.path / "usr/lib/modules").glob("*/modules.builtin"))
    present |= {Path(line).name.removesuffix(".ko").replace("_", "-") for line in builtin.split()}
    for module in MODULES + (MODULES_HARDWARE if profile == "generic" else ()):
        if module.replace("_", "-") not in present:
            report.wrong(f"kernel module {module} is not in the image")
    report.facts["dpdk_drivers"] = sorted(loaded)
    report.facts["kernel_modules"] = len(present)


def check_files(root: Root, report: Report) -> None:
    setuid, capable = [], []
    for name, path in root.files():
        mode = path.stat().st_mode
        if mode & (stat.S_ISUID | stat.S_ISGID):
            setuid.append(name)
        if "security.capability" in os.listxattr(path):
            capable.append(name)
        if mode & stat.S_IWOTH:
            report.wrong(f"{name}: everybody may write it")
        if (
            path.stat().st_size < 1 << 20
            and name.startswith(("etc/", "root/", "var/", "usr/lib/dsnat/", "usr/share/dsnat/"))
            and SECRET.search(path.read_bytes())
        ):
            report.wrong(f"{name}: a private key is baked in")
    for name in setuid:
        report.wrong(f"{name}: runs with the rights of its owner (setuid or setgid)")
    for name in capable:
        report.wrong(f"{name}: has capabilities of its own")
    for name in UNWANTED:
        if (root.path / name).exists():
            report.wrong(f"{name}: does not belong on a gateway")
    for line in (root.path / "etc/shadow").read_text().splitlines():
        user, password = line.split(":")[:2]
        if password not in ("*", "!", "!*", "!!"):
            report.wrong(
                f"etc/shadow: {user} has a password" if password else f"etc/shadow: {user} needs no password"
            )
    machine_id = root.path / "etc/machine-id"
    if machine_id.exists() and machine_id.read_text().strip() not in ("", "uninitialized"):
        report.wrong("etc/machine-id: every gateway would have the same one")
    for pattern in ("etc/ssh/ssh_host_*", "root/.ssh/*", "etc/hostname"):
        for path in root.path.glob(pattern):
            report.wrong(f"{path.relative_to(root.path)}: an identity is baked in")
    report.facts["setuid"], report.facts["capabilities"] = setuid, capable


def check_units(root: Root, report: Report) -> None:
    wants = root.path / "etc/systemd/system"
    links = [
        path
        for pattern in ("*.wants/*.service", "*.service")
        for path in wants.glob(pattern)
        if path.is_symlink()
    ]
    # an alias (dbus.service) counts as what it leads to, a masked unit not at all
    enabled = {path.readlink().name.removesuffix(".service") for path in links} - {"null"}
    for unit in ENABLED:
        if unit not in enabled:
            report.wrong(f"{unit}.service is not enabled")
    for unit in sorted(enabled - set(ENABLED)):
        report.wrong(
            f"{unit}.service is enabled; a gateway does not need it, or ENABLED in audit.py does not know it"
        )
    report.facts["enabled_units"] = sorted(enabled)
    units = [f"{unit}.service" for unit in OUR_UNITS]
    done = subprocess.run(
        tool("systemd-analyze", "verify", f"--root={root.path}", "--man=no", "--recursive-errors=no", *units),
        capture_output=True,
        text=True,
    )
    for line in done.stderr.splitlines():
        # Without an engine in the image yet, its unit has nothing to run; the boot would say the same.
        report.wrong(f"systemd-analyze verify: {line.strip().removeprefix(str(root.path))}")


def check_size(image: Path, report: Report) -> None:
    download = Path(f"{image}.zst").stat().st_size
    uki = image.with_suffix(".efi").stat().st_size
    report.facts["bytes"] = {"download": download, "disk": image.stat().st_size, "uki": uki}
    if download > DOWNLOAD_BYTES:
        report.wrong(f"the download has {download / 1e6:.0f} MB, the budget is {DOWNLOAD_BYTES / 1e6:.0f} MB")
    if 3 * uki > 512 << 20:
        report.wrong(f"three UKIs of {uki / 1e6:.0f} MB do not fit the ESP; an update would fill it")


def audit(profile: str) -> Report:
    image = image_path(profile)
    if not image.exists():
        raise BuildError(f"{image} is not there; run `make image` first", status=3)
    report = Report(image.name)
    root = unpack(image)
    check_size(image, report)
    check_files(root, report)
    check_elves(root, report)
    check_libraries(root, report)
    check_drivers(root, report, profile)
    check_units(root, report)
    (Paths(profile).output / "audit.json").write_text(
        json.dumps(asdict(report), indent=1, default=list) + "\n"
    )
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m image.audit", description="Look into the built image.")
    parser.add_argument("--profile", choices=PROFILES, default="cloud", help="which built image")
    parser.add_argument("--debug", action="store_true", help="show a traceback")
    options = parser.parse_args(arguments)
    try:
        report = audit(options.profile)
    except BuildError as error:
        if options.debug:
            raise
        print(f"audit: {error}", file=sys.stderr)
        return error.status
    for finding in report.findings:
        print(f"audit: {finding}")
    sizes = report.facts["bytes"]
    assert isinstance(sizes, dict)
    print(
        f"audit: {report.image}: {report.facts['elf_files']} programs and libraries, "
        f"{sizes['download'] / 1e6:.0f} MB to download, {len(report.findings)} findings; "
        f"details in {Paths(options.profile).output / 'audit.json'}"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
