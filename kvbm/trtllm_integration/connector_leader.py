# SPDX-License-Identifier: Apache-2.0
"""Scheduler side of the TensorRT-LLM connector: its requests and steps become calls of the leader.

What TensorRT-LLM does differently from what the leader expects of an engine, and what comes of it:

- A request is looked up once. What is on disk is brought to host memory for whoever comes next.
- What was promised is taken for loaded: there is no way to say "compute it after all". A promised
  load that does not arrive ends the engine before anything runs with these blocks (`lost`); a
  request that fails would not do, since TensorRT-LLM files all of its blocks for reuse.
- Requests that are cancelled, or end with an error, are freed without a word. So each step looks
  at who is over and who gets whose device blocks: stores from them are stopped, loads into them are
  waited for.
- For the same reason blocks that a request found on the device are not stored: TensorRT-LLM files
  blocks of a cancelled request for reuse whether they were computed or not.
- No step comes while nothing is scheduled: workers are told of a store when it begins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvbm._fast.contract import ROWS
from kvbm._fast.keys import Keys
from kvbm._fast.timing import CallTime
from kvbm.closing import close_at_exit
from kvbm.hashing import token_chain
from kvbm.leader.call_time import counted
from kvbm.leader.leader import Leader
from kvbm.leader.opening import EngineCache
from kvbm.tiers.host import read_header
from kvbm.trtllm_integration import compat
from kvbm.trtllm_integration.consolidator_config import start_events
from kvbm.trtllm_integration.engine import (
    check_engine,
    engine_place,
    fingerprint_values,
    own_engine_id,
    settings_of,
)
from kvbm.trtllm_integration.known_request import KnownRequest
from kvbm.trtllm_integration.request_keys import request_keys, why_not_cached
from kvbm.trtllm_integration.step import EngineStep

if TYPE_CHECKING:
    from kvbm.leader.sequences import TrackedSequence

logger = logging.getLogger(__name__)

FORGET_STEPS = 4096
"""Steps after which a request that is in none of them is forgotten: it was cancelled."""

FORGET_EVERY = 256


class KvConnectorLeader:
    """What the connector's scheduler does, on the first rank.

    Its cache is opened once the workers of all ranks have registered their KV caches.

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
        self.place = engine_place(llm_args, self.settings, own_engine_id(llm_args))
        self._values = fingerprint_values(llm_args)
        self._llm_args = llm_args
        self._cache: EngineCache | None = None
        self.leader: Leader = None  # type: ignore[assignment]
        self._events: Any = None
        self._began = time.monotonic()
        self._off = False
        self._known: dict[str, KnownRequest] = {}
        self._loading: dict[str, KnownRequest] = {}
        self._set_aside: dict[str, int] = {}
        self._broken: set[str] = set()
        self._new = EngineStep()
        self._steps = 0
        self._told: set[str] = set()
        close_at_exit(self, self.close)

    # ---- start and end ---------------------------------------------------------------------------
    def open(self, wait: bool = False) -> bool:
        """Open the cache if all workers have announced themselves; return whether it is open.

        Parameters
        ----------
        wait : bool
            Wait for them, up to `DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS`.

        Raises
        ------
        ConfigError, SegmentError
            The tier cannot be made.
        LeaderTimeout
            Not all of them have, in the time that is set.
        """
        if self._cache is not None or self._off:
            return self._cache is not None
        if not (wait or self._workers_are_there()):
            if time.monotonic() - self._began > self.settings.leader_worker_init_timeout_secs:
                self._off = True
                logger.error(
                    "nothing is cached: not all of %d workers have announced themselves in %s s",
                    self.place.ranks,
                    self.settings.leader_worker_init_timeout_secs,
                )
            return False
        self._off = True  # unless what follows succeeds: it is not tried again
        cache = EngineCache(self.place, self.settings, self._values)
        assert cache.leader is not None
        self._cache, self.leader, self._off = cache, cache.leader, False
        self.call_time = CallTime(cache.segment)
        if not getattr(self._llm_args.kv_cache_config, "enable_block_reuse", True):
            logger.warning(
                "nothing will be loaded: TensorRT-LLM asks its connector only if "
                "kv_cache_config.enable_block_reuse is on, and it is off, or was turned off since "
                "the attention backend does not support it"
            )
        self._events = start_events(self.settings, self.place.instance, cache.disk_is_open)
        return True

    def _workers_are_there(self) -> bool:
        place, group = self.place, self.settings.shm_group
        ranks = range(place.ranks)
        return all(read_header(place.instance, rank, group) is not None for rank in ranks)

    def count_error(self) -> None:
        """Count a hook that failed."""
        if self._cache is not None:
            self.leader.table.count("errors", 1)

    def _tell_once(self, what: str, *arguments: Any) -> None:
        """Count a surprise; the first of its kind is logged."""
        self.count_error()
        if what not in self._told:
            self._told.add(what)
            logger.warning(what, *arguments)

    def close(self) -> None:
        """Return everything and detach; may be called twice."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._cache is not None:
            self._cache.close()
            self._cache = None
            self._off = True

    # ---- requests --------------------------------------------------------------------------------
    def _track(self, request: Any) -> KnownRequest | None:
        """Begin a request; None if it is not cached."""
        reason = why_not_cached(request)
        if reason is not None:
            logger.debug("request %s is not cached: %s", request.request_id, reason)
            return None
        request_id = str(request.request_id)
        chain = token_chain(self.place.block_tokens, request_keys(request, self.place.engine_id))
        chain.extend(request.get_tokens(0))
        self.leader.track(request_id, [Keys(chain, 1, 0)])
        known = self._known[request_id] = KnownRequest(chain, seen=self._steps)
        return known

    def match(self, request: Any, computed: int) -> int:
        """Tokens beyond the device's own prefix that will be loaded: whole blocks, never the last.

        The last token must be computed, since its logits are needed. Operations for the load are
        set aside, since it may not fail any more.
        """
        if not self.open():
            return 0
        with self.call_time:
            known = self._track(request)
            if known is None:
                return 0
            return self._match(str(request.request_id), known, computed)

    def _match(self, request_id: str, known: KnownRequest, computed: int) -> int:
        block = self.place.block_tokens
        known.computed = computed
        sequence = self.leader.sequences[request_id]
        sequence.own_from = -(-computed // block)  # in part another one's is not its own
        start, stop = computed // block, (known.chain.total_tokens - 1) // block
        if computed % block != 0 or stop <= start:
            return 0
        known.asked = stop - start
        count = self.leader.match(sequence, start, stop)
        disk = self.leader.disk
        if disk is not None and self.leader.liveness.workers_ready():
            disk.promote(sequence, start + count, stop)  # in time for the next one
        needed = -(-count // ROWS)
        if self.leader.table.free_operations() - sum(self._set_aside.values()) < needed:
            self.leader.drop_match(sequence)
            return 0
        self._set_aside[request_id] = needed
        known.promised = count
        return count * block

    def allocated(self, request: Any, block_ids: Sequence[int]) -> None:
        """Device blocks are allocated for a request: load what was promised into them."""
        if self._cache is None:
            return
        request_id = str(request.request_id)
        known = self._known.get(request_id)
        self._set_aside.pop(request_id, None)
        try:
            with self.call_time:
                if known is None:  # no look-up: TensorRT-LLM has block reuse switched off
                    known = self._track(request)
                    if known is None:
                        self._claim(request_id, block_ids)
                        return
                    known.computed = int(request.context_current_position)
                    sequence = self.leader.sequences[request_id]
                    sequence.own_from = -(-known.computed // self.place.block_tokens)
                known.request = request
                # Inputs without a hash, which the copy that was looked up does not show.
                known.given_up = bool(getattr(request, "py_multimodal_data", None))
                known.place(block_ids, self.place.block_tokens)
                self.leader.sequences[request_id].set_device_blocks([known.blocks])
                self._claim(request_id, block_ids[known.computed // self.place.block_tokens :])
                if known.promised:
                    self._load(request, known)
        except Exception:
            if known is not None:
                known.given_up = True
            if known is not None and known.promised:
                self._broken.add(request_id)
                self.leader.fail_load(request_id, [])
            raise

    def _load(self, request: Any, known: KnownRequest) -> None:
        """Load as many of the promised blocks as TensorRT-LLM counts as computed."""
        request_id, block = str(request.request_id), self.place.block_tokens
        honoured = int(request.context_current_position) - known.computed
        if not 0 <= honoured <= known.promised * block or honoured % block:
            raise ValueError(
                f"{known.promised * block} tokens were promised for request {request_id}, "
                f"{honoured} are taken for loaded"
            )
        sequence = self.leader.sequences[request_id]
        if honoured == 0:  # it is waited for all the same
            self.leader.drop_match(sequence)
            self.leader.fail_load(request_id, [])
            self.leader.loads_ended([request_id])
            known.promised = 0
            return
        known.loaded = honoured // block
        self.leader.load(sequence, known.loaded)
        known.unended = list(sequence.loads)
        known.arrived = not sequence.load_failed
        self._loading[request_id] = known

    def _claim(self, request_id: str, block_ids: Sequence[int]) -> None:
        """These device blocks are a request's from this step on, to be overwritten.

        Stores from them are stopped, loads into them are waited for: whose they were is over.
        """
        if not block_ids:
            return
        taken = set(block_ids)
        for other_id in self.leader.storing():
            known = self._known.get(other_id)
            if other_id != request_id and known and not taken.isdisjoint(known.blocks):
                self._stop_stores(other_id)
        for other_id, other in self._loading.items():
            first = other.computed // self.place.block_tokens
            targets = other.blocks[first : first + other.loaded]
            if other_id != request_id and not taken.isdisjoint(targets):
                self._new.wait += other.unended

    def finished(self, request: Any) -> bool:
        """The request is done; True while its device blocks must be kept."""
        request_id = str(request.request_id)
        if self._cache is None or request_id not in self._known:
            return False
        try:
            with self.call_time:
                return self._finish(request_id, self._known[request_id])
        except Exception:
            self._known.pop(request_id, None)
            self.leader.abandon(request_id)
            raise

    def _finish(self, request_id: str, known: KnownRequest) -> bool:
        self._poll_load(request_id, known)
        if known.unended:
            known.finished = True
            return True
        del self._known[request_id]
        assert self._cache is not None
        self._cache.hits.record(known.loaded, 0, known.asked)
        return self.leader.finish(request_id, 0)  # what is complete was submitted with its step

    # ---- steps -----------------------------------------------------------------------------------
    def build_step(self, output: Any) -> EngineStep:
        """End of a scheduling step: store the blocks that it completes.

        The step's message goes to the workers whatever happens here. If it is not known any more
        which requests run, those whose load is not certain are taken for lost.
        """
        if self._cache is None:
            return EngineStep()
        self._steps += 1
        self._set_aside.clear()  # what was promised in this step has been allocated
        try:
            self._note_step(output)
        except Exception:
            if "step" not in self._told:  # it may come again in each step
                self._told.add("step")
                logger.exception("a step was not understood; its requests are not cached any more")
            self.count_error()
            self._new.lost += list(self._loading)
            for request_id in list(self._known):
                with suppress(Exception):
                    self._give_up(request_id)
        built, self._new = self._new, EngineStep()
        built.step = self.leader.build_step()
        built.step.held = {}  # the workers know the stores already
        return built

    @counted
    def _note_step(self, output: Any) -> None:
        self.leader.collect()
        requests = [*output.new_requests, *output.cached_requests]
        self.leader.prefill.step(sum(data.num_scheduled_tokens for data in requests))
        for request_id, known in list(self._loading.items()):
            self._poll_load(request_id, known)
        running = {str(data.request_id) for data in requests}
        for request_id in running:
            self._check_load(request_id)
        for request_id in self.leader.storing():
            if request_id not in self._known or self._known[request_id].is_over:
                self._stop_stores(request_id)
        for data in requests:
            self._per_request(str(data.request_id), data)
        if self._steps % FORGET_EVERY == 0:
            self._forget()

    def _poll_load(self, request_id: str, known: KnownRequest) -> None:
        """Note which operations of a load have ended on all ranks, and what came of them."""
        if request_id not in self._loading:
            return
        results = {handle: self.leader.table.collect(handle) for handle in known.unended}
        known.unended = [handle for handle, result in results.items() if result is None]
        known.arrived = known.arrived and False not in results.values()
        sequence = self.leader.sequences[request_id]
        sequence.loads = list(known.unended)
        if known.unended:
            return
        del self._loading[request_id]
        if not known.arrived:
            self._lose(request_id, known)
        self.leader.loads_ended([request_id])
        if known.finished:
            known.finished = False
            self._finish(request_id, known)

    def _lose(self, request_id: str, known: KnownRequest) -> None:
        known.given_up = True
        self._new.lost.append(request_id)
        self.leader.sequences[request_id].load_failed = True
        self.leader.table.count("errors", 1)

    def _check_load(self, request_id: str) -> None:
        """A request runs: all ranks have reported its load, so it has ended, or is lost."""
        known = self._known.get(request_id)
        if request_id in self._broken or (known is not None and known.unended):
            self._broken.discard(request_id)
            self._new.lost.append(request_id)

    def _stop_stores(self, request_id: str) -> None:
        """A request's device blocks are others' from this step on."""
        self.leader.preempt(request_id)
        if request_id in self._known:
            self._known[request_id].settled = 0

    def _per_request(self, request_id: str, data: Any) -> None:
        """Note that a request runs; an error costs it its cache, and nothing else."""
        known = self._known.get(request_id)
        if known is None or known.given_up:
            self._claim(request_id, data.new_block_ids)
            return
        try:
            self._runs(request_id, known, data)
        except Exception:
            self.count_error()
            self._give_up(request_id)
            logger.exception("request %s is not cached any more", request_id)

    def _give_up(self, request_id: str) -> None:
        known = self._known[request_id]
        known.given_up = True
        if known.unended:
            return  # its end is waited for
        del self._known[request_id]
        self.leader.abandon(request_id)

    def _runs(self, request_id: str, known: KnownRequest, data: Any) -> None:
        """A request runs in this step: note its device blocks, store what it completes.

        Its KV exists up to the tokens scheduled now; which tokens these are is known as far as it
        has them. Draft tokens of speculative decoding are none of them until they are accepted.
        """
        known.seen = self._steps
        if known.started:
            known.chain.extend(data.new_tokens)
            self._claim(request_id, data.new_block_ids)
            known.blocks += data.new_block_ids
        else:
            self._first_run(request_id, known, data)
        priorities = compat.priorities_of(data)
        if priorities is not None:
            missing = len(known.blocks) - len(data.new_block_ids) - len(known.priorities)
            known.priorities += [0] * missing + list(priorities)
        block, sequence = self.place.block_tokens, self.leader.sequences[request_id]
        end = data.computed_position + data.num_scheduled_tokens
        if end > len(known.blocks) * block:
            self._tell_once(
                "request %s runs %d tokens and has %d blocks of %d: the rest is not stored",
                request_id,
                end,
                len(known.blocks),
                block,
            )
        upto = min(end, known.chain.total_tokens) // block
        if upto > known.settled:
            known.check_places()
            sequence.set_device_blocks([known.blocks])
            self._store(request_id, known, sequence, upto)

    def _first_run(self, request_id: str, known: KnownRequest, data: Any) -> None:
        """A request's first scheduler output has all of its tokens and blocks."""
        tokens, blocks = list(data.new_tokens), list(data.new_block_ids)
        count = known.chain.total_tokens
        if tokens[:count] != known.chain.tokens():
            raise ValueError(f"request {request_id} has other tokens than at its admission")
        if known.blocks and blocks[: len(known.blocks)] != known.blocks:
            raise ValueError(f"request {request_id} has other blocks than at its admission")
        known.chain.extend(tokens[count:])
        self._claim(request_id, blocks[len(known.blocks) :])
        known.blocks, known.started = blocks, True

    def _store(
        self, request_id: str, known: KnownRequest, sequence: TrackedSequence, upto: int
    ) -> None:
        """Store a request's own blocks, as far as its priorities allow and its prefix is cached."""
        least = self.settings.host_offload_prefix_min_priority
        end, priority = known.may_be_offloaded(upto, least)
        before, group = set(sequence.stores), sequence.groups[0]
        self.leader.store(sequence, end, priority)
        added = [handle for handle in sequence.stores if handle not in before]
        if added:
            self._new.stores[request_id] = added
        limited = end < upto or group.stored < sequence.own_from
        known.settled = upto if limited else group.stored

    def _forget(self) -> None:
        """Requests that no step has had for long, and that do not load, were cancelled."""
        for request_id, known in list(self._known.items()):
            if not known.unended and known.seen + FORGET_STEPS < self._steps:
                del self._known[request_id]
                self.leader.abandon(request_id)
