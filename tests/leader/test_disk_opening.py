# SPDX-License-Identifier: Apache-2.0
"""How a disk tier begins: what slabs of several ranks agree on, its settings, and an early end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvbm.worker.disk
from kvbm._fast.slab import SLAB_HEADER
from kvbm.instance import remove
from kvbm.leader.disk_opening import common_headers
from kvbm.tiers.disk import slab_path
from tests.disk_engine import BLOCKS, HOST, ask, disk_engines, expected, load, spill, tier
from tests.leaks import wait_until
from tests.small_engine import SmallEngine


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier."""
    yield from disk_engines(tmp_path)


def headers(*digests: tuple[int, int]) -> np.ndarray:
    """Headers of (slot, digest)."""
    made = np.zeros(len(digests), SLAB_HEADER)
    for header, (slot, digest) in zip(made, digests, strict=True):
        header["slot"], header["digest_lo"] = slot, digest
    return made


# ---- what the ranks agree on ---------------------------------------------------------------------
def test_one_rank_agrees_with_itself() -> None:
    table = headers((3, 30), (5, 50))
    assert common_headers([table]).tolist() == table.tolist()


def test_slots_that_hold_the_same_on_all_ranks_are_kept() -> None:
    found = common_headers(
        [
            headers((1, 10), (2, 20), (4, 40), (6, 60)),
            headers((1, 10), (2, 21), (4, 40), (7, 70)),
            headers((0, 5), (1, 10), (4, 40)),
        ]
    )
    assert found["slot"].tolist() == [1, 4]
    assert found["digest_lo"].tolist() == [10, 40]


@pytest.mark.parametrize(
    "field", ["digest_lo", "digest_hi", "parent_lo", "parent_hi", "position", "group"]
)
def test_one_field_that_differs_is_enough(field: str) -> None:
    one, other = headers((1, 10)), headers((1, 10))
    other[field] += 1
    assert len(common_headers([one, other])) == 0


def test_a_block_that_one_rank_lost_is_not_found_after_a_restart(
    make_engine: Callable[..., SmallEngine], tmp_path: Path
) -> None:
    name = f"disk-opening-{os.getpid()}"
    engine = make_engine(instance=name, ranks=2)
    spill(engine, value=4)
    own = tier(engine).disk
    assert own is not None
    engine.close()
    remove(name)
    path = slab_path(tmp_path, name, 1)
    with path.open("r+b") as file:  # the second rank's header of the slot written last
        table = np.frombuffer(file.read(4096 + 64 * 128)[4096:], SLAB_HEADER)
        last = int(table["slot"][table["position"] == len(BLOCKS) - 1][0])
        file.seek(4096 + last * 128)
        file.write(bytes(128))
    again = make_engine(instance=name, ranks=2)
    assert ask(again, "r", "a") == len(BLOCKS) - 1
    assert load(again, "r", len(BLOCKS) - 1) == expected(4, len(BLOCKS) - 1)


# ---- settings ------------------------------------------------------------------------------------
def test_without_disk_slots_there_is_no_tier() -> None:
    engine = SmallEngine(HOST)
    assert engine.leader.disk is None
    assert engine.opener is None
    engine.close()


def test_with_a_disk_alone_every_block_is_written_and_comes_back(
    make_engine: Callable[..., SmallEngine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(cpu_cache_override_num_blocks=0, disable_disk_offload_filter=False)
    assert not tier(engine).flow.filtered
    assert "this wears an SSD" in caplog.text
    spill(engine, value=6)
    assert ask(engine, "r", "a") == len(BLOCKS)
    assert load(engine, "r", len(BLOCKS)) == expected(6)


def test_with_a_host_tier_the_filter_is_on(make_engine: Callable[..., SmallEngine]) -> None:
    assert tier(make_engine(disable_disk_offload_filter=False)).flow.filtered


# ---- start and end -------------------------------------------------------------------------------
def test_the_log_says_how_much_was_found(
    make_engine: Callable[..., SmallEngine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = f"disk-opening-{os.getpid()}"
    engine = make_engine(instance=name)
    spill(engine)
    engine.close()
    remove(name)
    make_engine(instance=name)
    found = [r.getMessage() for r in caplog.records if "found in the slabs" in r.getMessage()]
    assert found[0].endswith("0 found in the slabs")
    assert not found[1].endswith(" 0 found in the slabs")


def test_the_end_comes_while_the_workers_make_their_slabs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.worker.disk.WorkerDisk, "_open", lambda _: None)
    engine = SmallEngine(HOST, disk_cache_override_num_blocks=20, disk_cache_dir=tmp_path)
    assert engine.opener is not None
    assert not engine.opener.wait(0.05)
    engine.opener.close()
    assert wait_until(lambda: engine.opener is not None and engine.opener.wait(0))
    assert tier(engine).disk is None
    engine.close()
