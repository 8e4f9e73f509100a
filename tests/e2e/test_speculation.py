# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: KV of draft tokens that were rejected is never stored."""

from __future__ import annotations

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call
from tests.e2e import lives
from tests.e2e.lab import Lab
from tests.e2e.test_lives import CHUNK, Expected, assert_outputs, life

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def expected(lab: Lab) -> Expected:
    return Expected(lab)


@pytest.fixture(scope="module")
def run(lab: Lab, expected: Expected) -> RunResult:
    """One engine that proposes tokens by looking them up in the prompt."""
    settings = lab.with_kvbm(
        environment={"DYN_KVBM_VERIFY_HOST": "1"},
        max_num_batched_tokens=CHUNK,
        device_blocks=96,
        logprobs=False,
        extra_arguments={"async_scheduling": False, "speculative_config": NGRAM},
    )
    one, two, three, *_ = expected.prompts
    return lab.run(
        settings,
        Call("all", lives.all_at_once, ((one, two, three),)),
        Call("finished storing", lives.ended_while_storing, (one, two, False)),
        Call("preempted storing", lives.preempted, ((one, two), True)),
    )


def test_tokens_were_proposed(run: RunResult) -> None:
    assert sum(phase.counter("spec_decode_num_draft_tokens") for phase in run.phases.values()) > 0


def test_outputs_are_those_without_speculation_and_without_kvbm(
    run: RunResult, expected: Expected
) -> None:
    for number, prompt in enumerate(expected.prompts[:3]):
        assert_outputs(life(run, "all"), expected, prompt, (f"cold {number}", f"warm {number}"))


def test_a_request_that_ends_while_it_stores_leaves_good_blocks(
    run: RunResult, expected: Expected
) -> None:
    lived = life(run, "finished storing")
    assert_outputs(lived, expected, expected.prompts[0], ("storing", "again"))
    assert lived.facts["cached"] == expected.whole_blocks(expected.prompts[0])


def test_preempted_requests_give_the_same_outputs(run: RunResult, expected: Expected) -> None:
    lived = life(run, "preempted storing")
    for number, prompt in enumerate(expected.prompts[:2]):
        names = (f"request {number}", f"again {number}")
        assert_outputs(lived, expected, prompt, names)


def test_nothing_is_left(run: RunResult) -> None:
    for name in run.phases:
        facts = life(run, name).facts
        left = {fact: facts[fact] for fact in ("in use", "held", "tracked", "errors")}
        assert left == {"in use": 0, "held": 0, "tracked": 0, "errors": 0}, name
