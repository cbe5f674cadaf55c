"""The NAT in some hundred dull lines: what an endpoint-dependent, round-robin gateway may and may not answer.

The oracle is told every packet and the engine's answer to it, in order, and raises `Disagreement` when no
correct gateway could have answered so. It keeps a plain dictionary of sessions and looks at everything, every
time. Two things it leaves to the engine, because they are not promises: which free port is drawn (it must be
free and in range), and whether a session lives in the moments around its time-out (`Life.UNSURE`: then both
answers are right, and it learns).

It knows UDP, TCP and ICMP echo through one pool and one zone. What it does not know (fragments, ICMP errors,
hairpins) the tests do not feed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from tests.packet import ICMP, TCP, UDP, Packet, read
from tests.replay import SECOND_NS, Answer

SLACK_S = 3  # the engine's clock for ageing is coarse
TIMEOUTS_S = {
    "opening": 240,
    "established": 7440,
    "closing": 240,
    "udp": 300,
    "one_way": 120,
    "dns": 20,
    "icmp": 60,
}

Inside = tuple[int, str, int, str, int]  # protocol, host, port, remote, port
Outside = tuple[int, str, int, str, int]  # protocol, public address, port, remote, port


class Disagreement(Exception):
    """What was asked, what was answered, and what would have been right."""


class Life(Enum):
    DEAD, UNSURE, ALIVE = range(3)


@dataclass
class Session:
    inside: Inside
    outside: Outside
    last_out_s: float
    last_s: float
    flags_out: set[str] = field(default_factory=set)
    flags_in: set[str] = field(default_factory=set)
    answered: bool = False

    def timeouts_s(self) -> tuple[int, int]:
        """The shortest and the longest time-out that its state allows."""
        if self.inside[0] == ICMP:
            return TIMEOUTS_S["icmp"], TIMEOUTS_S["icmp"]
        if self.inside[0] == UDP:
            if self.inside[4] == 53:
                return TIMEOUTS_S["dns"], TIMEOUTS_S["udp"]
            one = TIMEOUTS_S["udp" if self.answered else "one_way"]
            return one, one
        if "R" in self.flags_out | self.flags_in or "F" in self.flags_out & self.flags_in:
            return TIMEOUTS_S["closing"], TIMEOUTS_S["established"]
        one = TIMEOUTS_S["established" if "S" in self.flags_out & self.flags_in else "opening"]
        return one, one

    def life(self, now_s: float) -> Life:
        """RFC 4787 REQ-6: a packet from inside must refresh it, one from outside may."""
        shortest, longest = self.timeouts_s()
        if now_s > self.last_s + longest + SLACK_S:
            return Life.DEAD
        return Life.ALIVE if now_s < self.last_out_s + shortest - SLACK_S else Life.UNSURE

    def saw(self, packet: Packet, now_s: float, *, outbound: bool) -> None:
        self.last_s = now_s
        if outbound:
            self.last_out_s = now_s
        else:
            self.answered = True
        seen = self.flags_out if outbound else self.flags_in
        if outbound and packet.tcp_flags == "S" and self.timeouts_s() != (7440, 7440):
            self.flags_out, self.flags_in = {"S"}, self.flags_in - {"F", "R"}  # may start the walk again
        else:
            seen.update(packet.tcp_flags)


class Oracle:
    def __init__(self, addresses: Sequence[str], ports: range) -> None:
        self.addresses, self.ports = list(addresses), ports
        self.by_inside: dict[Inside, Session] = {}
        self.by_outside: dict[Outside, Session] = {}
        self.cursor = 0
        self.refused = 0

    def check(self, now_ns: int, interface: str, raw: bytes, answer: Answer) -> None:
        packet, now_s = read(raw), now_ns / SECOND_NS
        if interface == "inside0":
            self._from_inside(packet, now_s, answer)
        else:
            self._from_outside(packet, now_s, answer)

    # -- the two directions --

    def _from_inside(self, packet: Packet, now_s: float, answer: Answer) -> None:
        remote_port = 0 if packet.protocol == ICMP else packet.dport
        inside = (
            packet.protocol,
            packet.source_address,
            packet.sport,
            packet.destination_address,
            remote_port,
        )
        session = self.by_inside.get(inside)
        life = session.life(now_s) if session else Life.DEAD
        if (
            session
            and life is not Life.DEAD
            and answer.verdict == "forward"
            and self._leaves_as(session, answer)
        ):
            self._unchanged(packet, answer)
            session.saw(packet, now_s, outbound=True)
            return
        if session and life is Life.ALIVE:
            raise Disagreement(f"{inside} is {session.outside} and alive, but the answer is {answer.line}")
        if session:
            self._forget(session)
        if packet.protocol == TCP and packet.tcp_flags != "S":
            self._dropped(answer, "tcp_not_syn")
            return
        self._new(packet, inside, now_s, answer)

    def _from_outside(self, packet: Packet, now_s: float, answer: Answer) -> None:
        remote_port = 0 if packet.protocol == ICMP else packet.sport
        outside = (
            packet.protocol,
            packet.destination_address,
            packet.dport,
            packet.source_address,
            remote_port,
        )
        session = self.by_outside.get(outside)
        life = session.life(now_s) if session else Life.DEAD
        if life is Life.DEAD or (life is Life.UNSURE and answer.verdict == "drop"):
            self._dropped(answer, "no_session")
            if session:
                self._forget(session)
            return
        assert session is not None
        if answer.verdict != "forward":
            raise Disagreement(f"a reply to {outside} was not forwarded: {answer.line}")
        protocol, host, port, _, _ = session.inside
        got = answer.packet
        if (got.protocol, got.destination_address, got.dport) != (protocol, host, port):
            raise Disagreement(f"a reply to {outside} belongs to {host}:{port}, went to {got.destination}")
        if got.source_address != packet.source_address or (protocol != ICMP and got.sport != packet.sport):
            raise Disagreement(f"a reply from {packet.source} says it is from {got.source}")
        self._unchanged(packet, answer)
        session.saw(packet, now_s, outbound=False)

    # -- a new session --

    def _new(self, packet: Packet, inside: Inside, now_s: float, answer: Answer) -> None:
        count = len(self.addresses)
        turn = [(self.cursor + step) % count for step in range(count)]
        allowed: list[int] = []  # addresses that may be taken: up to the first that surely has a free port
        for number in turn:
            lives = self._lives(self.addresses[number], inside, now_s)
            if lives.count(Life.DEAD):
                allowed.append(number)
                break
            if lives.count(Life.UNSURE):
                allowed.append(number)
        else:
            if answer.verdict == "drop":
                self._dropped(answer, "no_port")
                self.refused += 1
                self.cursor = (self.cursor + 1) % count
                return
        if answer.verdict != "forward":
            raise Disagreement(f"{inside} was refused while a port is free: {answer.line}")
        got = answer.packet
        addresses = [self.addresses[number] for number in allowed]
        if got.source_address not in addresses:
            raise Disagreement(f"{inside} got {got.source_address}, the next in turn is one of {addresses}")
        if got.sport not in self.ports:
            raise Disagreement(f"{inside} got port {got.sport}, outside of {self.ports}")
        outside = (inside[0], got.source_address, got.sport, inside[3], inside[4])
        holder = self.by_outside.get(outside)
        if holder:
            if holder.life(now_s) is Life.ALIVE:
                raise Disagreement(f"{inside} got {outside}, which {holder.inside} has")
            self._forget(holder)
        self._unchanged(packet, answer)
        session = Session(inside, outside, now_s, now_s)
        session.saw(packet, now_s, outbound=True)
        self.by_inside[inside] = self.by_outside[outside] = session
        self.cursor = (self.addresses.index(got.source_address) + 1) % count

    def _lives(self, address: str, inside: Inside, now_s: float) -> list[Life]:
        """What is known of every port of the address towards this remote."""
        ends = ((inside[0], address, port, inside[3], inside[4]) for port in self.ports)
        holders = [self.by_outside.get(end) for end in ends]
        return [holder.life(now_s) if holder else Life.DEAD for holder in holders]

    # -- small things --

    @staticmethod
    def _leaves_as(session: Session, answer: Answer) -> bool:
        return answer.packet.source == f"{session.outside[1]}:{session.outside[2]}"

    @staticmethod
    def _unchanged(packet: Packet, answer: Answer) -> None:
        """All but the translated end is as a router leaves it."""
        got = answer.packet
        if (got.payload, got.ttl, got.tcp_flags) != (packet.payload, packet.ttl - 1, packet.tcp_flags):
            raise Disagreement(f"{packet} came out as {got}")

    @staticmethod
    def _dropped(answer: Answer, reason: str) -> None:
        if (answer.verdict, answer.reason) != ("drop", reason):
            raise Disagreement(f"expected a drop for {reason}, the answer is {answer.line}")

    def _forget(self, session: Session) -> None:
        self.by_inside.pop(session.inside, None)
        if self.by_outside.get(session.outside) is session:
            del self.by_outside[session.outside]
