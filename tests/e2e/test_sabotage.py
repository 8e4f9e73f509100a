# SPDX-License-Identifier: Apache-2.0
"""Wrong bytes in the host tier: seen by the comparison, and by the guard where it is on."""

from __future__ import annotations

import pytest

from bench.vllm_lab.compare import compare
from bench.vllm_lab.faults import corrupt_host_copies
from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call, Chat, Replay, ResetPrefixCache
from tests.e2e.lab import LAST_TURN, TRAFFIC, Lab, assert_same_outputs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def run_with_corrupt_copies(lab: Lab, guard: bool) -> RunResult:
    """One engine: traffic, a wrong row in every tenth block's host copy, last turn from the host.

    A block that cannot be loaded is recomputed, as the connector tells the engine to.
    """
    environment = {"DYN_KVBM_VERIFY_HOST": "1"} if guard else {}
    return lab.run(
        lab.with_kvbm(environment=environment),
        Chat("chat", TRAFFIC),
        Replay("before", "chat", turns=(LAST_TURN,)),
        Call("corrupt", corrupt_host_copies, (10, 2)),
        ResetPrefixCache("forget the device", connector=False),
        Replay("after", "chat", turns=(LAST_TURN,)),
        ResetPrefixCache("forget the device again", connector=False),
        Replay("healed", "chat", turns=(LAST_TURN,)),
    )


def test_wrong_bytes_in_the_host_tier_change_outputs_without_the_guard(lab: Lab) -> None:
    run = run_with_corrupt_copies(lab, guard=False)
    assert_same_outputs(lab.reference(), run["chat"], run["before"])
    assert run["corrupt"].value > 0
    assert not compare(lab.reference().of_turns(LAST_TURN), run["after"]).equal


def test_the_engine_recomputes_what_the_guard_refuses(lab: Lab) -> None:
    run = run_with_corrupt_copies(lab, guard=True)
    assert run["corrupt"].value > 0
    assert run["after"].external_hit_tokens > 0
    assert run["after"].kvbm_counters["kvbm_onboard_failures"] > 0
    assert_same_outputs(lab.reference(), *(run[n] for n in ("chat", "before", "after", "healed")))
