# SPDX-License-Identifier: Apache-2.0
"""Scheduler side of the vLLM connector: vLLM's requests and scheduler output become calls of the leader."""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vllm.v1.core import kv_cache_utils

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.segment import Segment, segment_bytes
from kvbm.fingerprint import Fingerprint
from kvbm.hashing import MultimodalItem, RequestKeys, TokenChain, engine_hashes_problem, token_chain
from kvbm.instance import engine_key, is_private, remove_dead_private_instances
from kvbm.leader import Leader, TrackedSequence
from kvbm.shared import SegmentSpec, close_and_remove, open_as_leader
from kvbm.step import StepMetadata
from kvbm.tiers.host import ArenaHeader, wait_for_headers
from kvbm.vllm_integration.engine import (
    at_exit,
    block_tokens_of,
    check_model,
    fingerprint_values,
    instance_of,
    settings_of,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
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
        self._use_recompute_policy(vllm_config)
        self._problem = engine_hashes_problem(
            vllm_config.cache_config.prefix_caching_hash_algo,
            os.environ,
            getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None),
            shared=not is_private(self.instance),
        )
        if self._problem is not None:
            logger.info("blocks are identified by hashes of our own: %s", self._problem)
        self._kv_cache_config = kv_cache_config
        self._requests: dict[str, Request] = {}
        self._chains: dict[str, TokenChain] = {}
        remove_dead_private_instances()
        self.segment = self._open_segment(vllm_config)
        self.leader = Leader(OperationTable(self.segment), self.block_tokens)
        at_exit(self, self.close)

    @staticmethod
    def _use_recompute_policy(vllm_config: "VllmConfig") -> None:
        """A block that cannot be loaded is recomputed; vLLM's default ends the request with an error."""
        transfer = vllm_config.kv_transfer_config
        if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
            transfer.kv_load_failure_policy = "recompute"
            logger.info("kv_load_failure_policy is set to recompute: blocks that cannot be loaded are recomputed")

    def _open_segment(self, vllm_config: "VllmConfig") -> Segment:
        headers = wait_for_headers(
            self.instance, self.ranks, self.settings.leader_worker_init_timeout_secs
        )
        per_block = sum(header.bytes_per_block for header in headers)
        slots = self.settings.host_slots(per_block)
        spec = SegmentSpec(
            instance=self.instance,
            host_slots=slots,
            ranks=self.ranks,
            block_tokens=self.block_tokens,
            fingerprint=self._fingerprint(vllm_config, headers),
            nonces=tuple(header.nonce for header in headers),
            mode=0o660 if self.settings.shm_group is not None else 0o600,
            group=self.settings.shm_group,
        )
        if all(nonce == 0 for nonce in spec.nonces):
            self.settings.check_shm_room(slots * per_block + segment_bytes(spec.shape))
        segment = open_as_leader(spec, engine_key(self.engine_id))
        logger.info(
            "host tier: %d blocks of %d tokens, %d bytes over %d ranks, instance %s",
            slots, self.block_tokens, slots * per_block, self.ranks, self.instance,
        )
        return segment

    def _fingerprint(self, vllm_config: "VllmConfig", headers: Sequence[ArenaHeader]) -> Fingerprint:
        return Fingerprint(
            {
                **fingerprint_values(vllm_config, self.block_tokens),
                "hashes": "engine" if self._problem is None else "kvbm",
                "groups": self.group_count,
                "geometry": [header.geometry.hex() for header in headers],
            }
        )

    # ---- requests ---------------------------------------------------------------------------------------
    def _keys(self, request: "Request") -> list[Keys]:
        """Where the digests of a request's blocks come from: vLLM's own hashes if they qualify."""
        if self._problem is None:
            hash_tokens = getattr(self._kv_cache_config, "hash_block_size", None) or self.block_tokens
            stride = self.block_tokens // hash_tokens
            return [Keys(request.block_hashes, stride, group) for group in range(self.group_count)]
        chain = token_chain(self.block_tokens, request_keys(request))
        self._chains[request.request_id] = chain
        return [Keys(chain, 1, group) for group in range(self.group_count)]

    def _sequence(self, request: "Request") -> TrackedSequence:
        """The leader's sequence of a request, with keys for all tokens that it has now."""
        request_id = request.request_id
        sequence = self.leader.sequences.get(request_id)
        if sequence is None:
            sequence = self.leader.track(request_id, self._keys(request))
            self._requests[request_id] = request
        chain = self._chains.get(request_id)
        if chain is not None:
            chain.update(request._all_token_ids)
        return sequence

    def match(self, request: "Request", computed_tokens: int) -> int:
        """Tokens beyond the device's own prefix that can be loaded: whole blocks, never the last token."""
        start = computed_tokens // self.block_tokens
        stop = (request.num_tokens - 1) // self.block_tokens
        if stop <= start or computed_tokens % self.block_tokens != 0:
            return 0
        return self.leader.match(self._sequence(request), start, stop) * self.block_tokens

    def allocated(
        self, request: "Request", block_ids: Sequence[Sequence[int]], external_tokens: int
    ) -> None:
        """Device blocks are allocated for a request; load `external_tokens` of the match into them.

        The external range begins where the match began: vLLM asks again before it allocates.
        """
        sequence = self._sequence(request)
        self.leader.set_device_blocks(sequence, block_ids)
        if external_tokens > 0:
            self.leader.load(sequence, sequence.matched_from, external_tokens // self.block_tokens)
        else:
            self.leader.drop_match(sequence)

    def finished(self, request: "Request") -> bool:
        """The request is done; True while its device blocks must be kept."""
        sequence = self.leader.sequences.get(request.request_id)
        if sequence is None:
            return False
        self._sequence(request)  # the last tokens
        hold = self.leader.finish(request.request_id, request.num_computed_tokens // self.block_tokens)
        self._requests.pop(request.request_id, None)
        self._chains.pop(request.request_id, None)
        return hold

    def loads_ended(self, request_ids: Iterable[str]) -> None:
        """All workers have reported these loads."""
        self.leader.loads_ended(request_ids)

    # ---- steps ------------------------------------------------------------------------------------------
    def build_step(self, output: "SchedulerOutput") -> StepMetadata:
        """End of a scheduling step: store the blocks that it completes."""
        self.leader.preempt(output.preempted_req_ids or ())
        for new in output.scheduled_new_reqs:
            self._complete(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            sequence = self.leader.sequences.get(request_id)
            if sequence is None:
                continue
            blocks = cached.new_block_ids[index]
            if blocks is not None and request_id in cached.resumed_req_ids:
                self.leader.set_device_blocks(sequence, blocks)
            elif blocks is not None:
                self.leader.add_device_blocks(sequence, blocks)
            self._complete(request_id, cached.num_computed_tokens[index], output)
        return self.leader.build_step()

    def _complete(self, request_id: str, computed_tokens: int, output: "SchedulerOutput") -> None:
        """Store what a request has complete after this step.

        Its KV exists up to the tokens scheduled now; which tokens these are is known as far as its block hashes
        go. Draft tokens of speculative decoding have no hashes until they are accepted.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        upto = (computed_tokens + output.num_scheduled_tokens[request_id]) // self.block_tokens
        self.leader.store(self._sequence(request), upto)

    def reset(self) -> None:
        """Make all cached content unreachable."""
        self.leader.reset()

    def count_error(self) -> None:
        """Count a hook that failed."""
        self.leader.table.count("errors", 1)

    def close(self) -> None:
        """Return everything and detach; may be called twice."""
        if self.leader is not None:
            self.leader.close()
            close_and_remove(self.segment, self.instance)
            self.leader = None  # type: ignore[assignment]


def request_keys(request: "Request") -> RequestKeys:
    """What changes the KV of a request besides its tokens."""
    lora = request.lora_request
    return RequestKeys(
        salt=request.cache_salt,
        lora_name=None if lora is None else lora.lora_name,
        lora_path=None if lora is None else getattr(lora, "lora_path", None),
        multimodal=tuple(
            MultimodalItem(f.identifier, f.mm_position.offset, f.mm_position.length)
            for f in request.mm_features or ()
        ),
    )
