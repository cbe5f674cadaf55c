"""Tells BIRD whether to announce this gateway: two devices that are there while the engine is well.

BIRD's static routes lead to them (bird.conf.j2), and it withdraws a route as soon as its device is gone. No
packet ever takes them. They are TUN devices that nobody made persistent, so they vanish with the process
that holds them: if this one dies, the gateway is withdrawn, whatever the reason.

    dsnat-in     routers inside may send their hosts' packets here
    dsnat-out    the slice is ours: replies come here

    state        dsnat-in  dsnat-out
    well         there     there
    drained      gone      there      asked for; sessions that still get here go on (of a pair: both stay)
    full         gone      there      for so long no new session found a port, and some wanted one
    ill          gone      gone       the engine does not answer, its numbers do not add up, or it does not
                                      have the addresses that bird.conf announces

Both of a pair announce the address that the master has: where packets go, VRRP says alone. A drained one that
withdrew could be quicker than the announcement of its peer, and the routers would have no way for a moment.

An engine that does not answer is ill after as long as BFD would wait for a silent neighbour, so that a
restart that is quicker than that moves no traffic. Well again it is only after it has stayed so (CALM_S).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Protocol

from .machine import Machine
from .protocol import Json

INSIDE, OUTSIDE = "dsnat-in", "dsnat-out"
LOOK_S = 0.1  # between two looks at the engine
PATIENCE_S = 0.9  # without BFD
POOLS_S = 1.0  # between two looks at its pools, which may be long
CALM_S = 3.0
LAG_S = 5.0  # the engine has new addresses before bird.conf does, or after it, while a change is applied
FULL_S = 5.0

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


class Devices(Protocol):
    def set(self, name: str, on: bool) -> None: ...


class Tuns:
    """The devices themselves. Closing one makes it go."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def set(self, name: str, on: bool) -> None:
        if on and name not in self._held:
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                    request = struct.pack("16sH22x", name.encode(), 0)
                    (flags,) = struct.unpack_from("H", fcntl.ioctl(s, SIOCGIFFLAGS, request), 16)
                    fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | IFF_UP))
            except OSError:
                os.close(descriptor)
                raise
            self._held[name] = descriptor
        elif not on and name in self._held:
            os.close(self._held.pop(name))


def announced(bird_conf: Path) -> list[IPv4Network]:
    """The slice as BIRD was told."""
    with contextlib.suppress(OSError):
        return [
            IPv4Network(prefix)
            for prefix in re.findall(rf'(?m)^    route (\S+) via "{OUTSIDE}";$', bird_conf.read_text())
        ]
    return []


def patience_s(bird_conf: Path) -> float:
    """How long BFD waits for a neighbour."""
    with contextlib.suppress(OSError):
        if found := re.search(r"interval (\d+) ms;\s*multiplier (\d+);", bird_conf.read_text()):
            return int(found[1]) * int(found[2]) / 1000
    return PATIENCE_S


def of_a_pair(bird_conf: Path) -> bool:
    """Whether what is announced leads to the address of the pair's master."""
    with contextlib.suppress(OSError):
        return re.search(r"(?m)^ *next hop address ", bird_conf.read_text()) is not None
    return False


class Watch:
    """Looks, and remembers since when."""

    def __init__(self, machine: Machine, bird_conf: Path, devices: Devices) -> None:
        self.machine, self.bird_conf, self.devices = machine, bird_conf, devices
        self.state = ""
        self._well_since: float | None = None
        self._silent_since: float | None = None
        self._apart_since: float | None = None
        self._made: tuple[int, float] = (0, 0.0)  # sessions created, and when there was a new one last
        self._refused: tuple[int, float] = (0, 0.0)
        self._pools_at = 0.0
        self._lacks, self._full = "", False

    def look(self) -> str:
        """One look: judges, sets the devices, and gives the state."""
        now = self.machine.clock()
        why = self._ill(now)
        if why is None:
            return self.state
        if why:
            self._well_since = None
            self._become("ill", why, inside=False, outside=False)
            return self.state
        self._well_since = now if self._well_since is None else self._well_since
        if self.state in ("", "ill") and now - self._well_since < (CALM_S if self.state else 0.0):
            return self.state
        if self.machine.is_drained():
            self._become(
                "drained", "an operator asked for it", inside=of_a_pair(self.bird_conf), outside=True
            )
        elif self._full:
            self._become("full", "no new session found a port", inside=False, outside=True)
        else:
            self._become("well", "", inside=True, outside=True)
        return self.state

    def _ill(self, now: float) -> str | None:
        """What is wrong, "" for nothing; None: not known yet, all stays as it is."""
        wait_s = patience_s(self.bird_conf)
        try:
            status = self.machine.engine({"cmd": "status"}, wait_s)
            if now - self._pools_at >= POOLS_S:
                self._pools_at = now
                self._judge(self.machine.engine({"cmd": "show", "what": "pools"}, wait_s)["pools"], now)
        except (OSError, ValueError, KeyError) as error:
            self._silent_since = now if self._silent_since is None else self._silent_since
            patient = self.state and self.machine.clock() - self._silent_since < wait_s
            return None if patient else f"the engine does not answer: {error}"
        self._silent_since = None
        if status.get("equation") is False:
            return "the engine's packets do not add up"
        if self._apart_since is not None and now - self._apart_since >= LAG_S:
            return f"the engine does not have {self._lacks}, which bird.conf announces"
        return ""

    def _judge(self, pools: list[Json], now: float) -> None:
        own = {IPv4Address(a["address"]) for pool in pools for a in pool["addresses"]}
        missing = [net for net in announced(self.bird_conf) if not all(address in own for address in net)]
        self._lacks = ", ".join(map(str, missing))
        self._apart_since = (self._apart_since or now) if missing else None
        made, refused = (sum(int(pool[key]) for pool in pools) for key in ("created", "refused"))
        if made != self._made[0]:
            self._made = made, now
        if refused != self._refused[0]:
            self._refused = refused, now
        # Somebody was refused since the last new session, and again just now; full until somebody is not.
        self._full = self._refused[1] > self._made[1] + FULL_S and (self._full or self._refused[1] == now)

    def _become(self, state: str, why: str, *, inside: bool, outside: bool) -> None:
        self.devices.set(OUTSIDE, outside)  # the slice first: replies must find us before packets do
        self.devices.set(INSIDE, inside)
        if state != self.state:
            self.state = state
            self.machine.log(f"announce: {state}{': ' if why else ''}{why}")


def announce(machine: Machine, bird_conf: Path) -> None:
    """Until it is ended."""
    watch = Watch(machine, bird_conf, Tuns())
    while True:
        watch.look()
        machine.sleep(LOOK_S)
