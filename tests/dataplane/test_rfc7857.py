"""RFC 7857, updates to RFC 4787, 5382 and 5508. It numbers no requirements, so its sections stand in."""

from __future__ import annotations

import pytest

from tests.packet import fragments, icmp_error, joined, ping, pong, read, tcp, udp
from tests.replay import ED, EIM, Answer, Bench, Start, configuration, outside

BOTH = pytest.mark.parametrize("mapping", [EIM, ED])
HOST, REMOTE = "100.64.0.2:40000", "198.51.100.1:80"


def play(replay: Bench, segments: str) -> str:
    """Segments such as ">S <SA >A" (out, in); the outside address and port."""
    mapped = ""
    for segment in segments.split():
        if segment[0] == ">":
            mapped = outside(replay.send(tcp(f"{HOST} > {REMOTE}", segment[1:])))
        else:
            answer = replay.send(tcp(f"{REMOTE} > {mapped}", segment[1:]), on="outside0")
            assert answer.packet.destination == HOST
    return mapped


def state(replay: Bench) -> str:
    (session,) = replay.sessions()
    found: str = session["state"]
    return found


@BOTH
@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (">S", "opening"),
        (">S >S", "opening"),
        (">S <SA", "established"),
        (">S <S >SA <SA", "established"),
        (">S <SA >A <PA >FA", "established"),  # half closed
        (">S <SA >A <FA <PA >A", "established"),
        (">S <SA >A >FA <FA", "closing"),
        (">S <SA >A <FA >FA", "closing"),
        (">S <SA >A >R", "closing"),
        (">S <SA >A <R", "closing"),
        (">S <RA", "closing"),
        (">S <SA >A <R >A", "established"),  # the RST was not the remote's
        (">S <SA >A <R <PA", "established"),
        (">S <SA >A >FA <FA >S", "opening"),  # the ports again
        (">S <SA >A >FA <FA >S <SA", "established"),
        (">S <SA >A >R >S <SA >A", "established"),
    ],
)
def test_rfc7857_s2_the_state_follows_what_both_ends_send(
    bench: Start, mapping: str, segments: str, expected: str
) -> None:
    replay = bench(configuration(mapping))
    play(replay, segments)
    assert state(replay) == expected


@BOTH
def test_rfc7857_s2_1_opening_and_closing_have_timers_of_their_own(bench: Start, mapping: str) -> None:
    for segments, lives_s in ((">S", 250), (">S <SA >A >FA <FA", 300), (">S <SA >A", 900)):
        timers = "timeouts: {tcp_opening: 250s, tcp_closing: 300s, tcp_established: 900s}"
        replay = bench(configuration(mapping, extra=timers))
        play(replay, segments)
        replay.wait(lives_s - 0.5)
        assert len(replay.sessions()) == 1
        replay.wait(3)
        assert replay.sessions() == []


@BOTH
def test_rfc7857_s2_1_the_defaults_are_four_minutes(bench: Start, mapping: str) -> None:
    for segments in (">S", ">S <SA >A >FA <FA"):
        replay = bench(configuration(mapping))
        play(replay, segments)
        assert 240 <= replay.sessions()[0]["expires_s"] <= 242


@BOTH
def test_rfc7857_s2_2_a_reset_is_translated_and_the_session_stays_four_minutes(
    bench: Start, mapping: str
) -> None:
    replay = bench(configuration(mapping))
    mapped = play(replay, ">S <SA >A <R")
    late = replay.send(tcp(f"{REMOTE} > {mapped}", "PA", b"late"), on="outside0", after_s=239)
    assert (late.packet.destination, late.packet.payload) == (HOST, b"late")


@BOTH
def test_rfc7857_s2_2_a_blind_reset_ends_nothing(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = play(replay, ">S <SA >A <R")
    assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", "A"), after_s=200)) == mapped
    assert (
        replay.send(tcp(f"{REMOTE} > {mapped}", "A"), on="outside0", after_s=7000).packet.destination == HOST
    )


def test_rfc7857_s3_an_outside_port_serves_again_towards_another_remote(bench: Start) -> None:
    replay = bench(configuration(ED, addresses="203.0.113.1", ports="5000-5000"))
    first = replay.send(udp("100.64.0.2:1111 > 198.51.100.1:80"))
    second = replay.send(udp("100.64.0.3:2222 > 198.51.100.2:80"))
    assert outside(first) == outside(second) == "203.0.113.1:5000"
    for host, remote in (("100.64.0.2:1111", "198.51.100.1:80"), ("100.64.0.3:2222", "198.51.100.2:80")):
        reply = replay.send(udp(f"{remote} > 203.0.113.1:5000"), on="outside0")
        assert reply.packet.destination == host


@BOTH
def test_rfc7857_s4_tcp_udp_and_icmp_of_a_host_share_its_address(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, "select: paired", addresses="203.0.113.1-203.0.113.64"))
    for n in range(1, 30):
        host = f"100.64.0.{n}"
        sent = replay(
            tcp(f"{host}:1000 > {REMOTE}"), udp(f"{host}:1000 > {REMOTE}"), ping(f"{host} > 198.51.100.1")
        )
        assert len({answer.packet.source_address for answer in sent}) == 1


def test_rfc7857_s5_a_mapping_is_of_one_protocol(bench: Start) -> None:
    """The same inside port in UDP and TCP are two mappings, and may get two ports."""
    replay = bench(configuration(EIM, addresses="203.0.113.1"))
    pairs = [
        (outside(replay.send(udp(f"{host} > {REMOTE}"))), outside(replay.send(tcp(f"{host} > {REMOTE}"))))
        for host in (f"100.64.0.2:{port}" for port in range(5000, 5020))
    ]
    assert any(by_udp != by_tcp for by_udp, by_tcp in pairs)


def test_rfc7857_s6_a_filter_is_of_one_protocol(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = outside(replay.send(udp(f"{HOST} > {REMOTE}")))
    assert replay.send(udp(f"192.0.2.9:9 > {mapped}"), on="outside0").verdict == "forward"
    knock = replay.send(tcp(f"192.0.2.9:9 > {mapped}", "S"), on="outside0")
    assert (knock.verdict, knock.reason) == ("drop", "no_session")


def test_rfc7857_s7_visitors_do_not_keep_a_mapping(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = outside(replay.send(udp(f"{HOST} > {REMOTE}")))
    for _ in range(11):
        assert replay.send(udp(f"192.0.2.9:9 > {mapped}"), on="outside0", after_s=10).verdict == "forward"
    assert replay.send(udp(f"192.0.2.9:9 > {mapped}"), on="outside0", after_s=12).reason == "no_session"


def test_rfc7857_s7_1_what_the_host_refuses_does_not_keep_a_mapping(bench: Start) -> None:
    """A prober knocks, the host says "closed" by RST or ICMP error: the mapping still ends in time."""

    def refusal(protocol: str, knock: Answer) -> bytes:
        if protocol == "tcp":
            return tcp(f"{HOST} > 192.0.2.9:9", "RA")
        return icmp_error("100.64.0.2 > 192.0.2.9", 3, 3, knock.out[0].raw)

    for protocol, make, lives_s in (("tcp", tcp, 240), ("udp", udp, 120)):
        replay = bench(configuration(EIM))
        mapped = outside(replay.send(make(f"{HOST} > {REMOTE}")))
        for _ in range(lives_s // 10 - 1):
            knock = replay.send(make(f"192.0.2.9:9 > {mapped}"), on="outside0", after_s=10)
            assert knock.packet.destination == HOST
            answer = replay.send(refusal(protocol, knock))
            assert answer.packet.source_address == mapped.split(":")[0]
        late = replay.send(make(f"192.0.2.9:9 > {mapped}"), on="outside0", after_s=12)
        assert late.reason == "no_session"


def test_rfc7857_s8_endpoint_dependent_ports_have_no_parity(bench: Start) -> None:
    replay = bench(configuration(ED))
    ports = [
        replay.send(udp(f"100.64.0.2:{port} > {REMOTE}")).packet.sport for port in range(20000, 20200, 2)
    ]
    assert 20 < sum(port % 2 for port in ports) < 80


@BOTH
def test_rfc7857_s9_the_seed_decides_the_ports_and_nothing_else_does(bench: Start, mapping: str) -> None:
    """Two engines of one seed agree; of a host's own ports and of time the outside port tells nothing."""
    flows = [f"100.64.0.2:{port} > {REMOTE}" for port in range(20000, 20100)]
    first, again = (
        [outside(answer) for answer in bench(configuration(mapping))(*map(udp, flows))] for _ in "12"
    )
    assert first == again
    ports = [int(one.split(":")[1]) for one in first]
    assert sum(abs(port - own) < 512 for port, own in zip(ports, range(20000, 20100), strict=True)) < 10


@BOTH
def test_rfc7857_s10_two_hosts_with_one_identification_do_not_collide(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, addresses="203.0.113.1"))
    whole = {
        host: fragments(udp(f"{host} > {REMOTE}", bytes([n]) * 3000), 1480, ident=77)
        for n, host in enumerate(("100.64.0.2:1000", "100.64.0.3:1000"))
    }
    first, second = whole.values()
    mixed = [part for pair in zip(first, second, strict=True) for part in pair]
    out = [one.raw for answer in replay(*mixed) for one in answer.out]
    by_ident: dict[bytes, list[bytes]] = {}
    for raw in out:
        by_ident.setdefault(raw[4:6], []).append(raw)
    assert len(by_ident) == 2
    assert {read(joined(parts)).payload for parts in by_ident.values()} == {bytes([n]) * 3000 for n in (0, 1)}


@BOTH
def test_rfc7857_s11_the_mapping_of_a_query_goes_with_its_last_session(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, extra="timeouts: {hold: 0s}"))
    sent = replay.send(ping("100.64.0.2 > 198.51.100.1", ident=7))
    replay.wait(62)
    assert replay.sessions() == []
    reply = pong(f"198.51.100.1 > {sent.packet.source_address}", ident=sent.packet.sport)
    assert replay.send(reply, on="outside0").reason == "no_session"


def test_rfc7857_s12_a_hairpinned_error_reaches_the_host_that_caused_it(bench: Start) -> None:
    replay = bench(configuration(EIM))
    theirs = outside(replay.send(udp("100.64.0.3:7000 > 198.51.100.1:80")))
    there = replay.send(udp(f"100.64.0.2:6000 > {theirs}", ttl=40))
    error = replay.send(icmp_error(f"100.64.0.3 > {there.packet.source_address}", 3, 3, there.out[0].raw))
    assert error.packet.destination_address == "100.64.0.2"
    assert error.packet.quoted is not None
    assert (error.packet.quoted.source, error.packet.quoted.destination) == ("100.64.0.2:6000", theirs)
