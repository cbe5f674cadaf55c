"""A pair that keeps every connection: two gateways, keepalived on their twins, and a link for sessions.

                          .2 [ gateway a ] .2
    client 100.64.0.10 ---|      | sync    |--- server 198.51.100.10
                          .3 [ gateway b ] .3

VRRP addresses 100.64.0.1 and 198.51.100.1 move together; the pool 198.51.100.200-203 belongs to who has them.
Here is also what may happen to a gateway (`Peer`), and who was master when (`mastered`).
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tests.gateway import DPDK_INTERFACES, Gateway, config
from tests.lab import Lab, Netns, Program, wait_until
from tests.traffic import CLIENT, SERVER

INSIDE, OUTSIDE = "100.64.0.1", "198.51.100.1"
POOL = "198.51.100.200"
KEY = "8f3c" * 16
SYNC = "192.0.2."
TEMPLATE = Path(__file__).parent.parent / "provision/templates/keepalived.conf.j2"
TUNSETQUEUE, IFF_MULTI_QUEUE, IFF_DETACH_QUEUE = 0x400454D9, 0x0100, 0x0400

REST = f"""\
pools:
  - {{name: public, addresses: [{POOL}-198.51.100.203], active_while: {OUTSIDE}}}
zones:
  - {{source: 100.64.0.0/16, pool: public}}
"""

# as provision/templates/keepalived.conf.j2 has it: the engine's word is added to the priority
HEAD = """\
global_defs {{
  router_id {name}
  vrrp_version 3
{scheduling}
}}
track_file drain {{
  file {drain}
  weight 0
  init_file 0
}}
track_file engine {{
  file {standing}
  weight 1
  init_file 0
}}
"""
GROUP = """\
vrrp_sync_group {group} {{
  group {{
    {group}_inside
    {group}_outside
  }}
  sync_group_tracking_weight
}}
"""
INSTANCE = """\
vrrp_instance {group}_{side} {{
  state BACKUP
  interface {side}0
  virtual_router_id {number}
  priority {priority}
  advert_int {advert_s}
  track_file {{
    drain
    engine
  }}
  virtual_ipaddress {{ {address}/24 }}
}}
"""


@dataclass(frozen=True)
class Group:
    """Two addresses that move together."""

    name: str
    inside: str
    outside: str
    number: int
    master: str = "a"  # who has the higher priority


ONE = Group("one", INSIDE, OUTSIDE, 51)


def scheduling() -> str:
    """How the fleet tool's template has keepalived scheduled."""
    lines = TEMPLATE.read_text().splitlines()
    found = [line for line in lines if re.match(r"\s+vrrp_(rt|rlimit|no_swap)", line)]
    assert found, f"{TEMPLATE} no longer says how keepalived is scheduled"
    return "\n".join(found)


def keepalived_text(
    name: str, groups: Sequence[Group], *, advert_s: float, drain: Path, standing: Path
) -> str:
    text = HEAD.format(name=name, drain=drain, standing=standing, scheduling=scheduling())
    for group in groups:
        text += GROUP.format(group=group.name)
        for number, (side, address) in enumerate((("inside", group.inside), ("outside", group.outside))):
            text += INSTANCE.format(
                group=group.name,
                side=side,
                number=group.number + number,
                priority=200 if group.master == name else 150,
                advert_s=advert_s,
                address=address,
            )
    return text


@dataclass
class Peer:
    """One gateway of the pair."""

    name: str
    number: int
    gateway: Gateway
    wires: Netns
    sessions: Path
    standing: Path  # what the engine tells VRRP
    drain: Path
    keepalived_argv: tuple[str, ...]
    keepalived: Program = field(init=False)
    monitor: Program = field(init=False)
    keepalived_starts: int = 0
    mute: list[tuple[float, float]] = field(default_factory=list)  # when nothing of it could be heard

    # --- what it is ---

    def has(self, address: str) -> bool:
        return f"inet {address}/" in self.gateway.space.ip("address show")

    def is_master(self) -> bool:
        return self.has(INSIDE) and self.has(OUTSIDE)

    def ours(self) -> bool:
        pools = self.gateway.show("pools")["pools"]
        return bool(pools[0]["active"])

    def in_sync(self) -> bool:
        answer = self.gateway.show("sync")
        return bool(answer["in_sync"]) and answer["waiting"] == 0 and answer["on_the_way"] == 0

    def compared_since(self, moment_s: float) -> bool:
        """Has every range been compared after that moment, and none differed?"""
        answer = self.gateway.show("sync")
        if not answer["in_sync"] or "compared_all_ms" not in answer:
            return False
        return bool(answer["compared_all_ms"] / 1000 < time.monotonic() - moment_s)

    # --- its programs ---

    def start_engine(self, program: Path | None = None) -> None:
        if program:
            self.gateway.program = program
        self.gateway.start("--sessions", str(self.sessions))
        self.can_be_heard()

    def kill_engine(self) -> None:
        self.mute.append((time.time(), float("inf")))
        self.gateway.daemon.process.kill()
        self.gateway.daemon.wait(timeout_s=10)

    def stop_engine(self) -> None:
        self.mute.append((time.time(), float("inf")))
        self.gateway.daemon.process.terminate()
        self.gateway.daemon.wait(timeout_s=15)

    def can_be_heard(self) -> None:
        if self.mute and self.mute[-1][1] == float("inf"):
            self.mute.append((self.mute.pop()[0], time.time()))

    def answers(self) -> bool:
        return not self.mute or self.mute[-1][1] != float("inf")

    def start_keepalived(self) -> None:
        # one that was killed left them, and its number may be in use again
        for argument in self.keepalived_argv:
            if "pid=" in argument:
                Path(argument.split("=")[1]).unlink(missing_ok=True)
        self.keepalived_starts += 1
        log = f"{self.name}-keepalived-{self.keepalived_starts}.log"
        self.keepalived = self.gateway.space.start(*self.keepalived_argv, log=log)

    def vrrp_pids(self) -> list[int]:
        """keepalived and its children."""
        parent = self.keepalived.process.pid
        with suppress(FileNotFoundError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            return [parent, *map(int, children)]
        return []

    def is_elected(self) -> bool:
        """By the word of the keepalived that runs now: one that was killed leaves its addresses behind."""
        return "Entering MASTER STATE" in self.keepalived.text()

    def kill_keepalived(self) -> None:
        """All of it at once: none of them can say goodbye."""
        for pid in self.vrrp_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.keepalived.wait(timeout_s=10)

    # --- what happens to it ---

    def fall_silent(self) -> None:
        """As when its power fails: nothing more is heard of it on either side."""
        for name in ("vin", "vout"):
            self.gateway.space.ip(f"link set {name} down")

    def return_(self) -> None:
        for name in ("vin", "vout"):
            self.gateway.space.ip(f"link set {name} up")

    def pull(self, side: str) -> None:
        """The cable of `side`: in, out or sync."""
        self.wires.ip(f"link set {side}{self.name} down")

    def plug(self, side: str) -> None:
        self.wires.ip(f"link set {side}{self.name} up")

    def power_off(self) -> None:
        for side in ("in", "out", "sync"):
            self.pull(side)
        self.kill_keepalived()
        self.kill_engine()
        self.sessions.unlink()
        for address, twin in ((INSIDE, "inside0"), (OUTSIDE, "outside0")):
            if self.has(address):
                self.gateway.space.ip(f"address delete {address}/24 dev {twin}")

    def power_on(self) -> None:
        for side in ("in", "out", "sync"):
            self.plug(side)
        self.start_engine()
        # keepalived 2.2.7 can miss a link that comes up while it starts, for ever
        links = self.gateway.space.ip
        wait_until(
            "both twins to be up",
            lambda: all("LOWER_UP" in links(f"link show {twin}") for twin in ("inside0", "outside0")),
        )
        self.start_keepalived()

    def freeze(self) -> None:
        """The whole gateway stands still."""
        self.mute.append((time.time(), float("inf")))
        for pid in (self.gateway.pid(), *self.vrrp_pids()):
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in (self.gateway.pid(), *self.vrrp_pids()):
            os.kill(pid, signal.SIGCONT)
        self.can_be_heard()

    # --- who was master when ---

    def mastered(self) -> list[tuple[float, float]]:
        """When it had the outside address and could say so, by the kernel's own word."""
        spans: list[tuple[float, float]] = []
        since_s = None
        for line in self.monitor.text().splitlines():
            if f"inet {OUTSIDE}/" not in line:
                continue
            stamp = re.match(r"\[(\S+)\] (Deleted )?", line)
            assert stamp, line
            at_s = datetime.fromisoformat(stamp[1]).timestamp()
            if stamp[2] and since_s is not None:
                spans.append((since_s, at_s))
                since_s = None
            elif not stamp[2] and since_s is None:
                since_s = at_s
        if since_s is not None:
            spans.append((since_s, time.time()))
        for began_s, ended_s in self.mute:
            spans = [
                part
                for first_s, last_s in spans
                for part in ((first_s, min(last_s, began_s)), (max(first_s, ended_s), last_s))
                if part[0] < part[1]
            ]
        return spans


@dataclass
class Pair:
    lab: Lab
    client: Netns
    server: Netns
    wires: Netns
    a: Peer
    b: Peer
    upgrade_to: Path | None = None  # the build that a fault of that name changes to

    def settle(self, master: Peer | None = None) -> None:
        """Until one is master alone (a, if it may) and both hold the same sessions."""
        master = master or self.a
        other = self.b if master is self.a else self.a
        wait_until(
            f"{master.name} to be master alone",
            lambda: master.is_master() and not other.has(OUTSIDE) and not other.has(INSIDE),
            deadline_s=60,
        )
        wait_until("the pool to be the master's", lambda: master.ours() and not other.ours(), deadline_s=30)
        wait_until("both to be in sync", lambda: self.a.in_sync() and self.b.in_sync(), deadline_s=60)

    def equal(self) -> None:
        moment_s = time.monotonic()
        both = (self.a, self.b)
        wait_until(
            "both to find no difference",
            lambda: all(peer.compared_since(moment_s) for peer in both),
            deadline_s=60,
        )

    def two_masters_s(self, since_s: float) -> float:
        """For how long since that moment (of time.time()) both had the address."""
        return sum(
            max(0.0, min(last_a, last_b) - max(first_a, first_b, since_s))
            for first_a, last_a in self.a.mastered()
            for first_b, last_b in self.b.mastered()
        )

    def close(self) -> None:
        for peer in (self.a, self.b):
            peer.keepalived.stop()
            peer.gateway.close()


def hold_twin(space: Netns, name: str) -> None:
    """A detached queue of the twin, as systemd's store has one: its carrier outlives the engine."""
    fd = space.open_tap(name, flags=IFF_MULTI_QUEUE)
    fcntl.ioctl(fd, TUNSETQUEUE, struct.pack("16sH22x", b"", IFF_DETACH_QUEUE))


def new_peer(
    lab: Lab,
    program: Path,
    wires: Netns,
    name: str,
    number: int,
    *,
    advert_s: float,
    sessions: int,
    groups: Sequence[Group],
    rest: str,
) -> Peer:
    space = lab.netns(name)
    for end, side in (("vin", "in"), ("vout", "out"), ("sync0", "sync")):
        lab.wire(space, end, wires, f"{side}{name}")
    space.ip(f"address add {SYNC}{number}/24 dev sync0")
    key = lab.directory / f"{name}.key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    # both may have other workers than the peer
    sync = f"sync: {{peer: {SYNC}{5 - number}, listen: {SYNC}{number}, key: file:{key}, hold_back: 1s}}\n"
    file = lab.directory / f"{name}.yaml"
    file.write_text(
        config(workers=number - 1, interfaces=DPDK_INTERFACES, sessions=sessions, rest=rest + sync)
    )
    control = Path("/tmp", f"{lab.prefix}-{name}.sock")
    table = Path("/dev/shm", f"{lab.prefix}-{name}.sessions")
    standing, drain = Path(f"{control}.vrrp"), lab.directory / f"{name}.drain"
    for path in (control, table, standing):
        lab.undo.callback(path.unlink, missing_ok=True)
    settings = lab.directory / f"{name}-keepalived.conf"
    settings.write_text(keepalived_text(name, groups, advert_s=advert_s, drain=drain, standing=standing))
    settings.chmod(0o600)
    pids = [f"--{kind}={lab.directory / f'{name}-{kind}'}" for kind in ("pid", "vrrp_pid", "checkers_pid")]
    argv = ("keepalived", "--dont-fork", "--log-console", "--vrrp", f"--use-file={settings}", *pids)
    gateway = Gateway(space, wires, wires, program, file, control, log=f"{name}-dsnatd")
    peer = Peer(name, number, gateway, wires, table, standing, drain, argv)
    peer.start_engine()
    peer.monitor = space.start("ip", "-ts", "-o", "monitor", "address", log=f"{name}-addresses.log")
    for twin, address in (("inside0", f"100.64.0.{number}"), ("outside0", f"198.51.100.{number}")):
        hold_twin(space, twin)
        space.ip(f"address add {address}/24 dev {twin}")
        space.ip(f"link set {twin} up")
    peer.start_keepalived()
    return peer


def new_pair(
    lab: Lab,
    program: Path,
    *,
    advert_s: float = 0.1,
    sessions: int = 8192,
    groups: Sequence[Group] = (ONE,),
    rest: str = REST,
) -> Pair:
    client, server, wires = (lab.netns(side) for side in ("client", "server", "wires"))
    a, b = (
        new_peer(
            lab,
            program,
            wires,
            name,
            number,
            advert_s=advert_s,
            sessions=sessions,
            groups=groups,
            rest=rest,
        )
        for name, number in (("a", 2), ("b", 3))
    )
    lab.wire(client, "eth0", wires, "inhost")
    lab.wire(server, "eth0", wires, "outhost")
    lab.bridge(wires, "inside", "ina", "inb", "inhost")
    lab.bridge(wires, "outside", "outa", "outb", "outhost")
    lab.bridge(wires, "sync", "synca", "syncb")
    client.ip(f"address add {CLIENT}/24 dev eth0")
    client.ip(f"route add default via {INSIDE}")
    server.ip(f"address add {SERVER}/24 dev eth0")
    pair = Pair(lab, client, server, wires, a, b)
    if len(groups) == 1:
        pair.settle()
    return pair
