"""How long is a gateway dark when its engine is killed and started again: `python -m tests.restarts`.

One gateway on vdevs under a crowd of connections. After each kill -9 the engine is started at once. The
client says for how long it was dark, the engine what its start took, and at the end every connection must be
there still. Beside each, rte_eal_init() alone is measured with the same devices. With --spare nobody starts
it: the process that it has prepared goes on. With --hammer it is killed as often as can be, without times.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.crowd import Crowd
from tests.gateway import Gateway, config, new_gateway
from tests.lab import Lab, new_lab, wait_until
from tests.pair import hold_twin
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[1]
READY = re.compile(
    r"ready after (\d+) ms: sessions (\d+), DPDK itself (\d+), ports (\d+), engines (\d+), forwarding (\d+), "
    r"the rest (\d+)"
)
PREPARED = re.compile(r"process (\d+) is prepared to go on for process (\d+)")
PARTS = ("start", "sessions", "DPDK itself", "ports", "engines", "forwarding", "rest")


def restart(gateway: Gateway, crowd: Crowd, table: Path) -> dict[str, float]:
    """A kill, and a start right after it. Milliseconds."""
    crowd.say("mark")
    killed_s = time.monotonic()
    gateway.daemon.process.kill()
    gateway.daemon.wait(timeout_s=10)
    ended_ms = (time.monotonic() - killed_s) * 1000
    gateway.start("--sessions", str(table))
    return measured(gateway, crowd, ended_ms)


class Bare:
    """DPDK's own start with the same devices, on wires of its own."""

    def __init__(self, lab: Lab, program: Path) -> None:
        self.space, self.program = lab.netns("bare"), program
        lab.wire(self.space, "vin", self.space, "vin2")
        lab.wire(self.space, "vout", self.space, "vout2")

    def start_ms(self) -> float:
        ring = "blocksz=65536,framesz=2048,framecnt=4096,qpairs=1"
        devices = [f"--vdev=net_af_packet{n},iface={wire},{ring}" for n, wire in enumerate(("vin", "vout"))]
        options = ["--no-shconf", "--no-telemetry", "--log-level=warning", "--no-pci", "--no-huge", "-m64"]
        prefix = f"--file-prefix=bare{os.getpid()}"
        return float(
            self.space.run(str(self.program), *options, prefix, "--lcores=0@(0,1),1@(0,1)", *devices)
        )


def inherit(gateway: Gateway, crowd: Crowd, kills: int) -> dict[str, float]:
    """A kill, after which the prepared process goes on. Milliseconds."""
    said = wait_until(
        "a prepared process", lambda: PREPARED.findall(gateway.daemon.text())[kills:], deadline_s=60
    )
    crowd.say("mark")
    os.kill(int(said[0][1]), signal.SIGKILL)
    wait_until("the heir", lambda: len(READY.findall(gateway.daemon.text())) > kills + 1, deadline_s=30)
    return measured(gateway, crowd, 0)


def hammer(gateway: Gateway, crowd: Crowd, table: Path, kills: int) -> int:
    """Kills as fast as it goes, two in three while packets go, the others at any moment of the start. Each
    hundred all connections must be there still. Returns how many kills met an engine that was forwarding.
    """
    forwarding = 0
    for number in range(1, kills + 1):
        if number % 3:
            gateway.wait_ready()
            time.sleep(random.uniform(0, 0.1))
        else:
            time.sleep(random.uniform(0, 0.5))
        forwarding += "dsnatd: ready" in gateway.daemon.text()
        assert "starting with none" not in gateway.daemon.text()
        gateway.daemon.process.kill()
        gateway.daemon.wait(timeout_s=10)
        gateway.start("--sessions", str(table), wait=False)
        if number % 100 == 0 or number == kills:
            gateway.wait_ready()
            crowd.say("mark")
            wait_until("all to be heard", lambda: crowd.say("dark")["waits"] == 0, deadline_s=300)
            asked = crowd.say("ask")
            assert gateway.show("counters")["equation"]
            print(f"{number} kills, {forwarding} while forwarding; lost: {asked['lost']} of {crowd.of}")
            sys.stdout.flush()
    return forwarding


def measured(gateway: Gateway, crowd: Crowd, ended_ms: float) -> dict[str, float]:
    found = READY.findall(gateway.daemon.text())[-1]
    wait_until("answers", lambda: crowd.say("dark")["silent"] < 0.1, deadline_s=30)
    dark_ms = crowd.say("dark")["stream"] * 1000
    parts = dict(zip(PARTS, map(float, found), strict=True))
    # who was silent for long asks again after as long: not into the next kill as well
    crowd.say("mark")
    wait_until("every connection to be heard", lambda: crowd.say("dark")["waits"] == 0, deadline_s=60)
    return {"dark": dark_ms, "to end": ended_ms, **parts}


def text(sessions: int, spare: bool) -> str:
    written = config(sessions=sessions)
    return written.replace("engine: {", "engine: {spare: on, ") if spare else written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.restarts", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--active", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=65536, help="engine.max_sessions")
    parser.add_argument("--engine", type=Path, default=ROOT / ".build/engine/dsnatd")
    parser.add_argument("--spare", action="store_true", help="a second process is prepared, and goes on")
    parser.add_argument(
        "--hammer", action="store_true", help="kill at any moment, as fast as it goes; no times are taken"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsnat-restarts-") as folder, new_lab(Path(folder)) as lab:
        table = Path("/dev/shm", f"{lab.prefix}.sessions")
        lab.undo.callback(table.unlink, missing_ok=True)
        gateway = new_gateway(lab, args.engine, text(args.sessions, args.spare), start=False)
        gateway.start("--sessions", str(table))
        gateway.address()
        for twin in ("inside0", "outside0"):
            hold_twin(gateway.space, twin)
        crowd = Crowd(
            gateway.client, gateway.server, SERVER, idle=args.idle, active=args.active, streams=5, pings=1
        )
        if args.hammer:
            forwarding = hammer(gateway, crowd, table, args.kills)
            asked = crowd.say("ask")
            print(
                f"{args.kills} kills, {forwarding} while forwarding; lost: {asked['lost']} of {crowd.of} "
                f"{asked['why']}, moved streams: {asked['moved']}"
            )
            gateway.close()
            return 1 if asked["lost"] or asked["moved"] else 0
        bare = Bare(lab, args.engine.with_name("dsnat-eal-bench"))
        rows = []
        for number in range(args.kills):
            row = inherit(gateway, crowd, number) if args.spare else restart(gateway, crowd, table)
            rows.append(row | {"bare EAL": bare.start_ms()})
        beyond_ms = statistics.median(row["dark"] - row["bare EAL"] for row in rows)
        asked = crowd.say("ask")
        print(f"{args.kills} kills; lost: {asked['lost']} of {crowd.of} {asked['why']}; ms:")
        for name in rows[0]:
            values = sorted(row[name] for row in rows)
            p50 = statistics.median(values)
            print(f"{name:12} p50 {p50:6.0f}  min {values[0]:6.0f}  max {values[-1]:6.0f}")
        print(f"dark beyond DPDK's own start, p50: {beyond_ms:.0f}")
        if not args.spare:  # an heir is not our child
            gateway.close()
    return 1 if asked["lost"] or asked["moved"] else 0


if __name__ == "__main__":
    sys.exit(main())
