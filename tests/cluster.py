"""What happens to a cluster, what the plan says of it, and what its hosts count: `python -m tests.cluster`.

Before each event all flows are opened anew, so that every session that a gateway counts is one that lives.
Then the product's own bill is asked for, the event is made, and the hosts say which of their connections
were reset. The two must be equal; where the hash of routers decides, within three standard deviations.
The cluster itself, in namespaces, is in cluster_lab.py.

Exit status: 0 every event was right, 1 one was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from provision import cluster
from provision.handover import NoHandOver, drain
from tests.cluster_lab import FIRST_HOST, HALVES, PORT, ROOT, SERVER, Cluster, Member
from tests.lab import LabError, new_lab, wait_until


class Flows:
    """Long connections of many hosts through the cluster (tests/flows.py)."""

    def __init__(self, lab: Cluster, count: int, *, period_s: float = 1.0) -> None:
        argv = (sys.executable, "-m", "tests.flows")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        server = lab.server.start(
            "env", f"PYTHONPATH={ROOT}", *argv, "serve", SERVER, str(PORT), log="serve.log"
        )
        lab.server.wait_for_listener(server, PORT)
        words = ("hold", FIRST_HOST, str(count), SERVER, str(PORT), str(period_s))
        self.process = subprocess.Popen(
            lab.hosts.argv(*argv, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        lab.lab.undo.callback(self._end)
        self.up = self._answer()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the holder of flows ended"
        found: dict[str, int] = json.loads(line)
        return found

    def ask(self, command: str) -> dict[str, int]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self._answer()

    def judged(self, *, deadline_s: float = 30) -> dict[str, int]:
        """What became of the marked flows, once each was heard from after this moment, or was reset."""
        self.ask("settled")
        latest: dict[str, int] = {}

        def over() -> bool:
            nonlocal latest
            latest = self.ask("count")
            return latest["silent"] == 0

        with suppress(LabError):  # the silent ones are in the count
            wait_until("all flows to be heard from or reset", over, deadline_s=deadline_s)
        return latest


@dataclass(frozen=True)
class Event:
    """One event. `predicted` is the product's own bill, `reset` what hosts counted."""

    name: str
    predicted: int
    reset: int
    silent: int
    kept: int
    again: int  # of those that were reset, how many got through at once when they tried again
    seconds: float  # until the routers had followed
    exact: bool  # else the hash of routers decides, and three standard deviations are right

    @property
    def right(self) -> bool:
        of = self.reset + self.kept
        near = abs(self.reset - self.predicted) <= (0 if self.exact else 3 * math.sqrt(of) / 2)
        return near and not self.silent and self.again == self.reset

    def row(self) -> str:
        sign = "=" if self.exact else "~"
        return (
            f"{self.name:<24}{sign}{self.predicted:>9}{self.reset:>9}{self.kept:>9}{self.again:>9}"
            f"{self.seconds:>9.2f}  {'ok' if self.right else 'WRONG'}"
        )


HEADS = f"{'event':<24}{'predicted':>10}{'reset':>9}{'kept':>9}{'again':>9}{'seconds':>9}"


class Story:
    """A cluster of four and its flows; each method is one event."""

    def __init__(self, lab: Cluster, flows: Flows) -> None:
        self.lab, self.flows = lab, flows
        self.exact = lab.hashing == "resilient"
        self.names = list(lab.members)

    def _event(self, name: str, predict: Callable[[], int], act: Callable[[], float]) -> Event:
        """All flows anew, so that every session that a gateway counts is one that lives."""
        self.flows.ask("close")
        for member in self._alive():
            member.machine.engine({"cmd": "clear", "all": True}, 30.0)
        assert self.flows.ask("open")["up"] == self.flows.up["of"]
        # A SYN that was sent again, to another gateway, has left half a session behind.
        wait_until(
            "one session for each flow",
            lambda: sum(m.sessions() for m in self._alive()) == self.flows.up["of"],
            deadline_s=60,
        )
        predicted, before = predict(), {m.name: m.sessions() for m in self._alive()}
        self.flows.ask("mark")
        seconds = act()
        found = self.flows.judged()
        again = self.flows.ask("again")["again"]
        counts = found["reset"], found["silent"], found["kept"]
        event = Event(name, predicted, *counts, again, seconds, self.exact)
        shares = ", ".join(f"{gateway} {n}" for gateway, n in before.items())
        print(f"{event.row()}   before: {shares}", flush=True)
        return event

    def _alive(self) -> list[Member]:
        return [member for member in self.lab.members.values() if member.alive("dsnatd")]

    def _loss(self, *gone: str) -> int:
        fleet = self.lab.fleet()
        return sum(loss.total for loss in cluster.losses(fleet, self.lab.look(fleet), drained=gone))

    def drained(self, name: str) -> Event:
        rest = [other for other in self.names if other != name]

        def act() -> float:
            drain(self.lab.fleet(), name, self.lab.dial, on=True)
            return self._timed(lambda: self.lab.next_hops() == set(rest))

        event = self._event(f"drain {name}", lambda: self._loss(name), act)
        assert name in self.lab.slices().values(), "what still comes back must find the drained one"
        return event

    def back(self, name: str) -> Event:
        """The opposite of a drain. With resilient hashing the returning member takes idle buckets only."""

        def predict() -> int:
            rest = [other for other in self.names if other != name]
            share = cluster.rehash(self.lab.hashing, rest, self.names)
            return round(share * sum(member.sessions() for member in self._alive()))

        def act() -> float:
            drain(self.lab.fleet(), name, self.lab.dial, on=False)
            return self._timed(lambda: self.lab.settled(*self.names))

        return self._event(f"drain {name} --undo", predict, act)

    def changed(self, name: str, numbers: Sequence[int], weights: Mapping[int, int]) -> Event:
        """A push with other members."""

        def predict() -> int:
            old = self.lab.weights
            self.lab.weights = {n: weights.get(n, 1) for n in numbers}
            fleet = self.lab.fleet()
            running = self.lab.look(fleet)
            self.lab.weights = old
            lost = cluster.losses(fleet, running)
            gone = {member for loss in lost for member in loss.ending}
            moved = sum(move.sessions for move in cluster.moves(fleet, running) if move.source not in gone)
            if not lost:
                return moved
            (loss,) = lost  # a session that moves and is sent elsewhere ends once
            rest = 1 - moved / loss.staying
            return sum(loss.ending.values()) + moved + round(loss.rehashed * rest)

        def act() -> float:
            results = self.lab.push(*numbers, weights=weights)
            assert all(result.good for result in results), results
            self.names = [f"gw{n}" for n in numbers if weights.get(n, 1)]
            return self._timed(lambda: self.lab.settled(*self.names))

        return self._event(name, predict, act)

    def killed(self, name: str) -> Event:
        def act() -> float:
            self.lab.members[name].kill()
            rest = set(self.names) - {name}
            return self._timed(lambda: self.lab.next_hops() == rest)

        event = self._event(f"power off {name}", lambda: self._loss(name), act)
        self.names.remove(name)
        return event

    def engine_died(self, name: str) -> Event:
        """Only dsnatd: BIRD lives, and must withdraw."""

        def act() -> float:
            process = self.lab.members[name].programs["dsnatd"].process
            process.kill()
            process.wait()
            return self._timed(lambda: name not in self.lab.next_hops() | set(self.lab.slices().values()))

        event = self._event(f"kill -9 dsnatd of {name}", lambda: self._loss(name), act)
        self.names.remove(name)
        return event

    def bfd_flapped(self, name: str) -> Event:
        """What routers and gateway say to each other is lost until it has been seen, and then is not."""
        space = self.lab.members[name].space
        rules = [
            ("INPUT", "-p", protocol, f"--{end}", port, "-j", "DROP")
            for protocol, end, port in (
                ("udp", "dport", "3784"),
                ("tcp", "dport", "179"),
                ("tcp", "sport", "179"),
            )
        ]

        def act() -> float:
            for rule in rules:
                space.run("iptables", "-I", *rule)
            gone = self._timed(lambda: name not in self.lab.next_hops())
            self.flows.judged()  # while it is away
            for rule in rules:
                space.run("iptables", "-D", *rule)
            self._timed(lambda: self.lab.settled(*self.names))
            return gone

        return self._event(f"BFD flap of {name}", lambda: self._loss(name), act)

    @staticmethod
    def _timed(done: Callable[[], bool]) -> float:
        begun = time.monotonic()
        wait_until("the routers to follow", done, deadline_s=60)
        return time.monotonic() - begun


def with_standby(lab: Cluster, count: int) -> list[Event]:
    """Three gateways alone and one pair. What happens to the pair's master costs no connection."""
    lab.standby = True
    assert all(result.good for result in lab.push(1, 2, 3))
    names = ["gw1", "gw2", "gw3", "gw101"]
    first, second = (f"gw{n}" for n in HALVES)
    print(f"in use after {lab.await_settled(*names):.1f} s")
    flows = Flows(lab, count)

    def held(name: str) -> int:
        return lab.members[name].sessions()

    def equal() -> bool:
        answer = lab.members[first].machine.engine({"cmd": "show", "what": "sync"})
        return bool(answer["in_sync"]) and not answer["waiting"] and not answer["on_the_way"]

    def event(name: str, act: Callable[[], None], predicted: int) -> Event:
        flows.ask("mark")
        begun = time.monotonic()
        act()
        seconds = time.monotonic() - begun
        found = flows.judged()
        counts = found["reset"], found["silent"], found["kept"]
        happened = Event(name, predicted, *counts, flows.ask("again")["again"], seconds, True)
        print(happened.row(), flush=True)
        return happened

    wait_until("both of the pair to have the same sessions", equal, deadline_s=60)
    print(f"{count} flows; {first} {held(first)}, its standby {second} {held(second)}\n{HEADS}")
    fleet = lab.fleet()

    def drain_it() -> None:
        def drained() -> bool:  # a peer that is too busy to say that it is well is asked again, as one would
            try:
                print("   ", drain(fleet, first, lab.dial, on=True))
            except NoHandOver:
                return False
            return True

        wait_until("the peer to be well and take over", drained, deadline_s=60)

    def take_back() -> None:
        drain(fleet, first, lab.dial, on=False)
        lab.members[second].machine.write_drain(True)
        wait_until(
            "the addresses to come back", lambda: "100.64.0.101" in lab.members[first].space.ip("address")
        )
        lab.members[second].machine.write_drain(False)

    found = [event(f"drain {first}, a pair's", drain_it, 0)]
    wait_until("the same sessions on both again", equal, deadline_s=60)
    found.append(event(f"and back to {first}", take_back, 0))
    wait_until("the same sessions on both again", equal, deadline_s=60)
    found.append(event(f"power off {first}", lab.members[first].kill, 0))
    alone = held("gw3")

    def drain_alone() -> None:
        drain(fleet, "gw3", lab.dial, on=True)
        wait_until("the routers to follow", lambda: "gw3" not in lab.next_hops())

    found.append(event("drain gw3, alone", drain_alone, alone))
    return found


def throughput(lab: Cluster, seconds: int = 5) -> str:
    """128 TCP streams of iperf3 through all gateways, and the share of each by its outside interface."""

    def sent(member: Member) -> int:
        return int(member.space.run("cat", "/sys/class/net/outside0/statistics/tx_bytes"))

    server = lab.server.start("iperf3", "-s", "-1", "-J", "-B", SERVER, log="iperf3-server.json")
    lab.server.wait_for_listener(server, 5201)
    before = {name: sent(member) for name, member in lab.members.items()}
    words = ("iperf3", "-J", "-c", SERVER, "-B", FIRST_HOST, "-P", "128", "-t", str(seconds))
    end = json.loads(lab.hosts.run(*words, timeout_s=120))["end"]["sum_received"]
    share = {name: sent(member) - before[name] for name, member in lab.members.items()}
    parts = ", ".join(f"{name} {100 * n / sum(share.values()):.0f} %" for name, n in share.items())
    return f"128 streams, {end['bits_per_second'] / 1e6:.0f} Mbit/s in all: {parts}"


def tell(lab: Cluster, count: int) -> list[Event]:
    """The whole story."""
    assert all(result.good for result in lab.push(1, 2, 3, 4))
    print(f"four gateways in use after {lab.await_settled('gw1', 'gw2', 'gw3', 'gw4'):.1f} s")
    print(throughput(lab))
    story = Story(lab, Flows(lab, count))
    print(f"{lab.hashing} hashing, {count} hosts with a connection each\n{HEADS}")
    return [
        story.drained("gw3"),
        story.back("gw3"),
        story.changed("add gw5", (1, 2, 3, 4, 5), {}),
        story.bfd_flapped("gw4"),
        story.changed("remove gw2", (1, 2, 3, 4, 5), {2: 0}),
        story.engine_died("gw5"),
        story.killed("gw1"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Events in a cluster: what the plan says, and what is counted."
    )
    parser.add_argument("--flows", type=int, default=1000)
    parser.add_argument("--hashing", choices=["resilient", "threshold"], default="resilient")
    parser.add_argument("--standby", action="store_true", help="a pair among the members, and its faults")
    parser.add_argument("--bfd-ms", type=int, default=300)
    parser.add_argument("--program", type=Path, default=ROOT / ".build/engine/dsnatd")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dsnat-cluster-"))
    with new_lab(folder) as made:
        lab = Cluster(made, options.program, hashing=options.hashing, bfd_ms=options.bfd_ms)
        events = (with_standby if options.standby else tell)(lab, options.flows)
    return 0 if all(event.right for event in events) else 1


if __name__ == "__main__":
    sys.exit(main())
