# SPDX-License-Identifier: Apache-2.0
"""What is read of a slab: whole, damaged, and of files that only look like one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvbm._fast.slab import EMPTY, FOREIGN, SLAB_HEADER, TORN, VALID, header_conditions
from kvbm.inspect.slab import (
    SlabFacts,
    SlabHead,
    find_slabs,
    looks_like_slab,
    read_slab_head,
    slab_folder,
)
from tests.fuzz.disk import sealed
from tests.inspect.conftest import Inspect
from tests.inspect.disk_samples import (
    PAYLOAD,
    SLOTS,
    slab_bytes,
    superblock,
    torn_superblock,
)
from tests.inspect.disk_samples import (
    TORN as TORN_SLOT,
)


def facts(data: bytes) -> SlabFacts:
    return SlabFacts(SlabHead("slab", len(data), data[: superblock(0).layout.data_offset]))


def test_a_header_is_empty_valid_torn_or_foreign() -> None:
    headers = np.zeros(6, SLAB_HEADER)
    headers["slot"] = np.arange(6)
    headers["state"][[1, 2, 3]] = 1
    headers["slot"][3] = 9
    headers = sealed(headers)
    headers["digest_lo"][2] = 7  # behind the checksum
    headers[4] = np.zeros(1, SLAB_HEADER)[0]
    headers["rank"][5] = 1
    headers[5:] = sealed(headers[5:])
    found = header_conditions(headers.tobytes(), rank=0, fingerprint=0, payload_bytes=0)
    assert found.tolist() == [EMPTY, VALID, TORN, FOREIGN, EMPTY, FOREIGN]
    after = header_conditions(headers[1:2].tobytes(), rank=0, fingerprint=0, payload_bytes=0)
    assert after.tolist() == [FOREIGN]  # not the first slot's


def test_a_whole_slab_says_everything() -> None:
    row = facts(slab_bytes(1)).row()
    assert row["rank"] == 1
    assert row["slots"] == SLOTS
    assert row["headers"] == {"empty": 14, "valid": 17, "torn": 1, "foreign": 0}
    assert row["nonce"] == f"{superblock(1).nonce:016x}"
    assert row["without_parent"] == 1
    assert row["damage"] == []


def test_without_a_superblock_the_headers_tell_the_sizes() -> None:
    found = facts(torn_superblock(slab_bytes(1)))
    assert found.layout == superblock(1).layout
    assert found.identity == (1, superblock(1).short_fingerprint, PAYLOAD)
    assert found.row()["headers"]["valid"] == 17
    assert found.conditions[TORN_SLOT] == TORN
    assert found.damage == ["slab: its superblock cannot be read; sizes from headers"]


def test_without_superblock_and_headers_nothing_is_made_up() -> None:
    found = facts(bytes(len(slab_bytes(0))))
    assert found.layout is None
    assert found.row()["headers"]["valid"] == 0
    assert found.damage == ["slab: its superblock cannot be read; nothing else tells its sizes"]


def test_a_file_of_another_size_than_the_headers_say_has_none() -> None:
    data = torn_superblock(slab_bytes(0)) + b"more"
    assert facts(data).layout is None


def test_only_the_head_of_a_slab_is_read(tmp_path: Path) -> None:
    path = tmp_path / "kvbm-a.disk.0"
    path.write_bytes(slab_bytes(0))
    head = read_slab_head(path)
    assert len(head.data) == superblock(0).layout.data_offset
    assert head.size == superblock(0).layout.total_bytes
    assert head.in_use is False


def test_a_superblock_that_promises_too_much_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "kvbm-a.disk.0"
    with path.open("wb") as file:
        file.write(replace(superblock(0), slots=2**32 - 1).pack())
        file.truncate(1 << 42)  # with a hole
    head = read_slab_head(path)
    assert len(head.data) < 1 << 20
    found = SlabFacts(head)
    assert any("headers are there" in text for text in found.damage)


def test_a_pipe_with_a_slabs_name_is_no_slab(tmp_path: Path, inspect: Inspect) -> None:
    path = tmp_path / "kvbm-a.disk.0"
    os.mkfifo(path)
    with pytest.raises(PermissionError, match="no regular file"):
        read_slab_head(path)
    assert inspect("show", path).exit_code == 2


def test_slabs_are_found_by_their_names_in_the_folder_that_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", str(tmp_path))
    for name in ("kvbm-a.disk.0", "kvbm-a.disk.1", "kvbm-b.c.disk.0", "other", "kvbm-x.disk.y"):
        (tmp_path / name).write_bytes(b"")
    found = find_slabs()
    assert {name: sorted(ranks) for name, ranks in found.items()} == {"a": [0, 1], "b.c": [0]}
    monkeypatch.delenv("DYN_KVBM_DISK_CACHE_DIR")
    assert slab_folder() == Path("/tmp")


def test_a_slab_under_another_name_is_known_by_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    path.write_bytes(slab_bytes(0))
    assert looks_like_slab(path)
    path.write_bytes(b"something else")
    assert not looks_like_slab(path)
