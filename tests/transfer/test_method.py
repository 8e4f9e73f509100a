# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvbm.transfer.geometry import KvGeometry, geometry_of
from kvbm.transfer.method import (
    MAX_PITCH_BYTES,
    Allocation,
    copy_method,
    uniform_pitch,
)
from tests.transfer.kv_tensors import ArrayTensor

BLOCKS, CHUNK = 6, 64


def geometry(addresses: Sequence[int], chunks: Sequence[int] | None = None) -> KvGeometry:
    """Return a geometry of packed layers at these addresses; no memory is touched."""
    chunks = chunks or [CHUNK] * len(addresses)

    class Placed(ArrayTensor):
        def __init__(self, address: int, chunk: int) -> None:
            super().__init__(np.zeros((BLOCKS, chunk), np.uint8))
            self.address = address

        def data_ptr(self) -> int:
            return self.address

    return geometry_of(
        {
            f"layers.{i}": Placed(*pair)
            for i, pair in enumerate(zip(addresses, chunks, strict=True))
        },
        BLOCKS,
    )


def one_allocation(start: int, size: int) -> Allocation:
    return start, size


def test_layers_at_one_distance_in_one_allocation_have_a_pitch() -> None:
    found = geometry([1000, 2000, 3000])
    assert uniform_pitch(found, lambda _: (1000, 2000 + BLOCKS * CHUNK)) == 1000


@pytest.mark.parametrize(
    "allocation",
    [None, (1000, 2000 + BLOCKS * CHUNK - 1), (1001, 5000), (2000, 5000)],
    ids=["unknown", "ends early", "begins late", "another"],
)
def test_a_copy_that_would_leave_the_allocation_has_no_pitch(allocation: Allocation | None) -> None:
    assert uniform_pitch(geometry([1000, 2000, 3000]), lambda _: allocation) == 0


def test_separate_allocations_have_no_pitch_even_at_equal_distances() -> None:
    found = geometry([1000, 2000, 3000])
    assert uniform_pitch(found, lambda at: (at // 1000 * 1000, BLOCKS * CHUNK)) == 0


def test_unequal_distances_chunks_or_a_single_region_have_no_pitch() -> None:
    everything = one_allocation(0, 10**6)
    assert uniform_pitch(geometry([1000, 2000, 3001]), lambda _: everything) == 0
    assert uniform_pitch(geometry([1000, 2000], [64, 32]), lambda _: everything) == 0
    assert uniform_pitch(geometry([1000]), lambda _: everything) == 0


def test_layers_in_descending_order_have_no_pitch() -> None:
    assert uniform_pitch(geometry([3000, 2000, 1000]), lambda _: (0, 10**6)) == 0


def test_a_pitch_beyond_the_drivers_limit_is_not_used() -> None:
    limit = MAX_PITCH_BYTES
    everything = one_allocation(0, 2**40)
    assert uniform_pitch(geometry([0x1000, 0x1000 + limit]), lambda _: everything) == limit
    assert uniform_pitch(geometry([0x1000, 0x1001 + limit]), lambda _: everything) == 0


def test_short_pieces_alone_go_pitched_where_there_are_batches() -> None:
    found = geometry([1000, 2000, 3000])
    with_batches = copy_method(found, lambda _: (0, 10**6))
    without = copy_method(found, lambda _: (0, 10**6), has_batches=False)
    assert with_batches.pitch_bytes == without.pitch_bytes == 1000
    assert with_batches.pitched_below_bytes < 1 << 20 < without.pitched_below_bytes


def test_chunks_are_staged_only_where_there_is_no_pitch() -> None:
    pitched = copy_method(geometry([1000, 2000, 3000]), lambda _: (0, 10**6))
    apart = copy_method(geometry([1000, 2000, 3001]), lambda _: (0, 10**6))
    off = copy_method(geometry([1000, 2000, 3001]), lambda _: (0, 10**6), staged=False)
    assert pitched.staged_loads_below_bytes == off.staged_loads_below_bytes == 0
    assert 64 << 10 < apart.staged_loads_below_bytes == apart.staged_stores_below_bytes
    assert apart.streams > off.streams
