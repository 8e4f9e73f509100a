# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.demo import scenario as demo_scenario
from bench.demo.scenario import PRESETS, Scenario, make_scenario


@pytest.fixture(autouse=True)
def no_model_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_scenario, "make_model", lambda folder, shape: folder / "model")


def scenario(device: str = "cpu", conversations: int = 8, turns: int = 4) -> Scenario:
    return make_scenario(device, conversations, turns, None, 8, Path("models"))


@pytest.mark.parametrize("device", PRESETS)
def test_the_engines_differ_in_the_connector_only(device: str) -> None:
    result = scenario(device)
    with_kvbm = result.with_kvbm
    assert with_kvbm.kv_transfer_config is not None
    assert with_kvbm.environment == {"DYN_KVBM_CPU_CACHE_GB": str(PRESETS[device].host_gb)}
    assert replace(with_kvbm, kv_transfer_config=None, environment={}) == result.without


@pytest.mark.parametrize("device", PRESETS)
def test_the_working_set_is_larger_than_the_device_and_fits_in_the_host_tier(device: str) -> None:
    result = scenario(device)
    plan = result.conversations
    assert plan.count * plan.shortest_history_tokens() > result.without.device_tokens()
    kv_bytes = plan.count * plan.longest_tokens() * PRESETS[device].shape.kv_bytes_per_token()
    assert kv_bytes < result.host_gb * 1e9


def test_the_longest_request_fits_in_the_engine() -> None:
    result = scenario(conversations=4, turns=20)
    assert result.without.max_model_len > result.conversations.longest_tokens()
    assert result.without.device_tokens() > result.without.max_model_len


@pytest.mark.parametrize(("conversations", "turns"), [(1, 4), (8, 1)])
def test_a_workload_that_fits_in_the_device_is_refused(conversations: int, turns: int) -> None:
    with pytest.raises(ValueError, match=f"--conversations={conversations} --turns={turns}"):
        scenario(conversations=conversations, turns=turns)
