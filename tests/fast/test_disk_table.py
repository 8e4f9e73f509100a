# SPDX-License-Identifier: Apache-2.0
"""The disk tier's table: what is registered from a slab's headers, runs of reservations, uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm._fast.disk_table import DiskTable, FrequencyFilter, raise_epoch
from kvbm._fast.keys import Keys
from kvbm._fast.participants import claim_leader
from kvbm._fast.slab import SLAB_HEADER
from tests.fast.instances import Instance, cache, digests, matched

Make = Callable[..., Instance]
SLOTS = 32


def disk_table(made: Instance) -> DiskTable:
    """Attach as a leader."""
    segment = made.attach()
    claim_leader(segment, 1)
    return DiskTable(segment)


def headers_of(keys: Keys, slots: list[int], first_ns: int = 1) -> np.ndarray[Any, Any]:
    """Headers of a chain, as a slab has them."""
    headers = np.zeros(len(slots), SLAB_HEADER)
    parent = (0, 0)
    for i, slot in enumerate(slots):
        digest = keys.identity(i)[0]
        own = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        headers[i]["digest_lo"], headers[i]["digest_hi"] = own
        headers[i]["parent_lo"], headers[i]["parent_hi"] = parent
        headers[i]["slot"], headers[i]["position"] = slot, i
        headers[i]["written_ns"] = first_ns + i
        parent = own
    return headers


# ---- restore -------------------------------------------------------------------------------------
def test_a_chain_is_found_in_the_slots_of_its_headers(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=SLOTS))
    keys = Keys(digests(5))
    slots = [30, 2, 7, 9, 11]
    headers = headers_of(keys, slots)
    assert table.restore(headers[[3, 0, 4, 2, 1]]) == 5
    count, ref = table.match(keys, 0, 5)
    assert count == 5
    assert ref is not None
    assert table.slots_of(ref, 5) == slots
    table.unpin(ref)
    assert table.held() == {}


# ---- blocks that cannot be read ------------------------------------------------------------------
def test_a_retired_block_is_gone_with_what_follows_and_its_slot_is_not_used_again(
    make_instance: Make,
) -> None:
    table = disk_table(make_instance(host_slots=8))
    keys = Keys(digests(6))
    slots = [0, 1, 2, 3, 4, 5]
    assert table.restore(headers_of(keys, slots)) == 6
    done, ref = table.retire(keys, 2)
    assert done
    assert ref is not None
    assert matched(table, keys) == 2
    reserved = table.reserve(Keys(digests(9, "more")), 0, 9)  # evicts what else there is
    assert sorted(slot for _, slot in reserved) == [0, 1, 3, 4, 5, 6, 7]
    counters = table.segment.counters()
    assert (counters["evicted_unreadable"], counters["evicted_capacity"]) == (4, 2)
    assert counters["evicted"] == 4 + 2
    assert table.abandon_reserved([one for one, _ in reserved])
    assert table.abandon_reserved([ref])
    assert table.held() == {}
    again = table.reserve(Keys(digests(9, "more")), 0, 8)
    assert sorted(slot for _, slot in again) == list(range(8))
    assert table.abandon_reserved([one for one, _ in again])


def test_a_block_that_is_held_or_has_another_child_is_not_retired(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=16))
    keys = Keys(digests(4))
    headers = headers_of(keys, [0, 1, 2, 3])
    branch = headers_of(Keys(digests(5, "branch")), [4, 5, 6, 7, 8])[4:]
    branch["parent_lo"], branch["parent_hi"] = headers["digest_lo"][2], headers["digest_hi"][2]
    assert table.restore(np.concatenate([headers, branch])) == 5
    _, ref = table.match(keys, 0, 4)
    assert ref is not None
    assert table.retire(keys, 1) == (False, None)
    assert matched(table, keys) == 4
    table.unpin(ref)
    assert table.retire(keys, 1) == (False, None)  # the branch hangs on the third
    assert matched(table, keys) == 3


def test_a_block_that_is_gone_needs_no_retirement(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=8))
    assert table.retire(Keys(digests(3)), 1) == (True, None)


def test_blocks_behind_a_gap_are_left_out(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=SLOTS))
    keys = Keys(digests(5))
    headers = headers_of(keys, [0, 1, 2, 3, 4])
    assert table.restore(headers[[0, 1, 3, 4]]) == 2
    assert matched(table, keys) == 2


def test_a_second_restore_and_slots_in_use_change_nothing(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=SLOTS))
    keys, other = Keys(digests(3)), Keys(digests(2, "other"))
    headers = headers_of(keys, [0, 1, 2])
    assert table.restore(headers) == 3
    assert table.restore(headers) == 0
    assert table.restore(headers_of(other, [2, 5])) == 0
    assert table.restore(headers_of(other, [SLOTS, 5])) == 0
    assert matched(table, keys) == 3


def test_what_was_written_first_is_evicted_first(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=4))
    old, new = Keys(digests(2, "old")), Keys(digests(2, "new"))
    table.restore(np.concatenate([headers_of(new, [0, 1], 100), headers_of(old, [2, 3], 1)]))
    cache(table, Keys(digests(2, "more")))
    assert (matched(table, new), matched(table, old)) == (2, 0)


def test_no_headers_restore_nothing(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=4))
    assert table.restore(np.empty(0, SLAB_HEADER)) == 0


# ---- runs and holds ------------------------------------------------------------------------------
def test_a_run_ends_before_a_block_that_is_there(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=SLOTS))
    keys = Keys(digests(6))
    first = table.reserve_run(keys, 0, 3, None)
    assert len(first) == 3
    assert table.reserve_run(keys, 0, 6, None) == []
    assert table.publish([ref for ref, _ in first]) == 3
    rest = table.reserve_run(keys, 3, 6, first[-1][0])
    assert [table.parent_of(ref) for ref, _ in rest] == [
        ref & 0xFFFFFFFF for ref, _ in [first[-1], *rest[:-1]]
    ]
    assert table.abandon_reserved([ref for ref, _ in rest])
    for ref, _ in reversed(first):
        table.unpin(ref)


class Raced(DiskTable):
    """A table to which another leader is faster: it reserves one block a moment before."""

    other: DiskTable
    taken: int

    def reserve(self, keys: Keys, start: int, stop: int, *rest: Any) -> list[tuple[int, int]]:
        """Reserve what the other one has left."""
        _, parent = self.match(keys, 0, self.taken)
        self.other.reserve(keys, self.taken, self.taken + 1, parent)
        return super().reserve(keys, start, stop, *rest)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_run_into_which_another_leader_comes_is_given_back(
    make_instance: Make, taken: int
) -> None:
    made = make_instance(host_slots=SLOTS)
    made.check = "invariants"  # the other leader's reservation stays
    segment = made.attach()
    claim_leader(segment, 2)
    table = Raced(segment)
    table.other, table.taken = disk_table(made), taken
    assert table.reserve_run(Keys(digests(4)), 0, 4, None) == []
    assert table.held() == {}
    assert made.creator.free_blocks() == SLOTS - 1


def test_a_block_is_held_as_often_as_that_is_said(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=SLOTS))
    keys = Keys(digests(1))
    cache(table, keys)
    _, ref = table.match(keys, 0, 1)
    assert ref is not None
    assert table.hold_again(ref) == ref
    assert list(table.held().values()) == [2]
    table.unpin(ref)
    table.unpin(ref)
    with pytest.raises(ValueError, match="not held"):
        table.hold_again(ref)


def test_an_epoch_only_grows(make_instance: Make) -> None:
    table = disk_table(make_instance(host_slots=4))
    for epoch, expected in ((3, 3), (2, 3), (4, 4)):
        raise_epoch(table, epoch)
        assert table.segment.key_epoch == expected


# ---- uses ----------------------------------------------------------------------------------------
def test_a_block_passes_at_its_second_use() -> None:
    uses, keys = FrequencyFilter(entries=64), Keys(digests(4))
    keys.identity(0)
    assert uses.passing(keys, 0, 0, 4) == 0
    assert uses.passing(keys, 0, 0, 2) == 2
    assert uses.passing(keys, 0, 4, 4) == 2  # looked at, not used
    assert uses.passing(keys, 1, 2, 4) == 3


def test_counts_double_with_each_use_and_lose_one_with_each_decay() -> None:
    uses, keys = FrequencyFilter(entries=64), Keys(digests(1))
    keys.identity(0)
    for _ in range(3):
        uses.passing(keys, 0, 0, 1)  # 1, 2, 4
    uses.age(2)
    assert uses.passing(keys, 0, 1, 1) == 1
    uses.age()
    assert uses.passing(keys, 0, 1, 1) == 0
    uses.age()
    assert uses.passing(keys, 0, 0, 1) == 0  # forgotten: this is its first use
    assert uses.passing(keys, 0, 0, 1) == 1


def test_counts_do_not_overflow() -> None:
    uses, keys = FrequencyFilter(entries=8), Keys(digests(1))
    keys.identity(0)
    for _ in range(100):
        uses.passing(keys, 0, 0, 1)
    assert uses.passing(keys, 0, 1, 1) == 1


def test_the_least_used_of_a_bucket_gives_way() -> None:
    uses = FrequencyFilter(entries=8)  # one bucket
    often, others = Keys(digests(1, "often")), Keys(digests(40, "others"))
    often.identity(0)
    others.identity(0)
    uses.passing(often, 0, 0, 1)
    uses.passing(often, 0, 0, 1)
    uses.passing(others, 0, 0, 40)
    assert uses.passing(often, 0, 1, 1) == 1
