"""Two booted gateways that share addresses and tell each other their sessions.

client 100.64.0.10 --- bridge in [ gw1, gw2 ] bridge out --- server 198.51.100.10

The first push makes a pair of them, the backup first. All tests of this file share the two machines, in
their order, and each leaves a pair that is well. Emulated CPUs are some twenty times slower than real ones:
what was dark or silent here is an upper bound.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from image.boot import MANAGEMENT_MAC, Machine, Nic
from image.identity import make_identity
from tests.crowd import Crowd
from tests.lab import Netns, new_lab, wait_until
from tests.provision.sshd import make_key
from tests.traffic import SERVER

pytestmark = pytest.mark.image

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600

FLEET = """\
schema: 1
defaults:
  ssh: {{identity: {key}, connect_timeout: 60s}}
  engine: {{workers: 1, max_sessions: {max_sessions}, spare: {spare}}}
  rollout: {{confirm_within: {window_s}s}}
pools:
  laddr_g1: {{addresses: [{pool}]}}
pairs:
  edge:
    sync: {{key: "file:edge.key", addresses: {{gw1: 100.64.0.2, gw2: 100.64.0.3}}}}
    vrrp:
      advert_interval: {advert}
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
    management: {{{interface}address: 127.0.0.1, port: {port}}}
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
        self.max_sessions, self.advert, self.spare = 100_000, "2s", "off"

    def fleet(
        self,
        pool: str = "203.0.113.1-203.0.113.4",
        window_s: int = 180,
        interface: str = "",
    ) -> Path:
        text = FLEET.format(
            key=self.key,
            pool=pool,
            max_sessions=self.max_sessions,
            spare=self.spare,
            advert=self.advert,
            window_s=window_s,
        )
        for n, machine in enumerate(self.machines, 1):
            assert machine.identity is not None
            text += MEMBER.format(
                n=n,
                own=n + 1,
                priority=150 - 25 * n,
                interface=interface,
                port=machine.ssh_port,
                host_key=machine.identity.host_key_public.strip(),
            )
        path = self.folder / "fleet.yaml"
        path.write_text(text)
        return path

    def argv(self, file: Path, *words: str) -> list[str]:
        return [sys.executable, "-m", "provision", "--file", str(file), *words]

    def run(self, file: Path, *words: str, status: int = 0) -> str:
        argv = self.argv(file, *words)
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def states(self) -> dict[str, dict[str, Any]]:
        """Of those that answer."""
        argv = self.argv(self.fleet(), "status", "--json")
        done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=False)
        found: dict[str, dict[str, Any]] = json.loads(done.stdout)["gateways"]
        return found

    def answer(self) -> bool:
        return len(self.states()) == 2

    def roles(self) -> dict[str, str]:
        return {name: state["role"] for name, state in self.states().items()}

    def machine(self, name: str) -> Machine:
        return self.machines[int(name.removeprefix("gw")) - 1]

    def wait_until_equal(self) -> dict[str, dict[str, Any]]:
        """Until one is master, the other is not, and both have the same sessions. Gives their states."""

        def equal() -> dict[str, dict[str, Any]] | None:
            states = self.states()
            roles = {s["role"] for s in states.values()}
            good = roles == {"master", "backup"} and all(
                s["sync"].startswith("equal") for s in states.values()
            )
            return states if good else None

        return wait_until("a pair with the same sessions", equal, deadline_s=PATIENCE_S)


def master_and_backup(states: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(states, key=lambda name: str(states[name]["role"]), reverse=True)


class Traffic:
    """Four iperf3 streams through the pair, slow enough for emulated machines, as long as the block takes.

    At its end nothing was reset, the same connections are there, and bytes still flow; `seen` says so.
    """

    def __init__(self, pair: Pair, name: str) -> None:
        self.pair, self.name, self.seen = pair, name, ""

    def __enter__(self) -> Traffic:
        listen = ("iperf3", "-s", "-1", "-B", "198.51.100.10")
        self.server = self.pair.server.start(*listen, log=f"{self.name}-server.log")
        self.pair.server.wait_for_listener(self.server, 5201)
        self.resets_before = self.resets()
        words = ("iperf3", "-J", "-c", "198.51.100.10", "-P", "4", "-b", "250K", "-t", "3000")
        self.client = self.pair.client.start(*words, log=f"{self.name}-client.json")
        self.connections = wait_until("four streams", self.established, deadline_s=60)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.seen = self.end()
        finally:
            self.client.stop()
            self.server.stop()

    def established(self) -> list[str]:
        """The ports of the client, when all its connections are there: four streams and one of control."""
        shown = self.pair.client.run("ss", "-Htn", "state", "established", "dport", "=", ":5201")
        ports = sorted(line.split()[2].rpartition(":")[2] for line in shown.splitlines())
        return ports if len(ports) == 5 else []

    def resets(self) -> int:
        """Received by either end since it was made."""
        total = 0
        for side in (self.pair.client, self.pair.server):
            counted = json.loads(side.run("nstat", "-a", "-s", "-z", "-j", "TcpEstabResets"))["kernel"]
            total += int(counted["TcpEstabResets"])
        return total

    def end(self) -> str:
        assert self.client.running, self.client.text()[-2000:]
        assert self.established() == self.connections
        assert self.resets() == self.resets_before
        self.client.process.send_signal(signal.SIGINT)
        self.client.wait(timeout_s=60)
        said = json.loads(self.client.text())
        seconds = [interval["sum"]["bytes"] for interval in said["intervals"]]
        assert any(seconds[-5:]), "the streams are open and nothing flows"
        silent = longest = 0
        for count in seconds:
            silent = 0 if count else silent + 1
            longest = max(longest, silent)
        rate = sum(seconds) * 8 / len(seconds) / 1e6
        again = sum(interval["sum"].get("retransmits", 0) for interval in said["intervals"])
        return (
            f"{len(seconds)} s of 4 streams at {rate:.2f} Mbit/s in all, no reset, {again} segments again, "
            f"at most {longest} s without a byte"
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, built_image: Path) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    key = folder / "operator"
    public = make_key(key)
    (folder / "edge.key").write_text("5a" * 32 + "\n")
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
            machine = Machine(built_image, folder / f"gw{n}", identity, nics, firmware=False, reboot=True)
            machines.append(undo.enter_context(machine))
            machine.wait_ready()
        found = Pair(folder, key, machines, client, server)
        wait_until("two gateways that answer", found.answer, deadline_s=PATIENCE_S)
        text = found.run(found.fleet(), "push", "--yes")
        assert text.index("gw2: confirmed") < text.index("gw1: staging"), text
        yield found


@pytest.mark.timeout(3600)
def test_one_of_a_pair_is_master_and_the_other_is_not(pair: Pair) -> None:
    pair.wait_until_equal()
    assert "nothing to change" in pair.run(pair.fleet(), "plan")


@pytest.mark.timeout(3600)
def test_a_rolling_push_under_iperf3_resets_no_connection(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    master, backup = master_and_backup(pair.wait_until_equal())
    with Traffic(pair, "push") as traffic:
        began = time.monotonic()
        text = pair.run(pair.fleet(pool="203.0.113.1-203.0.113.8"), "push", "--yes")
        took = time.monotonic() - began
        assert text.index(f"{backup}: confirmed") < text.index(f"{master}: staging"), text
    with capsys.disabled():
        print(f"\nrolling push, {took:.0f} s: {traffic.seen}")


@pytest.mark.scenario
@pytest.mark.timeout(3600)
def test_a_rolling_push_that_restarts_both_engines_resets_no_connection(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table's size is made at the engine's start: the master hands over, and its peer has the sessions."""
    master, backup = master_and_backup(pair.wait_until_equal())
    with Traffic(pair, "restart") as traffic:
        began = time.monotonic()
        pair.max_sessions = 120_000
        text = pair.run(pair.fleet(), "push", "--yes")
        took = time.monotonic() - began
        assert text.index(f"{backup}: confirmed") < text.index(f"{master}: handing over"), text
    with capsys.disabled():
        print(f"\nrolling push with both engines restarted, {took:.0f} s: {traffic.seen}")


@pytest.mark.scenario
@pytest.mark.timeout(3600)
def test_a_drained_master_hands_its_addresses_over_and_takes_part_again_when_asked(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    master, backup = master_and_backup(pair.wait_until_equal())
    with Traffic(pair, "drain") as traffic:
        log = pair.client.start("ping", "-n", "-D", "-i", "0.1", "198.51.100.10", log="drain-ping.log")
        assert f"{backup} has the VRRP addresses now" in pair.run(pair.fleet(), "drain", master)
        assert pair.roles() == {master: "backup, drained", backup: "master"}
        refused = pair.run(pair.fleet(), "drain", backup, status=3)
        assert f"its peer {master} is drained itself" in refused
        assert "takes part in VRRP again" in pair.run(pair.fleet(), "drain", master, "--undo")
        pair.wait_until_equal()
        log.stop()
    heard = [float(at) for at in re.findall(r"(?m)^\[([\d.]+)\] 64 bytes", log.text())]
    gap = max(b - a for a, b in pairwise(heard))
    with capsys.disabled():
        print(f"\ndrain and back: {traffic.seen}; a ping each 100 ms missed {gap * 1000:.0f} ms at most")


@pytest.mark.scenario
@pytest.mark.timeout(3600)
def test_a_push_that_cuts_the_backup_off_comes_back_and_leaves_the_master_alone(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """The address that is right for the operator's side of the port forwarding is wrong on the gateway."""
    before = pair.wait_until_equal()
    master, backup = master_and_backup(before)
    wrong = pair.fleet(interface="interface: mgmt0, ", window_s=20)
    with Traffic(pair, "cut") as traffic:
        began = time.monotonic()
        text = pair.run(wrong, "push", "--yes", status=5)
        took = time.monotonic() - began
    assert re.search(rf"{backup}: reverted .*undone by the gateway: nobody confirmed it in time", text), text
    assert f"{master}: staging" not in text
    after = pair.states()
    assert {n: s["generation"] for n, s in after.items()} == {n: s["generation"] for n, s in before.items()}
    with capsys.disabled():
        print(f"\na push that cuts its own way, {took:.0f} s until it was back and said so: {traffic.seen}")


@pytest.mark.scenario
@pytest.mark.timeout(3600)
def test_a_push_interrupted_by_power_off_is_undone_at_boot_and_said_to_the_operator(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pair.wait_until_equal()
    master, backup = master_and_backup(before)
    machine = pair.machine(backup)
    armed = "until test -e /var/lib/dsnat/pending; do sleep 0.1; done; echo armed"
    watch = machine.ssh_command(pair.key, armed)
    argv = pair.argv(pair.fleet(pool="203.0.113.1-203.0.113.9"), "push", "--yes")
    with Traffic(pair, "power") as traffic:
        began = time.monotonic()
        with subprocess.Popen(watch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as watcher:
            with subprocess.Popen(
                argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as push:
                assert watcher.stdout is not None
                assert watcher.stdout.readline() == "armed\n"
                machine.qmp("system_reset")
                heard, _ = push.communicate(timeout=PATIENCE_S)
            watcher.kill()
        took = time.monotonic() - began
        assert push.returncode == 5, heard
        assert re.search(rf"{backup}: reverted .*restarted before the change was confirmed", heard), heard
        assert f"{master}: staging" not in heard
        after = pair.wait_until_equal()
        assert {n: s["generation"] for n, s in after.items()} == {
            n: s["generation"] for n, s in before.items()
        }
    with capsys.disabled():
        print(f"\nthe backup's power cut while it applied, {took:.0f} s until it said so: {traffic.seen}")


@pytest.mark.scenario
@pytest.mark.timeout(3600)
def test_no_connection_is_lost_when_the_master_loses_its_engine_stands_still_or_loses_power(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """10,000 idle and 1,000 active TCP connections, four UDP streams and a ping go through it."""
    pair.advert = "1s"
    pair.run(pair.fleet(), "push", "--yes")
    pair.wait_until_equal()
    crowd = Crowd(pair.client, pair.server, SERVER, idle=10_000, active=1000, streams=4, pings=1, period_s=5)

    def master() -> Machine:
        return pair.machine(master_and_backup(pair.wait_until_equal())[0])

    def phase(what: str, do: Callable[[Machine], object]) -> int:
        machine = master()
        crowd.say("mark")
        do(machine)
        wait_until("traffic again", lambda: crowd.say("dark")["silent"] < 1, deadline_s=PATIENCE_S)
        pair.wait_until_equal()
        dark = crowd.say("dark")
        asked = crowd.say("ask")
        with capsys.disabled():
            print(
                f"\n{what}: {asked['lost']} of {crowd.of} lost, {asked['moved']} streams moved, dark for "
                f"{dark['stream']:.2f} s (stream), {dark['ping']:.2f} s (ping)  {'; '.join(asked['why'])}",
                flush=True,
            )
        return int(asked["lost"]) + int(asked["moved"])

    def stand_still(machine: Machine) -> None:
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            time.sleep(15)
        finally:
            os.kill(machine.pid, signal.SIGCONT)

    def kill_engine(machine: Machine) -> None:
        machine.ssh(pair.key, "systemctl", "kill", "--kill-whom=main", "--signal=KILL", "dsnatd")

    def prepared(machine: Machine) -> bool:
        return "is prepared to go on" in machine.ssh(pair.key, "journalctl -b -u dsnatd --no-pager").stdout

    faults: dict[str, Callable[[Machine], object]] = {
        "no fault": lambda _: time.sleep(10),
        "the engine restarted by systemd": lambda m: m.ssh(pair.key, "systemctl", "restart", "dsnatd"),
        "the engine killed": kill_engine,
        "the whole gateway still for 15 s": stand_still,
        "power cut, and on again": lambda m: m.qmp("system_reset"),
    }
    lost = {what: phase(what, do) for what, do in faults.items()}
    pair.spare = "on"
    pair.run(pair.fleet(), "push", "--yes")
    machine = master()
    wait_until("a prepared process", lambda: prepared(machine), deadline_s=PATIENCE_S)
    lost["killed, a spare goes on"] = phase("the engine killed, a spare goes on", kill_engine)
    assert (
        "goes on" in machine.ssh(pair.key, "journalctl -b -u dsnatd --no-pager").stdout.split("has died")[-1]
    )
    assert not any(lost.values()), lost
