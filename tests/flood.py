"""New sessions at a steady rate: one UDP datagram each, from an AF_PACKET socket.

    python -m tests.flood eth0 GATEWAY-MAC COUNT RATE [FIRST]

Session number n comes from 100.64.1.0 + n // 50000, port 10000 + n % 50000, and goes to 198.51.100.20:9. The
payload is source address and port, so that a capture behind the gateway tells by itself which host became
which public address and port.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from ipaddress import IPv4Address

FIRST_HOST = int(IPv4Address("100.64.1.0"))
REMOTE = "198.51.100.20"
PORTS = 50_000


def tuple_of(number: int) -> tuple[int, int]:
    """Source address and port of a session."""
    return FIRST_HOST + number // PORTS, 10_000 + number % PORTS


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def frame(ethernet: bytes, number: int) -> bytes:
    """Without UDP checksum, which IPv4 allows."""
    host, port = tuple_of(number)
    payload = struct.pack(">IH", host, port)
    udp = struct.pack(">HHHH", port, 9, 8 + len(payload), 0) + payload
    head = struct.pack(
        ">BBHHHBBHI4s",
        *(0x45, 0, 20 + len(udp), 0, 0x4000, 64, 17, 0, host),
        socket.inet_aton(REMOTE),
    )
    head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
    return ethernet + head + udp


def main(interface: str, gateway: str, count: str, rate: str, first: str = "0") -> None:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    link.bind((interface, 0))
    own: bytes = link.getsockname()[4]
    ethernet = bytes.fromhex(gateway.replace(":", "")) + own + b"\x08\x00"
    frames = [frame(ethernet, number) for number in range(int(first), int(first) + int(count))]
    begin = time.monotonic()
    for sent, one in enumerate(frames):
        if sent % 100 == 0:  # behind time it hurries, ahead of it it waits
            ahead = begin + sent / int(rate) - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
        link.send(one)
    print(f"{len(frames) / (time.monotonic() - begin):.0f} sessions a second")


if __name__ == "__main__":
    main(*sys.argv[1:])
