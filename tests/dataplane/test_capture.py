"""dsnatctl capture: what it shows is what came and what left; what it misses it counts."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dsnatctl
from dsnatctl import capture
from dsnatctl.__main__ import main
from tests.packet import read, tcp, udp
from tests.replay import CONFIG, Answer, Bench

OUT = udp("100.64.0.2:4000 > 198.51.100.1:80")


@dataclass(frozen=True)
class Block:
    side: str
    data: bytes
    length: int
    comment: str
    ident: int


def blocks(file: bytes) -> tuple[list[Block], dict[str, Any]]:
    """The packets of a pcapng file, and the statistics at its end."""
    at, names, found, last = 0, [], list[Block](), dict[str, Any]()
    while at < len(file):
        kind, length = struct.unpack_from("<II", file, at)
        assert struct.unpack_from("<I", file, at + length - 4)[0] == length
        body = file[at + 8 : at + length - 4]
        fixed = {0x0A0D0D0A: 16, 1: 8, 5: 12}.get(kind)
        if fixed is None:
            side, _, _, kept, whole = struct.unpack_from("<IIIII", body)
            fixed = 20 + kept + -kept % 4
        options = dict(read_options(body[fixed:]))
        if kind == 1:
            assert struct.unpack_from("<H", body)[0] == 228
            names.append(options[2].decode())
        elif kind == 6:
            ident = struct.unpack("<Q", options[5])[0]
            found.append(Block(names[side], body[20 : 20 + kept], whole, options[1].decode(), ident))
        elif kind == 5:
            last = {"lost": struct.unpack("<Q", options[5])[0], "comment": options[1].decode()}
        at += length
    return found, last


def read_options(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        code, length = struct.unpack_from("<HH", data, at)
        yield code, data[at + 4 : at + 4 + length]
        at += 4 + length + -length % 4


@dataclass
class Running:
    """`dsnatctl capture` beside the test."""

    process: subprocess.Popen[bytes]

    def end(self) -> tuple[bytes, str]:
        out, errors = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, errors.decode()
        return out, errors.decode()


@pytest.fixture
def start(engine: Bench, path: Path) -> Callable[..., Running]:
    def run(*words: str) -> Running:
        argv = [sys.executable, "-m", "dsnatctl", "capture", "--socket", str(path), *words]
        there = os.environ | {"PYTHONPATH": str(Path(dsnatctl.__file__).parents[1])}
        running = Running(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=there))
        deadline = time.monotonic() + 30
        while not engine.ctl(cmd="capture")["running"]:
            assert running.process.poll() is None, running.end()
            assert time.monotonic() < deadline, "the capture did not start"
        return running

    return run


def sent(engine: Bench, *packets: bytes, on: str = "inside0") -> list[Answer]:
    return [engine.send(packet, on=on) for packet in packets]


def test_the_file_holds_each_packet_before_and_after_with_the_reason(
    engine: Bench, start: Callable[..., Running], tmp_path: Path
) -> None:
    file = tmp_path / "a.pcapng"
    running = start("-w", str(file), "--count", "3")
    stray = udp("100.127.0.2:4000 > 198.51.100.1:80")
    first = engine.send(OUT)
    back = udp(f"198.51.100.1:80 > {first.packet.source}")
    second = engine.send(back, on="outside0")
    engine.send(stray)
    running.end()

    found, last = blocks(file.read_bytes())
    assert [(one.side, one.data) for one in found] == [
        ("before", OUT),
        ("after", first.out[0].raw),
        ("before", back),
        ("after", second.out[0].raw),
        ("before", stray),
    ]
    assert [one.ident for one in found] == [1, 1, 2, 2, 3]
    assert "inside0: forward, ok" in found[0].comment
    assert "drop, no_zone: no zone matches the source" in found[4].comment
    assert last["lost"] == 0
    told = subprocess.run(["tcpdump", "-nr", "-"], input=file.read_bytes(), capture_output=True, check=False)
    assert len(told.stdout.splitlines()) == 5, told


def test_a_filter_fits_either_side(engine: Bench, start: Callable[..., Running]) -> None:
    running = start("--count", "2", "udp", "and", "host", "203.0.113.1")
    answers = sent(engine, *(udp(f"100.64.0.{n}:4000 > 198.51.100.1:80") for n in range(2, 10)))
    sent(engine, tcp("100.64.0.3:5 > 198.51.100.1:80"))
    out, errors = running.end()

    shown = [line.split("  ", 1)[1] for line in out.decode().splitlines()]
    want = [
        f"inside0 {read(raw).source} > {read(raw).destination}  =>  "
        f"outside0 {answer.packet.source} > {answer.packet.destination}"
        for n, answer in enumerate(answers)
        if answer.packet.source_address == "203.0.113.1"
        for raw in (udp(f"100.64.0.{n + 2}:4000 > 198.51.100.1:80"),)
    ]
    assert shown == want
    assert "2 packets captured" in errors


def test_drops_for_a_reason_alone_and_one_in_so_many(engine: Bench, start: Callable[..., Running]) -> None:
    running = start("--drops", "no_zone", "--sample", "3", "--count", "2")
    sent(engine, OUT, *(udp(f"100.127.0.{n}:4000 > 198.51.100.1:80") for n in range(1, 8)))
    out, _ = running.end()

    assert [line.split()[2].partition(":")[0] for line in out.decode().splitlines()] == [
        "100.127.0.3",
        "100.127.0.6",
    ]


def test_what_is_not_fetched_in_time_is_lost_and_counted(engine: Bench) -> None:
    ident = engine.ctl(cmd="capture", start=True, snap=9216)["id"]
    n = 400
    sent(engine, *[OUT] * n)
    got, answer = 0, engine.ctl(cmd="capture", id=ident)
    while answer["packets"]:
        got += len(answer["packets"])
        answer = engine.ctl(cmd="capture", id=ident)

    assert answer["lost"] > 0
    assert (answer["seen"], answer["matched"]) == (n, n)
    assert got + answer["lost"] == n
    assert engine.ctl(cmd="capture", id=ident, stop=True)["ended"]
    assert "has ended" in engine.ctl(cmd="capture", id=ident)["error"]


def test_a_reader_that_is_gone_is_left_after_ten_seconds(engine: Bench) -> None:
    first = engine.ctl(cmd="capture", start=True)["id"]
    assert "somebody else" in engine.ctl(cmd="capture", start=True)["error"]
    engine.send(OUT, after_s=11)

    second = engine.ctl(cmd="capture", start=True)

    assert second["ok"]
    assert "has ended" in engine.ctl(cmd="capture", id=first)["error"]


def test_a_capture_shows_what_the_engine_makes_and_lets_go(engine: Bench) -> None:
    ident = engine.ctl(cmd="capture", start=True)["id"]
    engine.send(udp("100.64.0.2:4000 > 198.51.100.1:80", ttl=1))

    made, dropped = sorted(engine.ctl(cmd="capture", id=ident)["packets"], key=lambda one: not one["made"])

    assert (made["made"], made["after"]["if"], "before" in made) == (True, "inside0", False)
    assert (dropped["reason"], "after" in dropped) == ("ttl_expired", False)


def test_wrong_requests_and_filters_are_refused(
    engine: Bench, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, word in (
        ({"filter": [[1, 2, 3]]}, "BPF"),
        ({"filter": []}, "BPF"),
        ({"filter": [[6, 0, 0, 1]] * 5000}, "BPF"),
        ({"filter": "udp"}, "BPF"),
        ({"filter": [[5, 0, 0, 4294967295], [6, 0, 0, 0]]}, "BPF"),  # jumps backwards
        ({"reasons": ["nonsense"]}, "no reason"),
        ({"reasons": ["tx_full"]}, "only counted"),
        ({"snap": 100000}, "snap"),
    ):
        assert word in engine.ctl(cmd="capture", start=True, **wrong)["error"]

    assert main(["capture", "--socket", str(path), "nonsense", "filter"]) == 2
    assert "man pcap-filter" in capsys.readouterr().err
    assert main(["capture", "--socket", str(path), "--json"]) == 2


def test_a_capture_while_packets_flow_changes_none_of_them(
    engine: Bench, bench: Callable[[str], Bench]
) -> None:
    packets = [udp(f"100.64.0.{n % 9 + 2}:{4000 + n} > 198.51.100.1:80") for n in range(200)]
    ident = engine.ctl(cmd="capture", start=True, filter=capture.compiled("udp port 80", 2048))["id"]
    watched = [answer.line for answer in sent(engine, *packets)]

    unwatched = [answer.line for answer in sent(bench(CONFIG), *packets)]

    assert watched == unwatched
    assert engine.ctl(cmd="capture", id=ident)["seen"] == len(packets)


def test_the_summary_is_json_when_asked(
    engine: Bench, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["capture", "--socket", str(path), "--json", "-w", str(tmp_path / "b"), "--seconds", "0"]
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(main(words)))
    thread.start()
    thread.join(30)

    assert done == [0]
    assert json.loads(capsys.readouterr().out) == {
        "ok": True,
        "packets": 0,
        "seen": 0,
        "matched": 0,
        "lost": 0,
    }
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
