# SPDX-License-Identifier: Apache-2.0
"""Slots from sizes, and room in shared memory."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvbm.config.sizes
from kvbm.config.sizes import check_shm_room, tier_slots
from kvbm.errors import ConfigError

UINT32_MAX = 2**32 - 1


def slots(size_gb: float, bytes_per_block: int, override: int = 0) -> int:
    return tier_slots("SETTING", size_gb, override, bytes_per_block)


def filesystem(free: int, total: int, flags: int = 0) -> os.statvfs_result:
    """Result of statvfs with this many bytes, in blocks of 4 KiB."""
    return os.statvfs_result(
        (4096, 4096, total // 4096, free // 4096, free // 4096, 0, 0, 0, flags, 255)
    )


def refused(monkeypatch: pytest.MonkeyPatch, result: os.statvfs_result, needed: int) -> str:
    monkeypatch.setattr(os, "statvfs", lambda _folder: result)
    with pytest.raises(ConfigError) as error:
        check_shm_room("DYN_KVBM_CPU_CACHE_GB=20.0", needed)
    return str(error.value)


def test_gigabytes_are_decimal() -> None:
    assert slots(1, 1000) == 1_000_000
    assert slots(0.5, 1000) == 500_000


def test_a_part_of_a_block_is_no_slot() -> None:
    assert slots(1, 10**9) == 1
    assert slots(1, 10**9 // 2 + 1) == 1
    assert slots(1.999, 10**9) == 1


def test_an_override_wins_and_zero_is_no_override() -> None:
    assert slots(1, 1000, override=3) == 3
    assert slots(0, 1000, override=3) == 3
    assert slots(1, 1000, override=0) == 1_000_000


def test_no_size_is_no_slots() -> None:
    assert slots(0, 1000) == 0


@given(
    st.floats(min_value=1e-3, max_value=1e5),
    st.integers(min_value=1, max_value=2**34),
)
def test_slots_fill_the_size_to_within_a_block(size_gb: float, bytes_per_block: int) -> None:
    size_bytes = size_gb * 1e9
    if not 1 <= size_bytes / bytes_per_block < UINT32_MAX:
        with pytest.raises(ConfigError):
            slots(size_gb, bytes_per_block)
        return
    used = slots(size_gb, bytes_per_block) * bytes_per_block
    assert size_bytes - bytes_per_block - 1 < used < size_bytes + 1


def test_too_small_a_size_names_setting_value_and_bytes_per_block() -> None:
    with pytest.raises(ConfigError) as error:
        tier_slots("DYN_KVBM_CPU_CACHE_GB", 0.001, 0, 2_097_152)
    text = str(error.value)
    assert text.startswith("DYN_KVBM_CPU_CACHE_GB=0.001 gives 0 blocks of 2097152 bytes")
    assert "0.002097152 to " in text


def test_more_slots_than_can_be_numbered_are_refused() -> None:
    with pytest.raises(ConfigError, match=rf"allowed: 1 to {UINT32_MAX} blocks"):
        slots(1e6, 1)


@pytest.mark.parametrize("bytes_per_block", [0, -1])
def test_a_block_without_bytes_is_a_callers_mistake(bytes_per_block: int) -> None:
    with pytest.raises(ValueError, match="bytes per block must be >= 1"):
        slots(1, bytes_per_block)


def test_enough_room_is_accepted_to_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _folder: filesystem(8192, 65536))
    check_shm_room("S=1", 8192)
    with pytest.raises(ConfigError):
        check_shm_room("S=1", 8193)


def test_too_little_room_says_how_much_there_is_and_how_to_enlarge_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 64 MiB, as Docker gives by default, of which 1 MiB is taken.
    text = refused(monkeypatch, filesystem(63 * 2**20, 64 * 2**20), 20 * 10**9)
    for part in (
        "DYN_KVBM_CPU_CACHE_GB=20.0",
        "needs 20000000000 bytes (20.000 GB) in /dev/shm",
        f"{63 * 2**20} bytes (0.066 GB) free of {64 * 2**20}",
        "Set DYN_KVBM_CPU_CACHE_GB lower",
        "mount -o remount,size=19G /dev/shm",
        "--shm-size=19g",
        "medium: Memory",
        "sizeLimit: 19Gi",
    ):
        assert part in text


def test_the_size_to_enlarge_to_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 5 * 2**30
    text = refused(monkeypatch, filesystem(3 * 2**30, taken + 3 * 2**30), 4 * 2**30)
    assert "size=9G" in text
    monkeypatch.setattr(os, "statvfs", lambda _folder: filesystem(9 * 2**30 - taken, 9 * 2**30))
    check_shm_room("S=1", 4 * 2**30)


def test_a_read_only_mount_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refused(monkeypatch, filesystem(2**30, 2**30, os.ST_RDONLY), 1)
    assert "/dev/shm is mounted read-only" in text


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        check_shm_room("S=1", 1, str(tmp_path / "none"))


@pytest.mark.parametrize("limit", ["limit", "machine"])
def test_more_than_memory_can_hold_is_refused_though_the_file_system_is_larger(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str
) -> None:
    (tmp_path / "limit").write_text("1000000000\n")
    (tmp_path / "machine").write_text("max\n")
    monkeypatch.setattr(kvbm.config.sizes, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / limit))
    text = refused(monkeypatch, filesystem(2**60, 2**60), 2**50)
    allowed = {"limit": f"{tmp_path / limit} allows 1000000000 ", "machine": "this machine has "}
    assert allowed[limit] in text
    assert text.startswith("DYN_KVBM_CPU_CACHE_GB=20.0: the host tier needs 1125899906842624 bytes")
    assert "resources.limits.memory" in text
    check_shm_room("S=1", 10**9)


def test_the_real_file_system_is_asked(tmp_path: Path) -> None:
    check_shm_room("S=1", 1, str(tmp_path))
    with pytest.raises(ConfigError, match="S=1: the host tier needs"):
        check_shm_room("S=1", 2**62, str(tmp_path))
