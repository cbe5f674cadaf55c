"""Answers of the engine as text for people. Each function takes the answer and gives lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dsnatctl.client import Json

WORST = 5  # destinations below the pools
SESSION = "{:<5} {:<21} {:<21} {:<21} {:<12} {:>7} {:>7} {:>8} {:>12} {:>12}  {}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Iterator[str]:
    """Columns as wide as they must be; the first `left` ones to the left, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *texts]) for i in range(len(head))]
    for line in [list(head), *texts]:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def sessions_head() -> str:
    return SESSION.format(
        "proto", "inside", "outside", "remote", "state", "age_s", "idle_s", "left_s", "out", "in", "pool"
    )


def sessions(answer: Json) -> Iterator[str]:
    """Without head and with fixed widths: pages are printed as they come."""
    for s in answer["sessions"]:
        yield SESSION.format(
            s["protocol"],
            s["inside"],
            s["outside"],
            s["remote"],
            s["state"],
            s["age_s"],
            s["idle_s"],
            s["expires_s"],
            s["bytes_out"],
            s["bytes_in"],
            s["pool"] or "(removed)",
        )


def pools(answer: Json) -> Iterator[str]:
    for pool in answer["pools"]:
        active = "" if pool["active"] else ", not active here"
        drains = f", {pool['n_draining']} draining" if pool["n_draining"] else ""
        yield (
            f"{pool['name']}: {pool['mapping']}, {pool['select']}, ports {pool['ports']}, "
            f"{pool['n_addresses']} addresses{drains}, {pool['sessions']} sessions{active}"
        )
        n_ports = pool["n_ports"] // pool["n_addresses"] if pool["n_addresses"] else 0
        rows = [
            (
                f"  {a['address']}",
                a["sessions"],
                *_ports_of(pool, a, n_ports),
                a["created"],
                a["refused"],
                "draining" if a["draining"] else "static" if a.get("reserved") else "",
            )
            for a in pool["addresses"]
        ]
        head = ("  address", "sessions", "ports used", "free", "created", "refused", "")
        yield from table(head, rows)
        if len(rows) < pool["n_addresses"]:
            yield f"  and {pool['n_addresses'] - len(rows)} more addresses; see --limit"
    if not answer["pools"]:
        yield "there is no pool"
    names = {pool["name"] for pool in answer["pools"]}
    worst = [row for row in answer.get("destinations", []) if row["pool"] in names][:WORST]
    if worst:
        yield ""
        yield "ports are scarce towards (see show destinations)"
        yield from destinations({"destinations": worst, "of": len(worst)})


def _ports_of(pool: Json, address: Json, n_ports: int) -> tuple[object, object]:
    """Of the protocol that has taken most. Where a port serves many remotes it is used and free at once: what
    counts then is the fullest destination.
    """
    if pool["mapping"] == "endpoint-dependent":
        return "per remote", n_ports
    used = max(address["mappings"].values())
    return used, n_ports - used


def zones(answer: Json) -> Iterator[str]:
    rows = [
        (
            number,
            zone["source"],
            zone.get("destination", "any"),
            zone.get("pool", zone["action"]),
            zone.get("mss_clamp", "-"),
            zone["created"],
            zone["refused"],
        )
        for number, zone in enumerate(answer["zones"], 1)
    ]
    yield from table(("#", "source", "destination", "goes to", "mss", "created", "refused"), rows, left=4)


def counters(answer: Json) -> Iterator[str]:
    c, meanings = answer["counters"], answer.get("meanings", {})
    rows = [
        ("received", c["received"], ""),
        ("taken over", c["taken_over"], "from other workers"),
        ("= forwarded", c["forwarded"], "translated and sent"),
        ("+ passed", c["passed"], "given to the kernel"),
        ("+ dropped", c["dropped"], "by reason below"),
        ("+ handed over", c["handed_over"], "to other workers"),
        ("+ held", c["held"], "now"),
    ]
    yield from _columns(rows)
    yield (
        "Every packet is accounted for."
        if answer["equation"]
        else "THE TWO SIDES DIFFER: this is a fault of the engine, please report it."
    )
    yield ""
    yield from _columns(
        [
            ("made", c["made"], "by the engine itself, such as ICMP errors"),
            ("sessions", c["sessions"], "now"),
            ("  created", c["sessions_created"], ""),
            ("  expired", c["sessions_expired"], ""),
            ("  closed", c["sessions_closed"], "by both ends, or cleared"),
        ]
    )
    yield from _allocation(c["allocation"])
    yield ""
    rows = [(name, *t.values()) for name, t in c["traffic"].items()]
    head = ("translated", "sessions made", "packets out", "packets in", "bytes out", "bytes in")
    yield from table(head, rows)
    causes = [(f"  {cause}", count, "") for cause, count in c["handed_over_by_cause"].items() if count]
    if causes:
        yield ""
        yield "handed over because (see the engine's README)"
        yield from _columns(causes)
    for verdict in ("drop", "pass"):
        rows = [
            (name, count, _sentence(meanings[name]))
            for name, count in c["reasons"].items()
            if count and meanings.get(name, {}).get("verdict") == verdict
        ]
        if rows:
            yield ""
            yield "dropped because" if verdict == "drop" else "passed because"
            yield from _columns([(f"  {name}", count, text) for name, count, text in rows])

    yield from _nat_log(answer.get("nat_log", {"workers": [], "collectors": []}))


def _allocation(latency: Json) -> Iterator[str]:
    """How long it takes to give a new session its address and port: half of them, 99 in 100, all."""
    count, seen, wanted, told = sum(n for _, n in latency["buckets"]), 0, [0.5, 0.99, 1.0], []
    for end_ns, n in latency["buckets"]:
        seen += n
        text = "more" if end_ns is None else f"{end_ns / 1000:g} us"
        while wanted and count and seen >= wanted[0] * count:
            told.append(text)
            wanted.pop(0)
    if told:
        yield f"  made within      {told[0]} (half), {told[1]} (99 in 100), {told[2]} (all)"


def _nat_log(log: Json) -> Iterator[str]:
    """What was told to collectors, and what was not: never silent."""
    lost = [
        (f"  {kind}", count, f"worker {w['worker']}: the log thread was too slow, give it a core")
        for w in log["workers"]
        for kind, count in w["lost"].items()
        if count
    ]
    if lost:
        yield ""
        yield "events lost before the NAT log"
        yield from _columns(lost)
    if not log["collectors"]:
        return
    rows = [
        (
            c["collector"],
            f"{c['protocol']}/{c['transport']}",
            "up" if c["up"] else c["why"] or "not yet",
            c["records_sent"],
            c["records_queued"],
            c["records_lost"],
            c["records_refused"],
            c["stalls"],
        )
        for c in log["collectors"]
    ]
    yield ""
    head = ("NAT log to", "by", "state", "records sent", "queued", "lost", "refused", "stalls")
    yield from table(head, rows, left=3)


def _sentence(reason: Json) -> str:
    return f"{reason['meaning']}; {reason['advice']}" if reason["advice"] else str(reason["meaning"])


def _columns(rows: Sequence[tuple[str, int, str]]) -> Iterator[str]:
    for name, count, text in rows:
        yield f"{name:<18} {count:>16}  {text}".rstrip()


def load(now: Json, before: Json | None = None) -> str:
    """How much of its time a worker has spent on packets, in all or since `before`."""
    then = before or {}
    spent = {key: now.get(key, 0) - then.get(key, 0) for key in ("work_ns", "busy_ns", "idle_ns")}
    time_ns = spent["busy_ns"] + spent["idle_ns"]
    return f"{min(100 * spent['work_ns'] / time_ns, 100):.1f} %" if time_ns > 0 else "-"


def workers(answer: Json) -> Iterator[str]:
    rows = []
    for w in answer["workers"]:
        if not w["answers"]:
            rows.append((w["worker"], *("-" * 11), "does not answer"))
            continue
        c = w["counters"]
        packets = w.get("packets", 0)
        rows.append(
            (
                w["worker"],
                w.get("core", "-") if w.get("core", -1) >= 0 else "-",
                load(w),
                c["received"],
                c["forwarded"],
                c["dropped"],
                c["sessions"],
                f"{w['cycles'] / packets:.0f}" if packets and w.get("cycles") else "-",
                f"{packets / w['bursts']:.1f}" if w.get("bursts") else "-",
                f"{w['longest_job_ns'] / 1000:.0f} us" if w.get("longest_job_ns") else "-",
                c["handed_over"],
                c["taken_over"],
                "" if w["equation"] else "equation broken",
            )
        )
    head = (
        "worker",
        "core",
        "load",
        "received",
        "forwarded",
        "dropped",
        "sessions",
        "cycles/packet",
        "packets/burst",
        "longest pause",
    )
    yield from table((*head, "handed over", "taken over", ""), rows)


def ports(answer: Json) -> Iterator[str]:
    rows = []
    for p in answer["ports"]:
        link = "-" if "up" not in p else f"up, {p['speed_mbps']} Mb/s" if p["up"] else "down"
        figures = [
            p.get(key, "-")
            for key in ("rx_packets", "rx_missed", "rx_errors", "tx_packets", "tx_errors", "mtu", "queues")
        ]
        rows.append(
            (p["name"], p["role"], p["path"], p["device"] or "-", link, p.get("twin") or "-", *figures)
        )
    head = ("port", "role", "path", "device", "link", "twin")
    yield from table((*head, "rx", "missed", "errors", "tx", "tx errors", "mtu", "queues"), rows, left=6)


def config(answer: Json) -> Iterator[str]:
    """As YAML that dsnatd takes: every value is a scalar or a list of scalars or maps."""
    yield f"# in force, defaults included; read from {answer['file']}"
    yield from yaml(answer["config"])


def yaml(config: Json) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, list):
            yield f"{key}:" if value else f"{key}: []"
            yield from (f"  - {_flow(one)}" for one in value)
        else:
            yield f"{key}: {_flow(value)}"


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    # a PCI address has colons, a DPDK device commas; nothing in the file needs more than quotes
    return f'"{value}"' if isinstance(value, str) and set(value) & set(":,") else str(value)


def status(answer: Json) -> Iterator[str]:
    uptime = f"running for {_time(answer['uptime_s'])}" if "uptime_s" in answer else "running"
    yield f"{answer['program']} {answer['version']}, {uptime}, configuration {answer['config']}"
    yield (
        f"{answer['workers']} workers, {answer['interfaces']} interfaces, {answer['pools']} pools, "
        f"{answer['zones']} zones"
    )
    yield f"{answer['sessions']} of {answer['max_sessions']} sessions"
    yield "every packet is accounted for" if answer["equation"] else "THE COUNTERS DO NOT ADD UP"
    if answer.get("degraded"):
        yield "DEGRADED: no DPDK, the kernel keeps all ports; read the journal, restart dsnat-nic and dsnatd"
    yield from problems(answer)


def with_time_to_full(before: Json, after: Json, seconds: float) -> Json:
    """The later answer, each row with how fast its ports go and when none will be left."""

    def key(row: Json) -> tuple[str, str, str]:
        return row["pool"], row["protocol"], row["remote"]

    used = {key(row): row["used"] for row in before["destinations"]}
    rows = []
    for row in after["destinations"]:
        rate = (row["used"] - used.get(key(row), row["used"])) / seconds
        full_in_s = round((row["ports"] - row["used"]) / rate) if rate > 0 else None
        rows.append(row | {"per_s": round(rate, 1), "full_in_s": full_in_s})
    return {**after, "destinations": rows}


def destinations(answer: Json) -> Iterator[str]:
    rows = []
    for row in answer["destinations"]:
        cells = [row["pool"], row["protocol"], row["remote"], row["addresses"], row["used"]]
        cells += [row["ports"] - row["used"], f"{100 * row['used'] / row['ports']:.0f} %"]
        if "per_s" in row:
            cells += [f"{row['per_s']:+g}", "-" if row["full_in_s"] is None else _time(row["full_in_s"])]
        rows.append(cells)
    head = ["pool", "proto", "remote", "addresses", "used", "free", "full"]
    if not rows:
        yield "ports are scarce towards no destination"
        return
    yield from table(head + (["per s", "full in"] if len(rows[0]) > len(head) else []), rows, left=3)
    if answer["of"] > len(rows):
        yield f"and {answer['of'] - len(rows)} more; see --limit"


def problems(answer: Json) -> Iterator[str]:
    """FILE:LINE:COL: what; what to do"""
    for p in answer.get("problems", []):
        place = f"{p['file']}:{p['line']}:{p['column']}" if p["line"] else p["file"]
        yield f"{place}: {'warning: ' if p['warning'] else ''}{p['text']}"


def _time(seconds: int) -> str:
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
