# SPDX-License-Identifier: Apache-2.0
"""What is told of a block: the right tier, once, and its end when the last tier has lost it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from kvbm.events import tracker as module
from kvbm.events.index import EventIndex
from kvbm.events.model import Batch, Cleared, Event, Removed, Stored, Tier, tiers_in
from kvbm.events.table_keys import ContentKeys, EngineKeys
from kvbm.events.tracker import Mode, Tracker

SIZE = 2


def stored(value: int, parent: int | None = None, **more: Any) -> Stored:
    """The engine's event of a block."""
    return Stored(value, parent, (value, value + 1), **{"medium": "GPU", **more})


def chain(*values: int) -> list[Stored]:
    """A chain of blocks."""
    return [stored(v, p) for v, p in zip(values, (None, *values), strict=False)]


def told(tracker: Tracker) -> list[tuple[str, int | tuple[int, ...], str | None]]:
    """What a flush tells, in short."""
    short = []
    for event in tracker.flush():
        if isinstance(event, Stored):
            short.append(("+", event.block_hash, event.medium))
        elif isinstance(event, Removed):
            short.append(("-", event.block_hashes, event.medium))
        else:
            short.append(("0", 0, None))
    return short


def records(*values: int, group: int = 0) -> list[tuple[int, int]]:
    """Entries of a table."""
    return [(value, group) for value in values]


def heard(events: Iterable[Event], mode: Mode = "dedup", groups: int = 1) -> Tracker:
    """A tracker that has heard of these blocks, and told of them."""
    tracker = Tracker(EngineKeys(), mode, groups)
    for event in events:
        tracker.device(event)
    tracker.flush()
    return tracker


def test_a_block_is_told_of_with_its_tier_tokens_parent_and_adapter() -> None:
    tracker = Tracker(EngineKeys())
    tracker.device(stored(1, lora_name="l1", extra_keys=("l1", "salt")))
    tracker.device(stored(2, 1, lora_name="l1"))
    assert tracker.flush() == [
        Stored(1, None, (1, 2), "l1", "GPU"),
        Stored(2, 1, (2, 3), "l1", "GPU"),
    ]
    assert tracker.flush() == []


def test_a_second_tier_is_not_told_of() -> None:
    tracker = heard(chain(1, 2))
    tracker.table(Tier.HOST, records(1, 2), [])
    tracker.table(Tier.DISK, records(1), [])
    assert told(tracker) == []


def test_the_end_is_told_when_the_last_tier_has_lost_it() -> None:
    tracker = heard(chain(1))
    tracker.table(Tier.HOST, records(1), [])
    tracker.table(Tier.DISK, records(1), [])
    tracker.device(Removed((1,), "GPU"))
    assert told(tracker) == []
    tracker.table(Tier.HOST, [], records(1))
    assert told(tracker) == []  # upstream would end it here: host and disk are one for it
    tracker.table(Tier.DISK, [], records(1))
    assert told(tracker) == [("-", (1,), "GPU")]


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_the_tier_of_an_event_is_that_which_had_the_block_first(tier: Tier) -> None:
    tracker = heard([*chain(1, 2), Removed((1, 2), "GPU")])
    tracker.table(tier, records(1), [])
    assert told(tracker) == [("+", 1, tier.medium)]
    tracker.device(stored(1))
    assert told(tracker) == []
    tracker.device(Removed((1,), "GPU"))
    tracker.table(tier, [], records(1))
    assert told(tracker) == [("-", (1,), tier.medium)]


def test_passthrough_tells_of_each_tier() -> None:
    tracker = Tracker(EngineKeys(), "passthrough")
    tracker.device(stored(1))
    tracker.table(Tier.HOST, records(1), [])
    assert told(tracker) == [("+", 1, "GPU"), ("+", 1, "CPU_TIER1")]
    tracker.device(Removed((1,), "GPU"))
    tracker.table(Tier.DISK, records(1), [])
    assert told(tracker) == [("+", 1, "CPU_TIER2"), ("-", (1,), "GPU")]
    tracker.table(Tier.HOST, [], records(1))
    tracker.table(Tier.DISK, [], records(1))
    assert told(tracker) == [("-", (1,), "CPU_TIER1"), ("-", (1,), "CPU_TIER2")]


def test_what_comes_and_goes_between_two_flushes_is_not_told_of() -> None:
    tracker = heard(chain(1))
    tracker.device(stored(2, 1))
    tracker.device(Removed((2, 1), "GPU"))
    tracker.device(stored(1))
    assert told(tracker) == []


def test_a_block_moves_from_the_device_to_a_tier_without_an_end() -> None:
    """Whatever is heard first: the engine's word may come before the look at the table."""
    tracker = heard(chain(1))
    tracker.device(Removed((1,), "GPU"))
    tracker.table(Tier.HOST, records(1), [])
    assert told(tracker) == []


def test_a_block_that_was_nowhere_for_a_while_is_still_known() -> None:
    tracker = heard([*chain(1, 2), Removed((1, 2), "GPU")])
    assert told(tracker) == []
    tracker.table(Tier.HOST, records(1, 2), [])
    assert told(tracker) == [("+", 1, "CPU_TIER1"), ("+", 2, "CPU_TIER1")]


def test_what_is_kept_of_blocks_that_are_nowhere_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FORGOTTEN_MAX", 3)
    tracker = heard(stored(value) for value in range(5))
    tracker.device(Removed(tuple(range(5)), "GPU"))
    tracker.flush()
    tracker.table(Tier.HOST, records(*range(5)), [])
    assert told(tracker) == [("+", value, "CPU_TIER1") for value in (2, 3, 4)]


def test_a_block_of_unknown_tokens_waits_until_the_engine_has_told_of_it() -> None:
    tracker = Tracker(EngineKeys())
    tracker.table(Tier.HOST, records(1, 2), [])
    assert told(tracker) == []
    for event in chain(1, 2):
        tracker.device(event)
    assert told(tracker) == [("+", 1, "GPU"), ("+", 2, "GPU")]
    tracker.device(Removed((1, 2), "GPU"))
    assert told(tracker) == []  # the host tier had them all the time


def test_parents_are_told_of_first_whatever_was_heard_first() -> None:
    tracker = heard([*chain(1, 2, 3), Removed((3, 2, 1), "GPU")])
    tracker.table(Tier.DISK, records(3), [])
    tracker.table(Tier.HOST, records(2, 1), [])
    assert told(tracker) == [("+", 1, "CPU_TIER1"), ("+", 2, "CPU_TIER1"), ("+", 3, "CPU_TIER2")]


def test_two_records_of_one_block_end_with_the_second() -> None:
    tracker = heard([*chain(1), Removed((1,), "GPU")])
    tracker.table(Tier.HOST, records(1, 1), [])
    assert told(tracker) == [("+", 1, "CPU_TIER1")]
    tracker.table(Tier.HOST, [], records(1))
    assert told(tracker) == []
    tracker.table(Tier.HOST, [], records(1))
    assert told(tracker) == [("-", (1,), "CPU_TIER1")]


def test_a_block_is_on_the_device_until_the_last_copy_is_gone() -> None:
    """Two requests that began together have computed the same prompt."""
    tracker = heard([*chain(1), *chain(1)])
    tracker.device(Removed((1,), "GPU"))
    assert told(tracker) == []
    tracker.device(Removed((1,), "GPU"))
    assert told(tracker) == [("-", (1,), "GPU")]


def test_where_reuse_is_told_the_first_end_counts() -> None:
    tracker = heard(chain(1))
    tracker.reuse_is_told = True
    for _ in range(3):
        tracker.device(stored(1))
    assert told(tracker) == []
    tracker.device(Removed((1,), "GPU"))
    assert told(tracker) == [("-", (1,), "GPU")]


def test_an_end_that_was_no_beginning_is_ignored() -> None:
    tracker = heard([*chain(1), Removed((1,), "GPU")])
    tracker.device(Removed((1, 99), "GPU"))
    assert told(tracker) == []


def test_only_the_device_is_the_engines_business() -> None:
    tracker = heard(chain(1))
    tracker.device(stored(2, 1, medium="CPU"))
    tracker.device(Removed((1,), "STORAGE"))
    assert told(tracker) == []


def test_a_block_is_there_when_all_groups_have_it() -> None:
    tracker = heard([], groups=2)
    tracker.device(stored(1))
    assert told(tracker) == []
    tracker.device(stored(1, group=1))
    assert told(tracker) == [("+", 1, "GPU")]
    tracker.table(Tier.HOST, records(1), [])
    tracker.device(Removed((1,), "GPU", 1))
    assert told(tracker) == [("-", (1,), "GPU")]
    tracker.table(Tier.HOST, records(1, group=1), [])
    assert told(tracker) == [("+", 1, "CPU_TIER1")]
    tracker.device(Removed((1,), "GPU", 0))
    assert told(tracker) == []


# ---- everything at once --------------------------------------------------------------------------
def test_an_empty_device_with_empty_tiers_is_one_event() -> None:
    tracker = heard(chain(1, 2))
    tracker.device(Cleared())
    tracker.device(stored(3))
    assert told(tracker) == [("0", 0, None), ("+", 3, "GPU")]


def test_an_empty_device_keeps_what_the_tiers_have() -> None:
    tracker = heard(chain(1, 2))
    tracker.table(Tier.HOST, records(1), [])
    tracker.device(Cleared())
    assert told(tracker) == [("-", (2,), "GPU")]


def test_nothing_that_was_told_of_is_nothing_to_clear() -> None:
    tracker = heard([])
    tracker.device(Cleared())
    assert told(tracker) == []


def test_a_snapshot_is_what_was_told_parents_first() -> None:
    tracker = heard(chain(1, 2, 3), "passthrough")
    tracker.table(Tier.HOST, records(1, 2), [])
    tracker.flush()
    tracker.device(Removed((3,), "GPU"))  # not told yet
    events = list(tracker.snapshot())
    assert isinstance(events[0], Cleared)
    assert [(e.block_hash, e.medium) for e in events[1:] if isinstance(e, Stored)] == [
        (1, "GPU"),
        (1, "CPU_TIER1"),
        (2, "GPU"),
        (2, "CPU_TIER1"),
        (3, "GPU"),
    ]


def test_salt_and_adapter_keep_blocks_apart() -> None:
    """With hashes of our own: the engine's tell them apart anyway."""
    tracker = Tracker(ContentKeys(), "passthrough")
    plain, salted, adapted = (
        Stored(1, None, (5, 6), None, "GPU"),
        Stored(2, None, (5, 6), None, "GPU", extra_keys=("x",)),
        Stored(3, None, (5, 6), "x", "GPU", extra_keys=("x",)),
    )
    for event in (plain, salted, adapted):
        tracker.device(event)
    tracker.flush()
    key = ContentKeys().key(salted, None).value
    tracker.table(Tier.HOST, records(key), [])
    assert told(tracker) == [("+", 2, "CPU_TIER1")]


# ---- any order -----------------------------------------------------------------------------------
class World:
    """Tiers at random, and the subscribers of both modes."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.tiers: dict[int, int] = {}
        self.trackers = {mode: Tracker(EngineKeys(), mode) for mode in ("dedup", "passthrough")}
        self.indexes = {mode: EventIndex() for mode in self.trackers}
        self.known: set[int] = set()

    def step(self) -> None:
        """One block comes to a tier, or leaves it, or the device is emptied."""
        value, tier = self.dice.randint(1, 12), self.dice.choice(list(Tier))
        if self.dice.random() < 0.02:
            for block in self.tiers:
                self.tiers[block] &= ~Tier.DEVICE
            self.tell(None, Cleared())
        elif self.tiers.get(value, 0) & tier:
            self.tiers[value] -= tier
            self.tell(None if tier is Tier.DEVICE else tier, Removed((value,), "GPU"), value)
        else:
            self.tiers[value] = self.tiers.get(value, 0) + tier
            if tier is Tier.DEVICE:
                self.known.add(value)
            event = stored(value, value - 1 if value > 1 else None)
            self.tell(None if tier is Tier.DEVICE else tier, event, value)

    def tell(self, tier: Tier | None, event: Event, value: int = 0) -> None:
        """Both trackers hear of it."""
        for tracker in self.trackers.values():
            if tier is None:
                tracker.device(event)
            elif isinstance(event, Stored):
                tracker.table(tier, records(value), [])
            else:
                tracker.table(tier, [], records(value))

    def check(self) -> None:
        """The indexes are the truth; an event in vain is none."""
        truth = {v: tiers for v, tiers in self.tiers.items() if tiers and v in self.known}
        for mode, tracker in self.trackers.items():
            index = self.indexes[mode]
            for event in tracker.flush():
                if isinstance(event, Removed):
                    assert set(event.block_hashes) <= index.blocks.keys()
                before = dict(index.blocks)
                index.apply(Batch(0.0, (event,)))
                assert index.blocks != before
        assert self.indexes["passthrough"].blocks == truth
        dedup = self.indexes["dedup"].blocks
        assert dedup.keys() == truth.keys()
        assert all(len(tiers_in(tiers)) == 1 for tiers in dedup.values())
        again = EventIndex()
        again.apply(Batch(0.0, tuple(self.trackers["dedup"].snapshot())))
        assert again.blocks == dedup


@pytest.mark.parametrize("seed", range(20))
def test_a_subscribers_index_is_the_truth_whatever_happens(seed: int) -> None:
    world = World(seed)
    for _ in range(300):
        world.step()
        if world.dice.random() < 0.4:
            world.check()
    world.check()
