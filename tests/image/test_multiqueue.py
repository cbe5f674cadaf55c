"""The booted image on NICs with several queues, whose RSS the engine follows (--scenarios).

virtio with RSS, on TAP devices of as many queues: QEMU hashes with the key and the table that the engine
wrote. What is handed over, and why, is in the engine's own counters; each cause has its own traffic here.
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

SERVER, CLIENT, KEPT, BORROWER = "198.51.100.10", "100.64.0.10", "100.64.0.11", "100.64.0.12"
QUEUES, FLOWS, HAIRPIN_PORT = 4, 60, 7000
TEXT = f"""\
{CONFIG.partition("pools:")[0]}pools:
  - {{name: spread, addresses: [203.0.113.1-203.0.113.4]}}
  - {{name: kept, addresses: [203.0.113.8], select: paired}}
  - {{name: small, addresses: [203.0.113.9], ports: 5000-5059}}
zones:
  - {{source: {KEPT}/32, pool: kept}}
  - {{source: {BORROWER}/32, pool: small}}
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
    for address in (KEPT, BORROWER):
        gateway.client.ip(f"address add {address}/24 dev eth0")
        # the gateway knows its MAC from now on: of many answers at once, 16 wait for a neighbour
        ping(gateway, "-c", "3", "-I", address)
    assert "packets are handed over between workers" not in gateway("journalctl -u dsnatd -b -o cat")
    seen: dict[str, dict[str, int]] = {}
    with echo(gateway.server, SERVER), ExitStack() as undo:
        made: list[socket.socket] = []

        def open_flows(kind: int, source: str = CLIENT) -> None:
            some = flows(gateway.client, SERVER, kind, FLOWS, source=source, timeout_s=120)
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

        seen["echo"] = added(gateway, "echo", lambda: ping(gateway, "-c", "20"))
        seen["fragments"] = added(gateway, "fragments", lambda: talk(made[:20], "x" * 3000))
        seen["hairpin"] = added(gateway, "hairpin", lambda: hairpin(gateway))
        seen["kept pool"] = added(gateway, "kept pool", lambda: open_flows(socket.SOCK_DGRAM, KEPT))
        seen["borrowed"] = added(gateway, "borrowed", lambda: open_flows(socket.SOCK_DGRAM, BORROWER))
        # With another number of workers: sessions of the last run do not go straight, those of this one do.
        gateway(f"cat > /etc/dsnat/dsnatd.yaml <<'X'\n{text(2)}X\nsystemctl restart dsnatd", timeout_s=600)
        translates(gateway.client)
        seen["after a restart with 2 workers"] = added(
            gateway, "after a restart with 2 workers", lambda: talk(made[: 2 * FLOWS], "still")
        )
        seen["new ones there"] = added(gateway, "new ones there", lambda: open_flows(socket.SOCK_STREAM))
    assert set(seen["echo"]) <= {"icmp"}
    assert set(seen["fragments"]) == {"fragment"}
    assert set(seen["hairpin"]) <= {"hairpin", "kept"}
    assert set(seen["kept pool"]) == {"kept"}
    assert set(seen["borrowed"]) == {"borrowed"}
    assert set(seen["after a restart with 2 workers"]) == {"away"}
    assert seen["new ones there"] == {}


def ping(gateway: Gateway, *options: str) -> None:
    gateway.client.run("ping", "-n", "-q", "-i", "0.2", "-W", "20", *options, SERVER, timeout_s=120)
