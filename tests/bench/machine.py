"""The machine that is measured: its facts, its huge pages, and whether it is quiet enough to be trusted."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
BUSY_SHARE = 0.25  # of all cores, taken by others


@dataclass(frozen=True)
class Facts:
    cpu: str
    cores: int
    kernel: str
    load: float  # average of the last minute
    huge_pages: int

    def row(self) -> dict[str, object]:
        return {"what": "machine.facts", **asdict(self)}


def facts() -> Facts:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return Facts(
        cpu=models[0] if models else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        load=round(os.getloadavg()[0], 2),
        huge_pages=int(HUGE_PAGES.read_text()),
    )


@dataclass(frozen=True)
class Clock:
    """Jiffies of all cores since boot."""

    idle: int
    stolen: int
    total: int


def clock() -> Clock:
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return Clock(idle=fields[3] + fields[4], stolen=fields[7], total=sum(fields))


def busy_share(before: Clock, after: Clock, own: float) -> float:
    """How much of the machine others used between two readings, `own` being what we used of it.
    Both are shares of all cores; stolen time counts as theirs.
    """
    total = after.total - before.total
    if total <= 0:
        return 0.0
    return max(0.0, 1 - (after.idle - before.idle) / total - own)


@contextmanager
def reserved_pages(wanted: int) -> Iterator[str]:
    """Reserves `wanted` pages of 2 MB more than there are, then gives so many back, whatever others have
    reserved meanwhile. Yields what is lacking.
    """
    before = int(HUGE_PAGES.read_text())
    if os.geteuid():
        yield "not root: huge pages cannot be reserved; run `sudo make bench`"
        return
    got = 0
    try:
        HUGE_PAGES.write_text(f"{before + wanted}\n")
        got = int(HUGE_PAGES.read_text()) - before
        lacks = (
            f"only {got} of {wanted} huge pages could be reserved; free some memory" if got < wanted else ""
        )
        yield lacks
    finally:
        HUGE_PAGES.write_text(f"{max(int(HUGE_PAGES.read_text()) - got, 0)}\n")


def ahead(*cores: int) -> list[str]:
    """Command prefix: only these cores, ahead of others where we may. For the leader of a session: where the
    kernel groups by session (sched_autogroup), a nice value counts only in there; the group has its own.
    """
    pin = ["taskset", "--cpu-list", ",".join(map(str, cores))]
    if os.geteuid():
        return pin
    group = 'echo -15 2>/dev/null >/proc/self/autogroup; exec "$@"'
    return ["sh", "-c", group, "sh", "nice", "-n", "-15", *pin]


def alone() -> list[str]:
    """The same, on the last core."""
    return ahead(max(os.sched_getaffinity(0)))
