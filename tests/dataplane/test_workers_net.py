"""Several workers of a real dsnatd, with packets that nobody brings to the right one.

net_af_packet has no RSS that could be followed: the kernel spreads packets over its queues as it likes. So
every packet may come to any worker, and all of them must reach the worker of their session over the rings.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.echo import PORT, echo, flows, talk
from tests.gateway import Gateway, config, interfaces, new_gateway, ping
from tests.lab import Lab, wait_until
from tests.traffic import SERVER

pytestmark = pytest.mark.net

FLOWS = 60


CREWS = [("dpdk", 3), ("dpdk", 2), ("kernel-inside", 3), ("kernel-outside", 3)]
CREWS += [("nfqueue", workers) for workers in (1, 2, 3)]


@pytest.fixture(params=CREWS, ids=[f"{path}-{workers}" for path, workers in CREWS])
def gateway(lab: Lab, program: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[Gateway]:
    path, workers = request.param
    text = config(interfaces=interfaces(path), workers=workers)
    made = new_gateway(lab, program("dsnatd"), text, path=path)
    yield made
    made.close()


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
    # routes and next hops are known: no datagram is too early, or waits for one
    wait_until("a ping", lambda: " 3 received" in ping(gateway.client, SERVER))
    with echo(gateway.server, SERVER), ExitStack() as undo:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            made = [undo.enter_context(one) for one in flows(gateway.client, SERVER, kind, FLOWS)]
            for word in range(3):
                talk(made, f"again {word}")
        shown = gateway.show("sessions", limit=1000)["sessions"]
        assert len({one["worker"] for one in shown}) == len(gateway.show("workers")["workers"])
        assert len({(one["protocol"], one["outside"]) for one in shown}) == len(shown) >= 2 * FLOWS
        assert set(handovers(gateway)) <= {"no_rss", "icmp", "queue"}


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
    assert " 3 received" in ping(gateway.client, SERVER)
    with echo(gateway.server, SERVER), ExitStack() as undo:
        made = [undo.enter_context(one) for one in flows(gateway.client, SERVER, socket.SOCK_DGRAM, ports)]
        assert gateway.drops().get("no_port", 0) == 0
        talk(made, "again")  # requests go where their port was borrowed
        assert handovers(gateway)["borrowed"] > 0
        extra = gateway.client.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        undo.enter_context(extra)
        extra.sendto(b"one too many", (SERVER, PORT))
        wait_until("the refusal", lambda: gateway.drops().get("no_port", 0) == 1)
    gateway.close()


def test_sessions_live_on_with_another_number_of_workers(lab: Lab, program: Callable[[str], Path]) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(workers=2), start=False)
    sessions = Path("/dev/shm", f"{lab.prefix}.sessions")
    lab.undo.callback(sessions.unlink, missing_ok=True)
    gateway.start("--sessions", str(sessions))
    gateway.address()
    with echo(gateway.server, SERVER):
        open_ones = flows(gateway.client, SERVER, socket.SOCK_STREAM, FLOWS)
        for workers in (3, 1):
            gateway.close()
            gateway.file.write_text(config(workers=workers))
            gateway.start("--sessions", str(sessions))
            assert "going on with the sessions" in gateway.daemon.text()
            gateway.address()
            talk(open_ones, f"after {workers}")
            assert handovers(gateway).get("away", 0) > 0 or workers == 1
        for one in open_ones:
            one.close()
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
