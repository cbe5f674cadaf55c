"""explain: makes the packet that is asked about, has the engine try it, prints what it saw.

Nothing is decided here. A host would send such a packet: a SYN, a datagram, an echo request; `--flags`,
`--size`, `--ttl` and `--dont-fragment` make it another one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

from dsnatctl.client import Json

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
TCP_FLAGS = "FSRPAU"
LARGEST = 9000


class WrongPacket(ValueError):
    """What was asked for is no packet; the message says why."""


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def end(text: str, *, protocol: str) -> tuple[bytes, int]:
    """ADDRESS:PORT; of ICMP the port is the identifier and may be left out."""
    address, colon, port = text.partition(":")
    try:
        packed = IPv4Address(address).packed
    except ValueError as error:
        raise WrongPacket(f"{text!r} has no IPv4 address; write ADDRESS:PORT") from error
    if not colon and protocol == "icmp":
        return packed, 1
    if not port.isdecimal() or int(port) > 65535:
        raise WrongPacket(f"{text!r} has no port; write ADDRESS:PORT")
    return packed, int(port)


def transport(protocol: str, ports: tuple[int, int], flags: str, room: int) -> bytes:
    """The segment without its checksum, `room` bytes of zeros behind the header."""
    if protocol == "tcp":
        bits = 0
        for flag in flags:
            if flag not in TCP_FLAGS:
                raise WrongPacket(f"{flag!r} is no TCP flag; use letters of {TCP_FLAGS}")
            bits |= 1 << TCP_FLAGS.index(flag)
        return struct.pack("!HHIIHHHH", *ports, 1, 0, 5 << 12 | bits, 65535, 0, 0) + bytes(room)
    if protocol == "udp":
        return struct.pack("!HHHH", *ports, 8 + room, 0) + bytes(room)
    return struct.pack("!BBHHH", 8, 0, 0, ports[0], 1) + bytes(room)


def packet(
    protocol: str,
    source: str,
    destination: str,
    *,
    flags: str = "S",
    size: int = 0,
    ttl: int = 64,
    whole: bool = False,
) -> bytes:
    """`size` is the length of the IPv4 packet, 0 the shortest."""
    near, sport = end(source, protocol=protocol)
    far, dport = end(destination, protocol=protocol)
    least = 20 + {"tcp": 20, "udp": 8, "icmp": 8}[protocol]
    if size and not least <= size <= LARGEST:
        raise WrongPacket(f"--size is {size}; such a packet has {least} to {LARGEST} bytes")
    segment = transport(protocol, (sport, dport), flags, max(size - least, 0))
    pseudo = near + far + struct.pack("!BBH", 0, PROTOCOLS[protocol], len(segment))
    at = {"tcp": 16, "udp": 6, "icmp": 2}[protocol]
    value = checksum(segment if protocol == "icmp" else pseudo + segment)
    if protocol == "udp":
        value = value or 0xFFFF
    segment = segment[:at] + struct.pack("!H", value) + segment[at + 2 :]
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(segment),
        1,
        whole << 14,
        ttl,
        PROTOCOLS[protocol],
        0,
        near,
        far,
    )
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + segment


def ends_of(raw: bytes) -> str:
    """SOURCE > DESTINATION of a packet that the engine would send."""
    size = (raw[0] & 15) * 4
    ends = []
    for address, port in ((12, 0), (16, 2)):
        text = str(IPv4Address(raw[address : address + 4]))
        if raw[9] in (6, 17):
            text += f":{int.from_bytes(raw[size + port : size + port + 2])}"
        ends.append(text)
    return " > ".join(ends)


def lines(answer: Json) -> Iterator[str]:
    width = max(len(step["stage"]) for step in answer["steps"])
    for step in answer["steps"]:
        yield f"{step['stage']:<{width}}  {step['text']}"
    if "engine_sends" in answer:
        sent = answer["engine_sends"]
        raw = bytes.fromhex(sent["pkt"])
        what = f"ICMP {raw[20]}/{raw[21]}" if raw[9] == 1 else "a reset"
        yield f"{'answer':<{width}}  the engine sends {what} by {sent['if']}: {ends_of(raw)}"
    last = (
        f"by {answer['out']['if']}: {ends_of(bytes.fromhex(answer['out']['pkt']))}" if "out" in answer else ""
    )
    yield f"{answer['verdict']}, {answer['reason']}" + (f", {last}" if last else "")
