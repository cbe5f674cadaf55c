"""The engine is killed under connections, again and again, and goes on: on vdevs, dark time as clients see.

`pytest tests/dataplane/test_restart_net.py -s --restarts 50` prints the figures of a longer run: how long
nothing came back, beside what an engine needs from its start to its word that it is ready (EAL's own start is
most of it).
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.dataplane.test_failover_net import Probe
from tests.dataplane.test_pair_net import Connections
from tests.gateway import POOLS_AND_ZONES, Gateway, config, new_gateway
from tests.lab import Lab, run, wait_until
from tests.traffic import SERVER

pytestmark = pytest.mark.net

SESSIONS = 8192


def start(gateway: Gateway, table: Path) -> float:
    """Seconds from the start of the process to its word."""
    began_s = time.monotonic()
    gateway.start("--sessions", str(table))
    return time.monotonic() - began_s


def dark_since(probe: Probe, moment_s: float) -> float:
    """The longest time without an answer to a probe that is sent each 10 ms."""
    wait_until("answers again", lambda: len([at for at in probe.answered_s if at > moment_s + 0.1]) > 20)
    at = [moment_s, *(one for one in probe.answered_s if one > moment_s)]
    return max(after - before for before, after in itertools.pairwise(at))


@pytest.fixture
def table(lab: Lab) -> Path:
    path = Path("/dev/shm", f"{lab.prefix}.sessions")
    lab.undo.callback(path.unlink, missing_ok=True)
    return path


def test_no_connection_is_lost_by_kills_under_traffic_nor_by_other_workers_or_pools(
    lab: Lab,
    program: Callable[[str], Path],
    table: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(sessions=SESSIONS), start=False)
    start(gateway, table)
    gateway.address()
    connections = Connections(gateway, 100, 20)
    connections.open()
    probe = Probe(gateway.client, gateway.server)
    probe.start()
    dark_s, ready_s = [], []
    # other workers and other pools on the way; the addresses in use drain, as `dsnatctl plan` would say
    larger = POOLS_AND_ZONES.replace(
        "203.0.113.1-203.0.113.4]", "203.0.113.1-203.0.113.9], drain: [203.0.113.1]"
    )
    assert larger != POOLS_AND_ZONES
    for number in range(int(request.config.getoption("--restarts"))):
        text = config(
            sessions=SESSIONS, workers=1 + number % 2, rest=larger if number % 3 == 1 else POOLS_AND_ZONES
        )
        gateway.file.write_text(text)
        moment_s = time.monotonic()
        gateway.daemon.process.kill()
        gateway.daemon.wait(timeout_s=10)
        ready_s.append(start(gateway, table))
        dark_s.append(dark_since(probe, moment_s))
        connections.dark_s(moment_s)
        assert len(gateway.show("workers")["workers"]) == 1 + number % 2
        assert "going on with the sessions" in gateway.daemon.text()
        assert gateway.show("counters")["equation"]
    connections.all_live()
    probe.stop.set()
    figures = {
        "restarts": len(dark_s),
        "dark_p50_s": round(statistics.median(dark_s), 3),
        "dark_max_s": round(max(dark_s), 3),
        "ready_p50_s": round(statistics.median(ready_s), 3),
        "ready_max_s": round(max(ready_s), 3),
    }
    print(figures)
    record_property("restarts", figures)
    connections.close()
    gateway.close()


def going_on(gateway: Gateway, after: int) -> int:
    """The process that goes on for that one; it has said that it is ready."""

    def heir() -> int:
        found = re.search(
            rf"process {after} has died; process (\d+) goes on\n.*?ready after", said(), re.DOTALL
        )
        return int(found[1]) if found else 0

    def said() -> str:
        return gateway.daemon.text()

    wait_until(
        "a prepared process", lambda: f"prepared to go on for process {after}\n" in said(), deadline_s=60
    )
    os.kill(after, signal.SIGKILL)
    return wait_until("the prepared process to go on", heir, deadline_s=60)


def test_a_prepared_process_goes_on_with_every_connection_and_prepares_the_next_one(
    lab: Lab, program: Callable[[str], Path], table: Path
) -> None:
    key = lab.directory / "key"
    key.write_text("5a" * 32 + "\n")
    key.chmod(0o600)
    # with all that has sockets or memory of its own
    more = f'port_control: on\nsync: {{peer: 127.0.0.2, listen: "127.0.0.1:3784", key: "file:{key}"}}\n'
    text = config(sessions=SESSIONS, rest=POOLS_AND_ZONES + more)
    text = text.replace("engine: {", "engine: {spare: on, ")
    gateway = new_gateway(lab, program("dsnatd"), text, start=False)
    start(gateway, table)
    gateway.address()
    connections = Connections(gateway, 100, 5)
    connections.open()
    first = gateway.pid()
    moment_s = time.monotonic()
    second = going_on(gateway, first)
    # a reload by the control socket, too, ends the one that knows the old file
    of_second = f"prepared to go on for process {second}\n"
    wait_until("one with the old file", lambda: of_second in gateway.daemon.text(), deadline_s=60)
    gateway.file.write_text(text.replace("203.0.113.1-203.0.113.4]", "203.0.113.1-203.0.113.9]"))
    gateway.ask(cmd="reload")
    wait_until("one with the new", lambda: gateway.daemon.text().count(of_second) == 2, deadline_s=60)
    third = going_on(gateway, second)
    assert len(gateway.show("pools")["pools"][0]["addresses"]) == 9
    assert gateway.daemon.wait(timeout_s=10) == -signal.SIGKILL
    assert gateway.daemon.text().count("going on with the sessions") == 2
    connections.dark_s(moment_s)
    connections.all_live()
    connections.close()
    assert gateway.show("counters")["equation"]
    # the lock of the sessions was nobody's at no moment
    with pytest.raises(AssertionError, match="is in use by another dsnatd"):
        Gateway(
            gateway.space, gateway.client, gateway.server, gateway.program, gateway.file,
            gateway.socket.with_suffix(".other"), log="other",
        ).start("--sessions", str(table))  # fmt: skip
    # who is stopped leaves nothing to inherit
    prepared = f"prepared to go on for process {third}\n"
    wait_until("the third one", lambda: prepared in gateway.daemon.text(), deadline_s=60)
    os.kill(third, signal.SIGTERM)
    wait_until("all to end", lambda: not run(["ip", "netns", "pids", gateway.space.name]))
    assert f"process {third} has died" not in gateway.daemon.text()


def test_another_max_sessions_keeps_every_connection(
    lab: Lab, program: Callable[[str], Path], table: Path
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(sessions=SESSIONS), start=False)
    start(gateway, table)
    gateway.address()
    connections = Connections(gateway, 100, 5)
    connections.open()
    for sessions in (4 * SESSIONS, 1024):
        gateway.daemon.process.kill()
        gateway.daemon.wait(timeout_s=10)
        gateway.file.write_text(config(sessions=sessions))
        moment_s = time.monotonic()
        start(gateway, table)
        said = gateway.daemon.text()
        assert f"engine.max_sessions is {sessions} now" in said
        assert "going on with the sessions" in said
        assert "LOST" not in said
        connections.dark_s(moment_s)
        connections.all_live()
    connections.close()
    gateway.close()
    assert table.stat().st_size < 8 << 20, "the file of the larger table was not cut down"


def test_sessions_that_a_smaller_table_has_no_room_for_are_said(
    lab: Lab, program: Callable[[str], Path], table: Path
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(sessions=SESSIONS), start=False)
    start(gateway, table)
    gateway.address()
    connections = Connections(gateway, 50, 0)
    connections.open()

    def scan() -> None:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as one:
            for port in range(20000, 22000):
                one.sendto(b"?", (SERVER, port))
                time.sleep(0 if port % 100 else 0.01)

    gateway.client.inside(scan)
    wait_until("sessions", lambda: gateway.counters()["sessions"] > 1500)
    gateway.close()
    gateway.file.write_text(config(sessions=1024))
    start(gateway, table)
    assert re.search(
        r"LOST: \d+ of \d+ sessions have no room in engine.max_sessions: 1024", gateway.daemon.text()
    )
    # what goes first is what is over soonest: no established connection
    connections.all_live()
    connections.close()
    gateway.close()


def test_a_table_of_another_layout_is_refused_and_said(
    lab: Lab, program: Callable[[str], Path], table: Path
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(sessions=SESSIONS), start=False)
    start(gateway, table)
    gateway.close()
    with table.open("r+b") as file:
        file.seek(8)  # magic, then the layout's number
        layout = int.from_bytes(file.read(4), "little")
        file.seek(8)
        file.write((layout + 1).to_bytes(4, "little"))
    start(gateway, table)
    refusal = "the session table was written by a build with another record layout; starting with none"
    assert f"cannot be used: {refusal}" in gateway.daemon.text()
    wait_until("an engine without sessions", lambda: gateway.show("sessions")["sessions"] == [])
    gateway.close()
