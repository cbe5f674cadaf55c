"""dsnat's own files -> what each machine of the original was told: a `Node`.

Read are keepalived.conf of dsnat's patched keepalived, the `ip addr` and `ip route` lines of rc.local, and
ipvsadm commands or the output of `ipvsadm -S`. What they mean is what the original made of them, bugs
included where they decide what an operator has today. Whatever is understood goes into the node, whatever
is known to mean nothing is passed over (SILENT), and all else is a remark with file and line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from itertools import pairwise

# Words with nothing to carry over: defaults of the successor, or without effect on 0.0.0.0:0 in the original.
SILENT = {
    *("delay_loop", "lb_algo", "lvs_sched", "lb_kind", "lvs_method", "alpha", "omega", "ops", "router_id"),
    *("dont_track_primary", "smtp_alert", "garp_master_delay", "debug", "quorum", "hysteresis"),
}
SHELL_SILENT = re.compile(
    r"^(echo\b.*ip_forward|ethtool\b.*\b(gro|lro)\b|set_irq_affinity|service\b|chkconfig\b|#|!|$|exit\b|touch\b)"
)


@dataclass
class Instance:
    name: str
    interface: str = ""
    id: int = 0
    priority: int = 100
    advert_s: int = 1
    addresses: list[IPv4Interface] = field(default_factory=list)
    password: bool = False
    preempt: bool = True


@dataclass
class Node:
    """One machine of the original, as its files describe it."""

    name: str
    groups: dict[str, list[str]] = field(default_factory=dict)  # local_address_group -> addresses and ranges
    zones: list[tuple[IPv4Network, str | None]] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    own: dict[str, list[IPv4Interface]] = field(default_factory=dict)
    routes: list[tuple[str, IPv4Address]] = field(default_factory=list)
    services: set[str] = field(default_factory=set)  # protocols of the 0.0.0.0:0 service


@dataclass(frozen=True)
class Line:
    number: int
    words: tuple[str, ...]
    inside: tuple[Line, ...] | None  # None: no block


Remark = Callable[[Line, str], None]


def _blocks(text: str, remark: Remark) -> list[Line]:
    """keepalived's syntax: words, and blocks in braces; # and ! begin a comment."""
    stack: list[list[Line]] = [[]]
    heads: list[tuple[int, tuple[str, ...]]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.split(r"[#!]", raw, maxsplit=1)[0].replace("{", " { ").replace("}", " } ")
        words: list[str] = []
        for word in line.split():
            if word == "{":
                if not words and stack[-1] and stack[-1][-1].inside is None:
                    head = stack[-1].pop()  # the brace stands on a line of its own
                    heads.append((head.number, head.words))
                else:
                    heads.append((number, tuple(words) or ("{",)))
                words = []
                stack.append([])
            elif word == "}":
                if words:
                    stack[-1].append(Line(number, tuple(words), None))
                    words = []
                if len(stack) > 1:
                    inside = tuple(stack.pop())
                    at, head_words = heads.pop()
                    stack[-1].append(Line(at, head_words, inside))
                else:
                    remark(Line(number, (), None), "a } that closes nothing")
            else:
                words.append(word)
        if words:
            stack[-1].append(Line(number, tuple(words), None))
    while heads:
        at, head_words = heads.pop()
        head = Line(at, head_words, tuple(stack.pop()))
        remark(head, f"{' '.join(head_words)} is never closed; taken to the end of the file")
        stack[-1].append(head)
    return stack[0]


def keepalived(file: str, text: str, name: str, remarks: list[str]) -> Node:
    node = Node(name)

    def remark(line: Line, what: str) -> None:
        remarks.append(f"{file}:{line.number}: {what}")

    sync: list[str] = []
    for line in _blocks(text, remark):
        word = line.words[0] if line.words else ""
        inside = line.inside or ()
        if word == "local_address_group" and len(line.words) > 1:
            node.groups.setdefault(line.words[1], []).extend(_laddrs(inside, remark))
        elif word == "zone" and len(line.words) > 1:
            _zone(line, node, remark)
        elif word == "vrrp_sync_group":
            sync += [w for part in inside for member in part.inside or () for w in member.words]
        elif word == "vrrp_instance" and len(line.words) > 1:
            node.instances.append(_instance(line, remark))
        elif word == "virtual_server":
            _virtual_server(line, node, remark)
        elif word == "global_defs":
            for part in inside:
                if part.words and part.words[0] not in SILENT:
                    remark(part, f"{part.words[0]} is not carried over")
        else:
            remark(line, f"{word or 'a block without a name'} is not carried over")
    alone = [i.name for i in node.instances if i.name not in sync]
    if alone and len(node.instances) > 1:
        remarks.append(
            f"{file}: {', '.join(alone)} moved by itself; now all instances of a gateway move together"
        )
    return node


def _laddrs(lines: Iterable[Line], remark: Remark) -> list[str]:
    found: list[str] = []
    for line in lines:
        for word in line.words:
            base, _, end = word.partition("-")
            base, _, length = base.partition("/")
            if length:
                remark(line, f"the original ignored /{length} in {word}; taken as the one address {base}")
            try:
                first = IPv4Address(base)
                if end:
                    last = IPv4Address(end) if "." in end else IPv4Address(f"{base.rpartition('.')[0]}.{end}")
                    if last < first:
                        remark(
                            line, f"the range {word} ends before it starts; the original took nothing from it"
                        )
                        continue
                    found.append(f"{first}-{last}")
                else:
                    found.append(str(first))
            except ValueError:
                remark(line, f"{word} is not an address or a range; left out")
    return found


def _zone(line: Line, node: Node, remark: Remark) -> None:
    address, mask = line.words[1], line.words[2] if len(line.words) > 2 else ""
    if "/" in address and not mask:
        address, _, mask = address.partition("/")
        remark(line, f"the original read zone {line.words[1]} as 0.0.0.0/0; imported as it is written")
    group = next(
        (part.words[1] for part in line.inside or () if part.words[:1] == ("laddr_group_name",)), None
    )
    network = _network(address, mask or "32")
    if network is None:
        remark(line, f"zone {address} {mask} is not a prefix; left out")
        return
    if str(network.network_address) != address:
        remark(line, f"zone {address} {mask} is written {network}; both match the same hosts")
    node.zones.append((network, group))


def _network(address: str, mask: str) -> IPv4Network | None:
    try:
        return IPv4Network(f"{address}/{mask}", strict=False)
    except ValueError:
        return None


def _instance(line: Line, remark: Remark) -> Instance:
    found = Instance(line.words[1])
    for part in line.inside or ():
        word, value = part.words[0], part.words[1] if len(part.words) > 1 else ""
        if word == "interface":
            found.interface = value
        elif word == "virtual_router_id" and value.isdigit():
            found.id = int(value)
        elif word == "priority" and value.isdigit():
            found.priority = min(int(value), 254)
        elif word == "advert_int" and value.isdigit():
            found.advert_s = int(value)
        elif word == "nopreempt":
            found.preempt = False
        elif word == "state":
            if value not in ("MASTER", "BACKUP"):
                remark(
                    part,
                    f"the original ignored state {value} (it compares with MASTER); the priority decides",
                )
        elif word == "authentication":
            kind = next((p.words[1] for p in part.inside or () if p.words[:1] == ("auth_type",)), "")
            if kind == "PASS":
                found.password = True
                remark(part, "the password becomes a reference; set VRRP_PASSWORD where dsnat-fleet runs")
            else:
                remark(
                    part,
                    f"the original ignored auth_type {kind or '(none)'}; there was no "
                    "authentication, and is none",
                )
        elif word in ("virtual_ipaddress", "virtual_ipaddress_excluded"):
            for entry in part.inside or ():
                try:
                    found.addresses.append(IPv4Interface(entry.words[0]))
                except ValueError:
                    remark(entry, f"{entry.words[0]} is not an IPv4 address; left out")
        elif word not in SILENT:
            remark(part, f"{word} of {found.name} is not carried over")
    return found


def _virtual_server(line: Line, node: Node, remark: Remark) -> None:
    if line.words[1:3] != ("0.0.0.0", "0"):
        remark(
            line, f"virtual_server {' '.join(line.words[1:])} is a load balancer, not source NAT; left out"
        )
        return
    group = None
    protocol = "TCP"
    for part in line.inside or ():
        word, value = part.words[0], part.words[1] if len(part.words) > 1 else ""
        if word == "protocol":
            protocol = value.upper()
        elif word == "laddr_group_name":
            group = value
        elif word == "syn_proxy":
            remark(part, "syn_proxy had no effect on 0.0.0.0:0; left out")
        elif word not in SILENT:
            remark(part, f"{word} of virtual_server is not carried over")
    node.services.add(protocol)
    if group is not None and not any(known == group for _, known in node.zones):
        # The first generation hung the pool off the service: every inside host.
        node.zones.append((IPv4Network("0.0.0.0/0"), group))


def shell(file: str, text: str, node: Node, remarks: list[str]) -> None:
    """rc.local and ipvsadm, line by line. The READMEs' en dashes are dashes."""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip().replace("\N{EN DASH}", "-")
        words = line.split()
        where = f"{file}:{number}"
        if SHELL_SILENT.match(line):
            continue
        if words[0] == "ipvsadm":
            words = words[1:]
        if words[:3] == ["ip", "addr", "add"] or words[:3] == ["ip", "address", "add"]:
            _ip_addr(words, where, node, remarks)
        elif words[:3] == ["ip", "route", "add"] or words[:2] == ["route", "add"]:
            _ip_route(words, where, node, remarks)
        elif words and words[0] in ("-A", "-P", "-K", "-a", "--add-service", "--add-laddr", "--add-zone"):
            _ipvsadm(words, where, node, remarks)
        else:
            remarks.append(f"{where}: {line} is not carried over")


def _ip_addr(words: list[str], where: str, node: Node, remarks: list[str]) -> None:
    try:
        address = IPv4Interface(words[3])
        node.own.setdefault(words[words.index("dev") + 1], []).append(address)
    except (ValueError, IndexError):
        remarks.append(f"{where}: {' '.join(words)} is not understood; left out")


def _ip_route(words: list[str], where: str, node: Node, remarks: list[str]) -> None:
    text = " ".join(words)
    via = re.search(r"\b(?:via|gw) (\S+)", text)
    mask = re.search(r"netmask (\S+)", text)
    to = next((w for w in words[2:] if w not in ("add", "-net", "-host")), "")
    try:
        prefix = (
            "default"
            if to == "default"
            else str(IPv4Network(f"{to}/{mask[1]}" if mask else to, strict=False))
        )
        node.routes.append((prefix, IPv4Address(via[1] if via else "")))
    except ValueError:
        remarks.append(f"{where}: {text} is not understood; left out")


def _ipvsadm(words: list[str], where: str, node: Node, remarks: list[str]) -> None:
    options = dict(pairwise(words[1:]))
    service = next((options[k] for k in ("-t", "-u", "--tcp-service", "--udp-service") if k in options), None)
    address = options.get("-z") or options.get("--laddr")
    zone = options.get("--zone")
    if service is not None and service not in ("0.0.0.0:0", "0.0.0.0:00"):
        remarks.append(f"{where}: the service {service} is a load balancer's, not source NAT; left out")
    elif words[0] in ("-A", "--add-service"):
        node.services.add("UDP" if "-u" in options else "TCP")
    elif words[0] in ("-K", "--add-zone") and zone is not None:
        network = _zone_of(zone)
        if network is None:
            remarks.append(f"{where}: {zone} is not a prefix; left out")
        elif not any(known == network for known, _ in node.zones):
            node.zones.append((network, None))
    elif words[0] in ("-P", "--add-laddr") and address is not None:
        network = IPv4Network("0.0.0.0/0") if zone is None else _zone_of(zone)
        if network is None:
            remarks.append(f"{where}: {zone} is not a prefix; left out")
            return
        try:
            IPv4Address(address)
        except ValueError:
            remarks.append(f"{where}: {address} is not an address; left out")
            return
        group = f"laddr_{str(network).replace('.', '_').replace('/', '_')}" if zone is not None else "laddr"
        node.groups.setdefault(group, []).append(address)
        node.zones = [(known, group if known == network else named) for known, named in node.zones]
        if not any(known == network for known, _ in node.zones):
            node.zones.append((network, group))
    elif words[0] == "-a":
        pass  # the dummy real server 1.0.0.1:1
    else:
        remarks.append(f"{where}: {' '.join(words)} is not carried over")


def _zone_of(text: str) -> IPv4Network | None:
    address, _, mask = text.partition("/")
    parts = address.split(".")
    if any(len(p) > 1 and p.startswith("0") for p in parts):
        parts = [str(int(p, 8)) if p.startswith("0") and p.isdigit() else p for p in parts]  # inet_aton
    return _network(".".join(parts + ["0"] * (4 - len(parts))), mask or "32")
