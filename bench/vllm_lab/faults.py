# SPDX-License-Identifier: Apache-2.0
"""Faults for a `Call` phase: they break a cache, so that a comparison of outputs must fail."""

import mmap
from typing import Any

from bench.vllm_lab.processes import SHARED_MEMORY, mapped_kvbm_names


def corrupt_device_blocks(llm: Any, every: int, rows: int, layer: int) -> int:
    """Overwrite KV rows of blocks that the engine's prefix cache holds (engine in this process).

    Parameters
    ----------
    llm : vllm.LLM
        Engine with everything in one process, on the CPU.
    every : int
        Every so many-th cached block is hit.
    rows : int
        Token rows overwritten a block, from its first on.
    layer : int
        The layer hit.

    Returns
    -------
    int
        Blocks hit.
    """
    tensor, blocks = _layer_and_cached_blocks(llm, layer)
    hit = blocks[::every]
    for block in hit:
        tensor[block, :, :rows] = tensor[block, :, :rows].flip(-1)
    return len(hit)


def corrupt_host_copies(llm: Any, every: int, layer: int) -> int:
    """Overwrite one KV row in the host copies of blocks that are on the device as well.

    The copies are found by their bytes, so that nothing is assumed of the arena's layout: the row
    is searched in each of kvbm's shared-memory objects that this process has mapped, and its bytes
    are written there in reverse order.

    Parameters
    ----------
    llm : vllm.LLM
        Engine with everything in one process, on the CPU, with kvbm.
    every : int
        Every so many-th block of the device's prefix cache is searched for.
    layer : int
        The layer hit.

    Returns
    -------
    int
        Copies hit; fewer than blocks searched for if some are not on the host.
    """
    tensor, blocks = _layer_and_cached_blocks(llm, layer)
    rows = [tensor[block, 0, tensor.shape[2] // 2].numpy().tobytes() for block in blocks[::every]]
    hit = 0
    for name in mapped_kvbm_names(["self"]):
        with (SHARED_MEMORY / name).open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            for row in rows:
                start = view.find(row)
                if start >= 0:
                    view[start : start + len(row)] = row[::-1]
                    hit += 1
    return hit


def _layer_and_cached_blocks(llm: Any, layer: int) -> tuple[Any, list[int]]:
    """KV tensor [blocks, kv_heads, block_size, 2 * head_dim] and the blocks with a hash."""
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    pool = core.scheduler.kv_cache_manager.block_pool
    cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
    return worker.model_runner.kv_caches[layer], cached
