"""A gateway in a namespace: the real dsnatd between a client and a server.

    client 100.64.0.10 --- vin [ inside0 100.64.0.1 | outside0 198.51.100.1 ] vout --- server 198.51.100.10

On the path `dpdk` the engine takes vin and vout with net_af_packet, no hugepages needed; inside0 and
outside0 are its twins. `new_gateway` returns when ready; the gateway ends with the lab. `close` judges the
end: status 0 and the accounting equation exact.
"""

from __future__ import annotations

import json
import os
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

DPDK_INTERFACES = """\
interfaces:
  - {name: inside0, role: inside, path: dpdk, device: "net_af_packet0,iface=vin"}
  - {name: outside0, role: outside, path: dpdk, device: "net_af_packet1,iface=vout"}
"""


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
    daemon: Program = field(init=False)
    starts: int = 0

    def argv(self) -> tuple[str, ...]:
        return (str(self.program), "--config", str(self.file), "--socket", str(self.socket))

    def start(self, *options: str, ready_s: float = 30, env: Mapping[str, str] | None = None) -> None:
        """Starts the engine and waits for its word."""
        self.starts += 1
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        argv = (*self.argv(), "--no-huge", *options)
        self.daemon = self.space.start("env", *settings, *argv, log=f"dsnatd-{self.starts}.log")

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


def new_gateway(lab: Lab, program: Path, text: str, *, start: bool = True) -> Gateway:
    client, space, server = (lab.netns(side) for side in ("client", "gateway", "server"))
    lab.wire(client, "eth0", space, "vin")
    lab.wire(space, "vout", server, "eth0")
    client.ip(f"address add {CLIENT}/24 dev eth0")
    client.ip(f"route add default via {INSIDE_ADDRESS}")
    server.ip(f"address add {SERVER}/24 dev eth0")
    server.ip(f"route add 203.0.113.0/24 via {OUTSIDE_ADDRESS}")
    file = lab.directory / "dsnatd.yaml"
    file.write_text(text)
    # not in the test's directory: a socket's path has at most 107 bytes
    control = Path("/tmp", f"{lab.prefix}-{os.getpid()}.sock")
    lab.undo.callback(control.unlink, missing_ok=True)
    gateway = Gateway(space, client, server, program, file, control)
    if start:
        gateway.start()
        gateway.address()
    return gateway
