# SPDX-License-Identifier: Apache-2.0
"""By which number a block table knows a block that the engine tells of.

A table keeps 64 bits of a block beside its digest, its sequence hash. Where digests are the
engine's own hashes, these are the 64 bits that the engine publishes: `EngineKeys`. Otherwise they
are upstream's chained hash, which `ContentKeys` computes again from what the event says. Both have
tokens, all tokens before them, cache salt and LoRA adapter in them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvbm.events.model import Stored
from kvbm.hashing import pack_tokens, salt_hash, xxh3_64


class TableKey(NamedTuple):
    """Key of a block.

    Attributes
    ----------
    value : int
        As the table has it; negative for a block that the table does not tell from others.
    seed : int
        Salt hash of its chain; 0 where it is not used.
    """

    value: int
    seed: int = 0


class TableKeys(Protocol):
    """Where keys come from."""

    def key(self, block: Stored, parent: TableKey | None) -> TableKey:
        """Key of a block; `parent` is that of the one before it, if it is known."""


class EngineKeys:
    """The engine's hashes are the tables' own."""

    def key(self, block: Stored, parent: TableKey | None) -> TableKey:
        """The engine's hash, as it is."""
        return TableKey(block.block_hash)


class ContentKeys:
    """Upstream's chained hash, seeded with salt and adapter.

    It has no place for images, audio and embeddings: blocks with such inputs, and those behind
    them, get keys that no table has.
    """

    def key(self, block: Stored, parent: TableKey | None) -> TableKey:
        """Compute the next link of the chain."""
        if block.parent_hash is None:
            before, seed = None, salt_hash(*_identity(block))
        elif parent is None or parent.value < 0:
            return _no_key(block)
        else:
            before, seed = parent.value, parent.seed
        if any(not isinstance(key, str) for key in block.extra_keys):
            return _no_key(block)
        value = xxh3_64(pack_tokens(block.token_ids), seed)
        if before is not None:
            value = xxh3_64(before.to_bytes(8, "little") + value.to_bytes(8, "little"), seed)
        return TableKey(value, seed)


def _identity(block: Stored) -> tuple[str | None, str | None]:
    """Salt and adapter of a first block: its texts are the adapter's name, if any, and the salt."""
    texts = [key for key in block.extra_keys if isinstance(key, str)]
    if block.lora_name is not None and texts[:1] == [block.lora_name]:
        del texts[0]
    return (texts[0] if texts else None), block.lora_name


def _no_key(block: Stored) -> TableKey:
    return TableKey(~block.block_hash)
