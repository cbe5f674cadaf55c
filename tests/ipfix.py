"""IPFIX read by the book (RFC 7011), knowing nothing of who wrote it: templates first, then records."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

NAMES = {
    4: "protocol",
    7: "source_port",
    8: "source",
    11: "destination_port",
    12: "destination",
    225: "post_source",
    227: "post_source_port",
    230: "event",
    283: "pool_id",
    323: "time_ms",
    361: "port_first",
    362: "port_last",
    466: "quota_event",
    471: "max_sessions",
    473: "max_per_user",
}
ADDRESSES = {8, 12, 225}
Record = dict[str, Any]


@dataclass
class Reader:
    """One transport session. `missed` counts the data records that sequence numbers say were lost."""

    templates: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    expected: dict[int, int] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    missed: int = 0
    unreadable: int = 0
    messages: int = 0

    def read(self, data: bytes) -> bytes:
        """All whole messages at the start of `data`; gives the rest."""
        while len(data) >= 16:
            version, length = struct.unpack_from(">HH", data)
            assert version == 10, data[:16]
            if len(data) < length:
                break
            self.message(data[:length])
            data = data[length:]
        return data

    def message(self, data: bytes) -> None:
        _, length, export_s, sequence, domain = struct.unpack_from(">HHIII", data)
        assert length == len(data)
        assert domain > 0
        assert export_s >= 0
        self.messages += 1
        expected = self.expected.get(domain, sequence)
        assert sequence >= expected or sequence < 1000, "sequence numbers only go forward"
        self.missed += max(sequence - expected, 0)
        at, n_records = 16, 0
        while at < length:
            number, size = struct.unpack_from(">HH", data, at)
            assert size > 4, "no empty sets"
            body = data[at + 4 : at + size]
            if number == 2:
                self.template(domain, body)
            else:
                n_records += self.data(domain, number, body)
            at += size
        assert at == length
        self.expected[domain] = sequence + n_records

    def template(self, domain: int, body: bytes) -> None:
        at = 0
        while at < len(body):
            number, n = struct.unpack_from(">HH", body, at)
            pairs = struct.unpack_from(f">{2 * n}H", body, at + 4)
            self.templates[domain, number] = list(zip(pairs[::2], pairs[1::2], strict=True))
            at += 4 + 4 * n

    def data(self, domain: int, number: int, body: bytes) -> int:
        elements = self.templates.get((domain, number))
        if elements is None:
            self.unreadable += 1
            return 0
        size = sum(length for _, length in elements)
        assert len(body) % size == 0
        for at in range(0, len(body), size):
            self.records.append(dict(values(elements, body[at : at + size])))
        return len(body) // size


def values(elements: list[tuple[int, int]], body: bytes) -> Iterator[tuple[str, Any]]:
    at = 0
    for number, length in elements:
        value = int.from_bytes(body[at : at + length], "big")
        yield NAMES[number], str(IPv4Address(value)) if number in ADDRESSES else value
        at += length
