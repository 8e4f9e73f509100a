# SPDX-License-Identifier: Apache-2.0
"""The order of eviction: lowest priority, then least recently returned, leaves first."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.table import BlockTable
from tests.fast.instances import Instance, block_of, digests, fill, instance
from tests.fast.raw_segment import HOST, REGISTERED, RawSegment
from tests.leaks import wait_until

Make = Callable[..., Instance]


def expected_victim(raw: RawSegment) -> int | None:
    """The block that upstream would evict next."""
    evictable = [
        (block.priority, block.tick, index)
        for index, block in enumerate(raw.blocks())
        if block.state == REGISTERED and not block.holders and block.children == 0
    ]
    return min(evictable)[2] if evictable else None


def evict_one(table: BlockTable, raw: RawSegment, seed: object) -> int | None:
    """Make room for one block in a full table; the block that had to go."""
    assert not raw.free(HOST)
    before = [block.generation for block in raw.blocks()]
    found = table.reserve(Keys(digests(1, seed)), 0, 1)
    moved = [i for i, block in enumerate(raw.blocks()) if block.generation != before[i]]
    if not found:
        assert not moved
        return None
    assert moved == [block_of(found[0][0])]
    table.abandon_reserved([found[0][0]])
    return moved[0]


def test_the_least_recently_returned_goes_first(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    blocks = [fill(table, seed, 1)[0] for seed in range(8)]
    order = [2, 7, 0, 5, 1, 6, 3, 4]
    for seed in order:
        count, ref = table.match(Keys(digests(1, seed)), 0, 1)
        assert (count, block_of(ref or 0)) == (1, blocks[seed])
        table.unpin(ref or 0)
    victims = []
    for i in range(8):
        refs = table.reserve(Keys(digests(1, f"new {i}")), 0, 1)
        victims.append(block_of(refs[0][0]))
        table.publish([refs[0][0]])
    assert victims == [blocks[seed] for seed in order]
    for i in range(8):
        table.unpin(made.raw.block(victims[i]).generation << 32 | victims[i])


def test_each_eviction_is_counted_under_one_reason(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    for seed in range(3):
        fill(table, seed, 5)
    counters = made.creator.counters()
    assert counters["evicted_capacity"] == counters["evicted"] == 7
    assert counters["published"] - counters["evicted"] == 8
    assert table.reset() == 8
    counters = made.creator.counters()
    assert (counters["evicted_capacity"], counters["evicted_cleared"]) == (7, 8)
    assert counters["published"] == counters["evicted"] == 15
    assert counters["evicted_unreadable"] == 0


def test_a_lower_priority_goes_before_a_longer_wait(make_instance: Make) -> None:
    made = make_instance(6)
    table = made.leader()
    priorities = [3, 0, 2, 0, 1, 3]
    blocks = [fill(table, i, 1, priority)[0] for i, priority in enumerate(priorities)]
    victims = [evict_all_in_turn(table, made, i) for i in range(6)]
    assert victims == [blocks[i] for i in (1, 3, 4, 2, 0, 5)]


def evict_all_in_turn(table: BlockTable, made: Instance, turn: int) -> int:
    """Evict one and keep its record from coming back into the order."""
    expected = expected_victim(made.raw)
    found = table.reserve(Keys(digests(1, f"turn {turn}")), 0, 1, priority=60000)
    assert block_of(found[0][0]) == expected
    table.publish([found[0][0]])
    table.unpin(found[0][0])
    return block_of(found[0][0])


def test_a_chain_goes_from_its_end(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    blocks = fill(table, "chain", 8)
    victims = [evict_all_in_turn(table, made, i) for i in range(8)]
    assert victims == blocks[::-1]


def test_a_chain_ages_as_a_whole_by_its_last_use(make_instance: Make) -> None:
    """A hit on the deepest block counts for its ancestors, which get its tick when it goes."""
    made = make_instance(8)
    table = made.leader()
    used = fill(table, "used again", 4)
    other = fill(table, "other", 4)
    _, ref = table.match(Keys(digests(4, "used again")), 0, 4)
    table.unpin(ref or 0)
    victims = [evict_all_in_turn(table, made, i) for i in range(8)]
    assert victims == other[::-1] + used[::-1]


def test_a_chain_that_a_store_finds_there_becomes_recent(make_instance: Make) -> None:
    """An engine may compute again what is cached: the same answer to the same question."""
    made = make_instance(8)
    table = made.leader()
    again = fill(table, "again", 4)
    other = fill(table, "other", 4)
    first = made.raw.block(again[0]).generation << 32 | again[0]
    found = table.store(Keys(digests(4, "again")), 1, 4, [0, 1, 2, 3], first, 1)
    assert found == ([], 4, made.raw.block(again[3]).generation << 32 | again[3])
    assert table.held() == {}
    victims = [evict_all_in_turn(table, made, i) for i in range(8)]
    assert victims == other[::-1] + again[::-1]


def test_a_parent_goes_only_after_all_of_its_children(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    trunk = fill(table, "trunk", 2)
    ends = []
    for i in range(3):
        keys = Keys(digests(2, "trunk") + digests(2, f"branch {i}"))
        refs = [ref for ref, _ in table.reserve(keys, 0, 4)]
        assert table.publish(refs) == 2
        for ref in reversed(refs):
            table.unpin(ref)
        ends.append([block_of(ref) for ref in refs])
    victims = [evict_all_in_turn(table, made, i) for i in range(8)]
    assert victims == [*(b for end in ends for b in end[::-1]), *trunk[::-1]]


def test_what_is_held_or_has_children_stays(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    fill(table, "held", 4)
    fill(table, "free", 4)
    count, ref = table.match(Keys(digests(4, "held")), 0, 4)
    assert count == 4
    assert len(table.reserve(Keys(digests(9, "new")), 0, 9)) == 4
    assert table.match(Keys(digests(4, "held")), 0, 4) == (4, ref)
    assert table.match(Keys(digests(4, "free")), 0, 4) == (0, None)
    table.unpin(ref or 0)
    table.unpin(ref or 0)
    abandon_everything(table, made)


def abandon_everything(table: BlockTable, made: Instance) -> None:
    table.abandon_reserved(
        [made.raw.block(i).generation << 32 | i for i in table.held()],
    )


def test_nothing_evictable_gives_nothing_and_changes_nothing(make_instance: Make) -> None:
    made = make_instance(4)
    table = made.leader()
    fill(table, "all", 4)
    _, ref = table.match(Keys(digests(4, "all")), 0, 4)
    before = made.raw.blocks()
    assert table.reserve(Keys(digests(2, "new")), 0, 2) == []
    assert made.raw.blocks() == before
    assert made.creator.counters()["skipped_no_slot"] == 1
    table.unpin(ref or 0)


def test_a_block_returned_after_a_vain_search_can_go_at_once(make_instance: Make) -> None:
    made = make_instance(4)
    table = made.leader()
    for turn in range(50):
        blocks = [fill(table, (turn, i), 1)[0] for i in range(4)]
        held = [table.match(Keys(digests(1, (turn, i))), 0, 1)[1] for i in range(4)]
        assert evict_one(table, made.raw, "none") is None
        table.unpin(held[2] or 0)
        assert evict_one(table, made.raw, "one") == blocks[2]
        for i in (0, 1, 3):
            table.unpin(held[i] or 0)
        assert table.reset() == 3


def test_a_block_returned_by_another_leader_can_go(make_instance: Make) -> None:
    made = make_instance(4)
    first, second = made.leader(1), made.leader(2)
    block = fill(first, "one", 4)[-1]
    _, ref = second.match(Keys(digests(4, "one")), 0, 4)
    assert evict_one(first, made.raw, "none") is None
    second.unpin(ref or 0)
    evicted: list[int | None] = []

    def evict_something() -> bool:
        evicted.append(evict_one(first, made.raw, "new"))
        return evicted[-1] is not None

    assert wait_until(evict_something)
    assert evicted[-1] == block


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(2, 90),
    seed=st.integers(0, 2**32),
    chains=st.integers(1, 12),
    depth=st.integers(1, 12),
)
def test_one_leader_evicts_in_exact_order(slots: int, seed: int, chains: int, depth: int) -> None:
    """Before each eviction an independent reader says which block it must be."""
    made = instance(slots)
    try:
        table = made.leader()
        check_against_the_order(made, table, random.Random(seed), chains, depth)
        made.prove()
    finally:
        made.remove()


def check_against_the_order(
    made: Instance, table: OperationTable, rng: random.Random, chains: int, depth: int
) -> None:
    pinned: list[int] = []
    for turn in range(60):
        keys = Keys(digests(rng.randint(1, depth), rng.randrange(chains)))
        count, ref = table.match(keys, 0, len(keys))
        if ref is not None and rng.random() < 0.3:
            pinned.append(ref)
        elif ref is not None:
            table.unpin(ref)
        if pinned and rng.random() < 0.3:
            table.unpin(pinned.pop(rng.randrange(len(pinned))))
        if rng.random() < 0.6:
            store_in_order(made, table, keys, count)
        elif not made.raw.free(HOST):
            expected = expected_victim(made.raw)
            assert evict_one(table, made.raw, ("new", turn)) == expected
    for ref in pinned:
        table.unpin(ref)


def store_in_order(made: Instance, table: OperationTable, keys: Keys, start: int) -> None:
    """Add the rest of a chain block by block, checking each victim on the way."""
    refs = []
    hold, parent = table.match(keys, 0, len(keys)) if start else (0, None)
    for i in range(hold, len(keys)):
        full = not made.raw.free(HOST)
        expected = expected_victim(made.raw) if full else None
        found = table.reserve(keys, i, i + 1, parent if not refs else refs[-1])
        if not found:
            assert full
            assert expected is None
            break
        refs.append(found[0][0])
        assert not full or block_of(refs[-1]) == expected
        assert table.publish([refs[-1]]) == 1
    for ref in reversed(refs):
        table.unpin(ref)
    if parent is not None:
        table.unpin(parent)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), leaders=st.integers(2, 4))
def test_several_leaders_never_evict_what_must_stay(seed: int, leaders: int) -> None:
    made = instance(24)
    try:
        rng = random.Random(seed)
        tables = [made.leader(key) for key in range(leaders)]
        held: list[tuple[BlockTable, int, Keys, int]] = []
        for _ in range(80):
            table = rng.choice(tables)
            keys = Keys(digests(rng.randint(1, 6), rng.randrange(9)))
            refs = [ref for ref, _ in table.reserve(keys, 0, len(keys))]
            # The table may be so full that a parent had to go for its child.
            done = table.publish(refs)
            table.abandon_reserved(refs[done:])
            for ref in reversed(refs[:done]):
                table.unpin(ref)
            count, found = table.match(keys, 0, len(keys))
            if found is not None:
                held.append((table, found, keys, count))
            while len(held) > 6 or (held and rng.random() < 0.4):
                owner, ref, _, _ = held.pop(rng.randrange(len(held)))
                owner.unpin(ref)
            for owner, ref, keys, count in held:
                again, same = owner.match(keys, 0, count)
                assert (again, same) == (count, ref)
                owner.unpin(ref)
            made.raw.check_invariants()
        for owner, ref, _, _ in held:
            owner.unpin(ref)
        made.prove()
    finally:
        made.remove()


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 100, 300])
def test_a_sweep_of_any_length_finds_everything(
    make_instance: Make, probe: Any, blocks: int
) -> None:
    made = make_instance(blocks)
    table = made.leader()
    order = [fill(table, seed, 1)[0] for seed in range(blocks)]
    victims = probe.Order(table.segment)
    assert [victims.take()[0] for _ in range(blocks)] == order
    assert victims.take() is None
    made.check = "nothing"  # the records were not given back


def test_an_offered_block_goes_before_later_ones_of_the_same_sweep(
    make_instance: Make, probe: Any
) -> None:
    made = make_instance(40)
    made.check = "nothing"
    table = made.leader()
    chain = fill(table, "chain", 3)
    others = [fill(table, seed, 1)[0] for seed in range(37)]
    victims = probe.Order(table.segment)
    assert [victims.take()[0] for _ in range(40)] == [*chain[::-1], *others]
