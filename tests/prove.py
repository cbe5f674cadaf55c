"""`make prove`: what is small enough is proved by machine, and printed with its bounds.

dataplane/proof/*.c are proofs for CBMC (bounded model checking of the C code itself), *.smt2 for z3. Each
claim stands as a comment beside its proof: "Claim:" what, "For:" which inputs, "cbmc:" options. All are run;
a claim that does not hold is shown with the solver's words.

z3 is in Debian 12 and 13. CBMC is in Debian 13: on Debian 12 it is unpacked under .build/prover from the
machine's own package sources with the release changed, as the image tools are; nothing is installed.

Exit status: 0 all proved; 1 a claim does not hold, or took longer than --seconds; 3 a tool is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.aptsources import KEYRING, SourcesError, debian_sources, transport_options

ROOT = Path(__file__).resolve().parent.parent
PROOFS = ROOT / "dataplane/proof"
PROVER = ROOT / ".build/prover"
RELEASE = "trixie"
EXIT_NEEDS = 3


@dataclass(frozen=True)
class Claim:
    """One proof: a function of a C file, or the n-th check of an SMT file."""

    path: Path
    name: str
    text: str
    scope: str
    options: tuple[str, ...] = ()
    expected: str = "unsat"


def fields(comment: str) -> dict[str, str]:
    """Claim, For, cbmc, Expect of a comment, each of which may go on for several lines."""
    found: dict[str, str] = {}
    key = ""
    for line in comment.splitlines():
        line = re.sub(r"^\s*(/\*|\*/|\*|;)?\s*", "", line).removesuffix("*/").strip()
        if match := re.match(r"(Claim|For|cbmc|Expect):\s*(.*)", line):
            key, line = match.groups()
        if key:
            found[key] = f"{found.get(key, '')} {line}".strip()
    return found


def claims() -> Iterator[Claim]:
    for path in sorted(PROOFS.glob("*.c")):
        for match in re.finditer(
            r"(/\* Claim:(?:[^*]|\*(?!/))*\*/)\s*void (proof_\w+)\(void\)", path.read_text()
        ):
            said = fields(match[1])
            options = tuple(said.get("cbmc", "").split())
            yield Claim(path, match[2], said["Claim"], said["For"], options)
    for path in sorted(PROOFS.glob("*.smt2")):
        for number, match in enumerate(
            re.finditer(r"((?:^;.*\n)*^; Claim:.*\n(?:^;.*\n)*)", path.read_text(), re.M)
        ):
            said = fields(match[1])
            yield Claim(path, str(number), said["Claim"], said["For"], expected=said.get("Expect", "unsat"))


def need(missing: str) -> SystemExit:
    print(f"prove: {missing}", file=sys.stderr)
    return SystemExit(EXIT_NEEDS)


def cbmc() -> list[str]:
    """The command that runs CBMC: the machine's own, or the one under .build/prover by its own loader."""
    if found := shutil.which("cbmc"):
        return [found]
    libraries = PROVER / "usr/lib/x86_64-linux-gnu"
    if not (PROVER / "usr/bin/cbmc").exists():
        fetch_cbmc()
    path = f"{libraries}:{PROVER / 'usr/lib'}"
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", path, str(PROVER / "usr/bin/cbmc")]


def fetch_cbmc() -> None:
    if not shutil.which("mmdebstrap"):
        raise need("CBMC is not installed and mmdebstrap, which would fetch it, is missing; run `make setup`")
    try:
        lines = [line for source in debian_sources(RELEASE) for line in source.one_line()]
    except SourcesError as error:
        raise need(str(error)) from error
    fresh = PROVER.with_name(f"prover.{os.getpid()}")
    command = ["mmdebstrap", "--variant=extract", "--mode=auto", f"--keyring={KEYRING}", "--include=cbmc"]
    for option in ['Apt::Install-Recommends "false"', *(line.rstrip(";") for line in transport_options())]:
        command.append(f"--aptopt={option}")
    print(f"prove: unpacking CBMC of Debian 13 under {PROVER.relative_to(ROOT)}", flush=True)
    try:
        done = subprocess.run([*command, RELEASE, str(fresh), *lines], capture_output=True, text=True)
        if done.returncode:
            raise need(f"CBMC could not be fetched; mmdebstrap says:\n{done.stderr[-2000:]}")
        fresh.rename(PROVER)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def run(command: Sequence[str], seconds: int) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds} s"
    return done.stdout + done.stderr


def prove_c(claim: Claim, prover: list[str], seconds: int) -> str:
    """Nothing when it holds, else why not."""
    text = run([*prover, "--function", claim.name, *claim.options, str(claim.path)], seconds)
    if "VERIFICATION SUCCESSFUL" in text:
        return ""
    failures = [line for line in text.splitlines() if line.endswith("FAILURE")]
    return "\n".join(failures) or text[-500:]


def prove(wanted: str, seconds: int) -> int:
    if not shutil.which("z3"):
        raise need("z3 is missing; run `make setup`")
    prover = cbmc()
    all_claims = [claim for claim in claims() if wanted in f"{claim.path.name}:{claim.name}"]
    z3 = {
        path: run(["z3", str(path)], seconds).split("\n")
        for path in {c.path for c in all_claims}
        if path.suffix == ".smt2"
    }
    failed = 0
    for claim in all_claims:
        start = time.monotonic()
        if claim.path.suffix == ".c":
            why, tool = prove_c(claim, prover, seconds), "cbmc"
        else:
            said = (z3[claim.path] + [""] * 99)[int(claim.name)]
            why, tool = "" if said == claim.expected else f"z3 says {said!r}, not {claim.expected!r}", "z3"
        state = "NOT PROVED" if why else "proved"
        taken_s = time.monotonic() - start
        print(f"{state} ({claim.path.name}, {tool}, {taken_s:.0f} s): {claim.text}\n    For: {claim.scope}")
        if why:
            print("    " + why.replace("\n", "\n    "))
        sys.stdout.flush()
        failed += bool(why)
    print(f"{len(all_claims) - failed} of {len(all_claims)} claims proved")
    return 1 if failed or not all_claims else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="part of FILE:FUNCTION: run only these")
    parser.add_argument("--seconds", type=int, default=600, help="for one claim")
    options = parser.parse_args()
    return prove(options.only, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
