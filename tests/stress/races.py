# SPDX-License-Identifier: Apache-2.0
"""Leaders, workers and recoverers as threads over one mapping, for a race detector to watch.

``python -m tests.stress.races`` prints a JSON summary; tests/stress/test_races.py runs it on
instrumented builds. Every participant has an attachment, lines and locks of its own, but all reach
the segment through one mapping (tests/stress/_races.pyx). Leaders and workers die and are
replaced while the others go on: between two transitions, inside the structure, with pins,
reservations and stores under way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from kvbm._fast.control import census, evict_subtrees, find_registered, identify
from kvbm._fast.copy import HostCopier
from kvbm._fast.disk_table import DiskTable, FrequencyFilter, raise_epoch
from kvbm._fast.host_backend import HostBackend
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import (
    claim_leader,
    claim_worker,
    engine_counters,
    participants,
    usable_disk_slots,
)
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment, SegmentFault
from kvbm._fast.table import BlockTable
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.eviction.policy import evict_by
from kvbm.eviction.reuse import Reuse
from kvbm.transfer.arena_layout import ArenaLayout
from tests.fast.instances import Instance, digests, instance
from tests.fast.probe import load
from tests.fast.test_disk_table import headers_of

LEADERS = 3
SLOTS = 48
DEADLINE_S = 60.0


@dataclass
class Stage:
    """What all threads share.

    Attributes
    ----------
    one
        The segment; its creator's mapping is everybody's.
    races
        The compiled harness.
    turns, lives
        Operations of a leader's life, and lives of each leader.
    over
        Set when the last leader has ended.
    """

    one: Instance
    races: ModuleType
    turns: int
    lives: int
    layout: ArenaLayout = field(init=False)
    arena: np.ndarray = field(init=False)
    over: threading.Event = field(default_factory=threading.Event)
    done: Counter[str] = field(default_factory=Counter)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layout = ArenaLayout(SLOTS, (self.races.CHUNK_BYTES,))
        self.arena = np.zeros(self.layout.total_bytes // 8, dtype=np.uint64)

    def attach(self) -> Segment:
        """Attach by a file of its own, through the common mapping."""
        segment = Segment.attach(self.one.name)
        self.races.share_mapping(segment, self.one.creator)
        return segment

    def claim(self, claim: Callable[[], object], segment: Segment) -> None:
        """Claim a line as soon as what its last owner held has been returned."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            recover(segment)
            try:
                claim()
                self.races.born()
                return
            except SegmentFault:
                if time.monotonic() > deadline:
                    raise
                self.over.wait(0.001)

    @contextlib.contextmanager
    def copying(self, leader: int, device: np.ndarray) -> Iterator[WorkerLoop]:
        """A worker of a leader, whose thread copies until the block ends; then it dies."""
        segment = self.attach()
        self.claim(lambda: claim_worker(segment, leader, 0), segment)
        chunk = self.races.CHUNK_BYTES
        copier = HostCopier(
            [(device.ctypes.data, chunk, chunk)],
            self.layout,
            self.arena.data,
            device_blocks=self.races.DEVICE_BLOCKS,
        )
        loop = WorkerLoop(segment, HostBackend([copier]))
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield loop
        finally:
            loop.stop()
            thread.join()
            self.races.die(segment)
            segment.close()

    def work(self, table: OperationTable, device: np.ndarray, seed: int) -> object:
        """The harness's loop for one leader."""
        return self.races.Work(
            table,
            self.arena.ctypes.data + self.layout.data_offset,
            self.layout.group_bytes,
            self.layout.group_slots,
            device.ctypes.data,
            seed,
        )


def by_name(table: OperationTable, number: int) -> None:
    """What a controller and the block API do: look, evict by name, give an identity late."""
    census(table.segment, "host")
    participants(table.segment)
    table.segment.counters()
    found = find_registered(table.segment, [0]).get(0, [])
    evict_subtrees(table, found[number % 4 :: 8])
    anonymous = Keys(digests(1, f"anonymous {number}"))
    for ref, _ in table.reserve(anonymous, 0, 1):
        if not identify(table, ref, Keys(digests(1, "late")), 0) or table.publish([ref]) != 1:
            give_back(table, [ref])
        table.unpin(ref)


def give_back(table: BlockTable, refs: list[int]) -> None:
    """Give reservations back, after a recovery if one is under way, which ends in milliseconds."""
    deadline = time.monotonic() + DEADLINE_S
    while not table.abandon_reserved(refs):
        assert time.monotonic() < deadline


def lead_disk(stage: Stage) -> None:
    """A leader with the disk tier's table: chains from a slab's headers, runs, counts, uses."""
    segment = stage.attach()
    stage.claim(lambda: claim_leader(segment, LEADERS), segment)
    table = DiskTable(segment)
    uses = FrequencyFilter(least=2, entries=64)
    number = 0
    while not stage.over.wait(0.001):
        number += 1
        keys = Keys(digests(4, f"slab {number % 5}"))
        slots = [(7 * number + 11 * i) % SLOTS for i in range(4)]
        stage.done["restored"] += table.restore(headers_of(keys, slots, number))
        count, ref = table.match(keys, 0, 4)
        if ref is not None:
            assert len(table.slots_of(ref, count)) == count
            table.unpin(ref)
        uses.passing(keys, 0, 0, 4)
        refs = [ref for ref, _ in table.reserve_run(Keys(digests(3, number)), 0, 3, None)]
        if table.publish(refs) < len(refs):
            give_back(table, refs)
        for ref in refs:
            table.unpin(ref)
        raise_epoch(table, segment.key_epoch)
        assert engine_counters(segment)["reserved"] >= 0
        usable_disk_slots(segment)
    segment.close()


def stop_and_ask(stage: Stage, loop: WorkerLoop, work: object, ended: threading.Event) -> None:
    """The engine's thread of a worker: steps, and operations that are stopped or collected."""
    step = 0
    while not ended.wait(0.005):
        step += 1
        loop.bind_step(step)
        loop.fill_step(step)
        for handle in work.handles()[step % 12 :: 12]:  # type: ignore[attr-defined]
            if handle:
                loop.cancel_and_wait(handle, 1)


def life(stage: Stage, number: int, life_number: int) -> None:
    """One life of a leader and its worker."""
    segment = stage.attach()
    stage.claim(lambda: claim_leader(segment, number), segment)
    table = OperationTable(segment)
    evict_by(table, Reuse if life_number % 2 else None)
    assert segment.leader is not None
    device = np.zeros((stage.races.DEVICE_BLOCKS, stage.races.CHUNK_BYTES), dtype=np.uint8)
    last = life_number == stage.lives - 1
    with stage.copying(segment.leader, device) as loop:
        work = stage.work(table, device, 1000 * number + life_number)
        ended = threading.Event()
        engine = threading.Thread(target=stop_and_ask, args=(stage, loop, work, ended))
        engine.start()
        try:
            for part in range(4):
                work.run(stage.turns // 4, part == 3)  # type: ignore[attr-defined]
                by_name(table, part)
        finally:
            ended.set()
            engine.join()
        if last:
            work.finish()  # type: ignore[attr-defined]
        else:
            stage.races.leave_half_done(work, life_number % 2 == 1)
            stage.races.die(segment)
            stage.done["deaths"] += 2
            recover(stage.one.creator)  # the worker is alive
        for name in ("turns", "read", "wrong", "stored", "loaded", "failed", "abandoned"):
            stage.done[name] += getattr(work, name)
    segment.close()


def lead(stage: Stage, number: int) -> None:
    """All lives of a leader, one after the other."""
    try:
        for life_number in range(stage.lives):
            life(stage, number, life_number)
    except BaseException as error:
        stage.failures.append(error)
        raise


def disk(stage: Stage) -> None:
    """The disk tier's leader; what goes wrong in it fails the run."""
    try:
        lead_disk(stage)
    except BaseException as error:
        stage.failures.append(error)
        raise


def recoverer(stage: Stage) -> None:
    """Another process of the instance, which recovers while the others go on."""
    segment = stage.attach()
    while not stage.over.is_set():
        stage.done["lines returned"] += stage.races.recover_often(segment, 20, 2000)
    segment.close()


def run(stage: Stage) -> None:
    """Start everybody, wait for the leaders, and check what they leave."""
    leaders = [threading.Thread(target=lead, args=(stage, n)) for n in range(LEADERS)]
    helpers = [threading.Thread(target=help_, args=(stage,)) for help_ in (recoverer, disk)]
    for thread in (*leaders, *helpers):
        thread.start()
    for thread in leaders:
        thread.join()
    stage.over.set()
    for thread in helpers:
        thread.join()
    if stage.failures:
        raise stage.failures[0]
    recover(stage.one.creator, rebuild=True)
    stage.one.raw.check_invariants()
    stage.one.raw.check_idle()


def main() -> None:
    """Run with the numbers of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=4000)
    parser.add_argument("--lives", type=int, default=4)
    asked = parser.parse_args()
    races = load(Path(__file__).with_name("_races.pyx"))
    one = instance(host_slots=SLOTS)
    try:
        stage = Stage(one, races, asked.turns, asked.lives)
        run(stage)
        print(json.dumps(stage.done))
    finally:
        one.remove()


if __name__ == "__main__":
    main()
