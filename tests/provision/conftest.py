"""A small fleet to change one thing of, and how to read what comes out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from provision.load import InvalidFleet, Source, load
from provision.model import Fleet
from provision.validate import validate

KEYS = [
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFGT6nTb3i0nCRfdyjVkNEVTjXNeiWrxDMUIxdm2CtoL",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAJ3G1g0JHT5vNH0QzYb0i1t5bqB8nS5Kq1JYc7aVd2U",
]

LONE = f"""\
schema: 1
pools:
  home: {{addresses: [203.0.113.1-203.0.113.4]}}
gateways:
  gw1:
    management: {{address: 192.0.2.11}}
    host_key: {KEYS[0]}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.2/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.2/24]}}
    vrrp:
      instances:
        inside0: {{id: 10, addresses: [100.64.0.1/24]}}
        outside0: {{id: 20, addresses: [198.51.100.1/24]}}
    zones:
      - {{source: 100.64.0.0/24, pool: home}}
    routes:
      - {{to: default, via: 198.51.100.254}}
"""

PAIR = f"""\
schema: 1
pools:
  home: {{addresses: [203.0.113.1-203.0.113.4]}}
pairs:
  edge:
    vrrp:
      instances:
        inside0: {{id: 10, addresses: [100.64.0.1/24]}}
        outside0: {{id: 20, addresses: [198.51.100.1/24]}}
    zones:
      - {{source: 100.64.0.0/24, pool: home}}
gateways:
  gw1:
    pair: edge
    priority: 150
    management: {{address: 192.0.2.11}}
    host_key: {KEYS[0]}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.2/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.2/24]}}
  gw2:
    pair: edge
    priority: 100
    management: {{address: 192.0.2.12}}
    host_key: {KEYS[1]}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.3/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.3/24]}}
"""

MEMBER = """\
  gw{n}:
    cluster: north
    management: {{address: 192.0.2.{n}}}
    host_key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFGT6nTb3i0nCRfdyjVkNEVTjXNeiWrxDMUIxdm2Cto{n}
    interfaces:
      inside0: {{role: inside, path: nfqueue, addresses: [100.64.0.{n}/24]}}
      outside0: {{role: outside, path: nfqueue, addresses: [198.51.100.{n}/24]}}
"""

CLUSTER = """\
schema: 1
pools:
  public: {addresses: [203.0.113.0/26]}
clusters:
  north:
    bgp:
      as: 64512
      neighbors:
        - {address: 100.64.0.254, as: 64513}
        - {address: 198.51.100.254, as: 64500}
    zones:
      - {source: 100.64.0.0/12, pool: public}
gateways:
""" + "".join(MEMBER.format(n=n) for n in range(1, 5))

Reader = Callable[..., tuple[Fleet, Source]]
Complaints = Callable[..., list[str]]


def changed(text: str, *replace: tuple[str, str]) -> str:
    for old, new in replace:
        assert old in text, f"{old!r} is not in the fleet"
        text = text.replace(old, new)
    return text


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Loads a text as fleet.yaml."""
    monkeypatch.chdir(tmp_path)

    def reader(text: str) -> tuple[Fleet, Source]:
        Path("fleet.yaml").write_text(textwrap.dedent(text))
        return load(Path("fleet.yaml"))

    return reader


@pytest.fixture
def complaints(read: Reader) -> Complaints:
    """Everything that is wrong with a text, one line each, without the source lines."""

    def complain(text: str, *replace: tuple[str, str]) -> list[str]:
        try:
            fleet, source = read(changed(text, *replace))
        except InvalidFleet as error:
            problems = error.problems
        else:
            problems = validate(fleet, source)
        return [str(problem).splitlines()[0] for problem in problems]

    return complain
