# SPDX-License-Identifier: Apache-2.0
"""What a run gives back: plain data, picklable, without anything of the engine."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench.vllm_lab.workload import Prompt


@dataclass(frozen=True)
class RequestResult:
    """One finished request."""

    conversation: int
    turn: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the chosen tokens; empty when the run did not ask for them
    margin: float  # least lead, in logprob, of a chosen token over the next best; inf if not asked
    cached_tokens: int  # prompt tokens that were not computed, from whatever tier
    reusable_tokens: int  # what a cache that forgets nothing could have provided
    ttft_s: float
    finish_reason: str

    @property
    def key(self) -> tuple[int, int]:
        """Place in the conversations: (conversation, turn)."""
        return self.conversation, self.turn

    def as_prompt(self) -> Prompt:
        """The request's prompt, to be sent again."""
        return Prompt(self.conversation, self.turn, self.prompt)


@dataclass(frozen=True)
class PhaseResult:
    """One phase: its requests in the order sent, and how far the counters moved in it."""

    name: str
    requests: tuple[RequestResult, ...] = ()
    wall_s: float = 0.0
    engine_counters: dict[str, float] = field(default_factory=dict)
    kvbm_counters: dict[str, float] = field(default_factory=dict)
    value: Any = None

    def of_turns(self, *turns: int) -> "PhaseResult":
        """The phase with the requests of these turns only; its counters stay those of all."""
        kept = tuple(request for request in self.requests if request.turn in turns)
        return replace(self, requests=kept)

    def counter(self, name: str) -> int:
        """Movement of one of the engine's counters, 0 if it has no such counter."""
        return int(self.engine_counters.get(name, 0))

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Generated tokens of all requests."""
        return sum(len(request.output) for request in self.requests)

    @property
    def device_hit_tokens(self) -> int:
        """Prompt tokens found in the engine's own prefix cache."""
        return self.counter("prompt_tokens_by_source/local_cache_hit")

    @property
    def external_hit_tokens(self) -> int:
        """Prompt tokens that the connector provided, from all of its tiers."""
        return self.counter("prompt_tokens_by_source/external_kv_transfer")

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the engine computed."""
        return self.counter("prompt_tokens_by_source/local_compute")

    def tier_hit_tokens(self) -> dict[str, int]:
        """Prompt tokens reused, by tier.

        vLLM splits them by source from 0.32 on; before that, all that a connector provides is
        called "host".
        """
        prefix = "prompt_tokens_cached_by_source/"
        tiers = {
            name.removeprefix(prefix): int(value)
            for name, value in self.engine_counters.items()
            if name.startswith(prefix) and value
        }
        if tiers or not self.external_hit_tokens + self.device_hit_tokens:
            return tiers
        return {"device": self.device_hit_tokens, "host": self.external_hit_tokens}

    def ttft_ms(self) -> tuple[float, float]:
        """Mean and 99th percentile of the time to the first token, in milliseconds."""
        times = np.array([request.ttft_s for request in self.requests]) * 1e3
        return float(times.mean()), float(np.percentile(times, 99))


@dataclass(frozen=True)
class RunResult:
    """One engine, from its start to its end."""

    phases: dict[str, PhaseResult]
    start_s: float  # from the process to an engine that takes requests
    shared_objects: tuple[str, ...]  # /dev/shm names of kvbm that its processes had mapped

    def __getitem__(self, name: str) -> PhaseResult:
        """The phase of that name."""
        return self.phases[name]
