# SPDX-License-Identifier: Apache-2.0
"""Which tiers hold which block, and what subscribers have been told of it.

Sources say what they have (`device`, `device_cleared`, `tables`); `flush` compares that with what
was told, and the difference is the next events. So a block that comes and goes between two flushes
is never told of, whatever the order in which the sources are heard, and an event that a source
repeats changes nothing.

Two modes, which differ only in what is to be told of a block:

dedup
    One `Stored`, which names the tier that had it first, when it enters the first tier; one
    `Removed` with the same tier when it has left the last.
passthrough
    One of each for each tier.

A block is told of once its tokens are known, which the engine's own events say. They stay known
while a tier has the block, and a little longer: it may be on its way to another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from kvbm.events.model import Cleared, Event, Removed, Stored, Tier, tier_of, tiers_in
from kvbm.events.table_keys import TableKey, TableKeys
from kvbm.hashing import pack_tokens

Mode = Literal["dedup", "passthrough"]

FORGOTTEN_MAX = 16_384
"""Blocks in no tier whose tokens are kept; the oldest goes first."""


class _Block:
    """What is known of a block."""

    __slots__ = (
        "block_hash",
        "depth",
        "key",
        "lora_name",
        "parent_hash",
        "tiers",
        "tokens",
        "told",
    )

    def __init__(self, key: int) -> None:
        self.key = TableKey(key)
        self.block_hash = 0
        self.parent_hash: int | None = None
        self.tokens: bytes | None = None  # packed; None: the engine has not told of the block
        self.lora_name: str | None = None
        self.depth = 0
        self.tiers = 0  # where it is
        self.told = 0  # where subscribers think that it is

    def event(self, tier: Tier) -> Stored:
        """The event that says that the block is in a tier."""
        assert self.tokens is not None
        tokens = tuple(memoryview(self.tokens).cast("I"))
        return Stored(self.block_hash, self.parent_hash, tokens, self.lora_name, tier.medium)


class Tracker:
    """The consolidated index of one engine.

    Parameters
    ----------
    keys : TableKeys
        How the engine's blocks are found in the tables.
    mode : {"dedup", "passthrough"}
        What is told.
    groups : int
        KV-cache groups: a tier has a block once it has it in all of them.

    Attributes
    ----------
    reuse_is_told : bool
        Set where the engine also tells of device blocks that a request found there. Then it cannot
        be known how many hold the same tokens, and the first end counts.
    """

    def __init__(self, keys: TableKeys, mode: Mode = "dedup", groups: int = 1) -> None:
        self.reuse_is_told = False
        self._keys = keys
        self._dedup = mode == "dedup"
        self._groups = groups
        self._blocks: dict[int, _Block] = {}
        self._keys_of: dict[int, TableKey] = {}  # by the engine's hash
        self._counts: dict[Tier, Counter[tuple[int, int]]] = {tier: Counter() for tier in Tier}
        self._touched: dict[int, _Block] = {}
        self._forgotten: dict[int, _Block] = {}
        self._cleared = False

    # ---- what the sources have -------------------------------------------------------------------
    def device(self, event: Event) -> None:
        """The engine's own event, of its device cache; those of other media are not its business.

        Several device blocks may hold the same tokens: the engine tells of each, and of its end.
        """
        counts = self._counts[Tier.DEVICE]
        if isinstance(event, Cleared):
            self.device_cleared()
        elif tier_of(event.medium) is not Tier.DEVICE:
            return
        elif isinstance(event, Stored):
            block = self._describe(event)
            entry = block.key.value, event.group
            counts[entry] = 1 if self.reuse_is_told else counts[entry] + 1
            self._update(block, Tier.DEVICE)
        else:
            for value in event.block_hashes:
                key = self._keys_of.get(value)
                if key is not None and (key.value, event.group) in counts:
                    _take(counts, (key.value, event.group), all_of_it=self.reuse_is_told)
                    self._update(self._block(key.value), Tier.DEVICE)

    def device_cleared(self) -> None:
        """The device's cache is empty; the tiers keep what they have."""
        self._cleared = True
        self._counts[Tier.DEVICE].clear()
        for block in self._blocks.values():
            if block.tiers & Tier.DEVICE:
                self._update(block, Tier.DEVICE)

    def table(
        self, tier: Tier, added: Iterable[tuple[int, int]], removed: Iterable[tuple[int, int]]
    ) -> None:
        """What changed in a block table: (sequence hash, group) of records.

        Two records may hold the same block.
        """
        counts = self._counts[tier]
        for entry in removed:
            _take(counts, entry)
            found = self._blocks.get(entry[0])
            if found is not None:
                self._update(found, tier)
        for entry in added:
            counts[entry] += 1
            self._update(self._block(entry[0]), tier)

    def _block(self, key: int) -> _Block:
        block = self._blocks.get(key)
        if block is None:
            known = self._forgotten.pop(key, None)
            block = self._blocks[key] = _Block(key) if known is None else known
        return block

    def _describe(self, event: Stored) -> _Block:
        """The block of an event, whose tokens are known now."""
        parent = None if event.parent_hash is None else self._keys_of.get(event.parent_hash)
        key = self._keys_of.get(event.block_hash) or self._keys.key(event, parent)
        block = self._block(key.value)
        if block.tokens is None:
            above = self._above(event.parent_hash)
            block.key, block.depth = key, 0 if above is None else above.depth + 1
            block.block_hash, block.parent_hash = event.block_hash, event.parent_hash
            block.tokens, block.lora_name = pack_tokens(event.token_ids), event.lora_name
            self._keys_of[event.block_hash] = key
        return block

    def _above(self, parent_hash: int | None) -> _Block | None:
        """The block before one, if it is known."""
        key = None if parent_hash is None else self._keys_of.get(parent_hash)
        if key is None:
            return None
        return self._blocks.get(key.value) or self._forgotten.get(key.value)

    def _update(self, block: _Block, tier: Tier) -> None:
        counts, key = self._counts[tier], block.key.value
        if all((key, group) in counts for group in range(self._groups)):
            block.tiers |= tier
        else:
            block.tiers &= ~tier
        self._touched[key] = block

    # ---- what is told ----------------------------------------------------------------------------
    def _to_tell(self, block: _Block) -> int:
        """Where subscribers are to think that a block is."""
        if block.tokens is None or not block.tiers:
            return 0
        if not self._dedup:
            return block.tiers
        return block.told or block.tiers & -block.tiers

    def flush(self) -> list[Event]:
        """What subscribers must be told now: parents first, what is gone last."""
        events: list[Event] = []
        if self._cleared:
            self._cleared = False
            told = [block for block in self._blocks.values() if block.told]
            if told and not any(self._to_tell(block) for block in told):
                events.append(Cleared())
                for block in told:
                    block.told = 0
        gone: dict[Tier, list[int]] = {}
        for block in self._touched.values():
            events += self._news(block)
            for tier in tiers_in(block.told & ~self._to_tell(block)):
                gone.setdefault(tier, []).append(block.block_hash)
                block.told &= ~tier
        events += (Removed(tuple(hashes), tier.medium) for tier, hashes in gone.items())
        for block in self._touched.values():
            if not block.tiers:
                self._forget(block)
        self._touched.clear()
        return events

    def _news(self, block: _Block) -> Iterator[Stored]:
        """What is new of a block, and before it of those above it."""
        chain = []
        above: _Block | None = block
        while above is not None and self._to_tell(above) & ~above.told:
            chain.append(above)
            above = self._above(above.parent_hash)
        for one in reversed(chain):
            told, one.told = one.told, one.told | self._to_tell(one)
            for tier in tiers_in(one.told & ~told):
                yield one.event(tier)

    def _forget(self, block: _Block) -> None:
        """Keep the tokens of a block that is nowhere, for a while."""
        self._blocks.pop(block.key.value, None)
        if block.tokens is None:
            return
        self._forgotten[block.key.value] = block
        if len(self._forgotten) > FORGOTTEN_MAX:
            oldest = self._forgotten.pop(next(iter(self._forgotten)))
            self._keys_of.pop(oldest.block_hash, None)

    def snapshot(self) -> Iterator[Event]:
        """Everything that was told and holds, as events of its own, to an index that is emptied."""
        yield Cleared()
        told = [block for block in self._blocks.values() if block.told]
        for block in sorted(told, key=lambda block: block.depth):
            for tier in tiers_in(block.told):
                yield block.event(tier)


def _take(
    counts: Counter[tuple[int, int]], entry: tuple[int, int], all_of_it: bool = False
) -> None:
    """Count one less of an entry; none is not kept."""
    counts[entry] -= 1
    if all_of_it or counts[entry] <= 0:
        del counts[entry]
