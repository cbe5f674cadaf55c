"""One cold boot for all tests that look at a running gateway."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from image.boot import MANAGEMENT_MAC, Machine, Nic, Ready, one_boot_at_a_time, open_tap
from image.identity import make_identity
from tests.lab import Lab, Netns, new_lab

INSIDE, OUTSIDE = "0000:00:03.0", "0000:00:04.0"
# An emulated machine on a busy host takes more than five minutes to get well.
PATIENT = {"dsnat-healthy.service": "[Service]\nEnvironment=DSNAT_HEALTHY_S=900\n"}


def drop_in(unit: str, text: str) -> list[str]:
    """Words for QEMU that add settings to a unit of the unchanged image."""
    encoded = base64.b64encode(text.encode()).decode()
    return [
        "-smbios",
        f"type=11,value=io.systemd.credential.binary:systemd.unit-dropin.{unit}~test={encoded}",
    ]


@pytest.fixture(scope="session")
def built(built_image: Path) -> Path:
    return built_image


#  client eth0 100.64.0.10 --- in0 (tap) inside0 [ guest ] outside0 (tap) out0 --- eth0 198.51.100.10 server
@dataclass
class Gateway:
    """A booted image with two data NICs, and a host on the other end of each."""

    machine: Machine
    ready: Ready
    key: Path
    client: Netns
    server: Netns

    def __call__(self, script: str, *, check: bool = True, timeout_s: float = 180) -> str:
        """Runs a script as root on the gateway."""
        done = self.machine.ssh(self.key, script, timeout_s=timeout_s)
        assert not check or done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout


CONFIG = f"""\
engine: {{workers: 1, max_sessions: 100000}}
interfaces:
  - {{name: inside0, role: inside, path: dpdk, device: "{INSIDE}"}}
  - {{name: outside0, role: outside, path: dpdk, device: "{OUTSIDE}"}}
pools:
  - {{name: laddr_g1, addresses: [203.0.113.1-203.0.113.4]}}
zones:
  - {{source: 100.64.0.0/16, pool: laddr_g1}}
"""
NETWORK = "[Match]\nName={}\n\n[Network]\nConfigureWithoutCarrier=yes\nLinkLocalAddressing=no\nAddress={}\n"


def configure(gateway: Gateway, text: str = CONFIG) -> None:
    """By hand here; that the fleet tool does it is the demo's and the fleet's own test."""
    folder = "/var/lib/dsnat/generations/1"
    inside = NETWORK.format("inside0", "100.64.0.2/24")
    outside = NETWORK.format("outside0", "198.51.100.2/24")
    gateway(
        f"mkdir -p {folder}/network && cat > {folder}/dsnatd.yaml <<'X'\n{text}X\n"
        f"cat > {folder}/network/20-inside0.network <<'X'\n{inside}X\n"
        f"cat > {folder}/network/21-outside0.network <<'X'\n{outside}X\n"
        "ln -sfn 1 /var/lib/dsnat/generations/current "
        "&& systemctl reload-or-restart dsnat-failclosed dsnat-nic "
        "&& networkctl reload && systemctl restart dsnatd",
        timeout_s=600,
    )


def wired(lab: Lab, *, model: str = "virtio-net-pci", queues: int = 1) -> tuple[Netns, Netns, list[Nic]]:
    client, middle, server = (lab.netns(side) for side in ("client", "wires", "server"))
    nics = []
    for number, (space, tap) in enumerate(((client, "in0"), (server, "out0"))):
        lab.wire(space, "eth0", middle, f"to-{tap}")
        fds = taps(middle, tap, queues) if queues > 1 else (middle.open_tap(tap),)
        nics.append(Nic(fds, f"52:54:00:d5:00:0{3 + number}", model))
        lab.bridge(middle, f"br-{tap}", f"to-{tap}", tap)
    client.ip("address add 100.64.0.10/24 dev eth0")
    client.ip("route add default via 100.64.0.2")
    server.ip("address add 198.51.100.10/24 dev eth0")
    server.ip("route add 203.0.113.0/24 via 198.51.100.2")
    return client, server, nics


def taps(space: Netns, name: str, queues: int) -> tuple[int, ...]:
    fds = space.inside(lambda: open_tap(name, queues=queues))
    for fd in fds:
        space.lab.undo.callback(os.close, fd)
    return fds


@pytest.fixture(scope="session")
def gateway(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Booted through firmware, boot loader and unified kernel image, as a real one is."""
    folder = tmp_path_factory.mktemp("gateway")
    key = folder / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    identity = make_identity("gw1", key.with_suffix(".pub").read_text(), management=MANAGEMENT_MAC)
    with new_lab(folder) as lab:
        client, server, nics = wired(lab)
        machine = Machine(built, folder / "gw1", identity, nics)
        with ExitStack() as undo:
            undo.callback(machine.stop)
            with one_boot_at_a_time():
                machine.start()
                ready = machine.wait_ready()
            yield Gateway(machine, ready, key, client, server)
