# SPDX-License-Identifier: Apache-2.0
"""`verify` on a disk tier: sound tables and slabs hold, and what was broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvbm._fast.slab import SLAB_HEADER
from kvbm.inspect.capture import capture
from kvbm.inspect.slab_segment import decoded
from kvbm.inspect.verify import Verdict, check
from tests.fast.raw_segment import REGISTERED
from tests.fuzz.disk import sealed
from tests.inspect.conftest import Inspect
from tests.inspect.disk_samples import DiskSample, of_another_rank
from tests.inspect.test_verify import put_block, put_word, word


def checked(disk: DiskSample) -> Verdict:
    return check(decoded(capture(disk.name, slot_headers=True)))


def rules(verdict: Verdict) -> set[str]:
    return {violation.rule for violation in verdict.violations}


def change_header(path: Path, at_slot: int, seal: bool = True, **values: int) -> None:
    """Write fields of one header, with a right checksum or the one that it had."""
    at = 4096 + 128 * at_slot
    data = bytearray(path.read_bytes())
    header = np.frombuffer(data, SLAB_HEADER, 1, at).copy()
    for name, value in values.items():
        header[name] = value
    data[at : at + 128] = (sealed(header) if seal else header).tobytes()
    path.write_bytes(bytes(data))


def test_a_sound_disk_tier_holds_and_everything_was_checked(
    disk: DiskSample, inspect: Inspect
) -> None:
    found = json.loads(inspect("verify", disk.name, "--json").stdout)
    assert found["holds"], found["violations"]
    assert {"disk I1", "disk I2", "disk I4", "disk index", "disk slabs", "disk I6 (slabs)"} <= {
        *found["checked"]
    }


TABLE = {
    "a parent is gone": ("disk I1", put_word(2, word(0, 0, 0, 1))),
    "a child is not counted": ("disk I2", put_word(2, word(REGISTERED, 0, 0, 0))),
    "two blocks have one slot": ("disk I4", put_block(4, 40, 2 << 60 | 20)),
    "another slot": ("disk I6 (slabs)", put_block(15, 40, 2 << 60 | 25)),
    "another digest": ("disk I6 (slabs)", put_block(15, 8, 12345)),
}


@pytest.mark.parametrize("what", TABLE)
def test_a_broken_table_is_named_as_the_disk_tiers(what: str, disk: DiskSample) -> None:
    rule, change = TABLE[what]
    disk.disk.check = "nothing"
    assert checked(disk).violations == []
    with disk.disk.writable() as raw:
        change(raw)
    assert rule in rules(checked(disk))
    disk.disk.check = "nothing"


@pytest.mark.parametrize(
    "values",
    [
        {"state": 0},
        {"digest_lo": 1},
        {"digest_hi": 1},
        {"parent_lo": 1},
        {"group": 1},
        {"sequence_hash": 1},
    ],
    ids=str,
)
def test_a_slab_that_does_not_hold_what_the_table_says_is_named(
    values: dict[str, int], disk: DiskSample
) -> None:
    change_header(disk.slab(1), 21, **values)
    (found,) = checked(disk).violations
    assert found.rule == "disk I6 (slabs)"
    assert found.text == "rank 1: slot 21 of the slab does not hold block 3"


def test_a_torn_header_is_a_violation_only_where_the_table_has_its_block(
    disk: DiskSample,
) -> None:
    change_header(disk.slab(0), 25, seal=False, digest_lo=7)
    assert checked(disk).violations == []
    change_header(disk.slab(0), 21, seal=False, digest_lo=7)
    assert rules(checked(disk)) == {"disk I6 (slabs)"}


@pytest.mark.parametrize("values", [{"slot": 3}, {"rank": 0}, {"fingerprint": 9}], ids=str)
def test_a_whole_header_of_another_place_is_named(
    values: dict[str, int], slab_file: Path, inspect: Inspect
) -> None:
    change_header(slab_file, 29, **values)
    result = inspect("verify", slab_file)
    assert result.exit_code == 1
    assert "violated     slabs: rank 1: the header of slot 29 is whole and of" in result.stdout


def test_a_block_that_is_not_below_its_parent_is_named(slab_file: Path, inspect: Inspect) -> None:
    change_header(slab_file, 23, position=5)
    text = inspect("verify", slab_file).stdout
    assert "violated     slabs: rank 1: slot 23 is at position 5, its parent at 2" in text


def test_a_slab_that_is_cut_is_named(slab_file: Path, inspect: Inspect) -> None:
    data = slab_file.read_bytes()
    slab_file.write_bytes(data[: 4096 + 128 * 20])
    result = inspect("verify", slab_file)
    assert result.exit_code == 1
    assert "20 of 32 headers are there" in result.stdout
    assert f"of {len(data)}" in result.stdout


def test_slabs_that_cannot_be_compared_are_said(disk: DiskSample) -> None:
    slab = disk.slab(1)
    whole = slab.read_bytes()
    slab.write_bytes(of_another_rank(1) + whole[4096:])
    assert any("is of other content" in text for text in checked(disk).unchecked)
    slab.unlink()
    assert any("no slab of rank 1 was read" in text for text in checked(disk).unchecked)
    segment = decoded(capture(disk.name))
    assert segment.disk is not None
    segment.disk.__dict__["description"] = {"slabs": []}
    assert any("have no names" in text for text in check(segment).unchecked)


def test_a_row_that_names_no_disk_slot_is_named(disk: DiskSample) -> None:
    disk.host.instance.check = "nothing"
    with disk.host.instance.writable() as raw:
        at = raw.operation_at(0, 0)
        raw.put_u32(at + 8, 3)  # a spill
        raw.put_u32(at + 192, 31)
        assert checked(disk).violations == []
        raw.put_u32(at + 192, 32)
    assert "operations" in rules(checked(disk))
