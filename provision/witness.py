"""Who must agree before a change is kept: the engine, keepalived, the VRRP peer, BGP, and a probe outside.

That a pair's addresses are in the right place is not enough right after a change: a backup that no longer
hears its master takes a moment to notice. So the one that is not master must have heard the other, on every
interface.
"""

from __future__ import annotations

from provision.model import Fleet, milliseconds
from provision.plan import Running
from provision.push import FACTS_S, AgentRefused, Dial, Remote, Witness
from provision.render import Rendered
from provision.ssh import GatewayError


def witnesses(fleet: Fleet, before: Running, rendered: Rendered, dial: Dial) -> Witness:
    """Who must agree before a change is kept: the engine, keepalived, the VRRP peer, the BGP neighbours that
    were there before, and a probe outside.

    The addresses must be on exactly one of a pair, all of them; on a lone gateway, on itself. A backup has
    no way out to prove: the probe is for who carries the traffic."""
    name, addresses = before.gateway, list(rendered.vrrp)
    met = {n["address"] for n in _neighbors(before) if n["state"] == "Established"}
    peer = fleet.peer_of(name)

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
        active = running.facts.get("units", {}).get("keepalived")
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
                if other.facts.get("units", {}).get("keepalived") == "active":
                    listener = (peer, name, there) if mine else (name, peer, remote)
                    deaf = _unheard(fleet, *listener)
                    if deaf is not None:
                        return deaf
        except GatewayError as error:
            # A peer that is down cannot be asked; then this one must carry the addresses alone.
            return None if mine else f"the peer {peer} was not reached ({error}) and {name} is not master"
        copied = running.facts.get("engine", {}).get("sync", {})
        was = before.facts.get("engine", {}).get("sync", {})
        if was.get("in_sync") and copied.get("configured") and not copied.get("in_sync"):
            return f"{name} and {peer} do not have the same sessions yet"
        return None

    return look


def _unheard(fleet: Fleet, listener: str, speaker: str, remote: Remote) -> str | None:
    """The interfaces on which one of a pair does not hear the other, which is master. None: there is none."""
    vrrp = fleet.service_of(listener).vrrp
    if vrrp is None:
        return None
    instances = vrrp.instances
    slowest = max(
        (milliseconds(i.advert_interval or vrrp.advert_interval) for i in instances.values()), default=0
    )
    # Three adverts may be missed before a backup takes over; then it would be too late
    request = {
        "do": "adverts",
        "ids": sorted({i.id for i in instances.values()}),
        "wait_s": min(25, 3 * slowest // 1000 + 1),
    }
    try:
        heard = remote.ask(request, deadline_s=FACTS_S)["heard"]
    except AgentRefused as refused:
        return None if refused.word == "usage" else str(refused)  # an image of before does not know how
    silent = [interface for interface, i in instances.items() if str(i.id) not in heard]
    return f"{listener} hears no VRRP adverts of {speaker} on {', '.join(silent)}" if silent else None


def _neighbors(running: Running) -> list[dict[str, str]]:
    found: list[dict[str, str]] = running.facts.get("routing", {}).get("neighbors", [])
    return found
