# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("rich")

from bench.demo.report import document, figures, judge, table
from bench.vllm_lab.results import PhaseResult, RequestResult

REQUESTS = tuple(
    RequestResult(
        conversation=conversation,
        turn=0,
        prompt=tuple(range(100)),
        output=(1, 2, 3),
        logprobs=(),
        margin=0.0,
        cached_tokens=0,
        reusable_tokens=0,
        ttft_s=0.1 * (conversation + 1),
        finish_reason="length",
    )
    for conversation in range(4)
)
WITHOUT = PhaseResult(
    "conversations",
    REQUESTS,
    wall_s=2.0,
    engine_counters={
        "prompt_tokens_by_source/local_cache_hit": 40.0,
        "prompt_tokens_by_source/local_compute": 360.0,
        "prompt_tokens_cached_by_source/device": 40.0,
    },
)
WITH_KVBM = replace(
    WITHOUT,
    engine_counters={
        "prompt_tokens_by_source/local_cache_hit": 40.0,
        "prompt_tokens_by_source/external_kv_transfer": 300.0,
        "prompt_tokens_by_source/local_compute": 60.0,
        "prompt_tokens_cached_by_source/device": 40.0,
        "prompt_tokens_cached_by_source/host": 200.0,
        "prompt_tokens_cached_by_source/external_unspecified": 100.0,
    },
)


def test_figures_are_those_of_the_phase() -> None:
    result = figures(WITH_KVBM)
    assert result.tier_tokens == {"device": 40, "host": 300, "disk": 0, "remote": 0}
    assert result.hit_rate == pytest.approx(340 / 400)
    assert result.ttft_mean_ms == pytest.approx(250.0)
    assert result.ttft_p99_ms == pytest.approx(397.0)
    assert result.output_tokens_per_s == pytest.approx(6.0)


def test_equal_outputs_and_reuse_pass() -> None:
    verdict = judge(WITHOUT, WITH_KVBM)
    assert verdict.passed
    assert verdict.equal


def test_other_outputs_fail() -> None:
    wrong = (*REQUESTS[:3], replace(REQUESTS[3], output=(1, 2, 4)))
    verdict = judge(WITHOUT, replace(WITH_KVBM, requests=wrong))
    assert not verdict.passed
    assert not verdict.equal
    assert "(3, 0)" in verdict.reasons[0]


def test_nothing_reused_fails_though_the_outputs_are_equal() -> None:
    verdict = judge(WITHOUT, WITHOUT)
    assert verdict.equal
    assert verdict.reasons == ("no token was reused through kvbm",)


def test_the_table_leaves_out_tiers_that_do_not_exist() -> None:
    rows = list(table(figures(WITHOUT), figures(WITH_KVBM)).columns[0].cells)
    assert "  reused from host" in rows
    assert "  reused from disk" not in rows


def test_the_document_holds_both_sides_and_the_verdict() -> None:
    sides = figures(WITHOUT), figures(WITH_KVBM)
    result = document(*sides, judge(WITHOUT, WITH_KVBM), {"seed": 8})
    assert result["settings"] == {"seed": 8}
    assert result["passed"] is True
    assert result["with_kvbm"]["tier_tokens"]["host"] == 300
