# SPDX-License-Identifier: Apache-2.0
"""The watch over a block table: what it tells adds up to what is registered."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from kvbm._fast.changes import Delta, TableWatch
from kvbm._fast.keys import Keys
from kvbm._fast.objects import SegmentFault
from kvbm._fast.table import BlockTable
from tests.fast.instances import Instance, block_of, cache, digests
from tests.fast.raw_segment import REGISTERED

Told = Counter[tuple[int, int]]
PARENT_OFFSET = 32  # in a block record


def hashes(keys: Keys, count: int | None = None) -> list[int]:
    """Sequence hashes of the first blocks."""
    data = keys.sequence_hashes(0, len(keys) if count is None else count)
    return list(memoryview(data).cast("Q"))


def apply(told: Told, delta: Delta) -> None:
    """Add a delta to what was told before; nothing is taken back that was not told."""
    told.update(delta.added)
    told.subtract(delta.removed)
    assert min(told.values(), default=0) >= 0


def registered(instance: Instance) -> Told:
    """What the table holds, read by a second reader of the bytes."""
    found: Told = Counter()
    for number, block in enumerate(instance.raw.blocks()):
        if block.state == REGISTERED:
            sequence_hash, _, group, *_ = instance.raw.cold(number)
            found[(sequence_hash, group)] += 1
    return found


def test_new_blocks_are_told_once_parents_first(make_instance: Callable[..., Instance]) -> None:
    instance = make_instance()
    table, watch = instance.leader(), TableWatch(instance.attach(writable=False))
    keys = Keys(digests(8))
    cache(table, keys)
    assert watch.delta() == ([(value, 0) for value in hashes(keys)], [])
    assert watch.delta() == ([], [])


def test_parents_come_first_whatever_the_records(make_instance: Callable[..., Instance]) -> None:
    instance = make_instance(host_slots=8)
    table, watch = instance.leader(), TableWatch(instance.attach())
    for seed in range(6):  # evictions shuffle the records
        cache(table, Keys(digests(5, seed)))
        watch.delta()
    keys = Keys(digests(7, "last"))
    cache(table, keys)
    assert [value for value, _ in watch.delta().added] == hashes(keys)


def test_a_watch_that_comes_late_is_told_of_everything(
    make_instance: Callable[..., Instance],
) -> None:
    instance = make_instance()
    cache(instance.leader(), Keys(digests(8)))
    assert len(TableWatch(instance.attach()).delta().added) == 8


def test_evictions_by_anybody_are_told(make_instance: Callable[..., Instance]) -> None:
    instance = make_instance(host_slots=8)
    mine, other = instance.leader(1), instance.leader(2)
    watch = TableWatch(instance.attach())
    first, second = Keys(digests(8, "a")), Keys(digests(8, "b"))
    cache(mine, first)
    watch.delta()
    cache(other, second)
    delta = watch.delta()
    assert sorted(delta.removed) == sorted((value, 0) for value in hashes(first))
    assert [value for value, _ in delta.added] == hashes(second)


def test_a_reservation_is_not_told_of(make_instance: Callable[..., Instance]) -> None:
    instance = make_instance()
    table, watch = instance.leader(), TableWatch(instance.attach())
    reserved = [ref for ref, _ in table.reserve(Keys(digests(3)), 0, 3)]
    assert watch.delta() == ([], [])
    table.abandon_reserved(reserved)
    assert watch.delta() == ([], [])


def test_a_child_waits_for_its_parent(make_instance: Callable[..., Instance]) -> None:
    instance = make_instance()
    instance.check = "nothing"
    table, watch = instance.leader(), TableWatch(instance.attach())
    keys = Keys(digests(2))
    refs = cache(table, keys)
    with instance.writable() as raw:  # as a look sees it that passed the parent a moment too soon
        at = raw.block_at(block_of(refs[0]))
        word = raw.u64(at)
        raw.put_u64(at, 0)
        assert watch.delta() == ([], [])
        raw.put_u64(at, word)
    assert [value for value, _ in watch.delta().added] == hashes(keys)


def test_a_reset_takes_everything_back_at_once(make_instance: Callable[..., Instance]) -> None:
    instance = make_instance()
    table, watch = instance.leader(), TableWatch(instance.attach())
    keys = Keys(digests(4))
    cache(table, keys)
    watch.delta()
    count, held = table.match(keys, 0, 4)
    assert (count, held is None) == (4, False)
    table.reset()  # what is held stays registered, but nobody can match it
    assert sorted(watch.delta().removed) == sorted((value, 0) for value in hashes(keys))
    assert watch.delta() == ([], [])
    assert held is not None
    table.unpin(held)
    cache(table, keys)
    assert [value for value, _ in watch.delta().added] == hashes(keys)


def test_a_damaged_parent_is_no_reason_to_read_outside(
    make_instance: Callable[..., Instance],
) -> None:
    instance = make_instance()
    instance.check = "nothing"
    table, watch = instance.leader(), TableWatch(instance.attach())
    (ref,) = cache(table, Keys(digests(1)))
    with instance.writable() as raw:
        raw.put_u32(raw.block_at(block_of(ref)) + PARENT_OFFSET, 0xFFFFFFFF)
    assert watch.delta() == ([], [])


def test_a_count_tells_when_to_look(make_instance: Callable[..., Instance]) -> None:
    instance = make_instance(host_slots=4)
    table, watch = instance.leader(), TableWatch(instance.attach())
    assert watch.moved()  # the first look is due in any case
    assert not watch.moved()
    cache(table, Keys(digests(4)))
    assert watch.moved()
    assert not watch.moved()
    table.reset()
    assert watch.moved()


def test_a_closed_segment_is_refused(make_instance: Callable[..., Instance]) -> None:
    segment = make_instance().attach()
    watch = TableWatch(segment)
    segment.close()
    with pytest.raises(SegmentFault, match="closed"):
        watch.delta()
    with pytest.raises(SegmentFault, match="closed"):
        watch.moved()


@pytest.mark.parametrize("seed", range(4))
def test_the_deltas_add_up_to_the_table(make_instance: Callable[..., Instance], seed: int) -> None:
    instance = make_instance(host_slots=24)
    tables: list[BlockTable] = [instance.leader(1), instance.leader(2)]
    watch = TableWatch(instance.attach(writable=False))
    dice, told = random.Random(seed), Counter[tuple[int, int]]()
    for _ in range(200):
        keys = Keys(digests(dice.randint(1, 12), dice.randint(0, 6)), group=dice.randint(0, 1))
        table = dice.choice(tables)
        if dice.random() < 0.03:
            table.reset()
        elif dice.random() < 0.8:
            cache(table, keys)
        if dice.random() < 0.4:
            apply(told, watch.delta())
    apply(told, watch.delta())
    assert +told == registered(instance)
