"""`make bench`: what a packet costs, in cycles of the time stamp counter, beside what peers published.

Runs dsnat-bench round by round, each round through all sizes (so that a disturbance meets all alike), merges
the rounds, prints the tables and writes .build/bench/bench.json and .build/bench/cycles.svg. Peers' figures
were measured elsewhere (peers.py) and are marked so.

Exit status: 0 measured, 1 a measurement could not be made, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import machine, peers, picture

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".build/engine/dsnat-bench"
OUT = ROOT / ".build/bench"
SIZES = (1, 10_000, 100_000, 1_000_000, 4_000_000, 8_000_000)
QUICK_SIZES = (1, 10_000, 1_000_000)
HUGE_PAGES = 700  # 8 M sessions, and the load's own memory
STAGE_SIZES = (10_000, 1_000_000)

Row = dict[str, Any]


class BenchError(Exception):
    pass


def run_program(*arguments: str, program: Path = PROGRAM) -> list[Row]:
    argv = [*machine.alone(), str(program), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        raise BenchError(f"{' '.join(argv)}: exit status {done.returncode}: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def key(row: Row) -> tuple[str, int, int]:
    return row["what"], row.get("sessions", 0), row.get("used_percent", -1)


def merge(rounds: list[list[Row]]) -> list[Row]:
    """One row for each measurement: the least minimum, the median of the medians, all windows counted."""
    together: dict[tuple[str, int, int], list[Row]] = {}
    for rows in rounds:
        for row in rows:
            together.setdefault(key(row), []).append(row)
    merged = []
    for same in together.values():
        row = dict(same[-1])
        if "cycles_min" in row:
            row["cycles_min"] = min(one["cycles_min"] for one in same)
            row["cycles_median"] = round(statistics.median(one["cycles_median"] for one in same), 1)
            row["windows"] = sum(one["windows"] for one in same)
        merged.append(row)
    return merged


def measure(sizes: tuple[int, ...], *, rounds: int, windows: int, plain: bool) -> Iterator[list[Row]]:
    pages = ["--plain-pages"] if plain else []
    common = [*pages, "--windows", str(windows)]
    listed = ",".join(str(size) for size in sizes)
    stages = ",".join(str(size) for size in STAGE_SIZES if size in sizes)
    for number in range(rounds):
        for part in ("packets", "new"):
            yield run_program("--only", part, "--sessions", listed, *common)
        if number == 0:
            yield run_program("--only", "stages", "--sessions", stages, *common)
            yield run_program("--only", "expiry", "--sessions", listed, *common)
            yield run_program("--only", "latency", "--sessions", stages, *common)
            yield run_program("--only", "flood", "--sessions", stages, *common)
        yield run_program("--only", "allocation", "--sessions", "1", *common)


# ---- what is printed ----


def figure(row: Row | None) -> str:
    return f"{row['cycles_min']:.0f} / {row['cycles_median']:.0f}" if row else "-"


def table(head: list[str], body: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [head, *body]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def packet_table(rows: dict[tuple[str, int, int], Row], sizes: tuple[int, ...]) -> str:
    names = (
        "inside_to_outside.udp",
        "outside_to_inside.udp",
        "inside_to_outside.tcp",
        "outside_to_inside.tcp",
    )
    head = [
        "sessions",
        "out udp",
        "in udp",
        "out tcp",
        "in tcp",
        "goal",
        "VPP out",
        "VPP in",
        "new udp",
        "new tcp",
    ]
    head += ["goal", "VPP new", "expiry udp", "bytes"]
    body = []
    for size in sizes:
        memory = rows.get(("core.memory", size, -1))
        line = [picture.short(size), *(figure(rows.get((f"core.{name}", size, -1))) for name in names)]
        line.append(str(peers.GOAL_PACKET.get(size, "")))
        for name in names[:2]:
            line.append(f"{peers.cycles(peers.VPP, f'core.{name}', size) or '-'}")
        line += [figure(rows.get((f"core.new_session.{protocol}", size, -1))) for protocol in ("udp", "tcp")]
        line.append(str(peers.GOAL_NEW_SESSION.get(size, "")))
        line.append(f"{peers.cycles(peers.VPP, 'core.new_session.udp', size) or '-'}")
        line.append(figure(rows.get(("core.expiry.udp", size, -1))))
        line.append(f"{memory['bytes_per_session']:.0f}" if memory else "-")
        body.append(line)
    return table(head, body)


def stage_table(rows: dict[tuple[str, int, int], Row]) -> str:
    stages = list(dict.fromkeys(what.split(".")[2] for what, _, _ in rows if what.startswith("core.stage.")))
    kinds = ("inside_to_outside", "outside_to_inside", "new_session")
    head = ["udp, minimum", *(f"{kind} {picture.short(size)}" for kind in kinds for size in STAGE_SIZES)]
    body = []
    for stage in stages:
        cells = [
            rows.get((f"core.stage.{stage}.{kind}.udp", size, -1)) for kind in kinds for size in STAGE_SIZES
        ]
        body.append([stage, *(f"{cell['cycles_min']:.1f}" if cell else "-" for cell in cells)])
    return table(head, body)


def allocation_table(rows: dict[tuple[str, int, int], Row]) -> str:
    """One column for each number of addresses that the pool has."""
    found = {(what, used): row for (what, _, used), row in rows.items() if what.startswith("core.allocation")}
    kinds = sorted({what for what, _ in found}, key=len)
    head = ["ports used", *(f"of {what.split('.')[2].removeprefix('on_')} addresses" for what in kinds)]
    uses = sorted({used for _, used in found})
    return table(head, [[f"{used} %", *(figure(found.get((what, used))) for what in kinds)] for used in uses])


def others_table(rows: dict[tuple[str, int, int], Row]) -> str:
    """What is in the way of known sessions: new ones, those whose time is over, a SYN flood."""
    head = ["sessions", "a burst of 32", "p50 us", "p99 us", "p99.9 us"]
    names = {
        "core.latency.udp": "known sessions",
        "core.latency_beside_new.udp": "every other burst all new",
        "core.latency_beside_expiry.udp": "all others' time is over",
    }
    body = []
    for (what, sessions, _), row in rows.items():
        if what in names:
            figures = [f"{row[name]:.2f}" for name in ("p50_us", "p99_us", "p999_us")]
            body.append([picture.short(sessions), names[what], *figures])
    floods = [
        f"half of each burst a SYN flood, {picture.short(sessions)} sessions: a known packet costs"
        f" {row['flooded_median']:.0f} cycles instead of {row['alone_median']:.0f}"
        f" ({row['slowed_percent']:+.0f} %, median; goal {peers.GOAL_FLOOD_PERCENT:+d} % at most)"
        for (what, sessions, _), row in rows.items()
        if what == "core.syn_flood.tcp"
    ]
    return "\n".join([table(head, body), *floods])


def peer_rows() -> list[Row]:
    return [
        {
            "what": peer.what.replace("core.", "peer."),
            "peer": peer.name,
            "sessions": sessions,
            "cycles_min": least,
            "cycles_median": median,
            "measured": f"elsewhere: {peers.MACHINE}",
        }
        for peer in peers.PEERS
        for sessions, (least, median) in peer.cycles.items()
    ]


def draw(rows: list[Row]) -> str:
    def measured(what: str) -> list[tuple[float, float]]:
        return [(row["sessions"], row["cycles_min"]) for row in rows if row["what"] == what]

    lines = [
        picture.Line("ours, inside to outside", measured("core.inside_to_outside.udp")),
        picture.Line("ours, outside to inside", measured("core.outside_to_inside.udp")),
        picture.Line("ours, new session", measured("core.new_session.udp")),
        picture.Line("dsnatd on net_null, I/O included", measured("ports.null.dsnatd")),
        picture.Line("kernel SNAT, this machine", measured("kernel.snat")),
    ]
    for peer in peers.PEERS:
        if peer.what != "core.outside_to_inside.udp":
            name = peer.short + (", new session *" if "new" in peer.what else " *")
            points = [(sessions, figures[0]) for sessions, figures in peer.cycles.items()]
            lines.append(picture.Line(name, points, dashed=True))
    return picture.draw(
        "TSC cycles per 64-byte packet, one core, UDP (* measured elsewhere)",
        [line for line in lines if line.points],
        "sessions",
        "cycles, minimum",
    )


def stored(what: str = "") -> list[Row]:
    """Of the last run, all rows or those of one measurement."""
    path = OUT / "bench.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if what in ("", row["what"])]


def store(prefix: str, rows: list[Row]) -> None:
    """Puts rows in place of those whose name begins so (all of them: ""), and draws the picture again."""
    kept = [row for row in stored() if prefix and not row["what"].startswith(prefix)]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "bench.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in kept + rows) + "\n]\n")
    (OUT / "cycles.svg").write_text(draw(kept + rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="What a packet costs, beside the peers.")
    parser.add_argument("--quick", action="store_true", help="three sizes, one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=7)
    options = parser.parse_args()
    if not PROGRAM.exists():
        print(f"make bench: {PROGRAM} is not built; run `make build`", file=sys.stderr)
        return 1
    sizes, rounds = (QUICK_SIZES, 1) if options.quick else (SIZES, options.rounds)
    facts, before, start = machine.facts(), machine.clock(), time.monotonic()
    try:
        with machine.reserved_pages(HUGE_PAGES) as lacks:
            if lacks:
                print(
                    f"make bench: {lacks}; measuring on plain 4 KB pages, which are slower", file=sys.stderr
                )
            parts = list(measure(sizes, rounds=rounds, windows=options.windows, plain=bool(lacks)))
    except BenchError as error:
        print(f"make bench: {error}", file=sys.stderr)
        return 1
    elapsed_s = time.monotonic() - start
    busy = machine.busy_share(before, machine.clock(), own=1 / facts.cores)
    rows = merge(parts)
    by_key = {key(row): row for row in rows}
    tsc = by_key[("machine", 0, -1)]
    pages = next(row["pages"] for row in rows if "pages" in row)
    print(f"machine: {facts.cpu}, {facts.cores} cores, Linux {facts.kernel}; {pages} pages")
    print(f"  TSC {tsc['tsc_hz'] / 1e9:.2f} GHz, {tsc['core_per_tsc']:.2f} core cycles in a TSC cycle")
    print(
        f"  load {facts.load} at the start; others used {busy:.0%} of the machine in these {elapsed_s:.0f} s"
    )
    if busy > machine.BUSY_SHARE:
        print(
            "warning: the machine is too busy to trust medians; look at minima and ratios, or run again later"
        )
    print(
        "\ncycles per packet (new, expiry: per session), minimum / median; VPP: measured elsewhere, on",
        peers.MACHINE,
    )
    print(packet_table(by_key, sizes))
    print(f"\nstages, with about 2 cycles of measuring in each\n{stage_table(by_key)}")
    print(
        f"\nfinding a port when most towards one remote are used, whole session\n{allocation_table(by_key)}"
    )
    print(
        f"\nfrom receive to transmit call, best window (p99.9 of a busy machine is its scheduler's)\n"
        f"{others_table(by_key)}"
    )
    store("", [{**facts.row(), "busy_share": round(busy, 2)}, *rows, *peer_rows()])
    print(f"\nwritten: {OUT / 'bench.json'}, {OUT / 'cycles.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
