# SPDX-License-Identifier: Apache-2.0
"""What must hold of the slabs: alone, and beside the disk tier's table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvbm._fast.slab import FOREIGN, VALID
from kvbm.inspect.decode import Segment
from kvbm.inspect.slab import SlabFacts, digests_of
from kvbm.inspect.violations import Violation, listed

__all__ = ["BESIDE_TABLE", "OF_SLABS", "check_beside_table", "check_slabs", "unread_slabs"]

OF_SLABS = "slabs"
BESIDE_TABLE = "I6 (slabs)"


def check_slabs(segment: Segment) -> Iterator[Violation]:
    """A slab can be read whole; no whole header is of another place; chains are in order.

    A torn header is none: a loss of power leaves one, and its slot counts as empty.
    """
    for rank, facts in segment.slabs.items():
        for text in facts.damage:
            yield Violation(OF_SLABS, text, text)
        yield from _foreign(rank, facts)
        yield from _misplaced(rank, facts)


def _foreign(rank: int, facts: SlabFacts) -> Iterator[Violation]:
    yield from listed(
        OF_SLABS,
        facts.conditions == FOREIGN,
        lambda slot: (
            f"rank {rank}: the header of slot {slot} is whole and of slot "
            f"{facts.headers['slot'][slot]}, rank {facts.headers['rank'][slot]}, "
            f"fingerprint {facts.headers['fingerprint'][slot]:016x}"
        ),
    )


def _misplaced(rank: int, facts: SlabFacts) -> Iterator[Violation]:
    """A block whose parent is there is one position further down."""
    valid = facts.valid
    if len(valid) == 0:
        return
    own, parents = digests_of(valid, "digest"), digests_of(valid, "parent")
    order = np.argsort(own, kind="stable")
    place = order[np.minimum(np.searchsorted(own[order], parents), len(order) - 1)]
    wrong = (own[place] == parents) & (valid["position"] > 0)
    wrong &= (valid["group"] == valid["group"][place]) & (
        valid["position"] != valid["position"][place] + 1
    )
    yield from listed(
        OF_SLABS,
        wrong,
        lambda n: (
            f"rank {rank}: slot {valid['slot'][n]} is at position {valid['position'][n]}, its "
            f"parent at {valid['position'][place[n]]}"
        ),
    )


def unread_slabs(disk: Segment) -> str | None:
    """Why the table cannot be compared with the slabs; None if it can."""
    ranks = disk.shape.ranks if disk.shape is not None else 0
    nonces = disk.description.get("slabs")
    if not isinstance(nonces, list) or not nonces:
        return "the slabs have no names, so their headers cannot be read from outside"
    missing = [str(rank) for rank in range(ranks) if rank not in disk.slabs]
    if missing:
        return f"no slab of rank {', '.join(missing)} was read; DYN_KVBM_DISK_CACHE_DIR says where"
    for rank, facts in disk.slabs.items():
        if facts.superblock is not None and f"{facts.superblock.nonce:016x}" not in nonces:
            return f"the slab of rank {rank} is of other content: {facts.head.path}"
    return None


def check_beside_table(disk: Segment) -> Iterator[Violation]:
    """I6, as far as the slabs show it: the slot of a registered block names it, on every rank."""
    for rank, facts in disk.slabs.items():
        yield from _rank_beside_table(disk, rank, facts)


def _rank_beside_table(disk: Segment, rank: int, facts: SlabFacts) -> Iterator[Violation]:
    blocks, headers = disk.blocks, facts.headers
    if len(headers) == 0:
        return
    slot = blocks.slot[:, 0]
    seen = blocks.of_state("registered") & (blocks.placement_state[:, 0] == 2)
    seen &= slot < len(headers)
    place = np.where(seen, slot, 0)
    header, digest = headers[place], blocks.digests.view("<u8")
    right = facts.conditions[place] == VALID
    right &= (header["digest_lo"] == digest[:, 0]) & (header["digest_hi"] == digest[:, 1])
    right &= (header["position"] == blocks.position) & (header["group"] == blocks.group)
    right &= header["sequence_hash"] == blocks.sequence_hash
    parent = np.where(blocks.parent_in_table, blocks.parent, 0)
    of_parent = digest[parent] if len(digest) else digest
    same = (header["parent_lo"] == of_parent[:, 0]) & (header["parent_hi"] == of_parent[:, 1])
    right &= same | ~blocks.parent_in_table
    yield from listed(
        BESIDE_TABLE,
        seen & ~right,
        lambda b: f"rank {rank}: slot {slot[b]} of the slab does not hold block {b}",
    )
