"""capture: packets before and after translation, to a pcapng file or as lines.

libpcap compiles the filter here, not in the daemon: names in it are looked up, and that may take its time.
The engine gets the program, runs it on each packet as it came and as it leaves, and shows those where one
fits. It keeps packets for a short while only; what this program does not fetch in time is lost, and counted.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from dsnatctl import explain, pcapng
from dsnatctl.client import Engine, Json

LIBRARIES = ("libpcap.so.0.8", "libpcap.so.1", "libpcap.so")
DLT_RAW, NETMASK_UNKNOWN = 12, 0xFFFFFFFF
WAIT_S = 0.05  # the ring of a busy engine is full after some 0.1 s


class WrongFilter(Exception):
    """libpcap does not understand the filter, or is not there."""


class Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.POINTER(Instruction)))


def libpcap() -> ctypes.CDLL:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise WrongFilter("filters need libpcap, which is not here; capture without one, or install libpcap0.8")


def compiled(text: str, snap: int) -> list[list[int]]:
    """The filter as [code, jt, jf, k] of classic BPF, for IPv4 packets without a link layer."""
    library = libpcap()
    library.pcap_open_dead.restype = ctypes.c_void_p
    library.pcap_geterr.restype = ctypes.c_char_p
    handle = ctypes.c_void_p(library.pcap_open_dead(DLT_RAW, snap))
    program = Program()
    try:
        if library.pcap_compile(
            handle, ctypes.byref(program), text.encode(), 1, ctypes.c_uint32(NETMASK_UNKNOWN)
        ):
            why = library.pcap_geterr(handle).decode(errors="replace")
            raise WrongFilter(f"the filter {text!r} cannot be read: {why}; see man pcap-filter")
        try:
            return [[one.code, one.jt, one.jf, one.k] for one in program.instructions[: int(program.length)]]
        finally:
            library.pcap_freecode(ctypes.byref(program))
    finally:
        library.pcap_close(handle)


@dataclass
class Capture:
    """One capture: what was asked for, and how far it has come."""

    snap: int
    count: int
    seconds: float
    size: int
    meanings: Mapping[str, Mapping[str, str]]
    writer: pcapng.Writer | None = None
    wall_ns: int = 0  # to add to the engine's time
    packets: int = 0
    figures: Json = field(default_factory=lambda: {"seen": 0, "matched": 0, "lost": 0})

    def full(self) -> bool:
        return self.packets >= self.count or (self.writer is not None and self.writer.written >= self.size)

    def take(self, one: Json) -> None:
        self.packets += 1
        if self.writer is None:
            print(self.line(one))
            return
        comment = self.comment(one)
        for side, name in ((pcapng.BEFORE, "before"), (pcapng.AFTER, "after")):
            if name in one:
                part = one[name]
                self.writer.packet(
                    side,
                    one["t_ns"] + self.wall_ns,
                    bytes.fromhex(part["pkt"]),
                    part["bytes"],
                    comment=f"{part['if']}: {comment}",
                    ident=self.packets,
                )

    def comment(self, one: Json) -> str:
        verdict = "made by the engine" if one["made"] else one["verdict"]
        meaning = self.meanings.get(one["reason"], {}).get("meaning", "")
        return f"{verdict}, {one['reason']}" + (f": {meaning}" if meaning else "")

    def line(self, one: Json) -> str:
        at = datetime.fromtimestamp((one["t_ns"] + self.wall_ns) / 1e9).time()
        ends = [
            f"{one[name]['if']} {explain.ends_of(bytes.fromhex(one[name]['pkt']))}"
            for name in ("before", "after")
            if name in one and len(one[name]["pkt"]) >= 48
        ]
        if "after" not in one or one["made"]:
            ends.append(self.comment(one))
        return f"{at}  " + "  =>  ".join(ends)


def requests(*, flt: str, sample: int, reasons: list[str], snap: int) -> Json:
    request: Json = {"cmd": "capture", "start": True, "sample": sample, "snap": snap}
    if flt:
        request["filter"] = compiled(flt, snap)
    if reasons:
        request["reasons"] = reasons
    return request


def pages(engine: Engine, ident: int) -> Iterator[Json]:
    """What there is, again and again; ends when the engine has ended it."""
    while True:
        answer = engine.ask(cmd="capture", id=ident)
        yield answer
        if answer["ended"]:
            return
        if not answer["packets"]:
            time.sleep(WAIT_S)


def run(engine: Engine, request: Json, capture: Capture) -> None:
    """Until one of the bounds is reached or the user interrupts; both are a proper end."""
    started = engine.ask(**request)
    capture.wall_ns = time.time_ns() - started["now_ns"]
    ends = time.monotonic() + capture.seconds
    try:
        for answer in pages(engine, started["id"]):
            capture.figures = answer
            for one in answer["packets"]:
                if capture.full():
                    break
                capture.take(one)
            if capture.full() or (time.monotonic() >= ends and not answer["packets"]):
                break
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    finally:
        left = engine.ask(cmd="capture", id=started["id"], stop=True)
        for one in left["packets"]:
            if not capture.full():
                capture.take(one)
        capture.figures = left
    if capture.writer is not None:
        capture.writer.end(time.time_ns(), lost=capture.figures["lost"], comment=summary(capture))


def summary(capture: Capture) -> str:
    figures = capture.figures
    return (
        f"{capture.packets} packets captured, {figures['matched']} of {figures['seen']} chosen, "
        f"{figures['lost']} lost because they were not fetched in time"
    )
