# SPDX-License-Identifier: Apache-2.0
"""What is refused at the start, and what decides whether bytes can be used again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbm.errors import ConfigError, GeometryError
from tests.trtllm_integration.engine import arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pp_size": 2}, "pp_size=2"),
        ({"cp_size": 4}, "cp_size=4"),
        ({"enable_attention_dp": True}, "enable_attention_dp"),
        ({"max_beam_width": 4}, "max_beam_width=4"),
        ({"host_cache_size": 1}, "host_cache_size"),
        ({"max_attention_window": [4096, 512]}, "max_attention_window"),
        ({"max_attention_window": [512], "max_seq_len": None}, "max_attention_window"),
        ({"sparse_attention_config": SimpleNamespace()}, "sparse_attention_config"),
        ({"attn_backend": "VANILLA"}, "VANILLA"),
        ({"dtype": "nvfp4"}, "4-bit"),
        ({"quant_config": SimpleNamespace(kv_cache_quant_algo="NVFP4")}, "4-bit"),
    ],
)
def test_what_is_not_supported_is_refused_on_every_rank(
    interface: Any, changes: dict[str, Any], words: str
) -> None:
    from kvbm.trtllm_integration.connector_leader import KvConnectorLeader
    from kvbm.trtllm_integration.connector_worker import KvConnectorWorker

    for side in (KvConnectorLeader, KvConnectorWorker):
        with pytest.raises(ConfigError, match=words):
            side(arguments(**changes))


@pytest.mark.parametrize("windows", [None, [], [4096], [4096, 8192]])
def test_windows_as_long_as_the_longest_sequence_are_none(interface: Any, windows: Any) -> None:
    from kvbm.trtllm_integration.engine import check_engine

    assert check_engine(arguments(max_attention_window=windows)) is None


def test_without_a_tier_it_does_not_start(interface: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbm.trtllm_integration.connector import DynamoKVBMConnectorLeader

    monkeypatch.delenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS")
    with pytest.raises(ConfigError, match="DYN_KVBM_CPU_CACHE_GB"):
        DynamoKVBMConnectorLeader(arguments())


def test_the_second_cache_manager_is_refused(interface: Any) -> None:
    from kvbm.trtllm_integration.connector import DynamoKVBMConnectorWorker

    with pytest.raises(ConfigError, match="use_kv_cache_manager_v2"):
        DynamoKVBMConnectorWorker(arguments()).register_kv_cache_layout(SimpleNamespace())


@pytest.mark.parametrize("shape", [(8, 2, 2), (8, 2, 3, 16), (8, 2, 2, 4, 4)])
def test_a_pool_of_another_shape_is_refused(interface: Any, shape: tuple[int, ...]) -> None:
    from kvbm.trtllm_integration.connector import DynamoKVBMConnectorWorker

    with pytest.raises(GeometryError, match="is not understood"):
        DynamoKVBMConnectorWorker(arguments()).register_kv_caches(torch.zeros(shape))


def test_a_cache_without_separate_values_is_understood(interface: Any) -> None:
    from kvbm.trtllm_integration.connector import DynamoKVBMConnectorWorker

    pool = torch.zeros(8, 3, 1, 16)  # as MLA has it
    with pytest.raises(ConfigError, match="set 64"):
        DynamoKVBMConnectorWorker(arguments(tokens_per_block=32)).register_kv_caches(pool)
    worker = DynamoKVBMConnectorWorker(arguments(tokens_per_block=64))
    worker.register_kv_caches(pool)
    assert worker._worker._worker.geometries[0].bytes_per_block == 3 * 16 * 4
    with pytest.raises(ConfigError, match="registered already"):
        worker.register_kv_caches(pool)
    worker.shutdown()


def test_both_sides_of_a_process_have_one_name_and_others_another(interface: Any) -> None:
    from kvbm.trtllm_integration.engine import own_engine_id

    one, other = arguments(), arguments()
    assert own_engine_id(one) == own_engine_id(one) != own_engine_id(other)


def test_a_difference_that_changes_the_bytes_is_in_the_fingerprint(
    interface: Any, tmp_path: Path
) -> None:
    from kvbm.trtllm_integration.engine import fingerprint_values

    (tmp_path / "config.json").write_text('{"rope_theta": 10000}')
    plain = fingerprint_values(arguments(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"rope_theta": 20000}')
    assert fingerprint_values(arguments(model=str(tmp_path))) != plain
    plain = fingerprint_values(arguments())
    assert fingerprint_values(arguments()) == plain
    for changes in (
        {"model": "another"},
        {"dtype": "float16"},
        {"attn_backend": "FLASHINFER"},
        {"quant_config": "fp8"},
        {"model_kwargs": {"rope_theta": 1}},
        {"tp_size": 2},
        {"speculative_config": "MTP"},
        {"tokens_per_block": 64},
    ):
        assert fingerprint_values(arguments(**changes)) != plain, changes
