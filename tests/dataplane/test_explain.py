"""explain says what the engine would do: tried here by letting it do it.

Random packets, in sequence and out of it, over a gateway that has every kind of pool and is short of
everything. Each is explained first and sent then: verdict, reason and every byte that leaves must be what was
foretold, and the same run without a single explanation must come to the same end. `--explain-packets 100000`
makes the run longer.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsnatctl.__main__ import main
from tests.packet import icmp_error, ping, pong, tcp, udp
from tests.replay import CONFIG, Bench

CROWDED = """\
engine: {workers: 1, max_sessions: 1024}
interfaces:
  - {name: inside0, role: inside, path: dpdk}
  - {name: outside0, role: outside, path: dpdk, mtu: 600}
pools:
  - {name: ed, addresses: [203.0.113.1-203.0.113.3], ports: 5000-5001}
  - {name: eim, addresses: [203.0.113.8-203.0.113.9], ports: 1000-1060, mapping: endpoint-independent,
     filtering: address-dependent}
  - {name: open, addresses: [203.0.113.16], ports: 7000-7100, mapping: endpoint-independent}
  - {name: blocks, addresses: [203.0.113.24-203.0.113.25], ports: 4096-4223, select: paired,
     block_ports: 16, blocks_per_host: 2}
  - {name: shares, addresses: [203.0.113.32], ports: 2048-2111, select: paired,
     deterministic: 100.64.4.0/29, dynamic_ports: 8}
zones:
  - {source: 100.64.0.0/24, pool: ed}
  - {source: 100.64.1.0/24, pool: eim}
  - {source: 100.64.2.0/24, pool: open, mss_clamp: 1200}
  - {source: 100.64.3.0/24, pool: blocks}
  - {source: 100.64.4.0/29, pool: shares}
  - {source: 100.64.5.0/24, action: drop}
  - {source: 100.64.6.0/24, action: pass}
static:
  - {inside: 100.64.0.9, outside: 203.0.113.1, protocol: tcp, port: 5001, inside_port: 80}
  - {inside: 100.64.1.9, outside: 203.0.113.9}
limits: {sessions_per_host: 7, new_per_host_per_s: 6}
timeouts: {tcp_opening: 20s, tcp_closing: 5s, udp: 30s, udp_one_way: 10s, hold: 9s, icmp: 6s}
tcp_midflow: reset
refusal: icmp-host
"""
POOL = [*(f"203.0.113.{n}" for n in (1, 2, 3, 8, 9, 16, 24, 25, 32)), "203.0.113.99"]
REMOTES = ["198.51.100.1", "198.51.100.2"]
Sent = tuple[str, str, bytes]  # protocol, interface, packet


def build(dice: random.Random, protocol: str, flow: str) -> bytes:
    payload = dice.choice([b"payload", b"payload", b"x" * 700])
    ttl, whole = dice.choice([64, 64, 64, 64, 1]), dice.random() < 0.5
    if protocol == "tcp":
        flags = dice.choice(["S", "S", "S", "SA", "A", "FA", "R", "PA"])
        return tcp(flow, flags, b"" if "S" in flags else payload, ttl=ttl, mss=1460, dont_fragment=whole)
    if protocol == "udp":
        return udp(flow, payload, ttl=ttl, dont_fragment=whole)
    addresses = " > ".join(end.partition(":")[0] for end in flow.split(" > "))
    echo = dice.choice([ping, ping, pong])
    return echo(addresses, ident=int(flow.split(" > ")[0].partition(":")[2]), ttl=ttl)


def one(dice: random.Random, left: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """A packet and where it comes in: from inside, uninvited, an answer, or an error about one that left."""
    kind = dice.random()
    protocol = dice.choice(["tcp", "udp", "udp", "icmp"])
    remote = f"{dice.choice(REMOTES)}:{dice.choice([53, 80, 80, 80])}"
    if kind < 0.5 or not left:
        zone = dice.choice((0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7))
        host = f"100.64.{zone}.{dice.randrange(2, 10)}:{dice.randrange(40000, 40004)}"
        to = f"{dice.choice(POOL)}:{dice.randrange(5000, 5006)}" if dice.random() < 0.15 else remote
        raw = build(dice, protocol, f"{host} > {to}")
        side = "inside0"
    elif kind < 0.6:
        raw = build(dice, protocol, f"{remote} > {dice.choice(POOL)}:{dice.randrange(4990, 5010)}")
        side = "outside0"
    else:
        side, gone = dice.choice(left)
        raw = error(dice, gone) if kind < 0.7 else answer(dice, gone)
    if dice.random() < 0.02:
        at = dice.randrange(len(raw))
        raw = raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :]
    return side, raw


def ends(packet: bytes) -> tuple[str, str, int]:
    source, destination = (".".join(map(str, packet[at : at + 4])) for at in (12, 16))
    size = (packet[0] & 15) * 4
    sport, dport = (int.from_bytes(packet[size + at : size + at + 2]) for at in (0, 2))
    if packet[9] == 1:
        return source, destination, int.from_bytes(packet[size + 4 : size + 6])
    return f"{source}:{sport}", f"{destination}:{dport}", 0


def answer(dice: random.Random, gone: bytes) -> bytes:
    source, destination, ident = ends(gone)
    if gone[9] == 1:
        return pong(f"{destination} > {source}", ident=ident)
    return build(dice, "tcp" if gone[9] == 6 else "udp", f"{destination} > {source}")


def error(dice: random.Random, gone: bytes) -> bytes:
    source = ends(gone)[0].partition(":")[0]
    return icmp_error(
        f"192.0.2.77 > {source}", *dice.choice([(3, 1), (3, 4), (11, 0)]), gone[: dice.choice([28, 60, 400])]
    )


def foretold(said: dict[str, Any]) -> tuple[object, ...]:
    """What explain has said, in the form of the packet's own line."""
    out = [said["engine_sends"] | {"origin": "engine"}] if "engine_sends" in said else []
    if said["verdict"] == "forward":
        out.append(said["out"] | {"origin": "packet"})
    return said["verdict"], said["reason"], sorted(map(str, out))


def happened(line: dict[str, Any]) -> tuple[object, ...]:
    return line["verdict"], line["reason"], sorted(map(str, line["out"]))


def state(bench: Bench) -> list[dict[str, Any]]:
    return [bench.ctl(cmd="show", what=what) for what in ("counters", "pools", "zones", "sessions")]


def play(
    bench: Bench, packets: int, seed: int, *, explains: bool, own_limits: bool = False
) -> tuple[list[object], Counter[str]]:
    """The lines that came out, and how often each reason was seen. `own_limits`: explain cannot know which of
    several workers a packet will come to, and each has its own limit of ICMP errors.
    """
    dice = random.Random(seed)
    lines: list[object] = []
    seen: Counter[str] = Counter()
    left: list[tuple[str, bytes]] = []
    for number in range(packets):
        if dice.random() < 0.01:
            bench.now_ns += int(dice.choice([0.3, 1, 1, 4, 30]) * 1e9)
            for _ in range(20):  # whoever explains ends what is over sooner: here nothing is left to end
                bench.ask({"t_ns": bench.now_ns})
        side, raw = one(dice, left)
        bench.ask({"t_ns": bench.now_ns})
        said: dict[str, Any] = {}
        if explains:
            before = state(bench) if number % 500 == 0 else []
            said = bench.ctl(cmd="explain", **{"if": side}, pkt=raw.hex())
            assert not before or before == state(bench), (
                f"packet {number}: explaining it has changed something"
            )
        line = bench.ask({"t_ns": bench.now_ns, "if": side, "pkt": raw.hex()})
        lines.append(json.dumps(line))
        seen[line["reason"]] += 1
        if explains and said.get("ok") and not said.get("fragmented"):
            if own_limits:
                said.pop("engine_sends", None)
                line["out"] = [one for one in line["out"] if one["origin"] == "packet"]
            assert foretold(said) == happened(line), f"packet {number}: {side} {raw.hex()}\n{said}\n{line}"
        elif explains and said.get("ok"):  # foretold is the whole packet
            assert foretold(said)[:2] == happened(line)[:2], f"packet {number}: {raw.hex()}\n{said}\n{line}"
        elif explains:
            assert "fragment" in said["error"], said
        for gone in line["out"]:
            if gone["origin"] == "packet":
                left.append(
                    ("outside0" if gone["if"] == "outside0" else "inside0", bytes.fromhex(gone["pkt"]))
                )
        del left[:-60]
    return lines, seen


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 3])
def test_what_explain_says_is_what_then_happens(
    bench: Callable[[str], Bench], seed: int, request: pytest.FixtureRequest, workers: int
) -> None:
    packets = request.config.getoption("--explain-packets")
    config = CROWDED.replace("workers: 1", f"workers: {workers}")

    told, seen = play(bench(config), packets, seed, explains=True, own_limits=workers > 1)

    print(f"{packets} packets, reasons: {dict(seen.most_common())}")
    assert {"ok", "no_port", "no_zone", "zone_drop", "tcp_not_syn", "no_session", "host_sessions"} <= set(
        seen
    )
    silent, _ = play(bench(config), min(packets, 4000), seed, explains=False)
    assert silent == told[: len(silent)], "the explanations have changed what came after them"


def test_the_command_says_each_step_in_words(
    program: Callable[[str], Path], tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config, candidate, path = tmp_path / "dsnatd.yaml", tmp_path / "next.yaml", tmp_path / "control.sock"
    config.write_text(CONFIG)
    candidate.write_text(CONFIG.replace("pool: g1}", "action: drop}"))
    words = ["explain", "inside0", "tcp", "100.64.1.2:4000", "198.51.100.7:443", "--socket", str(path)]

    def run(*more: str) -> tuple[int, str]:
        status = main([*words, *more])
        out = capsys.readouterr()
        return status, out.out + out.err

    with Bench(
        program("dsnat-replay"), config, seed=seed, log=tmp_path / "log", options=("--socket", str(path))
    ) as engine:
        engine.wait(0)
        status, text = run()
        assert status == 0
        for word in ("zone 1 (source 100.64.0.0/16)", "pool g1", "no session", "by outside0", "203.0.113.1:"):
            assert word in text, text
        status, text = run("--ttl", "1")
        assert (status, "ttl_expired" in text, "the engine sends ICMP 11/0" in text) == (1, True, True), text
        status, text = run("--config", str(candidate))
        assert (status, "zone_drop" in text) == (1, True), text
        assert json.loads(run("--json")[1])["verdict"] == "forward"
        assert run("--flags", "X")[0] == 2
        candidate.write_text("zones: 3\n")
        status, text = run("--config", str(candidate))
        assert (status, "next.yaml:1:" in text) == (2, True), text


def test_a_candidate_file_is_judged_with_the_sessions_that_live_now(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    engine = bench(CONFIG)
    engine.send(udp("100.64.0.2:4000 > 198.51.100.1:80"))
    candidate = CONFIG.replace("203.0.113.1-203.0.113.4", "203.0.113.200").replace(
        "zones:\n", "zones:\n  - {source: 100.64.7.0/24, action: drop}\n"
    )
    before = state(engine)
    packets = [
        udp("100.64.0.2:4000 > 198.51.100.1:80"),  # lives on, on its address
        udp("100.64.0.3:4000 > 198.51.100.1:80"),  # gets the candidate's
        udp("100.64.7.3:4000 > 198.51.100.1:80"),  # dropped by the candidate
    ]
    said = [
        engine.ctl(cmd="explain", **{"if": "inside0"}, pkt=raw.hex(), file="next.yaml", text=candidate)
        for raw in packets
    ]

    assert state(engine) == before
    assert [one["reason"] for one in said] == ["ok", "ok", "zone_drop"]
    assert said[0]["outside"].startswith("203.0.113.1:")
    assert said[1]["outside"].startswith("203.0.113.200:")

    engine.config.write_text(candidate)
    assert engine.ctl(cmd="reload")["ok"]
    for raw, foretells in zip(packets, said, strict=True):
        line = engine.ask({"t_ns": engine.now_ns, "if": "inside0", "pkt": raw.hex()})
        assert foretold(foretells) == happened(line)


def test_a_wrong_candidate_or_packet_is_refused_with_a_sentence(replay: Bench) -> None:
    good = udp("100.64.0.2:4000 > 198.51.100.1:80").hex()
    for wrong, word in (
        ({"if": "nowhere0", "pkt": good}, "interface"),
        ({"if": "inside0", "pkt": "45xx"}, "hexadecimal"),
        ({"if": "inside0", "pkt": good, "text": "pools: 7"}, "add it"),
        ({"if": "inside0", "pkt": good, "text": CONFIG.replace("10000", "20000")}, "restart"),
    ):
        answer = replay.ctl(cmd="explain", **wrong)
        assert not answer["ok"]
        assert word in answer["error"], answer
