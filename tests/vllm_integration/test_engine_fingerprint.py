# SPDX-License-Identifier: Apache-2.0
"""Each value of vLLM's configuration that makes other KV makes another fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

import kvbm.shared
from kvbm.errors import FingerprintMismatch
from kvbm.fingerprint import Fingerprint, differences
from kvbm.instance import remove
from kvbm.vllm_integration.connector import DynamoConnector
from kvbm.vllm_integration.engine import fingerprint_values
from tests.vllm_integration.connected import (
    BLOCK,
    Connected,
    cache_configuration,
    configuration,
)

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds


class HfConfig(SimpleNamespace):
    """What is read of a model's configuration."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def values(change: Callable[[Any], None] | None = None, block: int = BLOCK) -> dict[str, Any]:
    """Values of a configuration after a change."""
    config = configuration()
    config.model_config.hf_config = HfConfig(rope_theta=10000.0)
    if change is not None:
        change(config)
    return fingerprint_values(config, block)


def put(part: str, name: str, value: Any) -> Callable[[Any], None]:
    """Make a change of one field."""
    return lambda config: setattr(getattr(config, part), name, value)


CHANGES: dict[str, Callable[[Any], None]] = {
    "model": put("model_config", "model", "no/other-model"),
    "weights": put("model_config", "revision", "other"),
    "config": put("model_config", "hf_config", HfConfig(rope_theta=500000.0)),
    "dtype": put("model_config", "dtype", torch.bfloat16),
    "quantization": put("model_config", "quantization", "awq"),
    "cache_dtype": put("cache_config", "cache_dtype", "fp8"),
    "kv_scales": put("cache_config", "calculate_kv_scales", True),
    "tensor_parallel": put("parallel_config", "tensor_parallel_size", 2),
    "pipeline_parallel": put("parallel_config", "pipeline_parallel_size", 2),
    "hash_algorithm": put("cache_config", "prefix_caching_hash_algo", "sha256_cbor"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_another_fingerprint_that_names_it(name: str) -> None:
    one, other = Fingerprint(values()), Fingerprint(values(CHANGES[name]))
    assert one.digest != other.digest
    found, wanted = differences(one.description, other.description)
    assert found.partition("=")[0] == wanted.partition("=")[0] == name


def test_other_block_sizes_and_versions_of_vllm_are_other_fingerprints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Fingerprint(values())
    assert differences(one.description, Fingerprint(values(block=2 * BLOCK)).description) == (
        f"block_tokens={BLOCK}",
        f"block_tokens={2 * BLOCK}",
    )
    monkeypatch.setattr("vllm.__version__", "99.0")
    assert Fingerprint(values()).digest != one.digest


def test_scales_that_an_engine_computes_by_itself_are_shared_with_nobody() -> None:
    change = CHANGES["kv_scales"]
    assert Fingerprint(values(change)).digest != Fingerprint(values(change)).digest


def test_every_value_has_its_case() -> None:
    assert set(values()) == {*CHANGES, "block_tokens", "engine"}


def test_equal_configurations_are_one_fingerprint() -> None:
    assert Fingerprint(values()).digest == Fingerprint(values()).digest


def test_a_connector_refuses_what_another_one_holds_for_each_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvbm.shared, "USER_SECS", 0.01)  # how long one that is in use is waited for
    name = f"fingerprint-{os.getpid()}"
    first = Connected(instance=name)
    try:
        for changed, change in CHANGES.items():
            if changed.endswith("_parallel"):
                continue  # other ranks: their workers are waited for first
            config = configuration(instance=name)
            change(config)
            with pytest.raises(FingerprintMismatch, match=f" {changed}=") as caught:
                DynamoConnector(config, KVConnectorRole.SCHEDULER, cache_configuration())
            assert "\n" not in str(caught.value)
        same = DynamoConnector(
            configuration(instance=name), KVConnectorRole.SCHEDULER, cache_configuration()
        )
        same.shutdown()
    finally:
        first.close()
        remove(name)
