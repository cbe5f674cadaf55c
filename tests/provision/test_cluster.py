"""Clusters: what is wrong in a file, what moves, and that nothing is announced twice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from provision import cluster, slices
from provision.load import load
from provision.model import Fleet
from provision.plan import Running
from provision.render import render
from provision.slices import Range
from tests.provision.conftest import CLUSTER, MEMBER, Complaints, Reader, changed

FIFTH = MEMBER.format(n=5)


def running_of(fleet: Fleet, sessions: int = 10) -> dict[str, Running]:
    """Gateways that run what this fleet wants, with so many sessions on each address."""
    found: dict[str, Running] = {}
    for name in fleet.gateways:
        files = render(fleet, name, secret=lambda reference: "").files
        own = [r for pool in fleet.pools_of(name).values() for r in pool.spans()]
        addresses = [
            {"address": slices.text([(n, n)])[0], "sessions": sessions}
            for first, last in own
            for n in range(first, last + 1)
        ]
        engine = {
            "status": {"sessions": sessions * len(addresses)},
            "pools": {"pools": [{"addresses": addresses}]},
        }
        facts = {"generation": 1, "engine": engine, "files": {n: {"text": f.text} for n, f in files.items()}}
        found[name] = Running(name, facts)
    return found


BGP = CLUSTER[CLUSTER.index("    bgp:") : CLUSTER.index("    zones:")]
SLICES = "slices: {{north: {{public: {{{}}}}}}}\ngateways:\n"
FLOATING = "vrrp: {instances: {outside0: {id: 7, addresses: [198.51.100.99/24]}}}"
MISTAKES = [
    ("cluster: north", "cluster: nort", 'there is no cluster "nort"; did you mean "north"?'),
    ("203.0.113.0/26", "203.0.113.0/31", "pool public has 2 addresses for 4 gateways of cluster north"),
    ("0/26]", "0/26], deterministic: 100.64.0.0/16", "a deterministic pool cannot be sliced"),
    (
        "as: 64500}",
        "as: 64500}\n        - {address: 198.51.100.254, as: 64501}",
        "198.51.100.254 has AS 64501 here and AS 64500 elsewhere",
    ),
    ("        - {address: 100.64.0.254, as: 64513}\n", "", "gw1 has no BGP neighbour inside"),
    ("    zones:", f"    {FLOATING}\n    zones:", "a cluster has no VRRP addresses"),
    (
        "    management: {address: 192.0.2.3}",
        "    zones: []\n    management: {address: 192.0.2.3}",
        "gw3 belongs to cluster north, which says zones for all",
    ),
    (BGP, "", "cluster north has no bgp"),
    (
        "gateways:\n",
        SLICES.format("gw1: [203.0.113.0/28], gw2: [203.0.113.8/29]"),
        "slices of gw1 and gw2 overlap in 203.0.113.8-203.0.113.15",
    ),
    (
        "gateways:\n",
        SLICES.format("gw9: [203.0.113.0/28]"),
        "gw9 had 203.0.113.0/28 and is not in cluster north any more",
    ),
]


@pytest.mark.parametrize(("old", "new", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_with_its_place(
    complaints: Complaints, old: str, new: str, sentence: str
) -> None:
    found = complaints(CLUSTER, (old, new))
    assert any(line.startswith("fleet.yaml:") and sentence in line for line in found), found


def test_a_cluster_that_is_right_has_no_complaint(complaints: Complaints) -> None:
    assert complaints(CLUSTER) == []


def test_each_gateway_announces_its_slice_and_no_other(read: Reader, tmp_path: Path) -> None:
    fleet, _ = read(CLUSTER)
    everything: list[Range] = []
    for name in fleet.gateways:
        text = render(fleet, name, secret=lambda reference: "").files["bird.conf"].text
        (prefix,) = [line.split()[1] for line in text.splitlines() if "dsnat-out" in line and "route" in line]
        own = fleet.pools_of(name)["public"].spans()
        assert slices.prefixes(own) == [prefix]
        everything += own
        (tmp_path / "bird.conf").write_text(text)
        subprocess.run(["bird", "-p", "-c", str(tmp_path / "bird.conf")], check=True)
    assert slices.merged(everything) == slices.merged(fleet.pools["public"].spans())
    assert slices.size(everything) == fleet.pools["public"].size()


def test_a_gateway_without_a_share_announces_nothing(read: Reader) -> None:
    management = "    management: {address: 192.0.2.2}"
    fleet, _ = read(changed(CLUSTER, (management, f"    weight: 0\n{management}")))
    text = render(fleet, "gw2", secret=lambda reference: "").files["bird.conf"].text
    assert "dsnat-in" not in text
    assert "    route " not in text


def test_a_fifth_gateway_takes_a_fifth_and_the_bill_says_of_whom(read: Reader) -> None:
    before, _ = read(CLUSTER)
    running = running_of(before)
    cluster.keep_slices(Path("fleet.slices.yaml"), before)
    after, _ = read(CLUSTER + FIFTH)
    moves = cluster.moves(after, running)
    assert {move.target for move in moves} == {"gw5"}
    assert sorted(move.source for move in moves) == ["gw1", "gw2", "gw3", "gw4"]
    assert sum(slices.size(move.ranges) for move in moves) == 12  # of 64, in blocks of one
    assert sum(move.sessions for move in moves) == 120


def test_the_file_of_slices_is_read_back_and_moves_nothing(read: Reader) -> None:
    fleet, _ = read(CLUSTER)
    assert cluster.keep_slices(Path("fleet.slices.yaml"), fleet)
    again, _ = load(Path("fleet.yaml"))
    assert again.slices["north"]["public"]["gw2"] == ("203.0.113.16-203.0.113.31",)
    assert again.division == fleet.division
    assert not cluster.keep_slices(Path("fleet.slices.yaml"), again)


def test_a_gateway_that_was_not_reached_keeps_what_it_may_announce(read: Reader) -> None:
    before, _ = read(CLUSTER)
    cluster.keep_slices(Path("fleet.slices.yaml"), before)
    running = running_of(before)
    del running["gw2"]
    assert cluster.unsafe(before, running) == []  # it keeps its own
    after, _ = read(CLUSTER + FIFTH)
    (sentence,) = cluster.unsafe(after, running)
    assert sentence.startswith("gw2 was not reached and may still announce 203.0.113.")
    assert "which gw5 is to have; reach it, or say that it is gone for good" in sentence


def test_two_gateways_with_the_same_addresses_are_an_alarm(read: Reader) -> None:
    fleet, _ = read(CLUSTER)
    running = running_of(fleet)
    running["gw3"] = Running("gw3", running["gw2"].facts)
    (sentence,) = cluster.twice(fleet, running)
    assert sentence.startswith("gw2 and gw3 both have 203.0.113.16-203.0.113.31 of pool public")


def test_a_neighbour_that_is_not_up_is_named_with_what_to_look_at(read: Reader) -> None:
    fleet, _ = read(CLUSTER)
    running = running_of(fleet)
    neighbors = [
        {"address": "100.64.0.254", "state": "Established", "error": ""},
        {"address": "198.51.100.254", "state": "Active", "error": "Received: Bad peer AS"},
    ]
    facts = {**running["gw1"].facts, "routing": {"neighbors": neighbors}}
    assert cluster.strangers(fleet, {"gw1": Running("gw1", facts)}) == [
        "gw1: BGP to 198.51.100.254 is not established (Active, Received: Bad peer AS); "
        "AS 64500 for it or 64512 for us is not what it has"
    ]


def test_addresses_that_drain_stay_in_their_pool(read: Reader) -> None:
    before, _ = read(CLUSTER)
    running = running_of(before)
    cluster.keep_slices(Path("fleet.slices.yaml"), before)
    after, _ = read(CLUSTER + FIFTH)
    leaving = [move for move in cluster.moves(after, running) if move.source == "gw1"]
    text = cluster.draining(running["gw1"], leaving)
    assert cluster.pools_in(text) == cluster.running_pools(running["gw1"])
    assert "    drain:\n      - 203.0.113.13-203.0.113.15\n    ports:" in text


@pytest.mark.parametrize(
    ("hashing", "before", "after", "share"),
    [
        ("resilient", "abcd", "abd", 0),
        ("threshold", "abcd", "abd", 1 / 9),
        ("threshold", "abcd", "bcd", 1 / 3),
        ("threshold", "abcd", "abcde", 1 / 2),
        ("threshold", "ab", "b", 0),
        ("modulo", "abcd", "abcde", 4 / 5),
        ("modulo", "abcd", "abcd", 0),
    ],
)
def test_the_share_of_flows_that_routers_send_elsewhere(
    hashing: str, before: str, after: str, share: float
) -> None:
    assert cluster.rehash(hashing, before, after) == pytest.approx(share)


def test_a_pair_is_one_member_with_one_slice(read: Reader) -> None:
    text = changed(CLUSTER, ("gateways:\n", f"pairs:\n  edge: {{cluster: north, {FLOATING}}}\ngateways:\n"))
    for n, priority in ((1, 150), (2, 100)):
        management = f"    management: {{address: 192.0.2.{n}}}"
        alone, half = "    cluster: north\n", f"    pair: edge\n    priority: {priority}\n"
        text = changed(text, (alone + management, half + management))
    fleet, _ = read(text)
    assert fleet.weights_of("north") == {"edge": 1, "gw3": 1, "gw4": 1}
    assert fleet.pools_of("gw1") == fleet.pools_of("gw2")
    files = render(fleet, "gw1", secret=lambda reference: "").files
    assert "active_while: 198.51.100.99" in files["dsnatd.yaml"].text
    assert "next hop address 198.51.100.99;" in files["bird.conf"].text
