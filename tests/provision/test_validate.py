"""Rules between objects: each finds its fault, names both places, and is silent about a fleet that is
right.
"""

from __future__ import annotations

import pytest

from tests.provision.conftest import KEYS, LONE, PAIR, Complaints

GW2_INSIDE = 'inside0: {role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.3/24]}'

ANOTHER = f"""\
  other:
    management: {{address: 192.0.2.99}}
    host_key: {KEYS[1]}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.2/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.9/24]}}
    zones:
      - {{source: 100.64.0.0/24, pool: office}}
"""
OFFICE = "  office: {addresses: [203.0.113.9]}\ngateways:\n"


def test_a_good_fleet_has_no_complaints(complaints: Complaints) -> None:
    assert complaints(LONE) == []
    assert complaints(PAIR) == []
    assert complaints(LONE + ANOTHER, ("gateways:\n", OFFICE)) == []


CASES: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "an unknown pool": (
        LONE,
        [("pool: home}", "pool: hone}")],
        'gateways.gw1.zones.0.pool: there is no pool "hone"; did you mean "home"?',
    ),
    "an unknown pair": (
        PAIR,
        [("pair: edge\n    priority: 100", "pair: egde\n    priority: 100")],
        'no pair "egde"',
    ),
    "a pair of one": (PAIR, [("pair: edge\n    priority: 100", "priority: 100")], "pair edge has only gw1"),
    "the same priority": (
        PAIR,
        [("priority: 100", "priority: 150")],
        "gw1 and gw2 have the same priority 150; give the usual master the higher one (the "
        "other is at fleet.yaml:15",
    ),
    "a zone in a member of a pair": (
        PAIR,
        [("    priority: 100\n", "    priority: 100\n    zones: [{source: 100.64.0.0/24, pool: home}]\n")],
        "gw2 belongs to pair edge; move zones there",
    ),
    "an interface that only one has": (
        PAIR,
        [(GW2_INSIDE, GW2_INSIDE.replace("inside0:", "inside1:"))],
        "gw1 has inside0 and its peer gw2 has not",
    ),
    "roles that differ": (
        PAIR,
        [(GW2_INSIDE, GW2_INSIDE.replace("role: inside", "role: outside"))],
        "inside0 is outside here and not on gw1",
    ),
    "segments that differ": (
        PAIR,
        [("100.64.0.3/24", "100.65.0.3/24")],
        "gw1 and gw2 share no prefix on inside0",
    ),
    "pools that overlap": (
        LONE,
        [("gateways:\n", "  office: {addresses: [203.0.113.0/30]}\ngateways:\n")],
        'pools "office" and "home" both own 203.0.113.1-203.0.113.3; give each address to one pool '
        "(the other is at fleet.yaml:4:",
    ),
    "an address twice in a pool": (
        LONE,
        [("203.0.113.1-203.0.113.4]", "203.0.113.1-203.0.113.4, 203.0.113.2]")],
        "pool home has 203.0.113.2 twice",
    ),
    "a pool of two owners": (
        LONE + ANOTHER.replace("pool: office", "pool: home"),
        [],
        'pool "home" is used by gw1 and other; two active gateways cannot share addresses',
    ),
    "a pool that nobody uses": (
        LONE,
        [("gateways:\n", OFFICE)],
        "warning: pools.office: no zone uses pool office",
    ),
    "a VRRP address in a pool": (
        LONE,
        [("203.0.113.1-203.0.113.4", "198.51.100.0/29")],
        "the VRRP address 198.51.100.1 lies in pool home",
    ),
    "an own address in a pool": (
        LONE,
        [("203.0.113.1-203.0.113.4", "198.51.100.2-198.51.100.5")],
        "198.51.100.2 lies in pool home; an interface's own address cannot be in a pool",
    ),
    "the management address in a pool": (
        LONE,
        [("address: 192.0.2.11", "address: 203.0.113.2")],
        "the gateway would no longer be reachable",
    ),
    "a pool inside a zone": (
        LONE,
        [("source: 100.64.0.0/24", "source: 203.0.113.0/24")],
        "the zone's source 203.0.113.0/24 holds addresses of pool home",
    ),
    "VRRP on an interface that is not there": (
        LONE,
        [("        inside0: {id: 10", "        inside7: {id: 10")],
        "gw1 has no interface inside7 (it has: inside0, outside0)",
    ),
    "a VRRP address off the segment": (
        LONE,
        [("addresses: [100.64.0.1/24]", "addresses: [100.64.9.1/24]")],
        "100.64.9.1 is in no prefix of gw1's inside0",
    ),
    "a VRRP address that is somebody's own": (
        LONE,
        [("addresses: [100.64.0.1/24]", "addresses: [100.64.0.2/24]")],
        "100.64.0.2 is gw1's own address",
    ),
    "authentication in VRRP 3": (
        LONE,
        [("    vrrp:\n", "    vrrp:\n      authentication: {password: 'env:P'}\n")],
        "VRRP version 3 has no authentication",
    ),
    "half seconds in VRRP 2": (
        LONE,
        [("    vrrp:\n", "    vrrp:\n      version: 2\n      advert_interval: 500ms\n")],
        "VRRP version 2 counts whole seconds",
    ),
    "unicast to nobody": (
        LONE,
        [("    vrrp:\n", "    vrrp:\n      transport: unicast\n")],
        "unicast needs a peer",
    ),
    "a VRRP id twice on a segment": (
        LONE
        + ANOTHER
        + "    vrrp:\n      instances:\n        outside0: {id: 20, addresses: [198.51.100.8/24]}\n",
        [("gateways:\n", OFFICE)],
        "VRRP id 20 is used twice on the segment 198.51.100.0/24; choose another (the other "
        "is at fleet.yaml:15",
    ),
    "a route to nowhere": (
        LONE,
        [("via: 198.51.100.254", "via: 198.18.0.1")],
        "the next hop 198.18.0.1 is in no prefix of an interface of gw1",
    ),
    "a zone that never matches": (
        LONE,
        [("    zones:\n", "    zones:\n      - {source: 100.64.0.0/10, action: drop}\n")],
        "this zone never matches: 100.64.0.0/10 stands before it; move it up (the other is at fleet.yaml:16",
    ),
    "no outside": (
        LONE,
        [("role: outside", "role: inside")],
        "gw1 has zones to translate and no outside interface",
    ),
    "too few ports": (
        LONE,
        [("113.4]}", "113.4], ports: 5000-5009, mapping: endpoint-independent}")],
        "pool home has 40 ports for 256 hosts",
    ),
    "too few ports for the limit": (
        LONE,
        [
            ("113.4]}", "113.4], mapping: endpoint-independent}"),
            ("    routes:\n", "    limits: {sessions_per_host: 2000}\n    routes:\n"),
        ],
        "256 hosts with 2000 mappings each need 512000 ports and pool home has 258048; add 4 "
        "addresses or lower",
    ),
    "an address drained that is not there": (
        LONE,
        [("113.4]}", "113.4], drain: [203.0.113.9]}")],
        "203.0.113.9 is not in pool home",
    ),
    "a static mapping outside of the pools": (
        LONE,
        [("    routes:\n", "    static: [{inside: 100.64.0.9, outside: 203.0.113.99}]\n    routes:\n")],
        "203.0.113.99 is in no pool of gw1",
    ),
    "a port that is forwarded twice": (
        LONE,
        [
            (
                "    routes:\n",
                "    static:\n"
                "      - {inside: 100.64.0.8, outside: 203.0.113.1, protocol: tcp, port: 80}\n"
                "      - {inside: 100.64.0.9, outside: 203.0.113.1, protocol: tcp, port: 80}\n"
                "    routes:\n",
            )
        ],
        "203.0.113.1 port 80 is mapped twice; remove one (the other is at fleet.yaml:18",
    ),
    "half a forwarded port": (
        LONE,
        [
            (
                "    routes:\n",
                "    static: [{inside: 100.64.0.9, outside: 203.0.113.1, port: 80}]\n    routes:\n",
            )
        ],
        "a forwarded port needs both protocol and port",
    ),
    "a neighbour that is not connected": (
        LONE,
        [
            (
                "    routes:\n",
                "    bgp: {as: 65001, neighbors: [{address: 192.0.2.9, as: 65000}]}\n    routes:\n",
            )
        ],
        "the neighbour 192.0.2.9 is in no prefix of an interface of gw1",
    ),
    "no time to confirm": (
        LONE,
        [("schema: 1\n", "schema: 1\ndefaults: {rollout: {confirm_within: 500ms}}\n")],
        "defaults.rollout.confirm_within: a gateway waits between 5s and 1h",
    ),
    "an interface called all": (LONE, [("outside0", "all")], "the name all is taken by Linux"),
    "one host key for two": (PAIR, [(KEYS[1], KEYS[0])], "host key is given to two places"),
    "one outside address for two": (
        PAIR,
        [("198.51.100.3/24", "198.51.100.2/24")],
        "198.51.100.2 is given to two",
    ),
    "one device for two interfaces": (
        LONE,
        [("0000:00:04.0", "0000:00:03.0")],
        "0000:00:03.0 is used twice on gw1",
    ),
    "management on a port of the engine": (
        LONE,
        [("address: 192.0.2.11", "address: 100.64.0.2")],
        "100.64.0.2 is on inside0, which the engine drives",
    ),
    "management interface that carries traffic": (
        LONE,
        [("{address: 192.0.2.11}", "{address: 192.0.2.11, interface: inside0}")],
        "inside0 is the way to gw1 and cannot also carry hosts' traffic",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(complaints: Complaints, name: str) -> None:
    text, replace, expected = CASES[name]
    found = complaints(text, *replace)
    assert any(expected in line for line in found), found
