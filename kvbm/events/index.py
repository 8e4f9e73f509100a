# SPDX-License-Identifier: Apache-2.0
"""What a subscriber makes of events: which blocks an engine has, and where."""

from __future__ import annotations

from collections.abc import Iterable

from kvbm.events.model import Batch, Cleared, Stored, tier_of


class EventIndex:
    """An index by block hash, of both modes of the consolidator.

    Attributes
    ----------
    blocks : dict of int to int
        Set of tiers of each block (`kvbm.events.model.Tier`), as the events name them.
    parents : dict of int to int or None
        Hash of the block before each.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.parents: dict[int, int | None] = {}

    def apply(self, batch: Batch) -> None:
        """Apply the events of a batch."""
        for event in batch.events:
            if isinstance(event, Cleared):
                self.blocks.clear()
                self.parents.clear()
            elif isinstance(event, Stored):
                tier = tier_of(event.medium) or 0
                self.blocks[event.block_hash] = self.blocks.get(event.block_hash, 0) | tier
                self.parents[event.block_hash] = event.parent_hash
            else:
                self._remove(event.block_hashes, tier_of(event.medium) or 0)

    def _remove(self, block_hashes: Iterable[int], tier: int) -> None:
        for value in block_hashes:
            left = self.blocks.get(value, 0) & ~tier
            if left:
                self.blocks[value] = left
            else:
                self.blocks.pop(value, None)
                self.parents.pop(value, None)
