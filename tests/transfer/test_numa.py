# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvbm.transfer.numa import cpus_near, parse_cpu_list

BUS_ID = "0000:3B:00.0"


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may use four processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def describe(devices: Path, cpus: str) -> Path:
    """Describe the device's processors as the kernel does."""
    folder = devices / BUS_ID.lower()
    folder.mkdir()
    (folder / "local_cpulist").write_text(cpus)
    return devices


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,8,10-11\n", {0, 1, 2, 8, 10, 11}), ("5", {5}), ("\n", set())]
)
def test_a_list_of_processors_is_read(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


def test_the_near_processors_are_those_that_the_process_may_use(tmp_path: Path) -> None:
    assert cpus_near(BUS_ID, describe(tmp_path, "2-7\n")) == {2, 3}


@pytest.mark.parametrize(
    "cpus", ["0-7\n", "8-15\n", "\n", "many\n"], ids=["all", "others", "none", "no list"]
)
def test_nothing_is_near_where_it_makes_no_difference_or_is_unknown(
    tmp_path: Path, cpus: str
) -> None:
    assert cpus_near(BUS_ID, describe(tmp_path, cpus)) == frozenset()


def test_a_device_that_the_system_does_not_describe_has_no_near_processors(tmp_path: Path) -> None:
    assert cpus_near(BUS_ID, tmp_path) == frozenset()
    assert cpus_near("", tmp_path) == frozenset()
