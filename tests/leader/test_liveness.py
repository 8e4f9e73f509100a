# SPDX-License-Identifier: Apache-2.0
"""Leaders that live return what dead ones held, in the segments of both tiers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvbm.leader.liveness
from kvbm._fast.disk_table import DiskTable
from kvbm._fast.keys import Keys
from kvbm._fast.participants import claim_leader, participants
from kvbm._fast.segment import Segment
from tests.disk_engine import BLOCKS, counters, disk_engines, settle, tier
from tests.fast.instances import digests, run_in_fork
from tests.small_engine import SmallEngine


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier."""
    yield from disk_engines(tmp_path)


def test_what_a_dead_engine_reserved_on_disk_is_written_by_one_that_lives(
    make_engine: Callable[..., SmallEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.leader.liveness, "LIVENESS_SECS", 0.0)
    engine = make_engine(instance=f"liveness-{os.getpid()}")
    disk = tier(engine).disk
    assert disk is not None
    chain = digests(len(BLOCKS), "a")

    def die_while_writing() -> None:
        segment = Segment.attach(disk.segment.name)
        claim_leader(segment, 0xDEAD)
        assert len(DiskTable(segment).reserve(Keys(chain), 0, len(chain))) == len(chain)

    run_in_fork(die_while_writing)
    assert sum(not line.alive for line in participants(disk.segment)) == 1
    engine.store("r", BLOCKS, "a")
    settle(engine)
    assert counters(engine)["blocks_stored"] == len(BLOCKS)
    assert all(line.alive for line in participants(disk.segment))
