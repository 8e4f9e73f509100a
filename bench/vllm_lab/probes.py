# SPDX-License-Identifier: Apache-2.0
"""What a `Call` phase asks of an engine that has everything in one process."""

import urllib.request
from collections.abc import Sequence
from typing import Any

from bench.vllm_lab.workload import Prompt

# An idle engine finishes in a handful; a request that never ends must not hang the run.
STEPS_MAX = 100_000


def blocks_in_use(llm: Any) -> int:
    """Device blocks held by requests once the engine has nothing to do (engine in this process).

    Blocks whose copy is in flight are given back in later steps, so the engine is stepped until it
    says that it has finished everything; a request that never ends shows as a block in use.
    """
    core = llm.llm_engine.engine_core.engine_core
    for _ in range(STEPS_MAX):
        if not core.scheduler.has_requests():
            break
        core.step_fn()
    pool = core.scheduler.kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


def uses_seen_by_policy(llm: Any) -> int:
    """Requests that kvbm's policy of eviction was asked about; 0 if it has none, or it failed."""
    core = llm.llm_engine.engine_core.engine_core
    uses = core.scheduler.connector._leader.leader.table.uses  # no hook has it
    return 0 if uses is None else int(uses.last)


def abort_after_steps(llm: Any, prompts: Sequence[Prompt], steps: int) -> int:
    """Submit prompts, step the engine, and abort what is not finished by then.

    Returns
    -------
    int
        Requests that were aborted.
    """
    from vllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    names = [f"abort-{steps}-{number}" for number in range(len(prompts))]
    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, TokensPrompt(prompt_token_ids=list(prompt.tokens)), sampling)
    finished = sum(bool(output.finished) for _ in range(steps) for output in engine.step())
    engine.abort_request(names)
    return len(names) - finished


def scrape(llm: Any, port: int) -> dict[str, float]:
    """Metrics that the engine serves on a port of its own: those without labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
