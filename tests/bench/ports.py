"""What dsnatd costs on DPDK ports, from receive to transmit, beside dpdk-testpmd on the same ports.

testpmd swaps the two MAC addresses of each packet and sends it on: the I/O floor. What dsnatd costs beyond
it is translation, routes, neighbours and books. Both run as they are, in turn; libdsnat-inject.so
(io/bench/inject.c) is preloaded into both and makes each received packet the next one of random flows.

    net_null     both directions at once; a port that always has a full burst. Windows of 131,072 packets,
                 in the worker's own processor time, so that others on the core do not count
    latency      the same ports: from the receive to the transmit call of each packet, by time stamps in it
    scaling      the same ports with a queue for each worker: packets a second of one worker and of two
    memif        zero-copy, inside to outside only: a generator on the other core sends through shared memory.
                 Cycles from each burst that was there to the next look for one

Run by `make bench`, in namespaces of its own (root). Exit status: 0 measured, 1 not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import machine
from tests.bench.run import store
from tests.lab import Lab, LabError, Program, new_lab, run, wait_until

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".build/engine"
SIZES = (10_000, 1_000_000, 4_000_000)
HUGE_PAGES = 600
TESTPMD = "dpdk-testpmd"
MACS = ("02:00:00:00:01:00", "02:00:00:00:01:01")  # of the programs' memif ports
NULL = ("net_null0", "net_null1")
MEMIF_PATIENCE_S, MEMIF_BUDGET_S = 4, 120  # of a turn; of all
MEMIF_WAITED_PERCENT = 5  # of their time, for a core, from which on two busy programs measure their waits

CONFIG = """\
engine: {{workers: {workers}, max_sessions: {sessions}}}
interfaces:
  - {{name: inside0, role: inside, path: dpdk, device: "{inside}"}}
  - {{name: outside0, role: outside, path: dpdk, device: "{outside}"}}
pools:
  - {{name: public, addresses: [203.0.113.0/26]}}
zones:
  - {{source: 100.64.0.0/10, pool: public}}
"""
# next hops of the injected hosts and remotes
NETWORK = (
    "address replace 100.127.255.253/30 dev inside0",
    "address replace 198.51.100.1/24 dev outside0",
    "link set inside0 up",
    "link set outside0 up",
    "neigh replace 100.127.255.254 lladdr 02:00:00:00:00:01 dev inside0 nud permanent",
    "neigh replace 198.51.100.10 lladdr 02:00:00:00:00:02 dev outside0 nud permanent",
    "route replace 100.64.0.0/10 via 100.127.255.254",
    "route replace 198.18.0.0/15 via 198.51.100.10",
)


@dataclass
class Figure:
    windows: list[float] = field(default_factory=list)

    def row(self, what: str, **more: object) -> dict[str, Any]:
        low, middle = min(self.windows), statistics.median(self.windows)
        figures = {"cycles_min": round(low, 1), "cycles_median": round(middle, 1)}
        return {"what": what, **more, **figures, "windows": len(self.windows)}


def injected(flows: int, *, answers: bool = True, latency: bool = False) -> list[str]:
    """The environment of a program with traffic in its ports."""
    words = [f"LD_PRELOAD={BUILD / 'libdsnat-inject.so'}", f"DSNAT_INJECT_INSIDE={NULL[0]}"]
    words += [f"DSNAT_INJECT_OUTSIDE={NULL[1]}"] if answers else []
    words += ["DSNAT_INJECT_LATENCY=1"] if latency else []
    return [*words, f"DSNAT_INJECT_FLOWS={flows}"]


class Bench:
    """One namespace, a hugetlbfs of its own, and the programs that take turns in it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.space = lab, lab.netns("ports")
        self.huge = lab.directory / "huge"
        self.huge.mkdir()
        subprocess.run(["mount", "-t", "hugetlbfs", "none", self.huge], check=True)
        lab.undo.callback(run, ["umount", str(self.huge)])
        self.turn = 0

    def _log(self, name: str) -> str:
        self.turn += 1
        return f"{name}-{self.turn}.log"

    @contextmanager
    def dsnatd(
        self, devices: Sequence[str], flows: int, environment: Sequence[str], *, workers: int = 1
    ) -> Iterator[Program]:
        file, control = self.lab.directory / "dsnatd.yaml", Path(f"/tmp/{self.lab.prefix}.sock")
        sessions = self.huge / "sessions"
        text = CONFIG.format(
            workers=workers, sessions=flows + flows // 4 + 16384, inside=devices[0], outside=devices[1]
        )
        file.write_text(text)
        program = [str(BUILD / "dsnatd"), "--config", str(file), "--socket", str(control)]
        argv = [
            *machine.ahead(*os.sched_getaffinity(0)),
            "env",
            *environment,
            *program,
            "--sessions",
            str(sessions),
        ]
        started = self.space.start(*argv, log=self._log("dsnatd"))
        try:
            wait_until("dsnatd to be ready", lambda: "dsnatd: ready" in alive(started), deadline_s=60)
            for line in NETWORK:
                self.space.ip(line)
            pin(started.process.pid)
            yield started
        finally:
            started.stop()
            control.unlink(missing_ok=True)
            sessions.unlink(missing_ok=True)

    def handed_over(self) -> int:
        """By dsnatd that runs now."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(f"/tmp/{self.lab.prefix}.sock")
            client.sendall(b'{"cmd":"show","what":"counters"}\n')
            return int(json.loads(client.makefile().readline())["counters"]["handed_over"])

    @contextmanager
    def testpmd(
        self,
        devices: Sequence[str],
        environment: Sequence[str],
        *,
        core: int,
        mode: str = "macswap",
        prefix: str = "floor",
        ahead: bool = True,
    ) -> Iterator[Program]:
        other = min(os.sched_getaffinity(0))
        argv = [
            *(machine.ahead(core, other) if ahead else ["taskset", "--cpu-list", str(core)]),
            "env",
            *environment,
            "stdbuf",
            "-oL",
            TESTPMD,
            "--in-memory",
            "--single-file-segments",
        ]
        argv += ["--no-pci", "--no-telemetry", f"--file-prefix={self.lab.prefix}-{prefix}", "-m", "128"]
        argv += [f"--lcores=0@{other},1@{core}", *(f"--vdev={device}" for device in devices), "--"]
        argv += [
            f"--forward-mode={mode}",
            "--burst=32",
            "--total-num-mbufs=16384",
            "--no-mlockall",
            "--disable-link-check",
        ]
        commands = self.lab.directory / self._log("commands")
        os.mkfifo(commands)
        shell = f"exec 0<>{commands}; exec {shlex.join(argv)} --interactive --auto-start"
        started = self.space.start("sh", "-c", shell, log=self._log("testpmd"))
        try:
            wait_until(
                "testpmd to start", lambda: "core dump" in alive(started) or "testpmd>" in alive(started)
            )
            yield started
        finally:
            started.stop()


def pin(pid: int) -> None:
    """Workers on a core each, from the last on; where there is one left, everything else on the first."""
    cores = sorted(os.sched_getaffinity(0))
    threads = {int(task.name): (task / "comm").read_text() for task in Path(f"/proc/{pid}/task").iterdir()}
    workers = sorted(thread for thread, name in threads.items() if name.startswith("rte-worker"))
    for thread in threads:
        os.sched_setaffinity(
            thread, {cores[-1 - workers.index(thread) % len(cores)] if thread in workers else cores[0]}
        )


def alive(program: Program) -> str:
    text = program.text()
    if not program.running:
        raise LabError(f"{program.argv[4:8]} ended at once:\n{text[-2000:]}")
    return text


def windows(program: Program, pattern: str, count: int, *, deadline_s: float = 120) -> list[tuple[str, ...]]:
    """The next so many lines that match, from now on; the first may have begun before."""
    skip = len(re.findall(pattern, program.text())) + 1

    def found() -> list[tuple[str, ...]] | None:
        lines = re.findall(pattern, alive(program))
        return lines[skip : skip + count] if len(lines) >= skip + count else None

    return wait_until(f"{count} windows", found, deadline_s=deadline_s)


CYCLES = r"inject: queue (\d+) cycles ([\d.]+) at_s ([\d.]+) packets (\d+)"
WATCHED = r"inject: queue 0 cycles ([\d.]+) at_s [\d.]+ packets \d+ burst"
LATENCY = r"inject: queue (\d+) p50_us ([\d.]+) p99_us ([\d.]+) p999_us ([\d.]+)"


def on_null(bench: Bench, sizes: Sequence[int], rounds: int, count: int) -> list[dict[str, Any]]:
    core, rows = max(os.sched_getaffinity(0)), []
    for flows in sizes:
        ours, floor = Figure(), Figure()
        for _ in range(rounds):
            with bench.dsnatd(NULL, flows, injected(flows)) as program:
                ours.windows += [float(line[1]) for line in windows(program, CYCLES, count)]
            with bench.testpmd(NULL, injected(flows), core=core) as program:
                floor.windows += [float(line[1]) for line in windows(program, CYCLES, count)]
        rows.append(ours.row("ports.null.dsnatd", sessions=flows))
        rows.append(floor.row("ports.null.testpmd_macswap", sessions=flows))
    return rows


def latency(bench: Bench, flows: int, count: int) -> list[dict[str, Any]]:
    core, rows = max(os.sched_getaffinity(0)), []
    environment = injected(flows, latency=True)
    with bench.dsnatd(NULL, flows, environment) as program:
        ours = windows(program, LATENCY, count)
    with bench.testpmd(NULL, environment, core=core) as program:
        floor = windows(program, LATENCY, count)
    for name, lines in (("dsnatd", ours), ("testpmd_macswap", floor)):
        best = min(lines, key=lambda line: float(line[2]))
        figures = {
            name: float(value) for name, value in zip(("p50_us", "p99_us", "p999_us"), best[1:], strict=True)
        }
        middle = {
            f"{what}_median": round(statistics.median(float(line[1 + i]) for line in lines), 2)
            for i, what in enumerate(("p50_us", "p99_us", "p999_us"))
        }
        rows.append(
            {"what": f"ports.latency.{name}", "sessions": flows, **figures, **middle, "windows": len(lines)}
        )
    return rows


def rate(lines: Sequence[tuple[str, ...]], hz: float) -> float:
    """Million packets in a second of all queues: of each, the cost in its own processor time."""
    best: dict[str, float] = {}
    for queue, cycles, *_ in lines:
        best[queue] = min(best.get(queue, float("inf")), float(cycles))
    return sum(hz / cycles for cycles in best.values()) / 1e6


def scaling(bench: Bench, flows: int, rounds: int, count: int) -> list[dict[str, Any]]:
    hz, rows = tsc_hz(), []
    found: dict[int, list[float]] = {}
    handed: dict[int, int] = {}
    for _ in range(rounds):
        for workers in range(1, len(os.sched_getaffinity(0)) + 1):
            with bench.dsnatd(NULL, flows, injected(flows), workers=workers) as program:
                found.setdefault(workers, []).append(rate(windows(program, CYCLES, count * workers), hz))
                handed[workers] = handed.get(workers, 0) + bench.handed_over()
    for workers, rates in found.items():
        best, middle = max(rates), statistics.median(rates)
        figures = {"million_per_s": round(best, 2), "million_per_s_median": round(middle, 2)}
        ratio = round(best / max(found[1]), 2)
        rows.append(
            {
                "what": "ports.scaling",
                "workers": workers,
                "sessions": flows,
                **figures,
                "ratio": ratio,
                "handed_over": handed[workers],
            }
        )
    return rows


def tsc_hz() -> float:
    done = subprocess.run(
        [BUILD / "dsnat-bench", "--only", "nothing", "--sessions", "1", "--plain-pages"],
        capture_output=True,
        text=True,
        check=False,
    )
    return float(json.loads(done.stdout.splitlines()[0])["tsc_hz"])


# ---- memif ----


def memif(bench: Bench, number: int, role: str, turn: int) -> str:
    path = bench.lab.directory / f"memif{number}-{turn}.sock"  # a killed generator leaves its own
    more = f",zero-copy=yes,mac={MACS[number]}" if role == "client" else ""
    return f"net_memif{number},role={role},id={number},socket={path},socket-abstract=no{more}"


def times(programs: Sequence[Program]) -> tuple[int, int]:
    """Nanoseconds that all their threads have run, and have waited for a core, so far."""
    run_ns = waited_ns = 0
    for program in programs:
        for thread in Path(f"/proc/{program.process.pid}/task").glob("*/schedstat"):
            words = thread.read_text().split()
            run_ns, waited_ns = run_ns + int(words[0]), waited_ns + int(words[1])
    return run_ns, waited_ns


def memif_turn(bench: Bench, turn: int, flows: int, count: int, *, floor: bool) -> tuple[list[float], float]:
    """Windows, and the share of its time in which generator and program waited for a core."""
    cores = sorted(os.sched_getaffinity(0))
    watched = [f"LD_PRELOAD={BUILD / 'libdsnat-inject.so'}", "DSNAT_INJECT_WATCH=net_memif0"]
    # paired: what is injected goes to the inside memif; what comes from the outside one ends in a null
    ends, clients = ([memif(bench, n, role, turn) for n in range(2)] for role in ("server", "client"))
    generator = [NULL[0], *ends, NULL[1] + ",no-rx=1"]
    environment = [*injected(flows, answers=False), f"DSNAT_INJECT_TO={MACS[0]}"]
    environment.append("DSNAT_INJECT_WATCH=net_memif1")
    with bench.testpmd(
        generator, environment, core=cores[0], mode="io", prefix="generator", ahead=False
    ) as sender:
        contender = (
            bench.testpmd(clients, watched, core=cores[-1])
            if floor
            else bench.dsnatd(clients, flows, watched)
        )
        with contender as program:

            def found() -> list[str] | None:
                back = re.findall(WATCHED, alive(sender))
                lines = re.findall(WATCHED, alive(program))
                # as long as it has no connection on its other side a program only drops, which is cheap
                return lines[-count:] if len(lines) > count < len(back) else None

            before = times((sender, program))
            lines = wait_until("packets to come back over memif", found, deadline_s=MEMIF_PATIENCE_S)
            run_ns, waited_ns = (
                now - then for now, then in zip(times((sender, program)), before, strict=True)
            )
    return [float(line) for line in lines], waited_ns / max(run_ns + waited_ns, 1)


def on_memif(bench: Bench, flows: int, rounds: int, count: int) -> list[dict[str, Any]]:
    """DPDK's memif driver may lose a connection that is made while the other end is busy, and its server may
    even end of that: such a turn does not count and is taken again, with new sockets.
    """
    ours, floor, waited = Figure(), Figure(), list[float]()
    repeated, end_s = 0, time.monotonic() + MEMIF_BUDGET_S
    while len(floor.windows) < rounds * count:
        turn = len(waited)
        try:
            figures, share = memif_turn(bench, turn + repeated, flows, count, floor=turn % 2 == 1)
        except LabError:
            repeated += 1
            if time.monotonic() > end_s:
                if floor.windows:
                    break  # less than was wanted, but of both
                raise
            continue
        (floor if turn % 2 else ours).windows += figures
        waited.append(share)
    more = {
        "sessions": flows,
        "waited_percent": round(100 * statistics.median(waited), 1),
        "repeated": repeated,
        "load": round(os.getloadavg()[0], 2),
    }
    return [ours.row("ports.memif.dsnatd", **more), floor.row("ports.memif.testpmd_macswap", **more)]


# ---- what is printed ----


def text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "\ndsnatd on DPDK ports, cycles per packet in and out, minimum / median (whole loop, I/O included);"
        f" load {os.getloadavg()[0]:.1f} at the end"
    ]
    by_key = {(row["what"], row.get("sessions", 0)): row for row in rows}
    for (what, sessions), ours in by_key.items():
        if not what.endswith(".dsnatd") or "cycles_min" not in ours:
            continue
        floor = by_key[what.replace("dsnatd", "testpmd_macswap"), sessions]
        beyond = ours["cycles_min"] - floor["cycles_min"]
        lines.append(
            f"  {what.split('.')[1]:6} {sessions:>9,} sessions: dsnatd {ours['cycles_min']:.0f} /"
            f" {ours['cycles_median']:.0f}, testpmd macswap {floor['cycles_min']:.0f} /"
            f" {floor['cycles_median']:.0f}: {beyond:.0f} beyond the I/O floor"
        )
        if ours.get("waited_percent", 0) > MEMIF_WAITED_PERCENT:
            lines.append(
                f"    warning: not to be trusted: generator and program waited for a core"
                f" {ours['waited_percent']:.0f} % of the time (load {ours['load']}), and each waits for the"
                " other; run it where two cores are idle"
            )
    for row in rows:
        if row["what"].startswith("ports.latency"):
            lines.append(
                f"  latency under full load, {row['sessions']:,} sessions, {row['what'].split('.')[2]}:"
                f" p50 {row['p50_us']} us, p99 {row['p99_us']} us, p99.9 {row['p999_us']} us (best window;"
                f" medians {row['p50_us_median']}, {row['p99_us_median']}, {row['p999_us_median']})"
            )
        elif row["what"] == "ports.scaling":
            lines.append(
                f"  {row['workers']} workers, {row['sessions']:,} sessions: {row['million_per_s']:.1f}"
                f" million packets a second of processor time ({row['ratio']:.2f} x; median"
                f" {row['million_per_s_median']:.1f}); {row['handed_over']} handed over"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ports", description="dsnatd on DPDK ports.")
    parser.add_argument("--quick", action="store_true", help="one size, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--only", choices=("null", "latency", "scaling", "memif"))
    options = parser.parse_args()
    if os.geteuid():
        print("ports are not measured: namespaces need root", file=sys.stderr)
        return 0
    if not shutil.which(TESTPMD):
        print(f"ports are not measured: {TESTPMD} is missing; run `make setup`", file=sys.stderr)
        return 1
    sizes, rounds = (SIZES[:1], 1) if options.quick else (SIZES, options.rounds)
    rows: list[dict[str, Any]] = []
    with ExitStack() as undo:
        lacks = undo.enter_context(machine.reserved_pages(HUGE_PAGES))
        if lacks:
            print(f"ports are not measured: {lacks}", file=sys.stderr)
            return 1
        lab = undo.enter_context(new_lab(Path(undo.enter_context(tempfile.TemporaryDirectory()))))
        bench = Bench(lab)
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "null": lambda: on_null(bench, sizes, rounds, options.windows),
            "latency": lambda: latency(bench, SIZES[0], options.windows),
            "scaling": lambda: scaling(bench, SIZES[0], rounds, options.windows),
            "memif": lambda: on_memif(bench, SIZES[0], rounds, options.windows),
        }
        failed = 0
        for name, part in parts.items():
            if options.only in (None, name):
                try:
                    rows += part()
                except LabError as error:  # the others are worth having
                    print(f"ports.{name} could not be measured: {error}", file=sys.stderr)
                    failed = 1
    print(text(rows))
    store("ports." if not options.only else f"ports.{options.only}", rows)
    return failed


if __name__ == "__main__":
    sys.exit(main())
