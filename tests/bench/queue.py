"""What the netfilter-queue path costs beside a program that accepts everything, and beside the kernel's NAT.

    sender 100.64.0.10 --- inside0 [ gateway ] outside0 --- server 198.51.100.10

One sender floods; each contender forwards as much as it can; the packets that arrive at the server in a
window are counted by the kernel. The contenders take turns, window by window, so that a disturbance meets
all alike.

    dsnatd      the release build on the queue path: the whole NAT
    batch       accepts all, 32 packets a system call, one verdict for all: the floor of any queue program
    one         accepts all, one system call for each packet and each verdict
    nft         nftables SNAT with conntrack, no queue

Two figures: packets a second, which only means something on a quiet machine, because sender, kernel and
contender share its cores; and the processor time that the contender spends on a packet, from receiving it to
the kernel's having sent it (the verdict's system call does that), which a busy machine changes little. The
goal is judged by the latter. Exit status: 0 measured, 1 not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.run import store
from tests.gateway import Gateway, config, interfaces, new_gateway
from tests.lab import Program, new_lab, wait_until
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build/engine"
QUEUE = "27400"
FLOWS = "64"
GOAL = 0.85  # of the accept-everything rate

SNAT = """\
table ip bench {
  chain out {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "outside0" snat to 203.0.113.1-203.0.113.4
  }
}
"""


def arrived(gateway: Gateway) -> int:
    return int(gateway.server.run("cat", "/sys/class/net/eth0/statistics/rx_packets"))


@dataclass(frozen=True)
class Window:
    packets_per_s: float
    ns_per_packet: float  # of the contender's processor time; 0 for the kernel's own


def spent_ns(program: Program | None) -> int:
    """Processor time of all threads so far."""
    if not program:
        return 0
    threads = Path(f"/proc/{program.process.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads)


def window(gateway: Gateway, contender: Program | None, seconds: float) -> Window:
    """While the sender floods."""
    argv = (str(BUILD / "dsnat-queue-bench"), "flood", SERVER, FLOWS, str(seconds + 1))
    sender = gateway.client.start(*argv, log=f"flood-{time.monotonic_ns()}.log")
    start = arrived(gateway)
    wait_until("the flood to arrive", lambda: arrived(gateway) > start)
    time.sleep(0.2)  # the queue fills
    before, start_s, start_ns = arrived(gateway), time.monotonic(), spent_ns(contender)
    time.sleep(seconds)
    after, end_s, end_ns = arrived(gateway), time.monotonic(), spent_ns(contender)
    sender.wait(timeout_s=seconds + 10)
    return Window((after - before) / (end_s - start_s), (end_ns - start_ns) / (after - before))


@contextmanager
def dsnatd(gateway: Gateway) -> Iterator[Program | None]:
    gateway.start()
    yield gateway.daemon
    gateway.daemon.process.terminate()
    gateway.daemon.wait(timeout_s=20)


@contextmanager
def accept(gateway: Gateway, how: str) -> Iterator[Program | None]:
    """Behind the rules that dsnatd has left."""
    argv = (str(BUILD / "dsnat-queue-bench"), "accept", QUEUE, how)
    program = gateway.space.start(*argv, log=f"accept-{time.monotonic_ns()}.log")
    yield program
    program.stop()


@contextmanager
def nft(gateway: Gateway) -> Iterator[Program | None]:
    rules = gateway.space.run("nft", "list", "table", "ip", "dsnat")
    file = gateway.file.with_name("snat.nft")
    file.write_text(SNAT)
    gateway.space.run("nft", "delete", "table", "ip", "dsnat", timeout_s=300)
    gateway.space.run("nft", "-f", str(file), timeout_s=300)  # others' conntracks may be cleared just now
    yield None
    gateway.space.run("nft", "delete", "table", "ip", "bench")
    assert "dsnat" in rules  # the next dsnatd brings them back


CONTENDERS: dict[str, Callable[[Gateway], AbstractContextManager[Program | None]]] = {
    "dsnatd": dsnatd,
    "batch": lambda gateway: accept(gateway, "batch"),
    "one": lambda gateway: accept(gateway, "one"),
    "nft": nft,
}


def measure(windows: int, seconds: float) -> dict[str, list[Window]]:
    found: dict[str, list[Window]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as directory, new_lab(Path(directory)) as lab:
        text = config(interfaces=interfaces("nfqueue"))
        gateway = new_gateway(lab, BUILD / "dsnatd", text, path="nfqueue")
        gateway.daemon.process.terminate()
        gateway.daemon.wait(timeout_s=20)
        for _ in range(windows):
            for name, begin in CONTENDERS.items():
                with begin(gateway) as contender:
                    found[name].append(window(gateway, contender, seconds))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.queue", description="The queue path, in ratios."
    )
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    options = parser.parse_args()
    if os.geteuid():
        print("the queue path is not measured: namespaces need root", file=sys.stderr)
        return 0
    found = measure(options.windows, options.seconds)
    print(
        "\nnetfilter-queue path: 64-byte packets, one direction, one queue (median of windows taken in turn)"
    )
    rate = {name: statistics.median(one.packets_per_s for one in all_) for name, all_ in found.items()}
    cost = {name: statistics.median(one.ns_per_packet for one in all_) for name, all_ in found.items()}
    rows = []
    for name in found:
        against = "  ".join(
            f"{rate[name] / rate[other]:5.2f} x {other:6}" for other in found if other != name
        )
        spent = f"{cost[name]:6.0f} ns a packet" if cost[name] else " " * 15
        print(f"  {name:8} {rate[name] / 1000:8.0f} kpps   {against}   {spent}")
        figures = {"packets_per_s": round(rate[name]), "ns_per_packet": round(cost[name])}
        rows.append({"what": f"queue.{name}", **figures, "windows": len(found[name])})
    for floor in ("batch", "one"):
        ratio = cost[floor] / cost["dsnatd"]
        verdict = "met" if ratio >= GOAL else "not met"
        print(
            f"  dsnatd does {ratio:.2f} of the packets of {floor} in the same time (goal {GOAL}: {verdict})"
        )
    store("queue.", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
