"""A pair that keeps every connection: two gateways, keepalived on their twins, and a link for sessions.

                          .2 [ gateway a ] .2
    client 100.64.0.10 ---|      | sync    |--- server 198.51.100.10
                          .3 [ gateway b ] .3

Connections live through whatever happens to a gateway: idle ones, and some that talk all the time. After each
fault the gateways themselves compare their tables, range by range. `--connections 10000 --talking 1000` is
the long run.
"""

from __future__ import annotations

import itertools
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gateway import Gateway
from tests.lab import Lab, wait_until
from tests.pair import OUTSIDE, Pair, Peer, new_pair
from tests.traffic import SERVER

pytestmark = pytest.mark.net

FIRST_PORT = 7010


@pytest.fixture
def pair(lab: Lab, program: Callable[[str], Path], request: pytest.FixtureRequest) -> Pair:
    option = request.config.getoption
    many = int(option("--connections")) + int(option("--talking")) > 2000
    advert_s = getattr(request, "param", 0.1)
    return new_pair(lab, program("dsnatd"), advert_s=advert_s, sessions=65536 if many else 8192)


@dataclass
class Connections:
    """TCP through the pair: `idle` that only wait, `talking` that send a byte when the last one came back."""

    pair: Pair | Gateway  # what has a client and a server
    idle: int
    talking: int
    port: int = FIRST_PORT
    sockets: list[socket.socket] = field(default_factory=list)
    echoed_s: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def echo(self) -> None:
        with (
            closing(socket.create_server((SERVER, self.port), backlog=4096)) as listener,
            selectors.DefaultSelector() as some,
        ):
            listener.setblocking(False)
            some.register(listener, selectors.EVENT_READ)
            while not self.stop.is_set():
                for ready, _ in some.select(0.2):
                    if ready.fileobj is listener:
                        try:
                            one, _ = listener.accept()
                        except OSError:
                            continue
                        one.setblocking(False)
                        some.register(one, selectors.EVENT_READ)
                        continue
                    one = ready.fileobj  # type: ignore[assignment]
                    try:
                        data = one.recv(100)
                        one.send(data)
                    except BlockingIOError:
                        continue
                    except OSError:
                        data = b""
                    if not data:
                        some.unregister(one)
                        one.close()

    def open(self) -> None:
        threading.Thread(target=self.pair.server.inside, args=(self.echo,), daemon=True).start()

        def connect() -> None:
            for _ in range(self.idle + self.talking):
                one = socket.create_connection((SERVER, self.port), timeout=20)
                one.settimeout(60)
                self.sockets.append(one)

        wait_until("the server to listen", lambda: f":{self.port}" in self.pair.server.run("ss", "-ltn"))
        self.pair.client.inside(connect)
        self.ask(self.sockets)
        assert not self.lost
        if self.talking:
            threading.Thread(target=self.talk, daemon=True).start()
            wait_until("the first echoes", lambda: len(self.echoed_s) > 2 * self.talking)

    def ask(self, some: list[socket.socket]) -> None:
        """A byte on each of them, and back."""
        for one in some:
            try:
                one.send(b"?")
            except OSError as error:
                self.lost.append(str(error))
        for one in some:
            try:
                if one.recv(100) != b"?":
                    self.lost.append("ended by the other side")
            except OSError as error:
                self.lost.append(str(error))

    def talk(self) -> None:
        """All the talking ones at once: the longest time without any echo is the dark time."""
        with selectors.DefaultSelector() as some:
            for one in self.sockets[self.idle :]:
                some.register(one, selectors.EVENT_READ)
                one.send(b"?")
            while not self.stop.is_set():
                for ready, _ in some.select(0.2):
                    one = ready.fileobj  # type: ignore[assignment]
                    assert isinstance(one, socket.socket)
                    try:
                        data = one.recv(100)
                        one.send(b"?")
                    except OSError as error:
                        data = b""
                        self.lost.append(str(error))
                    if not data:
                        some.unregister(one)
                        continue
                    self.echoed_s.append(time.monotonic())
                self.stop.wait(0.002)

    def dark_s(self, since_s: float) -> float:
        """The longest time without an echo since that moment; waits until echoes come."""
        many = 20 * max(1, self.talking)
        later = wait_until(
            "echoes again",
            lambda: [at for at in self.echoed_s if at > since_s + 0.3][many:] and self.echoed_s,
            deadline_s=90,
        )
        at = [since_s, *(one for one in later if one > since_s)]
        return max(after - before for before, after in itertools.pairwise(at))

    def all_live(self) -> None:
        self.ask(self.sockets[: self.idle])
        assert not self.lost, (
            f"{len(self.lost)} of {self.idle + self.talking} connections lost: {self.lost[:3]}"
        )

    def close(self) -> None:
        self.stop.set()
        for one in self.sockets:
            one.close()


@pytest.fixture
def connections(pair: Pair, request: pytest.FixtureRequest) -> Iterator[Connections]:
    option = request.config.getoption
    these = Connections(pair, int(option("--connections")), int(option("--talking")))
    these.open()
    pair.equal()
    yield these
    these.close()


@pytest.mark.parametrize("pair", [0.1], indirect=True, ids=["100ms"])
def test_every_connection_survives_whatever_happens_to_a_gateway(
    pair: Pair, connections: Connections, record_property: Callable[[str, object], None]
) -> None:
    a, b = pair.a, pair.b

    def survived(what: str, since_s: float) -> None:
        dark_s = connections.dark_s(since_s)
        connections.all_live()
        print(f"{what}: 0 of {connections.idle + connections.talking} lost, dark for {dark_s:.3f} s")
        record_property(what, round(dark_s, 3))

    # the master falls silent; the backup has every session already
    moment_s = time.monotonic()
    a.fall_silent()
    wait_until("b to be master", b.is_master, deadline_s=20)
    survived("master silent", moment_s)
    # it comes back, and takes the traffic again
    moment_s = time.monotonic()
    a.return_()
    wait_until("a to be master", lambda: a.is_master() and not b.has(OUTSIDE), deadline_s=40)
    survived("master returns", moment_s)
    pair.equal()
    # the engine is killed: the next one goes on with the sessions; keepalived sees nothing
    moment_s = time.monotonic()
    a.kill_engine()
    a.start_engine()
    survived("engine killed", moment_s)
    pair.equal()
    # the backup is rebooted with an empty table while traffic runs, and gets everything
    b.kill_engine()
    b.sessions.unlink()
    b.start_engine()
    wait_until("b to be in sync", lambda: a.in_sync() and b.in_sync(), deadline_s=40)
    pair.equal()
    moment_s = time.monotonic()
    a.fall_silent()
    wait_until("b to be master", b.is_master, deadline_s=20)
    survived("backup rebooted, then master silent", moment_s)
    connections.close()
    a.return_()
    wait_until("a to be master", lambda: a.is_master() and not b.has(OUTSIDE), deadline_s=40)
    pair.equal()
    pair.close()


@pytest.mark.parametrize("pair", [0.1], indirect=True, ids=["100ms"])
def test_the_link_for_sessions_may_lose_break_or_freeze(
    pair: Pair, connections: Connections, record_property: Callable[[str, object], None]
) -> None:
    a, b = pair.a, pair.b
    moment_s = time.monotonic()
    # as on a bad link, in both directions; connections opened meanwhile are told as well
    lose = (
        "INPUT",
        "-i",
        "sync0",
        "-m",
        "statistic",
        "--mode",
        "random",
        "--probability",
        "0.3",
        "-j",
        "DROP",
    )
    for peer in (a, b):
        peer.gateway.space.run("iptables", "-A", *lose)
    more = Connections(pair, 50, 0)
    more.port += 1
    more.open()
    wait_until("all to be told over a bad link", lambda: a.in_sync() and b.in_sync(), deadline_s=60)

    def dropped(peer: Peer) -> int:
        rules = peer.gateway.space.run("iptables", "-nvxL", "INPUT")
        return int(rules.splitlines()[2].split()[0])

    wait_until("something to be lost", lambda: dropped(a) and dropped(b))
    for peer in (a, b):
        peer.gateway.space.run("iptables", "-D", *lose)
    # pulled for a while: said, nothing is lost by it, and told when it is back
    a.pull("sync")
    wait_until("the silence to be seen", lambda: not a.gateway.show("sync")["connected"])
    assert not a.in_sync()
    late = Connections(pair, 50, 0)
    late.port += 2
    late.open()
    a.plug("sync")
    wait_until("both to be in sync again", lambda: a.in_sync() and b.in_sync(), deadline_s=60)
    pair.equal()
    # the whole gateway stands still, and goes on later as if nothing had been
    a.freeze()
    moment_s = time.monotonic()
    wait_until("b to be master", b.is_master, deadline_s=20)
    dark_s = connections.dark_s(moment_s)
    for these in (connections, more, late):
        these.all_live()
    a.thaw()
    wait_until("a to be master alone", lambda: a.is_master() and not b.has(OUTSIDE), deadline_s=40)
    for these in (connections, more, late):
        these.all_live()
    record_property("frozen", round(dark_s, 3))
    print(f"master frozen: 0 of {connections.idle + connections.talking + 100} lost, dark for {dark_s:.3f} s")
    pair.equal()
    # both die at once, and come back on their tables
    for peer in (a, b):
        peer.kill_engine()
    moment_s = time.monotonic()
    for peer in (a, b):
        peer.start_engine()
    dark_s = connections.dark_s(moment_s)
    for these in (connections, more, late):
        these.all_live()
    record_property("both killed", round(dark_s, 3))
    print(f"both engines killed: 0 lost, dark for {dark_s:.3f} s")
    pair.equal()
    for these in (connections, more, late):
        these.close()
    pair.close()


@pytest.mark.parametrize("pair", [0.1], indirect=True, ids=["100ms"])
def test_a_returning_master_waits_until_it_has_every_session(pair: Pair) -> None:
    a, b = pair.a, pair.b
    # a loses everything, and the link that would give it back
    a.pull("sync")
    a.fall_silent()
    wait_until("b to be master", b.is_master, deadline_s=20)
    a.kill_engine()
    a.sessions.unlink()
    a.keepalived.stop()
    a.start_engine()
    wait_until("a to say that it lacks sessions", lambda: a.standing.read_text() == "-100\n")
    a.start_keepalived()
    a.return_()
    wait_until("a to be a backup", lambda: "Entering BACKUP STATE" in a.keepalived.text())
    moment_s = time.monotonic()
    wait_until("a to have had the time", lambda: time.monotonic() - moment_s > 2)
    assert b.is_master(), "a preempted without the sessions"
    assert not a.has(OUTSIDE)
    # the link is back: a hears all, and takes over
    a.plug("sync")
    wait_until("a to be master", lambda: a.is_master() and not b.has(OUTSIDE), deadline_s=40)
    assert a.standing.read_text() == "0\n"
    pair.equal()
    pair.close()
