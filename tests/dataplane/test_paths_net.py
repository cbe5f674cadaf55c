"""What holds on every path: through DPDK ports, through the kernel's queue, and through one of each.

`tests/gateway.py` draws the topology and names the paths.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway import PATHS, Gateway, config, interfaces, mac_of, new_gateway, ping, watch
from tests.lab import Lab, wait_until
from tests.traffic import CLIENT, POOL, SERVER, Servers, send

pytestmark = pytest.mark.net


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def gateway(lab: Lab, program: Callable[[str], Path], path: str) -> Iterator[Gateway]:
    made = new_gateway(lab, program("dsnatd"), path=path)
    yield made
    made.close()


def test_every_kind_of_traffic_gets_through_in_turn_over_the_pool(gateway: Gateway) -> None:
    servers = Servers(gateway.server, "eth0")
    servers.start()
    report = send(gateway.client, servers, drops=gateway.drops, seconds=2, udp_mbit=5)
    assert report.right, report.text()


def test_nothing_leaves_untranslated_or_twice_also_when_the_kernel_forwards(gateway: Gateway) -> None:
    seen = watch(gateway.server, "arp or icmp", "copy")
    gateway.space.run("sysctl", "-qw", "net.ipv4.ip_forward=1")  # the worst case: the kernel would route it
    assert " 3 received" in ping(gateway.client, SERVER)
    wait_until("the pings at the server", lambda: seen.text().count("echo request") >= 3)
    assert CLIENT not in seen.text(), "a packet left untranslated"
    assert "duplicates" not in ping(gateway.client, SERVER)


def test_arp_for_a_pool_inside_the_connected_prefix_is_answered_by_the_engine_alone(
    lab: Lab, program: Callable[[str], Path], path: str
) -> None:
    rest = """\
pools:
  - {name: near, addresses: [198.51.100.200]}
  - {name: routed, addresses: [203.0.113.1]}
zones:
  - {source: 100.64.0.0/16, pool: near}
"""
    text = config(interfaces=interfaces(path), rest=rest)
    gateway = new_gateway(lab, program("dsnatd"), text, path=path, start=False)
    seen = watch(gateway.server, "arp", "arp")
    gateway.start()
    gateway.address()
    mac = mac_of(gateway.space, gateway.port("outside"))
    announced = rf"{mac} > ff:ff:ff:ff:ff:ff.* who-has 198\.51\.100\.200 \S* ?tell 198\.51\.100\.200"
    wait_until("a gratuitous ARP", lambda: re.search(announced, seen.text()))
    wait_until("a second one, 5 s later", lambda: len(re.findall(announced, seen.text())) > 1)
    assert "203.0.113.1" not in seen.text(), "a routed pool needs no ARP"
    gateway.server.run("ping", "-n", "-c", "1", "-W", "1", "198.51.100.200", check=False)
    wait_until("the answer", lambda: "reply 198.51.100.200 is-at" in seen.text().lower())
    assert seen.text().lower().count("reply 198.51.100.200 is-at") == 1
    assert gateway.reason("arp_answered") == 1
    assert " 3 received" in ping(gateway.client, SERVER)
    gateway.close()


def test_a_pool_that_follows_a_vrrp_address_is_ours_only_while_the_kernel_has_it(
    lab: Lab, program: Callable[[str], Path], path: str
) -> None:
    rest = """\
pools:
  - {name: public, addresses: [198.51.100.200], active_while: 198.51.100.254}
zones:
  - {source: 100.64.0.0/16, pool: public}
"""
    text = config(interfaces=interfaces(path), rest=rest)
    gateway = new_gateway(lab, program("dsnatd"), text, path=path)
    seen = watch(gateway.server, "arp", "arp")
    assert " 0 received" in ping(gateway.client, SERVER)
    assert gateway.reason("pool_inactive") == 3
    gateway.space.ip("address add 198.51.100.254/32 dev outside0")
    wait_until("the announcement", lambda: "tell 198.51.100.200" in seen.text())
    assert " 3 received" in ping(gateway.client, SERVER)
    gateway.space.ip("address delete 198.51.100.254/32 dev outside0")
    wait_until("the pool to be given up", lambda: "no longer ours" in gateway.daemon.text())
    assert " 0 received" in ping(gateway.client, SERVER)
    gateway.close()


def test_a_packet_waits_until_its_next_hop_is_resolved(gateway: Gateway) -> None:
    text = ping(gateway.client, SERVER)  # the very first needs ARP on both sides
    assert " 3 received" in text
    assert gateway.reason("no_neighbour") == 0


def test_a_neighbour_that_changes_its_mac_address_gets_the_next_packet(gateway: Gateway) -> None:
    assert " 3 received" in ping(gateway.client, SERVER)
    gateway.server.ip("link set eth0 address 02:00:00:00:00:77")
    gateway.server.run("arping", "-U", "-c", "1", "-I", "eth0", SERVER, check=False)
    gateway.space.ip(f"neighbour replace {SERVER} lladdr 02:00:00:00:00:77 nud reachable dev outside0")
    assert " 3 received" in ping(gateway.client, SERVER)


DRAINED = "203.0.113.1, 203.0.113.9], drain: [203.0.113.1]"


def test_a_reload_changes_the_pool_and_keeps_open_connections(gateway: Gateway) -> None:
    seen: list[str] = []

    def serve() -> None:
        with socket.create_server((SERVER, 7000)) as listener:
            listening.set()
            for _ in range(2):
                peer, (address, _port) = listener.accept()
                seen.append(address)
                threads.append(threading.Thread(target=echo, args=(peer,), daemon=True))
                threads[-1].start()

    def echo(peer: socket.socket) -> None:
        with peer:
            while data := peer.recv(100):
                peer.sendall(data)

    listening = threading.Event()
    threads: list[threading.Thread] = []
    server = threading.Thread(target=gateway.server.inside, args=(serve,), daemon=True)
    server.start()
    assert listening.wait(10)

    def connect() -> socket.socket:
        return socket.create_connection((SERVER, 7000), timeout=10)

    with gateway.client.inside(connect) as first:
        first.sendall(b"before")
        assert first.recv(100) == b"before"
        gateway.file.write_text(gateway.file.read_text().replace(f"{POOL[0]}-{POOL[-1]}]", DRAINED))
        gateway.daemon.process.send_signal(signal.SIGHUP)
        wait_until("the new pool", lambda: "203.0.113.9" in str(gateway.show("pools")))
        first.sendall(b"after")
        assert first.recv(100) == b"after"
        with gateway.client.inside(connect) as second:
            second.sendall(b"new")
            assert second.recv(100) == b"new"
    server.join(10)
    assert seen == ["203.0.113.1", "203.0.113.9"]


def test_a_reload_of_a_wrong_file_keeps_the_running_configuration(gateway: Gateway) -> None:
    right = gateway.file.read_text()
    gateway.file.write_text(right.replace("203.0.113.1-203.0.113.4", "203.0.113.300"))
    gateway.daemon.process.send_signal(signal.SIGHUP)
    wait_until("the refusal", lambda: "the old one stays" in gateway.daemon.text())
    assert re.search(r"dsnatd\.yaml:\d+:\d+: ", gateway.daemon.text())
    assert " 3 received" in ping(gateway.client, SERVER)


def test_sessions_go_on_after_kill_minus_9(lab: Lab, program: Callable[[str], Path], path: str) -> None:
    gateway = new_gateway(lab, program("dsnatd"), path=path, start=False)
    sessions = Path("/dev/shm", f"{lab.prefix}.sessions")
    lab.undo.callback(sessions.unlink, missing_ok=True)
    gateway.start("--sessions", str(sessions))
    gateway.address()
    ping(gateway.client, SERVER, "-e", "4711")
    before = gateway.show("sessions")["sessions"]
    gateway.daemon.process.kill()
    gateway.daemon.wait(timeout_s=10)
    gateway.start("--sessions", str(sessions))
    assert "going on with the sessions" in gateway.daemon.text()
    ping(gateway.client, SERVER, "-e", "4711")
    after = gateway.show("sessions")["sessions"]
    assert [one["outside"] for one in after] == [one["outside"] for one in before]
    gateway.close()


def test_a_second_daemon_on_the_same_socket_is_refused_with_status_5(gateway: Gateway) -> None:
    argv = (*gateway.argv(), "--no-huge")
    ended = gateway.space.start(*argv, log="second.log")
    assert ended.wait(timeout_s=30) == 5, ended.text()
    assert " 3 received" in ping(gateway.client, SERVER), "the first one was disturbed"
