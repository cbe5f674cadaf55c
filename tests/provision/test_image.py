"""The promise on the shipped image: real systemd, networkd, keepalived, engine and sshd, booted in QEMU.

One machine serves all tests of this file, in their order; each leaves it with what the first push made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from image.boot import MANAGEMENT_MAC, Machine, Nic
from image.identity import make_identity
from tests.lab import new_lab
from tests.provision.sshd import make_key
from tests.provision.test_sshd import FLEET

pytestmark = pytest.mark.image

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600  # an emulated machine on a busy host


class Gateway:
    def __init__(self, machine: Machine, folder: Path, key: Path) -> None:
        self.machine, self.folder, self.key = machine, folder, key

    def fleet(self, *replace: tuple[str, str], window_s: int = 60) -> Path:
        assert self.machine.identity is not None
        text = FLEET.format(
            user="root",
            identity=self.key,
            window=window_s,
            pool="203.0.113.1-203.0.113.4",
            port=self.machine.ssh_port,
            host_key=self.machine.identity.host_key_public.strip(),
        )
        for old, new in replace:
            assert old in text
            text = text.replace(old, new)
        path = self.folder / "fleet.yaml"
        path.write_text(text)
        return path

    def run(self, file: Path, *words: str, status: int = 0) -> str:
        argv = [sys.executable, "-m", "provision", "--file", str(file), *words]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(self.fleet(), "status", "--json"))["gateways"]["gw1"]
        return found

    def ask(self, *words: str) -> str:
        return self.machine.ssh(self.key, *words).stdout.strip()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, built_image: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("image")
    key = folder / "operator"
    identity = make_identity("gw1", make_key(key), management=MANAGEMENT_MAC)
    with new_lab(folder / "lab") as lab:
        wires = lab.netns("wires")
        taps = [wires.open_tap("in0"), wires.open_tap("out0")]
        nics = [Nic((tap,), f"52:54:00:d5:01:0{n + 3}") for n, tap in enumerate(taps)]
        with Machine(built_image, folder / "gw1", identity, nics, firmware=False, reboot=True) as machine:
            machine.wait_ready()
            found = Gateway(machine, folder, key)
            found.run(found.fleet(window_s=120), "push", "--yes")
            yield found


def test_a_gateway_from_the_factory_is_configured_by_its_first_push(gateway: Gateway) -> None:
    state = gateway.state()
    assert (state["generation"], state["state"], state["role"]) == (1, "idle", "master")
    assert state["engine"] == "up"
    assert "nothing to change" in gateway.run(gateway.fleet(), "plan")


def test_a_change_of_the_pool_restarts_nothing(gateway: Gateway) -> None:
    show = ("systemctl", "show", "-p", "MainPID", "--value", "dsnatd", "keepalived")
    before = gateway.ask(*show)
    gateway.run(gateway.fleet(("203.0.113.4", "203.0.113.8")), "push", "--yes")
    assert "203.0.113.8" in gateway.ask("dsnatctl", "show", "pools")
    gateway.run(gateway.fleet(), "push", "--yes")
    assert gateway.ask(*show) == before


def test_a_push_that_cuts_its_own_management_off_comes_back_by_itself(gateway: Gateway) -> None:
    """The address that is right for the operator's side of the port forwarding is wrong on the gateway."""
    before = gateway.state()["generation"]
    wrong = gateway.fleet(
        ("management: {address: 127.0.0.1,", "management: {interface: mgmt0, address: 127.0.0.1,"),
        window_s=20,
    )
    text = gateway.run(wrong, "push", "--yes", status=6)
    assert "undone by the gateway: nobody confirmed it in time" in text
    assert gateway.state()["generation"] == before
    assert "was undone" in gateway.ask("cat", "/run/motd.d/dsnat")


def test_an_unconfirmed_change_does_not_survive_a_power_cut(gateway: Gateway) -> None:
    before = gateway.state()["generation"]
    file = gateway.fleet(("203.0.113.4", "203.0.113.9"))
    gateway.run(file, "push", "--yes", "--no-confirm", "--window", "3600")
    assert gateway.state()["generation"] != before
    boot = gateway.ask("cat", "/proc/sys/kernel/random/boot_id")
    gateway.machine.qmp("system_reset")
    end = time.monotonic() + PATIENCE_S
    while gateway.ask("cat", "/proc/sys/kernel/random/boot_id") in ("", boot):
        assert time.monotonic() < end, gateway.machine.console()[-2000:]
        time.sleep(2)
    state = gateway.state()
    assert (state["generation"], state["state"]) == (before, "idle")
    assert "restarted before the change was confirmed" in gateway.run(gateway.fleet(), "history")
    gateway.run(file, "confirm")
    assert gateway.state()["generation"] == before
