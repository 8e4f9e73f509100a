# SPDX-License-Identifier: Apache-2.0
"""Reserve, publish, return and evict, a block, with a million blocks in the table.

``pytest bench/bench_blocks.py``; KVBM_BENCH_BLOCKS changes the number of blocks. Calls of 128
blocks: divide by 128. ``reserve``: from the free pools. ``reserve_evicting``: the table is full, so
that each block is an eviction and a reservation. ``publish``, ``unpin``: the same blocks
afterwards. ``reset``: evicts a whole table; divide by the number of blocks. Baseline ``lru``: an
OrderedDict from hash to slot with a list of free slots, private, the same steps (evict the oldest,
insert).

Many processes on one table: ``python -m bench.segment``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest

from bench.segments import BLOCKS, CHAIN, fill, hashes, leader, segment
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable

CALL = min(128, BLOCKS // 16)
ROUNDS = min(1000, BLOCKS // CALL // 2)
STEPS = ("reserve", "publish", "unpin")


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
