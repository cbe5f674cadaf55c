"""RFC 5508, NAT behaviour for ICMP: one test or more for each requirement, seen from outside.

inside   100.64.0.2, 100.64.0.3 ... --- [ gateway, 203.0.113.1-203.0.113.4 ] --- 198.51.100.x, 192.0.2.x
"""

from __future__ import annotations

import struct

import pytest

from tests.packet import ICMP, checksum, icmp, icmp_error, ipv4, ping, pong, tcp, udp
from tests.replay import ED, EIM, Answer, Bench, Start, configuration, outside

BOTH = pytest.mark.parametrize("mapping", [EIM, ED])
HOST, REMOTE = "100.64.0.2:40000", "198.51.100.1:80"


def about(sent: Answer, kind: int = 3, code: int = 3, *, sender: str = "192.0.2.254") -> bytes:
    """An error from outside that quotes what was sent."""
    return icmp_error(f"{sender} > {sent.packet.source_address}", kind, code, sent.out[0].raw)


def echo_reply(sent: Answer, *, sender: str = "198.51.100.1") -> bytes:
    return pong(f"{sender} > {sent.packet.source_address}", ident=sent.packet.sport)


def with_sum(message: bytes, flow: str) -> bytes:
    """An ICMP message with its checksum filled in, as a packet."""
    message = message[:2] + b"\0\0" + message[4:]
    return ipv4(flow, ICMP, message[:2] + struct.pack("!H", checksum(message)) + message[4:])


@BOTH
def test_rfc5508_req1_three_hosts_may_ping_one_target_with_one_identifier(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, addresses="203.0.113.1"))
    hosts = ["100.64.0.2", "100.64.0.3", "100.64.0.4"]
    sent = replay(*(ping(f"{host} > 198.51.100.1", ident=7) for host in hosts))
    assert len({outside(answer) for answer in sent}) == 3
    for host, answer in zip(hosts, sent, strict=True):
        reply = replay.send(echo_reply(answer), on="outside0")
        assert (reply.packet.destination, reply.packet.payload) == (f"{host}:7", b"payload!")


@BOTH
def test_rfc5508_req1_a_reply_that_nobody_asked_for_is_dropped(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    answer = replay.send(pong("198.51.100.1 > 203.0.113.1", ident=7), on="outside0")
    assert (answer.verdict, answer.reason) == ("drop", "no_session")


def test_rfc5508_req1a_every_target_sees_the_same_identifier(bench: Start) -> None:
    replay = bench(configuration(EIM))
    targets = ["198.51.100.1", "198.51.100.2", "192.0.2.9"]
    assert len({outside(replay.send(ping(f"100.64.0.2 > {target}", ident=7))) for target in targets}) == 1


@BOTH
def test_rfc5508_req2_a_reply_may_take_a_minute(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(ping("100.64.0.2 > 198.51.100.1", ident=7))
    reply = replay.send(echo_reply(sent), on="outside0", after_s=59.9)
    assert reply.packet.destination == "100.64.0.2:7"


@BOTH
def test_rfc5508_req2a_the_timer_is_a_setting(bench: Start, mapping: str) -> None:
    for setting, verdict in (("200s", "forward"), ("70s", "drop")):
        replay = bench(configuration(mapping, extra=f"timeouts: {{icmp: {setting}}}"))
        sent = replay.send(ping("100.64.0.2 > 198.51.100.1", ident=7))
        assert replay.send(echo_reply(sent), on="outside0", after_s=199).verdict == verdict


@BOTH
@pytest.mark.parametrize("inside", [False, True])
def test_rfc5508_req3_an_error_with_a_wrong_checksum_is_dropped(
    bench: Start, mapping: str, inside: bool
) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    error = about(sent)
    if inside:
        reply = replay.send(udp(f"{REMOTE} > {outside(sent)}"), on="outside0")
        error = icmp_error("100.64.0.2 > 198.51.100.1", 3, 3, reply.out[0].raw)
    broken = error[:-1] + bytes([error[-1] ^ 1])
    answer = replay.send(broken, on="inside0" if inside else "outside0")
    assert (answer.verdict, answer.reason, answer.out) == ("drop", "icmp_checksum", ())


@BOTH
def test_rfc5508_req3a_a_quote_with_a_wrong_header_checksum_is_dropped(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    quote = bytearray(sent.out[0].raw)
    quote[10] ^= 1
    answer = replay.send(
        icmp_error(f"192.0.2.254 > {sent.packet.source_address}", 3, 3, bytes(quote)), on="outside0"
    )
    assert (answer.verdict, answer.reason) == ("drop", "icmp_quote")


@BOTH
def test_rfc5508_req3b_options_in_the_quoted_header_are_skipped(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    record_route = bytes([7, 7, 4, 0, 0, 0, 0, 0])
    segment = udp(f"{HOST} > {REMOTE}", b"with options")[20:]
    sent = replay.send(ipv4(f"{HOST} > {REMOTE}", 17, segment, options=record_route, dont_fragment=True))
    answer = replay.send(about(sent), on="outside0")
    assert answer.packet.destination_address == "100.64.0.2"
    expected = ipv4(f"{HOST} > {REMOTE}", 17, segment, options=record_route, dont_fragment=True, ttl=63)
    assert answer.out[0].raw[28:] == expected


@BOTH
def test_rfc5508_req3c_the_quoted_transport_checksum_is_not_judged(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp(f"{HOST} > {REMOTE}", b"the payload", dont_fragment=True))
    quote = bytearray(sent.out[0].raw)
    quote[30] ^= 0xFF  # a byte of the payload: now the quoted UDP checksum is wrong
    error = icmp_error(f"192.0.2.254 > {sent.packet.source_address}", 3, 3, bytes(quote))
    # not read(): it would find the wrong checksum too
    line = replay.ask({"t_ns": replay.now_ns, "if": "outside0", "pkt": error.hex()})
    expected = bytearray(udp(f"{HOST} > {REMOTE}", b"the payload", ttl=63, dont_fragment=True))
    expected[30] ^= 0xFF
    assert bytes.fromhex(line["out"][0]["pkt"])[28:] == bytes(expected)


@BOTH
@pytest.mark.parametrize("payload", [b"", b"x" * 160])
def test_rfc5508_req3d_extensions_and_padding_are_carried_unchanged(
    bench: Start, mapping: str, payload: bytes
) -> None:
    """RFC 4884: a short quote is padded to 128 bytes, behind it stands an MPLS label stack."""
    replay = bench(configuration(mapping))
    sent = replay.send(tcp(f"{HOST} > {REMOTE}", "S", payload, dont_fragment=True))
    label = struct.pack("!HBBI", 8, 1, 1, 16 << 12 | 1 << 8 | 64)
    extension = struct.pack("!BBH", 0x20, 0, checksum(b"\x20\0\0\0" + label)) + label
    body = sent.out[0].raw[:128].ljust(128, b"\0") + extension
    flow = f"192.0.2.254 > {sent.packet.source_address}"
    answer = replay.send(with_sum(struct.pack("!BBHI", 11, 0, 0, 32 << 16) + body, flow), on="outside0")
    own = tcp(f"{HOST} > {REMOTE}", "S", payload, ttl=63, dont_fragment=True)
    assert answer.packet.destination_address == "100.64.0.2"
    assert answer.out[0].raw[28:] == own[:128].ljust(128, b"\0") + extension


@BOTH
@pytest.mark.parametrize("length", [28, 32, 36, 38, 40, 44, 100])
def test_rfc5508_req4a_the_quoted_packet_is_restored_however_much_of_it_is_there(
    bench: Start, mapping: str, length: int
) -> None:
    replay = bench(configuration(mapping))
    own = {
        make: make(f"{HOST} > {REMOTE}", payload=b"x" * 80, ttl=63, dont_fragment=True) for make in (udp, tcp)
    }
    for make, expected in own.items():
        sent = replay.send(make(f"{HOST} > {REMOTE}", payload=b"x" * 80, dont_fragment=True))
        error = icmp_error(f"192.0.2.254 > {sent.packet.source_address}", 11, 0, sent.out[0].raw[:length])
        answer = replay.send(error, on="outside0")
        assert answer.out[0].raw[28:] == expected[:length]


@BOTH
def test_rfc5508_req4a_a_quoted_ping_gets_its_identifier_back(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(ping("100.64.0.2 > 198.51.100.1", ident=7, ttl=2))
    answer = replay.send(about(sent, 11, 0), on="outside0")
    assert answer.packet.destination_address == "100.64.0.2"
    assert answer.out[0].raw[28:] == ping("100.64.0.2 > 198.51.100.1", ident=7, ttl=1)


@BOTH
@pytest.mark.parametrize(
    ("kind", "code"), [(3, 0), (3, 4), (3, 13), (4, 0), (11, 0), (11, 1), (12, 0), (12, 2)]
)
def test_rfc5508_req4b_type_and_code_stay(bench: Start, mapping: str, kind: int, code: int) -> None:
    replay = bench(configuration(mapping))
    answer = replay.send(about(replay.send(udp(f"{HOST} > {REMOTE}")), kind, code), on="outside0")
    assert (answer.packet.icmp_type, answer.packet.icmp_code) == (kind, code)


@BOTH
def test_rfc5508_req4c_only_the_outer_destination_changes(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    error = about(replay.send(udp(f"{HOST} > {REMOTE}")), sender="192.0.2.77")
    answer = replay.send(error, on="outside0")
    assert (answer.packet.source_address, answer.packet.destination_address) == ("192.0.2.77", "100.64.0.2")


@BOTH
def test_rfc5508_req4_an_error_about_nothing_is_dropped_in_silence(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    quoted = udp("203.0.113.1:5000 > 198.51.100.1:80")
    answer = replay.send(icmp_error("192.0.2.254 > 203.0.113.1", 3, 3, quoted), on="outside0")
    assert (answer.verdict, answer.reason, answer.out) == ("drop", "icmp_no_session", ())


def test_rfc5508_req4_a_mapping_is_enough_for_an_error_to_pass(bench: Start) -> None:
    """The session that the quoted packet belonged to is over, the mapping lives on through another one."""
    replay = bench(configuration(EIM))
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    replay.send(udp(f"{HOST} > 192.0.2.9:9"), after_s=100)
    answer = replay.send(about(sent), on="outside0", after_s=100)
    assert answer.packet.quoted is not None
    assert (answer.packet.destination_address, answer.packet.quoted.source) == ("100.64.0.2", HOST)


def closed_port(replay: Bench) -> tuple[Answer, Answer]:
    """A request, and the error with which the host meets the reply to it."""
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    reply = replay.send(udp(f"{REMOTE} > {outside(sent)}", b"to a closed port"), on="outside0")
    return sent, replay.send(icmp_error("100.64.0.2 > 198.51.100.1", 3, 3, reply.out[0].raw))


@BOTH
def test_rfc5508_req5a_an_error_from_inside_quotes_what_its_receiver_sent(bench: Start, mapping: str) -> None:
    sent, error = closed_port(bench(configuration(mapping)))
    assert error.out[0].interface == "outside0"
    assert error.out[0].raw[28:] == udp(f"{REMOTE} > {outside(sent)}", b"to a closed port", ttl=63)


@BOTH
def test_rfc5508_req5b_type_and_code_stay(bench: Start, mapping: str) -> None:
    _, error = closed_port(bench(configuration(mapping)))
    assert (error.packet.icmp_type, error.packet.icmp_code) == (3, 3)


@BOTH
def test_rfc5508_req5c_an_error_from_inside_has_a_public_source(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent, error = closed_port(replay)
    assert error.packet.source_address == sent.packet.source_address
    assert error.packet.destination_address == "198.51.100.1"
    reply = replay.send(udp(f"{REMOTE} > {outside(sent)}"), on="outside0")
    router = icmp_error("100.64.9.9 > 198.51.100.1", 11, 0, reply.out[0].raw)
    assert replay.send(router).packet.source_address == sent.packet.source_address, (
        "also that of a router inside"
    )


@BOTH
def test_rfc5508_req5_an_error_from_inside_about_nothing_is_dropped_in_silence(
    bench: Start, mapping: str
) -> None:
    replay = bench(configuration(mapping))
    quoted = udp(f"{REMOTE} > {HOST}")
    answer = replay.send(icmp_error("100.64.0.2 > 198.51.100.1", 3, 3, quoted))
    assert (answer.verdict, answer.reason, answer.out) == ("drop", "icmp_no_session", ())


@BOTH
def test_rfc5508_req5_a_router_inside_that_no_zone_names_is_heard(bench: Start, mapping: str) -> None:
    """Links between routers often have addresses of their own: without errors path MTU discovery fails."""
    replay = bench(configuration(mapping))
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    reply = replay.send(udp(f"{REMOTE} > {outside(sent)}"), on="outside0")
    answer = replay.send(icmp_error("10.255.0.1 > 198.51.100.1", 3, 4, reply.out[0].raw))
    assert answer.packet.source_address == sent.packet.source_address
    other = replay.send(icmp_error("10.255.0.1 > 198.51.100.1", 3, 4, udp(f"{REMOTE} > 10.9.9.9:7")))
    assert (other.verdict, other.reason) == ("drop", "no_zone"), "nobody's packet is quoted"


@pytest.mark.parametrize(("action", "fate"), [("drop", ("drop", "zone_drop")), ("pass", ("drop", "no_zone"))])
def test_rfc5508_req5_a_made_up_quote_opens_no_way_that_the_senders_zone_does_not(
    bench: Start, action: str, fate: tuple[str, str]
) -> None:
    """A quoted host that is passed untranslated, or translated, vouches for nobody else."""
    zones = {"drop": "100.64.7.0/24", "pass": "100.64.8.0/24"}
    text = configuration(ED)
    for word, source in zones.items():
        text = text.replace("zones:\n", f"zones:\n  - {{source: {source}, action: {word}}}\n", 1)
    replay = bench(text)
    sender = {"drop": "100.64.7.7", "pass": "10.255.0.1"}[action]
    quoted = {"drop": HOST, "pass": "100.64.8.8:7"}[action]
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    reply = replay.send(udp(f"{REMOTE} > {outside(sent)}"), on="outside0").out[0].raw
    quote = reply if quoted == HOST else udp(f"{REMOTE} > {quoted}")
    answer = replay.send(icmp_error(f"{sender} > 198.51.100.1", 3, 4, quote))
    assert (answer.verdict, answer.reason) == fate


@BOTH
@pytest.mark.parametrize("sender", ["100.64.0.2", "100.64.9.9"])
def test_rfc5508_req5_an_error_from_inside_goes_to_whom_it_quotes_or_nowhere(
    bench: Start, mapping: str, sender: str
) -> None:
    """RFC 1122 3.2.2: the source of the packet that it is about. Another one would learn of the mapping."""
    replay = bench(configuration(mapping))
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    reply = replay.send(udp(f"{REMOTE} > {outside(sent)}"), on="outside0")
    answer = replay.send(icmp_error(f"{sender} > 192.0.2.66", 3, 3, reply.out[0].raw))
    assert (answer.verdict, answer.reason, answer.out) == ("drop", "icmp_quote", ())


def test_rfc5508_req5_a_visitor_hears_that_the_port_is_closed(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = outside(replay.send(udp(f"{HOST} > {REMOTE}")))
    knock = replay.send(udp(f"192.0.2.9:7 > {mapped}"), on="outside0")
    error = replay.send(icmp_error("100.64.0.2 > 192.0.2.9", 3, 3, knock.out[0].raw))
    assert error.packet.quoted is not None
    assert (error.packet.destination_address, error.packet.quoted.destination) == ("192.0.2.9", mapped)


@BOTH
def test_rfc5508_req6_errors_neither_keep_nor_end_a_session(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    for _ in range(11):
        assert replay.send(about(sent), on="outside0", after_s=10).verdict == "forward"
    assert replay.sessions()[0]["idle_s"] == 110
    late = replay.send(udp(f"{REMOTE} > {outside(sent)}"), on="outside0", after_s=12)
    assert late.reason == "no_session"


def test_rfc5508_req7_a_hairpinned_error_reaches_the_host_that_caused_it(bench: Start) -> None:
    replay = bench(configuration(EIM))
    theirs = outside(replay.send(udp("100.64.0.3:7000 > 198.51.100.1:80")))
    request = udp(f"100.64.0.2:6000 > {theirs}", b"anybody there?")
    there = replay.send(request)
    error = replay.send(icmp_error(f"100.64.0.3 > {there.packet.source_address}", 3, 3, there.out[0].raw))
    assert error.out[0].interface == "inside0"
    assert error.packet.destination_address == "100.64.0.2"
    assert error.packet.source_address == theirs.split(":")[0]
    assert error.packet.quoted is not None
    assert (error.packet.quoted.source, error.packet.quoted.destination) == ("100.64.0.2:6000", theirs)


def test_rfc5508_req7a_the_error_goes_where_the_quoted_packet_came_from(bench: Start) -> None:
    """The outer destination must be the quoted source; an error that contradicts itself is dropped."""
    replay = bench(configuration(EIM, "select: round-robin"))
    theirs = outside(replay.send(udp("100.64.0.3:7000 > 198.51.100.1:80")))
    there = replay.send(udp(f"100.64.0.2:6000 > {theirs}"))
    other = next(f"203.0.113.{n}" for n in range(1, 5) if f"203.0.113.{n}" != there.packet.source_address)
    error = replay.send(icmp_error(f"100.64.0.3 > {other}", 3, 3, there.out[0].raw))
    assert (error.verdict, error.reason) == ("drop", "icmp_quote")


@BOTH
def test_rfc5508_req8_a_host_whose_quota_is_full_is_told_so(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, extra="refusal: icmp-admin\nlimits: {sessions_per_host: 2}"))
    replay(*(udp(f"100.64.0.2:{port} > {REMOTE}") for port in (1000, 1001)))
    third = udp(f"100.64.0.2:1002 > {REMOTE}")
    answer = replay.send(third)
    assert (answer.verdict, answer.reason) == ("drop", "host_sessions")
    assert (answer.out[0].origin, answer.out[0].interface) == ("engine", "inside0")
    assert (answer.packet.icmp_type, answer.packet.icmp_code) == (3, 13)
    assert answer.out[0].raw[28:] == third


@BOTH
def test_rfc5508_req8_the_errors_are_limited_in_rate(bench: Start, mapping: str) -> None:
    replay = bench(
        configuration(
            mapping, extra="refusal: icmp-admin\nlimits: {sessions_per_host: 1, icmp_errors_per_s: 10}"
        )
    )
    answers = replay(*(udp(f"100.64.0.2:{port} > {REMOTE}") for port in range(1000, 1100)))
    assert sum(len(answer.out) for answer in answers[1:]) == 10


@BOTH
def test_rfc5508_req9_no_error_of_the_gateways_own_leaves_a_silent_interface(
    bench: Start, mapping: str
) -> None:
    config = configuration(mapping).replace(
        "role: outside, path: dpdk", "role: outside, path: dpdk, icmp_errors: off"
    )
    replay = bench(config)
    mapped = outside(replay.send(udp(f"{HOST} > {REMOTE}")))
    late = replay.send(udp(f"{REMOTE} > {mapped}", ttl=1), on="outside0")
    assert (late.reason, late.out) == ("ttl_expired", ())
    assert len(replay.send(udp(f"{HOST} > {REMOTE}", ttl=1)).out) == 1, "the other interface is not"
    reply = replay.send(udp(f"{REMOTE} > {mapped}"), on="outside0")
    error = replay.send(icmp_error("100.64.0.2 > 198.51.100.1", 3, 3, reply.out[0].raw))
    assert error.out[0].interface == "outside0", "translated errors are not its own"


@BOTH
def test_rfc5508_req10_the_gateway_is_a_hop_of_traceroute_both_ways(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    probe = udp("100.64.0.2:33434 > 198.51.100.1:33434", ttl=1)
    hop = replay.send(probe)
    assert (hop.verdict, hop.reason) == ("drop", "ttl_expired")
    assert (hop.packet.icmp_type, hop.packet.icmp_code, hop.packet.destination_address) == (
        11,
        0,
        "100.64.0.2",
    )
    assert hop.out[0].raw[28:] == probe
    mapped = outside(replay.send(udp(f"{HOST} > {REMOTE}")))
    back = replay.send(udp(f"{REMOTE} > {mapped}", ttl=1), on="outside0")
    assert (back.packet.icmp_type, back.packet.destination_address) == (11, "198.51.100.1")
    assert back.packet.quoted is not None
    assert back.packet.quoted.destination == mapped


@BOTH
def test_rfc5508_req10_an_error_is_never_answered_by_an_error(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp(f"{HOST} > {REMOTE}"))
    error = icmp_error(f"192.0.2.254 > {sent.packet.source_address}", 3, 3, sent.out[0].raw, ttl=1)
    answer = replay.send(error, on="outside0")
    assert (answer.verdict, answer.reason, answer.out) == ("drop", "ttl_expired", ())


@BOTH
@pytest.mark.parametrize("kind", [5, 9, 10, 13, 14, 15, 16, 17, 18, 30, 40, 42, 43])
def test_rfc5508_req11_what_is_neither_echo_nor_error_is_dropped(
    bench: Start, mapping: str, kind: int
) -> None:
    replay = bench(configuration(mapping))
    for flow, side in (("100.64.0.2 > 198.51.100.1", "inside0"), ("198.51.100.1 > 203.0.113.1", "outside0")):
        answer = replay.send(icmp(flow, kind, 0, 1 << 16, bytes(12)), on=side)
        assert (answer.verdict, answer.reason, answer.out) == ("drop", "icmp_type", ())
