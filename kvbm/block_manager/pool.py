# SPDX-License-Identifier: Apache-2.0
"""A pool of blocks in one tier: allocate, register, match, touch, reset, with upstream's meaning.

The pool's state is a segment (kvbm/_fast/layout.h), so several processes can have a pool over the
same blocks, and an engine's blocks and those of this API are the same ones. What upstream's pool
does through a thread and channels is done in place here:

==================  ===============================================================================
upstream            here
==================  ===============================================================================
Reset, Partial,     reserved in the segment by this process, under a random digest; which of the
Complete            three is known to the `Block` object alone
Registered          registered in the segment under the digest of its tokens
active              held by some process, or the ancestor of a block that is
inactive            registered and held by nobody: evictable, in order of (priority, last return)
empty               neither
==================  ===============================================================================

Two differences follow from the tree. A block whose parent is not registered cannot be registered.
And a block is evicted after its descendants, never before.

Sequence hashes have 64 bits and identify nothing here. A pool looks a hash up among the token
blocks that it has seen (registered, or given to `match_token_blocks`), which have the 128-bit
digest; what it has not seen it does not find.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbm._fast.control import Census, census, evict_subtrees, find_registered, identify
from kvbm._fast.keys import Keys
from kvbm._fast.table import BlockTable
from kvbm._fast.token_chain import TokenBlock
from kvbm.block_manager.block import Block, BlockState
from kvbm.block_manager.hold import Hold
from kvbm.errors import BlockError, BlockStateError, NotEnoughBlocks, ResetError

if TYPE_CHECKING:
    from kvbm.block_manager.memory import BlockMemory

__all__ = ["BlockPool", "BlockPoolStatus", "ResetBlocksResponse", "reset_registered"]

RECOVERY_SECS = 10.0
"""How long an operation is tried again while some process recovers what a dead one left."""


@dataclass(frozen=True)
class BlockPoolStatus:
    """Numbers of blocks of a pool; upstream's are methods too."""

    active: int
    inactive: int
    empty: int

    @classmethod
    def of(cls, counted: Census) -> BlockPoolStatus:
        """Take the numbers from a count; what is being filled is in none of them."""
        return cls(counted.active, counted.inactive, counted.empty)

    def active_blocks(self) -> int:
        """Registered blocks in use, by any process."""
        return self.active

    def inactive_blocks(self) -> int:
        """Cached blocks that may be evicted."""
        return self.inactive

    def empty_blocks(self) -> int:
        """Blocks with nothing in them."""
        return self.empty


@dataclass(frozen=True)
class ResetBlocksResponse:
    """What became of each sequence hash of a `reset_blocks`."""

    reset: tuple[int, ...]
    not_found: tuple[int, ...]
    not_reset: tuple[int, ...]

    def reset_blocks(self) -> list[int]:
        """Hashes whose blocks are empty now."""
        return list(self.reset)

    def not_found_blocks(self) -> list[int]:
        """Hashes that no registered block has."""
        return list(self.not_found)

    def not_reset_blocks(self) -> list[int]:
        """Hashes of blocks that are in use, and kept."""
        return list(self.not_reset)


def reset_registered(table: BlockTable, sequence_hashes: Sequence[int]) -> ResetBlocksResponse:
    """Evict the blocks with these hashes, and what depends on them, unless they are used."""
    before = find_registered(table.segment, list(sequence_hashes))
    evict_subtrees(table, [ref for refs in before.values() for ref in refs])
    after = {ref for refs in find_registered(table.segment, list(before)).values() for ref in refs}
    groups: dict[str, list[int]] = {"reset": [], "not found": [], "not reset": []}
    for value in sequence_hashes:
        refs = before.get(value, [])
        kept = any(ref in after for ref in refs)
        groups["not found" if not refs else "not reset" if kept else "reset"].append(value)
    return ResetBlocksResponse(
        tuple(groups["reset"]), tuple(groups["not found"]), tuple(groups["not reset"])
    )


class BlockPool:
    """The blocks of one tier.

    May be used by several threads. Every call is over when it returns: nothing here waits for
    anybody, but for another process's recovery of a dead one, which is bounded.

    Parameters
    ----------
    table : BlockTable
        This process's handle on the segment whose host slots are the places of this pool.
    page_size : int
        Tokens in a block.
    memory : BlockMemory, optional
        Where the bytes are, if this process has them.
    closed : callable, optional
        Called once, when the pool is closed and its last block has come back.
    """

    def __init__(
        self,
        table: BlockTable,
        page_size: int,
        memory: BlockMemory | None = None,
        closed: Callable[[], None] | None = None,
    ) -> None:
        self._table = table
        self._page_size = page_size
        self._memory = memory
        self._closed = closed
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._returned: deque[tuple[int, bool]] = deque()
        self._live = 0
        self._holds: weakref.WeakSet[Hold] = weakref.WeakSet()
        self._closing = False
        self._seen: OrderedDict[int, TokenBlock] = OrderedDict()
        self._seen_max = 4 * self.total_blocks + 1024

    # ---- numbers -------------------------------------------------------------------------------
    @property
    def total_blocks(self) -> int:
        """Places in the pool."""
        return self._table.segment.shape.host_slots

    @property
    def available_blocks(self) -> int:
        """Blocks that could be allocated now: empty ones and cached ones that nobody uses."""
        counted = self._count()
        return counted.empty + counted.inactive

    def status(self) -> BlockPoolStatus:
        """Count the blocks by their use."""
        return BlockPoolStatus.of(self._count())

    def _count(self) -> Census:
        with self._using():
            return census(self._table.segment, "host")

    # ---- allocate ------------------------------------------------------------------------------
    def allocate_blocks(self, count: int) -> list[Block]:
        """Take blocks: empty ones, then the least recently used cached ones. All or nothing.

        Raises
        ------
        NotEnoughBlocks
            Fewer are available. Nothing was taken.
        """
        if count < 0:
            raise ValueError(f"count={count} is not allowed: 0 or more")
        with self._using():
            table = self._table
            if count > table.segment.free_blocks():
                counted = census(table.segment, "host")
                if count > counted.empty + counted.inactive:
                    raise NotEnoughBlocks(count, counted.empty + counted.inactive)
            keys = Keys([os.urandom(24) for _ in range(count)])
            taken: list[tuple[int, int]] = []
            self._settled(lambda: len(taken) == count or self._reserve(keys, taken))
            if len(taken) < count:
                table.abandon_reserved([ref for ref, _ in taken])
                raise NotEnoughBlocks(count, len(taken))
            self._live += count
            return [
                Block(Hold(self, ref, slot, False), self._page_size, self._memory, None)
                for ref, slot in taken
            ]

    def _reserve(self, keys: Keys, taken: list[tuple[int, int]]) -> bool:
        """Reserve what is missing; False if nothing came, which a recovery may be the cause of."""
        before = len(taken)
        taken += self._table.reserve(keys, before, len(keys))
        return len(taken) > before and len(taken) == len(keys)

    # ---- register ------------------------------------------------------------------------------
    def register_blocks(self, blocks: Sequence[Block]) -> list[Block]:
        """Publish complete blocks, parents first, so that they can be matched.

        A block that is registered already, by whatever process, is not registered twice: the one
        that is there is returned in its place and the given one goes back to the pool.

        Returns
        -------
        list of Block
            Registered blocks, in the order given.

        Raises
        ------
        BlockStateError
            A block is not complete, or its parent is not registered. Blocks before it are.
        BlockError
            There are no blocks, or one belongs to another pool.
        """
        if not blocks:
            raise BlockError("no blocks to register")
        for block in blocks:
            if block.hold().pool is not self:
                raise BlockError(f"block {block.block_id} belongs to another pool")
            if block.state is not BlockState.COMPLETE:
                raise BlockStateError(block.block_id, block.state.value, BlockState.COMPLETE.value)
        with self._using():
            return [self._register(block) for block in blocks]

    def _register(self, block: Block) -> Block:
        hold, content = block.hold(), block.token_block
        assert content is not None
        keys = self._keys(content.digest, content.sequence_hash)
        found, ref = self._table.match(keys, 0, 1)
        if found and ref is not None:
            self._learn(content)
            block.release()
            return self._registered(ref, content)
        if hold.named not in (None, content.digest):
            # Another leader may have stored a child below it when it had the other name.
            state = "given another name by a registration that failed"
            raise BlockStateError(block.block_id, state, "a newly allocated one")
        parent = self._hold_parent(block, content)
        hold.named = content.digest
        try:
            done = self._settled(
                lambda: identify(self._table, hold.ref, keys, 0, parent, block.priority)
            ) and self._settled(lambda: self._table.publish([hold.ref]) == 1)
        finally:
            if parent is not None:
                self._table.unpin(parent)
        if not done:
            raise BlockStateError(block.block_id, "not publishable", BlockState.REGISTERED.value)
        hold.registered = True
        self._learn(content)
        block.become_registered()
        return block

    def _hold_parent(self, block: Block, content: TokenBlock) -> int | None:
        if content.parent_sequence_hash is None:
            return None
        parent = self._look_up(content.parent_sequence_hash)
        if parent is not None:
            return parent
        raise BlockStateError(
            block.block_id,
            f"the child of {content.parent_sequence_hash:#x}, which is not registered",
            "one whose parent is registered",
        )

    @staticmethod
    def _keys(digest: bytes, sequence_hash: int) -> Keys:
        """Return one key with a digest and a sequence hash of its own, like an engine's hash."""
        return Keys([digest + sequence_hash.to_bytes(8, "big")])

    def _learn(self, content: TokenBlock) -> None:
        self._seen[content.sequence_hash] = content._replace(tokens=())
        self._seen.move_to_end(content.sequence_hash)
        while len(self._seen) > self._seen_max:
            self._seen.popitem(last=False)

    # ---- match and touch -----------------------------------------------------------------------
    def match_token_blocks(self, token_blocks: Iterable[TokenBlock]) -> list[Block]:
        """Blocks of a sequence that are registered, from its first on; held until let go."""
        blocks = list(token_blocks)
        with self._using():
            for content in blocks:
                self._learn(content)
            return self._match(content.sequence_hash for content in blocks)

    def match_sequence_hashes(self, sequence_hashes: Iterable[int]) -> list[Block]:
        """Blocks with these hashes, up to the first that is not registered; held until let go."""
        with self._using():
            return self._match(sequence_hashes)

    def _match(self, sequence_hashes: Iterable[int]) -> list[Block]:
        blocks: list[Block] = []
        for value in sequence_hashes:
            ref = self._look_up(value)
            if ref is None:
                break
            blocks.append(self._registered(ref, self._seen[value]))
        return blocks

    def _look_up(self, sequence_hash: int) -> int | None:
        """Reference to a registered block, held; None if it is not there or was never seen here."""
        content = self._seen.get(sequence_hash)
        if content is None:
            return None
        return self._table.match(self._keys(content.digest, sequence_hash), 0, 1)[1]

    def _registered(self, ref: int, content: TokenBlock) -> Block:
        slot = self._table.slots_of(ref, 1)[0]
        self._live += 1
        return Block(Hold(self, ref, slot, True), self._page_size, self._memory, content)

    def touch_blocks(self, sequence_hashes: Iterable[int]) -> int:
        """Make blocks the most recently used ones, up to the first hash that is not registered.

        Returns how many. Blocks in use stay as they are.
        """
        with self._using():
            refs = []
            for value in sequence_hashes:
                ref = self._look_up(value)
                if ref is None:
                    break
                refs.append(ref)
            for ref in reversed(refs):  # a leaf is to be evicted before its parent
                self._table.unpin(ref)
            return len(refs)

    # ---- reset ---------------------------------------------------------------------------------
    def reset(self) -> None:
        """Empty the pool.

        Raises
        ------
        ResetError
            Blocks are in use; nothing was reset.
        """
        with self._using():
            counted = census(self._table.segment, "host")
            if counted.active or counted.filling:
                raise ResetError(counted.total, counted.empty + counted.inactive)
            self._table.reset()

    def reset_blocks(self, sequence_hashes: Sequence[int]) -> ResetBlocksResponse:
        """Empty the blocks with these hashes that nobody uses, and with them their descendants."""
        with self._using():
            return reset_registered(self._table, sequence_hashes)

    def track(self, hold: Hold) -> None:
        """Know a place that is owned; called when it is made."""
        self._holds.add(hold)

    # ---- returns -------------------------------------------------------------------------------
    def give_back(self, ref: int, registered: bool) -> None:
        """Return a place; called when a `Hold` goes away, in any thread, inside any call."""
        if os.getpid() == self._pid:  # else a forked child's copy, whose places are the parent's
            self._returned.append((ref, registered))
            self._settle_returns()

    def _settle_returns(self) -> None:
        """Handle returns, unless a call is under way, which will do it before it ends."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._take_returns()
            finally:
                self._lock.release()

    def _take_returns(self) -> None:
        while self._returned:
            ref, registered = self._returned.popleft()
            self._live -= 1
            if registered:
                self._table.unpin(ref)
            else:
                self._table.abandon_reserved([ref])
        if self._closing and self._live == 0:
            self._detach()

    def _using(self) -> _Using:
        return _Using(self)

    def enter(self) -> None:
        """Begin a call: lock, and see to what has come back."""
        self._lock.acquire()
        try:
            self._take_returns()
            if self._closing:
                raise BlockError("the pool is closed")
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """End a call."""
        self._lock.release()
        self._settle_returns()

    def _settled(self, attempt: Callable[[], bool]) -> bool:
        """Try again for a bounded time while a recovery makes the segment decline changes."""
        deadline = time.monotonic() + RECOVERY_SECS
        while True:
            declined = self._declined()
            if attempt():
                return True
            if self._declined() == declined or time.monotonic() > deadline:
                return False
            time.sleep(0.001)

    def _declined(self) -> int:
        return self._table.segment.counters()["declined"]

    # ---- end -----------------------------------------------------------------------------------
    def close(self, *, force: bool = False) -> None:
        """Close as soon as the last block has come back; no block is given out from now on.

        Parameters
        ----------
        force : bool
            Do not wait for blocks: what tensors show may then be overwritten. For the end of the
            process.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closing = True
            self._take_returns()
            if force and self._live:
                for hold in list(self._holds):
                    hold.returned = True
                    self._returned.append((hold.ref, hold.registered))
                self._take_returns()
        self._settle_returns()

    def _detach(self) -> None:
        closed, self._closed = self._closed, None
        self._memory = None
        if closed is not None:
            closed()


class _Using:
    """`with`: one call of a pool."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def __enter__(self) -> None:
        self._pool.enter()

    def __exit__(self, *exc: object) -> None:
        self._pool.leave()
