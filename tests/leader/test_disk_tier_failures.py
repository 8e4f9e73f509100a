# SPDX-License-Identifier: Apache-2.0
"""A disk tier whose disk fails: damaged blocks, a disk that hangs, no slab, and the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvbm.leader.disk_tier
import kvbm.worker.disk
from kvbm._fast.keys import Keys
from kvbm.shared import close_and_remove
from kvbm.tiers.disk import read_slab, slab_path
from tests.disk_engine import (
    BLOCKS,
    DISK,
    HOST,
    ask,
    counters,
    disk_engines,
    expected,
    load,
    settle,
    spill,
    tier,
)
from tests.fast.instances import digests
from tests.leaks import wait_until
from tests.small_engine import SmallEngine


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier."""
    yield from disk_engines(tmp_path)


@pytest.fixture
def engine(make_engine: Callable[..., SmallEngine]) -> SmallEngine:
    """A private engine that writes every block to disk."""
    return make_engine()


def flip_everything(folder: Path, name: str) -> None:
    """Change a byte in each slot's data."""
    path = slab_path(folder, name, 0)
    found = read_slab(path)
    assert found is not None
    layout = found[0].layout
    with open(path, "r+b") as file:
        for slot in range(layout.slots):
            file.seek(layout.data_offset + slot * layout.stride + 10)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 255]))


def test_damaged_bytes_are_never_served(
    make_engine: Callable[..., SmallEngine], tmp_path: Path
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name, disk_disable_o_direct=True)
    spill(engine)
    flip_everything(tmp_path, name)
    assert ask(engine, "r", "a") == 0
    assert counters(engine)["loads_failed"] == 1
    assert counters(engine)["check_failures"] == 1  # its slot is not used again
    engine.leader.abandon("r")
    assert ask(engine, "s", "a") == 0  # and it is not asked for again soon
    assert counters(engine)["loads_failed"] == 1


def test_a_damaged_block_is_written_anew_elsewhere(
    make_engine: Callable[..., SmallEngine], tmp_path: Path
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name, disk_disable_o_direct=True)
    spill(engine)
    own = tier(engine)
    assert own.disk is not None
    keys = Keys(digests(len(BLOCKS), "a"))
    flip_everything(tmp_path, name)
    assert ask(engine, "r", "a") == 0
    engine.leader.abandon("r")
    settle(engine)
    assert own.disk.match(keys, 0, len(BLOCKS)) == (0, None)
    assert len(own._quarantined) == 1
    own.failures.forget()
    spill(engine, value=7)
    assert ask(engine, "s", "a") == len(BLOCKS)
    assert load(engine, "s", len(BLOCKS)) == expected(7)


def test_slots_are_kept_in_quarantine_up_to_a_number(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kvbm.leader.disk_tier, "QUARANTINE_MAX", 2)
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(instance=name, disk_disable_o_direct=True)
    for number in range(3):
        spill(engine, number)
    flip_everything(tmp_path, name)
    for number in range(3):
        assert ask(engine, f"r{number}", number) == 0
        engine.leader.abandon(f"r{number}")
    own = tier(engine)
    assert own.disk is not None
    assert len(own._quarantined) == 2
    assert sorted(own.disk.held().values()) == [1, 1]
    engine.leader.reset()
    assert own.disk.held() == {}


def test_a_read_that_came_too_late_damages_nothing(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(engine)
    own = tier(engine)
    engine.workers[0].loop.stop()  # type: ignore[union-attr]
    engine.workers[0]._copies.join(timeout=10)
    monkeypatch.setattr(kvbm.leader.disk_tier, "DEADLINE_SECS", 0.05)
    assert ask(engine, "r", "a") == 0
    own.collect()
    assert own.disk is not None
    count, ref = own.disk.match(Keys(digests(len(BLOCKS), "a")), 0, len(BLOCKS))
    assert count == len(BLOCKS)
    assert ref is not None
    own.disk.unpin(ref)
    assert not own._damaged


def test_a_disk_that_keeps_failing_is_left_alone(
    make_engine: Callable[..., SmallEngine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"disk-tier-{os.getpid()}"
    engine = make_engine(
        instance=name, disk_disable_o_direct=True, disk_cache_override_num_blocks=200
    )
    for number in range(5):
        spill(engine, number)
    flip_everything(tmp_path, name)
    for number in range(5):
        assert ask(engine, f"r{number}", number) == 0
        engine.leader.abandon(f"r{number}")
    assert "left alone" in caplog.text
    failed = counters(engine)["loads_failed"]
    assert failed == 4
    assert not tier(engine).health.allows()


def test_a_disk_on_which_nothing_ends_is_switched_off_and_requests_go_on(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spill(engine)
    engine.workers[0].loop.stop()  # type: ignore[union-attr]  # nobody takes operations any more
    engine.workers[0]._copies.join(timeout=10)
    monkeypatch.setattr(kvbm.leader.disk_tier, "DEADLINE_SECS", 0.05)
    assert ask(engine, "r", "a") == 0
    assert tier(engine).health.is_off
    assert "the disk tier is off" in caplog.text


def test_without_a_slab_the_engine_serves_without_a_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    engine = SmallEngine(
        HOST, disk_cache_override_num_blocks=DISK, disk_cache_dir=tmp_path / "file"
    )
    try:
        assert wait_until(lambda: "there is no disk tier" in caplog.text)
        engine.store("r", BLOCKS, "a", 3)
        assert ask(engine, "s", "a") == len(BLOCKS)
        assert load(engine, "s", len(BLOCKS)) == expected(3)
    finally:
        engine.close()


def test_nothing_is_held_when_all_is_quiet(engine: SmallEngine) -> None:
    for number in range(3):
        spill(engine, number)
    ask(engine, "r", 0)
    engine.leader.abandon("r")
    settle(engine)
    own = tier(engine)
    assert own.disk is not None
    assert own.disk.held() == {}
    assert own.table.held() == {}


def test_the_end_with_writes_under_way_leaves_nothing(engine: SmallEngine) -> None:
    engine.store("r", BLOCKS, "a")
    engine.run_until(lambda: tier(engine)._spills or counters(engine)["stores"])
    engine.leader.close()  # what still runs is left to recovery
    assert engine.opener is not None
    engine.opener.close()
    engine.leader = None  # type: ignore[assignment]
    engine.raw.close()
    close_and_remove(engine.segment, engine.instance)
    engine.close()
    assert list(Path("/dev/shm").glob(f"kvbm-{engine.instance}*")) == []
