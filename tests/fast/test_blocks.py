# SPDX-License-Identifier: Apache-2.0
"""The life of a block: each transition does what layout.h says, and nothing else moves a block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import Segment
from tests.fast.instances import Instance, digests
from tests.fast.raw_segment import (
    AT_RECOVERING,
    BLOCKS,
    DISK,
    EMPTY,
    EVICTING,
    FILLING,
    HOST,
    NONE,
    PARTIAL,
    READY,
    REGISTERED,
    RESET,
    RawSegment,
)

Make = Callable[..., Instance]
CHAIN = [digest[:16] for digest in digests(8)]
GENERATION_MAX = 0xFFFFFF
CHILDREN_MAX = 0x1FFFFF


class World(NamedTuple):
    """A segment whose block records belong to the test, and two leaders on it."""

    made: Instance
    raw: RawSegment
    first: Segment
    second: Segment


@pytest.fixture
def world(make_instance: Make, probe: Any) -> World:
    made = make_instance(16, disk_slots=16)
    made.check = "nothing"
    for pool in (BLOCKS, HOST):
        while probe.take_run(made.creator, pool, 64)[1]:
            pass
    leaders = [made.attach(), made.attach()]
    for key, leader in enumerate(leaders):
        claim_leader(leader, key)
    return World(made, made.raw, *leaders)


def scribble(world: World, block: int, word: int) -> None:
    with RawSegment(world.made.name, writable=True) as raw:
        raw.put_u64(raw.block_at(block), word)


def word_of(world: World, block: int) -> int:
    return world.raw.u64(world.raw.block_at(block))


def register(probe: Any, world: World, block: int, parent: int | None = None) -> None:
    """Reserve and publish block number `block` with its digest of CHAIN, held by the first."""
    generation = 0 if parent is None else world.raw.block(parent).generation
    got = probe.reserve(world.first, block, block, CHAIN[block], parent, generation)
    assert probe.publish(world.first, block, got) == "published"


# ---- reserve -------------------------------------------------------------------------------------
def test_a_reserved_block_carries_all_that_it_was_reserved_with(probe: Any, world: World) -> None:
    register(probe, world, 1)
    got = probe.reserve(world.second, 3, 7, CHAIN[3], 1, 0, 5, 42, 2, 0xFEDCBA9876543210, 9)
    block = world.raw.block(3)
    assert (got, block.state, block.holders, block.children) == (0, PARTIAL, {1}, 0)
    assert (block.digest, block.parent, block.parent_generation) == (CHAIN[3], 1, 0)
    assert (block.priority, block.tick) == (5, 9)
    assert [(p.state, p.slot) for p in block.placements] == [(FILLING, 7), (EMPTY, 0), (EMPTY, 0)]
    assert world.raw.cold(3) == (0xFEDCBA9876543210, 42, 2, 0, 0, 0)


@pytest.mark.parametrize("state", [PARTIAL, REGISTERED, EVICTING])
def test_only_a_reset_block_can_be_reserved(probe: Any, world: World, state: int) -> None:
    scribble(world, 3, state << 61 | 9)
    assert probe.reserve(world.first, 3, 3, CHAIN[3]) is None
    assert word_of(world, 3) == state << 61 | 9


def test_a_priority_above_16_bits_counts_as_the_highest(probe: Any, world: World) -> None:
    probe.reserve(world.first, 3, 3, CHAIN[3], priority=70000)
    assert world.raw.block(3).priority == 65535


# ---- publish -------------------------------------------------------------------------------------
def test_publishing_registers_counts_on_the_parent_and_keeps_the_holder(
    probe: Any, world: World
) -> None:
    register(probe, world, 1)
    got = probe.reserve(world.second, 2, 2, CHAIN[2], 1)
    assert probe.publish(world.second, 2, got, now_ns=99) == "published"
    block = world.raw.block(2)
    assert (block.state, block.holders, block.generation) == (REGISTERED, {1}, got)
    assert (block.placements[0].state, block.placements[0].generation) == (READY, got)
    assert world.raw.cold(2)[3] == 99
    assert world.raw.block(1).children == 1
    world.raw.check_invariants(exact=False)


def test_publishing_again_changes_nothing(probe: Any, world: World) -> None:
    register(probe, world, 1)
    register(probe, world, 2, parent=1)
    before = world.raw.blocks()
    assert probe.publish(world.second, 2, 0) == "already"
    assert world.raw.blocks() == before


@pytest.mark.parametrize(
    "word",
    [
        RESET << 61,
        EVICTING << 61,
        PARTIAL << 61 | 1,
        REGISTERED << 61 | 1,
        PARTIAL << 61 | GENERATION_MAX,
    ],
)
def test_a_block_in_another_state_or_generation_is_gone(
    probe: Any, world: World, word: int
) -> None:
    register(probe, world, 1)
    probe.reserve(world.first, 2, 2, CHAIN[2], 1)
    scribble(world, 2, word)
    assert probe.publish(world.first, 2, 0) == "gone"
    assert word_of(world, 2) == word
    assert world.raw.block(1).children == 0


@pytest.mark.parametrize("block", [32, 1000, NONE])
def test_a_block_outside_the_table_is_gone(probe: Any, world: World, block: int) -> None:
    assert probe.publish(world.first, block, 0) == "gone"


@pytest.mark.parametrize(
    "parent_word",
    [
        RESET << 61,
        PARTIAL << 61,
        EVICTING << 61,
        REGISTERED << 61 | 1,
        REGISTERED << 61 | CHILDREN_MAX << 24,
    ],
)
def test_without_a_registered_parent_of_that_generation_it_stays_partial(
    probe: Any, world: World, parent_word: int
) -> None:
    scribble(world, 1, parent_word)
    got = probe.reserve(world.first, 2, 2, CHAIN[2], 1, 0)
    before = world.raw.block(2)
    assert probe.publish(world.first, 2, got) == "no parent"
    assert world.raw.block(2) == before
    assert word_of(world, 1) == parent_word


def test_it_can_be_published_once_its_parent_is(probe: Any, world: World) -> None:
    probe.reserve(world.first, 1, 1, CHAIN[1])
    probe.reserve(world.second, 2, 2, CHAIN[2], 1, 0)
    assert probe.publish(world.second, 2, 0) == "no parent"
    assert probe.publish(world.first, 1, 0) == "published"
    assert probe.publish(world.second, 2, 0) == "published"
    world.raw.check_invariants(exact=False)


def test_a_parent_outside_the_table_is_not_followed(probe: Any, world: World) -> None:
    probe.reserve(world.first, 2, 2, CHAIN[2], 1000)
    assert probe.publish(world.first, 2, 0) == "gone"


# ---- pin and unpin -------------------------------------------------------------------------------
def test_each_leader_holds_a_block_with_a_bit_of_its_own(probe: Any, world: World) -> None:
    register(probe, world, 1)
    assert world.raw.block(1).holders == {0}
    assert probe.pin(world.second, 1, CHAIN[1])
    assert probe.pin(world.second, 1, CHAIN[1])
    assert world.raw.block(1).holders == {0, 1}
    probe.unpin(world.first, 1, 50)
    assert world.raw.block(1).holders == {1}
    probe.unpin(world.first, 1, 51)
    probe.unpin(world.second, 1, 52)
    assert world.raw.block(1).holders == frozenset()


@pytest.mark.parametrize("state", [RESET, PARTIAL, EVICTING])
def test_only_a_registered_block_can_be_pinned(probe: Any, world: World, state: int) -> None:
    register(probe, world, 1)
    scribble(world, 1, state << 61)
    assert not probe.pin(world.second, 1, CHAIN[1])
    assert word_of(world, 1) == state << 61


def test_a_pin_under_another_digest_is_taken_back(probe: Any, world: World) -> None:
    register(probe, world, 1)
    before = word_of(world, 1)
    for half in (0, 8):
        other = bytearray(CHAIN[1])
        other[half] ^= 1
        assert not probe.pin(world.second, 1, bytes(other))
        assert word_of(world, 1) == before


def test_a_failed_pin_leaves_an_earlier_one_in_place(probe: Any, world: World) -> None:
    register(probe, world, 1)
    assert not probe.pin(world.first, 1, CHAIN[2])
    assert world.raw.block(1).holders == {0}


def test_a_returned_block_has_the_tick_of_its_return_and_its_own_priority(
    probe: Any, world: World
) -> None:
    generation = probe.reserve(world.first, 1, 1, CHAIN[1], priority=7)
    probe.publish(world.first, 1, generation)
    probe.unpin(world.first, 1, 1234)
    block = world.raw.block(1)
    assert (block.priority, block.tick) == (7, 1234)


def test_a_block_that_is_not_registered_keeps_its_holder(probe: Any, world: World) -> None:
    probe.reserve(world.first, 1, 1, CHAIN[1])
    probe.unpin(world.first, 1, 9)
    block = world.raw.block(1)
    assert (block.state, block.holders) == (PARTIAL, {0})


# ---- evict and abandon ---------------------------------------------------------------------------
def test_an_evicted_block_is_reset_under_the_next_generation(probe: Any, world: World) -> None:
    register(probe, world, 1)
    register(probe, world, 2, parent=1)
    probe.unpin(world.first, 2, 70)
    assert probe.evict(world.second, 2) == (2, 1)
    block = world.raw.block(2)
    assert (block.state, block.holders, block.children) == (RESET, frozenset(), 0)
    assert block.generation == 1
    assert all(placement.state == EMPTY for placement in block.placements)
    assert not world.raw.indexed(2, CHAIN[2])
    assert world.raw.block(1).children == 0
    world.raw.check_invariants(exact=False)


def test_a_root_has_no_parent_to_return(probe: Any, world: World) -> None:
    register(probe, world, 1)
    probe.unpin(world.first, 1, 70)
    assert probe.evict(world.second, 1) == (1, NONE)


def test_a_word_that_has_moved_is_not_evicted(probe: Any, world: World) -> None:
    register(probe, world, 1)
    probe.unpin(world.first, 1, 70)
    expected = word_of(world, 1)
    assert probe.pin(world.first, 1, CHAIN[1])
    assert probe.evict(world.second, 1, expected) is None
    assert world.raw.block(1).holders == {0}


@pytest.mark.parametrize(("own", "childs", "after"), [(10, 20, 20), (20, 10, 20)])
def test_the_parent_inherits_the_later_tick_and_keeps_its_priority(
    probe: Any, world: World, own: int, childs: int, after: int
) -> None:
    generation = probe.reserve(world.first, 1, 1, CHAIN[1], priority=3)
    probe.publish(world.first, 1, generation)
    probe.unpin(world.first, 1, own)
    generation = probe.reserve(world.first, 2, 2, CHAIN[2], 1, 0, priority=9)
    probe.publish(world.first, 2, generation)
    probe.unpin(world.first, 2, childs)
    probe.evict(world.first, 2)
    parent = world.raw.block(1)
    assert (parent.priority, parent.tick) == (3, after)


def test_an_abandoned_block_is_reset_and_its_parent_not_touched(probe: Any, world: World) -> None:
    register(probe, world, 1)
    register(probe, world, 2, parent=1)
    parent = world.raw.block(1)
    generation = probe.reserve(world.second, 3, 9, CHAIN[3], 1)
    assert probe.abandon(world.second, 3, generation) == 9
    block = world.raw.block(3)
    assert (block.state, block.holders, block.generation) == (RESET, frozenset(), 1)
    assert not world.raw.indexed(3, CHAIN[3])
    assert world.raw.block(1) == parent


@pytest.mark.parametrize("word", [RESET << 61, REGISTERED << 61, PARTIAL << 61 | 5])
def test_only_the_named_reservation_is_abandoned(probe: Any, world: World, word: int) -> None:
    probe.reserve(world.first, 3, 3, CHAIN[3])
    scribble(world, 3, word)
    assert probe.abandon(world.first, 3, 0) is None
    assert word_of(world, 3) == word


def test_a_leaving_block_gives_its_disk_slot_back(probe: Any, world: World) -> None:
    taken = probe.take_run(world.first, DISK, 4)[0]
    register(probe, world, 1)
    with RawSegment(world.made.name, writable=True) as raw:
        raw.put_u64(raw.block_at(1) + 48, READY << 60 | taken)
    assert world.raw.block(1).placements[1].state == READY
    probe.unpin(world.first, 1, 5)
    assert probe.evict(world.first, 1) == (1, NONE)
    assert taken in world.raw.free(DISK)
    assert world.raw.block(1).placements[1].state == EMPTY


@pytest.mark.parametrize("leaves", ["evict", "abandon"])
def test_the_generation_wraps_around(probe: Any, world: World, leaves: str) -> None:
    scribble(world, 1, RESET << 61 | GENERATION_MAX)
    generation = probe.reserve(world.first, 1, 1, CHAIN[1])
    assert generation == GENERATION_MAX
    if leaves == "evict":
        assert probe.publish(world.first, 1, generation) == "published"
        assert world.raw.block(1).placements[0].generation == GENERATION_MAX
        probe.unpin(world.first, 1, 5)
        assert probe.evict(world.first, 1) is not None
    else:
        assert probe.abandon(world.first, 1, generation) == 1
    block = world.raw.block(1)
    assert (block.state, block.generation, block.holders, block.children) == (RESET, 0, set(), 0)


def test_children_and_holders_do_not_spill_into_each_other(probe: Any, world: World) -> None:
    register(probe, world, 1)
    word = REGISTERED << 61 | 1 << 45 | (CHILDREN_MAX - 1) << 24 | GENERATION_MAX
    scribble(world, 1, word)
    got = probe.reserve(world.second, 2, 2, CHAIN[2], 1, GENERATION_MAX)
    assert probe.publish(world.second, 2, got) == "published"
    assert probe.pin(world.second, 1, CHAIN[1])
    block = world.raw.block(1)
    assert (block.state, block.holders, block.children, block.generation) == (
        REGISTERED,
        {0, 1},
        CHILDREN_MAX,
        GENERATION_MAX,
    )


# ---- inside --------------------------------------------------------------------------------------
def test_a_participant_shows_when_it_is_inside(probe: Any, world: World) -> None:
    assert probe.enter(world.second)
    assert [world.raw.u32(world.raw.line_at(line)) for line in (0, 1)] == [0, 1]
    probe.leave(world.second)
    assert world.raw.u32(world.raw.line_at(1)) == 0


def test_nobody_enters_while_a_recovery_is_under_way(probe: Any, world: World) -> None:
    with RawSegment(world.made.name, writable=True) as raw:
        raw.put_u32(AT_RECOVERING, 1)
        assert not probe.enter(world.first)
        assert raw.u32(raw.line_at(0)) == 0
        assert world.first.counters()["declined"] == 1
        raw.put_u32(AT_RECOVERING, 0)
    assert probe.enter(world.first)
    probe.leave(world.first)
