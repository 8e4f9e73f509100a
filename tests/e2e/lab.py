# SPDX-License-Identifier: Apache-2.0
"""Engines for the tests: the same tiny model and traffic, checked for leftovers after each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.vllm_lab.compare import LOGPROB_TOLERANCE, compare
from bench.vllm_lab.engine import EngineRun
from bench.vllm_lab.model import ModelShape, make_model
from bench.vllm_lab.processes import existing_names
from bench.vllm_lab.results import PhaseResult, RunResult
from bench.vllm_lab.settings import KVBM_TRANSFER_CONFIG, EngineSettings
from bench.vllm_lab.workload import Chat, Conversations, Phase, Prompt

TRAFFIC = Conversations()
LAST_TURN = TRAFFIC.turns - 1
HOST_GB = "0.1"  # several times the blocks of the traffic


class Lab:
    """Starts engines in a folder of its own.

    Parameters
    ----------
    folder : Path
        For the model and the logs.
    **settings
        Of all engines, by field of `EngineSettings`.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._folder = folder
        model = make_model(folder / "models", ModelShape())
        self._settings = EngineSettings(model=model, **settings)
        self._runs = 0
        self._reference: PhaseResult | None = None

    def plain(self, **changes: Any) -> EngineSettings:
        """Settings of an engine without a connector."""
        return replace(self._settings, **changes)

    def with_kvbm(
        self, environment: dict[str, str] | None = None, **changes: Any
    ) -> EngineSettings:
        """Settings of an engine with kvbm and a host tier in which all of the traffic fits."""
        variables = {"DYN_KVBM_CPU_CACHE_GB": HOST_GB} | (environment or {})
        config = dict(KVBM_TRANSFER_CONFIG)
        return self.plain(kv_transfer_config=config, environment=variables, **changes)

    def start(self, settings: EngineSettings, phases: Sequence[Phase]) -> EngineRun:
        """Start an engine; the caller ends it."""
        return EngineRun(settings, phases, self.new_log())

    def new_log(self) -> Path:
        """File for the output of one more engine."""
        self._runs += 1
        return self._folder / f"engine-{self._runs}.log"

    def run(self, settings: EngineSettings, *phases: Phase) -> RunResult:
        """Run an engine to its end; if its cache is a private one, nothing of it may be left."""
        with self.start(settings, phases) as engine:
            result = engine.result()
        if settings.kv_transfer_config is not None:
            assert result.shared_objects, "kvbm had nothing in shared memory"
        if "DYN_KVBM_INSTANCE" not in settings.environment:
            assert existing_names(result.shared_objects) == []
        return result

    def reference(self) -> PhaseResult:
        """The traffic through an engine without a connector, run once a session.

        Its outputs must be safe to compare with: no token may lead the next best by so little that
        the rounding of another batch composition could change it.
        """
        if self._reference is None:
            phase = self.run(self.plain(), Chat("reference", TRAFFIC))["reference"]
            assert min(request.margin for request in phase.requests) > LOGPROB_TOLERANCE
            self._reference = phase
        return self._reference

    def last_prompts(self) -> tuple[Prompt, ...]:
        """The prompts of the last turn: the whole histories."""
        requests = self.reference().of_turns(LAST_TURN).requests
        return tuple(request.as_prompt() for request in requests)


def assert_same_outputs(reference: PhaseResult, *phases: PhaseResult) -> None:
    """Fail unless each phase has the outputs of the reference, for the turns that it holds."""
    for phase in phases:
        turns = {request.turn for request in phase.requests}
        comparison = compare(reference.of_turns(*turns), phase)
        assert comparison.equal, f"{phase.name}: {comparison}"
        assert {request.finish_reason for request in phase.requests} == {"length"}


def device_turnovers(phase: PhaseResult, settings: EngineSettings) -> float:
    """How often the phase filled the device's cache: tokens that came into it over its size."""
    entered = phase.computed_tokens + phase.external_hit_tokens + phase.output_tokens
    return entered / settings.device_tokens()


def reusable_tokens(phase: PhaseResult) -> int:
    """What a cache that forgets nothing could have provided."""
    return sum(request.reusable_tokens for request in phase.requests)


def cached_tokens(phase: PhaseResult) -> int:
    """Prompt tokens that were not computed, as the requests report them."""
    return sum(request.cached_tokens for request in phase.requests)


def requests_with_generated_tokens_reused(phase: PhaseResult, block_size: int) -> int:
    """Requests of later turns whose reused tokens reach into what the turn before generated.

    A hit ends at a block border, so it must cover a whole block that ends behind the last prompt.
    """
    prompts = {request.key: len(request.prompt) for request in phase.requests}
    count = 0
    for request in phase.requests:
        before = prompts.get((request.conversation, request.turn - 1))
        if before is not None and request.cached_tokens > before // block_size * block_size:
            count += request.cached_tokens > before
    return count
