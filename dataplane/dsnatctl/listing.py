"""ipvsadm's listings, column for column as the original printed them, and right where it mixed them up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network
from pathlib import Path

from dsnatctl.client import Engine, Json
from dsnatctl.rules import Rules, addresses

SERVICE = "0.0.0.0:0"
ANYBODY = "0.0.0.0/0"
ZERO = Path("/run/dsnatd/ipvsadm.json")  # the counters at the last -Z: the engine's own never go back
PROTOCOLS = {"t": "tcp", "u": "udp"}
TIMEOUTS = ("tcp_established", "tcp_closing", "udp")
LIST_ROW = "{:<30} {:<8} {:<20} {:<10} {:<10}"
LADDR_ROW = "{:<20} {:<8} {:<20} {:<10} {:<10}"


def shortened(number: int, width: int, *, exact: bool) -> str:
    """As the original: from a hundred million on in K, M, G, T."""
    for limit, unit, letter in (
        (10**14, 10**12, "T"),
        (10**11, 10**9, "G"),
        (10**9, 10**6, "M"),
        (10**8, 10**3, "K"),
    ):
        if number >= limit and not exact:
            return f"{number // unit:>{width - 1}}{letter}"
    return f"{number:>{width}}"


def title(status: Json) -> str:
    return f"IP Virtual Server version 1.2.1 (size={status['max_sessions']})"


def services(status: Json, protocols: Sequence[str]) -> Iterator[str]:
    yield title(status)
    yield "Prot LocalAddress:Port Scheduler Flags"
    yield "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn"
    yield from (f"{protocol.upper()}  {SERVICE} rr" for protocol in protocols)


FIGURES = ("sessions_created", "packets_out", "packets_in", "bytes_out", "bytes_in")  # In is from inside


def figures(
    status: Json, values: dict[str, list[int]], names: Sequence[str], *, exact: bool = False
) -> Iterator[str]:
    yield title(status)
    yield "{:<33} {:>8} {:>8} {:>8} {:>8} {:>8}".format("Prot LocalAddress:Port", *names)
    yield "  -> RemoteAddress:Port"
    for protocol, row in values.items():
        numbers = "".join(shortened(number, 9, exact=exact) for number in row)
        yield f"{f'{protocol.upper()}  {SERVICE}':<33}{numbers}"


def traffic(engine: Engine) -> dict[str, list[int]]:
    counted = engine.ask(cmd="show", what="counters")["counters"]["traffic"]
    return {protocol: [counted[protocol][name] for name in FIGURES] for protocol in PROTOCOLS.values()}


def since_zero(now: dict[str, list[int]]) -> dict[str, list[int]]:
    try:
        zero = json.loads(ZERO.read_text())
        left = {p: [a - b for a, b in zip(now[p], zero[p], strict=True)] for p in now}
    except (OSError, ValueError, KeyError, TypeError):
        return now
    # a restarted engine counts from the beginning
    return left if all(number >= 0 for numbers in left.values() for number in numbers) else now


def local_addresses(rules: Rules, pools: Json, *, of_service: bool) -> Iterator[str]:
    """-G"""
    views = {a["address"]: a for pool in pools["pools"] for a in pool["addresses"]}
    zones = [z for z in rules.zones if not of_service or z["source"] == ANYBODY]
    row = LADDR_ROW if of_service else LIST_ROW
    if zones:
        head = "VIP:VPORT" if of_service else "NET/MASK"
        yield row.format(head, "TOTAL", "SNAT_IP", "CONFLICTS", "CONNS")
    for zone in zones:
        own = list(addresses(rules.pool(zone["pool"]))) if "pool" in zone else []
        name = SERVICE if of_service else IPv4Network(zone["source"]).with_netmask
        yield f"{name:<{20 if of_service else 30}} {len(own):<8} "
        for address in own:
            view = views.get(address, {"refused": 0, "sessions": 0})
            yield row.format("", "", address, view["refused"], view["sessions"])


STATES = {"opening": "SYN_SENT", "established": "ESTABLISHED", "closing": "FIN_WAIT"}


def connections(pages: Iterator[Json]) -> Iterator[str]:
    """The original's columns, holding what their names say: here `virtual` is the public address."""
    yield "IPVS connection entries"
    yield "pro expire state       source             virtual            destination"
    for page in pages:
        for s in page["sessions"]:
            protocol = s["protocol"].upper()
            state = STATES.get(s["state"], protocol)
            expires = f"{s['expires_s'] // 60:02}:{s['expires_s'] % 60:02}"
            begin = f"{protocol:<3} {expires}"  # ICMP, which the original did not know, keeps the columns
            yield f"{begin:<10} {state:<11} {s['inside']:<18} {s['outside']:<18} {s['remote']}"


def timeouts(rules: Rules) -> str:
    return " ".join(rules.config["timeouts"][name].removesuffix("s") for name in TIMEOUTS)


def saved(rules: Rules) -> Iterator[str]:
    """Commands that make these zones and addresses again."""
    yield from (f"-A -{option} {SERVICE} -s rr" for option in PROTOCOLS)
    for zone in rules.zones:
        yield f"-K --zone {zone['source']}"
        if "pool" in zone:
            for address in addresses(rules.pool(zone["pool"])):
                yield f"-P --zone {zone['source']} -z {address}"
    yield f"--set {timeouts(rules)}"
