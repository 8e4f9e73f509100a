# SPDX-License-Identifier: Apache-2.0
"""Events, one a block, and the tiers that they name."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

MASK64 = (1 << 64) - 1


class Tier(IntEnum):
    """Where a block is, the fastest first. A set of tiers is the sum of its members, 0 if empty."""

    DEVICE = 1
    HOST = 2
    DISK = 4

    @property
    def medium(self) -> str:
        """What events call the tier."""
        return _MEDIA[self]


def tiers_in(tiers: int) -> list[Tier]:
    """Members of a set, the fastest first."""
    return [tier for tier in Tier if tier & tiers]


_MEDIA = {Tier.DEVICE: "GPU", Tier.HOST: "CPU_TIER1", Tier.DISK: "CPU_TIER2"}
# As Dynamo's router reads them.
_TIERS = {
    "GPU": Tier.DEVICE,
    "DEVICE": Tier.DEVICE,
    "CPU": Tier.HOST,
    "CPU_PINNED": Tier.HOST,
    "CPU_TIER1": Tier.HOST,
    "CPU_TIER2": Tier.DISK,
    "DISK": Tier.DISK,
    "NVME": Tier.DISK,
    "STORAGE": Tier.DISK,
}


def tier_of(medium: str | None) -> Tier | None:
    """Tier that a medium stands for: the device if none is named, None if nobody knows it."""
    return Tier.DEVICE if medium is None else _TIERS.get(medium.upper())


class Stored(NamedTuple):
    """A tier has a block now.

    Attributes
    ----------
    block_hash, parent_hash : int
        The engine's hashes of the block and of the one before it (None: the first), 64 bits.
    token_ids : tuple of int
        Its tokens.
    lora_name : str or None
        The adapter whose KV it is.
    medium : str or None
        Where it is.
    group : int
        KV-cache group.
    extra_keys : tuple
        What else the engine's hash is made of, as the engine tells it: texts, and for images what
        is no text; not sent on.
    """

    block_hash: int
    parent_hash: int | None
    token_ids: tuple[int, ...]
    lora_name: str | None = None
    medium: str | None = None
    group: int = 0
    extra_keys: tuple[Any, ...] = ()


class Removed(NamedTuple):
    """A tier has not got these blocks any more."""

    block_hashes: tuple[int, ...]
    medium: str | None = None
    group: int = 0


class Cleared(NamedTuple):
    """All tiers are empty."""


Event: TypeAlias = Stored | Removed | Cleared


class Batch(NamedTuple):
    """Events that were sent together.

    Attributes
    ----------
    timestamp : float
        When, in seconds since 1970.
    events : tuple of Event
        In the order in which they are to be applied.
    rank : int
        Data-parallel rank of the engine.
    problems : tuple of str
        What could not be read and was left out, a line each.
    """

    timestamp: float
    events: tuple[Event, ...]
    rank: int = 0
    problems: tuple[str, ...] = ()
