# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from bench.vllm_lab.counters import difference
from bench.vllm_lab.results import PhaseResult

BY_SOURCE = {
    "prompt_tokens_by_source/local_cache_hit": 32.0,
    "prompt_tokens_by_source/external_kv_transfer": 64.0,
    "prompt_tokens_by_source/local_compute": 5.0,
}


def test_tiers_are_those_that_the_engine_names() -> None:
    named = BY_SOURCE | {
        "prompt_tokens_cached_by_source/device": 32.0,
        "prompt_tokens_cached_by_source/host": 60.0,
        "prompt_tokens_cached_by_source/disk": 4.0,
        "prompt_tokens_cached_by_source/p2p": 0.0,
    }
    phase = PhaseResult("phase", engine_counters=named)
    assert phase.tier_hit_tokens() == {"device": 32, "host": 60, "disk": 4}


def test_an_engine_that_names_no_tiers_has_device_and_host() -> None:
    phase = PhaseResult("phase", engine_counters=BY_SOURCE)
    assert phase.tier_hit_tokens() == {"device": 32, "host": 64}
    assert (phase.device_hit_tokens, phase.external_hit_tokens) == (32, 64)
    assert phase.computed_tokens == 5


def test_a_counter_that_appears_meanwhile_counts_from_zero() -> None:
    assert difference({"a": 5.0, "b": 2.0}, {"a": 3.0}) == {"a": 2.0, "b": 2.0}
