# SPDX-License-Identifier: Apache-2.0
"""Moving KV bytes between tiers.

``geometry``
    Where a block's bytes lie in the engine's KV tensors.
``arena_layout``
    Where a slot's bytes lie in a host arena.
``plan``
    Rows (device block, slot) -> runs -> copies, as arrays; no bytes are touched.

The first two meet in the order of regions: region ``r`` of a `KvGeometry` is copied to and from
region ``r`` of an `ArenaLayout`, and both have the same chunk sizes.
"""
