"""The agent's promises, one by one. test_agent_life.py tries to break them in every order."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from provision.agent import PROTOCOL, Json, Refused
from provision.agent.change import by_hand
from provision.agent.command import reply
from provision.agent.look import READING
from provision.agent.machine import Machine
from provision.agent.services import actions_between
from provision.agent.state import State
from provision.plan import Running
from provision.push import _receipt as receipt_text
from tests.provision.machine import Client, FakeMachine, PowerCutError, files, snapshot_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path / "dsnat")


@pytest.fixture
def alice(machine: FakeMachine) -> Client:
    return Client(machine, "alice")


def test_a_staged_generation_changes_nothing_live(machine: FakeMachine, alice: Client) -> None:
    staged = alice.stage("a")
    assert staged["generation"] == 1
    assert machine.live() == 0
    assert machine.running == {}


def test_an_applied_change_is_live_and_has_a_deadline(machine: FakeMachine, alice: Client) -> None:
    assert alice.apply(alice.stage("a"))["state"] == "live"
    status = alice.ask(do="status")
    assert (status["generation"], status["state"]) == (1, "live")
    assert 0 < status["pending"]["deadline_in_s"] <= 60


def test_a_deadline_that_passes_brings_the_change_back(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    alice.apply(alice.stage("b"))
    machine.now += 61
    machine.undo_runs()
    assert machine.live() == 1
    assert machine.running["dsnatd"] == "engine: a\n"
    assert alice.ask(do="status")["last"]["reason"] == "nobody confirmed it in time"
    assert "undone" in machine.said[-1]


def test_a_confirmed_change_stays(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    machine.now += 10_000
    machine.undo_runs()
    machine.boot_up()
    assert machine.live() == 1
    assert machine.running["dsnatd"] == "engine: a\n"


def test_a_restart_before_the_confirmation_brings_the_change_back(
    machine: FakeMachine, alice: Client
) -> None:
    alice.push("a")
    alice.apply(alice.stage("b"))
    machine.boot_up()
    assert machine.live() == 1
    assert machine.running["dsnatd"] == "engine: a\n"
    with pytest.raises(Refused, match="was undone") as refused:
        alice.confirm(2)
    assert refused.value.kind == "reverted"


def test_a_connection_from_before_the_change_cannot_confirm_it(machine: FakeMachine, alice: Client) -> None:
    alice.apply(alice.stage("a"))
    with pytest.raises(Refused, match="new connection"):
        alice.confirm(1, fresh=False)
    machine.connection = None
    with pytest.raises(Refused, match="new connection"):
        alice.ask(do="confirm", generation=1)


def test_a_confirmation_that_comes_too_late_is_refused(machine: FakeMachine, alice: Client) -> None:
    alice.apply(alice.stage("a"))
    machine.now += 60
    with pytest.raises(Refused, match="too late"):
        alice.confirm(1)


def test_a_change_whose_undo_died_half_way_can_only_be_undone(machine: FakeMachine, alice: Client) -> None:
    alice.apply(alice.stage("a"))
    machine.steps_left = 1  # the link is back, the services and the record are not
    with pytest.raises(PowerCutError):
        alice.ask(do="revert")
    machine.after_power_cut()
    assert machine.live() == 0
    with pytest.raises(Refused, match="is not live"):
        alice.confirm(1)
    machine.now += 61
    machine.undo_runs()
    assert State(machine).pending() is None
    assert "dsnatd" not in machine.running


@pytest.mark.parametrize("steps", range(12))
def test_power_that_goes_at_any_step_of_an_undo_leaves_the_undo_done(
    machine: FakeMachine, alice: Client, steps: int
) -> None:
    alice.push("a")
    alice.apply(alice.stage("b"))
    machine.steps_left = steps
    try:
        alice.ask(do="revert")
    except PowerCutError:
        machine.after_power_cut()
    machine.steps_left = None
    machine.boot_up()
    assert machine.live() == 1
    assert State(machine).pending() is None


def test_confirming_twice_is_the_same_as_once(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    assert alice.confirm(1)["again"]


def test_a_plan_made_for_another_generation_is_stale(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    with pytest.raises(Refused) as refused:
        alice.stage("b", base=0)
    assert refused.value.kind == "stale"


def test_a_second_operator_waits_for_the_lease_to_end(machine: FakeMachine, alice: Client) -> None:
    alice.stage("a")
    bob = Client(machine, "bob")
    with pytest.raises(Refused, match="alice is changing") as refused:
        bob.stage("b")
    assert refused.value.kind == "locked"
    machine.now += 301
    bob.push("b")
    assert machine.live() == 2


def test_a_lease_does_not_outlive_a_restart(machine: FakeMachine, alice: Client) -> None:
    alice.stage("a")
    machine.boot_up()
    Client(machine, "bob").stage("b")


def test_a_file_that_the_gateways_own_programs_refuse_leaves_nothing_behind(
    machine: FakeMachine, alice: Client
) -> None:
    before = snapshot_of(machine.root)
    with pytest.raises(Refused, match=r"dsnatd\.yaml:1:1: broken; mend it"):
        alice.stage("BROKEN")
    assert snapshot_of(machine.root) == before


def test_a_service_that_does_not_start_reverts_at_once(machine: FakeMachine, alice: Client) -> None:
    machine.broken.add("keepalived")
    answer = alice.apply(alice.stage("a"))
    assert (answer["state"], answer["reason"]) == ("reverted", "keepalived: keepalived failed")
    assert machine.live() == 0
    assert "dsnatd" not in machine.running


def test_an_engine_that_does_not_answer_reverts_at_once(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    machine.unwell.add(2)
    answer = alice.apply(alice.stage("b", hardware="other"))
    assert answer["state"] == "reverted"
    assert "does not answer" in answer["reason"]
    assert machine.running["dsnatd"] == "engine: a\n"


def test_an_undo_that_cannot_be_armed_stops_the_change(machine: FakeMachine, alice: Client) -> None:
    machine.broken.add("systemd-run")
    with pytest.raises(Refused, match="no units today"):
        alice.apply(alice.stage("a"))
    assert machine.live() == 0
    assert State(machine).pending() is None


def test_a_full_disk_stops_a_change_before_anything_moves(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    staged = alice.stage("b")
    machine.full = True
    with pytest.raises(OSError, match="No space left"):
        alice.apply(staged)
    assert State(machine).pending() is None, "the undo would restart an engine that nobody touched"
    assert machine.live() == 1


def test_an_undo_ends_also_when_the_disk_is_full(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    alice.apply(alice.stage("b"))
    machine.full = True
    machine.now += 61
    machine.undo_runs()
    assert State(machine).pending() is None, "or it begins again each second, restarts of the engine included"
    assert machine.running["dsnatd"] == "engine: a\n"
    assert "undone" in machine.said[-1]


def test_a_change_that_is_confirmed_on_a_full_disk_is_kept_and_answered_without_a_receipt(
    machine: FakeMachine, alice: Client
) -> None:
    alice.apply(alice.stage("a"))
    machine.full = True
    kept = alice.confirm(1)
    assert (kept["state"], kept["receipt"]) == ("confirmed", "")
    assert "history" in receipt_text(kept), "who pushes is told"
    machine.now += 3600
    machine.undo_runs()
    assert machine.live() == 1
    assert machine.running["dsnatd"] == "engine: a\n"
    machine.full = False
    Client(machine, "bob").push("b")  # the lease was given back


def test_a_file_that_does_not_fit_leaves_no_part_of_it_behind(
    machine: FakeMachine, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = snapshot_of(machine.root)
    monkeypatch.setattr(machine, "fsync", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            alice.stage("a")
        with pytest.raises(OSError, match="No space left"):
            State(machine).hold_lease("alice")
    assert snapshot_of(machine.root) == before


def test_a_generation_that_was_edited_after_staging_is_not_applied(
    machine: FakeMachine, alice: Client
) -> None:
    staged = alice.stage("a")
    (machine.root / "generations/1/dsnatd.yaml").write_text("engine: z\n")
    with pytest.raises(Refused, match="was changed on the gateway"):
        alice.apply(staged)


@pytest.mark.parametrize("verb", ["facts", "status", "history"])
def test_reading_writes_nothing_and_cancels_nothing(machine: FakeMachine, alice: Client, verb: str) -> None:
    alice.apply(alice.stage("a"))
    before = snapshot_of(machine.root)
    alice.ask(do=verb)
    assert snapshot_of(machine.root) == before
    machine.now += 61
    machine.undo_runs()
    assert machine.live() == 0


@pytest.mark.parametrize(
    "request_",
    [
        {"do": "stage", "base": 0},
        {"do": "stage", "base": 0, "files": {"../../etc/passwd": {"text": "x"}}},
        {"do": "stage", "base": 0, "files": {"network/../../x.network": {"text": "x"}}},
        {"do": "stage", "base": 0, "files": {"dsnatd.yaml": {"text": "x", "mode": 0o4755}}},
        {"do": "apply", "base": 0, "generation": "1"},
        {"do": "apply", "base": 0, "generation": 1, "window_s": 0},
        {"do": "confirm", "generation": True},
        {"do": "shell"},
        {"do": "stage", "base": 0, "files": files("a"), "plan": "two\nlines"},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    machine: FakeMachine, alice: Client, request_: dict[str, object]
) -> None:
    before = snapshot_of(machine.root)
    with pytest.raises(Refused) as refused:
        alice.ask(**request_)
    assert refused.value.kind == "usage"
    assert snapshot_of(machine.root) == before


@pytest.mark.parametrize(
    "line",
    [
        "dsnatctl show pools --json",
        "ip -j address show dev inside0",
        "ip -s link",
        "journalctl -u dsnatd.service -n 50 --no-pager",
        "systemctl status keepalived",
        "uptime",
        "dsnatctl show sessions --host 100.64.0.0/24 --json",
        "dsnatctl explain inside0 tcp 100.64.1.2:4000 198.51.100.7:443 --size=1400",
        "dsnatctl who 203.0.113.1:40211",
        "ip route show table all",
        "ip -br -4 addr show to 100.64.0.0/10",
        "birdc -r show route for 203.0.113.0/24",
        "systemctl show -p NRestarts --value dsnatd.service",
    ],
)
def test_commands_that_read_are_on_the_list(line: str) -> None:
    assert any(re.fullmatch(pattern, line) for pattern in READING)


@pytest.mark.parametrize(
    "argv",
    [
        ["dsnatctl", "clear"],
        ["ip", "address", "add", "192.0.2.1/24", "dev", "inside0"],
        ["ip", "address", "show", "x;reboot"],
        ["ip", "netns", "exec", "x", "sh"],
        ["dsnatctl", "explain", "inside0", "tcp", "a:1", "b:2", "--config=/etc/shadow"],
        ["dsnatctl", "explain", "inside0", "tcp", "a:1", "b:2", "--config", "/etc/shadow"],
        ["dsnatctl", "explain", "inside0", "tcp", "a:1", "b:2", "--conf=shadow"],  # argparse completes it
        ["dsnatctl", "show", "pools", "--socket=/run/other.sock"],
        ["ip", "-batch", "link"],
        ["ip", "-n", "other", "link"],
        ["birdc", "-r", "show", "status", "-s", "other.ctl"],
        ["systemctl", "status", "-H", "192.0.2.7"],
        ["systemctl", "show", "--root=/mnt"],
        ["systemctl", "status", "/etc/shadow"],
        ["uname -a"],
        ["systemctl", "stop", "dsnatd"],
        ["journalctl", "--vacuum-time=1s"],
        ["uptime", "\n"],
        ["sh", "-c", "uptime"],
        [],
        "uptime",
    ],
)
def test_a_command_that_is_not_on_the_list_is_refused(alice: Client, argv: object) -> None:
    with pytest.raises(Refused):
        alice.ask(do="exec", argv=argv)


def test_a_command_on_the_list_gives_status_and_output(alice: Client) -> None:
    assert alice.ask(do="exec", argv=["uptime"]) == {"status": 0, "output": "up 1 day"}


@pytest.mark.net
def test_a_probe_hears_the_answer_of_a_host_and_no_others(machine: FakeMachine) -> None:
    real = Machine(machine.root)
    assert real.pings("127.0.0.1")
    assert not real.pings("0.0.0.1", tries=1, wait_s=0.2)


def test_another_protocol_is_refused_with_both_numbers(machine: FakeMachine) -> None:
    with pytest.raises(Refused, match="speaks protocol 1 and was asked in 2"):
        reply(State(machine), {"protocol": 2, "do": "status"})


def test_facts_do_not_give_passwords_away(machine: FakeMachine, alice: Client) -> None:
    alice.push("a", **{"keepalived.conf": "authentication {\n    auth_pass geheim\n}\n"})
    facts = alice.ask(do="facts")
    assert "geheim" not in json.dumps(facts)
    assert facts["drift"] == []


def test_a_file_added_beside_the_generation_is_drift(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    (machine.root / "generations/1/network/99-mine.network").write_text("[Match]\n")
    assert alice.ask(do="facts")["drift"] == ["network/99-mine.network"]


def test_a_change_by_hand_is_a_generation_that_survives_and_is_known_for_drift(
    machine: FakeMachine, alice: Client
) -> None:
    alice.push("a")
    request: Json = {"owner": "ipvsadm", "files": {"dsnatd.yaml": {"text": "engine: by hand\n"}}}
    assert by_hand(State(machine), request)["generation"] == 2
    assert machine.running["dsnatd"] == "engine: by hand\n"
    machine.boot_up()
    assert machine.running["dsnatd"] == "engine: by hand\n"
    facts = alice.ask(do="facts")
    assert facts["manifest"]["by_hand"] == ["dsnatd.yaml"]
    assert "dsnatd.yaml (by ipvsadm)" in Running("gw1", facts).drift
    with pytest.raises(Refused, match="plan again"):
        alice.stage("b", base=1)


def test_a_change_by_hand_that_the_engine_does_not_take_is_undone(
    machine: FakeMachine, alice: Client
) -> None:
    alice.push("a")
    machine.unwell.add(2)
    answer = by_hand(State(machine), {"owner": "ipvsadm", "files": {"dsnatd.yaml": {"text": "x\n"}}})
    assert answer["state"] == "reverted"
    assert machine.running["dsnatd"] == "engine: a\n"


def test_a_change_by_hand_cannot_be_asked_for_over_the_network(alice: Client) -> None:
    with pytest.raises(Refused, match="there is no request"):
        alice.ask(do="change", files=files("a"))


def test_old_generations_go_and_the_ones_in_use_stay(machine: FakeMachine, alice: Client) -> None:
    for number in range(60):
        alice.push(str(number))
    numbers = State(machine).numbers()
    assert numbers[0] == 0
    assert numbers[-1] == 60
    assert len(numbers) <= 52


def test_an_unreadable_pending_file_is_undone_to_what_was_confirmed_last(
    machine: FakeMachine, alice: Client
) -> None:
    alice.push("a")
    alice.apply(alice.stage("b"))
    (machine.root / "pending").write_text("")
    machine.boot_up()
    assert machine.live() == 1
    assert State(machine).pending() is None


FILES = {"dsnatd.yaml": "1", "keepalived.conf": "1", "network/a.network": "1"}
MANIFEST: dict[str, object] = {"hardware": "h", "files": FILES}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"files": FILES | {"dsnatd.yaml": "2"}}, ["failclosed", "engine-reload"]),
        (
            {"files": FILES | {"dsnatd.yaml": "2"}, "hardware": "g"},
            ["failclosed", "engine-stop", "nic", "engine-start"],
        ),
        ({"files": FILES | {"keepalived.conf": "2"}}, ["keepalived"]),
        ({"files": FILES | {"network/a.network": "2"}}, ["network"]),
        ({"files": FILES | {"authorized_keys/root": "2"}}, []),
    ],
)
def test_only_what_changed_is_reloaded(change: dict[str, object], expected: list[str]) -> None:
    assert actions_between(MANIFEST, MANIFEST | change) == expected
    assert actions_between(MANIFEST | change, MANIFEST) == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("not json", "usage"),
        (json.dumps({"protocol": PROTOCOL, "do": "probe", "addresses": 5}), "failed"),  # of the wrong type
    ],
)
def test_a_request_that_makes_no_sense_is_answered_in_one_line(tmp_path: Path, text: str, kind: str) -> None:
    FakeMachine(tmp_path / "dsnat")
    done = subprocess.run(
        [sys.executable, ROOT / "provision/agent/__main__.py"],
        input=text,
        env={"DSNAT_ROOT": str(tmp_path / "dsnat")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["kind"] == kind
    assert done.stderr == ""


def test_a_change_on_the_gateway_itself_is_kept_in_one_go(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    before = files("a")
    done = by_hand(State(machine), {"owner": "ipvsadm", "files": {"dsnatd.yaml": {"text": "engine: z\n"}}})
    assert (done["state"], done["generation"]) == ("confirmed", 2)
    assert machine.running["dsnatd"] == "engine: z\n"
    assert State(machine).pending() is None
    here = machine.root / "generations/current"
    for name, file in before.items():
        if name != "dsnatd.yaml":
            assert (here / name).read_text() == file["text"], f"{name} went missing"
    assert alice.ask(do="status")["last"]["owner"] == "ipvsadm"
    alice.push("b")  # the lease was given back


def test_a_local_change_that_a_service_refuses_is_undone(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    machine.unwell = {2}
    done = by_hand(State(machine), {"owner": "ipvsadm", "files": {"dsnatd.yaml": {"text": "engine: z\n"}}})
    assert done["state"] == "reverted"
    assert machine.live() == 1
    assert machine.running["dsnatd"] == "engine: a\n"
    with pytest.raises(Refused, match="broken; mend it"):
        by_hand(State(machine), {"owner": "ipvsadm", "files": {"dsnatd.yaml": {"text": "BROKEN"}}})
    assert State(machine).lease() is None
    assert machine.live() == 1


def test_a_line_of_history_that_was_changed_or_taken_out_is_found(
    machine: FakeMachine, alice: Client
) -> None:
    for marker in "abc":
        alice.push(marker)
    told = alice.ask(do="history")
    assert told["broken_at"] is None
    assert alice.push("d")["receipt"] == alice.ask(do="history")["events"][-1]["receipt"]
    file = machine.root / "history.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2].replace("alice", "mallory"), *lines[3:]]) + "\n")
    assert alice.ask(do="history")["broken_at"] == 4
    file.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    assert alice.ask(do="history")["broken_at"] == 3


def test_history_goes_on_behind_a_line_that_a_power_cut_tore(machine: FakeMachine, alice: Client) -> None:
    alice.push("a")
    file = machine.root / "history.jsonl"
    file.write_text(file.read_text() + '{"event": "appl')
    alice.push("b")
    told = alice.ask(do="history")
    assert told["broken_at"] is None
    assert [e["event"] for e in told["events"]] == ["applied", "confirmed"] * 2
