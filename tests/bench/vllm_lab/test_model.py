# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.vllm_lab.model import ModelShape, make_model

pytest.importorskip("safetensors")

SHAPE = ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, vocabulary=64)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_the_same_shape_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    first = make_model(tmp_path / "a", SHAPE)
    second = make_model(tmp_path / "b", SHAPE)
    assert first.name == second.name
    assert weights(first) == weights(second)
    assert weights(make_model(tmp_path / "a", SHAPE, seed=1)) != weights(first)


def test_a_model_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    directory = make_model(tmp_path, SHAPE)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert make_model(tmp_path, SHAPE) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_the_configuration_says_the_shape(tmp_path: Path) -> None:
    config = json.loads((make_model(tmp_path, SHAPE) / "config.json").read_text())
    assert config["num_hidden_layers"] == SHAPE.layers
    assert config["num_key_value_heads"] == SHAPE.kv_heads
    assert config["vocab_size"] == SHAPE.vocabulary


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert SHAPE.kv_bytes_per_token() == 2 * 2 * 1 * 16 * 4
