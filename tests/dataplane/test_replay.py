"""The NAT packet by packet, through `dsnat-replay --stdio`: what an operator would check first."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.packet import icmp_error, ipv4, ping, pong, read, tcp, udp
from tests.replay import CONFIG, Bench, outside

POOL = [f"203.0.113.{n}" for n in range(1, 5)]


def test_each_new_connection_takes_the_next_address(replay: Bench) -> None:
    answers = replay(*(tcp(f"100.64.0.2:{40000 + n} > 198.51.100.1:80") for n in range(8)))
    assert [outside(answer).split(":")[0] for answer in answers] == POOL * 2


def test_a_reply_finds_its_host(replay: Bench) -> None:
    request = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:53"))
    reply = replay.send(udp(f"198.51.100.1:53 > {outside(request)}"), on="outside0")
    assert reply.verdict == "forward"
    assert reply.out[0].interface == "inside0"
    assert reply.packet.destination == "100.64.0.2:40000"
    assert reply.packet.source == "198.51.100.1:53"


def test_packets_of_a_connection_keep_their_address_and_port(replay: Bench) -> None:
    first = replay.send(tcp("100.64.0.2:40000 > 198.51.100.1:80"))
    replay.send(tcp(f"198.51.100.1:80 > {outside(first)}", "SA", ack=1001), on="outside0")
    second = replay.send(tcp("100.64.0.2:40000 > 198.51.100.1:80", "A", seq=1001, ack=1001))
    assert outside(first) == outside(second)


def test_payload_and_ttl_are_as_a_router_leaves_them(replay: Bench) -> None:
    answer = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:53", b"the payload", ttl=17))
    assert answer.packet.payload == b"the payload"
    assert answer.packet.ttl == 16
    assert answer.packet.destination == "198.51.100.1:53"


def test_a_ping_is_answered_to_the_host_that_sent_it(replay: Bench) -> None:
    request = replay.send(ping("100.64.0.2 > 198.51.100.1", ident=7))
    address, _, ident = outside(request).partition(":")
    reply = replay.send(pong(f"198.51.100.1 > {address}", ident=int(ident)), on="outside0")
    assert reply.packet.destination == "100.64.0.2:7"


def test_an_error_about_a_request_reaches_the_host_with_its_own_packet_inside(replay: Bench) -> None:
    request = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:53"))
    address = outside(request).split(":")[0]
    error = icmp_error(f"198.51.100.254 > {address}", 3, 1, request.out[0].raw)
    answer = replay.send(error, on="outside0")
    assert answer.packet.destination_address == "100.64.0.2"
    assert answer.packet.quoted is not None
    assert answer.packet.quoted.source == "100.64.0.2:40000"


def test_an_unasked_packet_to_a_pool_address_is_dropped_and_named(replay: Bench) -> None:
    answer = replay.send(udp("198.51.100.1:53 > 203.0.113.1:5000"), on="outside0")
    assert (answer.verdict, answer.reason, answer.out) == ("drop", "no_session", ())


def test_a_source_without_a_zone_is_dropped_and_named(replay: Bench) -> None:
    answer = replay.send(udp("192.168.7.7:40000 > 198.51.100.1:53"))
    assert (answer.verdict, answer.reason) == ("drop", "no_zone")


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"\x45", "truncated"),
        (udp("100.64.0.2:40000 > 198.51.100.1:53")[:24], "truncated"),
        (b"\x65" + udp("100.64.0.2:40000 > 198.51.100.1:53")[1:], "bad_version"),
        (udp("127.0.0.1:40000 > 198.51.100.1:53"), "bad_source"),
        (ipv4("100.64.0.2 > 198.51.100.1", 47, b"gre"), "protocol"),
    ],
)
def test_a_broken_or_foreign_packet_is_dropped_by_its_name(replay: Bench, packet: bytes, reason: str) -> None:
    answer = replay.send(packet)
    assert (answer.verdict, answer.reason) == ("drop", reason)


def test_a_packet_whose_ttl_ends_here_is_answered_by_the_gateway(replay: Bench) -> None:
    answer = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:33434", ttl=1))
    assert (answer.verdict, answer.reason) == ("drop", "ttl_expired")


def test_a_session_that_was_idle_too_long_is_gone(bench: Callable[[str], Bench]) -> None:
    replay = bench(CONFIG + "timeouts: {udp_one_way: 10s, udp: 10s}\n")
    first = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    replay.wait(15)
    reply = replay.send(udp(f"198.51.100.1:5000 > {outside(first)}"), on="outside0")
    assert (reply.verdict, reply.reason) == ("drop", "no_session")


def test_no_session_is_refused_while_a_port_is_free(bench: Callable[[str], Bench]) -> None:
    replay = bench(CONFIG.replace("1024-65535", "5000-5009"))
    free = 4 * 10
    answers = replay(*(udp(f"100.64.0.2:{20000 + n} > 198.51.100.1:53") for n in range(free + 1)))
    taken = Counter(outside(answer) for answer in answers[:free])
    assert len(taken) == free
    assert (answers[free].verdict, answers[free].reason) == ("drop", "no_port")


def test_an_outside_port_serves_again_towards_another_remote(bench: Callable[[str], Bench]) -> None:
    replay = bench(
        CONFIG.replace("1024-65535", "5000-5000").replace("203.0.113.1-203.0.113.4", "203.0.113.1")
    )
    first = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:53"))
    second = replay.send(udp("100.64.0.2:40000 > 198.51.100.2:53"))
    assert outside(first) == outside(second) == "203.0.113.1:5000"


def _transcript(program: Path, config: Path, seed: int) -> bytes:
    lines = [
        {"t_ns": n, "if": "inside0", "pkt": tcp(f"100.64.0.{n % 200 + 1}:{1024 + n} > 198.51.100.1:80").hex()}
        for n in range(500)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    argv = [str(program), "--stdio", "--config", str(config), "--seed", str(seed)]
    return subprocess.run(argv, input=text.encode(), capture_output=True, check=True, timeout=30).stdout


def test_the_same_seed_gives_the_same_output_byte_for_byte(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG)
    first, again, other = (_transcript(program("dsnat-replay"), config, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first.splitlines()) == 500


def test_ports_are_hard_to_guess(replay: Bench) -> None:
    answers = replay(*(udp(f"100.64.0.2:{20000 + n} > 198.51.100.{n % 250 + 1}:53") for n in range(200)))
    ports = [int(outside(answer).split(":")[1]) for answer in answers]
    steps = [abs(b - a) for a, b in pairwise(ports)]
    assert sum(step < 256 for step in steps) < 20, "ports follow one another"


def test_every_line_is_answered_by_one_line(replay: Bench) -> None:
    assert replay.ask({"nonsense": 1}) != {}
    assert replay.ctl(cmd="show", what="pools")["ok"] is True
    assert replay.ctl(cmd="show", what="nothing")["ok"] is False
    assert read(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:53")).out[0].raw)


def test_a_wrong_configuration_is_told_by_line_and_column(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG.replace("pool: g1", "pool: g2").replace("role: inside", "role: within"))
    argv = [str(program("dsnat-replay")), "--stdio", "--config", str(config), "--seed", "1"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert any(line.startswith(f"{config}:3:") for line in lines), done.stderr
    assert any(line.startswith(f"{config}:8:") for line in lines), done.stderr


def test_an_address_that_leaves_its_pool_serves_its_sessions_to_their_end(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    nat = bench(CONFIG)
    file = tmp_path / "dsnatd-0.yaml"
    before = [nat.send(udp(f"100.64.0.2:{5000 + n} > 198.51.100.1:53")) for n in range(4)]
    file.write_text(CONFIG.replace("203.0.113.1-203.0.113.4", "203.0.113.2"))
    assert nat.ctl(cmd="reload")["ok"]
    for n, answer in enumerate(before):
        reply = nat.send(udp(f"198.51.100.1:53 > {outside(answer)}"), on="outside0")
        assert reply.packet.destination == f"100.64.0.2:{5000 + n}"
        again = nat.send(udp(f"100.64.0.2:{5000 + n} > 198.51.100.1:53"))
        assert outside(again) == outside(answer)
    new = [nat.send(udp(f"100.64.0.2:{6000 + n} > 198.51.100.1:53")) for n in range(4)]
    assert {outside(answer).split(":")[0] for answer in new} == {"203.0.113.2"}
    draining = [
        a["address"] for a in nat.ctl(cmd="show", what="pools")["pools"][0]["addresses"] if a["draining"]
    ]
    assert draining == ["203.0.113.1", "203.0.113.3", "203.0.113.4"]
    nat.wait(1000)
    nat.wait(1)
    assert nat.ctl(cmd="reload")["ok"]
    assert len(nat.ctl(cmd="show", what="pools")["pools"][0]["addresses"]) == 1
