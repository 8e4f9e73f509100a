# SPDX-License-Identifier: Apache-2.0
"""`PdConnector` over vLLM's own MultiConnector: which children, and who is asked for what."""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvbm.errors import ConfigError
from tests.small_engine import unique_engine_id

pytestmark = [
    pytest.mark.slow,  # importing vLLM takes many seconds
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

STAND_INS = "tests.vllm_integration.stand_ins"
CACHE = {
    "kv_connector": "LMCacheConnectorV1",
    "kv_role": "kv_both",
    "kv_connector_module_path": STAND_INS,
}
KVBM = CACHE | {
    "kv_connector": "DynamoConnector",
    "kv_connector_module_path": "kvbm.vllm_integration.connector",
}
TRANSFER = CACHE | {"kv_connector": "NixlConnector"}


def vllm_config(*children: dict[str, Any], hybrid: bool = False) -> Any:
    """Return what MultiConnector reads of vLLM's configuration."""
    transfer = pytest.importorskip("vllm.config.kv_transfer")
    return SimpleNamespace(
        kv_transfer_config=transfer.KVTransferConfig(
            kv_connector="PdConnector",
            kv_role="kv_both",
            kv_connector_module_path="kvbm.vllm_integration.connector",
            engine_id="engine",
            kv_connector_extra_config={"connectors": list(children)},
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not hybrid),
    )


def connector(*children: dict[str, Any], role: str = "SCHEDULER", hybrid: bool = False) -> Any:
    """Load the connector as vLLM does and make it."""
    base = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")
    factory = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.factory")
    config = vllm_config(*children, hybrid=hybrid)
    cls = factory.KVConnectorFactory.get_connector_class(config.kv_transfer_config)
    return cls(config, getattr(base.KVConnectorRole, role), kv_cache_config=None)


REQUEST = SimpleNamespace(request_id="r")
BLOCKS = SimpleNamespace(new_empty=lambda: BLOCKS, blocks=())


@pytest.mark.parametrize(
    ("children", "error", "message"),
    [
        ([], ValueError, "has 0 connectors"),
        ([CACHE], ValueError, "has 1 connectors"),
        ([CACHE, TRANSFER, TRANSFER], ValueError, "has 3 connectors"),
        ([TRANSFER, TRANSFER], TypeError, "the first connector is 'NixlConnector'"),
        ([CACHE, CACHE], TypeError, "the second connector is 'LMCacheConnectorV1'"),
        ([TRANSFER, CACHE], TypeError, "allowed are DynamoConnector, LMCacheConnectorV1"),
    ],
)
def test_there_are_a_cache_and_a_transfer(
    children: list[dict[str, Any]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        connector(*children)


def test_the_hybrid_manager_is_refused_with_what_to_pass() -> None:
    with pytest.raises(ConfigError, match="--disable-hybrid-kv-cache-manager"):
        connector(CACHE, TRANSFER, hybrid=True)


def test_only_the_cache_is_asked_for_hits() -> None:
    both = connector(CACHE, TRANSFER)
    cache, transfer = both._connectors
    transfer.answer = (64, True)
    assert both.get_num_new_matched_tokens(REQUEST, 16) == (0, False)
    cache.answer = (32, True)
    assert both.get_num_new_matched_tokens(REQUEST, 16) == (32, True)
    assert cache.calls == 2 * [("match", "r", 16)]
    assert transfer.calls == []


def test_only_the_cache_is_told_to_load() -> None:
    both = connector(CACHE, TRANSFER)
    cache, transfer = both._connectors
    cache.answer = (32, True)
    both.get_num_new_matched_tokens(REQUEST, 0)
    both.update_state_after_alloc(REQUEST, BLOCKS, 32)
    assert cache.calls[-1] == ("allocated", "r", 32)
    assert transfer.calls == [("allocated", "r", 0)]


def test_a_hit_that_is_gone_when_asked_again_is_forgotten() -> None:
    both = connector(CACHE, TRANSFER)
    cache, _ = both._connectors
    for answer in ((32, True), (None, False), (0, False)):
        cache.answer = answer
        assert both.get_num_new_matched_tokens(REQUEST, 0) == answer
    both.update_state_after_alloc(REQUEST, BLOCKS, 0)
    assert cache.calls[-1] == ("allocated", "r", 0)
    assert both._requests_to_connector == {}


def test_each_child_gets_its_own_message() -> None:
    scheduler = connector(CACHE, TRANSFER)
    worker = connector(CACHE, TRANSFER, role="WORKER")
    message = scheduler.build_connector_meta(SimpleNamespace())
    assert type(message).__name__ == "PdConnectorMetadata"
    worker.bind_connector_metadata(message)
    assert [child.calls for child in worker._connectors] == [
        [("bind", "LMCacheConnectorV1")],
        [("bind", "NixlConnector")],
    ]
    assert worker.has_connector_metadata()
    worker.clear_connector_metadata()
    assert not any(child.has_connector_metadata() for child in worker._connectors)


def test_a_request_is_finished_when_both_have_let_go() -> None:
    scheduler = connector(CACHE, TRANSFER)
    worker = connector(CACHE, TRANSFER, role="WORKER")
    scheduler._connectors[0].hold = worker._connectors[0].hold = True
    scheduler._connectors[0].request_finished = lambda *_: (True, None)
    held, parameters = scheduler.request_finished(REQUEST, [1])
    assert held
    assert parameters == {"remote_engine_id": "engine"}
    worker.bind_connector_metadata(scheduler.build_connector_meta(SimpleNamespace()))
    worker._connectors[1].hold = False
    assert worker.get_finished({"r"})[0] is None
    worker._connectors[0].hold, worker._connectors[1].hold = False, True
    assert worker.get_finished({"r"})[0] == {"r"}


def test_the_handshake_is_that_of_the_transfer_and_goes_to_both() -> None:
    worker = connector(CACHE, TRANSFER, role="WORKER")
    cache, transfer = worker._connectors
    cache.get_handshake_metadata = lambda: "something"
    metadata = worker.get_handshake_metadata()
    assert metadata.text == "here"
    transfer.get_handshake_metadata = lambda: None
    assert worker.get_handshake_metadata() is None
    transfer.get_handshake_metadata = lambda: "something"
    with pytest.raises(TypeError, match="is a str; needed is NixlHandshakePayload"):
        worker.get_handshake_metadata()
    worker.set_xfer_handshake_metadata({0: metadata})
    assert cache.calls == transfer.calls == [("handshake", {0: metadata})]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["PdConnector", "MultiConnector"])
def test_statistics_of_the_cache_reach_the_front_end(name: str, processes: int) -> None:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
    from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector

    from kvbm.vllm_integration.connector import PdConnector
    from kvbm.vllm_integration.stats import KvbmStats

    counted = KvbmStats.of({"blocks_stored": 3}, {"blocks_stored": 5})
    stats = multi_connector.MultiKVConnectorStats(data={"DynamoConnector": counted})
    sent = stats.to_dict() if hasattr(stats, "to_dict") else stats.data
    if processes == 2:
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(sent))

    kind = {"PdConnector": PdConnector, "MultiConnector": multi_connector.MultiConnector}[name]
    rebuilt = kind.build_kv_connector_stats(sent)
    assert rebuilt.reduce()["DynamoConnector"]["blocks stored"] == 3

    registry = CollectorRegistry()
    types = {t: functools.partial(t, registry=registry) for t in (Counter, Gauge, Histogram)}
    metrics = kind.build_prom_metrics(vllm_config(KVBM, TRANSFER), types, ["engine"], {0: ["0"]})
    metrics.observe(sent)
    assert registry.get_sample_value("kvbm_offload_blocks_d2h_total", {"engine": "0"}) == 5


@pytest.mark.parametrize(("given", "policy"), [(None, "recompute"), ("fail", "fail")])
def test_the_engine_follows_the_caches_policy_for_failed_loads(
    given: str | None, policy: str
) -> None:
    import torch
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from kvbm.vllm_integration.connector import PdConnector
    from tests.vllm_integration.connected import (
        BLOCK,
        LAYERS,
        cache_configuration,
        configuration,
    )

    extra = {"cpu_cache_override_num_blocks": 32, "load_failure_policy": given}
    cache = CACHE | {
        "kv_connector": "DynamoConnector",
        "kv_connector_module_path": "kvbm.vllm_integration.connector",
        "kv_connector_extra_config": extra,
    }
    config, parts = configuration(), vllm_config(cache, TRANSFER)
    config.kv_transfer_config = parts.kv_transfer_config
    config.kv_transfer_config.engine_id = unique_engine_id()
    config.scheduler_config = parts.scheduler_config
    worker = PdConnector(config, KVConnectorRole.WORKER, cache_configuration())
    worker.register_kv_caches({name: torch.zeros(64, 1, BLOCK, 16) for name in LAYERS})
    scheduler = PdConnector(config, KVConnectorRole.SCHEDULER, cache_configuration())
    worker.shutdown()
    scheduler.shutdown()
    assert config.kv_transfer_config.kv_load_failure_policy == policy


def test_names_and_aliases_are_upstreams() -> None:
    import kvbm.vllm_integration as package
    from kvbm.vllm_integration import connector as module

    assert package.dynamo_connector is package.DynamoConnector is module.DynamoConnector
    assert package.pd_connector is package.PdConnector is module.PdConnector
    assert package.PdConnectorMetadata is module.PdConnectorMetadata
    assert package.DynamoConnectorMetadata is module.DynamoConnectorMetadata
    for where in (package, module):
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = where.Nothing
