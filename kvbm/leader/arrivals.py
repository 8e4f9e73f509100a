# SPDX-License-Identifier: Apache-2.0
"""Requests that wait a moment for blocks that somebody is storing just now.

Two engines of one instance, or two data-parallel ranks, often get the same prompt within a second.
The one that comes second finds blocks that are reserved and not published yet: the first engine
computes and copies them at this moment. To compute them again would cost the time of the device for
what is about to be there. So the look-up answers "ask again", and the request waits in the engine's
queue, without device blocks, until the blocks are published. Blocks on their way from disk, for
another engine, look the same and are waited for in the same way.

The wait is bounded three ways. It ends

* when whoever fills the blocks is dead, which a lock that the kernel drops tells at once;
* when it has taken as long as computing what it would bring, from its first block to the end of
  what is being filled now. An engine that prefills in chunks is followed chunk by chunk: what has
  arrived meanwhile counts as brought;
* after `SECS_MAX`, whatever the rates say: an engine that is stopped holds its blocks for ever.

A request waits once in an admission. It is not held up for less than `TOKENS_MIN`: it is asked
again once a step, and a step takes longer than computing a few blocks.
"""

import time
from collections.abc import Callable

from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import line_is_alive
from kvbm.leader.rates import PrefillRate
from kvbm.leader.sequences import TrackedSequence

__all__ = ["SECS_MAX", "TOKENS_MIN", "UNMEASURED_TOKENS_PER_SEC", "Arrivals"]

SECS_MAX = 5.0
TOKENS_MIN = 256
UNMEASURED_TOKENS_PER_SEC = 20_000.0
"""Rate of an engine that has computed nothing yet: a fast one's, so that waits are short."""


class Arrivals:
    """What is being filled in the host tier, and who waits for it.

    Parameters
    ----------
    table : OperationTable
        The leader's handle on the segment.
    block_tokens : int
        Tokens in a block.
    prefill : PrefillRate
        How fast this engine computes.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self,
        table: OperationTable,
        block_tokens: int,
        prefill: PrefillRate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = table
        self._block_tokens = block_tokens
        self._prefill = prefill
        self._clock = clock

    def worth_a_wait(self, sequence: TrackedSequence, first: int, stop: int) -> bool:
        """Return whether a sequence is to ask again, since blocks from `first` on are coming."""
        if sequence.has_waited:
            return False
        coming = self._coming(sequence, first, stop)
        if sequence.waits_since is None:
            if coming * self._block_tokens < TOKENS_MIN:
                return False
            sequence.waits_since, sequence.waits_from = self._clock(), first
        tokens = (first + coming - sequence.waits_from) * self._block_tokens
        rate = self._prefill.tokens_per_sec or UNMEASURED_TOKENS_PER_SEC
        waited = self._clock() - sequence.waits_since
        if coming and waited < min(SECS_MAX, tokens / rate):
            return True
        sequence.has_waited = True
        return False

    def _coming(self, sequence: TrackedSequence, first: int, stop: int) -> int:
        """Blocks from `first` on that live engines fill now in all groups that lack them."""
        counts = []
        for group in sequence.groups:
            count, leader = self._table.filling(group.keys, first, stop)
            if count == 0:
                continue  # it has the block, or will not get it: then the match stays short
            if leader is None or not line_is_alive(self._table.segment, leader):
                return 0
            counts.append(count)
        return min(counts, default=0)
