"""Writes pcapng: packets as the engine saw them, before and after translation.

Two interfaces, one for each side; both sides of one packet carry the same packet id, and a comment says what
the engine decided and why. IPv4 without a link layer (LINKTYPE_IPV4), times in nanoseconds.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

LINKTYPE_IPV4 = 228
BEFORE, AFTER = 0, 1
INBOUND, OUTBOUND = 1, 2  # epb_flags, as the gateway sees it


def option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + b"\0" * (-len(value) % 4)


def block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", 12 + len(body))
    return struct.pack("<I", kind) + length + body + length


class Writer:
    def __init__(self, file: BinaryIO, *, version: str, snap: int, comment: str) -> None:
        self._file = file
        self.written = 0
        options = option(1, comment.encode()) + option(4, version.encode()) + option(0, b"")
        self._put(block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1) + options))
        for name, text in (("before", "packets as they came in"), ("after", "packets as they leave")):
            options = (
                option(2, name.encode()) + option(3, text.encode()) + option(9, b"\x09") + option(0, b"")
            )
            self._put(block(1, struct.pack("<HHI", LINKTYPE_IPV4, 0, snap) + options))

    def packet(self, side: int, t_ns: int, data: bytes, length: int, *, comment: str, ident: int) -> None:
        flags = INBOUND if side == BEFORE else OUTBOUND
        options = (
            option(1, comment.encode())
            + option(2, struct.pack("<I", flags))
            + option(5, struct.pack("<Q", ident))
            + option(0, b"")
        )
        head = struct.pack("<IIIII", side, t_ns >> 32, t_ns & 0xFFFFFFFF, len(data), length)
        self._put(block(6, head + data + b"\0" * (-len(data) % 4) + options))

    def end(self, t_ns: int, *, lost: int, comment: str) -> None:
        """The statistics of both interfaces: what the reader has missed."""
        for side in (BEFORE, AFTER):
            options = option(1, comment.encode()) + option(5, struct.pack("<Q", lost)) + option(0, b"")
            self._put(block(5, struct.pack("<III", side, t_ns >> 32, t_ns & 0xFFFFFFFF) + options))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.written += len(data)
