# SPDX-License-Identifier: Apache-2.0
"""Where a block's bytes lie in the engine's KV tensors, found from shape and strides.

A KV cache is a list of regions. A region is one contiguous piece that each block has: device block
``b`` of region ``r`` lies at ``base_r + b * block_stride_r`` and has ``chunk_r`` bytes. What is
inside a chunk is opaque here.

==============================  ============================  ======================================
tensor of one layer             shape                         regions
==============================  ============================  ======================================
K and V packed                  (nb, heads, tokens, 2 * dim)  1, whatever the order of heads, tokens
MLA                             (nb, tokens, width)           1
block first                     (nb, 2, tokens, heads, dim)   1
K/V first                       (2, nb, tokens, heads, dim)   2: keys, values
K/V first over block first      the same, other strides       1
heads outermost                 (nb, heads, tokens, width)    1 a head
kernel blocks                   (nb * k, ...) instead of nb   as above; a block is k kernel blocks
cross-layer                     a view a layer, or one        1 for all layers that lie side by side
                                tensor of all layers          in a block
==============================  ============================  ======================================

The engine's tensors are used by duck typing (`kvbm.transfer.tensors.KvTensor`), so that nothing
here needs an engine. Whatever is not understood is refused: a wrong guess would serve wrong bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbm.errors import GeometryError
from kvbm.transfer.tensors import (
    LayerFormat,
    Piece,
    TensorReader,
    checked,
    dtype_name,
    layer_order,
)

__all__ = ["KvGeometry", "Region", "geometry_of", "geometry_of_groups"]

REGIONS_MAX = 16384


@dataclass(frozen=True)
class Region:
    """One contiguous piece that each block has.

    Attributes
    ----------
    base_address
        Address of device block 0's piece.
    block_stride_bytes
        From one device block's piece to the next one's; at least `chunk_bytes`.
    chunk_bytes
        Size of the piece.
    layer_index
        First layer in it, counted from 0 in the order of the geometry's layers.
    name
        Name of that layer.
    layers
        All layers in it, ascending: more than one where layers lie side by side in a block.
    """

    base_address: int
    block_stride_bytes: int
    chunk_bytes: int
    layer_index: int
    name: str
    layers: tuple[int, ...]

    @property
    def is_packed(self) -> bool:
        """Whether neighbouring blocks' pieces touch, so that a run of blocks is one piece."""
        return self.block_stride_bytes == self.chunk_bytes


@dataclass(frozen=True)
class KvGeometry:
    """Where the blocks of one KV-cache group lie in one rank's memory.

    Attributes
    ----------
    regions
        In the order in which a block's pieces are laid out in lower tiers.
    num_blocks
        Device blocks, as the scheduler counts them.
    layer_names
        Names of each layer, in order; several where layers share one tensor (KV sharing).
    formats, parts
        What `fingerprint` is made of: a layer's format, and which pieces each region joins.
    """

    regions: tuple[Region, ...]
    num_blocks: int
    layer_names: tuple[tuple[str, ...], ...]
    formats: tuple[LayerFormat, ...]
    parts: tuple[tuple[int, ...], ...]

    @property
    def chunk_bytes(self) -> tuple[int, ...]:
        """Chunk size of each region."""
        return tuple(region.chunk_bytes for region in self.regions)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block on this rank."""
        return sum(self.chunk_bytes)

    @property
    def address_table(self) -> tuple[tuple[int, int, int], ...]:
        """Base address, block stride and chunk size of each region, for the copy backends."""
        return tuple((r.base_address, r.block_stride_bytes, r.chunk_bytes) for r in self.regions)

    def fingerprint(self) -> str:
        """Hash of what must be equal for stored bytes to be usable again, 32 hex digits.

        It covers element type, order of the axes inside a block, number and order of layers, chunk
        sizes and which layers a chunk joins; not addresses, names, the number of blocks or the
        distances between blocks, which may differ from one start to the next.
        """
        facts = ("kvbm geometry 1", self.chunk_bytes, self.parts, tuple(map(tuple, self.formats)))
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def geometry_of(
    kv_caches: Mapping[str, Any],
    num_blocks: int,
    *,
    block_axis: int | None = None,
    merge_layers: bool = True,
) -> KvGeometry:
    """Find where blocks lie in the tensors of one KV-cache group.

    Parameters
    ----------
    kv_caches
        Tensor by layer name. Layers are ordered by the integers in their names; a tensor under
        several names counts once.
    num_blocks
        Device blocks, as the scheduler counts them. A tensor may have ``num_blocks * k`` smaller
        blocks of the attention kernel.
    block_axis
        Axis of the blocks in all tensors, for shapes that can be read in two ways (two blocks, or a
        leading axis of layers). By default it is found.
    merge_layers
        Join the pieces of layers that lie side by side in a block into one region. Without, each
        region belongs to one layer.

    Raises
    ------
    GeometryError
        If a tensor is not understood, can be read in two ways, or overlaps another one. The message
        has its name, shape and strides and the number of blocks.
    """
    if num_blocks < 1:
        raise GeometryError(f"num_blocks={num_blocks} is not allowed: 1 or more")
    if not kv_caches:
        raise GeometryError("no KV cache tensors: at least one layer is needed")
    names: dict[tuple[object, ...], list[str]] = {}
    pieces: list[Piece] = []
    formats: list[LayerFormat] = []
    for name in sorted(kv_caches, key=layer_order):
        tensor = checked(name, kv_caches[name])
        identity = (tensor.data_ptr(), *tensor.shape, *tensor.stride(), dtype_name(tensor))
        names.setdefault(identity, []).append(name)
        if len(names[identity]) == 1:
            reader = TensorReader(name, tensor, num_blocks, block_axis)
            pieces += reader.pieces(len(names) - 1, len(pieces))
            formats.append(reader.format())
    joined = _join(pieces) if merge_layers else [[piece] for piece in pieces]
    if len(joined) > REGIONS_MAX:
        raise GeometryError(
            f"{len(joined)} regions for {len(names)} layers and num_blocks={num_blocks}: "
            f"at most {REGIONS_MAX} are supported"
        )
    regions = tuple(map(_region, joined))
    _check_disjoint(regions, num_blocks)
    return KvGeometry(
        regions=regions,
        num_blocks=num_blocks,
        layer_names=tuple(map(tuple, names.values())),
        formats=tuple(formats),
        parts=tuple(tuple(piece.position for piece in group) for group in joined),
    )


def geometry_of_groups(
    kv_caches: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    num_blocks: int,
    *,
    block_axis: int | None = None,
    merge_layers: bool = True,
) -> tuple[KvGeometry, ...]:
    """Find where blocks lie for each KV-cache group; groups may use the same memory.

    Parameters
    ----------
    kv_caches
        Tensor by layer name, of all groups.
    groups
        Layer names of each group.
    num_blocks, block_axis, merge_layers
        As for `geometry_of`.

    Raises
    ------
    GeometryError
        As for `geometry_of`; also if a group names a layer that has no tensor, or a tensor belongs
        to no group and is not shared with a layer that does: its bytes would not come back.
    """
    listed = [name for group in groups for name in group]
    missing = sorted(set(listed) - set(kv_caches))
    if missing:
        raise GeometryError(f"KV-cache groups name layers without a tensor: {', '.join(missing)}")
    repeated = sorted({name for name in listed if listed.count(name) > 1})
    if repeated:
        raise GeometryError(f"layers in more than one KV-cache group: {', '.join(repeated)}")
    addresses = {checked(name, kv_caches[name]).data_ptr() for name in listed}
    for name in sorted(set(kv_caches) - set(listed)):
        if checked(name, kv_caches[name]).data_ptr() not in addresses:
            raise GeometryError(
                f"KV cache tensor {name!r} belongs to none of the {len(groups)} KV-cache groups"
            )
    return tuple(
        geometry_of(
            {name: kv_caches[name] for name in group},
            num_blocks,
            block_axis=block_axis,
            merge_layers=merge_layers,
        )
        for group in groups
    )


def _join(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Join pieces that lie side by side in each block; keep the order of the first of each."""
    groups: list[list[Piece]] = []
    total = 0
    for piece in sorted(pieces, key=lambda piece: (piece.block_stride, piece.base)):
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and last.block_stride == piece.block_stride
            and last.base + last.chunk == piece.base
            and total + piece.chunk <= piece.block_stride
        ):
            groups[-1].append(piece)
            total += piece.chunk
        else:
            groups.append([piece])
            total = piece.chunk
    return sorted(groups, key=lambda group: min(piece.position for piece in group))


def _region(pieces: Sequence[Piece]) -> Region:
    first = min(pieces)  # by position
    return Region(
        base_address=pieces[0].base,
        block_stride_bytes=pieces[0].block_stride,
        chunk_bytes=sum(piece.chunk for piece in pieces),
        layer_index=first.layer,
        name=first.name,
        layers=tuple(sorted({piece.layer for piece in pieces})),
    )


def _check_disjoint(regions: Iterable[Region], num_blocks: int) -> None:
    """Refuse regions that have bytes in common.

    Regions whose spans intersect must have one stride, and then they must lie apart within it.
    """
    cluster: list[Region] = []
    end = 0
    for region in sorted(regions, key=lambda region: region.base_address):
        if region.base_address >= end:
            cluster = []
        span = (num_blocks - 1) * region.block_stride_bytes + region.chunk_bytes
        end = max(end, region.base_address + span)
        cluster.append(region)
        if len(cluster) > 1:
            _check_interleaved(cluster[0], cluster[-2], region)


def _check_interleaved(first: Region, before: Region, region: Region) -> None:
    stride = region.block_stride_bytes
    offset = region.base_address - first.base_address
    if (
        stride != first.block_stride_bytes
        or before.base_address + before.chunk_bytes > region.base_address
        or offset + region.chunk_bytes > stride
    ):
        raise GeometryError(
            f"KV cache tensors {first.name!r} and {region.name!r} overlap: base addresses "
            f"{first.base_address:#x} and {region.base_address:#x}, block strides "
            f"{first.block_stride_bytes} and {stride}, chunks {first.chunk_bytes} and "
            f"{region.chunk_bytes} bytes"
        )
