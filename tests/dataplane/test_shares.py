"""How a pool is shared out: weights, port blocks, deterministic mapping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.packet import ipv4, tcp, udp
from tests.replay import Bench, configuration, outside

CONFIG = """\
engine: {workers: 1, max_sessions: 10000}
interfaces:
  - {name: inside0, role: inside}
  - {name: outside0, role: outside}
pools:
  - POOL
zones:
  - {source: 100.64.0.0/16, pool: p}
"""


def address_of(tuple_: str) -> str:
    return tuple_.split(":")[0]


def port_of(tuple_: str) -> int:
    return int(tuple_.split(":")[1])


def test_an_address_of_weight_three_has_three_turns(bench: Callable[[str], Bench]) -> None:
    nat = bench(
        CONFIG.replace(
            "POOL", "{name: p, addresses: [203.0.113.1, {range: 203.0.113.2, weight: 3}, 203.0.113.3]}"
        )
    )
    given = [
        address_of(outside(nat.send(tcp(f"100.64.0.2:{4000 + n} > 198.51.100.1:80")))) for n in range(50)
    ]
    assert Counter(given) == {"203.0.113.1": 10, "203.0.113.2": 30, "203.0.113.3": 10}
    assert given[:5] == given[5:10]


BLOCKS = (
    "{name: p, addresses: [203.0.113.1-203.0.113.2], ports: 1024-1151, select: paired, "
    "block_ports: 32, blocks_per_host: 2, mapping: MAPPING}"
)


@pytest.fixture(params=["endpoint-dependent", "endpoint-independent"])
def blocks(request: pytest.FixtureRequest, bench: Callable[[str], Bench]) -> Bench:
    return bench(CONFIG.replace("POOL", BLOCKS.replace("MAPPING", request.param)))


def block_of(tuple_: str) -> tuple[str, int]:
    return address_of(tuple_), (port_of(tuple_) - 1024) // 32


def test_a_host_has_its_ports_in_blocks_of_one_address_up_to_its_limit(blocks: Bench) -> None:
    answers = [blocks.send(udp(f"100.64.0.2:{4000 + n} > 198.51.100.1:80")) for n in range(65)]
    assert len({block_of(outside(answer)) for answer in answers[:32]}) == 1
    assert len({block_of(outside(answer)) for answer in answers[:64]}) == 2
    assert len({address_of(outside(answer)) for answer in answers[:64]}) == 1
    assert (answers[64].verdict, answers[64].reason) == ("drop", "host_ports")


def test_no_two_hosts_share_a_block_and_every_block_is_given_out(blocks: Bench) -> None:
    answers = [blocks.send(udp(f"100.64.0.{n}:4000 > 198.51.100.1:80")) for n in range(1, 10)]
    assert len({block_of(outside(answer)) for answer in answers[:8]}) == 8
    assert (answers[8].verdict, answers[8].reason) == ("drop", "no_port")


def test_a_block_is_free_again_when_its_last_session_has_ended(blocks: Bench) -> None:
    for n in range(1, 9):
        blocks.send(udp(f"100.64.0.{n}:4000 > 198.51.100.1:80"))
    blocks.wait(1000)
    blocks.wait(1000)
    assert blocks.send(udp("100.64.0.99:4000 > 198.51.100.1:80")).verdict == "forward"
    assert blocks.ctl(cmd="show", what="counters")["counters"]["sessions"] == 1


PREFIX_HOSTS, ADDRESSES, FIRST, LAST, DYNAMIC = 1024, 4, 1024, 65535, 8192


def by_arithmetic(host: int) -> tuple[str, int, int]:
    """Address, first port and number of ports of the n-th host of the prefix: RFC 7422 in Python."""
    hosts_per_address = -(-PREFIX_HOSTS // ADDRESSES)
    ports = (LAST - FIRST + 1 - DYNAMIC) // hosts_per_address
    return f"203.0.113.{1 + host // hosts_per_address}", FIRST + host % hosts_per_address * ports, ports


DETERMINISTIC = (
    "{name: p, addresses: [203.0.113.1-203.0.113.4], select: paired, mapping: MAPPING, "
    "deterministic: 100.64.0.0/22, dynamic_ports: 8192}"
)
BOTH = pytest.mark.parametrize("mapping", ["endpoint-dependent", "endpoint-independent"])


@BOTH
def test_rfc7422_det1_arithmetic_predicts_every_tuple(bench: Callable[[str], Bench], mapping: str) -> None:
    nat = bench(CONFIG.replace("POOL", DETERMINISTIC.replace("MAPPING", mapping)))
    for host in (0, 1, 255, 256, 700, 1023):
        address, first, ports = by_arithmetic(host)
        for n in range(20):
            got = outside(nat.send(tcp(f"100.64.{host >> 8}.{host & 255}:{5000 + n} > 198.51.100.1:80")))
            assert address_of(got) == address
            assert first <= port_of(got) < first + ports


@BOTH
def test_rfc7422_det2_every_engine_gives_a_host_the_same_share(
    program: Callable[[str], Path], tmp_path: Path, mapping: str
) -> None:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG.replace("POOL", DETERMINISTIC.replace("MAPPING", mapping)))
    address, first, ports = by_arithmetic(513)
    for seed in range(1, 6):
        with Bench(program("dsnat-replay"), config, seed=seed, log=tmp_path / "log") as nat:
            got = outside(nat.send(tcp("100.64.2.1:5000 > 198.51.100.1:80")))
            assert address_of(got) == address
            assert first <= port_of(got) < first + ports


@BOTH
def test_rfc7422_det4_a_host_that_overflows_draws_from_the_dynamic_share(
    bench: Callable[[str], Bench], mapping: str
) -> None:
    nat = bench(CONFIG.replace("POOL", DETERMINISTIC.replace("MAPPING", mapping)))
    address, first, ports = by_arithmetic(0)
    got = [outside(nat.send(tcp(f"100.64.0.0:{5000 + n} > 198.51.100.1:80"))) for n in range(ports + 10)]
    assert all(first <= port_of(one) < first + ports for one in got[:ports])
    dynamic_first = FIRST + ports * (PREFIX_HOSTS // ADDRESSES)
    assert all(port_of(one) >= dynamic_first and address_of(one) == address for one in got[ports:])


def test_another_protocol_is_dropped_or_left_to_the_kernel(bench: Callable[[str], Bench]) -> None:
    plain = "{name: p, addresses: 203.0.113.1}"
    gre = ipv4("100.64.0.2 > 198.51.100.1", 47, b"\\0" * 8)
    assert bench(CONFIG.replace("POOL", plain)).send(gre).reason == "protocol"
    passed = bench(CONFIG.replace("POOL", plain) + "other_protocols: pass\n").send(gre)
    assert (passed.verdict, passed.reason) == ("pass", "other_protocol")


def test_a_pool_of_65536_addresses_takes_them_in_turn_and_forgets_none(bench: Callable[[str], Bench]) -> None:
    nat = bench(configuration("endpoint-dependent", addresses="198.18.0.0/16"))
    taken = [
        nat.send(udp(f"100.64.0.{1 + n % 250}:{5000 + n} > 192.0.2.1:80")).packet.source_address
        for n in range(600)
    ]
    assert taken == [str(IPv4Address("198.18.0.0") + n) for n in range(600)]
    text = configuration(
        "endpoint-dependent", "drain: [198.18.0.0-198.18.255.254]", addresses="198.18.0.0/16"
    )
    nat.config.write_text(text)
    assert nat.ctl(cmd="reload")["ok"]
    last = {nat.send(udp(f"100.64.1.{n}:80 > 192.0.2.1:80")).packet.source_address for n in range(1, 9)}
    assert last == {"198.18.255.255"}
    assert nat.counters()["sessions"] == 608, "those of addresses that drain live on"
