"""Static mappings: a whole public address for one host, and single forwarded ports."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.packet import ping, pong, tcp, udp
from tests.replay import Bench, outside

CONFIG = """\
engine: {workers: 1, max_sessions: 10000}
interfaces:
  - {name: inside0, role: inside}
  - {name: outside0, role: outside}
pools:
  - {name: g1, addresses: [203.0.113.1-203.0.113.2], ports: 1024-1027, mapping: MAPPING}
zones:
  - {source: 100.64.0.0/16, pool: g1}
static:
  - {inside: 100.64.0.10, outside: 203.0.113.2}
  - {inside: 100.64.0.20, outside: 203.0.113.1, protocol: tcp, port: 1025, inside_port: 443}
"""


@pytest.fixture(params=["endpoint-dependent", "endpoint-independent"])
def nat(request: pytest.FixtureRequest, bench: Callable[[str], Bench]) -> Bench:
    return bench(CONFIG.replace("MAPPING", request.param))


def test_a_host_with_an_address_of_its_own_keeps_its_ports(nat: Bench) -> None:
    request = nat.send(udp("100.64.0.10:777 > 198.51.100.1:53"))
    assert outside(request) == "203.0.113.2:777"
    reply = nat.send(udp("198.51.100.1:53 > 203.0.113.2:777"), on="outside0")
    assert reply.packet.destination == "100.64.0.10:777"


def test_anybody_reaches_a_host_with_an_address_of_its_own(nat: Bench) -> None:
    knock = nat.send(tcp("198.51.100.9:999 > 203.0.113.2:22"), on="outside0")
    assert knock.packet.destination == "100.64.0.10:22"
    answer = nat.send(tcp("100.64.0.10:22 > 198.51.100.9:999", "SA", ack=1001))
    assert (answer.packet.source, answer.packet.destination) == ("203.0.113.2:22", "198.51.100.9:999")
    again = nat.send(tcp("198.51.100.9:999 > 203.0.113.2:22", "A", seq=1001, ack=1001), on="outside0")
    assert again.packet.destination == "100.64.0.10:22"


def test_a_host_with_an_address_of_its_own_answers_pings(nat: Bench) -> None:
    request = nat.send(ping("198.51.100.9 > 203.0.113.2", ident=5), on="outside0")
    assert request.packet.destination_address == "100.64.0.10"
    reply = nat.send(pong("100.64.0.10 > 198.51.100.9", ident=5))
    assert reply.packet.source_address == "203.0.113.2"


def test_a_forwarded_port_leads_to_its_host_and_only_that_port(nat: Bench) -> None:
    knock = nat.send(tcp("198.51.100.9:999 > 203.0.113.1:1025"), on="outside0")
    assert knock.packet.destination == "100.64.0.20:443"
    answer = nat.send(tcp("100.64.0.20:443 > 198.51.100.9:999", "SA", ack=1001))
    assert answer.packet.source == "203.0.113.1:1025"
    assert nat.send(tcp("198.51.100.9:999 > 203.0.113.1:1026"), on="outside0").reason == "no_session"
    assert nat.send(udp("198.51.100.9:999 > 203.0.113.1:1025"), on="outside0").reason == "no_session"


def test_nobody_else_is_given_a_reserved_address_or_a_forwarded_port(nat: Bench) -> None:
    given = [nat.send(tcp(f"100.64.0.{n}:5000 > 198.51.100.1:80")) for n in range(100, 104)]
    assert sorted(outside(a) for a in given[:3]) == [f"203.0.113.1:{port}" for port in (1024, 1026, 1027)]
    assert (given[3].verdict, given[3].reason) == ("drop", "no_port")


def test_every_session_over_a_static_mapping_ends(nat: Bench) -> None:
    nat.send(tcp("198.51.100.9:999 > 203.0.113.1:1025"), on="outside0")
    nat.send(udp("100.64.0.10:777 > 198.51.100.1:53"))
    for _ in range(3):
        nat.wait(4000)
    counters = nat.ctl(cmd="show", what="counters")
    assert counters["equation"]
    assert counters["counters"]["sessions"] == 0
