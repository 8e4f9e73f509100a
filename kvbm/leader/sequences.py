# SPDX-License-Identifier: Apache-2.0
"""What a leader knows about a request from its arrival to the end of its last transfer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm.instance import engine_key

if TYPE_CHECKING:
    from kvbm.leader.disk_transfers import Promotion


@dataclass(eq=False)
class GroupBlocks:
    """One KV-cache group of a sequence: where its blocks are, and how far they are in the cache.

    Attributes
    ----------
    keys : Keys
        Digests of the sequence's complete blocks in this group.
    device_blocks : list of int
        Device block of each block, from block 0.
    stored : int
        Blocks from the start that were found in the cache or submitted to it.
    parent : int or None
        Reference to block `stored - 1`.
    matched : int or None
        Reference to the deepest matched block, held until the load has ended or the match is
        dropped.
    used : int
        Blocks from the start that have been counted as used.
    """

    keys: Keys
    device_blocks: list[int] = field(default_factory=list)
    stored: int = 0
    parent: int | None = None
    matched: int | None = None
    used: int = 0

    def look_again(self) -> None:
        """Make the next store find out anew what is in the cache."""
        self.stored, self.parent = 0, None

    def find_start(self, table: OperationTable, end: int) -> int | None:
        """Make `stored` and `parent` those of where a store up to block `end` begins.

        Where the last one ended, if that is still cached; otherwise at the deepest ancestor that
        is, so that gaps close: it is returned, held.
        """
        if self.parent is not None and table.is_current(self.parent):
            return None
        self.stored, self.parent = table.hold_longest(self.keys, end)
        return self.parent


@dataclass(eq=False)
class TrackedSequence:
    """A request between its arrival and the end of its last transfer.

    Attributes
    ----------
    request_id : str
        The engine's name for it.
    groups : list of GroupBlocks
        One a KV-cache group.
    matched_from, matched_count, matched_step : int
        Last match: first block, blocks (0 when nothing is held), step in which it was made.
    loading : bool
        The engine waits for a load; its device blocks are not to be read.
    loads, stores : list of int
        Handles of operations that have not been collected.
    load_failed : bool
        A load of it failed: it is recomputed, and not matched again before its next admission.
    own_from : int
        Blocks before this one are not stored from it: they were on the device before, and the
        engine does not answer for what is in them.
    stale : bool
        Its device blocks must not be stored: what they hold is from before a reset, or unknown.
    failed_stores : int
        Stores of it that did not arrive.
    finished : bool
        The engine is done with it.
    cancelled : bool
        It ended while it was loaded: that the load did not arrive says nothing about the cache.
    promotion : Promotion or None
        What it waits for to come from a slower tier.
    promoted : bool
        It has been waited for once in this admission.
    promoted_from : int or None
        First of the blocks that were waited for; None if none were.
    waits_since, waits_from : float or None, int
        Since when it waits for blocks that somebody stores, and for which block on.
    has_waited : bool
        That wait is over, in this admission.
    """

    request_id: str
    groups: list[GroupBlocks]
    matched_from: int = 0
    matched_count: int = 0
    matched_step: int = 0
    loading: bool = False
    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)
    load_failed: bool = False
    own_from: int = 0
    stale: bool = False
    failed_stores: int = 0
    finished: bool = False
    cancelled: bool = False
    promotion: "Promotion | None" = None
    promoted: bool = False
    promoted_from: int | None = None
    waits_since: float | None = None
    waits_from: int = 0
    has_waited: bool = False

    @cached_property
    def request_key(self) -> int:
        """64-bit hash of the request id, as operations carry it."""
        return engine_key(self.request_id)

    def look_again(self) -> None:
        """Make the next store find out anew what is in the cache."""
        for group in self.groups:
            group.look_again()

    def set_device_blocks(self, blocks: Sequence[Sequence[int]]) -> None:
        """All device blocks, one list a group, replacing what was known."""
        for group, ids in zip(self.groups, blocks, strict=True):
            group.device_blocks = list(ids)

    def add_device_blocks(self, blocks: Sequence[Sequence[int]]) -> None:
        """Device blocks that the sequence got in addition, one list a group."""
        for group, ids in zip(self.groups, blocks, strict=True):
            group.device_blocks.extend(ids)

    def new_admission(self) -> None:
        """Forget the device blocks: they belong to others from now on."""
        for group in self.groups:
            group.device_blocks = []
            group.look_again()
        self.stale = self.load_failed = self.promoted = self.has_waited = False
        self.waits_since = self.promoted_from = None

    def promoted_blocks(self, count: int) -> int:
        """How many of the first `count` matched blocks came from a slower tier."""
        if self.promoted_from is None:
            return 0
        return min(count, max(0, self.matched_from + count - self.promoted_from))
