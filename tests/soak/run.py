# SPDX-License-Identifier: Apache-2.0
"""Starts the engines of a soak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.vllm_lab.engine import Message, run_engine
from bench.vllm_lab.results import RunResult
from bench.vllm_lab.settings import KVBM_TRANSFER_CONFIG, EngineSettings
from bench.vllm_lab.workload import Call, Chat, Conversations
from tests.soak.pool import Known, pool_of
from tests.soak.report import EngineSoak
from tests.soak.traffic import Round, end_engine, run_round

SLACK_S = 300.0  # for the start, the draining and the end of an engine
SCHEDULES = {"asynchronous": True, "step by step": False}
END = "end"


@dataclass(frozen=True)
class Soak:
    """How long, how random, how small.

    The host tier is smaller than what the pool's conversations need, and so is the engine's own
    cache by far: blocks are evicted and requests preempted all the time.
    """

    seed: int
    rounds: int
    round_s: float
    host_blocks: int
    schedule: str = "asynchronous"
    device_blocks: int = 64
    chunk_tokens: int = 192  # of a step: longer prompts are computed in chunks


def settings(model: Path, soak: Soak, kvbm: bool) -> EngineSettings:
    """Settings of the engine, or of its reference, which differs in the connector alone."""
    plain = EngineSettings(
        model=model,
        device_blocks=soak.device_blocks,
        max_num_batched_tokens=soak.chunk_tokens,
        extra_arguments={"async_scheduling": SCHEDULES[soak.schedule]},
    )
    if not kvbm:
        return plain
    return replace(
        plain,
        logprobs=False,
        kv_transfer_config=dict(KVBM_TRANSFER_CONFIG),
        environment={
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(soak.host_blocks),
            "DYN_KVBM_VERIFY_HOST": "1",  # damaged bytes must be noticed
        },
    )


def make_pool(
    model: Path, soak: Soak, conversations: Conversations, log: Path
) -> tuple[Known, ...]:
    """The conversations through an engine without kvbm: each prompt once."""
    run = run_engine(settings(model, soak, kvbm=False), [Chat("reference", conversations)], log)
    return pool_of(run["reference"].requests)


def run_soak(
    model: Path,
    soak: Soak,
    pool: Sequence[Known],
    log: Path,
    on_message: Callable[[Message], None] | None = None,
) -> EngineSoak:
    """One engine under traffic."""
    phases = [
        Call(
            f"round {number}",
            run_round,
            (tuple(pool), f"{soak.seed}/{soak.schedule}/{number}", soak.round_s),
        )
        for number in range(1, soak.rounds + 1)
    ]
    deadline_s = soak.rounds * soak.round_s * 2 + SLACK_S
    result = run_engine(
        settings(model, soak, kvbm=True),
        [*phases, Call(END, end_engine)],
        log,
        on_message,
        deadline_s,
    )
    return _collected(soak, result)


def _collected(soak: Soak, result: RunResult) -> EngineSoak:
    collected = EngineSoak(soak.schedule, left=result[END].value)
    for phase in result.phases.values():
        if isinstance(phase.value, Round):
            collected.rounds.append(phase.value)
            collected.seconds += phase.wall_s
            collected.engine_counters.update(phase.engine_counters)
            collected.kvbm_counters.update(phase.kvbm_counters)
    return collected
