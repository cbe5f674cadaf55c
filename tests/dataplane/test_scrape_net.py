"""How long a scrape takes, by a client on a socket, under traffic: with a full table as with an empty one.

`--sessions 8000000 --scrapes 300 --realtime` is the run whose figure stands in dataplane/README.md; with
--realtime engine, sidecar and client go before all other processes, as on cores of their own.
"""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flood import REMOTE
from tests.gateway import DPDK_INTERFACES, Gateway, mac_of, new_gateway
from tests.lab import Lab, Program

pytestmark = pytest.mark.net
ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 500_000  # frames that the generator makes beforehand


def first(pid: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(task.name), os.SCHED_FIFO, os.sched_param(1))


def flood(gateway: Gateway, count: int, rate: int, begin: int = 0) -> None:
    mac = mac_of(gateway.space, "inside0")
    argv = (sys.executable, "-m", "tests.flood", "eth0", mac, *map(str, (count, rate, begin)))
    gateway.client.run("env", f"PYTHONPATH={ROOT}", *argv, timeout_s=60 + 3 * count / rate)


def scrapes(count: int, *, realtime: bool) -> list[float]:
    """Milliseconds, sorted; called in the gateway's namespace."""
    took = []
    if realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    for _ in range(count):
        begin = time.perf_counter()
        client = http.client.HTTPConnection("127.0.0.1", 9732, timeout=10)
        client.request("GET", "/metrics")
        page = client.getresponse().read()
        client.close()
        took.append((time.perf_counter() - begin) * 1000)
        assert b"\ndsnat_up 1\n" in page
        assert page.count(b"\ndsnat_address_sessions{") == 256
        time.sleep(0.05)  # the next one is a new one: nothing waits in between
    return sorted(took)


def told(what: str, took: list[float]) -> None:
    p50, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
    load = os.getloadavg()[0]
    print(f"{what}: {len(took)} scrapes, p50 {p50:.1f} p99 {p99:.1f} max {took[-1]:.1f} ms, load {load:.1f}")


def sidecar(gateway: Gateway) -> Program:
    argv = (sys.executable, "-m", "dsnatctl", "metrics", "--socket", str(gateway.socket))
    program = gateway.space.start("env", f"PYTHONPATH={ROOT / 'dataplane'}", *argv, log="metrics.log")
    gateway.space.wait_for_listener(program, 9732)
    return program


@pytest.mark.timeout(1800)
def test_a_scrape_under_traffic_takes_no_longer_when_the_table_is_full(
    lab: Lab, program: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    sessions, count = int(request.config.getoption("--sessions")), int(request.config.getoption("--scrapes"))
    realtime = bool(request.config.getoption("--realtime"))
    built = program("dsnatd")
    ports = DPDK_INTERFACES.replace("iface=vin", "iface=vin,blocksz=65536,framesz=2048,framecnt=32768")
    ports = ports.replace("net_af_packet1,iface=vout", "net_pcap1,tx_pcap=/dev/null")
    gateway = new_gateway(
        lab,
        built if not realtime else built.parents[1] / "engine/dsnatd",
        f"engine: {{workers: 1, max_sessions: {sessions + 10_000}}}\n{ports}"
        "pools: [{name: public, addresses: [203.0.112.0/24]}]\n"
        "zones: [{source: 100.64.0.0/10, pool: public}]\n"
        "timeouts: {udp_one_way: 3h}\n",
    )
    gateway.space.ip(f"neighbour replace {REMOTE} lladdr 02:00:00:00:00:14 dev outside0 nud permanent")
    metrics = sidecar(gateway)
    for pid in (gateway.pid(), metrics.process.pid) if realtime else ():
        first(pid)
    empty = gateway.space.inside(lambda: scrapes(count, realtime=realtime))
    told("without sessions", empty)

    for begin in range(0, sessions, AT_ONCE):
        flood(gateway, min(AT_ONCE, sessions - begin), 100_000, begin)
    there = gateway.counters()["sessions"]
    done = threading.Event()

    def traffic() -> None:
        while not done.is_set():
            flood(gateway, min(AT_ONCE, sessions), 50_000)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        before = gateway.counters()["received"]
        full = gateway.space.inside(lambda: scrapes(count, realtime=realtime))
    finally:
        done.set()
        thread.join()

    told(f"{there} sessions, {gateway.counters()['received'] - before} packets meanwhile", full)
    assert there > sessions / 2  # a busy machine loses part of the flood before the engine sees it
    assert full[count // 2] < 3 * empty[count // 2] + 50, "a scrape must not walk the sessions"
    gateway.close()
