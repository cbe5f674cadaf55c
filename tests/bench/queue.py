"""What the netfilter-queue path costs beside a program that accepts everything, and beside the kernel's NAT.

    sender 100.64.0.10 --- inside0 [ gateway ] outside0 --- server 198.51.100.10

One sender floods; each contender forwards as much as it can; the packets that arrive at the server in a
window are counted by the kernel. The contenders take turns, window by window, so that a disturbance meets
all alike.

    dsnatd      the release build on the queue path: the whole NAT
    batch       accepts all, 32 packets a system call, one verdict for all: the floor of any queue program
    one         accepts all, one system call for each packet and each verdict
    nft         nftables SNAT with conntrack, no queue

Only ratios mean anything: sender, kernel and contender share the machine's cores. Exit status: 0 measured,
1 not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import machine
from tests.gateway import Gateway, config, interfaces, new_gateway
from tests.lab import new_lab, wait_until
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build/engine"
OUT = ROOT / ".build/bench"
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


def window(gateway: Gateway, seconds: float) -> float:
    """Packets a second at the server, while the sender floods."""
    argv = (str(BUILD / "dsnat-queue-bench"), "flood", SERVER, FLOWS, str(seconds + 1))
    sender = gateway.client.start(*argv, log=f"flood-{time.monotonic_ns()}.log")
    start = arrived(gateway)
    wait_until("the flood to arrive", lambda: arrived(gateway) > start)
    time.sleep(0.2)  # the queue fills
    before, start_s = arrived(gateway), time.monotonic()
    time.sleep(seconds)
    after, end_s = arrived(gateway), time.monotonic()
    sender.wait(timeout_s=seconds + 10)
    return (after - before) / (end_s - start_s)


@contextmanager
def dsnatd(gateway: Gateway) -> Iterator[None]:
    gateway.start()
    yield
    gateway.daemon.process.terminate()
    gateway.daemon.wait(timeout_s=20)


@contextmanager
def accept(gateway: Gateway, how: str) -> Iterator[None]:
    """Behind the rules that dsnatd has left."""
    argv = (str(BUILD / "dsnat-queue-bench"), "accept", QUEUE, how)
    program = gateway.space.start(*argv, log=f"accept-{time.monotonic_ns()}.log")
    yield
    program.stop()


@contextmanager
def nft(gateway: Gateway) -> Iterator[None]:
    rules = gateway.space.run("nft", "list", "table", "ip", "dsnat")
    file = gateway.file.with_name("snat.nft")
    file.write_text(SNAT)
    gateway.space.run("nft", "delete", "table", "ip", "dsnat")
    gateway.space.run("nft", "-f", str(file))
    yield
    gateway.space.run("nft", "delete", "table", "ip", "bench")
    assert "dsnat" in rules  # the next dsnatd brings them back


CONTENDERS: dict[str, Callable[[Gateway], object]] = {
    "dsnatd": dsnatd,
    "batch": lambda gateway: accept(gateway, "batch"),
    "one": lambda gateway: accept(gateway, "one"),
    "nft": nft,
}


def measure(windows: int, seconds: float) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as directory, new_lab(Path(directory)) as lab:
        text = config(interfaces=interfaces("nfqueue"))
        gateway = new_gateway(lab, BUILD / "dsnatd", text, path="nfqueue")
        gateway.daemon.process.terminate()
        gateway.daemon.wait(timeout_s=20)
        for _ in range(windows):
            for name, begin in CONTENDERS.items():
                with begin(gateway):  # type: ignore[attr-defined]
                    rates[name].append(window(gateway, seconds))
    return rates


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
    before = machine.clock()
    rates = measure(options.windows, options.seconds)
    busy = machine.busy_share(before, machine.clock(), own=1)
    print(
        "\nnetfilter-queue path: 64-byte packets, one direction, one queue (median of windows taken in turn)"
    )
    medians = {name: statistics.median(found) for name, found in rates.items()}
    rows = []
    for name, rate in medians.items():
        against = {other: rate / medians[other] for other in medians if other != name}
        ratios = "  ".join(f"{ratio:5.2f} x {other}" for other, ratio in against.items())
        print(f"  {name:8} {rate / 1000:8.0f} kpps   {ratios}")
        rows.append({"what": f"queue.{name}", "packets_per_s": round(rate), "windows": len(rates[name])})
    verdict = "met" if medians["dsnatd"] >= GOAL * medians["batch"] else "not met"
    print(
        f"  goal: dsnatd at least {GOAL} of batch: {verdict}; others used {max(0.0, busy):.0%} of the machine"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "queue.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
