"""Coming from dsnat: its own files in, `fleet.yaml` out.

dsnat_files.py reads one node after the other; the master's and the backup's together become a pair. Every
decision that changes what an operator had is a remark, and nothing is dropped in silence.

What those files cannot know (management address, host key, a NIC's PCI address) is given by the caller,
or stands in the result as CHANGE-ME, which `validate` then points at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

from provision.dsnat_files import Instance, Node, keepalived, shell

CHANGE = "CHANGE-ME"


@dataclass(frozen=True)
class Known:
    """What the original's files do not say about a node."""

    management: str = CHANGE
    host_key: str = CHANGE
    addresses: tuple[tuple[str, str], ...] = ()  # interface, address/length
    devices: tuple[tuple[str, str], ...] = ()  # interface, PCI address


class NotDsnat(Exception):
    """Files that hold nothing to import. One sentence."""


@dataclass(frozen=True)
class Imported:
    text: str
    remarks: tuple[str, ...]
    gateways: tuple[str, ...]


def import_files(files: Sequence[tuple[str, str]], known: dict[str, Known] | None = None) -> Imported:
    """`files`: name and text of each, in the order given. A keepalived.conf begins a node, others add to
    it.
    """
    remarks: list[str] = []
    nodes: list[Node] = []
    for name, text in files:
        if re.search(
            r"(?m)^\s*(local_address_group|vrrp_instance|vrrp_sync_group|virtual_server|zone|global_defs)\b.*\{",
            text,
        ):
            nodes.append(keepalived(name, text, f"gw{len(nodes) + 1}", remarks))
        else:
            if not nodes:
                nodes.append(Node("gw1"))
            shell(name, text, nodes[-1], remarks)
    if all(node == Node(node.name) for node in nodes):
        raise NotDsnat("nothing of dsnat's stands in what was given; name keepalived.conf first")
    names = tuple(node.name for node in nodes)
    return Imported(_fleet(nodes, known or {}, remarks), tuple(remarks), names)


def _fleet(nodes: list[Node], known: dict[str, Known], remarks: list[str]) -> str:
    for node in nodes:
        for interface, address in known.get(node.name, Known()).addresses:
            try:
                node.own.setdefault(interface, []).append(IPv4Interface(address))
            except ValueError:
                remarks.append(
                    f"{node.name}: {address} of {interface} is not an address with its length; left out"
                )
    first = nodes[0]
    for other in nodes[1:]:
        if (other.groups, other.zones) != (first.groups, first.zones):
            remarks.append(
                f"{other.name}: pools and zones differ from {first.name}'s; a pair has them "
                f"once, {first.name}'s count"
            )
    if len(nodes) > 2:
        remarks.append(
            f"{len(nodes)} nodes: a pair has two; the others stand below it and need a pair of their own"
        )
    pools = _pools(first, remarks)
    floating = _floating(first, pools, remarks)
    lines = ["# Imported from dsnat by dsnat-fleet.", "schema: 1", *_pool_lines(pools)]
    service = _service_lines(first, nodes, floating, pools, remarks)
    if len(nodes) > 1:
        lines += ["pairs:", "  edge:", *(f"    {line}" for line in service)]
        service = ["pair: edge"]
    lines.append("gateways:")
    for position, node in enumerate(nodes):
        lines.append(f"  {node.name}:")
        own = service if position < 2 else []
        lines += [
            f"    {line}"
            for line in [*own, *_gateway_lines(node, known.get(node.name, Known()), floating, pools, remarks)]
        ]
    return "\n".join(lines) + "\n"


Pools = dict[str, list[str]]


def _pools(node: Node, remarks: list[str]) -> Pools:
    pools: Pools = {}
    taken: dict[str, str] = {}
    for name, addresses in node.groups.items():
        for address in addresses:
            if taken.setdefault(address, name) != name:
                remarks.append(
                    f"{address} is in {taken[address]} and in {name}; a pool owns its "
                    f"addresses, {taken[address]} keeps it"
                )
            elif address not in pools.setdefault(name, []):
                pools[name].append(address)
    return {name: addresses for name, addresses in pools.items() if addresses}


def _in_pool(address: IPv4Address, pools: Pools) -> bool:
    from provision.values import span

    return any(low <= int(address) <= high for found in pools.values() for low, high in map(span, found))


def _floating(node: Node, pools: Pools, remarks: list[str]) -> list[tuple[Instance, list[IPv4Interface]]]:
    """VRRP instances with the addresses that still float: the engine answers for a pool's addresses
    itself.
    """
    found: list[tuple[Instance, list[IPv4Interface]]] = []
    for instance in node.instances:
        left = [a for a in instance.addresses if not _in_pool(a.ip, pools)]
        gone = [str(a.ip) for a in instance.addresses if _in_pool(a.ip, pools)]
        if gone:
            remarks.append(
                f"{instance.name}: {', '.join(gone)} no longer float, the engine answers for "
                "a pool's addresses itself"
                f" while this gateway is master"
            )
        if left:
            found.append((instance, left))
        elif instance.addresses:
            remarks.append(
                f"{instance.name} has nothing left to float and is gone; the other instances "
                "decide who is master"
            )
    return found


def _pool_lines(pools: Pools) -> list[str]:
    if not pools:
        return []
    return [
        "pools:",
        *(f"  {name}: {{addresses: [{', '.join(addresses)}]}}" for name, addresses in pools.items()),
    ]


def _service_lines(
    node: Node,
    nodes: list[Node],
    floating: list[tuple[Instance, list[IPv4Interface]]],
    pools: Pools,
    remarks: list[str],
) -> list[str]:
    lines = ["profile: dsnat"]
    if node.services and not {"TCP", "UDP"} <= node.services:
        remarks.append(f"only {'/'.join(sorted(node.services))} was translated; TCP, UDP and ping are now")
    if floating:
        lines += ["vrrp:"]
        if any(instance.password for instance, _ in floating):
            lines += ["  version: 2", "  authentication: {password: 'env:VRRP_PASSWORD'}"]
        if len({i.advert_s for i, _ in floating}) == 1:
            lines += [f"  advert_interval: {floating[0][0].advert_s}s"]
        if all(instance.preempt for instance, _ in floating):
            lines += ["  preempt: true"]
        lines += ["  instances:"]
        for instance, addresses in floating:
            shown = [str(_with_prefix(a, instance.interface, nodes)) for a in addresses]
            lines += [f"    {instance.interface}: {{id: {instance.id}, addresses: [{', '.join(shown)}]}}"]
    if node.zones:
        lines += ["zones:"]
        for network, group in node.zones:
            if group in pools:
                lines += [f"  - {{source: {network}, pool: {group}}}"]
            else:
                if group is not None and group not in node.groups:
                    remarks.append(f"zone {network} names {group}, and there is no such group; it is dropped")
                lines += [f"  - {{source: {network}, action: drop}}"]
    if node.routes:
        lines += ["routes:", *(f"  - {{to: {to}, via: {via}}}" for to, via in node.routes)]
    return lines


def _with_prefix(address: IPv4Interface, interface: str, nodes: list[Node]) -> IPv4Interface:
    """keepalived takes an address without a length as /32; the interface's own prefix is what was meant."""
    if address.network.prefixlen < 32:
        return address
    for node in nodes:
        for own in node.own.get(interface, []):
            if address.ip in own.network:
                return IPv4Interface(f"{address.ip}/{own.network.prefixlen}")
    return address


def _gateway_lines(
    node: Node,
    known: Known,
    floating: list[tuple[Instance, list[IPv4Interface]]],
    pools: Pools,
    remarks: list[str],
) -> list[str]:
    priorities = {instance.priority for instance in node.instances} or {100}
    if len(priorities) > 1:
        remarks.append(
            f"{node.name}: its instances have different priorities; a gateway has one, the highest counts"
        )
    lines = [
        f"priority: {max(priorities)}",
        f"management: {{address: {known.management}}}",
        f"host_key: {known.host_key}",
        "interfaces:",
    ]
    floats = {str(a.ip) for _, addresses in floating for a in addresses}
    names = dict.fromkeys([*(i.interface for i in node.instances), *node.own])
    outside = _outside(node, pools)
    devices = dict(known.devices)
    for name in names:
        addresses: list[str] = []
        for own in node.own.get(name, []):
            if _in_pool(own.ip, pools) or str(own.ip) in floats:
                remarks.append(
                    f"{node.name}: {own.ip} on {name} belongs to a pool or to VRRP; no longer bound at boot"
                )
            else:
                addresses.append(str(own))
        if not addresses:
            addresses = [CHANGE]
        role = "outside" if name in outside else "inside"
        way = f'path: dpdk, device: "{devices[name]}"' if name in devices else "path: nfqueue"
        lines.append(f"  {name}: {{role: {role}, {way}, addresses: [{', '.join(addresses)}]}}")
    return lines


def _outside(node: Node, pools: Pools) -> set[str]:
    """The interface that had, or whose prefix holds, a pool's addresses; else the last one."""
    found: set[str] = set()
    for instance in node.instances:
        if any(_in_pool(a.ip, pools) for a in instance.addresses):
            found.add(instance.interface)
    for name, addresses in node.own.items():
        if any(_in_pool(a.ip, pools) for a in addresses):
            found.add(name)
    names = list(dict.fromkeys([*(i.interface for i in node.instances), *node.own]))
    return found or set(names[1:][-1:])
