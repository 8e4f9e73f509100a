# SPDX-License-Identifier: Apache-2.0
"""`DynamoConnector`: vLLM's KV connector interface, over the leader and the worker.

Scheduler side (one process, with the scheduler):
    get_num_new_matched_tokens  update_state_after_alloc  build_connector_meta  request_finished
    update_connector_output  has_pending_block_frees  get_kv_connector_stats  reset_cache  shutdown
Worker side (one process a rank):
    register_kv_caches  handle_preemptions  bind_connector_metadata  start_load_kv
    wait_for_layer_load  save_kv_layer  wait_for_save  get_finished  get_transfer_results
    get_block_ids_with_load_errors  get_kv_connector_stats  shutdown
Without an instance (any process):
    build_kv_connector_stats  build_prom_metrics  supports_sleep_mode

docs/vllm.md has the table of all of vLLM's methods. Anything that a hook raises would end the
engine, so after the start no hook raises: a surprise costs the request its cache, one line in the
log and a count (`guarded`).
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from kvbm.closing import call_after_children
from kvbm.config import Settings
from kvbm.guard import guarded
from kvbm.shared import remove_as_engines_end
from kvbm.step import StepMetadata
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.connector_leader import KvConnectorLeader
from kvbm.vllm_integration.connector_worker import KvConnectorWorker
from kvbm.vllm_integration.stats import KvbmPromMetrics, KvbmStats

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass
class DynamoConnectorMetadata(KVConnectorMetadata):
    """One step's message from the scheduler side to the workers."""

    step: StepMetadata = field(default_factory=StepMetadata)


class DynamoConnector(KVConnectorBase_V1):
    """Keeps the KV blocks of past prompts in host memory and brings them back.

    Parameters
    ----------
    vllm_config : VllmConfig
        Must have a `kv_transfer_config`.
    role : KVConnectorRole
        SCHEDULER or WORKER.
    kv_cache_config : KVCacheConfig, optional
        Groups and number of blocks.

    Raises
    ------
    ConfigError
        No tier is configured, or a setting is wrong.
    """

    _cache_hit_source = compat.host_hit_source()

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig | None" = None,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._leader: KvConnectorLeader | None = None
        self._worker: KvConnectorWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._leader = KvConnectorLeader(vllm_config, kv_cache_config)
        else:
            self._worker = KvConnectorWorker(vllm_config, kv_cache_config)

    def count_error(self) -> None:
        """Count a hook that failed."""
        for side in (self._leader, self._worker):
            if side is not None:
                side.count_error()

    @property
    def settings(self) -> Settings:
        """Settings of this side."""
        side = self._worker if self._leader is None else self._leader
        assert side is not None
        return side.settings

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may lose a block at any time: nobody waits for its stores."""
        return False

    # ---- scheduler side --------------------------------------------------------------------------
    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond `num_computed_tokens` that can be loaded; loading is asynchronous.

        None: more is on its way from disk, vLLM asks again in its next step.
        """
        assert self._leader is not None
        tokens = self._leader.match(request, num_computed_tokens)
        return tokens, bool(tokens)

    @guarded(lambda: None)
    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        """The request's device blocks are allocated: load what was matched."""
        assert self._leader is not None
        self._leader.allocated(request, blocks.get_block_ids(), num_external_tokens)

    @guarded(DynamoConnectorMetadata)
    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """End of a scheduling step: store what this step completes."""
        assert self._leader is not None
        return DynamoConnectorMetadata(self._leader.build_step(scheduler_output))

    @guarded(lambda: (False, None))
    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """True while stores from the request's device blocks are in flight."""
        assert self._leader is not None
        return self._leader.finished(request), None

    @guarded(lambda: None)
    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Loads and stores that all workers have reported."""
        assert self._leader is not None
        self._leader.worker_output(connector_output)

    @guarded(lambda: False)
    def has_pending_block_frees(self) -> bool:
        """Whether blocks become free when copies end: vLLM then waits instead of preempting."""
        return self._leader is not None and self._leader.holds_device_blocks

    @guarded(lambda: False)
    def reset_cache(self) -> bool | None:
        """Make all cached content unreachable, in flight or not."""
        assert self._leader is not None
        self._leader.reset()
        return True

    # ---- worker side -----------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        """The KV cache is allocated: find its geometry, make the arena, start the copy thread.

        Raises
        ------
        GeometryError
            A tensor is not understood; the message has its shape and strides.
        """
        assert self._worker is not None
        self._worker.register(kv_caches)

    @guarded(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before the step's forward pass overwrites the blocks of preempted requests."""
        if self._worker is not None and isinstance(kv_connector_metadata, DynamoConnectorMetadata):
            self._worker.stop_copies(kv_connector_metadata.step)

    @guarded(lambda: None)
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, DynamoConnectorMetadata):
            self._worker.bind(connector_metadata.step)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Nothing: loads begin as soon as the step is bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs only after its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: blocks are copied after the whole forward pass."""

    @guarded(lambda: None)
    def wait_for_save(self) -> None:
        """The forward pass is done: its blocks may be copied. Does not wait."""
        if self._worker is not None:
            self._worker.filled()

    @guarded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose stores, and whose loads, have ended on this rank."""
        assert self._worker is not None
        sent, received, _ = self._worker.ended()
        return sent or None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Return the same as `KVConnectorTransferResults`, asked for by vLLM 0.30 and later.

        With several KV-cache groups a load fails as a whole: device blocks do not tell the group.
        """
        sent, received, failed = self._transfers(finished_req_ids)
        return compat.transfer_results(sent, received, failed)

    @guarded(lambda: (set(), set(), set()))
    def _transfers(self, finished_req_ids: set[str]) -> tuple[set[str], set[str], set[str]]:
        assert self._worker is not None
        return self._worker.ended()

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Device blocks that did not arrive; the engine recomputes them."""
        assert self._worker is not None
        return self._worker.take_load_errors()

    @guarded(lambda: None)
    def get_kv_connector_stats(self) -> KvbmStats | None:
        """What moved since the last call; the scheduler side reads the counters of all ranks."""
        if self._leader is not None:
            return self._leader.stats()
        return None if self._worker is None else self._worker.stats()

    # ---- without an instance ---------------------------------------------------------------------
    @classmethod
    @guarded(KvbmStats)
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvbmStats | None:
        """Statistics as they arrive at the front end."""
        return KvbmStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvbmPromMetrics:
        """Prometheus counters of the front end."""
        return KvbmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Return False: the KV cache must stay where it was registered (asked for from 0.33 on)."""
        return False

    # ---- both ------------------------------------------------------------------------------------
    @guarded(lambda: None)
    def shutdown(self) -> None:
        """Stop threads, detach, remove what is private."""
        for side in (self._leader, self._worker):
            if side is not None:
                side.close()


# vLLM imports this class wherever it makes its configuration, also in the process that starts its
# engine cores and, as `vllm serve` does by default, kills them.
call_after_children(remove_as_engines_end)

# A MultiConnector rebuilds its children's statistics in the front end. It finds them in vLLM's
# registry, by the name of the class, and not by the module path that the user gave.
with suppress(ValueError):  # the name is registered
    KVConnectorFactory.register_connector("DynamoConnector", __name__, "DynamoConnector")
