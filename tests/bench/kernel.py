"""What the kernel's own NAT costs at the same numbers of sessions: nftables SNAT with conntrack, on veths.

    sender 100.64/10 --- eth0 | inside [ gateway ] outside | eth0 --- sink (drops at ingress)

One sender (io/bench/send.c) on one core; a veth's receiving end works in the sender's time. Three contenders
in turn, on the same wires: `sender` (the gateway drops at ingress: what sending alone costs), `forward`
(routes, no conntrack) and `snat`. Figures are TSC cycles of processor time for a packet, the sender's own
taken off.
conntrack's limit is raised for the run, and its hash table to a bucket for every two sessions, so that the
kernel is measured at its best; both are put back.

Run by `make bench` (root). Exit status: 0 measured, 1 not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench import machine
from tests.bench.ports import tsc_hz
from tests.bench.run import store, stored
from tests.lab import Lab, LabError, Netns, new_lab, run

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".build/engine/dsnat-send-bench"
SIZES = (1, 10_000, 100_000, 1_000_000, 4_000_000, 8_000_000)
QUICK_SIZES = (10_000,)
LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
BUCKETS = Path("/sys/module/nf_conntrack/parameters/hashsize")
PATIENCE_S = 300
BYTES_PER_SESSION = 512  # with its extensions, and room

DROP = "table netdev bench { chain c { type filter hook ingress device %s priority 0; drop; }; }"
SNAT = """table ip bench { chain c { type nat hook postrouting priority srcnat;
oifname "outside" snat to 203.0.113.0-203.0.113.63; }; }"""


class Wires:
    """The three namespaces; one contender at a time."""

    def __init__(self, lab: Lab) -> None:
        self.sender, self.gateway, self.sink = (lab.netns(side) for side in ("sender", "gateway", "sink"))
        lab.wire(self.sender, "eth0", self.gateway, "inside")
        lab.wire(self.gateway, "outside", self.sink, "eth0")
        self.sink.run("nft", DROP % "eth0")
        for name in ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"):
            self.gateway.run("sysctl", "-qw", name)
        self.gateway.run("sysctl", "-qw", "net.ipv4.conf.inside.rp_filter=0")
        self.gateway.ip("address add 100.127.255.253/30 dev inside")
        self.gateway.ip("address add 198.51.100.1/24 dev outside")
        mac = self.sink.run("cat", "/sys/class/net/eth0/address").strip()
        self.gateway.ip(f"neigh replace 198.51.100.10 lladdr {mac} dev outside nud permanent")
        self.gateway.ip("route add 198.18.0.0/15 via 198.51.100.10")
        self.gateway.ip("route add 100.64.0.0/10 via 100.127.255.254")
        self.mac = self.gateway.run("cat", "/sys/class/net/inside/address").strip()
        self.softirq = ksoftirqd(max(os.sched_getaffinity(0)))

    def arrived(self) -> int:
        return int(self.gateway.run("cat", "/sys/class/net/outside/statistics/tx_packets"))

    def send(self, flows: int, windows: int) -> tuple[float, list[float]]:
        """Nanoseconds for a packet: of a new flow, and in each window."""
        argv = [*machine.alone(), str(PROGRAM), "eth0", self.mac, str(flows), str(windows), self.softirq]
        said = run(["setsid", "--wait", *self.sender.argv(*argv)], timeout_s=900)
        words = [line.split() for line in said.splitlines()]
        return float(words[0][1]), [float(word[1]) for word in words[1:]]


def ksoftirqd(core: int) -> str:
    for task in Path("/proc").glob("[0-9]*/comm"):
        if task.read_text().strip() == f"ksoftirqd/{core}":
            return task.parent.name
    return ""


@contextmanager
def rules(space: Netns, text: str) -> Iterator[None]:
    family, name = text.split()[1:3]
    space.run("nft", text, timeout_s=PATIENCE_S)  # it waits for the kernel to clear millions of sessions away
    try:
        yield
    finally:
        space.run("nft", "delete", "table", family, name, timeout_s=PATIENCE_S)


@contextmanager
def room_for(sessions: int) -> Iterator[None]:
    """conntrack's limit and buckets are the machine's, not the namespace's."""
    before = [(path, path.read_text()) for path in (LIMIT, BUCKETS)]
    try:
        for path, wanted in ((LIMIT, sessions * 2), (BUCKETS, max(sessions // 2, 65536))):
            if int(path.read_text()) < wanted:
                path.write_text(f"{wanted}\n")
        yield
    finally:
        for path, text in before:
            path.write_text(text)


def enough_memory(sessions: int) -> bool:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 > 2 * sessions * BYTES_PER_SESSION


def measure(lab: Lab, flows: int, rounds: int, windows: int) -> list[dict[str, Any]]:
    wires, cycles = Wires(lab), tsc_hz() / 1e9
    floor: list[float] = []
    found: dict[str, list[float]] = {"forward": [], "snat": []}
    new: list[float] = []
    with room_for(flows):
        for turn in range(rounds):
            with rules(wires.gateway, DROP % "inside"):
                floor += wires.send(min(flows, 65536), windows)[1]
            found["forward"] += wires.send(min(flows, 65536), windows)[1]
            with rules(wires.gateway, SNAT):
                wires.gateway.run("sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=3600")
                before = wires.arrived()
                first, all_ = wires.send(flows, windows)
                share = (wires.arrived() - before) / (flows + 65536 * windows)
            found["snat"] += all_
            if turn == 0:
                new.append(first)
            if share < 0.99:
                print(f"  kernel, {flows:,} sessions: only {share:.0%} of the packets left", file=sys.stderr)
    base = min(floor)
    rows = [row(f"kernel.{name}", flows, cycles, figures, base) for name, figures in found.items()]
    if flows > 1:
        rows.append(row("kernel.snat.new_session", flows, cycles, new, base))
    return rows


def row(what: str, flows: int, cycles: float, figures: Sequence[float], base: float) -> dict[str, Any]:
    low, middle = ((one(figures) - base) * cycles for one in (min, statistics.median))
    both = {"cycles_min": round(low), "cycles_median": round(middle)}
    return {"what": what, "sessions": flows, **both, "windows": len(figures)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernel", description="The kernel's own NAT.")
    parser.add_argument("--quick", action="store_true", help="one size, one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=5)
    options = parser.parse_args()
    if os.geteuid():
        print("the kernel's NAT is not measured: namespaces need root", file=sys.stderr)
        return 0
    failed, rows = 0, list[dict[str, Any]]()
    print("\nkernel: nftables SNAT on veths, cycles of processor time per packet without the sender's")
    ours = {one["sessions"]: one for one in stored("core.inside_to_outside.udp")}
    for flows in QUICK_SIZES if options.quick else SIZES:
        if not enough_memory(flows):
            print(f"  {flows:>9,} sessions: left out, not enough memory")
            continue
        try:
            with ExitStack() as undo:
                lab = undo.enter_context(new_lab(Path(undo.enter_context(tempfile.TemporaryDirectory()))))
                some = measure(lab, flows, 1 if options.quick else options.rounds, options.windows)
        except LabError as error:  # the other sizes are worth having
            print(f"  {flows:>9,} sessions: could not be measured: {error}", file=sys.stderr)
            failed = 1
            continue
        rows += some
        text = ", ".join(
            f"{one['what'].removeprefix('kernel.')} {one['cycles_min']} / {one['cycles_median']}"
            for one in some
        )
        snat = next(one for one in some if one["what"] == "kernel.snat")
        if flows in ours:
            ratio = snat["cycles_min"] / ours[flows]["cycles_min"]
            text += f"; the core takes {ours[flows]['cycles_min']:.0f}: {ratio:.0f} times less, without I/O"
        print(f"  {flows:>9,} sessions: {text}", flush=True)
    store("kernel.", rows)
    return failed


if __name__ == "__main__":
    sys.exit(main())
