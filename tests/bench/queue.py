"""What the netfilter-queue path costs beside a program that accepts everything, and beside the kernel's NAT.

    sender 100.64.0.10 --- inside0 [ gateway ] outside0 --- server 198.51.100.10

The contenders take turns, window by window, so that a disturbance meets all alike.

    dsnatd      the release build on the queue path: the whole NAT
    batch       accepts all, 32 packets a system call, one verdict for all: the floor of any queue program
    back        accepts all, 32 packets a system call, with each verdict the packet's bytes: the floor of a
                program that changes packets
    one         accepts all, one system call for each packet and each verdict
    nft         nftables SNAT with conntrack, no queue

Three figures, each in windows of its own:

    full queue  8,000 packets wait in the queue while the contender stands still (SIGSTOP); it goes on, and
                the processor time that it needs for them is taken, from receiving to the kernel's having sent
                the packet (the verdict's system call does that). No sender takes part, and a busy machine
                changes little: the goal is judged by this one
    steady      packets come at a rate that all keep up with, and all processor time that the gateway needs
                for one is taken: the contender's, and the kernel's. For that the inside interface's receive
                work is in a thread of its own (threaded NAPI), whose clock nobody else moves. It and the
                contender have a core to themselves, by real-time priority, it first; the sender has another
                one and sends 192 packets at a time. So all find the same bursts, whatever else the machine
                does. By this one NAT in a program is compared with NAT in the kernel
    flood       a sender sends as fast as it can; the packets that arrive in a second. Sender, kernel and
                contender share the machine's cores, so on two of them this is as much about the sender

On a veth "sent" means that the server's kernel has taken it, in the same system call, so the server drops
the datagrams first thing: the errors that it would answer with have a route to the pool but none to a host
inside, and would be a cost of the translating contenders alone. Exit status: 0 measured, 1 not.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tests.bench.run import store
from tests.gateway import Gateway, config, interfaces, new_gateway
from tests.lab import LabError, Program, new_lab, wait_until
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build/engine"
QUEUE = "27400"
FLOWS = "64"
GOAL = 0.85  # of the accept-everything rate
FULL = 8000  # packets: a little less than the shortest queue
DRAINS = 4  # in each window
STEADY, STEADY_PER_S = 20_000, 100_000

SNAT = """\
table ip bench {
  chain out {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "outside0" snat to 203.0.113.1-203.0.113.4
  }
}
"""


SINK = """table ip sink {
  chain first {
    type filter hook prerouting priority raw; policy accept;
    udp dport 9 drop
  }
}
"""


def arrived(gateway: Gateway) -> int:
    return int(gateway.server.run("cat", "/sys/class/net/eth0/statistics/rx_packets"))


def spent_ns(program: Program) -> int:
    """Processor time of all threads so far."""
    threads = Path(f"/proc/{program.process.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads)


def flood(gateway: Gateway, seconds: float, *count: str) -> Program:
    argv = (str(BUILD / "dsnat-queue-bench"), "flood", SERVER, FLOWS, str(seconds), *count)
    return gateway.client.start(*argv, log=f"flood-{time.monotonic_ns()}.log")


def rate(gateway: Gateway, seconds: float) -> float:
    """Packets a second while the sender floods."""
    start = arrived(gateway)
    sender = flood(gateway, seconds + 1)
    wait_until("the flood to arrive", lambda: arrived(gateway) > start)
    time.sleep(0.2)  # the queue fills
    before, start_s = arrived(gateway), time.monotonic()
    time.sleep(seconds)
    after, end_s = arrived(gateway), time.monotonic()
    sender.wait(timeout_s=seconds + 10)
    return (after - before) / (end_s - start_s)


def waiting(gateway: Gateway) -> int:
    """Packets in the kernel's queue; -1 as long as nobody listens."""
    listing = gateway.space.run("cat", "/proc/net/netfilter/nfnetlink_queue").split()
    return int(listing[2]) if listing else -1


def drained(gateway: Gateway, contender: Program) -> float:
    """Nanoseconds that a packet of a full queue takes."""
    wait_until("an empty queue", lambda: waiting(gateway) == 0)
    contender.process.send_signal(signal.SIGSTOP)
    start, before_ns = arrived(gateway), spent_ns(contender)
    sender = flood(gateway, 30, str(FULL))
    if sender.wait(timeout_s=40):
        raise LabError(f"the sender failed: {sender.text()[-500:]}")
    count = waiting(gateway)
    if not FULL * 0.9 < count <= FULL:
        raise LabError(f"{count} of {FULL} packets wait in the queue: {sender.text()[-500:]}")
    contender.process.send_signal(signal.SIGCONT)
    wait_until("the packets", lambda: arrived(gateway) >= start + count)
    return (spent_ns(contender) - before_ns) / count


@contextmanager
def kernel_thread(gateway: Gateway) -> Iterator[int]:
    """Gives the inside interface's receive work a thread of its own: its number."""
    gateway.space.run("ethtool", "-K", "inside0", "gro", "on")  # a veth has NAPI only for this
    gateway.space.run("sh", "-c", "echo 1 > /sys/class/net/inside0/threaded")
    found = []
    for task in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if task.read_text().startswith("napi/inside0-"):
                found.append(int(task.parent.name))
    newest = max(found)  # there may be other labs
    alone(newest, 1, 2)
    yield newest
    gateway.space.run("ethtool", "-K", "inside0", "gro", "off")


def alone(thread: int, core: int, priority: int) -> None:
    os.sched_setaffinity(thread, {core % (os.cpu_count() or 1)})
    os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(priority))


def threads(program: Program) -> list[int]:
    return [int(thread.name) for thread in Path(f"/proc/{program.process.pid}/task").iterdir()]


def lost_in_queue(gateway: Gateway) -> int:
    listing = gateway.space.run("cat", "/proc/net/netfilter/nfnetlink_queue").split()
    return int(listing[5]) + int(listing[6]) if listing else 0


def steady(gateway: Gateway, contender: Program | None, kernel: int) -> float | None:
    """Nanoseconds that the gateway needs for a packet, all in all; None if the contender did not keep up.
    What the kernel's thread was too late for was never received, so it has cost nothing.
    """

    def spent() -> int:
        clock = int(Path(f"/proc/{kernel}/schedstat").read_text().split()[0])
        return clock + (spent_ns(contender) if contender else 0)

    start, before_ns, lost = arrived(gateway), spent(), lost_in_queue(gateway)
    sender = flood(gateway, 30, str(STEADY), str(STEADY_PER_S))
    for thread in threads(sender):
        alone(thread, 0, 1)
    sender.wait(timeout_s=40)
    wait_until("an empty queue", lambda: waiting(gateway) <= 0)
    count, used_ns = arrived(gateway) - start, spent() - before_ns
    return used_ns / count if lost_in_queue(gateway) == lost and count > STEADY / 2 else None


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
    "back": lambda gateway: accept(gateway, "back"),
    "one": lambda gateway: accept(gateway, "one"),
    "nft": nft,
}


Figures = dict[str, list[float]]  # by contender


def measure(windows: int, seconds: float) -> tuple[Figures, Figures, Figures]:
    """Packets a second in a flood; nanoseconds a packet of a full queue, and of all the gateway's."""
    rates: Figures = {name: [] for name in CONTENDERS}
    costs: Figures = {name: [] for name in CONTENDERS}
    steadies: Figures = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as directory, new_lab(Path(directory)) as lab:
        text = config(interfaces=interfaces("nfqueue"))
        gateway = new_gateway(lab, BUILD / "dsnatd", text, path="nfqueue")
        gateway.daemon.process.terminate()
        gateway.daemon.wait(timeout_s=20)
        sink = Path(directory, "sink.nft")
        sink.write_text(SINK)
        gateway.server.run("nft", "-f", str(sink))
        for _ in range(windows):
            for name, begin in CONTENDERS.items():
                with begin(gateway) as contender:
                    if seconds:
                        rates[name].append(rate(gateway, seconds))
                    if contender:
                        costs[name] += [drained(gateway, contender) for _ in range(DRAINS)]
                    for thread in threads(contender) if contender else ():
                        alone(thread, 1, 1)
                    with kernel_thread(gateway) as kernel:
                        some = [steady(gateway, contender, kernel) for _ in range(DRAINS)]
                    if kept := [one for one in some if one is not None]:
                        steadies[name].append(statistics.median(kept))
    return rates, costs, steadies


def compare(steadies: Figures) -> list[str]:
    """What dsnatd does of each contender's packets in the same processor time, window by window."""
    lines = []
    for name, all_ in steadies.items():
        line = f"  steady      {name:8} {min(all_):6.0f} / {statistics.median(all_):6.0f} ns a packet"
        if name == "dsnatd":
            line += " (minimum / median)"
        else:
            ratios = sorted(other / ours for other, ours in zip(all_, steadies["dsnatd"], strict=False))
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            line += f"; dsnatd {middle:.2f} of its packets in the same time"
            line += f" (half of the windows {low:.2f} to {high:.2f})"
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.queue", description="The queue path, in ratios."
    )
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of flood in a window; 0: none")
    options = parser.parse_args()
    if os.geteuid():
        print("the queue path is not measured: namespaces need root", file=sys.stderr)
        return 0
    try:
        rates, costs, steadies = measure(options.windows, options.seconds)
    except LabError as error:
        print(f"the queue path could not be measured: {error}", file=sys.stderr)
        return 1
    print(f"\nnetfilter-queue path: 64-byte packets, one queue (load {os.getloadavg()[0]:.1f})")
    print("\n".join(compare(steadies)))
    median = {name: statistics.median(all_) for name, all_ in rates.items() if all_}
    rows = []
    for name, all_ in rates.items() if options.seconds else ():
        against = "  ".join(
            f"{median[name] / median[other]:5.2f} x {other:6}" for other in rates if other != name
        )
        print(f"  flood       {name:8} {median[name] / 1000:6.0f} kpps   {against}")
        rows.append(
            {"what": f"queue.{name}", "packets_per_s": round(median[name]), "windows": len(all_)}
            | ({"ns_per_packet": round(statistics.median(costs[name]))} if costs[name] else {})
            | {"gateway_ns_per_packet": round(statistics.median(steadies[name]))}
        )
    for name, all_ in costs.items():
        if all_:
            figures = f"{min(all_):6.0f} / {statistics.median(all_):6.0f} ns a packet (minimum / median)"
            print(f"  full queue  {name:8} {figures}")
    for floor in ("batch", "back", "one"):
        ratios = [pick(costs[floor]) / pick(costs["dsnatd"]) for pick in (min, statistics.median)]
        verdict = "met" if min(ratios) >= GOAL else "not met"
        figures = f"{ratios[0]:.2f} (minima) and {ratios[1]:.2f} (medians)"
        print(f"  dsnatd does {figures} of the packets of {floor} in the same time (goal {GOAL}: {verdict})")
    store("queue.", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
