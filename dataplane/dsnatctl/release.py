"""Takes away what the engine leaves in the kernel on purpose.

When the engine stops or dies, three things stay, so that nothing leaves the gateway untranslated and VRRP
does not move: the fail-closed rules, the rules that drop the kernel's own copy of a port's packets, and the
twins. That is right for a gateway, and wrong for a machine that is to become something else. Only this verb
removes them, and only when no engine runs.

    nft tables    inet dsnat_failclosed, ip dsnat (the queue path), netdev dsnat-*
    interfaces    TAP devices with the name of a DPDK interface of the configuration (the twins), TUN dsnat0
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Collection, Sequence
from typing import Any

Run = Callable[[Sequence[str]], str]


class ReleaseError(Exception):
    """A command of the kernel's tools failed."""


def run(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ReleaseError(f"{argv[0]} is not installed; install it") from error
    if done.returncode:
        raise ReleaseError(f"{' '.join(argv)}: {done.stderr.strip()}; are you root?")
    return done.stdout


def tables(listing: str) -> list[tuple[str, str]]:
    """(family, name) of our tables in what `nft --json list tables` prints."""
    found: list[tuple[str, str]] = []
    for item in json.loads(listing).get("nftables", []):
        table: dict[str, Any] = item.get("table", {})
        family, name = table.get("family", ""), table.get("name", "")
        if (family, name) in {("inet", "dsnat_failclosed"), ("ip", "dsnat")} or (
            family == "netdev" and name.startswith("dsnat-")
        ):
            found.append((family, name))
    return found


def dpdk_interfaces(facts: str) -> set[str]:
    """Names in what `dsnatd --facts FILE` prints: interface NAME ROLE PATH DEVICE."""
    words = [line.split() for line in facts.splitlines()]
    return {word[1] for word in words if word[:1] == ["interface"] and word[3:4] == ["dpdk"]}


def links(listing: str, twins: Collection[str]) -> list[str]:
    """Our interfaces in what `ip -json -details link show` prints. A real NIC of that name is not ours."""
    return [
        str(link["ifname"])
        for link in json.loads(listing or "[]")
        if link.get("linkinfo", {}).get("info_kind") == "tun" and link["ifname"] in {*twins, "dsnat0"}
    ]


def release(config: str, *, run: Run = run) -> list[str]:
    """What was removed, in words. Interfaces first: while a rule still stands nothing can leak."""
    done = []
    twins = dpdk_interfaces(run(["dsnatd", "--facts", config]))
    for name in links(run(["ip", "-json", "-details", "link", "show"]), twins):
        run(["ip", "link", "delete", name])
        done.append(f"interface {name}")
    for family, name in tables(run(["nft", "--json", "list", "tables"])):
        run(["nft", "delete", "table", family, name])
        done.append(f"nft table {family} {name}")
    return done
