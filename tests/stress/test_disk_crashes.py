# SPDX-License-Identifier: Apache-2.0
"""Crashes while blocks are written to disk: what is found afterwards is what was written.

Losses of power at every moment of a recorded log, with any part of the writes that were not synced;
processes that are killed at every write and sync, also in the middle of a write.
"""

from __future__ import annotations

import itertools
import os
import random
import traceback
from collections import Counter
from pathlib import Path

import pytest

from kvbm.tiers.disk import PAGE_BYTES, slab_path
from tests.copy_rig import SLOTS
from tests.disk_rig import DiskRig
from tests.fast.instances import Instance, instance
from tests.stress.disk_crashes import (
    BLOCKS,
    PAIRS,
    Event,
    KillingCalls,
    RecordedCalls,
    blocks_in,
    crashes,
    digest_of,
    image_of,
    keys_of,
    oracle,
    slots_of,
    work,
)

xxhash = pytest.importorskip("xxhash")

SEED = int(os.environ.get("KVBM_STRESS_SEED", "1"))
BLOCKS_OF = oracle()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Event]]:
    """A new slab's bytes, and all that was written to it."""
    one, calls = instance(host_slots=SLOTS), RecordedCalls()
    rig = DiskRig(one, tmp_path_factory.mktemp("log"), calls=calls)
    try:
        before = image_of(rig.slab)
        work(rig)
    finally:
        rig.close()
        one.prove()
        one.remove()
    return before, list(calls.events)


def checksum(data: bytes) -> int:
    """As slab headers have it: pieces of a page, each with the one before as its seed."""
    found = 0
    for at in range(0, len(data), PAGE_BYTES):
        found = xxhash.xxh3_64_intdigest(data[at : at + PAGE_BYTES], found)
    return int(found)


def test_the_whole_log_leaves_what_was_written_last(log: tuple[bytes, list[Event]]) -> None:
    *_, last = crashes(*log, syncs_hold=True)
    image = bytearray(last.durable)
    for write in last.pending:
        image[write.offset : write.offset + len(write.data)] = write.data
    found = {block.slot: block for block in blocks_in(bytes(image), BLOCKS_OF)}
    assert all(block.data == block.wanted for block in found.values())
    assert all(block.checksum == checksum(block.data) for block in found.values())
    assert set(itertools.chain(*slots_of(PAIRS - 1))) <= set(found)


def test_a_loss_of_power_leaves_each_slot_valid_or_empty(
    log: tuple[bytes, list[Event]], scale: float, summary: list[str]
) -> None:
    choose, done = random.Random(SEED), Counter[str]()
    for crash in crashes(*log, syncs_hold=True):
        done["moments"] += 1
        for _ in range(max(1, round(20 * scale))):
            done["images"] += 1
            for block in blocks_in(crash.image(choose), BLOCKS_OF):
                assert block.data == block.wanted, f"slot {block.slot} holds something else"
                done["blocks"] += 1
    assert done["moments"] > 300
    summary.append(f"loss of power: {dict(done)}, 0 wrong blocks")


def test_a_disk_that_ignores_syncs_is_found_out_by_the_checksum(
    log: tuple[bytes, list[Event]], scale: float, summary: list[str]
) -> None:
    choose, done = random.Random(SEED), Counter[str]()
    for crash in crashes(*log, syncs_hold=False):
        for _ in range(max(1, round(4 * scale))):
            for block in blocks_in(crash.image(choose), BLOCKS_OF):
                right = block.data == block.wanted
                assert right is (block.checksum == checksum(block.data))
                done["right" if right else "refused"] += 1
    assert done["refused"] > 0  # without syncs the order of writes is no help
    summary.append(f"loss of power, no syncs: {dict(done)}, 0 wrong blocks taken")


def test_an_engine_that_starts_after_a_loss_of_power_reads_what_was_written(
    log: tuple[bytes, list[Event]], tmp_path: Path, scale: float
) -> None:
    choose, read = random.Random(SEED), 0
    moments = sum(1 for _ in crashes(*log, syncs_hold=True))
    chosen = set(choose.sample(range(moments), min(moments, round(8 * scale))))
    for number, crash in enumerate(crashes(*log, syncs_hold=True)):
        if number in chosen:
            slab_path(tmp_path, "rig", 0).write_bytes(crash.image(choose))
            read += chains_read(tmp_path)
    assert read > 0


def chains_read(folder: Path) -> int:
    """Open a slab and read each chain that is in it whole; its bytes must be right."""
    one = instance(host_slots=SLOTS)
    rig = DiskRig(one, folder)
    read = 0
    try:
        assert rig.slab.adopted
        for chain in range(2 * PAIRS):
            keys, slots = keys_of(chain), slots_of(chain // 2)[chain % 2]
            if rig.fetched(keys, slots):
                assert rig.loaded(keys, range(BLOCKS), 5) is True
                wanted = [BLOCKS_OF[digest_of(chain, block)] for block in range(BLOCKS)]
                assert [rig.memory.read(block) for block in range(BLOCKS)] == wanted
                read += 1
    finally:
        rig.close()
        one.prove()
        one.remove()
    return read


def killed_at(one: Instance, folder: Path, call: int, half: bool) -> bool:
    """Write all chains in a process that is killed at a call; False if it got to the end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(DiskRig(one, folder, calls=KillingCalls(call, half)))
            status = 0
        except Exception:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -9)
    return status != 0


@pytest.mark.parametrize("half", [False, True], ids=["between calls", "in the middle"])
def test_a_killed_process_leaves_each_slot_valid_or_empty(
    tmp_path: Path, scale: float, summary: list[str], half: bool
) -> None:
    step = max(1, round(16 / scale))
    call, kills, blocks = 1, 0, 0
    while True:
        one = instance(host_slots=SLOTS)
        one.check = "nothing"
        try:
            killed = killed_at(one, tmp_path, call, half)
        finally:
            one.remove()
        image = slab_path(tmp_path, "rig", 0).read_bytes()
        for block in blocks_in(image, BLOCKS_OF):
            assert block.data == block.wanted
            blocks += 1
        if not killed:
            break
        kills += 1
        call += step
    assert kills > 200 // step
    summary.append(f"killed at {kills} calls, {blocks} blocks found, 0 wrong")
