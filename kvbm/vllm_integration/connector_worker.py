# SPDX-License-Identifier: Apache-2.0
"""Worker side of the vLLM connector: vLLM's KV tensors and hooks become calls of the worker."""

import logging
from typing import TYPE_CHECKING, Any

from kvbm.closing import close_at_exit
from kvbm.errors import ConfigError
from kvbm.step import StepMetadata
from kvbm.transfer.backends import Device
from kvbm.transfer.geometry import geometry_of_groups
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.engine import check_model, instance_of, settings_of
from kvbm.vllm_integration.stats import WORKER_ERRORS, KvbmStats
from kvbm.worker.worker import Worker, WorkerPlace

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


class KvConnectorWorker:
    """What the connector's worker role does.

    Parameters
    ----------
    vllm_config : VllmConfig
        Model, parallel, cache and transfer configuration.
    kv_cache_config : KVCacheConfig or None
        KV-cache groups and number of blocks; None on versions that do not pass it.
    """

    def __init__(self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig | None") -> None:
        self.settings = settings_of(vllm_config)
        self.settings.require_a_tier()
        self._groups = check_model(vllm_config, kv_cache_config)
        parallel = vllm_config.parallel_config
        self.place = WorkerPlace(
            instance=instance_of(vllm_config, self.settings),
            engine_id=str(vllm_config.kv_transfer_config.engine_id),
            rank=_rank_in_engine(parallel),
            ranks=int(parallel.world_size),
        )
        self._kv_cache_config = kv_cache_config
        self._vllm_config = vllm_config
        self._worker: Worker | None = None
        self._load_errors: set[int] = set()
        self._sent: set[str] = set()
        self._surprises = self._told = 0

    def register(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        """Find the geometry of the KV cache and begin to work.

        Raises
        ------
        GeometryError
            A tensor is not understood.
        ConfigError
            The tensors are on a device that no backend serves, or were registered before.
        """
        if self._worker is not None:
            raise ConfigError("the KV caches of this worker are registered already")
        device = device_of(kv_caches)
        config = self._kv_cache_config
        groups = [g.layer_names for g in config.kv_cache_groups] if config else [list(kv_caches)]
        blocks = config.num_blocks if config else self._vllm_config.cache_config.num_gpu_blocks
        geometries = geometry_of_groups(kv_caches, groups, int(blocks))
        self._worker = Worker(
            self.place, self.settings, geometries, keep_alive=kv_caches, device=device
        )
        close_at_exit(self, self.close)
        logger.info(
            "rank %d: %d blocks of %d bytes on the device, %d regions",
            self.place.rank,
            blocks,
            geometries[0].bytes_per_block,
            len(geometries[0].regions),
        )

    def stop_copies(self, metadata: StepMetadata) -> None:
        """Stop stores whose device blocks this step overwrites."""
        if self._worker is not None:
            self._worker.stop_copies(metadata)

    def bind(self, metadata: StepMetadata) -> None:
        """Begin a step; nothing has been overwritten yet, so `stop_copies` is in time here too."""
        if self._worker is not None:
            try:
                self._worker.stop_copies(metadata)
            finally:  # else nobody would report the loads of this step
                self._worker.bind(metadata)

    def filled(self) -> None:
        """The forward pass of the step is done."""
        if self._worker is not None:
            self._worker.filled()

    def ended(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose stores, and whose loads, have ended, and those of the latter that failed.

        With one KV-cache group a failed load is told by its device blocks (`take_load_errors`), so
        that the blocks before the first missing one are used; with several, as a whole.

        The worker tells each once, and the engine keeps device blocks until it is told: what has
        been heard when something fails here is told the next time.
        """
        if self._worker is None:
            return set(), set(), set()
        self._sent |= self._worker.ended_stores()
        received = self._worker.ended_loads()
        sent, self._sent = self._sent, set()
        missing = {request: blocks for request, blocks in received.items() if blocks}
        if self._groups > 1:
            return sent, set(received), set(missing)
        for blocks in missing.values():
            self._load_errors.update(blocks)
        return sent, set(received), set()

    def take_load_errors(self) -> set[int]:
        """Device blocks that did not arrive, told once."""
        errors, self._load_errors = self._load_errors, set()
        return errors

    def count_error(self) -> None:
        """Count a hook that failed."""
        self._surprises += 1

    def stats(self) -> KvbmStats | None:
        """Surprises on this rank, if there were any: all else is counted in the segment."""
        if self._surprises:
            new, self._told = self._surprises - self._told, self._surprises
            return KvbmStats.of(
                {WORKER_ERRORS: new}, {f"{WORKER_ERRORS}.{self.place.rank}": self._surprises}
            )
        return KvbmStats() if compat.STATS_NEED_A_WORKER else None

    def close(self) -> None:
        """Stop and detach; may be called twice."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def device_of(kv_caches: "dict[str, torch.Tensor]") -> Device:
    """Device that all KV caches are on, with the stream that the engine's thread works on.

    Raises
    ------
    ConfigError
        They are on several devices, or on one that no backend serves.
    """
    devices = {(str(t.device.type), t.device.index) for t in kv_caches.values()}
    if len(devices) != 1:
        raise ConfigError(f"KV caches on devices {sorted(map(str, devices))}: allowed is one")
    kind, index = devices.pop()
    if kind != "cuda":
        return Device(kind)
    import torch

    ordinal = torch.cuda.current_device() if index is None else int(index)
    return Device(kind, ordinal, lambda: int(torch.cuda.current_stream(ordinal).cuda_stream))


def _rank_in_engine(parallel: Any) -> int:
    """Rank among the workers of one engine; a data-parallel replica is an engine of its own."""
    return int(parallel.rank) % int(parallel.world_size)
