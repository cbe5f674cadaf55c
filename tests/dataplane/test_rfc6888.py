"""RFC 6888, carrier-grade NAT: one test or more for each requirement, seen from outside.

REQ-1 is the sum of RFC 4787, 5382 and 5508: `make rfc` shows it. REQ-9 is tested in test_pcp*.py.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from tests.packet import icmp_error, ping, tcp, udp
from tests.replay import ED, EIM, Bench, Start, configuration, outside

BOTH = pytest.mark.parametrize("mapping", [EIM, ED])
REMOTE = "198.51.100.1:80"


def ask(replay: Bench, host: str, port: int, remote: str = REMOTE) -> str:
    """A new flow of the host: its outside address and port, or the reason why it has none."""
    answer = replay.send(udp(f"{host}:{port} > {remote}"))
    return outside(answer) if answer.verdict == "forward" else answer.reason


def test_rfc6888_req1_a_flow_keeps_the_promises_of_the_three_rfcs_together(bench: Start) -> None:
    """One host, one socket each: mapped once, reached by anybody, told of errors, never moved."""
    replay = bench(configuration(EIM))
    for make in (udp, tcp):
        first, second = (
            outside(replay.send(make(f"100.64.0.2:5000 > {remote}"))) for remote in (REMOTE, "192.0.2.9:9")
        )
        assert first == second
        visitor = replay.send(make(f"192.0.2.77:7 > {first}"), on="outside0")
        assert visitor.packet.destination == "100.64.0.2:5000"
    sent = replay.send(ping("100.64.0.2 > 198.51.100.1", ident=5))
    error = icmp_error(f"192.0.2.1 > {sent.packet.source_address}", 11, 0, sent.out[0].raw)
    assert replay.send(error, on="outside0").packet.destination_address == "100.64.0.2"


def test_rfc6888_req2_a_host_is_paired_with_one_address_by_default(bench: Start) -> None:
    replay = bench(configuration(EIM))
    seen = {ask(replay, "100.64.0.2", port).split(":")[0] for port in range(20000, 20200)}
    assert len(seen) == 1


@BOTH
def test_rfc6888_req3_a_pool_may_be_any_set_of_addresses(bench: Start, mapping: str) -> None:
    addresses = "203.0.113.1, 203.0.113.7-203.0.113.9, 198.18.0.16/30"
    replay = bench(configuration(mapping, "select: round-robin", addresses=addresses))
    seen = Counter(ask(replay, "100.64.0.2", port).split(":")[0] for port in range(20000, 20080))
    expected = [
        "203.0.113.1",
        *(f"203.0.113.{n}" for n in (7, 8, 9)),
        *(f"198.18.0.{n}" for n in range(16, 20)),
    ]
    assert seen == dict.fromkeys(expected, 10)


@BOTH
def test_rfc6888_req4_a_host_gets_no_more_than_its_share_of_ports(bench: Start, mapping: str) -> None:
    replay = bench(
        configuration(mapping, "select: paired, block_ports: 64, blocks_per_host: 2", addresses="203.0.113.1")
    )
    got = Counter(ask(replay, "100.64.0.2", port) == "host_ports" for port in range(20000, 20200))
    assert got == {False: 128, True: 72}
    assert ":" in ask(replay, "100.64.0.3", 20000), "others are not affected"


@BOTH
def test_rfc6888_req4a_the_share_is_a_setting(bench: Start, mapping: str) -> None:
    for blocks in (1, 3):
        keys = f"select: paired, block_ports: 32, blocks_per_host: {blocks}"
        replay = bench(configuration(mapping, keys, addresses="203.0.113.1"))
        got = [ask(replay, "100.64.0.2", port) for port in range(20000, 20150)]
        assert got.count("host_ports") == 150 - 32 * blocks


@BOTH
def test_rfc6888_req4c_a_host_that_opens_flows_too_fast_slows_only_itself(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, extra="limits: {new_per_host_per_s: 10}"))
    flood = Counter(ask(replay, "100.64.0.66", port) == "host_rate" for port in range(20000, 20100))
    assert flood == {False: 10, True: 90}
    assert all(":" in ask(replay, f"100.64.1.{n}", 20000) for n in range(1, 100))
    replay.wait(1)
    assert ":" in ask(replay, "100.64.0.66", 30000)


@BOTH
def test_rfc6888_req5_a_host_gets_no_more_than_its_share_of_sessions(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, extra="limits: {sessions_per_host: 20}"))
    # one socket to many remotes: one port in endpoint-independent mode, and still a session each
    got = [ask(replay, "100.64.0.2", 20000, f"198.51.100.{n}:80") for n in range(1, 31)]
    assert got[20:] == ["host_sessions"] * 10
    assert ":" in ask(replay, "100.64.0.3", 20000)


def test_rfc6888_req5_nobody_outside_can_fill_the_table(bench: Start) -> None:
    replay = bench(configuration(EIM))
    for make in (udp, tcp):
        mapped = outside(replay.send(make(f"100.64.0.2:5000 > {REMOTE}")))
        for n in range(500):
            visitor = replay.send(make(f"192.0.{n // 250}.{n % 250 + 1}:7 > {mapped}"), on="outside0")
            assert visitor.packet.destination == "100.64.0.2:5000"
    assert replay.counters()["sessions"] == 2


@BOTH
def test_rfc6888_req6_traffic_to_a_chosen_destination_is_not_translated(bench: Start, mapping: str) -> None:
    config = configuration(mapping).replace(
        "zones:\n", "zones:\n  - {source: 100.64.0.0/16, destination: 192.0.2.0/24, action: pass}\n"
    )
    replay = bench(config)
    there = replay.send(udp("100.64.0.2:5000 > 192.0.2.9:80"))
    assert (there.verdict, there.reason) == ("pass", "zone_pass")
    back = replay.send(udp("192.0.2.9:80 > 100.64.0.2:5000"), on="outside0")
    assert (back.verdict, back.reason) == ("pass", "kernel_route")
    assert ":" in ask(replay, "100.64.0.2", 5000)


def test_rfc6888_req7_anybody_may_answer_a_mapping(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = ask(replay, "100.64.0.2", 5000)
    assert replay.send(udp(f"192.0.2.9:9 > {mapped}"), on="outside0").packet.destination == "100.64.0.2:5000"


def one_port(hold: str = "", **keys: str) -> str:
    extra = f"timeouts: {{udp_one_way: 120s{hold}}}"
    return configuration(EIM, keys.get("pool", ""), addresses="203.0.113.1", ports="5000-5000", extra=extra)


def test_rfc6888_req8_a_freed_port_rests_for_two_minutes(bench: Start) -> None:
    replay = bench(one_port())
    mapped = ask(replay, "100.64.0.2", 5000)
    replay.wait(123)  # the mapping is over
    assert replay.counters()["sessions"] == 0
    assert ask(replay, "100.64.0.3", 5000) == "no_port"
    assert replay.send(udp(f"192.0.2.9:9 > {mapped}"), on="outside0").reason == "no_session"
    replay.wait(118)
    assert ask(replay, "100.64.0.3", 5000) == "no_port"
    replay.wait(5)
    assert ask(replay, "100.64.0.3", 5000) == mapped


def test_rfc6888_req8_its_own_host_gets_a_resting_port_back(bench: Start) -> None:
    replay = bench(one_port())
    mapped = ask(replay, "100.64.0.2", 5000)
    replay.wait(150)
    assert ask(replay, "100.64.0.2", 5000) == mapped


def test_rfc6888_req8_the_time_is_a_setting(bench: Start) -> None:
    for hold, rests in (("0s", False), ("600s", True)):
        replay = bench(one_port(f", hold: {hold}"))
        ask(replay, "100.64.0.2", 5000)
        replay.wait(123)
        assert (ask(replay, "100.64.0.3", 5000) == "no_port") == rests


def test_rfc6888_req8_the_number_of_resting_ports_is_a_setting(bench: Start) -> None:
    extra = "limits: {held_ports: 10}"
    replay = bench(configuration(EIM, addresses="203.0.113.1", ports="5000-5049", extra=extra))
    for n in range(1, 51):
        assert ":" in ask(replay, f"100.64.0.{n}", 5000)
    replay.wait(123)
    got = [ask(replay, f"100.64.1.{n}", 5000) for n in range(1, 51)]
    assert got.count("no_port") == 10


@BOTH
def test_rfc6888_req8a_the_port_of_a_tcp_connection_that_has_ended_is_free(
    bench: Start, mapping: str
) -> None:
    replay = bench(configuration(mapping, addresses="203.0.113.1", ports="5000-5000"))
    mapped = outside(replay.send(tcp(f"100.64.0.2:5000 > {REMOTE}", "S")))
    replay.send(tcp(f"{REMOTE} > {mapped}", "SA"), on="outside0")
    replay.send(tcp(f"{REMOTE} > {mapped}", "FA"), on="outside0")
    replay.send(tcp(f"100.64.0.2:5000 > {REMOTE}", "FA"))
    assert replay.send(tcp(f"100.64.0.3:5000 > {REMOTE}", "S"), after_s=200).reason == "no_port"
    assert outside(replay.send(tcp(f"100.64.0.3:5000 > {REMOTE}", "S"), after_s=45)) == mapped


def test_rfc6888_req8b_a_static_port_is_always_its_hosts(bench: Start) -> None:
    static = (
        "static: [{inside: 100.64.0.9, outside: 203.0.113.1, protocol: udp, port: 5000, inside_port: 53}]"
    )
    replay = bench(configuration(EIM, addresses="203.0.113.1", ports="5000-5001", extra=static))
    for _ in range(3):
        visitor = replay.send(udp("192.0.2.9:9 > 203.0.113.1:5000"), on="outside0", after_s=500)
        assert visitor.packet.destination == "100.64.0.9:53"


def test_rfc6888_req8c_a_port_whose_filter_was_strict_is_free_at_once(bench: Start) -> None:
    for filtering in ("address-dependent", "address-and-port-dependent"):
        replay = bench(one_port(pool=f"filtering: {filtering}"))
        mapped = ask(replay, "100.64.0.2", 5000)
        replay.wait(123)
        assert ask(replay, "100.64.0.3", 5000) == mapped


def test_rfc6888_req8c_every_endpoint_dependent_filter_is_strict(bench: Start) -> None:
    replay = bench(configuration(ED, addresses="203.0.113.1", ports="5000-5000"))
    mapped = ask(replay, "100.64.0.2", 5000)
    replay.wait(123)
    assert ask(replay, "100.64.0.3", 5000) == mapped


@BOTH
def test_rfc6888_req11a_without_a_port_the_packet_is_dropped(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, addresses="203.0.113.1", ports="5000-5009"))
    got = [ask(replay, "100.64.0.2", port) for port in range(20000, 20012)]
    assert got[10:] == ["no_port"] * 2


@BOTH
def test_rfc6888_req11b_the_host_is_told(bench: Start, mapping: str) -> None:
    replay = bench(
        configuration(mapping, addresses="203.0.113.1", ports="5000-5000", extra="refusal: icmp-host")
    )
    ask(replay, "100.64.0.2", 5000)
    refused = udp(f"100.64.0.3:5000 > {REMOTE}")
    answer = replay.send(refused)
    assert (answer.verdict, answer.reason) == ("drop", "no_port")
    assert (answer.packet.icmp_type, answer.packet.icmp_code) == (3, 1)
    assert (answer.packet.destination_address, answer.out[0].raw[28:]) == ("100.64.0.3", refused)


@BOTH
def test_rfc6888_req11d_no_live_flow_makes_room_for_a_new_one(bench: Start, mapping: str) -> None:
    """The ports first, then the table: 1024 records."""
    few_ports = configuration(mapping, addresses="203.0.113.1", ports="5000-5099")
    small = configuration(mapping).replace("max_sessions: 10000", "max_sessions: 1024")
    for config, reason in ((few_ports, "no_port"), (small, "table_full")):
        replay = bench(config)
        flows = {port: ask(replay, "100.64.0.2", port) for port in range(20000, 21100)}
        live = {port: mapped for port, mapped in flows.items() if ":" in mapped}
        assert reason in flows.values()
        assert len(live) >= 100
        for port, mapped in live.items():
            reply = replay.send(udp(f"{REMOTE} > {mapped}"), on="outside0")
            assert reply.packet.destination == f"100.64.0.2:{port}"


@BOTH
@pytest.mark.parametrize("count", [1, 4])
def test_rfc6888_req13_the_last_port_is_given_out_before_the_first_refusal(
    bench: Start, mapping: str, count: int
) -> None:
    replay = bench(configuration(mapping, addresses=f"203.0.113.1-203.0.113.{count}", ports="5000-5499"))
    got = [ask(replay, f"100.64.{n // 200}.{n % 200 + 1}", 5000) for n in range(500 * count + 1)]
    assert len(set(got[:-1])) == 500 * count
    assert got[-1] == "no_port"


def test_rfc6888_req14_blocks_need_one_note_for_many_flows(bench: Start) -> None:
    """A host's ports lie in one block: who had a port is known without a note per flow."""
    replay = bench(configuration(EIM, "block_ports: 128, blocks_per_host: 4", addresses="203.0.113.1"))
    ports = [int(ask(replay, "100.64.0.2", port).split(":")[1]) for port in range(20000, 20128)]
    assert max(ports) - min(ports) == 127


@BOTH
def test_rfc6888_req15_outside_ports_are_uniform(bench: Start, mapping: str) -> None:
    """Chi-square over 64 bins: the 1 in 100,000 bound for 63 degrees of freedom is 126."""
    replay = bench(configuration(mapping))
    n = 4000
    ports = [
        int(ask(replay, "100.64.0.2", 1024 + k, f"198.51.{k % 200}.1:80").split(":")[1]) for k in range(n)
    ]
    bins = Counter((port - 1024) * 64 // 64512 for port in ports)
    assert sum((bins[b] - n / 64) ** 2 / (n / 64) for b in range(64)) < 126
    steps = Counter((later - port) % 65536 for port, later in pairwise(ports))
    assert steps.most_common(1)[0][1] < 8, "one port does not tell the next"
