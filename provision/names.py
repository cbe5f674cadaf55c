"""Names that lead somewhere: a zone's pool, a gateway's pair, a site, a jump host.

Looked up in the plain data, before there is a Fleet: a name that does not exist is said together with what is
wrong in form, and not only once that has been mended.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from provision.load import Loc, Problem, Source

Reference = tuple["Loc", Any, str]
"""Where it stands, the name, and the map at the top that should have it."""


def unknown_names(data: Any, at: Source) -> Iterator[Problem]:
    for loc, name, table in _references(data):
        known = _map(data, table)
        if not isinstance(name, str) or name in known:
            continue  # what is not text, the model says
        guess = difflib.get_close_matches(name, list(known), n=1)
        hint = f'did you mean "{guess[0]}"?' if guess else f"add it under {table}:"
        yield at.problem(loc, f'there is no {table[:-1]} "{name}"; {hint}')


def _references(data: Any) -> Iterator[Reference]:
    defaults = _map(data, "defaults")
    yield from _of_logging(("defaults",), defaults)
    yield ("defaults", "ssh", "jump"), _map(defaults, "ssh").get("jump"), "jumps"
    for name, site in _map(data, "sites").items():
        yield ("sites", name, "jump"), _get(site, "jump"), "jumps"
    for kind in ("clusters", "pairs", "gateways"):
        for name, service in _map(data, kind).items():
            where = (kind, name)
            for i, zone in enumerate(_list(service, "zones")):
                yield (*where, "zones", i, "pool"), _get(zone, "pool"), "pools"
            yield from _of_logging(where, service)
            yield (*where, "site"), _get(service, "site"), "sites"
            if kind == "gateways":
                yield (*where, "pair"), _get(service, "pair"), "pairs"
                yield (*where, "ssh", "jump"), _map(service, "ssh").get("jump"), "jumps"


def _of_logging(where: Loc, service: Any) -> Iterator[Reference]:
    for i, collector in enumerate(_list(service, "logging")):
        for k, pool in enumerate(_list(collector, "pools")):
            yield (*where, "logging", i, "pools", k), pool, "pools"


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, Mapping) else None


def _map(data: Any, key: str) -> Mapping[str, Any]:
    value = _get(data, key)
    return value if isinstance(value, Mapping) else {}


def _list(data: Any, key: str) -> list[Any]:
    value = _get(data, key)
    return value if isinstance(value, list) else []
