"""`dsnatctl show sync`: is the peer's table equal to ours?"""

from __future__ import annotations

from collections.abc import Iterator

from dsnatctl.client import Json

RANGE = 1024  # sessions' places that are compared at once


def sync(answer: Json) -> Iterator[str]:
    if not answer["configured"]:
        yield "no peer is configured; see `sync` in the engine's configuration"
        return
    yield verdict(answer)
    for number in answer["differing_ranges"]:
        first, last = number * RANGE, number * RANGE + RANGE - 1
        yield f"range {number} (places {first} to {last}) differs; it is told again"
    yield (
        f"lag: {answer['waiting']} changes wait, {answer['on_the_way']} are on their way, "
        f"the oldest for {answer['lag_ms']} ms; the peer has {answer['peer_waiting']} for us"
    )
    if "compared_all_ms" in answer:
        when = f"all {answer['ranges']} ranges within the last {answer['compared_all_ms'] / 1000:.1f} s"
    else:
        when = f"not all {answer['ranges']} ranges yet"
    yield f"compared: {when}; {answer['compared']} in all, {answer['repaired']} told again"
    each = answer["bytes_out"] / answer["told"] if answer["told"] else 0
    yield (
        f"told {answer['told']} changes ({each:.0f} bytes each, all traffic counted), "
        f"heard {answer['heard']}; {answer['told_again']} datagrams lost"
    )
    if not answer.get("same_pools", True):
        yield "the peer has other pools or zones than we have: push the same configuration to both"
    if answer.get("peer_exhausted"):
        yield "the peer refuses sessions: its pools have no port left"
    if answer["conflicts"]:
        yield (
            f"{answer['conflicts']} sessions of the peer were refused: ours in their place were used later; "
            f"the last was {answer['last_conflict']}"
        )
    if answer["other_version"]:
        yield (
            f"{answer['other_version']} datagrams were of version {answer['peer_version']} of the sync: "
            "give both gateways the same release"
        )
    for key, what in (
        ("table_full", "sessions of the peer found no room: give both gateways the same engine.max_sessions"),
        ("not_authentic", "datagrams were not from our peer: is the key the same on both?"),
        ("invalid", "changes made no sense: do both run the same version?"),
    ):
        if answer[key]:
            yield f"{answer[key]} {what}"


def verdict(answer: Json) -> str:
    if not answer["connected"]:
        ago = f", silent for {answer['heard_ms'] / 1000:.1f} s" if "heard_ms" in answer else ""
        return f"NOT IN SYNC: the peer is not heard{ago}"
    if answer["in_sync"]:
        return "in sync, 0 differences"
    if not answer["told_all"]:
        return "NOT IN SYNC: the peer is being told of all sessions"
    if not answer["heard_all"]:
        return "NOT IN SYNC: the peer has not told of all its sessions yet"
    return f"NOT IN SYNC: {answer['differences']} ranges differ"
