# SPDX-License-Identifier: Apache-2.0
"""What a restart costs: attaching to a full segment, and recovery after a ``kill -9``.

``pytest bench/bench_restart.py``; KVBM_BENCH_BLOCKS changes the number of blocks. Groups:

attach
    `Segment.attach`, and the same with a leader's line and private tables. Baselines: ``map``, the
    same object opened and mapped without a look at it; ``touch``, mapped and one byte of each page
    read, as a process would that does not ask the kernel to map all pages at once.
recovery
    A leader is killed while it holds chains and has reserved blocks that it has not published; the
    time of the whole `recover`. Baselines: ``read``, all bytes of the segment once; ``dict``,
    what a cache with a private index does instead: fill it again from a list of its blocks.
"""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import posix_ipc
import pytest

from bench.segments import BLOCKS, CHAIN, fill, hashes, leader, segment
from kvbm._fast.keys import Keys
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment

ROUNDS = 10
HELD_CHAINS = min(100, BLOCKS // 800)
RESERVED = min(1000, CHAIN // 2)


@pytest.fixture(scope="module")
def full() -> Iterator[str]:
    """Return the name of a full segment."""
    with segment() as name:
        table = leader(name, 1)
        for _ in range(BLOCKS // CHAIN):
            fill(table, Keys(hashes(CHAIN)))
        table.segment.close()
        yield name


def mapped(name: str) -> mmap.mmap:
    """Map an object, as Python does."""
    shared = posix_ipc.SharedMemory(name)
    found = mmap.mmap(shared.fd, shared.size)
    shared.close_fd()
    return found


def test_attach(benchmark: Any, full: str) -> None:
    benchmark.group = f"attach, {BLOCKS} blocks"
    found: list[Segment] = []
    again = close_all(found)
    benchmark.pedantic(lambda: found.append(Segment.attach(full)), rounds=ROUNDS, setup=again)
    assert len(found) == 1
    again()


def close_all(found: list[Any]) -> Callable[[], None]:
    """Return what closes the mapping of the round before."""

    def close() -> None:
        while found:
            found.pop().close()

    return close


def test_attach_as_leader(benchmark: Any, full: str) -> None:
    benchmark.group = f"attach, {BLOCKS} blocks"
    found: list[Segment] = []
    again = close_all(found)
    benchmark.pedantic(lambda: found.append(leader(full, 2).segment), rounds=ROUNDS, setup=again)
    assert len(found) == 1
    again()


def test_map(benchmark: Any, full: str) -> None:
    benchmark.group = f"attach, {BLOCKS} blocks"
    found: list[mmap.mmap] = []
    again = close_all(found)
    benchmark.pedantic(lambda: found.append(mapped(full)), rounds=ROUNDS, setup=again)
    assert len(found) == 1
    again()


def test_touch(benchmark: Any, full: str) -> None:
    benchmark.group = f"attach, {BLOCKS} blocks"

    def touch() -> int:
        with mapped(full) as memory:
            return len(memory[:: mmap.PAGESIZE])

    assert benchmark.pedantic(touch, rounds=ROUNDS) > 0


def hold_and_wait(name: str, pipe: Connection) -> None:
    """Be the leader that is killed: with pins, and with blocks that are being filled."""
    table = leader(name, 3)
    for _ in range(HELD_CHAINS):
        keys = Keys(hashes(min(CHAIN, 100)))
        table.publish([ref for ref, _ in table.reserve(keys, 0, len(keys))])
    pipe.send(len(table.reserve(Keys(hashes(RESERVED)), 0, RESERVED)))
    pipe.recv()


def kill_one(name: str) -> None:
    """Leave behind what a leader has that was killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_and_wait, args=(name, theirs))
    process.start()
    assert ours.recv() == RESERVED
    process.kill()
    process.join()
    process.close()
    ours.close()
    theirs.close()


def test_recovery(benchmark: Any, full: str) -> None:
    benchmark.group = f"recovery, {BLOCKS} blocks"
    survivor = Segment.attach(full)
    found: list[int] = []
    benchmark.pedantic(
        lambda: found.append(recover(survivor)), rounds=3, setup=lambda: kill_one(full)
    )
    survivor.close()
    assert set(found) == {1}


def test_read(benchmark: Any, full: str) -> None:
    benchmark.group = f"recovery, {BLOCKS} blocks"
    with mapped(full) as memory:
        words = np.frombuffer(memory, np.uint64)
        assert benchmark.pedantic(words.sum, rounds=ROUNDS) > 0
        del words


def test_dict(benchmark: Any) -> None:
    benchmark.group = f"recovery, {BLOCKS} blocks"
    known = hashes(BLOCKS)
    slots = range(BLOCKS)
    assert len(benchmark.pedantic(lambda: dict(zip(known, slots, strict=True)), rounds=3)) == BLOCKS
