# SPDX-License-Identifier: Apache-2.0
"""The order of eviction with a policy: priority, then rank, then the last return; leaves first."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._fast.keys import Keys
from kvbm._fast.ranks import AGE_STARTS, AGES, CLASSES, Uses
from kvbm._fast.table import BlockTable
from tests.fast.instances import Instance, block_of, digests, instance
from tests.fast.raw_segment import HOST, REGISTERED, RawSegment
from tests.fast.test_eviction import expected_victim

numbers = itertools.count()
Make = Callable[..., Instance]
SWEEP_STEP = 8
"""Blocks that a sweep looks at an eviction; see kvbm/_fast/ranked.pyx."""


class Told:
    """A policy that gives each sequence the class it is told to."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses
        self.next_class = 0
        self.seen: list[tuple[int, int, int]] = []
        uses.set_ranks(by_class())

    def arrive(self, use: int, keys: Keys, stop: int, hits: int) -> int:
        self.seen.append((use, stop, hits))
        return self.next_class


def by_class() -> np.ndarray:
    """Ranks that are the number of the class at any age; of what has none, in the middle."""
    numbers = np.arange(CLASSES, dtype=np.uint8)
    numbers[0] = 128
    return np.repeat(numbers[:, None], AGES, axis=1)


def told(table: BlockTable) -> Told:
    policy = Told(Uses(table.segment))
    table.order_by(policy, policy.uses)
    return policy


def put(
    table: BlockTable, policy: Told, seed: object, count: int, rank_class: int, priority: int = 0
) -> list[int]:
    """Ask for a chain, cache what is missing and return all, its end first; the new blocks."""
    policy.next_class = rank_class
    keys = Keys(digests(count, seed))
    hits, deepest = table.match(keys, 0, count)
    refs = [ref for ref, _ in table.reserve(keys, hits, count, deepest, priority=priority)]
    assert table.publish(refs) == len(refs)
    for ref in reversed(refs):
        table.unpin(ref)
    if deepest is not None:
        table.unpin(deepest)
    return [block_of(ref) for ref in refs]


def victims(table: BlockTable, count: int) -> list[int]:
    """Evict so many blocks, one a call; their places are filled by what is never evicted here."""
    found = []
    for _ in range(count):
        ((ref, _),) = table.reserve(Keys(digests(1, f"new {next(numbers)}")), 0, 1)
        found.append(block_of(ref))
    return found


@pytest.fixture
def made(make_instance: Make) -> Instance:
    made = make_instance(8)
    made.check = "invariants"  # what replaces the victims stays reserved
    return made


def test_the_lowest_rank_goes_first_and_equal_ones_by_their_last_return(made: Instance) -> None:
    table = made.leader()
    policy = told(table)
    classes = [3, 1, 2, 1, 3, 2, 1, 0]  # 0 is in the middle
    blocks = [put(table, policy, i, 1, c)[0] for i, c in enumerate(classes)]
    assert victims(table, 8) == [blocks[i] for i in (1, 3, 6, 2, 5, 0, 4, 7)]


def test_priority_comes_before_the_rank(made: Instance) -> None:
    table = made.leader()
    policy = told(table)
    blocks = [put(table, policy, i, 1, c, p)[0] for i, (c, p) in enumerate([(1, 2), (200, 1)] * 4)]
    assert victims(table, 8) == [blocks[i] for i in (1, 3, 5, 7, 0, 2, 4, 6)]


def test_a_chain_goes_from_its_end_whatever_its_rank(made: Instance) -> None:
    table = made.leader()
    policy = told(table)
    chain = put(table, policy, "low", 5, 1)
    other = put(table, policy, "high", 3, 2)
    assert victims(table, 8) == chain[::-1] + other[::-1]


def test_what_is_below_a_block_of_a_low_rank_keeps_it(made: Instance) -> None:
    """The trunk has the class of its last use; the branch that others used is not its end."""
    table = made.leader()
    policy = told(table)
    branch = put(table, policy, "chain", 6, 9)
    put(table, policy, "chain", 3, 1)  # a hit on the first three
    late = put(table, policy, "late", 2, 5)
    assert victims(table, 5) == [*late[::-1], *branch[:2:-1]]
    assert victims(table, 3) == branch[2::-1]


def test_a_use_gives_all_of_a_chain_its_class(made: Instance) -> None:
    """A hit touches the deepest block only; its ancestors inherit the class with the tick."""
    table = made.leader()
    policy = told(table)
    chain = put(table, policy, "chain", 4, 5)
    other = put(table, policy, "other", 4, 2)
    assert put(table, policy, "chain", 4, 1) == []
    assert victims(table, 8) == chain[::-1] + other[::-1]


def test_what_is_stored_again_gets_the_class_of_who_stores_it(made: Instance) -> None:
    table = made.leader()
    policy = told(table)
    chain = put(table, policy, "chain", 4, 5)
    other = put(table, policy, "other", 4, 2)
    policy.next_class = 1
    keys = Keys(digests(4, "chain"))
    _, first = table.match(keys, 0, 1)  # the rest was asked for on the device
    table.unpin(first or 0)
    assert table.store(keys, 0, 4, [0, 1, 2, 3], None, 1)[:2] == ([], 4)
    assert victims(table, 8) == chain[::-1] + other[::-1]


def test_the_policy_is_asked_once_a_sequence_and_told_what_was_hit(made: Instance) -> None:
    table = made.leader()
    policy = told(table)
    keys = Keys(digests(4, "once"))
    assert keys.use == 0
    for _ in range(3):
        assert table.match(keys, 0, 9) == (0, None)
    put(table, policy, "once", 3, 0)
    put(table, policy, "once", 4, 0)
    assert policy.seen == [(1, 4, 0), (2, 3, 0), (3, 4, 3)]
    assert (keys.use, policy.uses.last) == (1, 3)


def test_a_class_may_change_and_a_sweep_later_the_order_has(make_instance: Make) -> None:
    made = make_instance(64)
    made.check = "invariants"
    table = made.leader()
    policy = told(table)
    blocks = [put(table, policy, i, 1, 100)[0] for i in range(64)]
    late = blocks[-2:]
    assert victims(table, 1) == blocks[:1]
    policy.uses.classify(63, 1)
    policy.uses.classify(64, 2)
    found = victims(table, 2 * 64 // SWEEP_STEP)
    assert set(late) < set(found)
    assert [block for block in found if block not in late] == blocks[1 : len(found) - 1]


def test_a_victim_whose_rank_has_risen_meanwhile_goes_back(make_instance: Make) -> None:
    """By age alone, while nothing was evicted, so that no sweep has seen it."""
    made = make_instance(64)
    made.check = "invariants"
    table = made.leader()
    policy = told(table)
    ranks = by_class()
    ranks[1, AGE_STARTS.index(1024) :] = 50
    policy.uses.set_ranks(ranks)
    blocks = [put(table, policy, i, 1, 1 + (i > 0))[0] for i in range(64)]
    policy.uses.classify(64, 200)
    assert victims(table, 1) == blocks[:1]
    blocks[0] = put(table, policy, "low again", 1, 1)[0]
    assert blocks[0] == blocks[1]  # it has taken the place of the next victim
    for _ in range(1100):
        put(table, policy, 63, 1, 200)
    assert victims(table, 3) == blocks[2:5]


def test_what_another_leader_returned_has_no_class_here(made: Instance) -> None:
    table, other = made.leader(1), made.leader(2)
    policy = told(table)
    blocks = [put(table, policy, i, 1, 9)[0] for i in range(8)]
    _, ref = other.match(Keys(digests(1, 6)), 0, 1)
    other.unpin(ref or 0)
    assert victims(table, 8) == [*blocks[:6], blocks[7], blocks[6]]


def test_leaders_of_different_orders_take_turns_on_one_table(made: Instance) -> None:
    ranked, plain = made.leader(1), made.leader(2)
    policy = told(ranked)
    blocks = [put(ranked, policy, i, 1, 9 - i)[0] for i in range(8)]
    found = [victims(table, 1)[0] for table in (ranked, plain) * 4]
    assert found == [blocks[i] for i in (7, 0, 6, 1, 5, 2, 4, 3)]


def test_a_policy_that_fails_leaves_upstreams_order(
    made: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    table = made.leader()
    policy = told(table)
    blocks = [put(table, policy, i, 1, 8 - i)[0] for i in range(7)]
    policy.next_class = CLASSES
    blocks += put(table, policy, 7, 1, CLASSES)
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "the eviction policy Told failed" in caplog.text
    assert put(table, policy, 0, 1, 3) == []
    assert len(policy.seen) == 8
    assert victims(table, 8) == [*blocks[1:], blocks[0]]


def test_the_order_may_be_changed_at_any_time(made: Instance) -> None:
    table = made.leader()
    blocks = [put(table, told(table), i, 1, 0)[0] for i in range(4)]
    policy = told(table)
    blocks += [put(table, policy, i, 1, 130 + i)[0] for i in range(4, 8)]
    assert victims(table, 1) == blocks[:1]
    put(table, policy, 1, 1, 200)
    assert victims(table, 1) == blocks[2:3]
    table.order_by(None)
    assert victims(table, 6) == [*blocks[3:], blocks[1]]


def test_a_block_returned_after_a_vain_search_can_go_at_once(made: Instance) -> None:
    table = made.leader()
    policy = told(table)
    blocks = [put(table, policy, i, 1, 1)[0] for i in range(8)]
    held = [table.match(Keys(digests(1, i)), 0, 1)[1] or 0 for i in range(8)]
    for _ in range(3):
        assert table.reserve(Keys(digests(1, "none")), 0, 1) == []
    table.unpin(held[5])
    assert victims(table, 1) == [blocks[5]]
    for ref in held[:5] + held[6:]:
        table.unpin(ref)


def test_a_reset_gives_everything_back_with_a_policy_too(made: Instance) -> None:
    table = made.leader()
    policy = told(table)
    put(table, policy, "chain", 8, 3)
    assert table.reset() == 8
    assert len(made.raw.free(HOST)) == 8


def test_the_uses_of_another_segment_are_refused(make_instance: Make) -> None:
    table, other = make_instance(4).leader(), make_instance(4).leader()
    uses = Uses(other.segment)
    with pytest.raises(ValueError, match="uses of this table's segment"):
        table.order_by(Told(uses), uses)
    with pytest.raises(ValueError, match="uses of this table's segment"):
        table.order_by(Told(uses))


def ranked_victim(raw: RawSegment, rank_of: dict[int, int]) -> int | None:
    """The block that must go, by a reader of its own."""
    evictable = [
        (block.priority, rank_of[index], block.tick, index)
        for index, block in enumerate(raw.blocks())
        if block.state == REGISTERED and not block.holders and block.children == 0
    ]
    return min(evictable)[3] if evictable else None


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(2, 90),
    seed=st.integers(0, 2**32),
    chains=st.integers(1, 12),
    depth=st.integers(1, 12),
    classes=st.integers(1, 5),
)
def test_one_leader_evicts_in_the_order_of_a_plain_model(
    slots: int, seed: int, chains: int, depth: int, classes: int
) -> None:
    made = instance(slots)
    try:
        table = made.leader()
        policy = told(table)
        rng = random.Random(seed)
        rank_of: dict[int, int] = {}
        for _ in range(60):
            chain = rng.randrange(chains)
            policy.next_class = 1 + chain % classes
            use_a_chain(made, table, Keys(digests(rng.randint(1, depth), chain)), rank_of, policy)
            if classes == 1:
                assert ranked_victim(made.raw, rank_of) == expected_victim(made.raw)
        made.prove()
    finally:
        made.remove()


def use_a_chain(
    made: Instance, table: BlockTable, keys: Keys, rank_of: dict[int, int], policy: Told
) -> None:
    """Match a chain and add the rest of it block by block, checking each victim on the way."""
    count, deepest = table.match(keys, 0, len(keys))
    refs: list[int] = []
    for i in range(count, len(keys)):
        full = not made.raw.free(HOST)
        expected = ranked_victim(made.raw, rank_of) if full else None
        found = table.reserve(keys, i, i + 1, refs[-1] if refs else deepest)
        if not found:
            assert full
            assert expected is None
            break
        refs.append(found[0][0])
        assert not full or block_of(refs[-1]) == expected
        rank_of[block_of(refs[-1])] = policy.next_class
        assert table.publish([refs[-1]]) == 1
    for ref in reversed(refs):
        table.unpin(ref)
    if deepest is not None:
        table.unpin(deepest)
