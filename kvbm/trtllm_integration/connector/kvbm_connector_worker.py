# SPDX-License-Identifier: Apache-2.0
"""`DynamoKVBMConnectorWorker`: TensorRT-LLM's worker interface, over the worker.

A surprise in a method costs the cache, one line in the log and a count (`guarded`), but for one: a
`TransferError` says that the engine must not go on, and ends it on all ranks in the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvbm.errors import ConfigError, TransferError
from kvbm.guard import guarded
from kvbm.trtllm_integration.compat import WorkerBase
from kvbm.trtllm_integration.connector_worker import KvConnectorWorker
from kvbm.trtllm_integration.step import EngineStep

if TYPE_CHECKING:
    import torch

__all__ = ["DynamoKVBMConnectorWorker"]


class DynamoKVBMConnectorWorker(WorkerBase):
    """Copies KV blocks between one rank's device and its host memory.

    Parameters
    ----------
    llm_args : TorchLlmArgs
        TensorRT-LLM's arguments.

    Raises
    ------
    ConfigError
        No tier is configured, a setting is wrong, or something of the engine is not supported.
    """

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._worker = KvConnectorWorker(llm_args)

    def count_error(self) -> None:
        """Count a hook that failed."""
        self._worker.count_error()

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """The KV pool is allocated: find its geometry, make the arena, start the copy thread.

        Raises
        ------
        GeometryError
            The pool is not understood; the message has its shape.
        ConfigError
            Something of the engine is not supported.
        """
        self._worker.register(kv_cache_tensor)

    def register_kv_cache_layout(self, layout: Any) -> None:
        """Refuse TensorRT-LLM's second KV cache manager.

        Raises
        ------
        ConfigError
            Always: it allocates chunk by chunk, and may load less than it was promised.
        """
        raise ConfigError(
            "KVCacheManagerV2 is not supported with this connector: set "
            "kv_cache_config.use_kv_cache_manager_v2 to false"
        )

    def register_forward_pass_callable(self) -> Callable[[], None]:
        """Return what is called at the end of each forward pass, on its stream."""
        return self._forward_done

    @guarded(lambda: None)
    def _forward_done(self) -> None:
        self._worker.filled(current_stream())

    @guarded(lambda: None, lets_through=TransferError)
    def bind_connector_meta(self, metadata: object) -> None:
        """A step's message is there.

        Raises
        ------
        TransferError
            A promised load has not arrived: nothing may be computed from it.
        """
        super().bind_connector_meta(metadata)
        if isinstance(metadata, EngineStep):
            self._worker.bind(metadata)

    @guarded(lambda: None, lets_through=TransferError)
    def start_load_kv(self, stream: torch.cuda.Stream) -> None:
        """Loads of this step may begin; its forward pass will run on `stream`.

        Raises
        ------
        TransferError
            A load into device blocks that are another request's now does not end.
        """
        self._worker.begin(handle_of(stream))

    def wait_for_layer_load(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        """Nothing: a request runs only after its load has ended."""

    def save_kv_layer(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        """Nothing: blocks are copied after the whole forward pass."""

    @guarded(lambda: None)
    def wait_for_save(self, stream: torch.cuda.Stream) -> None:
        """The forward pass is done, if its callable has not said so. Does not wait."""
        self._worker.filled(handle_of(stream))

    @guarded(lambda: ([], []), lets_through=TransferError)
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Requests whose stores, and whose loads, have ended on this rank."""
        return self._worker.ended(finished_gen_req_ids, started_loading_req_ids)

    @guarded(lambda: None)
    def shutdown(self) -> None:
        """Stop threads, detach, remove what is private."""
        self._worker.close()


def handle_of(stream: Any) -> int:
    """Handle of a CUDA stream; 0 for what is none."""
    return int(getattr(stream, "cuda_stream", 0))


def current_stream() -> int:
    """Handle of the stream on which this thread works; 0 without CUDA."""
    import torch

    return handle_of(torch.cuda.current_stream()) if torch.cuda.is_initialized() else 0
