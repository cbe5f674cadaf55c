"""`make bench`: all measurements, one part after the other; one that fails does not take the others with it.

What is measured is built first, so that no part meets a program of another tree. A whole run takes about ten
minutes; how long each part took is printed.

Exit status: 0 all were measured, 1 one was not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("run", "ports", "kernel", "queue")


def main() -> int:
    if subprocess.run(["ninja", "-C", ROOT / ".build/engine", "--quiet"], check=False).returncode:
        print("make bench: the engine does not build; `make build` says why", file=sys.stderr)
        return 1
    failed, took = [], []
    for part in PARTS:
        start = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"tests.bench.{part}"], cwd=ROOT, check=False).returncode:
            failed.append(part)
        took.append(f"{part} {time.monotonic() - start:.0f} s")
    print(f"\nmake bench: {', '.join(took)}")
    if failed:
        print(f"make bench: not measured: {', '.join(failed)}; what they said is above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
