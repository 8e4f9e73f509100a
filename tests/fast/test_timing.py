# SPDX-License-Identifier: Apache-2.0
"""What is counted of operations: each that is done is in two histograms; a kill takes none out."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kvbm._fast.contract import LATENCY_BOUNDS_NS
from kvbm._fast.keys import Keys
from kvbm._fast.participants import claim_worker, engine_counters
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment, SegmentFault
from kvbm._fast.timing import CallTime, Histogram, thread_cpu_time_ns, worker_latencies
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.backends import RankCopies
from kvbm.transfer.geometry import geometry_of
from tests.copy_rig import BLOCKS, GROUP_SLOTS, SLOTS, HostMemory, Rig
from tests.disk_rig import DiskRig
from tests.fast.actors import actor
from tests.fast.instances import Instance, digests
from tests.leaks import wait_until

MakeInstance = Callable[..., Instance]
KINDS = ("store", "load", "spill", "fetch")


@pytest.fixture
def rig(make_instance: MakeInstance) -> Iterator[Rig]:
    made = Rig(make_instance(host_slots=SLOTS), HostMemory())
    yield made
    made.close()


def counted(segment: Segment, leader: int = 0, rank: int = 0) -> dict[str, tuple[int, int]]:
    """By kind: operations in the histogram of all of the time, and in that of the copy."""
    found = worker_latencies(segment, leader, rank)
    assert tuple(found) == KINDS
    return {kind: (sum(one.total.buckets), sum(one.copy.buckets)) for kind, one in found.items()}


def test_a_time_is_in_the_first_bucket_whose_bound_it_does_not_exceed(probe: Any) -> None:
    times = [0, 1, 2**63, 2**64 - 1]
    times += [bound + by for bound in LATENCY_BOUNDS_NS for by in (-1, 0, 1)]
    assert [probe.latency_bucket(ns) for ns in times] == [
        bisect_left(LATENCY_BOUNDS_NS, ns) for ns in times
    ]
    assert LATENCY_BOUNDS_NS[0] == 4000
    assert LATENCY_BOUNDS_NS[-1] > 16 * 10**9


def test_each_operation_that_is_done_is_counted_once_in_each_histogram(rig: Rig) -> None:
    rig.start()
    before = time.monotonic_ns()
    keys = [rig.stored(seed, [1, 2, 3]) for seed in range(5)]
    for one in keys[:3]:
        assert rig.loaded(one, [4, 5, 6]) is True
    elapsed = time.monotonic_ns() - before
    counters = rig.segment.counters()
    assert (counters["stores"], counters["loads"]) == (5, 3)
    assert counted(rig.segment) == {
        "store": (5, 5),
        "load": (3, 3),
        "spill": (0, 0),
        "fetch": (0, 0),
    }
    found = worker_latencies(rig.segment, 0, 0)
    for kind, ns in (("store", "store_ns"), ("load", "load_ns")):
        assert 0 < found[kind].copy.sum_ns == counters[ns] <= found[kind].total.sum_ns <= elapsed


def test_the_histograms_are_where_an_independent_reader_finds_them(rig: Rig) -> None:
    rig.start()
    keys = rig.stored("a", [1, 2, 3])
    assert rig.loaded(keys, [4, 5, 6]) is True
    for number, kind in enumerate(KINDS, 1):
        for copy in (False, True):
            buckets, sum_ns = rig.raw.histogram(0, 0, number, copy)
            one = worker_latencies(rig.segment, 0, 0)[kind]
            assert (one.copy if copy else one.total) == Histogram(tuple(buckets), sum_ns)


def test_the_time_before_the_copy_is_in_the_total_alone(rig: Rig) -> None:
    rig.start()
    handle = rig.store(Keys(digests(2)), [1, 2], 3)
    assert not wait_until(lambda: rig.loop.rank_ended(handle), 0.05)  # its step is not filled
    rig.loop.fill_step(3)
    assert rig.collected(handle) is True
    found = worker_latencies(rig.segment, 0, 0)["store"]
    assert found.total.sum_ns - found.copy.sum_ns >= 50_000_000


def test_what_failed_or_was_cancelled_is_in_no_histogram(rig: Rig) -> None:
    rig.start()
    keys = Keys(digests(3))
    cancelled = rig.store(keys, [1, 2, 3], 2)
    rig.table.cancel(cancelled)
    assert rig.collected(cancelled) is False
    failed = rig.store(keys, [1, 2, BLOCKS + 1], 1)  # a device block that does not exist
    rig.loop.fill_step(2)
    assert rig.collected(failed) is False
    assert rig.segment.counters()["stores_failed"] == 1
    assert counted(rig.segment)["store"] == (0, 0)


def test_copies_to_and_from_disk_have_histograms_of_their_own(
    make_instance: MakeInstance, tmp_path: Path
) -> None:
    rig = DiskRig(make_instance(host_slots=SLOTS), tmp_path)
    try:
        keys = rig.stored("a", [5, 6, 7])
        assert rig.spilled(keys, [3, 4, 5]) is True
        rig.stored("other", range(SLOTS))
        assert rig.fetched(keys, [3, 4, 5]) is True
        stores = rig.segment.counters()["stores"]
        assert counted(rig.segment) == {
            "store": (stores, stores),
            "load": (0, 0),
            "spill": (1, 1),
            "fetch": (1, 1),
        }
    finally:
        rig.close()


def test_the_cpu_time_of_the_copy_thread_is_counted(rig: Rig) -> None:
    before = time.process_time_ns()
    rig.start()
    rig.stored("a", range(SLOTS))
    rig.stop()
    spent = rig.segment.counters()["cpu_ns"]
    assert 0 < spent <= time.process_time_ns() - before


def spin(ns: int) -> None:
    """Use the processor for so long."""
    began = time.thread_time_ns()
    while time.thread_time_ns() - began < ns:
        pass


def test_the_cpu_time_of_calls_is_on_their_leaders_line(make_instance: MakeInstance) -> None:
    one = make_instance(8)
    tables = one.leader(), one.leader()
    calls = CallTime(tables[1].segment)
    before = time.thread_time_ns()
    spin(1_000_000)  # not in a call
    with calls:
        spin(2_000_000)
        threading.Event().wait(0.02)  # no CPU time
    with pytest.raises(KeyError), calls:
        {}["a call that raises"]
    elapsed = time.thread_time_ns() - before
    spent = [engine_counters(table.segment)["cpu_ns"] for table in tables]
    assert spent[0] == 0
    assert 2_000_000 <= spent[1] <= elapsed - 1_000_000


def test_calls_to_a_segment_that_is_closed_are_refused(make_instance: MakeInstance) -> None:
    segment = make_instance(8).leader().segment
    calls = CallTime(segment)
    segment.close()
    with pytest.raises(SegmentFault), calls:
        pass
    with pytest.raises(TypeError):
        CallTime(None)  # type: ignore[arg-type]


def test_the_clock_is_that_of_the_calling_thread() -> None:
    before = thread_cpu_time_ns()
    spin(2_000_000)
    assert thread_cpu_time_ns() - before >= 2_000_000


def test_a_worker_that_does_not_exist_has_no_histograms(make_instance: MakeInstance) -> None:
    made = make_instance(8, ranks=2)
    assert set(counted(made.creator, 15, 1).values()) == {(0, 0)}
    for leader, rank in ((16, 0), (0, 2), (-1, 0)):
        with pytest.raises(IndexError):
            worker_latencies(made.creator, leader, rank)


def copy_until_killed(name: str, pipe: Connection) -> None:
    """A worker of leader 0 that copies what it is told to, of every step."""
    segment = Segment.attach(name)
    claim_worker(segment, 0, 0)
    memory = HostMemory()
    geometry = geometry_of(memory.tensors, BLOCKS)
    layout = ArenaLayout(SLOTS, geometry.chunk_bytes, GROUP_SLOTS)
    arena = bytearray(layout.total_bytes)
    copies = RankCopies(memory.device, [geometry], layout, arena, rank=0)
    copies.grow(layout.total_bytes)
    loop = WorkerLoop(segment, copies.backend)
    loop.bind_step(1000)
    pipe.send("copies")
    loop.run()


def test_a_kill_takes_nothing_out_and_the_next_worker_goes_on(make_instance: MakeInstance) -> None:
    one = make_instance(host_slots=SLOTS)
    table = one.leader()

    def stored(seed: object) -> bool:
        handle = table.store(Keys(digests(2, seed)), 0, 2, [1, 2], None, 1)[0][0]
        ended: list[bool | None] = []
        assert wait_until(lambda: ended.append(table.collect(handle)) or ended[-1] is not None)
        return ended[-1] is True

    for life in range(2):
        with actor(copy_until_killed, one.name) as worker:
            assert worker.result() == "copies"
            assert [stored((life, seed)) for seed in range(3)] == [True] * 3
            before = worker_latencies(table.segment, 0, 0), table.segment.counters()
            worker.kill()
        assert worker_latencies(table.segment, 0, 0) == before[0]
        assert table.segment.counters() == before[1]
        assert counted(table.segment)["store"] == (3 * (life + 1), 3 * (life + 1))
        assert table.segment.counters()["stores"] == 3 * (life + 1)
        assert table.segment.counters()["cpu_ns"] > 0
        assert recover(table.segment) == 1
