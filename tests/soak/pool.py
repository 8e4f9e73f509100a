# SPDX-License-Identifier: Apache-2.0
"""Prompts that the traffic draws from, with the greedy output that each must have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.vllm_lab.compare import LOGPROB_TOLERANCE
from bench.vllm_lab.results import RequestResult


@dataclass(frozen=True)
class Known:
    """A prompt, its place in the conversations, and the output of an engine without kvbm."""

    conversation: int
    turn: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]


def pool_of(requests: Sequence[RequestResult]) -> tuple[Known, ...]:
    """Return the requests whose outputs are safe to compare with.

    A token that leads the next best by too little may change with the rounding of another batch
    composition, so a request with such a token is left out.
    """
    return tuple(
        Known(request.conversation, request.turn, request.prompt, request.output)
        for request in requests
        if request.margin > LOGPROB_TOLERANCE
    )
