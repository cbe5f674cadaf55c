"""What only the netfilter-queue path has: its rules in the kernel, and a kernel that forwards.

The topology is that of `tests/gateway.py` with the path `nfqueue`.
"""

from __future__ import annotations

import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.gateway import (
    INSIDE_ADDRESS,
    OUTSIDE_ADDRESS,
    Gateway,
    config,
    interfaces,
    new_gateway,
    ping,
    watch,
)
from tests.lab import Lab, run, wait_until
from tests.traffic import CLIENT, POOL, SERVER

pytestmark = pytest.mark.net

DSNATCTL = Path(__file__).parents[2] / "dataplane"  # the package's folder


@pytest.fixture
def gateway(lab: Lab, program: Callable[[str], Path]) -> Iterator[Gateway]:
    made = new_gateway(lab, program("dsnatd"), path="nfqueue")
    yield made
    made.close()


def fetched_bytes(gateway: Gateway, size: int) -> int:
    """The client's own count of what a server sent over one TCP connection."""

    def serve() -> None:
        with closing(socket.create_server((SERVER, 7001))) as listener:
            listening.set()
            peer, _ = listener.accept()
            with peer:
                peer.sendall(bytes(size))

    def fetch() -> int:
        received = 0
        with socket.create_connection((SERVER, 7001), timeout=10) as client:
            while data := client.recv(65536):
                received += len(data)
        return received

    listening = threading.Event()
    server = threading.Thread(target=gateway.server.inside, args=(serve,), daemon=True)
    server.start()
    assert listening.wait(10)
    received = gateway.client.inside(fetch)
    server.join(10)
    return received


def test_the_engine_starts_without_dpdks_environment(gateway: Gateway) -> None:
    threads = Path(f"/proc/{gateway.pid()}/task")
    names = {(thread / "comm").read_text().strip() for thread in threads.iterdir()}
    assert "dsnat-queue" in names
    assert not {name for name in names if name.startswith(("dpdk-", "eal-", "rte_"))}


def test_a_killed_engine_leaves_nothing_untranslated_and_the_next_one_goes_on(gateway: Gateway) -> None:
    assert " 3 received" in ping(gateway.client, SERVER)
    seen = watch(gateway.server, "icmp", "leak")
    gateway.daemon.process.kill()
    gateway.daemon.wait(timeout_s=10)
    assert " 0 received" in ping(gateway.client, SERVER, "-W", "1")
    assert "echo request" not in seen.text()
    gateway.start()
    assert " 3 received" in ping(gateway.client, SERVER)
    wait_until("the pings at the server", lambda: "echo request" in seen.text())
    assert CLIENT not in seen.text()


def test_only_release_removes_the_rules(lab: Lab, program: Callable[[str], Path]) -> None:
    gateway = new_gateway(lab, program("dsnatd"), path="nfqueue")
    gateway.close()
    assert "table ip dsnat" in gateway.space.run("nft", "list", "tables")
    assert " 0 received" in ping(gateway.client, SERVER, "-W", "1")
    path = f"PATH={program('dsnatd').parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    argv = ("env", path, f"PYTHONPATH={DSNATCTL}", sys.executable, "-m", "dsnatctl", "release", "--yes")
    gateway.space.run(*argv, "--config", str(gateway.file))
    assert "dsnat" not in gateway.space.run("nft", "list", "tables")


@pytest.mark.parametrize("what", ["ruleset", "table ip dsnat", "chain ip dsnat requests"])
def test_rules_that_somebody_flushes_are_put_back_and_he_is_named(gateway: Gateway, what: str) -> None:
    before = gateway.space.run("nft", "-s", "list", "ruleset")
    gateway.space.run("nft", "flush", *what.split())
    wait_until("the report", lambda: "nft (process " in gateway.daemon.text())
    wait_until("the rules", lambda: gateway.space.run("nft", "-s", "list", "ruleset") == before)
    assert " 3 received" in ping(gateway.client, SERVER)
    assert gateway.daemon.text().count("put in place again") == 1


def test_rules_of_others_are_no_business_of_ours(gateway: Gateway) -> None:
    gateway.space.run("nft", "add", "table", "ip", "theirs")
    gateway.space.run("nft", "delete", "table", "ip", "theirs")
    assert " 3 received" in ping(gateway.client, SERVER)
    assert "put in place again" not in gateway.daemon.text()


def test_fragments_cross_in_both_directions(gateway: Gateway) -> None:
    assert " 3 received" in ping(gateway.client, SERVER, "-s", "4000", "-M", "dont")
    # as many as were sent: the kernel has put none together
    assert gateway.counters()["received"] == 3 * 3 * 2


def test_fragments_stay_apart_also_where_conntrack_is_in_use(gateway: Gateway) -> None:
    rule = "add table ip theirs { chain in { type filter hook forward priority 0; ct state new counter; }; }"
    gateway.space.run("nft", rule)
    assert " 3 received" in ping(gateway.client, SERVER, "-s", "4000", "-M", "dont")
    assert gateway.counters()["received"] == 3 * 3 * 2
    assert "counter packets 0" in gateway.space.run("nft", "list", "table", "ip", "theirs")


def test_unfinished_checksums_and_joined_segments_of_the_kernel_are_sent_right(gateway: Gateway) -> None:
    for space, name in (
        (gateway.client, "eth0"),
        (gateway.server, "eth0"),
        (gateway.space, "inside0"),
        (gateway.space, "outside0"),
    ):
        space.run("ethtool", "-K", name, "tx", "on", "tso", "on", "gso", "on", "gro", "on", check=False)
    assert fetched_bytes(gateway, 3_000_000) == 3_000_000


def test_a_reply_too_large_for_the_inside_is_answered_in_the_servers_own_terms(gateway: Gateway) -> None:
    gateway.space.ip("link set inside0 mtu 1280")  # as a tunnel would be; the client does not know
    seen = watch(gateway.server, "icmp", "errors")
    assert fetched_bytes(gateway, 200_000) == 200_000
    wait_until("the error", lambda: "need to frag (mtu 1280)" in seen.text())
    assert CLIENT not in seen.text()


def test_traceroute_shows_the_gateway_once(gateway: Gateway) -> None:
    text = gateway.client.run("traceroute", "-n", "-I", "-q", "1", "-w", "2", "-m", "4", SERVER)
    hops = re.findall(r"^ *\d+ +(\S+)", text, re.MULTILINE)[-2:]
    assert hops == [INSIDE_ADDRESS, SERVER], text
    # and the other way: a session that a reply may use, with a TTL that ends at the gateway
    assert gateway.reason("ttl_expired") == 0


def test_an_outside_host_cannot_reach_the_inside_directly(gateway: Gateway) -> None:
    gateway.server.ip(f"route add 100.64.0.0/16 via {OUTSIDE_ADDRESS}")
    assert " 0 received" in ping(gateway.server, CLIENT, "-W", "1")
    assert gateway.reason("not_ours") == 3


def test_an_inside_host_without_a_zone_is_not_forwarded(gateway: Gateway) -> None:
    gateway.space.ip("address add 100.99.0.1/24 dev inside0")
    gateway.client.ip("address add 100.99.0.2/24 dev eth0")
    assert " 0 received" in ping(gateway.client, SERVER, "-W", "1", "-I", "100.99.0.2")
    assert gateway.reason("no_zone") == 3


def test_a_pool_address_answers_nobody_without_a_session(gateway: Gateway) -> None:
    assert " 0 received" in ping(gateway.server, POOL[0], "-W", "1")
    assert gateway.reason("no_session") == 3


def test_one_inside_host_reaches_another_by_its_public_address(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    rest = """\
pools:
  - {name: public, addresses: [203.0.113.1-203.0.113.4]}
zones:
  - {source: 100.64.0.0/16, pool: public}
static:
  - {inside: 100.64.0.10, outside: 203.0.113.4}
"""
    gateway = new_gateway(
        lab, program("dsnatd"), config(interfaces=interfaces("nfqueue"), rest=rest), path="nfqueue"
    )
    gateway.client.ip("address add 100.64.0.11/24 dev eth0")
    assert " 3 received" in ping(gateway.client, "203.0.113.4", "-I", "100.64.0.11")
    gateway.close()


def test_an_interface_that_goes_and_comes_back_is_served_again(gateway: Gateway, lab: Lab) -> None:
    assert " 3 received" in ping(gateway.client, SERVER)
    gateway.space.ip("link delete inside0")
    lab.wire(gateway.client, "eth0", gateway.space, "inside0")
    gateway.client.ip(f"address add {CLIENT}/24 dev eth0")
    gateway.client.ip(f"route add default via {INSIDE_ADDRESS}")
    gateway.address()
    wait_until("the new interface", lambda: " 3 received" in ping(gateway.client, SERVER, "-W", "1"))


def test_what_overruns_the_queue_is_counted_from_the_kernels_figures(gateway: Gateway) -> None:
    assert " 3 received" in ping(gateway.client, SERVER)
    gateway.daemon.process.send_signal(signal.SIGSTOP)

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(20_000):
                client.sendto(bytes(20), (SERVER, 9))

    try:
        gateway.client.inside(flood)
    finally:
        gateway.daemon.process.send_signal(signal.SIGCONT)

    def missed() -> int:
        return sum(int(port["rx_missed"]) for port in gateway.show("ports")["ports"])

    wait_until(
        "20,000 packets received or missed", lambda: gateway.counters()["received"] + missed() >= 20_006
    )
    assert missed() > 0


def test_a_second_engine_in_the_same_namespace_is_refused_with_status_3(gateway: Gateway) -> None:
    argv = (str(gateway.program), "--config", str(gateway.file), "--socket", f"{gateway.socket}-2")
    ended = gateway.space.start(*argv, log="second.log")
    assert ended.wait(timeout_s=30) == 3, ended.text()
    assert "another" in ended.text()
    run(["rm", "-f", f"{gateway.socket}-2"])
    assert " 3 received" in ping(gateway.client, SERVER), "the first one was disturbed"
    assert "put in place again" not in gateway.daemon.text()


def test_three_workers_have_three_queues_and_hand_over_what_is_not_theirs(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    text = config(interfaces=interfaces("nfqueue"), workers=3)
    gateway = new_gateway(lab, program("dsnatd"), text, path="nfqueue")
    hosts = [f"100.64.0.{host}" for host in range(20, 40)]
    for host in hosts:
        gateway.client.ip(f"address add {host}/24 dev eth0")
    wait_until("the routes", lambda: " 3 received" in ping(gateway.client, SERVER))
    before = gateway.drops()
    for host in hosts:
        assert " 3 received" in ping(gateway.client, SERVER, "-I", host)
    # fragments come together at one worker, whichever queues they came by; errors find their session
    assert " 3 received" in ping(gateway.client, SERVER, "-s", "4000", "-M", "dont")
    with pytest.raises(ConnectionRefusedError):
        gateway.client.inside(refused)
    listing = gateway.space.run("cat", "/proc/net/netfilter/nfnetlink_queue").splitlines()
    packets = {int(line.split()[0]): int(line.split()[7]) for line in listing}
    assert sorted(packets) == [27400, 27401, 27402]
    assert all(packets.values()), f"the kernel uses not every queue: {packets}"

    def exact() -> bool:
        counters = gateway.counters()
        moved = counters["handed_over"] == counters["taken_over"] > 0
        settled = counters["forwarded"] + counters["passed"] + sum(before.values())
        return moved and bool(counters["received"] == settled)

    wait_until("every packet to be where it belongs", exact)
    assert set(gateway.counters()["handed_over_by_cause"]) >= {"queue", "fragment", "icmp"}
    assert gateway.drops() == before
    gateway.close()


def refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect((SERVER, 9))
        client.send(b"to nobody")
        client.recv(10)
