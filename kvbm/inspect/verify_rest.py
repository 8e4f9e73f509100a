# SPDX-License-Identifier: Apache-2.0
"""The invariants that hold only at rest: nobody inside, and all that were dead recovered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract
from kvbm.inspect.decode import Segment
from kvbm.inspect.violations import Violation, listed


def resting_problem(segment: Segment) -> str | None:
    """Why the segment is not known to be at rest; None if it is."""
    if segment.capture.locked is None:
        return "who was alive is not known of a plain copy"
    lines = segment.participants
    dead = [int(n) for n in np.flatnonzero(lines["role"]) if not segment.is_alive(int(n))]
    if dead:
        return f"what died on lines {dead} has not been recovered"
    inside = [int(n) for n in np.flatnonzero(lines["inside"]) if segment.is_alive(int(n))]
    if inside:
        return f"lines {inside} are inside"
    if segment.header["recovering"]:
        return "a recovery is under way, or its process died"
    return None


def check_exact_counts(segment: Segment) -> Iterator[Violation]:
    """I2 as an equality."""
    blocks = segment.blocks
    found = blocks.registered_children
    wrong = blocks.of_state("registered") & (blocks.children > found)
    yield from listed(
        "exact counts",
        wrong,
        lambda b: f"block {b} counts {blocks.children[b]} children, it has {found[b]}",
        blocks.words,
    )


def check_between(segment: Segment) -> Iterator[Violation]:
    """Nothing is half done: no EVICTING block, PARTIAL ones and holders of the living.

    A living leader may have a PARTIAL block without an operation: one that it has just reserved, or
    one that the caller of `kvbm.block_manager` fills himself.
    """
    blocks = segment.blocks
    yield from listed(
        "half done",
        blocks.of_state("evicting"),
        lambda b: f"block {b} is left evicting",
        blocks.words,
    )
    locked = segment.capture.locked or frozenset()
    living = sum(1 << leader for leader in range(contract.LEADERS) if leader in locked)
    dead = (blocks.holders & ~living) != 0
    yield from listed(
        "half done",
        dead & ~blocks.of_state("evicting"),
        lambda b: f"block {b} is held by {_leaders(int(blocks.holders[b]) & ~living)}, not alive",
        blocks.words,
    )


def _leaders(holders: int) -> str:
    found = [str(n) for n in range(contract.LEADERS) if holders >> n & 1]
    return f"leader {', '.join(found)}"


def check_lost(segment: Segment) -> Iterator[Violation]:
    """Every record and slot that no block names is in its pool, and findable there."""
    blocks = segment.blocks
    live = ~blocks.of_state("reset")
    taken = {"blocks": live}
    for tier, name in segment.checked_tiers.items():
        slot = blocks.slot[:, tier][live & (blocks.placement_state[:, tier] != 0)]
        named = np.zeros(segment.capacity(name), np.bool_)
        named[slot[slot < len(named)]] = True
        taken[name] = named
    for pool, in_use in taken.items():
        yield from _lost_of_pool(segment, pool, in_use)


def _lost_of_pool(
    segment: Segment, pool: str, in_use: npt.NDArray[np.bool_]
) -> Iterator[Violation]:
    free = segment.free(pool)
    count = min(len(free), len(in_use))
    lost = ~free[:count] & ~in_use[:count]
    yield from listed("lost", lost, lambda n: f"{pool} {n} is neither free nor in use")
    section = segment.checked_pools[pool]
    words = segment.array(f"pool.{section}")
    summary = np.unpackbits(segment.array(f"summary.{section}").view(np.uint8), bitorder="little")
    hidden = (words != 0)[: len(summary)] & (summary[: len(words)] == 0)
    yield from listed("lost", hidden, lambda n: f"free {pool} from {64 * n} on cannot be found")


def check_index(segment: Segment) -> Iterator[Violation]:
    """The index leads to each block that is in the tree or on its way there, and nowhere else."""
    blocks, buckets = segment.blocks, segment.buckets
    if len(blocks) == 0 or len(buckets) == 0 or len(buckets) & (len(buckets) - 1):
        return
    count = len(blocks)
    tag, first, second = (np.zeros(count, np.uint32) for _ in range(3))
    digest = blocks.digests.view("<u8")
    contract.index_places(
        np.ascontiguousarray(digest[:, 0]),
        np.ascontiguousarray(digest[:, 1]),
        len(buckets),
        tag,
        first,
        second,
    )
    live = blocks.of_state("registered") | blocks.of_state("partial")
    entry = (tag.astype(np.uint64) << np.uint64(32)) | np.arange(1, count + 1, dtype=np.uint64)
    found = (buckets[first] == entry[:, None]).any(axis=1)
    found |= (buckets[second] == entry[:, None]).any(axis=1)
    yield from listed(
        "index", live & ~found, lambda b: f"the index does not lead to block {b}", blocks.words
    )
    used = buckets != 0
    block = (buckets & np.uint64(0xFFFFFFFF)).astype(np.int64) - 1
    inside = used & (block >= 0) & (block < count)
    where = np.where(inside, block, 0)
    bucket = np.arange(len(buckets))[:, None]
    right = inside & live[where] & (entry[where] == buckets)
    right &= (first[where] == bucket) | (second[where] == bucket)
    stale = used & ~right
    yield from listed(
        "index",
        stale.any(axis=1),
        lambda n: f"bucket {n} has {int(stale[n].sum())} stale entries",
    )


REST_CHECKS: dict[str, Callable[[Segment], Iterator[Violation]]] = {
    "exact counts": check_exact_counts,
    "half done": check_between,
    "lost": check_lost,
    "index": check_index,
}
