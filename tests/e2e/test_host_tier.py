# SPDX-License-Identifier: Apache-2.0
"""Multi-turn traffic through a device cache that it overflows and a host tier: one process."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.vllm_lab.probes import abort_after_steps, blocks_in_use, scrape
from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call, Chat, Replay, ResetPrefixCache
from tests.e2e.lab import (
    LAST_TURN,
    TRAFFIC,
    Lab,
    assert_same_outputs,
    cached_tokens,
    device_turnovers,
    requests_with_generated_tokens_reused,
    reusable_tokens,
)
from tests.metrics.scrape import free_port

# At the first step loads are submitted, in the next ones they run, then prompts are computed.
ABORT_AFTER_STEPS = (1, 2, 3, 8)
WHOLE = ("chat", "again", "after reset", "from host")  # phases with all of the traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(lab: Lab) -> RunResult:
    """One engine whose host tier holds everything."""
    port = free_port()
    return lab.run(
        lab.with_kvbm({"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_PORT": str(port)}),
        Chat("chat", TRAFFIC),
        Replay("again", "chat", latest_first=True),
        Call("in use", blocks_in_use),
        ResetPrefixCache("reset", connector=True),
        Replay("after reset", "chat"),
        ResetPrefixCache("device reset", connector=False),
        Replay("from host", "chat"),
        Call("metrics", scrape, (port,)),
        *(
            Call(f"abort after {steps}", abort_after_steps, (lab.last_prompts()[:4], steps))
            for steps in ABORT_AFTER_STEPS
        ),
        Call("in use after aborts", blocks_in_use),
        Replay("after aborts", "chat", turns=(LAST_TURN,)),
        Call("in use at the end", blocks_in_use),
    )


def test_outputs_are_those_of_an_engine_without_kvbm(lab: Lab, run: RunResult) -> None:
    phases = [run[name] for name in (*WHOLE, "after aborts")]
    assert_same_outputs(lab.reference(), *phases)


def test_the_device_cache_is_evicted_several_times(lab: Lab, run: RunResult) -> None:
    assert device_turnovers(run["chat"], lab.with_kvbm()) > 3


def test_blocks_come_back_from_the_host(run: RunResult) -> None:
    for name in WHOLE:
        assert run[name].tier_hit_tokens()["host"] == run[name].external_hit_tokens > 0
        assert run[name].kvbm_counters["kvbm_matched_tokens"] == run[name].external_hit_tokens


def test_the_metrics_are_what_the_requests_and_vllm_counted(run: RunResult) -> None:
    found = run["metrics"].value
    phases = [run[name] for name in WHOLE]
    for name in ("kvbm_matched_tokens", "kvbm_offload_blocks_d2h", "kvbm_onboard_blocks_h2d"):
        assert found[name] == sum(phase.kvbm_counters[name] for phase in phases) > 0, name
    assert found["kvbm_matched_tokens"] == sum(phase.external_hit_tokens for phase in phases)
    assert 0.2 < found["kvbm_host_cache_hit_rate"] <= 1
    assert found["kvbm_disk_cache_hit_rate"] == 0


def test_almost_all_that_was_computed_before_is_reused(run: RunResult) -> None:
    # Not all: a block may be asked for while its copy to the host is in flight.
    for name in WHOLE:
        assert cached_tokens(run[name]) >= 0.95 * reusable_tokens(run[name])


def test_generated_tokens_are_reused_in_the_next_turn(run: RunResult) -> None:
    later_turns = TRAFFIC.count * (TRAFFIC.turns - 1)
    assert requests_with_generated_tokens_reused(run["chat"], block_size=32) == later_turns


def test_device_blocks_are_held_by_nobody_when_the_engine_is_idle(run: RunResult) -> None:
    assert (run["in use"].value, run["in use at the end"].value) == (0, 0)


def test_aborts_while_loading_leave_no_device_block_held(run: RunResult) -> None:
    assert [run[f"abort after {steps}"].value for steps in ABORT_AFTER_STEPS] == [4] * 4
    assert run["in use after aborts"].value == 0


def test_no_copy_fails(run: RunResult) -> None:
    counted: Counter[str] = Counter()
    for name in WHOLE:  # not those with aborts, which cancel copies
        counted.update(run[name].kvbm_counters)
    assert counted["kvbm_offload_blocks_d2h"] > 0
    assert counted["kvbm_onboard_blocks_h2d"] > 0
    failures = ("kvbm_offload_failures", "kvbm_onboard_failures", "kvbm_errors")
    assert [counted[name] for name in failures] == [0, 0, 0]


def test_reset_forgets_the_host_tier(run: RunResult) -> None:
    assert run["reset"].value is True
    assert run["after reset"].requests[0].cached_tokens == 0
    assert cached_tokens(run["after reset"]) < cached_tokens(run["again"])


def test_reset_of_the_device_keeps_the_host_tier(run: RunResult) -> None:
    assert run["device reset"].value is True
    first = run["from host"].requests[0]
    assert first.cached_tokens == first.reusable_tokens > 0


def test_the_state_is_in_a_segment_and_one_arena(run: RunResult) -> None:
    arenas = [name for name in run.shared_objects if name.endswith(".host.0")]
    assert len(arenas) == 1
    assert set(run.shared_objects) == {arenas[0], arenas[0].removesuffix(".host.0")}
