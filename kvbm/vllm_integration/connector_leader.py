# SPDX-License-Identifier: Apache-2.0
"""Scheduler side of the vLLM connector: vLLM's requests and outputs become calls of the leader.

What vLLM says about device blocks, and how it is followed: `update_state_after_alloc` names all
blocks of a request at its admission, so does the scheduler output when it first runs or runs again;
after that, only additions are named. A preemption takes them all away. It is seen by the request's
own count of preemptions: the scheduler output of old versions leaves out those that a reset of the
prefix cache causes, and a request may be admitted again in the step that preempts it.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvbm._fast.keys import Keys
from kvbm._fast.timing import CallTime
from kvbm.closing import close_at_exit
from kvbm.hashing import TokenChain, engine_hashes_problem, identity_mix, token_chain
from kvbm.instance import is_private
from kvbm.leader.call_time import counted
from kvbm.leader.leader import Leader
from kvbm.leader.opening import EngineCache, EnginePlace
from kvbm.leader.sequences import TrackedSequence
from kvbm.step import StepMetadata
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.consolidator_config import start_events
from kvbm.vllm_integration.engine import (
    apply_load_failure_policy,
    block_tokens_of,
    check_model,
    fingerprint_values,
    instance_of,
    settings_of,
)
from kvbm.vllm_integration.known_request import KnownRequest
from kvbm.vllm_integration.request_keys import request_keys
from kvbm.vllm_integration.stats import KvbmStats, StatsReader

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class KvConnectorLeader:
    """What the connector's scheduler role does.

    Parameters
    ----------
    vllm_config : VllmConfig
        Model, parallel, cache and transfer configuration.
    kv_cache_config : KVCacheConfig or None
        KV-cache groups; None on versions that do not pass it.

    Raises
    ------
    ConfigError
        No tier is configured, the tier does not fit, or the model's groups are not supported.
    LeaderTimeout
        Not all workers announced themselves in time.
    """

    def __init__(self, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig | None") -> None:
        self.settings = settings_of(vllm_config)
        self.settings.require_a_tier()
        self.group_count = check_model(vllm_config, kv_cache_config)
        self.instance = instance_of(vllm_config, self.settings)
        self.engine_id = str(vllm_config.kv_transfer_config.engine_id)
        self.block_tokens = block_tokens_of(vllm_config, kv_cache_config)
        self.ranks = int(vllm_config.parallel_config.world_size)
        apply_load_failure_policy(vllm_config, self.settings)
        self._stores = self._priorities_allow_stores()
        self._problem = engine_hashes_problem(
            vllm_config.cache_config.prefix_caching_hash_algo,
            os.environ,
            compat.HASH_SEED,
            shared=not is_private(self.instance),
        )
        if self._problem is not None:
            logger.info("blocks are identified by hashes of our own: %s", self._problem)
        self._hash_tokens = compat.hash_block_tokens(
            vllm_config, kv_cache_config, self.block_tokens
        )
        self._known: dict[str, KnownRequest] = {}
        self._reported = False
        place = EnginePlace(self.instance, self.engine_id, self.ranks, self.block_tokens)
        self._cache = EngineCache(place, self.settings, self._fingerprint(vllm_config))
        assert self._cache.leader is not None
        self.leader: Leader = self._cache.leader
        self.segment = self._cache.segment
        self.call_time = CallTime(self.segment)
        self._stats = StatsReader(self.segment, repeat=compat.STATS_GET_LOST)
        self._hits = self._cache.hits
        self._exporter = self._cache.exporter
        self._events = start_events(
            vllm_config,
            self.settings,
            self.instance,
            self.group_count,
            own_hashes=self._problem is not None,
            disk_is_open=self._cache.disk_is_open,
        )
        close_at_exit(self, self.close)

    def _priorities_allow_stores(self) -> bool:
        """Return whether anything is offloaded: vLLM gives no priorities, so that all are 0."""
        least = self.settings.host_offload_prefix_min_priority
        if least > 0:
            logger.warning(
                "nothing is offloaded: DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY=%d, and all "
                "blocks have priority 0 with vLLM",
                least,
            )
        return least == 0

    def _fingerprint(self, vllm_config: "VllmConfig") -> dict[str, Any]:
        return {
            **fingerprint_values(vllm_config, self.block_tokens),
            "hashes": "engine" if self._problem is None else "kvbm",
            "groups": self.group_count,
        }

    # ---- requests --------------------------------------------------------------------------------
    def _keys(self, request: "Request") -> tuple[list[Keys], TokenChain | None]:
        """Where the digests of a request's blocks come from: vLLM's own hashes if they qualify."""
        groups = range(self.group_count)
        if self._problem is not None:
            chain = token_chain(self.block_tokens, request_keys(request))
            return [Keys(chain, 1, group) for group in groups], chain
        expected = request.num_tokens // self._hash_tokens
        if len(request.block_hashes) != expected:
            raise ValueError(
                f"{len(request.block_hashes)} block hashes for {request.num_tokens} tokens; "
                f"{expected} of {self._hash_tokens} tokens each are expected"
            )
        stride = self.block_tokens // self._hash_tokens
        mix = identity_mix(request_keys(request)) if compat.HASHES_NEED_IDENTITY else bytes(16)
        return [Keys(request.block_hashes, stride, group, mix) for group in groups], None

    def _sequence(self, request: "Request") -> TrackedSequence:
        """The leader's sequence of a request, with keys for all tokens that it has now."""
        request_id = request.request_id
        known = self._known.get(request_id)
        sequence = self.leader.sequences.get(request_id)
        if known is None or sequence is None or known.request is not request:
            return self._track(request)
        if known.hashes is not request.block_hashes:
            return self._track(request)
        if request.num_preemptions != known.preemptions:
            known.preemptions = request.num_preemptions
            known.settled = -1
            self.leader.preempt(request_id)
        if known.chain is not None:
            if len(request.mm_features or ()) != known.multimodal:
                self._renew_chain(known, sequence)
            known.chain.update(request._all_token_ids)  # noqa: SLF001  # the list itself
        return sequence

    def _track(self, request: "Request") -> TrackedSequence:
        if self._events is not None and compat.reports_reuse(request):
            self._events.expect_reuse()
        keys, chain = self._keys(request)
        sequence = self.leader.track(request.request_id, keys)
        self._known[request.request_id] = KnownRequest(
            request,
            request.block_hashes,
            chain,
            len(request.mm_features or ()),
            request.num_preemptions,
        )
        if chain is not None:
            chain.update(request._all_token_ids)  # noqa: SLF001  # the list itself
        return sequence

    def _renew_chain(self, known: KnownRequest, sequence: TrackedSequence) -> None:
        """A streaming session got more multimodal inputs: they enter the hashes of their blocks."""
        known.chain = token_chain(self.block_tokens, request_keys(known.request))
        known.multimodal = len(known.request.mm_features or ())
        for number, group in enumerate(sequence.groups):
            group.keys = Keys(known.chain, 1, number)
        sequence.look_again()

    @counted
    def match(self, request: "Request", computed_tokens: int) -> int | None:
        """Tokens beyond the device's own prefix that can be loaded: whole blocks, never the last.

        The last token must be computed, since its logits are needed. None: ask again, more is
        being stored, or on its way from disk.
        """
        if request.skip_reading_prefix_cache or computed_tokens % self.block_tokens != 0:
            return 0
        start = computed_tokens // self.block_tokens
        stop = (request.num_tokens - 1) // self.block_tokens
        if stop <= start:
            return 0
        sequence = self._sequence(request)
        self._known[request.request_id].asked = stop - start
        blocks = self.leader.look_up(sequence, start, stop)
        return None if blocks is None else blocks * self.block_tokens

    @counted
    def allocated(
        self, request: "Request", block_ids: Sequence[Sequence[int]], external_tokens: int
    ) -> None:
        """Device blocks are allocated for a request; load `external_tokens` of the match into them.

        The external range begins where the last match began, and ends with the last block. If this
        fails, the request must still be reported as loaded, without a block of the range having
        arrived: vLLM waits for it.
        """
        blocks = -(-external_tokens // self.block_tokens)  # vLLM computes the rest of a block again
        try:
            sequence = self._sequence(request)
            sequence.set_device_blocks(block_ids)
            if blocks > 0:
                self.leader.load(sequence, blocks)
                known = self._known[request.request_id]
                known.loaded, known.from_disk = blocks, sequence.promoted_blocks(blocks)
            else:
                self.leader.drop_match(sequence)
        except Exception:
            if blocks > 0:
                targets = [block for ids in block_ids for block in ids[-blocks:]]
                self.leader.fail_load(request.request_id, targets)
            raise

    @counted
    def finished(self, request: "Request") -> bool:
        """The request is done; True while its device blocks must be kept."""
        request_id = request.request_id
        try:
            if request_id not in self.leader.sequences:
                return False
            sequence = self._sequence(request)  # with its last tokens
            known = self._known[request_id]
            disk = 0 if sequence.load_failed else known.from_disk
            host = 0 if sequence.load_failed else known.loaded - disk
            self._hits.record(host, disk, known.asked)
            computed = request.num_computed_tokens // self.block_tokens if self._stores else 0
            failed = request.status.name == "FINISHED_ERROR"
            return self.leader.finish(request_id, computed, load_failed=failed)
        except Exception:
            self.leader.abandon(request_id)
            raise
        finally:
            self._known.pop(request_id, None)

    @counted
    def worker_output(self, output: "KVConnectorOutput") -> None:
        """What all workers have reported."""
        self.leader.loads_ended(
            output.finished_recving or (), compat.not_loaded(output), compat.failed_loads(output)
        )
        if output.finished_sending:
            self.leader.collect()

    # ---- steps -----------------------------------------------------------------------------------
    @counted
    def build_step(self, output: "SchedulerOutput") -> StepMetadata:
        """End of a scheduling step: store the blocks that it completes.

        The step's message goes to the workers whatever happens here: it says which copies to stop
        and which loads to report.
        """
        try:
            self._note_step(output)
        except Exception:
            if not self._reported:  # it may come again in each step
                self._reported = True
                logger.exception("a step was not understood; its requests are not cached any more")
            self.count_error()
            self._give_up_all()
        return self.leader.build_step()

    def _give_up_all(self) -> None:
        """Which device blocks the requests have now is not known: none is stored any more."""
        for request_id in list(self._known):
            with suppress(Exception):
                self._give_up(request_id)

    def _note_step(self, output: "SchedulerOutput") -> None:
        self.leader.prefill.step(sum(output.num_scheduled_tokens.values()))
        for request_id in self.leader.storing():
            self._per_request(request_id, self._note_preemption, request_id)
        for request_id in output.preempted_req_ids or ():
            self._per_request(request_id, self._note_preemption, request_id)
        for new in output.scheduled_new_reqs:
            self._per_request(
                new.req_id,
                self._runs,
                new.req_id,
                new.num_computed_tokens,
                new.block_ids,
                True,
                output,
            )
        cached = output.scheduled_cached_reqs
        scheduled, block_tokens = output.num_scheduled_tokens, self.block_tokens
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            known = self._known.get(request_id)
            if known is None:
                continue
            if (
                blocks is None
                and (computed + scheduled[request_id]) // block_tokens <= known.settled
            ):
                continue  # most requests in most steps: one more token, no new block
            again = request_id in cached.resumed_req_ids
            self._per_request(request_id, self._runs, request_id, computed, blocks, again, output)

    def _per_request(self, request_id: str, call: Any, *arguments: Any) -> None:
        """Call; an error costs the request its cache, and nothing else."""
        try:
            call(*arguments)
        except Exception:
            self.count_error()
            self._give_up(request_id)
            logger.exception("request %s is not cached any more", request_id)

    def _give_up(self, request_id: str) -> None:
        self._known.pop(request_id, None)
        self.leader.abandon(request_id)

    def _note_preemption(self, request_id: str) -> None:
        known = self._known.get(request_id)
        if known is not None:
            self._sequence(known.request)

    def _runs(
        self,
        request_id: str,
        computed_tokens: int,
        blocks: Sequence[Sequence[int]] | None,
        all_blocks: bool,
        output: "SchedulerOutput",
    ) -> None:
        """A request runs in this step: note its device blocks, store what it completes.

        Its KV exists up to the tokens scheduled now; which tokens these are is known as far as its
        block hashes go. Draft tokens of speculative decoding have none until they are accepted.
        """
        known = self._known.get(request_id)
        if known is None:
            return
        sequence = self._sequence(known.request)
        if blocks is not None and all_blocks:
            sequence.set_device_blocks(blocks)
        elif blocks is not None:
            sequence.add_device_blocks(blocks)
        upto = (computed_tokens + output.num_scheduled_tokens[request_id]) // self.block_tokens
        if self._stores and not sequence.stale:
            self.leader.store(sequence, upto)
            known.settled = min(group.stored for group in sequence.groups)
        else:
            known.settled = upto

    @property
    def holds_device_blocks(self) -> bool:
        """Whether device blocks of finished requests become free when transfers end."""
        return self.leader.holds_device_blocks

    @counted
    def reset(self) -> None:
        """Make all cached content unreachable."""
        self.leader.reset()

    def stats(self) -> KvbmStats | None:
        """What moved since the last report."""
        at_once = compat.STATS_NEED_A_WORKER or not self.leader.sequences
        return self._stats.read(at_once)

    def count_error(self) -> None:
        """Count a hook that failed."""
        self.leader.table.count("errors", 1)

    def close(self) -> None:
        """Return everything and detach; may be called twice."""
        if self._events is not None:
            self._events.close()
            self._events = None
        self._cache.close()
        self.leader = None  # type: ignore[assignment]
