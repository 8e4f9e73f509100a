# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.errors import GeometryError, TransferError
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.geometry import KvGeometry, geometry_of
from kvbm.transfer.plan import coalesce, plan_copy
from tests.transfer.kv_tensors import block_bytes, numbered

NAMES = ("layers.0", "layers.1", "layers.2")
# Shape of a layer with 16 blocks, and the order of its axes in memory.
SHAPES = {
    "packed": ((16, 3, 5), (0, 1, 2)),
    "k/v first": ((2, 16, 3, 5), (0, 1, 2, 3)),
    "heads outermost": ((16, 3, 5), (1, 0, 2)),
    "blocks apart": ((16, 3, 5), (2, 0, 1)),
}


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Runs of rows (device block, slot) of 16 blocks and 20 slots, in any order."""
    found: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 6))):
        block, slot = draw(st.integers(0, 15)), draw(st.integers(0, 19))
        length = draw(st.integers(1, min(16 - block, 20 - slot)))
        found += [(block + i, slot + i) for i in range(length)]
    return found


def geometry_with(shape: str) -> tuple[KvGeometry, list[object]]:
    tensors = [numbered(*SHAPES[shape], start=10_000 * i) for i in range(3)]
    return geometry_of(dict(zip(NAMES, tensors, strict=True)), 16), tensors


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.uint32).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@given(pairs=rows(), group_slots=st.integers(1, 8), run_rows_max=st.integers(1, 20))
def test_runs_are_the_rows_in_their_order(
    pairs: list[tuple[int, int]], group_slots: int, run_rows_max: int
) -> None:
    runs = coalesce(*columns(pairs), group_slots, run_rows_max=run_rows_max)
    unrolled = [
        (int(run["device_block"]) + i, int(run["slot"]) + i)
        for run in runs
        for i in range(run["count"])
    ]
    assert unrolled == pairs
    assert all(run["count"] <= run_rows_max for run in runs)
    last = runs["slot"].astype(int) + runs["count"] - 1
    assert np.array_equal(runs["slot"] // group_slots, last // group_slots)


@given(pairs=rows(), group_slots=st.integers(1, 8))
def test_runs_are_as_long_as_they_can_be(pairs: list[tuple[int, int]], group_slots: int) -> None:
    runs = coalesce(*columns(pairs), group_slots)
    for run, following in itertools.pairwise(runs):
        joins = (
            following["device_block"] == run["device_block"] + run["count"]
            and following["slot"] == run["slot"] + run["count"]
            and following["slot"] % group_slots != 0
        )
        assert not joins


@pytest.mark.parametrize("shape", SHAPES)
@given(pairs=rows(), group_slots=st.integers(1, 8), by_region=st.booleans())
def test_the_copies_of_a_plan_move_each_block_into_its_slot(
    shape: str, pairs: list[tuple[int, int]], group_slots: int, by_region: bool
) -> None:
    geometry, tensors = geometry_with(shape)
    layout = ArenaLayout(20, geometry.chunk_bytes, group_slots)
    arena = np.zeros(layout.total_bytes, np.uint8)
    memory = {region.name: region for region in geometry.regions}
    assert len(memory) == len(tensors)
    segments = plan_copy(*columns(pairs), geometry, layout, by_region=by_region)
    for segment in segments:
        region = geometry.regions[segment["region"]]
        tensor = tensors[region.layer_index]
        flat = tensor.array.base.view(np.uint8).reshape(-1)  # type: ignore[attr-defined]
        begin = region.base_address - flat.ctypes.data + int(segment["device_offset"])
        to, size = int(segment["arena_offset"]), int(segment["bytes"])
        arena[to : to + size] = flat[begin : begin + size]
    expected = dict.fromkeys(range(20), b"\0" * layout.bytes_per_slot)
    expected.update({slot: b"".join(block_bytes(geometry, block)) for block, slot in pairs})
    for slot, content in expected.items():
        found = b"".join(arena[at : at + n].tobytes() for at, n in layout.pieces(slot))
        assert found == content
    assert not arena[: layout.data_offset].any()


@given(pairs=rows())
def test_copies_by_region_are_the_same_copies_with_the_regions_in_order(
    pairs: list[tuple[int, int]],
) -> None:
    geometry, _ = geometry_with("heads outermost")
    layout = ArenaLayout(20, geometry.chunk_bytes, 4)
    by_run = plan_copy(*columns(pairs), geometry, layout)
    by_region = plan_copy(*columns(pairs), geometry, layout, by_region=True)
    assert np.all(np.diff(by_region["region"].astype(int)) >= 0)
    assert np.array_equal(by_run[np.argsort(by_run["region"], kind="stable")], by_region)


def test_a_run_of_packed_blocks_is_one_copy_a_region() -> None:
    geometry, _ = geometry_with("packed")
    layout = ArenaLayout(20, geometry.chunk_bytes, 8)
    segments = plan_copy(np.arange(3, 9), np.arange(1, 7), geometry, layout)
    assert segments["bytes"].tolist() == [6 * 3 * 5 * 4] * 3
    assert segments["region"].tolist() == [0, 1, 2]


def test_no_rows_are_no_copies() -> None:
    geometry, _ = geometry_with("packed")
    layout = ArenaLayout(20, geometry.chunk_bytes, 8)
    assert len(plan_copy([], [], geometry, layout)) == 0


@pytest.mark.parametrize(
    ("blocks", "slots", "message"),
    [
        ([0, 16], [0, 1], "row 1: device block 16"),
        ([0, -1], [0, 1], "row 1: device block -1"),
        ([0, 1], [20, 1], "row 0: slot 20"),
    ],
)
def test_rows_out_of_range_are_refused(blocks: list[int], slots: list[int], message: str) -> None:
    geometry, _ = geometry_with("packed")
    layout = ArenaLayout(20, geometry.chunk_bytes, 8)
    with pytest.raises(TransferError, match=message):
        plan_copy(blocks, slots, geometry, layout)


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(TransferError, match="as many device blocks as slots"):
        coalesce([1, 2], [1], 4)


def test_a_layout_with_other_chunks_is_refused() -> None:
    geometry, _ = geometry_with("packed")
    with pytest.raises(GeometryError, match="differ"):
        plan_copy([0], [0], geometry, ArenaLayout(20, (60, 60), 8))
