"""When a gateway is announced: while its engine is well, and for how long after it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from provision.agent import Json
from provision.agent.announce import CALM_S, FULL_S, INSIDE, LAG_S, OUTSIDE, Watch, announced
from tests.provision.machine import FakeMachine

CONF = """\
protocol bfd {
    interface "*" {
        interval 300 ms;
        multiplier 3;
    };
}
protocol static slice {
    ipv4;
    route 203.0.113.0/30 via "dsnat-out";
}
"""


class Gateway(FakeMachine):
    """An engine that says what the test wants, and devices that are remembered."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.up, self.equation, self.owns = True, True, 4
        self.created = self.refused = 0
        self.on: set[str] = set()
        conf = root / "bird.conf"
        conf.write_text(CONF)
        self.watch = Watch(self, conf, self)

    def engine(self, request: Json, timeout_s: float = 5.0) -> Json:
        if not self.up:
            raise OSError("connection refused")
        addresses = [{"address": f"203.0.113.{n}"} for n in range(self.owns)]
        pool = {"addresses": addresses, "created": self.created, "refused": self.refused}
        return {"ok": True, "equation": self.equation, "pools": [pool]}

    def set(self, name: str, on: bool) -> None:
        (self.on.add if on else self.on.discard)(name)

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.1
            self.watch.look()


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    made = Gateway(tmp_path / "dsnat")
    made.watch.look()
    assert made.on == {INSIDE, OUTSIDE}
    return made


def test_an_engine_that_died_is_withdrawn_within_the_time_of_bfd(gateway: Gateway) -> None:
    gateway.up = False
    gateway.passes(0.7)
    assert gateway.on == {INSIDE, OUTSIDE}, "a quick restart moves no traffic"
    gateway.passes(0.4)
    assert gateway.on == set()


def test_an_engine_that_came_back_is_announced_when_it_has_stayed(gateway: Gateway) -> None:
    gateway.up = False
    gateway.passes(2)
    gateway.up = True
    gateway.passes(CALM_S - 0.5)
    assert gateway.on == set()
    gateway.passes(1)
    assert gateway.on == {INSIDE, OUTSIDE}


def test_a_drained_gateway_keeps_its_slice(gateway: Gateway) -> None:
    gateway.write_drain(True)
    gateway.passes(0.2)
    assert gateway.on == {OUTSIDE}
    gateway.write_drain(False)
    gateway.passes(0.2)
    assert gateway.on == {INSIDE, OUTSIDE}


def test_a_drained_one_of_a_pair_leaves_the_way_of_packets_to_vrrp(gateway: Gateway) -> None:
    """Two announcers that look every 100 ms: one must not withdraw before the other has announced."""
    conf = gateway.watch.bird_conf
    conf.write_text(
        f"{CONF}protocol bgp inside1 {{\n    ipv4 {{\n        next hop address 100.64.0.101;\n    }};\n}}\n"
    )
    gateway.write_drain(True)
    gateway.passes(0.2)
    assert gateway.watch.state == "drained"
    assert gateway.on == {INSIDE, OUTSIDE}


def test_packets_that_do_not_add_up_are_an_illness(gateway: Gateway) -> None:
    gateway.equation = False
    gateway.passes(0.2)
    assert gateway.on == set()


def test_addresses_that_the_engine_does_not_have_are_withdrawn_when_no_change_explains_it(
    gateway: Gateway,
) -> None:
    gateway.owns = 3
    gateway.passes(LAG_S - 1)
    assert gateway.on == {INSIDE, OUTSIDE}
    gateway.passes(3)
    assert gateway.on == set()


def test_a_gateway_where_no_new_session_finds_a_port_takes_no_more(gateway: Gateway) -> None:
    gateway.created = 10
    gateway.passes(2)
    for _ in range(int(FULL_S) + 4):
        gateway.refused += 1
        gateway.passes(1)
    assert gateway.on == {OUTSIDE}
    gateway.created += 1
    gateway.passes(2)
    assert gateway.on == {INSIDE, OUTSIDE}


def test_some_refusals_beside_new_sessions_are_not_a_full_gateway(gateway: Gateway) -> None:
    for _ in range(20):
        gateway.refused += 1
        gateway.created += 1
        gateway.passes(1)
        assert gateway.on == {INSIDE, OUTSIDE}


def test_the_slice_is_read_from_what_bird_was_told(gateway: Gateway) -> None:
    assert [str(net) for net in announced(gateway.root / "bird.conf")] == ["203.0.113.0/30"]
    assert announced(gateway.root / "none") == []
