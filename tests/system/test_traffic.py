"""The judge is judged: tests/traffic.py against gateways that are known to be right and known to be wrong.

The kernel's own nftables stands in for the gateway, so only the traffic and its verdicts are on trial.
"""

from __future__ import annotations

import pytest

from tests.lab import Lab, Netns
from tests.traffic import CLIENT, SERVER, Report, Servers, send

IN_TURN = "snat to numgen inc mod 4 map { 0: 203.0.113.1, 1: 203.0.113.2, 2: 203.0.113.3, 3: 203.0.113.4 }"
ONE_ADDRESS = "snat to 203.0.113.1"


#  client 100.64.0.10/24 --- in [ kernel 100.64.0.1 | 198.51.100.1 ] out --- server 198.51.100.10/24
def kernel_gateway(lab: Lab, *rules: str) -> tuple[Netns, Servers]:
    client, gateway, server = (lab.netns(side) for side in ("client", "gateway", "server"))
    lab.wire(client, "eth0", gateway, "in")
    lab.wire(gateway, "out", server, "eth0")
    client.ip(f"address add {CLIENT}/24 dev eth0")
    client.ip("route add default via 100.64.0.1")
    gateway.ip("address add 100.64.0.1/24 dev in")
    gateway.ip("address add 198.51.100.1/24 dev out")
    server.ip(f"address add {SERVER}/24 dev eth0")
    server.ip("route add 203.0.113.0/24 via 198.51.100.1")
    gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    for rule in rules:
        chain = f"chain c {{ type nat hook postrouting priority 100; oifname out {rule}; }}"
        gateway.run("nft", f"table ip t {{ {chain}; }}")
    servers = Servers(server, "eth0")
    servers.start()
    return client, servers


def kept(report: Report) -> dict[str, bool]:
    return {line.promise.split()[0]: line.kept for line in report.lines}


@pytest.mark.net
def test_a_gateway_that_takes_addresses_in_turn_keeps_every_promise(lab: Lab) -> None:
    client, servers = kernel_gateway(lab, IN_TURN)
    report = send(client, servers, drops=dict, seconds=1, udp_mbit=2)
    assert report.right, report.text()


@pytest.mark.net
def test_a_gateway_that_uses_one_address_is_found_out(lab: Lab) -> None:
    client, servers = kernel_gateway(lab, ONE_ADDRESS)
    report = send(client, servers, drops=dict, seconds=1, udp_mbit=2)
    assert [name for name, ok in kept(report).items() if not ok] == ["40"], report.text()


@pytest.mark.net
def test_a_packet_that_left_untranslated_is_found_out(lab: Lab) -> None:
    client, servers = kernel_gateway(lab)
    servers.space.ip("route add 100.64.0.0/10 via 198.51.100.1")
    report = send(client, servers, drops=dict, seconds=1, udp_mbit=2)
    assert not kept(report)["no"], report.text()
    assert not kept(report)["every"], report.text()
