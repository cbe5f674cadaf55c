"""dsnatctl and the control socket, against a real engine: dsnat-replay with --socket."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dsnatctl import deterministic, metrics, release, show
from tests.packet import tcp, udp
from tests.replay import CONFIG, Bench, outside

ROOT = Path(__file__).resolve().parents[2]
Ctl = Callable[..., tuple[int, str, str]]


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(path))
    return client


def talk(path: Path, data: bytes) -> list[dict[str, object]]:
    """Sends, closes the sending side, and reads what comes back."""
    with connect(path) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answers = b""
        while part := client.recv(1 << 16):
            answers += part
    return [json.loads(line) for line in answers.splitlines()]


def test_every_show_has_a_table_and_the_engines_own_answer(engine: Bench, ctl: Ctl) -> None:
    request = engine.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    expected = {
        "sessions": outside(request),
        "pools": "203.0.113.4",
        "zones": "100.64.0.0/16",
        "counters": "Every packet is accounted for.",
        "workers": "cycles/packet",
        "ports": "outside0",
    }
    for what, text in expected.items():
        status, out, err = ctl("show", what)
        assert (status, err) == (0, "")
        assert text in out
        status, out, _ = ctl("show", what, "--json")
        assert status == 0
        assert json.loads(out)["ok"] is True


def test_counters_name_the_reason_and_what_to_do(engine: Bench, ctl: Ctl) -> None:
    engine.send(udp("192.168.7.7:40000 > 198.51.100.1:53"))
    _, out, _ = ctl("show", "counters")
    (line,) = (line for line in out.splitlines() if line.startswith("  no_zone"))
    assert line.split()[1] == "1"
    assert "add a zone" in line
    _, out, _ = ctl("show", "counters", "--json")
    answer = json.loads(out)
    assert answer["dropped"] == {"no_zone": 1}
    assert answer["equation"] is True


def test_sessions_are_filtered_by_each_end(engine: Bench, ctl: Ctl) -> None:
    first = engine.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    engine.send(tcp("100.64.0.3:40001 > 198.51.100.9:80"))
    filters = {
        "--host": ["100.64.0.2", "100.64.0.2:40000", "100.64.0.2/32", ":40000"],
        "--remote": ["198.51.100.1", "198.51.100.0/29:5000"],
        "--outside": [outside(first)],
        "--protocol": ["udp"],
        "--pool": ["g1"],
    }
    for option, values in filters.items():
        for value in values:
            _, out, _ = ctl("show", "sessions", option, value, "--json")
            hosts = {session["inside"] for session in json.loads(out)["sessions"]}
            assert "100.64.0.2:40000" in hosts, (option, value)
            assert ("100.64.0.3:40001" in hosts) == (option == "--pool"), (option, value)
    status, out, err = ctl("show", "sessions", "--host", "100.64.0.2/33")
    assert status == 1
    assert "ADDRESS" in err


def test_a_list_of_sessions_comes_in_pages_and_is_complete(engine: Bench, ctl: Ctl) -> None:
    hosts = {f"100.64.0.{n % 250 + 1}:{20000 + n}" for n in range(2500)}
    for host in sorted(hosts):
        engine.send(udp(f"{host} > 198.51.100.1:5000"))
    assert "next" in engine.ctl(cmd="show", what="sessions")
    _, out, _ = ctl("show", "sessions", "--json")
    found = [session["inside"] for session in json.loads(out)["sessions"]]
    assert sorted(found) == sorted(hosts)
    _, out, _ = ctl("show", "sessions", "--limit", "7")
    assert len(out.splitlines()) == 8


@pytest.mark.parametrize("verb", [["show", "sessions"], ["clear"]])
def test_an_empty_filter_is_an_error_and_never_taken_for_none(
    engine: Bench, ctl: Ctl, verb: list[str]
) -> None:
    """As `clear --host "$HOST" --protocol udp` in a script where HOST is not set."""
    engine.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    status, out, err = ctl(*verb, "--host", "", "--protocol", "udp")
    assert (status, out) == (2, "")
    assert err == "dsnatctl: --host is empty; give it a value, or leave it out\n"
    _, out, _ = ctl("show", "sessions", "--json")
    assert len(json.loads(out)["sessions"]) == 1


@pytest.mark.parametrize("key", ["host", "remote", "outside", "protocol", "state", "pool"])
@pytest.mark.parametrize("request_", [{"cmd": "show", "what": "sessions"}, {"cmd": "clear"}])
def test_the_engine_too_refuses_an_empty_filter(engine: Bench, request_: dict[str, str], key: str) -> None:
    engine.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    answer = engine.ctl(**request_, **{key: ""})
    assert answer == {"ok": False, "error": f'"{key}" is empty; give it a value, or leave it out'}
    assert len(engine.ctl(cmd="show", what="sessions")["sessions"]) == 1


def test_a_refused_listing_is_one_answer_with_nothing_before_it(engine: Bench, ctl: Ctl) -> None:
    status, out, err = ctl("show", "sessions", "--host", "nobody", "--json")
    assert status == 1
    assert json.loads(out)["ok"] is False
    assert "nobody" in err


def test_a_full_disk_is_a_sentence_and_a_status(engine: Bench, path: Path) -> None:
    argv = [sys.executable, "-m", "dsnatctl", "show", "pools", "--socket", str(path)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT / "dataplane"
        )
    assert done.returncode == 1
    assert done.stderr == "dsnatctl: what was asked for cannot be written (No space left on device)\n"


def test_clear_ends_what_the_filter_names_and_asks_for_one(engine: Bench, ctl: Ctl) -> None:
    for n in range(3000):
        engine.send(udp(f"100.64.1.{n % 2}:{20000 + n} > 198.51.100.1:5000"))
    status, _, err = ctl("clear")
    assert status == 2
    assert "--all" in err
    assert ctl("clear", "--host", "100.64.1.1")[:2] == (0, "1500 sessions cleared\n")
    assert ctl("clear", "--all", "--json")[1] == '{"ok": true, "cleared": 1500}\n'
    _, out, _ = ctl("show", "pools", "--json")
    assert json.loads(out)["pools"][0]["sessions"] == 0


def test_reload_drains_addresses_and_keeps_their_sessions(engine: Bench, ctl: Ctl, tmp_path: Path) -> None:
    before = engine.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    (tmp_path / "dsnatd.yaml").write_text(
        CONFIG.replace("203.0.113.4]", "203.0.113.4, 203.0.113.7], drain: 203.0.113.1-203.0.113.4")
    )
    assert ctl("reload") == (0, "reloaded: 1 pools, 1 zones\n", "")
    reply = engine.send(udp(f"198.51.100.1:5000 > {outside(before)}"), on="outside0")
    assert reply.verdict == "forward"
    after = engine.send(udp("100.64.0.2:40001 > 198.51.100.1:5000"))
    assert outside(after).startswith("203.0.113.7:")


def test_reload_says_every_error_and_changes_nothing(engine: Bench, ctl: Ctl, tmp_path: Path) -> None:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG.replace("1024-65535", "9-3").replace("pool: g1", "pool: g2"))
    status, out, err = ctl("reload")
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert lines[0].startswith(f"{config}:6:")
    assert lines[1].startswith(f"{config}:8:")
    assert lines[2] == "dsnatctl: nothing was changed; correct the file and reload again"
    assert engine.send(udp("100.64.0.2:40000 > 198.51.100.1:53")).verdict == "forward"


def test_reload_refuses_what_needs_a_restart(engine: Bench, ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "dsnatd.yaml").write_text(CONFIG.replace("max_sessions: 10000", "max_sessions: 20000"))
    status, _, err = ctl("reload")
    assert status == 1
    assert err == ("dsnatctl: engine.max_sessions changed from 10000 to 20000; restart dsnatd for that\n")


def test_status_and_version_name_the_program(engine: Bench, ctl: Ctl) -> None:
    assert "dsnat-replay" in ctl("version")[1]
    assert "of 10000 sessions" in ctl("status")[1]


def test_an_engine_that_is_not_there_is_one_sentence_and_status_3(ctl: Ctl, path: Path) -> None:
    assert ctl("status") == (
        3,
        "",
        f"dsnatctl: {path} is not there: dsnatd does not run; start dsnatd.service\n",
    )
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    status, _, err = ctl("show", "pools")
    assert status == 3
    assert "nobody listens" in err


def test_a_second_engine_does_not_take_the_socket_of_the_first(
    engine: Bench, program: Callable[[str], Path], tmp_path: Path, path: Path
) -> None:
    argv = [program("dsnat-replay"), "--config", tmp_path / "dsnatd.yaml", "--stdio", "--socket", path]
    second = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=20, check=False)
    assert second.returncode == 1
    assert f"another dsnatd listens on {path}" in second.stderr
    assert talk(path, b'{"cmd":"version"}\n')[0]["ok"]


def test_only_owner_and_group_may_connect(engine: Bench, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o660


def test_many_requests_in_one_write_are_answered_in_order(engine: Bench, path: Path) -> None:
    asked = ["pools", "zones", "nonsense", "counters"] * 50
    data = b"".join(json.dumps({"cmd": "show", "what": what}).encode() + b"\n" for what in asked)
    answers = talk(path, data)
    assert [next((w for w in asked[:4] if w in answer), "nonsense") for answer in answers] == asked


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello",
        b"[]",
        b"{}",
        b'{"cmd":1}',
        b'{"cmd":"show"}',
        b'{"cmd":"clear","hots":"1.2.3.4"}',
        b'{"cmd":"show","what":"sessions","cursor":"x"}',
        b"\xff\xfe",
        b'{"a":' * 5000,
        b"\0" * 100,
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_malformed_request_is_answered_with_an_error(engine: Bench, path: Path, line: bytes) -> None:
    answers = talk(path, line + b'\n{"cmd":"version"}\n')
    assert [answer["ok"] for answer in answers] == [False, True]
    assert answers[0]["error"]


def test_a_request_that_is_too_long_is_refused_and_the_client_dropped(engine: Bench, path: Path) -> None:
    with connect(path) as client:
        client.sendall(b" " * ((4 << 20) + 1))
        answer = client.makefile().readline()
        assert json.loads(answer)["error"].startswith("the request is too long")
        assert client.recv(1) == b""


def test_clients_beyond_the_limit_are_told_and_the_others_go_on(engine: Bench, path: Path) -> None:
    clients = [connect(path) for _ in range(64)]
    assert engine.wait(0).verdict == ""  # all of them are accepted by now or wait before us
    with connect(path) as late:
        assert "too many clients" in late.makefile().readline()
    for client in clients:
        client.sendall(b'{"cmd":"version"}\n')
        assert json.loads(client.makefile().readline())["ok"]
        client.close()
    assert talk(path, b'{"cmd":"version"}\n')[0]["ok"]


def test_a_slow_reader_stops_neither_the_engine_nor_other_clients_and_is_dropped(
    engine: Bench, path: Path
) -> None:
    for n in range(3000):
        engine.send(udp(f"100.64.1.1:{20000 + n} > 198.51.100.1:5000"))
    with connect(path) as slow:
        slow.sendall(b'{"cmd":"show","what":"sessions","limit":1000}\n' * 500)  # never reads
        for _ in range(20):
            assert talk(path, b'{"cmd":"version"}\n')[0]["ok"]
            assert engine.send(udp("100.64.1.1:20000 > 198.51.100.1:5000")).verdict == "forward"
        gone = select.poll()
        gone.register(slow, 0)  # its end is always told
        for _ in range(60):
            if gone.poll(500):
                break
            assert talk(path, b'{"cmd":"version"}\n')[0]["ok"]
        assert gone.poll(0), "a client that took nothing for 10 s is still there"


def test_a_client_that_goes_away_in_the_middle_harms_nobody(engine: Bench, path: Path) -> None:
    for _ in range(50):
        with connect(path) as client:
            client.sendall(b'{"cmd":"show","what":"counters"}\n{"cmd":"sh')
    assert talk(path, b'{"cmd":"version"}\n')[0]["ok"]


def test_dsnatctl_starts_in_a_tenth_of_a_second(engine: Bench, path: Path) -> None:
    argv = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); "]
    argv[-1] += "from dsnatctl.__main__ import main; sys.exit(main())"
    took = []
    for _ in range(5):
        before = os.times()
        subprocess.run(
            [*argv, str(ROOT / "dataplane"), "version", "--socket", str(path)],
            check=True,
            capture_output=True,
        )
        after = os.times()  # processor time: what it takes on a machine with nothing else to do
        took.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(took) < 0.1, took


def test_release_names_only_what_is_ours() -> None:
    asked: list[list[str]] = []
    answers = {
        "dsnatd": "interface in0 inside dpdk -\ninterface wg0 inside nfqueue -\npool a 1.2.3.4-1.2.3.4\n",
        "ip": json.dumps(
            [
                {"ifname": "in0", "linkinfo": {"info_kind": "tun"}},
                {"ifname": "wg0", "linkinfo": {"info_kind": "tun"}},
                {"ifname": "eth0"},
                {"ifname": "dsnat0", "linkinfo": {"info_kind": "tun"}},
            ]
        ),
        "nft": json.dumps(
            {
                "nftables": [
                    {"metainfo": {}},
                    {"table": {"family": "inet", "name": "dsnat_failclosed"}},
                    {"table": {"family": "inet", "name": "filter"}},
                    {"table": {"family": "netdev", "name": "dsnat-eth1"}},
                ]
            }
        ),
    }

    def fake(argv: object) -> str:
        words = list(argv)  # type: ignore[call-overload]
        asked.append(words)
        return "" if "delete" in words else answers[words[0]]

    done = release.release("/etc/dsnat/dsnatd.yaml", run=fake)
    assert done == [
        "interface in0",
        "interface dsnat0",
        "nft table inet dsnat_failclosed",
        "nft table netdev dsnat-eth1",
    ]
    assert [words[1:] for words in asked if "delete" in words] == [
        ["link", "delete", "in0"],
        ["link", "delete", "dsnat0"],
        ["delete", "table", "inet", "dsnat_failclosed"],
        ["delete", "table", "netdev", "dsnat-eth1"],
    ]


def test_release_refuses_while_an_engine_runs(engine: Bench, ctl: Ctl) -> None:
    status, _, err = ctl("release", "--yes")
    assert status == 1
    assert "stop dsnatd.service first" in err


def test_a_table_is_as_wide_as_its_widest_cell() -> None:
    assert list(show.table(("name", "n"), [("a", 1000), ("longer", 1)])) == [
        "name       n",
        "a       1000",
        "longer     1",
    ]


EVERY_KEY = """\
engine: {workers: 1, max_sessions: 10000, spare: on}
interfaces:
  - {name: inside0, role: inside}
  - {name: outside0, role: outside, vlan: 100, mtu: 1400, icmp_errors: off, device: 'net_bonding0,mode=1',
     members: ['0000:00:04.0', '0000:00:05.0']}
pools:
  - {name: a, addresses: [203.0.113.1, {range: 203.0.113.2-203.0.113.3, weight: 3}], drain: 203.0.113.1}
  - {name: b, addresses: 203.0.113.8/29, select: paired, block_ports: 64, blocks_per_host: 2, announce: none}
  - {name: c, addresses: 203.0.113.16/28, ports: 2000-60000, mapping: endpoint-independent,
     filtering: address-dependent, deterministic: 100.67.0.0/24, dynamic_ports: 99,
     active_while: 198.51.100.1}
zones:
  - {source: 100.64.0.0/16, pool: a, mss_clamp: 1400}
  - {source: 100.65.0.0/16, destination: 192.0.2.0/24, action: pass}
  - {source: 100.65.0.0/16, pool: b}
  - {source: 100.67.0.0/16, pool: c}
static:
  - {inside: 100.64.0.9, outside: 203.0.113.2, protocol: tcp, port: 2500, inside_port: 2525}
limits: {fragments: 16, sessions_per_host: 7, new_per_host_per_s: 8, icmp_errors_per_s: 9, held_ports: 10}
timeouts: {dns: 0s, udp: 9m}
tcp_midflow: reset
refusal: icmp-host
other_protocols: pass
degraded: off
port_control: on
logging:
  - {protocol: syslog, transport: tcp, collector: 192.0.2.10, pools: [b, c], destinations: on}
  - {protocol: ipfix, collector: "192.0.2.10:4740"}
sync: {peer: "192.0.2.2:3782", listen: "192.0.2.1:3783", key: "file:/etc/dsnat/sync.key", hold_back: 3s}
"""


def test_the_shown_configuration_is_one_that_the_engine_takes(
    program: Callable[[str], Path], tmp_path: Path, path: Path, ctl: Ctl
) -> None:
    """Shown, read again and shown again: every key survives."""
    config = tmp_path / "dsnatd.yaml"
    config.write_text(EVERY_KEY)
    shown = []
    for _ in range(2):
        argv = ("--socket", str(path))
        with Bench(program("dsnat-replay"), config, seed=1, log=tmp_path / "log", options=argv) as bench:
            bench.wait(0)
            status, out, err = ctl("show", "config")
            assert (status, err) == (0, "")
            shown.append(out)
        config.write_text(out)
    assert shown[0] == shown[1]
    keys = re.findall(
        r"^\| `([a-z_.\[\]]+)` \|.*\|.*\|.*\|$", (ROOT / "dataplane/README.md").read_text(), re.MULTILINE
    )
    missing = {key for key in keys if f"{key.split('.')[-1]}:" not in shown[0]} - {"profile"}
    assert not missing, "show config does not show these keys of the README, or EVERY_KEY does not set them"
    for text in ("udp: 540s", "weight: 3", "inside_port: 2525", '"0000:00:04.0"', "mss_clamp: 1400"):
        assert text in shown[0]


def test_who_names_the_host_behind_an_outside_tuple(engine: Bench, ctl: Ctl) -> None:
    request = engine.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    status, out, _ = ctl("who", outside(request))
    assert status == 0
    assert out.startswith(f"100.64.0.2:40000 has had {outside(request)} for 0 s")
    status, out, err = ctl("who", "203.0.113.4:1")
    assert (status, out) == (1, "")
    assert "nobody has 203.0.113.4:1 now" in err


def test_plan_gives_the_bill_and_changes_nothing(engine: Bench, ctl: Ctl, tmp_path: Path) -> None:
    for n in range(3000):
        engine.send(udp(f"100.64.{n % 100}.1:{20000 + n} > 198.51.100.1:5000"))
    candidate = tmp_path / "candidate.yaml"
    text = CONFIG.replace("203.0.113.1-203.0.113.4", "203.0.113.1-203.0.113.2, 203.0.113.9")
    text = (
        text.replace("ports:", "drain: 203.0.113.2, ports:") + "  - {source: 100.65.0.0/16, action: drop}\n"
    )
    candidate.write_text(text + "timeouts: {udp: 400s}\n")
    status, out, err = ctl("plan", str(candidate))
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "~ timeouts.udp: 300s -> 400s",
        "~ pool g1.addresses: 203.0.113.1-203.0.113.4 -> 203.0.113.1-203.0.113.2 203.0.113.9",
        "~ pool g1.drain: none -> 203.0.113.2",
        "+ zone 2: source 100.65.0.0/16, action drop",
        "2250 live sessions of 75 hosts are on addresses that take no new ones: "
        "1500 on addresses that leave their pool, 750 on addresses that drain",
        "reload lets them live on: the last one ends in 121 s if no packet comes; "
        "reload --cut ends the 1500 on addresses that leave at once",
    ]
    assert json.loads(ctl("plan", str(candidate), "--json")[1])["hosts"] == 75
    assert "udp: 300s" in ctl("show", "config")[1]


def test_plan_says_the_candidates_errors_and_what_needs_a_restart(
    engine: Bench, ctl: Ctl, tmp_path: Path
) -> None:
    candidate = tmp_path / "candidate.yaml"
    candidate.write_text(CONFIG.replace("pool: g1", "pool: g2"))
    status, _, err = ctl("plan", str(candidate))
    assert status == 2
    assert err == f'{candidate}:8:35: there is no pool "g2"; did you mean "g1"?\n'
    candidate.write_text(CONFIG.replace("10000", "20000"))
    assert "reload will refuse it: engine.max_sessions changed" in ctl("plan", str(candidate))[1]
    assert ctl("plan", str(tmp_path / "none"))[0] == 2


def test_rfc_says_what_the_settings_give_up(engine: Bench, ctl: Ctl, tmp_path: Path) -> None:
    _, out, _ = ctl("rfc")
    assert "pool g1: mapping: endpoint-dependent\n  gives up  RFC 4787 REQ-1" in out
    (tmp_path / "dsnatd.yaml").write_text(
        CONFIG.replace("ports:", "mapping: endpoint-independent, ports:")
        + "timeouts: {tcp_established: 900s}\nlimits: {sessions_per_host: 100}\nrefusal: icmp-admin\n"
        + "logging: [{protocol: ipfix, collector: 192.0.2.10, destinations: on}]\n"
    )
    assert ctl("reload")[0] == 0
    given_up = json.loads(ctl("rfc", "--json")[1])["given_up"]
    assert [one["setting"] for one in given_up] == [
        "timeouts: tcp_established: 900s",
        "refusal: icmp-admin",
        "logging: 192.0.2.10:4739: destinations: on",
    ]


SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+)\})? (-?[0-9.e+]+)')


def samples(text: str) -> dict[tuple[str, str], float]:
    """The page, read as strictly as Prometheus does: one HELP and TYPE before the samples of a metric."""
    found: dict[tuple[str, str], float] = {}
    kinds: dict[str, str] = {}
    last = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, last, kind = line.split()
            assert last not in kinds, f"{last} has two types"
            kinds[last] = kind
        elif not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            parts = ("_bucket", "_sum", "_count") if kinds[last] == "histogram" else ("",)
            assert match[1] in [last + part for part in parts], f"{line} stands apart from its TYPE"
            assert match[1].endswith("_total") == (kinds[last] == "counter"), line
            assert (match[1], match[2]) not in found, f"{line} is there twice"
            found[match[1], match[2] or ""] = float(match[3])
    return found


def test_metrics_are_served_to_prometheus_and_agree_with_the_counters(engine: Bench, path: Path) -> None:
    engine.send(udp("100.64.0.2:40000 > 198.51.100.1:5000"))
    engine.send(udp("192.168.7.7:40000 > 198.51.100.1:53"))
    with metrics.Server(("127.0.0.1", 0), str(path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(f"{where}/metrics", timeout=20) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            found = samples(answer.read().decode())
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{where}/", timeout=20)
        server.shutdown()
    assert found["dsnat_up", ""] == 1
    assert found["dsnat_equation_holds", ""] == 1
    assert found["dsnat_packets_total", 'worker="0",result="received"'] == 2
    assert found["dsnat_reason_packets_total", 'worker="0",reason="no_zone"'] == 1
    assert found["dsnat_sessions", 'worker="0"'] == 1
    assert found["dsnat_address_sessions", 'pool="g1",address="203.0.113.1"'] == 1
    assert (
        found["dsnat_zone_sessions_created_total", 'zone="1",source="100.64.0.0/16",destination="any"'] == 1
    )


def test_metrics_of_an_engine_that_is_gone_say_so(ctl: Ctl) -> None:
    status, out, _ = ctl("metrics", "--once")
    assert status == 0
    assert samples(out) == {("dsnat_up", ""): 0}
    assert "dsnatd does not run" in out


def test_a_generation_is_the_number_that_the_link_ends_in(tmp_path: Path) -> None:
    (tmp_path / "generations/17").mkdir(parents=True)
    (tmp_path / "dsnat").symlink_to("generations/17")
    assert metrics.generation(str(tmp_path / "dsnat")) == 17
    assert metrics.generation(str(tmp_path)) == -1


DETERMINISTIC = CONFIG.replace(
    "[203.0.113.1-203.0.113.4], ports: 1024-65535",
    "[203.0.113.1, 203.0.113.9-203.0.113.10], select: paired, "
    "deterministic: 100.64.0.0/24, dynamic_ports: 1000",
)


def test_rfc7422_det5_whose_a_port_is_follows_from_the_configuration_alone(
    engine: Bench, ctl: Ctl, tmp_path: Path
) -> None:
    (tmp_path / "dsnatd.yaml").write_text(DETERMINISTIC)
    assert ctl("reload")[0] == 0
    for host in (0, 1, 85, 86, 172, 255):
        tuple_ = outside(engine.send(udp(f"100.64.0.{host}:4000 > 198.51.100.1:5000")))
        assert ctl("clear", "--all")[0] == 0  # no session is left to ask
        status, out, _ = ctl("who", tuple_)
        assert status == 0
        assert out.startswith(f"100.64.0.{host} has ports "), (tuple_, out)
        address, port = tuple_.split(":")
        assert f"of {address}," in out
        share = deterministic.Deal.of(engine.ctl(cmd="show", what="config")["config"]["pools"][0])
        own = share.of_host(IPv4Address(f"100.64.0.{host}"))
        assert own is not None
        assert own.port_first <= int(port) <= own.port_last
        assert share.of_port(own.address, own.port_first) == own == share.of_port(own.address, own.port_last)


def test_ports_that_arithmetic_gives_to_nobody_are_nobodys(engine: Bench, ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "dsnatd.yaml").write_text(DETERMINISTIC)
    assert ctl("reload")[0] == 0
    for tuple_ in ("203.0.113.1:65535", "203.0.113.1:1023", "203.0.113.2:2000", "203.0.113.10:64000"):
        assert ctl("who", tuple_)[0] == 1


def test_traffic_is_counted_by_protocol_and_direction(engine: Bench, ctl: Ctl) -> None:
    request = engine.send(tcp("100.64.0.2:40000 > 198.51.100.1:80"))  # 40 bytes
    engine.send(tcp(f"198.51.100.1:80 > {outside(request)}", "SA"), on="outside0")
    engine.send(udp("100.64.0.2:40000 > 198.51.100.1:53", b"four"))  # 32 bytes
    engine.send(udp("100.64.0.2:40000 > 198.51.100.1:53", b"four"))
    counters = json.loads(ctl("show", "counters", "--json")[1])["counters"]
    fields = ("sessions_created", "packets_out", "packets_in", "bytes_out", "bytes_in")
    assert {name: [one[field] for field in fields] for name, one in counters["traffic"].items()} == {
        "tcp": [1, 1, 1, 40, 40],
        "udp": [1, 2, 0, 64, 0],
        "icmp": [0, 0, 0, 0, 0],
    }
    assert (counters["bytes_out"], counters["bytes_in"]) == (104, 40)
