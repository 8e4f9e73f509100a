# SPDX-License-Identifier: Apache-2.0
"""`PdConnector` and vLLM's own `MultiConnector`: the cache beside a transfer that holds requests.

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


CHILDREN = {"connectors": [dict(KVBM_TRANSFER_CONFIG), TRANSFER]}
PD = KVBM_TRANSFER_CONFIG | {"kv_connector": "PdConnector", "kv_connector_extra_config": CHILDREN}
MULTI = {
    "kv_connector": "MultiConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": CHILDREN,
}
ENGINES = {
    "PdConnector in one process": (PD, False),
    "PdConnector in processes": (PD, True),
    "MultiConnector in processes": (MULTI, True),
}


@pytest.fixture(scope="module", params=list(ENGINES))
def run(request: pytest.FixtureRequest, lab: Lab) -> RunResult:
    """An engine with both connectors."""
    config, processes = ENGINES[request.param]
    settings = replace(
        lab.with_kvbm(worker_processes=processes),
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


def test_metrics_are_those_of_the_cache(run: RunResult) -> None:
    counters = run["from host"].kvbm_counters
    assert counters["kvbm_matched_tokens"] == run["from host"].external_hit_tokens > 0
    assert counters["kvbm_errors"] == 0
