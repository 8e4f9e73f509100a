# SPDX-License-Identifier: Apache-2.0
"""Real vLLM publishes its KV events over ZMQ; what the consolidator makes of them is the truth."""

from __future__ import annotations

from typing import Any

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call, Chat, ResetPrefixCache
from kvbm.events.model import Tier
from tests.e2e.events import settled_tiers, steps_with_a_router
from tests.e2e.lab import TRAFFIC, Lab, assert_same_outputs
from tests.events.sockets import free_base_port
from tests.metrics.scrape import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(lab: Lab) -> RunResult:
    """An engine with a small host tier, so that blocks leave it as well."""
    port = free_base_port()
    endpoints = f"tcp://127.0.0.1:{port + 1000}", f"tcp://127.0.0.1:{port + 2000}"
    events: dict[str, Any] = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{free_port()}",
    }
    settings = lab.with_kvbm(
        {
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "96",
            "DYN_KVBM_LEADER_ZMQ_PUB_PORT": str(port),
        },
        extra_arguments={"kv_events_config": events},
    )
    return lab.run(
        settings,
        Chat("chat", TRAFFIC),
        Call("truth", settled_tiers),
        Call("router", steps_with_a_router, (lab.last_prompts(), *endpoints, 1)),
        ResetPrefixCache("device reset", connector=False),
        Call("truth after device reset", settled_tiers),
        ResetPrefixCache("reset", connector=True),
        Call("truth after reset", settled_tiers),
        Call("router at the end", steps_with_a_router, ((), *endpoints, 2)),
    )


def test_outputs_are_those_of_an_engine_without_kvbm(lab: Lab, run: RunResult) -> None:
    assert_same_outputs(lab.reference(), run["chat"])


def test_a_consolidator_that_comes_late_knows_every_tier_of_every_block(run: RunResult) -> None:
    tiers = set(run["truth"].value.values())
    assert tiers >= {int(Tier.HOST), Tier.DEVICE | Tier.HOST}


def test_a_router_that_is_killed_at_random_knows_every_block(run: RunResult) -> None:
    found = run["router"].value
    assert found["settled"], found
    assert found["starts"] > 2
    assert (found["orphans"], found["lost"]) == ([], 0)


def test_the_tiers_keep_what_the_device_forgets(run: RunResult) -> None:
    assert set(run["truth after device reset"].value.values()) == {int(Tier.HOST)}


def test_nothing_is_left_after_a_reset(run: RunResult) -> None:
    assert run["truth after reset"].value == {}
    assert run["router at the end"].value["blocks"] == {}
