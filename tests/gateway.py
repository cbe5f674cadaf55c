"""A gateway in a namespace: the real dsnatd between a client and a server.

    client 100.64.0.10 --- vin [ inside0 100.64.0.1 | outside0 198.51.100.1 ] vout --- server 198.51.100.10

On the path `dpdk` the engine takes vin and vout with net_af_packet, no hugepages needed; inside0 and
outside0 are its twins. On the path `nfqueue` the veths themselves are called inside0 and outside0, and the
kernel keeps them. A hybrid has one side on each. `new_gateway` returns when ready; the gateway ends with the
lab. `close` judges the end: status 0 and the accounting equation exact.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab import Lab, Netns, Program, wait_until
from tests.traffic import CLIENT, POOL, SERVER

INSIDE_ADDRESS, OUTSIDE_ADDRESS = "100.64.0.1", "198.51.100.1"

POOLS_AND_ZONES = f"""\
pools:
  - {{name: public, addresses: [{POOL[0]}-{POOL[-1]}]}}
zones:
  - {{source: 100.64.0.0/16, pool: public}}
"""

# the interfaces that a configuration names, and the kernel's wires behind them
WIRES = {
    "dpdk": {"inside": "vin", "outside": "vout"},
    "nfqueue": {"inside": "inside0", "outside": "outside0"},
}

# one path for both sides; in a hybrid each side has its own
PATHS = {
    "dpdk": {"inside": "dpdk", "outside": "dpdk"},
    "nfqueue": {"inside": "nfqueue", "outside": "nfqueue"},
    "kernel-inside": {"inside": "nfqueue", "outside": "dpdk"},
    "kernel-outside": {"inside": "dpdk", "outside": "nfqueue"},
}


def interfaces(path: str) -> str:
    text = "interfaces:\n"
    for number, (side, kind) in enumerate(PATHS[path].items()):
        device = f', device: "net_af_packet{number},iface={WIRES[kind][side]}"' if kind == "dpdk" else ""
        text += f"  - {{name: {side}0, role: {side}, path: {kind}{device}}}\n"
    return text


DPDK_INTERFACES = interfaces("dpdk")


def config(
    *,
    interfaces: str = DPDK_INTERFACES,
    workers: int = 1,
    sessions: int = 100_000,
    rest: str = POOLS_AND_ZONES,
) -> str:
    return f"engine: {{workers: {workers}, max_sessions: {sessions}}}\n{interfaces}{rest}"


@dataclass
class Gateway:
    space: Netns
    client: Netns
    server: Netns
    program: Path
    file: Path
    socket: Path
    path: str = "dpdk"
    log: str = "dsnatd"
    daemon: Program = field(init=False)
    starts: int = 0

    def port(self, side: str) -> str:
        """The kernel's end of that side's wire."""
        return WIRES[PATHS[self.path][side]][side]

    def pid(self) -> int:
        """The daemon's own: ip and env are gone, each has become the next."""
        return self.daemon.process.pid

    def argv(self) -> tuple[str, ...]:
        return (str(self.program), "--config", str(self.file), "--socket", str(self.socket))

    def start(
        self, *options: str, ready_s: float = 30, env: Mapping[str, str] | None = None, wait: bool = True
    ) -> None:
        """Starts the engine and waits for its word."""
        self.starts += 1
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        argv = (*self.argv(), "--no-huge", *options)
        self.daemon = self.space.start("env", *settings, *argv, log=f"{self.log}-{self.starts}.log")

        if wait:
            self.wait_ready(ready_s=ready_s)

    def wait_ready(self, *, ready_s: float = 30) -> None:
        def ready() -> bool:
            assert self.daemon.running, f"dsnatd ended at once:\n{self.daemon.text()[-3000:]}"
            return "dsnatd: ready" in self.daemon.text()

        wait_until("dsnatd to be ready", ready, deadline_s=ready_s)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request of the control socket; an answer that is not ok is an error of the test."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(self.socket))
            client.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json.loads(client.makefile().readline())
        assert answer["ok"], answer
        return answer

    def show(self, what: str, **filters: Any) -> dict[str, Any]:
        return self.ask(cmd="show", what=what, **filters)

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self.show("counters")["counters"]
        return counters

    def reason(self, name: str) -> int:
        count: int = self.counters()["reasons"][name]
        return count

    def drops(self) -> Mapping[str, int]:
        dropped: dict[str, int] = self.show("counters")["dropped"]
        return dropped

    def address(self) -> None:
        """What networkd would do: addresses on the twins."""
        for name, address in (("inside0", INSIDE_ADDRESS), ("outside0", OUTSIDE_ADDRESS)):
            self.space.ip(f"address replace {address}/24 dev {name}")
            self.space.ip(f"link set {name} up")

    def close(self) -> None:
        answer = self.show("counters")
        assert answer["equation"], answer
        self.daemon.process.terminate()
        status = self.daemon.wait(timeout_s=15)
        assert status == 0, f"dsnatd ended with status {status}:\n{self.daemon.text()[-3000:]}"


def new_gateway(
    lab: Lab, program: Path, text: str = "", *, path: str = "dpdk", start: bool = True
) -> Gateway:
    """`text` is the whole configuration; without one, the usual pool over `path`."""
    client, space, server = (lab.netns(side) for side in ("client", "gateway", "server"))
    lab.wire(client, "eth0", space, WIRES[PATHS[path]["inside"]]["inside"])
    lab.wire(space, WIRES[PATHS[path]["outside"]]["outside"], server, "eth0")
    client.ip(f"address add {CLIENT}/24 dev eth0")
    client.ip(f"route add default via {INSIDE_ADDRESS}")
    server.ip(f"address add {SERVER}/24 dev eth0")
    server.ip(f"route add 203.0.113.0/24 via {OUTSIDE_ADDRESS}")
    file = lab.directory / "dsnatd.yaml"
    file.write_text(text or config(interfaces=interfaces(path)))
    # not in the test's directory: a socket's path has at most 107 bytes
    control = Path("/tmp", f"{lab.prefix}-{os.getpid()}.sock")
    lab.undo.callback(control.unlink, missing_ok=True)
    gateway = Gateway(space, client, server, program, file, control, path)
    if start:
        gateway.start()
        gateway.address()
    return gateway


def watch(space: Netns, what: str, name: str) -> Program:
    """A tcpdump that has begun to listen."""
    log, errors = f"{name}.log", f"{name}-errors.log"
    argv = ("tcpdump", "-n", "-e", "-l", "--immediate-mode", "-i", "eth0", *what.split())
    program = space.start(*argv, log=log, errors=errors)
    path = space.lab.directory / errors
    wait_until("tcpdump to listen", lambda: "listening on" in path.read_text())
    return program


def mac_of(space: Netns, name: str) -> str:
    found = re.search(r"link/ether (\S+)", space.ip(f"link show {name}"))
    assert found
    return found[1]


def ping(space: Netns, address: str, *options: str) -> str:
    return space.run("ping", "-n", "-c", "3", "-i", "0.05", "-W", "2", *options, address, check=False)
