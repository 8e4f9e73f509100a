# SPDX-License-Identifier: Apache-2.0
"""Operations that are taken whole: checked before and after, and saved where a mover fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._fast.disk_backend import PROBLEMS
from kvbm._fast.disk_batches import DiskBatches
from kvbm.tiers.disk import Slab
from tests.copy_rig import CHUNK, LAYERS, SLOTS, content
from tests.disk_rig import DiskRig
from tests.fast.instances import Instance, matched
from tests.leaks import wait_until

DEVICE = [5, 6, 7, 30, 2, 9]
TARGETS = [10, 11, 12, 13, 14, 15]
DISK = [3, 4, 5, 20, 1, 23]


class Mover:
    """Moves operations through buffers, a few rows at a time; fails where it is told to."""

    def __init__(self, batches: DiskBatches, slab: Slab) -> None:
        self.batches, self.slab = batches, slab
        self.fails = False
        self.may_write = threading.Event()
        self.may_write.set()
        self.taken: list[tuple[bool, list[int]]] = []

    def serve(self) -> None:
        """Move until the backend stops."""
        while (job := self.batches.take()) is not None:
            place, reading, _, disk = job
            self.taken.append((reading, disk.tolist()))
            assert reading or self.may_write.wait(timeout=10)
            if not self.fails:
                self._move(place, reading, disk.tolist())
            self.batches.give(place, not self.fails)

    def _move(self, place: int, reading: bool, slots: list[int]) -> None:
        layout = self.slab.layout
        for first in range(0, len(slots), 4):
            some = slots[first : first + 4]
            rows = np.zeros((len(some), layout.stride), np.uint8)
            if not reading:
                self.batches.copy_rows(place, first, rows)
            for row, slot in zip(rows, some, strict=True):
                at = layout.data_offset + slot * layout.stride
                call: Callable[..., int] = os.preadv if reading else os.pwritev
                assert call(self.slab.table_fd, [memoryview(row)], at) == layout.stride
            if reading:
                self.batches.copy_rows(place, first, rows)


@pytest.fixture
def mover() -> list[Mover]:
    """Where the rig's mover will be."""
    return []


@pytest.fixture
def rig(
    make_instance: Callable[..., Instance], tmp_path: Path, mover: list[Mover]
) -> Iterator[DiskRig]:
    """A rig whose bytes are moved by a `Mover`."""

    def servers(batches: DiskBatches, slab: Slab) -> list[Callable[[], None]]:
        mover.append(Mover(batches, slab))
        return [mover[0].serve]

    made = DiskRig(make_instance(host_slots=SLOTS), tmp_path, servers=servers, direct=False)
    yield made
    mover.clear()  # it keeps the arena mapped
    made.close()


def spilled_and_forgotten(rig: DiskRig) -> Any:
    """A chain that is on disk and nowhere else."""
    keys = rig.stored("a", DEVICE)
    assert rig.spilled(keys, DISK) is True
    rig.stored("other", range(SLOTS))
    assert matched(rig.table, keys) == 0
    return keys


def test_a_chain_comes_back_as_it_was(rig: DiskRig, mover: list[Mover]) -> None:
    keys = spilled_and_forgotten(rig)
    assert rig.fetched(keys, DISK) is True
    assert rig.loaded(keys, TARGETS, 5) is True
    assert [rig.memory.read(block) for block in TARGETS] == [content(i) for i in range(6)]
    assert mover[0].taken == [(False, DISK), (True, DISK)]


def test_what_a_mover_cannot_move_is_moved_row_by_row(rig: DiskRig, mover: list[Mover]) -> None:
    mover[0].fails = True
    keys = spilled_and_forgotten(rig)
    assert rig.fetched(keys, DISK) is True
    assert rig.loaded(keys, TARGETS, 5) is True
    assert [rig.memory.read(block) for block in TARGETS] == [content(i) for i in range(6)]
    assert rig.disk.problems()[0] == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("row", [0, 4])
def test_other_bytes_fail_the_fetch(
    rig: DiskRig, mover: list[Mover], row: int, fails: bool
) -> None:
    keys = spilled_and_forgotten(rig)
    mover[0].fails = fails
    rig.flip(rig.data_offset(DISK[row]) + 77)
    assert rig.fetched(keys, DISK) is False
    count, slot, problem = rig.disk.problems()
    assert (count, slot) == (1, DISK[row])
    assert "other bytes" in PROBLEMS[problem]
    assert matched(rig.table, keys) == 0


def test_a_slot_of_another_block_is_not_even_taken(rig: DiskRig, mover: list[Mover]) -> None:
    keys = spilled_and_forgotten(rig)
    assert rig.fetched(keys, [DISK[1], DISK[0], *DISK[2:]]) is False
    assert "does not hold" in PROBLEMS[rig.disk.problems()[2]]
    assert mover[0].taken == [(False, DISK)]


def test_a_host_slot_that_is_scribbled_on_is_not_written(rig: DiskRig, mover: list[Mover]) -> None:
    keys = rig.stored("a", DEVICE)
    count, ref = rig.table.match(keys, 0, len(DISK))
    assert ref is not None
    rig.headers["digest_lo"][rig.table.slots_of(ref, count)[2]] ^= np.uint64(1)
    rig.table.unpin(ref)
    assert rig.spilled(keys, DISK) is False
    assert mover[0].taken == []


def test_buffers_that_are_too_small_are_refused(rig: DiskRig) -> None:
    with pytest.raises(ValueError, match="too small"):
        rig.disk.copy_rows(0, 0, np.zeros((1, LAYERS * CHUNK - 1), np.uint8))


def test_host_slots_have_addresses_of_their_own(rig: DiskRig) -> None:
    addresses = rig.disk.slot_addresses()
    assert len(set(addresses.tolist())) == SLOTS
    assert not rig.disk.is_contiguous


def test_a_fetch_does_not_wait_until_all_that_is_written_is_written(
    make_instance: Callable[..., Instance], tmp_path: Path
) -> None:
    movers: list[Mover] = []

    def servers(batches: DiskBatches, slab: Slab) -> list[Callable[[], None]]:
        movers.append(Mover(batches, slab))
        batches.keep_for_reads(2)
        return [movers[0].serve] * 2

    rig = DiskRig(make_instance(host_slots=SLOTS), tmp_path, servers=servers, direct=False)
    try:
        keys = spilled_and_forgotten(rig)
        third = rig.stored("third", range(SLOTS))
        movers[0].may_write.clear()
        count, ref = rig.table.match(third, 0, 4)
        assert count == 4
        assert ref is not None
        writes = [
            handle
            for slots in ([6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17])
            for handle in rig.table.spill(ref, 0, slots) or []
        ]
        wait_until(lambda: len(movers[0].taken) == 2)
        assert rig.fetched(keys, DISK) is True
        assert [reading for reading, _ in movers[0].taken] == [False, False, True]
        movers[0].may_write.set()
        assert [rig.collected(handle) for handle in writes] == [True, True, True]
        rig.table.unpin(ref)
    finally:
        movers[0].may_write.set()
        movers.clear()  # they keep the arena mapped
        rig.close()
