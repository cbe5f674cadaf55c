"""The bill of a change before it is made: what differs, and which sessions would lose their address."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsnatctl.client import Engine, Json


def ask(engine: Engine, file: str, text: str) -> Json:
    """All pages of the answer, added up."""
    whole: Json = {}
    hosts: set[str] = set()
    gone = draining = drained_s = 0
    for page in engine.pages(cmd="plan", file=file, text=text):
        whole = whole or page
        gone += page["sessions_gone"]
        draining += page["sessions_draining"]
        drained_s = max(drained_s, page["drained_s"])
        hosts.update(page["hosts"])
    whole.pop("next", None)
    whole.pop("hosts")
    changes = list(differences(whole.pop("running"), whole.pop("candidate")))
    return {
        **whole,
        "changes": changes,
        "sessions_gone": gone,
        "sessions_draining": draining,
        "drained_s": drained_s,
        "hosts": len(hosts),
    }


def differences(running: Json, candidate: Json) -> Iterator[str]:
    """One line per thing that changes: + new, - gone, ~ different."""
    for section in ("engine", "limits", "timeouts"):
        for key, value in candidate[section].items():
            if running[section][key] != value:
                yield f"~ {section}.{key}: {running[section][key]} -> {value}"
    for key in ("tcp_midflow", "refusal", "other_protocols", "port_control", "degraded"):
        if running[key] != candidate[key]:
            yield f"~ {key}: {running[key]} -> {candidate[key]}"
    before, after = (side.get("sync", {}) for side in (running, candidate))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"~ sync.{key}: {_word(before.get(key))} -> {_word(after.get(key))}"
    yield from _named("interface", running["interfaces"], candidate["interfaces"])
    yield from _named("pool", running["pools"], candidate["pools"])
    yield from _ordered("zone", running["zones"], candidate["zones"])
    yield from _ordered("static", running["static"], candidate["static"])
    yield from _ordered("collector", running["logging"], candidate["logging"])


def _named(what: str, old: list[Json], new: list[Json]) -> Iterator[str]:
    before, after = ({one["name"]: one for one in side} for side in (old, new))
    for name, one in after.items():
        if name not in before:
            yield f"+ {what} {name}: {_words(one)}"
            continue
        for key in sorted(before[name].keys() | one.keys()):
            if before[name].get(key) != one.get(key):
                yield f"~ {what} {name}.{key}: {_word(before[name].get(key))} -> {_word(one.get(key))}"
    yield from (f"- {what} {name}" for name in before if name not in after)


def _ordered(what: str, old: list[Json], new: list[Json]) -> Iterator[str]:
    """Order counts: the first match wins."""
    before, after = ([_words(one) for one in side] for side in (old, new))
    yield from (f"+ {what} {place}: {one}" for place, one in enumerate(after, 1) if one not in before)
    yield from (f"- {what}: {one}" for one in before if one not in after)
    kept = [one for one in before if one in after]
    if kept != [one for one in after if one in before]:
        yield f"~ {what}s change their order"


def _words(one: Json) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in one.items() if key != "name")


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return f"{value['range']} (weight {value['weight']})"
    return " ".join(map(_word, value)) if isinstance(value, list) else str(value)


def lines(answer: Json) -> Iterator[str]:
    yield from answer["changes"] or ["nothing changes"]
    if answer["restart"]:
        yield f"reload will refuse it: {answer['why_restart']}"
    touched = answer["sessions_gone"] + answer["sessions_draining"]
    if touched:
        yield (
            f"{touched} live sessions of {answer['hosts']} hosts are on addresses that take no new ones: "
            f"{answer['sessions_gone']} on addresses that leave their pool, "
            f"{answer['sessions_draining']} on addresses that drain"
        )
        yield (
            f"reload lets them live on: the last one ends in {answer['drained_s']} s if no packet comes; "
            f"reload --cut ends the {answer['sessions_gone']} on addresses that leave at once"
        )
    else:
        yield "no live session loses its address"
