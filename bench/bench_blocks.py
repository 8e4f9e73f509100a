# SPDX-License-Identifier: Apache-2.0
"""Reserve, publish, return and evict, a block, with a million blocks in the table.

``pytest bench/bench_blocks.py``; KVBM_BENCH_BLOCKS changes the number of blocks. Groups:

one process
    Calls of 128 blocks; divide by 128. ``reserve``: from the free pools. ``reserve_evicting``: the
    table is full, so that each block is an eviction and a reservation. ``publish``, ``unpin``: the
    same blocks afterwards. ``reset``: evicts a whole table; divide by the number of blocks.
    Baseline ``lru``: an OrderedDict from hash to slot with a list of free slots, private, the same
    steps (evict the oldest, insert).
processes-N
    N processes, each a leader, on one full table: cycles of reserve, publish and return of chains.
    A table on the terminal has nanoseconds a block: mean and median of calls of 128 blocks, median
    and P99 of calls of one block, which include the call from Python. Each reservation evicts. The
    means of more processes than processor cores are those of the scheduler: a call that is
    interrupted lasts a time slice; such runs show that nothing breaks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import pytest

from bench.segments import BLOCKS, CHAIN, fill, hashes, leader, segment
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable

CALL = min(128, BLOCKS // 16)
ROUNDS = min(1000, BLOCKS // CALL // 2)
PROCESSES = [1, 2, 4, 8]
STEPS = ("reserve", "publish", "unpin")


# ---- one process ---------------------------------------------------------------------------------
@pytest.fixture
def table() -> Iterator[OperationTable]:
    with segment() as name:
        made = leader(name, 1)
        yield made
        made.segment.close()


@pytest.fixture
def full(table: OperationTable) -> OperationTable:
    for _ in range(BLOCKS // CHAIN):
        fill(table, Keys(hashes(CHAIN)))
    return table


@pytest.fixture(autouse=True)
def group(benchmark: Any) -> None:
    benchmark.group = f"one process, {CALL} blocks a call, {BLOCKS} in all"


class Call:
    """Steps of one sequence of blocks, each timed on its own with the others around it."""

    def __init__(self, table: OperationTable) -> None:
        self.table = table
        self.keys = Keys([])
        self.refs: list[int] = []

    def new(self) -> None:
        self.keys = Keys(hashes(CALL))

    def reserve(self) -> int:
        self.refs = [ref for ref, _ in self.table.reserve(self.keys, 0, CALL)]
        return len(self.refs)

    def publish(self) -> int:
        return self.table.publish(self.refs)

    def unpin(self) -> None:
        for ref in reversed(self.refs):
            self.table.unpin(ref)

    def rest(self, done: str) -> None:
        """Finish the steps after the one that was timed."""
        if done == "reserve":
            self.publish()
        if done in ("reserve", "publish"):
            self.unpin()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("room", ["free", "evicting"])
def test_step(benchmark: Any, request: pytest.FixtureRequest, step: str, room: str) -> None:
    table = request.getfixturevalue("table" if room == "free" else "full")
    call = Call(table)
    steps = {"reserve": call.reserve, "publish": call.publish, "unpin": call.unpin}
    results: list[int | None] = []

    def before() -> None:
        if results:
            call.rest(step)
        call.new()
        for name in STEPS[: STEPS.index(step)]:
            steps[name]()

    benchmark.pedantic(lambda: results.append(steps[step]()), setup=before, rounds=ROUNDS)
    call.rest(step)
    assert set(results) == {None if step == "unpin" else CALL}
    evicted = table.segment.counters()["evicted"]
    assert (evicted > 0) == (room == "evicting")


def test_reset(benchmark: Any, full: OperationTable) -> None:
    benchmark.group = f"reset of {BLOCKS} blocks"
    assert benchmark.pedantic(full.reset, rounds=1) == BLOCKS - BLOCKS % CHAIN


class Lru:
    """The baseline: what a private dict costs."""

    def __init__(self, slots: int) -> None:
        self.free = list(range(slots))
        self.blocks: OrderedDict[bytes, int] = OrderedDict()

    def put(self, chain: list[bytes]) -> int:
        """Insert the blocks of a chain that are not there, evicting the oldest."""
        count = 0
        for block in chain:
            if block not in self.blocks:
                slot = self.free.pop() if self.free else self.blocks.popitem(last=False)[1]
                self.blocks[block] = slot
                count += 1
        return count

    def touch(self, chain: list[bytes]) -> None:
        for block in reversed(chain):
            self.blocks.move_to_end(block)


@pytest.mark.parametrize("room", ["free", "evicting"])
def test_lru(benchmark: Any, room: str) -> None:
    lru = Lru(BLOCKS)
    if room == "evicting":
        lru.put(hashes(BLOCKS))
    chains: list[list[bytes]] = [[]]

    def before() -> None:
        lru.touch(chains[0])
        chains[0] = hashes(CALL)

    result = benchmark.pedantic(lambda: lru.put(chains[0]), setup=before, rounds=ROUNDS)
    assert result == CALL


# ---- several processes ---------------------------------------------------------------------------
class Timing(NamedTuple):
    """Nanoseconds a block of one step."""

    batch_mean: float
    batch_median: float
    single_median: float
    single_p99: float


def work(name: str, number: int, barrier: Barrier, results: Any) -> None:
    """One process: cycles of long and of short chains, each call timed."""
    table = leader(name, 100 + number)
    long = [Keys(hashes(CALL)) for _ in range(ROUNDS // 4)]
    short = [Keys(hashes(1)) for _ in range(4 * ROUNDS)]
    barrier.wait()
    many = cycles(table, long, CALL)
    single = cycles(table, short, 1)
    barrier.wait()
    table.segment.close()
    results.put({step: summary(many[step], single[step]) for step in STEPS})


def cycles(table: OperationTable, chains: list[Keys], count: int) -> dict[str, list[float]]:
    """Reserve, publish and return each chain; nanoseconds a block of each call."""
    spent: dict[str, list[float]] = {step: [] for step in STEPS}
    clock = time.perf_counter_ns
    for keys in chains:
        began = clock()
        found = table.reserve(keys, 0, count)
        reserved = clock()
        refs = [ref for ref, _ in found]
        publishing = clock()
        done = table.publish(refs)
        published = clock()
        for ref in reversed(refs):
            table.unpin(ref)
        ended = clock()
        assert done == len(refs) == count, (done, len(refs))
        spent["reserve"].append((reserved - began) / count)
        spent["publish"].append((published - publishing) / count)
        spent["unpin"].append((ended - published) / count)
    return spent


def summary(many: list[float], single: list[float]) -> Timing:
    p99 = statistics.quantiles(single, n=100)[98]
    return Timing(statistics.fmean(many), statistics.median(many), statistics.median(single), p99)


@contextlib.contextmanager
def workers(name: str, count: int) -> Iterator[tuple[Barrier, Any]]:
    """Processes that wait at the barrier before and after their work."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count + 1), context.SimpleQueue()
    started = [
        context.Process(target=work, args=(name, number, barrier, results))
        for number in range(count)
    ]
    for process in started:
        process.start()
    try:
        yield barrier, results
    finally:
        for process in started:
            process.join(60)
            process.kill()
            process.join()
            assert process.exitcode == 0
            process.close()
        results.close()


@pytest.mark.parametrize("count", PROCESSES)
def test_processes(benchmark: Any, full: OperationTable, capsys: Any, count: int) -> None:
    benchmark.group = f"processes, {BLOCKS} blocks in all"
    with workers(full.segment.name, count) as (barrier, results):
        barrier.wait(120)
        benchmark.pedantic(barrier.wait, args=(600,), rounds=1)
        found = [results.get() for _ in range(count)]
    cores = os.cpu_count()
    lines = [f"\n{count} processes, {cores} cores; ns a block (goals: average 500, P99 5,000)"]
    for step in STEPS:
        timing = Timing(
            *(statistics.fmean(one[step][i] for one in found) for i in range(len(Timing._fields)))
        )
        lines.append(
            f"  {step:8} calls of {CALL}: mean {timing.batch_mean:6.0f}, median "
            f"{timing.batch_median:6.0f}; calls of 1: median {timing.single_median:6.0f}, "
            f"P99 {timing.single_p99:6.0f}"
        )
        benchmark.extra_info[step] = timing._asdict()
    with capsys.disabled():
        print("\n".join(lines), flush=True)
    counters = full.segment.counters()
    assert counters["published"] >= count * ROUNDS * 4
    assert full.held() == {}
