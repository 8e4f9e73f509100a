# SPDX-License-Identifier: Apache-2.0
"""A leader and its workers in this process, over KV caches in numpy, driven step by step.

It does what an engine does around kvbm: allocates device blocks, runs a "forward pass" that writes
them, carries metadata to the workers and their answers back. Real segment, arenas and copy threads.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import workers_attached
from kvbm.config import Settings, load_settings
from kvbm.fingerprint import Fingerprint
from kvbm.instance import engine_key, is_private, private_instance
from kvbm.leader.disk_opening import DiskOpener, DiskSpec, open_disk_tier
from kvbm.leader.leader import Leader
from kvbm.leader.recorder import make_leader, open_recorder
from kvbm.leader.sequences import TrackedSequence
from kvbm.shared import SegmentSpec, close_and_remove, open_as_leader
from kvbm.step import StepMetadata
from kvbm.tiers.disk import slab_path
from kvbm.tiers.host import wait_for_headers
from kvbm.transfer.geometry import geometry_of_groups
from kvbm.worker.worker import Worker, WorkerPlace
from tests.fast.instances import digests
from tests.fast.raw_segment import RawSegment
from tests.leaks import wait_until
from tests.transfer.kv_tensors import ArrayTensor

BLOCK_TOKENS = 16
ROW = 48  # elements of one block in one layer
DEADLINE_S = 20.0

_numbers = itertools.count()


def unique_engine_id() -> str:
    """Return an id that no other engine has."""
    return f"small-engine-{os.getpid()}-{next(_numbers)}"


def settings_for(host_slots: int, **more: Any) -> Settings:
    """Settings of a host tier of so many blocks."""
    return load_settings({"cpu_cache_override_num_blocks": host_slots, **more}, environ={})


class KvCache:
    """One rank's KV cache: an array a layer, [blocks, elements of a block]."""

    def __init__(self, blocks: int, layers: int, rank: int = 0, row: int = ROW) -> None:
        self.rank = rank
        self.arrays = [np.zeros((blocks, row), np.float32) for _ in range(layers)]
        for block in range(blocks):
            self.write(block, 0)

    def tensors(self, first_layer: int, layers: int) -> dict[str, ArrayTensor]:
        """Tensors of some layers, as an engine registers them."""
        return {
            f"model.layers.{layer}.attn": ArrayTensor(self.arrays[layer])
            for layer in range(first_layer, first_layer + layers)
        }

    def write(self, block: int, value: float) -> None:
        """Fill a block; every layer and rank gets another value."""
        for layer, array in enumerate(self.arrays):
            array[block] = value + 1000 * layer + 100_000 * self.rank

    def read(self, block: int) -> float | None:
        """Value that a block was filled with, None if its bytes are not those of one `write`."""
        value = float(self.arrays[0][block, 0]) - 100_000 * self.rank
        for layer, array in enumerate(self.arrays):
            if not np.all(array[block] == value + 1000 * layer + 100_000 * self.rank):
                return None
        return value


class SmallEngine:
    """One engine.

    Parameters
    ----------
    host_slots, ranks, groups, device_blocks
        Sizes.
    instance
        Name of a shared instance; private by default.
    start
        Whether to start workers and leader at once.
    settings
        More settings, by field name.
    """

    def __init__(
        self,
        host_slots: int = 32,
        *,
        ranks: int = 1,
        groups: int = 1,
        device_blocks: int = 64,
        instance: str | None = None,
        start: bool = True,
        **settings: Any,
    ) -> None:
        self.engine_id = unique_engine_id()
        self.instance = instance or private_instance(self.engine_id)
        self.settings = settings_for(host_slots, **settings)
        self.host_slots = host_slots
        self.ranks = ranks
        self.groups = groups
        self.caches = [KvCache(device_blocks, 2 * groups, rank) for rank in range(ranks)]
        self.workers: list[Worker] = []
        self.leader: Leader = None  # type: ignore[assignment]
        self.opener: DiskOpener | None = None
        self.received: set[str] = set()
        self.sent: set[str] = set()
        self.missing: set[int] = set()
        self._told: Counter[tuple[str, str]] = Counter()
        if start:
            for rank in range(ranks):
                self.start_worker(rank)
            self.start_leader()
            self.wait_until_attached()

    # ---- start and end ---------------------------------------------------------------------------
    def start_worker(self, rank: int = 0) -> Worker:
        """Register the KV cache of a rank."""
        cache = self.caches[rank]
        names = [list(cache.tensors(2 * group, 2)) for group in range(self.groups)]
        tensors = cache.tensors(0, 2 * self.groups)
        geometries = geometry_of_groups(tensors, names, cache.arrays[0].shape[0])
        place = WorkerPlace(self.instance, self.engine_id, rank, self.ranks)
        self.workers.append(Worker(place, self.settings, geometries, keep_alive=tensors))
        return self.workers[-1]

    def start_leader(self) -> Leader:
        """Open the segment and begin to lead."""
        group = self.settings.shm_group
        headers = wait_for_headers(self.instance, self.ranks, DEADLINE_S, group)
        spec = SegmentSpec(
            instance=self.instance,
            host_slots=self.host_slots,
            ranks=self.ranks,
            block_tokens=BLOCK_TOKENS,
            fingerprint=Fingerprint({"geometry": [h.geometry.hex() for h in headers]}),
            nonces=tuple(header.nonce for header in headers),
            disk_slots=self.settings.disk_cache_override_num_blocks,
            group=group,
        )
        self.segment = open_as_leader(spec, engine_key(self.engine_id))
        self.raw = RawSegment(self.segment.name)
        table = OperationTable(self.segment)
        private = is_private(self.instance)
        slabs = [
            slab_path(self.settings.disk_cache_dir, self.instance, rank)
            for rank in range(0 if private else self.ranks)
        ]
        place = DiskSpec(self.instance, engine_key(self.engine_id), tuple(slabs))
        block_bytes = sum(header.bytes_per_block for header in headers)
        tier, self.opener = open_disk_tier(self.settings, table, place, block_bytes) or (None, None)
        recorder = open_recorder(self.settings)
        self.leader = make_leader(table, BLOCK_TOKENS, tier, recorder)
        return self.leader

    def wait_until_attached(self) -> None:
        """Wait until all ranks can copy and all slots are usable."""
        assert wait_until(lambda: workers_attached(self.segment), DEADLINE_S)
        slots = self.host_slots
        for rank in range(self.ranks):
            assert wait_until(lambda r=rank: self.segment.ready_slots(r) == slots, DEADLINE_S)
        assert wait_until(lambda: all(worker.loop for worker in self.workers), DEADLINE_S)

    def close(self) -> None:
        """End everything, after proving that nothing is held; may be called twice."""
        if self.leader is not None:
            self.leader.close()
            if self.opener is not None:
                self.opener.close()
            self.leader = None  # type: ignore[assignment]
            for worker in self.workers:
                worker.close()
            self.raw.check_invariants()
            self.raw.check_idle()
            self.raw.close()
            close_and_remove(self.segment, self.instance)
        for worker in self.workers:
            worker.close()

    # ---- requests --------------------------------------------------------------------------------
    def track(self, request: str, blocks: int, seed: object = 0) -> TrackedSequence:
        """Begin a request of so many complete blocks; the same seed, the same content."""
        hashes = digests(blocks, seed)
        return self.leader.track(request, [Keys(hashes, 1, g) for g in range(self.groups)])

    def place(self, sequence: TrackedSequence, blocks: Sequence[int]) -> None:
        """Give a request these device blocks, the same numbers in each group."""
        sequence.set_device_blocks([list(blocks)] * self.groups)

    def fill(self, blocks: Sequence[int], first_value: float = 1.0) -> None:
        """Forward pass: write device blocks with consecutive values."""
        for cache in self.caches:
            for number, block in enumerate(blocks):
                cache.write(block, first_value + number)

    def values(self, blocks: Sequence[int], rank: int = 0) -> list[float | None]:
        """Values in device blocks of a rank."""
        return [self.caches[rank].read(block) for block in blocks]

    # ---- steps -----------------------------------------------------------------------------------
    def step(self, forward: Callable[[], None] | None = None) -> StepMetadata:
        """One engine step on all ranks: metadata, forward pass, answers."""
        metadata = self.leader.build_step()
        self.bind(metadata)
        if forward is not None:
            forward()
        self.output()
        return metadata

    def bind(self, metadata: StepMetadata) -> None:
        """Give a step to the workers."""
        for worker in self.workers:
            worker.stop_copies(metadata)
            worker.bind(metadata)

    def output(self) -> None:
        """End of the forward pass; what all ranks have reported goes to the leader."""
        received: set[str] = set()
        missing: set[int] = set()
        for worker in self.workers:
            worker.filled()
            for request in worker.ended_stores():
                self._tell("sent", request, self.sent)
            for request, blocks in worker.ended_loads().items():
                self._tell("received", request, received)
                missing.update(blocks)
        self.received |= received
        self.missing |= missing
        self.leader.loads_ended(received, missing)

    def _tell(self, kind: str, request: str, complete: set[str]) -> None:
        self._told[kind, request] += 1
        if self._told[kind, request] % self.ranks == 0:
            complete.add(request)

    def run_until(self, condition: Callable[[], object]) -> None:
        """Step without a forward pass until the condition holds."""

        def holds() -> object:
            if condition():
                return True
            self.step()
            return condition()

        assert wait_until(holds, DEADLINE_S)

    def store(
        self, request: str, blocks: Sequence[int], seed: object = 0, value: float = 1
    ) -> None:
        """Run a request from its start to its end: its blocks are cached afterwards."""
        sequence = self.track(request, len(blocks), seed)
        self.place(sequence, blocks)
        self.leader.store(sequence, len(blocks))
        self.step(lambda: self.fill(blocks, value))
        if self.leader.finish(request, len(blocks)):
            self.run_until(lambda: request in self.sent)
        self.run_until(lambda: not self.leader.holds_device_blocks)

    def load(self, request: str, blocks: Sequence[int], seed: object = 0) -> TrackedSequence:
        """Begin a request whose first blocks are cached, and submit their load."""
        sequence = self.track(request, len(blocks), seed)
        count = self.leader.match(sequence, 0, len(blocks))
        assert count == len(blocks)
        self.place(sequence, blocks)
        self.leader.load(sequence, count)
        return sequence

    def counter(self, name: str) -> int:
        """One of the segment's counters."""
        return self.segment.counters()[name]
