# SPDX-License-Identifier: Apache-2.0
"""New blocks come from the pools first, and a leader takes again what it gave back."""

from __future__ import annotations

from collections.abc import Callable

from kvbm._fast.keys import Keys
from kvbm._fast.table import BlockTable
from tests.fast.instances import Instance, block_of, digests, fill
from tests.fast.raw_segment import HOST, RawSegment

Make = Callable[..., Instance]


def reserved(table: BlockTable, seed: str, count: int) -> list[tuple[int, int]]:
    """Reserve a new chain; references and slots."""
    found = table.reserve(Keys(digests(count, seed)), 0, count)
    assert len(found) == count
    return found


def records(found: list[tuple[int, int]]) -> list[int]:
    """Blocks of reservations."""
    return [block_of(ref) for ref, _ in found]


def abandon(table: BlockTable, found: list[tuple[int, int]]) -> None:
    """Give reservations back."""
    assert table.abandon_reserved([ref for ref, _ in found])


def test_a_leader_takes_what_it_gave_back_before_what_lies_lower(make_instance: Make) -> None:
    made = make_instance(256)
    first, second = made.leader(), made.leader()
    low, high = reserved(first, "low", 64), reserved(second, "high", 64)
    assert (records(low), records(high)) == (list(range(64)), list(range(64, 128)))
    abandon(first, low)
    abandon(second, high)
    again = reserved(second, "again", 64)
    assert (sorted(records(again)), sorted(slot for _, slot in again)) == (
        list(range(64, 128)),
        list(range(64, 128)),
    )
    abandon(second, again)


def test_all_that_is_free_is_found_wherever_a_leader_looked_last(make_instance: Make) -> None:
    made = make_instance(200)
    table = made.leader()
    found = reserved(table, "all", 200)
    for at in (150, 70, 3):
        abandon(table, [found[at]])
    assert sorted(records(reserved(table, "three", 3))) == [3, 70, 150]
    assert free(made.raw) == 0
    table.abandon_reserved([made.raw.block(i).generation << 32 | i for i in table.held()])
    assert free(made.raw) == 200


def free(raw: RawSegment) -> int:
    """Host slots that are free."""
    return len(raw.free(HOST))


def test_victims_follow_when_the_pools_are_empty(make_instance: Make) -> None:
    made = make_instance(64)
    table = made.leader()
    old = fill(table, "old", 60)
    new = reserved(table, "new", 10)
    assert set(records(new)) == {60, 61, 62, 63, *old[-6:]}
    abandon(table, new)
