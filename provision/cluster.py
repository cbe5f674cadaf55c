"""Addresses that move from one gateway of a cluster to another: drain, move, announce, and the bill.

Pure. What runs is taken from the gateways' own word, not from a file, so a run that was cut goes on where the
addresses are. An address is announced by one gateway at a time: it first takes no new sessions where it is
(drain), then leaves (move), and only then comes up where it goes (announce). A gateway that was not reached
keeps what it may still announce: nobody else gets it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from provision import slices
from provision.load import replace_text
from provision.model import Fleet
from provision.plan import Running
from provision.render import ENGINE
from provision.slices import Range
from provision.values import span


@dataclass(frozen=True)
class Move:
    """Addresses, from whom to whom, and how many live sessions are on them."""

    pool: str
    ranges: tuple[Range, ...]
    source: str
    target: str
    sessions: int

    def __str__(self) -> str:
        where = ", ".join(slices.text(self.ranges))
        return f"{where} of pool {self.pool} from {self.source} to {self.target}: {self.sessions} sessions"

    def as_json(self) -> dict[str, object]:
        return {
            "pool": self.pool,
            "addresses": slices.text(self.ranges),
            "from": self.source,
            "to": self.target,
            "sessions": self.sessions,
        }


def pools_in(text: str) -> dict[str, list[Range]]:
    """The pools of a dsnatd.yaml that the template wrote."""
    found: dict[str, list[Range]] = {}
    for name, listed in re.findall(
        r"(?m)^  - name: (\S+)\n    addresses:\n((?:      .*\n|        .*\n)+)", text
    ):
        words = re.findall(r"(?m)^      - (?:range: )?([0-9][0-9./-]*)$", listed)
        found[name] = slices.merged(span(word) for word in words)
    return found


def running_pools(running: Running) -> dict[str, list[Range]]:
    return pools_in(running.files.get(ENGINE, {}).get("text", ""))


def sessions_on(running: Running, ranges: Iterable[Range]) -> int:
    wanted, total = list(ranges), 0
    for pool in running.facts.get("engine", {}).get("pools", {}).get("pools", []):
        for address in pool.get("addresses", []):
            number = int(IPv4Address(address["address"]))
            if any(low <= number <= high for low, high in wanted):
                total += int(address["sessions"])
    return total


def moves(fleet: Fleet, running: Mapping[str, Running]) -> list[Move]:
    """What runs at one gateway of a cluster and is wanted at another."""
    found: list[Move] = []
    for cluster in fleet.clusters:
        members = [name for name in fleet.gateways if fleet.cluster_of(name) == cluster]
        for source in members:
            if source not in running:
                continue
            has = running_pools(running[source])
            for target in members:
                if fleet.member_of(target) == fleet.member_of(source):
                    continue
                for pool, wanted in fleet.pools_of(target).items():
                    ranges = slices.common(has.get(pool, ()), wanted.spans())
                    if ranges:
                        sessions = sessions_on(running[source], ranges)
                        found.append(Move(pool, tuple(ranges), source, target, sessions))
    return found


def draining(running: Running, leaving: Iterable[Move]) -> str:
    """dsnatd.yaml of a gateway that keeps what moves away for a while, without new sessions on it."""
    text = running.files[ENGINE]["text"]
    for move in leaving:
        listed = "".join(f"      - {where}\n" for where in slices.text(move.ranges))
        head = re.search(rf"(?m)^  - name: {re.escape(move.pool)}\n    addresses:\n(      .*\n)+", text)
        assert head is not None, move
        rest = text[head.end() :]
        rest = (
            rest.replace("    drain:\n", f"    drain:\n{listed}", 1)
            if rest.startswith("    drain:\n")
            else f"    drain:\n{listed}{rest}"
        )
        text = text[: head.end()] + rest
    return text


def unsafe(fleet: Fleet, running: Mapping[str, Running]) -> list[str]:
    """Why no address may move now: each a sentence."""
    said: list[str] = []
    for name in fleet.clusters:
        members = [g for g in fleet.gateways if fleet.cluster_of(g) == name]
        for missing in (g for g in members if g not in running):
            had = slices.merged(
                span(text)
                for pool in fleet.slices.get(name, {}).values()
                for text in pool.get(fleet.member_of(missing), ())
            )
            for other in members:
                for pool in fleet.pools_of(other).values():
                    both = slices.common(had, pool.spans())
                    if both and fleet.member_of(other) != fleet.member_of(missing):
                        what, member = ", ".join(slices.text(both)), fleet.member_of(missing)
                        said.append(
                            f"{missing} was not reached and may still announce {what}, which {other} is to "
                            f"have; reach it, or say that it is gone for good with slices --lost {member}"
                        )
    return said


def twice(fleet: Fleet, running: Mapping[str, Running]) -> list[str]:
    """Addresses that two members of a cluster have at this moment: an alarm."""
    said: list[str] = []
    for cluster in fleet.clusters:
        members = [g for g in fleet.gateways if fleet.cluster_of(g) == cluster and g in running]
        for i, one in enumerate(members):
            for two in members[i + 1 :]:
                if fleet.member_of(one) == fleet.member_of(two):
                    continue
                for pool, ranges in running_pools(running[one]).items():
                    both = slices.common(ranges, running_pools(running[two]).get(pool, ()))
                    if both:
                        said.append(
                            f"{one} and {two} both have {', '.join(slices.text(both))} of pool {pool}, "
                            "and both announce it; push, or stop one of them"
                        )
        for name in members:
            for prefix in running[name].facts.get("routing", {}).get("doubles", []):
                said.append(
                    f"{name} hears {prefix} of its own slice from a router: somebody else announces it"
                )
    return said


def strangers(fleet: Fleet, running: Mapping[str, Running]) -> list[str]:
    """BGP neighbours that are not up, each with what to look at."""
    said: list[str] = []
    for name, found in running.items():
        service, gateway = fleet.service_of(name), fleet.gateways[name]
        if service.bgp is None or "bird.conf" not in found.files:
            continue
        routing = found.facts.get("routing", {})
        if "error" in routing:
            said.append(f"{name}: BIRD does not answer ({routing['error']}); look at its journal")
            continue
        have = {n["address"]: n for n in routing.get("neighbors", [])}
        for neighbor in gateway.neighbors or service.bgp.neighbors:
            state = have.get(str(neighbor.address), {"state": "not configured", "error": ""})
            if state["state"] == "Established":
                continue
            why = f", {state['error']}" if state["error"] else ""
            hint = "is it up, and does it expect this gateway?"
            if "AS" in state["error"]:
                hint = f"AS {neighbor.as_number} for it or {service.bgp.as_number} for us is not what it has"
            said.append(
                f"{name}: BGP to {neighbor.address} is not established ({state['state']}{why}); {hint}"
            )
    return said


def rehash(hashing: str, before: Sequence[str], after: Sequence[str]) -> float:
    """The share of flows, of gateways that stay, which routers send to another one when members change.

    resilient    none: only the buckets of the member that goes, or idle ones
    threshold    the range of the hash is cut into equal regions, one for each next hop in the order of their
                 addresses (Linux, and most vendors by default)
    modulo       the hash modulo the number of next hops, in that order
    """
    if hashing == "resilient" or not before or not after:
        return 0.0
    cuts = math.lcm(len(before), len(after))  # at which either of them changes
    if hashing == "modulo":
        pairs = [(before[n % len(before)], after[n % len(after)]) for n in range(cuts)]
    else:
        pairs = [(before[n * len(before) // cuts], after[n * len(after) // cuts]) for n in range(cuts)]
    staying = [(old, new) for old, new in pairs if old in after]
    return sum(old != new for old, new in staying) / len(staying) if staying else 0.0


@dataclass(frozen=True)
class Loss:
    """What hosts behind a cluster will notice when its members change."""

    cluster: str
    before: int  # members that routers inside use
    after: int
    ending: Mapping[str, int]  # member that goes -> its sessions, which end
    staying: int  # sessions of the others
    rehashed: int  # of these, how many arrive at another gateway and end there, on average

    @property
    def total(self) -> int:
        return sum(self.ending.values()) + self.rehashed


def losses(fleet: Fleet, running: Mapping[str, Running], *, drained: Iterable[str] = ()) -> list[Loss]:
    """For each cluster whose members change: to those that fleet.yaml has a share for, less `drained`."""
    found: list[Loss] = []
    for name, cluster in fleet.clusters.items():
        members = {fleet.member_of(g): running[g] for g in running if fleet.cluster_of(g) == name}
        ill = {m for m, r in members.items() if running_pools(r) and "error" in r.facts.get("engine", {})}
        out = ill | {m for m, r in members.items() if r.facts.get("drained") or not running_pools(r)}
        serving = [m for m in members if m not in out]
        wanted = [m for m, w in fleet.weights_of(name).items() if w and m not in drained and m not in ill]
        if not serving or set(serving) == set(wanted):
            continue
        live = {
            m: int(r.facts.get("engine", {}).get("status", {}).get("sessions", 0)) for m, r in members.items()
        }
        place = {fleet.member_of(g): _inside(fleet, g) for g in fleet.gateways}
        ending = {m: live[m] for m in serving if m not in wanted}
        staying = sum(live[m] for m in serving if m in wanted)
        share = rehash(cluster.hashing, *(sorted(side, key=place.__getitem__) for side in (serving, wanted)))
        found.append(Loss(name, len(serving), len(wanted), ending, staying, round(share * staying)))
    return found


def _inside(fleet: Fleet, name: str) -> int:
    """The address by which routers inside know a gateway: they sort their next hops by it."""
    service = fleet.service_of(name)
    for interface, found in fleet.gateways[name].interfaces.items():
        if found.role == "inside":
            floating = service.vrrp.instances.get(interface) if service.vrrp is not None else None
            for address in (*(floating.addresses if floating is not None else ()), *found.addresses):
                if isinstance(address, IPv4Interface):
                    return int(address.ip)
    return 0


def bill(fleet: Fleet, running: Mapping[str, Running], *, drained: Iterable[str] = ()) -> list[str]:
    """The losses as sentences."""
    said: list[str] = []
    for loss in losses(fleet, running, drained=drained):
        said += [f"{m} leaves cluster {loss.cluster}: its {n} sessions end" for m, n in loss.ending.items()]
        hashing = fleet.clusters[loss.cluster].hashing
        said.append(
            f"routers inside go from {loss.before} to {loss.after} gateways ({hashing} hashing): about "
            f"{loss.rehashed} of {loss.staying} sessions of the others arrive elsewhere and end there"
        )
    return said


def slices_text(fleet: Fleet) -> str:
    """The file that says who has what: the next division starts from it."""
    lines = ["# Made by dsnat-fleet: who owns which addresses. Commit it: the next change starts from here."]
    lines.append("slices:")
    for cluster in fleet.clusters:
        lines.append(f"  {cluster}:")
        for (of, pool), owned in fleet.division.items():
            if of == cluster:
                lines.append(f"    {pool}:")
                lines += [f"      {m}: [{', '.join(slices.text(r))}]" for m, r in owned.items() if r]
    return "\n".join(lines) + "\n"


def keep_slices(path: Path, fleet: Fleet) -> bool:
    """Writes it when it says something else. True: it did."""
    if not fleet.clusters:
        return False
    text = slices_text(fleet)
    if path.exists() and path.read_text() == text:
        return False
    replace_text(path, text)
    return True
