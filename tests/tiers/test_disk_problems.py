# SPDX-License-Identifier: Apache-2.0
"""Slabs on real file systems that are full, read-only, another user's or without O_DIRECT."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvbm.errors import SlabError
from kvbm.tiers.disk import Slab, SlabFiles
from kvbm.tiers.disk_problems import not_writable
from tests.mounts import become_nobody, mount, with_mounts
from tests.tiers.test_disk import WANTED

NAMES = [None, "disk"]  # a slab without a name, and one with a name
ZEROS = {"zerofill": True}


def refusal(files: SlabFiles, instance: str | None) -> str:
    """What a slab is refused with; no file may be left."""
    with pytest.raises(SlabError) as caught:
        Slab(files, WANTED, instance)
    if files.folder.is_dir():
        assert list(files.folder.iterdir()) == []
    text = str(caught.value)
    assert f"DYN_KVBM_DISK_CACHE_DIR={files.folder} to another folder" in text
    return text


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    slab = Slab(SlabFiles(tmp_path / "a" / "b"), WANTED, "disk")
    assert slab.path is not None
    assert slab.path.stat().st_size == WANTED.layout.total_bytes
    slab.close()


@pytest.mark.parametrize("instance", NAMES)
def test_a_full_file_system_is_refused_with_the_numbers(
    tmp_path: Path, instance: str | None
) -> None:
    def check() -> None:
        mount(tmp_path, "size=20480")
        text = refusal(SlabFiles(tmp_path), instance)
        assert f"{WANTED.layout.total_bytes} bytes (0.000 GB) do not fit, 20480 " in text
        assert "DYN_KVBM_DISK_CACHE_GB lower" in text

    with_mounts(check)


@pytest.mark.parametrize("instance", NAMES)
@pytest.mark.parametrize("below", ["", "missing/deep"])
def test_a_read_only_file_system_is_refused(
    tmp_path: Path, instance: str | None, below: str
) -> None:
    def check() -> None:
        mount(tmp_path, read_only=True)
        text = refusal(SlabFiles(tmp_path / below), instance)
        assert "Read-only file system" in text
        assert f"allowed: one that user {os.geteuid()} may write" in text

    with_mounts(check)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("instance", NAMES)
@pytest.mark.parametrize("below", ["", "missing"])
def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, instance: str | None, below: str
) -> None:
    def check() -> None:
        mount(tmp_path.parents[-2], "mode=755")  # the way to it must be open
        tmp_path.mkdir(parents=True)
        become_nobody()
        text = refusal(SlabFiles(tmp_path / below), instance)
        assert ("may not make files in" if instance and not below else "Permission denied") in text
        assert "user 65534 may write" in text

    with_mounts(check)


@pytest.mark.parametrize("instance", NAMES)
def test_a_file_system_without_direct_io_is_refused_before_space_is_reserved(
    tmp_path: Path, instance: str | None
) -> None:
    def check() -> None:
        mount(tmp_path, kind="ramfs")
        for files in (SlabFiles(tmp_path), SlabFiles(tmp_path, zerofill=True, open_direct=True)):
            text = refusal(files, instance)
            assert "O_DIRECT is not possible (Invalid argument)" in text
            assert "DYN_KVBM_DISK_DISABLE_O_DIRECT=1" in text

    with_mounts(check)


@pytest.mark.parametrize("instance", NAMES)
def test_a_file_system_that_cannot_reserve_is_refused_unless_zeros_are_asked_for(
    tmp_path: Path, instance: str | None
) -> None:
    def check() -> None:
        mount(tmp_path, kind="ramfs")
        files = SlabFiles(tmp_path, direct=False)
        assert "DYN_KVBM_DISK_ZEROFILL_FALLBACK=1" in refusal(files, instance)
        slab = Slab(replace(files, zerofill=True), WANTED, instance)
        assert os.fstat(slab.table_fd).st_size == WANTED.layout.total_bytes
        slab.close()

    with_mounts(check)


@pytest.mark.parametrize("instance", NAMES)
def test_zeros_that_do_not_fit_are_refused_with_the_numbers(
    tmp_path: Path, instance: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm.tiers.disk.allocate_file", lambda _fd, _count: errno.EOPNOTSUPP)

    def check() -> None:
        mount(tmp_path, "size=20480")
        assert "bytes (0.000 GB) do not fit" in refusal(SlabFiles(tmp_path, **ZEROS), instance)

    with_mounts(check)


@pytest.mark.parametrize("below", ["", "deep"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    text = refusal(SlabFiles(tmp_path / "file" / below), "disk")
    assert ("Not a directory" if below else "it is no folder") in text


def test_a_quota_is_told_by_its_own_name(tmp_path: Path) -> None:
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert "quota" in str(not_writable("a file", tmp_path, error))
