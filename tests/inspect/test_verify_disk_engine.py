# SPDX-License-Identifier: Apache-2.0
"""`verify` on a disk tier that an engine fills, evicts from, resets, and leaves to a reboot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm.instance import remove
from tests.disk_engine import BLOCKS, ask, counters, disk_engines, settle, spill
from tests.inspect.conftest import Inspect
from tests.small_engine import SmallEngine

NAME = f"verify-disk-{os.getpid()}"


@pytest.fixture
def make_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines whose slabs the inspector finds."""
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", str(tmp_path))
    yield from disk_engines(tmp_path)


def holds(inspect: Inspect) -> list[str]:
    """What was checked; nothing may be violated."""
    found = json.loads(inspect("verify", NAME, "--json").stdout)
    assert found["violations"] == []
    return list(found["checked"])


@pytest.mark.parametrize("groups", [1, 2])
def test_everything_holds_whatever_the_engine_does(
    groups: int, make_engine: Callable[..., SmallEngine], inspect: Inspect
) -> None:
    engine = make_engine(
        instance=NAME,
        ranks=2,
        groups=groups,
        host_slots=12 * groups,
        disk_cache_override_num_blocks=40 * groups,
    )
    for number in range(4):  # the disk has room for the last of them, and not for all
        spill(engine, seed=number, value=float(number))
    assert counters(engine)["evicted"] > 0
    assert "disk I6 (slabs)" in holds(inspect)
    assert ask(engine, "again", 3) == len(BLOCKS)
    settle(engine)
    assert counters(engine)["blocks_loaded"] > 0
    assert "disk I6 (slabs)" in holds(inspect)
    engine.leader.reset()
    engine.run_until(lambda: engine.leader.disk is not None)
    spill(engine, seed="after the reset", value=9.0)
    assert "disk I6 (slabs)" in holds(inspect)
    engine.close()
    assert "disk I6 (slabs)" in holds(inspect)
    remove(NAME)
    assert holds(inspect) == ["slabs"]
    found = json.loads(inspect("show", NAME, "--json").stdout)
    assert found["state"] == "on disk"
    assert found["pools"]["disk"]["used"] >= len(BLOCKS) * groups
    assert all(slab["headers"]["torn"] == 0 for slab in found["slabs"])
