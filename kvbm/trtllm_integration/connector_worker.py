# SPDX-License-Identifier: Apache-2.0
"""Worker side of the TensorRT-LLM connector: its KV pool and hooks become calls of the worker.

On each rank and in each step TensorRT-LLM binds the metadata, starts loads, runs the forward pass
and, scheduled or not, asks what has ended. Loads of a step begin, and stores of the step before are
told apart from those that never ran, when loads are started: there the stream is given on which the
forward pass runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvbm.closing import close_at_exit
from kvbm.errors import ConfigError, TransferError
from kvbm.step import StepMetadata
from kvbm.transfer.backends import Device
from kvbm.transfer.geometry import geometry_of
from kvbm.trtllm_integration import compat
from kvbm.trtllm_integration.engine import (
    check_engine,
    check_pool,
    engine_place,
    own_engine_id,
    settings_of,
)
from kvbm.trtllm_integration.step import EngineStep
from kvbm.worker.worker import Worker, WorkerPlace

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class KvConnectorWorker:
    """What the connector's worker does.

    Parameters
    ----------
    llm_args : TorchLlmArgs
        TensorRT-LLM's arguments.

    Raises
    ------
    ConfigError
        No tier is configured, or something of the engine is not supported.
    """

    def __init__(self, llm_args: Any) -> None:
        self.settings = settings_of()
        check_engine(llm_args)
        self._llm_args = llm_args
        self.rank = int(llm_args.parallel_config.to_mapping().rank)
        self.errors = 0
        self._worker: Worker | None = None
        self._stream = 0
        self._unbound: list[EngineStep] = []
        self._unfilled: list[int] | None = None  # stores of the step whose forward pass runs
        self._stores: dict[str, list[int]] = {}
        self._loads: dict[str, list[int]] = {}
        self._saving: set[int] = set()
        self._loading: set[int] = set()
        self._saved: set[str] = set()
        self._loaded: set[str] = set()

    def register(self, pool: torch.Tensor) -> None:
        """Find the geometry of the KV cache and begin to work; all ranks do this together.

        Raises
        ------
        GeometryError
            The tensor is not understood.
        ConfigError
            It is on a device that no backend serves, was registered before, or its blocks may have
            other tokens than is said.
        """
        if self._worker is not None:
            raise ConfigError("the KV cache of this worker is registered already")
        check_engine(self._llm_args)  # a model may have added to it since
        shape = tuple(map(int, pool.shape))
        check_pool(self._llm_args, shape)
        engine_id = own_engine_id(self._llm_args)
        ranks = int(self._llm_args.parallel_config.to_mapping().world_size)
        if ranks > 1:
            engine_id = compat.from_first_rank(engine_id)
        place = engine_place(self._llm_args, self.settings, engine_id)
        geometry = geometry_of({"pool": pool}, shape[0], block_axis=0)
        self._worker = Worker(
            WorkerPlace(place.instance, engine_id, self.rank, ranks),
            self.settings,
            [geometry],
            keep_alive=pool,
            device=self._device_of(pool),
        )
        close_at_exit(self, self.close)
        logger.info(
            "rank %d: %d blocks of %d bytes on the device",
            self.rank,
            shape[0],
            geometry.bytes_per_block,
        )

    def _device_of(self, pool: torch.Tensor) -> Device:
        kind = str(pool.device.type)
        if kind != "cuda":
            return Device(kind)
        import torch

        index = pool.device.index
        ordinal = torch.cuda.current_device() if index is None else int(index)
        self._stream = int(torch.cuda.current_stream(ordinal).cuda_stream)
        return Device(kind, ordinal, lambda: self._stream)

    # ---- steps -----------------------------------------------------------------------------------
    def bind(self, metadata: EngineStep) -> None:
        """A step's message is there.

        Raises
        ------
        TransferError
            A promised load has not arrived: the engine must not go on.
        """
        if metadata.lost:
            raise TransferError(
                f"the KV of requests {', '.join(metadata.lost)} was promised to TensorRT-LLM and "
                "could not be loaded. It cannot be told to compute it, so the engine ends before "
                "anything is computed from it"
            )
        self._unbound.append(metadata)

    def begin(self, stream: int) -> None:
        """Its loads may begin; the forward pass will run on this stream.

        Raises
        ------
        TransferError
            A copy into device blocks that are other requests' now does not end.
        """
        self._stream = stream
        for metadata in self._unbound:
            self._begin(metadata)
        self._unbound = []

    def _begin(self, metadata: EngineStep) -> None:
        worker = self._worker
        if worker is None:
            return
        if self._unfilled:  # that step has not run: its blocks hold nothing
            worker.stop_copies(StepMetadata(stop=self._unfilled))
        mine = {handle for order in metadata.step.loads.values() for handle in order.handles}
        self._wait([handle for handle in metadata.wait if handle not in mine])
        self._unfilled = [handle for handles in metadata.stores.values() for handle in handles]
        for request_id, handles in metadata.stores.items():
            self._stores.setdefault(request_id, []).extend(handles)
        for request_id, order in metadata.step.loads.items():
            self._loads[request_id] = list(order.handles)
        try:
            worker.stop_copies(metadata.step)
        finally:  # else nobody would report the loads of this step
            worker.bind(metadata.step)
        self._wait([handle for handle in metadata.wait if handle in mine])

    def _wait(self, handles: list[int]) -> None:
        assert self._worker is not None
        if not self._worker.wait_until_ended(handles):
            raise TransferError(
                f"rank {self.rank}: a load into device blocks that TensorRT-LLM has given to "
                "another request does not end"
            )

    def filled(self, stream: int) -> None:
        """The forward pass of the step is on this stream; told once or more, the first counts."""
        if self._worker is not None and self._unfilled is not None:
            self._stream, self._unfilled = stream, None
            self._worker.filled()

    def ended(self, saving: Iterable[int], loading: Iterable[int]) -> tuple[list[int], list[int]]:
        """Requests whose stores, and whose loads, have ended on this rank.

        Parameters
        ----------
        saving, loading : iterable of int
            Requests that wait from now on for their stores, for their loads. No others are told.
        """
        self._saving.update(saving)
        self._loading.update(loading)
        worker = self._worker
        if worker is None:
            return [], []
        if self._unbound:  # nothing is scheduled: no forward pass follows
            self.begin(self._stream)
        for request_id in map(str, saving):
            handles = self._stores.pop(request_id, []) + self._loads.get(request_id, [])
            worker.bind(StepMetadata(held={request_id: handles}))
        self._saved |= worker.ended_stores()
        ended = worker.ended_loads()
        self._loaded |= set(ended)
        for request_id in ended:
            self._loads.pop(request_id, None)
        for request_id, handles in list(self._stores.items()):
            if worker.wait_until_ended(handles, 0):
                del self._stores[request_id]
        saved = [number for number in self._saving if str(number) in self._saved]
        loaded = [number for number in self._loading if str(number) in self._loaded]
        self._saving.difference_update(saved)
        self._loading.difference_update(loaded)
        self._saved.difference_update(map(str, saved))
        self._loaded.difference_update(map(str, loaded))
        return saved, loaded

    def count_error(self) -> None:
        """Count a hook that failed."""
        self.errors += 1

    def close(self) -> None:
        """Stop and detach; may be called twice."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
