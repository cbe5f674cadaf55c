"""What BIRD says of its neighbours, and who else announces our addresses."""

from __future__ import annotations

import re
from ipaddress import IPv4Network

from .announce import announced
from .protocol import Json
from .services import BGP
from .state import State


def routing_facts(state: State) -> Json:
    """Never fails: `error` says why there is nothing."""
    status, text = state.machine.run(["birdc", "-r", "show", "protocols", "all"], 10.0)
    if status != 0:
        return {"error": text.splitlines()[-1] if text else f"birdc ended with {status}"}
    _, doubles = state.machine.run(["birdc", "-r", "show", "route", "filtered"], 10.0)
    own = announced(state.generations / "current" / BGP)
    return {"neighbors": neighbors_in(text), "doubles": doubles_in(doubles, own)}


def neighbors_in(text: str) -> list[Json]:
    """The BGP protocols of `show protocols all`."""
    found: list[Json] = []
    for block in re.split(r"(?m)^(?=\S)", text):
        head = re.match(r"(\S+)\s+BGP\s+\S+\s+\S+\s+(?:\d{4}-\d\d-\d\d )?[\d:.-]+\s*(\S*)", block)
        if head is None:
            continue

        def said(key: str, block: str = block) -> str:
            match = re.search(rf"(?m)^\s+{key}:\s+(.*?)\s*$", block)
            return match[1] if match else ""

        found.append(
            {
                "name": head[1],
                "state": head[2] or "Down",
                "address": said("Neighbor address").partition("%")[0],
                "as": said("Neighbor AS"),
                "error": said("Last error"),
            }
        )
    return found


def doubles_in(text: str, own: list[IPv4Network]) -> list[str]:
    """Prefixes of our slice among those that bird.conf refused: somebody else announces them."""
    heard = {IPv4Network(p) for p in re.findall(r"(?m)^([\d./]+)\s.*?\[outside\S* [^]]*\]", text)}
    return sorted(str(net) for net in heard if any(net.overlaps(mine) for mine in own))
