"""Rules between objects, over the whole fleet.

Each rule is a generator of problems, and where two places disagree both are named. An error is something
that would break on a gateway or between gateways (the engine or keepalived would refuse it, or worse,
would not); a warning is something that works and is probably not meant. All rules always run: an operator
sees everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, ip_address

from provision import validate_cluster
from provision.load import Loc, Problem, Source
from provision.model import Fleet, Gateway, Pool, Service, Zone
from provision.names import unknown_names
from provision.render import interface_of
from provision.values import milliseconds, span

Rule = Callable[[Fleet, Source], Iterator[Problem]]

TAKEN = {"all", "default", "lo", "dsnat0", "dsnat-in", "dsnat-out"}
HOST_BITS_MAX = 22  # a zone larger than this is a provider's; guessing its hosts would be noise


def validate(fleet: Fleet, source: Source) -> list[Problem]:
    return sorted({problem for rule in RULES for problem in rule(fleet, source)})


def names_exist(fleet: Fleet, at: Source) -> Iterator[Problem]:
    yield from unknown_names(at.data, at)


def pairs_have_two(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for pair in fleet.pairs:
        members = fleet.members(pair)
        if len(members) > 2:
            text = f"{members[2]} is a third gateway of pair {pair}; a pair has two"
            yield at.problem(("gateways", members[2], "pair"), text)
        if not members:
            yield at.problem(
                ("pairs", pair), f"no gateway belongs to pair {pair}; give two of them pair: {pair}", key=True
            )
        if len(members) == 1:
            text = f"pair {pair} has only {members[0]}; nobody takes over when it fails"
            yield at.problem(("pairs", pair), text, key=True, warning=True)


def a_pair_is_written_once(fleet: Fleet, at: Source) -> Iterator[Problem]:
    shared = [key for key in Service.model_fields if key != "routes"]
    for name, gateway in fleet.gateways.items():
        if gateway.pair is None:
            continue
        for key in shared:
            if key in gateway.model_fields_set:
                text = f"{name} belongs to pair {gateway.pair}; move {key} there, both have the same"
                yield at.problem(("gateways", name, key), text, key=True)


def members_of_a_pair_fit(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for pair in fleet.pairs:
        members = fleet.members(pair)[:2]
        if len(members) != 2:
            continue
        one, two = members
        a, b = fleet.gateways[one], fleet.gateways[two]
        if a.priority == b.priority:
            loc: Loc = (
                ("gateways", two, "priority") if "priority" in b.model_fields_set else ("gateways", two)
            )
            other: Loc = (
                ("gateways", one, "priority") if "priority" in a.model_fields_set else ("gateways", one)
            )
            text = (
                f"{one} and {two} have the same priority {a.priority}; give the usual master the higher one"
            )
            yield at.problem(loc, text, key=True, other=other)
        for interface in a.interfaces.keys() ^ b.interfaces.keys():
            has, lacks = (one, two) if interface in a.interfaces else (two, one)
            text = (
                f"{has} has {interface} and its peer {lacks} has not; both of a pair need the same interfaces"
            )
            yield at.problem(("gateways", has, "interfaces", interface), text, key=True)
        for interface in a.interfaces.keys() & b.interfaces.keys():
            if a.interfaces[interface].role != b.interfaces[interface].role:
                text = (
                    f"{interface} is {b.interfaces[interface].role} here and not on {one}; make both the same"
                )
                yield at.problem(
                    ("gateways", two, "interfaces", interface, "role"),
                    text,
                    other=("gateways", one, "interfaces", interface, "role"),
                )
            nets = [{x.network for x in g.interfaces[interface].addresses} for g in (a, b)]
            if nets[0] and nets[1] and not nets[0] & nets[1]:
                text = f"{one} and {two} share no prefix on {interface}; VRRP needs both on one segment"
                yield at.problem(
                    ("gateways", two, "interfaces", interface, "addresses"),
                    text,
                    other=("gateways", one, "interfaces", interface, "addresses"),
                )


def addresses_are_unique(fleet: Fleet, at: Source) -> Iterator[Problem]:
    """An interface address, a management address with its port, a host key: each belongs to one gateway.

    The same private prefix may exist behind several pairs, so inside addresses are compared within a pair
    only."""
    seen: dict[tuple[str, str], Loc] = {}
    for name, gateway in fleet.gateways.items():
        own: list[tuple[tuple[str, str], Loc]] = []
        for interface, found in gateway.interfaces.items():
            scope = "" if found.role == "outside" else (gateway.pair or name)
            for i, address in enumerate(found.addresses):
                own.append(
                    ((scope, str(address.ip)), ("gateways", name, "interfaces", interface, "addresses", i))
                )
        management = gateway.management
        port = fleet.ssh_of(name).port
        jump = fleet.ssh_of(name).jump or ""
        own.append(
            (
                (f"management {jump}", f"{management.address}:{port}"),
                ("gateways", name, "management", "address"),
            )
        )
        own.append((("key", " ".join(gateway.host_key.split()[:2])), ("gateways", name, "host_key")))
        for key, loc in own:
            if key in seen:
                what = "host key" if key[0] == "key" else key[1]
                text = f"{what} is given to two places; each gateway needs its own"
                yield at.problem(loc, text, other=seen[key])
            seen.setdefault(key, loc)
        devices: dict[tuple[str, int | None], Loc] = {}
        for interface, found in gateway.interfaces.items():
            if found.device is not None:
                loc = ("gateways", name, "interfaces", interface, "device")
                frames = (found.device, found.vlan)
                if frames in devices:
                    text = f"{found.device} is used twice on {name}; each needs a device or vlan of its own"
                    yield at.problem(loc, text, other=devices[frames])
                devices.setdefault(frames, loc)


def pools_are_disjoint(fleet: Fleet, at: Source) -> Iterator[Problem]:
    """Sorted by start, an overlap is always with the furthest-reaching span before."""
    spans = sorted(
        (span(item.range), ("pools", name, "addresses", i))
        for name, pool in fleet.pools.items()
        for i, item in enumerate(pool.addresses)
    )
    reach: tuple[tuple[int, int], Loc] | None = None
    for (first, last), loc in spans:
        if reach is not None and first <= reach[0][1]:
            both = (
                f"{IPv4Address(first)}-{IPv4Address(min(last, reach[0][1]))}"
                if first != last
                else IPv4Address(first)
            )
            one, two = str(reach[1][1]), str(loc[1])
            text = (
                f"pool {one} has {both} twice; remove one"
                if one == two
                else f'pools "{one}" and "{two}" both own {both}; give each address to one pool'
            )
            yield at.problem(loc, text, other=reach[1])
        if reach is None or last > reach[0][1]:
            reach = ((first, last), loc)
    for name, pool in fleet.pools.items():
        own = pool.spans()
        for i, text in enumerate(pool.drain):
            first, last = span(text)
            if not any(low <= first and last <= high for low, high in own):
                yield at.problem(
                    ("pools", name, "drain", i), f"{text} is not in pool {name}; drain only its own addresses"
                )


def a_pool_has_one_owner(fleet: Fleet, at: Source) -> Iterator[Problem]:
    owner: dict[str, Loc] = {}
    for where, service, _ in fleet.services():
        for i, zone in enumerate(service.zones):
            if zone.pool is None or zone.pool not in fleet.pools:
                continue
            loc = (*where, "zones", i, "pool")
            first = owner.setdefault(zone.pool, loc)
            if first[:2] != where:
                text = (
                    f'pool "{zone.pool}" is used by {first[1]} and {where[1]}; '
                    "two active gateways cannot share addresses"
                )
                yield at.problem(loc, text, other=first)
    for name in fleet.pools:
        if name not in owner:
            yield at.problem(("pools", name), f"no zone uses pool {name}", key=True, warning=True)


def static_mappings_are_in_a_pool(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for where, service, _ in fleet.services():
        used = {zone.pool for zone in service.zones if zone.pool in fleet.pools}
        own = [both for name in used if name is not None for both in fleet.pools[name].spans()]
        seen: dict[tuple[object, ...], Loc] = {}
        for i, static in enumerate(service.static):
            loc: Loc = (*where, "static", i)
            if not any(low <= int(static.outside) <= high for low, high in own):
                text = (
                    f"{static.outside} is in no pool of {where[1]}; a static mapping uses an "
                    "address of its pools"
                )
                yield at.problem((*loc, "outside"), text)
            key = (static.outside, static.protocol, static.port)
            if key in seen:
                text = (
                    f"{static.outside}{f' port {static.port}' if static.port else ''} is mapped "
                    "twice; remove one"
                )
                yield at.problem(loc, text, other=seen[key])
            seen.setdefault(key, loc)


def interface_names_are_free(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for name, gateway in fleet.gateways.items():
        for interface in gateway.interfaces.keys() & TAKEN:
            text = f"the name {interface} is taken by Linux or by the engine itself; choose another"
            yield at.problem(("gateways", name, "interfaces", interface), text, key=True)


def pool_addresses_are_nobodys(fleet: Fleet, at: Source) -> Iterator[Problem]:
    """The engine answers for pool addresses; an address that the kernel also has would be answered twice."""
    pools = [(first, last, name) for name, pool in fleet.pools.items() for first, last in pool.spans()]

    def clash(address: object) -> str | None:
        if not isinstance(address, IPv4Address):
            return None
        return next((name for first, last, name in pools if first <= int(address) <= last), None)

    for where, service, _ in fleet.services():
        if service.vrrp is not None:
            for interface, instance in service.vrrp.instances.items():
                for i, floating in enumerate(instance.addresses):
                    pool = clash(floating.ip)
                    if pool is not None:
                        text = (
                            f"the VRRP address {floating.ip} lies in pool {pool}; take it out of one of them"
                        )
                        loc: Loc = (*where, "vrrp", "instances", interface, "addresses", i)
                        yield at.problem(loc, text, other=("pools", pool, "addresses"))
        for i, zone in enumerate(service.zones):
            low, high = int(zone.source.network_address), int(zone.source.broadcast_address)
            for first, last, name in pools:
                if zone.source.prefixlen > 0 and first <= high and low <= last:
                    text = (
                        f"the zone's source {zone.source} holds addresses of pool {name}; inside "
                        "and outside must differ"
                    )
                    yield at.problem((*where, "zones", i, "source"), text, other=("pools", name, "addresses"))
                    break
    for name, gateway in fleet.gateways.items():
        for interface, found in gateway.interfaces.items():
            for i, address in enumerate(found.addresses):
                pool = clash(address.ip)
                if pool is not None:
                    text = f"{address.ip} lies in pool {pool}; an interface's own address cannot be in a pool"
                    loc = ("gateways", name, "interfaces", interface, "addresses", i)
                    yield at.problem(loc, text, other=("pools", pool, "addresses"))
        try:
            management = ip_address(gateway.management.address)
        except ValueError:
            continue  # a host name
        pool = clash(management)
        if pool is not None:
            text = (
                f"the management address {management} lies in pool {pool}; the gateway would no "
                "longer be reachable"
            )
            yield at.problem(
                ("gateways", name, "management", "address"), text, other=("pools", pool, "addresses")
            )


def vrrp_fits_the_interfaces(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for where, service, members in fleet.services():
        if service.vrrp is None:
            continue
        vrrp = service.vrrp
        for interface, instance in vrrp.instances.items():
            loc: Loc = (*where, "vrrp", "instances", interface)
            for name in members:
                found = fleet.gateways[name].interfaces.get(interface)
                if found is None:
                    have = ", ".join(fleet.gateways[name].interfaces) or "none"
                    yield at.problem(loc, f"{name} has no interface {interface} (it has: {have})", key=True)
                    continue
                own = [a for a in found.addresses if isinstance(a, IPv4Interface)]
                if not own:
                    text = f"{name} needs an own IPv4 address on {interface} to speak VRRP there"
                    yield at.problem(("gateways", name, "interfaces", interface), text, key=True, other=loc)
                    continue
                for i, floating in enumerate(instance.addresses):
                    if isinstance(floating, IPv4Interface) and not any(floating.ip in a.network for a in own):
                        text = (
                            f"{floating.ip} is in no prefix of {name}'s {interface} "
                            f"({', '.join(map(str, own))})"
                        )
                        yield at.problem((*loc, "addresses", i), text)
                    if any(floating.ip == a.ip for a in own):
                        text = (
                            f"{floating.ip} is {name}'s own address; a VRRP address floats and "
                            "belongs to nobody"
                        )
                        yield at.problem(
                            (*loc, "addresses", i),
                            text,
                            other=("gateways", name, "interfaces", interface, "addresses"),
                        )
            interval = milliseconds(instance.advert_interval or vrrp.advert_interval)
            key = (
                (*loc, "advert_interval") if instance.advert_interval else (*where, "vrrp", "advert_interval")
            )
            if vrrp.version == 2 and interval % 1000:
                yield at.problem(key, "VRRP version 2 counts whole seconds; use them, or version: 3")
            if not 10 <= interval <= 40_950:
                yield at.problem(key, "the advert interval must be between 10ms and 40s")
        if vrrp.authentication is not None and vrrp.version != 2:
            text = (
                "VRRP version 3 has no authentication; remove it, or set version: 2 for a peer that insists"
            )
            yield at.problem((*where, "vrrp", "authentication"), text, key=True)
        if milliseconds(vrrp.preempt_delay) and not vrrp.preempt:
            text = "preempt_delay does nothing without preempt: true"
            yield at.problem((*where, "vrrp", "preempt_delay"), text, key=True, warning=True)
        if vrrp.transport == "unicast" and len(members) < 2:
            text = "unicast needs a peer to send to; a gateway alone uses multicast"
            yield at.problem((*where, "vrrp", "transport"), text)


def vrrp_ids_are_unique_per_segment(fleet: Fleet, at: Source) -> Iterator[Problem]:
    seen: dict[tuple[object, int], tuple[Loc, Loc]] = {}
    for where, service, members in fleet.services():
        if service.vrrp is None:
            continue
        for interface, instance in service.vrrp.instances.items():
            loc: Loc = (*where, "vrrp", "instances", interface, "id")
            for name in members:
                found = fleet.gateways[name].interfaces.get(interface)
                for address in found.addresses if found is not None else ():
                    if found is not None and found.role == "inside" and address.network.is_private:
                        segment: object = (
                            where,
                            address.network,
                        )  # private prefixes repeat behind other pairs
                    else:
                        segment = address.network
                    first = seen.setdefault((segment, instance.id), (where, loc))
                    if first[1] != loc:
                        text = (
                            f"VRRP id {instance.id} is used twice on the segment "
                            f"{address.network}; choose another"
                        )
                        yield at.problem(loc, text, other=first[1])


def routes_have_a_way(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for name, gateway in fleet.gateways.items():
        if not gateway.interfaces:
            continue
        service = fleet.service_of(name)
        where: Loc = ("pairs", gateway.pair) if gateway.pair in fleet.pairs else ("gateways", name)
        if fleet.cluster_of(name) in fleet.clusters:
            where = ("clusters", str(fleet.cluster_of(name)))
        listed: list[tuple[Loc, IPv4Address]] = [
            ((*where, "routes", i, "via"), route.via) for i, route in enumerate(service.routes)
        ]
        if service is not gateway:
            listed += [(("gateways", name, "routes", i, "via"), r.via) for i, r in enumerate(gateway.routes)]
        for loc, via in listed:
            if interface_of(gateway, via) is None:
                yield at.problem(loc, f"the next hop {via} is in no prefix of an interface of {name}")


def neighbors_are_connected(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for where, service, members in fleet.services():
        if service.bgp is None:
            continue
        seen: dict[IPv4Address, Loc] = {}
        for i, neighbor in enumerate(service.bgp.neighbors):
            loc: Loc = (*where, "bgp", "neighbors", i, "address")
            for name in members:
                if fleet.gateways[name].neighbors:
                    continue  # its own count
                if interface_of(fleet.gateways[name], neighbor.address) is None:
                    text = f"the neighbour {neighbor.address} is in no prefix of an interface of {name}"
                    yield at.problem(loc, text)
            if neighbor.address in seen:
                yield at.problem(
                    loc, f"{neighbor.address} is a neighbour twice", other=seen[neighbor.address]
                )
            seen.setdefault(neighbor.address, loc)


def zones_can_be_reached(fleet: Fleet, at: Source) -> Iterator[Problem]:
    """First match wins: a zone behind one that matches all of it never matches."""
    for where, service, members in fleet.services():
        earlier: list[tuple[int, Zone]] = []
        for i, zone in enumerate(service.zones):
            for j, before in earlier:
                if _covers(before, zone):
                    text = f"this zone never matches: {before.source} stands before it; move it up"
                    yield at.problem((*where, "zones", i), text, other=(*where, "zones", j), warning=True)
                    break
            earlier.append((i, zone))
        if any(zone.pool is not None for zone in service.zones):
            for name in members:
                roles = {interface.role for interface in fleet.gateways[name].interfaces.values()}
                for role in {"inside", "outside"} - roles:
                    text = f"{name} has zones to translate and no {role} interface; add one with role: {role}"
                    yield at.problem(("gateways", name), text, key=True)


def _covers(before: Zone, zone: Zone) -> bool:
    if not zone.source.subnet_of(before.source):
        return False
    if before.destination is None:
        return True
    return zone.destination is not None and zone.destination.subnet_of(before.destination)


def pools_are_large_enough(fleet: Fleet, at: Source) -> Iterator[Problem]:
    """Hosts x ports: only where a host's need is stated, or a mapping takes a port whatever the remote."""
    for where, service, _ in fleet.services():
        limits = service.limits or fleet.defaults.limits
        hosts: dict[str, int] = {}
        first: dict[str, Loc] = {}
        for i, zone in enumerate(service.zones):
            if zone.pool in fleet.pools and 32 - zone.source.prefixlen <= HOST_BITS_MAX:
                assert zone.pool is not None
                hosts[zone.pool] = hosts.get(zone.pool, 0) + zone.source.num_addresses
                first.setdefault(zone.pool, (*where, "zones", i))
        for name, count in hosts.items():
            pool = fleet.pools[name]
            ports = _ports(pool)
            if pool.mapping == "endpoint-independent" and limits.sessions_per_host:
                need = count * limits.sessions_per_host
                if need > ports:
                    text = (
                        f"{count} hosts with {limits.sessions_per_host} mappings each need "
                        f"{need} ports and pool {name} "
                        f"has {ports}; add {-(-(need - ports) * pool.size() // ports)} "
                        "addresses or lower the limit"
                    )
                    yield at.problem(first[name], text, other=("pools", name), warning=True)
            elif ports < count:
                text = f"pool {name} has {ports} ports for {count} hosts; add addresses or ports"
                yield at.problem(first[name], text, other=("pools", name), warning=True)


def _ports(pool: Pool) -> int:
    low, _, high = pool.ports.partition("-")
    return pool.size() * (int(high) - int(low) + 1)


def management_stays_reachable(fleet: Fleet, at: Source) -> Iterator[Problem]:
    for name, gateway in fleet.gateways.items():
        _, management = name, gateway.management
        if management.interface in gateway.interfaces:
            text = f"{management.interface} is the way to {name} and cannot also carry hosts' traffic"
            other: Loc = ("gateways", name, "interfaces", str(management.interface))
            yield at.problem(("gateways", name, "management", "interface"), text, other=other)
        if management.interface is not None:
            try:
                ip_address(management.address)
            except ValueError:
                text = (
                    "with interface: the address is configured on the gateway; write it as a "
                    "number, not a name"
                )
                yield at.problem(("gateways", name, "management", "address"), text)
        interface = _on_engine_port(gateway)
        if interface is not None:
            text = (
                f"{management.address} is on {interface}, which the engine drives; "
                f"when the engine stops, {name} cannot be reached"
            )
            yield at.problem(("gateways", name, "management", "address"), text, warning=True)


def _on_engine_port(gateway: Gateway) -> str | None:
    try:
        address = ip_address(gateway.management.address)
    except ValueError:
        return None
    for name, interface in gateway.interfaces.items():
        if interface.path == "dpdk" and any(address == own.ip for own in interface.addresses):
            return name
    return None


def times_are_possible(fleet: Fleet, at: Source) -> Iterator[Problem]:
    window_ms = milliseconds(fleet.defaults.rollout.confirm_within)
    if not 5_000 <= window_ms <= 3_600_000:
        text = "a gateway waits between 5s and 1h for a confirmation; choose a time in between"
        yield at.problem(("defaults", "rollout", "confirm_within"), text)


RULES: tuple[Rule, ...] = (
    names_exist,
    pairs_have_two,
    a_pair_is_written_once,
    members_of_a_pair_fit,
    addresses_are_unique,
    pools_are_disjoint,
    a_pool_has_one_owner,
    pool_addresses_are_nobodys,
    static_mappings_are_in_a_pool,
    interface_names_are_free,
    vrrp_fits_the_interfaces,
    vrrp_ids_are_unique_per_segment,
    routes_have_a_way,
    neighbors_are_connected,
    zones_can_be_reached,
    pools_are_large_enough,
    management_stays_reachable,
    times_are_possible,
    *validate_cluster.RULES,
)
