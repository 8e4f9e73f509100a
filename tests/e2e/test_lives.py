# SPDX-License-Identifier: Apache-2.0
"""Everything that a request can live through, with outputs compared.

Two engines: with steps one after the other and with asynchronous scheduling. The prompts are
computed in chunks. Speculative decoding is in test_speculation.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call
from tests.e2e import lives
from tests.e2e.lab import LAST_TURN, Lab
from tests.e2e.lives import Lives, Tokens

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BLOCK = 32
CHUNK = 96  # tokens a step
SHORT = (1, 5, 31, 32, 33, 63, 64, 65)


class Expected:
    """Prompts and what an engine without kvbm generates for them."""

    def __init__(self, lab: Lab) -> None:
        requests = lab.reference().of_turns(LAST_TURN).requests
        self.prompts: list[Tokens] = [request.prompt for request in requests]
        self._outputs = {request.prompt: request.output for request in requests}

    def output(self, prompt: Tokens) -> Tokens:
        """What is generated for a prompt."""
        return self._outputs[prompt]

    def whole_blocks(self, prompt: Tokens) -> int:
        """Most tokens of a prompt that can come from a cache."""
        return (len(prompt) - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def expected(lab: Lab) -> Expected:
    return Expected(lab)


def phases(prompts: list[Tokens]) -> list[Call]:
    """All lives, in one engine."""
    one, two, *_ = prompts
    return [
        Call("all", lives.all_at_once, (prompts,)),
        Call("same", lives.same_prompt_many_times, (one, 6)),
        Call("waiting", lives.aborted_while_waiting, (prompts[:3],)),
        Call("loading", lives.aborted_while_loading, (one, two)),
        Call("running", lives.aborted_while_running, (one,)),
        Call("aborted storing", lives.ended_while_storing, (one, two, True)),
        Call("finished storing", lives.ended_while_storing, (one, two, False)),
        Call("preempted", lives.preempted, (prompts[:3], False)),
        Call("preempted storing", lives.preempted, (prompts[:3], True)),
        Call("reset running", lives.reset_while_running, (one,)),
        Call("reset loading", lives.reset_while_loading, (one,)),
        Call("samples", lives.parallel_samples, (one, 3)),
        Call("short", lives.short_prompts, (one, SHORT)),
        Call("logprobs", lives.prompt_logprobs, (one,)),
        Call("salted", lives.salted, (one,)),
        Call("paused", lives.paused, (one,)),
    ]


ENGINES: dict[str, dict[str, Any]] = {
    "step by step": {"async_scheduling": False},
    "asynchronous": {"async_scheduling": True},
}


@pytest.fixture(scope="module", params=list(ENGINES))
def run(lab: Lab, expected: Expected, request: pytest.FixtureRequest) -> RunResult:
    """One engine in which all of it happens."""
    settings = lab.with_kvbm(
        environment={"DYN_KVBM_VERIFY_HOST": "1"},
        max_num_batched_tokens=CHUNK,
        device_blocks=96,
        logprobs=False,
        extra_arguments=ENGINES[request.param],
    )
    return lab.run(settings, *phases(expected.prompts))


def life(run: RunResult, name: str) -> Lives:
    """What came out of one of them."""
    value = run[name].value
    assert isinstance(value, Lives)
    return value


def assert_outputs(lived: Lives, expected: Expected, prompt: Tokens, names: Iterable[str]) -> None:
    """Fail unless these requests finished with what is expected for the prompt."""
    for name in names:
        assert lived.outputs[name] == expected.output(prompt), name


def test_nothing_is_left_after_any_life(run: RunResult) -> None:
    for name in run.phases:
        facts = life(run, name).facts
        left = {fact: facts[fact] for fact in ("in use", "held", "tracked", "errors")}
        assert left == {"in use": 0, "held": 0, "tracked": 0, "errors": 0}, name


def test_all_at_once(run: RunResult, expected: Expected) -> None:
    lived = life(run, "all")
    for number, prompt in enumerate(expected.prompts):
        assert_outputs(lived, expected, prompt, (f"cold {number}", f"warm {number}"))
    wanted = [expected.whole_blocks(prompt) for prompt in expected.prompts]
    assert sum(lived.facts["cached"]) >= 0.9 * sum(wanted)


def test_the_same_prompt_many_times_at_once(run: RunResult, expected: Expected) -> None:
    lived = life(run, "same")
    prompt = expected.prompts[0]
    names = [f"{when} {number}" for when in ("cold", "warm") for number in range(6)]
    assert_outputs(lived, expected, prompt, names)
    assert lived.facts["published"] == (len(prompt) + lives.OUTPUT_TOKENS - 1) // BLOCK
    assert min(lived.facts["cached"]) == expected.whole_blocks(prompt)


def test_aborted_while_waiting(run: RunResult, expected: Expected) -> None:
    lived = life(run, "waiting")
    assert set(lived.outputs) == {"request 0", "request 2"}
    assert_outputs(lived, expected, expected.prompts[0], ["request 0"])
    assert_outputs(lived, expected, expected.prompts[2], ["request 2"])


def test_aborted_while_loading(run: RunResult, expected: Expected) -> None:
    lived = life(run, "loading")
    one, two, *_ = expected.prompts
    assert_outputs(lived, expected, one, ("first", "again"))
    assert_outputs(lived, expected, two, ["other"])
    assert lived.facts["cached"] == expected.whole_blocks(one)


def test_aborted_while_running(run: RunResult, expected: Expected) -> None:
    lived = life(run, "running")
    assert_outputs(lived, expected, expected.prompts[0], ["again"])
    assert lived.facts["cached"] == expected.whole_blocks(expected.prompts[0])


@pytest.mark.parametrize("how", ["aborted", "finished"])
def test_ended_while_storing(run: RunResult, expected: Expected, how: str) -> None:
    lived = life(run, f"{how} storing")
    one, two, *_ = expected.prompts
    assert_outputs(lived, expected, one, ["again"] if how == "aborted" else ["storing", "again"])
    assert_outputs(lived, expected, two, ["other"])
    assert lived.facts["kept"] or not lived.facts["could hold"]
    assert lived.facts["cached"] == expected.whole_blocks(one)


@pytest.mark.parametrize("how", ["preempted", "preempted storing"])
def test_preempted_and_resumed(run: RunResult, expected: Expected, how: str) -> None:
    lived = life(run, how)
    for number in range(3):
        names = (f"request {number}", f"again {number}")
        assert_outputs(lived, expected, expected.prompts[number], names)
    assert lived.facts["loads"] > 0


@pytest.mark.parametrize("when", ["running", "loading"])
def test_the_cache_is_reset_meanwhile(run: RunResult, expected: Expected, when: str) -> None:
    lived = life(run, f"reset {when}")
    assert_outputs(lived, expected, expected.prompts[0], (when, "again"))
    assert lived.facts["cached"] == 0


def test_parallel_samples(run: RunResult, expected: Expected) -> None:
    lived = life(run, "samples")
    wanted = [expected.output(expected.prompts[0])] * 3
    assert lived.facts["cold"] == lived.facts["warm"] == wanted


def test_prompts_around_the_size_of_a_block(run: RunResult) -> None:
    lived = life(run, "short")
    for length in SHORT:
        assert lived.outputs[f"warm {length}"] == lived.outputs[f"cold {length}"], length
        assert lived.facts["cached"][length] == (length - 1) // BLOCK * BLOCK


def test_logprobs_of_a_prompt_are_computed(run: RunResult, expected: Expected) -> None:
    lived = life(run, "logprobs")
    assert_outputs(lived, expected, expected.prompts[0], ("first", "logprobs"))
    assert lived.facts["cached"] == 0


def test_requests_with_different_salts_share_nothing(run: RunResult, expected: Expected) -> None:
    lived = life(run, "salted")
    assert_outputs(lived, expected, expected.prompts[0], lived.outputs)
    whole = expected.whole_blocks(expected.prompts[0])
    alone = {"none": 0, "a": 0, "b": 0, "c": 0}
    again = {"none again": whole, "a again": whole, "b again": whole}
    assert lived.facts["cached"] == alone | again


def test_paused_for_new_weights(run: RunResult, expected: Expected) -> None:
    lived = life(run, "paused")
    assert_outputs(lived, expected, expected.prompts[0], ["after"])
    assert lived.facts["cached"] == 0


def test_a_prompt_longer_than_the_tier(lab: Lab, expected: Expected) -> None:
    settings = lab.with_kvbm(
        environment={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "5"},
        prefix_caching=False,
        logprobs=False,
    )
    run = lab.run(settings, Call("all", lives.all_at_once, (expected.prompts[:3],)))
    for number, prompt in enumerate(expected.prompts[:3]):
        names = (f"cold {number}", f"warm {number}")
        assert_outputs(life(run, "all"), expected, prompt, names)
