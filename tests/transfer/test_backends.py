# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.errors import ConfigError, TransferError
from kvbm.transfer import backends
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.backends import Device, RankCopies, register_pieces
from kvbm.transfer.geometry import geometry_of
from tests.copy_rig import BLOCKS, CHUNK, LAYERS, FakeMemory, HostMemory

LAYOUT = ArenaLayout(37, (CHUNK,) * LAYERS, 8)


@pytest.fixture
def arena() -> Iterator[mmap.mmap]:
    memory = mmap.mmap(-1, LAYOUT.total_bytes)
    yield memory
    memory.close()


@given(
    slots=st.integers(1, 100),
    reserved=st.lists(st.integers(0, 1 << 20), max_size=8),
    piece=st.integers(1, 1 << 18),
)
def test_pieces_are_whole_groups_side_by_side_and_cover_what_is_usable(
    slots: int, reserved: list[int], piece: int
) -> None:
    layout = ArenaLayout(slots, (512, 1024), 8)
    begins = {layout.data_offset + g * layout.group_bytes for g in range(layout.groups)}
    ends = {*list(begins)[1:], *begins, layout.total_bytes}
    done, pieces = 0, []
    for count in [*sorted(reserved), layout.total_bytes]:
        new = register_pieces(layout, done, min(count, layout.total_bytes), piece)
        pieces += new
        done = sum(new[-1]) if new else done
        usable = layout.usable_slots(min(count, layout.total_bytes))
        if usable:
            last = usable - 1
            assert layout.offset(last, 1) + 1024 <= done
    assert all(at in begins and at + size in ends for at, size in pieces)
    assert all(a + size == b for (a, size), (b, _) in pairwise(pieces))
    assert sum(pieces[-1]) == layout.total_bytes


@pytest.mark.parametrize("kind", ["xpu", "meta", ""])
def test_a_device_that_no_backend_serves_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="allowed is cpu or cuda"):
        Device(kind)


def test_without_a_driver_the_error_says_so(arena: mmap.mmap) -> None:
    geometry = geometry_of(HostMemory().tensors, BLOCKS)
    device = Device("cuda", library="libkvbm-no-such-driver.so")
    with pytest.raises(TransferError, match=r"libkvbm-no-such-driver\.so cannot be opened"):
        RankCopies(device, [geometry], LAYOUT, arena, rank=0)


def test_the_processors_near_the_device_are_those_of_its_place_on_the_bus(
    arena: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "cpus_near", lambda bus_id: frozenset({len(bus_id)}))
    memory = FakeMemory()
    geometry = geometry_of(memory.tensors, BLOCKS)
    copies = RankCopies(memory.device, [geometry], LAYOUT, arena, rank=0)
    assert copies.cpus_near == {len("0000:3B:00.0")}
    copies.close()
    assert copies.cpus_near == frozenset()
    host = RankCopies(Device(), [geometry_of(HostMemory().tensors, BLOCKS)], LAYOUT, arena, rank=0)
    assert host.cpus_near == frozenset()
    host.close()


def test_usable_slots_grow_with_what_is_registered(arena: mmap.mmap) -> None:
    memory = FakeMemory()
    copies = RankCopies(memory.device, [geometry_of(memory.tensors, BLOCKS)], LAYOUT, arena, rank=0)
    assert copies.grow(LAYOUT.data_offset) == 0
    before = memory.cuda.alive
    assert copies.grow(LAYOUT.data_offset + 2 * LAYOUT.group_bytes) == 16
    assert memory.cuda.alive == before + 1
    assert copies.grow(LAYOUT.total_bytes) == 37
    copies.close()
    assert memory.cuda.alive == 0


def test_a_tier_that_cannot_be_registered_stays_smaller(
    arena: mmap.mmap, caplog: pytest.LogCaptureFixture
) -> None:
    memory = FakeMemory()
    copies = RankCopies(memory.device, [geometry_of(memory.tensors, BLOCKS)], LAYOUT, arena, rank=0)
    assert copies.grow(LAYOUT.data_offset + LAYOUT.group_bytes) == 8
    memory.cuda.fail("cuMemHostRegister", error=2)
    with caplog.at_level(logging.ERROR):
        assert copies.grow(LAYOUT.total_bytes) == 8
    assert "stays at 8 of 37 blocks" in caplog.text
    copies.close()
