# SPDX-License-Identifier: Apache-2.0
"""The rig that vLLM's own connector tests are run with (`make test-vllm-units`) still works.

Those tests are not part of `make test`, so what the rig uses of the leader is used here once.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from scripts.vllm_units import rig
from tests.vllm_integration.connected import (
    BLOCK,
    block_hasher,
    cache_configuration,
    configuration,
)

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds

PROMPT = list(range(3, 3 + 4 * BLOCK + 5))


def test_what_a_test_of_vllms_wants_cached_is_found_and_loaded() -> None:
    config = configuration(matched_tokens=2 * BLOCK, is_async=True)
    engine = rig.DynamoConnector(config, KVConnectorRole.SCHEDULER, cache_configuration())
    try:
        request = Request(
            "one", PROMPT, SamplingParams(), None, block_hasher=block_hasher("sha256")
        )
        assert engine.get_num_new_matched_tokens(request, 0) == (2 * BLOCK, True)
        blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4, 5],))
        engine.update_state_after_alloc(request, blocks, 2 * BLOCK)
        engine.build_connector_meta(SchedulerOutput.make_empty())
        assert engine.request_finished(request, [1, 2, 3, 4, 5]) == (False, None)
        assert engine.call_record["errors"] == 0
        assert not engine._leader.leader._storing
    finally:
        rig.ENGINES.remove(engine)
        for worker in engine.workers:
            worker.shutdown()
        engine.shutdown()
