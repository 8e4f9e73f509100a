# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding in real vLLM on a device, as in tests/e2e/test_speculation.py.

Steps are CUDA graphs, scheduled one after the other: with asynchronous scheduling vLLM looks up its
drafts on the device, by code that it must be allowed to compile.
"""

from __future__ import annotations

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call
from tests.e2e import lives
from tests.e2e.lab import Lab
from tests.e2e.test_lives import CHUNK, Expected
from tests.e2e.test_speculation import (
    NGRAM,
    test_a_request_that_ends_while_it_stores_leaves_good_blocks,
    test_nothing_is_left,
    test_outputs_are_those_without_speculation_and_without_kvbm,
    test_preempted_requests_give_the_same_outputs,
    test_tokens_were_proposed,
)

__all__ = [
    "test_a_request_that_ends_while_it_stores_leaves_good_blocks",
    "test_nothing_is_left",
    "test_outputs_are_those_without_speculation_and_without_kvbm",
    "test_preempted_requests_give_the_same_outputs",
    "test_tokens_were_proposed",
]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


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
