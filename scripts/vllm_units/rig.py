# SPDX-License-Identifier: Apache-2.0
"""`DynamoConnector` for tests that have a scheduler and no workers.

vLLM's scheduler tests make a scheduler, which makes its connector, and stand in for the model
runner. kvbm's leader waits for its workers at start, so this subclass makes them: real ones, over
KV tensors of zeros, which do what each step tells them before the scheduler goes on. So whatever
such a test reports (a load that has ended, one that failed) has really happened before.

Where a test's own stand-in for a connector would answer "so many tokens are cached", the blocks are
put into the tier through the leader and a worker, and then the leader is asked as ever.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvbm.errors import ConfigError
from kvbm.vllm_integration import connector

DEADLINE_S = 20.0
ENGINES: list[DynamoConnector] = []
"""Scheduler sides of the running test; the plugin ends them."""

_numbers = itertools.count()


class NotOurs(Exception):
    """The test wants an answer that this connector never gives; the message says which."""


def kv_tensors(kv_cache_config: Any) -> dict[str, torch.Tensor]:
    """Tensors as vLLM's CPU worker makes them: [blocks, heads, block size, K and V]."""
    tensors = {}
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        shape = (kv_cache_config.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
        tensors |= {name: torch.zeros(shape, dtype=spec.dtype) for name in group.layer_names}
    return tensors


class DynamoConnector(connector.DynamoConnector):
    """The connector, whose scheduler side brings workers of its own."""

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        self.workers: list[connector.DynamoConnector] = []
        self.call_record: Counter[str] = Counter()
        self.loaded: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.wanted: dict[str, int] = {}
        transfer = vllm_config.kv_transfer_config
        extra = transfer.kv_connector_extra_config
        extra["load_failure_policy"] = transfer.kv_load_failure_policy
        self.mocked = {k: extra[k] for k in ("matched_tokens", "is_async") if k in extra}
        if extra.get("num_defers_before_matching"):
            raise NotOurs("the first question is answered, never put off")
        if role == KVConnectorRole.SCHEDULER:
            self._start_workers(vllm_config, kv_cache_config)
            ENGINES.append(self)
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.instance = self._leader.instance
            self._wait_for_workers()

    def _wait_for_workers(self) -> None:
        side, deadline = self._leader, time.monotonic() + DEADLINE_S
        side.leader.liveness.wait_for_workers(DEADLINE_S)
        slots = side.segment.shape.host_slots
        while any(side.segment.ready_slots(rank) < slots for rank in range(side.ranks)):
            if time.monotonic() > deadline:
                raise TimeoutError("the workers' arenas are not there")

    def _start_workers(self, vllm_config: Any, kv_cache_config: Any) -> None:
        for rank in range(vllm_config.parallel_config.world_size):
            config = copy.copy(vllm_config)
            config.parallel_config = copy.copy(vllm_config.parallel_config)
            config.parallel_config.rank = rank
            try:
                worker = connector.DynamoConnector(config, KVConnectorRole.WORKER, kv_cache_config)
            except ConfigError as error:
                raise NotOurs(str(error).partition(":")[0]) from error
            self.workers.append(worker)
            worker.register_kv_caches(kv_tensors(kv_cache_config))

    # ---- the workers' part -----------------------------------------------------------------------
    def drive(self, metadata: Any) -> None:
        """Have all workers do what a step says, to the end."""
        for worker in self.workers:
            worker.handle_preemptions(metadata)
            worker.bind_connector_metadata(metadata)
            worker.wait_for_save()
        step, ranks = metadata.step, len(self.workers)
        deadline = time.monotonic() + DEADLINE_S
        loads, held = dict.fromkeys(step.loads, ranks), dict.fromkeys(step.held, ranks)
        while not (loads.items() <= self.loaded.items() and held.items() <= self.sent.items()):
            for worker in self.workers:
                sent, received, _ = worker._worker.ended()
                self.sent.update(sent)
                self.loaded.update(received)
            if time.monotonic() > deadline:
                raise TimeoutError(f"copies did not end: {step}")
        for name in loads:
            del self.loaded[name]
        while self._leader.leader._storing:
            self._leader.leader.collect()
            if time.monotonic() > deadline:
                raise TimeoutError("stores did not end")
        for worker in self.workers:
            worker.clear_connector_metadata()

    def put(self, request: Any, tokens: int) -> None:
        """Put the first tokens of a request into the tier."""
        side = self._leader
        name = f"seed {next(_numbers)}"
        keys, chain = side._keys(request)
        if chain is not None:
            chain.update(request._all_token_ids)
        blocks = min(tokens // side.block_tokens, len(keys[0]))
        sequence = side.leader.track(name, keys)
        sequence.set_device_blocks([list(range(1, blocks + 1))] * len(keys))
        side.leader.store(sequence, blocks)
        self.drive(connector.DynamoConnectorMetadata(side.leader.build_step()))
        side.leader.finish(name, blocks)

    # ---- scheduler side --------------------------------------------------------------------------
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Answer for what is cached, after having cached what the test wants to be."""
        self.call_record["get_num_new_matched_tokens"] += 1
        if self.mocked.get("matched_tokens"):
            self.want(request, num_computed_tokens, **self.mocked)
        elif (getattr(request, "kv_transfer_params", None) or {}).get("do_remote_prefill"):
            # Computed elsewhere: what a cache can have of it is cached.
            self.put(request, request.num_tokens - 1)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def want(self, request: Any, computed: int, matched_tokens: int, is_async: bool) -> None:
        """Have so many tokens cached beyond the computed ones."""
        if not is_async:
            raise NotOurs("loads are asynchronous, always")
        if computed + matched_tokens >= request.num_tokens:
            raise NotOurs("the last token is never loaded")
        if matched_tokens % self._leader.block_tokens:
            raise NotOurs("only whole blocks are loaded")
        if self.wanted.setdefault(request.request_id, 0) < computed + matched_tokens:
            self.wanted[request.request_id] = computed + matched_tokens
            self.put(request, computed + matched_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """End a step; the workers do it at once."""
        metadata = super().build_connector_meta(scheduler_output)
        self.drive(metadata)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        names = [new.req_id for new in scheduler_output.scheduled_new_reqs] + list(resumed)
        metadata.requests = [
            {"req_id": name} for name in names
        ]  # read by tests with MockKVConnector
        return metadata

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, Any]:
        """End a request; the copies from its last step end before this returns."""
        self.call_record["request_finished"] += 1
        kept, parameters = super().request_finished(request, block_ids)
        if kept:
            step = self._leader.leader.build_step()
            self.drive(connector.DynamoConnectorMetadata(step))
        return False, parameters

    def count_error(self) -> None:
        """A hook failed: inside these tests, that is a failure."""
        super().count_error()
        self.call_record["errors"] += 1

    # ---- worker side -----------------------------------------------------------------------------
    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Count the call."""
        self.call_record["bind_connector_metadata"] += 1
        super().bind_connector_metadata(connector_metadata)

    def wait_for_save(self) -> None:
        """Count the call."""
        self.call_record["wait_for_save"] += 1
        super().wait_for_save()

    def clear_connector_metadata(self) -> None:
        """Count the call."""
        self.call_record["clear_connector_metadata"] += 1
        super().clear_connector_metadata()


class Asked:
    """Stands where a test's mock has its answer, and has it cached instead of given."""

    def __init__(self, engine: DynamoConnector) -> None:
        self._engine = engine
        self.side_effect: Any = None
        self.call_count = 0

    def __call__(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Look at the mock's answer; have it cached; ask the connector."""
        self.call_count += 1
        if callable(self.side_effect):
            tokens, is_async = self.side_effect(request, num_computed_tokens)
        else:
            self.side_effect = iter(self.side_effect)
            tokens, is_async = next(self.side_effect)
        if tokens:
            self._engine.want(request, num_computed_tokens, tokens, is_async)
        return self._engine.get_num_new_matched_tokens(request, num_computed_tokens)


class Counted:
    """A method of the connector that counts its calls; a mock's `return_value` is not asked."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self.return_value: Any = None
        self.call_count = 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        """Call the connector."""
        self.call_count += 1
        return self._method(*arguments, **more)


class OverMock:
    """The connector of the newest scheduler, with the handles of the mock that it stands for."""

    def __init__(self) -> None:
        engine = ENGINES[-1]
        self.engine = engine
        self.get_num_new_matched_tokens = Asked(engine)
        self.request_finished = Counted(engine.request_finished)
        self.take_events = Counted(engine.take_events)
        self.get_loaded_kv_cache_group_ids = Counted(engine.get_loaded_kv_cache_group_ids)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the connector's."""
        return getattr(self.engine, name)
