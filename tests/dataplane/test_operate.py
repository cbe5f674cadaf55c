"""What an operator does to a running gateway: cut, filter, find what is scarce."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packet import tcp, udp
from tests.replay import CONFIG, Bench, configuration, outside

Ctl = Callable[..., tuple[int, str, str]]
REMOTE = "198.51.100.1:80"
FEWER = CONFIG.replace("203.0.113.1-203.0.113.4", "203.0.113.2-203.0.113.4")


def fill(engine: Bench, count: int = 8) -> list[str]:
    return [outside(engine.send(udp(f"100.64.0.{n + 2}:4000 > {REMOTE}"))) for n in range(count)]


def test_the_bill_says_how_many_would_drain_or_be_cut_and_until_when(
    engine: Bench, ctl: Ctl, tmp_path: Path
) -> None:
    fill(engine)
    candidate = tmp_path / "next.yaml"
    candidate.write_text(FEWER)

    text = ctl("plan", str(candidate))[1]

    assert "2 live sessions of 2 hosts" in text
    assert "ends in 121 s if no packet comes; reload --cut ends the 2 on addresses that leave at once" in text


def test_reload_cut_ends_the_sessions_of_addresses_that_leave_and_no_other(
    engine: Bench, ctl: Ctl, tmp_path: Path
) -> None:
    had = fill(engine)
    (tmp_path / "dsnatd.yaml").write_text(FEWER)

    assert ctl("reload", "--cut") == (0, "reloaded: 1 pools, 1 zones, 2 sessions cut\n", "")

    left = [one["outside"] for one in engine.sessions()]
    assert sorted(left) == sorted(one for one in had if not one.startswith("203.0.113.1:"))
    back = engine.send(udp(f"{REMOTE} > {had[0]}"), on="outside0")
    assert back.reason == "not_ours"
    again = outside(engine.send(udp(f"100.64.0.2:4000 > {REMOTE}")))
    assert not again.startswith("203.0.113.1:"), "the host begins anew"
    assert engine.ctl(cmd="show", what="counters")["equation"]


@pytest.mark.parametrize("cut", [True, False])
def test_a_mapping_on_hold_does_not_outlive_its_address(
    bench: Callable[[str], Bench], tmp_path: Path, cut: bool
) -> None:
    config = configuration("endpoint-independent", addresses="203.0.113.1", extra="timeouts: {hold: 900s}")
    engine = bench(config)
    assert outside(engine.send(udp(f"100.64.0.2:4000 > {REMOTE}"))).startswith("203.0.113.1:")
    if not cut:
        engine.wait(200)  # the session has ended, its mapping rests
        assert engine.sessions() == []
    engine.config.write_text(config.replace("203.0.113.1]", "203.0.113.7]"))
    answer = engine.ctl(cmd="reload", **({"cut": True} if cut else {}))
    assert (answer["ok"], answer.get("cut", 0)) == (True, int(cut))

    assert outside(engine.send(udp(f"100.64.0.2:4000 > {REMOTE}"))).startswith("203.0.113.7:")


def test_sessions_are_shown_and_cleared_by_age_state_and_each_end(engine: Bench, ctl: Ctl) -> None:
    fill(engine, 3)
    engine.wait(30)
    young = outside(engine.send(tcp(f"100.64.0.9:5000 > {REMOTE}")))

    def shown(*words: str) -> set[str]:
        answer = json.loads(ctl("show", "sessions", "--json", *words)[1])
        return {one["inside"] for one in answer["sessions"]}

    old = {f"100.64.0.{n}:4000" for n in (2, 3, 4)}
    assert shown("--older-s", "30") == old
    assert shown("--younger-s", "30") == {"100.64.0.9:5000"}
    assert shown("--older-s", "10", "--younger-s", "20") == set()
    assert shown("--outside", young) == shown("--state", "opening") == {"100.64.0.9:5000"}
    assert shown("--remote", REMOTE, "--host", "100.64.0.0/29") == old
    assert ctl("clear", "--older-s", "30", "--host", "100.64.0.2")[1] == "1 sessions cleared\n"
    assert ctl("clear", "--older-s", "30")[1] == "2 sessions cleared\n"
    assert shown() == {"100.64.0.9:5000"}
    assert ctl("show", "sessions", "--older-s", "0")[0] == 2


def test_destinations_with_scarce_ports_are_listed_fullest_first(
    bench: Callable[[str], Bench], seed: int
) -> None:
    engine = bench(
        configuration("endpoint-dependent", addresses="203.0.113.1-203.0.113.2", ports="5000-5063")
    )
    for remote, count in (("198.51.100.1:443", 127), ("198.51.100.2:443", 122), ("198.51.100.3:443", 9)):
        for n in range(count):
            assert engine.send(udp(f"100.64.{n // 250}.{n % 250 + 1}:4000 > {remote}")).verdict == "forward"

    answer = engine.ctl(cmd="show", what="destinations")

    first, second = answer["destinations"][:2]
    assert (first["remote"], first["used"], first["ports"], first["addresses"]) == (
        "198.51.100.1:443",
        127,
        128,
        2,
    )
    assert (second["remote"], second["used"]) == ("198.51.100.2:443", 122)
    assert "198.51.100.3:443" not in str(answer), "nearly everything is free there"
    assert engine.ctl(cmd="show", what="destinations", limit=1)["of"] == 2


@pytest.mark.parametrize(
    ("mapping", "row"),
    [
        ("endpoint-dependent", "203.0.113.1 60 per remote 64 60 0"),
        ("endpoint-independent", "203.0.113.1 60 60 4 60 0"),
    ],
)
def test_pools_show_ports_used_and_free_and_the_destinations_that_run_out(
    engine: Bench, ctl: Ctl, tmp_path: Path, mapping: str, row: str
) -> None:
    file = tmp_path / "dsnatd.yaml"
    file.write_text(configuration(mapping, addresses="203.0.113.1", ports="5000-5063"))
    assert engine.ctl(cmd="reload")["ok"]
    for n in range(60):
        engine.send(udp(f"100.64.0.{n + 2}:4000 > 198.51.100.1:443"))

    pools, worst = ctl("show", "pools", "--seconds", "0.1")[1].split("ports are scarce towards")

    assert " ".join(pools.splitlines()[2].split()) == row
    assert worst.splitlines()[1].split()[-4:] == ["per", "s", "full", "in"]
    assert worst.splitlines()[2].split()[4:8] == ["60", "4", "94", "%"]
    both = json.loads(ctl("show", "pools", "--json")[1])
    assert (both["pools"][0]["sessions"], both["destinations"][0]["used"]) == (60, 60)


def test_counters_say_how_long_sessions_take_to_be_made() -> None:
    """The bench has no clock; that the engine measures it is seen in test_monitoring."""
    from dsnatctl import show

    assert list(show._allocation({"buckets": [[1000, 0], [None, 0]]})) == []
    latency = {"buckets": [[1000, 60], [2000, 39], [4000, 0], [None, 1]]}
    told = list(show._allocation(latency))
    assert told == ["  made within      1 us (half), 2 us (99 in 100), more (all)"]


def test_the_time_until_a_destination_is_full_comes_from_two_looks() -> None:
    from dsnatctl import show

    row = {"pool": "g1", "protocol": "udp", "remote": REMOTE, "addresses": 1, "ports": 1000}
    before, after = ({"destinations": [row | {"used": n}], "of": 1} for n in (500, 600))

    told = show.with_time_to_full(before, after, 2.0)

    assert told["destinations"][0] | {"per_s": 50.0, "full_in_s": 8} == told["destinations"][0]
    assert list(show.destinations(told))[1].split() == [
        *("g1", "udp", REMOTE, "1", "600", "400", "60", "%", "+50", "0:00:08")
    ]
    assert list(show.destinations({"destinations": [], "of": 0})) == [
        "ports are scarce towards no destination"
    ]
