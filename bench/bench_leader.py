# SPDX-License-Identifier: Apache-2.0
"""What an engine's scheduler pays: the look-up of a request, and all of a transfer but its bytes.

``pytest bench/bench_leader.py``; KVBM_BENCH_BLOCKS changes the number of resident blocks. Groups:

look-up
    ``leader_match``: the leader's part of the connector's `get_num_new_matched_tokens`, as often as
    a waiting request asks, for a prefix of 2,000 cached blocks; with the pin of this call and the
    return of the one before. Baselines: ``dict_walk`` over the same hashes, and
    ``vllm_prefix_walk``, vLLM's own look-up of a prefix in its block pool, where vLLM is installed.
control path
    ``store`` and ``load`` of 2,000 blocks of 64 bytes: operations, ring, worker loop, checks, copy,
    publication and collection, from the call to the end; divide by the number of blocks.
    Baseline ``memcpy``: the bytes alone.
CPU time
    ``counted``: a call of the engine that does nothing, with its CPU time counted. Baseline:
    ``plain``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bench.segments import BLOCKS, CHAIN, fill, hashes, leader, segment
from kvbm._fast.copy import HostCopier
from kvbm._fast.host_backend import HostBackend
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_worker, set_attached
from kvbm._fast.segment import Segment
from kvbm._fast.timing import CallTime
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.leader.call_time import counted
from kvbm.leader.leader import Leader
from kvbm.transfer.arena_layout import ArenaLayout

CHUNK = 64
STEP = 1


@pytest.fixture(scope="module")
def engine() -> Iterator[Leader]:
    """A leader whose worker copies blocks of 64 bytes, on a segment with many blocks."""
    layout = ArenaLayout(BLOCKS, (CHUNK,))
    memory = np.zeros((CHAIN, CHUNK), dtype=np.uint8)
    arena = np.zeros(layout.total_bytes // 8 + 1, dtype=np.uint64)
    copier = HostCopier(
        [(memory.ctypes.data, CHUNK, CHUNK)], layout, arena, device_blocks=CHAIN, keep_alive=memory
    )
    with segment() as name:
        table = leader(name, 1)
        assert table.segment.leader is not None
        worker = Segment.attach(name)
        claim_worker(worker, table.segment.leader, 0)
        set_attached(worker)
        loop = WorkerLoop(worker, HostBackend([copier]))
        thread = threading.Thread(target=loop.run, name="kvbm-bench")
        thread.start()
        loop.bind_step(STEP)
        loop.fill_step(STEP)
        try:
            yield Leader(table, 16)
        finally:
            loop.stop()
            thread.join()
            worker.close()
            table.segment.close()


def settle(table: OperationTable, handles: list[int]) -> None:
    """Collect operations as they end."""
    while handles:
        handles = [handle for handle in handles if table.collect(handle) is None]


def test_leader_match(benchmark: Any, engine: Leader) -> None:
    benchmark.group = f"look-up of {CHAIN} blocks"
    keys = Keys(hashes(CHAIN))
    fill(engine.table, keys)
    sequence = engine.track("request", [keys])
    assert benchmark(engine.match, sequence, 0, CHAIN) == CHAIN
    engine.finish("request", 0)


def test_dict_walk(benchmark: Any) -> None:
    benchmark.group = f"look-up of {CHAIN} blocks"
    chain = hashes(CHAIN)
    known = {block: i for i, block in enumerate(chain)}
    assert benchmark(lambda: sum(block in known for block in chain)) == CHAIN


def test_vllm_prefix_walk(benchmark: Any) -> None:
    pool_module = pytest.importorskip("vllm.v1.core.block_pool")
    utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    benchmark.group = f"look-up of {CHAIN} blocks"
    pool = pool_module.BlockPool(CHAIN + 1, True, 16)
    chain = hashes(CHAIN)
    for block, block_hash in zip(pool.get_new_blocks(CHAIN), chain, strict=True):
        key = utils.make_block_hash_with_group_id(block_hash, 0)
        pool.cached_block_hash_to_block.insert(key, block)

    def walk() -> int:
        return sum(pool.get_cached_block(block_hash, [0]) is not None for block_hash in chain)

    assert benchmark(walk) == CHAIN


def test_store(benchmark: Any, engine: Leader) -> None:
    benchmark.group = f"control path of {CHAIN} blocks"
    table, targets = engine.table, list(range(CHAIN))

    def other() -> tuple[tuple[Keys], dict[str, Any]]:
        return (Keys(hashes(CHAIN)),), {}

    def store(keys: Keys) -> int:
        handles, upto, _ = table.store(keys, 0, CHAIN, targets, None, STEP)
        settle(table, handles)
        return upto

    assert benchmark.pedantic(store, setup=other, rounds=100) == CHAIN


def test_load(benchmark: Any, engine: Leader) -> None:
    benchmark.group = f"control path of {CHAIN} blocks"
    table, targets = engine.table, list(range(CHAIN))
    keys = Keys(hashes(CHAIN))
    handles, _, _ = table.store(keys, 0, CHAIN, targets, None, STEP)
    settle(table, handles)
    count, ref = table.match(keys, 0, CHAIN)
    assert (count, ref is not None) == (CHAIN, True)

    def load() -> int:
        handles = table.load(ref, 0, targets, STEP)
        assert handles is not None
        settle(table, list(handles))
        return len(handles)

    assert benchmark(load) > 0
    table.unpin(ref)


class Calls:
    """Calls that do nothing."""

    def __init__(self, table: OperationTable) -> None:
        self.call_time = CallTime(table.segment)

    @counted
    def counted(self, number: int) -> int:
        """Counted as those of an engine."""
        return number

    def plain(self, number: int) -> int:
        """Not counted."""
        return number


@pytest.mark.parametrize("name", ["counted", "plain"])
def test_call(benchmark: Any, engine: Leader, name: str) -> None:
    benchmark.group = "CPU time of a call"
    assert benchmark(getattr(Calls(engine.table), name), 7) == 7


def test_memcpy(benchmark: Any) -> None:
    benchmark.group = f"control path of {CHAIN} blocks"
    source, target = np.ones(CHAIN * CHUNK, np.uint8), np.zeros(CHAIN * CHUNK, np.uint8)
    benchmark(np.copyto, target, source)
    assert target.all()
