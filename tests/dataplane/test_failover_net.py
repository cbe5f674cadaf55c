"""A pair: two gateways with keepalived from Debian on their twins, an upstream host and an inside host.

                          .2 [ gateway a ] .2
    client 100.64.0.10 ---|                 |--- server 198.51.100.10
                          .3 [ gateway b ] .3

VRRP addresses 100.64.0.1 and 198.51.100.1 move together (a sync group). The pool 198.51.100.200-203 lies in
the outside prefix, so its addresses are known upstream by ARP, and belongs to who has 198.51.100.1. This pair
has no `sync`, and each probe of the client is a new session; pairs that share them are in test_pair_net.py.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.adverts import Adverts, figures
from tests.gateway import DPDK_INTERFACES, Gateway, config, ping
from tests.lab import Lab, Netns, Program, wait_until
from tests.pair import scheduling
from tests.traffic import CLIENT, SERVER

pytestmark = pytest.mark.net

INSIDE, OUTSIDE = "100.64.0.1", "198.51.100.1"
POOL = "198.51.100.200"
PORT = 7003

# with adverts each 0.1 s and priority 150 (RFC 9568 6.1)
MASTER_DOWN_S = 3 * 0.1 + (256 - 150) / 256 * 0.1

REST = f"""\
pools:
  - {{name: public, addresses: [{POOL}-198.51.100.203], active_while: {OUTSIDE}}}
zones:
  - {{source: 100.64.0.0/16, pool: public}}
"""

KEEPALIVED = """\
global_defs {{
  router_id {name}
  vrrp_version 3
{scheduling}
}}
vrrp_sync_group both {{
  group {{ inside outside }}
}}
vrrp_instance inside {{
  state BACKUP
  interface inside0
  virtual_router_id 51
  priority {priority}
  advert_int {advert_s}
  virtual_ipaddress {{ 100.64.0.1/24 }}
}}
vrrp_instance outside {{
  state BACKUP
  interface outside0
  virtual_router_id 52
  priority {priority}
  advert_int {advert_s}
  virtual_ipaddress {{ 198.51.100.1/24 }}
}}
"""


@dataclass
class Member:
    """One gateway of the pair."""

    name: str
    gateway: Gateway
    keepalived: Program

    def has(self, address: str) -> bool:
        return f"inet {address}/" in self.gateway.space.ip("address show")

    def is_master(self) -> bool:
        return self.has(INSIDE) and self.has(OUTSIDE)

    def ours(self) -> bool:
        pools = self.gateway.show("pools")["pools"]
        return bool(pools[0]["active"])

    def fall_silent(self) -> None:
        """As when its power fails: nothing more is heard of it on either side."""
        for name in ("vin", "vout"):
            self.gateway.space.ip(f"link set {name} down")

    def return_(self) -> None:
        for name in ("vin", "vout"):
            self.gateway.space.ip(f"link set {name} up")


@dataclass
class Pair:
    client: Netns
    server: Netns
    wires: Netns
    a: Member
    b: Member

    def close(self) -> None:
        for member in (self.a, self.b):
            member.keepalived.stop()
            member.gateway.close()


def new_member(
    space: Netns, program: Path, wires: Netns, name: str, number: int, advert_s: float, sessions: int
) -> Member:
    lab = space.lab
    file = lab.directory / f"{name}.yaml"
    file.write_text(config(interfaces=DPDK_INTERFACES, sessions=sessions, rest=REST))
    control = Path("/tmp", f"{lab.prefix}-{name}.sock")
    lab.undo.callback(control.unlink, missing_ok=True)
    gateway = Gateway(space, wires, wires, program, file, control, log=f"{name}-dsnatd")
    gateway.start()
    for twin, address in (("inside0", f"100.64.0.{number}"), ("outside0", f"198.51.100.{number}")):
        space.ip(f"address add {address}/24 dev {twin}")
        space.ip(f"link set {twin} up")
    text = KEEPALIVED.format(
        name=name, priority=200 - 50 * (number - 2), advert_s=advert_s, scheduling=scheduling()
    )
    settings = lab.directory / f"{name}-keepalived.conf"
    settings.write_text(text)
    settings.chmod(0o600)
    return Member(name, gateway, start_keepalived(space, name, "first"))


def start_keepalived(space: Netns, name: str, which: str) -> Program:
    directory = space.lab.directory
    settings = directory / f"{name}-keepalived.conf"
    pids = [f"--{kind}={directory / f'{name}-{kind}'}" for kind in ("pid", "vrrp_pid", "checkers_pid")]
    argv = ("keepalived", "--dont-fork", "--log-console", "--vrrp", f"--use-file={settings}", *pids)
    return space.start(*argv, log=f"{name}-keepalived-{which}.log")


def new_pair(lab: Lab, program: Path, *, advert_s: float, sessions: int = 10_000) -> Pair:
    client, server, wires, first, second = (
        lab.netns(side) for side in ("client", "server", "wires", "a", "b")
    )
    for name, space in (("a", first), ("b", second)):
        lab.wire(space, "vin", wires, f"in{name}")
        lab.wire(space, "vout", wires, f"out{name}")
    lab.wire(client, "eth0", wires, "inhost")
    lab.wire(server, "eth0", wires, "outhost")
    lab.bridge(wires, "inside", "ina", "inb", "inhost")
    lab.bridge(wires, "outside", "outa", "outb", "outhost")
    client.ip(f"address add {CLIENT}/24 dev eth0")
    client.ip(f"route add default via {INSIDE}")
    server.ip(f"address add {SERVER}/24 dev eth0")
    # wired before they speak: two that do not hear each other are both masters, for as long as wiring takes
    a = new_member(first, program, wires, "a", 2, advert_s, sessions)
    b = new_member(second, program, wires, "b", 3, advert_s, sessions)
    wait_until("a to be master", lambda: a.is_master() and not b.has(OUTSIDE), deadline_s=40)
    wait_until("the pool to be a's", lambda: a.ours() and not b.ours())
    return Pair(client, server, wires, a, b)


@dataclass
class Probe:
    """A new UDP session every 10 ms, answered by the server: when, and whether."""

    client: Netns
    server: Netns
    answered_s: list[float] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def echo(self) -> None:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as here:
            here.bind((SERVER, PORT))
            here.settimeout(0.2)
            while not self.stop.is_set():
                try:
                    data, who = here.recvfrom(100)
                except TimeoutError:
                    continue
                here.sendto(data, who)

    def ask(self) -> None:
        while not self.stop.is_set():
            with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as here:
                here.settimeout(0.01)
                try:
                    here.sendto(b"?", (SERVER, PORT))
                    here.recv(100)
                    self.answered_s.append(time.monotonic())
                    self.stop.wait(0.01)
                except OSError:
                    continue  # not answered within 10 ms, or no route for a moment

    def start(self) -> None:
        for space, job in ((self.server, self.echo), (self.client, self.ask)):
            threading.Thread(target=space.inside, args=(job,), daemon=True).start()
        wait_until("the first answers", lambda: len(self.answered_s) > 20)

    def gap_after(self, moment_s: float) -> float:
        """Seconds from `moment_s` to the first answer that came at least 0.2 s later, once there are some."""
        later = wait_until(
            "answers again",
            lambda: [at for at in self.answered_s if at > moment_s + 0.2][10:] or None,
            deadline_s=40,
        )
        assert later
        return next(at for at in self.answered_s if at > moment_s + 0.2) - moment_s


# RFC 9568: the backup waits three intervals and its skew, (256 - priority) / 256 of one
@pytest.mark.parametrize(("advert_s", "bound_s"), [(1, 6.0), (0.1, 1.5)], ids=["default", "100ms"])
def test_a_pair_fails_over_and_upstream_neighbour_entries_move(
    lab: Lab,
    program: Callable[[str], Path],
    advert_s: float,
    bound_s: float,
    record_property: Callable[[str, object], None],
) -> None:
    pair = new_pair(lab, program("dsnatd"), advert_s=advert_s)
    wait_until("a ping", lambda: " 3 received" in ping(pair.client, SERVER))

    def mac_upstream() -> str:
        found = re.search(r"lladdr (\S+)", pair.server.ip(f"neighbour show {POOL}"))
        return found[1] if found else ""

    before = mac_upstream()
    probe = Probe(pair.client, pair.server)
    probe.start()
    moment_s = time.monotonic()
    pair.a.fall_silent()
    gap_s = probe.gap_after(moment_s)
    record_property("failover_s", round(gap_s, 3))
    print(f"failover with adverts every {advert_s} s: {gap_s:.3f} s without an answer at the client")
    assert gap_s < bound_s
    assert pair.b.is_master()
    wait_until("the entry upstream to move", lambda: mac_upstream() not in ("", before))
    # split brain: a comes back thinking that it is master; the pair settles and the pool goes back
    pair.a.return_()
    wait_until("b to step back", lambda: pair.a.is_master() and not pair.b.has(OUTSIDE), deadline_s=40)
    wait_until("the pool to be a's alone", lambda: pair.a.ours() and not pair.b.ours())
    wait_until("the entry upstream to move back", lambda: mac_upstream() == before, deadline_s=30)
    wait_until("answers", lambda: " 3 received" in ping(pair.client, SERVER))
    probe.stop.set()
    pair.close()


def test_a_keepalived_that_is_restarted_gives_the_addresses_away_and_takes_them_back(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    pair = new_pair(lab, program("dsnatd"), advert_s=0.1)
    wait_until("a ping", lambda: " 3 received" in ping(pair.client, SERVER))
    pair.a.keepalived.stop()
    wait_until("the other to take over", lambda: pair.b.is_master() and pair.b.ours() and not pair.a.ours())
    wait_until("service by the other", lambda: " 3 received" in ping(pair.client, SERVER))
    pair.a.keepalived = start_keepalived(pair.a.gateway.space, "a", "second")
    wait_until(
        "the first to take them back", lambda: pair.a.is_master() and pair.a.ours() and not pair.b.ours()
    )
    wait_until("service by the first", lambda: " 3 received" in ping(pair.client, SERVER))
    pair.close()


def test_adverts_go_on_while_the_data_path_is_saturated_and_every_session_is_taken(
    lab: Lab,
    program: Callable[[str], Path],
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    pair = new_pair(lab, program("dsnatd"), advert_s=0.1, sessions=2_000)
    wait_until("a ping", lambda: " 3 received" in ping(pair.client, SERVER))
    seconds: float = request.config.getoption("--flood-seconds")
    members = {m.name: (m.gateway, lab.directory / f"{m.name}-vrrp_pid") for m in (pair.a, pair.b)}
    for _, pid in members.values():
        assert os.sched_getscheduler(int(pid.read_text())) & 3 == os.SCHED_RR, "keepalived has no priority"

    def flood() -> None:
        until = time.monotonic() + seconds
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(50)]
        while time.monotonic() < until:
            for number, one in enumerate(sockets):
                for port in range(1024, 1124):
                    one.sendto(b"flood", (SERVER, port + 100 * number))
                # to the gateway itself: through the twin, where the adverts go as well
                one.sendto(b"flood", (INSIDE, 9))
        for one in sockets:
            one.close()

    before = figures(members)
    adverts = Adverts(
        pair.a.gateway.space,
        pair.wires,
        pair.b.gateway.space,
        {"inside": "100.64.0.2", "outside": "198.51.100.2"},
    )
    said = {m.name: len(m.keepalived.text()) for m in (pair.a, pair.b)}
    pair.client.inside(flood)
    logs = {m.name: m.keepalived.text()[said[m.name] :] for m in (pair.a, pair.b)}
    gaps = adverts.stop()
    after = figures(members)
    told = "\n".join(
        [
            *map(str, gaps),
            *(f"{what}: {after[what] - before[what]}" for what in before if after[what] > before[what]),
            *(f"keepalived {name} said:\n{text}" for name, text in logs.items() if text),
        ]
    )
    print(told)
    record_property("longest_gap_s", max(gap.seconds for gap in gaps if gap.place == "delivered"))
    for gap in gaps:
        assert gap.seconds < MASTER_DOWN_S, f"the backup would have taken over\n{told}"
    assert not re.search(r"Entering \w+ STATE", "".join(logs.values())), f"somebody changed state\n{told}"
    assert pair.a.is_master()
    assert not pair.b.is_master()
    assert pair.a.gateway.reason("table_full") > 0, "the table was not full"
    pair.close()
