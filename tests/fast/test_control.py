# SPDX-License-Identifier: Apache-2.0
"""Counting, finding and evicting by name, and blocks whose identity comes after their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvbm._fast.control import Census, census, evict_subtrees, find_registered, identify
from kvbm._fast.keys import Keys
from kvbm._fast.segment import Segment
from kvbm._fast.table import BlockTable
from tests.fast.instances import Instance, block_of, digests

MakeInstance = Callable[..., Instance]


def event_hash(block_hash: bytes) -> int:
    """Return the 64-bit form of a block hash."""
    return int.from_bytes(block_hash[-8:], "big")


def published(table: BlockTable, hashes: list[bytes]) -> list[int]:
    """Register a chain that nobody holds; returns its references."""
    refs = [ref for ref, _ in table.reserve(Keys(hashes), 0, len(hashes))]
    assert table.publish(refs) == len(refs)
    for ref in reversed(refs):
        table.unpin(ref)
    return refs


# ---- census --------------------------------------------------------------------------------------
def test_an_empty_tier_is_counted_as_empty(make_instance: MakeInstance) -> None:
    segment = make_instance(host_slots=10).creator
    assert census(segment, "host") == Census(10, 0, 0, 0)
    assert census(segment, "host").empty == 10
    assert census(segment, "disk") == Census(0, 0, 0, 0)


def test_what_a_held_block_depends_on_is_active_too(make_instance: MakeInstance) -> None:
    table = make_instance(host_slots=10).leader()
    trunk = digests(4)
    published(table, trunk)
    published(table, digests(2, "other"))
    assert census(table.segment, "host") == Census(10, 0, 0, 6)
    count, ref = table.match(Keys(trunk), 0, 3)
    assert (count, census(table.segment, "host")) == (3, Census(10, 0, 3, 3))
    assert ref is not None
    table.unpin(ref)
    assert census(table.segment, "host") == Census(10, 0, 0, 6)


def test_blocks_being_filled_count_apart_and_hold_their_parents(
    make_instance: MakeInstance,
) -> None:
    table = make_instance(host_slots=10).leader()
    trunk = digests(3)
    refs = published(table, trunk[:2])
    filling = table.reserve(Keys(trunk), 2, 3, refs[1])
    assert census(table.segment, "host") == Census(10, 1, 2, 0)
    assert census(table.segment, "host").empty == 7
    table.abandon_reserved([ref for ref, _ in filling])
    assert census(table.segment, "host") == Census(10, 0, 0, 2)


def test_a_read_only_attachment_can_count_and_find(make_instance: MakeInstance) -> None:
    one = make_instance(host_slots=10)
    hashes = digests(2)
    refs = published(one.leader(), hashes)
    reader = one.attach(writable=False)
    assert census(reader, "host") == Census(10, 0, 0, 2)
    assert find_registered(reader, [event_hash(h) for h in hashes]) == {
        event_hash(h): [ref] for h, ref in zip(hashes, refs, strict=True)
    }


def test_an_unknown_tier_is_refused(make_instance: MakeInstance) -> None:
    with pytest.raises(KeyError):
        census(make_instance().creator, "tape")


# ---- find ----------------------------------------------------------------------------------------
def test_only_registered_blocks_are_found(make_instance: MakeInstance) -> None:
    table = make_instance().leader()
    hashes = digests(5)
    refs = published(table, hashes[:3])
    filling = table.reserve(Keys(hashes), 3, 5, refs[2])
    found = find_registered(table.segment, [event_hash(h) for h in hashes] + [1, 2])
    assert found == {event_hash(h): [ref] for h, ref in zip(hashes, refs, strict=False)}
    assert find_registered(table.segment, []) == {}
    table.abandon_reserved([ref for ref, _ in filling])


def test_every_block_with_a_hash_is_found(make_instance: MakeInstance) -> None:
    table = make_instance().leader()
    tail = (7).to_bytes(8, "big")
    refs = [published(table, [h[:24] + tail])[0] for h in digests(3)]
    assert find_registered(table.segment, [7]) == {7: refs}


@pytest.mark.parametrize("wrong", [-1, 2**64])
def test_numbers_beyond_64_bits_are_refused(make_instance: MakeInstance, wrong: int) -> None:
    with pytest.raises(OverflowError):
        find_registered(make_instance().creator, [wrong])


# ---- evict ---------------------------------------------------------------------------------------
def test_a_block_goes_with_its_descendants_and_no_other(make_instance: MakeInstance) -> None:
    table = make_instance(host_slots=16).leader()
    trunk, branch = digests(6), digests(2, "branch")
    refs = published(table, trunk)
    grown = table.reserve(Keys(branch), 0, 2, refs[2])
    assert table.publish([ref for ref, _ in grown]) == 2
    for ref, _ in reversed(grown):
        table.unpin(ref)
    assert evict_subtrees(table, [refs[4]]) == 2
    assert evict_subtrees(table, [refs[4]]) == 0
    assert table.match(Keys(trunk), 0, 6)[0] == 4
    table.unpin(refs[3])
    assert evict_subtrees(table, [refs[2], refs[1]]) == 5
    assert table.segment.counters()["evicted_cleared"] == table.segment.counters()["evicted"] == 7
    assert census(table.segment, "host") == Census(16, 0, 0, 1)
    assert table.segment.free_blocks() == 15


def test_a_block_of_which_a_descendant_is_held_stays_whole(make_instance: MakeInstance) -> None:
    one = make_instance(host_slots=16)
    table, other = one.leader(1), one.leader(2)
    hashes = digests(6)
    refs = published(table, hashes)
    count, held = other.match(Keys(hashes), 0, 4)
    assert count == 4
    assert evict_subtrees(table, [refs[1]]) == 0
    assert census(table.segment, "host") == Census(16, 0, 4, 2)
    assert evict_subtrees(table, [refs[1], refs[4]]) == 2
    assert held is not None
    other.unpin(held)
    assert evict_subtrees(table, refs) == 4


def test_stale_references_and_blocks_being_filled_are_left_alone(
    make_instance: MakeInstance,
) -> None:
    table = make_instance().leader()
    (old,) = published(table, digests(1))
    assert evict_subtrees(table, [old]) == 1
    filling = table.reserve(Keys(digests(2, "next")), 0, 2)
    assert block_of(old) in {block_of(ref) for ref, _ in filling}
    assert evict_subtrees(table, [old] + [ref for ref, _ in filling]) == 0
    table.abandon_reserved([ref for ref, _ in filling])
    with pytest.raises(IndexError):
        evict_subtrees(table, [0xFFFFFFFF])


# ---- identify ------------------------------------------------------------------------------------
def test_a_block_is_found_under_its_late_identity_only(make_instance: MakeInstance) -> None:
    table = make_instance().leader()
    early, late = digests(1, "early"), digests(1, "late")
    ((ref, slot),) = table.reserve(Keys(early), 0, 1)
    assert identify(table, ref, Keys(late), 0)
    assert table.publish([ref]) == 1
    assert table.match(Keys(early), 0, 1) == (0, None)
    assert table.match(Keys(late), 0, 1) == (1, ref)
    assert table.slots_of(ref, 1) == [slot]
    assert find_registered(table.segment, [event_hash(late[0])]) == {event_hash(late[0]): [ref]}
    table.unpin(ref)
    table.unpin(ref)


def test_a_late_identity_joins_the_chain_of_its_parent(make_instance: MakeInstance) -> None:
    table = make_instance().leader()
    hashes = digests(3)
    refs = published(table, hashes[:2])
    ((ref, _),) = table.reserve(Keys(digests(1, "early")), 0, 1)
    assert table.match(Keys(hashes), 0, 2) == (2, refs[1])
    assert identify(table, ref, Keys(hashes), 2, refs[1], 3)
    assert table.publish([ref]) == 1
    table.unpin(refs[1])
    table.unpin(ref)
    assert table.match(Keys(hashes), 0, 3) == (3, ref)
    table.unpin(ref)
    assert evict_subtrees(table, [refs[0]]) == 3


def test_only_what_this_leader_fills_can_be_identified(make_instance: MakeInstance) -> None:
    one = make_instance()
    table, other = one.leader(1), one.leader(2)
    ((ref, _),) = table.reserve(Keys(digests(1)), 0, 1)
    late = Keys(digests(1, "late"))
    with pytest.raises(LookupError, match="not reserved by this leader"):
        identify(other, ref, late, 0)
    with pytest.raises(LookupError):
        identify(table, ref + (1 << 32), late, 0)
    with pytest.raises(IndexError, match="block 1: there are 1 keys"):
        identify(table, ref, late, 1)
    assert table.publish([ref]) == 1
    with pytest.raises(LookupError):
        identify(table, ref, late, 0)
    table.unpin(ref)


def test_a_closed_segment_is_refused(make_instance: MakeInstance) -> None:
    segment: Segment = make_instance().attach()
    segment.close()
    with pytest.raises(Exception, match="closed"):
        census(segment, "host")
    with pytest.raises(Exception, match="closed"):
        find_registered(segment, [1])
