# SPDX-License-Identifier: Apache-2.0
"""What the scheduler side remembers of a TensorRT-LLM request from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbm.hashing import TokenChain

EXTRA_TOKENS = 128
"""Places that TensorRT-LLM may allocate beyond a prompt, for draft tokens, at most."""


@dataclass
class KnownRequest:
    """What was last seen of a request.

    Attributes
    ----------
    request : LlmRequest or None
        TensorRT-LLM's own object, once it has given it; what a look-up gets is a copy.
    chain : TokenChain
        Its tokens, and the hashes of its complete blocks.
    computed : int
        Tokens that TensorRT-LLM found on the device at its admission.
    blocks : list of int
        Its device blocks.
    priorities : list of int
        Retention priority of each of them.
    started : bool
        It has been in a scheduler output.
    seen : int
        The step that it was last in.
    asked, promised, loaded : int
        Blocks that the look-up was about, that TensorRT-LLM was promised, that were submitted.
    unended : list of int
        Operations of its load that have not ended on all ranks.
    arrived : bool
        All of those that have ended have arrived.
    settled : int
        Blocks before this one need no look any more.
    given_up : bool
        Nothing of it is stored; it is kept for its load.
    finished : bool
        TensorRT-LLM is done with it, and keeps its device blocks until its load has ended.
    """

    chain: TokenChain
    request: Any = None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    started: bool = False
    seen: int = 0
    asked: int = 0
    promised: int = 0
    loaded: int = 0
    unended: list[int] = field(default_factory=list)
    arrived: bool = True
    settled: int = 0
    given_up: bool = False
    finished: bool = False

    @property
    def is_over(self) -> bool:
        """Whether TensorRT-LLM is done with it, also where it has not said so."""
        try:
            return bool(self.request.is_finished or self.request.is_generation_complete_state)
        except AttributeError:  # it cannot be told
            return True

    def place(self, block_ids: Sequence[int], block_tokens: int) -> None:
        """Note the device blocks of its admission.

        Raises
        ------
        ValueError
            They cannot be those of its tokens.
        """
        tokens = self.chain.total_tokens
        needed, more = -(-tokens // block_tokens), 1 + -(-EXTRA_TOKENS // block_tokens)
        if not needed <= len(block_ids) <= needed + more:
            raise ValueError(
                f"{tokens} tokens have {len(block_ids)} blocks: those of TensorRT-LLM have not "
                f"{block_tokens} tokens"
            )
        self.blocks = list(block_ids)
        self.check_places()

    def check_places(self) -> None:
        """Refuse blocks that have no place on the device.

        Raises
        ------
        ValueError
            There is one.
        """
        if any(block < 0 for block in self.blocks):
            raise ValueError("it has blocks without a place on the device")

    def may_be_offloaded(self, upto: int, least: int) -> tuple[int, int]:
        """Return how far blocks before `upto` may be offloaded, and the least of their priorities.

        They may up to the first with a priority below `least`. Blocks without one have 0, as
        upstream.
        """
        given = self.priorities[:upto]
        priorities = given + [0] * (upto - len(given))
        if least > 0:
            low = (number for number, value in enumerate(priorities) if value < least)
            upto = next(low, upto)
        return upto, min(priorities[self.settled : upto], default=0)
