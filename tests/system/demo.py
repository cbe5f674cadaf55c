"""The whole job, end to end: `make demo`.

    client 100.64.0.10 -- bridge -- tap [ inside0   gateway   outside0 ] tap -- bridge -- server 198.51.100.10
                                        100.64.0.1   (QEMU)   198.51.100.1    both by VRRP
                                         management: 127.0.0.1:PORT on this machine, SSH only

Builds the engine and the image, boots the image, provisions it with dsnat-fleet over SSH, sends real traffic
through it and prints what the server saw. The gateway's host key is made here and given to it at birth, so it
is never trusted on first use. Client, server and bridges are network namespaces without a way out; QEMU gets
open tap descriptors and stays in the namespace of this machine, where the operator's SSH comes from.

Every stage logs to .build/demo/. Whatever ends the run (an error, Ctrl-C, SIGTERM), what it started ends too.

Exit status: 0 every line is right; 1 the traffic broke a promise; 2 wrong usage; 3 the machine lacks
something; 4 the engine or the image could not be built; 5 the gateway did not come up; 6 it could not be
provisioned; 7 the lab itself failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from image.boot import MANAGEMENT_MAC, Machine, Nic
from image.build import image_path
from image.identity import make_identity
from image.qemu import BootError, NeedsError
from tests.lab import Lab, LabError, Netns, new_lab, run, wait_until
from tests.traffic import CLIENT, SERVER, Line, Report, Servers, send

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / ".build/demo"
LOCK = ROOT / ".build/demo.lock"
GATEWAY = "demo1"
FREE_GIB = 6
TOOLS = (
    *("ip", "ss", "ethtool", "sysctl", "nginx", "iperf3", "dnsmasq", "dig", "curl", "ping", "traceroute"),
    *("tcpdump", "ssh", "ssh-keygen", "meson", "ninja", "qemu-system-x86_64", "qemu-img"),
)

BROKEN_PROMISE, LACKING, NOT_BUILT, NOT_UP, NOT_PROVISIONED, LAB_FAILED, INTERRUPTED = 1, 3, 4, 5, 6, 7, 130
STATUS: Mapping[type[Exception], int] = {LabError: LAB_FAILED, BootError: NOT_UP, NeedsError: LACKING}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PLAN_HAS_CHANGES = 4  # exit status of `dsnat-fleet plan`

Ask = Callable[..., str]  # runs a command on the gateway, gives what it printed

FLEET = """\
# Written by `make demo` for dsnat-fleet: one gateway, a pool of four addresses, one zone, VRRP addresses.
schema: 1
defaults:
  ssh: {{user: root, identity: {identity}}}
  engine: {{workers: 1, max_sessions: 100000}}
pools:
  laddr_g1: {{addresses: [203.0.113.1-203.0.113.4]}}
gateways:
  {name}:
    management: {{address: 127.0.0.1, port: {port}}}
    host_key: {host_key}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.2/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.2/24]}}
    zones:
      - {{source: 100.64.0.0/16, pool: laddr_g1}}
    vrrp:
      instances:
        inside0: {{id: 51, addresses: [100.64.0.1/24]}}
        outside0: {{id: 52, addresses: [198.51.100.1/24]}}
"""


def shown(path: Path) -> str:
    """A path as a reader in the checkout would write it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


class DemoError(Exception):
    """One sentence for the operator, and the exit status that it deserves."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Stages:
    """Says which stage runs and how long each took."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.started = total, 0, time.monotonic()

    def say(self, text: str) -> None:
        print(f"demo: [{self.number}/{self.total}] {text}", flush=True)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        self.number += 1
        self.say(f"{name}: {what}")
        start = time.monotonic()
        yield
        self.say(f"{name}: done in {time.monotonic() - start:.0f} s")


def program(
    argv: Sequence[str], log: Path, *, status: int, stages: Stages, relay: str = "", expected: int = 0
) -> None:
    """Runs one of our own tools with its output in `log`; lines that start with `relay` are shown, too.

    It is in a session of its own, so that a Ctrl-C reaches it and its children once, from us, and they can
    clean up.
    """
    tail: deque[str] = deque(maxlen=15)
    with (
        log.open("w", buffering=1) as sink,
        subprocess.Popen(
            argv,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sink.write(line)
                tail.append(line.rstrip())
                if relay and line.startswith(relay):
                    stages.say(line.rstrip())
        except BaseException:
            end_group(process)
            raise
    if process.returncode != expected:
        end = "\n".join(f"    {line}" for line in tail)
        raise DemoError(
            f"`{shlex.join(argv)}` ended with status {process.returncode}; log: {shown(log)}:\n{end}",
            status=status,
        )


def end_group(process: subprocess.Popen[str]) -> None:
    """As a Ctrl-C would end it: make alone would leave the compilers behind. Comes back when all is over,
    which leaving Popen's `with` by a KeyboardInterrupt does not: it waits for a quarter of a second.
    """
    for number, patience_s in ((signal.SIGINT, 90.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=patience_s)  # reads on, so that nobody waits for room in the pipe
            return


def take_lock(undo: ExitStack) -> None:
    """One demo in a checkout: logs, image and engine are in one place."""
    LOCK.parent.mkdir(exist_ok=True)
    lock = undo.enter_context(LOCK.open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DemoError(
            "another demo runs in this checkout; end it, or wait for it", status=LACKING
        ) from error


def check_needs() -> None:
    """Everything that can be known before starting, in one go."""
    if os.geteuid():
        raise DemoError("namespaces and taps need root; run `sudo make demo`", status=LACKING)
    missing = [name for name in TOOLS if not shutil.which(name)]
    if missing:
        raise DemoError(f"{', '.join(missing)} not found; run `make setup`", status=LACKING)
    if not Path("/dev/net/tun").exists():
        raise DemoError("/dev/net/tun is missing; run `modprobe tun`", status=LACKING)
    built = (ROOT / ".build/image").exists()
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < (2 if built else FREE_GIB):
        raise DemoError(
            f"{ROOT} has {free:.1f} GiB free and the demo needs {FREE_GIB}; make room and run again",
            status=LACKING,
        )


#  client eth0 --- [in: client, tap in0]   guest   [out: tap out0, server] --- eth0 server
@dataclass
class Site:
    """The two sides of the gateway, and the descriptors of the taps that are its wires."""

    client: Netns
    servers: Servers
    inside_tap: int
    outside_tap: int


def make_site(lab: Lab) -> Site:
    client, middle, server = (lab.netns(side) for side in ("client", "wires", "server"))
    lab.wire(client, "eth0", middle, "client")
    lab.wire(server, "eth0", middle, "server")
    inside, outside = middle.open_tap("in0"), middle.open_tap("out0")
    lab.bridge(middle, "in", "client", "in0")
    lab.bridge(middle, "out", "server", "out0")
    client.ip(f"address add {CLIENT}/24 dev eth0")
    client.ip("route add default via 100.64.0.1")
    server.ip(f"address add {SERVER}/24 dev eth0")
    server.ip("route add 203.0.113.0/24 via 198.51.100.1")
    servers = Servers(server, "eth0")
    servers.start()
    return Site(client, servers, inside, outside)


def drops(ask: Ask) -> dict[str, int]:
    """Everything that the gateway admits to have lost, by name: the engine's reasons, and its ports' own."""
    counters = json.loads(ask("dsnatctl", "show", "counters", "--json"))
    ports = json.loads(ask("dsnatctl", "show", "ports", "--json"))
    lost = {str(name): int(count) for name, count in counters["dropped"].items()}
    for port in ports["ports"]:
        lost |= {
            f"{port['name']} {name}": int(port[name]) for name in ("rx_missed", "rx_errors", "tx_errors")
        }
    return lost


def accounts(ask: Ask) -> Line:
    """Every packet that came in has one fate; the engine checks its own books, and so do we."""
    answer = json.loads(ask("dsnatctl", "show", "counters", "--json"))
    n = answer["counters"]
    came = n["received"] + n["taken_over"]
    went = n["forwarded"] + n["passed"] + n["dropped"] + n["handed_over"] + n["held"]
    kept = came == went and answer["equation"] is True
    return Line(kept, "the gateway accounts for every packet", f"{came} came, {went} have a fate")


def provision(site_file: Path, stages: Stages) -> None:
    """As an operator would: check the file, look at the plan, push it."""
    tool = [str(ROOT / ".venv/bin/dsnat-fleet"), "--file", str(site_file)]
    for verb, log, expected in (
        (["validate"], "validate.log", 0),
        (["plan"], "plan.log", PLAN_HAS_CHANGES),
        (["push", "--yes"], "push.log", 0),
    ):
        stages.say(f"dsnat-fleet {shlex.join(verb)}; log: {shown(LOGS / log)}")
        program([*tool, *verb], LOGS / log, status=NOT_PROVISIONED, stages=stages, expected=expected)


def wait_for_master(site: Site) -> None:
    """Until both VRRP addresses answer on the wire: hosts depend on that, not on what keepalived says."""
    sides = ((site.client, "100.64.0.1"), (site.servers.space, "198.51.100.1"))
    for space, address in sides:

        def answers(space: Netns = space, address: str = address) -> bool:
            return "1 received" in space.run("ping", "-n", "-c", "1", "-W", "1", address, check=False)

        try:
            wait_until(f"{address} to answer in {space.name}", answers, deadline_s=120)
        except LabError as error:
            raise DemoError(f"the gateway did not become VRRP master: {error}", status=NOT_UP) from error


def boot(machine: Machine, stages: Stages) -> None:
    """Starts QEMU and waits for the guest's own word, for SSH is not up before it."""
    machine.start()
    stages.say(f"console: {shown(machine.serial)}")
    ready = machine.wait_ready(silence_s=120)
    (LOGS / "ready.json").write_text(json.dumps(ready.report, indent=2) + "\n")
    stages.say(f"ready after {ready.seconds:.0f} s: {ready.report['hostname']} {ready.report['version']}")


def demo(undo: ExitStack, *, keep: bool, iommu: bool) -> Report:
    stages = Stages(total=7)
    with stages.stage("engine", f"meson and ninja; log: {shown(LOGS / 'engine.log')}"):
        program(["make", "build"], LOGS / "engine.log", status=NOT_BUILT, stages=stages)
    with stages.stage("image", f"mkosi on Debian 13; log: {shown(LOGS / 'image.log')}"):
        argv = [sys.executable, "-m", "image.build"]
        program(argv, LOGS / "image.log", status=NOT_BUILT, stages=stages, relay="image:")
    with stages.stage("lab", "client and server namespaces, bridges, taps, servers"):
        lab = undo.enter_context(new_lab(LOGS / "lab"))
        site = make_site(lab)
    with stages.stage("boot", "QEMU, headless, two data NICs and one for management"):
        key = LOGS / "operator"
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "operator", "-f", str(key)])
        identity = make_identity(GATEWAY, key.with_suffix(".pub").read_text(), management=MANAGEMENT_MAC)
        nics = [Nic((site.inside_tap,), "52:54:00:d5:00:03"), Nic((site.outside_tap,), "52:54:00:d5:00:04")]
        machine = Machine(image_path(), LOGS / GATEWAY, identity, nics, iommu=iommu)
        undo.callback(machine.stop)
        boot(machine, stages)
    with stages.stage("provision", "dsnat-fleet validate, plan, push, over SSH"):
        fleet = LOGS / "fleet.yaml"
        fleet.write_text(
            FLEET.format(
                name=GATEWAY, identity=key, port=machine.ssh_port, host_key=identity.host_key_public.strip()
            )
        )
        provision(fleet, stages)
        wait_for_master(site)

    def ask(*words: str) -> str:
        return run(machine.ssh_command(key, *words), timeout_s=60)

    with stages.stage("traffic", "ping, curl, dig, iperf3 and traceroute, from the client to the server"):
        report = send(site.client, site.servers, drops=lambda: drops(ask), say=stages.say)
    with stages.stage("gateway", "its own view: dsnatctl show counters and pools"):
        report = Report(report.connections, [*report.lines, accounts(ask)])
        pools = ask("dsnatctl", "show", "pools")
        (LOGS / "report.txt").write_text(f"{report.text()}\n\n{pools}")
    print(f"\n{report.text()}\n\n$ dsnatctl show pools\n{pools}")
    used = time.monotonic() - stages.started
    verdict = "every line is right" if report.right else "a promise was broken"
    print(f"demo: {verdict}; {used:.0f} s; logs in {shown(LOGS)}", flush=True)
    if keep:
        print("demo: the lab stays up until Ctrl-C. The gateway, a client and the server:")
        print(f"  {shlex.join(machine.ssh_command(key))}")
        print(
            f"  {shlex.join(site.client.argv('bash'))}\n  {shlex.join(site.servers.space.argv('bash'))}",
            flush=True,
        )
        with suppress(KeyboardInterrupt):
            signal.pause()
    return report


def interrupt(number: int, frame: FrameType | None) -> None:
    """The first signal ends the run; the ones after it wait, so that nothing stops the cleaning up."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make demo", description="Build, boot, provision and translate, end to end."
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the lab up until Ctrl-C and print how to log in"
    )
    parser.add_argument(
        "--iommu", action="store_true", help="drive the NICs by vfio-pci behind an emulated IOMMU"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback")
    options = parser.parse_args(arguments)
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        check_needs()
        with ExitStack() as undo:
            take_lock(undo)
            shutil.rmtree(LOGS, ignore_errors=True)
            LOGS.mkdir(parents=True)
            report = demo(undo, keep=options.keep, iommu=options.iommu)
    except KeyboardInterrupt:
        print("demo: interrupted; everything it started has ended", file=sys.stderr)
        return INTERRUPTED
    except (DemoError, LabError, BootError, NeedsError, OSError, subprocess.SubprocessError) as error:
        if options.debug:
            raise
        status = error.status if isinstance(error, DemoError) else STATUS.get(type(error), LAB_FAILED)
        print(f"demo: {error}\ndemo: status {status}; logs in {shown(LOGS)}", file=sys.stderr)
        return status
    return 0 if report.right else BROKEN_PROMISE


if __name__ == "__main__":
    sys.exit(main())
