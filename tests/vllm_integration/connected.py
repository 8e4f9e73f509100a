# SPDX-License-Identifier: Apache-2.0
"""Both roles of the connector in this process, called as vLLM calls them, with vLLM's own objects.

Requests, scheduler outputs, KV-cache specifications and block hashes are vLLM's; the configuration
has only the fields that the connector reads, and the scheduler and the model runner are the test.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.utils import hashing
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvbm.vllm_integration.connector import DynamoConnector
from tests.leaks import wait_until
from tests.small_engine import DEADLINE_S, unique_engine_id

BLOCK = 16
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")


def configuration(
    algorithm: str = "sha256",
    ranks: int = 1,
    rank: int = 0,
    engine_id: str | None = None,
    **extra: Any,
) -> SimpleNamespace:
    """What the connector reads of a VllmConfig."""
    extra = {"cpu_cache_override_num_blocks": 32} | extra
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            engine_id=engine_id or unique_engine_id(),
            kv_connector_extra_config=extra,
            kv_load_failure_policy="fail",
            is_kv_producer=True,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            tensor_parallel_size=ranks,
            pipeline_parallel_size=1,
            world_size=ranks,
            rank=rank,
        ),
        cache_config=SimpleNamespace(
            block_size=BLOCK,
            cache_dtype="auto",
            prefix_caching_hash_algo=algorithm,
            num_gpu_blocks=64,
        ),
        model_config=SimpleNamespace(
            model="no/such-model", revision=None, dtype=torch.float32, quantization=None
        ),
    )


def cache_configuration(blocks: int = 64, groups: int = 1) -> SimpleNamespace:
    """What the connector reads of a KVCacheConfig; layer i is in group i modulo `groups`."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    names = [list(LAYERS[group::groups]) for group in range(groups)]
    return SimpleNamespace(
        num_blocks=blocks,
        kv_cache_groups=[SimpleNamespace(layer_names=n, kv_cache_spec=spec) for n in names],
    )


def block_hasher(algorithm: str) -> Any:
    """vLLM's function that hashes the new blocks of a request."""
    if algorithm.startswith("xxhash"):
        pytest.importorskip("xxhash")
    function = hashing.get_hash_fn_by_name(algorithm)
    kv_cache_utils.init_none_hash(function)
    return kv_cache_utils.get_request_block_hasher(BLOCK, function)


class Connected:
    """One engine's connectors and the part of vLLM around them.

    Parameters
    ----------
    algorithm
        prefix_caching_hash_algo: "sha256" has kvbm use vLLM's hashes, "xxhash" its own.
    groups
        KV-cache groups.
    """

    def __init__(self, algorithm: str = "sha256", groups: int = 1, **extra: Any) -> None:
        config = configuration(algorithm, **extra)
        cache = cache_configuration(groups=groups)
        self.hasher = block_hasher(algorithm)
        self.groups = groups
        self.tensors = {name: torch.zeros(64, 1, BLOCK, 16) for name in LAYERS}
        self.worker = DynamoConnector(config, KVConnectorRole.WORKER, cache)
        self.worker.register_kv_caches(self.tensors)
        self.scheduler = DynamoConnector(config, KVConnectorRole.SCHEDULER, cache)
        self.side = self.scheduler._leader
        self.ran: set[str] = set()
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.missing: set[int] = set()
        self.requests: dict[str, Request] = {}
        self.blocks: dict[str, list[int]] = {}
        assert wait_until(self.side.leader.liveness.workers_ready, DEADLINE_S)
        slots = self.side.segment.shape.host_slots
        assert wait_until(lambda: self.side.segment.ready_slots(0) == slots, DEADLINE_S)

    def close(self) -> None:
        """End both sides, as vLLM does."""
        self.worker.shutdown()
        self.scheduler.shutdown()
        self.tensors.clear()

    # ---- requests --------------------------------------------------------------------------------
    def request(self, name: str, tokens: Sequence[int] | None, **more: Any) -> Request:
        """A request of vLLM's."""
        known = inspect.signature(Request.__init__).parameters
        unknown = set(more) - set(known)
        assert not unknown, f"this vLLM's Request takes no {unknown}"
        params = more.pop("sampling_params", SamplingParams(max_tokens=8))
        request = Request(
            request_id=name,
            prompt_token_ids=None if tokens is None else list(tokens),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self.hasher,
            **more,
        )
        self.requests[name] = request
        return request

    def ids(self, blocks: Sequence[int]) -> tuple[list[int], ...]:
        """Block ids as vLLM gives them, the same in each group."""
        return tuple(list(blocks) for _ in range(self.groups))

    def matched(self, request: Request, computed: int = 0) -> int:
        """Tokens that the connector says it has."""
        tokens, asynchronous = self.scheduler.get_num_new_matched_tokens(request, computed)
        assert asynchronous == (tokens > 0)
        return int(tokens)

    def allocate(self, request: Request, blocks: Sequence[int], external: int = 0) -> None:
        """Tell the connector about the blocks of an admitted request."""
        self.blocks[request.request_id] = list(blocks)
        allocated = SimpleNamespace(get_block_ids=lambda: self.ids(blocks))
        self.scheduler.update_state_after_alloc(request, allocated, external)

    def fill(self, blocks: Sequence[int], value: float) -> None:
        """Forward pass: block i of the list gets value + i."""
        for number, block in enumerate(blocks):
            for tensor in self.tensors.values():
                tensor[block] = value + number

    def value(self, block: int) -> float | None:
        """Value in a block, None if it is not the same everywhere."""
        parts = torch.stack([tensor[block] for tensor in self.tensors.values()])
        return float(parts.flatten()[0]) if bool((parts == parts.flatten()[0]).all()) else None

    # ---- steps -----------------------------------------------------------------------------------
    def output(
        self,
        run: dict[str, int] | None = None,
        *,
        new_blocks: dict[str, list[int]] | None = None,
        resumed: Sequence[str] = (),
        preempted: Sequence[str] = (),
        resumed_are_new: bool = False,
    ) -> SchedulerOutput:
        """A scheduler output in which these requests run so many tokens."""
        output = SchedulerOutput.make_empty()
        cached = CachedRequestData.make_empty()
        for name, tokens in (run or {}).items():
            request = self.requests[name]
            output.num_scheduled_tokens[name] = tokens
            output.total_num_scheduled_tokens += tokens
            if name not in self.ran or (resumed_are_new and name in resumed):
                ids = self.ids(self.blocks[name])
                output.scheduled_new_reqs.append(NewRequestData.from_request(request, ids))
                self.ran.add(name)
                continue
            if name in resumed:
                blocks: list[int] | None = self.blocks[name]
                cached.resumed_req_ids.add(name)
            else:
                blocks = (new_blocks or {}).get(name)
                self.blocks[name] += blocks or []
            cached.req_ids.append(name)
            cached.new_block_ids.append(None if blocks is None else self.ids(blocks))
            cached.num_computed_tokens.append(request.num_computed_tokens)
            cached.num_output_tokens.append(request.num_output_tokens)
        output.scheduled_cached_reqs = cached
        output.preempted_req_ids = set(preempted)
        return output

    def schedule(self, output: SchedulerOutput) -> Any:
        """End of scheduling: metadata; computed tokens move on, as in the scheduler."""
        metadata = self.scheduler.build_connector_meta(output)
        for name, tokens in output.num_scheduled_tokens.items():
            self.requests[name].num_computed_tokens += tokens
        return metadata

    def execute(self, metadata: Any, forward: Any = None) -> KVConnectorOutput:
        """A step of the model runner."""
        self.worker.handle_preemptions(metadata)
        self.worker.bind_connector_metadata(metadata)
        if forward is not None:
            forward()
        self.worker.start_load_kv(SimpleNamespace())
        self.worker.wait_for_save()
        sent, received = set(), set()
        if hasattr(DynamoConnector.__mro__[1], "get_transfer_results"):
            results = self.worker.get_transfer_results(set())
            sent, received = results.finished_sending, results.finished_recving
            self.failed |= results.failed_recving
        else:
            told = self.worker.get_finished(set())
            sent, received = set(told[0] or ()), set(told[1] or ())
        missing = self.worker.get_block_ids_with_load_errors()
        self.worker.clear_connector_metadata()
        self.sent |= sent
        self.received |= received
        self.missing |= missing
        answer = KVConnectorOutput(
            finished_sending=sent or None,
            finished_recving=received or None,
            invalid_block_ids=missing,
        )
        self.scheduler.update_connector_output(answer)
        return answer

    def step(self, run: dict[str, int] | None = None, forward: Any = None, **more: Any) -> Any:
        """Schedule and execute."""
        metadata = self.schedule(self.output(run, **more))
        self.execute(metadata, forward)
        return metadata

    def run_until(self, condition: Any) -> None:
        """Empty steps until the condition holds."""
        assert wait_until(lambda: condition() or self.step() is None, DEADLINE_S)

    # ---- whole lives -----------------------------------------------------------------------------
    def cache(self, request: Request, blocks: Sequence[int], value: float) -> None:
        """Run a request from admission to its end; its blocks are cached afterwards."""
        name = request.request_id
        self.allocate(request, blocks)
        tokens = request.num_tokens
        self.step({name: tokens}, lambda: self.fill(blocks, value))
        kept, _ = self.scheduler.request_finished(request, list(blocks))
        if kept:
            self.run_until(lambda: name in self.sent)
        self.run_until(lambda: not self.side.leader._storing)

    def load(self, request: Request, blocks: Sequence[int]) -> int:
        """Match, allocate and load; returns the number of tokens that were matched."""
        tokens = self.matched(request)
        self.allocate(request, blocks, tokens)
        if tokens:
            self.run_until(lambda: request.request_id in self.received)
        return tokens
