# SPDX-License-Identifier: Apache-2.0
"""`DynamoKVBMConnectorLeader`: TensorRT-LLM's scheduler interface, over the leader.

After the start no method raises: a surprise costs the request its cache, one line in the log and a
count (`guarded`).
"""

from __future__ import annotations

from typing import Any

from kvbm.closing import call_after_children
from kvbm.guard import guarded
from kvbm.shared import remove_as_engines_end
from kvbm.trtllm_integration.compat import SchedulerBase
from kvbm.trtllm_integration.connector_leader import KvConnectorLeader
from kvbm.trtllm_integration.step import EngineStep

__all__ = ["DynamoKVBMConnectorLeader"]


class DynamoKVBMConnectorLeader(SchedulerBase):
    """Keeps the KV blocks of past prompts in host memory and brings them back.

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
        self._leader = KvConnectorLeader(llm_args)

    def count_error(self) -> None:
        """Count a hook that failed."""
        self._leader.count_error()

    def wait_for_initialization(self) -> None:
        """Wait for the workers of all ranks, and open the cache (asked for from 1.3 on).

        Raises
        ------
        ConfigError, SegmentError
            The tier cannot be made.
        LeaderTimeout
            Not all workers have announced themselves in time.
        """
        self._leader.open(wait=True)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens beyond `num_computed_tokens` that will be loaded; loading is asynchronous."""
        tokens = self._leader.match(request, num_computed_tokens)
        return tokens, tokens > 0

    @guarded(lambda: None)
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """The request's device blocks are allocated: load what was promised."""
        self._leader.allocated(request, block_ids)

    @guarded(EngineStep)
    def build_connector_meta(self, scheduler_output: Any) -> EngineStep:
        """End of a scheduling step: store what this step completes."""
        return self._leader.build_step(scheduler_output)

    @guarded(lambda: False)
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """True while copies from or to the request's device blocks are in flight."""
        return self._leader.finished(request)

    @guarded(lambda: None)
    def shutdown(self) -> None:
        """Detach, remove what is private."""
        self._leader.close()


# This module is also imported by the process that starts the ranks.
call_after_children(remove_as_engines_end)
