"""Who must agree before a change is kept: the engine, keepalived, the VRRP peer, BGP, and a probe outside.

That a pair's addresses are in the right place is not enough right after a change: a backup that no longer
hears its master takes a moment to notice. So a backup must hear the master's adverts, on every interface on
which it heard them before; and a master that its peer does not hear is looked at again after the time in
which a well peer would have taken over. One that was ill before the change does not stop it.
"""

from __future__ import annotations

from contextlib import suppress

from provision.model import Fleet
from provision.plan import Running
from provision.push import FACTS_S, AgentRefused, Dial, Remote, Witness
from provision.render import Rendered
from provision.ssh import GatewayError
from provision.values import milliseconds


def witnesses(fleet: Fleet, before: Running, rendered: Rendered, dial: Dial) -> Witness:
    """Who must agree before a change is kept: the engine, keepalived, the VRRP peer, the BGP neighbours that
    were there before, and a probe outside.

    The addresses must be on exactly one of a pair, all of them; on a lone gateway, on itself. A backup has
    no way out to prove: the probe is for who carries the traffic."""
    name, addresses = before.gateway, list(rendered.vrrp)
    met = {n["address"] for n in _neighbors(before) if n["state"] == "Established"}
    peer = fleet.peer_of(name)
    deaf_before: set[str] = set()
    if peer is not None and not before.holds(addresses) and _keepalived_of(before) == "active":
        with suppress(GatewayError), dial(name) as remote:
            deaf_before = _deaf(fleet, name, remote)

    def probe(remote: Remote) -> str | None:
        if not rendered.probes:
            return None
        try:
            request = {"do": "probe", "addresses": list(rendered.probes)}
            answers = remote.ask(request, deadline_s=FACTS_S)["answers"]
        except AgentRefused as error:
            return str(error)
        silent = [address for address, good in answers.items() if not good]
        return f"{', '.join(silent)} does not answer from {name}" if silent else None

    def look(running: Running, remote: Remote) -> str | None:
        engine = running.facts.get("engine", {})
        if "error" in engine:
            return f"the engine does not answer: {engine['error']}"
        if engine.get("status", {}).get("equation") is False:
            return "the engine's packets do not add up (dsnatctl show counters)"
        lost = [n for n in _neighbors(running) if n["address"] in met and n["state"] != "Established"]
        if lost:
            return f"BGP to {lost[0]['address']} is {lost[0]['state']}, and was established before"
        if not addresses:
            return probe(remote)
        active = _keepalived_of(running)
        if active != "active":
            return f"keepalived is {active}"
        mine = running.holds(addresses)
        if mine or peer is None:
            silent = probe(remote)
            if silent is not None:
                return silent
        if mine not in (0, len(addresses)):
            return f"{name} holds {mine} of {len(addresses)} VRRP addresses"
        if peer is None:
            return None if mine else f"{name} does not hold its VRRP addresses yet"
        try:
            with dial(peer) as there:
                other = Running(peer, there.ask({"do": "facts"}, deadline_s=FACTS_S))
                theirs = other.holds(addresses)
                if bool(mine) == bool(theirs):
                    who = "both of the pair hold" if mine else "neither of the pair holds"
                    return f"{who} the VRRP addresses"
                if mine and _keepalived_of(other) == "active" and _deaf(fleet, peer, there):
                    # It has waited for as long as VRRP does: a peer that is well is master now.
                    other = Running(peer, there.ask({"do": "facts"}, deadline_s=FACTS_S))
                    if other.holds(addresses):
                        return f"{peer} does not hear {name} and has the VRRP addresses too"
                deaf = set() if mine else _deaf(fleet, name, remote) - deaf_before
                if deaf:
                    return f"{name} hears no VRRP adverts of {peer} on {', '.join(sorted(deaf))}"
        except GatewayError as error:
            # A peer that is down cannot be asked; then this one must carry the addresses alone.
            return None if mine else f"the peer {peer} was not reached ({error}) and {name} is not master"
        copied = running.facts.get("engine", {}).get("sync", {})
        was = before.facts.get("engine", {}).get("sync", {})
        if was.get("in_sync") and copied.get("configured") and not copied.get("in_sync"):
            return f"{name} and {peer} do not have the same sessions yet"
        return None

    return look


def _keepalived_of(running: Running) -> str | None:
    active: str | None = running.facts.get("units", {}).get("keepalived")
    return active


def _deaf(fleet: Fleet, listener: str, remote: Remote) -> set[str]:
    """The interfaces on which it does not hear a master that is not itself."""
    vrrp = fleet.service_of(listener).vrrp
    if vrrp is None:
        return set()
    slowest = max(milliseconds(i.advert_interval or vrrp.advert_interval) for i in vrrp.instances.values())
    # Three adverts may be missed before a backup takes over.
    request = {
        "do": "adverts",
        "ids": sorted({i.id for i in vrrp.instances.values()}),
        "wait_s": min(25, 3 * slowest // 1000 + 1),
    }
    try:
        heard = remote.ask(request, deadline_s=FACTS_S)["heard"]
    except AgentRefused:
        return set()  # an image of before does not know how to listen
    return {interface for interface, i in vrrp.instances.items() if str(i.id) not in heard}


def _neighbors(running: Running) -> list[dict[str, str]]:
    found: list[dict[str, str]] = running.facts.get("routing", {}).get("neighbors", [])
    return found
