# SPDX-License-Identifier: Apache-2.0
"""What the scheduler side remembers of a vLLM request from one step to the next."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbm.hashing import TokenChain

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class KnownRequest:
    """What was last seen of a request.

    Attributes
    ----------
    request : Request
        vLLM's own object.
    hashes : list of bytes
        vLLM's block hashes of it, a list that grows.
    chain : TokenChain or None
        Our own hashes; None if vLLM's serve.
    multimodal : int
        Number of its multimodal inputs: a streaming session gets more.
    preemptions : int
        How often it was preempted.
    settled : int
        Blocks before this one need no look any more; -1 if that is not known.
    asked, loaded, from_disk : int
        Blocks that the last look-up was about, that were loaded after it, and those of these that
        the look-up had brought from disk.
    """

    request: "Request"
    hashes: list[bytes]
    chain: TokenChain | None
    multimodal: int
    preemptions: int
    settled: int = -1
    asked: int = 0
    loaded: int = 0
    from_disk: int = 0
