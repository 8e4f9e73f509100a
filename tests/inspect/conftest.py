# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the sample instance, and the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvbm.inspect.cli import main
from tests.fast.instances import instance
from tests.inspect.samples import Sample, fill, frozen_snapshot

Inspect = Callable[..., Result]


@pytest.fixture
def sample() -> Iterator[Sample]:
    """The live sample; its segment is removed afterwards."""
    one = instance(host_slots=64, ranks=2)
    try:
        yield fill(one)
    finally:
        one.remove()


@pytest.fixture(scope="session")
def frozen_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the sample, which is always the same."""
    one = instance(host_slots=64, ranks=2)
    try:
        return frozen_snapshot(fill(one), tmp_path_factory.mktemp("inspect"))
    finally:
        one.remove()


@pytest.fixture
def snapshot_file(frozen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The frozen snapshot in the current folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    os.link(frozen_file, tmp_path / frozen_file.name)
    return Path(frozen_file.name)


@pytest.fixture
def inspect() -> Inspect:
    """Run the command line; the result has `exit_code`, `stdout` and `stderr`."""

    def run(*arguments: object, **options: object) -> Result:
        return CliRunner().invoke(
            main, [str(argument) for argument in arguments], catch_exceptions=False, **options
        )

    return run
