# SPDX-License-Identifier: Apache-2.0
"""Slabs as a segment: what a start would find, whatever the slabs hold."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from kvbm.inspect import detail, report, text, tree
from kvbm.inspect.capture import capture
from kvbm.inspect.slab_segment import decoded
from kvbm.inspect.verify import check
from tests.fuzz import disk as fuzz
from tests.inspect.disk_samples import DiskSample, slab_bytes

SEEDS = 60


def test_blocks_are_those_that_the_table_has_and_what_is_left_over(disk: DiskSample) -> None:
    live = decoded(capture(disk.name)).of_tier("disk")
    alone = decoded(capture(str(disk.slab(0))))
    registered = live.blocks.of_state("registered")
    of_table = {one.tobytes() for one in live.blocks.digests[registered]}
    of_slab = {one.tobytes() for one in alone.blocks.digests[alone.blocks.of_state("registered")]}
    assert of_table < of_slab
    assert len(of_slab) == len(of_table) + 1
    slots = live.blocks.slot[registered, 0]
    assert (alone.blocks.digests[slots] == live.blocks.digests[registered]).all()
    assert (alone.blocks.position[slots] == live.blocks.position[registered]).all()
    assert (alone.blocks.children[slots] == live.blocks.children[registered]).all()


def test_a_block_must_be_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", str(tmp_path))
    data = bytearray(slab_bytes(1))
    data[4096 + 128 * 21 : 4096 + 128 * 22] = bytes(128)
    (tmp_path / "kvbm-both.disk.0").write_bytes(slab_bytes(0))
    (tmp_path / "kvbm-both.disk.1").write_bytes(bytes(data))
    both = decoded(capture("both"))
    assert report.pools(both)["disk"] == {"total": 32, "free": 16, "used": 16}
    assert detail.find(both, "20")[0][1] == 20
    rows = [tree.node_row(both, node) for node in tree.nodes(tree.tree_of(both))]
    assert [(row["position"], row["length"], row["orphan"]) for row in rows] == [
        (0, 12, False),
        (2, 2, True),
        (0, 1, False),
        (2, 1, True),
    ]


def test_whatever_a_slab_holds_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "kvbm-fuzz.disk.0"
    shown = 0
    for seed in range(SEEDS):
        path.write_bytes(fuzz.slab_bytes(Random(seed)))
        segment = decoded(capture(str(path)))
        shown += sum(1 for _ in text.summary_lines(report.summary(segment)))
        chosen = report.select_blocks(segment, report.Filter())
        shown += sum(1 for _ in report.block_rows(segment, chosen))
        shown += sum(1 for _ in tree.nodes(tree.tree_of(segment)))
        for block in chosen[:5]:
            shown += len(detail.detail(segment, int(block)))
        shown += len(check(segment).checked)
    assert shown > SEEDS
