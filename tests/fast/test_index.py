# SPDX-License-Identifier: Apache-2.0
"""The index: hints that are never believed, so that a wrong one is a miss."""

import struct
from collections.abc import Callable
from typing import Any

import pytest

from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import Segment
from tests.fast.instances import Instance, digests
from tests.fast.raw_segment import (
    ENTRIES,
    EVICTING,
    PARTIAL,
    REGISTERED,
    RESET,
    RawSegment,
    digest_hash,
    mix64,
)

Make = Callable[..., Instance]


def leader_of(made: Instance) -> Segment:
    """Attach with a leader line and no table; block records are used as the test likes."""
    made.check = "nothing"
    segment = made.attach()
    claim_leader(segment, 1)
    return segment


def register(probe: Any, segment: Segment, block: int, digest: bytes) -> int:
    """Reserve and publish a block whose record nobody else uses."""
    generation = probe.reserve(segment, block, block, digest)
    assert generation is not None
    assert probe.publish(segment, block, generation) == "published"
    return int(generation)


def same_buckets(raw: RawSegment, count: int) -> list[bytes]:
    """Find digests that all have the same two candidate buckets."""
    wanted = None
    found: list[bytes] = []
    for i in range(2**20):
        digest = struct.pack("<QQ", i, 7)
        _, first, second = raw.candidates(digest)
        buckets = frozenset((first, second))
        wanted = wanted or (buckets if len(buckets) == 2 else None)
        if buckets == wanted:
            found.append(digest)
            if len(found) == count:
                return found
    raise AssertionError("no such digests")


def with_the_tag_of(digest: bytes) -> bytes:
    """Make another digest with the same hash: same tag, same buckets."""
    low, high = struct.unpack("<QQ", digest)
    # hash = mix(low ^ mix(high)): moving high moves what low must be.
    other = high + 1
    mixed = mix64(high) ^ mix64(other)
    return struct.pack("<QQ", low ^ mixed, other)


def test_what_was_inserted_is_found_under_its_digest_only(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    chain = [digest[:16] for digest in digests(64)]
    for block, digest in enumerate(chain):
        assert probe.find(segment, digest) is None
        register(probe, segment, block, digest)
    assert [probe.find(segment, digest) for digest in chain] == [
        (block, 0, REGISTERED) for block in range(64)
    ]
    assert all(probe.find(segment, digest[:16]) is None for digest in digests(64, "other"))
    made.raw.check_index()


def test_an_entry_has_the_tag_and_the_block_in_one_of_two_buckets(
    make_instance: Make, probe: Any
) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    for block, digest in enumerate(d[:16] for d in digests(64)):
        register(probe, segment, block, digest)
        tag, first, second = made.raw.candidates(digest)
        entries = made.raw.entries(first) + (made.raw.entries(second) if second != first else [])
        assert entries.count(tag << 32 | block + 1) == 1


def test_a_digest_with_the_same_tag_is_a_miss(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    digest = digests(1)[0][:16]
    twin = with_the_tag_of(digest)
    assert digest_hash(twin) == digest_hash(digest)
    assert twin != digest
    register(probe, segment, 5, digest)
    assert probe.find(segment, twin) is None
    register(probe, segment, 6, twin)
    assert probe.find(segment, twin) == (6, 0, REGISTERED)
    assert probe.find(segment, digest) == (5, 0, REGISTERED)


@pytest.mark.parametrize("half", [0, 8])
def test_each_half_of_the_digest_is_compared(make_instance: Make, probe: Any, half: int) -> None:
    """A hint for another digest is put where the asked one would be."""
    made = make_instance(64)
    segment = leader_of(made)
    digest = bytearray(digests(1)[0][:16])
    register(probe, segment, 3, bytes(digest))
    digest[half] ^= 1
    assert probe.insert(segment, bytes(digest), 3)
    assert probe.find(segment, bytes(digest)) is None


def test_a_partial_block_is_found_only_if_asked_for(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    digest = digests(1)[0][:16]
    generation = probe.reserve(segment, 9, 9, digest)
    assert probe.find(segment, digest) is None
    assert probe.find(segment, digest, True) == (9, generation, PARTIAL)


def test_a_registered_block_is_preferred_to_a_partial_one(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    digest = digests(1)[0][:16]
    for block in (9, 4, 10):
        generation = probe.reserve(segment, block, block, digest)
        if block == 4:
            assert probe.publish(segment, block, generation) == "published"
        probe.delete(segment, digest, block)  # else the next one would not be let in
    for block in (9, 4, 10):
        probe.insert(segment, digest, block)
    assert probe.find(segment, digest, True) == (4, 0, REGISTERED)


@pytest.mark.parametrize("published", [True, False])
def test_a_digest_that_another_block_carries_is_not_reserved_again(
    make_instance: Make, probe: Any, published: bool
) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    digest = digests(1)[0][:16]
    generation = probe.reserve(segment, 1, 1, digest)
    if published:
        assert probe.publish(segment, 1, generation) == "published"
    assert probe.reserve(segment, 2, 2, digest) is None
    assert made.raw.block(2).state == RESET
    assert probe.find(segment, digest, True) is not None
    assert made.creator.counters()["index_full"] == 0
    assert probe.reserve(segment, 2, 2, digests(1, "other")[0][:16]) is not None


@pytest.mark.parametrize("state", [RESET, EVICTING])
def test_a_block_in_no_live_state_is_a_miss(make_instance: Make, probe: Any, state: int) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    digest = digests(1)[0][:16]
    register(probe, segment, 2, digest)
    with RawSegment(made.name, writable=True) as raw:
        raw.put_u64(raw.block_at(2), state << 61)
    assert probe.find(segment, digest) is None
    assert probe.find(segment, digest, True) is None


def test_an_entry_that_names_no_block_of_the_table_is_ignored(
    make_instance: Make, probe: Any
) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    digest = digests(1)[0][:16]
    tag, first, second = made.raw.candidates(digest)
    with RawSegment(made.name, writable=True) as raw:
        for bucket in (first, second):
            for place, block in enumerate((65, 1000, 2**31, 2**32 - 1)):
                raw.put_u64(raw.entry_at(bucket, place), tag << 32 | block)
            raw.put_u64(raw.entry_at(bucket, 4), tag << 32)  # block number 0 - 1
    assert probe.find(segment, digest, True) is None
    register(probe, segment, 1, digest)
    assert probe.find(segment, digest) == (1, 0, REGISTERED)
    assert probe.purge(segment) == (5 if first == second else 10)


def test_delete_removes_this_blocks_entry_and_no_other(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    digest = digests(1)[0][:16]
    register(probe, segment, 1, digest)
    probe.delete(segment, digest, 1)
    register(probe, segment, 2, digest)
    probe.insert(segment, digest, 1)
    probe.delete(segment, digest, 1)
    assert probe.find(segment, digest) == (2, 0, REGISTERED)
    probe.delete(segment, digest, 1)
    probe.delete(segment, digests(1, "other")[0][:16], 2)
    assert probe.find(segment, digest) == (2, 0, REGISTERED)
    probe.delete(segment, digest, 2)
    assert probe.find(segment, digest) is None


def test_two_full_buckets_refuse_the_next_digest(make_instance: Make, probe: Any) -> None:
    made = make_instance(64, index_buckets=4)
    segment = leader_of(made)
    chain = same_buckets(made.raw, 2 * ENTRIES + 1)
    for block, digest in enumerate(chain[:-1]):
        register(probe, segment, block, digest)
    assert probe.reserve(segment, 40, 40, chain[-1]) is None
    assert made.raw.block(40).state == RESET
    assert made.creator.counters()["index_full"] == 1
    assert [probe.find(segment, digest) for digest in chain] == [
        *((block, 0, REGISTERED) for block in range(2 * ENTRIES)),
        None,
    ]


def test_a_stale_entry_gives_its_place_when_there_is_no_other(
    make_instance: Make, probe: Any
) -> None:
    made = make_instance(64, index_buckets=4)
    segment = leader_of(made)
    chain = same_buckets(made.raw, 2 * ENTRIES + 1)
    for block, digest in enumerate(chain[:-1]):
        register(probe, segment, block, digest)
    with RawSegment(made.name, writable=True) as raw:
        raw.put_u64(raw.block_at(7), RESET << 61 | 1)
    assert register(probe, segment, 40, chain[-1]) == 0
    assert probe.find(segment, chain[-1]) == (40, 0, REGISTERED)
    assert probe.find(segment, chain[7]) is None
    assert made.creator.counters()["stale_entries"] == 1


def test_the_emptier_bucket_is_filled_first(make_instance: Make, probe: Any) -> None:
    made = make_instance(64, index_buckets=4)
    segment = leader_of(made)
    chain = same_buckets(made.raw, 2 * ENTRIES)
    _, first, second = made.raw.candidates(chain[0])
    for count, digest in enumerate(chain, 1):
        register(probe, segment, count - 1, digest)
        used = [sum(entry != 0 for entry in made.raw.entries(b)) for b in (first, second)]
        assert sum(used) == count
        assert abs(used[0] - used[1]) <= 1


def test_purge_deletes_what_is_stale_and_nothing_else(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    segment = leader_of(made)
    chain = [digest[:16] for digest in digests(30)]
    for block, digest in enumerate(chain):
        register(probe, segment, block, digest)
    partial = digests(1, "partial")[0][:16]
    probe.reserve(segment, 50, 50, partial)
    with RawSegment(made.name, writable=True) as raw:
        for block in range(0, 30, 3):
            raw.put_u64(raw.block_at(block), RESET << 61 | 1)
    probe.insert(segment, digests(1, "elsewhere")[0][:16], 1)  # block 1 has another digest
    assert probe.purge(segment) == 11
    assert probe.purge(segment) == 0
    for block, digest in enumerate(chain):
        assert probe.find(segment, digest) == (None if block % 3 == 0 else (block, 0, REGISTERED))
    assert probe.find(segment, partial, True) == (50, 0, PARTIAL)


def test_a_table_at_its_usual_load_never_finds_the_index_full(
    make_instance: Make, probe: Any
) -> None:
    """The worst case of `shape_for`: entries for a block record each, buckets just large enough."""
    made = make_instance(4096)
    assert made.raw.buckets * ENTRIES == 2 * 4096
    segment = leader_of(made)
    for block, digest in enumerate(d[:16] for d in digests(4096)):
        register(probe, segment, block, digest)
    assert made.creator.counters()["index_full"] == 0
    made.raw.check_index()
