"""A real OpenSSH server on the loopback that runs the real agent in a directory of its own. No root is
needed.

Every login runs the agent (ForceCommand), with small programs of ours in place of systemctl, keepalived
and dsnatd. What they did stands in `calls`; a file in `state` makes one of them fail.
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "provision/agent/__main__.py"
SSHD = Path("/usr/sbin/sshd")

FAKES = {
    "systemctl": """
verb=$1; shift
while [ "$verb" != is-active ] && [ -e "$FAKE/wait" ]; do : > "$FAKE/waiting"; sleep 0.05; done
echo "systemctl $verb $*" >> "$FAKE/calls"
[ "$verb $*" = "reload ssh.service" ] && kill -HUP "$(cat "$FAKE/../sshd.pid")"
for unit in "$@"; do
    [ -e "$FAKE/fail-$unit" ] && { echo "$unit failed"; exit 1; }
    case $verb in
    is-active) if [ -e "$FAKE/active-$unit" ]; then echo active; else echo inactive; fi ;;
    stop) rm -f "$FAKE/active-$unit" ;;
    *) : > "$FAKE/active-$unit" ;;
    esac
done
""",
    "networkctl": 'echo "networkctl $*" >> "$FAKE/calls"',
    "chronyc": 'echo "chronyc $*" >> "$FAKE/calls"',
    "dsnatd": '! grep -Hn BROKEN "$2" || exit 2',
    "unshare": 'shift 4; grep -Hn BROKEN "$1" && exit 5; test -s "$1"',
    "ip": 'cat "$FAKE/addresses" 2>/dev/null || echo "[]"',
    "systemd-run": """
while [ "${1#--}" != "$1" ]; do shift; done
[ -e "$FAKE/fail-systemd-run" ] && { echo "no units today"; exit 1; }
setsid "$@" < /dev/null > /dev/null 2>&1 &
""",
}


@dataclass
class Gateway:
    name: str
    home: Path
    port: int
    host_key: str
    identity: Path

    @property
    def root(self) -> Path:
        return self.home / "dsnat"

    @property
    def fake(self) -> Path:
        return self.home / "fake"

    @property
    def calls(self) -> list[str]:
        path = self.fake / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def current(self) -> int:
        return int((self.root / "generations/current").readlink().name)

    def hold(self, *addresses: str) -> None:
        """The kernel has these addresses, as a VRRP master would."""
        shown = [{"ifname": "outside0", "addr_info": [{"local": address} for address in addresses]}]
        (self.fake / "addresses").write_text(json.dumps(shown))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def make_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text().strip()


def make_root(home: Path) -> Path:
    """A gateway as it leaves the factory: generation 0, with nothing in it."""
    (home / "dsnat/generations/0").mkdir(parents=True)
    (home / "dsnat/generations/current").symlink_to("0")
    return home / "dsnat"


@contextmanager
def running(home: Path, name: str = "gw1") -> Iterator[Gateway]:
    home.mkdir()
    make_root(home)
    fake, bin_ = home / "fake", home / "bin"
    fake.mkdir()
    bin_.mkdir()
    for program, text in FAKES.items():
        (bin_ / program).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / program).chmod(0o755)
    shown = home / "identity"
    shown.mkdir()
    host_key, user_key = make_key(shown / "ssh_host_ed25519_key"), make_key(home / "user")
    (home / "authorized_keys").write_text(f"{user_key}\n")
    gateway = Gateway(name, home, free_port(), host_key, home / "user")
    environment = {
        "PATH": f"{bin_}:/usr/sbin:/usr/bin:/sbin:/bin",
        "FAKE": fake,
        "DSNAT_ROOT": gateway.root,
        "DSNAT_UPDATES": home / "updates",
        "DSNAT_IDENTITY": shown,
        "DSNAT_KEPT": home / "kept",
        "DSNAT_SOCKET": home / "control.sock",
    }
    words = [
        "/usr/bin/env",
        *(f"{key}={value}" for key, value in environment.items()),
        sys.executable,
        str(AGENT),
    ]
    (home / "sshd_config").write_text(
        f"""\
Port {gateway.port}
ListenAddress 127.0.0.1
HostKey {shown}/ssh_host_ed25519_key
PidFile {home}/sshd.pid
AuthorizedKeysFile {home}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100:30:200
ForceCommand {shlex.join(words)}
"""
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it, and makes it only as a service
    argv = [str(SSHD), "-D", "-e", "-f", str(home / "sshd_config")]
    with (home / "sshd.log").open("wb") as log:
        server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    with engine(home / "control.sock"):
        try:
            wait_for_port(gateway.port, server, home / "sshd.log")
            yield gateway
        finally:
            server.terminate()
            server.wait(10)


def wait_for_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise AssertionError(f"sshd did not start:\n{log.read_text()}")


@contextmanager
def engine(path: Path) -> Iterator[None]:
    """Answers on a control socket as an engine that is well."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(64)

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as lines:
                request = json.loads(lines.readline() or b"{}")
                answer = {"ok": True, "sessions": 7, "pools": []} if request else {"ok": False}
                lines.write(json.dumps(answer).encode() + b"\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def user() -> str:
    return getpass.getuser()
