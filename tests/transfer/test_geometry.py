# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvbm.errors import GeometryError
from kvbm.transfer.geometry import KvGeometry, geometry_of, geometry_of_groups
from kvbm.transfer.tensors import REGIONS_PER_TENSOR_MAX
from tests.transfer.kv_tensors import (
    ArrayTensor,
    block_bytes,
    block_numbers,
    expected_numbers,
    numbered,
)

NAME = "model.layers.{}.self_attn.attn"


def one_layer(tensor: object, num_blocks: int, block_axis: int | None = None) -> KvGeometry:
    return geometry_of({NAME.format(0): tensor}, num_blocks, block_axis=block_axis)


def views_of(memory: np.ndarray, order: str, layers: int, blocks: int, inner: str) -> list:
    """Per-layer views [B, *inner] of one allocation whose axes lie in `order`; sizes by letter."""
    sizes = {"L": layers, "B": blocks, "H": 2, "N": 4, "C": 8}
    physical = memory.reshape([sizes[letter] for letter in order])
    logical = physical.transpose([order.index(letter) for letter in "LB" + inner])
    return [ArrayTensor(logical[layer]) for layer in range(layers)]


# Shape, order of the axes in memory, block axis, regions a layer.
LAYOUTS = {
    "packed, heads first": ((7, 2, 4, 8), (0, 1, 2, 3), 0, 1),
    "packed, tokens first in memory": ((7, 2, 4, 8), (0, 2, 1, 3), 0, 1),
    "MLA": ((7, 4, 9), (0, 1, 2), 0, 1),
    "block first": ((7, 2, 4, 2, 8), (0, 1, 2, 3, 4), 0, 1),
    "K/V first": ((2, 7, 4, 2, 8), (0, 1, 2, 3, 4), 1, 2),
    "K/V first, three axes": ((2, 7, 64), (0, 1, 2), 1, 2),
    "K/V first, blocks outermost in memory": ((2, 7, 4, 2, 8), (1, 0, 2, 3, 4), 1, 1),
    "heads outermost in memory": ((7, 2, 4, 8), (1, 0, 2, 3), 0, 2),
    "kernel blocks": ((21, 2, 4, 8), (0, 1, 2, 3), 0, 1),
    "kernel blocks, K/V first": ((2, 21, 4, 2, 8), (0, 1, 2, 3, 4), 1, 2),
    "kernel blocks, heads outermost": ((21, 2, 4, 8), (1, 0, 2, 3), 0, 2),
}


@pytest.mark.parametrize(("shape", "order", "axis", "regions"), LAYOUTS.values(), ids=LAYOUTS)
def test_each_layout_gives_all_bytes_of_a_block_and_no_others(
    shape: tuple[int, ...], order: tuple[int, ...], axis: int, regions: int
) -> None:
    tensor = numbered(shape, order)
    geometry = one_layer(tensor, 7)
    assert len(geometry.regions) == regions
    assert geometry.bytes_per_block * 7 == tensor.array.nbytes
    for block in range(7):
        assert sorted(block_numbers(geometry, block)) == expected_numbers(tensor, axis, block, 7)


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    blocks=st.integers(1, 6),
    kernel_blocks=st.integers(1, 3),
    data=st.data(),
)
def test_any_order_of_axes_in_memory_gives_the_block_whole(
    shape: list[int], blocks: int, kernel_blocks: int, data: st.DataObject
) -> None:
    assume(math.prod(shape) * kernel_blocks <= REGIONS_PER_TENSOR_MAX)  # in the worst order
    axis = data.draw(st.integers(0, len(shape)))
    shape = [*shape[:axis], blocks * kernel_blocks, *shape[axis:]]
    tensor = numbered(shape, data.draw(st.permutations(range(len(shape)))))
    geometry = one_layer(tensor, blocks, block_axis=axis)
    for block in range(blocks):
        found = block_numbers(geometry, block)
        assert sorted(found) == expected_numbers(tensor, axis, block, blocks)


@given(shape=st.lists(st.integers(1, 9), min_size=3, max_size=5), blocks=st.integers(2, 8))
def test_a_shape_that_is_read_without_a_hint_is_read_as_a_known_layout(
    shape: list[int], blocks: int
) -> None:
    tensor = numbered(shape)
    try:
        geometry = one_layer(tensor, blocks)
    except GeometryError:
        return
    axis = 1 if len(geometry.regions) == 2 else 0
    assert axis == 0 or shape[0] == 2
    assert shape[axis] % blocks == 0
    assert block_numbers(geometry, 0) == sorted(block_numbers(geometry, 0))
    assert sorted(block_numbers(geometry, 1)) == expected_numbers(tensor, axis, 1, blocks)


def test_two_blocks_with_four_axes_are_the_first_axis() -> None:
    tensor = numbered((2, 2, 4, 8))
    geometry = one_layer(tensor, 2)
    assert len(geometry.regions) == 1
    assert block_numbers(geometry, 1) == expected_numbers(tensor, 0, 1, 2)


def test_two_blocks_under_a_k_v_first_view_of_blocks_outermost_are_the_second_axis() -> None:
    tensor = numbered((2, 2, 4, 2, 8), (1, 0, 2, 3, 4))
    geometry = one_layer(tensor, 2)
    assert len(geometry.regions) == 1
    assert block_numbers(geometry, 1) == expected_numbers(tensor, 1, 1, 2)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_blocks_that_may_be_keys_and_values_need_the_hint(axis: int) -> None:
    tensor = numbered((2, 2, 4, 2, 8))
    with pytest.raises(GeometryError, match="axes 0 and 1 may both be the blocks: pass block_axis"):
        one_layer(tensor, 2)
    geometry = one_layer(tensor, 2, block_axis=axis)
    assert sorted(block_numbers(geometry, 1)) == expected_numbers(tensor, axis, 1, 2)


def test_kernel_blocks_beside_an_axis_that_is_just_the_blocks_need_the_hint() -> None:
    with pytest.raises(GeometryError, match="may both be the blocks"):
        one_layer(numbered((16, 4, 3, 8)), 4)


def test_a_head_count_that_equals_the_number_of_blocks_does_not_confuse() -> None:
    tensor = numbered((8, 8, 4, 8))
    assert block_numbers(one_layer(tensor, 8), 3) == expected_numbers(tensor, 0, 3, 8)


def test_one_block_is_the_whole_tensor() -> None:
    tensor = numbered((2, 1, 4, 2, 8))
    geometry = one_layer(tensor, 1)
    assert block_numbers(geometry, 0) == list(range(tensor.array.size))


def test_padding_between_blocks_is_not_part_of_a_block() -> None:
    memory = np.arange(7 * 80, dtype=np.int32).reshape(7, 80)
    tensor = ArrayTensor(np.lib.stride_tricks.as_strided(memory, (7, 2, 4, 8), (320, 128, 32, 4)))
    geometry = one_layer(tensor, 7)
    (region,) = geometry.regions
    assert (region.block_stride_bytes, region.chunk_bytes) == (320, 256)
    assert not region.is_packed
    assert block_numbers(geometry, 2) == memory[2, :64].tolist()


def test_padding_inside_a_block_splits_it_into_regions() -> None:
    memory = np.arange(7 * 2 * 40, dtype=np.int32).reshape(7, 2, 40)
    tensor = ArrayTensor(memory[:, :, :32].reshape(7, 2, 4, 8))
    strided = np.lib.stride_tricks.as_strided(memory, (7, 2, 4, 8), (320, 160, 32, 4))
    geometry = one_layer(ArrayTensor(strided), 7)
    assert [region.chunk_bytes for region in geometry.regions] == [128, 128]
    assert block_numbers(geometry, 3) == tensor.array[3].ravel().tolist()


@pytest.mark.parametrize(
    ("order", "regions"), [("LBHNC", 3), ("LBNHC", 3), ("LHBNC", 6), ("BLHNC", 1), ("BHLNC", 1)]
)
def test_layers_in_one_allocation_are_joined_where_they_lie_side_by_side(
    order: str, regions: int
) -> None:
    memory = np.arange(3 * 5 * 2 * 4 * 8, dtype=np.int32)
    views = views_of(memory, order, 3, 5, "HNC")
    geometry = geometry_of({NAME.format(i): view for i, view in enumerate(views)}, 5)
    assert len(geometry.regions) == regions
    assert sorted({layer for region in geometry.regions for layer in region.layers}) == [0, 1, 2]
    for block in range(5):
        expected = sorted(n for view in views for n in view.array[block].ravel().tolist())
        assert sorted(block_numbers(geometry, block)) == expected


def test_each_region_has_one_layer_without_merging() -> None:
    views = views_of(np.arange(3 * 5 * 64, dtype=np.int32), "BLHNC", 3, 5, "HNC")
    named = {NAME.format(i): view for i, view in enumerate(views)}
    geometry = geometry_of(named, 5, merge_layers=False)
    assert [region.layers for region in geometry.regions] == [(0,), (1,), (2,)]
    assert [region.name for region in geometry.regions] == list(named)
    whole = geometry_of(named, 5)
    assert b"".join(block_bytes(geometry, 4)) == b"".join(block_bytes(whole, 4))
    assert geometry.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("shape", [(5, 3, 2, 4, 8), (3, 5, 2, 4, 8), (3, 2, 5, 4, 8)])
def test_one_tensor_of_all_layers_has_its_block_axis_found(shape: tuple[int, ...]) -> None:
    tensor = numbered(shape)
    geometry = geometry_of({"ALL_LAYERS": tensor}, 5)
    found = sorted(block_numbers(geometry, 2))
    assert found == expected_numbers(tensor, shape.index(5), 2, 5)


def test_one_tensor_of_all_layers_with_two_readings_needs_the_hint() -> None:
    tensor = numbered((5, 5, 2, 4, 8))
    with pytest.raises(GeometryError, match="may both be the blocks"):
        geometry_of({"ALL_LAYERS": tensor}, 5)
    geometry = geometry_of({"ALL_LAYERS": tensor}, 5, block_axis=1)
    assert sorted(block_numbers(geometry, 2)) == expected_numbers(tensor, 1, 2, 5)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = [NAME.format(i) for i in (10, 2, 0, 1)]
    tensors = {name: numbered((7, 2, 4, 8), start=1000 * i) for i, name in enumerate(names)}
    geometry = geometry_of(tensors, 7)
    assert [region.name for region in geometry.regions] == sorted(
        names, key=lambda n: int(n.split(".")[2])
    )
    assert [region.layer_index for region in geometry.regions] == [0, 1, 2, 3]


def test_two_numbers_in_a_name_both_count_for_the_order() -> None:
    names = ["layers.1.attn.0", "layers.0.attn.1", "layers.0.attn.0", "layers.1.attn.1"]
    geometry = geometry_of({name: numbered((7, 2, 4, 8)) for name in names}, 7)
    assert [region.name for region in geometry.regions] == sorted(names)


def test_a_tensor_under_several_names_is_counted_once() -> None:
    shared = numbered((7, 2, 4, 8))
    tensors = {
        NAME.format(0): shared,
        NAME.format(1): numbered((7, 2, 4, 8)),
        NAME.format(2): ArrayTensor(shared.array),
    }
    geometry = geometry_of(tensors, 7)
    assert geometry.layer_names == ((NAME.format(0), NAME.format(2)), (NAME.format(1),))
    assert geometry.bytes_per_block == 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize("shift", [1, 64, 7 * 64 - 1])
def test_tensors_that_overlap_are_refused(shift: int) -> None:
    memory = np.zeros(7 * 64 + shift, dtype=np.int32)
    tensors = {
        NAME.format(0): ArrayTensor(memory[: 7 * 64].reshape(7, 2, 4, 8)),
        NAME.format(1): ArrayTensor(memory[shift:].reshape(7, 2, 4, 8)),
    }
    with pytest.raises(GeometryError, match="overlap"):
        geometry_of(tensors, 7)


def test_tensors_side_by_side_do_not_overlap() -> None:
    memory = np.zeros(2 * 7 * 64, dtype=np.int32)
    tensors = {
        NAME.format(0): ArrayTensor(memory[: 7 * 64].reshape(7, 2, 4, 8)),
        NAME.format(1): ArrayTensor(memory[7 * 64 :].reshape(7, 2, 4, 8)),
    }
    assert len(geometry_of(tensors, 7).regions) == 2


def test_interleaved_tensors_that_overlap_are_refused() -> None:
    memory = np.zeros(7 * 128, dtype=np.int32)
    first = np.lib.stride_tricks.as_strided(memory, (7, 2, 4, 8), (512, 128, 32, 4))
    second = np.lib.stride_tricks.as_strided(memory[32:], (7, 2, 4, 8), (512, 128, 32, 4))
    with pytest.raises(GeometryError, match="overlap"):
        geometry_of({NAME.format(0): ArrayTensor(first), NAME.format(1): ArrayTensor(second)}, 7)


REFUSED = {
    "no axis is the blocks": numbered((6, 2, 4, 8)),
    "axis 1 is the blocks but axis 0 is not keys and values": numbered((3, 7, 4, 8)),
    "one axis": numbered((7 * 64,)),
    "two axes, kernel blocks": numbered((14, 64)),
    "an empty axis": ArrayTensor(np.zeros((7, 0, 4, 8), np.int32)),
    "too many kernel blocks": numbered((7 * 2000, 2, 2)),
    "elements apart": ArrayTensor(np.zeros((7, 2, 512, 16), np.int32)[..., ::2]),
    "repeated bytes": ArrayTensor(np.broadcast_to(np.zeros((7, 1, 8), np.int32), (7, 4, 8))),
    "sliding windows": ArrayTensor(
        np.lib.stride_tricks.as_strided(np.zeros(99, np.int32), (7, 4, 8), (32, 16, 4))
    ),
}


@pytest.mark.parametrize("tensor", REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_with_its_description(tensor: ArrayTensor) -> None:
    with pytest.raises(GeometryError) as caught:
        one_layer(tensor, 7)
    strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
    for fact in (NAME.format(0), f"shape={tensor.shape}", f"{strides}", "num_blocks=7"):
        assert fact in str(caught.value)


def test_lists_of_tensors_are_refused() -> None:
    with pytest.raises(GeometryError, match="list of 2 tensors"):
        one_layer([numbered((7, 4)), numbered((7, 8))], 7)


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(GeometryError, match="is int, not a tensor"):
        one_layer(7, 7)


def test_no_tensors_and_no_blocks_are_refused() -> None:
    with pytest.raises(GeometryError, match="at least one layer"):
        geometry_of({}, 7)
    with pytest.raises(GeometryError, match="num_blocks=0"):
        one_layer(numbered((7, 2, 4, 8)), 0)


def test_a_hint_that_does_not_fit_is_refused() -> None:
    with pytest.raises(GeometryError, match="block_axis=4"):
        one_layer(numbered((7, 2, 4, 8)), 7, block_axis=4)
    with pytest.raises(GeometryError, match="axis 1 is not num_blocks times"):
        one_layer(numbered((7, 2, 4, 8)), 7, block_axis=1)


def test_the_fingerprint_is_the_same_at_other_addresses_and_with_other_numbers_of_blocks() -> None:
    prints = set()
    for blocks in (5, 7, 11):
        tensors = {NAME.format(i): numbered((2, blocks, 4, 2, 8)) for i in range(3)}
        prints.add(geometry_of(tensors, blocks).fingerprint())
    assert len(prints) == 1


def test_the_fingerprint_is_stable_between_versions() -> None:
    tensors = {NAME.format(i): numbered((7, 2, 4, 8)) for i in range(2)}
    assert geometry_of(tensors, 7).fingerprint() == "decb885fac52dcad3bf90d2e9788a797"


def test_the_fingerprint_tells_what_changes_the_meaning_of_the_bytes() -> None:
    variants = [
        {NAME.format(0): numbered((7, 2, 4, 8))},
        {NAME.format(0): numbered((7, 2, 4, 8), (0, 2, 1, 3))},  # tokens before heads in memory
        {NAME.format(0): numbered((7, 4, 2, 8))},
        {NAME.format(0): numbered((14, 2, 2, 8))},  # kernel blocks
        {NAME.format(0): numbered((2, 7, 4, 8))},  # keys and values apart
        {NAME.format(0): ArrayTensor(numbered((7, 2, 4, 8)).array.view(np.float32))},
        {NAME.format(0): ArrayTensor(np.zeros((7, 2, 4, 16), np.int16))},
        {NAME.format(i): numbered((7, 2, 4, 4)) for i in range(2)},
    ]
    assert len({geometry_of(tensors, 7).bytes_per_block for tensors in variants}) == 1
    assert len({geometry_of(tensors, 7).fingerprint() for tensors in variants}) == len(variants)


def test_groups_have_their_own_layers_and_may_share_memory() -> None:
    memory = np.arange(7 * 64, dtype=np.int32).reshape(7, 2, 4, 8)
    tensors = {NAME.format(i): ArrayTensor(memory) for i in range(2)}
    first, second = geometry_of_groups(tensors, [[NAME.format(0)], [NAME.format(1)]], 7)
    assert first.layer_names == ((NAME.format(0),),)
    assert second.layer_names == ((NAME.format(1),),)
    assert first.regions[0].base_address == second.regions[0].base_address
    assert first.fingerprint() == second.fingerprint()


def test_a_shared_tensor_need_not_be_listed_in_a_group() -> None:
    shared = numbered((7, 2, 4, 8))
    tensors = {NAME.format(0): shared, NAME.format(1): shared}
    (geometry,) = geometry_of_groups(tensors, [[NAME.format(0)]], 7)
    assert geometry.layer_names == ((NAME.format(0),),)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a.0"]], "'a.1' belongs to none"),
        ([["a.0", "a.1", "a.2"]], "without a tensor: a.2"),
        ([["a.0"], ["a.0", "a.1"]], "more than one KV-cache group: a.0"),
    ],
)
def test_groups_that_do_not_match_the_tensors_are_refused(
    groups: list[list[str]], message: str
) -> None:
    tensors = {f"a.{i}": numbered((7, 2, 4, 8)) for i in range(2)}
    with pytest.raises(GeometryError, match=message):
        geometry_of_groups(tensors, groups, 7)


def test_torch_tensors_are_read_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    storage = torch.arange(3 * 5 * 64, dtype=torch.int32)
    views = storage.view(3, 5, 4, 2, 8).permute(0, 1, 3, 2, 4)
    geometry = geometry_of({NAME.format(i): views[i] for i in range(3)}, 5)
    assert len(geometry.regions) == 3
    for block in range(5):
        assert sorted(block_numbers(geometry, block)) == sorted(views[:, block].flatten().tolist())
