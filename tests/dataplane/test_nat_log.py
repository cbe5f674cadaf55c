"""What goes into the NAT log, event by event: `dsnat-replay --log` writes what a collector would get, and
tests/ipfix.py reads it by the book.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ipfix
from tests.packet import udp
from tests.replay import ED, EIM, Bench, configuration, outside

REMOTE = "198.51.100.1:80"
IPFIX = 'logging: [{protocol: ipfix, collector: "192.0.2.10:4739"}]\n'
IPFIX_ALL = IPFIX.replace("}", ", destinations: on}")
SYSLOG = IPFIX.replace("ipfix", "syslog")
CREATED, DELETED, BIB_CREATED, BIB_DELETED, BLOCK, BLOCK_FREED = 4, 5, 8, 9, 16, 17

Logged = Callable[[str, Callable[[Bench], None]], bytes]


@pytest.fixture
def logged(program: Callable[[str], Path], tmp_path: Path, seed: int) -> Logged:
    """The log's bytes of an engine with this configuration, after `play` has had it."""

    def run(text: str, play: Callable[[Bench], None]) -> bytes:
        config, log = tmp_path / "dsnatd.yaml", tmp_path / "nat.log"
        config.write_text(text)
        options = ("--log", str(log))
        bench = Bench(program("dsnat-replay"), config, seed=seed, log=tmp_path / "errors", options=options)
        with bench:
            play(bench)
        assert bench.close() == 0, (tmp_path / "errors").read_text()
        return log.read_bytes()

    return run


def records(log: bytes) -> list[ipfix.Record]:
    reader = ipfix.Reader()
    assert reader.read(log) == b""
    assert reader.missed == reader.unreadable == 0
    return reader.records


def events(log: bytes) -> Counter[int]:
    return Counter(one["event"] for one in records(log))


def three_sessions(bench: Bench) -> None:
    for source, remote in (("100.64.0.2:1", "1"), ("100.64.0.2:1", "2"), ("100.64.0.3:1", "1")):
        bench.send(udp(f"{source} > 198.51.100.{remote}:80"))


def until_all_is_over(bench: Bench) -> None:
    three_sessions(bench)
    for _ in range(500):
        bench.wait(1)


def test_rfc8158_log1_an_endpoint_dependent_pool_tells_of_sessions(logged: Logged) -> None:
    assert events(logged(configuration(ED, extra=IPFIX), until_all_is_over)) == {CREATED: 3, DELETED: 3}


def test_rfc8158_log1_an_endpoint_independent_pool_tells_of_mappings(logged: Logged) -> None:
    assert events(logged(configuration(EIM, extra=IPFIX), until_all_is_over)) == {
        BIB_CREATED: 2,
        BIB_DELETED: 2,
    }


def test_rfc8158_log1_with_destinations_it_tells_of_its_sessions_too(logged: Logged) -> None:
    found = records(logged(configuration(EIM, extra=IPFIX_ALL), until_all_is_over))
    assert Counter(one["event"] for one in found) == {BIB_CREATED: 2, BIB_DELETED: 2, CREATED: 3, DELETED: 3}
    remotes = [one["destination"] for one in found if one["event"] == CREATED]
    assert remotes == ["198.51.100.1", "198.51.100.2", "198.51.100.1"]


def test_rfc8158_log1_with_blocks_it_tells_of_blocks_only(logged: Logged) -> None:
    text = configuration(EIM, "block_ports: 64, blocks_per_host: 1", extra=IPFIX)
    found = records(logged(text, until_all_is_over))
    assert Counter(one["event"] for one in found) == {BLOCK: 2, BLOCK_FREED: 2}
    assert {one["port_last"] - one["port_first"] for one in found} == {63}


def test_rfc8158_log1_a_deterministic_pool_tells_of_its_dynamic_share_only(logged: Logged) -> None:
    """RFC 7422 section 4: what arithmetic tells needs no log."""
    keys = "deterministic: 100.64.0.0/28, dynamic_ports: 1000"
    text = configuration(EIM, keys, addresses="203.0.113.1", ports="1024-2151", extra=IPFIX)

    def play(bench: Bench) -> None:
        for port in range(1, 31):
            assert bench.send(udp(f"100.64.0.2:{port} > {REMOTE}")).verdict == "forward"

    ports = {one["post_source_port"] for one in records(logged(text, play))}
    assert len(ports) == 22  # eight are the host's own
    assert min(ports) >= 1152


def test_rfc8158_log1_exhaustion_and_quotas_are_told(logged: Logged) -> None:
    def fill(bench: Bench) -> None:
        for port in range(1, 4):
            bench.send(udp(f"100.64.0.2:{port} > {REMOTE}"))
            bench.wait(61)  # an alarm is told once a minute

    extra = IPFIX + "timeouts: {udp_one_way: 1h}\n"
    one = records(logged(configuration(ED, addresses="203.0.113.1", ports="5000-5000", extra=extra), fill))
    assert [(r["event"], r.get("protocol")) for r in one] == [(CREATED, 17), (12, 17), (12, 17)]
    drained = configuration(ED, "drain: 203.0.113.1", addresses="203.0.113.1", extra=extra)
    assert {r["event"] for r in records(logged(drained, fill))} == {3}
    limited = configuration(ED, extra=extra + "limits: {sessions_per_host: 1}\n")
    quota = records(logged(limited, fill))[1]
    assert (quota["event"], quota["quota_event"], quota["max_per_user"]) == (13, 3, 1)
    assert quota["source"] == "100.64.0.2"

    def flood(bench: Bench) -> None:
        for n in range(1100):
            bench.send(udp(f"100.64.0.2:{1000 + n} > {REMOTE}"))

    small = configuration(ED, extra=extra).replace("max_sessions: 10000", "max_sessions: 1024")
    quota = next(r for r in records(logged(small, flood)) if r["event"] == 13)
    assert (quota["quota_event"], quota["max_sessions"]) == (1, 1024)


def test_rfc8158_log2_a_record_holds_what_the_packet_was_given(logged: Logged) -> None:
    public = ""

    def play(bench: Bench) -> None:
        nonlocal public
        public = outside(bench.send(udp(f"100.64.0.2:40000 > {REMOTE}")))

    (one,) = records(logged(configuration(ED, extra=IPFIX), play))
    assert f"{one['post_source']}:{one['post_source_port']}" == public
    assert (one["source"], one["source_port"], one["protocol"]) == ("100.64.0.2", 40000, 17)
    assert one["time_ms"] == 1000  # the bench's clock starts at one second


@pytest.mark.parametrize("form", [IPFIX, SYSLOG], ids=["ipfix", "syslog"])
def test_rfc6888_req12_a_log_names_no_destination_unless_asked(logged: Logged, form: str) -> None:
    log = logged(configuration(ED, extra=form), until_all_is_over)
    assert bytes((198, 51, 100)) not in log
    assert b"198.51.100" not in log
    log = logged(configuration(ED, extra=form.replace("}", ", destinations: on}")), until_all_is_over)
    assert bytes((198, 51, 100, 2)) in log or b'remote="198.51.100.2"' in log


def test_rfc8158_log3_templates_come_first(logged: Logged) -> None:
    log = logged(configuration(ED, extra=IPFIX), lambda _: None)
    assert ipfix.Reader().read(log) == b""
    assert log[16:18] == b"\x00\x02"


def test_rfc8158_log5_every_create_has_one_delete_whatever_a_reload_does(
    logged: Logged, tmp_path: Path
) -> None:
    """The pool leaves the configuration while its sessions live."""
    text = configuration(ED, extra=IPFIX)

    def play(bench: Bench) -> None:
        three_sessions(bench)
        other = text.replace("g1", "g2").replace("203.0.113.1-203.0.113.4", "203.0.113.9")
        bench.config.write_text(other)
        assert bench.ctl(cmd="reload")["ok"]
        until_all_is_over(bench)

    def of(found: list[ipfix.Record], event: int) -> list[Any]:
        keys = ("source", "source_port", "post_source", "post_source_port", "pool_id")
        return sorted(tuple(one[key] for key in keys) for one in found if one["event"] == event)

    found = records(logged(text, play))
    assert len(of(found, CREATED)) >= 3
    assert of(found, CREATED) == of(found, DELETED)


def test_only_the_named_pools_are_told_of(logged: Logged) -> None:
    text = configuration(ED, extra=IPFIX.replace("}", ", pools: [g2]}"))
    text = text.replace(
        "zones:\n", "  - {name: g2, addresses: 203.0.113.9}\nzones:\n  - {source: 100.65.0.0/16, pool: g2}\n"
    )

    def play(bench: Bench) -> None:
        three_sessions(bench)
        bench.send(udp(f"100.65.0.9:1 > {REMOTE}"))

    assert [one["source"] for one in records(logged(text, play))] == ["100.65.0.9"]


def test_a_reload_turns_the_log_on_and_off(logged: Logged) -> None:
    text = configuration(ED, extra=IPFIX)

    def play(bench: Bench) -> None:
        for number, now in enumerate((text, text.replace(IPFIX, ""), text)):
            bench.config.write_text(now)
            assert bench.ctl(cmd="reload")["ok"]
            bench.send(udp(f"100.64.0.{2 + number}:1 > {REMOTE}"))

    assert [one["source"] for one in records(logged(text, play))] == ["100.64.0.2", "100.64.0.4"]


def test_syslog_lines_are_rfc_5424_with_structured_data(logged: Logged) -> None:
    lines = logged(configuration(ED, extra=SYSLOG), until_all_is_over).decode().splitlines()
    assert len(lines) == 6
    form = re.compile(
        r"<134>1 1970-01-01T00:0\d:\d\d\.\d{6}Z - dsnatd - session-(create|delete) "
        r'\[nat@32473 pool="g1" protocol="udp" host="100\.64\.0\.[23]" hostPort="1" '
        r'public="203\.0\.113\.\d" publicPort="\d+" worker="0"\]\[meta sequenceId="(\d)"\]'
    )
    assert [match[2] for line in lines if (match := form.fullmatch(line))] == list("123456")


def test_the_same_input_gives_the_same_log(logged: Logged) -> None:
    text = configuration(EIM, extra=IPFIX_ALL)
    assert logged(text, until_all_is_over) == logged(text, until_all_is_over)
