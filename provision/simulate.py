"""What does not fit on one machine: 64 gateways, ten million hosts, members that come and go; and sizing.

    python -m provision.simulate                  the table of a year of changes; --svg FILE the picture
    python -m provision.simulate --sizing         how large a cluster must be, from 10 Gbit/s to 10 Tbit/s

A router knows a flow by a hash. Here the hash is one of a million cells, and each host has its flow in one of
them; how a router chooses is a function from cells to members, so that what moves when members change can
be counted exactly for the hosts drawn. Slices are cut by the code that a push uses (slices.py). *Ideal* is
what must move: the flows of who goes, or the share of who comes.
"""

from __future__ import annotations

import argparse
import math
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from itertools import pairwise
from pathlib import Path

from provision import slices
from provision.slices import Range

BUCKETS = 1 << 14  # of a resilient group
HASHINGS = ("resilient", "threshold", "modulo")
POOL_STARTS = int(IPv4Address("198.18.0.0"))
PORTS = 64512  # of an address, towards one destination


@dataclass(frozen=True)
class Step:
    """One change of members: which share of all flows arrives elsewhere, by hashing and at best."""

    name: str
    members: int
    moved: Mapping[str, float]
    ideal: float
    uneven: Mapping[str, float]  # the fullest gateway over the mean
    addresses: float  # share of addresses that have another owner
    prefixes: int  # most that one gateway announces
    spread: float  # largest slice over the smallest


def draw(hosts: int, seed: int, bits: int) -> array[int]:
    """How many hosts have their flow in each cell."""
    cells = array("L", bytes(array("L").itemsize << bits))
    chance = random.Random(seed)
    left = hosts
    while left:
        some = min(left, 1 << 20)
        numbers = array("I")
        numbers.frombytes(chance.randbytes(some * numbers.itemsize))
        shift = numbers.itemsize * 8 - bits
        for number in numbers:
            cells[number >> shift] += 1
        left -= some
    return cells


class Resilient:
    """A table of buckets. Only buckets of a member that went, or as many as a new one needs, change."""

    def __init__(self, members: Sequence[str]) -> None:
        self.table = [members[i % len(members)] for i in range(BUCKETS)]

    def change(self, members: Sequence[str]) -> None:
        have: dict[str, list[int]] = {member: [] for member in members}
        homeless: list[int] = []
        for bucket, member in enumerate(self.table):
            have.get(member, homeless).append(bucket)
        share = BUCKETS / len(members)
        for listed in have.values():
            while len(listed) > math.ceil(share):
                homeless.append(listed.pop())
        for bucket in homeless:
            poorest = min(have, key=lambda member: len(have[member]))
            have[poorest].append(bucket)
            self.table[bucket] = poorest


def owners(hashing: str, members: Sequence[str], resilient: Resilient, bits: int) -> Callable[[int], str]:
    """cell -> the member that a router chooses."""
    count = len(members)
    if hashing == "resilient":
        table, shift = resilient.table, bits - BUCKETS.bit_length() + 1
        return lambda cell: table[cell >> shift]
    if hashing == "modulo":
        return lambda cell: members[cell % count]
    return lambda cell: members[cell * count >> bits]


def history(gateways: int, seed: int) -> list[tuple[str, list[str]]]:
    """Changes as they come in a year: growth, failures, maintenance, a member that is replaced."""
    chance = random.Random(seed)
    now = [f"gw{n:03}" for n in range(gateways)]
    found = [("begin", list(now))]

    def turn(name: str) -> None:
        found.append((name, sorted(now)))

    for number in range(3):
        gone = chance.choice(now)
        now.remove(gone)
        turn(f"{gone} fails")
        now.append(gone)
        turn(f"{gone} is back")
        now.append(f"gw{gateways + number:03}")
        turn(f"{now[-1]} is new")
    for _ in range(2):
        now.remove(chance.choice(now))
    turn("two go at once")
    for number in range(3, 11):
        now.append(f"gw{gateways + number:03}")
    turn("eight are new")
    return found


def simulate(gateways: int, hosts: int, addresses: int, seed: int) -> list[Step]:
    bits = 20 if hosts > 1_000_000 else BUCKETS.bit_length() - 1
    cells = draw(hosts, seed, bits)
    year = history(gateways, seed)
    pool: list[Range] = [(POOL_STARTS, POOL_STARTS + addresses - 1)]
    resilient = Resilient(year[0][1])
    owned = slices.divide(pool, dict.fromkeys(year[0][1], 1), {})
    maps = {h: list(map(owners(h, year[0][1], resilient, bits), range(1 << bits))) for h in HASHINGS}
    steps: list[Step] = []
    for (_, before), (name, members) in pairwise(year):
        resilient.change(members)
        moved: dict[str, float] = {}
        uneven: dict[str, float] = {}
        for hashing in HASHINGS:
            fresh = list(map(owners(hashing, members, resilient, bits), range(1 << bits)))
            lost = 0
            load = dict.fromkeys(members, 0)
            for count, old, new in zip(cells, maps[hashing], fresh, strict=True):
                load[new] += count
                if old != new:
                    lost += count
            moved[hashing] = lost / hosts
            uneven[hashing] = max(load.values()) * len(members) / hosts
            maps[hashing] = fresh
        after = slices.divide(pool, dict.fromkeys(members, 1), owned)
        kept = sum(slices.size(slices.common(owned.get(m, ()), ranges)) for m, ranges in after.items())
        sizes = [slices.size(ranges) for ranges in after.values()]
        went, came = set(before) - set(members), set(members) - set(before)
        steps.append(
            Step(
                name,
                len(members),
                moved,
                len(went) / len(before) + len(came) / len(members),
                uneven,
                1 - kept / addresses,
                max(len(slices.prefixes(ranges)) for ranges in after.values()),
                max(sizes) / min(sizes),
            )
        )
        owned = after
    return steps


def table(steps: Sequence[Step]) -> str:
    heads = ("change", "members", "ideal", *HASHINGS, "addresses", "prefixes", "fullest")
    rows: list[tuple[str, ...]] = [heads]
    for step in steps:
        moved = (f"{step.moved[h]:.2%}" for h in HASHINGS)
        rest = (f"{step.addresses:.2%}", str(step.prefixes), f"{step.uneven['resilient']:.3f}")
        rows.append((step.name, str(step.members), f"{step.ideal:.2%}", *moved, *rest))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


COLOURS = {"ideal": "#888888", "resilient": "#2a7f62", "threshold": "#c98a1b", "modulo": "#b03a48"}


def picture(steps: Sequence[Step]) -> str:
    """Share of flows that arrive elsewhere, one group of bars for each change."""
    width, height, left, foot = 980, 420, 60, 110
    group = (width - left - 20) / len(steps)
    bar = group / 6

    def y(share: float) -> float:
        return (height - foot) * (1 - share) + 10

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for percent in (0, 25, 50, 75, 100):
        at = y(percent / 100)
        out.append(f'<line x1="{left}" x2="{width - 20}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{percent} %</text>')
    for number, step in enumerate(steps):
        start = left + number * group
        for place, (name, share) in enumerate([("ideal", step.ideal), *step.moved.items()]):
            x, top = start + (place + 1) * bar, y(share)
            out.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar * 0.9:.1f}" height="{y(0) - top:.1f}" '
                f'fill="{COLOURS[name]}"/>'
            )
        x, foot_y = start + group / 2, y(0) + 14
        out.append(
            f'<text x="{x:.1f}" y="{foot_y:.1f}" text-anchor="end" '
            f'transform="rotate(-35 {x:.1f} {foot_y:.1f})">{step.name}</text>'
        )
    for place, (name, colour) in enumerate(COLOURS.items()):
        x = left + place * 130
        out.append(f'<rect x="{x}" y="{height - 18}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{x + 18}" y="{height - 8}">{name}</text>')
    out.append("</svg>\n")
    return "\n".join(out)


# ---- how many gateways
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What hosts do in the busy hour, and what a gateway is. Change them to yours."""

    mbit_per_host: float = 2.5
    sessions_per_host: int = 100
    session_s: float = 60.0  # how long one lives
    hottest: float = 0.05  # share of sessions to the busiest single destination
    packet_bytes: int = 800
    nic_gbit: float = 100.0
    full: float = 0.7  # how far links and ports may be used
    packet_cycles: int = 400  # in and out of the port included
    session_cycles: int = 540
    core_ghz: float = 2.6
    session_bytes: int = 96
    hosts_per_address: int = 640


def sizing(gbits: Sequence[float], need: Need | None = None) -> list[tuple[str, ...]]:
    """One row for each rate; one gateway more than needed, so that one may be away."""
    need = need or Need()
    rows: list[tuple[str, ...]] = []
    for gbit in gbits:
        hosts = gbit * 1000 / need.mbit_per_host
        sessions = hosts * need.sessions_per_host
        new = sessions / need.session_s
        active = math.ceil(gbit / (need.nic_gbit * need.full))
        packets = gbit * 1e9 / 8 / need.packet_bytes
        cycles = (packets * need.packet_cycles + new * need.session_cycles) / active
        cores = math.ceil(cycles / (need.core_ghz * 1e9 * need.full))
        ports = math.ceil(sessions * need.hottest / (PORTS * need.full))
        addresses = max(ports, math.ceil(hosts / need.hosts_per_address))
        memory = sessions / active * need.session_bytes
        rows.append(
            (
                f"{gbit:g} G" if gbit < 1000 else f"{gbit / 1000:g} T",
                _short(hosts),
                _short(sessions),
                _short(new),
                _short(packets),
                f"{active} + 1",
                str(cores),
                f"{_short(memory)}B",
                _short(addresses),
                str(ports),
            )
        )
    return rows


SIZING_HEADS = (
    *("traffic", "hosts", "sessions", "new/s", "packets/s"),
    *("gateways", "cores each", "table each", "addresses", "of these for the busiest destination"),
)
RATES = (10, 40, 100, 400, 1000, 4000, 10_000)


def _short(number: float) -> str:
    for limit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{name}"
    return f"{number:.3g}"


def sizing_table() -> str:
    rows = [SIZING_HEADS, tuple("---" for _ in SIZING_HEADS), *sizing(RATES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Members of a large cluster come and go; how large it must be."
    )
    parser.add_argument("--gateways", type=int, default=64)
    parser.add_argument("--hosts", type=int, default=10_000_000)
    parser.add_argument("--addresses", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--svg", type=Path, help="write the picture here")
    parser.add_argument("--sizing", action="store_true")
    options = parser.parse_args()
    if options.sizing:
        print(sizing_table())
        return
    steps = simulate(options.gateways, options.hosts, options.addresses, options.seed)
    print(table(steps))
    hottest = options.hosts * Need.sessions_per_host * Need.hottest
    worst = max(step.uneven["resilient"] * step.spread for step in steps)
    ideal = hottest / options.addresses / PORTS
    print(
        f"ports towards the busiest destination: {ideal:.1%} of all at best, "
        f"{ideal * worst:.1%} at the fullest gateway"
    )
    if options.svg is not None:
        options.svg.write_text(picture(steps))


if __name__ == "__main__":
    main()
