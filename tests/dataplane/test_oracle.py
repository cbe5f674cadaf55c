"""Random traffic through the engine and through tests/oracle.py: they must agree packet for packet.

So must 2, 3 and 5 workers, whether packets come to them as a NIC with RSS would bring them, in turns, or all
to one; but for the turns of addresses, of which each worker has its own.

Hypothesis makes the traffic and, when the two disagree, the shortest one that still shows it. `--seed` gives
other traffic. The pool is so small that it runs out of ports all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.oracle import Oracle
from tests.packet import ICMP, TCP, UDP, ping, pong, tcp, udp
from tests.replay import Bench

ADDRESSES = ["203.0.113.1", "203.0.113.2", "203.0.113.9"]
PORTS = range(5000, 5002)
CONFIG = """\
engine: {workers: 1, max_sessions: 1024}
interfaces:
  - {name: inside0, role: inside, path: dpdk}
  - {name: outside0, role: outside, path: dpdk}
pools:
  - {name: g1, addresses: [203.0.113.1-203.0.113.2, 203.0.113.9], ports: 5000-5001}
zones:
  - {source: 100.64.0.0/16, pool: g1}
"""

protocols = st.sampled_from([UDP, TCP, ICMP])
remotes = st.sampled_from(["198.51.100.1", "198.51.100.2"])
remote_ports = st.sampled_from([80, 53])
flags = st.sampled_from(["S", "S", "A", "FA", "R", "PA"])
out = st.tuples(
    st.just("out"),
    protocols,
    st.sampled_from(["100.64.0.2", "100.64.0.3"]),
    st.integers(40000, 40005),
    remotes,
    remote_ports,
    flags,
)
back = st.tuples(
    st.just("back"),
    protocols,
    st.sampled_from(ADDRESSES),
    st.sampled_from(PORTS),
    remotes,
    remote_ports,
    st.sampled_from(["SA", "A", "FA", "R"]),
)
wait = st.tuples(st.just("wait"), st.sampled_from([1, 10, 30, 70, 130, 250, 400, 8000]))
crowd = st.tuples(st.just("crowd"), st.sampled_from([UDP, TCP]), st.integers(2, 9), remotes, remote_ports)
traffic = st.lists(st.one_of(out, out, back, back, wait, crowd), min_size=1, max_size=100)


def build(protocol: int, flow: str, ident: int, flags: str, *, request: bool) -> bytes:
    if protocol == UDP:
        return udp(flow)
    if protocol == TCP:
        return tcp(flow, flags)
    addresses = " > ".join(end.strip().split(":")[0] for end in flow.split(">"))
    return (ping if request else pong)(addresses, ident=ident)


WORKERS = [(1, "rss", 80), (2, "rss", 20), (3, "turns", 20), (5, "rss", 20), (5, "one", 20)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("workers", "spread", "examples"), WORKERS)
def test_random_traffic_is_answered_as_the_oracle_says(
    program: Callable[[str], Path], tmp_path: Path, seed: int, workers: int, spread: str, examples: int
) -> None:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG)
    options = ["--workers", str(workers), "--spread", spread]

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=examples, deadline=None, database=None, print_blob=False)
    @hypothesis.given(traffic)
    def agree(steps: list[tuple[Any, ...]]) -> None:
        oracle = Oracle(ADDRESSES, PORTS, workers=workers)

        def one(interface: str, raw: bytes) -> None:
            oracle.check(bench.now_ns, interface, raw, bench.send(raw, on=interface))

        log = tmp_path / "replay.log"
        with Bench(program("dsnat-replay"), config, seed=seed, log=log, options=options) as bench:
            for kind, *what in steps:
                if kind == "wait":
                    bench.wait(what[0])
                elif kind == "crowd":  # as many hosts as it takes to run out of ports towards one remote
                    protocol, hosts, remote, remote_port = what
                    for host in range(hosts):
                        flow = f"100.64.1.{host}:41000 > {remote}:{remote_port}"
                        one("inside0", build(protocol, flow, 0, "S", request=True))
                else:
                    protocol, near, port, remote, remote_port, tcp_flags = what
                    ends = (f"{near}:{port}", f"{remote}:{remote_port}")
                    flow = " > ".join(ends if kind == "out" else reversed(ends))
                    raw = build(protocol, flow, port, tcp_flags, request=kind == "out")
                    one("inside0" if kind == "out" else "outside0", raw)
            oracle.check_sessions(bench.now_ns, bench.sessions())
            assert bench.ctl(cmd="show", what="counters")["equation"]
            assert bench.close() == 0
        refused.append(oracle.refused)

    refused: list[int] = []
    agree()
    assert sum(refused) > 0, "the traffic never ran out of ports"
