# SPDX-License-Identifier: Apache-2.0
"""Stores and loads of a leader: what is submitted, what becomes of the blocks, what is left."""

from collections.abc import Callable
from typing import Any

import pytest

from kvbm._fast.keys import Keys
from tests.fast.instances import Instance, block_of, digests, matched
from tests.fast.raw_segment import (
    AT_RECOVERING,
    LOAD,
    OPERATIONS,
    PARTIAL,
    REGISTERED,
    ROWS,
    STORE,
    SUBMITTED,
    RawSegment,
)
from tests.fast.test_operations import World, run, world_of

Make = Callable[..., Instance]


@pytest.fixture(params=[1, 2])
def world(make_instance: Make, request: pytest.FixtureRequest) -> World:
    return world_of(make_instance(1024, ranks=request.param))


def store(world: World, count: int, seed: object = 0, start: int = 0, **options: Any) -> list[int]:
    """Submit a store and return its handles; everything must find a place."""
    keys = Keys(digests(count, seed))
    options.setdefault("parent", None)
    handles, upto, _ = world.table.store(keys, start, count, list(range(count)), step=1, **options)
    assert upto == count
    return handles


def complete(probe: Any, world: World, handles: list[int]) -> None:
    for handle in handles:
        run(probe, world, handle)
        assert world.table.collect(handle) is True


# ---- store ---------------------------------------------------------------------------------------
def test_a_store_has_a_row_for_each_new_block(world: World) -> None:
    keys = Keys(digests(5), group=3)
    device = [70, 71, 60, 61, 62]
    handles, upto, parent = world.table.store(keys, 0, 5, device, None, 9, 0xABCDEF, 2)
    (handle,) = handles
    operation = world.made.raw.operation(0, handle)
    assert (operation.state, operation.kind, operation.step) == (SUBMITTED, STORE, 9)
    assert (operation.request_key, operation.leader, operation.group) == (0xABCDEF, 0, 3)
    assert [row.device_block for row in operation.rows] == device
    assert [row.slot for row in operation.rows] == [0, 1, 2, 3, 4]
    for i, row in enumerate(operation.rows):
        block = world.made.raw.block(row.block)
        assert (block.state, block.generation, block.priority) == (PARTIAL, row.generation, 2)
        assert block.digest == keys.identity(i)[0]
        assert block.placements[0].slot == row.slot
    assert (upto, parent) == (5, operation.rows[-1].generation << 32 | operation.rows[-1].block)
    world.table.cancel(handle)
    assert world.table.collect(handle) is False


def test_a_completed_store_is_registered_and_held_by_nobody(probe: Any, world: World) -> None:
    handles = store(world, 6)
    assert matched(world.table, Keys(digests(6))) == 0
    complete(probe, world, handles)
    assert matched(world.table, Keys(digests(6))) == 6
    assert world.table.held() == {}
    assert world.table.free_operations() == OPERATIONS


def test_the_end_of_a_chain_was_returned_before_its_root(probe: Any, world: World) -> None:
    complete(probe, world, store(world, 6))
    blocks = [b for b in world.made.raw.blocks() if b.state == REGISTERED]
    by_depth = sorted(blocks, key=lambda block: block.placements[0].slot)
    ticks = [block.tick for block in by_depth]
    assert ticks == sorted(ticks, reverse=True)
    assert len(set(ticks)) == 6


def test_a_failed_store_gives_everything_back(probe: Any, world: World) -> None:
    (handle,) = store(world, 6)
    run(probe, world, handle, done=False)
    assert world.table.collect(handle) is False
    assert world.table.held() == {}
    assert world.made.creator.free_blocks() == 1024
    assert matched(world.table, Keys(digests(6))) == 0


def test_a_result_is_given_once(probe: Any, world: World) -> None:
    (handle,) = store(world, 2)
    run(probe, world, handle)
    assert world.table.collect(handle) is True
    for again in (world.table.collect, world.table.cancel):
        with pytest.raises(LookupError, match="has been collected already"):
            again(handle)


def test_a_long_store_is_several_operations_of_one_chain(probe: Any, world: World) -> None:
    handles = store(world, 300)
    sizes = [len(world.made.raw.operation(0, handle).rows) for handle in handles]
    assert sizes == [ROWS, ROWS, 300 - 2 * ROWS]
    complete(probe, world, handles)
    assert matched(world.table, Keys(digests(300))) == 300
    assert world.table.held() == {}


def test_what_follows_an_operation_that_failed_is_given_back(probe: Any, world: World) -> None:
    first, second, third = store(world, 300)
    run(probe, world, first)
    run(probe, world, second, done=False)
    run(probe, world, third)
    assert world.table.collect(first) is True
    assert world.table.collect(second) is False
    assert world.table.collect(third) is True
    assert matched(world.table, Keys(digests(300))) == ROWS
    assert world.made.creator.free_blocks() == 1024 - ROWS
    assert world.table.held() == {}


def test_what_is_there_already_is_not_stored_again(probe: Any, world: World) -> None:
    complete(probe, world, store(world, 4))
    assert store(world, 4) == []
    handles = store(world, 7)
    (operation,) = (world.made.raw.operation(0, handle & 0xFFFFFFFF) for handle in handles)
    assert [row.device_block for row in operation.rows] == [4, 5, 6]
    assert world.made.creator.counters()["deduplicated"] == 8
    complete(probe, world, handles)
    assert matched(world.table, Keys(digests(7))) == 7


def test_the_parent_of_a_store_is_kept_while_it_runs(probe: Any, make_instance: Make) -> None:
    world = world_of(make_instance(4))
    complete(probe, world, store(world, 2))
    (handle,) = store(world, 3)
    (parent,) = set(world.table.held()) - {
        row.block for row in world.made.raw.operation(0, handle & 0xFFFFFFFF).rows
    }
    # Three new blocks find one free slot; the chain's blocks must not be evicted for them.
    handles, upto, _ = world.table.store(Keys(digests(3, "x")), 0, 3, [7, 8, 9], None, 1)
    assert upto == 1
    assert world.made.raw.block(parent).state == REGISTERED
    complete(probe, world, [handle, *handles])
    assert matched(world.table, Keys(digests(3))) == 3


def test_a_store_continues_where_another_one_ended(probe: Any, world: World) -> None:
    keys = Keys(digests(9))
    device = list(range(9))
    first, upto, parent = world.table.store(keys, 0, 4, device, None, 1)
    second, upto, parent = world.table.store(keys, upto, 9, device, parent, 2)
    assert upto == 9
    rows = world.made.raw.operation(0, second[0]).rows
    assert [row.device_block for row in rows] == device[4:]
    complete(probe, world, first + second)
    assert matched(world.table, keys) == 9


def test_a_store_on_a_parent_that_is_gone_is_given_back(probe: Any, make_instance: Make) -> None:
    world = world_of(make_instance(8))
    keys = Keys(digests(3))
    first, _, parent = world.table.store(keys, 0, 1, [0], None, 1)
    complete(probe, world, first)
    assert world.table.reset() == 1
    second, upto, _ = world.table.store(keys, 1, 3, [0, 1, 2], parent, 1)
    assert upto == 3
    for handle in second:
        run(probe, world, handle)
        assert world.table.collect(handle) is True
    assert world.made.creator.free_blocks() == 8


def test_a_store_that_meets_another_leaders_reservation_joins_its_chain(
    probe: Any, make_instance: Make
) -> None:
    world = world_of(make_instance(16))
    other = world.made.leader(2)
    theirs = [ref for ref, _ in other.reserve(Keys(digests(2)), 0, 2)]
    handles = store(world, 4)
    assert len(world.made.raw.operation(0, handles[0]).rows) == 2
    run(probe, world, handles[0])
    assert other.publish(theirs) == 2
    assert world.table.collect(handles[0]) is True
    assert matched(other, Keys(digests(4))) == 4
    for ref in theirs:
        other.unpin(ref)


def test_a_store_stops_where_there_is_no_slot(probe: Any, make_instance: Make) -> None:
    world = world_of(make_instance(4))
    keys = Keys(digests(9))
    handles, upto, parent = world.table.store(keys, 0, 9, list(range(9)), None, 1)
    assert upto == 4
    assert world.made.raw.block(block_of(parent or 0)).digest == keys.identity(3)[0]
    assert world.table.store(Keys(digests(3, "x")), 0, 3, [1, 2, 3], None, 1) == ([], 0, None)
    complete(probe, world, handles)


def test_a_store_ends_with_the_device_blocks(probe: Any, world: World) -> None:
    handles, upto, _ = world.table.store(Keys(digests(9)), 0, 9, [4, 5, 6], None, 1)
    assert upto == 3
    complete(probe, world, handles)
    assert world.table.store(Keys(digests(9)), 3, 9, [], None, 1) == ([], 3, None)


@pytest.mark.parametrize("bad", [-1, 2**32, "text", None])
def test_an_impossible_device_block_leaves_nothing(world: World, bad: Any) -> None:
    device = [*range(200), bad, *range(20)]
    with pytest.raises((OverflowError, TypeError)):
        world.table.store(Keys(digests(221)), 0, 221, device, None, 1)
    assert world.made.creator.free_blocks() == 1024
    assert world.table.held() == {}
    assert world.table.free_operations() == OPERATIONS
    assert [world.made.raw.ring(0, rank)[0] for rank in range(len(world.workers))] == [0] * len(
        world.workers
    )


def test_a_ring_entry_says_the_kind_of_its_operation(world: World) -> None:
    """The operation itself may be another one by the time a slow worker looks."""
    (stored,) = store(world, 2)
    _, _, entries = world.made.raw.ring(0, 0)
    assert (entries[0] >> 32, entries[0] >> 8 & 3, entries[0] & 0xFF) == (stored >> 32, STORE, 0)
    world.table.cancel(stored)
    assert world.table.collect(stored) is False


# ---- operations and rings as a resource ----------------------------------------------------------
def occupy(world: World, count: int) -> list[int]:
    """Take operations with a store of one block each."""
    return [store(world, 1, f"occupied {i}")[0] for i in range(count)]


@pytest.mark.parametrize("free", [0, 1, 2])
def test_no_operation_is_used_twice_by_one_call(probe: Any, world: World, free: int) -> None:
    occupied = occupy(world, OPERATIONS - free)
    keys = Keys(digests(400))
    handles, upto, _ = world.table.store(keys, 0, 400, list(range(400)), None, 1)
    assert (len(handles), len(set(handles)), upto) == (free, free, free * ROWS)
    assert world.table.free_operations() == 0
    complete(probe, world, occupied + handles)
    assert matched(world.table, keys) == free * ROWS


def test_a_load_that_finds_too_few_operations_submits_nothing(probe: Any, world: World) -> None:
    complete(probe, world, store(world, 300))
    _, ref = world.table.match(Keys(digests(300)), 0, 300)
    occupied = occupy(world, OPERATIONS - 2)
    assert world.table.load(ref or 0, 0, list(range(300)), 5) is None
    assert world.table.free_operations() == 2
    handles = world.table.load(ref or 0, 0, list(range(256)), 5)
    assert len(set(handles or [])) == 2
    complete(probe, world, occupied)
    for handle in handles or []:
        run(probe, world, handle)
        assert world.table.collect(handle) is True
    world.table.unpin(ref or 0)


def test_operations_that_are_in_use_are_passed_over(probe: Any, world: World) -> None:
    occupied = occupy(world, OPERATIONS)
    assert world.table.store(Keys(digests(1)), 0, 1, [0], None, 1) == ([], 0, None)
    assert world.made.creator.counters()["skipped_no_operation"] == 1
    complete(probe, world, [occupied[77]])
    (handle,) = store(world, 1)
    assert block_of(handle) == block_of(occupied[77])
    assert handle != occupied[77]
    del occupied[77]
    complete(probe, world, [*occupied, handle])


def test_an_operation_is_never_lost_to_a_full_ring(probe: Any, world: World) -> None:
    """A worker that does not look keeps the entries of what was cancelled meanwhile."""
    (waiting,) = store(world, 1, "waiting")
    for i in range(3 * OPERATIONS):
        handles, _, _ = world.table.store(Keys(digests(1, i)), 0, 1, [0], None, 1)
        for handle in handles:
            world.table.cancel(handle)
            assert world.table.collect(handle) is False
    for rank, worker in enumerate(world.workers):
        popped = []
        while (entry := probe.pop(worker, rank)) is not None:
            popped.append(entry)
        assert popped[0] == waiting
        assert len(popped) == len(set(popped)) <= OPERATIONS
    complete(probe, world, [waiting])
    complete(probe, world, store(world, 1, "the workers have looked"))


# ---- load ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("skip", "count"), [(0, 10), (0, 3), (4, 6), (9, 1), (3, 0)])
def test_a_load_has_the_rows_of_the_chain_shallowest_first(
    probe: Any, world: World, skip: int, count: int
) -> None:
    complete(probe, world, store(world, 10))
    _, ref = world.table.match(Keys(digests(10)), 0, 10)
    slots = world.table.slots_of(ref or 0, 10)
    device = list(range(100, 100 + count))
    handles = world.table.load(ref or 0, skip, device, 77, 5, 1)
    assert handles is not None
    operations = [world.made.raw.operation(0, block_of(handle)) for handle in handles]
    assert [(op.kind, op.step, op.request_key, op.group) for op in operations] == [
        (LOAD, 77, 5, 1)
    ] * (count > 0)
    rows = [row for op in operations for row in op.rows]
    assert [row.device_block for row in rows] == device
    assert [row.slot for row in rows] == slots[10 - skip - count : 10 - skip]
    for row in rows:
        block = world.made.raw.block(row.block)
        assert (block.state, block.generation) == (REGISTERED, row.generation)
    for handle in handles:
        run(probe, world, handle)
        assert world.table.collect(handle) is True
    world.table.unpin(ref or 0)


def test_a_long_load_is_several_operations(probe: Any, world: World) -> None:
    complete(probe, world, store(world, 300))
    _, ref = world.table.match(Keys(digests(300)), 0, 300)
    handles = world.table.load(ref or 0, 10, list(range(1000, 1290)), 3) or []
    operations = [world.made.raw.operation(0, block_of(handle)) for handle in handles]
    assert [len(op.rows) for op in operations] == [ROWS, ROWS, 290 - 2 * ROWS]
    rows = [row for op in operations for row in op.rows]
    assert [row.device_block for row in rows] == list(range(1000, 1290))
    assert [row.slot for row in rows] == world.table.slots_of(ref or 0, 300)[:290]
    for handle in handles:
        run(probe, world, handle)
        assert world.table.collect(handle) is True
    world.table.unpin(ref or 0)


def test_a_load_beyond_the_root_or_of_a_stale_block_submits_nothing(
    probe: Any, world: World
) -> None:
    complete(probe, world, store(world, 4))
    _, ref = world.table.match(Keys(digests(4)), 0, 4)
    assert ref is not None
    for skip, count in ((0, 5), (4, 1), (2, 3), (1000, 1)):
        assert world.table.load(ref, skip, list(range(count)), 3) is None
    assert world.table.load(ref + (1 << 32), 0, [0], 3) is None
    assert world.table.load(ref, 0, list(range(OPERATIONS * ROWS + 1)), 3) is None
    assert world.table.free_operations() == OPERATIONS
    world.table.unpin(ref)


def test_blocks_stay_as_they_were_after_a_load(probe: Any, world: World) -> None:
    complete(probe, world, store(world, 4))
    _, ref = world.table.match(Keys(digests(4)), 0, 4)
    before = world.made.raw.blocks()
    for done in (True, False):
        for handle in world.table.load(ref or 0, 0, [1, 2, 3, 4], 3) or []:
            run(probe, world, handle, done)
            assert world.table.collect(handle) is done
    assert world.made.raw.blocks() == before
    world.table.unpin(ref or 0)


# ---- handles -------------------------------------------------------------------------------------
@pytest.mark.parametrize("handle", [128, 2**31, 2**32 - 1, 1 << 32 | 128])
def test_handles_outside_the_table_are_refused(world: World, handle: int) -> None:
    for call in (world.table.collect, world.table.cancel):
        with pytest.raises(IndexError, match=r"outside 0\.\.127"):
            call(handle)


def test_a_handle_of_another_generation_is_refused(world: World) -> None:
    (handle,) = store(world, 1)
    for call in (world.table.collect, world.table.cancel):
        with pytest.raises(LookupError, match="has been collected already"):
            call(handle + (1 << 32))
    world.table.cancel(handle)
    assert world.table.collect(handle) is False


def test_while_a_recovery_is_under_way_nothing_is_stored_or_collected(
    probe: Any, world: World
) -> None:
    (handle,) = store(world, 2)
    run(probe, world, handle)
    with RawSegment(world.made.name, writable=True) as raw:
        raw.put_u32(AT_RECOVERING, 1)
        keys = Keys(digests(3, "x"))
        assert world.table.store(keys, 0, 3, [1, 2, 3], None, 1) == ([], 0, None)
        assert world.table.collect(handle) is None
        raw.put_u32(AT_RECOVERING, 0)
    assert world.table.collect(handle) is True


def test_two_leaders_have_operations_of_their_own(probe: Any, make_instance: Make) -> None:
    made = make_instance(32)
    worlds = [World(made, made.leader(leader), [made.worker(leader, 0)]) for leader in range(2)]
    handles = [store(world, 3, i)[0] for i, world in enumerate(worlds)]
    assert handles[0] == handles[1]
    assert [made.raw.operation(i, handles[0]).leader for i in range(2)] == [0, 1]
    run(probe, worlds[1], handles[1])
    assert worlds[0].table.collect(handles[0]) is None
    assert worlds[1].table.collect(handles[1]) is True
    run(probe, worlds[0], handles[0])
    assert worlds[0].table.collect(handles[0]) is True
