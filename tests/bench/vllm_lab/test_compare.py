# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest

from bench.vllm_lab.compare import LOGPROB_TOLERANCE, compare
from bench.vllm_lab.results import PhaseResult, RequestResult

REQUEST = RequestResult(
    conversation=0,
    turn=0,
    prompt=(5, 6, 7),
    output=(8, 9),
    logprobs=(-0.5, -1.0),
    margin=0.2,
    cached_tokens=0,
    reusable_tokens=0,
    ttft_s=0.1,
    finish_reason="length",
)
PHASE = PhaseResult("reference", (REQUEST, replace(REQUEST, turn=1)))


def changed(**changes: object) -> PhaseResult:
    return PhaseResult("other", (REQUEST, replace(REQUEST, turn=1, **changes)))


def test_equal_phases_are_equal_in_any_order() -> None:
    comparison = compare(PHASE, PhaseResult("other", PHASE.requests[::-1]))
    assert comparison.equal
    assert comparison.requests == 2


def test_another_token_is_a_difference() -> None:
    comparison = compare(PHASE, changed(output=(8, 10)))
    assert not comparison.equal
    assert comparison.tokens_differ == ((0, 1),)


def test_fewer_tokens_are_a_difference() -> None:
    assert not compare(PHASE, changed(output=(8,), logprobs=(-0.5,))).equal


def test_another_prompt_is_a_difference_of_its_own_kind() -> None:
    comparison = compare(PHASE, changed(prompt=(5, 6, 8)))
    assert not comparison.equal
    assert comparison.prompt_differs == ((0, 1),)
    assert comparison.tokens_differ == ()


def test_equal_tokens_with_other_logprobs_are_a_difference() -> None:
    noise = replace(REQUEST, logprobs=(-0.5, -1.0 + LOGPROB_TOLERANCE / 2)).logprobs
    assert compare(PHASE, changed(logprobs=noise)).equal
    wrong = replace(REQUEST, logprobs=(-0.5, -1.0 + 2 * LOGPROB_TOLERANCE)).logprobs
    assert not compare(PHASE, changed(logprobs=wrong)).equal


def test_nothing_compared_is_not_equal() -> None:
    assert not compare(PhaseResult("a"), PhaseResult("b")).equal


def test_phases_of_other_requests_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        compare(PHASE, PHASE.of_turns(0))
    with pytest.raises(ValueError, match="more than once"):
        compare(PHASE, PhaseResult("twice", (REQUEST, REQUEST)))
