# SPDX-License-Identifier: Apache-2.0
"""The same traffic under other schedules and in a host tier that evicts: same outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.vllm_lab.probes import blocks_in_use, uses_seen_by_policy
from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call, Chat, Replay
from tests.e2e.lab import (
    LAST_TURN,
    TRAFFIC,
    Lab,
    assert_same_outputs,
    cached_tokens,
    reusable_tokens,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SMALL_HOST_BLOCKS = 48  # two histories; the traffic has 150 blocks


@pytest.fixture(scope="module")
def crowded(lab: Lab) -> RunResult:
    """Chunked prefill of two blocks a step, more requests at once than the device can hold."""
    return lab.run(
        lab.with_kvbm(max_num_batched_tokens=64),
        Chat("chat", replace(TRAFFIC, together=5)),
        Replay("again", "chat", together=5),
        Call("in use", blocks_in_use),
    )


def test_outputs_are_equal_with_chunked_prefill_and_preemption(
    lab: Lab, crowded: RunResult
) -> None:
    assert_same_outputs(lab.reference(), crowded["chat"], crowded["again"])
    assert crowded["chat"].counter("num_preemptions") > 0
    assert crowded["chat"].external_hit_tokens > 0
    assert crowded["again"].external_hit_tokens > 0


def test_preempted_requests_leave_no_device_block_held(crowded: RunResult) -> None:
    assert crowded["in use"].value == 0


def test_outputs_are_equal_without_the_engines_prefix_cache(lab: Lab) -> None:
    run = lab.run(
        lab.with_kvbm(prefix_caching=False, max_num_batched_tokens=128),
        Chat("chat", TRAFFIC),
        Replay("again", "chat", turns=(LAST_TURN,)),
    )
    assert_same_outputs(lab.reference(), run["chat"], run["again"])
    for phase in run.phases.values():
        assert phase.device_hit_tokens == 0
        assert phase.external_hit_tokens >= 0.95 * reusable_tokens(phase)


@pytest.mark.parametrize("policy", ["lru", "reuse"])
def test_outputs_are_equal_while_the_host_tier_evicts(lab: Lab, policy: str) -> None:
    small = {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(SMALL_HOST_BLOCKS),
        "DYN_KVBM_EVICTION_POLICY": policy,
    }
    run = lab.run(
        lab.with_kvbm(environment=small, device_blocks=48),
        Chat("chat", TRAFFIC),
        Replay("again", "chat", turns=(LAST_TURN,), latest_first=True),
        Replay("once more", "chat", turns=(LAST_TURN,)),
        Call("asked", uses_seen_by_policy),
    )
    assert_same_outputs(lab.reference(), run["chat"], run["again"], run["once more"])
    assert (run["asked"].value > 0) == (policy == "reuse")
    assert sum(phase.external_hit_tokens for phase in run.phases.values()) > 0
    assert sum(phase.kvbm_counters["kvbm_evicted_blocks"] for phase in run.phases.values()) > 0
    # Everything would have been found if nothing had been evicted.
    assert cached_tokens(run["once more"]) < 0.9 * reusable_tokens(run["once more"])
