"""Random traffic through the engine and through tests/oracle.py: they must agree packet for packet.

Hypothesis makes the traffic and, when the two disagree, the shortest one that still shows it. `--seed` gives
other traffic. The pool is so small that it runs out of ports all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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

# most of it to one place, so that its ports run out
protocols = st.sampled_from([UDP, UDP, TCP, TCP, ICMP])
remotes = st.sampled_from(["198.51.100.1", "198.51.100.1", "198.51.100.2"])
remote_ports = st.sampled_from([80, 80, 53])
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
traffic = st.lists(st.one_of(out, out, out, back, wait), min_size=1, max_size=100)


def build(protocol: int, flow: str, ident: int, flags: str, *, request: bool) -> bytes:
    if protocol == UDP:
        return udp(flow)
    if protocol == TCP:
        return tcp(flow, flags)
    addresses = " > ".join(end.strip().split(":")[0] for end in flow.split(">"))
    return (ping if request else pong)(addresses, ident=ident)


@pytest.mark.timeout(180)
def test_random_traffic_is_answered_as_the_oracle_says(
    program: Callable[[str], Path], tmp_path: Path, seed: int
) -> None:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=80, deadline=None, database=None, print_blob=False)
    @hypothesis.given(traffic)
    def agree(steps: list[tuple[object, ...]]) -> None:
        oracle = Oracle(ADDRESSES, PORTS)
        with Bench(program("dsnat-replay"), config, seed=seed, log=tmp_path / "replay.log") as bench:
            for step in steps:
                if step[0] == "wait":
                    bench.wait(float(str(step[1])))
                    continue
                kind, protocol, near, port, remote, remote_port, tcp_flags = step
                assert isinstance(protocol, int)
                assert isinstance(port, int)
                if kind == "out":
                    interface, flow = "inside0", f"{near}:{port} > {remote}:{remote_port}"
                else:
                    interface, flow = "outside0", f"{remote}:{remote_port} > {near}:{port}"
                raw = build(protocol, flow, port, str(tcp_flags), request=kind == "out")
                oracle.check(bench.now_ns, interface, raw, bench.send(raw, on=interface))
            assert bench.close() == 0

    agree()
