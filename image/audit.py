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

from image.build import BUILD, PROFILES, BuildError, Paths, tool
from image.elf import Elf, read_elf

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
    *("bird", "chrony", "dbus-broker", "dsnat-failclosed", "dsnat-generation", "dsnat-healthy"),
    *("dsnat-identity", "dsnat-metrics", "dsnat-nic", "dsnat-nic-watch", "dsnat-unconfirmed", "dsnatd"),
    *("keepalived", "ssh", "systemd-network-generator", "systemd-networkd"),
)
OUR_UNITS = (
    "dsnatd",
    "dsnat-failclosed",
    "dsnat-generation",
    "dsnat-healthy",
    "dsnat-identity",
    "dsnat-metrics",
    "dsnat-nic",
    "dsnat-nic-watch",
    "dsnat-ready",
)
# The worst that `systemd-analyze security` may say, in tenths. SSH is not here: a session may do all.
EXPOSURE = {
    "dsnatd": 55,
    "dsnat-failclosed": 50,
    "dsnat-generation": 45,
    "dsnat-healthy": 60,
    "dsnat-identity": 62,
    "dsnat-nic": 68,
    "dsnat-nic-watch": 52,
    "dsnat-ready": 55,
    "dsnat-unconfirmed": 75,
    "dsnat-announce": 55,
    "dsnat-metrics": 25,
    "keepalived": 56,
    "bird": 56,
    "chrony": 40,
}
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
    parts = list(image.parent.glob(f"{image.stem}.root-x86-64.*.raw.gz"))
    if len(parts) != 1:
        raise BuildError(
            f"{image.parent} has no root partition beside the image; run `python -m image.build --force`",
            status=3,
        )
    folder = BUILD / "audit" / parts[0].name.removesuffix(".raw.gz")
    if not folder.exists():
        fresh, raw = folder.with_suffix(".new"), folder.with_suffix(".raw")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        for old in fresh.parent.glob(f"{image.stem}.root-*"):  # of earlier builds of this version
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        try:
            with raw.open("wb") as out:
                subprocess.run(["gzip", "--decompress", "--stdout", str(parts[0])], stdout=out, check=True)
            done = subprocess.run(
                tool("fsck.erofs", f"--extract={fresh}", str(raw)), capture_output=True, text=True
            )
        finally:
            raw.unlink(missing_ok=True)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip().splitlines()[-1]
            raise BuildError(f"{parts[0].name} cannot be unpacked: {said}")
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
            f"it needs a processor of {elf.isa}": strict and elf.isa != "baseline",
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


def check_exposure(root: Root, report: Report) -> None:
    """What a service could do if it were taken over, as systemd counts it: 0 nothing, 10 everything."""
    scores = {}
    for unit, bar in EXPOSURE.items():
        argv = tool("systemd-analyze", "security", "--offline=yes", "--no-pager", f"--root={root.path}")
        done = subprocess.run([*argv, f"{unit}.service"], capture_output=True, text=True)
        match = re.search(r"Overall exposure level for \S+ ([\d.]+)", done.stdout)
        if not match:
            report.wrong(
                f"{unit}.service: systemd-analyze security says nothing of it: {done.stderr.strip()}"
            )
            continue
        scores[unit] = float(match[1])
        if scores[unit] * 10 > bar:
            report.wrong(f"{unit}.service: exposure {match[1]}, the bar is {bar / 10}; lock it up further")
    report.facts["exposure"] = scores


def check_trust(root: Root, image: Path, report: Report) -> None:
    """An image with update keys has the public half only, and signed checksums beside it."""
    ring = root.path / "usr/share/dsnat/updates.gpg"
    trusted = root.path / "usr/lib/systemd/import-pubring.gpg"
    if trusted.is_symlink() != ring.exists() or (trusted.exists() and not trusted.is_symlink()):
        report.wrong(
            "usr/lib/systemd/import-pubring.gpg: keys that this build was not given may sign updates"
        )
    if ring.exists():
        # an OpenPGP secret key packet begins so, in the old and in the new format
        if ring.read_bytes()[:1] in (b"\x94", b"\x95", b"\x97", b"\xc5"):
            report.wrong("usr/share/dsnat/updates.gpg: the secret half of the update key is baked in")
        if not (image.parent / "SHA256SUMS.gpg").exists():
            report.wrong("SHA256SUMS.gpg is not beside the image, whose gateways will take no other")
    report.facts["updates_signed"] = ring.exists()


def check_size(image: Path, report: Report) -> None:
    download = Path(f"{image}.zst").stat().st_size
    uki = image.with_suffix(".efi").stat().st_size
    report.facts["bytes"] = {"download": download, "disk": image.stat().st_size, "uki": uki}
    if download > DOWNLOAD_BYTES:
        report.wrong(f"the download has {download / 1e6:.0f} MB, the budget is {DOWNLOAD_BYTES / 1e6:.0f} MB")
    if 3 * uki > 512 << 20:
        report.wrong(f"three UKIs of {uki / 1e6:.0f} MB do not fit the ESP; an update would fill it")


def audit(profile: str, version: str = "") -> Report:
    paths = Paths(profile, version)
    image = paths.image
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
    check_exposure(root, report)
    check_trust(root, image, report)
    (paths.output / "audit.json").write_text(json.dumps(asdict(report), indent=1, default=list) + "\n")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m image.audit", description="Look into the built image.")
    parser.add_argument("--profile", choices=PROFILES, default="cloud", help="which built image")
    parser.add_argument("--version", default="", help="one that was built with --version")
    parser.add_argument("--debug", action="store_true", help="show a traceback")
    options = parser.parse_args(arguments)
    try:
        report = audit(options.profile, options.version)
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
        f"details in {Paths(options.profile, options.version).output / 'audit.json'}"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
