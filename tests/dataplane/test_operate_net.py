"""Operating a gateway that carries traffic, on both paths: reload, explain, capture."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsnatctl import explain
from tests.gateway import INSIDE_ADDRESS, POOLS_AND_ZONES, Gateway, config, new_gateway, ping
from tests.lab import Lab, wait_until
from tests.traffic import CLIENT, SERVER

pytestmark = pytest.mark.net

IDLE = 1000
POOLS = (  # what the reloads turn the pools into, in turn
    "  - {name: public, addresses: [203.0.113.1-203.0.113.4]}\n",
    "  - {name: public, addresses: [203.0.113.1-203.0.113.5]}\n",  # one more
    "  - {name: public, addresses: [203.0.113.1-203.0.113.5], drain: [203.0.113.2]}\n",
    "  - {name: public, addresses: [203.0.113.5, 203.0.113.3-203.0.113.4, 203.0.113.1]}\n",
    "  - {name: more, addresses: [203.0.113.9]}\n  - {name: public, addresses: [203.0.113.3-203.0.113.4]}\n",
    "  - {name: public, addresses: [203.0.113.4, 203.0.113.1]}\n  - {name: more, addresses: [203.0.113.8]}\n",
)


@pytest.fixture(params=["dpdk", "nfqueue"])
def gateway(lab: Lab, program: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[Gateway]:
    made = new_gateway(lab, program("dsnatd"), path=request.param)
    yield made
    made.close()


class Idle:
    """TCP connections that do nothing, both ends in our hand."""

    def __init__(self, gateway: Gateway, count: int) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(most[0], min(4096, most[1])), most[1]))
        self.near: list[socket.socket] = []
        self.far: list[socket.socket] = []
        self.listener = gateway.server.inside(lambda: socket.create_server((SERVER, 7000), backlog=64))
        gateway.client.inside(lambda: self.connect(count))

    def connect(self, count: int) -> None:
        for _ in range(count):
            self.near.append(socket.create_connection((SERVER, 7000), timeout=20))
            peer, _ends = self.listener.accept()
            peer.settimeout(20)
            self.far.append(peer)

    def speak(self, step: int = 1, first: int = 0) -> int:
        """A byte each way over every `step`-th connection; a reset or a hole is an exception here."""
        spoken = 0
        for near, far in list(zip(self.near, self.far, strict=True))[first::step]:
            near.sendall(b"?")
            assert far.recv(1) == b"?"
            far.sendall(b"!")
            assert near.recv(1) == b"!"
            spoken += 1
        return spoken

    def close(self) -> None:
        for one in (*self.near, *self.far, self.listener):
            one.close()


class Iperf:
    """iperf3 from the client to the server, as long as the test lasts."""

    def __init__(self, gateway: Gateway, name: str, port: int, *options: str) -> None:
        self.server = gateway.server.start(
            *("iperf3", "-s", "-1", "-J", "-p", str(port), "-B", SERVER),
            log=f"{name}-server.json",
            errors=f"{name}-server.log",
        )
        gateway.server.wait_for_listener(self.server, port)
        self.client = gateway.client.start(
            *("iperf3", "-c", SERVER, "-p", str(port), "-J", *options),
            log=f"{name}-client.json",
            errors=f"{name}-client.log",
        )

    def result(self) -> dict[str, Any]:
        self.client.wait(timeout_s=120)
        said: dict[str, Any] = json.loads(self.client.text())
        assert "error" not in said, said["error"]
        self.server.wait(timeout_s=30)
        end: dict[str, Any] = said["end"]
        return end


def wires(gateway: Gateway) -> dict[str, int]:
    """What the kernel dropped on the wires, and what a port's receive ring had no room for: net_af_packet
    does not say, but the wire counts what came and the engine what it got.
    """
    lost = {}
    ends = [(gateway.client, "eth0"), (gateway.server, "eth0")]
    ends += [(gateway.space, gateway.port(side)) for side in ("inside", "outside")]
    read = {}
    for space, name in ends:
        cells = space.run("sh", "-c", f"sed -n 's/^ *{name}://p' /proc/net/dev").split()
        read[name] = int(cells[1])
        lost[f"{name} of {space.name.rpartition('-')[2]}"] = int(cells[3]) + int(cells[11])
    for port in gateway.show("ports")["ports"]:
        if port["path"] == "dpdk":
            lost[f"{port['name']} receive ring"] = read[gateway.port(port["role"])] - port["rx_packets"]
    return lost


def losses(gateway: Gateway) -> dict[str, int]:
    """Everything between the two ends that counts its drops: engine, ports, wires, the server's socket."""
    udp = [
        line.split()[1:]
        for line in gateway.server.run("cat", "/proc/net/snmp").splitlines()
        if "Udp:" in line
    ]
    return {
        **gateway.drops(),
        **wires(gateway),
        **{f"{port['name']} missed": port["rx_missed"] for port in gateway.show("ports")["ports"]},
        "full socket of the server": int(dict(zip(*udp, strict=True))["RcvbufErrors"]),
    }


@pytest.mark.timeout(600)
def test_reloads_that_change_the_pools_reset_no_connection_and_lose_nothing_uncounted(
    gateway: Gateway, request: pytest.FixtureRequest
) -> None:
    reloads = int(request.config.getoption("--reloads"))
    seconds = str(max(6, reloads // 3))
    idle = Idle(gateway, IDLE)
    before = losses(gateway)
    tcp = Iperf(gateway, "tcp", 5201, "-t", seconds, "-b", "20M")
    udp = Iperf(gateway, "udp", 5202, "-t", seconds, "-u", "-b", "5M", "-l", "1200")
    head = gateway.file.read_text().partition("pools:\n")[0]

    for number in range(1, reloads + 1):
        pools = POOLS[number % len(POOLS)]
        zones = "zones:\n  - {source: 100.64.0.0/16, pool: public}\n"
        gateway.file.write_text(f"{head}pools:\n{pools}{zones}")
        gateway.ask(cmd="reload")
        assert idle.speak(step=50, first=number % 50) == IDLE // 50
    ended = {"tcp": tcp.result(), "udp": udp.result()}

    assert idle.speak() == IDLE
    counted = {name: n - before[name] for name, n in losses(gateway).items() if n > before[name]}
    lost = ended["udp"]["sum"]["lost_packets"]
    again = ended["tcp"]["sum_sent"]["retransmits"]
    received = ended["tcp"]["sum_received"]["bytes"]
    print(
        f"{gateway.path}: {reloads} reloads, {IDLE} connections, {received} bytes of TCP, {again} resent, "
        f"{lost} of {ended['udp']['sum']['packets']} datagrams lost, counted drops: {counted or 'none'}"
    )
    # a segment may be sent again because its answer was late, so TCP is judged by its end, UDP by its numbers
    assert received > 0
    assert lost <= sum(counted.values()), (lost, counted)
    idle.close()


def test_explain_foretells_what_a_real_packet_then_gets(gateway: Gateway) -> None:
    raw = explain.packet("icmp", f"{CLIENT}:4711", SERVER)
    said = gateway.ask(cmd="explain", **{"if": "inside0"}, pkt=raw.hex())
    assert said["verdict"] == "forward"
    assert gateway.show("sessions")["sessions"] == []

    assert " 3 received" in ping(gateway.client, SERVER, "-e", "4711")

    assert [one["outside"] for one in gateway.show("sessions")["sessions"]] == [said["outside"]]
    again = gateway.ask(cmd="explain", **{"if": "inside0"}, pkt=raw.hex())
    assert (again["new_session"], again["outside"]) == (False, said["outside"])


def test_capture_shows_pings_on_both_sides_and_costs_no_packet(gateway: Gateway) -> None:
    ident = gateway.ask(cmd="capture", start=True)["id"]
    packets: list[dict[str, Any]] = []

    def seen() -> bool:
        packets.extend(one for one in gateway.ask(cmd="capture", id=ident)["packets"] if "after" in one)
        return len(packets) >= 6

    assert " 3 received" in ping(gateway.client, SERVER)
    wait_until("three pings and their answers", seen)
    answer = gateway.ask(cmd="capture", id=ident, stop=True)

    first, second = packets[:2]
    assert (first["before"]["if"], first["after"]["if"]) == ("inside0", "outside0")
    assert (second["before"]["if"], second["after"]["if"]) == ("outside0", "inside0")
    assert explain.ends_of(bytes.fromhex(first["before"]["pkt"])) == f"{CLIENT} > {SERVER}"
    assert explain.ends_of(bytes.fromhex(first["after"]["pkt"])).startswith("203.0.113.")
    assert answer["lost"] == 0


def flood(count: int) -> None:
    """UDP packets of as many sessions, from 250 hosts at most; called in the client's namespace."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        gateway = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        gateway.sendto(b"", (INSIDE_ADDRESS, 9))  # so that the kernel learns where it is
        gateway.close()
        wait_until("the gateway's MAC address", lambda: "100.64.0.1" in arp_table())
        mac = bytes.fromhex(arp_table()["100.64.0.1"].replace(":", ""))
        ether = mac + b"\x02\0\0\0\0\1\x08\0"
        for n in range(count):
            near = f"100.64.{1 + n // 50_000}.{1 + n % 250}:{1024 + n // 250 % 60_000}"
            raw.send(ether + explain.packet("udp", near, f"{SERVER}:{5000 + n % 8}"))
            if n % 64 == 0:
                time.sleep(0.001)  # a receive ring of af_packet is small


def arp_table() -> dict[str, str]:
    rows = [line.split() for line in Path("/proc/thread-self/net/arp").read_text().splitlines()[1:]]
    return {row[0]: row[3] for row in rows if row[3] != "00:00:00:00:00:00"}


@pytest.mark.timeout(900)
def test_listing_all_sessions_never_keeps_a_worker_from_packets_for_long(
    lab: Lab, program: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    wanted = int(request.config.getoption("--sessions"))
    file = config(sessions=wanted + 1000, rest=f"{POOLS_AND_ZONES}timeouts: {{udp_one_way: 1h}}\n")
    gateway = new_gateway(lab, program("dsnatd"), file)
    gateway.client.inside(lambda: flood(wanted))
    wait_until("the last packet", lambda: settled(gateway))
    there = gateway.show("counters")["counters"]["sessions"]

    started, seen, longest_s = time.monotonic(), 0, 0.0
    cursor: dict[str, str] = {}
    while True:
        before = time.monotonic()
        page = gateway.show("sessions", limit=1000, **cursor)
        longest_s = max(longest_s, time.monotonic() - before)
        seen += len(page["sessions"])
        if "next" not in page:
            break
        cursor = {"cursor": page["next"]}

    pause_us = max(one["longest_job_ns"] for one in gateway.show("workers")["workers"]) / 1000
    print(
        f"{seen} sessions listed in {time.monotonic() - started:.1f} s, longest answer {longest_s:.3f} s, "
        f"longest that the worker was kept from packets: {pause_us:.0f} us"
    )
    assert seen == there > wanted / 2  # a busy machine loses part of the flood before the engine sees it
    assert pause_us < 1e6, "no step may take so long, on however busy a machine"
    gateway.close()


def settled(gateway: Gateway) -> bool:
    before = gateway.counters()["received"]
    time.sleep(0.3)
    return bool(gateway.counters()["received"] == before)
