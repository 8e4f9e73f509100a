# SPDX-License-Identifier: Apache-2.0
"""Spills and fetches: bytes come back as they were or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._fast.copy import HostCopier
from kvbm._fast.disk_backend import PROBLEMS, DiskBackend
from kvbm._fast.keys import Keys
from kvbm.tiers.disk import SlabLayout, read_slab
from tests.copy_rig import SLOTS, content
from tests.disk_rig import DISK_SLOTS, DiskRig
from tests.fast.instances import Instance, matched
from tests.leaks import wait_until

DEVICE = [5, 6, 7, 30, 2, 9]
TARGETS = [10, 11, 12, 13, 14, 15]
DISK = [3, 4, 5, 20, 1, 23]


@pytest.fixture
def make_rig(
    make_instance: Callable[..., Instance], tmp_path: Path
) -> Iterator[Callable[..., DiskRig]]:
    """Make rigs over one folder."""
    made: list[DiskRig] = []

    def make(**options: Any) -> DiskRig:
        made.append(DiskRig(make_instance(host_slots=SLOTS), tmp_path, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., DiskRig]) -> DiskRig:
    """A rig with a named slab and direct I/O."""
    return make_rig()


def forget(rig: DiskRig) -> None:
    """Push everything else out of the host tier."""
    rig.stored("other", range(SLOTS))


def spilled_and_forgotten(rig: DiskRig) -> Keys:
    """A chain that is on disk and nowhere else."""
    keys = rig.stored("a", DEVICE)
    assert rig.spilled(keys, DISK) is True
    forget(rig)
    assert matched(rig.table, keys) == 0
    return keys


def returned(rig: DiskRig, keys: Keys) -> list[bool]:
    """Load a chain from the host tier; which blocks are as they were."""
    assert rig.loaded(keys, TARGETS, 5) is True
    return [rig.memory.read(block) == content(i) for i, block in enumerate(TARGETS)]


# ---- round trips ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "bounces"),
    [
        ({}, False),
        ({"name": None}, False),
        ({"direct": False}, False),
        ({"alignment": 8192}, True),
    ],
    ids=["direct", "private", "page cache", "unaligned pieces"],
)
def test_a_chain_comes_back_from_disk_as_it_was(
    make_rig: Callable[..., DiskRig], options: dict[str, Any], bounces: bool
) -> None:
    rig = make_rig(**options)
    assert rig.disk.bounces is bounces
    keys = spilled_and_forgotten(rig)
    assert rig.fetched(keys, DISK) is True
    assert matched(rig.table, keys) == len(DISK)
    assert returned(rig, keys) == [True] * len(DISK)
    assert rig.disk.problems()[0] == 0


def test_headers_say_what_a_slot_holds(rig: DiskRig) -> None:
    keys = rig.stored("a", DEVICE)
    rig.spilled(keys, DISK)
    assert rig.slab.path is not None
    found = read_slab(rig.slab.path)
    assert found is not None
    headers = {int(h["slot"]): h for h in found[1]}
    assert sorted(headers) == sorted(DISK)
    chain = [headers[slot] for slot in DISK]
    assert [int(h["position"]) for h in chain] == list(range(len(DISK)))
    own = [(int(h["digest_lo"]), int(h["digest_hi"])) for h in chain]
    parents = [(int(h["parent_lo"]), int(h["parent_hi"])) for h in chain]
    assert parents == [(0, 0), *own[:-1]]
    assert {int(h["generation"]) for h in chain} == {1}


def test_a_slot_that_is_written_again_has_the_next_generation(rig: DiskRig) -> None:
    first, second = rig.stored("a", DEVICE), rig.stored("b", [20, 21])
    assert rig.spilled(first, DISK) is True
    assert rig.spilled(second, DISK[:2]) is True
    assert rig.slab.path is not None
    found = read_slab(rig.slab.path)
    assert found is not None
    assert {int(h["slot"]): int(h["generation"]) for h in found[1]} == {
        slot: 2 if slot in DISK[:2] else 1 for slot in DISK
    }


def test_host_slots_that_were_fetched_carry_their_checksum(rig: DiskRig) -> None:
    keys = spilled_and_forgotten(rig)
    rig.fetched(keys, DISK)
    _, ref = rig.table.match(keys, 0, len(DISK))
    assert ref is not None
    slots = rig.table.slots_of(ref, len(DISK))
    rig.table.unpin(ref)
    assert all(int(word) >> 59 & 1 for word in rig.headers["word"][slots])


# ---- order of writes -----------------------------------------------------------------------------
def test_headers_are_empty_before_data_move_and_valid_after_a_sync(rig: DiskRig) -> None:
    rig.spilled(rig.stored("a", DEVICE), DISK)
    rig.calls.log.clear()
    rig.spilled(rig.stored("b", DEVICE), DISK)
    data, table = rig.slab.data_fd, rig.slab.table_fd
    kinds = [
        ("data" if fd == data else "header") if kind == "write" else kind
        for kind, fd, _ in rig.calls.log
        if kind != "read"
    ]
    n = len(DISK)
    assert kinds == ["header"] * n + ["sync"] + ["data"] * n + ["sync"] + ["header"] * n
    assert {fd for kind, fd, _ in rig.calls.log if kind == "sync"} == {table}


def test_a_private_slab_is_never_synced(make_rig: Callable[..., DiskRig]) -> None:
    rig = make_rig(name=None)
    rig.spilled(rig.stored("a", DEVICE), DISK)
    rig.spilled(rig.stored("b", DEVICE), DISK)
    assert "sync" not in {kind for kind, _, _ in rig.calls.log}


# ---- wrong bytes ---------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [0, 3, 5])
def test_a_flipped_bit_fails_the_fetch_and_empties_the_slot(rig: DiskRig, row: int) -> None:
    keys = spilled_and_forgotten(rig)
    rig.flip(rig.data_offset(DISK[row]) + 7777)
    assert rig.fetched(keys, DISK) is False
    assert matched(rig.table, keys) == 0
    count, slot, problem = rig.disk.problems()
    assert (count, slot) == (1, DISK[row])
    assert "other bytes" in PROBLEMS[problem]
    assert rig.slab.path is not None
    found = read_slab(rig.slab.path)
    assert found is not None
    assert DISK[row] not in found[1]["slot"]


@pytest.mark.parametrize("at", [0, 8, 16, 31, 48, 56, 64, 96, 127])
def test_a_damaged_header_fails_the_fetch(rig: DiskRig, at: int) -> None:
    keys = spilled_and_forgotten(rig)
    rig.flip(rig.header_offset(DISK[2]) + at)
    assert rig.fetched(keys, DISK) is False
    assert rig.disk.problems()[1] == DISK[2]


def test_a_slot_of_another_block_is_refused(rig: DiskRig) -> None:
    keys = spilled_and_forgotten(rig)
    swapped = [DISK[1], DISK[0], *DISK[2:]]
    assert rig.fetched(keys, swapped) is False
    assert "does not hold" in PROBLEMS[rig.disk.problems()[2]]


def test_a_host_slot_that_is_scribbled_on_is_not_spilled(rig: DiskRig) -> None:
    keys = rig.stored("a", DEVICE)
    count, ref = rig.table.match(keys, 0, len(DISK))
    assert ref is not None
    rig.headers["digest_lo"][rig.table.slots_of(ref, count)[2]] ^= np.uint64(1)
    rig.table.unpin(ref)
    assert rig.spilled(keys, DISK) is False
    assert "host slot" in PROBLEMS[rig.disk.problems()[2]]
    assert rig.slab.path is not None
    found = read_slab(rig.slab.path)
    assert found is not None
    assert len(found[1]) == 0


def test_a_truncated_file_fails_the_fetch(rig: DiskRig) -> None:
    keys = spilled_and_forgotten(rig)
    os.ftruncate(rig.slab.table_fd, rig.data_offset(DISK_SLOTS - 1) + 4096)
    assert rig.fetched(keys, DISK) is False
    assert "fewer bytes" in PROBLEMS[rig.disk.problems()[2]]


# ---- a disk that fails ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["read", "write", "sync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_fails_the_spill_and_leaves_no_valid_slot(
    rig: DiskRig, kind: str, number: int
) -> None:
    keys = rig.stored("a", DEVICE)
    rig.calls.faults[kind] = lambda _offset, _fd: rig.calls.fail(number)
    assert rig.spilled(keys, DISK) is False
    assert rig.disk.problems()[2] == number
    rig.calls.faults.clear()
    assert rig.slab.path is not None
    found = read_slab(rig.slab.path)
    assert found is not None
    assert len(found[1]) == 0
    assert rig.spilled(keys, DISK) is True


def test_an_error_of_one_read_fails_the_fetch_and_the_next_one_works(rig: DiskRig) -> None:
    keys = spilled_and_forgotten(rig)
    bad = rig.data_offset(DISK[4])
    rig.calls.faults["read"] = lambda at, _fd: rig.calls.fail(errno.EIO) if at == bad else None
    assert rig.fetched(keys, DISK) is False
    assert rig.disk.problems()[1:] == (DISK[4], errno.EIO)
    rig.calls.faults.clear()
    assert rig.fetched(keys, DISK) is True
    assert returned(rig, keys) == [True] * len(DISK)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_short_transfer_is_a_failure(rig: DiskRig, kind: str) -> None:
    keys = spilled_and_forgotten(rig)
    rig.calls.faults[kind] = lambda _offset, fd: 4096 if fd == rig.slab.data_fd else None
    if kind == "read":
        assert rig.fetched(keys, DISK) is False
    else:
        assert rig.spilled(rig.stored("b", DEVICE), DISK) is False
    assert "fewer bytes" in PROBLEMS[rig.disk.problems()[2]]


def test_a_hung_read_holds_up_neither_other_copies_nor_the_end(rig: DiskRig) -> None:
    keys = spilled_and_forgotten(rig)
    go, stuck = threading.Event(), threading.Event()

    def hang(offset: int, _fd: int) -> int | None:
        if offset == rig.data_offset(DISK[1]):
            stuck.set()
            go.wait(60)
        return None

    rig.calls.faults["read"] = hang
    handles, _, _ = rig.table.fetch(keys, 0, len(DISK), DISK, None)
    assert wait_until(stuck.is_set)
    others = rig.stored("c", [40, 41])  # the device's copies go on
    assert rig.loaded(others, [42, 43], 6) is True
    assert rig.spilled(others, [8, 9]) is True  # and so do those of other slots
    rig.table.cancel(handles[0])
    assert rig.table.collect(handles[0]) is None  # its host slots may still be written to
    rig.loop.stop()
    assert rig._thread is not None
    rig._thread.join(timeout=10)
    assert not rig._thread.is_alive()
    assert rig.loop.disk_hangs
    rig.disk.stop()
    assert wait_until(lambda: rig.disk.serving == 1)
    go.set()
    assert wait_until(lambda: rig.disk.serving == 0)
    rig.start()  # sees how it ended after all
    assert rig.collected(handles[0]) is True


# ---- cancellation and bounds ---------------------------------------------------------------------
def test_a_cancelled_fetch_ends_at_the_next_row(rig: DiskRig) -> None:
    keys = spilled_and_forgotten(rig)
    go = threading.Event()

    def wait(_offset: int, _fd: int) -> None:
        go.wait(60)

    rig.calls.faults["read"] = wait
    handles, _, _ = rig.table.fetch(keys, 0, len(DISK), DISK, None)
    assert wait_until(lambda: len(rig.calls.log) > 3)
    rig.table.cancel(handles[0])
    go.set()
    assert rig.collected(handles[0]) is False
    assert rig.disk.problems()[0] == 0
    rig.calls.faults.clear()
    assert rig.fetched(keys, DISK) is True


def test_a_disk_slot_beyond_the_slab_is_refused(rig: DiskRig) -> None:
    keys = rig.stored("a", DEVICE)
    assert rig.spilled(keys, [*DISK[:5], DISK_SLOTS]) is False
    assert rig.calls.log == []


def test_blocks_of_another_size_are_refused(rig: DiskRig) -> None:
    copiers: list[HostCopier] = rig.copies.copiers
    with pytest.raises(ValueError, match="do not fit"):
        DiskBackend(
            rig.loop.segment,
            copiers,
            data_fd=0,
            table_fd=0,
            layout=SlabLayout(4, 4096),
            fingerprint=0,
            durable=False,
        )


def test_a_second_disk_is_refused(rig: DiskRig) -> None:
    with pytest.raises(ValueError, match="already"):
        rig.loop.use_disk(rig.disk)


# ---- restart -------------------------------------------------------------------------------------
def test_another_process_of_the_cache_reads_what_was_written(
    make_rig: Callable[..., DiskRig],
) -> None:
    first = make_rig()
    keys = spilled_and_forgotten(first)
    second = make_rig()
    assert second.slab.adopted
    assert second.fetched(keys, DISK) is True
    assert returned(second, keys) == [True] * len(DISK)
