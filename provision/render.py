"""`Fleet` -> the files of one gateway. Pure: the same fleet gives the same bytes, without a date or a host
name.

Everything that a gateway needs is rendered here, on the operator's machine, so that a plan shows exactly
what a push writes. Two guards stand between a value and a generated file: the narrow patterns of
values.py, and `_guard`, through which jinja2 sends the result of every `{{ }}`. A character that could end
a line, open a block or close a quote is an error and never output, whatever a template author forgot.

Secrets are looked up by a function that the caller passes in (`env:`, `file:`, `age:` references);
`Rendered.secrets` says which texts must never be shown.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision import slices
from provision.model import Bfd, Bgp, Fleet, Gateway, Pair, Pool, Service, Sync, Vrrp
from provision.values import milliseconds

if TYPE_CHECKING:
    from jinja2 import Environment

Secret = Callable[[str], str]

ENGINE = "dsnatd.yaml"
VRRP = "keepalived.conf"
SYNC_KEY = "sync.key"
BGP = "bird.conf"
KEYS = "authorized_keys/root"
MANAGEMENT = "network/10-management.network"
POOL_KEYS = (
    *("mapping", "filtering", "select", "announce"),
    *("block_ports", "blocks_per_host", "deterministic", "dynamic_ports"),
)
TIME = "chrony/fleet.sources"


class RenderError(Exception):
    """A value that must not stand in a generated file. One sentence."""


@dataclass(frozen=True)
class File:
    text: str
    mode: int = 0o644

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Rendered:
    """What one gateway should be."""

    gateway: str
    files: Mapping[str, File]
    hardware: str  # digest of what needs a restart of the engine, not a reload
    interfaces: tuple[str, ...]
    vrrp: tuple[str, ...] = ()  # the addresses that a master has
    probes: tuple[str, ...] = ()  # addresses that answer a ping when the way out works
    secrets: frozenset[str] = field(default=frozenset(), repr=False)


def render(fleet: Fleet, name: str, *, secret: Secret) -> Rendered:
    gateway, service = fleet.gateways[name], fleet.service_of(name)
    files = {ENGINE: File(_engine(fleet, name, gateway, service))}
    secrets: set[str] = set()
    if service.vrrp is not None:
        password = None
        if service.vrrp.authentication is not None:
            password = secret(service.vrrp.authentication.password)
            secrets.add(password)
        text = _keepalived(fleet, name, gateway, service.vrrp, password)
        files[VRRP] = File(text, 0o600 if password else 0o644)
    sync = _sync_of(fleet, gateway)
    if sync is not None:
        key = secret(sync.key)
        if not re.fullmatch(r"[0-9a-fA-F]{64}", key):
            raise RenderError(
                f"{name}: {sync.key} is not the key of a pair; make one with: openssl rand -hex 32"
            )
        secrets.add(key)
        files[SYNC_KEY] = File(f"{key}\n", 0o600)
    if service.bgp is not None:
        files[BGP] = File(_bird(fleet, name, gateway, service, service.bgp))
    for position, interface in enumerate(gateway.interfaces):
        text = _network(fleet, name, interface)
        files[f"network/{20 + position}-{interface}.network"] = File(text)
    if gateway.management.interface is not None:
        files[MANAGEMENT] = File(_management(name, gateway))
    site = fleet.sites.get(service.site or "")
    if site is not None and site.ntp:
        files[TIME] = File(_fill("fleet.sources.j2", gateway=name, servers=site.ntp))
    if fleet.users:
        files[KEYS] = File(_users(fleet, name))
    floating = service.vrrp.instances.values() if service.vrrp is not None else ()
    return Rendered(
        name,
        files,
        _hardware(fleet, name, gateway, service),
        tuple(gateway.interfaces),
        tuple(str(address.ip) for instance in floating for address in instance.addresses),
        tuple(map(str, service.probes)),
        frozenset(secrets),
    )


def settings_of(fleet: Fleet, name: str, service: Service, pool: Pool) -> Iterator[tuple[str, str]]:
    """The keys of a pool in dsnatd.yaml beside its addresses; what is not said is left to the engine."""
    if service.profile is None or "ports" in pool.model_fields_set:
        yield "ports", pool.ports
    for key in POOL_KEYS:
        value = getattr(pool, key)
        if value is not None:
            yield key, str(value)
    active = pool.active_while or _mark_of_master(fleet, name, service)
    if active is not None:
        yield "active_while", str(active)


def _mark_of_master(fleet: Fleet, name: str, service: Service) -> IPv4Address | None:
    """The VRRP address that says who answers for the pools: the master has it, the backup does not.

    An outside one where there is one; all of a gateway move together, so another is as good."""
    if service.vrrp is None:
        return None
    members = fleet.members(fleet.gateways[name].pair or "") or [name]
    found: dict[str, IPv4Address] = {}
    for interface, instance in service.vrrp.instances.items():
        for member in members:
            known = fleet.gateways[member].interfaces.get(interface)
            for address in instance.addresses if known is not None else ():
                if isinstance(address, IPv4Interface) and known is not None:
                    found.setdefault(known.role, address.ip)
    return found.get("outside", found.get("inside"))


def _collectors(fleet: Fleet, service: Service, pools: Collection[str]) -> Iterator[dict[str, object]]:
    """Each with those of its pools that this gateway has; one that has none of them is left out."""
    for collector in fleet.defaults.logging if service.logging is None else service.logging:
        own = [pool for pool in collector.pools if pool in pools]
        if own or not collector.pools:
            yield {**collector.model_dump(), "pools": own}


def _engine(fleet: Fleet, name: str, gateway: Gateway, service: Service) -> str:
    own = fleet.pools_of(name)
    spans = [span for found in own.values() for span in found.spans()]
    pools = [
        (
            pool,
            {
                "addresses": found.addresses,
                "drain": found.drain,
                "settings": list(settings_of(fleet, name, service, found)),
            },
        )
        for pool, found in own.items()
    ]
    return _fill(
        "dsnatd.yaml.j2",
        gateway=name,
        profile=service.profile,
        service=service,
        # In a cluster a gateway translates to what it owns: without a slice to nothing.
        zones=[zone for zone in service.zones if zone.pool is None or zone.pool in own],
        static=[s for s in service.static if any(low <= int(s.outside) <= high for low, high in spans)],
        engine=service.engine or fleet.defaults.engine,
        interfaces=list(gateway.interfaces.items()),
        pools=pools,
        limits=_given(service.limits or fleet.defaults.limits),
        timeouts=_given(service.timeouts or fleet.defaults.timeouts),
        logging=list(_collectors(fleet, service, own)),
        sync=_sync(fleet, name, gateway),
    )


def _sync_of(fleet: Fleet, gateway: Gateway) -> Sync | None:
    pair = fleet.pairs.get(gateway.pair or "")
    return pair.sync if isinstance(pair, Pair) else None


def _sync(fleet: Fleet, name: str, gateway: Gateway) -> dict[str, object] | None:
    """The section of dsnatd.yaml: our own end and the peer's."""
    sync, peer = _sync_of(fleet, gateway), fleet.peer_of(name)
    if sync is None or peer is None:
        return None
    ends = {}
    for member in (name, peer):
        address = sync.addresses.get(member) or fleet.gateways[member].management.address
        try:
            ends[member] = IPv4Address(address)
        except ValueError:
            raise RenderError(
                f"{member}: {address} is not an IPv4 address; give the pair's sync one under addresses"
            ) from None
    return {"listen": ends[name], "peer": ends[peer], "port": sync.port, "hold_back": sync.hold_back}


def _keepalived(fleet: Fleet, name: str, gateway: Gateway, vrrp: Vrrp, password: str | None) -> str:
    peer = fleet.peer_of(name)
    unicast = vrrp.transport == "unicast" or (vrrp.transport is None and peer is not None)
    instances = []
    for interface, instance in vrrp.instances.items():
        own = _own_address(gateway, interface)
        other = _own_address(fleet.gateways[peer], interface) if peer is not None else None
        instances.append(
            {
                "interface": interface,
                "id": instance.id,
                "addresses": list(instance.addresses),
                "advert_s": _seconds(instance.advert_interval or vrrp.advert_interval),
                "own": own if unicast else None,
                "peer": other,
            }
        )
    return _fill(
        "keepalived.conf.j2",
        gateway=name,
        group=gateway.pair or name,
        vrrp=vrrp,
        priority=gateway.priority,
        preempt_delay_s=milliseconds(vrrp.preempt_delay) // 1000,
        instances=instances,
        password=password,
    )


def _bird(fleet: Fleet, name: str, gateway: Gateway, service: Service, bgp: Bgp) -> str:
    clustered = fleet.cluster_of(name) in fleet.clusters
    spans = [span for pool in fleet.pools_of(name).values() for span in pool.spans()]
    neighbors = []
    for neighbor in gateway.neighbors or bgp.neighbors:
        interface = interface_of(gateway, neighbor.address) or ""
        floating = service.vrrp.instances.get(interface) if service.vrrp is not None else None
        neighbors.append(
            {
                "address": neighbor.address,
                "as_number": neighbor.as_number,
                "side": gateway.interfaces[interface].role if interface else "outside",
                "own": _own_address(gateway, interface),
                "next_hop": floating.addresses[0].ip if floating is not None else None,
            }
        )
    inwards = [str(prefix) for prefix in bgp.inwards] or (["0.0.0.0/0"] if clustered else [])
    bfd = bgp.bfd or (Bfd() if clustered else None)
    return _fill(
        "bird.conf.j2",
        gateway=name,
        bgp=bgp,
        bfd={"interval": milliseconds(bfd.interval), "multiplier": bfd.multiplier}
        if isinstance(bfd, Bfd)
        else None,
        router_id=neighbors[0]["own"],
        prefixes=slices.prefixes(spans) if bgp.announce == "pools" else [],
        inwards=inwards if spans and any(n["side"] == "inside" for n in neighbors) else [],
        sources=list(dict.fromkeys(str(zone.source) for zone in service.zones)),
        neighbors=neighbors,
    )


def _network(fleet: Fleet, name: str, interface: str) -> str:
    found = fleet.gateways[name].interfaces[interface]
    return _fill(
        "interface.network.j2",
        gateway=name,
        name=interface,
        mtu=found.mtu,
        addresses=found.addresses,
        routes=[
            route
            for route in routes_of(fleet, name)
            if interface_of(fleet.gateways[name], route.via) == interface
        ],
    )


def routes_of(fleet: Fleet, name: str) -> list[Any]:
    """The service's routes, then the gateway's own."""
    gateway, service = fleet.gateways[name], fleet.service_of(name)
    return [*service.routes, *(gateway.routes if service is not gateway else ())]


def interface_of(gateway: Gateway, via: IPv4Address) -> str | None:
    """The interface in whose prefix a next hop lies."""
    for name, interface in gateway.interfaces.items():
        if any(isinstance(a, IPv4Interface) and via in a.network for a in interface.addresses):
            return name
    return None


def _management(name: str, gateway: Gateway) -> str:
    management = gateway.management
    return _fill(
        "interface.network.j2",
        gateway=name,
        name=management.interface,
        mtu=None,
        addresses=[f"{management.address}/{management.prefix_length}"],
        routes=management.routes,
    )


def _users(fleet: Fleet, name: str) -> str:
    users = [
        (user, {"access": found.access, "bare": [" ".join(key.split()[:2]) for key in found.keys]})
        for user, found in fleet.users.items()
    ]
    return _fill("authorized_keys.j2", gateway=name, users=users)


def _own_address(gateway: Gateway, interface: str) -> str | None:
    found = gateway.interfaces.get(interface)
    return next((str(a.ip) for a in found.addresses), None) if found is not None else None


def _hardware(fleet: Fleet, name: str, gateway: Gateway, service: Service) -> str:
    """The engine takes all but this by a reload: ports, worker count and table size are made once, at its
    start.
    """
    engine = service.engine or fleet.defaults.engine
    made_once = {
        "engine": engine.model_dump(mode="json"),
        **({"sync": list(map(str, sync.values()))} if (sync := _sync(fleet, name, gateway)) else {}),
        "interfaces": [
            [name, i.role, i.path, i.device, i.members, i.vlan, i.mtu]
            for name, i in gateway.interfaces.items()
        ],
    }
    return hashlib.sha256(json.dumps(made_once, sort_keys=True).encode()).hexdigest()


def _given(model: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in model.model_dump().items() if value is not None]


def _seconds(duration: str) -> str:
    """keepalived takes seconds with a fraction."""
    return f"{milliseconds(duration) / 1000:g}"


_HARMLESS = re.compile(r"[A-Za-z0-9 ._:,=/@+%-]*")


def _guard(value: Any) -> str:
    text = str(value)
    if not _HARMLESS.fullmatch(text):
        bad = next(c for c in text if not _HARMLESS.fullmatch(c))
        raise RenderError(
            f"a value to be written into a file has the character {bad!r}, which is not allowed there"
        )
    return text


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # 25 ms that `--help` does not need

    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        finalize=_guard,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _fill(template: str, **values: Any) -> str:
    from jinja2 import UndefinedError

    try:
        return _environment().get_template(template).render(**values)
    except UndefinedError as error:
        raise RenderError(f"{template} uses a value that nobody gave: {error}") from error
