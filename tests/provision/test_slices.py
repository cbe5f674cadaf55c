"""A pool cut into slices: whole, even, and moved as little as can be."""

from __future__ import annotations

from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from provision.slices import Range, block_size, common, divide, merged, prefixes, size, without

BASE = int(IPv4Address("203.0.113.0"))
POOL: list[Range] = [(BASE, BASE + 16383)]
WEIGHTS = st.dictionaries(st.sampled_from([f"gw{n}" for n in range(12)]), st.integers(0, 4), min_size=1)


@st.composite
def pools(draw: st.DrawFn) -> list[Range]:
    found: list[Range] = []
    for gap, length in draw(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=4)
    ):
        first = (found[-1][1] if found else BASE) + gap
        found.append((first, first + length - 1))
    return found


@settings(max_examples=60, deadline=None)
@given(pool=pools(), history=st.lists(WEIGHTS, min_size=1, max_size=5))
def test_every_address_has_one_owner_whatever_came_before(
    pool: list[Range], history: list[dict[str, int]]
) -> None:
    owned: dict[str, list[Range]] = {}
    for weights in history:
        owned = divide(pool, weights, owned)
        active = [name for name, weight in weights.items() if weight]
        everything = [r for ranges in owned.values() for r in ranges]
        assert size(everything) == (size(pool) if active else 0)
        assert merged(everything) == (merged(pool) if active else [])
        assert all(not ranges for name, ranges in owned.items() if not weights[name])
        share = {name: size(pool) * weights[name] / sum(weights.values()) for name in active}
        block = block_size(size(pool), len(active))
        assert all(abs(size(owned[name]) - share[name]) <= max(block, 1) for name in active)
    assert divide(pool, history[-1], owned) == owned, "the same again moves nothing"


def test_a_member_that_comes_takes_its_share_and_nothing_else_moves() -> None:
    weights = {f"gw{n}": 1 for n in range(64)}
    before = divide(POOL, weights, {})
    after = divide(POOL, weights | {"new": 1}, before)
    moved = {name: without(before[name], after[name]) for name in weights}
    assert merged(r for ranges in moved.values() for r in ranges) == after["new"]
    assert size(after["new"]) == 248  # 16384 / 65 = 252, in blocks of 8


def test_a_member_that_goes_leaves_its_share_and_nothing_else_moves() -> None:
    weights = {f"gw{n}": 1 for n in range(64)}
    before = divide(POOL, weights, {})
    after = divide(POOL, weights | {"gw7": 0}, before)
    assert all(not without(before[name], after[name]) for name in weights if name != "gw7")
    assert after["gw7"] == []


def test_a_first_division_is_one_prefix_each() -> None:
    owned = divide(POOL, {f"gw{n}": 1 for n in range(64)}, {})
    assert [prefixes(ranges) for ranges in owned.values()][1] == ["203.0.114.0/24"]
    assert all(len(prefixes(ranges)) == 1 for ranges in owned.values())


def test_a_weight_of_three_owns_three_times_as_much() -> None:
    owned = divide([(BASE, BASE + 255)], {"big": 3, "small": 1}, {})
    assert {name: size(ranges) for name, ranges in owned.items()} == {"big": 192, "small": 64}


def test_a_division_by_hand_that_overlaps_is_put_right() -> None:
    before: dict[str, list[Range]] = {"a": [(BASE, BASE + 9)], "b": [(BASE + 5, BASE + 15)]}
    owned = divide([(BASE, BASE + 15)], {"a": 1, "b": 1}, before)
    assert common(owned["a"], owned["b"]) == []
