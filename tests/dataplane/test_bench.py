"""dsnat-replay itself: captures, lines that cannot be read, routes, addresses, several workers."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.packet import icmp_error, read, udp
from tests.replay import CONFIG, Bench, outside

Start = Callable[..., Bench]
ETHERNET, RAW = 1, 101


def write_pcap(path: Path, packets: Sequence[tuple[int, bytes]], *, link: int = RAW) -> Path:
    """Nanosecond time stamps; a packet is (time, bytes with link header)."""
    data = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, link)
    for t_ns, packet in packets:
        data += struct.pack("<IIII", *divmod(t_ns, 10**9), len(packet), len(packet)) + packet
    path.write_bytes(data)
    return path


def read_pcap(path: Path) -> list[tuple[int, bytes]]:
    data = path.read_bytes()
    magic, *_, link = struct.unpack("<IHHiIII", data[:24])
    assert (magic, link) == (0xA1B23C4D, RAW)
    found, at = [], 24
    while at < len(data):
        seconds, ns, length, _ = struct.unpack("<IIII", data[at : at + 16])
        found.append((seconds * 10**9 + ns, data[at + 16 : at + 16 + length]))
        at += 16 + length
    return found


@pytest.fixture
def start(program: Callable[[str], Path], tmp_path: Path) -> Start:
    def run(*options: str, config: str = CONFIG) -> Bench:
        path = tmp_path / "dsnatd.yaml"
        path.write_text(config)
        return Bench(program("dsnat-replay"), path, seed=1, log=tmp_path / "log", options=options)

    return run


@pytest.fixture
def run(program: Callable[[str], Path], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG)

    def start(*options: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        argv = [program("dsnat-replay"), "--config", config, "--seed", "1", *options]
        return subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=30, check=check)

    return start


def test_captures_are_merged_by_time_and_translated(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, start: Start
) -> None:
    first, second = udp("100.64.0.2:40000 > 198.51.100.1:53"), udp("100.64.0.2:40001 > 198.51.100.1:53")
    with start() as bench:
        bench.now_ns = 10
        answer = bench.send(first)
        reply = udp(f"198.51.100.1:53 > {outside(answer)}")
        bench.now_ns = 20
        expected_in = bench.send(reply, on="outside0").out[0].raw
        bench.now_ns = 30
        expected_out = [answer.out[0].raw, bench.send(second).out[0].raw]
    inside = write_pcap(tmp_path / "in.pcap", [(10, first), (30, second)])
    remote = write_pcap(tmp_path / "out.pcap", [(20, reply)])
    done = run(
        *("--read", f"outside0={remote}", "--read", f"inside0={inside}"),
        *("--write", f"inside0={tmp_path}/to-inside", "--write", f"outside0={tmp_path}/to-outside"),
    )
    assert read_pcap(tmp_path / "to-inside") == [(20, expected_in)]
    assert read_pcap(tmp_path / "to-outside") == list(zip([10, 30], expected_out, strict=True))
    summary = json.loads(done.stdout)
    assert summary["counters"]["received"] == 3
    assert summary["equation"] is True


def test_link_headers_are_removed_and_other_frames_counted(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    packet = udp("100.64.0.2:40000 > 198.51.100.1:53", b"x")
    ethernet = bytes(12) + b"\x08\x00" + packet + bytes(17)  # padded, as short frames are
    tagged = bytes(12) + b"\x81\x00\x00\x07\x08\x00" + packet
    arp, cut = bytes(12) + b"\x08\x06" + bytes(28), bytes(9)
    capture = write_pcap(tmp_path / "in.pcap", list(enumerate([ethernet, tagged, arp, cut])), link=ETHERNET)
    done = run("--read", f"inside0={capture}", "--write", f"outside0={tmp_path}/to-outside")
    sent = [packet for _, packet in read_pcap(tmp_path / "to-outside")]
    assert [read(one).destination for one in sent] == ["198.51.100.1:53"] * 2
    assert {len(one) for one in sent} == {len(packet)}
    counters = json.loads(done.stdout)["counters"]
    assert (counters["forwarded"], counters["passed"], counters["reasons"]["not_ipv4"]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--read", "inside0=/no/such.pcap"], 1, "cannot be opened"),
        (["--read", "inside7=x"], 1, "does not begin with an interface"),
        (["--stdio", "--read", "inside0=x"], 2, "either --stdio or --read"),
        ([], 2, "either --stdio or --read"),
        (["--stdio", "--route", "198.51.100.1/24=outside0"], 2, "--route takes"),
        (["--stdio", "--address", "outside0"], 2, "--address takes"),
        (["--stdio", "--workers", "65"], 2, "--workers takes"),
        (["--stdio", "--seed", "x"], 2, "--seed takes"),
        (["--stdio", "more"], 2, "what is this argument for"),
    ],
)
def test_wrong_usage_is_one_sentence_and_a_status(
    run: Callable[..., subprocess.CompletedProcess[str]], options: list[str], status: int, sentence: str
) -> None:
    done = run(*options, check=False)
    assert done.returncode == status
    assert sentence in done.stderr


def test_a_capture_that_is_cut_fails_by_name(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    capture = write_pcap(tmp_path / "in.pcap", [(1, udp("100.64.0.2:40000 > 198.51.100.1:53"))])
    capture.write_bytes(capture.read_bytes()[:-5])
    done = run("--read", f"inside0={capture}", check=False)
    assert done.returncode == 1
    assert str(capture) in done.stderr


BAD_LINES: list[Any] = [
    {},
    {"t_ns": -1},
    {"t_ns": 1.5},
    {"t_ns": "1"},
    {"if": "inside0"},
    {"pkt": "45"},
    {"if": "inside9", "pkt": "45"},
    {"if": "inside0", "pkt": "4"},
    {"if": "inside0", "pkt": "4g"},
    {"if": "inside0", "pkt": "00" * 65536},
    {"if": "inside0", "pkt": 45},
    {"if": "inside0", "pkt": "45", "flags": ["x"]},
    {"if": "inside0", "pkt": "45", "worker": 64},
    {"if": "inside0", "pkt": "45", "more": 1},
    {"addresses": {"inside9": []}},
    {"addresses": {"inside0": ["x"]}},
    {"addresses": {"inside0": "192.0.2.1"}},
    {"ctl": {"cmd": "status"}, "t_ns": 1},
    [],
    "x",
    None,
]


def test_a_line_that_cannot_be_read_is_answered_and_changes_nothing(
    run: Callable[..., subprocess.CompletedProcess[str]], program: Callable[[str], Path], tmp_path: Path
) -> None:
    config = tmp_path / "dsnatd.yaml"
    lines = [json.dumps(line).encode() for line in BAD_LINES[1:]]
    lines += [b"", b"{", b"\xff", b"\0", b'{"a":1,"a":2}', b"[" * 100_000, b"x" * 3_000_000]
    argv = [str(program("dsnat-replay")), "--config", str(config), "--stdio"]
    text = b"\n".join([*lines, b'{"ctl":{"cmd":"show","what":"counters"}}'])  # no newline at the end
    done = subprocess.run(argv, input=text, capture_output=True, timeout=60, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines) + 1
    for line, answer in zip(lines, answers, strict=False):
        assert set(answer) == {"error"}, line[:80]
    assert answers[-1]["counters"]["received"] == 0


def test_time_does_not_run_backwards(start: Start) -> None:
    with start() as bench:
        bench.ask({"t_ns": 100})
        assert "backwards" in bench.ask({"t_ns": 99})["error"]
        assert bench.ask({"t_ns": 100}) == {"out": []}


def test_a_route_of_the_command_line_wins(start: Start) -> None:
    config = CONFIG.replace("pools:", "  - {name: outside1, role: outside}\npools:")
    routes = ("198.51.100.0/24=outside1", "198.51.100.9=none", "192.0.2.0/24=prohibit")
    with start(*(word for route in routes for word in ("--route", route)), config=config) as bench:
        assert bench.send(udp("100.64.0.2:1 > 198.51.100.1:53")).out[0].interface == "outside1"
        assert bench.send(udp("100.64.0.2:1 > 203.0.113.99:53")).out[0].interface == "outside0"
        assert bench.send(udp("100.64.0.2:1 > 198.51.100.9:53")).reason == "no_route"
        assert bench.send(udp("100.64.0.2:1 > 192.0.2.9:53")).reason == "no_route"


def test_a_host_is_answered_where_it_was_last_seen(start: Start) -> None:
    config = CONFIG.replace("pools:", "  - {name: inside1, role: inside}\npools:")
    with start(config=config) as bench:
        request = bench.send(udp("100.64.0.2:40000 > 198.51.100.1:53"), on="inside1")
        reply = bench.send(udp(f"198.51.100.1:53 > {outside(request)}"), on="outside0")
        assert [out.interface for out in reply.out] == ["inside1"]


def test_own_addresses_are_local_and_the_source_of_errors(start: Start) -> None:
    with start("--address", "inside0=100.64.0.1") as bench:
        assert bench.send(udp("100.64.0.2:1 > 100.64.0.1:53")).reason == "local"
        expired = udp("100.64.0.2:40000 > 198.51.100.1:33434", ttl=1)
        assert bench.send(expired).packet.source_address == "100.64.0.1"
        bench.ask({"addresses": {"inside0": ["100.64.0.3"]}})
        assert bench.send(expired).packet.source_address == "100.64.0.3"


def test_a_pool_follows_the_address_it_is_active_with(start: Start) -> None:
    config = CONFIG.replace("ports: 1024-65535", "active_while: 198.51.100.1")
    with start(config=config) as bench:
        packet = udp("100.64.0.2:40000 > 192.0.2.1:53")
        assert bench.send(packet).reason == "pool_inactive"
        bench.ask({"addresses": {"outside0": ["198.51.100.1"]}})
        assert bench.send(packet).verdict == "forward"
        bench.ask({"addresses": {"outside0": []}})
        assert bench.send(packet).reason == "pool_inactive"
        assert bench.ctl(cmd="show", what="pools")["pools"][0]["active"] is False


def test_an_error_quoting_a_packet_is_translated_in_a_capture_too(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    request = udp("100.64.0.2:40000 > 198.51.100.1:53")
    to_outside = tmp_path / "to-outside"
    capture = write_pcap(tmp_path / "in.pcap", [(1, request)])
    run("--read", f"inside0={capture}", "--write", f"outside0={to_outside}")
    ((_, translated),) = read_pcap(to_outside)
    error = icmp_error("192.0.2.7 > " + read(translated).source_address, 3, 1, translated)
    errors = write_pcap(tmp_path / "errors.pcap", [(2, error)])
    run(
        *("--read", f"inside0={capture}", "--read", f"outside0={errors}"),
        *("--write", f"inside0={tmp_path}/to-inside"),
    )
    ((_, back),) = read_pcap(tmp_path / "to-inside")
    quoted = read(back).quoted
    assert quoted is not None
    assert quoted.source == "100.64.0.2:40000"
