"""A cluster of real gateways and real routers: what a plan says is what hosts count (tests/cluster.py).

The whole story, with 1,000 hosts and more events: `python -m tests.cluster`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from provision import cluster
from tests.cluster import Event, Flows, Story, with_standby
from tests.cluster_lab import OUR_AS, Cluster
from tests.lab import Lab, wait_until

pytestmark = pytest.mark.net

FOUR = ("gw1", "gw2", "gw3", "gw4")


def judge(event: Event) -> None:
    assert event.right, event


@pytest.mark.timeout(300)
def test_hosts_count_the_resets_that_the_plan_announced(lab: Lab, program: Callable[[str], Path]) -> None:
    made = Cluster(lab, program("dsnatd"), bfd_ms=1000)  # a busy machine is not ill
    made.push(1, 2, 3, 4)
    made.await_settled(*FOUR)
    assert len(made.slices()) == 4
    story = Story(made, Flows(made, 200))
    judge(story.drained("gw3"))
    judge(story.back("gw3"))
    judge(story.changed("add gw5", (1, 2, 3, 4, 5), {}))
    judge(story.changed("remove gw2", (1, 2, 3, 4, 5), {2: 0}))
    judge(story.engine_died("gw1"))
    running = made.look(made.fleet())
    assert cluster.twice(made.fleet(), running) == []
    assert all("gw1" in text for text in cluster.strangers(made.fleet(), running))


@pytest.mark.timeout(300)
def test_a_slice_with_a_standby_loses_no_connection(lab: Lab, program: Callable[[str], Path]) -> None:
    for event in with_standby(Cluster(lab, program("dsnatd"), bfd_ms=1000), 200):
        judge(event)


@pytest.mark.timeout(120)
def test_a_router_of_another_as_and_a_slice_that_somebody_else_announces_are_named(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    made = Cluster(lab, program("dsnatd"))
    made.push(1, 2)
    made.await_settled("gw1", "gw2")
    # somebody else takes gw2's slice: gw1's BIRD is told so behind the tool's back
    thief, owner = made.members["gw1"], made.members["gw2"]
    conf = thief.root / "generations/current/bird.conf"
    right = conf.read_text()
    (prefix,) = [p for p, name in made.slices().items() if name == "gw2"]
    stolen = right.replace("    ipv4;\n", f'    ipv4;\n    route {prefix} via "dsnat-out";\n', 1)
    conf.write_text(stolen.replace('export where proto = "slice";', "export where source = RTS_STATIC;"))
    thief.machine.run(["systemctl", "reload", "bird.service"])

    def alarms() -> list[str]:
        return cluster.twice(made.fleet(), made.look(made.fleet()))

    said = wait_until("the alarm", alarms)
    assert any(f"hears {prefix} of its own slice from a router" in text for text in said), said
    conf.write_text(right.replace(f"as {OUR_AS};", "as 64999;", 2))
    thief.machine.run(["systemctl", "reload", "bird.service"])
    assert owner.alive("bird")

    def named() -> list[str]:
        said = cluster.strangers(made.fleet(), made.look(made.fleet()))
        return [text for text in said if "is not what it has" in text]

    said = wait_until("the wrong AS to be named", named, deadline_s=60)
    assert said[0].startswith("gw1: BGP to "), said
