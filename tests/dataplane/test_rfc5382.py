"""RFC 5382, NAT behaviour for TCP: one test or more for each requirement, seen from outside.

inside   100.64.0.2, 100.64.0.3 ... --- [ gateway, 203.0.113.1-203.0.113.4 ] --- 198.51.100.x, 192.0.2.x
"""

from __future__ import annotations

import pytest

from tests.packet import icmp_error, read, tcp
from tests.replay import ED, EIM, Answer, Bench, Start, configuration, outside

BOTH = pytest.mark.parametrize("mapping", [EIM, ED])
HOST, REMOTE = "100.64.0.2:40000", "198.51.100.1:80"


def inbound(replay: Bench, flow: str, flags: str, *, after_s: float = 0) -> Answer:
    return replay.send(tcp(flow, flags), on="outside0", after_s=after_s)


def connect(replay: Bench, host: str = HOST, remote: str = REMOTE) -> str:
    """Three segments; the outside address and port."""
    mapped = outside(replay.send(tcp(f"{host} > {remote}", "S")))
    assert inbound(replay, f"{remote} > {mapped}", "SA").packet.destination == host
    assert outside(replay.send(tcp(f"{host} > {remote}", "A"))) == mapped
    return mapped


def test_rfc5382_req1_every_destination_sees_the_same_outside_address_and_port(bench: Start) -> None:
    replay = bench(configuration(EIM))
    remotes = ["198.51.100.1:80", "198.51.100.1:81", "192.0.2.9:80"]
    assert len({connect(replay, HOST, remote) for remote in remotes}) == 1


@BOTH
def test_rfc5382_req2_a_connection_opens_transfers_half_closes_and_closes(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = connect(replay)
    for flags in ("PA", "A", "FA", "A"):
        assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", flags))) == mapped
    for flags in ("A", "PA", "FA"):  # the other half stays open as long as it likes
        assert inbound(replay, f"{REMOTE} > {mapped}", flags, after_s=3600).packet.destination == HOST
    assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", "A"))) == mapped


@BOTH
def test_rfc5382_req2_segments_that_are_lost_and_sent_again_pass(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = outside(replay.send(tcp(f"{HOST} > {REMOTE}", "S")))
    for wait_s in (1, 2, 4, 8, 16, 32, 64):
        assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", "S"), after_s=wait_s)) == mapped
    for _ in range(3):
        assert inbound(replay, f"{REMOTE} > {mapped}", "SA", after_s=3).packet.destination == HOST


@BOTH
def test_rfc5382_req2_a_new_connection_may_follow_on_the_same_ports(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = connect(replay)
    replay.send(tcp(f"{HOST} > {REMOTE}", "FA"))
    inbound(replay, f"{REMOTE} > {mapped}", "FA")
    replay.send(tcp(f"{HOST} > {REMOTE}", "A"))
    assert connect(replay) == mapped
    assert inbound(replay, f"{REMOTE} > {mapped}", "A", after_s=7439).packet.destination == HOST


@BOTH
def test_rfc5382_req2a_both_ends_may_open_at_once(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = outside(replay.send(tcp(f"{HOST} > {REMOTE}", "S")))
    assert inbound(replay, f"{REMOTE} > {mapped}", "S").packet.destination == HOST
    assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", "SA"))) == mapped
    assert inbound(replay, f"{REMOTE} > {mapped}", "SA").packet.destination == HOST
    assert inbound(replay, f"{REMOTE} > {mapped}", "A", after_s=7439).packet.destination == HOST


def test_rfc5382_req2a_a_syn_from_outside_may_cross_the_one_from_inside(bench: Start) -> None:
    """The remote's SYN is let in by the mapping, before the host's own leaves on the same tuple."""
    replay = bench(configuration(EIM))
    mapped = connect(replay, remote="192.0.2.9:9")
    assert inbound(replay, f"{REMOTE} > {mapped}", "S").packet.destination == HOST
    assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", "S"))) == mapped
    assert inbound(replay, f"{REMOTE} > {mapped}", "SA").packet.destination == HOST
    assert inbound(replay, f"{REMOTE} > {mapped}", "A", after_s=7439).packet.destination == HOST


@pytest.mark.parametrize(
    ("filtering", "same_address", "other_address"),
    [
        ("", "ok", "ok"),
        ("filtering: address-dependent", "ok", "filtered"),
        ("filtering: address-and-port-dependent", "filtered", "filtered"),
    ],
)
def test_rfc5382_req3_a_mapping_lets_in_whom_its_filter_names(
    bench: Start, filtering: str, same_address: str, other_address: str
) -> None:
    replay = bench(configuration(EIM, filtering))
    mapped = connect(replay)
    assert inbound(replay, f"198.51.100.1:4444 > {mapped}", "S").reason == same_address
    assert inbound(replay, f"192.0.2.9:4444 > {mapped}", "S").reason == other_address


def test_rfc5382_req3_a_connection_begun_outside_is_one_like_any_other(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = connect(replay)
    visitor = "192.0.2.9:4444"
    assert inbound(replay, f"{visitor} > {mapped}", "S").packet.destination == HOST
    assert outside(replay.send(tcp(f"{HOST} > {visitor}", "SA"))) == mapped
    assert inbound(replay, f"{visitor} > {mapped}", "A").packet.destination == HOST
    assert inbound(replay, f"{visitor} > {mapped}", "PA", after_s=7439).packet.destination == HOST
    assert outside(replay.send(tcp(f"{HOST} > {visitor}", "A"))) == mapped


def test_rfc5382_req3_a_closed_port_says_so_to_a_visitor(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = connect(replay)
    inbound(replay, f"192.0.2.9:4444 > {mapped}", "S")
    reset = replay.send(tcp(f"{HOST} > 192.0.2.9:4444", "RA"))
    assert (outside(reset), reset.packet.tcp_flags) == (mapped, "RA")


@BOTH
def test_rfc5382_req4_an_uninvited_syn_gets_no_answer_for_six_seconds(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, extra="refusal: icmp-admin\ntcp_midflow: reset"))
    knock = inbound(replay, "198.51.100.1:80 > 203.0.113.1:5000", "S")
    assert (knock.verdict, knock.reason, knock.out) == ("drop", "no_session", ())
    assert all(replay.wait(0.5).out == () for _ in range(14))


@BOTH
def test_rfc5382_req4_a_syn_from_inside_meanwhile_opens_the_connection(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, addresses="203.0.113.1", ports="5000-5000"))
    knock = inbound(replay, f"{REMOTE} > 203.0.113.1:5000", "S")
    assert (knock.verdict, knock.out) == ("drop", ())
    mapped = outside(replay.send(tcp(f"{HOST} > {REMOTE}", "S"), after_s=3))
    assert mapped == "203.0.113.1:5000"
    assert inbound(replay, f"{REMOTE} > {mapped}", "S", after_s=1).packet.destination == HOST
    assert replay.wait(10).out == ()


@BOTH
def test_rfc5382_req4a_an_uninvited_syn_is_never_answered(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    knock = inbound(replay, "198.51.100.1:80 > 203.0.113.1:5000", "S")
    assert (knock.verdict, knock.out) == ("drop", ())
    assert all(replay.wait(60).out == () for _ in range(5))
    assert replay.counters()["made"] == 0


@BOTH
def test_rfc5382_req5_an_established_connection_may_be_idle_for_two_hours_and_four_minutes(
    bench: Start, mapping: str
) -> None:
    replay = bench(configuration(mapping))
    mapped = connect(replay)
    assert inbound(replay, f"{REMOTE} > {mapped}", "A", after_s=7439.9).packet.destination == HOST
    assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", "A"), after_s=7439.9)) == mapped


@BOTH
def test_rfc5382_req5_a_half_open_or_closing_one_for_four_minutes(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = outside(replay.send(tcp(f"{HOST} > {REMOTE}", "S")))
    assert inbound(replay, f"{REMOTE} > {mapped}", "SA", after_s=239.9).packet.destination == HOST
    replay.send(tcp(f"{HOST} > {REMOTE}", "FA"))
    inbound(replay, f"{REMOTE} > {mapped}", "FA")
    assert outside(replay.send(tcp(f"{HOST} > {REMOTE}", "A"), after_s=239.9)) == mapped


@BOTH
def test_rfc5382_req6_the_payload_of_an_ftp_command_is_left_alone(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    connect(replay, HOST, "198.51.100.1:21")
    command = b"PORT 100,64,0,2,156,64\r\n"
    sent = replay.send(tcp(f"{HOST} > 198.51.100.1:21", "PA", command))
    assert sent.packet.payload == command


def test_rfc5382_req7_no_two_hosts_share_an_outside_port(bench: Start) -> None:
    replay = bench(configuration(EIM, addresses="203.0.113.1-203.0.113.2", ports="5000-5049"))
    answers = replay(*(tcp(f"100.64.0.{n}:4000 > 198.51.{n}.1:80") for n in range(1, 101)))
    assert len({outside(answer) for answer in answers}) == 100
    assert replay.send(tcp("100.64.0.200:4000 > 192.0.2.1:80")).reason == "no_port"


def test_rfc5382_req8_hosts_connect_by_their_public_addresses(bench: Start) -> None:
    replay = bench(configuration(EIM))
    server, client = "100.64.0.3:7000", "100.64.0.2:6000"
    mapped = connect(replay, server)
    syn = replay.send(tcp(f"{client} > {mapped}", "S"))
    assert (syn.out[0].interface, syn.packet.destination) == ("inside0", server)
    public = syn.packet.source
    answer = replay.send(tcp(f"{server} > {public}", "SA"))
    assert (answer.packet.source, answer.packet.destination) == (mapped, client)
    ack = replay.send(tcp(f"{client} > {mapped}", "A"))
    assert (ack.packet.source, ack.packet.destination) == (public, server)
    late = replay.send(tcp(f"{server} > {public}", "PA", b"still there"), after_s=7439)
    assert (late.packet.destination, late.packet.payload) == (client, b"still there")


def test_rfc5382_req8a_a_hairpinned_segment_has_the_senders_public_source(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mine = connect(replay, "100.64.0.2:6000")
    theirs = connect(replay, "100.64.0.3:7000")
    assert replay.send(tcp(f"100.64.0.2:6000 > {theirs}", "S")).packet.source == mine


@BOTH
@pytest.mark.parametrize("code", range(16))
def test_rfc5382_req9_an_unreachable_message_reaches_the_host(bench: Start, mapping: str, code: int) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(tcp(f"{HOST} > {REMOTE}", "S", mss=1460))
    error = icmp_error(f"192.0.2.254 > {sent.packet.source_address}", 3, code, sent.out[0].raw, rest=1400)
    answer = replay.send(error, on="outside0")
    assert answer.packet.destination == "100.64.0.2:0"
    assert (answer.packet.icmp_type, answer.packet.icmp_code) == (3, code)
    # the quoted packet is the host's own, to the last byte, as it would be after one hop
    assert answer.out[0].raw[28:] == tcp(f"{HOST} > {REMOTE}", "S", mss=1460, ttl=63)
    assert answer.out[0].raw[24:28] == (1400).to_bytes(4)


@BOTH
def test_rfc5382_req10_an_icmp_error_ends_no_connection(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = connect(replay)
    sent = replay.send(tcp(f"{HOST} > {REMOTE}", "A"))
    before = replay.sessions()
    for code in range(16):
        error = icmp_error(f"198.51.100.1 > {sent.packet.source_address}", 3, code, sent.out[0].raw)
        assert replay.send(error, on="outside0").verdict == "forward"
    assert replay.sessions() == before
    assert inbound(replay, f"{REMOTE} > {mapped}", "A", after_s=7439).packet.destination == HOST
    assert read(replay.send(tcp(f"{HOST} > {REMOTE}", "A")).out[0].raw).source == mapped
