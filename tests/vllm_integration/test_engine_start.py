# SPDX-License-Identifier: Apache-2.0
"""Starting: what is missing or does not fit is an error that says what to do, never a wait."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvbm._fast.objects import SHARED_MEMORY
from kvbm.errors import (
    ConfigError,
    FingerprintMismatch,
    GeometryError,
    LeaderTimeout,
    SegmentInUse,
)
from kvbm.instance import instances
from kvbm.vllm_integration.connector import DynamoConnector
from tests.vllm_integration.connected import (
    BLOCK,
    LAYERS,
    Connected,
    cache_configuration,
    configuration,
)

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test sets is set."""
    import os

    for name in [name for name in os.environ if name.startswith("DYN_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def shared() -> Iterator[str]:
    """Name of a cache that outlives its engine; removed at the end."""
    name = f"start-{uuid.uuid4().hex[:12]}"
    yield name
    for path in SHARED_MEMORY.glob(f"kvbm-{name}*"):
        path.unlink()


def tensors(blocks: int = 64) -> dict[str, torch.Tensor]:
    """A KV cache."""
    return {name: torch.zeros(blocks, 1, BLOCK, 16) for name in LAYERS}


# ---- settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize("role", list(KVConnectorRole))
def test_without_a_tier_neither_side_starts(role: KVConnectorRole) -> None:
    config = configuration(cpu_cache_override_num_blocks=0)
    with pytest.raises(ConfigError, match="DYN_KVBM_CPU_CACHE_GB"):
        DynamoConnector(config, role, cache_configuration())


def test_a_size_that_is_none_names_the_setting_and_what_is_allowed() -> None:
    config = configuration(cpu_cache_gb="much")
    with pytest.raises(ConfigError, match=r"cpu_cache_gb.*much.*number"):
        DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())


def test_a_tier_that_does_not_fit_says_how_much_room_there_is() -> None:
    config = configuration(cpu_cache_override_num_blocks=0, cpu_cache_gb=1000)
    worker = DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())
    with pytest.raises(ConfigError, match=r"DYN_KVBM_CPU_CACHE_GB=1000\.0.*/dev/shm"):
        worker.register_kv_caches(tensors())
    worker.shutdown()


def test_blocks_that_do_not_fit_are_refused_when_all_ranks_are_known() -> None:
    config = configuration(cpu_cache_override_num_blocks=2**28)
    worker = DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())
    try:
        worker.register_kv_caches(tensors())
        with pytest.raises(ConfigError, match=r"OVERRIDE_NUM_BLOCKS=268435456 .*/dev/shm"):
            DynamoConnector(config, KVConnectorRole.SCHEDULER, cache_configuration())
    finally:
        worker.shutdown()


def test_an_extra_configuration_that_is_no_mapping_is_refused() -> None:
    config = configuration()
    config.kv_transfer_config.kv_connector_extra_config = ["cpu_cache_gb"]
    with pytest.raises(ConfigError, match=r"\['cpu_cache_gb'\] is not valid .*mapping"):
        DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())


def test_settings_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "0.001")
    engine = Connected(cpu_cache_override_num_blocks=None)
    try:
        assert engine.side.segment.shape.host_slots == 1_000_000 // (2 * BLOCK * 16 * 4)
    finally:
        engine.close()


def test_a_least_priority_above_zero_stores_nothing_and_says_so(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvbm"):
        engine = connect(host_offload_prefix_min_priority=1)
    assert "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY=1" in caplog.text
    prompt = list(range(40))
    engine.cache(engine.request("first", prompt), [1, 2, 3], 10)
    assert engine.matched(engine.request("second", prompt)) == 0


# ---- workers and their caches --------------------------------------------------------------------
def test_a_missing_worker_ends_the_start_after_the_time_that_is_set() -> None:
    config = configuration(ranks=2, leader_worker_init_timeout_secs=1)
    worker = DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())
    try:
        worker.register_kv_caches(tensors())
        with pytest.raises(LeaderTimeout, match=r"DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS=1.*1"):
            DynamoConnector(config, KVConnectorRole.SCHEDULER, cache_configuration())
    finally:
        worker.shutdown()


def test_kv_caches_are_registered_once() -> None:
    worker = DynamoConnector(configuration(), KVConnectorRole.WORKER, cache_configuration())
    try:
        worker.register_kv_caches(tensors())
        with pytest.raises(ConfigError, match="registered already"):
            worker.register_kv_caches(tensors())
    finally:
        worker.shutdown()


def test_a_tensor_that_is_not_understood_is_shown() -> None:
    worker = DynamoConnector(configuration(), KVConnectorRole.WORKER, cache_configuration())
    strange = {name: torch.zeros(63, 5) for name in LAYERS}  # 64 blocks are configured
    with pytest.raises(GeometryError, match=r"\(63, 5\)"):
        worker.register_kv_caches(strange)
    worker.shutdown()


def test_without_a_kv_cache_configuration_the_block_size_of_the_engine_counts() -> None:
    worker = DynamoConnector(configuration(), KVConnectorRole.WORKER, None)
    worker.register_kv_caches(tensors())
    assert worker._worker is not None
    worker.shutdown()


@pytest.mark.parametrize("kind", ["sliding window", "two sizes"])
def test_groups_that_are_not_full_attention_of_one_size_are_refused(kind: str) -> None:
    shape = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = FullAttentionSpec(block_size=BLOCK, **shape)
    other: Any = FullAttentionSpec(block_size=2 * BLOCK, **shape)
    if kind == "sliding window":
        other = SlidingWindowSpec(block_size=BLOCK, sliding_window=32, **shape)
    groups = [
        SimpleNamespace(layer_names=[name], kv_cache_spec=spec)
        for name, spec in zip(LAYERS, (full, other), strict=True)
    ]
    cache = SimpleNamespace(num_blocks=64, kv_cache_groups=groups)
    with pytest.raises(ConfigError, match="disable-hybrid-kv-cache-manager"):
        DynamoConnector(configuration(), KVConnectorRole.WORKER, cache)


def test_context_parallelism_is_refused() -> None:
    config = configuration()
    config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ConfigError, match="decode_context_parallel_size=2"):
        DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())


def test_kv_caches_on_a_device_that_nobody_serves_are_refused() -> None:
    worker = DynamoConnector(configuration(), KVConnectorRole.WORKER, cache_configuration())
    with pytest.raises((ConfigError, GeometryError), match="meta"):
        worker.register_kv_caches({name: t.to("meta") for name, t in tensors().items()})
    worker.shutdown()


# ---- other engines -------------------------------------------------------------------------------
def test_a_cache_of_another_model_that_is_in_use_is_refused(shared: str) -> None:
    first = Connected(instance=shared)
    config = configuration(instance=shared)
    config.model_config.dtype = torch.float16
    worker = DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())
    try:
        worker.register_kv_caches(tensors())
        with pytest.raises(FingerprintMismatch, match="float16"):
            DynamoConnector(config, KVConnectorRole.SCHEDULER, cache_configuration())
    finally:
        worker.shutdown()
        first.close()


def test_a_cache_that_another_layout_uses_is_refused(shared: str) -> None:
    first = Connected(instance=shared)
    config = configuration(instance=shared)
    worker = DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())
    other = {name: torch.zeros(64, 1, BLOCK, 32) for name in LAYERS}
    try:
        with pytest.raises(SegmentInUse, match=shared):
            worker.register_kv_caches(other)
    finally:
        worker.shutdown()
        first.close()


def test_a_cache_of_another_model_that_nobody_uses_is_replaced(
    shared: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = list(range(40))
    first = Connected(instance=shared)
    first.cache(first.request("first", prompt), [1, 2, 3], 10)
    first.close()
    config = configuration(instance=shared)
    config.model_config.dtype = torch.float16
    worker = DynamoConnector(config, KVConnectorRole.WORKER, cache_configuration())
    worker.register_kv_caches(tensors())
    with caplog.at_level(logging.WARNING, "kvbm"):
        leader = DynamoConnector(config, KVConnectorRole.SCHEDULER, cache_configuration())
    worker.shutdown()
    leader.shutdown()
    assert "starting clean" in caplog.text


def test_a_named_cache_is_warm_for_the_next_engine(shared: str) -> None:
    prompt = list(range(40))
    first = Connected(instance=shared)
    first.cache(first.request("first", prompt), [1, 2, 3], 10)
    first.close()
    second = Connected(instance=shared)
    try:
        assert second.load(second.request("second", prompt), [11, 12, 13]) == 2 * BLOCK
        assert [second.value(block) for block in (11, 12)] == [10, 11]
        second.scheduler.request_finished(second.requests["second"], [])
    finally:
        second.close()


def test_shutting_down_twice_is_harmless() -> None:
    engine = Connected()
    engine.close()
    left = instances()
    engine.close()
    assert instances() == left
