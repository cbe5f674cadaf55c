"""The commands of dsnat's own documentation, typed as there, against a real engine."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsnatctl import ipvsadm, listing
from dsnatctl.client import Engine
from provision.agent import Refused as AgentRefused
from provision.agent.change import by_hand
from provision.agent.state import State
from provision.plan import Running
from tests.packet import ping, tcp, udp
from tests.provision.machine import Client, FakeMachine
from tests.replay import Bench, outside

EMPTY = """\
engine: {workers: 1, max_sessions: 10000}
interfaces:
  - {name: inside0, role: inside}
  - {name: outside0, role: outside}
"""
EN, EM = "\u2013", "\u2014"  # the dashes of the documentation's copy
Ipvsadm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def engine(program: Callable[[str], Path], tmp_path: Path, path: Path) -> Iterator[Bench]:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(EMPTY)
    bench = Bench(
        program("dsnat-replay"), config, seed=1, log=tmp_path / "log", options=("--socket", str(path))
    )
    bench.wait(0)
    yield bench
    assert bench.close() == 0, (tmp_path / "log").read_text()


@pytest.fixture
def type_(
    engine: Bench,
    path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Ipvsadm:
    """Types a line; what it changes is written and reloaded, as the agent does on a gateway."""
    monkeypatch.setattr(listing, "ZERO", tmp_path / "zero.json")

    def save(text: str) -> None:
        (tmp_path / "dsnatd.yaml").write_text(text)
        with Engine(str(path)) as engine:
            engine.ask(cmd="reload")

    def run(line: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = ipvsadm.main(line.split()[1:], socket_path=str(path), save=save)
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_the_documentations_example_with_zones(engine: Bench, type_: Ipvsadm) -> None:
    for line in (
        f"ipvsadm {EN}A {EN}t 0.0.0.0:0 {EN}s rr",
        "ipvsadm -A -u 0.0.0.0:0 -s rr",
        f"ipvsadm {EN}K {EN}{EN}zone 1.1.0.0/16",
        f"ipvsadm {EN}P {EM}zone 1.1.0.0/16 {EN}z 203.0.113.1",
        "ipvsadm -P --zone 1.1.0.0/255.255.0.0 -z 203.0.113.2",
    ):
        assert type_(line) == (0, "", ""), line
    for n in range(3):
        answer = engine.send(tcp(f"1.1.0.{n}:40000 > 198.51.100.1:80"))
        assert outside(answer).split(":")[0] == f"203.0.113.{n % 2 + 1}"
        assert int(outside(answer).split(":")[1]) >= 5000
    engine.send(udp("1.1.0.9:40000 > 198.51.100.1:5000"))
    assert type_("ipvsadm -ln")[1] == (
        "IP Virtual Server version 1.2.1 (size=10000)\n"
        "Prot LocalAddress:Port Scheduler Flags\n"
        "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n"
        "TCP  0.0.0.0:0 rr\n"
        "UDP  0.0.0.0:0 rr\n"
    )
    assert type_("ipvsadm -G")[1] == (
        "NET/MASK                       TOTAL    SNAT_IP              CONFLICTS  CONNS     \n"
        "1.1.0.0/255.255.0.0            2        \n"
        "                                        203.0.113.1          0          2         \n"
        "                                        203.0.113.2          0          2         \n"
    )
    assert type_("ipvsadm -ln --stats")[1] == (
        "IP Virtual Server version 1.2.1 (size=10000)\n"
        "Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes\n"
        "  -> RemoteAddress:Port\n"
        "TCP  0.0.0.0:0                           3        3        0      120        0\n"
        "UDP  0.0.0.0:0                           1        1        0       35        0\n"
    )
    assert type_("ipvsadm -Z") == (0, "", "")
    assert type_("ipvsadm -ln --stats")[1].splitlines()[3].split() == ["TCP", "0.0.0.0:0", *"00000"]
    rates = type_("ipvsadm -ln --rate")[1].splitlines()
    assert rates[1].split() == ["Prot", "LocalAddress:Port", "CPS", "InPPS", "OutPPS", "InBPS", "OutBPS"]


def test_the_documentations_example_with_addresses_on_the_service(engine: Bench, type_: Ipvsadm) -> None:
    assert type_("ipvsadm -A -t 0.0.0.0:0 -s rr")[0] == 0
    assert type_("ipvsadm -P -t 0.0.0.0:0 -z 203.0.113.1") == (0, "", "")
    assert outside(engine.send(tcp("10.1.2.3:4000 > 198.51.100.1:80"))).startswith("203.0.113.1:")
    assert type_("ipvsadm -G -t 0.0.0.0:0")[1] == (
        "VIP:VPORT            TOTAL    SNAT_IP              CONFLICTS  CONNS     \n"
        "0.0.0.0:0            1        \n"
        "                              203.0.113.1          0          1         \n"
    )
    assert type_("ipvsadm -Q -t 0.0.0.0:0 -z 203.0.113.1")[0] == 0
    assert engine.send(tcp("10.1.2.4:4000 > 198.51.100.1:80")).reason == "zone_drop"


# The example of dsnat's README as it stood for each of the two kernels; ~ is its en dash, > is a packet and
# where it left from. Blanks at the ends of rows are looked at above.
FIRST_GENERATION = """\
$ ipvsadm ~A ~t 0.0.0.0:0 ~s rr
$ ipvsadm ~P ~t 0.0.0.0:0 -z 1.2.100.1
$ ipvsadm ~P ~t 0.0.0.0:0 -z 1.2.100.2
> 1.1.1.1:40000 1.2.100.1
> 1.1.1.1:40001 1.2.100.2
> 9.9.9.9:40002 1.2.100.1
$ ipvsadm -ln
IP Virtual Server version 1.2.1 (size=10000)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
TCP  0.0.0.0:0 rr
UDP  0.0.0.0:0 rr
$ ipvsadm -G
NET/MASK                       TOTAL    SNAT_IP              CONFLICTS  CONNS
0.0.0.0/0.0.0.0                2
                                        1.2.100.1            0          2
                                        1.2.100.2            0          1
$ ipvsadm -G -t 0.0.0.0:0
VIP:VPORT            TOTAL    SNAT_IP              CONFLICTS  CONNS
0.0.0.0:0            2
                              1.2.100.1            0          2
                              1.2.100.2            0          1
$ ipvsadm ~Q ~t 0.0.0.0:0 ~z 1.2.100.1
> 1.1.1.1:40003 1.2.100.2
$ ipvsadm ~D ~t 0.0.0.0:0
ipvsadm: TCP, UDP and ICMP echo are always translated; delete zones to refuse hosts
"""
FINAL_GENERATION = """\
$ ipvsadm ~A ~t 0.0.0.0:0 ~s rr
$ ipvsadm -K  --zone 1.1.0.0/16
$ ipvsadm -P --zone 1.1.0.0/16 -z 1.2.100.1
$ ipvsadm -P --zone 1.1.0.0/16 -z 1.2.100.2
$ ipvsadm -K  --zone 0.0.0.0/0
$ ipvsadm -P --zone 0.0.0.0/0 -z 1.2.100.3
> 1.1.1.1:40000 1.2.100.1
> 1.1.1.1:40001 1.2.100.2
> 9.9.9.9:40002 1.2.100.3
$ ipvsadm -ln
IP Virtual Server version 1.2.1 (size=10000)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
TCP  0.0.0.0:0 rr
UDP  0.0.0.0:0 rr
$ ipvsadm -G
NET/MASK                       TOTAL    SNAT_IP              CONFLICTS  CONNS
1.1.0.0/255.255.0.0            2
                                        1.2.100.1            0          1
                                        1.2.100.2            0          1
0.0.0.0/0.0.0.0                1
                                        1.2.100.3            0          1
$ ipvsadm -ln --stats
IP Virtual Server version 1.2.1 (size=10000)
Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes
  -> RemoteAddress:Port
TCP  0.0.0.0:0                           3        3        0      120        0
UDP  0.0.0.0:0                           0        0        0        0        0
$ ipvsadm -ln -u 0.0.0.0:0 --stats
IP Virtual Server version 1.2.1 (size=10000)
Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes
  -> RemoteAddress:Port
UDP  0.0.0.0:0                           0        0        0        0        0
$ ipvsadm -S
-A -t 0.0.0.0:0 -s rr
-A -u 0.0.0.0:0 -s rr
-K --zone 1.1.0.0/16
-P --zone 1.1.0.0/16 -z 1.2.100.1
-P --zone 1.1.0.0/16 -z 1.2.100.2
-K --zone 0.0.0.0/0
-P --zone 0.0.0.0/0 -z 1.2.100.3
--set 7440 240 300
$ ipvsadm -Q --zone 1.1.0.0/16 -z 1.2.100.1
> 1.1.1.1:40003 1.2.100.2
$ ipvsadm -V --zone 1.1.0.0/16
> 1.1.1.1:40004 1.2.100.3
$ ipvsadm -G --zone 0.0.0.0/0
NET/MASK                       TOTAL    SNAT_IP              CONFLICTS  CONNS
0.0.0.0/0.0.0.0                1
                                        1.2.100.3            0          2
$ ipvsadm -C
ipvsadm: TCP, UDP and ICMP echo are always translated; delete zones to refuse hosts
"""


@pytest.mark.parametrize("text", [FIRST_GENERATION, FINAL_GENERATION], ids=["2.6.32-220", "2.6.32-279"])
def test_the_whole_example_of_the_documentation_answers_as_on_the_original(
    engine: Bench, type_: Ipvsadm, text: str
) -> None:
    said = []
    for line in text.replace("~", EN).splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "$":
            status, out, err = type_(rest)
            assert status == 0, (line, err)
            said += [line, *(row.rstrip() for row in (out + err).splitlines())]
        elif kind == ">":
            source = rest.split()[0]
            public = outside(engine.send(tcp(f"{source} > 1.2.1.4:80"))).split(":")[0]
            said.append(f"> {source} {public}")
    assert said == text.replace("~", EN).splitlines()


def test_a_service_each_for_tcp_and_udp_has_the_same_addresses(type_: Ipvsadm) -> None:
    """With the first kernel a script added each address twice."""
    assert type_("ipvsadm -P -t 0.0.0.0:0 -z 203.0.113.1") == (0, "", "")
    status, _, err = type_("ipvsadm -P -u 0.0.0.0:0 -z 203.0.113.1")
    assert (status, "there already: TCP and UDP" in err) == (0, True)
    assert type_("ipvsadm -S")[1].count("203.0.113.1") == 1


def test_connections_without_ports_keep_the_columns(engine: Bench, type_: Ipvsadm) -> None:
    type_("ipvsadm -P -t 0.0.0.0:0 -z 203.0.113.1")
    engine.send(tcp("10.1.2.3:4000 > 198.51.100.1:80"))
    engine.send(ping("10.1.2.3 > 198.51.100.1"))
    _, _, *rows = type_("ipvsadm -lnc")[1].splitlines()
    assert {row.index("10.1.2.3") for row in rows} == {23}
    assert [row.split()[0] for row in type_("ipvsadm -lnc -t 0.0.0.0:0")[1].splitlines()[2:]] == ["TCP"]


def test_connections_are_in_the_columns_that_the_original_mixed_up(engine: Bench, type_: Ipvsadm) -> None:
    type_("ipvsadm -P -t 0.0.0.0:0 -z 203.0.113.1")
    request = engine.send(tcp("10.1.2.3:4000 > 198.51.100.1:80"))
    engine.send(tcp(f"198.51.100.1:80 > {outside(request)}", "SA", ack=1001), on="outside0")
    assert type_("ipvsadm -lnc")[1].splitlines() == [
        "IPVS connection entries",
        "pro expire state       source             virtual            destination",
        f"TCP 124:01 ESTABLISHED 10.1.2.3:4000      {outside(request):<18} 198.51.100.1:80",
    ]


def test_timeouts_are_set_and_listed(type_: Ipvsadm) -> None:
    assert type_("ipvsadm --set 900 120 0") == (0, "", "")
    assert type_("ipvsadm -L --timeout")[1] == "Timeout (tcp tcpfin udp): 900 120 300\n"
    assert type_("ipvsadm --set 900")[0] == 2


def test_save_and_restore_round_trip(type_: Ipvsadm) -> None:
    for line in ("-K --zone 10/8", "-P --zone 10/8 -z 203.0.113.1", "-P --zone 10/8 -z 203.0.113.2"):
        assert type_(f"ipvsadm {line}")[0] == 0
    assert type_("ipvsadm -K --zone 10.9.0.0/16")[0] == 0  # shadowed, and a drop: order is kept
    saved = type_("ipvsadm -S")[1]
    assert saved.splitlines() == [
        "-A -t 0.0.0.0:0 -s rr",
        "-A -u 0.0.0.0:0 -s rr",
        "-K --zone 10.0.0.0/8",
        "-P --zone 10.0.0.0/8 -z 203.0.113.1",
        "-P --zone 10.0.0.0/8 -z 203.0.113.2",
        "-K --zone 10.9.0.0/16",
        "--set 7440 240 300",
    ]
    assert type_("ipvsadm -V --zone 10/8")[0] == 0
    assert type_("ipvsadm -R", saved) == (0, "", "")
    assert type_("ipvsadm -S")[1] == saved
    status, _, err = type_("ipvsadm -R", saved + "-K --zone 300.1\n")
    assert (status, "line 8" in err) == (255, True)
    assert type_("ipvsadm -S")[1] == saved


def test_what_it_changes_is_a_generation_that_a_reboot_keeps_and_drift_names(
    engine: Bench,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The real agent in a directory; what its engine would read, the engine here reads."""
    machine = FakeMachine(tmp_path / "dsnat")
    fleet = Client(machine, "alice")
    fleet.push("a")

    def agent(argv: list[str], *, input: str, **_: object) -> subprocess.CompletedProcess[str]:
        assert argv == [ipvsadm.AGENT, "change"]
        said = {"ok": True, "result": by_hand(State(machine), json.loads(input))}
        return subprocess.CompletedProcess(argv, 0, json.dumps(said), "")

    def type_line(line: str) -> str:
        assert ipvsadm.main(line.split()[1:], socket_path=str(path)) == 0
        (tmp_path / "dsnatd.yaml").write_text(machine.running["dsnatd"])
        assert engine.ctl(cmd="reload")["ok"]
        return capsys.readouterr().out

    monkeypatch.setattr(subprocess, "run", agent)
    type_line("ipvsadm -K --zone 10.1.0.0/16")
    type_line("ipvsadm -P --zone 10.1.0.0/16 -z 203.0.113.7")
    machine.boot_up()

    assert "203.0.113.7" in type_line("ipvsadm -G"), "the reboot has lost it"
    assert machine.live() == 3, "a generation for each change, one rename each"
    facts = fleet.ask(do="facts")
    assert facts["manifest"]["owner"] == "ipvsadm"
    assert "dsnatd.yaml (by ipvsadm)" in Running("gw1", facts).drift
    with pytest.raises(AgentRefused, match="plan again"):
        fleet.stage("b", base=1)


def test_zones_with_the_same_addresses_share_a_pool(type_: Ipvsadm) -> None:
    for line in ("-K --zone 10/8", "-P --zone 10/8 -z 203.0.113.1", "-P --zone 10/8 -z 203.0.113.2"):
        type_(f"ipvsadm {line}")
    type_("ipvsadm -K --zone 11/8")
    status, _, err = type_("ipvsadm -P --zone 11/8 -z 203.0.113.1")
    assert status == 0
    assert "shares pool" in err
    saved = type_("ipvsadm -S")[1]
    assert type_("ipvsadm -R", saved)[0] == 0
    assert type_("ipvsadm -S")[1] == saved
    type_("ipvsadm -K --zone 12/8")
    type_("ipvsadm -P --zone 12/8 -z 203.0.113.9")
    status, _, err = type_("ipvsadm -P --zone 12/8 -z 203.0.113.1")
    assert status == 255
    assert "an address is in one pool only" in err


@pytest.mark.parametrize(
    ("line", "status", "sentence"),
    [
        ("-P --zone 9/8 -z 203.0.113.1", 255, "No such zone"),
        ("-V --zone 9/8", 255, "No such zone"),
        ("-G --zone 9/8", 255, "No such zone"),
        ("-K --zone 10/8", 255, "Zone already exists"),
        ("-P --zone 10/8 -z 203.0.113.1", 255, "Local address already exists"),
        ("-Q --zone 10/8 -z 203.0.113.2", 255, "No such Local address"),
        ("-K --zone 1.1.1.1/33", 255, "illegal zone address,192.168.1.0/255.255.255.0 or 192.168.1.0/24"),
        ("-K --zone 010.1.1.1", 255, "octal"),
        ("-P --zone 10/8 -z 203.0.113", 255, "illegal local address"),
        ("-P --zone 10/8 -z 127.0.0.1", 255, "loopback"),
        ("-K", 2, "You need to supply the 'zone' option"),
        ("-P --zone 10/8", 2, "You need to supply the 'local-address' option"),
        ("-A -t 192.0.2.1:80 -s rr", 2, "no load balancer"),
        ("-a -t 0.0.0.0:0 -r 192.0.2.1 -g", 2, "no load balancer"),
        ("-A -f 7", 2, "no firewall-mark services"),
        ("-A -t 0.0.0.0:0 -s rr -p 300", 2, "no load balancer: it has no persistence"),
        ("-e -t 0.0.0.0:0 -r 192.0.2.1 -x 9", 2, "no load balancer: there are no real servers"),
        ("-L --thresholds", 2, "no load balancer: it has no thresholds"),
        ("-A --zone 10/8", 2, "Illegal 'zone' option with the 'add-service' command"),
        ("-K --zone 12/8 -s rr", 2, "Illegal 'scheduler' option with the 'add-zone' command"),
        ("-P -t 0.0.0.0:0 --zone 10/8 -z 203.0.113.3", 2, "one service or one zone, not both"),
        ("-V --zone 10/8 11/8", 2, "unexpected argument 11/8"),
        ("-P --zone 10/8 -z 203.0.113.3 -z 203.0.113.4", 2, "given twice"),
        ("-Q --zone 10/8", 2, "You need to supply the 'local-address' option"),
        ("-A -K", 2, "one command at a time"),
        ("--start-daemon master", 2, "not synchronised"),
        ("--nonsense", 2, "see ipvsadm -h"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_a_status(
    type_: Ipvsadm, line: str, status: int, sentence: str
) -> None:
    type_("ipvsadm -K --zone 10/8")
    type_("ipvsadm -P --zone 10/8 -z 203.0.113.1")
    before = type_("ipvsadm -S")[1]
    done = type_(f"ipvsadm {line}")
    assert done[0] == status
    assert sentence in done[2]
    assert type_("ipvsadm -S")[1] == before


def test_what_ipvsadm_cannot_say_is_kept(engine: Bench, type_: Ipvsadm, tmp_path: Path, path: Path) -> None:
    rich = EMPTY + (
        "pools:\n  - {name: p, addresses: [203.0.113.1-203.0.113.9, {range: 203.0.113.16/28, weight: 2}], "
        "drain: 203.0.113.5}\nzones:\n  - {source: 10.0.0.0/8, destination: 192.0.2.0/24, action: pass}\n"
        "  - {source: 10.0.0.0/8, pool: p, mss_clamp: 1400}\nlimits: {sessions_per_host: 7}\n"
    )
    (tmp_path / "dsnatd.yaml").write_text(rich)
    engine.ctl(cmd="reload")
    assert type_("ipvsadm -Q --zone 10/8 -z 203.0.113.5")[0] == 0
    assert type_("ipvsadm -Q --zone 10/8 -z 203.0.113.20")[0] == 0
    config = engine.ctl(cmd="show", what="config")["config"]
    assert config["pools"][0]["addresses"] == [
        "203.0.113.1-203.0.113.4",
        "203.0.113.6-203.0.113.9",
        {"range": "203.0.113.16-203.0.113.19", "weight": 2},
        {"range": "203.0.113.21-203.0.113.31", "weight": 2},
    ]
    assert "drain" not in config["pools"][0]
    assert config["zones"][0]["action"] == "pass"
    assert config["zones"][1]["mss_clamp"] == 1400
    assert config["limits"]["sessions_per_host"] == 7


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (99_999_999, " 99999999"),
        (100_000_000, "  100000K"),
        (1_000_000_000, "    1000M"),
        (100_000_000_000, "     100G"),
        (100_000_000_000_000, "     100T"),
    ],
)
def test_large_figures_are_shortened_as_the_original_did(number: int, text: str) -> None:
    assert listing.shortened(number, 9, exact=False) == text
    assert listing.shortened(number, 9, exact=True) == f"{number:>9}"


def test_zero_survives_a_damaged_file(type_: Ipvsadm, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"tcp": "x"}))
    assert type_("ipvsadm -ln --stats")[0] == 0
