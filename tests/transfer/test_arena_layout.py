# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.errors import GeometryError
from kvbm.transfer.arena_layout import (
    PAGE_BYTES,
    SLOT_HEADER,
    ArenaLayout,
    default_group_slots,
    slot_headers,
)

CHUNKS = st.lists(st.integers(1, 3000), min_size=1, max_size=6).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> ArenaLayout:
    return ArenaLayout(draw(st.integers(1, 40)), draw(CHUNKS), draw(st.integers(1, 12)))


@given(layouts())
def test_no_two_pieces_overlap_and_all_lie_inside(layout: ArenaLayout) -> None:
    pieces = [(0, PAGE_BYTES)]
    for slot in range(layout.slots):
        pieces.append((layout.header_offset(slot), SLOT_HEADER.itemsize))
        pieces += layout.pieces(slot)
    pieces.sort()
    ends = [offset + size for offset, size in pieces]
    assert all(end <= begin for end, (begin, _) in zip(ends, pieces[1:], strict=False))
    assert ends[-1] <= layout.total_bytes


@given(layouts())
def test_a_run_of_slots_in_a_group_is_one_piece_a_region(layout: ArenaLayout) -> None:
    for slot in range(layout.slots - 1):
        if (slot + 1) % layout.group_slots:
            for region, chunk in enumerate(layout.chunk_bytes):
                assert layout.offset(slot + 1, region) == layout.offset(slot, region) + chunk


@given(layouts())
def test_groups_data_and_total_are_whole_pages(layout: ArenaLayout) -> None:
    firsts = range(0, layout.slots, layout.group_slots)
    offsets = [layout.data_offset, layout.group_bytes, layout.total_bytes]
    offsets += [layout.offset(slot, 0) for slot in firsts]
    assert len(firsts) == layout.groups
    assert not any(offset % PAGE_BYTES for offset in offsets)


@given(layouts())
def test_padding_is_less_than_a_page_a_group_and_two_around_the_table(layout: ArenaLayout) -> None:
    used = layout.slots * (layout.bytes_per_slot + SLOT_HEADER.itemsize)
    assert layout.total_bytes - used < PAGE_BYTES * (layout.groups + 2)


@given(slots=st.integers(1, 40), units=CHUNKS, shift=st.integers(0, 13))
def test_pieces_are_aligned_as_announced(slots: int, units: tuple[int, ...], shift: int) -> None:
    layout = ArenaLayout(slots, tuple(unit << shift for unit in units), 4)
    assert layout.direct_io_alignment >= min(1 << shift, PAGE_BYTES)
    for slot in range(slots):
        for offset, size in layout.pieces(slot):
            assert offset % layout.direct_io_alignment == 0
            assert size % layout.direct_io_alignment == 0


@given(layouts(), st.integers(0, 400_000))
def test_usable_slots_lie_in_the_memory_that_is_there(layout: ArenaLayout, size: int) -> None:
    usable = layout.usable_slots(size)
    assert 0 <= usable <= layout.slots
    for slot in range(usable):
        assert all(offset + chunk <= size for offset, chunk in layout.pieces(slot))
    # The next group is not usable because it, or a part of it, is not there.
    if usable < layout.slots:
        last = min(usable + layout.group_slots, layout.slots) - 1
        group_end = layout.offset(last, len(layout.chunk_bytes) - 1) + layout.chunk_bytes[-1]
        assert size < group_end + PAGE_BYTES


def test_all_slots_are_usable_in_a_whole_arena() -> None:
    layout = ArenaLayout(20, (4096, 100), 8)
    assert layout.usable_slots(layout.total_bytes) == 20
    assert layout.usable_slots(layout.total_bytes - 1) == 16
    assert layout.usable_slots(0) == 0


@pytest.mark.parametrize(
    ("chunks", "slots"),
    [
        ((64 << 10,) * 32, 16),  # 8B model
        ((16 << 10,) * 4, 64),
        ((18 << 10,) * 61, 64),  # MLA
        ((2 << 20,), 8),  # cross-layer blocks
        ((128,), 64),
    ],
)
def test_the_default_group_makes_a_region_a_mebibyte(chunks: tuple[int, ...], slots: int) -> None:
    assert default_group_slots(chunks) == slots
    assert ArenaLayout(1000, chunks).group_slots == slots


@pytest.mark.parametrize(
    ("slots", "chunks", "group_slots", "message"),
    [
        (0, (64,), 1, "slots=0"),
        (2**31, (64,), 1, "slots=2147483648"),
        (1, (), 1, r"chunk_bytes=\(\)"),
        (1, (64, 0), 1, r"chunk_bytes=\(64, 0\)"),
        (1, (64,), -1, "group_slots=-1"),
    ],
)
def test_numbers_that_are_not_allowed_are_named(
    slots: int, chunks: tuple[int, ...], group_slots: int, message: str
) -> None:
    with pytest.raises(GeometryError, match=message):
        ArenaLayout(slots, chunks, group_slots)


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_does_not_exist_has_no_offset(slot: int) -> None:
    layout = ArenaLayout(3, (64,), 2)
    with pytest.raises(IndexError, match=f"slot {slot}"):
        layout.offset(slot, 0)
    with pytest.raises(IndexError, match=f"slot {slot}"):
        layout.header_offset(slot)


def test_slot_headers_are_a_view_of_the_table() -> None:
    layout = ArenaLayout(5, (64, 32), 2)
    arena = np.zeros(layout.total_bytes, np.uint8)
    headers = slot_headers(arena, layout)
    headers["digest_lo"][3] = 7
    at = layout.header_offset(3)
    assert SLOT_HEADER.itemsize == 64
    assert arena[at : at + 64].view(SLOT_HEADER)["digest_lo"] == [7]


def test_a_large_arena_needs_no_large_numbers_of_steps() -> None:
    layout = ArenaLayout(2**31 - 1, (64 << 10,) * 32)
    assert layout.offset(layout.slots - 1, 31) + (64 << 10) <= layout.total_bytes
