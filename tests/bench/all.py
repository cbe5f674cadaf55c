"""`make bench`: all measurements, one part after the other; one that fails does not take the others with it.

Exit status: 0 all were measured, 1 one was not.
"""

from __future__ import annotations

import subprocess
import sys

PARTS = ("run", "ports", "kernel", "queue")


def main() -> int:
    failed = [
        part
        for part in PARTS
        if subprocess.run([sys.executable, "-m", f"tests.bench.{part}"], check=False).returncode
    ]
    if failed:
        print(f"make bench: not measured: {', '.join(failed)}; what they said is above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
