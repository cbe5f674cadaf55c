"""Hosts ask for mappings of their own: PCP (RFC 6887) and NAT-PMP (RFC 6886), byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from tests.packet import tcp, udp
from tests.replay import Bench, outside

CONFIG = """\
engine: {workers: 1, max_sessions: 10000}
interfaces:
  - {name: inside0, role: inside}
  - {name: outside0, role: outside}
pools:
  - {name: p, addresses: [203.0.113.1-203.0.113.4], ports: 1024-65535, mapping: endpoint-independent,
     filtering: address-and-port-dependent}
  - {name: ed, addresses: [203.0.113.9]}
zones:
  - {source: 100.64.0.0/16, pool: p}
  - {source: 100.65.0.0/16, pool: ed}
limits: {sessions_per_host: 3}
timeouts: {hold: 0s}
port_control: on
"""
TCP, UDP = 6, 17
NONCE = b"twelve bytes"


@pytest.fixture
def nat(bench: Callable[[str], Bench]) -> Bench:
    return bench(CONFIG)


def mapped(address: str) -> bytes:
    return bytes(10) + b"\xff\xff" + IPv4Address(address).packed


def pcp(opcode: int, lifetime: int, client: str, data: bytes = b"", *, version: int = 2) -> bytes:
    return struct.pack("!BBHI", version, opcode, 0, lifetime) + mapped(client) + data


def map_data(
    protocol: int, port: int, suggested: str = "0.0.0.0", suggested_port: int = 0, nonce: bytes = NONCE
) -> bytes:
    return nonce + struct.pack("!B3xHH", protocol, port, suggested_port) + mapped(suggested)


def ask(nat: Bench, client: str, request: bytes) -> bytes:
    answer = nat.ctl(cmd="pcp", client=client, request=request.hex())
    assert answer["ok"], answer
    return bytes.fromhex(answer["answer"])


def result_of(answer: bytes) -> int:
    assert answer[0] == 2
    assert answer[1] & 0x80
    return answer[3]


def given(answer: bytes) -> str:
    """ADDRESS:PORT of a MAP answer."""
    assert result_of(answer) == 0
    assert answer[24:36] == NONCE
    port = struct.unpack("!H", answer[42:44])[0]
    return f"{IPv4Address(answer[56:60])}:{port}"


def lifetime_of(answer: bytes) -> int:
    lifetime: int = struct.unpack("!I", answer[4:8])[0]
    return lifetime


def test_rfc6888_req9_anybody_reaches_a_host_over_the_mapping_that_it_asked_for(nat: Bench) -> None:
    answer = ask(nat, "100.64.0.2", pcp(1, 3600, "100.64.0.2", map_data(TCP, 8080)))
    assert lifetime_of(answer) == 3600
    knock = nat.send(tcp(f"198.51.100.7:999 > {given(answer)}"), on="outside0")
    assert knock.packet.destination == "100.64.0.2:8080"
    reply = nat.send(tcp("100.64.0.2:8080 > 198.51.100.7:999", "SA", ack=1001))
    assert reply.packet.source == given(answer)


def test_a_mapping_that_was_asked_for_is_the_one_that_the_hosts_own_traffic_uses(nat: Bench) -> None:
    answer = ask(nat, "100.64.0.2", pcp(1, 3600, "100.64.0.2", map_data(UDP, 5000)))
    assert outside(nat.send(udp("100.64.0.2:5000 > 198.51.100.1:53"))) == given(answer)


def test_a_suggested_address_and_port_are_given_when_they_are_free(nat: Bench) -> None:
    wanted = map_data(TCP, 8080, "203.0.113.3", 4444)
    assert given(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", wanted))) == "203.0.113.3:4444"
    other = map_data(TCP, 8080, "203.0.113.3", 4444)
    assert given(ask(nat, "100.64.0.3", pcp(1, 600, "100.64.0.3", other))) != "203.0.113.3:4444"


def test_a_mapping_ends_when_its_time_is_over_and_lives_when_it_is_renewed(nat: Bench) -> None:
    request = pcp(1, 600, "100.64.0.2", map_data(TCP, 8080))
    first = given(ask(nat, "100.64.0.2", request))
    nat.wait(500)
    assert given(ask(nat, "100.64.0.2", request)) == first
    nat.wait(500)
    assert nat.send(tcp(f"198.51.100.7:999 > {first}"), on="outside0").verdict == "forward"
    nat.wait(1000)
    nat.wait(1000)
    assert nat.send(tcp(f"198.51.100.7:998 > {first}"), on="outside0").reason == "no_session"


def test_lifetime_zero_ends_a_mapping(nat: Bench) -> None:
    first = given(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 8080))))
    assert lifetime_of(ask(nat, "100.64.0.2", pcp(1, 0, "100.64.0.2", map_data(UDP, 8080)))) == 0
    assert nat.send(udp(f"198.51.100.7:999 > {first}"), on="outside0").reason == "no_session"


@pytest.mark.parametrize("nonce", [b"twelve bytez", b"Twelve bytes", bytes(12), b"\xff" * 12])
def test_rfc6888_req9_who_does_not_know_the_nonce_can_neither_end_nor_renew_a_mapping(
    nat: Bench, nonce: bytes
) -> None:
    """RFC 6887 section 11.3: the error's lifetime is what the mapping has left."""
    first = given(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 8080))))
    nat.wait(100)
    forged = map_data(UDP, 8080, nonce=nonce)
    to_remote = struct.pack("!H2x", 53) + mapped("198.51.100.1")
    for opcode, lifetime, data in ((1, 0, forged), (1, 7200, forged), (2, 0, forged + to_remote)):
        answer = ask(nat, "100.64.0.2", pcp(opcode, lifetime, "100.64.0.2", data))
        assert result_of(answer) == 2
        assert 498 <= lifetime_of(answer) <= 500
    assert ask(nat, "100.64.0.2", struct.pack("!BB2xHHI", 0, 1, 8080, 0, 0))[3] == 2, "NAT-PMP has none"
    assert nat.send(udp(f"198.51.100.7:999 > {first}"), on="outside0").verdict == "forward"
    assert lifetime_of(ask(nat, "100.64.0.2", pcp(1, 900, "100.64.0.2", map_data(UDP, 8080)))) == 900
    assert lifetime_of(ask(nat, "100.64.0.2", pcp(1, 0, "100.64.0.2", map_data(UDP, 8080)))) == 0
    assert nat.send(udp(f"198.51.100.7:999 > {first}"), on="outside0").reason == "no_session"
    assert given(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 8081))))


def test_a_mapping_that_has_ended_is_anybodys_again(nat: Bench) -> None:
    ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 8080)))
    nat.send(udp("100.64.0.2:8080 > 198.51.100.7:999"))
    ask(nat, "100.64.0.2", pcp(1, 0, "100.64.0.2", map_data(UDP, 8080)))
    other = map_data(UDP, 8080, nonce=b"other twelve")
    assert result_of(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", other))) == 0
    assert result_of(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 8080)))) == 2


def test_a_mapping_made_by_nat_pmp_is_the_first_nonces_that_renews_it(nat: Bench) -> None:
    ask(nat, "100.64.0.2", struct.pack("!BB2xHHI", 0, 1, 8080, 0, 3600))
    assert result_of(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 8080)))) == 0
    other = map_data(UDP, 8080, nonce=b"other twelve")
    assert result_of(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", other))) == 2


def test_a_peer_mapping_lets_in_only_whom_the_filter_lets_in(nat: Bench) -> None:
    data = map_data(UDP, 7000) + struct.pack("!H2x", 53) + mapped("198.51.100.1")
    answer = ask(nat, "100.64.0.2", pcp(2, 600, "100.64.0.2", data))
    assert nat.send(udp(f"198.51.100.7:999 > {given(answer)}"), on="outside0").reason == "filtered"
    assert outside(nat.send(udp("100.64.0.2:7000 > 198.51.100.1:53"))) == given(answer)


def test_mappings_count_within_the_hosts_limit(nat: Bench) -> None:
    results = [
        result_of(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 5000 + n))))
        for n in range(4)
    ]
    assert results == [0, 0, 0, 10]


@pytest.mark.parametrize(
    ("client", "request_bytes", "result"),
    [
        ("100.65.0.2", pcp(1, 600, "100.65.0.2", map_data(TCP, 80)), 2),
        ("100.99.0.2", pcp(1, 600, "100.99.0.2", map_data(TCP, 80)), 2),
        ("100.64.0.2", pcp(1, 600, "100.64.0.3", map_data(TCP, 80)), 12),
        ("100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(47, 80)), 9),
        ("100.64.0.2", pcp(5, 600, "100.64.0.2"), 4),
        ("100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(TCP, 80)[:-4]), 3),
        ("100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(TCP, 80) + b"\x02\0\0\0"), 5),
        ("100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(TCP, 80), version=9), 1),
        ("100.64.0.2", b"\x02\x01", 3),
    ],
)
def test_a_request_that_cannot_be_served_is_told_why(
    nat: Bench, client: str, request_bytes: bytes, result: int
) -> None:
    assert result_of(ask(nat, client, request_bytes)) == result


def test_an_announce_is_answered_and_an_answer_is_not(nat: Bench) -> None:
    assert result_of(ask(nat, "100.64.0.2", pcp(0, 0, "100.64.0.2"))) == 0
    assert ask(nat, "100.64.0.2", pcp(0x80, 0, "100.64.0.2")) == b""
    assert ask(nat, "100.64.0.2", b"\0") == b""


def test_an_optional_option_is_passed_over(nat: Bench) -> None:
    data = map_data(TCP, 80) + b"\x80\0\0\x03abc\0"
    assert given(ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", data)))


def test_nat_pmp_gives_the_address_that_its_mapping_then_has(nat: Bench) -> None:
    answer = ask(nat, "100.64.0.2", b"\0\0")
    assert (answer[:4], len(answer)) == (b"\0\x80\0\0", 12)
    mapping = ask(nat, "100.64.0.2", struct.pack("!BB2xHHI", 0, 2, 8080, 0, 3600))
    assert mapping[:4] == b"\0\x82\0\0"
    inside, port, lifetime = struct.unpack("!HHI", mapping[8:16])
    assert (inside, lifetime) == (8080, 3600)
    knock = nat.send(tcp(f"198.51.100.7:999 > {IPv4Address(answer[8:12])}:{port}"), on="outside0")
    assert knock.packet.destination == "100.64.0.2:8080"


def test_nat_pmp_refuses_what_it_does_not_serve(nat: Bench) -> None:
    assert ask(nat, "100.64.0.2", b"\0\x09")[3] == 5
    assert ask(nat, "100.65.0.2", struct.pack("!BB2xHHI", 0, 1, 8080, 0, 3600))[3] == 2


def test_everything_that_was_asked_for_is_gone_in_the_end(nat: Bench) -> None:
    answer = ask(nat, "100.64.0.2", pcp(1, 600, "100.64.0.2", map_data(UDP, 5000)))
    nat.send(udp(f"198.51.100.7:999 > {given(answer)}"), on="outside0")
    nat.send(udp("100.64.0.2:5000 > 198.51.100.7:999"))
    for _ in range(4):
        nat.wait(2000)
    counters = nat.ctl(cmd="show", what="counters")
    assert counters["equation"]
    assert counters["counters"]["sessions"] == 0
    assert [outside(nat.send(udp(f"100.64.0.2:{n} > 198.51.100.7:9"))) for n in range(3000, 3003)]
