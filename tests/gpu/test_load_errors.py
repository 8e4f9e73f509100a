# SPDX-License-Identifier: Apache-2.0
"""Errors of the CUDA driver in the copies of real vLLM: the engine computes what did not come.

The driver is the real one, whose calls come back with an error on request (failing_driver.c).
"""

from __future__ import annotations

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call
from tests.e2e.lab import Lab
from tests.e2e.test_lives import Expected, assert_outputs, life
from tests.gpu import device_lives
from tests.gpu.failing_driver import KINDS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def expected(lab: Lab) -> Expected:
    return Expected(lab)


@pytest.fixture(scope="module", params=[False, True], ids=["step by step", "asynchronous"])
def run(lab: Lab, expected: Expected, request: pytest.FixtureRequest) -> RunResult:
    """One engine whose copies meet all of them; at last they all fail."""
    settings = lab.with_kvbm(
        device_blocks=96, logprobs=False, extra_arguments={"async_scheduling": request.param}
    )
    assert settings.kv_transfer_config is not None
    settings.kv_transfer_config["kv_connector_module_path"] = "tests.gpu.failing_connector"
    one, two, three, *_ = expected.prompts
    return lab.run(
        settings,
        *(Call(kind, device_lives.load_with_cuda_errors, (one, two, kind, 1)) for kind in KINDS),
        Call("off", device_lives.the_tier_gives_up, ((one, two, three),)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_equal_whatever_fails(run: RunResult, expected: Expected, kind: str) -> None:
    lived = life(run, kind)
    one, two, *_ = expected.prompts
    assert_outputs(lived, expected, one, ("first", "loaded", "again"))
    assert_outputs(lived, expected, two, ["other"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_fails_a_load_and_nothing_else(run: RunResult, kind: str) -> None:
    facts = life(run, kind).facts
    assert facts["left"] == 0
    assert facts["loads failed"] > 0
    assert facts["errors"] == 0


def test_after_errors_in_a_row_the_engine_goes_on_without_the_tier(
    run: RunResult, expected: Expected
) -> None:
    lived = life(run, "off")
    for number, prompt in enumerate(expected.prompts[:3]):
        assert_outputs(lived, expected, prompt, (f"lost {number}", f"after {number}"))
    assert lived.facts["off, lost"]
    assert lived.facts["off, after"]


def test_nothing_is_left_after_any_error(run: RunResult) -> None:
    for name in run.phases:
        facts = life(run, name).facts
        left = {fact: facts[fact] for fact in ("in use", "held", "tracked")}
        assert left == {"in use": 0, "held": 0, "tracked": 0}, name
