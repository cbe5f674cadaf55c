"""All that may happen to a pair, one after the other, under a crowd of connections: `python -m tests.faults`.

Each fault is a generator: what it yields names a phase that has just ended, in which traffic goes again.
After each phase the client is asked what it saw: connections lost, and how long it was dark (tests/crowd.py).
The kernel's own word tells for how long both gateways had the address while both could be heard; then the
gateways compare their tables, range by range.

The default of 10,000 idle and 1,000 active connections takes some minutes; `--only` names faults, `--advert`
the seconds between keepalived's adverts. Run it as root with a built engine: `make build`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.crowd import Crowd
from tests.lab import new_lab, wait_until
from tests.pair import Pair, new_pair
from tests.traffic import SERVER

ROOT = Path(__file__).resolve().parents[1]
SETTLE_S = 1.0  # of traffic after a phase, so that what was late is seen
RESTART_S = 0.1  # until systemd starts a dead service again: RestartSec= of the units

Phases = Iterator[str]


@dataclass(frozen=True)
class Row:
    fault: str
    phase: str
    lost: int
    of: int
    moved: int
    stream_s: float
    ping_s: float
    active_s: float
    two_masters_s: float
    told_again: int  # datagrams of the sync that had to be told again
    repaired: int  # ranges that the comparison found different, and mended
    differ: int  # at the end
    why: str  # the first ones that were lost

    def text(self) -> str:
        return (
            f"{self.fault + ': ' + self.phase:58} {self.lost:4} of {self.of}  moved {self.moved}  "
            f"dark {self.stream_s:6.3f} {self.ping_s:6.3f} {self.active_s:6.3f} s  "
            f"two masters {self.two_masters_s:5.2f} s  repaired {self.repaired}  "
            f"differ {self.differ}  {self.why}".rstrip()
        )


def resume(pair: Pair) -> None:
    """As systemd does for what was killed."""
    time.sleep(RESTART_S)


def backup_takes_over(pair: Pair) -> None:
    wait_until("b to be master", lambda: pair.b.is_master() and pair.b.ours(), deadline_s=30)


# --- the faults -----------------------------------------------------------------------------------


def engine_killed(pair: Pair) -> Phases:
    pair.a.kill_engine()
    resume(pair)
    pair.a.start_engine()
    yield "kill -9 of the master's, started again"
    pair.b.kill_engine()
    resume(pair)
    pair.b.start_engine()
    yield "kill -9 of the backup's, started again"


def keepalived_killed(pair: Pair) -> Phases:
    pair.a.kill_keepalived()
    time.sleep(RESTART_S)
    pair.a.start_keepalived()
    wait_until("a to be elected again", pair.a.is_elected, deadline_s=30)
    pair.settle()
    yield "kill -9 of the master's, started again"
    pair.a.kill_keepalived()
    backup_takes_over(pair)
    yield "kill -9 of the master's, stays away"
    pair.a.start_keepalived()
    wait_until("a to be elected again", pair.a.is_elected, deadline_s=30)
    pair.settle()
    yield "is back"


def power_off(pair: Pair) -> Phases:
    pair.a.power_off()
    backup_takes_over(pair)
    yield "master without power"
    pair.a.power_on()
    pair.settle()
    yield "boots with an empty table, and takes over again"


def frozen(pair: Pair) -> Phases:
    pair.a.freeze()
    backup_takes_over(pair)
    yield "SIGSTOP of the whole master"
    pair.a.thaw()
    pair.settle()
    yield "goes on"


def cable(side: str) -> Callable[[Pair], Phases]:
    def pulled(pair: Pair) -> Phases:
        pair.a.pull(side)
        if side == "sync":
            wait_until("the silence to be seen", lambda: not pair.a.gateway.show("sync")["connected"])
            assert pair.a.is_master(), "a broken sync link moved the address"
        else:
            backup_takes_over(pair)
        yield "pulled"
        pair.a.plug(side)
        pair.settle()
        yield "plugged"

    return pulled


def loss(percent: int) -> Callable[[Pair], Phases]:
    rule = ("INPUT", "-i", "sync0", "-m", "statistic", "--mode", "random", "--probability")

    def lossy(pair: Pair) -> Phases:
        more = (*rule, str(percent / 100), "-j", "DROP")
        for peer in (pair.a, pair.b):
            peer.gateway.space.run("iptables", "-A", *more)
        try:
            yield "begins, and 200 connections more"
            wait_until("both to be in sync", lambda: pair.a.in_sync() and pair.b.in_sync(), deadline_s=60)
            pair.a.fall_silent()
            backup_takes_over(pair)
            yield "and the master falls silent"
            pair.a.return_()
            pair.settle()
            yield "and it returns"
        finally:
            for peer in (pair.a, pair.b):
                peer.gateway.space.run("iptables", "-D", *more)

    return lossy


def backup_rebooted(pair: Pair) -> Phases:
    pair.b.power_off()
    pair.b.power_on()
    pair.settle()
    yield "while traffic runs"
    pair.a.fall_silent()
    backup_takes_over(pair)
    yield "then the master falls silent"
    pair.a.return_()
    pair.settle()
    yield "and returns"


def flapping(pair: Pair) -> Phases:
    for _ in range(10):
        pair.a.pull("in")
        time.sleep(0.3)
        pair.a.plug("in")
        time.sleep(0.3)
    pair.settle()
    yield "ten times in 6 s"


def upgraded(pair: Pair) -> Phases:
    pair.b.stop_engine()
    pair.b.start_engine(pair.upgrade_to)
    pair.settle()
    yield "the backup"
    pair.a.drain.write_text("1\n")
    pair.settle(pair.b)
    yield "the master is drained"
    pair.a.stop_engine()
    pair.a.start_engine(pair.upgrade_to)
    wait_until("both to be in sync", lambda: pair.a.in_sync() and pair.b.in_sync(), deadline_s=60)
    pair.a.drain.write_text("0\n")
    pair.settle()
    yield "the master, and it takes over again"


def both_down(pair: Pair) -> Phases:
    for peer in (pair.a, pair.b):
        peer.kill_engine()
    resume(pair)
    for peer in (pair.a, pair.b):
        peer.start_engine()
    pair.settle()
    yield "kill -9 of both engines, started again"
    for peer in (pair.a, pair.b):
        peer.kill_keepalived()
        peer.kill_engine()
    resume(pair)
    for peer in (pair.a, pair.b):
        peer.start_engine()
        peer.start_keepalived()
    pair.settle()
    yield "kill -9 of both engines and both keepalived, started again"


FAULTS: dict[str, Callable[[Pair], Phases]] = {
    "engine": engine_killed,
    "keepalived": keepalived_killed,
    "power": power_off,
    "freeze": frozen,
    "inside": cable("in"),
    "outside": cable("out"),
    "sync": cable("sync"),
    "loss-1": loss(1),
    "loss-10": loss(10),
    "loss-30": loss(30),
    "reboot": backup_rebooted,
    "flapping": flapping,
    "upgrade": upgraded,
    "both": both_down,
}


# --- the table ------------------------------------------------------------------------------------


def counted(pair: Pair, key: str) -> int:
    return sum(int(peer.gateway.show("sync")[key]) for peer in (pair.a, pair.b))


def table(pair: Pair, crowd: Crowd, faults: Sequence[str]) -> Iterator[Row]:
    for name in faults:
        phases = FAULTS[name](pair)
        began_s = time.time()
        crowd.say("mark")
        for phase in phases:
            time.sleep(SETTLE_S)
            dark = crowd.say("dark")
            if name.startswith("loss") and phase.startswith("begins"):
                crowd.say("more 200")
                crowd.of += 200
            asked = crowd.say("ask")
            both = [peer.gateway.show("sync") for peer in (pair.a, pair.b) if peer.answers()]
            if len(both) == 2 and all(one["connected"] for one in both):
                pair.equal()
                both = [peer.gateway.show("sync") for peer in (pair.a, pair.b)]
            yield Row(
                name,
                phase,
                asked["lost"],
                crowd.of,
                asked["moved"],
                dark["stream"],
                dark["ping"],
                dark["active"],
                round(pair.two_masters_s(began_s), 2),
                sum(int(one["told_again"]) for one in both),
                sum(int(one["repaired"]) for one in both),
                sum(int(one["differences"]) for one in both),
                "; ".join(asked["why"]),
            )
            began_s = time.time()
            crowd.say("mark")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--active", type=int, default=1_000)
    parser.add_argument("--streams", type=int, default=10)
    parser.add_argument("--pings", type=int, default=2)
    parser.add_argument("--advert", type=float, default=0.1, help="seconds between adverts")
    parser.add_argument("--engine", type=Path, default=ROOT / ".build/engine/dsnatd")
    parser.add_argument("--upgrade-to", type=Path, help="another build; else the same one is started again")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--keep-logs", type=Path, help="folder for the programs' logs")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="dsnat-faults-") as folder:
        with new_lab(args.keep_logs or Path(folder)) as lab:
            pair = new_pair(lab, args.engine, advert_s=args.advert, sessions=65536)
            pair.upgrade_to = args.upgrade_to
            crowd = Crowd(
                pair.client, pair.server, SERVER, idle=args.idle, active=args.active,
                streams=args.streams, pings=args.pings,
            )  # fmt: skip
            pair.equal()
            print(
                f"{crowd.of} connections, adverts each {args.advert:g} s; dark: stream, ping, active",
                flush=True,
            )
            rows = []
            for row in table(pair, crowd, args.only):
                print(row.text(), flush=True)
                rows.append(row)
            pair.close()
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if not any(row.lost or row.moved or row.differ for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
