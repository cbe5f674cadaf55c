"""New sessions at a steady rate: one UDP datagram each, from an AF_PACKET socket.

    python -m tests.flood eth0 GATEWAY-MAC COUNT RATE [FIRST [realtime]]

Session number n comes from 100.64.1.0 + n // 50000, port 10000 + n % 50000, and goes to 198.51.100.20:9. The
payload is source address and port, so that a capture behind the gateway tells by itself which host became
which public address and port.
"""

from __future__ import annotations

import ctypes
import errno
import os
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


class Sender:
    """Frames of one length, made beforehand and sent by sendmmsg: a system call for each would be the slowest
    part of the whole line at 100,000 a second.
    """

    STEP = 100

    def __init__(self, link: socket.socket, frames: list[bytes]) -> None:
        self.link, self.n_frames = link, len(frames)
        size = len(frames[0])
        self.memory = ctypes.create_string_buffer(b"".join(frames))
        first = ctypes.addressof(self.memory)
        vectors = b"".join(struct.pack("=QQ", first + n * size, size) for n in range(len(frames)))
        self.vectors = ctypes.create_string_buffer(vectors)
        first = ctypes.addressof(self.vectors)
        messages = b"".join(
            struct.pack("=QIIQQQQIIII", *(0, 0, 0, first + n * 16, 1), *[0] * 6) for n in range(len(frames))
        )
        self.messages = ctypes.create_string_buffer(messages)
        self.call = ctypes.CDLL(None, use_errno=True).sendmmsg

    def send(self, first: int) -> int:
        """The next frames from `first` on; how many went."""
        count = min(self.STEP, self.n_frames - first)
        at = ctypes.byref(self.messages, first * 64)
        sent: int = self.call(self.link.fileno(), at, count, 0)
        if sent < 0 and ctypes.get_errno() != errno.ENOBUFS:
            raise OSError(ctypes.get_errno(), "sendmmsg")
        return max(sent, 0)


def main(interface: str, gateway: str, count: str, rate: str, first: str = "0", how: str = "") -> None:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    link.bind((interface, 0))
    own: bytes = link.getsockname()[4]
    ethernet = bytes.fromhex(gateway.replace(":", "")) + own + b"\x08\x00"
    numbers = range(int(first), int(first) + int(count))
    sender = Sender(link, [frame(ethernet, number) for number in numbers])
    if how == "realtime":  # a rate that is due holds on a busy machine too
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    begin, sent, latest = time.monotonic(), 0, 0.0
    while sent < len(numbers):  # behind time it hurries, ahead of it it waits
        ahead = begin + sent / int(rate) - time.monotonic()
        latest = max(latest, -ahead)
        if ahead > 0:
            time.sleep(ahead)
        sent += sender.send(sent)
    rate_sent = sent / (time.monotonic() - begin)
    print(f"{rate_sent:.0f} sessions a second, late by {latest * 1000:.0f} ms at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
