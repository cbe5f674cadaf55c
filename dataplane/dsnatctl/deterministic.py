"""Deterministic mapping (RFC 7422): which ports a host has, and whose a port is, from configuration alone.

Hosts of the prefix are dealt to the pool's addresses in order, as many to each; a host's ports are one run.
The last `dynamic_ports` of an address belong to nobody: for those only the session table or a log can tell.
The engine does the same sums in core/policy.c; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from dsnatctl.client import Json


@dataclass(frozen=True)
class Share:
    pool: str
    host: IPv4Address
    address: IPv4Address
    port_first: int
    port_last: int

    def __str__(self) -> str:
        ports = f"{self.port_first}-{self.port_last}"
        return f"{self.host} has ports {ports} of {self.address}, by the arithmetic of pool {self.pool}"


@dataclass(frozen=True)
class Deal:
    """One pool's arithmetic."""

    pool: str
    hosts: IPv4Network
    ranges: tuple[tuple[int, int], ...]  # of addresses
    port_first: int
    port_last: int
    dynamic_ports: int

    @classmethod
    def of(cls, pool: Json) -> Deal:
        ports = [int(port) for port in pool["ports"].split("-")]
        texts = [one["range"] if isinstance(one, dict) else one for one in pool["addresses"]]
        ends = [[int(IPv4Address(end)) for end in text.split("-")] for text in texts]
        ranges = tuple((end[0], end[-1]) for end in ends)
        hosts = IPv4Network(pool["deterministic"])
        return cls(pool["name"], hosts, ranges, ports[0], ports[-1], pool["dynamic_ports"])

    @property
    def hosts_per_address(self) -> int:
        addresses = sum(last - first + 1 for first, last in self.ranges)
        return -(-self.hosts.num_addresses // addresses)

    @property
    def ports_per_host(self) -> int:
        return (self.port_last - self.port_first + 1 - self.dynamic_ports) // self.hosts_per_address

    def _share(self, number: int) -> Share:
        """Of the number-th host of the prefix."""
        place, slot = divmod(number, self.hosts_per_address)
        first = self.port_first + slot * self.ports_per_host
        host = self.hosts.network_address + number
        return Share(self.pool, host, self._address(place), first, first + self.ports_per_host - 1)

    def _address(self, place: int) -> IPv4Address:
        for first, last in self.ranges:
            if place <= last - first:
                return IPv4Address(first + place)
            place -= last - first + 1
        raise AssertionError("more hosts than hosts_per_address allows")

    def of_host(self, host: IPv4Address) -> Share | None:
        if host not in self.hosts:
            return None
        return self._share(int(host) - int(self.hosts.network_address))

    def of_port(self, address: IPv4Address, port: int) -> Share | None:
        place = 0
        for first, last in self.ranges:
            if first <= int(address) <= last:
                slot = (port - self.port_first) // self.ports_per_host
                number = (place + int(address) - first) * self.hosts_per_address + slot
                whose = 0 <= slot < self.hosts_per_address and number < self.hosts.num_addresses
                return self._share(number) if whose else None
            place += last - first + 1
        return None


def shares(config: Json, address: str, port: int) -> Iterator[Share]:
    """What arithmetic says about an inside address (port 0), or about a public address and port."""
    wanted = IPv4Address(address)
    for pool in config["pools"]:
        if "deterministic" not in pool:
            continue
        deal = Deal.of(pool)
        found = deal.of_port(wanted, port) if port else deal.of_host(wanted)
        if found:
            yield found
