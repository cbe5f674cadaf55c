"""IPv4 packets for the test bench: built from one readable line, read back into one frozen value.

    udp("100.64.0.2:40000 > 198.51.100.1:53")              bytes, checksums filled in
    read(packet).source                                    "100.64.0.2:40000"

A builder takes keyword arguments for what a test wants to be odd (ttl, flags, a wrong checksum by `corrupt`);
everything else has a plain value. `read` verifies every checksum that the packet claims to have, also in the
packet quoted inside an ICMP error, so that a test which compares two views has checked the arithmetic too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

ICMP, TCP, UDP = 1, 6, 17
TCP_FLAGS = "FSRPAUEC"  # bit 0 first, as tcpdump writes them


def checksum(data: bytes) -> int:
    """RFC 1071, the dull way: this is the other implementation that the engine is compared with."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Flow:
    """The line "ADDRESS[:PORT] > ADDRESS[:PORT]"; a port that is not written is 0."""

    source: str
    sport: int
    destination: str
    dport: int

    @classmethod
    def parse(cls, line: str) -> Flow:
        left, arrow, right = (part.strip() for part in line.partition(">"))
        if not arrow:
            raise ValueError(f"{line!r} is not of the form 'A:P > B:Q'")
        source, _, sport = left.partition(":")
        destination, _, dport = right.partition(":")
        return cls(source, int(sport or 0), destination, int(dport or 0))

    def pseudo_header(self, protocol: int, length: int) -> bytes:
        addresses = IPv4Address(self.source).packed + IPv4Address(self.destination).packed
        return addresses + struct.pack("!BBH", 0, protocol, length)


def ipv4(
    flow: str,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    ident: int = 0,
    tos: int = 0,
    dont_fragment: bool = False,
    more_fragments: bool = False,
    fragment_offset: int = 0,
    options: bytes = b"",
) -> bytes:
    """A header (and options, a multiple of 4 bytes) in front of `payload`; offsets are in bytes."""
    if len(options) % 4 or fragment_offset % 8:
        raise ValueError("options come in units of 4 bytes, fragment offsets in units of 8")
    ends = Flow.parse(flow)
    header_bytes = 20 + len(options)
    fragment = dont_fragment << 14 | more_fragments << 13 | fragment_offset // 8
    header = struct.pack(
        "!BBHHHBBH4s4s",
        4 << 4 | header_bytes // 4,
        tos,
        header_bytes + len(payload),
        ident,
        fragment,
        ttl,
        protocol,
        0,
        IPv4Address(ends.source).packed,
        IPv4Address(ends.destination).packed,
    )
    header += options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def udp(
    flow: str,
    payload: bytes = b"payload",
    *,
    ttl: int = 64,
    without_checksum: bool = False,
    dont_fragment: bool = False,
    corrupt: bool = False,
) -> bytes:
    ends, length = Flow.parse(flow), 8 + len(payload)
    segment = struct.pack("!HHHH", ends.sport, ends.dport, length, 0) + payload
    if not without_checksum:
        # RFC 768: a sum of zero is sent as all ones, because zero means "no checksum"
        value = checksum(ends.pseudo_header(UDP, length) + segment) or 0xFFFF
        segment = segment[:6] + struct.pack("!H", value ^ 0x5555 if corrupt else value) + segment[8:]
    return ipv4(flow, UDP, segment, ttl=ttl, dont_fragment=dont_fragment)


def tcp(
    flow: str,
    flags: str = "S",
    payload: bytes = b"",
    *,
    seq: int = 1000,
    ack: int = 0,
    window: int = 65535,
    mss: int = 0,
    ttl: int = 64,
    dont_fragment: bool = False,
) -> bytes:
    ends = Flow.parse(flow)
    options = struct.pack("!BBH", 2, 4, mss) if mss else b""
    bits = sum(1 << TCP_FLAGS.index(flag) for flag in flags)
    offset = (20 + len(options)) // 4 << 12
    segment = (
        struct.pack("!HHIIHHHH", ends.sport, ends.dport, seq, ack, offset | bits, window, 0, 0)
        + options
        + payload
    )
    value = checksum(ends.pseudo_header(TCP, len(segment)) + segment)
    segment = segment[:16] + struct.pack("!H", value) + segment[18:]
    return ipv4(flow, TCP, segment, ttl=ttl, dont_fragment=dont_fragment)


def icmp(flow: str, kind: int, code: int, rest: int = 0, body: bytes = b"", *, ttl: int = 64) -> bytes:
    message = struct.pack("!BBHI", kind, code, 0, rest) + body
    message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
    return ipv4(flow, ICMP, message, ttl=ttl)


def ping(flow: str, ident: int = 1, seq: int = 1, payload: bytes = b"payload!", *, ttl: int = 64) -> bytes:
    return icmp(flow, 8, 0, ident << 16 | seq, payload, ttl=ttl)


def pong(flow: str, ident: int = 1, seq: int = 1, payload: bytes = b"payload!", *, ttl: int = 64) -> bytes:
    return icmp(flow, 0, 0, ident << 16 | seq, payload, ttl=ttl)


def icmp_error(flow: str, kind: int, code: int, quoted: bytes, *, rest: int = 0, ttl: int = 64) -> bytes:
    """An error about `quoted`: RFC 792 asks for its header and 8 bytes, everybody sends more."""
    return icmp(flow, kind, code, rest, quoted, ttl=ttl)


def _with_header(header: bytes, fragment_field: int, payload: bytes) -> bytes:
    """The header with this fragment field, and length and checksum to fit."""
    total = struct.pack("!H", len(header) + len(payload))
    zeroed = header[:2] + total + header[4:6] + struct.pack("!H", fragment_field) + header[8:10]
    header = zeroed + b"\0\0" + header[12:]
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def fragments(packet: bytes, payload_bytes: int, *, ident: int) -> list[bytes]:
    """The packet in fragments of so many bytes behind the header, a multiple of 8, in order."""
    if payload_bytes % 8:
        raise ValueError("all fragments but the last carry a multiple of 8 bytes")
    size = (packet[0] & 15) * 4
    header, payload = packet[:4] + struct.pack("!H", ident) + packet[6:size], packet[size:]
    return [
        _with_header(
            header,
            (at + payload_bytes < len(payload)) << 13 | at // 8,
            payload[at : at + payload_bytes],
        )
        for at in range(0, len(payload), payload_bytes)
    ]


def joined(parts: Sequence[bytes]) -> bytes:
    """The packet that fragments in any order make: all of one datagram, without gap or overlap."""
    ordered = sorted(parts, key=lambda part: int.from_bytes(part[6:8]) & 0x1FFF)
    names = {(part[4:6], part[9], part[12:20]) for part in parts}
    if len(names) != 1:
        raise BadPacket(f"fragments of different datagrams: {names}")
    payload = b""
    for part in ordered:
        field = int.from_bytes(part[6:8])
        last = part is ordered[-1]
        if (field & 0x1FFF) * 8 != len(payload) or bool(field & 0x2000) == last:
            raise BadPacket(f"a fragment of {len(part)} bytes does not follow at {len(payload)}")
        payload += part[(part[0] & 15) * 4 :]
    return _with_header(ordered[0][: (ordered[0][0] & 15) * 4], 0, payload)


@dataclass(frozen=True)
class Packet:
    """What a packet says. An ICMP echo has its identifier in both ports, so that `source` names the query."""

    protocol: int
    source_address: str
    destination_address: str
    sport: int
    dport: int
    ttl: int
    payload: bytes
    tcp_flags: str = ""
    icmp_type: int = -1
    icmp_code: int = -1
    fragment_offset: int = 0
    more_fragments: bool = False
    quoted: Packet | None = None

    @property
    def source(self) -> str:
        return f"{self.source_address}:{self.sport}"

    @property
    def destination(self) -> str:
        return f"{self.destination_address}:{self.dport}"


class BadPacket(Exception):
    """The packet cannot be read; the message says which byte or sum is wrong."""


def read(data: bytes, *, quoted: bool = False) -> Packet:
    """Parses and verifies. A quoted packet may be cut short: sums over bytes that are missing are not
    checked.
    """
    if len(data) < 20 or data[0] >> 4 != 4:
        raise BadPacket(f"not an IPv4 header: {data[:20].hex()}")
    header_bytes, total = (data[0] & 15) * 4, int.from_bytes(data[2:4])
    if len(data) < header_bytes:
        raise BadPacket(f"header of {header_bytes} bytes in a packet of {len(data)}")
    if not quoted and total != len(data):
        raise BadPacket(f"total length says {total}, the packet has {len(data)}")
    if checksum(data[:header_bytes]) and not quoted:
        raise BadPacket("wrong IPv4 header checksum")
    fragment = int.from_bytes(data[6:8])
    view = Packet(
        protocol=data[9],
        source_address=str(IPv4Address(data[12:16])),
        destination_address=str(IPv4Address(data[16:20])),
        sport=0,
        dport=0,
        ttl=data[8],
        payload=data[header_bytes:total],
        fragment_offset=(fragment & 0x1FFF) * 8,
        more_fragments=bool(fragment & 0x2000),
    )
    whole = len(data) >= total and not fragment & 0x3FFF
    if view.fragment_offset:
        return view
    ends = Flow(view.source_address, 0, view.destination_address, 0)
    body = view.payload
    if view.protocol in (TCP, UDP):
        sport, dport = struct.unpack("!HH", body[:4])
        view = replace(view, sport=sport, dport=dport)
        summed = view.protocol == TCP or body[6:8] != b"\0\0"
        if whole and summed and checksum(ends.pseudo_header(view.protocol, len(body)) + body):
            raise BadPacket("wrong TCP or UDP checksum")
    if view.protocol == UDP:
        return replace(view, payload=body[8:])
    if view.protocol == TCP and len(body) >= 14:
        flags = "".join(name for bit, name in enumerate(TCP_FLAGS) if body[13] >> bit & 1)
        return replace(view, tcp_flags=flags, payload=body[(body[12] >> 4) * 4 :])
    if view.protocol == ICMP and len(body) >= 8:
        if whole and checksum(body):
            raise BadPacket("wrong ICMP checksum")
        view = replace(view, icmp_type=body[0], icmp_code=body[1], payload=body[8:])
        if view.icmp_type in (0, 8):
            ident = int.from_bytes(body[4:6])
            return replace(view, sport=ident, dport=ident)
        return replace(view, quoted=read(body[8:], quoted=True))
    return view
