# SPDX-License-Identifier: Apache-2.0
"""A leader and a worker with a disk tier over a KV cache in torch, driven as an engine drives them.

Two chains of as many blocks as the host tier has slots are stored, and both reach the disk. To load
one brings it from disk to the host tier, where it evicts the other, and from there to the device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.lane import CacheShape, make_tensors
from bench.segments import hashes
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import workers_attached
from kvbm.config import load_settings
from kvbm.fingerprint import Fingerprint
from kvbm.instance import engine_key, private_instance
from kvbm.leader.disk_opening import DiskSpec, open_disk_tier
from kvbm.leader.leader import Leader
from kvbm.shared import SegmentSpec, close_and_remove, open_as_leader
from kvbm.tiers.disk import Slab
from kvbm.tiers.host import wait_for_headers
from kvbm.transfer.backends import Device
from kvbm.transfer.geometry import geometry_of
from kvbm.worker.worker import Worker, WorkerPlace

__all__ = ["CHAINS", "DiskEngine"]

CHAINS = 2
BLOCK_TOKENS = 16
TIMEOUT_S = 120.0
POLL_S = 0.0001
POISON = 0xEE


class DiskEngine:
    """One engine; its device has room for both chains and for one more, to load to.

    Parameters
    ----------
    shape
        Of the KV cache.
    blocks
        Blocks of a chain, and slots of the host tier.
    folder
        Where the slab is.
    device
        ``cuda`` or ``cpu``.
    nixl
        Backends of NIXL to move with; none for plain reads and writes.

    Attributes
    ----------
    store_secs : list of float
        For each chain, seconds from the device until all of it was on disk.
    """

    def __init__(
        self,
        shape: CacheShape,
        blocks: int,
        folder: Path,
        device: str = "cuda",
        nixl: tuple[str, ...] = (),
    ) -> None:
        self.shape, self.blocks = shape, blocks
        self._on_cuda = device == "cuda"
        count = (CHAINS + 1) * blocks
        self.tensors = make_tensors(shape, count, device)
        self.engine_id = f"bench-disk-{os.getpid()}-{time.monotonic_ns()}"
        self.instance = private_instance(self.engine_id)
        self._settings = load_settings(
            {
                "cpu_cache_override_num_blocks": blocks,
                "disk_cache_override_num_blocks": CHAINS * blocks,
                "disk_cache_dir": folder,
                "disable_disk_offload_filter": True,
                **{f"nixl_backend_{name.lower()}": True for name in nixl},
            },
            environ={},
        )
        geometry = geometry_of(self.tensors, count)
        self._worker = Worker(
            WorkerPlace(self.instance, self.engine_id, 0, 1),
            self._settings,
            [geometry],
            self.tensors,
            Device("cuda", 0, self._stream) if self._on_cuda else Device(),
        )
        self._open_leader()
        self._received: set[str] = set()
        self._missing: set[int] = set()
        self._requests = 0
        self._chains = [Keys(hashes(blocks)) for _ in range(CHAINS)]
        self.store_secs = [self._store(number) for number in range(CHAINS)]

    @staticmethod
    def _stream() -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def _open_leader(self) -> None:
        headers = wait_for_headers(self.instance, 1, TIMEOUT_S)
        spec = SegmentSpec(
            instance=self.instance,
            host_slots=self.blocks,
            ranks=1,
            block_tokens=BLOCK_TOKENS,
            fingerprint=Fingerprint({"geometry": [h.geometry.hex() for h in headers]}),
            nonces=tuple(header.nonce for header in headers),
            disk_slots=CHAINS * self.blocks,
        )
        key = engine_key(self.engine_id)
        self._segment = open_as_leader(spec, key)
        table = OperationTable(self._segment)
        place = DiskSpec(self.instance, key, ())
        opened = open_disk_tier(self._settings, table, place, self.shape.block_bytes)
        assert opened is not None
        self._tier, self._opener = opened
        self._leader = Leader(table, BLOCK_TOKENS, self._tier)
        segment = self._segment
        self._wait(
            lambda: workers_attached(segment) and segment.ready_slots(0) == self.blocks, steps=False
        )
        self._wait(lambda: self._tier.disk is not None, steps=False)

    # ---- steps -----------------------------------------------------------------------------------
    def _step(self) -> None:
        metadata = self._leader.build_step()
        self._worker.stop_copies(metadata)
        self._worker.bind(metadata)
        self._worker.filled()
        self._worker.ended_stores()
        ended = self._worker.ended_loads()
        self._missing.update(block for blocks in ended.values() for block in blocks)
        self._received.update(ended)
        self._leader.loads_ended(ended, self._missing)

    def _wait(self, condition: Callable[[], object], *, steps: bool = True) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the disk tier did not get done")
            if steps:
                self._step()
            time.sleep(POLL_S)

    def _is_idle(self) -> bool:
        tier = self._tier
        return not (self._leader._storing or tier._candidates or tier._spills or tier._fetches)

    # ---- chains ----------------------------------------------------------------------------------
    def _device_blocks(self, number: int) -> list[int]:
        return list(range(number * self.blocks, (number + 1) * self.blocks))

    def _request(self, chain: int) -> Any:
        self._requests += 1
        return self._leader.track(f"request {self._requests}", [self._chains[chain]])

    def _store(self, chain: int) -> float:
        sequence = self._request(chain)
        began = time.perf_counter()
        sequence.set_device_blocks([self._device_blocks(chain)])
        self._leader.store(sequence, self.blocks)
        self._step()
        self._leader.finish(sequence.request_id, self.blocks)
        self._wait(self._is_idle)
        stored = self.counters()["blocks_stored"]
        if stored != (chain + 1) * self.blocks:
            raise RuntimeError(f"{stored} blocks are on disk instead of {chain + 1} chains")
        return time.perf_counter() - began

    def load(self, chain: int) -> tuple[float, float]:
        """Load a chain to other device blocks and compare the bytes there.

        Returns
        -------
        tuple of float
            Seconds until it was in the host tier, and from there to the device.
        """
        targets = self._device_blocks(CHAINS)
        for tensor in self.tensors.values():
            tensor[targets[0] :] = POISON
        self._synchronize()
        sequence = self._request(chain)
        answer: list[int | None] = [None]

        def answered() -> bool:
            answer[0] = self._leader.look_up(sequence, 0, self.blocks)
            return answer[0] is not None

        began = time.perf_counter()
        self._wait(answered)
        found = time.perf_counter()
        if answer[0] != self.blocks:
            raise RuntimeError(f"{answer[0]} of {self.blocks} blocks were found")
        sequence.set_device_blocks([targets])
        self._leader.load(sequence, self.blocks)
        self._wait(lambda: sequence.request_id in self._received)
        ended = time.perf_counter()
        self._leader.finish(sequence.request_id, 0)
        if self._missing or not self._is_equal(chain):
            raise RuntimeError(f"other bytes came back (not loaded: {len(self._missing)} blocks)")
        return found - began, ended - found

    def _is_equal(self, chain: int) -> bool:
        sources, targets = self._device_blocks(chain), self._device_blocks(CHAINS)
        return all(
            torch.equal(tensor[sources[0] : sources[-1] + 1], tensor[targets[0] :])
            for tensor in self.tensors.values()
        )

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    # ---- what is there ---------------------------------------------------------------------------
    @property
    def slab(self) -> Slab:
        """The worker's file; all of its slots hold blocks."""
        disk = self._worker._disk
        assert disk is not None
        assert disk._slab is not None
        return disk._slab

    @property
    def nixl_backend(self) -> str | None:
        """Backend of NIXL that moves the bytes; None where plain reads and writes do."""
        disk = self._worker._disk
        return disk._movers[0]._kind if disk is not None and disk._movers else None

    @property
    def nixl_blocks(self) -> int:
        """Blocks that NIXL has moved."""
        disk = self._worker._disk
        return 0 if disk is None else sum(mover.blocks for mover in disk._movers)

    def counters(self) -> dict[str, int]:
        """Counters of the disk tier."""
        assert self._tier.disk is not None
        return self._tier.disk.segment.counters()

    def close(self) -> None:
        """Stop, and remove everything."""
        self._leader.close()
        self._opener.close()
        self._worker.close()
        close_and_remove(self._segment, self.instance)
        self.tensors = {}
        if self._on_cuda:
            torch.cuda.empty_cache()
