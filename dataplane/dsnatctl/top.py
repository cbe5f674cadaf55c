"""top: rates per worker, pool, reason and destination, from two looks at the engine.

`frame` makes the lines of one screen out of two samples and knows nothing of terminals; `live` shows them
with curses until q is pressed, and asks for no more than `--once` does. Nothing here costs a worker a burst:
every answer is made of counters.
"""

from __future__ import annotations

import curses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsnatctl import show
from dsnatctl.client import Engine, Json

WHATS = ("counters", "workers", "pools", "destinations")
ROWS = 8  # of each table


@dataclass(frozen=True)
class Sample:
    at_s: float
    status: Json
    shows: Json


def sample(engine: Engine) -> Sample:
    shows = {
        what: engine.ask(cmd="show", what=what, **({"explain": True} if what == "counters" else {}))
        for what in WHATS
    }
    return Sample(time.monotonic(), engine.ask(cmd="status"), shows)


def short(value: float) -> str:
    """At most five characters and a unit: 12345, 123k, 45.6M."""
    for unit in ("", "k", "M", "G", "T"):
        if value < (100_000 if not unit else 1000):
            return f"{value:.0f}{unit}" if value >= 100 or value == int(value) else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}P"


def frame(before: Sample, after: Sample) -> Iterator[str]:
    seconds = max(after.at_s - before.at_s, 1e-3)
    old, new = (one.shows["counters"]["counters"] for one in (before, after))

    def rate(key: str, a: Json = old, b: Json = new) -> float:
        return float(max(b.get(key, 0) - a.get(key, 0), 0) / seconds)

    status = after.status
    full = 100 * status["sessions"] / status["max_sessions"]
    yield (
        f"{status['program']} {status['version']}  {status['sessions']} sessions ({full:.1f} % of all)  "
        + ("every packet accounted for" if status["equation"] else "EQUATION BROKEN")
    )
    yield (
        f"packets/s {short(rate('received'))} in, {short(rate('forwarded'))} forwarded, "
        f"{short(rate('passed'))} passed, {short(rate('dropped'))} dropped   "
        f"bit/s {short(8 * rate('bytes_out'))} out, {short(8 * rate('bytes_in'))} in   "
        f"sessions/s {short(rate('sessions_created'))} new, {short(rate('sessions_expired'))} expired"
    )
    for part in (workers, pools, reasons, destinations):
        lines = list(part(before, after, seconds))
        if lines:
            yield ""
            yield from lines


def pairs(before: Sample, after: Sample, what: str, key: str) -> Iterator[tuple[Json, Json]]:
    old = {one[key]: one for one in before.shows[what][what]}
    for one in after.shows[what][what]:
        yield old.get(one[key], one), one


def workers(before: Sample, after: Sample, seconds: float) -> Iterator[str]:
    rows = []
    for a, b in pairs(before, after, "workers", "worker"):
        if not (a["answers"] and b["answers"]):
            rows.append([b["worker"], *"-----", "does not answer"])
            continue
        packets = b.get("packets", 0) - a.get("packets", 0)
        cycles = b.get("cycles", 0) - a.get("cycles", 0)
        rows.append(
            [
                b["worker"],
                show.load(b, a),
                short(packets / seconds),
                f"{cycles / packets:.0f}" if packets and cycles > 0 else "-",
                *(
                    short((b["counters"][key] - a["counters"][key]) / seconds)
                    for key in ("sessions_created", "dropped", "handed_over")
                ),
            ]
        )
    head = ("worker", "load", "packets/s", "cycles/packet", "new/s", "dropped/s", "handed over/s")
    yield from show.table(head, rows[:ROWS])


def pools(before: Sample, after: Sample, seconds: float) -> Iterator[str]:
    rows = []
    for a, b in pairs(before, after, "pools", "name"):
        new, refused = ((b[key] - a[key]) / seconds for key in ("created", "refused"))
        state = "" if b["active"] else "not active here"
        rows.append([b["name"], b["n_addresses"], b["sessions"], short(new), short(refused), state])
    rows.sort(key=lambda row: -int(row[2]))
    yield from show.table(("pool", "addresses", "sessions", "new/s", "no port/s", ""), rows[:ROWS])


def reasons(before: Sample, after: Sample, seconds: float) -> Iterator[str]:
    old, new = (one.shows["counters"] for one in (before, after))
    meanings: dict[str, Any] = new["meanings"]
    rows = []
    for name, count in new["counters"]["reasons"].items():
        if count and meanings[name]["verdict"] == "drop":
            grown = (count - old["counters"]["reasons"].get(name, 0)) / seconds
            rows.append((grown, count, name, meanings[name]["meaning"]))
    rows.sort(key=lambda row: (-row[0], -row[1]))
    if rows:
        table = [(name, short(grown), count, text) for grown, count, name, text in rows[:ROWS]]
        width = max(len(row[3]) for row in table)
        yield from show.table(
            ("dropped", "per s", "in all", "because".ljust(width)),
            [(*row[:3], row[3].ljust(width)) for row in table],
        )


def destinations(before: Sample, after: Sample, seconds: float) -> Iterator[str]:
    told = show.with_time_to_full(before.shows["destinations"], after.shows["destinations"], seconds)
    if told["destinations"]:
        told["destinations"] = told["destinations"][:ROWS]
        yield from show.destinations({**told, "of": len(told["destinations"])})


def once(engine: Engine, seconds: float) -> Sequence[str]:
    before = sample(engine)
    time.sleep(seconds)
    return list(frame(before, sample(engine)))


def live(engine: Engine, seconds: float) -> None:
    def run(screen: curses.window) -> None:
        curses.curs_set(0)
        screen.timeout(int(seconds * 1000))
        before = sample(engine)
        lines: Sequence[str] = ["looking ..."]
        while True:
            height, width = screen.getmaxyx()
            screen.erase()
            for row, line in enumerate(lines[: height - 1]):
                screen.addnstr(row, 0, line, width - 1)
            screen.addnstr(height - 1, 0, f"every {seconds:g} s; q ends", width - 1)
            screen.refresh()
            if screen.getch() in (ord("q"), ord("Q")):
                return
            after = sample(engine)
            lines = list(frame(before, after))
            before = after

    curses.wrapper(run)
