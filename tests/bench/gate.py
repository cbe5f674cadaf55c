"""`make bench-gate [BASE=commit]`: has the work tree become slower than the base commit?

Both are built and measured in this run. Two judges, because each sees what the other cannot:

    instructions   of the core per packet and per new session, counted by cachegrind; the same in every run.
                   Red at +3 %. Blind to cache misses.
    cycles         per packet, as the ratio of alternating pairs (base, ours, ours, base, ...). The median's
                   95 % confidence interval follows from the order of the ratios. Red when all of it is more
                   than 10 % slower; pairs are added while the interval contains that mark, up to a limit.

Both builds use the work tree's io/bench, so that a change of the load does not look like one of the core;
where that does not compile against the base, the base uses its own.

Exit status: 0 not slower, 1 slower, or a build failed, 2 usage.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import machine
from tests.bench.run import Row, run_program

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / ".build/bench"
INSTRUCTIONS_LIMIT = 1.03
CYCLES_LIMIT = 1.10
PAIRS_MIN, PAIRS_MAX = 12, 36
SIZES = "10000,1000000"
HUGE_PAGES = 120
RING = 1024  # packets, as in io/bench/bench.h


class GateError(Exception):
    pass


def run(argv: Sequence[str | Path], *, cwd: Path = ROOT) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join(str(word) for word in argv)
        raise GateError(f"{words}: exit status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def base_commit(wanted: str | None) -> str:
    if wanted:
        return run(["git", "rev-parse", "--verify", f"{wanted}^{{commit}}"]).strip()
    upstream = subprocess.run(
        ["git", "merge-base", "HEAD", "origin/main"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    base = upstream.stdout.strip()
    dirty = run(["git", "status", "--porcelain", "--", "dataplane"]).strip()
    if base and (dirty or base != run(["git", "rev-parse", "HEAD"]).strip()):
        return base
    return run(["git", "rev-parse", "HEAD~1"]).strip()


@dataclass(frozen=True)
class Build:
    name: str
    program: Path
    library: Path


def compile_build(name: str, source: Path) -> Build:
    place = OUT / f"build-{name}"
    if not (place / "build.ninja").exists():
        run(["meson", "setup", place, source, "--buildtype=release", "-Dversion=bench"])
    run(["ninja", "-C", place, "dsnat-bench", "libnat.a"])
    return Build(name, place / "dsnat-bench", place / "libnat.a")


def build_base(commit: str) -> Build:
    tree, place = OUT / "base", OUT / "build-base"
    for old in (tree, place):
        shutil.rmtree(old, ignore_errors=True)
    tree.mkdir(parents=True)
    archive = OUT / "base.tar"
    run(["git", "archive", "--output", archive, commit, "dataplane"])
    run(["tar", "--extract", "--file", archive, "--directory", tree])
    archive.unlink()
    own, ours = tree / "dataplane/io/bench", ROOT / "dataplane/io/bench"
    if not own.exists():
        raise GateError(f"commit {commit[:12]} has no dataplane/io/bench to measure; choose a later BASE")
    kept = own.with_name("bench-of-base")
    own.rename(kept)
    shutil.copytree(ours, own)
    try:
        return compile_build("base", tree / "dataplane")
    except GateError:
        shutil.rmtree(own)
        kept.rename(own)
        print("bench-gate: the base builds with its own io/bench only: its load may differ", file=sys.stderr)
        return compile_build("base", tree / "dataplane")


# ---- instructions ----


def core_functions(library: Path) -> set[str]:
    """Names of all functions of the core, static ones too."""
    return {
        line.split()[-1].split(".")[0]
        for line in run(["nm", library]).splitlines()
        if re.search(r"^[0-9a-f]+ [tT] ", line)
    }


def count(build: Build, part: str, amount: str) -> int:
    """Instructions of the core in one run under cachegrind."""
    out = OUT / f"cachegrind-{build.name}.out"
    argv: list[str | Path] = ["valgrind", "--quiet", "--tool=cachegrind", "--cache-sim=no"]
    argv += [f"--cachegrind-out-file={out}", build.program, "--plain-pages", "--sessions", "10000"]
    run([*argv, "--only", part, *amount.split()])
    names, total, counted = core_functions(build.library), 0, False
    for line in out.read_text().splitlines():
        if line.startswith("fn="):
            counted = line[3:].split(".")[0] in names
        elif counted and line[:1].isdigit():
            total += int(line.split()[1])
    if total == 0:
        raise GateError(f"{out} names no function of the core; was the build stripped?")
    return total


def instructions(build: Build) -> dict[str, float]:
    """The difference between a long and a short run: what both have in common drops out."""
    short, long = 16, 80
    packets = 4 * (long - short) * RING  # two directions, UDP and TCP
    windows, new = 2, 2 * 2 * 16384
    return {
        "packet": (
            count(build, "packets", f"--windows 1 --rings {long}")
            - count(build, "packets", f"--windows 1 --rings {short}")
        )
        / packets,
        "new and ended session": (
            count(build, "new", f"--windows {1 + windows}") - count(build, "new", "--windows 1")
        )
        / new,
    }


def judge_instructions(base: Build, ours: Build) -> bool:
    before, after = instructions(base), instructions(ours)
    fine = True
    for what, was in before.items():
        ratio = after[what] / was
        red = ratio >= INSTRUCTIONS_LIMIT
        fine &= not red
        verdict = "RED" if red else "green"
        print(f"instructions per {what}: {was:.1f} -> {after[what]:.1f}  {ratio - 1:+.1%}  {verdict}")
    return fine


# ---- cycles ----


def typical(rows: Sequence[Row]) -> float:
    """One figure for a run: the geometric mean over sizes, protocols and directions."""
    figures = [row["cycles_min"] for row in rows if "cycles_min" in row]
    return math.exp(statistics.fmean(math.log(figure) for figure in figures))


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median: how many lie below it is binomial, whatever their law."""
    ordered, n = sorted(ratios), len(ratios)
    below, rank = 0.0, 0
    while below + math.comb(n, rank) / 2**n <= 0.025:
        below += math.comb(n, rank) / 2**n
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[n - 1 - rank]


def judge_cycles(base: Build, ours: Build) -> bool:
    ratios: list[float] = []
    with machine.reserved_pages(HUGE_PAGES) as lacks:
        pages = ["--plain-pages"] if lacks else []
        while True:
            pair = [
                typical(
                    run_program(
                        *(
                            "--only",
                            "packets",
                            "--sessions",
                            SIZES,
                            "--windows",
                            "5",
                            "--rings",
                            "32",
                            *pages,
                        ),
                        program=build.program,
                    )
                )
                for build in ((base, ours) if len(ratios) % 2 else (ours, base))
            ]
            ratios.append(pair[1] / pair[0] if len(ratios) % 2 else pair[0] / pair[1])
            if len(ratios) < PAIRS_MIN:
                continue
            low, high = interval(ratios)
            if not low <= CYCLES_LIMIT <= high or len(ratios) == PAIRS_MAX:
                break
    red = low > CYCLES_LIMIT
    verdict = "RED" if red else "green" if high < CYCLES_LIMIT else "green, but too noisy to be sure"
    print(
        f"cycles per packet: {statistics.median(ratios) - 1:+.1%},"
        f" 95 % confidence {low - 1:+.1%} to {high - 1:+.1%} ({len(ratios)} pairs)  {verdict}"
    )
    return not red


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-gate", description="Is the work tree slower than BASE?")
    parser.add_argument("base", nargs="?", help="commit; default: where this branch left origin/main")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        print("bench-gate: valgrind is missing; run `make setup`", file=sys.stderr)
        return 1
    try:
        commit = base_commit(options.base)
        print(f"base: {run(['git', 'log', '-1', '--format=%h %s', commit]).strip()}")
        base, ours = build_base(commit), compile_build("ours", ROOT / "dataplane")
        fine = [judge_instructions(base, ours), judge_cycles(base, ours)]
    except GateError as error:
        print(f"bench-gate: {error}", file=sys.stderr)
        return 1
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
