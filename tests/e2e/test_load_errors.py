# SPDX-License-Identifier: Apache-2.0
"""Loads that fail at every step: the engine computes what did not come, and nothing is left.

kv_load_failure_policy is not given: vLLM's default would end these requests with an error, as
DYN_KVBM_LOAD_FAILURE_POLICY=fail does.
"""

from __future__ import annotations

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call
from tests.e2e import load_faults
from tests.e2e.lab import Lab
from tests.e2e.load_faults import FAULTS
from tests.e2e.test_lives import Expected, assert_outputs, life

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# The copies run and are refused; the others never begin, or arrive and are reported late.
REFUSED = {"damaged_bytes", "damaged_slot_headers"}
# What the connector counts as a surprise.
UNEXPECTED = set(FAULTS) - REFUSED


@pytest.fixture(scope="module")
def expected(lab: Lab) -> Expected:
    return Expected(lab)


@pytest.fixture(scope="module")
def faults_possible(lab: Lab) -> None:
    """Faults are put into the worker, which must be in the engine's process for that."""
    run = lab.run(lab.with_kvbm(), Call("look", load_faults.worker_is_here))
    if not run["look"].value:
        pytest.skip("this vLLM has its worker in a process of its own")


@pytest.fixture(scope="module", params=[False, True], ids=["step by step", "asynchronous"])
def run(
    lab: Lab, expected: Expected, faults_possible: None, request: pytest.FixtureRequest
) -> RunResult:
    """One engine that meets all faults; the last one ends its copy thread."""
    settings = lab.with_kvbm(
        environment={"DYN_KVBM_VERIFY_HOST": "1"},
        device_blocks=96,
        logprobs=False,
        extra_arguments={"async_scheduling": request.param},
    )
    one, two, three, *_ = expected.prompts
    return lab.run(
        settings,
        *(Call(fault, load_faults.load_with_fault, (one, two, fault)) for fault in FAULTS),
        Call("cancelled", load_faults.cancelled_load, (one,)),
        Call("thread", load_faults.copy_thread_ends, (one, [two, three, one, two])),
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_outputs_are_equal_whatever_fails(run: RunResult, expected: Expected, fault: str) -> None:
    lived = life(run, fault)
    one, two, *_ = expected.prompts
    assert_outputs(lived, expected, one, ("first", "loaded", "again"))
    assert_outputs(lived, expected, two, ["other"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_in_the_counters(run: RunResult, fault: str) -> None:
    facts = life(run, fault).facts
    assert (facts["loads failed"] > 0) == (fault in REFUSED)
    assert (run[fault].kvbm_counters["kvbm_errors"] > 0) == (fault in UNEXPECTED)


def test_a_cancelled_load_is_computed(run: RunResult, expected: Expected) -> None:
    lived = life(run, "cancelled")
    assert_outputs(lived, expected, expected.prompts[0], ("first", "loaded"))
    assert lived.facts["loads cancelled"] > 0


def test_without_its_copy_thread_the_engine_goes_on(run: RunResult, expected: Expected) -> None:
    lived = life(run, "thread")
    one, two, three, *_ = expected.prompts
    assert_outputs(lived, expected, one, ("first", "loaded", "other 2"))
    assert_outputs(lived, expected, two, ("other 0", "other 3"))
    assert_outputs(lived, expected, three, ["other 1"])
    assert not lived.facts["copying"]


def test_nothing_is_left_after_any_fault(run: RunResult) -> None:
    for name in run.phases:
        facts = life(run, name).facts
        left = {fact: facts[fact] for fact in ("in use", "held", "tracked")}
        assert left == {"in use": 0, "held": 0, "tracked": 0}, name


def test_with_the_policy_fail_the_request_whose_load_fails_ends_with_an_error(
    lab: Lab, expected: Expected, faults_possible: None
) -> None:
    environment = {"DYN_KVBM_VERIFY_HOST": "1", "DYN_KVBM_LOAD_FAILURE_POLICY": "fail"}
    settings = lab.with_kvbm(environment=environment, device_blocks=96, logprobs=False)
    one, two, *_ = expected.prompts
    other = two[::-1]  # shares nothing, so that no block of it is damaged
    call = Call("damaged", load_faults.load_with_fault, (one, other, "damaged_bytes"))
    lived = life(lab.run(settings, call), "damaged")
    assert lived.reasons == dict.fromkeys(("first", "other", "again"), "length") | {
        "loaded": "error"
    }
    assert lived.outputs["loaded"] == ()
    assert_outputs(lived, expected, one, ("first", "again"))
    assert lived.facts["in use"] == 0
