"""What peers cost per packet, as published: measured elsewhere, not in this run.

On 2 virtual cores of a Xeon with AVX-512 (TSC 2.6 GHz, core about 3.6 GHz), 64-byte frames, one core, a
random session per packet in another order than that of creation; minimum and median of several windows, good
to about 30 %. Ratios to them are therefore hints, and the picture draws them dashed.
"""

from __future__ import annotations

from dataclasses import dataclass

MACHINE = "2 virtual cores of a Xeon with AVX-512, TSC 2.6 GHz"


@dataclass(frozen=True)
class Peer:
    name: str
    short: str
    what: str  # the row of ours to compare it with
    cycles: dict[int, tuple[float, float]]  # sessions -> minimum, median


VPP = "VPP nat44-ed (2026-08)"
LINUX = "Linux 6.18 forward + conntrack + nft SNAT"

PEERS = (
    Peer(
        VPP,
        "VPP nat44-ed",
        "core.inside_to_outside.udp",
        {
            1: (121, 129),
            10_000: (246, 254),
            100_000: (451, 665),
            1_000_000: (960, 1265),
            4_000_000: (1233, 1378),
        },
    ),
    Peer(
        VPP,
        "VPP nat44-ed",
        "core.outside_to_inside.udp",
        {
            1: (120, 130),
            10_000: (243, 263),
            100_000: (618, 850),
            1_000_000: (883, 1151),
            4_000_000: (1212, 1258),
        },
    ),
    Peer(
        VPP,
        "VPP nat44-ed",
        "core.new_session.udp",
        {10_000: (1620, 1620), 100_000: (2460, 2460), 1_000_000: (3830, 3830), 4_000_000: (3830, 3830)},
    ),
    Peer(
        LINUX,
        "Linux nft SNAT",
        "core.inside_to_outside.udp",
        {1: (1417, 1417), 10_000: (1725, 1725), 500_000: (3683, 3683)},
    ),
    Peer(LINUX, "Linux nft SNAT", "core.new_session.udp", {10_000: (4190, 4190), 500_000: (8430, 8430)}),
)

BYTES_PER_SESSION = {VPP: 640, LINUX: 256}

# What we want: cycles per packet in both directions, per new session, and bytes.
GOAL_PACKET = {10_000: 70, 1_000_000: 110, 4_000_000: 130, 8_000_000: 150}
GOAL_NEW_SESSION = {1_000_000: 350}
GOAL_BYTES = 96
GOAL_FLOOD_PERCENT = 20  # established traffic beside a SYN flood


def cycles(peer: str, what: str, sessions: int) -> float | None:
    """The published minimum, where the peer was measured with as many sessions."""
    for one in PEERS:
        if one.name == peer and one.what == what and sessions in one.cycles:
            return one.cycles[sessions][0]
    return None
