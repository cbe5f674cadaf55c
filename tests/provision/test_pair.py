"""Two booted gateways that share addresses: the first push makes a pair of them, the backup first.

client 100.64.0.10 --- bridge in [ gw1, gw2 ] bridge out --- server 198.51.100.10
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from image.boot import MANAGEMENT_MAC, Machine, Nic
from image.identity import make_identity
from tests.lab import Netns, new_lab
from tests.provision.sshd import make_key

pytestmark = pytest.mark.image

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600

FLEET = """\
schema: 1
defaults:
  ssh: {{identity: {key}, connect_timeout: 60s}}
  engine: {{workers: 1, max_sessions: 100000}}
  rollout: {{confirm_within: 180s}}
pools:
  laddr_g1: {{addresses: [{pool}]}}
pairs:
  edge:
    vrrp:
      instances:
        inside0: {{id: 10, addresses: [100.64.0.1/24]}}
        outside0: {{id: 20, addresses: [198.51.100.1/24]}}
    zones:
      - {{source: 100.64.0.0/24, pool: laddr_g1}}
    probes: [198.51.100.10]
gateways:
"""
MEMBER = """\
  gw{n}:
    pair: edge
    priority: {priority}
    management: {{address: 127.0.0.1, port: {port}}}
    host_key: {host_key}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.{own}/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.{own}/24]}}
"""


class Pair:
    def __init__(
        self, folder: Path, key: Path, machines: list[Machine], client: Netns, server: Netns
    ) -> None:
        self.folder, self.key, self.machines = folder, key, machines
        self.client, self.server = client, server

    def fleet(self, pool: str = "203.0.113.1-203.0.113.4") -> Path:
        text = FLEET.format(key=self.key, pool=pool)
        for n, machine in enumerate(self.machines, 1):
            assert machine.identity is not None
            host_key = machine.identity.host_key_public.strip()
            text += MEMBER.format(
                n=n, own=n + 1, priority=150 - 25 * n, port=machine.ssh_port, host_key=host_key
            )
        path = self.folder / "fleet.yaml"
        path.write_text(text)
        return path

    def run(self, file: Path, *words: str, status: int = 0) -> str:
        argv = [sys.executable, "-m", "provision", "--file", str(file), *words]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def roles(self) -> dict[str, str]:
        found: dict[str, Any] = json.loads(self.run(self.fleet(), "status", "--json"))["gateways"]
        return {name: gateway["role"] for name, gateway in found.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, built_image: Path) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    key = folder / "operator"
    public = make_key(key)
    with new_lab(folder / "lab") as lab, ExitStack() as undo:
        client, wires, server = (lab.netns(side) for side in ("client", "wires", "server"))
        lab.wire(client, "eth0", wires, "client")
        lab.wire(server, "eth0", wires, "server")
        taps = {name: wires.open_tap(name) for name in ("in1", "in2", "out1", "out2")}
        lab.bridge(wires, "in", "client", "in1", "in2")
        lab.bridge(wires, "out", "server", "out1", "out2")
        client.ip("address add 100.64.0.10/24 dev eth0")
        client.ip("route add default via 100.64.0.1")
        server.ip("address add 198.51.100.10/24 dev eth0")
        server.ip("route add 203.0.113.0/24 via 198.51.100.1")
        machines = []
        for n in (1, 2):  # one after the other: two cold boots at once starve each other
            nics = [
                Nic((taps[f"{side}{n}"],), f"52:54:00:d5:{n:02x}:0{3 + i}")
                for i, side in enumerate(("in", "out"))
            ]
            identity = make_identity(f"gw{n}", public, management=MANAGEMENT_MAC)
            machine = Machine(built_image, folder / f"gw{n}", identity, nics, firmware=False)
            machines.append(undo.enter_context(machine))
            machine.wait_ready()
        found = Pair(folder, key, machines, client, server)
        text = found.run(found.fleet(), "push", "--yes")
        assert text.index("gw2: confirmed") < text.index("gw1: staging"), text
        yield found


@pytest.mark.timeout(3600)
def test_one_of_a_pair_is_master_and_the_other_is_not(pair: Pair) -> None:
    assert sorted(pair.roles().values()) == ["backup", "master"]
    assert "nothing to change" in pair.run(pair.fleet(), "plan")
