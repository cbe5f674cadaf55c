"""A pool cut into slices, one for each gateway of a cluster. Pure arithmetic on address numbers.

The cut is a function of three things: the pool, the weights, and the cut that there was before. What a
member had it keeps, unless it has too much; so a member that comes or goes moves its own share and no
other address. The cut before stands in `fleet.slices.yaml`, which the tool writes and the operator commits.

Addresses move in blocks: whole, aligned powers of two, so that a slice is announced as few prefixes. A
block is about a sixteenth of an equal share, which is how even the slices can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, summarize_address_range

Range = tuple[int, int]  # first and last address, both included

BLOCKS_PER_SHARE = 16


def size(ranges: Iterable[Range]) -> int:
    return sum(last - first + 1 for first, last in ranges)


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Sorted, with neighbours joined."""
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def common(one: Iterable[Range], two: Iterable[Range]) -> list[Range]:
    """What is in both."""
    others = merged(two)
    both = ((max(a, c), min(b, d)) for a, b in one for c, d in others)
    return merged((first, last) for first, last in both if first <= last)


def without(ranges: Iterable[Range], taken: Iterable[Range]) -> list[Range]:
    left: list[Range] = []
    gaps = merged(taken)
    for first, last in merged(ranges):
        for low, high in gaps:
            if high < first or low > last:
                continue
            if low > first:
                left.append((first, low - 1))
            first = high + 1
        if first <= last:
            left.append((first, last))
    return left


def text(ranges: Iterable[Range]) -> list[str]:
    """As people write them: an address, or its first and last."""
    return [
        str(IPv4Address(first)) if first == last else f"{IPv4Address(first)}-{IPv4Address(last)}"
        for first, last in merged(ranges)
    ]


def prefixes(ranges: Iterable[Range]) -> list[str]:
    """As routers write them."""
    return [
        str(prefix)
        for first, last in merged(ranges)
        for prefix in summarize_address_range(IPv4Address(first), IPv4Address(last))
    ]


def block_size(addresses: int, members: int) -> int:
    """The largest power of two that gives each member so many blocks, and at least one address."""
    share = addresses // max(1, members * BLOCKS_PER_SHARE)
    return 1 << max(0, share.bit_length() - 1)


def _blocks(ranges: Iterable[Range], most: int) -> list[Range]:
    """Aligned blocks of at most so many addresses."""
    found: list[Range] = []
    for first, last in merged(ranges):
        while first <= last:
            step = most if first == 0 else min(most, first & -first)
            while first + step - 1 > last:
                step //= 2
            found.append((first, first + step - 1))
            first += step
    return found


def divide(
    pool: Sequence[Range], weights: Mapping[str, int], before: Mapping[str, Sequence[Range]]
) -> dict[str, list[Range]]:
    """Who owns what. A member of weight 0 owns nothing; the others differ by less than a block from their
    share.
    """
    active = {name: weight for name, weight in weights.items() if weight}
    owned: dict[str, list[Range]] = {name: [] for name in weights}
    if not active:
        return owned
    whole, total = merged(pool), sum(active.values())
    most = block_size(size(whole), len(active))
    share = {name: size(whole) * weight / total for name, weight in active.items()}
    left, blocks = whole, {}
    for name in active:  # of what two had before, by hand, the first keeps it
        blocks[name] = _blocks(common(before.get(name, ()), left), most)
        left = without(left, blocks[name])
    have = {name: size(listed) for name, listed in blocks.items()}

    def lacks(name: str) -> float:
        return share[name] - have[name]

    def give(name: str, block: Range) -> None:
        blocks[name].append(block)
        have[name] += size([block])

    name = ""
    for block in _blocks(left, most):
        if not name or lacks(name) < size([block]) / 2:  # else the same as before: fewer prefixes
            name = max(active, key=lacks)
        give(name, block)
    while True:
        poor, rich = max(active, key=lacks), min(active, key=lacks)
        worst = max(lacks(poor), -lacks(rich))
        helps = [
            block
            for block in blocks[rich]
            if max(abs(lacks(poor) - size([block])), abs(lacks(rich) + size([block]))) < worst
        ]
        if not helps:
            break
        block = max(helps, key=lambda b: (size([b]), b))
        blocks[rich].remove(block)
        have[rich] -= size([block])
        give(poor, block)
    return owned | {name: merged(listed) for name, listed in blocks.items()}
