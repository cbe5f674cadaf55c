"""A configuration, edited as ipvsadm edits it: zones by source, and public addresses in their pools.

It works on what `show config` gives, a plain dict, and gives back the text of a file. What ipvsadm cannot say
(destinations, weights, drains, limits) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from dsnatctl import show
from dsnatctl.client import Json

PORTS = "5000-65535"  # the original's


class CommandError(Exception):
    """The command makes sense and cannot be done."""


def parse_zone(text: str) -> str:
    """1.1.0.0/16, 1.1.0.0/255.255.0.0, 10/8, 1.2.3.4"""
    address, slash, mask = text.partition("/")
    octets = address.split(".")
    if any(len(octet) > 1 and octet.startswith("0") for octet in octets):
        raise CommandError(f"{text}: a leading zero meant octal to the original; write the number without")
    try:
        octets += ["0"] * (4 - len(octets)) if slash else []
        return str(IPv4Network(".".join(octets) + (slash + mask), strict=False))
    except ValueError as error:
        raise CommandError("illegal zone address,192.168.1.0/255.255.255.0 or 192.168.1.0/24") from error


def parse_laddr(text: str) -> str:
    try:
        return str(IPv4Address(text))
    except ValueError as error:
        raise CommandError("illegal local address") from error


def span(element: Any) -> tuple[int, int]:
    """First and last of an element of `addresses`."""
    text = element["range"] if isinstance(element, dict) else element
    first, _, last = text.partition("-")
    return int(IPv4Address(first)), int(IPv4Address(last or first))


def addresses(pool: Json) -> Iterator[str]:
    for element in pool["addresses"]:
        first, last = span(element)
        yield from (str(IPv4Address(address)) for address in range(first, last + 1))


def without(elements: Sequence[Any], address: str) -> list[Any]:
    number = int(IPv4Address(address))
    kept: list[Any] = []
    for element in elements:
        first, last = span(element)
        if not first <= number <= last:
            kept.append(element)
            continue
        for low, high in ((first, number - 1), (number + 1, last)):
            if low <= high:
                ends = sorted(
                    {str(IPv4Address(low)), str(IPv4Address(high))}, key=lambda a: int(IPv4Address(a))
                )
                text = "-".join(ends)
                kept.append({**element, "range": text} if isinstance(element, dict) else text)
    return kept


@dataclass
class Rules:
    """A configuration, edited as ipvsadm edits it. `notes` are for the operator."""

    config: Json
    notes: list[str] = field(default_factory=list)

    @property
    def zones(self) -> list[Json]:
        """Those that ipvsadm can have made: by source only, with a pool or dropping."""
        return [z for z in self.config["zones"] if "destination" not in z and z.get("action") != "pass"]

    def pool(self, name: str) -> Json:
        pool: Json = next(pool for pool in self.config["pools"] if pool["name"] == name)
        return pool

    def owner(self, address: str) -> Json | None:
        number = int(IPv4Address(address))
        for pool in self.config["pools"]:
            if any(first <= number <= last for first, last in map(span, pool["addresses"])):
                found: Json = pool
                return found
        return None

    def find_zone(self, source: str) -> Json:
        for zone in self.zones:
            if zone["source"] == source:
                return zone
        raise CommandError("No such zone")

    def add_zone(self, source: str) -> None:
        if any(zone["source"] == source for zone in self.zones):
            raise CommandError("Zone already exists")
        self.config["zones"].append({"source": source, "action": "drop"})

    def delete_zone(self, source: str) -> None:
        zone = self.find_zone(source)
        self.config["zones"].remove(zone)
        self._drop_unused(zone.get("pool"))

    def add_address(self, source: str, address: str) -> None:
        zone, owner = self.find_zone(source), self.owner(address)
        if owner and owner["name"] == zone.get("pool"):
            raise CommandError("Local address already exists")
        if owner and "pool" in zone:
            raise CommandError(
                f"{address} is in pool {owner['name']} already, and zone {source} has pool {zone['pool']}; "
                f"an address is in one pool only"
            )
        if owner:
            self._use(zone, owner["name"])
            self.notes.append(f"zone {source} shares pool {owner['name']}, with all its addresses")
            return
        if "pool" not in zone:
            name = "zone-" + source.replace("/", "-")
            self.config["pools"].append({"name": name, "addresses": [], "ports": PORTS})
            self._use(zone, name)
        self.pool(zone["pool"])["addresses"].append(address)

    def delete_address(self, source: str, address: str) -> None:
        zone = self.find_zone(source)
        owner = self.owner(address)
        if not owner or owner["name"] != zone.get("pool"):
            raise CommandError("No such Local address")
        owner["addresses"] = without(owner["addresses"], address)
        if "drain" in owner:
            owner["drain"] = without(owner["drain"], address)
        if owner["addresses"]:
            return
        for other in self.config["zones"]:
            if other.get("pool") == owner["name"]:
                del other["pool"]
                other.pop("mss_clamp", None)
                other["action"] = "drop"
        self._drop_unused(owner["name"])

    def _use(self, zone: Json, pool: str) -> None:
        zone.pop("action", None)
        zone["pool"] = pool

    def _drop_unused(self, pool: str | None) -> None:
        if pool and all(zone.get("pool") != pool for zone in self.config["zones"]):
            self.config["pools"] = [one for one in self.config["pools"] if one["name"] != pool]
            for collector in self.config["logging"]:
                if "pools" in collector:
                    collector["pools"] = [one for one in collector["pools"] if one != pool]
            self.config["logging"] = [one for one in self.config["logging"] if one.get("pools", True)]

    def text(self) -> str:
        head = "# Changed by ipvsadm. dsnat-fleet calls this drift; put it into fleet.yaml to keep it.\n"
        return head + "".join(f"{line}\n" for line in show.yaml(self.config))
