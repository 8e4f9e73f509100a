# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm._fast.copy import CopyResult, CopyStatus, HostCopier
from kvbm._fast.hashing import xxh3_64
from kvbm.transfer.arena_layout import ArenaLayout, slot_headers

DEADLINE_S = 60.0
GUARD = 128
PIECE_BYTES = 4096  # KV_CHECKSUM_PIECE in copy.h
VALID, FILLING = 2, 1


@dataclass
class Bench:
    """Device memory with a guard between all pieces, an arena with a guard behind it, a copier."""

    chunks: tuple[int, ...]
    padding: int = 0
    blocks: int = 12
    slots: int = 21
    group_slots: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = ArenaLayout(self.slots, self.chunks, self.group_slots)
        random = np.random.default_rng(0)
        self.devices = [
            random.integers(0, 256, 2 * GUARD + self.blocks * (chunk + self.padding), np.uint8)
            for chunk in self.chunks
        ]
        self.memory = np.full(self.layout.total_bytes + GUARD, 0xA5, np.uint8)
        self.memory[: self.layout.data_offset] = 0
        regions = [
            (device.ctypes.data + GUARD, chunk + self.padding, chunk)
            for device, chunk in zip(self.devices, self.chunks, strict=True)
        ]
        self.copier = HostCopier(
            regions, self.layout, self.memory, device_blocks=self.blocks, **self.options
        )

    def block(self, block: int) -> bytes:
        """Return the bytes of a device block."""
        parts = []
        for device, chunk in zip(self.devices, self.chunks, strict=True):
            at = GUARD + block * (chunk + self.padding)
            parts.append(device[at : at + chunk].tobytes())
        return b"".join(parts)

    def slot(self, slot: int) -> bytes:
        """Return the bytes of a slot, where the layout says they are."""
        pieces = self.layout.pieces(slot)
        return b"".join(self.memory[at : at + size].tobytes() for at, size in pieces)

    @property
    def headers(self) -> np.ndarray[Any, Any]:
        return slot_headers(self.memory, self.layout)

    def snapshot(self) -> list[bytes]:
        """Return everything that a copy could change."""
        return [self.memory.tobytes(), *(device.tobytes() for device in self.devices)]


def table(pairs: Sequence[tuple[int, int]]) -> np.ndarray[Any, Any]:
    """Return rows for (device block, slot); block and generation follow from the slot."""
    rows = np.zeros((len(pairs), 8), np.uint32)
    for i, (block, slot) in enumerate(pairs):
        rows[i, :4] = block, slot, (1000 + slot) % 2**32, (7 + slot) % 2**32
    return rows


def digests_of(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a digest for each row that follows from its slot."""
    slots = rows[:, 1].astype(np.uint64)
    high = np.full_like(slots, 2**64 - 3)
    return np.stack([slots + np.uint64(2**63), high - slots], axis=1)


def checksum(chunks: Sequence[bytes]) -> int:
    """Return the checksum of a slot as copy.h describes it."""
    seed = 0
    for chunk in chunks:
        for at in range(0, len(chunk), PIECE_BYTES):
            seed = xxh3_64(chunk[at : at + PIECE_BYTES], seed)
    return seed


def stored(bench: Bench, pairs: Sequence[tuple[int, int]], **options: Any) -> np.ndarray[Any, Any]:
    """Store the rows, and return them."""
    rows = table(pairs)
    assert bench.copier.store(rows, digests_of(rows), **options) == (CopyStatus.OK, len(rows))
    return rows


@st.composite
def benches(draw: st.DrawFn) -> Bench:
    return Bench(
        chunks=tuple(draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=3))),
        padding=draw(st.sampled_from([0, 0, 1, 64])),
        slots=draw(st.integers(12, 25)),
        group_slots=draw(st.integers(1, 8)),
        options={"run_bytes": draw(st.sampled_from([1, 20_000, 1 << 30]))},
    )


@st.composite
def distinct_pairs(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(device block, slot) with each block and slot at most once; neighbours are frequent."""
    blocks = draw(st.permutations(range(12)))
    slots = draw(st.permutations(range(12)))
    shift = draw(st.integers(-3, 3))
    if draw(st.booleans()):
        blocks = list(range(12))
        slots = [(block + shift) % 12 for block in blocks]
    return list(zip(blocks, slots, strict=True))[: draw(st.integers(0, 12))]


@given(bench=benches(), pairs=distinct_pairs(), with_checksum=st.booleans())
def test_stored_blocks_are_where_the_layout_says_and_come_back_into_other_blocks(
    bench: Bench, pairs: list[tuple[int, int]], with_checksum: bool
) -> None:
    before = {slot: bench.slot(slot) for slot in range(bench.slots)}
    rows = stored(bench, pairs, checksum=with_checksum)
    before.update({slot: bench.block(block) for block, slot in pairs})
    assert {slot: bench.slot(slot) for slot in range(bench.slots)} == before
    # Back into the device in the order of the slots, so that the runs are others.
    order = np.argsort(rows[:, 1])
    expected = {block: bench.block(block) for block in range(bench.blocks)}
    target = rows[order]
    target[:, 0] = np.arange(len(rows)) + (bench.blocks - len(rows))
    expected.update({int(row[0]): bench.slot(int(row[1])) for row in target})
    result = bench.copier.load(target, digests_of(target), checksum=with_checksum)
    assert result == (CopyStatus.OK, len(rows))
    assert {block: bench.block(block) for block in range(bench.blocks)} == expected


@given(
    bench=benches(),
    words=st.lists(
        st.tuples(*[st.one_of(st.integers(0, 30), st.integers(0, 2**32 - 1))] * 2), max_size=12
    ),
    load=st.booleans(),
)
def test_no_row_makes_a_copy_leave_its_memory(
    bench: Bench, words: list[tuple[int, int]], load: bool
) -> None:
    guards = [device[[*range(GUARD), *range(-GUARD, 0)]].copy() for device in bench.devices]
    everything = np.zeros((bench.slots, 8), np.uint32)
    everything[:, 1] = np.arange(bench.slots)
    assert bench.copier.store(everything, digests_of(everything)).status == CopyStatus.OK
    rows = np.zeros((len(words), 8), np.uint32)
    rows[:, :2] = np.array(words, np.uint32).reshape(-1, 2)
    move = bench.copier.load if load else bench.copier.store
    result = move(rows, digests_of(rows))
    bad = [block >= bench.blocks or slot >= bench.slots for block, slot in words]
    assert result.row == (bad.index(True) if any(bad) else len(words))
    assert (bench.memory[-GUARD:] == 0xA5).all()
    for device, guard in zip(bench.devices, guards, strict=True):
        assert np.array_equal(device[[*range(GUARD), *range(-GUARD, 0)]], guard)


def test_a_store_writes_the_headers_of_its_slots_only() -> None:
    bench = Bench((100, 5000), options={"rank": 3, "group": 2})
    stored(bench, [(4, 9), (5, 10), (0, 20)], checksum=True)
    headers = bench.headers
    assert np.flatnonzero(headers["word"]).tolist() == [9, 10, 20]
    for slot in (9, 10, 20):
        header = headers[slot]
        assert int(header["word"]) >> 60 == VALID
        assert int(header["word"]) & 0xFFFFFFFF == 7 + slot
        assert int(header["digest_lo"]) == slot + 2**63
        assert int(header["digest_hi"]) == 2**64 - 3 - slot
        assert int(header["payload_bytes"]) == 5100
        assert (header["rank"], header["group"], header["block"]) == (3, 2, 1000 + slot)
        content = bench.slot(slot)
        assert int(header["checksum"]) == checksum([content[:100], content[100:]])


def test_without_a_checksum_the_header_says_so() -> None:
    bench = Bench((100,))
    rows = stored(bench, [(0, 1)])
    assert int(bench.headers["word"][1]) >> 59 & 1 == 0
    before = bench.snapshot()
    result = bench.copier.load(rows, digests_of(rows), checksum=True)
    assert result == (CopyStatus.NO_CHECKSUM, 0)
    assert bench.snapshot() == before


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize(
    ("pair", "status"),
    [
        ((12, 3), CopyStatus.BAD_BLOCK),
        ((2**32 - 1, 3), CopyStatus.BAD_BLOCK),
        ((3, 21), CopyStatus.BAD_SLOT),
        ((3, 2**32 - 1), CopyStatus.BAD_SLOT),
    ],
)
def test_an_index_out_of_range_ends_the_copy_at_its_row(
    pair: tuple[int, int], status: CopyStatus, load: bool
) -> None:
    bench = Bench((300, 40))
    good = [(0, 0), (1, 1)]
    if load:
        stored(bench, good)
    rows = table([*good, pair, (5, 5)])
    move = bench.copier.load if load else bench.copier.store
    assert move(rows, digests_of(rows)) == (status, 2)
    assert [bench.slot(slot) for _, slot in good] == [bench.block(block) for block, _ in good]
    assert np.flatnonzero(bench.headers["word"]).tolist() == [0, 1]


def test_slots_whose_memory_is_not_there_yet_are_refused() -> None:
    bench = Bench((300,))
    assert bench.copier.usable_slots == 21
    bench.copier.usable_slots = 8
    rows = table([(0, 7), (1, 8)])
    assert bench.copier.store(rows, digests_of(rows)) == (CopyStatus.BAD_SLOT, 1)
    bench.copier.usable_slots = 9
    assert bench.copier.store(rows, digests_of(rows)) == (CopyStatus.OK, 2)
    with pytest.raises(ValueError, match="usable_slots=22 is not allowed: 0 to 21"):
        bench.copier.usable_slots = 22


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("word", (VALID << 60) | 8),  # another generation
        ("word", (FILLING << 60) | 16),  # its writer died
        ("word", 0),
        ("digest_lo", 1),
        ("digest_hi", 1),
        ("payload_bytes", 299),
        ("rank", 1),
        ("group", 1),
    ],
)
def test_a_slot_that_is_not_what_the_row_says_is_not_loaded(field_name: str, value: int) -> None:
    bench = Bench((300,))
    rows = stored(bench, [(0, 8), (1, 9), (2, 10)])
    rows[:, 0] += 5
    bench.headers[field_name][9] = value
    first, others = bench.slot(8), [bench.block(block) for block in (6, 7)]
    assert bench.copier.load(rows, digests_of(rows)) == (CopyStatus.BAD_HEADER, 1)
    assert bench.block(5) == first
    assert [bench.block(block) for block in (6, 7)] == others


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("place", [0, 4095, 4096, -1])
def test_a_flipped_bit_in_a_slot_is_found_by_the_checksum_alone(chunk: int, place: int) -> None:
    bench = Bench((9000, 5000))
    rows = stored(bench, [(0, 4), (1, 5), (2, 6)], checksum=True)
    at, size = bench.layout.pieces(5)[chunk]
    bench.memory[at + place % size] ^= 1
    assert bench.copier.load(rows, digests_of(rows), checksum=True) == (CopyStatus.BAD_CHECKSUM, 1)
    assert bench.copier.load(rows, digests_of(rows)) == (CopyStatus.OK, 3)


def test_chunks_in_each_others_place_are_found_by_the_checksum() -> None:
    bench = Bench((5000, 5000))
    rows = stored(bench, [(0, 4)], checksum=True)
    (first, size), (second, _) = bench.layout.pieces(4)
    content = bench.memory[first : first + size].copy()
    bench.memory[first : first + size] = bench.memory[second : second + size]
    bench.memory[second : second + size] = content
    assert bench.copier.load(rows, digests_of(rows), checksum=True) == (CopyStatus.BAD_CHECKSUM, 0)


def test_a_header_that_changes_during_the_copy_is_torn() -> None:
    # The "device memory" is the table of headers: loading slot 1 overwrites its own header.
    layout = ArenaLayout(4, (64,), 4)
    arena = np.zeros(layout.total_bytes, np.uint8)
    source = np.arange(4 * 64, dtype=np.uint8)
    rows = table([(0, 0), (1, 1)])
    writer = HostCopier([(source.ctypes.data, 64, 64)], layout, arena, device_blocks=4)
    assert writer.store(rows, digests_of(rows)).status == CopyStatus.OK
    table_address = arena.ctypes.data + layout.table_offset
    reader = HostCopier([(table_address, 64, 64)], layout, arena, device_blocks=4)
    rows[0, 0] = 3  # into a header that nobody reads
    assert reader.load(rows, digests_of(rows)) == (CopyStatus.TORN, 1)


def test_a_stop_that_is_set_before_copies_nothing() -> None:
    bench = Bench((300,))
    rows = table([(0, 0)])
    before = bench.snapshot()
    stop = np.ones(1, np.int32)
    assert bench.copier.store(rows, digests_of(rows), stop=stop) == (CopyStatus.STOPPED, 0)
    assert bench.snapshot() == before


def test_a_stop_ends_a_running_copy_between_two_runs() -> None:
    bench = Bench((1 << 16,), options={"run_bytes": 1})
    rows = np.tile(table([(block, block) for block in range(12)]), (30_000, 1))
    stop = np.zeros(1, np.int32)
    results: list[CopyResult] = []
    copying = threading.Thread(
        target=lambda: results.append(bench.copier.store(rows, digests_of(rows), stop=stop))
    )
    copying.start()
    deadline = time.monotonic() + DEADLINE_S
    while not bench.headers["word"][11] and time.monotonic() < deadline:
        pass  # the copy runs without the interpreter, so this thread sees it
    stop[0] = 1
    copying.join()
    (result,) = results
    assert result.status == CopyStatus.STOPPED
    assert 0 < result.row < len(rows)
    assert {int(word) >> 60 for word in bench.headers["word"]} <= {0, VALID}


def test_no_rows_are_copied_at_once() -> None:
    bench = Bench((300,))
    rows = table([])
    assert bench.copier.store(rows, digests_of(rows)) == (CopyStatus.OK, 0)
    assert bench.copier.load(rows, digests_of(rows)) == (CopyStatus.OK, 0)


def test_the_arena_stays_mapped_while_the_copier_lives() -> None:
    layout = ArenaLayout(4, (64,), 4)
    device = np.zeros(256, np.uint8)
    with mmap.mmap(-1, layout.total_bytes) as arena:
        copier = HostCopier([(device.ctypes.data, 64, 64)], layout, arena, device_blocks=4)
        with pytest.raises(BufferError):
            arena.close()
        del copier
    assert arena.closed


def test_owners_of_the_device_memory_live_as_long_as_the_copier() -> None:
    layout = ArenaLayout(4, (64,), 4)
    arena = np.zeros(layout.total_bytes, np.uint8)
    dropped: list[str] = []

    class Owner:
        def __init__(self) -> None:
            self.memory = np.zeros(256, np.uint8)

        def __del__(self) -> None:
            dropped.append("owner")

    owner = Owner()
    regions = [(owner.memory.ctypes.data, 64, 64)]
    copier = HostCopier(regions, layout, arena, device_blocks=4, keep_alive=owner)
    del owner
    assert dropped == []
    del copier
    assert dropped == ["owner"]


def shape_of(layout: ArenaLayout, **changes: int) -> SimpleNamespace:
    """Return the layout as a plain object, with some numbers replaced."""
    names = ("slots", "group_slots", "table_offset", "data_offset", "group_bytes")
    names = (*names, "total_bytes", "chunk_bytes")
    return SimpleNamespace(**{**{name: getattr(layout, name) for name in names}, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 0},
        {"slots": 2**32 - 1},
        {"slots": 300},
        {"group_slots": 0},
        {"group_slots": 100},
        {"table_offset": 4097},
        {"data_offset": 4096},
        {"data_offset": 2**63},
        {"group_bytes": 64},
        {"group_bytes": 2**63},
        {"total_bytes": 2**40},
        {"chunk_bytes": (64, 64)},
    ],
)
def test_a_layout_that_would_leave_the_arena_is_refused(changes: dict[str, int]) -> None:
    layout = ArenaLayout(10, (640,), 4)
    arena = np.zeros(layout.total_bytes, np.uint8)
    device = np.zeros(4 * 640, np.uint8)
    regions = [(device.ctypes.data, 640, 640)]
    HostCopier(regions, shape_of(layout), arena, device_blocks=4)
    with pytest.raises(ValueError, match=r"not allowed|contradicts itself|needs|differ"):
        HostCopier(regions, shape_of(layout, **changes), arena, device_blocks=4)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([], "regions=0 is not allowed"),
        ([(0, 64, 64)], "base_address=0x0"),
        ([(4096, 63, 64)], "block_stride_bytes=63"),
        ([(4096, 64, 64), (4096, 64, 64)], "differ from those of the layout"),
    ],
)
def test_regions_that_cannot_be_are_refused(
    regions: list[tuple[int, int, int]], message: str
) -> None:
    layout = ArenaLayout(4, (64,), 4)
    arena = np.zeros(layout.total_bytes, np.uint8)
    with pytest.raises(ValueError, match=message):
        HostCopier(regions, layout, arena, device_blocks=4)


def test_arenas_that_cannot_be_used_are_refused() -> None:
    layout = ArenaLayout(4, (64,), 4)
    regions = [(4096, 64, 64)]
    memory = np.zeros(layout.total_bytes + 1, np.uint8)
    with pytest.raises(ValueError, match="the layout needs"):
        HostCopier(regions, layout, memory[: layout.total_bytes - 1], device_blocks=4)
    with pytest.raises(ValueError, match="no multiple of 8"):
        HostCopier(regions, layout, memory[1:], device_blocks=4)
    with pytest.raises(BufferError):
        HostCopier(regions, layout, bytes(layout.total_bytes), device_blocks=4)
    with pytest.raises(ValueError, match="device_blocks=0"):
        HostCopier(regions, layout, memory, device_blocks=0)
    with pytest.raises(ValueError, match="run_bytes=0"):
        HostCopier(regions, layout, memory, device_blocks=4, run_bytes=0)


def test_rows_and_digests_that_do_not_fit_each_other_are_refused() -> None:
    bench = Bench((64,))
    rows = table([(0, 0), (1, 1)])
    with pytest.raises(ValueError, match="2 rows need as many digests, not 1"):
        bench.copier.store(rows, digests_of(rows)[:1])
    with pytest.raises(ValueError, match="rows of 7 and digests of 2 words"):
        bench.copier.store(np.ascontiguousarray(rows[:, :7]), digests_of(rows))
    with pytest.raises(ValueError, match="stop has 2 items"):
        bench.copier.store(rows, digests_of(rows), stop=np.zeros(2, np.int32))


def test_memory_that_no_array_owns_is_copied_by_its_address() -> None:
    layout = ArenaLayout(4, (64,), 4)
    arena = np.zeros(layout.total_bytes, np.uint8)
    device = ctypes.create_string_buffer(bytes(range(256)), 256)
    copier = HostCopier([(ctypes.addressof(device), 64, 64)], layout, arena, device_blocks=4)
    rows = table([(2, 1)])
    assert copier.store(rows, digests_of(rows)).status == CopyStatus.OK
    at = layout.offset(1, 0)
    assert arena[at : at + 64].tobytes() == bytes(range(128, 192))
