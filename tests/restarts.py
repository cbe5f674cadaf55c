"""How long is a gateway dark when its engine is killed and started again: `python -m tests.restarts`.

One gateway on vdevs under a crowd of connections. After each kill -9 the engine is started at once. The
client says for how long it was dark, the engine what its start took (DPDK's own initialization apart), and at
the end every connection must be there still.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.crowd import Crowd
from tests.gateway import Gateway, config, new_gateway
from tests.lab import new_lab, wait_until
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[1]
READY = re.compile(
    r"ready after (\d+) ms: sessions (\d+), DPDK itself (\d+), ports (\d+), engines (\d+), the rest (\d+)"
)
PARTS = ("start", "sessions", "DPDK itself", "ports", "engines", "rest")


def restart(gateway: Gateway, crowd: Crowd, table: Path) -> dict[str, float]:
    """Milliseconds."""
    crowd.say("mark")
    killed_s = time.monotonic()
    gateway.daemon.process.kill()
    gateway.daemon.wait(timeout_s=10)
    ended_ms = (time.monotonic() - killed_s) * 1000
    gateway.start("--sessions", str(table))
    found = READY.search(gateway.daemon.text())
    assert found
    wait_until("answers", lambda: crowd.say("dark")["silent"] < 0.1, deadline_s=30)
    dark_ms = crowd.say("dark")["stream"] * 1000
    parts = dict(zip(PARTS, map(float, found.groups()), strict=True))
    # who was silent for long asks again after as long: not into the next kill as well
    crowd.say("mark")
    wait_until("every connection to be heard", lambda: crowd.say("dark")["waits"] == 0, deadline_s=60)
    return {"dark": dark_ms, "to end": ended_ms, "beyond DPDK": dark_ms - parts["DPDK itself"], **parts}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.restarts", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--active", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=65536, help="engine.max_sessions")
    parser.add_argument("--engine", type=Path, default=ROOT / ".build/engine/dsnatd")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsnat-restarts-") as folder, new_lab(Path(folder)) as lab:
        table = Path("/dev/shm", f"{lab.prefix}.sessions")
        lab.undo.callback(table.unlink, missing_ok=True)
        gateway = new_gateway(lab, args.engine, config(sessions=args.sessions), start=False)
        gateway.start("--sessions", str(table))
        gateway.address()
        crowd = Crowd(
            gateway.client, gateway.server, SERVER, idle=args.idle, active=args.active, streams=5, pings=1
        )
        rows = [restart(gateway, crowd, table) for _ in range(args.kills)]
        asked = crowd.say("ask")
        print(f"{args.kills} kills; lost: {asked['lost']} of {crowd.of} {asked['why']}; ms:")
        for name in rows[0]:
            values = sorted(row[name] for row in rows)
            p50 = statistics.median(values)
            print(f"{name:12} p50 {p50:6.0f}  min {values[0]:6.0f}  max {values[-1]:6.0f}")
        gateway.close()
    return 1 if asked["lost"] or asked["moved"] else 0


if __name__ == "__main__":
    sys.exit(main())
