"""A gateway's life as a state machine: traffic, errors, fragments, hairpins, damage, pauses, reloads.

Hypothesis chooses the kind of gateway and the steps; tests/oracle.py judges each answer. When the two
disagree Hypothesis prints the shortest life that still shows it, and the seed. After each life the books are
checked: the accounting equation, and the list of sessions against the oracle's.

    pytest tests/dataplane/test_state_machine.py --seed 7              other lives
    pytest tests/dataplane/test_state_machine.py --steps 100000        the long run
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.oracle import Disagreement, EndpointIndependentOracle, Life, Oracle, Session
from tests.packet import ICMP, TCP, UDP, fragments, icmp_error, joined, ping, pong, read, tcp, udp
from tests.replay import SECOND_NS, Answer, Bench

ADDRESSES = ["203.0.113.1", "203.0.113.2", "203.0.113.9"]
REMOTES = ["198.51.100.1", "198.51.100.2"]
HOSTS = ["100.64.0.2", "100.64.0.3", "100.64.0.4"]
STEPS_PER_LIFE = 100
KINDS = ["endpoint-dependent", "endpoint-independent", "address-dependent", "address-and-port-dependent"]
CONFIG = """\
engine: {{workers: 1, max_sessions: 2048}}
interfaces:
  - {{name: inside0, role: inside, path: dpdk}}
  - {{name: outside0, role: outside, path: dpdk}}
pools:
  - name: g1
    addresses: [203.0.113.1-203.0.113.2, 203.0.113.9]
    ports: {ports.start}-{last}
    mapping: {mapping}
{more}zones:
  - {{source: 100.64.0.0/16, pool: g1}}
limits: {{sessions_per_host: {limit}}}
timeouts: {{hold: {hold_s}s}}
"""

protocols = st.sampled_from([UDP, UDP, TCP, ICMP])
picks = st.integers(0, 1 << 16)
seconds = st.sampled_from([0.2, 1, 5, 19, 30, 70, 130, 250, 400, 8000, 100000])


class GatewayLife(RuleBasedStateMachine):
    """One gateway. `program`, `directory` and `seed` are given by the test; `steps` counts for its report."""

    program: Path
    directory: Path
    seed: int
    steps: dict[str, int]

    @initialize(
        kind=st.sampled_from(KINDS),
        n_ports=st.sampled_from([1, 2, 70]),
        first=st.sampled_from([5000, 6399]),
        limit=st.sampled_from([0, 0, 0, 4]),
        hold_s=st.sampled_from([0, 10, 120]),
        workers=st.sampled_from([1, 1, 1, 2, 3, 5]),
        spread=st.sampled_from(["rss", "turns"]),
    )
    def begin(
        self, kind: str, n_ports: int, first: int, limit: int, hold_s: int, workers: int, spread: str
    ) -> None:
        self.kind, self.ports, self.limit, self.hold_s = kind, range(first, first + n_ports), limit, hold_s
        self.drain: list[str] = []
        self.ident = 0
        self.oracle = (
            Oracle(ADDRESSES, self.ports, sessions_per_host=limit, workers=1 if limit else workers)
            if kind == KINDS[0]
            else EndpointIndependentOracle(
                ADDRESSES, self.ports, filtering=kind, hold_s=hold_s, sessions_per_host=limit
            )
        )
        self.write_config()
        self.bench = Bench(
            self.program,
            self.directory / "life.yaml",
            seed=self.seed,
            log=self.directory / "life.log",
            options=["--workers", str(workers), "--spread", spread],
        )
        self.bench.ctl(cmd="version")  # it has read the file, which a reload may now write anew

    def write_config(self) -> None:
        lines = [] if self.kind == KINDS[0] else [f"filtering: {self.kind}", "select: paired"]
        lines += [f"drain: [{', '.join(self.drain)}]"] if self.drain else []
        text = CONFIG.format(
            ports=self.ports,
            last=self.ports[-1],
            mapping=KINDS[0] if self.kind == KINDS[0] else KINDS[1],
            more="".join(f"    {line}\n" for line in lines),
            limit=self.limit,
            hold_s=self.hold_s,
        )
        (self.directory / "life.yaml").write_text(text)

    # -- what the rules are made of --

    def sent(self, interface: str, raw: bytes) -> Answer:
        self.steps["packets"] += 1
        return self.bench.send(raw, on=interface)

    def judged(self, interface: str, raw: bytes) -> None:
        self.oracle.check(self.bench.now_ns, interface, raw, self.sent(interface, raw))

    def session(self, pick: int) -> Session | None:
        """Any but those of hairpins, which are judged from both ends at once."""
        known = [one for one in self.oracle.by_outside.values() if one.inside[3] not in ADDRESSES]
        return known[pick % len(known)] if known else None

    def is_alive(self, session: Session) -> bool:
        return session.life(self.bench.now_ns / SECOND_NS) is Life.ALIVE

    @staticmethod
    def packet(protocol: int, near: tuple[str, int], far: tuple[str, int], flags: str, *, out: bool) -> bytes:
        """`near` is the host's end as this side knows it, `far` the remote's."""
        if protocol == ICMP:
            flow = f"{near[0]} > {far[0]}" if out else f"{far[0]} > {near[0]}"
            return (ping if out else pong)(flow, ident=near[1])
        ends = [f"{near[0]}:{near[1]}", f"{far[0]}:{far[1]}"]
        flow = " > ".join(ends if out else reversed(ends))
        return udp(flow, bytes(40)) if protocol == UDP else tcp(flow, flags, b"data")

    # -- traffic --

    @rule(
        protocol=protocols,
        host=st.sampled_from(HOSTS),
        port=st.integers(40000, 40003),
        remote=st.sampled_from(REMOTES),
        remote_port=st.sampled_from([53, 80]),
        flags=st.sampled_from(["S", "S", "S", "A", "SA", "FA", "R"]),
    )
    def ask(self, protocol: int, host: str, port: int, remote: str, remote_port: int, flags: str) -> None:
        raw = self.packet(protocol, (host, port), (remote, remote_port), flags, out=True)
        self.judged("inside0", raw)

    @rule(pick=picks, flags=st.sampled_from(["SA", "A", "FA", "R", "S"]))
    def reply(self, pick: int, flags: str) -> None:
        if session := self.session(pick):
            protocol, address, port, remote, remote_port = session.outside
            raw = self.packet(protocol, (address, port), (remote, remote_port), flags, out=False)
            self.judged("outside0", raw)

    @rule(pick=picks, flags=st.sampled_from(["A", "FA", "R", "S", "SA"]))
    def go_on(self, pick: int, flags: str) -> None:
        if session := self.session(pick):
            protocol, address, port, remote, remote_port = session.inside
            raw = self.packet(protocol, (address, port), (remote, remote_port), flags, out=True)
            self.judged("inside0", raw)

    @rule(
        protocol=protocols,
        address=st.sampled_from(ADDRESSES),
        pick=picks,
        remote=st.sampled_from(REMOTES),
        remote_port=st.sampled_from([53, 80, 7]),
        flags=st.sampled_from(["S", "S", "A", "SA", "R"]),
    )
    def knock(
        self, protocol: int, address: str, pick: int, remote: str, remote_port: int, flags: str
    ) -> None:
        port = self.ports[pick % len(self.ports)]
        raw = self.packet(protocol, (address, port), (remote, remote_port), flags, out=False)
        self.judged("outside0", raw)

    @rule(
        protocol=st.sampled_from([UDP, TCP]),
        hosts=st.integers(2, 9),
        remote=st.sampled_from(REMOTES),
        remote_port=st.sampled_from([53, 80]),
    )
    def crowd(self, protocol: int, hosts: int, remote: str, remote_port: int) -> None:
        """As many hosts as it takes to run out of ports."""
        for host in range(hosts):
            end = (f"100.64.1.{host}", 41000)
            self.judged("inside0", self.packet(protocol, end, (remote, remote_port), "S", out=True))

    @rule(seconds=seconds)
    def pause(self, seconds: float) -> None:
        self.bench.wait(seconds)
        self.oracle.time_passes(self.bench.now_ns)

    # -- what is rarer --

    @rule(pick=picks, from_outside=st.booleans(), code=st.integers(0, 13), cut=st.booleans())
    def error(self, pick: int, from_outside: bool, code: int, cut: bool) -> None:
        """A router outside about what a host has sent, or a host about what it was sent."""
        if not (session := self.session(pick)):
            return
        end = session.outside if from_outside else session.inside
        protocol, address, port, remote, remote_port = end
        about = self.packet(protocol, (address, port), (remote, remote_port), "A", out=from_outside)
        quoted = about[:28] if cut else about
        if from_outside:
            flow, interface = f"192.0.2.77 > {address}", "outside0"
        else:
            flow, interface = f"{address} > {remote}", "inside0"
        raw = icmp_error(flow, 3, code, quoted)
        self.oracle.check_error(self.bench.now_ns, interface, raw, self.sent(interface, raw))

    @rule(pick=picks, outbound=st.booleans(), reverse=st.booleans(), size=st.sampled_from([16, 24]))
    def in_fragments(self, pick: int, outbound: bool, reverse: bool, size: int) -> None:
        """In order or the other way round, the pieces make the packet that the whole would have become."""
        session = self.session(pick)
        if session is None or session.inside[0] != UDP or not self.is_alive(session):
            return
        protocol, address, port, remote, remote_port = session.inside if outbound else session.outside
        whole = self.packet(protocol, (address, port), (remote, remote_port), "", out=outbound)
        self.ident += 1
        parts = fragments(whole, size, ident=self.ident % 65536)
        interface = "inside0" if outbound else "outside0"
        answers = [self.sent(interface, part) for part in (reversed(parts) if reverse else parts)]
        out = [one for answer in answers for one in answer.out]
        if len(out) != len(parts) or len({one.interface for one in out}) != 1:
            raise Disagreement(f"{len(parts)} fragments went in: {[answer.line for answer in answers]}")
        raw = joined([one.raw for one in out])
        line = {"in fragments": True}
        last = answers[-1].out[0]
        answer = Answer("forward", "ok", (type(last)(last.interface, raw, "packet", read(raw)),), line)
        self.oracle.check(self.bench.now_ns, interface, whole, answer)

    @rule(pick=picks, other=picks)
    def hairpin(self, pick: int, other: int) -> None:
        """A host that has a mapping sends to another one's (RFC 4787 REQ-9)."""
        first, second = self.session(pick), self.session(other)
        if self.kind == KINDS[0] or not first or not second or first.inside[0] != UDP:
            return
        if first.inside[:3] == second.inside[:3]:
            return
        if second.inside[0] != UDP or not self.is_alive(first) or not self.is_alive(second):
            return
        raw = self.packet(UDP, first.inside[1:3], second.outside[1:3], "", out=True)
        answer = self.sent("inside0", raw)
        if answer.reason == "host_sessions" and self.limit:
            return
        now_ns, outside = self.bench.now_ns, first.outside
        # seen from outside, it is what the first one's public end sends to the second one's
        seen = self.packet(UDP, second.outside[1:3], outside[1:3], "", out=False)
        goes = (answer.out[0].interface, answer.packet.source) if answer.verdict == "forward" else None
        if goes not in (None, ("inside0", f"{outside[1]}:{outside[2]}")):
            raise Disagreement(f"a hairpin of {first.inside} came out as {answer.line}")
        self.oracle.check(now_ns, "outside0", seen, answer)
        end = (UDP, *first.inside[1:3], *second.outside[1:3])
        if end not in self.oracle.by_inside:  # what it has sent is a session like any other
            session = Session(end, (*outside[:3], *end[3:]), now_ns / SECOND_NS, now_ns / SECOND_NS)
            self.oracle.by_inside[session.inside] = self.oracle.by_outside[session.outside] = session
            assert isinstance(self.oracle, EndpointIndependentOracle)
            self.oracle.by_owner[end[:3]].add(session)
        else:
            session = self.oracle.by_inside[end]
            session.doubtful = session.doubtful or not self.is_alive(session)
            session.saw(read(raw), now_ns / SECOND_NS, outbound=True)

    @rule(pick=picks, outbound=st.booleans(), at=st.integers(0, 59), bit=st.integers(0, 7))
    def damage(self, pick: int, outbound: bool, at: int, bit: int) -> None:
        """Cut anywhere, or with a bit of the header turned: dropped by name, and nothing is learned."""
        if not (session := self.session(pick)):
            return
        protocol, address, port, remote, remote_port = session.inside if outbound else session.outside
        raw = self.packet(protocol, (address, port), (remote, remote_port), "A", out=outbound)
        bad = raw[: min(at, len(raw) - 1)]
        if bit and at < 20:
            bad = raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
        answer = self.sent("inside0" if outbound else "outside0", bad)
        if answer.verdict != "drop" or answer.out:
            raise Disagreement(f"{bad.hex()} was let through: {answer.line}")

    @rule(drain=st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=3))
    def reload(self, drain: list[str]) -> None:
        self.drain = drain
        self.write_config()
        answer = self.bench.ctl(cmd="reload")
        assert answer["ok"], answer
        self.oracle.draining = set(drain)

    @rule()
    def look_at_the_books(self) -> None:
        self.oracle.check_sessions(self.bench.now_ns, self.bench.sessions())
        answer = self.bench.ctl(cmd="show", what="counters")
        count = answer["counters"]
        out = sum(count[name] for name in ("forwarded", "passed", "dropped", "handed_over", "held"))
        if count["received"] + count["taken_over"] != out or not answer["equation"]:
            raise Disagreement(f"the equation does not hold: {count}")

    @invariant()
    def count(self) -> None:
        self.steps["steps"] += 1

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        try:
            self.look_at_the_books()
        finally:
            assert self.bench.close() == 0, (self.directory / "life.log").read_text()[-2000:]
        self.steps["lives"] += 1
        self.steps["refused"] += self.oracle.refused


@pytest.mark.timeout(0)
def test_a_gateways_life_is_as_the_oracle_says(
    program: Callable[[str], Path],
    tmp_path: Path,
    seed: int,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, Any], None],
) -> None:
    wanted = pytestconfig.getoption("--steps")
    steps = {"steps": 0, "packets": 0, "lives": 0, "refused": 0}
    made = {"program": program("dsnat-replay"), "directory": tmp_path, "seed": seed, "steps": steps}
    settings = hypothesis.settings(
        max_examples=1 + wanted * 10 // (9 * STEPS_PER_LIFE),  # some lives end early
        stateful_step_count=STEPS_PER_LIFE,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    machine = type("Life", (GatewayLife,), made)
    run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
    record_property("steps", steps)
    print(f"seed {seed}: {steps}")
    assert steps["steps"] >= wanted
    assert steps["refused"] > 0 or wanted < 1000, "no life ever ran out of ports"
