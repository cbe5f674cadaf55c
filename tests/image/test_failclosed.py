"""The fail-closed rules, in a namespace that forwards: what may leave while no engine runs.

client 100.64.0.10 -- inside0 [ gateway, forwarding ] outside0 -- 198.51.100.10 server
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import Lab, Netns, run

SCRIPT = Path(__file__).resolve().parents[2] / "image/mkosi.extra/usr/lib/dsnat/failclosed"
FACTS = """\
interface inside0 inside dpdk 0000:00:03.0
interface outside0 outside dpdk 0000:00:04.0
pool p 203.0.113.1-203.0.113.4
zone 100.64.1.0/24 198.51.100.0/24 pass
zone 100.64.0.0/16 any pool
"""

pytestmark = pytest.mark.net


@pytest.fixture
def place(lab: Lab) -> tuple[Netns, Netns, Netns]:
    client, gateway, server = (lab.netns(name) for name in ("client", "gateway", "server"))
    lab.wire(client, "eth0", gateway, "inside0")
    lab.wire(server, "eth0", gateway, "outside0")
    gateway.ip("address add 100.64.0.1/16 dev inside0")
    gateway.ip("address add 198.51.100.1/24 dev outside0")
    gateway.ip("address add 203.0.113.1/32 dev outside0")
    gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    client.ip("address add 100.64.0.10/16 dev eth0")
    client.ip("address add 100.64.1.10/32 dev eth0")
    client.ip("route add default via 100.64.0.1")
    server.ip("address add 198.51.100.10/24 dev eth0")
    server.ip("route add 100.64.0.0/16 via 198.51.100.1")
    server.ip("route add 203.0.113.0/24 via 198.51.100.1")
    return client, gateway, server


@pytest.fixture
def load(place: tuple[Netns, Netns, Netns], tmp_path: Path) -> Callable[..., int]:
    """Runs the script of the image in the gateway, with a dsnatd that only knows facts."""

    def load(facts: str = FACTS, *, valid: bool = True) -> int:
        program = tmp_path / "dsnatd"
        program.write_text(f"#!/bin/sh\ncat <<X\n{facts}X\nexit {0 if valid else 2}\n")
        program.chmod(0o755)
        argv = place[1].argv("env", f"PATH={tmp_path}:{os.environ['PATH']}", "sh", str(SCRIPT), "any.yaml")
        return subprocess.run(argv, capture_output=True, timeout=30).returncode

    return load


def reaches(space: Netns, source: str, target: str) -> bool:
    text = space.run("ping", "-n", "-c", "1", "-W", "1", "-I", source, target, check=False)
    return "1 received" in text


def test_a_zones_packet_does_not_leave_untranslated(
    place: tuple[Netns, Netns, Netns], load: Callable[..., int]
) -> None:
    client, _, _ = place
    assert reaches(client, "100.64.0.10", "198.51.100.10"), "without the rules it does"
    assert load() == 0
    assert not reaches(client, "100.64.0.10", "198.51.100.10")


def test_a_zone_that_passes_is_passed_and_the_first_match_wins(
    place: tuple[Netns, Netns, Netns], load: Callable[..., int]
) -> None:
    assert load() == 0
    assert reaches(place[0], "100.64.1.10", "198.51.100.10")


def test_a_pool_address_never_reaches_the_gateways_own_stack(
    place: tuple[Netns, Netns, Netns], load: Callable[..., int]
) -> None:
    _, _, server = place
    assert reaches(server, "198.51.100.10", "203.0.113.1"), "without the rules it does"
    assert load() == 0
    assert not reaches(server, "198.51.100.10", "203.0.113.1")
    assert reaches(server, "198.51.100.10", "198.51.100.1"), "the gateway itself still answers"


def test_a_new_configuration_replaces_the_rules_of_the_old_one(
    place: tuple[Netns, Netns, Netns], load: Callable[..., int]
) -> None:
    client, gateway, _ = place
    assert load() == 0
    assert load(FACTS.replace("zone 100.64.0.0/16 any pool", "zone 100.65.0.0/16 any drop")) == 0
    assert reaches(client, "100.64.0.10", "198.51.100.10")
    tables = json.loads(gateway.run("nft", "--json", "list", "tables"))["nftables"]
    assert [item["table"]["name"] for item in tables if "table" in item] == ["dsnat_failclosed"]


def test_with_an_invalid_configuration_nothing_is_forwarded(
    place: tuple[Netns, Netns, Netns], load: Callable[..., int]
) -> None:
    client = place[0]
    assert load("", valid=False) == 1
    assert not reaches(client, "100.64.1.10", "198.51.100.10")
    assert reaches(client, "100.64.0.10", "100.64.0.1"), "the gateway stays reachable"


def test_a_large_fleet_loads_in_one_transaction(
    place: tuple[Netns, Netns, Netns], load: Callable[..., int]
) -> None:
    zones = "".join(f"zone 100.{64 + i // 250}.{i % 250}.0/24 any pool\n" for i in range(2000))
    assert load(FACTS + zones) == 0
    rules = run(place[1].argv("nft", "list", "chain", "inet", "dsnat_failclosed", "zones"))
    assert rules.count("drop") == 2001
