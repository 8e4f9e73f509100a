# SPDX-License-Identifier: Apache-2.0
"""The part of TensorRT-LLM around a connector, in this process, its KV cache in torch on the CPU.

It calls what `PyExecutor`, `KVCacheManager` and `KvCacheConnectorManager` call, in their order
(commits: see `interface`), and has what is theirs in it: requests that are loaded leave the batch
and come back, a look-up happens once, a cancelled request is freed without a word to the connector,
and the blocks of every freed request are filed for reuse, computed or not. Metadata is pickled for
each rank.

The forward pass writes what each token's KV must be, a value that depends on all tokens before it,
and looks at that of all tokens before it, as attention does: `wrong` has what it found wrong.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from tests.leaks import wait_until
from tests.small_engine import DEADLINE_S

BLOCK = 8
LAYERS = 2
ELEMENTS = 3  # of a token


@dataclass(eq=False)
class Request:
    """What is read of a request, and where it is in its life."""

    request_id: int
    tokens: list[int]
    max_new: int = 1
    cache_salt: str | None = None
    cache_salt_id: int | None = None
    lora_task_id: int | None = None
    priority: int | None = None
    multimodal_hashes: Any = None
    multimodal_positions: Any = None
    multimodal_embedding: Any = None
    prompt_embedding_table: Any = None
    return_context_logits: bool = False
    is_dummy_request: bool = False
    context_current_position: int = 0
    chunk: int = 0
    blocks: list[int] = field(default_factory=list)
    py_multimodal_data: Any = None
    state: str = "context"  # loading, generation, finished

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)
        self.sampled = list(self.tokens)  # what the device has; the host may be a step behind

    @property
    def is_finished(self) -> bool:
        """Whether it has all its tokens, or was cancelled."""
        return self.state == "finished"

    @property
    def is_generation_complete_state(self) -> bool:
        """Whether it ended, with an error perhaps."""
        return self.state == "failed"

    @property
    def is_sampled(self) -> bool:
        """Whether the device has all its tokens."""
        return len(self.sampled) - self.prompt_len >= self.max_new

    def get_tokens(self, beam: int) -> list[int]:
        """All tokens that it has, a copy."""
        assert beam == 0
        return list(self.tokens)

    def truth(self) -> list[int]:
        """What the KV of each token is made from: 31 bits of all tokens up to it."""
        digest, values = repr((self.cache_salt, self.lora_task_id)).encode(), []
        for token in self.sampled:
            digest = hashlib.blake2b(digest + token.to_bytes(4, "little")).digest()
            values.append(int.from_bytes(digest[:4], "little") >> 1)
        return values


def arguments(ranks: int = 1, rank: int = 0, **changes: Any) -> SimpleNamespace:
    """What is read of TorchLlmArgs."""
    cache = {
        "tokens_per_block": BLOCK,
        "dtype": "auto",
        "host_cache_size": None,
        "max_attention_window": None,
        "enable_block_reuse": True,
    }
    cache.update({name: changes.pop(name) for name in list(changes) if name in cache})
    mapping = {"world_size": ranks, "rank": rank, "tp_size": ranks, "pp_size": 1, "cp_size": 1}
    mapping.update({name: changes.pop(name) for name in list(changes) if name in mapping})
    fields = {
        "model": "no/such-model",
        "dtype": "bfloat16",
        "quant_config": None,
        "attn_backend": "TRTLLM",
        "max_beam_width": 1,
        "max_seq_len": 4096,
        "enable_attention_dp": False,
        "sparse_attention_config": None,
        "speculative_config": None,
        "kv_cache_config": SimpleNamespace(**cache),
        "parallel_config": SimpleNamespace(to_mapping=lambda: SimpleNamespace(**mapping)),
    }
    return SimpleNamespace(**(fields | changes))


class Engine:
    """One engine.

    Parameters
    ----------
    interface
        The module that has the classes of TensorRT-LLM's interface.
    ranks, blocks
        Ranks, and device blocks.
    chunk
        Tokens of a prompt that are computed in a step.
    reuse
        Whether blocks of freed requests are found again on the device.
    waits
        Whether it waits for the connector at its start, as 1.3 does.
    overlap
        Whether a step is launched before the tokens of the one before it are looked at.
    """

    def __init__(
        self,
        interface: Any,
        ranks: int = 1,
        blocks: int = 32,
        chunk: int = 10_000,
        reuse: bool = False,
        waits: bool = True,
        overlap: bool = False,
    ) -> None:
        from kvbm.trtllm_integration import compat, connector

        self.interface, self.ranks, self.chunk, self.reuse = interface, ranks, chunk, reuse
        self.priorities = "priorities" in interface.RequestData.__dataclass_fields__
        self.pools = [
            torch.zeros(blocks, LAYERS, 2, BLOCK * ELEMENTS, dtype=torch.float64)
            for _ in range(ranks)
        ]
        args = [arguments(ranks, rank) for rank in range(ranks)]
        self.workers = [connector.DynamoKVBMConnectorWorker(one) for one in args]
        self.scheduler = connector.DynamoKVBMConnectorLeader(args[0])
        self.done = [worker.register_forward_pass_callable() for worker in self.workers]
        broadcast = "mpi_broadcast"  # what it gives is the first rank's
        setattr(compat, broadcast, lambda *_, **__: self.side.place.engine_id)
        for worker, pool in zip(self.workers, self.pools, strict=True):
            worker.register_kv_caches(pool)
        if waits:
            self.scheduler.wait_for_initialization()
            self.wait_until_ready()
        self.free = list(range(blocks))
        self.held: dict[int, int] = {}  # block: users
        self.filed: dict[tuple[int, ...], int] = {}  # tokens up to its end: block
        self.active: list[Request] = []
        self.starting_loads: list[Request] = []
        self.starting_saves: list[Request] = []
        self.finished_loads: set[int] = set()
        self.waiting: tuple[list[set[int]], list[set[int]]] = (
            [set() for _ in range(ranks)],
            [set() for _ in range(ranks)],
        )
        self.loading: dict[int, Request] = {}
        self.saving: dict[int, Request] = {}
        self.reported: dict[int, tuple[int, int]] = {}
        self.wrong: list[tuple[int, int]] = []
        self.loaded: dict[int, int] = {}
        self.forward: Callable[[], None] = lambda: None
        self.is_over = False  # it has ended in a step
        self.overlap = overlap
        self.launched: list[Request] = []

    def wait_until_ready(self) -> None:
        """Wait until all ranks can copy and all slots are usable."""
        assert wait_until(self.side.leader.liveness.workers_ready, DEADLINE_S)
        segment = self.side._cache.segment
        slots = segment.shape.host_slots
        for rank in range(self.ranks):
            assert wait_until(lambda rank=rank: segment.ready_slots(rank) == slots, DEADLINE_S)

    @property
    def side(self) -> Any:
        """The scheduler side behind the interface."""
        return self.scheduler._leader

    def counter(self, name: str) -> int:
        """One of the segment's counters."""
        return int(self.side._cache.segment.counters()[name])

    def close(self) -> None:
        """End both sides."""
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.shutdown()

    # ---- requests --------------------------------------------------------------------------------
    def add(self, request: Request) -> Request:
        """A request arrives."""
        self.active.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """A request is cancelled, as in 1.2 and 1.3: it is freed, and the connector is not told."""
        self.active.remove(request)
        self.launched = [one for one in self.launched if one is not request]
        request.state = "finished"
        self.release(request)

    def release(self, request: Request) -> None:
        """Give a request's blocks back; all of them are filed, computed or not."""
        for number, block in enumerate(request.blocks):
            end = (number + 1) * BLOCK
            if self.reuse and end < len(request.tokens):
                self.filed.setdefault(tuple(request.tokens[:end]), block)
            self.held[block] -= 1
            if self.held[block] == 0:
                self.free.append(block)
        request.blocks = []

    def take(self, request: Request) -> None:
        """One more block."""
        block = self.free.pop(0)
        self.filed = {tokens: other for tokens, other in self.filed.items() if other != block}
        self.held[block] = 1
        request.blocks.append(block)

    # ---- an iteration of the executor ------------------------------------------------------------
    def step(self) -> None:
        """Schedule, prepare, run, and look at what has ended; what a worker raises ends it."""
        ready = [request for request in self.active if request.state in ("context", "generation")]
        batch = [request for request in ready if not request.is_sampled]
        before, self.launched = self.launched, []
        if batch:
            batch = self.prepare(batch)
            if batch:
                self.launched = self.run(batch)
        if not self.overlap:
            before, self.launched = self.launched, []
        self.process(before)
        self.collect()

    def prepare(self, batch: list[Request]) -> list[Request]:
        """Blocks and metadata for a batch; returns what of it runs."""
        admitted = []
        for request in batch:
            if request.state == "generation":
                if len(request.sampled) > len(request.blocks) * BLOCK:
                    self.take(request)
            elif not request.blocks:
                self.admit(request)
                admitted.append(request)
        for request in admitted:
            self.scheduler.update_state_after_alloc(request, list(request.blocks))
        for request in batch:
            left = request.prompt_len - request.context_current_position
            request.chunk = 1 if request.state == "generation" else min(self.chunk, left)
        running = [request for request in batch if request not in self.starting_loads]
        metadata = self.scheduler.build_connector_meta(self.output(running))
        for request in self.starting_loads:
            request.state = "loading"
        blob = pickle.dumps(metadata)
        self.is_over = bool(metadata.lost)
        for worker in self.workers:
            worker.bind_connector_meta(pickle.loads(blob))
        for worker in self.workers:
            worker.start_load_kv(SimpleNamespace())
        return running

    def admit(self, request: Request) -> None:
        """Find what the device has of a request, ask the connector, allocate."""
        while tuple(request.tokens[: (len(request.blocks) + 1) * BLOCK]) in self.filed:
            block = self.filed[tuple(request.tokens[: (len(request.blocks) + 1) * BLOCK])]
            if (len(request.blocks) + 1) * BLOCK >= request.prompt_len:
                break
            if self.held.get(block, 0) == 0:
                self.free.remove(block)
                self.held[block] = 0
            self.held[block] += 1
            request.blocks.append(block)
        computed = len(request.blocks) * BLOCK
        tokens, later = self.scheduler.get_num_new_matched_tokens(request, computed)
        assert later == (tokens > 0)
        assert computed + tokens < request.prompt_len
        self.loaded[request.request_id] = tokens
        request.context_current_position = computed + tokens
        if later:
            self.starting_loads.append(request)
        while len(request.blocks) * BLOCK < request.prompt_len:
            self.take(request)

    def output(self, running: Sequence[Request]) -> Any:
        """What the scheduler side is told of a batch."""
        new, cached = [], []
        for request in running:
            tokens, blocks = self.reported.get(request.request_id, (0, 0))
            position = request.context_current_position
            added = request.blocks[blocks:]
            fields: dict[str, Any] = {
                "request_id": request.request_id,
                "new_tokens": request.tokens[tokens:],
                "new_block_ids": added,
                "computed_position": (
                    position if request.state == "context" else len(request.tokens) - 1
                ),
                "num_scheduled_tokens": request.chunk,
            }
            if self.priorities:
                level = request.priority
                fields |= {
                    "block_hashes": [],
                    "priorities": None if level is None else [level] * len(added),
                    "cache_salt": request.cache_salt,
                    "new_block_ids_by_layer_group": [],
                }
            (cached if request.request_id in self.reported else new).append(
                self.interface.RequestData(**fields)
            )
            self.reported[request.request_id] = len(request.tokens), len(request.blocks)
        extra = (
            [None] if "attention_dp_rank" in self.interface.SchedulerOutput.__match_args__ else []
        )
        return self.interface.SchedulerOutput(new, cached, *extra)

    def run(self, batch: Sequence[Request]) -> list[Request]:
        """Forward pass and sampling; returns the requests that got a token."""
        self.forward()
        for layer in range(LAYERS):
            for worker in self.workers:
                worker.wait_for_layer_load(layer, SimpleNamespace())
                worker.save_kv_layer(layer, SimpleNamespace())
        for request in batch:
            generating = request.state == "generation"
            start = len(request.sampled) - 1 if generating else request.context_current_position
            self.compute(request, start, start + request.chunk)
        for done, worker in zip(self.done, self.workers, strict=True):
            done()
            worker.wait_for_save(SimpleNamespace())
        sampled = []
        for request in batch:
            if request.state == "context":
                request.context_current_position += request.chunk
                if request.context_current_position < request.prompt_len:
                    continue
                request.state = "generation"
            request.sampled.append(request.truth()[-1] % 1000)
            sampled.append(request)
        return sampled

    def process(self, batch: Sequence[Request]) -> None:
        """Look at the tokens of a batch."""
        for request in batch:
            request.tokens += request.sampled[len(request.tokens) :][:1]
            if len(request.tokens) - request.prompt_len >= request.max_new:
                self.finish(request)

    def compute(self, request: Request, start: int, stop: int) -> None:
        """Look at the KV of all tokens before, and write that of tokens `start` to `stop`."""
        truth = request.truth()
        for rank, pool in enumerate(self.pools):
            for position in range(stop):
                number, offset = divmod(position, BLOCK)
                row = pool[request.blocks[number], :, :, offset * ELEMENTS :][..., :ELEMENTS]
                value = torch.full_like(row, truth[position])
                value += 2.0**32 * torch.arange(LAYERS)[:, None, None]
                value += 2.0**34 * torch.arange(2)[None, :, None] + 2.0**36 * rank
                if position >= start:
                    row.copy_(value)
                elif not torch.equal(row, value):
                    self.wrong.append((request.request_id, position))

    def finish(self, request: Request) -> None:
        """A request has all its tokens."""
        request.state = "finished"
        self.active.remove(request)
        if self.scheduler.request_finished(request, list(request.blocks)):
            self.starting_saves.append(request)
        else:
            self.release(request)

    def collect(self) -> None:
        """What has ended on all ranks."""
        saves, loads = self.starting_saves, self.starting_loads
        self.starting_saves, self.starting_loads = [], []
        self.saving |= {request.request_id: request for request in saves}
        self.loading |= {request.request_id: request for request in loads}
        for rank, worker in enumerate(self.workers):
            saved, loaded = worker.get_finished(
                [request.request_id for request in saves],
                [request.request_id for request in loads],
            )
            assert set(saved) <= set(self.saving)
            assert set(loaded) <= set(self.loading)
            self.waiting[0][rank].update(saved)
            self.waiting[1][rank].update(loaded)
        for request_id in set.intersection(*self.waiting[0]):
            self.release(self.saving.pop(request_id))
            for ids in self.waiting[0]:
                ids.discard(request_id)
        for request_id in set.intersection(*self.waiting[1]):
            self.loading.pop(request_id).state = "context"
            for ids in self.waiting[1]:
                ids.discard(request_id)

    # ---- whole lives -----------------------------------------------------------------------------
    def run_until(self, condition: Callable[[], object]) -> None:
        """Iterate until a condition holds."""

        def holds() -> object:
            if condition():
                return True
            self.step()
            return condition()

        assert wait_until(holds, DEADLINE_S)

    def serve(self, request: Request) -> Request:
        """Run a request to its end, and until its blocks are free and its stores noted."""
        self.add(request)
        self.run_until(lambda: request.state == "finished" and not self.saving)
        self.settle()
        return request

    def settle(self) -> None:
        """Have what was stored noted: the leader does it in its steps, an idle engine has none."""

        def noted() -> bool:
            self.side.leader.collect()
            return not (self.side.leader._storing or self.side.leader._uncollected)

        assert wait_until(noted, DEADLINE_S)
