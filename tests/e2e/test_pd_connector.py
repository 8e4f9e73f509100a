# SPDX-License-Identifier: Apache-2.0
"""`PdConnector` under real vLLM: the cache works beside a transfer that holds every request.

The transfer is a stand-in: the real one needs NIXL and a second engine.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.vllm_lab.results import RunResult
from bench.vllm_lab.settings import KVBM_TRANSFER_CONFIG
from bench.vllm_lab.workload import Chat, Replay, ResetPrefixCache
from tests.e2e.lab import TRAFFIC, Lab, assert_same_outputs, cached_tokens, reusable_tokens

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TRANSFER = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "tests.vllm_integration.stand_ins",
}


@pytest.fixture(scope="module", params=[False, True], ids=["one process", "processes"])
def run(request: pytest.FixtureRequest, lab: Lab) -> RunResult:
    """An engine with both connectors."""
    config = dict(KVBM_TRANSFER_CONFIG)
    config |= {
        "kv_connector": "PdConnector",
        "kv_connector_extra_config": {"connectors": [dict(KVBM_TRANSFER_CONFIG), TRANSFER]},
    }
    settings = replace(
        lab.with_kvbm(worker_processes=request.param),
        kv_transfer_config=config,
        extra_arguments={"disable_hybrid_kv_cache_manager": True},
    )
    return lab.run(
        settings,
        Chat("chat", TRAFFIC),
        ResetPrefixCache("device reset", connector=False),
        Replay("from host", "chat"),
    )


def test_outputs_are_those_of_an_engine_without_connectors(lab: Lab, run: RunResult) -> None:
    assert_same_outputs(lab.reference(), run["chat"], run["from host"])


def test_the_cache_provides_what_was_computed_before(run: RunResult) -> None:
    for name in ("chat", "from host"):
        assert cached_tokens(run[name]) >= 0.9 * reusable_tokens(run[name])
    assert run["from host"].external_hit_tokens > 0
