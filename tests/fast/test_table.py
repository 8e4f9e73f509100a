# SPDX-License-Identifier: Apache-2.0
"""A leader's handle on the blocks: match, pin, reserve, publish, abandon, reset."""

from collections.abc import Callable
from typing import Any

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.segment import SegmentFault
from tests.fast.instances import (
    Instance,
    block_of,
    cache,
    digests,
    generation_of,
    matched,
    run_in_fork,
)
from tests.fast.raw_segment import AT_RECOVERING, HOST, PARTIAL, RESET, RawSegment

Make = Callable[..., Instance]


# ---- reserve and publish -------------------------------------------------------------------------
def test_new_blocks_are_a_run_of_slots_that_mirrors_the_sequence(make_instance: Make) -> None:
    made = make_instance(64)
    table = made.leader()
    found = table.reserve(Keys(digests(40)), 0, 40)
    slots = [slot for _, slot in found]
    assert slots == list(range(slots[0], slots[0] + 40))
    blocks = [made.raw.block(block_of(ref)) for ref, _ in found]
    assert [block.state for block in blocks] == [PARTIAL] * 40
    assert [block.parent for block in blocks] == [None, *(block_of(ref) for ref, _ in found[:-1])]
    assert [made.raw.cold(block_of(ref))[1] for ref, _ in found] == list(range(40))
    assert table.held() == {block_of(ref): 1 for ref, _ in found}
    table.abandon_reserved([ref for ref, _ in found])
    assert table.held() == {}


def test_a_partial_block_is_not_matched(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    keys = Keys(digests(4))
    refs = [ref for ref, _ in table.reserve(keys, 0, 4)]
    assert matched(table, keys) == 0
    assert table.publish(refs[:2]) == 2
    assert matched(table, keys) == 2
    assert table.publish(refs) == 4
    assert matched(table, keys) == 4
    for ref in refs:
        table.unpin(ref)


def test_what_is_in_the_table_is_not_reserved_again(make_instance: Make) -> None:
    made = make_instance(16)
    first, second = made.leader(1), made.leader(2)
    keys = Keys(digests(8))
    refs = [ref for ref, _ in first.reserve(keys, 0, 3)]
    assert second.reserve(keys, 0, 3) == []
    first.publish(refs)
    found = second.reserve(keys, 0, 8)
    assert len(found) == 5
    assert made.raw.block(block_of(found[0][0])).parent == block_of(refs[2])
    second.publish([ref for ref, _ in found])
    for ref in refs:
        first.unpin(ref)
    for ref, _ in found:
        second.unpin(ref)


def test_a_chain_goes_on_at_a_given_parent(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    keys = Keys(digests(6))
    refs = cache(table, keys, 3)
    _, parent = table.match(keys, 0, 3)
    more = [ref for ref, _ in table.reserve(keys, 3, 6, parent)]
    assert table.publish(more) == 3
    assert made.raw.block(block_of(more[0])).parent == block_of(refs[2])
    for ref in [*more, parent or 0]:
        table.unpin(ref)
    assert matched(table, keys) == 6


def test_reserving_never_evicts_the_ancestors_of_what_is_reserved(make_instance: Make) -> None:
    made = make_instance(4)
    table = made.leader()
    cache(table, Keys(digests(1)))
    for seed in range(3):
        cache(table, Keys(digests(1, seed)))
    refs = [ref for ref, _ in table.reserve(Keys(digests(5)), 0, 5)]
    assert len(refs) == 3
    assert table.publish(refs) == 3
    for ref in refs:
        table.unpin(ref)


def test_a_full_table_gives_what_it_can(make_instance: Make) -> None:
    made = make_instance(4)
    table = made.leader()
    refs = [ref for ref, _ in table.reserve(Keys(digests(9)), 0, 9)]
    assert len(refs) == 4
    assert made.creator.counters()["skipped_no_slot"] == 1
    table.abandon_reserved(refs)


@pytest.mark.parametrize("stop", [2**31, 2**32, 2**32 + 1, 2**62])
def test_the_range_ends_with_the_keys(make_instance: Make, stop: int) -> None:
    made = make_instance(16)
    table = made.leader()
    refs = [ref for ref, _ in table.reserve(Keys(digests(3)), 0, stop)]
    assert len(refs) == 3
    assert sorted(made.raw.free(HOST)) == list(range(3, 16))
    table.abandon_reserved(refs)


def test_only_slots_that_every_rank_can_use_are_handed_out(make_instance: Make) -> None:
    made = make_instance(16, ranks=2)
    with RawSegment(made.name, writable=True) as raw:
        for rank, ready in enumerate((5, 3)):
            raw.put_u32(256 + 4 * rank, ready)
    table = made.leader()
    found = table.reserve(Keys(digests(16)), 0, 16)
    assert [slot for _, slot in found] == [0, 1, 2]
    made.creator.set_ready_slots(1, 16)
    found += table.reserve(Keys(digests(16, "more")), 0, 16)
    assert [slot for _, slot in found] == [0, 1, 2, 3, 4]
    table.abandon_reserved([ref for ref, _ in found])


def test_a_block_whose_parent_is_gone_is_not_published(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    keys = Keys(digests(3))
    refs = [ref for ref, _ in table.reserve(keys, 0, 3)]
    table.abandon_reserved(refs[:1])
    assert table.publish(refs) == 0
    table.abandon_reserved(refs)
    assert made.creator.free_blocks() == 8


def test_the_hold_of_a_reservation_ends_with_it(make_instance: Make) -> None:
    """A return that comes too early must not leave a block that nobody can let go of."""
    made = make_instance(8)
    table = made.leader()
    (ref,) = [ref for ref, _ in table.reserve(Keys(digests(1)), 0, 1)]
    table.unpin(ref)
    assert table.held() == {block_of(ref): 1}
    assert table.publish([ref]) == 1
    table.unpin(ref)
    assert table.held() == {}
    assert made.raw.block(block_of(ref)).holders == frozenset()


def test_another_leaders_reservation_cannot_be_abandoned(make_instance: Make) -> None:
    made = make_instance(8)
    first, second = made.leader(1), made.leader(2)
    refs = [ref for ref, _ in first.reserve(Keys(digests(2)), 0, 2)]
    second.abandon_reserved(refs)
    assert first.publish(refs) == 2
    for ref in refs:
        first.unpin(ref)


# ---- stale references ----------------------------------------------------------------------------
def test_a_reference_to_a_block_that_is_gone_is_ignored(make_instance: Make) -> None:
    made = make_instance(1)
    table = made.leader()
    (old,) = cache(table, Keys(digests(1)))
    (new,) = cache(table, Keys(digests(1, "new")))
    assert (block_of(new), generation_of(new)) == (block_of(old), generation_of(old) + 1)
    assert table.is_current(new)
    assert not table.is_current(old)
    _, held = table.match(Keys(digests(1, "new")), 0, 1)
    before = made.raw.blocks()
    table.unpin(old)
    table.abandon_reserved([old])
    assert table.publish([old]) == 0
    with pytest.raises(LookupError, match="block 0 of a chain of 1"):
        table.slots_of(old, 1)
    assert made.raw.blocks() == before
    table.unpin(held or 0)


def test_a_return_without_a_hold_changes_nothing(make_instance: Make) -> None:
    made = make_instance(4)
    first, second = made.leader(1), made.leader(2)
    (ref,) = cache(first, Keys(digests(1)))
    _, held = second.match(Keys(digests(1)), 0, 1)
    before = made.raw.blocks()
    first.unpin(ref)
    assert made.raw.blocks() == before
    second.unpin(held or 0)


@pytest.mark.parametrize("ref", [4, 2**31, 2**32 - 1, 2**40 + 4])
def test_references_outside_the_table_are_refused(make_instance: Make, ref: int) -> None:
    made = make_instance(4)
    table = made.leader()
    calls: list[Callable[[], object]] = [
        lambda: table.unpin(ref),
        lambda: table.is_current(ref),
        lambda: table.publish([ref]),
        lambda: table.abandon_reserved([ref]),
        lambda: table.slots_of(ref, 1),
        lambda: table.reserve(Keys(digests(2)), 1, 2, ref),
        lambda: table.store(Keys(digests(2)), 1, 2, [0, 1], ref, 0),
        lambda: table.load(ref, 0, [1], 0),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=r"outside 0\.\.3"):
            call()
    assert made.creator.free_blocks() == 4


@pytest.mark.parametrize("bad", [-1, 2**64, "text"])
def test_impossible_references_leave_the_table_usable(make_instance: Make, bad: Any) -> None:
    made = make_instance(4)
    table = made.leader()
    (good,) = [ref for ref, _ in table.reserve(Keys(digests(1)), 0, 1)]
    for call in (table.publish, table.abandon_reserved):
        with pytest.raises((OverflowError, TypeError, IndexError)):
            call([good, bad])
        assert made.raw.u32(made.raw.line_at(0)) == 0
    assert made.raw.block(block_of(good)).state == PARTIAL
    table.abandon_reserved([good])


# ---- slots and reset -----------------------------------------------------------------------------
def test_the_slots_of_a_chain_are_found_from_its_deepest_block(make_instance: Make) -> None:
    made = make_instance(16)
    table = made.leader()
    keys = Keys(digests(6))
    found = table.reserve(keys, 0, 6)
    table.publish([ref for ref, _ in found])
    slots = [slot for _, slot in found]
    for depth in range(1, 7):
        for count in range(1, depth + 1):
            assert table.slots_of(found[depth - 1][0], count) == slots[depth - count : depth]
    with pytest.raises(LookupError, match="block 0 of a chain of 7"):
        table.slots_of(found[-1][0], 7)
    for ref, _ in found:
        table.unpin(ref)


def test_a_reset_makes_everything_unreachable_and_frees_what_nobody_holds(
    make_instance: Make,
) -> None:
    made = make_instance(16)
    first, second = made.leader(1), made.leader(2)
    keys = Keys(digests(8))
    cache(first, keys)
    cache(first, Keys(digests(4, "other")))
    _, held = second.match(keys, 0, 3)
    assert first.reset() == 9
    assert made.creator.key_epoch == 1
    assert [matched(table, keys) for table in (first, second)] == [0, 0]
    assert made.creator.free_blocks() == 13
    cache(second, keys)
    assert [matched(table, keys) for table in (first, second)] == [8, 8]
    second.unpin(held or 0)
    assert first.reset() == 11
    assert made.creator.free_blocks() == 16
    assert made.creator.counters()["resets"] == 2
    assert made.creator.counters()["evicted_cleared"] == made.creator.counters()["evicted"] == 20


def test_a_block_that_is_filled_across_a_reset_is_not_matched(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    keys = Keys(digests(2))
    refs = [ref for ref, _ in table.reserve(keys, 0, 2)]
    assert table.reset() == 0
    assert table.publish(refs) == 2
    assert matched(table, keys) == 0
    for ref in reversed(refs):
        table.unpin(ref)
    assert table.reset() == 2


# ---- recovery and the end ------------------------------------------------------------------------
def test_while_a_recovery_is_under_way_changes_decline_and_looking_does_not(
    make_instance: Make,
) -> None:
    made = make_instance(8)
    table = made.leader()
    keys = Keys(digests(4))
    refs = [ref for ref, _ in table.reserve(keys, 0, 2)]
    table.publish(refs[:1])
    before = made.raw.blocks()
    with RawSegment(made.name, writable=True) as raw:
        raw.put_u32(AT_RECOVERING, 1)
        assert table.reserve(keys, 0, 4) == []
        assert table.publish(refs) == 0
        assert not table.abandon_reserved(refs)
        assert made.raw.blocks() == before
        assert matched(table, keys) == 1
        raw.put_u32(AT_RECOVERING, 0)
    assert table.abandon_reserved(refs)
    table.unpin(refs[0])
    assert made.raw.block(block_of(refs[1])).state == RESET
    assert made.creator.counters()["declined"] == 3


def test_a_table_needs_a_leader_line(make_instance: Make) -> None:
    made = make_instance(8)
    made.leader()
    for segment in (made.attach(), made.worker()):
        with pytest.raises(ValueError, match="call claim_leader first"):
            OperationTable(segment)


def uses(table: OperationTable) -> list[Callable[[], object]]:
    keys = Keys(digests(2))
    return [
        lambda: table.match(keys, 0, 2),
        lambda: table.unpin(0),
        lambda: table.is_current(0),
        lambda: table.reserve(keys, 0, 2),
        lambda: table.publish([0]),
        lambda: table.abandon_reserved([0]),
        lambda: table.slots_of(0, 1),
        table.reset,
        lambda: table.count("errors", 1),
        lambda: table.store(keys, 0, 2, [0, 1], None, 0),
        lambda: table.load(0, 0, [1], 0),
        lambda: table.collect(0),
        lambda: table.cancel(0),
        table.free_operations,
    ]


def check_that_it_is_closed(table: OperationTable) -> None:
    for use in uses(table):
        with pytest.raises(SegmentFault) as caught:
            use()
        assert caught.value.kind == "closed"
    assert table.held() == {}


def test_a_table_whose_segment_is_closed_refuses_every_use(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    table.segment.close()
    check_that_it_is_closed(table)


def test_a_forked_child_may_not_use_the_table(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    run_in_fork(lambda: check_that_it_is_closed(table))
    assert len(cache(table, Keys(digests(3)))) == 3


def test_counters_are_added_by_name(make_instance: Make) -> None:
    made = make_instance(8)
    table = made.leader()
    table.count("matched_tokens", 48)
    table.count("matched_tokens", 2)
    assert made.creator.counters()["matched_tokens"] == 50
    with pytest.raises(ValueError, match="not in tuple"):
        table.count("no such counter", 1)
