"""dsnatctl and the control socket, against a real engine: dsnat-replay with --socket."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsnatctl import release, show
from dsnatctl.__main__ import main
from tests.packet import tcp, udp
from tests.replay import CONFIG, Bench, outside

Ctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def engine(program: Callable[[str], Path], tmp_path: Path, path: Path, seed: int) -> Iterator[Bench]:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG)
    bench = Bench(
        program("dsnat-replay"), config, seed=seed, log=tmp_path / "log", options=("--socket", str(path))
    )
    bench.wait(0)  # answered: the socket is there
    yield bench
    assert bench.close() == 0, (tmp_path / "log").read_text()


@pytest.fixture
def ctl(path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([*words, "--socket", str(path)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


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


def test_a_slow_reader_stops_neither_the_engine_nor_other_clients(engine: Bench, path: Path) -> None:
    for n in range(3000):
        engine.send(udp(f"100.64.1.1:{20000 + n} > 198.51.100.1:5000"))
    with connect(path) as slow:
        slow.sendall(b'{"cmd":"show","what":"sessions","limit":3000}\n' * 500)  # never reads
        for _ in range(20):
            assert talk(path, b'{"cmd":"version"}\n')[0]["ok"]
            assert engine.send(udp("100.64.1.1:20000 > 198.51.100.1:5000")).verdict == "forward"


def test_a_client_that_goes_away_in_the_middle_harms_nobody(engine: Bench, path: Path) -> None:
    for _ in range(50):
        with connect(path) as client:
            client.sendall(b'{"cmd":"show","what":"counters"}\n{"cmd":"sh')
    assert talk(path, b'{"cmd":"version"}\n')[0]["ok"]


def test_dsnatctl_starts_in_a_tenth_of_a_second(engine: Bench, path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); "]
    argv[-1] += "from dsnatctl.__main__ import main; sys.exit(main())"
    took = []
    for _ in range(10):
        begin = time.monotonic()
        subprocess.run(
            [*argv, str(root / "dataplane"), "version", "--socket", str(path)],
            check=True,
            capture_output=True,
        )
        took.append(time.monotonic() - begin)
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
