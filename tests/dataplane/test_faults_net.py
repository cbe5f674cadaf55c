"""What breaks around a gateway, and what then happens: service comes back, or one sentence says what to do.

`tests/gateway.py` draws the topology and names the paths. Faults that only one path knows are beside that
path's tests (`test_dpdk_net.py`, `test_queue_net.py`), those of a pair in `test_failover_net.py`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway import PATHS, Gateway, new_gateway, ping, watch
from tests.lab import Lab, wait_until
from tests.traffic import SERVER

pytestmark = pytest.mark.net

FAR = "192.0.2.9"


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def gateway(lab: Lab, program: Callable[[str], Path], path: str) -> Iterator[Gateway]:
    made = new_gateway(lab, program("dsnatd"), path=path)
    yield made
    made.close()


def sessions(gateway: Gateway) -> list[str]:
    return [one["outside"] for one in gateway.show("sessions")["sessions"]]


def has_carrier(gateway: Gateway, name: str) -> bool:
    return "LOWER_UP" in gateway.space.ip(f"link show {name}")


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_a_link_that_flaps_costs_only_what_was_sent_meanwhile(gateway: Gateway, side: str) -> None:
    far_end = {"inside": gateway.client, "outside": gateway.server}[side]
    assert " 3 received" in ping(gateway.client, SERVER, "-e", "4711")
    before = sessions(gateway)
    for _ in range(3):
        far_end.ip("link set eth0 down")
        wait_until("the kernel to see the link go", lambda: not has_carrier(gateway, f"{side}0"))
        far_end.ip("link set eth0 up")
        wait_until("the kernel to see the link come", lambda: has_carrier(gateway, f"{side}0"))
    if side == "inside":  # the client's kernel has dropped its route with the link
        gateway.client.ip("route replace default via 100.64.0.1")
    else:
        gateway.server.ip("route replace 203.0.113.0/24 via 198.51.100.1")
    wait_until("service", lambda: " 3 received" in ping(gateway.client, SERVER, "-e", "4711"))
    assert sessions(gateway) == before


def test_routes_are_right_again_after_more_changes_than_netlink_keeps(gateway: Gateway) -> None:
    gateway.server.ip(f"address add {FAR}/32 dev lo")
    batch = gateway.space.lab.directory / "routes"
    many = (
        f"route add 192.0.{n >> 6}.{(n & 63) << 2}/30 via {SERVER} metric {m}"
        for m in range(1, 9)
        for n in range(4096)
    )
    noise = [line for line in many if not line.startswith("route add 192.0.2.8/30")]
    batch.write_text("\n".join([*noise, f"route add {FAR}/32 via {SERVER}"]) + "\n")
    gateway.daemon.process.send_signal(signal.SIGSTOP)
    try:
        gateway.space.run("ip", "-batch", str(batch), timeout_s=60)
    finally:
        gateway.daemon.process.send_signal(signal.SIGCONT)
    wait_until("the route", lambda: " 3 received" in ping(gateway.client, FAR), deadline_s=60)
    assert gateway.ask(cmd="status")["routes"]["overruns"] > 0, "the kernel kept them all: nothing was tried"
    gateway.space.ip(f"route delete {FAR}/32")
    wait_until("its end", lambda: " 0 received" in ping(gateway.client, FAR))


def test_a_route_loop_ends_at_the_gateway_and_is_counted(gateway: Gateway) -> None:
    gateway.space.ip(f"route add 192.0.2.0/24 via {SERVER}")
    gateway.server.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0")
    gateway.server.ip("route add 192.0.2.0/24 via 198.51.100.1")
    seen = watch(gateway.server, f"icmp and dst host {FAR}", "loop")
    assert " 0 received" in ping(gateway.client, FAR, "-t", "64")
    arrived = r"ICMP echo request"
    wait_until(
        "the requests", lambda: len(re.findall(arrived, seen.text())) >= 6
    )  # three in, three out again
    assert len(re.findall(arrived, seen.text())) == 6, "the loop went round more than once"
    assert gateway.show("counters")["equation"]
    assert " 3 received" in ping(gateway.client, SERVER)


def test_the_mtu_that_an_operator_sets_holds_from_the_next_packet_on(gateway: Gateway) -> None:
    large = ("-M", "do", "-s", "1400")
    assert " 3 received" in ping(gateway.client, SERVER, *large)
    gateway.space.ip("link set outside0 mtu 1300")
    gateway.server.ip("link set eth0 mtu 1300")

    def told() -> bool:
        gateway.client.ip("route flush cache")
        return "mtu = 1300" in ping(gateway.client, SERVER, *large) or "mtu=1300" in ping(
            gateway.client, SERVER, *large
        )

    wait_until("the client to be told the MTU", told)
    assert " 3 received" in ping(gateway.client, SERVER, "-M", "do", "-s", "1200")
    assert " 3 received" in ping(gateway.client, SERVER, "-M", "dont", "-s", "1400")
    gateway.space.ip("link set outside0 mtu 1500")
    gateway.server.ip("link set eth0 mtu 1500")
    gateway.client.ip("route flush cache")
    wait_until("large packets", lambda: " 3 received" in ping(gateway.client, SERVER, *large))
