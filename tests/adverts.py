"""Where the adverts of a master were seen, and how far apart.

    keepalived a --> twin --> engine a --> port --wire--> port --> engine b --> twin --> keepalived b
                 sent                             wire                          delivered

A tcpdump at each of the three places says by the kernel's own clock when an advert passed, however late
tcpdump itself gets a processor. A gap that is in `sent` already is keepalived's; one that begins at `wire` is
the master's engine, or the machine's between twin and port; one at `delivered` alone is the backup's.
`Waits` has the figures that go with it: how long each thread stood in line for a processor, and every count
of a frame that somebody in between may have lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

from tests.gateway import Gateway
from tests.lab import Netns, Program, wait_until

PLACES = ("sent", "wire", "delivered")


@dataclass(frozen=True)
class Gap:
    """The longest time without an advert."""

    place: str
    side: str
    seconds: float
    at_s: float  # after the first advert
    adverts: int

    def __str__(self) -> str:
        return (
            f"{self.side:7} {self.place:9} {self.adverts:5} adverts, "
            f"longest gap {self.seconds * 1000:4.0f} ms at {self.at_s:.1f} s"
        )


@dataclass
class Adverts:
    """Listens from the moment it is made. `source` is the master's own address, by side."""

    master: Netns
    wires: Netns
    backup: Netns
    source: dict[str, str]
    listeners: dict[tuple[str, str], Program] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for side, address in self.source.items():
            short = side.removesuffix("side")  # the names of the wires
            for place, space, interface, way in (
                ("sent", self.master, f"{side}0", "out"),
                ("wire", self.wires, f"{short}a", "in"),
                ("delivered", self.backup, f"{side}0", "in"),
            ):
                argv = ("tcpdump", "-n", "-tt", "-l", "-Q", way, "-i", interface)
                self.listeners[side, place] = space.start(
                    *argv,
                    *f"ip proto 112 and src {address}".split(),
                    log=f"adverts-{side}-{place}.log",
                    errors=f"adverts-{side}-{place}-errors.log",
                )
        for side, place in self.listeners:
            errors = self.master.lab.directory / f"adverts-{side}-{place}-errors.log"
            wait_until(f"tcpdump of {place}", partial(_listens, errors))

    def stop(self) -> list[Gap]:
        """The longest gap of every place, those that an advert passes first before the others."""
        for listener in self.listeners.values():
            listener.stop()
        return [self._gap(side, place, listener.text()) for (side, place), listener in self.listeners.items()]

    def _gap(self, side: str, place: str, text: str) -> Gap:
        seen_s = [float(at) for at in re.findall(r"^(\d+\.\d+) IP .*VRRP", text, re.MULTILINE)]
        assert len(seen_s) > 1, f"no adverts at {side} {place}: {text[-500:]}"
        seconds, before_s = max((b - a, a) for a, b in pairwise(seen_s))
        return Gap(place, side, seconds, before_s - seen_s[0], len(seen_s))


def _listens(errors: Path) -> bool:
    return "listening on" in errors.read_text()


def _threads(what: str, pid: int) -> Iterator[tuple[str, int]]:
    """Milliseconds that each thread of a process has waited for a processor so far."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, waited_ns = (task / "comm").read_text().strip(), (task / "schedstat").read_text().split()[1]
        yield f"{what}, {name}: ms waited for a processor", int(waited_ns) // 1_000_000


def _lost(what: str, gateway: Gateway) -> Iterator[tuple[str, int]]:
    for port in gateway.show("ports")["ports"]:
        name = f"{what}, {port['name']}"
        yield f"{name}: missed by the port", port["rx_missed"]
        yield f"{name}: refused by the port", port["tx_errors"]
        for direction in ("rx_dropped", "tx_dropped"):
            count = gateway.space.run("cat", f"/sys/class/net/{port['name']}/statistics/{direction}")
            yield f"{name}: {direction} of the twin", int(count)
    for reason in ("twin_full", "tx_full", "no_buffer"):
        yield f"{what}: {reason}", gateway.reason(reason)


def figures(gateways: dict[str, tuple[Gateway, Path]]) -> dict[str, int]:
    """All counts as they stand now; with each gateway the file that has its VRRP process's number."""
    found: dict[str, int] = {}
    for name, (gateway, pid) in gateways.items():
        found |= dict(_threads(f"keepalived {name}", int(pid.read_text())))
        found |= dict(_threads(f"dsnatd {name}", gateway.pid()))
        found |= dict(_lost(name, gateway))
    # one line for each processor; the second column counts what its backlog had no room for
    for number, line in enumerate(Path("/proc/net/softnet_stat").read_text().splitlines()):
        found[f"backlog of processor {number}: dropped"] = int(line.split()[1], 16)
    return found
