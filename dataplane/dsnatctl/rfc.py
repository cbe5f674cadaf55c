"""Which clauses of the NAT RFCs the running settings give up. A choice is printed, not hidden.

What the engine does under the settings that give up nothing is the table in dataplane/README.md, joined to
its tests by `make rfc`.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsnatctl.client import Json

# What a setting gives up. tests/repo/test_rfc.py holds these two and the table together.
DEPENDENT = (
    "RFC 4787 REQ-1, REQ-3, REQ-3a, REQ-4, REQ-8, REQ-9, REQ-9a; "
    "RFC 5382 REQ-1, REQ-3, REQ-7, REQ-8, REQ-8a; RFC 5508 REQ-1a, REQ-7, REQ-7a; "
    "RFC 6888 REQ-1, REQ-7, REQ-9; RFC 7857 §12"
)
ROUND_ROBIN = "RFC 4787 REQ-2; RFC 6888 REQ-2; RFC 7857 §4"
# timer -> (at least this many seconds, clause)
FLOORS = {
    "tcp_established": (7440, "RFC 5382 REQ-5"),
    "tcp_opening": (240, "RFC 5382 REQ-5; RFC 7857 §2.1"),
    "tcp_closing": (240, "RFC 5382 REQ-5; RFC 7857 §2.1"),
    "udp": (120, "RFC 4787 REQ-5"),
    "udp_one_way": (120, "RFC 4787 REQ-5"),
    "icmp": (60, "RFC 5508 REQ-2"),
    "hold": (120, "RFC 6888 REQ-8"),
}


def given_up(config: Json) -> Iterator[tuple[str, str, str]]:
    """(setting, clauses, why it may be right)"""
    for pool in config["pools"]:
        name = f"pool {pool['name']}: "
        if pool["mapping"] == "endpoint-dependent":
            yield name + "mapping: endpoint-dependent", DEPENDENT, "a port serves many remotes: more capacity"
        if pool["select"] == "round-robin":
            yield name + "select: round-robin", ROUND_ROBIN, "load is even over the addresses"
        if pool.get("filtering") in ("address-dependent", "address-and-port-dependent"):
            clauses = "RFC 4787 REQ-8 (transparency); RFC 6888 REQ-7"
            yield f"{name}filtering: {pool['filtering']}", clauses, "fewer may send to a mapping"
        if int(pool["ports"].split("-")[0]) > 1024:
            yield (
                f"{name}ports: {pool['ports']}",
                "RFC 6888 REQ-13 (full use of the ports)",
                "ports are reserved",
            )
    for timer, (floor_s, clause) in FLOORS.items():
        value = config["timeouts"][timer]
        if int(value.removesuffix("s")) < floor_s:
            yield f"timeouts: {timer}: {value}", f"{clause} (at least {floor_s}s)", "state is freed earlier"
    if not config["limits"]["sessions_per_host"]:
        yield (
            "limits: sessions_per_host: 0",
            "RFC 6888 REQ-4, REQ-5 are possible and not used",
            "no host is ever refused",
        )
    if config["refusal"] == "silent":
        clauses = "RFC 5508 REQ-8; RFC 6888 REQ-11B"
        yield "refusal: silent", clauses, "nothing is said to a host that gets no session"
    if config["refusal"] == "icmp-admin":
        yield "refusal: icmp-admin", "RFC 6888 REQ-11B (asks for 3/1)", "RFC 5508 REQ-8 asks for 3/13"
    if config["refusal"] == "icmp-host":
        yield "refusal: icmp-host", "RFC 5508 REQ-8 (asks for 3/13)", "RFC 6888 REQ-11B asks for 3/1"
    for collector in config["logging"]:
        if collector["destinations"] == "on":
            setting = f"logging: {collector['collector']}: destinations: on"
            yield setting, "RFC 6888 REQ-12", "hosts that share a port at one time can be told apart"


def lines(answer: Json) -> Iterator[str]:
    found = list(given_up(answer["config"]))
    if not found:
        yield "the settings give up no clause of RFC 4787, 5382, 5508, 6888 and 7857"
    for setting, clauses, why in found:
        yield setting
        yield f"  gives up  {clauses}"
        yield f"  because   {why}"
