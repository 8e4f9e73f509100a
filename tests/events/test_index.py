# SPDX-License-Identifier: Apache-2.0
"""A subscriber's index, in both modes."""

from __future__ import annotations

from kvbm.events.index import EventIndex
from kvbm.events.model import Batch, Cleared, Event, Removed, Stored, Tier


def index(*events: Event) -> EventIndex:
    """An index that has heard of these."""
    made = EventIndex()
    made.apply(Batch(0.0, events))
    return made


FIRST, SECOND = Stored(1, None, (1,), medium="GPU"), Stored(2, 1, (2,), medium="CPU_TIER2")


def test_blocks_are_known_with_tier_and_parent() -> None:
    found = index(FIRST, SECOND)
    assert found.blocks == {1: Tier.DEVICE, 2: Tier.DISK}
    assert found.parents == {1: None, 2: 1}


def test_a_block_is_gone_when_its_last_tier_is() -> None:
    more = FIRST._replace(medium="CPU_TIER1")
    assert index(FIRST, more, Removed((1,), "GPU")).blocks == {1: Tier.HOST}
    gone = index(FIRST, more, Removed((1,), "GPU"), Removed((1,), "CPU_TIER1"))
    assert (gone.blocks, gone.parents) == ({}, {})


def test_the_end_of_an_unknown_block_is_ignored() -> None:
    assert index(FIRST, Removed((9,), "GPU")).blocks == {1: Tier.DEVICE}


def test_all_is_gone_when_everything_is_cleared() -> None:
    found = index(FIRST, SECOND, Cleared())
    assert (found.blocks, found.parents) == ({}, {})
