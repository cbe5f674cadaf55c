"""support: one archive with what somebody needs who helps from afar.

Each item is collected on its own and may fail on its own: what could not be had stands in `missing.json`,
with the reason. Nothing secret goes in: lines that hold a key or a password are blanked, and so are those
that are nothing but a key (the pair's, in a file of its own); packets are not taken, and sessions (whose
hosts are people) only with --sessions.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsnatctl.client import STRANGE, Engine, Json, Refused, Unreachable, strange

UNITS = ("dsnatd", "dsnat-nic", "dsnat-failclosed", "dsnat-metrics", "keepalived", "systemd-networkd")
SHOWS = ("counters", "workers", "pools", "destinations", "zones", "ports", "config")
JOURNAL_LINES = "20000"
FILE_BYTES_MAX = 1 << 20
SECRET = re.compile(
    r"(?im)^(?P<name>[^\n#]*\b(auth_pass|pass(word|phrase)?|secret|private_?key|preshared_?key|token)\b\s*[:=]?\s*)\S.*$"
)
BARE_KEY = re.compile(r"(?m)^\s*[0-9a-fA-F]{64}\s*$")  # sync.key
COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kernel/uname", ("uname", "-a")),
    ("kernel/lspci", ("lspci", "-nnk")),
    ("kernel/memory", ("free", "-m")),
    ("network/links", ("ip", "-d", "-s", "link")),
    ("network/addresses", ("ip", "address")),
    ("network/routes", ("ip", "route", "show", "table", "all")),
    ("network/rules", ("ip", "rule")),
    ("network/neighbours", ("ip", "neighbour")),
    ("network/nftables", ("nft", "list", "ruleset")),
    ("units/state", ("systemctl", "--no-pager", "status", *UNITS)),
    ("versions/packages", ("dpkg-query", "-W")),
    ("versions/dsnatd", ("dsnatd", "--version")),
    ("versions/image", ("cat", "/etc/os-release")),
)
FILES = ("/proc/cmdline", "/proc/cpuinfo", "/proc/meminfo", "/proc/interrupts", "/proc/net/softnet_stat",
         "/proc/net/netfilter/nfnetlink_queue", "/proc/sys/vm/nr_hugepages")  # fmt: skip


def without_secrets(text: str) -> str:
    return BARE_KEY.sub("(removed)", SECRET.sub(r"\g<name>(removed)", text))


class Archive:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.collected: list[str] = []
        self.missing: list[Json] = []

    def put(self, name: str, text: str) -> None:
        data = text.encode(errors="replace")
        info = tarfile.TarInfo(f"dsnat-support/{name}")
        info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
        self._tar.addfile(info, io.BytesIO(data))
        self.collected.append(name)

    def lacks(self, name: str, why: str) -> None:
        self.missing.append({"what": name, "why": why})

    def command(self, name: str, argv: Sequence[str]) -> None:
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, errors="replace", timeout=30, check=False
            )
        except FileNotFoundError:
            return self.lacks(name, f"{argv[0]} is not installed")
        except (OSError, subprocess.TimeoutExpired) as error:
            return self.lacks(name, str(error))
        if done.returncode and not done.stdout:
            return self.lacks(
                name, (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            )
        return self.put(name, without_secrets(done.stdout + done.stderr))

    def file(self, name: str, path: Path) -> None:
        try:
            with path.open("rb") as opened:
                data = opened.read(FILE_BYTES_MAX)
        except OSError as error:
            return self.lacks(name, f"{path}: {error.strerror}")
        return self.put(name, without_secrets(data.decode(errors="replace")))


def interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir() if path.name != "lo")


def affinities() -> Iterator[str]:
    for irq in sorted(Path("/proc/irq").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            cores = (irq / "smp_affinity_list").read_text().strip()
        except OSError:
            continue
        names = [path.name for path in irq.iterdir() if path.is_dir()]
        yield f"{irq.name} {cores} {' '.join(names)}\n"


def engine_answers(archive: Archive, path: str, *, sessions: bool) -> None:
    try:
        with Engine(path) as engine:
            for name, request in (
                ("status", {"cmd": "status"}),
                ("version", {"cmd": "version"}),
                *((what, {"cmd": "show", "what": what}) for what in SHOWS),
            ):
                try:
                    archive.put(f"engine/{name}.json", json.dumps(engine.ask(**request), indent=1))
                except Refused as error:
                    archive.lacks(f"engine/{name}.json", str(error))
            if sessions:
                found = [
                    one for page in engine.pages(cmd="show", what="sessions") for one in page["sessions"]
                ]
                archive.put("engine/sessions.json", json.dumps(found))
    except Unreachable as error:
        archive.lacks("engine", str(error))
    except STRANGE as error:
        archive.lacks("engine/sessions.json", strange(path, error))


def configuration(archive: Archive, config: str) -> None:
    directory = Path(config).parent
    archive.file("configuration/dsnatd.yaml", Path(config))
    archive.command("configuration/judgement", ("dsnatd", "--check", config))
    if not str(directory).startswith("/etc/"):
        return
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != Path(config):
            archive.file(f"configuration/{path.relative_to(directory)}", path)


def collect(archive: Archive, *, socket_path: str, config: str, sessions: bool) -> None:
    engine_answers(archive, socket_path, sessions=sessions)
    configuration(archive, config)
    for name, argv in COMMANDS:
        archive.command(name, argv)
    for path in FILES:
        archive.file(f"kernel{path}", Path(path))
    archive.put("kernel/affinities", "".join(affinities()))
    for name in interfaces():
        for option in "kilgS":
            archive.command(f"network/ethtool-{option}-{name}", ("ethtool", f"-{option}", name))
    for unit in UNITS:
        argv = ("journalctl", "--no-pager", "-o", "short-iso-precise", "-n", JOURNAL_LINES, "-u", unit)
        archive.command(f"journal/{unit}", argv)


def default_name() -> str:
    return f"dsnat-support-{socket.gethostname()}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz"


def write(path: str, *, socket_path: str, config: str, sessions: bool = False) -> Archive:
    """The archive is its owner's only."""
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(opened, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        archive = Archive(tar)
        collect(archive, socket_path=socket_path, config=config, sessions=sessions)
        archive.put("missing.json", json.dumps(archive.missing, indent=1))
    return archive
