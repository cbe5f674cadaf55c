"""What a fleet is, as read from `fleet.yaml`.

Frozen values and nothing else: no I/O, no rule that needs two objects (those are in validate.py). Types are
strict (`"3"` is not a number) and unknown keys are errors, so that a typing mistake cannot silently become
a default. What one word may look like stands in values.py.

A **service** is what hosts behind a gateway see: zones, VRRP addresses, routes, timers. It is written once,
in a cluster, in a pair, or in a gateway that stands alone; `Fleet.service_of` says which one counts.

A **cluster** is many active gateways that share pools: each **member**, a gateway or a pair, owns a slice of
every pool (slices.py), and `Fleet.pools_of` gives a gateway's own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from provision import slices as arithmetic
from provision.values import (
    Address,
    As,
    Destination,
    Device,
    Duration,
    Endpoint,
    Host,
    HostKey,
    InterfaceName,
    Name,
    Ports,
    Prefix,
    PublicKey,
    SecretRef,
    Span,
    Weight,
    Workers,
    span,
)

SCHEMA = 1
PRIORITY_OWNER = 255  # RFC 5798: only for the owner of the address; a floating address has no owner


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class Timeouts(Model):
    """The engine's timers; what is absent keeps the engine's own default."""

    tcp_established: Duration | None = None
    tcp_opening: Duration | None = None
    tcp_closing: Duration | None = None
    udp: Duration | None = None
    udp_one_way: Duration | None = None
    dns: Duration | None = None
    icmp: Duration | None = None
    hold: Duration | None = None


class Limits(Model):
    sessions_per_host: Annotated[int, Field(ge=0)] | None = None
    new_per_host_per_s: Annotated[int, Field(ge=0)] | None = None
    icmp_errors_per_s: Annotated[int, Field(ge=1)] | None = None
    held_ports: Annotated[int, Field(ge=0)] | None = None
    fragments: Annotated[int, Field(ge=16)] | None = None


class Engine(Model):
    workers: Workers = "auto"
    max_sessions: Annotated[int, Field(ge=1024, le=1_000_000_000)] | None = None
    spare: Literal["off", "on"] | None = None


class Ssh(Model):
    """How the operator's machine reaches a gateway."""

    user: Name = "root"
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    identity: str | None = Field(
        default=None, description="private key file; without it the ssh agent is asked"
    )
    connect_timeout: Duration = Field(
        default="10s",
        description="to connect and log in; an answer may take three times as long, or a minute",
    )
    jump: Name | None = Field(default=None, description="a jump host from `jumps`")


class Jump(Model):
    address: Host
    host_key: HostKey
    user: Name = "root"
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    identity: str | None = None


class Rollout(Model):
    confirm_within: Duration = Field(
        default="60s", description="a change not confirmed by then is undone by the gateway"
    )
    soak: Duration = "0s"
    failures: Annotated[int, Field(ge=0)] = Field(
        default=0, description="gateways that may fail before the rest is left"
    )
    first_wave_percent: Annotated[int, Field(ge=1, le=100)] = 10


class Collector(Model):
    """Who is told of the life of mappings; see "NAT logging" in dataplane/README.md."""

    protocol: Literal["ipfix", "syslog"]
    transport: Literal["udp", "tcp"] | None = None
    collector: Endpoint
    pools: tuple[Name, ...] = Field(default=(), description="default: all that the gateway has")
    destinations: Literal["off", "on"] | None = None


class Defaults(Model):
    ssh: Ssh = Ssh()
    rollout: Rollout = Rollout()
    engine: Engine = Engine()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    logging: tuple[Collector, ...] = ()


class Site(Model):
    description: str = ""
    ntp: tuple[Host, ...] = ()
    jump: Name | None = None


class User(Model):
    keys: Annotated[tuple[PublicKey, ...], Field(min_length=1)]
    access: Literal["shell", "agent"] = Field(
        default="agent", description="agent: may run the agent and nothing else"
    )


class PoolRange(Model):
    """Addresses of a pool. Written as text, or with a weight: so many turns for one of the others."""

    range: Span
    weight: Annotated[int, Field(ge=1, le=255)] = 1

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"range": value} if isinstance(value, str) else value


_RANGE_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"range": {"type": "string"}, "weight": {"type": "integer", "minimum": 1}},
            "required": ["range"],
            "additionalProperties": False,
        },
    ]
}


class Pool(Model):
    """Public addresses; a pool belongs to one pair or one gateway."""

    addresses: Annotated[tuple[Annotated[PoolRange, WithJsonSchema(_RANGE_SCHEMA)], ...], Field(min_length=1)]
    drain: tuple[Span, ...] = Field(default=(), description="addresses of the pool that take no new sessions")
    ports: Ports = "1024-65535"
    mapping: Literal["endpoint-dependent", "endpoint-independent"] | None = None
    filtering: Literal["endpoint-independent", "address-dependent", "address-and-port-dependent"] | None = (
        None
    )
    select: Literal["round-robin", "paired"] | None = None
    announce: Literal["auto", "arp", "none"] | None = None
    block_ports: Annotated[int, Field(ge=16, le=32768)] | None = None
    blocks_per_host: Annotated[int, Field(ge=1, le=4096)] | None = None
    deterministic: Prefix | None = None
    dynamic_ports: Annotated[int, Field(ge=0, le=65535)] | None = None
    active_while: IPv4Address | None = Field(
        default=None, description="default: the first VRRP address, an outside one if there is one"
    )

    def spans(self) -> list[tuple[int, int]]:
        return [span(item.range) for item in self.addresses]

    def size(self) -> int:
        return sum(last - first + 1 for first, last in self.spans())


class Zone(Model):
    source: Prefix
    destination: Prefix | None = None
    pool: Name | None = None
    action: Literal["drop", "pass"] | None = None
    mss_clamp: Annotated[int, Field(ge=536, le=9176)] | None = None

    @model_validator(mode="after")
    def _one_purpose(self) -> Zone:
        if (self.pool is None) == (self.action is None):
            raise ValueError("a zone has either a pool or an action (drop or pass)")
        return self


class Static(Model):
    """An inside host that always has the same outside address, or one port of it."""

    inside: IPv4Address
    outside: IPv4Address
    protocol: Literal["tcp", "udp"] | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    inside_port: Annotated[int, Field(ge=1, le=65535)] | None = None

    @model_validator(mode="after")
    def _port_and_protocol(self) -> Static:
        if (self.port is None) != (self.protocol is None):
            raise ValueError("a forwarded port needs both protocol and port; a whole address has neither")
        if self.inside_port is not None and self.port is None:
            raise ValueError("inside_port goes with port")
        return self


class Authentication(Model):
    """Simple text authentication, VRRP version 2 only: for interop, it protects nothing."""

    password: SecretRef


class Instance(Model):
    """One VRRP router on one interface."""

    id: Annotated[int, Field(ge=1, le=255)]
    addresses: Annotated[tuple[Address, ...], Field(min_length=1)]
    advert_interval: Duration | None = None


class Vrrp(Model):
    """All instances of a gateway stand in one sync group: they are master together or not at all."""

    instances: Annotated[dict[InterfaceName, Instance], Field(min_length=1)]
    advert_interval: Duration = "1s"
    version: Literal[2, 3] = 3
    transport: Literal["unicast", "multicast"] | None = Field(
        default=None, description="default: unicast between the two of a pair, multicast for a gateway alone"
    )
    preempt: bool = Field(
        default=False, description="may the higher priority take the addresses back when it returns?"
    )
    preempt_delay: Duration = "0s"
    authentication: Authentication | None = None


class Neighbor(Model):
    address: IPv4Address
    as_number: As = Field(alias="as")


class Bfd(Model):
    """A neighbour that is silent for `multiplier` intervals is gone."""

    interval: Duration = "300ms"
    multiplier: Annotated[int, Field(ge=1, le=255)] = 3


class Bgp(Model):
    """Pools are announced to the neighbours outside; whoever is master gets their packets.

    On which side a neighbour is, its address says."""

    as_number: As = Field(alias="as")
    neighbors: Annotated[tuple[Neighbor, ...], Field(min_length=1)]
    announce: Literal["pools", "none"] = "pools"
    accept: Literal["default", "all", "none"] = Field(
        default="default",
        description="routes taken from the neighbours outside: the default route, all, none",
    )
    inwards: tuple[Prefix, ...] = Field(
        default=(), description="prefixes announced to neighbours inside; in a cluster the default route"
    )
    bfd: Bfd | Literal["off"] | None = Field(default=None, description="default: on in a cluster, else off")


class Route(Model):
    to: Destination
    via: IPv4Address


class Interface(Model):
    role: Literal["inside", "outside"]
    path: Literal["dpdk", "nfqueue"]
    device: Device | None = None
    addresses: tuple[Address, ...] = ()
    members: Annotated[tuple[Device, ...], Field(min_length=2, max_length=4)] | None = None
    vlan: Annotated[int, Field(ge=1, le=4094)] | None = None
    mtu: Annotated[int, Field(ge=576, le=65535)] | None = None
    icmp_errors: Literal["on", "off"] | None = None

    @model_validator(mode="after")
    def _device_fits_path(self) -> Interface:
        if self.path == "dpdk" and self.device is None:
            raise ValueError("an interface on the dpdk path needs its device, for example its PCI address")
        if self.path == "nfqueue" and self.device is not None:
            raise ValueError("an interface on the nfqueue path has no device; the kernel keeps it")
        return self


class Management(Model):
    """Where the operator reaches the gateway. With `interface` the address is also configured by us."""

    address: Host
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    interface: InterfaceName | None = None
    prefix_length: Annotated[int, Field(ge=8, le=32)] = 24
    routes: tuple[Route, ...] = ()


class Service(Model):
    """What the hosts behind a gateway see. Of a pair, or of a gateway alone."""

    site: Name | None = None
    zones: tuple[Zone, ...] = ()
    vrrp: Vrrp | None = None
    routes: tuple[Route, ...] = ()
    profile: Literal["dsnat"] | None = Field(
        default=None, description="the original's values where a key is not given"
    )
    timeouts: Timeouts | None = None
    limits: Limits | None = None
    engine: Engine | None = None
    tcp_midflow: Literal["drop", "reset", "adopt"] | None = None
    refusal: Literal["silent", "icmp-admin", "icmp-host"] | None = None
    other_protocols: Literal["drop", "pass"] | None = None
    port_control: Literal["off", "on"] | None = None
    degraded: Literal["off", "nfqueue"] | None = None
    static: tuple[Static, ...] = ()
    logging: tuple[Collector, ...] | None = None
    bgp: Bgp | None = None
    probes: tuple[IPv4Address, ...] = Field(
        default=(), description="addresses outside that must answer a ping before a change is kept"
    )


class Sync(Model):
    """Both gateways of a pair hold the sessions of both; see "Two gateways" in dataplane/README.md."""

    key: SecretRef
    addresses: dict[Name, IPv4Address] = Field(
        default={}, description="per gateway, on a link of their own; default: the management addresses"
    )
    port: Annotated[int, Field(ge=1, le=65535)] = 3781
    hold_back: Duration | None = Field(default=None, description="what is over sooner is never told")


class Pair(Service):
    sync: Sync | None = None
    cluster: Name | None = Field(default=None, description="the pair is one member of this cluster")
    weight: Weight = 1


class Cluster(Service):
    """Many active gateways. What they share stands here once, `bgp` among it."""

    hashing: Literal["resilient", "threshold", "modulo"] = Field(
        default="threshold",
        description="how the routers inside choose among the gateways; the bill of a plan depends on it",
    )
    grace: Duration = Field(
        default="30s", description="how long addresses that move may run out before their sessions are ended"
    )


class Gateway(Service):
    pair: Name | None = None
    cluster: Name | None = None
    weight: Weight = Field(default=1, description="share of the cluster's pools; 0: none, before it goes")
    neighbors: tuple[Neighbor, ...] = Field(
        default=(), description="BGP neighbours of this gateway alone, instead of those of its cluster"
    )
    priority: Annotated[int, Field(ge=1, le=254)] = 100
    management: Management
    host_key: HostKey
    ssh: Ssh | None = None
    interfaces: dict[InterfaceName, Interface] = {}


def _part(pool: Pool, own: list[arithmetic.Range]) -> Pool:
    """A pool of which only these addresses are ours."""
    addresses = tuple(
        PoolRange(range=text, weight=item.weight)
        for item in pool.addresses
        for text in arithmetic.text(arithmetic.common([span(item.range)], own))
    )
    drain = arithmetic.text(arithmetic.common([span(text) for text in pool.drain], own))
    return pool.model_copy(update={"addresses": addresses, "drain": tuple(drain)})


class Fleet(Model):
    """Everything. `schema_version` stands as `schema` in the file."""

    schema_version: Literal[1] = Field(alias="schema")
    include: tuple[str, ...] = ()
    defaults: Defaults = Defaults()
    sites: dict[Name, Site] = {}
    jumps: dict[Name, Jump] = {}
    users: dict[Name, User] = {}
    pools: dict[Name, Pool] = {}
    clusters: dict[Name, Cluster] = {}
    pairs: dict[Name, Pair] = {}
    slices: dict[Name, dict[Name, dict[Name, tuple[Span, ...]]]] = Field(
        default={},
        description="cluster, pool, member: what it had before; fleet.slices.yaml, made by the tool",
    )
    gateways: Annotated[dict[Name, Gateway], Field(min_length=1)]

    def service_of(self, name: str) -> Service:
        gateway = self.gateways[name]
        # A pair that does not exist is validate.py's to report; until then the gateway stands alone.
        service: Service = self.pairs.get(gateway.pair or "", gateway)
        cluster = self.clusters.get(self.cluster_of(name) or "")
        if cluster is None:
            return service
        own = {"site": service.site or cluster.site, "vrrp": service.vrrp}
        return cluster.model_copy(update={**own, "tcp_midflow": cluster.tcp_midflow or "reset"})

    def cluster_of(self, name: str) -> str | None:
        gateway = self.gateways[name]
        pair = self.pairs.get(gateway.pair or "")
        return pair.cluster if pair is not None else gateway.cluster

    def member_of(self, name: str) -> str:
        """The member of a cluster that this gateway is, or is half of."""
        return self.gateways[name].pair or name

    def weights_of(self, cluster: str) -> dict[str, int]:
        """The members of a cluster, in the order of the file."""
        pairs = {name: p.weight for name, p in self.pairs.items() if p.cluster == cluster}
        alone = {
            name: g.weight for name, g in self.gateways.items() if g.cluster == cluster and g.pair is None
        }
        return {**pairs, **alone}

    @cached_property
    def division(self) -> Mapping[tuple[str, str], Mapping[str, list[arithmetic.Range]]]:
        """(cluster, pool) -> member -> the addresses it owns."""
        found: dict[tuple[str, str], Mapping[str, list[arithmetic.Range]]] = {}
        for name, cluster in self.clusters.items():
            weights = self.weights_of(name)
            for pool in dict.fromkeys(zone.pool for zone in cluster.zones if zone.pool in self.pools):
                assert pool is not None
                given = self.slices.get(name, {}).get(pool, {})
                before = {member: [span(text) for text in texts] for member, texts in given.items()}
                found[name, pool] = arithmetic.divide(self.pools[pool].spans(), weights, before)
        return found

    def pools_of(self, name: str) -> dict[str, Pool]:
        """The pools that a gateway translates to: in a cluster its slices of them."""
        used = dict.fromkeys(zone.pool for zone in self.service_of(name).zones if zone.pool in self.pools)
        cluster, member = self.cluster_of(name), self.member_of(name)
        found: dict[str, Pool] = {}
        for pool in used:
            assert pool is not None
            if cluster not in self.clusters:
                found[pool] = self.pools[pool]
            elif own := self.division[str(cluster), pool].get(member):
                found[pool] = _part(self.pools[pool], own)
        return found

    def members(self, pair: str) -> list[str]:
        return [name for name, gateway in self.gateways.items() if gateway.pair == pair]

    def services(self) -> Iterator[tuple[tuple[str, str], Service, list[str]]]:
        """(where it stands in the file, service, the gateways that offer it)."""
        for name, cluster in self.clusters.items():
            yield ("clusters", name), cluster, [g for g in self.gateways if self.cluster_of(g) == name]
        for name, pair in self.pairs.items():
            yield ("pairs", name), pair, self.members(name)
        for name, gateway in self.gateways.items():
            if gateway.pair is None:
                yield ("gateways", name), gateway, [name]

    def peer_of(self, name: str) -> str | None:
        pair = self.gateways[name].pair
        return next((other for other in self.members(pair) if other != name), None) if pair else None

    def ssh_of(self, name: str) -> Ssh:
        gateway = self.gateways[name]
        ssh = gateway.ssh or self.defaults.ssh
        site = self.sites.get(self.service_of(name).site or "")
        jump = ssh.jump or (site.jump if site else None)
        port = gateway.management.port or ssh.port
        return ssh.model_copy(update={"jump": jump, "port": port})
