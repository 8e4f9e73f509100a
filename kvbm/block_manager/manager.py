# SPDX-License-Identifier: Apache-2.0
"""`BlockManager`: pools of host and device blocks for Python, under upstream's name and arguments.

Two constructors, as upstream's binary and upstream's type stub have them::

    BlockManager(worker_id, leader=None, page_size=32, num_device_blocks=None,
                 disable_device_pool=False)
    BlockManager(worker_id, num_layer, outer_dim, page_size, inner_dim, dtype=None,
                 host_num_blocks=None, device_num_blocks=None, device_id=0)

The first is the scheduler's side of a cache whose bytes are the workers': blocks have ids, hashes
and states, and this process does not see their bytes. The second allocates the memory itself, one
rank in this process, and shows it by DLPack: host blocks lie in a shared-memory arena, device
blocks in a torch tensor (on the CPU where there is no GPU).

Each pool is a segment. The host pool's is the one that engines share if `DYN_KVBM_INSTANCE` names
it; the device pool's is private and has no bytes of its own.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from typing import Any, overload

from kvbm._fast.segment import Segment
from kvbm._fast.table import BlockTable
from kvbm.block_manager.block import BlockList
from kvbm.block_manager.memory import (
    BlockMemory,
    BlockShape,
    device_memory,
    element_type,
    map_arena,
)
from kvbm.block_manager.pool import BlockPool
from kvbm.closing import close_at_exit
from kvbm.config import Settings, load_settings
from kvbm.config.sizes import check_shm_room
from kvbm.errors import ConfigError, UnsupportedCacheLevel
from kvbm.fingerprint import Fingerprint
from kvbm.instance import (
    engine_key,
    is_private,
    private_instance,
    remove_dead_private_instances,
    remove_if_unused,
)
from kvbm.shared import SegmentSpec, close_and_remove, open_as_leader
from kvbm.standalone import KvbmLeader, open_segment
from kvbm.tiers.host import ArenaHeader, HostArena
from kvbm.transfer.arena_layout import ArenaLayout

__all__ = ["BlockManager"]


class BlockManager:
    """Pools of blocks in the device's and the host's memory.

    Parameters
    ----------
    worker_id : int
        A number for people; upstream's worker.
    leader : KvbmLeader
        Waited for: its workers own the memory.
    page_size : int
        Tokens in a block.
    num_device_blocks : int, optional
        Blocks in the device pool. By default those that the workers announced.
    disable_device_pool : bool
        Have no device pool.
    num_layer, outer_dim, inner_dim : int
        With these instead of `leader`: shape of a block, ``[num_layer, outer_dim, page_size,
        inner_dim]``.
    dtype : str, optional
        "fp8", "fp16" (the default), "bf16", "fp32", "fp64", "u8" to "u64", "i8" to "i64".
    host_num_blocks, device_num_blocks : int, optional
        Sizes of the pools; None for no such pool.
    device_id : int
        Number of the GPU.

    Raises
    ------
    ConfigError
        An argument or a setting is not allowed, or there is no room.
    """

    @overload
    def __init__(
        self,
        worker_id: int,
        leader: KvbmLeader | None = None,
        page_size: int = 32,
        num_device_blocks: int | None = None,
        disable_device_pool: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        worker_id: int,
        num_layer: int,
        outer_dim: int,
        page_size: int,
        inner_dim: int,
        dtype: str | None = None,
        host_num_blocks: int | None = None,
        device_num_blocks: int | None = None,
        device_id: int = 0,
    ) -> None: ...

    def __init__(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        self.worker_id = worker_id
        self._host: BlockPool | None = None
        self._device: BlockPool | None = None
        by_shape = "num_layer" in kwargs or (args and isinstance(args[0], int))
        make = self._with_shape if by_shape else self._with_leader
        bound = inspect.signature(make).bind(*args, **kwargs)  # names the argument that is wrong
        try:
            make(*bound.args, **bound.kwargs)
        except BaseException:
            self.close()
            raise
        close_at_exit(self, self._close_now)

    def _with_leader(
        self,
        leader: KvbmLeader | None = None,
        page_size: int = 32,
        num_device_blocks: int | None = None,
        disable_device_pool: bool = False,
    ) -> None:
        if leader is None:
            raise ConfigError(
                "leader=None is not valid (allowed: a KvbmLeader): without one, give the shape "
                "of a block: num_layer, outer_dim, page_size, inner_dim"
            )
        self._page_size = page_size
        self._host = BlockPool(BlockTable(leader.open(page_size)), page_size, closed=leader.close)
        if disable_device_pool:
            return
        count = num_device_blocks
        if count is None:
            count = min(header.device_blocks for header in leader.wait())
        self._device = _device_pool(leader.settings, count, page_size, None)

    def _with_shape(
        self,
        num_layer: int,
        outer_dim: int,
        page_size: int,
        inner_dim: int,
        dtype: str | None = None,
        host_num_blocks: int | None = None,
        device_num_blocks: int | None = None,
        device_id: int = 0,
    ) -> None:
        shape = BlockShape(num_layer, outer_dim, page_size, inner_dim, element_type(dtype))
        for name, count in (
            ("host_num_blocks", host_num_blocks),
            ("device_num_blocks", device_num_blocks),
        ):
            if count is not None and count < 1:
                raise ConfigError(f"{name}={count} is not valid (allowed: 1 or more, or None)")
        self._page_size = page_size
        settings = load_settings()
        remove_dead_private_instances()
        if host_num_blocks is not None:
            self._host = _host_pool(settings, host_num_blocks, shape)
        if device_num_blocks is not None:
            memory = _device_tensor(device_num_blocks, shape, device_id)
            self._device = _device_pool(settings, device_num_blocks, page_size, memory)

    # ---- pools ---------------------------------------------------------------------------------
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._page_size

    @property
    def host_pool(self) -> BlockPool:
        """Pool of host blocks.

        Raises
        ------
        UnsupportedCacheLevel
            There is none.
        """
        return self._pool(self._host, "G2", "host_num_blocks was not given")

    @property
    def device_pool(self) -> BlockPool:
        """Pool of device blocks.

        Raises
        ------
        UnsupportedCacheLevel
            There is none.
        """
        return self._pool(self._device, "G1", "it is disabled, or device_num_blocks was not given")

    @staticmethod
    def _pool(pool: BlockPool | None, level: str, why: str) -> BlockPool:
        if pool is None:
            raise UnsupportedCacheLevel(level, f"this manager has no such pool: {why}")
        return pool

    def allocate_host_blocks_blocking(self, count: int) -> BlockList:
        """Take host blocks, all or none.

        Raises
        ------
        NotEnoughBlocks
            Fewer are available.
        """
        return BlockList(self.host_pool.allocate_blocks(count))

    def allocate_device_blocks_blocking(self, count: int) -> BlockList:
        """Take device blocks, all or none.

        Raises
        ------
        NotEnoughBlocks
            Fewer are available.
        """
        return BlockList(self.device_pool.allocate_blocks(count))

    async def allocate_host_blocks(self, count: int) -> BlockList:
        """Take host blocks, as `allocate_host_blocks_blocking`; there is nothing to await."""
        return self.allocate_host_blocks_blocking(count)

    async def allocate_device_blocks(self, count: int) -> BlockList:
        """Take device blocks, as `allocate_device_blocks_blocking`; there is nothing to await."""
        return self.allocate_device_blocks_blocking(count)

    def init_controller(self, component: object) -> None:
        """Not offered: a controller needs no endpoint here.

        Raises
        ------
        NotImplementedError
            Always; the message says what to use.
        """
        raise NotImplementedError(
            "there is no controller endpoint: kvbm.controller works on the live segment "
            "(python -m kvbm.controller --instance NAME status G2)"
        )

    # ---- end -----------------------------------------------------------------------------------
    def close(self, *, force: bool = False) -> None:
        """Detach as soon as the blocks that are still in use have gone. May be called twice.

        Parameters
        ----------
        force : bool
            Do not wait for them: what tensors show may be overwritten from then on.
        """
        for pool in (self._host, self._device):
            if pool is not None:
                pool.close(force=force)

    def _close_now(self) -> None:
        self.close(force=True)

    def __del__(self) -> None:
        self.close()


# ---- making pools ------------------------------------------------------------------------------
def _host_pool(settings: Settings, count: int, shape: BlockShape) -> BlockPool:
    """Make a pool of host blocks whose arena is of this process, rank 0 of 1."""
    engine_id = f"kvbm-manager-{os.getpid()}-{os.urandom(8).hex()}"
    instance = settings.instance or private_instance(engine_id)
    layout = ArenaLayout(count, (shape.block_bytes,))
    header = ArenaHeader(0, 1, shape.block_bytes, 0, 0, _geometry(shape))
    arena = HostArena(
        instance,
        header,
        exclusive=is_private(instance),
        group=settings.shm_group,
    )
    try:
        if arena.header.nonce == 0:
            check_shm_room(f"host_num_blocks={count}", layout.total_bytes)
        segment = open_segment(
            settings, instance, engine_id, [arena.header], shape.page_size, count
        )
    except BaseException:
        arena.close()
        if is_private(instance):
            remove_if_unused(instance)
        raise
    detach = _detacher(segment, instance, arena)
    try:
        arena.belong_to(segment.nonce)
        arena.map(layout.total_bytes)
        if not arena.reserve(lambda done: None, lambda: False):
            raise ConfigError(f"host_num_blocks={count}: /dev/shm is full")
        segment.set_ready_slots(0, count)
        memory = map_arena(arena.name, layout, shape)
        return BlockPool(BlockTable(segment), shape.page_size, memory, closed=detach)
    except BaseException:
        detach()
        raise


def _detacher(segment: Segment, instance: str, arena: HostArena | None) -> Callable[[], None]:
    def detach() -> None:
        if arena is not None:
            arena.close()
        close_and_remove(segment, instance)

    return detach


def _geometry(shape: BlockShape) -> bytes:
    """32 bytes: what must be equal for blocks to be reusable."""
    facts = ("kvbm block 1", shape.axes, shape.element.name)
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest().ljust(32, b"\0")


def _device_tensor(count: int, shape: BlockShape, device_id: int) -> BlockMemory:
    try:
        from kvbm.block_manager.torch_memory import allocate
    except ImportError as error:
        raise ConfigError(
            f"device_num_blocks={count} needs torch, which cannot be imported: {error}"
        ) from error
    return device_memory(allocate(count, shape, device_id), shape, device_id)


def _device_pool(
    settings: Settings, count: int, page_size: int, memory: BlockMemory | None
) -> BlockPool:
    """Make a pool of block numbers over a private segment of its own, without an arena."""
    engine_id = f"kvbm-device-{os.getpid()}-{os.urandom(8).hex()}"
    instance = private_instance(engine_id)
    spec = SegmentSpec(
        instance=instance,
        host_slots=count,
        ranks=1,
        block_tokens=page_size,
        fingerprint=Fingerprint({"engine": "kvbm block API", "pool": "device"}),
        nonces=(),
    )
    segment = open_as_leader(spec, engine_key(engine_id))
    detach = _detacher(segment, instance, None)
    try:
        segment.set_ready_slots(0, count)
        return BlockPool(BlockTable(segment), page_size, memory, closed=detach)
    except BaseException:
        detach()
        raise
