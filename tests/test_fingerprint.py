# SPDX-License-Identifier: Apache-2.0
"""What must be equal for bytes to be reusable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvbm._fast.segment import FORMAT_VERSION
from kvbm.fingerprint import (
    SHOWN_CHARACTERS,
    Fingerprint,
    config_version,
    differences,
    weights_version,
)

VALUES: dict[str, Any] = {"model": "m", "dtype": "float16", "ranks": 2, "geometry": ["a", "b"]}


def reversed_dict(values: dict[str, Any]) -> dict[str, Any]:
    """Make the same dictionary with its keys the other way round."""
    return dict(reversed(values.items()))


def test_equal_values_in_another_order_are_one_fingerprint() -> None:
    assert Fingerprint(VALUES).digest == Fingerprint(reversed_dict(VALUES)).digest
    assert len(Fingerprint(VALUES).digest) == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "n"), ("dtype", "float32"), ("ranks", 1), ("geometry", ["b", "a"]), ("new", None)],
)
def test_every_value_counts(name: str, value: Any) -> None:
    assert Fingerprint(VALUES).digest != Fingerprint({**VALUES, name: value}).digest


def test_the_description_can_be_read() -> None:
    described = json.loads(Fingerprint(VALUES).description)
    assert described == {"format": FORMAT_VERSION, **VALUES}


def test_weights_of_a_folder_are_other_ones_once_a_file_was_replaced(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = weights_version(str(tmp_path), None)
    assert weights_version(str(tmp_path), "ignored") == first
    (tmp_path / "config.json").write_text('{"not": "weights"}')
    assert weights_version(str(tmp_path), None) == first
    os.utime(file, ns=(1, 1))
    second = weights_version(str(tmp_path), None)
    file.write_bytes(b"weights!")
    os.utime(file, ns=(1, 1))
    third = weights_version(str(tmp_path), None)
    (tmp_path / "more.bin").write_bytes(b"")
    assert len({first, second, third, weights_version(str(tmp_path), None)}) == 4


def test_weights_of_a_name_are_its_revision() -> None:
    assert weights_version("no/such-model", "abc") == "abc"
    assert weights_version("no/such-model", None) == "default"


def test_what_a_models_configuration_says_counts() -> None:
    config = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    same = {**reversed_dict(config), "_name_or_path": "/elsewhere", "transformers_version": "9"}
    assert config_version(same) == config_version(config)
    assert config_version({**config, "rope_theta": 500000.0}) != config_version(config)
    assert config_version({**config, "rope_scaling": None}) != config_version(config)
    assert config_version(None) is None


def test_only_what_differs_is_shown() -> None:
    changed = {**VALUES, "dtype": "bfloat16", "ranks": 4, "new": None}
    del changed["model"]
    found, wanted = differences(Fingerprint(VALUES).description, Fingerprint(changed).description)
    assert found == "dtype=float16, model=m, new=(none), ranks=2"
    assert wanted == "dtype=bfloat16, model=(none), new=null, ranks=4"


def test_a_long_value_is_cut_off() -> None:
    long = Fingerprint({**VALUES, "model": "x" * 10_000})
    found, wanted = differences(Fingerprint(VALUES).description, long.description)
    assert found == "model=m"
    assert len(wanted) == len("model=") + SHOWN_CHARACTERS


@pytest.mark.parametrize(
    "found", [b"", b"{", b"\xff\xfe", b"[1]", b"1", b"[" * 2000, b'{"model":"\x00\n"}']
)
def test_a_description_that_is_none_is_shown_as_far_as_it_goes(found: bytes) -> None:
    shown, wanted = differences(found, Fingerprint(VALUES).description)
    assert f"{shown}{wanted}".isprintable()
    assert "model=m" in wanted
