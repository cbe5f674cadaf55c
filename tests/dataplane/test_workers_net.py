"""Several workers of a real dsnatd, with packets that nobody brings to the right one.

net_af_packet has no RSS that could be followed: the kernel spreads packets over its queues as it likes. So
every packet may come to any worker, and all of them must reach the worker of their session over the rings.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, config, interfaces, new_gateway, ping
from tests.lab import Lab, wait_until
from tests.traffic import SERVER

pytestmark = pytest.mark.net

PORT, FLOWS = 7103, 60


@pytest.fixture(params=[("dpdk", 3), ("dpdk", 2), ("kernel-inside", 3), ("kernel-outside", 3)])
def gateway(lab: Lab, program: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[Gateway]:
    path, workers = request.param
    text = config(interfaces=interfaces(path), workers=workers)
    made = new_gateway(lab, program("dsnatd"), text, path=path)
    yield made
    made.close()


def echo(gateway: Gateway, stop: threading.Event) -> threading.Thread:
    """UDP and TCP, each byte back to where it came from."""
    ready = threading.Event()

    def serve_tcp(peer: socket.socket) -> None:
        with peer:
            while data := peer.recv(4096):
                peer.sendall(data)

    def job() -> None:
        with ExitStack() as undo:
            listener = undo.enter_context(socket.create_server((SERVER, PORT), backlog=256))
            listener.settimeout(0.1)
            datagrams = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            datagrams.bind((SERVER, PORT))
            datagrams.settimeout(0.01)
            ready.set()
            while not stop.is_set():
                with suppress(TimeoutError):
                    threading.Thread(target=serve_tcp, args=(listener.accept()[0],), daemon=True).start()
                with suppress(TimeoutError):
                    while True:
                        data, sender = datagrams.recvfrom(4096)
                        datagrams.sendto(data, sender)

    thread = threading.Thread(target=gateway.server.inside, args=(job,), daemon=True)
    thread.start()
    assert ready.wait(20)
    return thread


def flows(gateway: Gateway, kind: int, count: int = FLOWS) -> list[socket.socket]:
    """So many sockets at once, each of which has had its own words back."""

    def job() -> list[socket.socket]:
        made = []
        for number in range(count):
            one = socket.socket(socket.AF_INET, kind)
            one.settimeout(20)
            one.connect((SERVER, PORT))
            one.send(f"hello {number}".encode())
            made.append(one)
        return made

    made: list[socket.socket] = gateway.client.inside(job)
    for number, one in enumerate(made):
        assert one.recv(4096) == f"hello {number}".encode()
    return made


def handovers(gateway: Gateway) -> dict[str, int]:
    """Of a gateway that has come to rest: what is handed over has been taken over."""
    counters: dict[str, Any] = {}

    def rests() -> bool:
        counters.update(gateway.counters())
        return bool(counters["handed_over"] == counters["taken_over"])

    wait_until("the rings to be empty", rests)
    by_cause: dict[str, int] = counters["handed_over_by_cause"]
    assert sum(by_cause.values()) == counters["handed_over"]
    return {cause: n for cause, n in by_cause.items() if n}


def test_every_flow_reaches_its_worker_and_comes_back(gateway: Gateway) -> None:
    stop = threading.Event()
    server = echo(gateway, stop)
    assert " 3 received" in ping(gateway.client, SERVER)  # next hops are known: no datagram waits for one
    with ExitStack() as undo:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            for number, one in enumerate([undo.enter_context(flow) for flow in flows(gateway, kind)]):
                for word in range(3):
                    one.send(f"again {number} {word}".encode())
                    assert one.recv(4096) == f"again {number} {word}".encode()
        shown = gateway.show("sessions", limit=1000)["sessions"]
        assert len({one["worker"] for one in shown}) == len(gateway.show("workers")["workers"])
        assert len({(one["protocol"], one["outside"]) for one in shown}) == len(shown) >= 2 * FLOWS
        assert set(handovers(gateway)) <= {"no_rss", "icmp", "queue"}
    stop.set()
    server.join(20)


def test_all_ports_of_all_workers_are_used_before_a_flow_is_refused(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    ports = 100
    rest = f"""\
pools:
  - {{name: small, addresses: [203.0.113.1], ports: 5000-{5000 + ports - 1}}}
zones:
  - {{source: 100.64.0.0/16, pool: small}}
"""
    gateway = new_gateway(lab, program("dsnatd"), config(workers=4, rest=rest))
    stop = threading.Event()
    server = echo(gateway, stop)
    assert " 3 received" in ping(gateway.client, SERVER)
    with ExitStack() as undo:
        made = [undo.enter_context(one) for one in flows(gateway, socket.SOCK_DGRAM, ports)]
        assert gateway.drops().get("no_port", 0) == 0
        for number, one in enumerate(made):  # requests go where their port was borrowed
            one.send(f"again {number}".encode())
        for number, one in enumerate(made):
            assert one.recv(4096) == f"again {number}".encode()
        assert handovers(gateway)["borrowed"] > 0
        extra = gateway.client.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        undo.enter_context(extra)
        extra.sendto(b"one too many", (SERVER, PORT))
        wait_until("the refusal", lambda: gateway.drops().get("no_port", 0) == 1)
    stop.set()
    server.join(20)
    gateway.close()


def test_sessions_live_on_with_another_number_of_workers(lab: Lab, program: Callable[[str], Path]) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(workers=2), start=False)
    sessions = Path("/dev/shm", f"{lab.prefix}.sessions")
    lab.undo.callback(sessions.unlink, missing_ok=True)
    gateway.start("--sessions", str(sessions))
    gateway.address()
    stop = threading.Event()
    server = echo(gateway, stop)
    open_ones = flows(gateway, socket.SOCK_STREAM)
    for workers in (3, 1):
        gateway.close()
        gateway.file.write_text(config(workers=workers))
        gateway.start("--sessions", str(sessions))
        assert "going on with the sessions" in gateway.daemon.text()
        gateway.address()
        for number, one in enumerate(open_ones):
            one.send(f"after {workers} {number}".encode())
        for number, one in enumerate(open_ones):
            assert one.recv(4096) == f"after {workers} {number}".encode()
        assert handovers(gateway).get("away", 0) > 0 or workers == 1
    for one in open_ones:
        one.close()
    stop.set()
    server.join(20)
    gateway.close()


def test_a_port_whose_rss_can_be_read_is_followed_and_others_are_named(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    """net_null takes a key and a table and gives them back; net_af_packet has neither."""
    null = interfaces("dpdk").replace("net_af_packet0,iface=vin", "net_null0")
    gateway = new_gateway(lab, program("dsnatd"), config(interfaces=null, workers=3), start=False)
    gateway.start()
    said = gateway.daemon.text()
    assert "interface inside0" not in said
    assert (
        "dsnatd: interface outside0 has no RSS whose key and table can be read; packets are handed over"
        in said
    )
    gateway.close()
