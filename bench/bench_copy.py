# SPDX-License-Identifier: Apache-2.0
"""Copies between KV tensors and the host arena in host memory; memcpy in the same run.

``pytest bench/bench_copy.py``. Groups are shape and direction. Each round takes other rows, of
memory several times the last-level cache, so that both sides are cold. ``extra_info`` has GB/s of
the fastest round.

memcpy
    One ``memcpy`` of as many bytes, from one buffer to another.
memcpy_chunks
    One ``memcpy`` a chunk for random blocks, called through ctypes, which costs 0.3 us a call.
run, random
    `HostCopier`: neighbouring rows; each block and each slot somewhere else.
checksum
    The same with XXH3-64 of every slot, written or verified.
threads
    ``run`` in 1, 2 and 4 threads at once, each with rows of its own.
fixed
    One row of 64 bytes: what an operation costs beside the bytes.

What was tried (2 cores of an EPYC Milan, 32 MiB last-level cache, 4 KiB pages, GB/s, best of many
on a shared machine):

* ``memcpy`` of a 64 KiB chunk: 9.6. It writes through the cache, so each line of the destination is
  first read. Streaming stores with plain loads: 15.9 for random chunks, 17.8 for runs. Chunks of
  4 KiB: 7.1 against 6.1, of 16 KiB: 11.6 against 8.4. glibc's ``memcpy`` streams by itself in one
  copy of 256 MiB (17.7), not yet in one of 137 MiB (9.5). Loads stream as well: a whole KV cache
  does not stay in a cache until it is read.
* 32-byte instead of 16-byte stores: +3 to 6 %, not worth a second build of the function. Two pages
  interleaved: -15 %. Four pages: 3.7, the fill buffers run out.
* Fetching ahead inside a chunk: nothing. Fetching four lines of the next chunk: +5 % for random
  chunks of 16 KiB, +2 % for 64 KiB; left out.
* Huge pages on both sides: +25 % for random chunks of 64 KiB, +33 % for 18 KiB: what separates
  random from run is the translation of addresses. They are up to whoever maps the memory.
* Checksums: hash the destination after the copy: 6.3, it comes back from memory. Pieces through a
  buffer in the first-level cache: 8.6 with 16 KiB, 9.9 with 4 KiB and the next piece fetched while
  this one is written. Hashing the source and copying it then: 10.2, but a source that changes in
  between would go unnoticed.
* Longest run: from 8 MiB on no difference, so a run ends there, after half a millisecond, for the
  sake of whoever wants the copy to stop.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvbm._fast.copy import CopyStatus, HostCopier
from kvbm.transfer.arena_layout import ArenaLayout

ROUNDS = 25
SETS = 16  # of rows, taken in turn


class Shape(NamedTuple):
    """Regions, bytes of each one's chunk, rows of an operation, device blocks; twice the slots."""

    regions: int
    chunk_bytes: int
    rows: int
    blocks: int


SHAPES = {
    "8B-32x64KiB": Shape(32, 64 << 10, 32, 128),
    "tiny-4x16KiB": Shape(4, 16 << 10, 128, 4096),
    "MLA-61x18KiB": Shape(61, 18 << 10, 64, 256),
    "cross-layer-1x2MiB": Shape(1, 2 << 20, 32, 128),
}
BYTES = np.dtype(np.uint8)


def touched(size: int) -> np.ndarray[Any, Any]:
    """Return shared memory whose pages are there, as an arena's are."""
    memory = np.frombuffer(mmap.mmap(-1, size), BYTES)
    memory[:] = 1
    return memory


class Memory:
    """Tensors and arena of a shape, with sets of rows."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        chunk = shape.chunk_bytes
        self.layout = ArenaLayout(2 * shape.blocks, (chunk,) * shape.regions)
        self.arena = touched(self.layout.total_bytes)
        self.devices = [touched(shape.blocks * chunk) for _ in range(shape.regions)]
        regions = [(device.ctypes.data, chunk, chunk) for device in self.devices]
        self.copier = HostCopier(
            regions, self.layout, self.arena, device_blocks=shape.blocks, keep_alive=self.devices
        )
        self.bytes = shape.rows * chunk * shape.regions
        self.random = np.random.default_rng(0)

    def rows(self, kind: str) -> np.ndarray[Any, Any]:
        """Return an operation's rows: a run somewhere, or blocks and slots at random."""
        shape = self.shape
        rows = np.zeros((shape.rows, 8), np.uint32)
        if kind == "run":
            rows[:, 0] = np.arange(shape.rows) + self.random.integers(shape.blocks - shape.rows)
            rows[:, 1] = np.arange(shape.rows) + self.random.integers(2 * shape.blocks - shape.rows)
        else:
            rows[:, 0] = self.random.permutation(shape.blocks)[: shape.rows]
            rows[:, 1] = self.random.permutation(2 * shape.blocks)[: shape.rows]
        return rows

    def sets(self, kind: str) -> Iterator[np.ndarray[Any, Any]]:
        """Return sets of rows, in turn without end."""
        return itertools.cycle([self.rows(kind) for _ in range(SETS)])

    def fill(self) -> None:
        """Store into every slot, with checksums and the digests that all rows here have."""
        slots = np.arange(self.layout.slots, dtype=np.uint32)
        rows = np.zeros((len(slots), 8), np.uint32)
        rows[:, 0], rows[:, 1] = slots % self.shape.blocks, slots
        done = self.copier.store(rows, np.zeros((len(rows), 2), np.uint64), checksum=True)
        assert done.status == CopyStatus.OK


@pytest.fixture(params=SHAPES, scope="module")
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(SHAPES[request.param])


@pytest.fixture(params=["store", "load"])
def direction(request: pytest.FixtureRequest, benchmark: Any) -> str:
    shape = request.node.callspec.params["memory"]
    benchmark.group = f"{shape} {request.param}"
    return request.param


def note_speed(benchmark: Any, size: int) -> None:
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.min / 1e9, 2)


def test_memcpy(benchmark: Any, memory: Memory, direction: str) -> None:
    flat = touched(memory.bytes)
    places = itertools.cycle(
        range(memory.layout.data_offset, len(memory.arena) - len(flat), 1 << 22)
    )
    c_memmove = ctypes.memmove

    def copy(at: int) -> None:
        arena = memory.arena.ctypes.data + at
        pair = (arena, flat.ctypes.data) if direction == "store" else (flat.ctypes.data, arena)
        c_memmove(*pair, len(flat))

    benchmark.pedantic(copy, setup=lambda: ((next(places),), {}), rounds=ROUNDS)
    note_speed(benchmark, memory.bytes)


def test_memcpy_chunks(benchmark: Any, memory: Memory, direction: str) -> None:
    chunk, layout = memory.shape.chunk_bytes, memory.layout
    arena = memory.arena.ctypes.data
    calls = []
    for _ in range(SETS):
        pairs = []
        for block, slot in memory.rows("random")[:, :2].tolist():
            for region, device in enumerate(memory.devices):
                pair = (arena + layout.offset(slot, region), device.ctypes.data + block * chunk)
                pairs.append(pair if direction == "store" else pair[::-1])
        calls.append(pairs)
    sets = itertools.cycle(calls)
    c_memmove = ctypes.memmove

    def copy(pairs: list[tuple[int, int]]) -> None:
        for to, source in pairs:
            c_memmove(to, source, chunk)

    benchmark.pedantic(copy, setup=lambda: ((next(sets),), {}), rounds=ROUNDS)
    note_speed(benchmark, memory.bytes)


@pytest.mark.parametrize("checksum", [False, True], ids=["", "checksum"])
@pytest.mark.parametrize("kind", ["run", "random"])
def test_copier(benchmark: Any, memory: Memory, direction: str, kind: str, checksum: bool) -> None:
    sets = memory.sets(kind)
    digests = np.zeros((memory.shape.rows, 2), np.uint64)
    memory.fill()
    move = memory.copier.store if direction == "store" else memory.copier.load

    def copy(rows: np.ndarray[Any, Any]) -> None:
        assert move(rows, digests, checksum=checksum).status == CopyStatus.OK

    benchmark.pedantic(copy, setup=lambda: ((next(sets),), {}), rounds=ROUNDS, warmup_rounds=1)
    note_speed(benchmark, memory.bytes)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("memory", ["8B-32x64KiB"], indirect=True)
def test_copier_threads(benchmark: Any, memory: Memory, threads: int) -> None:
    benchmark.group = "8B-32x64KiB store, threads"
    sets = memory.sets("run")
    digests = np.zeros((memory.shape.rows, 2), np.uint64)
    with ThreadPoolExecutor(threads) as pool:

        def copy(parts: list[np.ndarray[Any, Any]]) -> None:
            done = list(pool.map(memory.copier.store, parts, [digests] * threads))
            assert all(result.status == CopyStatus.OK for result in done)

        benchmark.pedantic(
            copy, setup=lambda: (([next(sets) for _ in range(threads)],), {}), rounds=ROUNDS
        )
    note_speed(benchmark, threads * memory.bytes)


@pytest.mark.parametrize("direction", ["store", "load"])
def test_fixed(benchmark: Any, direction: str) -> None:
    benchmark.group = "one row of 64 bytes, from Python"
    layout = ArenaLayout(64, (64,))
    arena, device = touched(layout.total_bytes), touched(4096)
    copier = HostCopier([(device.ctypes.data, 64, 64)], layout, arena, device_blocks=64)
    rows, digests = np.zeros((1, 8), np.uint32), np.zeros((1, 2), np.uint64)
    assert copier.store(rows, digests).status == CopyStatus.OK
    move = copier.store if direction == "store" else copier.load
    assert benchmark(move, rows, digests).status == CopyStatus.OK
