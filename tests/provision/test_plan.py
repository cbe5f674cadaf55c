"""A plan is a value made of two values. What it says is what will differ, and nothing else."""

from __future__ import annotations

import io
from typing import Any

from provision import show
from provision.plan import Plan, Running, plan
from provision.render import Rendered, render
from tests.provision.conftest import LONE, PAIR, Reader, changed


def wanted(read: Reader, text: str) -> dict[str, Rendered]:
    fleet, _ = read(text)
    return {name: render(fleet, name, secret=lambda reference: reference[-8:]) for name in fleet.gateways}


def as_running(rendered: Rendered, **facts: Any) -> Running:
    from provision.plan import shown

    files = {name: {"sha256": f.sha256, "text": shown(f.text)} for name, f in rendered.files.items()}
    manifest = {"hardware": rendered.hardware, "base": 0}
    return Running(rendered.gateway, {"generation": 3, "files": files, "manifest": manifest, **facts})


def factory(name: str) -> Running:
    return Running(name, {"generation": 0, "files": {}, "manifest": {}})


def printed(found: Plan) -> str:
    out = io.StringIO()
    show.plan(found, out)
    return out.getvalue()


def test_what_runs_as_wanted_is_not_in_the_plan(read: Reader) -> None:
    want = wanted(read, PAIR)
    found = plan(want, {name: as_running(rendered) for name, rendered in want.items()})
    assert found.changes == ()
    assert found.unchanged == ("gw1", "gw2")
    assert printed(found) == "unchanged: gw1, gw2\nnothing to change\n"


def test_only_the_lines_that_differ_are_shown(read: Reader) -> None:
    running = as_running(wanted(read, LONE)["gw1"])
    found = plan(wanted(read, changed(LONE, ("203.0.113.4", "203.0.113.6"))), {"gw1": running})
    (change,) = found.changes
    assert [file.name for file in change.files] == ["dsnatd.yaml"]
    assert [line for line in change.files[0].diff if line[0] in "+-"] == [
        "-      - 203.0.113.1-203.0.113.4",
        "+      - 203.0.113.1-203.0.113.6",
    ]
    assert change.actions == ("failclosed", "engine-reload")


def test_a_factory_gateway_gets_everything(read: Reader) -> None:
    (change,) = plan(wanted(read, LONE), {"gw1": factory("gw1")}).changes
    assert {file.kind for file in change.files} == {"added"}
    assert change.actions == ("failclosed", "engine-stop", "nic", "network", "engine-start", "keepalived")


def test_the_same_change_on_both_is_shown_once(read: Reader) -> None:
    want = wanted(read, PAIR)
    running = {name: as_running(rendered) for name, rendered in want.items()}
    found = plan(wanted(read, changed(PAIR, ("203.0.113.4", "203.0.113.6"))), running)
    assert len(found.changes) == 2
    assert len(found.groups()) == 1
    assert printed(found).count("203.0.113.6") == 1
    assert "gw1, gw2: failclosed, engine-reload" in printed(found)


def test_the_bill_names_the_sessions_that_would_drain(read: Reader) -> None:
    rendered = wanted(read, LONE)["gw1"]
    addresses = [{"address": f"203.0.113.{n}", "sessions": 100 * n} for n in range(1, 5)]
    engine = {"pools": {"pools": [{"name": "home", "addresses": addresses}]}}
    running = as_running(rendered, engine=engine)
    found = plan(wanted(read, changed(LONE, ("203.0.113.4", "203.0.113.2"))), {"gw1": running})
    assert found.changes[0].impact == (
        "700 sessions on addresses that leave a pool run out: 203.0.113.4 (400), 203.0.113.3 (300)",
    )
    assert printed(found).startswith("! gw1: 700 sessions")


def test_a_restart_of_the_engine_is_announced(read: Reader) -> None:
    running = as_running(wanted(read, LONE)["gw1"], units={"dsnatd": "active"})
    found = plan(wanted(read, changed(LONE, ("00:04.0", "00:05.0"))), {"gw1": running})
    assert "the engine restarts" in found.changes[0].impact[0]


def test_a_change_of_the_management_address_is_the_first_thing_said(read: Reader) -> None:
    running = as_running(wanted(read, LONE)["gw1"], units={"dsnatd": "active"})
    text = changed(
        LONE, ("{address: 192.0.2.11}", "{address: 192.0.2.11, interface: mgmt0}"), ("04.0", "05.0")
    )
    assert "the way to it changes" in plan(wanted(read, text), {"gw1": running}).changes[0].impact[0]


def test_a_changed_password_is_said_and_not_shown(read: Reader) -> None:
    secret = (
        "    vrrp:\n",
        "    vrrp:\n      version: 2\n      authentication: {password: 'env:GEHEIM01'}\n",
    )
    running = as_running(wanted(read, changed(LONE, secret))["gw1"])
    found = plan(wanted(read, changed(LONE, secret, ("GEHEIM01", "GEHEIM02"))), {"gw1": running})
    assert "(secret changed)" in printed(found)
    assert "GEHEIM" not in printed(found)
    assert "GEHEIM" not in str(found.as_json())


def test_a_gateway_that_was_not_reached_is_not_in_the_plan(read: Reader) -> None:
    assert plan(wanted(read, PAIR), {"gw2": factory("gw2")}).changes[0].gateway == "gw2"


def test_the_hash_is_that_of_what_is_wanted_and_what_was_found(read: Reader) -> None:
    want = wanted(read, LONE)
    same = plan(want, {"gw1": factory("gw1")}).hash
    assert plan(wanted(read, LONE), {"gw1": factory("gw1")}).hash == same
    assert plan(wanted(read, changed(LONE, ("id: 10", "id: 11"))), {"gw1": factory("gw1")}).hash != same
    moved = Running("gw1", {**factory("gw1").facts, "generation": 1})
    assert plan(want, {"gw1": moved}).hash != same
