"""What may happen to a pair (tests/faults.py), in short: no connection is lost, and both tables end equal.

`python -m tests.faults` is the long run, with 11,000 connections and every fault.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.crowd import Crowd
from tests.faults import table
from tests.lab import Lab, wait_until
from tests.pair import OUTSIDE, POOL, Group, Pair, Peer, new_pair
from tests.traffic import SERVER

pytestmark = pytest.mark.net

SMALL = """\
pools:
  - {{name: public, addresses: [{addresses}], active_while: 198.51.100.1, ports: 2000-2009}}
zones:
  - {{source: 100.64.0.0/16, pool: public}}
"""

TWO_POOLS = """\
pools:
  - {name: first, addresses: [198.51.100.200-198.51.100.203], active_while: 198.51.100.1}
  - {name: second, addresses: [198.51.100.210-198.51.100.213], active_while: 198.51.100.4}
zones:
  - {source: 100.64.0.0/25, pool: first}
  - {source: 100.64.0.128/25, pool: second}
"""
GROUPS = (
    Group("one", "100.64.0.1", "198.51.100.1", 51, "a"),
    Group("two", "100.64.0.4", "198.51.100.4", 53, "b"),
)


@pytest.mark.parametrize(
    "faults", [("engine", "keepalived", "inside"), ("sync", "upgrade", "power")], ids=["programs", "gateways"]
)
def test_no_connection_is_lost_and_the_tables_are_equal_after_each_fault(
    lab: Lab,
    program: Callable[[str], Path],
    faults: tuple[str, ...],
    record_property: Callable[[str, object], None],
) -> None:
    pair = new_pair(lab, program("dsnatd"))
    crowd = Crowd(pair.client, pair.server, SERVER, idle=100, active=20, streams=3, pings=1)
    pair.equal()
    for row in table(pair, crowd, faults):
        print(row.text())
        record_property(f"{row.fault}: {row.phase}", f"dark for {row.stream_s} s")
        assert (row.lost, row.moved, row.differ) == (0, 0, 0), row.text()
    pair.close()


def standing(pair: Pair) -> tuple[str, str]:
    return pair.a.standing.read_text().strip(), pair.b.standing.read_text().strip()


def change(pair: Pair, name: str, addresses: str) -> None:
    """Another generation on one of the two."""
    peer = pair.a if name == "a" else pair.b
    text = peer.gateway.file.read_text()
    head, tail = text.split("pools:")[0], text[text.index("sync:") :]
    peer.gateway.file.write_text(head + SMALL.format(addresses=addresses) + tail)
    peer.gateway.ask(cmd="reload")


def test_another_generation_or_spent_ports_lower_the_priority(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    pair = new_pair(lab, program("dsnatd"), rest=SMALL.format(addresses=POOL))
    wait_until("both to be well", lambda: standing(pair) == ("0", "0"))
    assert pair.a.gateway.show("sync")["same_pools"]
    # the backup has other pools: it must not become master while the other one lives; the master stays
    change(pair, "b", "198.51.100.200-198.51.100.201")
    wait_until("the backup to say so", lambda: standing(pair) == ("0", "-90"))
    assert not pair.a.gateway.show("sync")["same_pools"]
    change(pair, "b", POOL)
    wait_until("both to be well again", lambda: standing(pair) == ("0", "0"))

    # ten ports towards one remote, and an eleventh session: both lower themselves, nothing moves
    def spend() -> None:
        for _ in range(20):
            with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as one:
                one.sendto(b"?", (SERVER, 9))

    pair.client.inside(spend)
    wait_until("refusals", lambda: pair.a.gateway.reason("no_port") > 0)
    wait_until("both to say so", lambda: standing(pair) == ("-80", "-80"))
    assert pair.a.is_master()
    assert not pair.b.has(OUTSIDE)
    # the backup gets more addresses: it can do better, and takes over
    change(pair, "b", "198.51.100.200-198.51.100.207")
    wait_until("the backup to take over", lambda: pair.b.is_master() and pair.b.ours(), deadline_s=30)
    wait_until("the other one to be behind", lambda: standing(pair) == ("-90", "0"))
    pair.client.inside(spend)
    wait_until("all of them", lambda: pair.b.gateway.counters()["sessions"] == 30)
    assert pair.b.gateway.reason("no_port") == 0
    pair.close()


def test_each_is_master_of_a_pool_and_stands_in_for_the_other(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    pair = new_pair(lab, program("dsnatd"), groups=GROUPS, rest=TWO_POOLS)
    a, b = pair.a, pair.b
    second = lab.netns("second")
    lab.wire(second, "eth0", pair.wires, "insecond")
    pair.wires.ip("link set insecond master inside")
    second.ip("address add 100.64.0.200/24 dev eth0")
    second.ip("route add default via 100.64.0.4")

    def active(peer: Peer) -> list[bool]:
        return [pool["active"] for pool in peer.gateway.show("pools")["pools"]]

    def has_both(peer: Peer) -> bool:
        return active(peer) == [True, True]

    def each_its_own() -> bool:
        return active(a) == [True, False] and active(b) == [False, True]

    wait_until("each to be master of its own", each_its_own, deadline_s=40)
    wait_until("both to be in sync", lambda: a.in_sync() and b.in_sync(), deadline_s=40)
    crowds = [
        Crowd(space, pair.server, SERVER, port=port, idle=60, active=10, streams=2, pings=1)
        for space, port in ((pair.client, 7100), (second, 7101))
    ]
    pair.equal()
    # both told the other one: sync goes both ways
    for peer in (a, b):
        told = peer.gateway.show("sync")
        assert told["told"] >= 70, told
        assert told["heard"] >= 70, told

    def unharmed() -> None:
        for crowd in crowds:
            asked = crowd.say("ask")
            assert (asked["up"], asked["lost"], asked["moved"]) == (70, 0, 0), asked

    for fails, stays in ((a, b), (b, a)):
        fails.fall_silent()
        wait_until("the other to have both pools", partial(has_both, stays), deadline_s=30)
        unharmed()
        fails.return_()
        wait_until("each to have its own again", each_its_own, deadline_s=40)
        unharmed()
        pair.equal()
    pair.close()
