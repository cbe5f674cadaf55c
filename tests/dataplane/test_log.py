"""What the operator reads in the journal: the bench answers with the lines that dsnatd would write."""

from __future__ import annotations

from tests.packet import udp
from tests.replay import ED, EIM, Bench, Start, configuration

REMOTE = "198.51.100.1:80"


def log(replay: Bench, packet: bytes) -> list[str]:
    lines: list[str] = replay.send(packet).line.get("log", [])
    return lines


def test_rfc6888_req11c_the_operator_is_told_once_a_minute_that_ports_are_exhausted(bench: Start) -> None:
    replay = bench(
        configuration(ED, addresses="203.0.113.1", ports="5000-5000", extra="timeouts: {udp_one_way: 1h}")
    )
    assert log(replay, udp(f"100.64.0.2:1 > {REMOTE}")) == []
    (line,) = log(replay, udp(f"100.64.0.3:1 > {REMOTE}"))
    assert line == (
        "pool g1: 100.64.0.3 was refused: no port of any address is free towards this remote (no_port); "
        "add addresses to the pool"
    )
    told = [len(log(replay, udp(f"100.64.1.{n}:1 > {REMOTE}"))) for n in range(1, 200)]
    assert sum(told) == 0
    replay.wait(61)
    assert len(log(replay, udp(f"100.64.0.3:1 > {REMOTE}"))) == 1


def test_rfc6888_req11c_the_operator_is_told_that_the_table_is_full_or_a_host_at_its_limit(
    bench: Start,
) -> None:
    small = configuration(ED).replace("max_sessions: 10000", "max_sessions: 1024")
    replay = bench(small + "limits: {sessions_per_host: 1000}\n")
    lines = [
        line
        for n in range(2000)
        for line in log(replay, udp(f"100.64.0.{2 + n // 1001}:{1000 + n} > {REMOTE}"))
    ]
    assert lines == [
        "pool g1: 100.64.0.2 was refused: the host has limits.sessions_per_host sessions (host_sessions); "
        "look for an infected host, or raise the limit",
        "pool g1: 100.64.0.3 was refused: max_sessions reached (table_full); raise engine.max_sessions",
    ]


def test_rfc6888_req12_no_line_names_a_destination(bench: Start) -> None:
    keys = "block_ports: 16, blocks_per_host: 1"
    replay = bench(configuration(EIM, keys, addresses="203.0.113.1", ports="5000-5031"))
    lines = [
        line
        for host in range(2, 6)
        for n in range(40)
        for line in log(replay, udp(f"100.64.0.{host}:{1000 + n} > 198.51.100.{n + 1}:{n + 1}"))
    ]
    assert len(lines) >= 4
    assert not any("198.51.100" in line for line in lines)


def test_rfc6888_req14_a_block_is_told_once_and_not_each_flow(bench: Start) -> None:
    keys = "block_ports: 128, blocks_per_host: 2"
    replay = bench(configuration(EIM, keys, addresses="203.0.113.1", ports="1024-2047"))
    lines = [line for n in range(256) for line in log(replay, udp(f"100.64.0.2:{1000 + n} > {REMOTE}"))]
    assert len(lines) == 2
    assert all(line.startswith("pool g1: 100.64.0.2 took ports ") for line in lines)
    freed = [line for _ in range(300) for line in replay.wait(1).line.get("log", ())]
    assert sorted(freed) == sorted(line.replace("took", "gave back") for line in lines)
