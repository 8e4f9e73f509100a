# SPDX-License-Identifier: Apache-2.0
"""A leader's match and reserve, access by access: kvbm/_fast/table.pyx."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from tests.model.blocks import (
    Found,
    Process,
    Reserved,
    block_evict,
    block_pin,
    block_reserve,
    give_back,
    index_find,
    pool_give_back,
    pool_take,
)
from tests.model.cells import READY, REGISTERED, Parent
from tests.model.explore import Step, load


def take_block(p: Process, victims: Sequence[int]) -> Generator[Step, Any, tuple[int, int] | None]:
    """A record and a slot: from the pools while they last, else those of a victim."""
    slot = yield from pool_take(p, p.segment.free_slots)
    if slot is not None:
        block = yield from pool_take(p, p.segment.free_blocks)
        if block is not None:
            return block, slot
        yield from pool_give_back(p, p.segment.free_slots, slot)
    for number in range(len(victims)):
        freed = yield from block_evict(p, victims[number])
        if freed is not None:
            return victims[number], freed
    return None


def reserve_chain(
    p: Process,
    chain: Sequence[str],
    victims: Sequence[int],
    parent: Parent = Parent(0, 0),  # noqa: B008
) -> Generator[Step, Any, tuple[Reserved, ...]]:
    """Reserve the blocks of a chain that nobody has or fills; called inside the structure."""
    found: tuple[Reserved, ...] = ()
    for i in range(len(chain)):
        known = yield from index_find(p, chain[i], True)
        if known is not None:
            parent = Parent(known.block + 1, known.word.generation)
            continue
        taken = yield from take_block(p, victims)
        if taken is None:
            break
        block, slot = taken
        reserved = yield from block_reserve(p, block, slot, chain[i], parent)
        if reserved is None:
            yield from give_back(p, block, slot)
            known = yield from index_find(p, chain[i], True)
            if known is None:
                break
            parent = Parent(known.block + 1, known.word.generation)
            continue
        found = (*found, reserved)
        parent = Parent(block + 1, reserved.generation)
    return found


def match(p: Process, chain: Sequence[str]) -> Generator[Step, Any, tuple[int, Found | None]]:
    """Longest run of registered blocks of a chain, pinned at its deepest."""
    first = yield from index_find(p, chain[0])
    if first is None:
        return 0, None
    deepest, low, high = first, 0, len(chain)
    middle = len(chain) - 1
    while high - low > 1:
        found = yield from index_find(p, chain[middle])
        if found is None:
            high = middle
        else:
            low, deepest = middle, found
        middle = (low + high) // 2
    while low >= 0:
        if deepest is not None:
            held = yield from block_pin(p, deepest.block, chain[low], deepest.word)
            if held:
                word = yield load(p.segment.word[deepest.block], "pinned")
                return low + 1, Found(deepest.block, word)
        low -= 1
        if low >= 0:
            deepest = yield from index_find(p, chain[low])
    return 0, None


def chain_slots(
    p: Process, deepest: Found, count: int
) -> Generator[Step, Any, tuple[tuple[int, int, int], ...] | None]:
    """(block, generation, slot) of a held chain along its parents, shallowest first."""
    found: tuple[tuple[int, int, int], ...] = ()
    block, generation = deepest.block, deepest.word.generation
    for _ in range(count):
        if block < 0:
            return None
        word = yield load(p.segment.word[block], "chain")
        placement = yield load(p.segment.placement[block], "chain")
        if word.state != REGISTERED or word.generation != generation:
            return None
        if placement.state != READY or placement.generation != generation:
            return None
        found = ((block, generation, placement.slot), *found)
        parent = yield load(p.segment.parent[block], "chain")
        block, generation = parent.block - 1, parent.generation
    return found
