"""The journal under a flood: a few lines with fields, never one for each packet."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gateway import DPDK_INTERFACES, mac_of, new_gateway
from tests.lab import Lab, wait_until

pytestmark = pytest.mark.net
ROOT = Path(__file__).resolve().parents[2]

# As systemd starts it: JOURNAL_STREAM names what standard error is, and the journal's socket is there.
AS_A_UNIT = """\
mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind "$1" /run/systemd/journal && shift
export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)
exec "$@"
"""


def fields(datagram: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in datagram.decode().splitlines() if "=" in line)


def test_a_flood_of_refusals_is_one_entry_with_fields_and_not_a_line_a_packet(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    text = (
        f"engine: {{workers: 1, max_sessions: 10000}}\n{DPDK_INTERFACES}"
        "pools: [{name: tiny, addresses: 203.0.113.1, ports: 5000-5015}]\n"
        "zones: [{source: 100.64.0.0/10, pool: tiny}]\n"
    )
    journal = Path("/tmp", f"{lab.prefix}-journal")
    journal.mkdir()
    lab.undo.callback(journal.rmdir)
    lab.undo.callback((journal / "socket").unlink)
    gateway = new_gateway(lab, program("dsnatd"), text, start=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sink:
        sink.bind(str(journal / "socket"))
        sink.setblocking(False)
        argv = (*gateway.argv(), "--no-huge")
        gateway.daemon = gateway.space.start("sh", "-c", AS_A_UNIT, "sh", str(journal), *argv, log="unit.log")
        wait_until("dsnatd to be ready", lambda: "dsnatd: ready" in gateway.daemon.text(), deadline_s=60)
        gateway.address()
        gateway.space.ip(
            "neighbour replace 198.51.100.20 lladdr 02:00:00:00:00:14 dev outside0 nud permanent"
        )
        before = len(gateway.daemon.text().splitlines())
        mac = mac_of(gateway.space, "inside0")
        flood = (sys.executable, "-m", "tests.flood", "eth0", mac, "5000", "2000")
        gateway.client.run("env", f"PYTHONPATH={ROOT}", *flood)
        wait_until("the refusals", lambda: gateway.reason("no_port") > 4000)
        entries: list[dict[str, str]] = []

        def received() -> bool:
            while True:
                try:
                    entries.append(fields(sink.recv(65536)))
                except BlockingIOError:
                    return bool(entries)

        wait_until("an entry in the journal", received)
        gateway.close()
        received()
    (entry,) = entries
    assert entry["MESSAGE"].startswith("pool tiny: 100.64.1.0 was refused: no port of any address is free")
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("4", "dsnatd")
    assert (entry["DSNAT_EVENT"], entry["DSNAT_REASON"]) == ("ports_exhausted", "no_port")
    assert (entry["DSNAT_POOL"], entry["DSNAT_HOST"]) == ("tiny", "100.64.1.0")
    assert len(gateway.daemon.text().splitlines()) - before < 10
