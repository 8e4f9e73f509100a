# SPDX-License-Identifier: Apache-2.0
"""What KV events cost, with a million blocks in the table.

``pytest bench/bench_events.py``; KVBM_BENCH_BLOCKS changes the number of resident blocks.

look
    One look at the whole table: nothing has changed, and the question whether to look at all. The
    interpreter is released meanwhile.
way
    The way of events of 10,000 blocks from the engine's bytes to those of subscribers, step by
    step; divide by 10,000. ``end`` is the device's loss of blocks that the host tier keeps. Memory
    of a block that is known is printed.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from bench.segments import BLOCKS, CHAIN, fill, hashes, leader, segment
from kvbm._fast.changes import TableWatch
from kvbm._fast.keys import Keys
from kvbm._fast.segment import Segment
from kvbm.events.model import Batch, Removed, Stored, Tier
from kvbm.events.msgspec_wire import decode_batch, encode_batch
from kvbm.events.table_keys import EngineKeys
from kvbm.events.tracker import Tracker

SOME = 10_000
TOKENS = 16
PRIME = 11400714819323198485  # spreads the hashes over 64 bits
VALUES = [(number * PRIME) % 2**64 for number in range(1, SOME + 1)]
BATCH = Batch(
    1.5,
    tuple(
        Stored(
            value, VALUES[number - 1] if number % 64 else None, tuple(range(TOKENS)), medium="GPU"
        )
        for number, value in enumerate(VALUES)
    ),
)
PAYLOAD = encode_batch(BATCH)


@pytest.fixture(scope="module")
def watch() -> Iterator[TableWatch]:
    with segment() as name:
        table = leader(name, 1)
        for _ in range(BLOCKS // CHAIN):
            fill(table, Keys(hashes(CHAIN)))
        reader = Segment.attach(name, writable=False)
        made = TableWatch(reader)
        assert len(made.delta().added) == BLOCKS // CHAIN * CHAIN
        yield made
        reader.close()
        table.segment.close()


def told() -> Tracker:
    """A tracker that has told of all blocks."""
    tracker = Tracker(EngineKeys())
    for event in BATCH.events:
        tracker.device(event)
    tracker.flush()
    return tracker


@pytest.mark.benchmark(group="look")
def test_whole_table(benchmark: Any, watch: TableWatch) -> None:
    assert benchmark(watch.delta) == ([], [])


@pytest.mark.benchmark(group="look")
def test_whether_to_look(benchmark: Any, watch: TableWatch) -> None:
    watch.moved()
    assert not benchmark(watch.moved)


@pytest.mark.benchmark(group="way")
def test_read(benchmark: Any) -> None:
    assert len(benchmark(decode_batch, PAYLOAD).events) == SOME


@pytest.mark.benchmark(group="way")
def test_note_and_tell(benchmark: Any) -> None:
    def both() -> list[Any]:
        tracker = Tracker(EngineKeys())
        for event in BATCH.events:
            tracker.device(event)
        return tracker.flush()

    assert len(benchmark(both)) == SOME


@pytest.mark.benchmark(group="way")
def test_write(benchmark: Any) -> None:
    assert benchmark(encode_batch, BATCH) == PAYLOAD


@pytest.mark.benchmark(group="way")
def test_host_and_end(benchmark: Any) -> None:
    removed = Removed(tuple(VALUES), "GPU")
    entries = [(value, 0) for value in VALUES]

    def move(tracker: Tracker) -> list[Any]:
        tracker.table(Tier.HOST, entries, [])
        tracker.device(removed)
        return tracker.flush()

    assert benchmark.pedantic(move, setup=lambda: ((told(),), {}), rounds=10) == []


@pytest.mark.benchmark(group="way")
def test_snapshot(benchmark: Any) -> None:
    tracker = told()
    assert len(benchmark(lambda: list(tracker.snapshot()))) == SOME + 1


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    tracemalloc.start()
    tracker = told()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tracker.flush() == []
    with capsys.disabled():
        print(f"\nmemory of a known block of {TOKENS} tokens: {held / SOME:.0f} bytes")
