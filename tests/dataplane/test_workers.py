"""Several workers in one process: what they hand to each other, and that nobody outside can tell.

The oracle and the state machine (test_oracle.py, test_state_machine.py) run with several workers too; here is
what they do not look at: how evenly addresses are taken, what is handed over and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.packet import fragments, icmp_error, joined, ping, pong, read, tcp, udp
from tests.replay import ED, EIM, Answer, Bench, configuration, outside

Start = Callable[..., Any]
REMOTE = "198.51.100.7"


@pytest.fixture
def workers(program: Callable[[str], Path], tmp_path: Path, seed: int) -> Start:
    @contextmanager
    def start(config: str, n: int, spread: str = "rss") -> Iterator[Bench]:
        path = tmp_path / "dsnatd.yaml"
        path.write_text(config)
        options = ["--workers", str(n), "--spread", spread]
        log = tmp_path / "replay.log"
        with Bench(program("dsnat-replay"), path, seed=seed, log=log, options=options) as bench:
            bench.ctl(cmd="version")  # it has read the file, which a test may now write anew
            yield bench
            assert bench.ctl(cmd="show", what="counters")["equation"]
            assert bench.close() == 0, log.read_text()[-2000:]

    return start


def causes(bench: Bench) -> dict[str, int]:
    counters = bench.counters()
    by_cause: dict[str, int] = counters["handed_over_by_cause"]
    assert sum(by_cause.values()) == counters["handed_over"] == counters["taken_over"]
    return {cause: n for cause, n in by_cause.items() if n}


def ask(bench: Bench, host: int, port: int = 4000) -> Answer:
    return bench.send(udp(f"100.64.{host // 250}.{host % 250 + 1}:{port} > {REMOTE}:80"))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_behind_rss_neither_requests_nor_replies_are_handed_over(workers: Start, n: int) -> None:
    with workers(configuration(ED), n) as bench:
        given = [outside(ask(bench, host)) for host in range(100)]
        given += [
            outside(bench.send(tcp(f"100.64.9.{host}:5000 > {REMOTE}:443", "S"))) for host in range(1, 100)
        ]
        for at, source in enumerate(given):
            back = f"{REMOTE}:80 > {source}" if at < 100 else f"{REMOTE}:443 > {source}"
            assert bench.send(udp(back) if at < 100 else tcp(back, "SA"), on="outside0").verdict == "forward"
        assert causes(bench) == {}
        assert len({session["worker"] for session in bench.sessions()}) == n


@pytest.mark.parametrize("n", [2, 5])
def test_a_heavy_single_host_is_spread_over_all_workers(workers: Start, n: int) -> None:
    with workers(configuration(ED), n) as bench:
        for port in range(2000, 2300):
            outside(ask(bench, 1, port))
        share = Counter(session["worker"] for session in bench.sessions())
        assert len(share) == n
        assert min(share.values()) > 300 / n / 2


@pytest.mark.parametrize("n", [2, 3, 5])
def test_each_worker_takes_the_addresses_in_turn(workers: Start, n: int) -> None:
    with workers(configuration(ED, addresses="203.0.113.1-203.0.113.7"), n) as bench:
        count = Counter(outside(ask(bench, host)).split(":")[0] for host in range(200))
        assert max(count.values()) - min(count.values()) <= n


@pytest.mark.parametrize(("n", "spread"), [(2, "rss"), (3, "turns"), (5, "one")])
def test_a_host_is_refused_only_when_no_port_of_any_worker_is_free(
    workers: Start, n: int, spread: str
) -> None:
    config = configuration(ED, addresses="203.0.113.1-203.0.113.3", ports="5000-5069")
    with workers(config, n, spread) as bench:
        given = [outside(ask(bench, host)) for host in range(210)]
        assert len(set(given)) == 210
        assert {ask(bench, host).reason for host in range(210, 220)} == {"no_port"}
        assert [outside(ask(bench, host)) for host in range(210)] == given
        for source in given:
            answer = bench.send(udp(f"{REMOTE}:80 > {source}"), on="outside0")
            assert answer.verdict == "forward"
        assert causes(bench)["borrowed"] > 0


def test_without_rss_all_is_handed_to_its_owner_and_counted_so(workers: Start) -> None:
    with workers(configuration(ED), 3, "one") as bench:
        for host in range(60):
            source = outside(ask(bench, host))
            assert bench.send(udp(f"{REMOTE}:80 > {source}"), on="outside0").verdict == "forward"
        seen = causes(bench)
        assert set(seen) == {"no_rss"}
        assert 60 < seen["no_rss"] < 120  # a third belongs to the first worker anyway


def test_echo_and_errors_find_the_worker_of_their_session(workers: Start) -> None:
    with workers(configuration(ED), 3) as bench:
        for ident in range(1, 30):
            got = bench.send(ping(f"100.64.0.2 > {REMOTE}", ident=ident)).packet
            answer = bench.send(pong(f"{REMOTE} > {got.source_address}", ident=got.sport), on="outside0")
            assert answer.packet.dport == ident
        for host in range(30):
            source = outside(ask(bench, host))
            error = icmp_error(f"192.0.2.9 > {source.split(':')[0]}", 3, 3, udp(f"{source} > {REMOTE}:80"))
            answer = bench.send(error, on="outside0")
            assert answer.packet.quoted is not None
            assert answer.packet.quoted.source == f"100.64.0.{host + 1}:4000"
        assert set(causes(bench)) == {"icmp"}


@pytest.mark.parametrize("backwards", [False, True])
def test_fragments_come_together_wherever_they_come_in(workers: Start, backwards: bool) -> None:
    with workers(configuration(ED), 5, "turns") as bench:
        for host in range(1, 12):
            whole = udp(f"100.64.0.{host}:4000 > {REMOTE}:80", bytes(range(100)))
            parts = fragments(whole, 32, ident=host)
            answers = [bench.send(part) for part in (reversed(parts) if backwards else parts)]
            out = [one.raw for answer in answers for one in answer.out]
            assert len(out) == len(parts), [answer.line for answer in answers]
            assert read(joined(out)).payload == bytes(range(100))
        assert causes(bench)["fragment"] > 0


def test_endpoint_independent_mappings_are_as_with_one_worker(workers: Start) -> None:
    """One outside port for all remotes, hairpins, the limit of a host: exact, for one worker keeps all."""
    config = configuration(EIM, extra="limits: {sessions_per_host: 6}")
    with workers(config, 4, "turns") as bench:
        first = outside(ask(bench, 1))
        for remote in range(1, 5):
            assert outside(bench.send(udp(f"100.64.0.2:4000 > 192.0.2.{remote}:53"))) == first
        other = outside(ask(bench, 7))
        hairpin = bench.send(udp(f"100.64.0.2:4000 > {other}"))
        assert (hairpin.out[0].interface, hairpin.packet.source) == ("inside0", first)
        assert hairpin.packet.destination == "100.64.0.8:4000"
        assert bench.send(udp("100.64.0.2:4000 > 192.0.2.9:9")).reason == "host_sessions"
        assert set(causes(bench)) == {"kept"}


def test_a_pool_that_would_move_between_all_workers_and_one_needs_a_restart(
    workers: Start, tmp_path: Path
) -> None:
    with workers(configuration(ED), 2) as bench:
        (tmp_path / "dsnatd.yaml").write_text(configuration(EIM))
        answer = bench.ctl(cmd="reload")
        assert not answer["ok"]
        assert "restart" in answer["error"]
        (tmp_path / "dsnatd.yaml").write_text(configuration(ED, "drain: [203.0.113.1]"))
        assert bench.ctl(cmd="reload")["ok"]


def test_sessions_live_on_when_a_reload_gives_their_host_another_place(
    workers: Start, tmp_path: Path
) -> None:
    """A static mapping decides where its host's packets belong; what the host had before stays in place."""
    with workers(configuration(ED), 5, "turns") as bench:
        given = [outside(ask(bench, 1, port)) for port in range(4000, 4020)]
        rules = [
            f"  - {{inside: 100.64.0.2, outside: 203.0.113.{1 + port % 4}, protocol: udp, port: {port}}}"
            for port in range(4000, 4020)
        ]
        (tmp_path / "dsnatd.yaml").write_text(configuration(ED, extra="static:\n" + "\n".join(rules)))
        assert bench.ctl(cmd="reload")["ok"]
        assert [outside(ask(bench, 1, port)) for port in range(4000, 4020)] == given
        assert causes(bench)["away"] > 0


def test_reload_with_cut_ends_the_sessions_of_every_worker_on_addresses_that_are_gone(
    workers: Start, tmp_path: Path
) -> None:
    with workers(configuration(ED), 5, "turns") as bench:
        given = [outside(ask(bench, host)) for host in range(80)]
        (tmp_path / "dsnatd.yaml").write_text(configuration(ED, addresses="203.0.113.2-203.0.113.4"))
        assert bench.ctl(cmd="reload", cut=True)["ok"]
        stay = [source for source in given if not source.startswith("203.0.113.1:")]
        assert len(stay) < len(given)
        assert sorted(one["outside"] for one in bench.sessions()) == sorted(stay)
        assert [outside(ask(bench, host)) for host in range(80) if given[host] in stay] == stay
