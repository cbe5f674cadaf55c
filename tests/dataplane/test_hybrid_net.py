"""One pool for hosts behind a DPDK port and hosts behind an interface that the kernel keeps.

    dpdk host   100.64.0.10 --- vin [ inside0          outside0 ] vout --- server 198.51.100.10
    kernel host 100.65.0.10 ------- [ tunnel0                    ]

tunnel0 is a veth in the place of a WireGuard tunnel. The outside is on either path. The engine is one, so
there is one table of sessions; what this shows is that packets change path in both directions and that no
two sessions share an outside tuple. (No fragments here: net_af_packet's fanout puts them together.)
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gateway import PATHS, WIRES, Gateway, config, new_gateway, ping
from tests.lab import Lab, Netns, wait_until
from tests.traffic import SERVER

pytestmark = pytest.mark.net

KERNEL_HOST, TUNNEL = "100.65.0.10", "100.65.0.1"
PORT = 7002
CLIENTS_EACH = 100

REST = """\
pools:
  - {name: public, addresses: [203.0.113.1]}
zones:
  - {source: 100.64.0.0/15, pool: public}
timeouts: {hold: 0s}
"""


def hybrid(lab: Lab, program: Path, outside: str) -> tuple[Gateway, Netns]:
    device = ', device: "net_af_packet1,iface=vout"' if outside == "dpdk" else ""
    interfaces = f"""\
interfaces:
  - {{name: inside0, role: inside, path: dpdk, device: "net_af_packet0,iface=vin"}}
  - {{name: tunnel0, role: inside, path: nfqueue}}
  - {{name: outside0, role: outside, path: {outside}{device}}}
"""
    path = "dpdk" if outside == "dpdk" else "kernel-outside"
    assert WIRES[PATHS[path]["inside"]]["inside"] == "vin"
    gateway = new_gateway(lab, program, config(interfaces=interfaces, rest=REST), path=path, start=False)
    host = lab.netns("tunnel")
    lab.wire(host, "eth0", gateway.space, "tunnel0")
    host.ip(f"address add {KERNEL_HOST}/24 dev eth0")
    host.ip(f"route add default via {TUNNEL}")
    gateway.space.ip(f"address add {TUNNEL}/24 dev tunnel0")
    gateway.start()
    gateway.address()
    return gateway, host


@dataclass
class Echo:
    """A server that gives every connection's bytes back, and notes from which public tuple each came."""

    space: Netns
    tuples: list[tuple[str, int]] = field(default_factory=list)
    shared: list[tuple[str, int]] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with ExitStack() as undo, selectors.DefaultSelector() as waiting:
            listener = undo.enter_context(socket.create_server((SERVER, PORT), backlog=512))
            listener.setblocking(False)
            waiting.register(listener, selectors.EVENT_READ)
            live: Counter[tuple[str, int]] = Counter()
            self.ready.set()
            while not self.stop.is_set():
                for key, _ in waiting.select(0.2):
                    if key.fileobj is listener:
                        peer, address = listener.accept()
                        waiting.register(peer, selectors.EVENT_READ, address)
                        self.tuples.append(address)
                        live[address] += 1
                        if live[address] > 1:
                            self.shared.append(address)
                        continue
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(4096)
                    if data:
                        key.fileobj.sendall(data)
                    else:
                        live[key.data] -= 1
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()


def talk(space: Netns, clients: int, seconds: float) -> int:
    """So many TCP connections at once, each checking its own bytes until the time is over: rounds."""

    def job() -> int:
        rounds = 0
        with ExitStack() as undo:
            open_ones = [
                undo.enter_context(socket.create_connection((SERVER, PORT), timeout=20))
                for _ in range(clients)
            ]
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for number, client in enumerate(open_ones):
                    client.sendall(f"{space.name} {number} {rounds}".encode())
                for number, client in enumerate(open_ones):
                    assert client.recv(4096) == f"{space.name} {number} {rounds}".encode()
                rounds += 1
        return rounds

    return space.inside(job)


@pytest.mark.parametrize("outside", ["dpdk", "nfqueue"])
def test_200_clients_over_both_paths_share_one_address_and_no_tuple(
    lab: Lab, program: Callable[[str], Path], outside: str, request: pytest.FixtureRequest
) -> None:
    gateway, host = hybrid(lab, program("dsnatd"), outside)
    for space in (gateway.client, host):
        wait_until("a ping", lambda space=space: " 3 received" in ping(space, SERVER))  # type: ignore[misc]
    before = gateway.drops()  # what came before the routes stood
    echo = Echo(gateway.server)
    server = threading.Thread(target=gateway.server.inside, args=(echo.run,), daemon=True)
    server.start()
    assert echo.ready.wait(10)
    rounds: list[int] = []
    failed: list[str] = []
    seconds = float(request.config.getoption("--hybrid-seconds"))

    def one_path(space: Netns) -> None:
        try:
            rounds.append(talk(space, CLIENTS_EACH, seconds))
        except (OSError, AssertionError) as error:
            failed.append(f"{space.name}: {error!r}")

    both = [threading.Thread(target=one_path, args=(space,)) for space in (gateway.client, host)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(seconds + 60)
    echo.stop.set()
    server.join(10)
    assert not failed
    assert len(rounds) == 2
    assert min(rounds) > 0
    assert len(echo.tuples) == 2 * CLIENTS_EACH
    assert {address for address, _ in echo.tuples} == {"203.0.113.1"}
    assert not echo.shared
    assert gateway.drops() == before

    def exact() -> bool:
        counters = gateway.counters()
        settled = counters["forwarded"] + counters["passed"] + sum(before.values())
        return bool(counters["received"] == settled)

    wait_until("every packet to be forwarded or passed", exact)
    print(f"{gateway.counters()['forwarded']} packets forwarded, {min(rounds)} and {max(rounds)} rounds")
    gateway.close()


@pytest.mark.parametrize("outside", ["dpdk", "nfqueue"])
def test_ping_and_errors_change_path_in_both_directions(
    lab: Lab, program: Callable[[str], Path], outside: str
) -> None:
    gateway, host = hybrid(lab, program("dsnatd"), outside)
    for space, first in ((gateway.client, "100.64.0.1"), (host, TUNNEL)):
        wait_until("a ping", lambda space=space: " 3 received" in ping(space, SERVER))  # type: ignore[misc]
        trace = space.run("traceroute", "-n", "-I", "-q", "1", "-w", "2", "-m", "4", SERVER).splitlines()
        assert [line.split()[1] for line in trace[1:]] == [first, SERVER], trace
        # an error from outside about a packet of this host: nobody listens on that port
        with pytest.raises(ConnectionRefusedError):
            space.inside(refused)
    gateway.close()


def refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((SERVER, 9))
        client.send(b"to nobody")
        client.recv(10)


@pytest.mark.parametrize("outside", ["dpdk", "nfqueue"])
def test_a_host_on_one_path_reaches_a_host_on_the_other_untranslated(
    lab: Lab, program: Callable[[str], Path], outside: str
) -> None:
    gateway, host = hybrid(lab, program("dsnatd"), outside)
    gateway.space.run("sysctl", "-qw", "net.ipv4.ip_forward=1")  # inside to inside is the kernel's
    assert " 3 received" in ping(gateway.client, KERNEL_HOST)
    assert " 3 received" in ping(host, "100.64.0.10")
    assert gateway.counters()["forwarded"] == 0
    gateway.close()
