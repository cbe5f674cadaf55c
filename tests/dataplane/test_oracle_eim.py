"""Random traffic through endpoint-independent pools, judged packet by packet by a model of two dictionaries.

`Model` is told each packet and the answer to it, and says what is wrong. It knows UDP and echo: hosts that
write to remotes, remotes that write to anybody, neighbours that meet over the gateway (hairpin), ICMP errors,
and time that passes. Around a time-out it takes either answer (`life` is None) and learns from it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tests.packet import ICMP, UDP, Packet, icmp_error, ping, pong, read, udp
from tests.replay import EIM, SECOND_NS, Answer, Bench, Start, configuration

SLACK_S, HOLD_S, PORTS = 3, 120, range(5000, 5040)
OPEN, BY_ADDRESS, BY_PORT = "endpoint-independent", "address-dependent", "address-and-port-dependent"

Socket = tuple[int, str, int]  # protocol, address, port; of an echo: the identifier
Remote = tuple[str, int]  # address, port; of an echo: 0


@dataclass
class Session:
    last_out_s: float
    timeout_s: float

    def life(self, now_s: float) -> bool | None:
        if now_s < self.last_out_s + self.timeout_s - SLACK_S:
            return True
        return None if now_s < self.last_out_s + self.timeout_s + SLACK_S else False


@dataclass
class Mapping:
    host: Socket
    outside: Socket
    sessions: dict[Remote, Session] = field(default_factory=dict)

    def life(self, now_s: float) -> bool | None:
        lives = [session.life(now_s) for session in self.sessions.values()]
        return True if True in lives else None if None in lives else False

    def wrote(self, now_s: float, remote: Remote, timeout_s: float) -> None:
        session = self.sessions.get(remote)
        if session is None or session.life(now_s) is False:
            session = self.sessions[remote] = Session(now_s, timeout_s)
        session.last_out_s = now_s

    def heard(self, now_s: float, remote: Remote) -> None:
        session = self.sessions.get(remote)
        if session and session.life(now_s) is not False and self.host[0] == UDP:
            session.timeout_s = 300

    def rests(self, now_s: float) -> bool:
        """Surely still on hold, once it is over."""
        ended_s = max(session.last_out_s + session.timeout_s for session in self.sessions.values())
        return now_s < ended_s + HOLD_S - SLACK_S

    def occupies(self, now_s: float) -> bool:
        """Its port may still be refused to others."""
        ended_s = max(session.last_out_s + session.timeout_s for session in self.sessions.values())
        return now_s < ended_s + HOLD_S + 2 * SLACK_S


@dataclass
class Model:
    filtering: str
    by_host: dict[Socket, Mapping] = field(default_factory=dict)
    by_outside: dict[Socket, Mapping] = field(default_factory=dict)

    def sent(self, now_s: float, packet: Packet, answer: Answer) -> None:
        host: Socket = (packet.protocol, packet.source_address, packet.sport)
        remote: Remote = (packet.destination_address, 0 if packet.protocol == ICMP else packet.dport)
        mapping = self.by_host.get(host)
        life = mapping.life(now_s) if mapping else False
        if answer.verdict == "drop":
            assert life is not True, f"{host} has {mapping} and was refused: {answer.line}"
            assert answer.reason == "no_port", answer.line
            holding = sum(
                one.occupies(now_s) for (kind, _, _), one in self.by_outside.items() if kind == host[0]
            )
            assert holding >= len(PORTS), f"{host} was refused with {holding} of {len(PORTS)} ports in use"
            return
        got: Socket = (packet.protocol, answer.packet.source_address, answer.packet.sport)
        if mapping and life is True:
            assert got == mapping.outside, f"{host} had {mapping.outside} and got {got}"
        if not mapping or got != mapping.outside:
            self._given(now_s, host, got)
            if mapping:
                self.by_outside.pop(mapping.outside, None)
            mapping = self.by_host[host] = self.by_outside[got] = Mapping(host, got)
        assert mapping is not None
        mapping.wrote(now_s, remote, 60 if packet.protocol == ICMP else 120)

    def _given(self, now_s: float, host: Socket, got: Socket) -> None:
        assert got[2] in PORTS
        if got[0] == UDP:
            full = sum(1 for one in self.by_outside if one[0] == UDP) > len(PORTS) // 2
            assert full or got[2] % 2 == host[2] % 2, "parity is kept while there is room"
        holder = self.by_outside.get(got)
        if holder is None:
            return
        assert holder.life(now_s) is not True, f"{got} is {holder.host}'s and was given to {host}"
        if self.filtering == OPEN and holder.host != host:
            assert not holder.rests(now_s), f"{got} rests and was given to {host}"
        self.by_host.pop(holder.host, None)

    def came(self, now_s: float, packet: Packet, answer: Answer) -> None:
        """A packet from outside to a public address and port."""
        to: Socket = (packet.protocol, packet.destination_address, packet.dport)
        remote: Remote = (packet.source_address, 0 if packet.protocol == ICMP else packet.sport)
        mapping = self.by_outside.get(to)
        admitted = self.admits(now_s, mapping, remote)
        if admitted is True:
            assert answer.verdict == "forward", f"{remote} may write to {mapping}: {answer.line}"
        if admitted is False:
            assert answer.verdict == "drop", f"{remote} may not write to {mapping}: {answer.line}"
            assert answer.reason in ("no_session", "filtered")
        if answer.verdict == "forward":
            assert mapping is not None
            assert (answer.packet.destination_address, answer.packet.dport) == mapping.host[1:]
            mapping.heard(now_s, remote)

    def admits(self, now_s: float, mapping: Mapping | None, remote: Remote) -> bool | None:
        if mapping is None:
            return False
        if self.filtering == OPEN:
            return mapping.life(now_s)
        near = [
            session.life(now_s)
            for (address, port), session in mapping.sessions.items()
            if address == remote[0] and (port == remote[1] or self.filtering == BY_ADDRESS)
        ]
        return True if True in near else None if None in near else False


def step(chance: random.Random, model: Model, replay: Bench) -> None:
    now_s = replay.now_ns / SECOND_NS
    host = f"100.64.0.{chance.randint(1, 6)}"
    remote = f"198.51.100.{chance.randint(1, 3)}"
    kind = chance.choices(
        ("udp", "ping", "reply", "visitor", "error", "hairpin", "time"), (8, 3, 6, 4, 2, 2, 2)
    )[0]
    known = list(model.by_outside.values())
    if kind == "udp":
        packet = udp(f"{host}:{chance.randint(1000, 1007)} > {remote}:{chance.randint(80, 82)}")
        answer = replay.send(packet)
        model.sent(now_s, read(packet), answer)
    elif kind == "ping":
        packet = ping(f"{host} > {remote}", ident=chance.randint(1, 7))
        answer = replay.send(packet)
        model.sent(now_s, read(packet), answer)
    elif kind == "time":
        for _ in range(chance.choice((1, 3, 20, 70, 150))):  # a hold time begins when the end is noticed
            replay.wait(1)
    elif known:
        mapping = chance.choice(known)
        protocol, address, port = mapping.outside
        if kind == "reply":
            source, source_port = chance.choice(list(mapping.sessions))
            if source == address:
                return  # from outside nobody comes with an address of the pool
        else:
            source, source_port = remote, chance.randint(80, 82)
        if kind == "hairpin":
            if protocol == UDP:
                meet(now_s, model, replay, host, mapping)
        elif kind == "error":
            quote_error(now_s, replay, mapping, chance)
        else:
            packet = (
                udp(f"{source}:{source_port} > {address}:{port}")
                if protocol == UDP
                else pong(f"{source} > {address}", ident=port)
            )
            model.came(now_s, read(packet), replay.send(packet, on="outside0"))


def meet(now_s: float, model: Model, replay: Bench, host: str, theirs: Mapping) -> None:
    """A neighbour that has a mapping writes to another's: a packet sent by one that comes to the other."""
    mine = model.by_host.get((UDP, host, 1000))
    if not mine or mine.life(now_s) is not True:
        return
    answer = replay.send(udp(f"{host}:1000 > {theirs.outside[1]}:{theirs.outside[2]}"))
    mine.wrote(now_s, theirs.outside[1:], 120)
    admitted = model.admits(now_s, theirs, mine.outside[1:])
    if answer.verdict == "drop":
        assert admitted is not True, f"{mine} may write to {theirs}: {answer.line}"
        assert answer.reason in ("no_session", "filtered")
        return
    assert admitted is not False, f"{mine} may not write to {theirs}: {answer.line}"
    assert answer.out[0].interface == "inside0"
    assert (answer.packet.source_address, answer.packet.sport) == mine.outside[1:]
    assert (answer.packet.destination_address, answer.packet.dport) == theirs.host[1:]
    theirs.heard(now_s, mine.outside[1:])


def quote_error(now_s: float, replay: Bench, mapping: Mapping, chance: random.Random) -> None:
    """An error about a packet of a live session reaches the host with that packet inside."""
    protocol, address, port = mapping.outside
    (remote, remote_port), session = chance.choice(list(mapping.sessions.items()))
    if protocol != UDP or remote.startswith("203."):
        return
    error = icmp_error("192.0.2.1 > " + address, 3, 3, udp(f"{address}:{port} > {remote}:{remote_port}"))
    answer = replay.send(error, on="outside0")
    if session.life(now_s):
        assert answer.packet.quoted is not None
        assert answer.packet.quoted.source == f"{mapping.host[1]}:{mapping.host[2]}"
    elif mapping.life(now_s) is False:
        assert answer.reason == "icmp_no_session"


@pytest.mark.parametrize("filtering", [OPEN, BY_ADDRESS, BY_PORT])
@pytest.mark.parametrize("run", range(4))
def test_the_engine_and_the_model_agree(bench: Start, filtering: str, run: int, seed: int) -> None:
    ports = f"{PORTS[0]}-{PORTS[-1]}"
    replay = bench(configuration(EIM, f"filtering: {filtering}", addresses="203.0.113.1", ports=ports))
    chance, model = random.Random(f"{seed} {filtering} {run}"), Model(filtering)
    for _ in range(1500):
        step(chance, model, replay)
    assert replay.ctl(cmd="show", what="counters")["equation"] is True
