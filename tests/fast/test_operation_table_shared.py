# SPDX-License-Identifier: Apache-2.0
"""Two leaders that store the same chain at the same time: each block is copied once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import PARENT_SECS, OperationTable
from tests.fast.instances import Instance, digests, matched
from tests.fast.test_operations import World, run, world_of

Make = Callable[..., Instance]
CHAIN = Keys(digests(6))
AT_COMPLETED_NS = 40


@pytest.fixture
def world(make_instance: Make) -> World:
    """The second engine, whose operations the tests run."""
    return world_of(make_instance(16))


@pytest.fixture
def first(world: World) -> OperationTable:
    """The engine that is faster."""
    return world.made.leader(2)


def store(world: World, count: int = 6) -> int:
    """Submit the second engine's store of the chain; it must be one operation."""
    (handle,), upto, _ = world.table.store(CHAIN, 0, count, list(range(count)), None, 1)
    assert upto == count
    return int(handle)


def let_go(table: OperationTable, refs: list[int]) -> None:
    for ref in refs:
        table.unpin(ref)


# ---- stores that meet ----------------------------------------------------------------------------
def test_blocks_that_another_engine_stores_are_not_copied_again(
    world: World, first: OperationTable
) -> None:
    theirs = [ref for ref, _ in first.reserve(CHAIN, 0, 6)]
    before = world.made.creator.counters()["deduplicated"]
    assert world.table.store(CHAIN, 0, 6, list(range(6)), None, 1)[:2] == ([], 6)
    assert world.made.creator.counters()["deduplicated"] == before + 6
    assert first.publish(theirs) == 6
    let_go(first, theirs)


def test_copied_blocks_wait_for_the_parent_that_another_engine_fills(
    probe: Any, world: World, first: OperationTable
) -> None:
    theirs = [ref for ref, _ in first.reserve(CHAIN, 0, 2)]
    handle = store(world)
    assert len(world.made.raw.operation(0, handle).rows) == 4
    run(probe, world, handle)
    for _ in range(3):
        assert world.table.collect(handle) is None
    assert first.publish(theirs) == 2
    assert world.table.collect(handle) is True
    assert matched(first, CHAIN) == 6
    let_go(first, theirs)


def test_copied_blocks_whose_parent_does_not_arrive_are_given_back(
    probe: Any, world: World, first: OperationTable
) -> None:
    theirs = [ref for ref, _ in first.reserve(CHAIN, 0, 2)]
    handle = store(world)
    run(probe, world, handle)
    assert world.table.collect(handle) is None
    assert first.abandon_reserved(theirs)
    assert world.table.collect(handle) is True
    assert world.made.creator.free_blocks() == 16
    assert world.table.held() == {}


def test_the_wait_for_a_parent_has_an_end(probe: Any, world: World, first: OperationTable) -> None:
    theirs = [ref for ref, _ in first.reserve(CHAIN, 0, 2)]
    handle = store(world)
    run(probe, world, handle)
    assert world.table.collect(handle) is None
    with world.made.writable() as raw:
        at = raw.operation_at(0, handle & 0xFFFFFFFF) + AT_COMPLETED_NS
        raw.put_u64(at, raw.u64(at) - int(PARENT_SECS * 1e9))
    assert world.table.collect(handle) is True
    assert world.made.creator.free_blocks() == 14
    assert first.publish(theirs) == 2
    let_go(first, theirs)


def test_a_failed_store_does_not_wait_for_its_parent(
    probe: Any, world: World, first: OperationTable
) -> None:
    theirs = [ref for ref, _ in first.reserve(CHAIN, 0, 2)]
    handle = store(world)
    run(probe, world, handle, done=False)
    assert world.table.collect(handle) is False
    assert first.abandon_reserved(theirs)
    assert world.made.creator.free_blocks() == 16


# ---- what is being filled ------------------------------------------------------------------------
def test_what_is_being_filled_is_told_with_whose_it_is(world: World, first: OperationTable) -> None:
    assert world.table.filling(CHAIN, 0, 6) == (0, None)
    theirs = [ref for ref, _ in first.reserve(CHAIN, 0, 4)]
    leader = first.segment.leader
    assert world.table.filling(CHAIN, 0, 6) == first.filling(CHAIN, 0, 6) == (4, leader)
    assert world.table.filling(CHAIN, 1, 6) == (3, leader)
    assert world.table.filling(CHAIN, 0, 2) == (2, leader)
    assert world.table.filling(CHAIN, 4, 6) == world.table.filling(CHAIN, 6, 9) == (0, None)
    assert first.publish(theirs[:2]) == 2
    assert world.table.filling(CHAIN, 0, 6) == (0, None)
    assert world.table.filling(CHAIN, 2, 6) == (2, leader)
    assert first.publish(theirs[2:]) == 2
    let_go(first, theirs)
    with pytest.raises(ValueError, match="negative"):
        world.table.filling(CHAIN, -1, 6)
