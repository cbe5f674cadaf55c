"""Two booted images that are a pair, and a crowd of connections through them: `python -m tests.system.pair`.

    client 100.64.0.10 --- bridge in [ gw1, gw2 ] bridge out --- server 198.51.100.10

The fleet tool makes a pair of them, with sync over the inside network. Then the master's engine is killed,
the whole master stands still and goes on (SIGSTOP of QEMU), and its power fails (SIGKILL of QEMU). After each
the client says what it lost and for how long it was dark. Emulated CPUs are some twenty times slower than
real ones, so the times are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from image.boot import MANAGEMENT_MAC, Machine, Nic
from image.build import image_path
from image.identity import make_identity
from tests.crowd import Crowd
from tests.lab import new_lab, wait_until
from tests.provision.sshd import make_key
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 900

FLEET = """\
schema: 1
defaults:
  ssh: {{identity: {key}, connect_timeout: 120s}}
  engine: {{workers: 1, max_sessions: 100000}}
  rollout: {{confirm_within: 300s}}
pools:
  laddr_g1: {{addresses: [203.0.113.1-203.0.113.4]}}
pairs:
  edge:
    vrrp:
      advert_interval: {advert}
      instances:
        inside0: {{id: 10, addresses: [100.64.0.1/24]}}
        outside0: {{id: 20, addresses: [198.51.100.1/24]}}
    sync: {{key: "file:{sync}", addresses: {{gw1: 100.64.0.2, gw2: 100.64.0.3}}}}
    zones:
      - {{source: 100.64.0.0/24, pool: laddr_g1}}
    probes: [198.51.100.10]
gateways:
"""
MEMBER = """\
  gw{n}:
    pair: edge
    priority: {priority}
    management: {{address: 127.0.0.1, port: {port}}}
    host_key: {host_key}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.{own}/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.{own}/24]}}
"""


class Booted:
    def __init__(self, folder: Path, key: Path, machines: list[Machine], advert: str) -> None:
        self.folder, self.key, self.machines = folder, key, machines
        sync = folder / "sync.key"
        sync.write_text("8f3c" * 16 + "\n")
        sync.chmod(0o600)
        text = FLEET.format(key=key, sync=sync, advert=advert)
        for n, machine in enumerate(machines, 1):
            assert machine.identity is not None
            text += MEMBER.format(
                n=n,
                own=n + 1,
                priority=150 - 25 * n,
                port=machine.ssh_port,
                host_key=machine.identity.host_key_public.strip(),
            )
        self.file = folder / "fleet.yaml"
        self.file.write_text(text)

    def run(self, *words: str) -> str:
        argv = [sys.executable, "-m", "provision", "--file", str(self.file), *words]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode:
            raise SystemExit(f"`{' '.join(words)}` ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def ssh(self, machine: Machine, command: str) -> str:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        argv = ["ssh", "-i", str(self.key), "-p", str(machine.ssh_port)]
        argv += [word for option in options for word in ("-o", option)]
        done = subprocess.run(
            [*argv, "root@127.0.0.1", command],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return done.stdout

    def sync(self, machine: Machine) -> dict[str, Any]:
        text = self.ssh(machine, "dsnatctl show sync --json")
        said: dict[str, Any] = json.loads(text) if text.strip() else {}
        return said

    def master(self) -> Machine | None:
        for machine in self.machines:
            if "inet 198.51.100.1/" in self.ssh(machine, "ip address show outside0"):
                return machine
        return None


def phase(crowd: Crowd, what: str, do: Callable[[], object]) -> None:
    crowd.say("mark")
    do()
    time.sleep(2)
    wait_until("traffic again", lambda: crowd.say("dark")["silent"] < 0.5, deadline_s=180)
    dark = crowd.say("dark")
    asked = crowd.say("ask")
    print(
        f"{what:44} {asked['lost']:4} of {crowd.of}  moved {asked['moved']}  "
        f"dark {dark['stream']:6.3f} {dark['ping']:6.3f} {dark['active']:6.3f} s  {'; '.join(asked['why'])}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.pair", description=__doc__)
    parser.add_argument("--image", type=Path, default=image_path())
    parser.add_argument("--idle", type=int, default=400)
    parser.add_argument("--active", type=int, default=40)
    parser.add_argument("--advert", default="1s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsnat-pair-") as name:
        folder = Path(name)
        key = folder / "operator"
        public = make_key(key)
        with new_lab(folder / "lab") as lab, ExitStack() as undo:
            client, wires, server = (lab.netns(side) for side in ("client", "wires", "server"))
            lab.wire(client, "eth0", wires, "client")
            lab.wire(server, "eth0", wires, "server")
            taps = {tap: wires.open_tap(tap) for tap in ("in1", "in2", "out1", "out2")}
            lab.bridge(wires, "in", "client", "in1", "in2")
            lab.bridge(wires, "out", "server", "out1", "out2")
            client.ip("address add 100.64.0.10/24 dev eth0")
            client.ip("route add default via 100.64.0.1")
            server.ip(f"address add {SERVER}/24 dev eth0")
            server.ip("route add 203.0.113.0/24 via 198.51.100.1")
            machines = []
            for n in (1, 2):  # one after the other: two cold boots at once starve each other
                nics = [
                    Nic((taps[f"{side}{n}"],), f"52:54:00:d6:{n:02x}:0{3 + i}")
                    for i, side in enumerate(("in", "out"))
                ]
                identity = make_identity(f"gw{n}", public, management=MANAGEMENT_MAC)
                machine = Machine(args.image, folder / f"gw{n}", identity, nics, firmware=False)
                machines.append(undo.enter_context(machine))
                print(f"gw{n} ready after {machine.wait_ready().seconds:.0f} s", flush=True)
            pair = Booted(folder, key, machines, args.advert)
            pair.run("push", "--yes")
            print("a pair of them", flush=True)
            wait_until(
                "both to be in sync",
                lambda: all(pair.sync(machine).get("in_sync") for machine in machines),
                deadline_s=300,
            )
            crowd = Crowd(client, server, SERVER, idle=args.idle, active=args.active, streams=4, pings=1)
            print(
                f"{crowd.of} connections, adverts each {args.advert}; dark: stream, ping, active", flush=True
            )

            def equal() -> bool:
                said = [pair.sync(machine) for machine in machines]
                return all(one.get("in_sync") and one["waiting"] == 0 for one in said)

            master = pair.master() or machines[0]
            other = machines[1] if master is machines[0] else machines[0]
            wait_until("both to be equal", equal, deadline_s=120)
            phase(crowd, "nothing", lambda: None)
            phase(
                crowd,
                "kill -9 of the master's engine",
                lambda: pair.ssh(master, "systemctl kill --signal=KILL dsnatd"),
            )
            wait_until("both to be equal", equal, deadline_s=120)
            master = pair.master() or master
            other = machines[1] if master is machines[0] else machines[0]
            phase(crowd, "SIGSTOP of the whole master", lambda: os.kill(master.pid, signal.SIGSTOP))
            phase(crowd, "goes on", lambda: os.kill(master.pid, signal.SIGCONT))
            wait_until("both to be equal", equal, deadline_s=180)
            print("tables: in sync, 0 differences", flush=True)
            master = pair.master() or other
            phase(crowd, "the master's power fails", lambda: os.kill(master.pid, signal.SIGKILL))
            lost = int(crowd.say("ask")["lost"])
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
