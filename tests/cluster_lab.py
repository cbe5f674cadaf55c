"""A cluster in namespaces: real dsnatd, real BIRD, the real agent, and routers that spread by 5-tuple.

                                   .1 [ gw1 ] .1
    holder --- inside router ------.2 [ gw2 ] .2------ outside router --- server
    100.64.16.0/20   .254  (bridge)     ...     (bridge)  .254          192.0.2.10

Both routers are BIRD too. The inside one spreads over all gateways that announce the default route: with
`hashing="threshold"` as Linux does by itself, with `"resilient"` through a resilient next-hop group, which a
thread here keeps as BIRD's routes are (what FRR does on a router). Gateways are changed with the code of
`dsnat-fleet`, down to the agent; only SSH and systemd are missing: `Here` is the machine that the agent sees.
What happens to such a cluster is in cluster.py.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from provision import cluster, moving
from provision.agent import PROTOCOL, Json, Refused
from provision.agent.command import reply
from provision.agent.machine import Machine
from provision.agent.state import State
from provision.load import load
from provision.model import Fleet
from provision.plan import Running
from provision.plan import plan as make_plan
from provision.push import AgentRefused, Order, Remote, Result, gather
from provision.render import ENGINE, Rendered, render
from provision.rollout import Budget, Rollout
from provision.validate import validate
from tests.lab import Lab, Netns, Program, run, wait_until

ROOT = Path(__file__).resolve().parents[1]
INSIDE_AS, OUR_AS, OUTSIDE_AS = 64513, 64512, 64500
HOSTS = "100.64.16.0/20"
FIRST_HOST = "100.64.16.1"
SERVER, PORT = "192.0.2.10", 7000
TABLE = 100  # where the inside router's BIRD puts its routes, with resilient hashing
GROUP = 1000  # the next-hop group

HEAD = """\
schema: 1
defaults:
  engine: {{workers: 1, max_sessions: 20000}}
  timeouts: {{tcp_opening: 4s, tcp_closing: 1s, hold: 0s}}
  rollout: {{first_wave_percent: 100}}
pools:
  public: {{addresses: [203.0.113.0/26]}}
clusters:
  north:
    hashing: {hashing}
    grace: {grace}
    bgp:
      as: 64512
      bfd: {{interval: {bfd}, multiplier: 3}}
      neighbors:
        - {{address: 100.64.0.254, as: 64513}}
        - {{address: 198.51.100.254, as: 64500}}
    zones:
      - {{source: {hosts}, pool: public}}
gateways:
"""
MEMBER = """\
  gw{n}:
    cluster: north
    weight: {weight}
    management: {{address: 192.0.2.{n}}}
    host_key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFGT6nTb3i0nCRfdyjVkNEVTjXNeiWrxDMUIxdm2Cto{n}
    interfaces:
      inside0: {{role: inside, path: nfqueue, addresses: [100.64.0.{n}/24]}}
      outside0: {{role: outside, path: nfqueue, addresses: [198.51.100.{n}/24]}}
"""

# two more gateways that are one member: its slice has a standby, which holds the sessions by sync
PAIR = """\
pairs:
  edge:
    cluster: north
    vrrp:
      advert_interval: 100ms
      instances:
        inside0: {id: 10, addresses: [100.64.0.101/24]}
        outside0: {id: 20, addresses: [198.51.100.101/24]}
"""
HALVES = (6, 7)

ROUTER = """\
router id {address};
log "{log}" all;
protocol device {{ scan time 5; }}
protocol bfd {{ interface "*" {{ interval {bfd} ms; multiplier 3; }}; }}
protocol kernel {{ {table} merge paths on; ipv4 {{ import none; export where source = RTS_BGP; }}; }}
protocol static own {{ ipv4; route {announces} blackhole; }}
protocol bgp gateways {{
    local {address} as {own_as};
    neighbor range {network} as {peer_as};
    dynamic name "gateway";
    hold time 9;
    error wait time 1, 4;
    bfd on;
    ipv4 {{ import all; export where {exports}; next hop self; }};
}}
"""


class Here(Machine):
    """A gateway of the lab, as its agent sees it: services are the lab's programs, time is real."""

    def __init__(self, gateway: Member) -> None:
        super().__init__(gateway.root, str(gateway.socket))
        self.gateway, self.drain_file = gateway, gateway.root / "run/dsnat-drain"
        self.connection: float | None = None

    def run(self, argv: list[str], timeout_s: float = 150.0) -> tuple[int, str]:
        match argv:
            case ["dsnatd", "--check", path]:
                return super().run([str(self.gateway.program), "--check", path], timeout_s)
            case ["birdc", "-r", *words]:
                return super().run(["birdc", "-s", str(self.gateway.bird_socket), "-r", *words], timeout_s)
            case ["bird", "-p", *_]:
                return super().run(argv, timeout_s)
            case ["ip", "-j", *_]:
                return super().run(self.gateway.space.argv(*argv), timeout_s)
            case ["systemctl", "is-active", *units]:
                return 0, "\n".join("active" if self.gateway.alive(unit) else "inactive" for unit in units)
            case ["systemctl", _, "bird.service"]:
                words = ["birdc", "-s", str(self.gateway.bird_socket), "configure"]
                return super().run(words, timeout_s) if self.gateway.alive("bird.service") else (0, "")
            case ["systemctl", *_] | ["networkctl", *_]:
                return 0, ""
        raise AssertionError(argv)

    def arm(self, identity: str, verb: str = "undo") -> None:
        pass

    def connected_at(self) -> float | None:
        return self.connection

    def adverts(self, ids: set[int], wait_s: float) -> dict[int, str]:
        return self.gateway.space.inside(lambda: super(Here, self).adverts(ids, wait_s))

    def on_trial(self) -> bool:
        return False

    def announce(self, text: str) -> None:
        print(f"{self.gateway.name}: {text}")

    def log(self, text: str) -> None:
        pass


class Member:
    """One gateway: namespace, root of the agent, dsnatd, BIRD and the announcer."""

    def __init__(self, lab: Cluster, number: int) -> None:
        self.lab, self.number, self.name = lab, number, f"gw{number}"
        self.program = lab.program
        self.space = lab.lab.netns(self.name)
        self.root = lab.lab.directory / self.name
        self.socket, self.bird_socket = self.root / "dsnatd.sock", self.root / "bird.ctl"
        (self.root / "generations/0").mkdir(parents=True)
        (self.root / "run").mkdir()
        (self.root / "generations/current").symlink_to("0")
        self.programs: dict[str, Program] = {}
        self.machine = Here(self)
        for side, router in (("inside", lab.inside), ("outside", lab.outside)):
            port = f"{side[0]}{number}"
            lab.lab.wire(self.space, f"{side}0", router, port)
            router.ip(f"link set {port} master lan")
            network = "100.64.0" if side == "inside" else "198.51.100"
            self.space.ip(f"address add {network}.{number}/24 dev {side}0")

    def start(self) -> None:
        """What systemd would do at boot, with the configuration that was pushed."""
        here = self.root / "generations/current"
        argv = (str(self.program), "--config", str(here / "dsnatd.yaml"), "--socket", str(self.socket))
        engine = self.space.start(*argv, log=f"{self.name}-dsnatd.log")
        self.programs["dsnatd"] = engine

        def ready() -> bool:
            assert engine.running, f"dsnatd ended at once:\n{engine.text()[-3000:]}"
            return "dsnatd: ready" in engine.text()

        wait_until(f"the engine of {self.name}", ready, deadline_s=60)
        self.programs["bird"] = self.space.start(
            *("bird", "-f", "-c", str(here / "bird.conf"), "-s", str(self.bird_socket)),
            *("-P", str(self.root / "bird.pid")),
            log=f"{self.name}-bird.log",
        )
        self.programs["announce"] = self.space.start(
            *("env", f"PYTHONPATH={ROOT}", f"DSNAT_ROOT={self.root}", f"DSNAT_SOCKET={self.socket}"),
            *(f"DSNAT_ETC={here}", f"DSNAT_DRAIN={self.machine.drain_file}"),
            *(sys.executable, "-m", "provision.agent", "announce"),
            log=f"{self.name}-announce.log",
        )
        if (here / "keepalived.conf").exists():
            # Its own /run: there are the files that `drain` and the engine write.
            word = self.root / "run/dsnatd/vrrp"
            word.parent.mkdir(exist_ok=True)
            word.unlink(missing_ok=True)
            word.symlink_to(f"{self.socket}.vrrp")
            mount = f"mount --bind {self.root / 'run'} /run"
            keepalived = f"exec keepalived -n -l -f {here / 'keepalived.conf'}"
            pids = "-p /run/keepalived.pid -r /run/vrrp.pid"
            self.programs["keepalived"] = self.space.start(
                *("unshare", "-m", "sh", "-c", f"{mount} && {keepalived} {pids}"),
                log=f"{self.name}-keepalived.log",
            )

    def alive(self, unit: str) -> bool:
        program = self.programs.get(unit.removesuffix(".service"))
        return program is not None and program.running

    def kill(self) -> None:
        """Power off: nothing says goodbye."""
        for side in ("inside0", "outside0"):
            self.space.ip(f"link set {side} down")
        for program in self.programs.values():
            program.process.kill()
            program.process.wait()

    def sessions(self) -> int:
        return int(self.machine.engine({"cmd": "status"})["sessions"])

    def reason(self, name: str) -> int:
        counters = self.machine.engine({"cmd": "show", "what": "counters"})["counters"]
        return int(counters["reasons"][name])


class Cluster:
    """The routers, the server, and as many gateways as were asked for."""

    def __init__(
        self, lab: Lab, program: Path, *, hashing: str = "resilient", bfd_ms: int = 300, grace: str = "1s"
    ) -> None:
        self.lab, self.program, self.hashing = lab, program, hashing
        self.bfd_ms, self.grace, self.standby = bfd_ms, grace, False
        self.weights: dict[int, int] = {}
        self.members: dict[str, Member] = {}
        self.file = lab.directory / "fleet.yaml"
        self.hosts, self.inside, self.outside, self.server = (
            lab.netns(side) for side in ("hosts", "inside", "outside", "server")
        )
        for router, address in ((self.inside, "100.64.0.254/24"), (self.outside, "198.51.100.254/24")):
            lab.bridge(router, "lan")
            router.ip(f"address add {address} dev lan")
            router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.fib_multipath_hash_policy=1")
        # Between namespaces a packet keeps the hash that its socket gave it, and routers use that one; the
        # socket would choose another when it sends again. On a wire only the packet itself counts.
        for space in (self.hosts, self.server):
            space.run("sysctl", "-qw", "net.core.txrehash=0")
        lab.wire(self.hosts, "eth0", self.inside, "hosts")
        self.hosts.ip("address add 100.127.0.2/30 dev eth0")
        self.inside.ip("address add 100.127.0.1/30 dev hosts")
        self.hosts.ip(f"route add local {HOSTS} dev lo")
        self.hosts.ip("route add default via 100.127.0.1")
        self.inside.ip(f"route add {HOSTS} via 100.127.0.2")
        lab.wire(self.server, "eth0", self.outside, "server")
        self.server.ip(f"address add {SERVER}/24 dev eth0")
        self.outside.ip("address add 192.0.2.1/24 dev server")
        self.server.ip("route add default via 192.0.2.1")
        table = f"kernel table {TABLE};" if hashing == "resilient" else ""
        self._router(self.inside, "100.64.0", INSIDE_AS, HOSTS, table)
        self._router(self.outside, "198.51.100", OUTSIDE_AS, "0.0.0.0/0", "")
        if hashing == "resilient":
            self._keep_group()

    def _router(self, space: Netns, network: str, own_as: int, announces: str, table: str) -> None:
        name = space.name.rpartition("-")[2]
        conf = self.lab.directory / f"{name}.conf"
        conf.write_text(
            ROUTER.format(
                address=f"{network}.254",
                network=f"{network}.0/24",
                own_as=own_as,
                peer_as=OUR_AS,
                announces=announces,
                table=table,
                exports='proto = "own"'
                + (" || source = RTS_BGP" if table == "" and own_as == OUTSIDE_AS else ""),
                bfd=self.bfd_ms,
                log=self.lab.directory / f"{name}-bird.log",
            )
        )
        socket = str(self.lab.directory / f"{name}.ctl")
        words = ("bird", "-f", "-c", str(conf), "-s", socket, "-P", f"{socket}.pid")
        space.start(*words, log=f"{name}.log")

    def _keep_group(self) -> None:
        """The default route leads to a resilient group, and the group follows what BIRD learned."""
        stop = threading.Event()

        def members() -> list[int]:
            words = ["ip", "-n", self.inside.name, "route", "show", "default", "table", str(TABLE)]
            return sorted(int(n) for n in re.findall(r"via 100\.64\.0\.(\d+)", run(words, check=False)))

        def follow() -> None:
            have: list[int] = []
            known: set[int] = set()
            while not stop.is_set():
                want = members()
                if want != have and want:
                    for number in set(want) - known:
                        self.inside.ip(f"nexthop add id {number} via 100.64.0.{number} dev lan")
                        known.add(number)
                    group = "/".join(map(str, want))
                    kind = "type resilient buckets 4096 idle_timer 5 unbalanced_timer 0"
                    self.inside.ip(f"nexthop replace id {GROUP} group {group} {kind}")
                    if not have:
                        self.inside.ip(f"route replace default nhid {GROUP}")
                    have = want
                stop.wait(0.02)

        thread = threading.Thread(target=follow)
        thread.start()

        def end() -> None:
            stop.set()
            thread.join()

        self.lab.undo.callback(end)

    # -- the fleet --

    def fleet(self) -> Fleet:
        text = HEAD.format(hashing=self.hashing, grace=self.grace, hosts=HOSTS, bfd=f"{self.bfd_ms}ms")
        text += "".join(MEMBER.format(n=n, weight=w) for n, w in self.weights.items())
        if self.standby:
            halves = "".join(MEMBER.format(n=n, weight=1) for n in HALVES)
            for n in HALVES:
                own = f"    cluster: north\n    weight: 1\n    management: {{address: 192.0.2.{n}}}"
                assert own in halves
                half = f"    pair: edge\n    priority: {200 - n}\n    management: {{address: 192.0.2.{n}}}"
                halves = halves.replace(own, half)
            text = text.replace("gateways:\n", f"{PAIR}gateways:\n") + halves
        self.file.write_text(text)
        fleet, source = load(self.file)
        assert not [p for p in validate(fleet, source) if not p.warning]
        return fleet

    @contextmanager
    def dial(self, name: str) -> Iterator[Remote]:
        yield Asked(self.members[name])

    def look(self, fleet: Fleet) -> dict[str, Running]:
        """What runs, of those that were there before."""
        found = gather([name for name in fleet.gateways if name in self.members], self.dial, jobs=4)
        return {name: value for name, value in found.items() if isinstance(value, Running)}

    def push(self, *numbers: int, weights: Mapping[int, int] | None = None) -> list[Result]:
        """fleet.yaml with these gateways, carried out as `dsnat-fleet push` does."""
        self.weights = {n: (weights or {}).get(n, 1) for n in numbers}
        if self.standby:
            numbers = (*numbers, *HALVES)
        new = [n for n in numbers if f"gw{n}" not in self.members]
        for n in new:
            self.members[f"gw{n}"] = Member(self, n)
        fleet = self.fleet()
        running = self.look(fleet)
        wanted = {name: self.rendered(fleet, name) for name in fleet.gateways}
        cluster.keep_slices(self.file.with_name("fleet.slices.yaml"), fleet)
        order = Order("lab", "lab", 60)
        rollout = Rollout(
            fleet, self.dial, order, Budget(0), 4, say=lambda who, text: print(f"{who}: {text}")
        )
        if new and len(new) == len(numbers):  # the first boot of all: nothing runs that could be asked
            return [self._first(name, wanted[name]) for name in wanted]
        for name in (f"gw{n}" for n in new):
            # from the factory: its services start with its first configuration, after the others let go
            self.members[name].machine.__class__ = Fresh
        return moving.carry_out(rollout, make_plan(wanted, running), wanted, running)

    def rendered(self, fleet: Fleet, name: str) -> Rendered:
        return render(fleet, name, secret=lambda reference: "")

    def _first(self, name: str, rendered: Rendered) -> Result:
        generation = self.members[name].root / "generations/1"
        for file, value in rendered.files.items():
            (generation / file).parent.mkdir(parents=True, exist_ok=True)
            (generation / file).write_text(value.text + self._sync(name) * (file == ENGINE))
        sums = {file: value.sha256 for file, value in rendered.files.items()}
        manifest = {"schema": 1, "base": 0, "hardware": rendered.hardware, "files": sums}
        (generation / "generation.json").write_text(json.dumps(manifest))
        link = self.members[name].root / "generations/current"
        link.unlink()
        link.symlink_to("1")
        self.members[name].start()
        return Result(name, "confirmed", "", 1)

    def _sync(self, name: str) -> str:
        """The two halves of a pair tell each other their sessions, here over the outside."""
        number = int(name.removeprefix("gw"))
        if not self.standby or number not in HALVES:
            return ""
        peer = next(n for n in HALVES if n != number)
        key = self.members[name].root / "sync.key"
        key.write_text("8f3c" * 16 + "\n")
        key.chmod(0o600)
        ends = f"peer: 198.51.100.{peer}, listen: 198.51.100.{number}"
        return f'sync: {{{ends}, key: "file:{key}", hold_back: 0s}}\n'

    # -- what is to be seen --

    def next_hops(self) -> set[str]:
        """Gateways to which the inside router sends new flows."""
        if self.hashing == "resilient":
            found = re.search(rf"id {GROUP} group (\S+)", self.inside.ip("nexthop show"))
            return {f"gw{part.partition(',')[0]}" for part in found[1].split("/")} if found else set()
        text = self.inside.ip("route show default")
        return {f"gw{n}" for n in re.findall(r"via 100\.64\.0\.(\d+)", text)}

    def slices(self) -> dict[str, str]:
        """prefix -> gateway, as the outside router has it."""
        found: dict[str, str] = {}
        for route in json.loads(run(["ip", "-n", self.outside.name, "-j", "route"])):
            if route.get("gateway", "").startswith("198.51.100.") and route["dst"].startswith("203."):
                found[route["dst"]] = f"gw{route['gateway'].rpartition('.')[2]}"
        return found

    def settled(self, *names: str) -> bool:
        return self.next_hops() == set(names) and set(self.slices().values()) == set(names)

    def await_settled(self, *names: str) -> float:
        """Until both routers use these gateways and no other; how long that took."""
        begun = time.monotonic()
        wait_until(f"the routers to use {', '.join(names)}", lambda: self.settled(*names), deadline_s=60)
        return time.monotonic() - begun


class Fresh(Here):
    """A gateway whose services are not running yet: its first configuration starts them."""

    def run(self, argv: list[str], timeout_s: float = 150.0) -> tuple[int, str]:
        if argv[:1] == ["systemctl"] and argv[1] != "is-active" and argv[2] == "bird.service":
            self.gateway.start()
            self.__class__ = Here  # type: ignore[assignment]
            return 0, ""
        if argv[:2] == ["systemctl", "is-active"]:
            return 0, "\n".join("active" for _ in argv[2:])
        return super().run(argv, timeout_s)

    def engine(self, request: Json, timeout_s: float = 5.0) -> Json:
        return {"ok": True} if not self.gateway.alive("dsnatd") else super().engine(request, timeout_s)


class Asked:
    """A new connection to a gateway's agent."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.opened = member.machine.clock()

    def ask(
        self, request: Mapping[str, Any], *, deadline_s: float, stream: Iterable[bytes] = ()
    ) -> dict[str, Any]:
        self.member.machine.connection = self.opened
        try:
            return reply(State(self.member.machine), {"protocol": PROTOCOL, **request})
        except Refused as refused:
            raise AgentRefused(refused.kind, str(refused)) from refused
