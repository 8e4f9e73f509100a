# SPDX-License-Identifier: Apache-2.0
"""`gc` removes what nobody uses, asks first, and leaves everything else alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbm._fast.objects import SHARED_MEMORY
from kvbm.errors import InspectError
from kvbm.inspect import gc
from kvbm.instance import instances, segment_name
from tests.fast.instances import unique_name
from tests.inspect.conftest import Inspect
from tests.inspect.samples import Sample


def test_what_a_dead_private_instance_left_is_found_and_removed(
    left: str, inspect: Inspect
) -> None:
    found = {one.instance: one for one in gc.leftovers([])}
    assert found[left].objects == [segment_name(left)]
    assert found[left].bytes > 0
    result = inspect("gc", left, "--yes", "--json")
    assert json.loads(result.stdout)["removed"] == [left]
    assert left not in instances()


def test_gc_asks_and_no_is_no(left: str, inspect: Inspect) -> None:
    result = inspect("gc", left, input="n\n")
    assert "remove 1 instances?" in result.stdout
    assert result.exit_code == 0
    assert left in instances()
    assert inspect("gc", left, input="y\n").exit_code == 0
    assert left not in instances()


def test_json_without_yes_removes_nothing(left: str, inspect: Inspect) -> None:
    found = json.loads(inspect("gc", left, "--json").stdout)
    assert [one["instance"] for one in found["found"]] == [left]
    assert found["removed"] == []
    assert left in instances()


def test_what_is_in_use_is_never_removed(sample: Sample, inspect: Inspect) -> None:
    assert sample.name not in {one.instance for one in gc.leftovers([])}
    result = inspect("gc", sample.name, "--yes")
    assert result.exit_code == 2
    assert "is in use" in result.stderr
    assert sample.name in instances()


def test_a_named_instance_goes_only_when_it_is_named(inspect: Inspect) -> None:
    name = unique_name().removeprefix("/kvbm-")
    path = SHARED_MEMORY / segment_name(name).lstrip("/")
    path.write_bytes(b"left by a creator that died")
    try:
        assert name not in {one.instance for one in gc.leftovers([])}
        assert inspect("gc", name, "--yes").exit_code == 0
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_what_comes_into_use_meanwhile_is_kept(sample: Sample, inspect: Inspect) -> None:
    with pytest.raises(InspectError):
        gc.leftovers([sample.name])
    removed, kept = gc.remove([gc.Leftover(sample.name, [sample.instance.name], 1)])
    assert not removed
    assert [one.instance for one in kept] == [sample.name]
    assert (SHARED_MEMORY / sample.instance.name.lstrip("/")).exists()


def test_an_instance_without_a_segment_is_listed_and_can_be_removed(
    inspect: Inspect, tmp_path: Path
) -> None:
    name = unique_name().removeprefix("/kvbm-")
    path = SHARED_MEMORY / f"kvbm-{name}.host.0"
    path.write_bytes(bytes(4096))
    try:
        rows = json.loads(inspect("list", "--json").stdout)["instances"]
        mine = next(row for row in rows if row["instance"] == name)
        assert mine["state"] == "no segment"
        assert inspect("show", name).exit_code == 2
        assert inspect("gc", name, "--yes").exit_code == 0
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)
