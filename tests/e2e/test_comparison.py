# SPDX-License-Identifier: Apache-2.0
"""The comparison that the other tests rest on: it holds where it should and fails where it should.

No connector here.
"""

from __future__ import annotations

import pytest

from bench.vllm_lab.compare import compare
from bench.vllm_lab.faults import corrupt_device_blocks
from bench.vllm_lab.workload import Call, Chat, Replay, ResetPrefixCache
from tests.e2e.lab import TRAFFIC, Lab, assert_same_outputs, device_turnovers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_outputs_do_not_depend_on_batches_chunks_and_the_prefix_cache(lab: Lab) -> None:
    other = lab.plain(prefix_caching=False, max_num_batched_tokens=64)
    assert_same_outputs(lab.reference(), lab.run(other, Chat("chunks", TRAFFIC))["chunks"])


def test_the_traffic_fills_the_device_cache_several_times(lab: Lab) -> None:
    assert device_turnovers(lab.reference(), lab.plain()) > 3


def test_one_wrong_row_in_one_layer_of_a_few_blocks_changes_outputs(lab: Lab) -> None:
    run = lab.run(
        lab.plain(device_blocks=512),
        Chat("chat", TRAFFIC),
        Replay("before", "chat"),
        Call("corrupt", corrupt_device_blocks, (20, 1, 2)),
        Replay("after", "chat"),
        ResetPrefixCache("forget", connector=False),
        Replay("recomputed", "chat"),
    )
    assert_same_outputs(lab.reference(), run["chat"], run["before"], run["recomputed"])
    assert 0 < run["corrupt"].value < 10
    assert not compare(lab.reference(), run["after"]).equal
