# SPDX-License-Identifier: Apache-2.0
"""Everything that a request can live through, in real vLLM on a device, with outputs compared.

The tests are those of tests/e2e/test_lives.py; steps are CUDA graphs and scheduled asynchronously.
In the second engine all copies are slow, so that aborts, preemptions and resets meet them in
flight.
"""

from __future__ import annotations

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call
from tests.e2e import lives
from tests.e2e.lab import Lab
from tests.e2e.test_lives import (
    CHUNK,
    Expected,
    life,
    phases,
    test_a_prompt_longer_than_the_tier,
    test_aborted_while_loading,
    test_aborted_while_running,
    test_aborted_while_waiting,
    test_all_at_once,
    test_ended_while_storing,
    test_logprobs_of_a_prompt_are_computed,
    test_nothing_is_left_after_any_life,
    test_parallel_samples,
    test_paused_for_new_weights,
    test_preempted_and_resumed,
    test_prompts_around_the_size_of_a_block,
    test_requests_with_different_salts_share_nothing,
    test_the_cache_is_reset_meanwhile,
    test_the_same_prompt_many_times_at_once,
)
from tests.gpu import device_lives

__all__ = [
    "test_a_prompt_longer_than_the_tier",
    "test_aborted_while_loading",
    "test_aborted_while_running",
    "test_aborted_while_waiting",
    "test_all_at_once",
    "test_ended_while_storing",
    "test_logprobs_of_a_prompt_are_computed",
    "test_nothing_is_left_after_any_life",
    "test_parallel_samples",
    "test_paused_for_new_weights",
    "test_preempted_and_resumed",
    "test_prompts_around_the_size_of_a_block",
    "test_requests_with_different_salts_share_nothing",
    "test_the_cache_is_reset_meanwhile",
    "test_the_same_prompt_many_times_at_once",
]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ASYNCHRONOUS = {"async_scheduling": True}


@pytest.fixture(scope="module")
def expected(lab: Lab) -> Expected:
    return Expected(lab)


@pytest.fixture(scope="module")
def runs(lab: Lab, expected: Expected) -> dict[str, RunResult]:
    """The engines, with normal and with slow copies."""
    settings = lab.with_kvbm(
        environment={"DYN_KVBM_VERIFY_HOST": "1"},
        max_num_batched_tokens=CHUNK,
        device_blocks=96,
        logprobs=False,
        extra_arguments=ASYNCHRONOUS,
    )
    all_of_it = phases(expected.prompts)
    slow = Call("slow", device_lives.slow_copies)
    normal = Call("normal", device_lives.copies_are_normal)
    return {
        "graphs": lab.run(settings, *all_of_it),
        "copies in flight": lab.run(settings, slow, *all_of_it, normal),
    }


@pytest.fixture(params=["graphs", "copies in flight"])
def run(runs: dict[str, RunResult], request: pytest.FixtureRequest) -> RunResult:
    """One engine's lives."""
    found = runs[request.param]
    kept = {name: phase for name, phase in found.phases.items() if name not in ("slow", "normal")}
    return RunResult(kept, found.start_s, found.shared_objects)


def test_stores_were_stopped_in_flight(runs: dict[str, RunResult]) -> None:
    assert runs["copies in flight"]["normal"].value > 0


def test_a_store_that_does_not_wait_for_the_forward_pass_changes_outputs(
    lab: Lab, expected: Expected
) -> None:
    settings = lab.with_kvbm(
        max_num_batched_tokens=CHUNK,
        device_blocks=96,
        logprobs=False,
        extra_arguments=ASYNCHRONOUS,
    )
    prompts = expected.prompts[:3]
    early = Call("early", device_lives.early_stores)
    run = lab.run(settings, early, Call("all", lives.all_at_once, (prompts,)))
    lived = life(run, "all")
    for number, prompt in enumerate(prompts):
        assert lived.outputs[f"cold {number}"] == expected.output(prompt)
        assert lived.outputs[f"warm {number}"] != expected.output(prompt)
