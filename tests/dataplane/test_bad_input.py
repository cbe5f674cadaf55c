"""Malformed and forged packets: each has a named reason, none crashes, none gets out untranslated.

`offer` puts any bytes into the engine and judges what comes out by a parser of its own, a few lines long:
what leaves by the outside has a public source, what leaves by the inside goes to a host, and a packet that
is dropped does not leave at all. The sanitizers judge at the end of each test, when the engine stops.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from tests.packet import (
    TCP,
    UDP,
    Flow,
    checksum,
    fragments,
    icmp_error,
    ipv4,
    ping,
    tcp,
    udp,
)
from tests.replay import ED, EIM, Bench, Start, configuration, outside

INSIDE, POOL = IPv4Network("100.64.0.0/16"), IPv4Network("203.0.113.0/29")
HOST, REMOTE = "100.64.0.2:40000", "198.51.100.1:80"
OUT, IN = f"{HOST} > {REMOTE}", "outside0"


def repaired(packet: bytes, *, total: int | None = None) -> bytes:
    """The same with a header checksum that fits, and a total length that does (or that lies: `total`)."""
    length = struct.pack("!H", len(packet) if total is None else total)
    packet = packet[:2] + length + packet[4:10] + b"\0\0" + packet[12:]
    size = min(max((packet[0] & 15) * 4, 20), len(packet))
    return packet[:10] + struct.pack("!H", checksum(packet[:size])) + packet[12:]


def put(packet: bytes, at: int, value: int, size: int = 1, *, repair: bool = True) -> bytes:
    packet = packet[:at] + value.to_bytes(size) + packet[at + size :]
    return repaired(packet) if repair else packet


def offer(replay: Bench, packet: bytes, on: str = "inside0") -> dict[str, Any]:
    line = replay.ask({"t_ns": replay.now_ns, "if": on, "pkt": packet.hex()})
    assert line.get("verdict") in ("forward", "pass", "drop", "hold"), line
    assert line["reason"], line
    for one in line.get("out", ()):
        raw = bytes.fromhex(one["pkt"])
        if one["origin"] == "engine":
            continue
        assert line["verdict"] == "forward"
        source, destination = IPv4Address(raw[12:16]), IPv4Address(raw[16:20])
        assert checksum(raw[: (raw[0] & 15) * 4]) == 0
        if one["if"] == "outside0":
            assert source in POOL, f"{packet.hex()} left untranslated: {line}"
        else:
            assert destination in INSIDE, f"{packet.hex()} went to no host: {line}"
    return line


def reason(replay: Bench, packet: bytes, on: str = "inside0") -> str:
    line = offer(replay, packet, on)
    return str(line["reason"] if line["verdict"] == "drop" else line["verdict"])


@pytest.fixture(params=[EIM, ED])
def replay(request: pytest.FixtureRequest, bench: Start) -> Iterator[Bench]:
    """With a session of each protocol, so that what looks right is translated."""
    one = bench(configuration(request.param, addresses=str(POOL), zone="mss_clamp: 1200"))
    yield one
    answer = one.ctl(cmd="show", what="counters")
    assert answer["equation"] is True, answer


def replies(replay: Bench) -> dict[str, bytes]:
    """From outside, one of each kind, all for a live session."""
    asked = replay.send(udp(OUT))
    opened = replay.send(tcp(OUT, "S", mss=1460))
    address = asked.packet.source_address
    return {
        "udp": udp(f"{REMOTE} > {outside(asked)}", b"a reply"),
        "tcp": tcp(f"{REMOTE} > {outside(opened)}", "SA", mss=1460),
        "icmp_error": icmp_error(f"192.0.2.1 > {address}", 3, 3, asked.out[0].raw),
    }


REQUESTS = {
    "udp": udp(OUT, b"a request"),
    "tcp": tcp(OUT, "S", mss=1460),
    "ping": ping("100.64.0.2 > 198.51.100.1"),
    "options": ipv4(OUT, UDP, udp(OUT)[20:], options=bytes([7, 7, 4, 0, 0, 0, 0, 0])),
    "fragment": fragments(udp(OUT, bytes(64)), 32, ident=1)[0],
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_cut_off_at_any_byte_is_dropped(replay: Bench, kind: str) -> None:
    packet = REQUESTS[kind]
    for length in range(len(packet)):
        assert reason(replay, packet[:length]) == "truncated"
    assert reason(replay, packet) == "forward"


def test_a_reply_cut_off_at_any_byte_is_dropped(replay: Bench) -> None:
    for packet in replies(replay).values():
        for length in range(len(packet)):
            assert reason(replay, packet[:length], IN) == "truncated"
        assert reason(replay, packet, IN) == "forward"


def test_a_packet_whose_length_was_shortened_with_it_is_judged_by_its_own_lengths(replay: Bench) -> None:
    """The header says what is there; then the transport header is short, or says more than there is."""
    for length in range(20, 28):
        assert reason(replay, repaired(REQUESTS["udp"][:length])) == "truncated"
        assert reason(replay, repaired(REQUESTS["ping"][:length])) == "truncated"
    for length in range(28, len(REQUESTS["udp"])):
        assert reason(replay, repaired(REQUESTS["udp"][:length])) == "bad_length"
    for length in range(20, 40):
        assert reason(replay, repaired(REQUESTS["tcp"][:length])) == "truncated"
    for length in range(40, 44):
        assert reason(replay, repaired(REQUESTS["tcp"][:length])) == "bad_length"


def test_a_short_quote_in_an_error_is_dropped(replay: Bench) -> None:
    error = replies(replay)["icmp_error"]
    for length in range(28, 56):
        cut = bytearray(repaired(error[:length]))
        cut[22:24] = b"\0\0"
        cut[22:24] = struct.pack("!H", checksum(bytes(cut[20:])))
        assert reason(replay, bytes(cut), IN) == "icmp_quote"


@pytest.mark.parametrize(
    ("what", "change", "expected"),
    [
        ("version 0", lambda p: put(p, 0, 0x05), "bad_version"),
        ("version 6", lambda p: put(p, 0, 0x65), "bad_version"),
        ("version 15", lambda p: put(p, 0, 0xF5), "bad_version"),
        ("header of 0 words", lambda p: put(p, 0, 0x40), "bad_header"),
        ("header of 4 words", lambda p: put(p, 0, 0x44), "bad_header"),
        ("header longer than the packet", lambda p: put(p, 0, 0x4F), "bad_header"),
        ("total length 0", lambda p: repaired(p, total=0), "bad_header"),
        ("total length 19", lambda p: repaired(p, total=19), "bad_header"),
        ("total length one too much", lambda p: repaired(p, total=len(p) + 1), "truncated"),
        ("total length 65535", lambda p: repaired(p, total=65535), "truncated"),
        ("header checksum", lambda p: put(p, 10, p[10] ^ 1, repair=False), "bad_checksum"),
        ("header checksum 0", lambda p: put(p, 10, 0, 2, repair=False), "bad_checksum"),
        ("UDP length 0", lambda p: put(p, 24, 0, 2), "bad_length"),
        ("UDP length 7", lambda p: put(p, 24, 7, 2), "bad_length"),
        ("UDP length one too much", lambda p: put(p, 24, len(p) - 19, 2), "bad_length"),
        ("UDP length 65535", lambda p: put(p, 24, 65535, 2), "bad_length"),
        ("source port 0", lambda p: put(p, 20, 0, 2), "bad_port"),
        ("destination port 0", lambda p: put(p, 22, 0, 2), "bad_port"),
        ("protocol GRE", lambda p: put(p, 9, 47), "protocol"),
        ("protocol 0", lambda p: put(p, 9, 0), "protocol"),
        ("protocol 255", lambda p: put(p, 9, 255), "protocol"),
        ("TTL 0", lambda p: put(p, 8, 0), "ttl_expired"),
    ],
)
def test_a_field_that_lies_has_its_reason(
    replay: Bench, what: str, change: Callable[[bytes], bytes], expected: str
) -> None:
    assert reason(replay, change(udp(OUT))) == expected, what


@pytest.mark.parametrize(
    ("what", "change", "expected"),
    [
        ("header of 0 words", lambda p: put(p, 32, 0x02), "bad_length"),
        ("header of 4 words", lambda p: put(p, 32, 0x42), "bad_length"),
        ("header longer than the segment", lambda p: put(p, 32, 0xF2), "bad_length"),
        ("source port 0", lambda p: put(p, 20, 0, 2), "bad_port"),
        ("no flags", lambda p: put(p, 33, 0), "tcp_not_syn"),
        ("SYN and FIN", lambda p: put(p, 33, 3), "tcp_not_syn"),
        ("SYN and RST", lambda p: put(p, 33, 6), "tcp_not_syn"),
        ("all flags", lambda p: put(p, 33, 255), "tcp_not_syn"),
    ],
)
def test_a_segment_that_lies_has_its_reason(
    replay: Bench, what: str, change: Callable[[bytes], bytes], expected: str
) -> None:
    assert reason(replay, change(tcp("100.64.0.7:7 > 198.51.100.7:7", "S"))) == expected, what


def test_ip_options_that_cannot_be_are_dropped(replay: Bench) -> None:
    bad = [
        bytes([7, 0, 0, 0]),  # length 0
        bytes([7, 1, 0, 0]),  # length 1
        bytes([7, 5, 0, 0]),  # behind the end
        bytes([1, 1, 1, 7]),  # no length at all
        bytes([131, 7, 4, 10, 0, 0, 1, 0]),  # loose source route
        bytes([137, 7, 4, 10, 0, 0, 1, 0]),  # strict source route
    ]
    for options in bad:
        assert reason(replay, ipv4(OUT, UDP, udp(OUT)[20:], options=options)) == "bad_option"
    good = [bytes(4), bytes([1] * 8), bytes([148, 4, 0, 0]), bytes([7, 3, 4, 0]), bytes([1] * 39 + [0])]
    for options in good:
        assert reason(replay, ipv4(OUT, UDP, udp(OUT)[20:], options=options)) == "forward"


def test_tcp_options_that_cannot_be_are_left_to_the_ends(replay: Bench) -> None:
    """The engine reads them to lower the MSS; it must neither run over their end nor change others."""
    for options in (
        b"\2\0\0\0",
        b"\2\1\0\0",
        b"\2\x28\5\xb4",
        b"\2\3\5\0",
        b"\1\1\1\2",
        b"\xfe\0\0\0",
    ):
        options = options.ljust(-len(options) % 4 + len(options), b"\0")
        header = (
            struct.pack("!HHIIHHHH", 40001, 80, 1, 0, (5 + len(options) // 4) << 12 | 2, 9, 0, 0) + options
        )
        ends = Flow.parse(OUT)
        value = checksum(ends.pseudo_header(TCP, len(header)) + header)
        packet = ipv4("100.64.0.2 > 198.51.100.1", TCP, header[:16] + struct.pack("!H", value) + header[18:])
        line = offer(replay, packet)
        assert line["verdict"] == "forward"
        assert bytes.fromhex(line["out"][0]["pkt"])[40:] == options


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("0.0.0.0", "bad_source"),
        ("0.1.2.3", "bad_source"),
        ("127.0.0.1", "bad_source"),
        ("224.0.0.1", "bad_source"),
        ("239.255.255.255", "bad_source"),
        ("240.0.0.1", "bad_source"),
        ("255.255.255.255", "bad_source"),
        ("203.0.113.1", "spoofed"),
        ("203.0.113.7", "spoofed"),
        ("8.8.8.8", "no_zone"),
        ("169.254.1.1", "no_zone"),
    ],
)
def test_a_source_that_no_host_can_have_is_dropped(replay: Bench, source: str, expected: str) -> None:
    for packet in (
        udp(f"{source}:4 > {REMOTE}"),
        tcp(f"{source}:4 > {REMOTE}"),
        ping(f"{source} > 198.51.100.1"),
    ):
        assert reason(replay, packet) == expected


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("0.0.0.0", "bad_destination"),
        ("0.1.2.3", "bad_destination"),
        ("127.0.0.1", "bad_destination"),
        ("240.0.0.1", "bad_destination"),
        ("255.255.255.254", "bad_destination"),
        ("169.254.169.254", "bad_destination"),  # RFC 3927 section 7
        ("255.255.255.255", "pass"),  # DHCP and the like: the kernel's
        ("224.0.0.18", "pass"),  # VRRP: the kernel's
    ],
)
def test_a_destination_that_nobody_can_have_is_dropped(
    replay: Bench, destination: str, expected: str
) -> None:
    for packet in (
        udp(f"{HOST} > {destination}:4"),
        tcp(f"{HOST} > {destination}:4"),
        ping(f"100.64.0.2 > {destination}"),
    ):
        assert reason(replay, packet) == expected


def test_a_link_local_address_is_served_by_the_gateway_itself_and_never_translated(bench: Start) -> None:
    """RFC 3927 section 7, also where a zone has every source."""
    nat = bench(configuration("endpoint-independent").replace("100.64.0.0/16", "0.0.0.0/0"))
    nat.ask({"addresses": {"inside0": ["169.254.0.1"]}})
    assert nat.send(udp("169.254.0.9:5 > 169.254.0.1:53")).verdict == "pass"
    assert nat.send(udp("169.254.0.9:5 > 198.51.100.1:53")).reason == "bad_source"
    assert nat.sessions() == []


def test_an_error_that_quotes_an_error_is_dropped_and_nothing_of_it_gets_in(replay: Bench) -> None:
    """RFC 1122 3.2.2: nobody answers an error by an error, so what says so is forged."""
    asked = replay.send(udp(f"{HOST} > {REMOTE}"))
    error = icmp_error(f"198.51.100.1 > {asked.packet.source_address}", 3, 3, asked.out[0].raw)
    assert replay.send(error, on=IN).verdict == "forward"
    for kind, code in ((3, 3), (11, 0), (12, 0)):
        nested = icmp_error(f"198.51.100.1 > {asked.packet.source_address}", kind, code, error)
        assert reason(replay, nested, IN) == "icmp_quote"


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        ("203.0.113.1:5000 > 203.0.113.1:5000", "spoofed"),  # LAND
        ("203.0.113.2:5000 > 203.0.113.1:5000", "spoofed"),
        ("127.0.0.1:5000 > 203.0.113.1:5000", "bad_source"),
        ("169.254.0.9:5000 > 203.0.113.1:5000", "bad_source"),
        ("100.64.0.2:5000 > 203.0.113.1:5000", "no_session"),
        ("198.51.100.1:5000 > 100.64.0.2:40000", "not_ours"),
        ("198.51.100.1:5000 > 192.0.2.200:40000", "not_ours"),
        ("198.51.100.1:5000 > 127.0.0.1:40000", "bad_destination"),
    ],
)
def test_a_forged_packet_from_outside_is_dropped(replay: Bench, flow: str, expected: str) -> None:
    for make in (udp, tcp):
        assert reason(replay, make(flow), IN) == expected


def fragment(payload: bytes, protocol: int, offset: int, *, more: bool, ident: int = 9) -> bytes:
    flow = "100.64.0.2 > 198.51.100.1"
    return ipv4(flow, protocol, payload, ident=ident, more_fragments=more, fragment_offset=offset)


def test_a_fragment_that_cannot_be_is_dropped(replay: Bench) -> None:
    segment, datagram = tcp(OUT, "S", b"x" * 60)[20:], udp(OUT, bytes(60))[20:]
    for length in range(8, 20):  # RFC 1858: a first fragment that hides the flags
        assert reason(replay, fragment(segment[:length], TCP, 0, more=True)) == "frag_bad"
    assert reason(replay, fragment(segment[8:32], TCP, 8, more=True)) == "frag_bad"  # ... or overwrites them
    assert reason(replay, fragment(b"", UDP, 64, more=True)) == "frag_bad"
    assert reason(replay, fragment(bytes(64), UDP, 65512, more=False)) == "frag_bad"  # ping of death
    for length in range(8):
        assert reason(replay, fragment(datagram[:length], UDP, 0, more=True)) in ("truncated", "frag_bad")
    error = icmp_error("100.64.0.2 > 198.51.100.1", 3, 3, udp(OUT))[20:]
    assert reason(replay, fragment(error[:32], 1, 0, more=True)) == "frag_bad"


def test_overlapping_fragments_are_translated_alike_and_their_ports_are_the_first_ones(replay: Bench) -> None:
    datagram = udp(OUT, bytes(range(200)))[20:]
    first = offer(replay, fragment(datagram[:48], UDP, 0, more=True))
    left = bytes.fromhex(first["out"][0]["pkt"])
    for offset, length in ((16, 32), (24, 8), (40, 24), (48, 48), (48, 48), (16, 176)):
        part = fragment(datagram[offset : offset + length], UDP, offset, more=offset + length < len(datagram))
        line = offer(replay, part)
        raw = bytes.fromhex(line["out"][0]["pkt"])
        assert (raw[4:6], raw[12:20], raw[20:]) == (
            left[4:6],
            left[12:20],
            datagram[offset : offset + length],
        )
    assert reason(replay, fragment(datagram[8:48], UDP, 8, more=True)) == "frag_bad"


def test_a_second_first_fragment_is_judged_by_its_own_ports(replay: Bench) -> None:
    """It may name another port only if that one has a session of its own."""
    asked = replay.send(udp(OUT))
    address = asked.packet.source_address
    whole = udp(f"{REMOTE} > {outside(asked)}", bytes(96))
    parts = fragments(whole, 48, ident=3)
    assert reason(replay, parts[0], IN) == "forward"
    other = fragments(udp(f"198.51.100.1:81 > {address}:1", bytes(96)), 48, ident=3)[0]
    assert reason(replay, other, IN) == "no_session"


def test_a_wrong_transport_checksum_stays_wrong(replay: Bench) -> None:
    """It is updated, not computed anew: damage on the way in must be seen by the receiver."""
    damaged = put(udp(OUT, b"payload"), 30, 0xFF)
    raw = bytes.fromhex(offer(replay, damaged)["out"][0]["pkt"])
    ends = Flow.parse(f"{IPv4Address(raw[12:16])} > {IPv4Address(raw[16:20])}")
    assert checksum(ends.pseudo_header(UDP, len(raw) - 20) + raw[20:]) != 0


def test_link_padding_behind_the_packet_is_not_sent(replay: Bench) -> None:
    packet = udp(OUT, b"x")
    raw = bytes.fromhex(offer(replay, packet + bytes(17))["out"][0]["pkt"])
    assert len(raw) == len(packet)


@pytest.mark.parametrize("side", ["inside0", "outside0"])
def test_no_damaged_packet_gets_out_untranslated(replay: Bench, side: str, seed: int) -> None:
    """Thousands of packets with a few bytes changed, header checksum repaired or not."""
    chance = random.Random(seed)
    base = list(REQUESTS.values()) if side == "inside0" else list(replies(replay).values())
    seen = set()
    for _ in range(4000):
        packet = bytearray(chance.choice(base))
        for _ in range(chance.randint(1, 4)):
            packet[chance.randrange(len(packet))] = chance.choice(
                (0, 1, 127, 128, 255, chance.randrange(256))
            )
        whole = bytes(packet) if chance.random() < 0.1 else repaired(bytes(packet))
        seen.add(
            reason(replay, whole[: chance.randint(0, len(whole))] if chance.random() < 0.1 else whole, side)
        )
    assert len(seen) > 6, seen
