"""The booted image on NICs with several queues, whose RSS the engine follows (--scenarios).

virtio with RSS, on TAP devices of as many queues: QEMU hashes with the key and the table that the engine
wrote. What is handed over, and why, is in the engine's own counters.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.echo import PORT, echo, flows, talk
from tests.image.conftest import CONFIG, Gateway, configure
from tests.image.test_scenarios import booted, translates
from tests.lab import wait_until

pytestmark = [pytest.mark.image, pytest.mark.scenario]

SERVER, CLIENT = "198.51.100.10", "100.64.0.10"
QUEUES, FLOWS, HAIRPIN_PORT = 4, 60, 7000
TEXT = f"""\
{CONFIG.partition("pools:")[0]}pools:
  - {{name: spread, addresses: [203.0.113.1-203.0.113.4]}}
zones:
  - {{source: 100.64.0.0/16, pool: spread}}
static:
  - {{inside: {CLIENT}, outside: 203.0.113.4, protocol: udp, port: {HAIRPIN_PORT}}}
"""


def text(workers: int) -> str:
    return TEXT.replace("workers: 1", f"workers: {workers}")


def shown(gateway: Gateway, what: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(gateway(f"dsnatctl show {what} --json"))
    return answer


def causes(gateway: Gateway) -> dict[str, int]:
    """What was handed over so far and why; of a gateway that has come to rest."""
    counters: dict[str, Any] = {}

    def rests() -> bool:
        counters.update(shown(gateway, "counters"))
        return bool(counters["counters"]["handed_over"] == counters["counters"]["taken_over"])

    wait_until("the rings to be empty", rests, deadline_s=120)
    assert counters["equation"] is True
    by_cause: dict[str, int] = counters["counters"]["handed_over_by_cause"]
    return by_cause


def added(gateway: Gateway, name: str, traffic: Callable[[], None]) -> dict[str, int]:
    before = causes(gateway)
    traffic()
    more = {cause: n - before[cause] for cause, n in causes(gateway).items() if n > before[cause]}
    print(f"handed over: {name}: {more or 0}", flush=True)
    return more


def hairpin(gateway: Gateway) -> None:
    """To the public address of the host's own static port, from so many others of its ports."""

    def job() -> None:
        with ExitStack() as undo:
            listener = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            listener.bind((CLIENT, HAIRPIN_PORT))
            listener.settimeout(60)
            for number in range(20):
                one = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                one.bind((CLIENT, 0))
                one.sendto(str(number).encode(), ("203.0.113.4", HAIRPIN_PORT))
                assert listener.recvfrom(100)[0] == str(number).encode()

    gateway.client.inside(job)


def test_behind_rss_only_what_has_a_cause_is_handed_over(built: Path, tmp_path: Path) -> None:
    rss = ("-global", "virtio-net-pci.rss=on")
    with booted(built, tmp_path, queues=QUEUES, cpus=4, memory_mib=1536, extra=rss) as gateway:
        follows_rss(gateway)


def follows_rss(gateway: Gateway) -> None:
    configure(gateway, text(3))
    translates(gateway.client)
    assert "packets are handed over between workers" not in gateway("journalctl -u dsnatd -b -o cat")
    seen: dict[str, dict[str, int]] = {}
    with echo(gateway.server, SERVER), ExitStack() as undo:
        made: list[socket.socket] = []

        def open_flows(kind: int) -> None:
            some = flows(gateway.client, SERVER, kind, FLOWS, timeout_s=120)
            made.extend(undo.enter_context(one) for one in some)
            for word in range(5):
                talk(some, f"again {word}")

        before = [one["packets"] for one in shown(gateway, "workers")["workers"]]
        seen["UDP"] = added(gateway, "UDP", lambda: open_flows(socket.SOCK_DGRAM))
        seen["TCP"] = added(gateway, "TCP", lambda: open_flows(socket.SOCK_STREAM))
        of_queue = [
            one["packets"] - earlier
            for one, earlier in zip(shown(gateway, "workers")["workers"], before, strict=True)
        ]
        sessions = shown(gateway, "sessions --limit 1000")["sessions"]
        own = [one for one in sessions if one["remote"] == f"{SERVER}:{PORT}"]
        print(f"packets of these by queue: {of_queue}; sessions by worker:")
        print({worker: sum(one["worker"] == worker for one in own) for worker in range(3)})
        print(gateway("dsnatctl show workers"), gateway("dsnatctl show ports"), sep="\n")
        assert seen == {"UDP": {}, "TCP": {}}
        assert len(own) == 2 * FLOWS
        assert all(packets > FLOWS for packets in of_queue)

        # RSS does not look at what these have: listed, with their causes
        added(gateway, "echo", lambda: ping(gateway, "-c", "20"))
        added(gateway, "fragments", lambda: talk(made[:20], "x" * 3000))
        added(gateway, "hairpin", lambda: hairpin(gateway))


def ping(gateway: Gateway, *options: str) -> None:
    gateway.client.run("ping", "-n", "-q", "-i", "0.2", "-W", "20", *options, SERVER, timeout_s=120)
