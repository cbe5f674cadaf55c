"""Rules for clusters: who belongs, what may be sliced, and what nobody else may announce."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from provision import slices
from provision.load import Loc, Problem, Source
from provision.model import Fleet, Service
from provision.render import interface_of
from provision.slices import Range
from provision.values import milliseconds, span


def members_fit_their_cluster(fleet: Fleet, at: Source) -> Iterator[Problem]:
    import difflib

    for kind, listed in (("gateways", fleet.gateways), ("pairs", fleet.pairs)):
        for name, member in listed.items():
            if member.cluster is not None and member.cluster not in fleet.clusters:
                guess = difflib.get_close_matches(member.cluster, fleet.clusters, n=1)
                hint = f'did you mean "{guess[0]}"?' if guess else "add it under clusters:"
                yield at.problem((kind, name, "cluster"), f'there is no cluster "{member.cluster}"; {hint}')
    shared = [key for key in Service.model_fields if key not in ("routes", "site", "vrrp")]
    for name, pair in fleet.pairs.items():
        if pair.cluster is None:
            continue
        for key in shared:
            if key in pair.model_fields_set:
                text = f"pair {name} belongs to cluster {pair.cluster}; move {key} there, all have the same"
                yield at.problem(("pairs", name, key), text, key=True)
    for name, gateway in fleet.gateways.items():
        if gateway.cluster is not None and gateway.pair is not None:
            text = f"{name} is in cluster {gateway.cluster} by itself and in pair {gateway.pair}; remove one"
            yield at.problem(("gateways", name, "cluster"), text, other=("gateways", name, "pair"))
        elif gateway.cluster is not None:
            for key in [*shared, "vrrp"]:
                if key in gateway.model_fields_set:
                    what = "a standby makes it a pair" if key == "vrrp" else "move it"
                    text = f"{name} belongs to cluster {gateway.cluster}, which says {key} for all; {what}"
                    yield at.problem(("gateways", name, key), text, key=True)
    for name, cluster in fleet.clusters.items():
        if not fleet.weights_of(name):
            text = f"no gateway belongs to cluster {name}; give them cluster: {name}"
            yield at.problem(("clusters", name), text, key=True)
        if cluster.vrrp is not None:
            text = "a cluster has no VRRP addresses; a member with a standby is a pair, which has them"
            yield at.problem(("clusters", name, "vrrp"), text, key=True)
        if cluster.bgp is None:
            text = f"cluster {name} has no bgp; without it no router knows its gateways"
            yield at.problem(("clusters", name), text, key=True)


def pools_can_be_sliced(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for name in fleet.clusters:
        active = [member for member, weight in fleet.weights_of(name).items() if weight]
        for of, pool in fleet.division:
            if of != name:
                continue
            found = fleet.pools[pool]
            if found.size() < len(active):
                text = (
                    f"pool {pool} has {found.size()} addresses for {len(active)} gateways of cluster {name}; "
                    "each needs one, add addresses or set weight: 0"
                )
                yield at.problem(("pools", pool, "addresses"), text, other=("clusters", name))
            if found.deterministic is not None:
                text = f"a deterministic pool cannot be sliced: every gateway of {name} meets every host"
                yield at.problem(("pools", pool, "deterministic"), text, other=("clusters", name))
            if found.select == "paired" or found.mapping == "endpoint-independent":
                text = (
                    f"in cluster {name} a host meets several gateways, so it keeps one address only if the "
                    "routers inside choose by source address alone"
                )
                key = "select" if found.select == "paired" else "mapping"
                yield at.problem(("pools", pool, key), text, warning=True)


def slices_are_nobody_elses(fleet: Fleet, at: Source) -> Iterator[Problem]:
    """What fleet.slices.yaml says of before: by hand it may have become wrong."""
    for cluster, pools in fleet.slices.items():
        if cluster not in fleet.clusters:
            text = f"there is no cluster {cluster} any more; remove it"
            yield at.problem(("slices", cluster), text, key=True)
            continue
        weights = fleet.weights_of(cluster)
        for pool, members in pools.items():
            if pool not in fleet.pools:
                text = f"there is no pool {pool} any more; remove it"
                yield at.problem(("slices", cluster, pool), text, key=True)
                continue
            seen: list[tuple[Range, str, Loc]] = []
            for member, texts in members.items():
                loc: Loc = ("slices", cluster, pool, member)
                if member not in weights:
                    text = (
                        f"{member} had {', '.join(texts)} and is not in cluster {cluster} any more; give it "
                        f"weight: 0 and push before it goes, or say that it is gone: slices --lost {member}"
                    )
                    yield at.problem(loc, text, key=True, other=("clusters", cluster))
                for i, each in enumerate(texts):
                    own = span(each)
                    for other, owner, place in seen:
                        if slices.common([own], [other]):
                            both = ", ".join(slices.text(slices.common([own], [other])))
                            text = f"slices of {owner} and {member} overlap in {both}; give it to one of them"
                            yield at.problem((*loc, i), text, other=place)
                    seen.append((own, member, (*loc, i)))


def routers_agree(fleet: Fleet, at: Source) -> Iterator[Problem]:
    """One router has one AS, and a cluster has neighbours on both sides."""
    seen: dict[IPv4Address, tuple[int, Loc]] = {}
    listed: list[tuple[Loc, IPv4Address, int]] = []
    for where, service, members in fleet.services():
        for i, neighbor in enumerate(service.bgp.neighbors if service.bgp is not None else ()):
            listed.append(((*where, "bgp", "neighbors", i, "as"), neighbor.address, neighbor.as_number))
        bgp = service.bgp
        if bgp is None or where[0] != "clusters":
            continue
        for name in members:
            gateway = fleet.gateways[name]
            sides = set()
            for neighbor in gateway.neighbors or bgp.neighbors:
                interface = interface_of(gateway, neighbor.address)
                if interface is not None:
                    sides.add(gateway.interfaces[interface].role)
            for missing in {"inside", "outside"} - sides if sides else ():
                text = f"{name} has no BGP neighbour {missing}; routers there would not know it"
                yield at.problem((*where, "bgp", "neighbors"), text)
        if bgp.announce == "none":
            text = "a cluster announces its slices; without that replies do not find their gateway"
            yield at.problem((*where, "bgp", "announce"), text)
    for name, gateway in fleet.gateways.items():
        for i, neighbor in enumerate(gateway.neighbors):
            loc: Loc = ("gateways", name, "neighbors", i)
            listed.append(((*loc, "as"), neighbor.address, neighbor.as_number))
            if interface_of(gateway, neighbor.address) is None:
                text = f"the neighbour {neighbor.address} is in no prefix of an interface of {name}"
                yield at.problem((*loc, "address"), text)
        if gateway.neighbors and fleet.cluster_of(name) is None:
            text = f"{name} is in no cluster; its neighbours stand under bgp:"
            yield at.problem(("gateways", name, "neighbors"), text, key=True)
    for loc, address, number in listed:
        known = seen.setdefault(address, (number, loc))
        if known[0] != number:
            text = f"{address} has AS {number} here and AS {known[0]} elsewhere; a router has one"
            yield at.problem(loc, text, other=known[1])
    for name, cluster in fleet.clusters.items():
        if milliseconds(cluster.grace) > 3_600_000:
            yield at.problem(("clusters", name, "grace"), "nobody waits longer than 1h; choose less")


RULES = (members_fit_their_cluster, pools_can_be_sliced, slices_are_nobody_elses, routers_agree)
