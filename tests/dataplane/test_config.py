"""dsnatd.yaml is read strictly: every error at once, each with its place and what to do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
engine: {workers: auto, max_sessions: 4000000}
interfaces:
  - {name: inside0,  role: inside,  path: dpdk,    device: "0000:00:03.0"}
  - {name: outside0, role: outside, path: dpdk,    device: "0000:00:04.0"}
  - {name: wg0,      role: inside,  path: nfqueue}
pools:
  - name: laddr_g1
    addresses: [203.0.113.1, 203.0.113.8-203.0.113.15, 203.0.113.64/28]
    ports: 1024-65535
    mapping: endpoint-dependent
    select: round-robin
zones:
  - {source: 100.64.0.0/16, pool: laddr_g1}
  - {source: 100.65.0.0/16, action: drop}
  - {source: 100.66.0.0/16, destination: 192.0.2.0/24, action: pass}
limits: {sessions_per_host: 0, new_per_host_per_s: 0}
timeouts: {tcp_established: 7440s, tcp_opening: 4m, udp: 300s, dns: 0s}
"""
INTERFACES = """\
interfaces:
  - {name: inside0, role: inside, device: net_tap0}
  - {name: outside0, role: outside, device: net_tap1}
"""
Check = Callable[[str | bytes], list[str]]


@pytest.fixture
def check(program: Callable[[str], Path], tmp_path: Path) -> Check:
    """The problems of a text as LINE:COL: ..., warnings included; the exit status must fit them."""

    def run(text: str | bytes) -> list[str]:
        path = tmp_path / "dsnatd.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        done = subprocess.run(
            [program("dsnat-replay"), "--check", path],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        lines = done.stderr.splitlines()
        assert all(line.startswith(f"{path}:") for line in lines), done.stderr
        wrong = any(": warning: " not in line for line in lines)
        assert done.returncode == (2 if wrong else 0), done.stderr
        return [line.removeprefix(f"{path}:") for line in lines]

    return run


def pools(*lines: str) -> str:
    return INTERFACES + "pools:\n" + "".join(f"  - {line}\n" for line in lines)


def zones(*lines: str) -> str:
    pool = pools("{name: a, addresses: 203.0.113.1}")
    return pool + "zones:\n" + "".join(f"  - {line}\n" for line in lines)


def test_the_file_of_the_design_is_good(check: Check) -> None:
    assert check(GOOD) == []


def test_every_error_is_told_at_once_and_in_order(check: Check) -> None:
    text = GOOD.replace("workers: auto", "workers: 65").replace("dns: 0s", "dns: 9").replace("4m", "4w")
    places = [
        re.match(r"(\d+):(\d+): ", line)
        for line in check(text.replace("mapping: endpoint-dep", "mapping: dep"))
    ]
    assert [place and place[0] for place in places] == ["1:19: ", "10:14: ", "17:49: ", "17:69: "]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            GOOD.replace("sessions:", "session:", 1),
            '1:25: unknown key "max_session" in engine; did you mean "max_sessions"?',
        ),
        (
            GOOD + "limits: {}\n",
            '18:1: "limits" is given twice in the file (first in line 16); keep one',
        ),
        (
            GOOD.replace("auto", "many"),
            '1:19: "workers" is "many"; write auto or a number from 1 to 64',
        ),
        (
            GOOD.replace("4000000", "04"),
            '1:39: "max_sessions" is "04"; write a whole number from 1024 to 1000000000',
        ),
        (
            GOOD.replace("4000000", '"4000"'),
            '1:39: "max_sessions" is text; write the number without quotes',
        ),
        (
            GOOD.replace("4000000", "7"),
            '1:39: "max_sessions" is 7; it must be from 1024 to 1000000000',
        ),
        (
            GOOD.replace("7440s", "7440"),
            '17:29: "tcp_established" has no unit; write 7440s for seconds (or ms, m, h, d)',
        ),
        (
            GOOD.replace("udp: 300s", "udp: -1s"),
            '17:58: "udp" is "-1s"; write a time with its unit, such as 300s or 5m',
        ),
        (
            GOOD.replace("7440s", "31d"),
            '17:29: "tcp_established" is 31d; it must be from 1s to 30d',
        ),
        (
            GOOD.replace("7440s", ""),
            '17:12: "tcp_established" has no value; give one or remove the key',
        ),
        (
            GOOD.replace("1024-65535", "0-65535"),
            "9:12: ports 0-65535 begin with 0, which is not a port; begin with 1 or more",
        ),
        (
            GOOD.replace("1024-65535", "9-3"),
            "9:12: ports 9-3 are reversed; write the lower port first",
        ),
        (
            GOOD.replace("1024-65535", "1024-65536"),
            "9:12: ports 1024-65536 go beyond 65535; write a range such as 1024-65535",
        ),
        (
            GOOD.replace("name: wg0", "name: a/b"),
            '5:12: "name" is "a/b"; use letters, digits, "_", "-" and "." only',
        ),
        (
            GOOD.replace("name: wg0", "name: " + "x" * 16),
            '5:12: "name" is 16 characters long; it must be 1 to 15',
        ),
        (
            GOOD.replace("name: wg0", "name: inside0"),
            '5:5: interface "inside0" is there twice (first in line 3); rename one',
        ),
        (
            GOOD.replace("00:04.0", "00:03.0"),
            '4:5: device "0000:00:03.0" is there twice (first in line 3); give each interface its own, '
            "or a vlan of its own",
        ),
        (
            GOOD.replace("path: nfqueue", "path: nfqueue, vlan: 100"),
            "5:58: an interface with path nfqueue is the kernel's; name its VLAN interface, "
            'and remove "vlan"',
        ),
        (
            GOOD.replace('00:04.0"}', '00:04.0", vlan: 7}') + "degraded: nfqueue\n",
            "18:11: interface outside0 has a vlan or members, which the kernel's path cannot take over; "
            'remove "degraded"',
        ),
        (
            GOOD.replace("0000:00:04.0", "00:04.0"),
            '4:60: "device" is "00:04.0" without its PCI domain; write "0000:00:04.0"',
        ),
        (
            GOOD.replace("role: outside", "role: inside"),
            "1:1: no interface has role outside; add the one that leads to the Internet",
        ),
        (
            GOOD.replace("pool: laddr_g1", "pool: laddr_g2"),
            '13:35: there is no pool "laddr_g2"; did you mean "laddr_g1"?',
        ),
        (
            GOOD.replace("100.65.0.0/16", "100.65.0.1/16"),
            '14:14: "source" is "100.65.0.1/16", which has bits set behind its prefix length; write '
            "100.65.0.0/16",
        ),
        (
            GOOD.replace("100.65.0.0/16", "010.0.0.0/8"),
            '14:14: "source" is "010.0.0.0/8"; write an IPv4 prefix such as 100.64.0.0/16',
        ),
        (
            GOOD.replace("action: drop", "action: drop, pool: laddr_g1"),
            '14:49: a zone with action drop uses no pool; remove "pool" or "action"',
        ),
        (
            GOOD.replace(", action: drop", ""),
            '14:5: the zone says neither pool nor action; add "pool: NAME" or "action: drop"',
        ),
        (pools("{name: a, addresses: []}"), '5:26: pool "a" has no address; give it at least one'),
        (pools("{name: a}"), '5:5: the pool has no "addresses"; add it'),
        (
            pools("{name: a, addresses: 203.0.113.9-203.0.113.2}"),
            '5:26: range "203.0.113.9-203.0.113.2" is reversed; write the lower address first',
        ),
        (
            pools("{name: a, addresses: 203.0.113.8-12}"),
            '5:26: range "203.0.113.8-12" is cut short; write 203.0.113.8-203.0.113.12',
        ),
        (
            pools("{name: a, addresses: 127.0.0.0/30}"),
            '5:26: "127.0.0.0/30" holds a loopback address; a public address must be one that hosts can'
            " reply to",
        ),
        (
            pools("{name: a, addresses: 203.0.113.1, drain: 203.0.113.2}"),
            '5:46: 203.0.113.2 drains but is not in the addresses of pool "a"; keep it there while it drains',
        ),
        (
            pools("{name: a, addresses: 203.0.113.1, filtering: endpoint-independent}"),
            '5:50: an endpoint-dependent mapping always filters by address and port; remove "filtering"'
            " or set mapping: endpoint-independent",
        ),
        (
            pools("{name: a, addresses: 203.0.113.0/24, active_while: 203.0.113.5}"),
            '5:26: pool "a" covers 203.0.113.5, which is the gateway\'s own address (active_while at '
            "5:56); take it out of the pool",
        ),
        (
            GOOD + "more: 1\n",
            '18:1: unknown key "more" in the file; its keys are profile, engine, interfaces, pools, '
            "zones, static, limits, timeouts, tcp_midflow, refusal, other_protocols, port_control, "
            "logging, sync and degraded",
        ),
        (
            GOOD + "sync: {peer: 192.0.2.2, listen: 192.0.2.1:3781, key: 000102030405}\n",
            '18:54: "key" names no file; write "file:/etc/dsnat/sync.key", the key itself stands in it',
        ),
        (
            GOOD + "sync: {peer: 192.0.2.2:0, listen: 192.0.2.1, key: file:/etc/dsnat/sync.key}\n",
            '18:14: "peer" is "192.0.2.2:0"; write an IPv4 address and a port, such as "192.0.2.2:3781"',
        ),
        (
            GOOD + "sync: {peer: 192.0.2.1, listen: 192.0.2.1, key: file:/etc/dsnat/sync.key}\n",
            '18:14: "peer" and "listen" are the same address; name the other gateway\'s as "peer"',
        ),
        (
            GOOD + "logging: [{protocol: ipfx, collector: 192.0.2.10}]\n",
            '18:22: "protocol" is "ipfx"; did you mean ipfix',
        ),
        (
            GOOD + "logging: [{protocol: ipfix, collector: 192.0.2.10:x}]\n",
            '18:40: "collector" is "192.0.2.10:x"; write an IPv4 address and a port, '
            'such as "192.0.2.10:4739"',
        ),
        (
            GOOD + "logging: [{protocol: ipfix, collector: 224.0.0.9}]\n",
            '18:40: "collector" is a multicast address; nothing can be sent to one host there',
        ),
        (
            GOOD + "logging: [{protocol: syslog, collector: 192.0.2.10, pools: [laddr_g2]}]\n",
            '18:61: there is no pool "laddr_g2"; did you mean "laddr_g1"?',
        ),
        (
            GOOD + "logging: [{protocol: syslog, collector: 203.0.113.1}]\n",
            '18:11: the collector 203.0.113.1 is an address of pool "laddr_g1"; no collector can be there',
        ),
        (
            GOOD + "logging:\n" + "  - {protocol: syslog, collector: 192.0.2.10, destinations: on}\n" * 2,
            "20:5: this collector is there twice, and would get each record twice; keep one, "
            "with the pools of both",
        ),
        (
            GOOD + "logging: [{protocol: ipfix, collector: 192.0.2.10}]\n",
            '18:11: warning: pool "laddr_g1" is endpoint-dependent: hosts share its ports at the same time, '
            "and only the destination tells them apart; set destinations: on, or give the pool block_ports "
            "or mapping: endpoint-independent",
        ),
    ],
)
def test_an_error_says_where_what_and_what_to_do(check: Check, text: str, problem: str) -> None:
    assert problem in check(text)


def test_overlapping_pools_name_both_places(check: Check) -> None:
    found = check(
        pools(
            "{name: home, addresses: [203.0.113.16-203.0.113.40]}",
            "{name: office, addresses: [203.0.113.1, 203.0.113.32/28]}",
        )
    )
    assert (
        '6:45: pools "home" and "office" both own 203.0.113.32-203.0.113.40 (first at 5:30); '
        "give each address to one pool"
    ) in found


def test_an_interface_on_the_dpdk_path_needs_a_device_only_where_there_is_one(
    check: Check, program: Callable[[str], Path], tmp_path: Path
) -> None:
    text = zones("{source: 100.64.0.0/16, pool: a}").replace(", device: net_tap0", "")
    assert check(text)[0].startswith('2:5: the interface has path dpdk and no "device"')
    config = tmp_path / "bench.yaml"
    config.write_text(text)
    argv = [str(program("dsnat-replay")), "--config", str(config), "--stdio"]
    assert subprocess.run(argv, input=b"", check=True, capture_output=True, timeout=30).stderr == b""


def test_a_zone_that_can_never_match_is_warned_about(check: Check) -> None:
    found = check(
        zones(
            "{source: 100.64.0.0/10, destination: 192.0.2.0/24, action: pass}",
            "{source: 100.64.0.0/16, pool: a}",
            "{source: 100.64.7.0/24, destination: 192.0.2.9/32, action: drop}",
            "{source: 100.64.0.0/15, action: drop}",
            "{source: 100.64.3.3, action: drop}",
        )
    )
    never = (
        "warning: this zone never matches, the zone in line {} takes all its packets; move it up or remove it"
    )
    assert found == [f"9:5: {never.format(7)}", f"11:5: {never.format(8)}"]


def test_a_part_of_a_second_is_rounded_up_and_said(check: Check) -> None:
    assert check(GOOD.replace("300s", "1500ms")) == [
        '17:58: warning: "udp" is 1500ms and timers count whole seconds; it is rounded up to 2s'
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0\0",
        b"engine: \xff\n",
        "engine: {}".encode("utf-16"),
        b"[" * 100_000,
        b"- " * 50_000,
        b"{a: " * 50_000,
        b"a: &a [x]\nb: *a\n",
        b"a: 1\n---\nb: 2\n",
        b"!tag {a: 1}\n",
        b"? [a]\n: b\n",
        b"<<: {a: 1}\n",
        b"engine:\n\tworkers: 1\n",
        b'engine: {workers: "\\0"}\n',
        b"".join(b"k%d: 1\n" % n for n in range(50_000)),
        b"x" * (17 << 20),
    ],
    ids=lambda text: repr(text[:12]) if isinstance(text, bytes) else None,
)
def test_a_hostile_file_is_an_error_and_nothing_worse(check: Check, text: bytes) -> None:
    found = check(text)
    assert 1 <= len(found) <= 201


def keys_of(check: Check, text: str) -> set[str]:
    """The keys that the message about an unknown key lists."""
    match = re.search(r'unknown key "xxxxxxxxxxxx" in .*; its keys are (.*)', "\n".join(check(text)))
    assert match
    return set(re.split(r", | and ", match[1]))


def test_the_readme_documents_every_key_and_no_other(check: Check) -> None:
    table = re.findall(
        r"^\| `([a-z_.\[\]]+)` \|.*\|.*\|.*\|$", (ROOT / "dataplane/README.md").read_text(), re.M
    )
    unknown = "xxxxxxxxxxxx: 1"
    sections = {
        "engine.": f"engine: {{{unknown}}}\n",
        "interfaces[].": f"interfaces: [{{{unknown}}}]\n",
        "pools[].": f"pools: [{{{unknown}}}]\n",
        "zones[].": f"zones: [{{{unknown}}}]\n",
        "static[].": f"static: [{{{unknown}}}]\n",
        "logging[].": f"logging: [{{{unknown}}}]\n",
        "sync.": f"sync: {{{unknown}}}\n",
        "limits.": f"limits: {{{unknown}}}\n",
        "timeouts.": f"timeouts: {{{unknown}}}\n",
    }
    known = {f"{name}{key}" for name, text in sections.items() for key in keys_of(check, text)}
    known |= keys_of(check, unknown + "\n") - {name.rstrip("[].") for name in sections}
    assert set(table) == known
