"""Pushing with gateways in memory: what is reported is what happened, whatever the network does."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from provision.agent import PROTOCOL, Refused
from provision.agent.command import reply
from provision.agent.state import State
from provision.handover import NoHandOver, drain, with_failover
from provision.model import Fleet
from provision.plan import Change, Running, plan
from provision.push import AgentRefused, Attempt, Order, Remote, Result, gather
from provision.render import render
from provision.rollout import Budget, push_all, units, waves
from provision.ssh import LostInFlight, Throttled, Unreachable
from provision.witness import witnesses
from tests.provision.conftest import LONE, PAIR, Reader, changed
from tests.provision.machine import FakeMachine

VIPS = ["100.64.0.1", "198.51.100.1"]


class Lab:
    """Gateways in memory and the network to them. Time passes only when somebody waits."""

    def __init__(self, home: Path, names: list[str]) -> None:
        self.machines = {name: FakeMachine(home / name) for name in names}
        self.master: str | None = names[0]
        self.takes_over = True
        self.asked: list[tuple[str, str]] = []
        self.dials = dict.fromkeys(names, 0)
        self.fault: Callable[[str, str], None] = lambda name, verb: None

    @contextmanager
    def dial(self, name: str) -> Iterator[Remote]:
        self.fault(name, "dial")
        self.dials[name] += 1
        machine = self.machines[name]
        machine.now += 0.01
        machine.connection = machine.now
        machine.now += 0.01
        yield Asked(self, name)

    def nap(self, seconds: float) -> None:
        for machine in self.machines.values():
            machine.now += seconds
            machine.undo_runs()

    def now(self) -> float:
        return next(iter(self.machines.values())).now


class Asked:
    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        self.machine = lab.machines[name]
        self.opened = self.machine.connection

    def ask(
        self, request: Mapping[str, Any], *, deadline_s: float, stream: Iterable[bytes] = ()
    ) -> dict[str, Any]:
        self.machine.payload = io.BytesIO(b"".join(stream))
        verb = str(request["do"])
        self.lab.asked.append((self.name, verb))
        self.lab.fault(self.name, verb)
        self.machine.connection = self.opened
        try:
            answer = reply(State(self.machine), {"protocol": PROTOCOL, **request})
        except Refused as refused:
            raise AgentRefused(refused.kind, str(refused)) from refused
        finally:
            self.lab.fault(self.name, f"after {verb}")
        if verb == "drain" and request["on"] and self.lab.takes_over:
            self.lab.master = next(n for n in self.lab.machines if n != self.name)
        if verb == "facts":
            held = VIPS if self.lab.master == self.name else []
            answer["addresses"] = {"outside0": held}
            answer["units"] = {"keepalived": "active"}
        return answer


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, ["gw1", "gw2"])


def push(lab: Lab, read: Reader, text: str = LONE, name: str = "gw1", **order: Any) -> Result:
    fleet, _ = read(text)
    rendered = render(fleet, name, secret=lambda reference: "x")
    found = gather([name], lab.dial, jobs=1)[name]
    assert isinstance(found, Running)
    (change,) = plan({name: rendered}, {name: found}).changes
    witness = witnesses(fleet, found, rendered, lab.dial)
    options = Order("alice", "p", **{"window_s": 30, **order})
    return Attempt(name, lab.dial, options, witness, now=lab.now, nap=lab.nap).push(change, rendered)


def fail_on(*steps: str, times: int = 1, error: Exception | None = None) -> Callable[[str, str], None]:
    left = dict.fromkeys(steps, times)

    def fault(name: str, verb: str) -> None:
        if left.get(verb, 0):
            left[verb] -= 1
            raise error or LostInFlight("the connection ended")

    return fault


def test_a_push_stages_applies_dials_again_and_confirms(lab: Lab, read: Reader) -> None:
    result = push(lab, read)
    assert (result.outcome, result.generation) == ("confirmed", 1)
    assert [verb for _, verb in lab.asked] == ["facts", "stage", "apply", "facts", "confirm"]
    assert lab.dials["gw1"] == 3
    assert lab.machines["gw1"].live() == 1


def test_an_answer_lost_after_the_change_is_looked_for(lab: Lab, read: Reader) -> None:
    lab.fault = fail_on("after apply")
    assert push(lab, read).outcome == "confirmed"


def test_an_answer_lost_after_the_confirmation_is_looked_for(lab: Lab, read: Reader) -> None:
    lab.fault = fail_on("after confirm")
    assert push(lab, read).outcome == "confirmed"
    assert lab.machines["gw1"].live() == 1


def test_a_change_that_cuts_itself_off_comes_back_and_says_so(lab: Lab, read: Reader) -> None:
    def fault(name: str, verb: str) -> None:
        if verb == "dial" and lab.machines["gw1"].live() == 1:
            raise Unreachable("no route")

    lab.fault = fault
    result = push(lab, read)
    assert result.outcome == "reverted"
    assert "nobody confirmed it in time" in result.text
    assert lab.machines["gw1"].live() == 0


def test_a_gateway_that_never_comes_back_is_a_failure_and_not_a_guess(lab: Lab, read: Reader) -> None:
    def fault(name: str, verb: str) -> None:
        if verb == "dial" and ("gw1", "apply") in lab.asked:
            raise Unreachable("no route")

    lab.fault = fault
    result = push(lab, read)
    assert result.outcome == "failed"
    assert "not known whether the change was kept: no route" in result.text


def test_a_witness_that_never_agrees_has_the_change_undone(lab: Lab, read: Reader) -> None:
    lab.master = None
    result = push(lab, read)
    assert result.outcome == "reverted"
    assert "does not hold its VRRP addresses" in result.text
    assert lab.machines["gw1"].live() == 0


def test_a_witness_that_agrees_late_is_waited_for(lab: Lab, read: Reader) -> None:
    lab.master = None
    nap = lab.nap

    def nap_and_become_master(seconds: float) -> None:
        nap(seconds)
        if lab.now() > 110:
            lab.master = "gw1"

    lab.nap = nap_and_become_master  # type: ignore[method-assign]
    assert push(lab, read).outcome == "confirmed"


def test_both_masters_is_not_health(lab: Lab, read: Reader) -> None:
    push(lab, read, PAIR)
    original = Asked.ask

    def both(self: Asked, request: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        lab.master = self.name
        return original(self, request, deadline_s=deadline_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asked, "ask", both)
        result = push(lab, read, PAIR, "gw2")
    assert result.outcome == "reverted"
    assert "both of the pair hold the VRRP addresses" in result.text


def test_a_backup_that_no_longer_hears_its_master_is_not_health(lab: Lab, read: Reader) -> None:
    run_both(lab, read)

    def fault(name: str, verb: str) -> None:
        if verb == "after apply":
            lab.machines["gw2"].deaf.add(20)

    lab.fault = fault
    result = push(lab, read, changed(PAIR, ("203.0.113.4", "203.0.113.5")), "gw2")
    assert result.outcome == "reverted"
    assert "gw2 hears no VRRP adverts of gw1 on outside0" in result.text


@pytest.mark.parametrize("name", ["gw1", "gw2"])
def test_a_backup_that_was_deaf_before_does_not_freeze_the_pair(lab: Lab, read: Reader, name: str) -> None:
    run_both(lab, read)
    lab.machines["gw2"].deaf.add(20)
    assert push(lab, read, changed(PAIR, ("203.0.113.4", "203.0.113.5")), name).outcome == "confirmed"


def test_a_master_that_its_peer_no_longer_hears_is_not_health(lab: Lab, read: Reader) -> None:
    """The peer takes a moment to be master too: gw1 looks well when it is asked first."""
    run_both(lab, read)
    original = Asked.ask
    deaf: list[str] = []

    def ask(self: Asked, request: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        answer = original(self, request, deadline_s=deadline_s)
        if request["do"] == "adverts":
            deaf.append(self.name)
            return {"heard": {}}
        if request["do"] == "facts" and self.name == "gw2" and deaf:
            answer["addresses"] = {"outside0": VIPS}
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asked, "ask", ask)
        result = push(lab, read, changed(PAIR, ("203.0.113.4", "203.0.113.5")), "gw1")
    assert result.outcome == "reverted"
    assert "both of the pair hold" in result.text or "does not hear gw1" in result.text


def test_an_engine_whose_packets_do_not_add_up_is_not_health(lab: Lab, read: Reader) -> None:
    def engine(request: dict[str, Any], timeout_s: float = 5.0) -> dict[str, Any]:
        return {"ok": True, "equation": False}

    lab.machines["gw1"].engine = engine  # type: ignore[method-assign]
    result = push(lab, read)
    assert result.outcome == "reverted"
    assert "packets do not add up" in result.text


def test_a_gateway_that_restarted_before_it_applied_is_not_waited_for(lab: Lab, read: Reader) -> None:
    def power_cut(name: str, verb: str) -> None:
        if (name, verb) == ("gw2", "apply"):
            lab.machines["gw2"].boot_up()
            lab.machines["gw1"].now += 40  # the clock of all others
            raise LostInFlight("the connection ended")

    lab.fault = power_cut
    begun = lab.now()
    result = push(lab, read, PAIR, "gw2")
    assert (result.outcome, lab.now() - begun < 60) == ("failed", True)
    assert "restarted before it applied the change" in result.text
    assert lab.machines["gw2"].live() == 0


def test_a_pair_whose_peer_is_down_can_still_be_changed(lab: Lab, read: Reader) -> None:
    def fault(name: str, verb: str) -> None:
        if name == "gw2":
            raise Unreachable("gw2 is down")

    lab.fault = fault
    assert push(lab, read, PAIR).outcome == "confirmed"


def test_what_is_left_pending_is_said_to_be(lab: Lab, read: Reader) -> None:
    result = push(lab, read, confirm=False)
    assert (result.outcome, result.good) == ("pending", True)
    assert lab.machines["gw1"].live() == 1
    lab.nap(31)
    assert lab.machines["gw1"].live() == 0


def test_what_is_left_pending_is_looked_for_when_the_answer_was_lost(lab: Lab, read: Reader) -> None:
    lab.fault = fail_on("after apply")
    assert push(lab, read, confirm=False).outcome == "pending"
    lab.nap(31)
    lab.fault = fail_on("apply")  # the request itself was lost
    result = push(lab, read, changed(LONE, ("id: 10", "id: 11")), confirm=False)
    assert result.outcome == "failed"
    assert "not known" in result.text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Unreachable("no route"), "unreached"),
        (Throttled("later", 1), "unreached"),
        (LostInFlight("the connection ended"), "failed"),
    ],
)
def test_an_error_before_the_change_leaves_it_unmade(
    lab: Lab, read: Reader, error: Exception, outcome: str
) -> None:
    lab.fault = fail_on("stage", error=error)
    assert push(lab, read).outcome == outcome
    assert lab.machines["gw1"].live() == 0


def test_a_way_out_that_does_not_work_is_not_kept(lab: Lab, read: Reader) -> None:
    probes = ("    routes:\n", "    probes: [192.0.2.1]\n    routes:\n")
    lab.machines["gw1"].silent = True
    result = push(lab, read, changed(LONE, probes))
    assert result.outcome == "reverted"
    assert "192.0.2.1 does not answer from gw1" in result.text
    lab.machines["gw1"].silent = False
    assert push(lab, read, changed(LONE, probes)).outcome == "confirmed"


def test_a_change_that_cannot_be_applied_lets_the_next_operator_in(lab: Lab, read: Reader) -> None:
    lab.machines["gw1"].broken.add("systemd-run")
    assert push(lab, read).outcome == "failed"
    assert State(lab.machines["gw1"]).lease() is None


def test_two_operators_do_not_overwrite_each_other(lab: Lab, read: Reader) -> None:
    machine = lab.machines["gw1"]

    def somebody_else(name: str, verb: str) -> None:
        if verb == "stage":
            lab.fault = lambda name, verb: None
            request = {"protocol": PROTOCOL, "do": "stage", "base": 0, "owner": "bob"}
            reply(State(machine), {**request, "files": {"dsnatd.yaml": {"text": "x"}}})

    lab.fault = somebody_else
    result = push(lab, read)
    assert result.outcome == "locked"
    assert "bob" in result.text


# ---- handing over
# ------------------------------------------------------------------------------------------------


def run_both(lab: Lab, read: Reader) -> Fleet:
    for name in ("gw2", "gw1"):
        assert push(lab, read, PAIR, name).outcome == "confirmed"
    lab.asked.clear()
    return read(PAIR)[0]


def test_a_drained_master_hands_its_addresses_to_its_peer(lab: Lab, read: Reader) -> None:
    fleet = run_both(lab, read)
    assert (
        drain(fleet, "gw1", lab.dial, on=True, now=lab.now, nap=lab.nap) == "gw2 has the VRRP addresses now"
    )
    assert lab.machines["gw1"].drained
    drain(fleet, "gw1", lab.dial, on=False)
    assert not lab.machines["gw1"].drained


def test_a_peer_that_is_not_well_is_handed_nothing(lab: Lab, read: Reader) -> None:
    fleet = run_both(lab, read)
    lab.machines["gw2"].running.pop("dsnatd")
    with pytest.raises(NoHandOver, match="gw2 is not well"):
        drain(fleet, "gw1", lab.dial, on=True, now=lab.now, nap=lab.nap)
    assert not lab.machines["gw1"].drained


@pytest.mark.parametrize(("after_s", "connected_s"), [(20, 0), (25, 20), (4000, 0), (4000, 4000)])
def test_a_peer_is_handed_the_traffic_only_when_it_has_the_sessions(
    lab: Lab, read: Reader, after_s: float, connected_s: float
) -> None:
    """One that does not connect at all never will have them, and is given half a minute to."""
    fleet = run_both(lab, read)
    begun = lab.now()

    def engine(request: dict[str, Any], timeout_s: float = 5.0) -> dict[str, Any]:
        passed = lab.now() - begun
        known = {"connected": passed > connected_s, "in_sync": passed > after_s, "differences": 7}
        return {"ok": True, "configured": True, **known}

    lab.machines["gw1"].engine = engine  # type: ignore[method-assign]
    if min(after_s, connected_s) > 300 or after_s < 300:
        assert "gw2 has" in drain(fleet, "gw1", lab.dial, on=True, now=lab.now, nap=lab.nap)
        assert lab.now() - begun >= min(after_s, 30)
        return
    with pytest.raises(NoHandOver, match=r"gw2 still does not have its sessions .* \(7 ranges differ"):
        drain(fleet, "gw1", lab.dial, on=True, now=lab.now, nap=lab.nap)
    assert not lab.machines["gw1"].drained


def test_both_of_a_pair_cannot_be_drained(lab: Lab, read: Reader) -> None:
    fleet = run_both(lab, read)
    drain(fleet, "gw1", lab.dial, on=True, now=lab.now, nap=lab.nap)
    with pytest.raises(NoHandOver, match="gw1 is drained itself"):
        drain(fleet, "gw2", lab.dial, on=True, now=lab.now, nap=lab.nap)


def test_a_hand_over_that_nobody_takes_is_undone(lab: Lab, read: Reader) -> None:
    fleet = run_both(lab, read)
    lab.takes_over = False
    with pytest.raises(NoHandOver, match="the hand-over was undone"):
        drain(fleet, "gw1", lab.dial, on=True, now=lab.now, nap=lab.nap)
    assert not lab.machines["gw1"].drained


def test_a_gateway_alone_cannot_be_drained(lab: Lab, read: Reader) -> None:
    with pytest.raises(NoHandOver, match="no peer"):
        drain(read(LONE)[0], "gw1", lab.dial, on=True)


@pytest.mark.parametrize(
    ("actions", "name", "expected"),
    [
        (("engine-stop",), "gw1", ["drain on", "push", "drain off"]),
        (("engine-stop",), "gw2", ["push"]),  # the backup
        (("engine-reload",), "gw1", ["push"]),
    ],
)
def test_the_peer_carries_the_traffic_while_a_masters_engine_restarts(
    lab: Lab, read: Reader, actions: tuple[str, ...], name: str, expected: list[str]
) -> None:
    fleet = run_both(lab, read)
    found = gather([name], lab.dial, jobs=1)[name]
    assert isinstance(found, Running)
    happened: list[str] = []

    def note() -> Result:
        happened.append("push")
        return Result(name, "confirmed")

    def fault(gateway: str, verb: str) -> None:
        if verb == "drain":
            happened.append("drain off" if lab.machines[name].drained else "drain on")

    lab.fault = fault
    with_failover(fleet, Change(name, 0, "", (), actions), found, lab.dial, note)
    assert happened == expected


# ---- the order of a fleet
# ----------------------------------------------------------------------------------------


def change(name: str) -> Change:
    return Change(name, 0, "", (), ())


def run_all(ordered: list[list[list[Change]]], bad: set[str], *, allowed: int = 0) -> dict[str, str]:
    def one(c: Change) -> Result:
        return Result(c.gateway, "failed" if c.gateway in bad else "confirmed")

    found = push_all(ordered, one, jobs=4, budget=Budget(allowed), stop=threading.Event())
    return {result.gateway: result.outcome for result in found}


def test_the_backup_of_a_pair_goes_first_whatever_the_priorities_say(read: Reader) -> None:
    fleet, _ = read(PAIR)
    running = {
        n: Running(n, {"generation": 0, "addresses": {"x": VIPS if n == "gw2" else []}})
        for n in fleet.gateways
    }
    ((first, second),) = units(fleet, [change("gw1"), change("gw2")], running)
    assert (first.gateway, second.gateway) == ("gw1", "gw2")  # gw2 has the lower priority and is master now


def test_the_master_is_left_alone_when_its_backup_failed() -> None:
    assert run_all([[[change("backup"), change("master")]]], {"backup"}, allowed=5) == {
        "backup": "failed",
        "master": "skipped",
    }


def test_a_spent_budget_leaves_the_rest_alone() -> None:
    ordered = waves([[change(f"gw{n}")] for n in range(20)], 10)
    assert [len(wave) for wave in ordered] == [1, 2, 17]
    found = run_all(ordered, {"gw0"})
    assert found["gw0"] == "failed"
    assert {found[f"gw{n}"] for n in range(1, 20)} == {"skipped"}


def test_a_budget_that_is_not_spent_lets_the_run_go_on() -> None:
    ordered = waves([[change(f"gw{n}")] for n in range(20)], 10)
    found = run_all(ordered, {"gw0", "gw5"}, allowed=2)
    assert sum(outcome == "confirmed" for outcome in found.values()) == 18


def test_an_interrupted_run_begins_nothing_new() -> None:
    stop = threading.Event()

    def one(c: Change) -> Result:
        stop.set()
        return Result(c.gateway, "confirmed")

    ordered = waves([[change(f"gw{n}")] for n in range(3)], 10)
    found = push_all(ordered, one, jobs=1, budget=Budget(0), stop=stop)
    assert [result.outcome for result in found] == ["confirmed", "skipped", "skipped"]


def test_an_interrupt_while_it_soaks_tells_who_has_the_change_and_who_has_not() -> None:
    def nap(seconds: float) -> None:
        raise KeyboardInterrupt

    stop = threading.Event()
    ordered = waves([[change(f"gw{n}")] for n in range(3)], 10)
    found = push_all(
        ordered,
        lambda c: Result(c.gateway, "confirmed"),
        jobs=1,
        budget=Budget(0),
        soak_s=600,
        stop=stop,
        nap=nap,
    )
    assert [result.outcome for result in found] == ["confirmed", "skipped", "skipped"]
    assert stop.is_set()


def test_a_defect_of_ours_loses_no_other_result() -> None:
    def one(c: Change) -> Result:
        raise ZeroDivisionError

    (result,) = push_all([[[change("gw1")]]], one, jobs=1, budget=Budget(0), stop=threading.Event())
    assert result.outcome == "failed"


def test_a_plan_that_was_made_for_another_generation_is_stale(lab: Lab, read: Reader) -> None:
    fleet, _ = read(LONE)
    rendered = render(fleet, "gw1", secret=lambda reference: "x")
    found = gather(["gw1"], lab.dial, jobs=1)["gw1"]
    assert isinstance(found, Running)
    (old,) = plan({"gw1": rendered}, {"gw1": found}).changes
    push(lab, read, changed(LONE, ("id: 10", "id: 11")))
    attempt = Attempt("gw1", lab.dial, Order("alice", "p"), lambda running, remote: None)
    result = attempt.push(old, rendered)
    assert result.outcome == "stale"
