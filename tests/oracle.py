"""The NAT in some hundred dull lines: what a gateway with one pool and one zone may and may not answer.

The oracle is told every packet and the engine's answer to it, in order, and raises `Disagreement` when no
correct gateway could have answered so. It keeps a plain dictionary of sessions and looks at everything, every
time. Two things it leaves to the engine, because they are not promises: which free port is drawn (it must be
free and in range), and whether a session lives in the moments around its time-out (`Life.UNSURE`: then both
answers are right, and it learns).

It knows UDP, TCP, ICMP echo and ICMP errors; `Oracle` is an endpoint-dependent pool with round robin,
`EndpointIndependentOracle` one with mappings, filters and paired addresses. Hosts may be limited, addresses
drained. What it does not know (static mappings, port blocks, PCP) the tests do not feed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
    reset: bool = False  # its last segment was a RST
    doubtful: bool = False  # it may have ended and begun anew at the same port, without what it had seen

    def is_closing(self) -> bool:
        """RFC 7857 section 2: by FINs of both sides, or by a RST until the next segment takes that back."""
        return self.reset or "F" in self.flags_out & self.flags_in

    def timeouts_s(self) -> tuple[int, int]:
        """The shortest and the longest time-out that its state allows."""
        if self.inside[0] == ICMP:
            return TIMEOUTS_S["icmp"], TIMEOUTS_S["icmp"]
        if self.inside[0] == UDP:
            if self.inside[4] == 53:
                return TIMEOUTS_S["dns"], TIMEOUTS_S["dns"]
            longest = TIMEOUTS_S["udp" if self.answered else "one_way"]
            return TIMEOUTS_S["one_way"] if self.doubtful else longest, longest
        open_ = "established" if "S" in self.flags_out & self.flags_in else "opening"
        longest = TIMEOUTS_S["closing" if self.is_closing() else open_]
        return TIMEOUTS_S["opening"] if self.doubtful else longest, longest

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
            self.doubtful = self.doubtful and self.inside[0] != UDP
        if "R" in packet.tcp_flags:
            self.reset = True
            return
        if outbound and "S" in packet.tcp_flags and self.is_closing():  # the walk starts again
            self.flags_out, self.flags_in = set(), {"S"} if "A" in packet.tcp_flags else set()
        self.reset = False
        (self.flags_out if outbound else self.flags_in).update(packet.tcp_flags)


class Oracle:
    def __init__(
        self, addresses: Sequence[str], ports: range, *, sessions_per_host: int = 0, workers: int = 1
    ) -> None:
        self.addresses, self.ports = list(addresses), ports
        self.draining: set[str] = set()
        self.sessions_per_host = sessions_per_host
        self.by_inside: dict[Inside, Session] = {}
        self.by_outside: dict[Outside, Session] = {}
        # whose turn it may be: more than one after a session that lived on, or not; each worker has its own
        self.cursors = {0} if workers == 1 else set(range(len(self.addresses)))
        self.workers = workers
        self.refused = 0

    def check(self, now_ns: int, interface: str, raw: bytes, answer: Answer) -> None:
        packet, now_s = read(raw), now_ns / SECOND_NS
        self.time_passes(now_ns)
        if interface == "inside0":
            self._from_inside(packet, now_s, answer)
        else:
            self._from_outside(packet, now_s, answer)

    def time_passes(self, now_ns: int) -> None:
        """The engine has seen this time; sessions need no word of it."""

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
            if life is Life.UNSURE:  # or it ended, and a new one got the same port
                self.cursors.add(self._after(session.outside[1]))
                session.doubtful = packet.protocol != TCP or packet.tcp_flags == "S"
            return
        if session and life is Life.ALIVE:
            raise Disagreement(f"{inside} is {session.outside} and alive, but the answer is {answer.line}")
        if session:
            self._forget(session)
        if packet.protocol == TCP and packet.tcp_flags != "S":
            if not self._midflow(packet, inside, now_s, answer):
                self._dropped(answer, "tcp_not_syn")
            return
        if not self._is_over_limit(packet.source_address, now_s, answer):
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
            if session:
                self._forget(session)
            self._uninvited(packet, now_s, answer)
            return
        assert session is not None
        if answer.verdict != "forward":
            raise Disagreement(f"a reply to {outside} was not forwarded: {answer.line}")
        self._reaches(packet, session.inside[1], session.inside[2], answer)
        session.saw(packet, now_s, outbound=False)

    # -- what has no session --

    def _midflow(self, packet: Packet, inside: Inside, now_s: float, answer: Answer) -> bool:
        """Is the TCP packet from inside, which is no SYN, one that goes on all the same?"""
        return False

    def _uninvited(self, packet: Packet, now_s: float, answer: Answer) -> None:
        self._dropped(answer, "no_session")

    def _is_over_limit(self, host: str, now_s: float, answer: Answer) -> bool:
        """Was a new session of this host refused, and rightly so?"""
        lives = [one.life(now_s) for one in self.by_inside.values() if one.inside[1] == host]
        sure, possible = lives.count(Life.ALIVE), len(lives) - lives.count(Life.DEAD)
        refused = answer.reason == "host_sessions"
        if refused and not 0 < self.sessions_per_host <= possible:
            raise Disagreement(f"{host} has at most {possible} sessions, and was refused for having too many")
        if not refused and 0 < self.sessions_per_host <= sure:
            raise Disagreement(f"{host} has {sure} sessions and gets one more: {answer.line}")
        return refused

    # -- ICMP errors --

    def check_error(self, now_ns: int, interface: str, raw: bytes, answer: Answer) -> None:
        """An error about a packet of a session: it reaches whom the packet came from, and quotes it
        as it was known there. It neither refreshes nor ends anything.
        """
        error, now_s = read(raw), now_ns / SECOND_NS
        quoted = error.quoted
        assert quoted is not None
        from_outside = interface == "outside0"
        near, far = ("source", "destination") if from_outside else ("destination", "source")
        address, port = getattr(quoted, f"{near}_address"), quoted.sport if from_outside else quoted.dport
        remote, remote_port = (
            getattr(quoted, f"{far}_address"),
            quoted.dport if from_outside else quoted.sport,
        )
        end = (quoted.protocol, address, port, remote, 0 if quoted.protocol == ICMP else remote_port)
        session = (self.by_outside if from_outside else self.by_inside).get(end)
        life = session.life(now_s) if session else Life.DEAD
        if answer.verdict == "drop" and life is not Life.ALIVE:
            self._dropped(answer, "icmp_no_session")
            return
        if session is None:
            raise Disagreement(f"an error about {end}, which nobody has, was let through: {answer.line}")
        got, other = answer.packet, session.inside if from_outside else session.outside
        assert got.quoted is not None
        told = getattr(got.quoted, f"{near}_address"), getattr(got.quoted, near)
        if told != (other[1], f"{other[1]}:{other[2]}"):
            raise Disagreement(f"an error quotes {told}, the packet was of {other}")
        whole = quoted.protocol == UDP or quoted.tcp_flags  # else cut so short that ports count as payload
        if quoted.protocol != ICMP and getattr(got.quoted, far) != getattr(quoted, far):
            raise Disagreement(f"an error quotes {got.quoted}, the packet was {quoted}")
        if whole and got.quoted.payload != quoted.payload:
            raise Disagreement(f"an error quotes {got.quoted}, the packet was {quoted}")
        outer = (other[1], error.source_address) if from_outside else (error.destination_address, other[1])
        if (got.destination_address, got.source_address) != outer:
            raise Disagreement(f"an error about {end} went from {got.source} to {got.destination}")
        if (got.ttl, got.icmp_type, got.icmp_code) != (error.ttl - 1, error.icmp_type, error.icmp_code):
            raise Disagreement(f"{error} came out as {got}")

    # -- the books --

    def check_sessions(self, now_ns: int, shown: Sequence[dict[str, Any]]) -> None:
        """What the gateway lists is what lives: each outside tuple once, and with its own host."""
        now_s, numbers = now_ns / SECOND_NS, {"icmp": ICMP, "tcp": TCP, "udp": UDP}
        seen: set[Outside] = set()
        for one in shown:
            protocol = numbers[one["protocol"]]
            outside, remote = one["outside"].split(":"), one["remote"].split(":")
            remote_port = 0 if protocol == ICMP else int(remote[1])
            end = (protocol, outside[0], int(outside[1]), remote[0], remote_port)
            if end in seen:
                raise Disagreement(f"two sessions share {end}")
            seen.add(end)
            session = self.by_outside.get(end)
            if session is None or session.life(now_s) is Life.DEAD:
                raise Disagreement(f"{one} is listed, and is not alive")
            if one["inside"] != f"{session.inside[1]}:{session.inside[2]}":
                raise Disagreement(f"{end} belongs to {session.inside}, the list says {one['inside']}")
        for end, session in self.by_outside.items():
            if session.life(now_s) is Life.ALIVE and end not in seen:
                raise Disagreement(f"{session.inside} as {end} is alive, and is not listed")

    # -- a new session --

    def _new(self, packet: Packet, inside: Inside, now_s: float, answer: Answer) -> None:
        if not set(self.addresses) - self.draining:
            self._dropped(answer, "pool_empty")
            return
        lives = {
            address: self._lives(address, inside, now_s)
            for address in self.addresses
            if address not in self.draining
        }
        if answer.verdict == "drop" and not any(Life.DEAD in of_ports for of_ports in lives.values()):
            self._dropped(answer, "no_port")
            self.refused += 1
            self.cursors = {(cursor + 1) % len(self.addresses) for cursor in self.cursors}
            return
        if answer.verdict != "forward":
            raise Disagreement(f"{inside} was refused while a port is free: {answer.line}")
        got = answer.packet
        allowed = {address for cursor in self.cursors for address in self._in_turn(cursor, lives)}
        if got.source_address not in allowed:
            raise Disagreement(f"{inside} got {got.source_address}, the next in turn is one of {allowed}")
        if got.sport not in self.ports:
            raise Disagreement(f"{inside} got port {got.sport}, outside of {self.ports}")
        outside = (inside[0], got.source_address, got.sport, inside[3], inside[4])
        holder = self.by_outside.get(outside)
        if holder:
            if holder.life(now_s) is Life.ALIVE:
                raise Disagreement(f"{inside} got {outside}, which {holder.inside} has")
            self._forget(holder)
        self._begin(packet, inside, outside, now_s, answer)
        if self.workers == 1:
            self.cursors = {self._after(got.source_address)}

    def _in_turn(self, cursor: int, lives: dict[str, list[Life]]) -> list[str]:
        """The addresses that may be taken: up to the first that surely has a free port."""
        allowed: list[str] = []
        for address in (*self.addresses[cursor:], *self.addresses[:cursor]):
            of_ports = lives.get(address, [])
            if Life.DEAD in of_ports:
                return [*allowed, address]
            if Life.UNSURE in of_ports:
                allowed.append(address)
        return allowed

    def _after(self, address: str) -> int:
        return (self.addresses.index(address) + 1) % len(self.addresses)

    def _lives(self, address: str, inside: Inside, now_s: float) -> list[Life]:
        """What is known of every port of the address towards this remote."""
        ends = ((inside[0], address, port, inside[3], inside[4]) for port in self.ports)
        holders = [self.by_outside.get(end) for end in ends]
        return [holder.life(now_s) if holder else Life.DEAD for holder in holders]

    def _begin(
        self, packet: Packet, inside: Inside, outside: Outside, now_s: float, answer: Answer
    ) -> Session:
        self._unchanged(packet, answer)
        session = Session(inside, outside, now_s, now_s)
        session.saw(packet, now_s, outbound=True)
        self.by_inside[inside] = self.by_outside[outside] = session
        return session

    # -- small things --

    def _reaches(self, packet: Packet, host: str, port: int, answer: Answer) -> None:
        got = answer.packet
        if (got.protocol, got.destination_address, got.dport) != (packet.protocol, host, port):
            raise Disagreement(f"{packet.destination} belongs to {host}:{port}, went to {got.destination}")
        if got.source_address != packet.source_address or (
            packet.protocol != ICMP and got.sport != packet.sport
        ):
            raise Disagreement(f"what {packet.source} sent says it is from {got.source}")
        self._unchanged(packet, answer)

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


@dataclass
class Mapping:
    """One outside port of one inside port. It lives as long as a session under it, and then may be held."""

    owner: tuple[int, str, int]  # protocol, host, port
    outside: tuple[int, str, int]
    sessions: list[Session] = field(default_factory=list)
    gone_s: float = 0.0  # when the last session that was forgotten had surely ended
    ended_s: float = 0.0  # ... had not surely ended yet before that
    noticed_s: float | None = None  # when the engine has surely seen that: the hold time counts from then

    def life(self, now_s: float) -> Life:
        return max((one.life(now_s) for one in self.sessions), key=lambda life: life.value, default=Life.DEAD)

    def add(self, session: Session) -> None:
        self.sessions.append(session)
        self.noticed_s = None

    def forget(self, session: Session) -> None:
        shortest, longest = session.timeouts_s()
        self.ended_s = max(self.ended_s, session.last_out_s + shortest - SLACK_S)
        self.gone_s = max(self.gone_s, session.last_s + longest + SLACK_S)
        self.sessions.remove(session)


class EndpointIndependentOracle(Oracle):
    """RFC 4787: one mapping for all remotes (REQ-1), paired addresses (REQ-2), a filter (REQ-8)."""

    def __init__(
        self,
        addresses: Sequence[str],
        ports: range,
        *,
        filtering: str,
        hold_s: int,
        sessions_per_host: int = 0,
    ) -> None:
        super().__init__(addresses, ports, sessions_per_host=sessions_per_host)
        self.filtering, self.hold_s = filtering, hold_s
        self.by_owner: dict[tuple[int, str, int], Mapping] = {}
        self.strewn: set[str] = set()  # hosts that have been on three addresses at once since they began
        self.by_port: dict[tuple[int, str, int], Mapping] = {}

    def _hold_of(self, protocol: int) -> int:
        """RFC 6888 REQ-8: TCP is exempt (A), and so are filters that would not let the old remotes in (C)."""
        return self.hold_s if self.filtering == "endpoint-independent" and protocol != TCP else 0

    def _holds(self, mapping: Mapping, now_s: float) -> Life:
        """Is the mapping's port still its own, by a session or by the hold time?"""
        life = mapping.life(now_s)
        if life is Life.ALIVE:
            return life
        hold_s = self._hold_of(mapping.owner[0])
        ended_s, gone_s = mapping.ended_s, mapping.gone_s
        for session in mapping.sessions:
            shortest, longest = session.timeouts_s()
            ended_s = max(ended_s, session.last_out_s + shortest - SLACK_S)
            gone_s = max(gone_s, session.last_s + longest + SLACK_S)
        if hold_s and now_s < ended_s + hold_s - SLACK_S:
            return Life.ALIVE
        noticed_s = now_s if mapping.noticed_s is None else mapping.noticed_s
        return Life.UNSURE if now_s < max(gone_s, noticed_s) + hold_s + SLACK_S else Life.DEAD

    def time_passes(self, now_ns: int) -> None:
        for mapping in self.by_owner.values():
            if mapping.life(now_ns / SECOND_NS) is not Life.DEAD:
                mapping.noticed_s = None
            elif mapping.noticed_s is None:
                mapping.noticed_s = now_ns / SECOND_NS

    def _forget(self, session: Session) -> None:
        super()._forget(session)
        mapping = self.by_owner.get(session.inside[:3])
        if mapping and session in mapping.sessions:
            mapping.forget(session)

    def _drop_mapping(self, mapping: Mapping) -> None:
        for session in list(mapping.sessions):
            self._forget(session)
        self.by_owner.pop(mapping.owner, None)
        self.by_port.pop(mapping.outside, None)

    def _admits(self, mapping: Mapping, packet_remote: str, now_s: float) -> Life:
        if self.filtering == "endpoint-independent":
            return Life.ALIVE
        if self.filtering != "address-dependent" or mapping.owner[0] == ICMP:
            return Life.DEAD
        lives = [one.life(now_s) for one in mapping.sessions if one.inside[3] == packet_remote]
        return max(lives, key=lambda life: life.value, default=Life.DEAD)

    def _uninvited(self, packet: Packet, now_s: float, answer: Answer) -> None:
        mapping = self.by_port.get((packet.protocol, packet.destination_address, packet.dport))
        life = mapping.life(now_s) if mapping else Life.DEAD
        if mapping is None or life is Life.DEAD or (packet.protocol == TCP and packet.tcp_flags != "S"):
            self._dropped(answer, "no_session")
            return
        admits = self._admits(mapping, packet.source_address, now_s)
        if answer.verdict == "forward" and admits is not Life.DEAD:
            self._reaches(packet, mapping.owner[1], mapping.owner[2], answer)
        elif life is Life.UNSURE and answer.reason == "no_session":
            self._dropped(answer, "no_session")
        elif admits is Life.ALIVE:
            raise Disagreement(f"{packet.source} may reach {mapping.owner} and did not: {answer.line}")
        else:
            self._dropped(answer, "filtered")

    def _midflow(self, packet: Packet, inside: Inside, now_s: float, answer: Answer) -> bool:
        """The answer to a SYN that the mapping has let in: SYN-ACK begins a session, RST only passes."""
        mapping = self.by_owner.get(inside[:3])
        if mapping is None or answer.verdict != "forward":
            if mapping is None or packet.tcp_flags not in ("SA", "R"):
                return False
            open_ = mapping.life(now_s) is Life.ALIVE
            if open_ and self._admits(mapping, inside[3], now_s) is Life.ALIVE:
                if packet.tcp_flags == "SA" and answer.reason in ("host_sessions",):
                    return self._is_over_limit(inside[1], now_s, answer)
                raise Disagreement(f"{inside} answers over {mapping.outside} and was refused: {answer.line}")
            return False
        if packet.tcp_flags not in ("SA", "R") or self._admits(mapping, inside[3], now_s) is Life.DEAD:
            return False
        if mapping.life(now_s) is Life.DEAD or answer.packet.source != ":".join(
            map(str, mapping.outside[1:])
        ):
            raise Disagreement(f"{inside} answered as {answer.packet.source}, its mapping is {mapping}")
        if packet.tcp_flags == "SA":
            outside = (*mapping.outside, *inside[3:])
            session = self._begin(packet, inside, outside, now_s, answer)
            session.flags_in.add("S")  # the one that it answers came in over the mapping
            mapping.add(session)
        return True

    def _new(self, packet: Packet, inside: Inside, now_s: float, answer: Answer) -> None:
        mapping = self.by_owner.get(inside[:3])
        held = self._holds(mapping, now_s) if mapping else Life.DEAD
        goes = answer.packet.source if answer.verdict == "forward" else ""
        if mapping and held is not Life.DEAD and goes == f"{mapping.outside[1]}:{mapping.outside[2]}":
            outside = (*mapping.outside, *inside[3:])
            mapping.add(self._begin(packet, inside, outside, now_s, answer))
            return
        if mapping and held is Life.ALIVE:
            raise Disagreement(f"{inside} has the mapping {mapping.outside}, but: {answer.line}")
        if mapping:
            self._drop_mapping(mapping)
        in_service = [address for address in self.addresses if address not in self.draining]
        free = [
            address
            for address in in_service
            for port in self.ports
            if self._port_life((inside[0], address, port), now_s) is Life.DEAD
        ]
        if answer.verdict == "drop" and not free:
            self._dropped(answer, "no_port" if in_service else "pool_empty")
            self.refused += 1
            return
        if answer.verdict != "forward":
            raise Disagreement(f"{inside} was refused while a port is free: {answer.line}")
        got = answer.packet
        if got.source_address not in in_service or got.sport not in self.ports:
            raise Disagreement(f"{inside} got {got.source}, which is not of {in_service}, {self.ports}")
        port = (inside[0], got.source_address, got.sport)
        if self._port_life(port, now_s) is Life.ALIVE:
            raise Disagreement(f"{inside} got {port}, which {self.by_port[port].owner} has")
        home = self._home_of(inside[1], now_s)
        if home in free and got.source_address != home:
            raise Disagreement(f"{inside} got {got.source}, its host is at {home}, where a port is free")
        if port in self.by_port:
            self._drop_mapping(self.by_port[port])
        mapping = Mapping(inside[:3], port)
        self.by_owner[inside[:3]] = self.by_port[port] = mapping
        mapping.add(self._begin(packet, inside, (*port, *inside[3:]), now_s, answer))
        if len(self._addresses_of(inside[1], now_s)) > 2:
            self.strewn.add(inside[1])

    def _port_life(self, port: tuple[int, str, int], now_s: float) -> Life:
        mapping = self.by_port.get(port)
        return self._holds(mapping, now_s) if mapping else Life.DEAD

    def _addresses_of(self, host: str, now_s: float) -> dict[str, Life]:
        """The public addresses that the host has sessions on, and how surely."""
        found: dict[str, Life] = {}
        for one in self.by_inside.values():
            if one.inside[1] == host and (life := one.life(now_s)) is not Life.DEAD:
                found[one.outside[1]] = max(found.get(one.outside[1], life), life, key=lambda one: one.value)
        return found

    def _home_of(self, host: str, now_s: float) -> str:
        """The public address of a host, where there is no doubt about it: of its first session, or where
        the others are when no session is left there.
        """
        addresses = self._addresses_of(host, now_s)
        if not addresses:
            self.strewn.discard(host)
        if len(addresses) != 1 or host in self.strewn:
            return ""
        (home, life), *_ = addresses.items()
        return home if life is Life.ALIVE else ""
