# SPDX-License-Identifier: Apache-2.0
"""What the scheduler side remembers of a TensorRT-LLM request from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvbm.hashing import TokenChain


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
