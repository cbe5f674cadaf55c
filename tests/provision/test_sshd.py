"""The whole way, over real SSH: OpenSSH on the loopback, the real agent, the real program."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from provision.push import AgentRefused, SshRemote
from provision.ssh import AuthFailed, HostKeyMismatch, Target, Unreachable, dial
from tests.lab import wait_until
from tests.packet import tcp
from tests.provision.sshd import Gateway, make_key, running, user
from tests.replay import Bench, outside

pytestmark = pytest.mark.net  # real programs

ROOT = Path(__file__).resolve().parents[2]

FLEET = """\
schema: 1
defaults:
  ssh: {{user: {user}, identity: {identity}}}
  engine: {{workers: 1, max_sessions: 100000}}
  rollout: {{confirm_within: {window}s}}
pools:
  laddr_g1: {{addresses: [{pool}]}}
gateways:
  gw1:
    management: {{address: 127.0.0.1, port: {port}}}
    host_key: {host_key}
    interfaces:
      inside0: {{role: inside, path: dpdk, device: "0000:00:03.0", addresses: [100.64.0.2/24]}}
      outside0: {{role: outside, path: dpdk, device: "0000:00:04.0", addresses: [198.51.100.2/24]}}
    vrrp:
      instances:
        inside0: {{id: 10, addresses: [100.64.0.1/24]}}
        outside0: {{id: 20, addresses: [198.51.100.1/24]}}
    zones:
      - {{source: 100.64.0.0/24, pool: laddr_g1}}
"""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with running(tmp_path / "gw1") as found:
        found.hold("100.64.0.1", "198.51.100.1")
        yield found


def fleet(gateway: Gateway, *, pool: str = "203.0.113.1-203.0.113.4", window: int = 20, **other: str) -> Path:
    path = gateway.home.parent / "fleet.yaml"
    values = {
        "port": str(gateway.port),
        "host_key": gateway.host_key,
        "identity": str(gateway.identity),
    } | other
    path.write_text(FLEET.format(user=user(), pool=pool, window=window, **values))
    return path


def run(file: Path, *words: str, status: int = 0) -> str:
    argv = [sys.executable, "-m", "provision", "--file", str(file), *words]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def connect(gateway: Gateway) -> SshRemote:
    target = Target("gw1", "127.0.0.1", gateway.port, user(), gateway.host_key, gateway.identity)
    return SshRemote("gw1", dial(target))


def test_a_plan_is_pushed_confirmed_and_then_empty(gateway: Gateway) -> None:
    file = fleet(gateway)
    text = run(file, "plan", status=4)
    assert "+      - 203.0.113.1-203.0.113.4" in text
    run(file, "push", "--yes")
    assert gateway.current() == 1
    assert not (gateway.root / "pending").exists()
    assert [call for call in gateway.calls if "is-active" not in call] == [
        "systemctl reload-or-restart dsnat-failclosed.service",
        "systemctl stop dsnatd.service",
        "systemctl reload-or-restart dsnat-nic.service",
        "networkctl reload",
        "systemctl restart dsnatd.service",
        "systemctl reload-or-restart keepalived.service",
    ]
    assert "nothing to change" in run(file, "plan")
    run(file, "push", "--yes")
    assert gateway.current() == 1
    assert "confirmed" in run(file, "history")
    found = json.loads(run(file, "status", "--json"))["gateways"]["gw1"]
    assert (found["role"], found["state"], found["generation"], found["sessions"]) == ("master", "idle", 1, 7)


def test_the_documentations_example_of_dsnat_is_imported_pushed_and_translates(
    gateway: Gateway, tmp_path: Path, bench: Callable[[str], Bench]
) -> None:
    example = Path(__file__).parent / "dsnat"
    gateway.hold("1.1.100.1")
    words = ["--management", "127.0.0.1", "--host-key", gateway.host_key]
    words += ["--interface", "eth1=1.2.0.2/16,0000:00:04.0"]
    told = run(
        tmp_path, "import", "--json", str(example / "keepalived.conf"), str(example / "rc.local"), *words
    )
    ssh = f"{{user: {user()}, identity: {gateway.identity}, port: {gateway.port}}}"
    file = tmp_path / "fleet.yaml"
    file.write_text(
        json.loads(told)["fleet"].replace("schema: 1\n", f"schema: 1\ndefaults: {{ssh: {ssh}}}\n")
    )
    run(file, "push", "--yes")
    engine = bench((gateway.root / "generations/current/dsnatd.yaml").read_text())
    engine.ask({"addresses": {"eth0": ["1.1.100.2", "1.1.100.1"]}})
    answers = [engine.send(tcp(f"1.1.1.1:{40001 + n} > 1.2.1.4:80"), on="eth0") for n in range(6)]
    assert [outside(a).split(":")[0] for a in answers] == ["1.2.100.1", "1.2.100.2", "1.2.100.3"] * 2
    assert engine.send(tcp("1.9.1.1:40000 > 1.2.1.4:80"), on="eth0").reason == "no_zone"


def test_a_password_is_in_one_private_file_of_the_gateway_and_nowhere_else(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it changes, when somebody edits the file by hand, and in what the tool writes down."""
    vrrp = "    vrrp:\n      version: 2\n      authentication: {password: 'env:VRRP_SECRET'}\n"
    said, passwords = "", ("geheim7x", "anders8y")
    for password in passwords:
        monkeypatch.setenv("VRRP_SECRET", password)
        file = fleet(gateway)
        file.write_text(file.read_text().replace("    vrrp:\n", vrrp))
        said += run(file, "plan", "--json", "--out", str(tmp_path / "saved"), status=4)
        said += run(file, "push", "--yes")
    said += run(file, "render", "gw1")
    live = gateway.root / "generations/current/keepalived.conf"
    live.write_text(live.read_text() + "# by hand\n")
    said += run(file, "drift", "--json", status=4) + run(file, "history", "--json")
    told = [path for path in tmp_path.rglob("*") if path.is_file()]
    holders = {p for p in told if any(word.encode() in p.read_bytes() for word in passwords)}
    assert holders == {p.resolve() for p in (gateway.root / "generations").glob("*/keepalived.conf")}
    assert {p.stat().st_mode & 0o777 for p in holders} == {0o600}
    assert not any(word in said for word in passwords)


def test_a_change_of_the_pool_reloads_the_engine_and_nothing_else(gateway: Gateway) -> None:
    run(fleet(gateway), "push", "--yes")
    (gateway.fake / "calls").unlink()
    run(fleet(gateway, pool="203.0.113.1-203.0.113.6"), "push", "--yes")
    assert [call for call in gateway.calls if "is-active" not in call] == [
        "systemctl reload-or-restart dsnat-failclosed.service"
    ]


def test_a_gateway_whose_service_fails_reverts_and_the_status_says_so(gateway: Gateway) -> None:
    (gateway.fake / "fail-keepalived.service").touch()
    text = run(fleet(gateway), "push", "--yes", status=6)
    assert "keepalived.service failed" in text
    assert gateway.current() == 0


def test_an_unconfirmed_change_is_undone_in_time(gateway: Gateway) -> None:
    file = fleet(gateway)
    run(file, "push", "--yes", "--no-confirm", "--window", "5")
    assert gateway.current() == 1
    end = time.monotonic() + 20
    while (gateway.root / "pending").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert gateway.current() == 0
    assert "nobody confirmed it in time" in run(file, "history")


def test_a_witness_that_disagrees_undoes_the_change(gateway: Gateway) -> None:
    gateway.hold("198.51.100.1")  # half of the VRRP addresses
    text = run(fleet(gateway), "push", "--yes", "--window", "5", status=6)
    assert "holds 1 of 2 VRRP addresses" in text
    assert gateway.current() == 0


def test_confirming_needs_a_connection_that_was_opened_after_the_change(gateway: Gateway) -> None:
    file = fleet(gateway)
    with connect(gateway) as old:
        run(file, "push", "--yes", "--no-confirm")
        with pytest.raises(AgentRefused, match="new connection"):
            old.ask({"do": "confirm", "generation": 1}, deadline_s=10)
    run(file, "confirm")
    assert not (gateway.root / "pending").exists()


def test_another_host_key_is_never_trusted(gateway: Gateway, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    text = run(fleet(gateway, host_key=other), "push", "--yes", status=3)
    assert "another host key" in text
    assert gateway.current() == 0
    with pytest.raises(HostKeyMismatch):
        dial(Target("gw1", "127.0.0.1", gateway.port, user(), other, gateway.identity))


def test_a_key_that_the_gateway_does_not_know_is_said_so(gateway: Gateway, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    with pytest.raises(AuthFailed, match="stranger"):
        dial(Target("gw1", "127.0.0.1", gateway.port, user(), gateway.host_key, tmp_path / "stranger"))


def test_a_file_edited_on_the_gateway_is_drift_with_its_lines(gateway: Gateway) -> None:
    file = fleet(gateway)
    run(file, "push", "--yes")
    path = gateway.root / "generations/1/dsnatd.yaml"
    path.write_text(path.read_text().replace("203.0.113.4", "203.0.113.5"))
    text = run(file, "drift", status=4)
    assert "-      - 203.0.113.1-203.0.113.5" in text
    assert "edited on the gateway: dsnatd.yaml" in text


def test_a_rollback_makes_the_generation_before_live_again(gateway: Gateway) -> None:
    run(fleet(gateway), "push", "--yes")
    run(fleet(gateway, pool="203.0.113.9"), "push", "--yes")
    assert gateway.current() == 2
    run(fleet(gateway), "rollback", "--yes")
    assert gateway.current() == 1
    assert "nothing to change" in run(fleet(gateway), "plan")


def test_a_stale_plan_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    run(fleet(gateway), "plan", "--out", str(tmp_path / "plan"), status=4)
    run(fleet(gateway, pool="203.0.113.9"), "push", "--yes")
    run(fleet(gateway), "push", "--yes", "--plan", str(tmp_path / "plan"), status=8)
    assert gateway.current() == 1


def test_two_operators_cannot_change_a_gateway_at_once(gateway: Gateway) -> None:
    run(fleet(gateway), "push", "--yes", "--no-confirm", "--window", "600")
    text = run(fleet(gateway, pool="203.0.113.9"), "push", "--yes", status=7)
    assert "waits to be confirmed" in text


def test_a_gateway_that_is_away_is_named_and_the_status_is_three(gateway: Gateway) -> None:
    text = run(fleet(gateway, port="1"), "push", "--yes", status=3)
    assert "127.0.0.1:1 cannot be reached" in text


def test_a_run_that_failed_is_resumed_where_it_ended(gateway: Gateway) -> None:
    (gateway.fake / "fail-keepalived.service").touch()
    file = fleet(gateway)
    run(file, "push", "--yes", status=6)
    (gateway.fake / "fail-keepalived.service").unlink()
    text = run(file, "resume", "--yes")
    assert "0 done, 1 left" in text
    assert gateway.current() == 2
    assert "1 done, 0 left" in run(file, "resume", "--yes")


def test_a_command_that_reads_runs_on_the_gateway_and_others_do_not(gateway: Gateway) -> None:
    file = fleet(gateway)
    assert "==> gw1\n" in run(file, "exec", "--", "uname", "-a")
    assert "is not one of the commands that only read" in run(file, "exec", "--", "reboot", status=3)


def test_the_pinned_key_is_checked_on_request(gateway: Gateway) -> None:
    assert "as pinned" in run(fleet(gateway), "keys", "--check")


def interrupted(gateway: Gateway, file: Path, *words: str) -> str:
    """What a verb says that was interrupted while the gateway was at it. It ends with 130."""
    (gateway.fake / "wait").touch()
    with subprocess.Popen(
        [sys.executable, "-m", "provision", "--file", str(file), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell ignores Ctrl-C for what it runs in the background, and so would all that this one starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as verb:
        wait_until("the gateway to be at it", (gateway.fake / "waiting").exists, deadline_s=40)
        verb.send_signal(signal.SIGINT)
        time.sleep(0.5)  # nothing shows that the signal has arrived; the change waits meanwhile
        (gateway.fake / "wait").unlink()
        assert verb.stdout is not None
        said = verb.stdout.read()
        assert verb.wait(40) == 130, said
    return said


def test_ctrl_c_lets_what_is_in_flight_end_and_says_that_nothing_is_armed(gateway: Gateway) -> None:
    said = interrupted(gateway, fleet(gateway), "push", "--yes")
    assert "interrupted; nothing is left armed" in said
    assert gateway.current() == 1
    assert not (gateway.root / "pending").exists()


def test_ctrl_c_never_parts_a_new_host_key_from_the_file(gateway: Gateway) -> None:
    file = fleet(gateway)
    said = interrupted(gateway, file, "keys", "rotate", "--yes")
    assert "interrupted; not begun: nobody; nothing is left armed" in said
    assert gateway.host_key not in file.read_text()
    assert "as pinned" in run(file, "keys", "--check")


def test_a_gateway_behind_a_jump_host_is_reached_with_both_keys_pinned(
    gateway: Gateway, tmp_path: Path
) -> None:
    with running(tmp_path / "hop", "hop") as hop:
        jump = Target("hop", "127.0.0.1", hop.port, user(), hop.host_key, hop.identity)
        target = Target(
            "gw1", "127.0.0.1", gateway.port, user(), gateway.host_key, gateway.identity, jump=jump
        )
        with SshRemote("gw1", dial(target)) as remote:
            assert remote.ask({"do": "status"}, deadline_s=10)["generation"] == 0
        wrong = replace(target, jump=replace(jump, host_key=gateway.host_key))
        with pytest.raises(HostKeyMismatch, match=f"127.0.0.1:{hop.port} shows another host key"):
            dial(wrong)
        with pytest.raises(HostKeyMismatch, match=f"127.0.0.1:{gateway.port} shows another host key"):
            dial(replace(target, host_key=hop.host_key))


def test_a_part_of_an_image_is_streamed_and_counts_only_when_it_is_whole(gateway: Gateway) -> None:
    data = b"0123456789abcdef" * (1 << 20)
    name = "gateway_0.2.0.efi"
    request = {"do": "receive", "name": name, "size": len(data), "owner": "alice"}
    pieces = [data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20)]
    with connect(gateway) as remote:
        with pytest.raises(AgentRefused, match="did not arrive whole"):
            remote.ask({**request, "sha256": "0"}, deadline_s=30, stream=pieces)
        assert not (gateway.home / "updates" / name).exists()
        remote.ask({**request, "sha256": hashlib.sha256(data).hexdigest()}, deadline_s=30, stream=pieces)
    assert (gateway.home / "updates" / name).read_bytes() == data


def test_a_host_key_is_rotated_shown_and_written_into_the_file(gateway: Gateway) -> None:
    file = fleet(gateway)
    text = run(file, "keys", "rotate", "--yes")
    assert f"written to {file}" in text
    assert gateway.host_key not in file.read_text()
    assert "as pinned" in run(file, "keys", "--check")
    assert "rekeyed" in run(file, "history")
    assert (gateway.home / "kept/rotated").exists()
    again = file.read_text()
    link = file.with_name("link.yaml")
    link.symlink_to(file.name)
    run(link, "keys", "rotate", "--yes")
    assert link.is_symlink(), "a file that is kept elsewhere stays there"
    assert file.read_text() != again
    assert (gateway.home / "kept/replaces").read_text().strip() == gateway.host_key


def test_a_host_key_that_nobody_keeps_is_undone(gateway: Gateway) -> None:
    with connect(gateway) as remote:
        new = remote.ask({"do": "rekey", "step": "make", "owner": "alice"}, deadline_s=10)["public"]
        request = {"do": "rekey", "step": "use", "owner": "alice", "public": new, "window_s": 5}
        remote.ask(request, deadline_s=10)
        with pytest.raises(AgentRefused, match="kept by a new connection"):
            remote.ask({"do": "rekey", "step": "keep", "owner": "alice"}, deadline_s=10)
    end = time.monotonic() + 30
    while True:
        try:
            with connect(gateway) as remote:
                remote.ask({"do": "status"}, deadline_s=10)
            break
        except (HostKeyMismatch, Unreachable):  # sshd takes a moment to start anew
            assert time.monotonic() < end
            time.sleep(0.2)
    with connect(gateway) as remote, pytest.raises(AgentRefused, match="the old one is shown again"):
        remote.ask({"do": "rekey", "step": "keep", "owner": "alice"}, deadline_s=10)
    assert not (gateway.home / "kept/rotated").exists()
