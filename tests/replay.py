"""Drives `dsnat-replay --stdio`: one line in, one line out, as in the design of the test bench.

A `Bench` is one engine with one configuration and one seed. Its clock is the test's: it starts at one second
and moves only when a test says so. Every packet that the engine lets out is parsed, so a wrong checksum fails
where it happens.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.packet import Packet, read

SECOND_NS = 1_000_000_000

CONFIG = """\
engine: {workers: 1, max_sessions: 10000}
interfaces:
  - {name: inside0, role: inside, path: dpdk}
  - {name: outside0, role: outside, path: dpdk}
pools:
  - {name: g1, addresses: [203.0.113.1-203.0.113.4], ports: 1024-65535}
zones:
  - {source: 100.64.0.0/16, pool: g1}
"""

ED, EIM = "endpoint-dependent", "endpoint-independent"


def configuration(
    mapping: str,
    pool: str = "",
    *,
    addresses: str = "203.0.113.1-203.0.113.4",
    ports: str = "1024-65535",
    mtu: str = "",
    zone: str = "",
    extra: str = "",
) -> str:
    """A gateway with one pool. `pool` and `zone` are further keys of theirs, `extra` is further lines of the
    file.
    """
    more_pool, more_zone = (", " + keys if keys else "" for keys in (pool, zone))
    more_mtu = f", mtu: {mtu}" if mtu else ""
    return (
        "engine: {workers: 1, max_sessions: 10000}\n"
        "interfaces:\n"
        "  - {name: inside0, role: inside, path: dpdk}\n"
        f"  - {{name: outside0, role: outside, path: dpdk{more_mtu}}}\n"
        "pools:\n"
        f"  - {{name: g1, addresses: [{addresses}], ports: {ports}, mapping: {mapping}{more_pool}}}\n"
        "zones:\n"
        f"  - {{source: 100.64.0.0/16, pool: g1{more_zone}}}\n"
        f"{extra}\n"
    )


@dataclass(frozen=True)
class Out:
    """A packet that left: over which interface, and whether the engine made it itself."""

    interface: str
    raw: bytes
    origin: str
    packet: Packet


@dataclass(frozen=True)
class Answer:
    verdict: str
    reason: str
    out: tuple[Out, ...]
    line: dict[str, Any]

    @property
    def packet(self) -> Packet:
        """The one packet that left; anything else is a failure of the test."""
        assert len(self.out) == 1, f"expected exactly one packet out: {self.line}"
        return self.out[0].packet


def outside(answer: Answer) -> str:
    """ADDRESS:PORT that a request was given."""
    assert answer.verdict == "forward", answer.line
    return answer.packet.source


def changed(before: bytes, after: bytes) -> set[int]:
    """The offsets of the bytes that differ; both must have the same length."""
    assert len(before) == len(after), f"{len(before)} bytes became {len(after)}"
    return {at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}


class Bench(AbstractContextManager["Bench"]):
    def __init__(
        self, program: Path, config: Path, *, seed: int, log: Path, options: Sequence[str] = ()
    ) -> None:
        self.now_ns = SECOND_NS
        self.log, self.config = log, config
        argv = [str(program), "--stdio", "--config", str(config), "--seed", str(seed), *options]
        self._errors = log.open("wb")
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> int:
        """Ends the input and returns the exit status: under ASan a leak or an overrun shows here."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
        status = self._process.wait(timeout=20)
        self._errors.close()
        return status

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            text = self._process.stdout.readline()
        except BrokenPipeError:
            text = ""
        if not text:
            status = self._process.wait(timeout=20)
            raise AssertionError(f"dsnat-replay ended with status {status}:\n{self.log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def send(self, packet: bytes, *, on: str = "inside0", after_s: float = 0.0) -> Answer:
        self.now_ns += int(after_s * SECOND_NS)
        return self._answer(self.ask({"t_ns": self.now_ns, "if": on, "pkt": packet.hex()}))

    def wait(self, seconds: float) -> Answer:
        """Only time passes; the answer carries what the engine itself sends meanwhile."""
        self.now_ns += int(seconds * SECOND_NS)
        return self._answer(self.ask({"t_ns": self.now_ns}))

    def ctl(self, **request: Any) -> dict[str, Any]:
        return self.ask({"ctl": request})

    def __call__(self, *packets: bytes, on: str = "inside0") -> Sequence[Answer]:
        return [self.send(packet, on=on) for packet in packets]

    def sessions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ctl(cmd="show", what="sessions")["sessions"]
        return found

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ctl(cmd="show", what="counters")["counters"]
        return found

    @staticmethod
    def _answer(line: dict[str, Any]) -> Answer:
        out = tuple(
            Out(one["if"], raw, one["origin"], read(raw))
            for one in line.get("out", ())
            for raw in (bytes.fromhex(one["pkt"]),)
        )
        return Answer(line.get("verdict", ""), line.get("reason", ""), out, line)


Start = Callable[[str], Bench]
