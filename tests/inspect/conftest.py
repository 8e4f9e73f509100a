# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the sample instance, and the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvbm._fast.objects import object_path
from kvbm._fast.segment import shape_for
from kvbm.inspect.cli import main
from kvbm.instance import private_instance, segment_name
from kvbm.tiers.disk_device import DiskDevice
from tests.fast.instances import Instance, instance, unique_name
from tests.inspect.disk_samples import DiskSample, disk_sample, slab_bytes
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


@pytest.fixture
def left() -> Iterator[str]:
    """A private instance that its engine has left behind."""
    name = private_instance(unique_name())
    one = Instance(shape_for(64, 0, 1, 16, True), segment_name(name))
    one.raw.close()
    for segment in one.attached:
        segment.close()
    yield name
    object_path(one.name).unlink(missing_ok=True)


@pytest.fixture(scope="session")
def frozen_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the sample, which is always the same."""
    one = instance(host_slots=64, ranks=2)
    try:
        return frozen_snapshot(fill(one), tmp_path_factory.mktemp("inspect"))
    finally:
        one.remove()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskSample]:
    """The live sample with a disk tier, whose slabs are in the folder that is configured."""
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", str(tmp_path))
    with disk_sample(tmp_path) as made:
        yield made


@pytest.fixture
def disk_file(disk: DiskSample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A frozen snapshot of it, which is always the same, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(frozen_snapshot(disk.host, tmp_path).name)


@pytest.fixture
def slab_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slab alone, as after a reboot, in the current folder, on a device that hides its wear."""
    monkeypatch.chdir(tmp_path)
    device = DiskDevice("sda", None, True, 1 << 30, problem="sda is no NVMe drive")
    monkeypatch.setattr("kvbm.inspect.capture.device_of", lambda _: device)
    path = tmp_path / "kvbm-sample.disk.1"
    path.write_bytes(slab_bytes(1))
    return Path(path.name)


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
