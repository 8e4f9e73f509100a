# SPDX-License-Identifier: Apache-2.0
"""The longest match: what a linear walk would find, held, with a handful of look-ups."""

from collections.abc import Callable

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.token_chain import TokenChain
from tests.fast.instances import Instance, block_of, cache, digests, matched
from tests.fast.raw_segment import REGISTERED

Make = Callable[..., Instance]


def test_nothing_matches_in_an_empty_table(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    assert table.match(Keys(digests(5)), 0, 5) == (0, None)
    assert table.match(Keys([]), 0, 5) == (0, None)
    assert table.held() == {}


@pytest.mark.parametrize("present", [1, 2, 3, 7, 31, 32, 33, 63, 64])
def test_the_match_ends_where_the_cached_prefix_ends(make_instance: Make, present: int) -> None:
    made = make_instance(64)
    table = made.leader()
    keys = Keys(digests(64))
    refs = cache(table, keys, present)
    for start in range(64):
        for stop in (0, start, start + 1, present, 64, 1000):
            expected = max(0, min(stop, present) - start) if start < present else 0
            count, ref = table.match(keys, start, stop)
            assert count == expected
            assert ref == (refs[start + count - 1] if count else None)
            if ref is not None:
                table.unpin(ref)


def test_a_match_asks_the_first_the_last_and_then_bisects(make_instance: Make) -> None:
    made = make_instance(1024)
    table = made.leader()
    keys = Keys(digests(1000))
    probes = []

    def look() -> None:
        before = made.creator.counters()["lookup_probes"]
        matched(table, keys)
        probes.append(made.creator.counters()["lookup_probes"] - before)

    look()
    cache(table, keys, 500)
    look()
    cache(table, keys)
    look()
    assert probes[0] == 1
    assert probes[1] <= 2 + len(bin(1000)) - 2
    assert probes[2] == 2


def test_a_match_is_counted(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    cache(table, Keys(digests(8)))
    before = made.creator.counters()
    matched(table, Keys(digests(12)))
    after = made.creator.counters()
    delta = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert delta.pop("lookup_probes") >= 2
    assert delta == {"lookups": 1, "lookup_blocks": 12, "matched_blocks": 8}


def test_what_is_held_to_be_copied_is_found_like_a_match_and_counted_as_none(
    make_instance: Make,
) -> None:
    made = make_instance(16)
    table = made.leader()
    cache(table, Keys(digests(8)))
    before = made.creator.counters()
    for stop, found in ((12, 8), (8, 8), (3, 3), (0, 0)):
        count, ref = table.hold_longest(Keys(digests(12)), stop)
        assert (count, ref is None) == (found, found == 0)
        if ref is not None:
            assert table.is_current(ref)
            table.unpin(ref)
    assert table.hold_longest(Keys(digests(3, "other")), 3) == (0, None)
    assert made.creator.counters() == before
    assert {made.raw.cold(block)[4] for block in range(16)} == {0}


def test_a_match_is_noted_at_the_block_where_it_ends(make_instance: Make) -> None:
    made = make_instance(8)
    first, second = made.leader(), made.leader(2)
    keys = Keys(digests(8))
    refs = cache(first, keys)

    def uses() -> list[int]:
        return [made.raw.cold(block_of(ref))[4] for ref in refs]

    assert uses() == [0] * 8
    for table, stop in ((first, 8), (second, 8), (second, 3), (first, 8)):
        assert matched(table, keys, 0, stop) == stop
    assert matched(first, Keys(digests(5, "other"))) == 0
    held = first.hold(keys, 4)
    assert held is not None
    first.unpin(held)  # the cache's own look is no use
    assert uses() == [0, 0, 1, 0, 0, 0, 0, 3]
    again = cache(first, Keys(digests(8, "other")))  # the records have other blocks now
    assert [made.raw.cold(block_of(ref))[4] for ref in again] == [0] * 8


def test_the_deepest_block_is_held_until_its_last_return(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    keys = Keys(digests(4))
    refs = cache(table, keys)
    first, again = table.match(keys, 0, 4)[1], table.match(keys, 0, 4)[1]
    assert first == again == refs[-1]
    assert table.held() == {block_of(refs[-1]): 2}
    table.unpin(refs[-1])
    assert made.raw.block(block_of(refs[-1])).holders == {0}
    table.unpin(refs[-1])
    assert table.held() == {}
    assert made.raw.block(block_of(refs[-1])).holders == frozenset()


def test_two_leaders_hold_a_block_independently(make_instance: Make) -> None:
    made = make_instance(16)
    first, second = made.leader(1), made.leader(2)
    keys = Keys(digests(4))
    refs = cache(first, keys)
    assert second.match(keys, 0, 4) == first.match(keys, 0, 4) == (4, refs[-1])
    first.unpin(refs[-1])
    assert made.raw.block(block_of(refs[-1])).holders == {1}
    second.unpin(refs[-1])


def test_groups_and_sequences_do_not_share_blocks(make_instance: Make) -> None:
    made = make_instance(32)
    table = made.leader()
    cache(table, Keys(digests(4)))
    assert matched(table, Keys(digests(4), group=1)) == 0
    assert matched(table, Keys(digests(4, "other"))) == 0
    cache(table, Keys(digests(4), group=1))
    assert matched(table, Keys(digests(4), group=1)) == 4
    assert made.raw.cold(4)[2] == 1


def test_a_chain_of_our_own_is_matched_like_the_engines(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    chain = TokenChain(16, 7)
    chain.update(range(100))
    keys = Keys(chain)
    refs = cache(table, keys, 4)
    assert matched(table, keys) == 4
    chain.update(range(200))
    assert len(keys) == 12
    cache(table, keys)
    assert matched(table, keys) == 12
    block = made.raw.block(block_of(refs[3]))
    assert block.digest == chain.digest(3)
    assert made.raw.cold(block_of(refs[3]))[:2] == (chain.sequence_hash(3), 3)


def test_an_engine_block_hash_is_the_last_of_its_stride(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    hashes = digests(11)
    keys = Keys(hashes, stride=3)
    refs = cache(table, keys)
    assert [made.raw.block(block_of(ref)).digest for ref in refs] == [
        hashes[i][:16] for i in (2, 5, 8)
    ]


@pytest.mark.parametrize("present", [0, 1, 10, 49, 50])
def test_bisection_agrees_with_a_walk(make_instance: Make, present: int) -> None:
    made = make_instance(256)
    table = made.leader()
    trunk = digests(50)
    cache(table, Keys(trunk), present)
    cache(table, Keys(trunk[:present] + digests(30, "fork")))
    for branch in (trunk, trunk[:present] + digests(50, "fork"), trunk[:5] + digests(9, "no")):
        known = {block.digest for block in made.raw.blocks() if block.state == REGISTERED}
        walked = next((i for i, d in enumerate(branch) if d[:16] not in known), len(branch))
        assert matched(table, Keys(branch)) == walked


def test_a_negative_start_is_refused(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    keys = Keys(digests(4))
    for call in (table.match, table.reserve):
        with pytest.raises(ValueError, match="start -1 is negative"):
            call(keys, -1, 4)
    with pytest.raises(ValueError, match="start -1 is negative"):
        table.store(keys, -1, 4, [0, 1, 2, 3], None, 0)


@pytest.mark.parametrize("bad", [b"short", "text", None, 17])
def test_a_bad_block_hash_is_named_and_nothing_is_left(make_instance: Make, bad: object) -> None:
    made = make_instance(16)
    table = made.leader()
    keys = Keys([*digests(3), bad, *digests(1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="block hash 3"):
        table.reserve(keys, 0, 5)
    with pytest.raises(ValueError, match="block hash 3"):
        table.store(keys, 0, 5, [0] * 5, None, 0)
    with pytest.raises(ValueError, match="block hash 3"):
        table.match(Keys([bad] * 4), 3, 5)  # type: ignore[list-item]
    assert table.held() == {}
    assert made.creator.free_blocks() == 16
