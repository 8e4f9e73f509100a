# SPDX-License-Identifier: Apache-2.0
"""The life of a block, access by access: kvbm/_fast/blocks.pyx, index.pyx and pool.pyx.

Functions have the names of the sources; `p` is the process that runs them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.cells import (
    EMPTY,
    EVICTING,
    FILLING,
    NO_PLACEMENT,
    PARTIAL,
    READY,
    REGISTERED,
    RESET,
    Entry,
    Parent,
    Placement,
    Segment,
    Word,
)
from tests.model.explore import Actions, Step, cas, fail, fetch_and, fetch_or, load, store
from tests.model.rules import Rules

PUBLISHED, ALREADY, NO_PARENT, GONE = "published", "already", "no parent", "gone"


@dataclass(eq=False)
class Process:
    """An attached process: its view of the segment and its place in it.

    Attributes
    ----------
    number : int
        What its locks hold: the position of its actor + 1.
    line, leader, rank : int
        Participant line; the leader whose bit and operations it uses; its rank if it is a worker.
    disk : Process or None
        The same process in the disk tier's segment, where it has a line if it is a leader.
    """

    segment: Segment
    rules: Rules
    number: int
    line: int
    leader: int
    rank: int = 0
    disk: Process | None = None

    @property
    def bit(self) -> int:
        """The leader's bit of `holders`."""
        return 1 << self.leader


class Found(NamedTuple):
    """What a look-up verified."""

    block: int
    word: Word


class Reserved(NamedTuple):
    """A reservation."""

    block: int
    generation: int
    slot: int
    digest: str


Answer = Generator[Step, Any, bool]


# ---- inside the structure ------------------------------------------------------------------------
def structure_enter(p: Process) -> Answer:
    """Show that this process changes the structure; False while a recovery is under way."""
    recovering = 0
    if not p.rules.inside_before_look:
        recovering = yield load(p.segment.recovering, "[S1]")
    yield store(p.segment.inside[p.line], 1, "[S0]")
    if p.rules.inside_before_look:
        recovering = yield load(p.segment.recovering, "[S1]")
    if recovering:
        yield store(p.segment.inside[p.line], 0, "decline")
        return False
    return True


def structure_exit(p: Process) -> Actions:
    """The structure is whole again."""
    yield store(p.segment.inside[p.line], 0, "exit")


# ---- index ---------------------------------------------------------------------------------------
def has_digest(p: Process, block: int, digest: str) -> Answer:
    """Compare a block's digest words, one after the other."""
    for part in range(p.segment.sizes.digest_words):
        seen = yield load(p.segment.digest[block][part], "[D1]")
        if seen != digest:
            return False
    return True


def live(word: Word, partial_too: bool) -> bool:
    """Whether a look-up may believe in a block with this word."""
    return word.state == REGISTERED or (partial_too and word.state == PARTIAL)


def index_find(
    p: Process, digest: str, partial_too: bool = False
) -> Generator[Step, Any, Found | None]:
    """A block that carries this digest, registered ones first."""
    found = None
    for e in range(p.segment.sizes.entries):
        entry = yield load(p.segment.entry[e], "look up")
        if entry is None or entry.digest != digest:
            continue
        before = yield load(p.segment.word[entry.block], "word before [D1]")
        if not live(before, partial_too):
            continue
        same = yield from has_digest(p, entry.block, digest)
        if not same:
            continue
        after = yield load(p.segment.word[entry.block], "[D2]")
        if after.generation != before.generation or not live(after, partial_too):
            continue
        found = Found(entry.block, after)
        if after.state == REGISTERED:
            return found
    return found


def entry_is_stale(p: Process, entry: Entry) -> Answer:
    """True if the block that an entry names cannot be what the entry was made for."""
    word = yield load(p.segment.word[entry.block], "stale?")
    if word.state not in (REGISTERED, PARTIAL):
        return True
    digest = yield load(p.segment.digest[entry.block][0], "stale?")
    return bool(digest != entry.digest)


def entry_has_digest(p: Process, entry: Entry | None, digest: str, block: int) -> Answer:
    """True if an entry leads to another block that carries this digest now."""
    if entry is None or entry.digest != digest or entry.block == block:
        return False
    word = yield load(p.segment.word[entry.block], "taken?")
    if not live(word, True):
        return False
    same = yield from has_digest(p, entry.block, digest)
    return bool(same)


def index_insert(p: Process, digest: str, block: int, alone: bool) -> Answer:
    """Add a hint; False when the bucket is full of live entries.

    With `alone` also when another block carries the digest already.
    """
    for choice in range(2):
        for e in range(p.segment.sizes.entries):
            seen = yield load(p.segment.entry[e], "room?")
            if seen is not None:
                if choice == 0:
                    taken = yield from entry_has_digest(p, seen if alone else None, digest, block)
                    if taken:
                        return False
                    continue
                stale = yield from entry_is_stale(p, seen)
                if not stale:
                    continue
            done, seen = yield cas(p.segment.entry[e], seen, Entry(digest, block), "insert")
            if done:
                return True
            taken = yield from entry_has_digest(p, seen if alone else None, digest, block)
            if taken:
                return False
    return False


def index_delete(p: Process, digest: str, block: int) -> Actions:
    """[E3] Remove the hint for a block."""
    entry = Entry(digest, block)
    for e in range(p.segment.sizes.entries):
        seen = yield load(p.segment.entry[e], "[E3]")
        if seen == entry:
            yield cas(p.segment.entry[e], entry, None, "[E3]")
            return


# ---- pools ---------------------------------------------------------------------------------------
def pool_take(p: Process, pool: int) -> Generator[Step, Any, int | None]:
    """Take one free index; None when nothing is free (or the hint says so)."""
    hinted = p.segment.sizes.summary and pool == p.segment.free_slots
    if hinted:
        hint = yield load(p.segment.summary, "summary")
        if not hint:
            return None
    bits = yield load(pool, "bits")
    while bits:
        lowest = bits & -bits
        done, seen = yield cas(pool, bits, bits & ~lowest, "take")
        if not done:
            bits = seen
            continue
        if hinted and not bits & ~lowest:
            yield fetch_and(p.segment.summary, 0, "clear summary")
            if p.rules.second_look:
                again = yield load(pool, "second look")
                if again:
                    yield fetch_or(p.segment.summary, 1, "set summary")
        return int(lowest).bit_length() - 1
    return None


def pool_give_back(p: Process, pool: int, index: int) -> Actions:
    """[E6] Mark an index free."""
    before = yield fetch_or(pool, 1 << index, "[E6]")
    if before == 0 and p.segment.sizes.summary and pool == p.segment.free_slots:
        yield fetch_or(p.segment.summary, 1, "set summary")


# ---- holders -------------------------------------------------------------------------------------
def block_pin(p: Process, block: int, digest: str, verified: Word | None = None) -> Answer:
    """Hold a registered block; False if it is not registered under this digest any more."""
    cell = p.segment.word[block]
    word = yield load(cell, "pin")
    while True:
        if word.state != REGISTERED:
            return False
        if p.rules.pin_expects_generation and verified is not None:
            if word.generation != verified.generation:
                return False
        done, seen = yield cas(cell, word, word._replace(holders=word.holders | p.bit), "pin")
        if done:
            break
        word = seen
    if not p.rules.pin_compares:
        return True
    same = yield from has_digest(p, block, digest)
    if not same and not word.holders & p.bit:
        yield from clear_holder(p, block)
    return bool(same)


def clear_holder(p: Process, block: int) -> Actions:
    """Let go of a registered block."""
    word = yield load(p.segment.word[block], "unpin")
    while word.holders & p.bit and word.state == REGISTERED:
        free = word._replace(holders=word.holders & ~p.bit)
        done, seen = yield cas(p.segment.word[block], word, free, "unpin")
        if done:
            return
        word = seen


# ---- reserve and publish -------------------------------------------------------------------------
def write_digest(p: Process, block: int, digest: str) -> Actions:
    """[D0]."""
    for part in range(p.segment.sizes.digest_words):
        yield store(p.segment.digest[block][part], digest, "[D0]")


def block_reserve(
    p: Process, block: int, slot: int, digest: str, parent: Parent
) -> Generator[Step, Any, Reserved | None]:
    """RESET -> PARTIAL; None, with the block back in RESET, when its digest is taken."""
    cell = p.segment.word[block]
    word = yield load(cell, "reserve")
    early = p.rules.digest_before_partial and p.rules.digest_before_publish
    if word.state == RESET and early:
        yield from write_digest(p, block, digest)
        yield store(p.segment.parent[block], parent, "parent")
    partial = Word(PARTIAL, p.bit, 0, word.generation)
    done = False
    if word.state == RESET:
        done, _ = yield cas(cell, word, partial, "reserve")
    if not done:
        yield fail(f"a record was handed out that is not free: block {block}")
    if not early:
        if p.rules.digest_before_publish:
            yield from write_digest(p, block, digest)
        yield store(p.segment.parent[block], parent, "parent")
    filling = Placement(FILLING, word.generation, slot)
    yield store(p.segment.placement[block], filling, "placement")
    inserted = yield from index_insert(p, digest, block, True)
    if inserted:
        return Reserved(block, word.generation, slot, digest)
    yield from block_abandon(p, block, word.generation)
    return None


def count_on_parent(p: Process, parent: Parent) -> Answer:
    """[P1] children + 1; False if the parent is not registered under this generation."""
    cell = p.segment.word[parent.block - 1]
    word = yield load(cell, "[P1]")
    while True:
        if p.rules.parent_registered and word.state != REGISTERED:
            return False
        if p.rules.parent_generation and word.generation != parent.generation:
            return False
        done, seen = yield cas(cell, word, word._replace(children=word.children + 1), "[P1]")
        if done:
            return True
        word = seen


def uncount_on_parent(p: Process, parent: Parent) -> Actions:
    """[E2] children - 1."""
    cell = p.segment.word[parent.block - 1]
    word = yield load(cell, "[E2]")
    while word.generation == parent.generation and word.children:
        done, seen = yield cas(cell, word, word._replace(children=word.children - 1), "[E2]")
        if done:
            return
        word = seen


def block_publish(
    p: Process, block: int, generation: int, digest: str
) -> Generator[Step, Any, str]:
    """PARTIAL -> REGISTERED, after the parent has been counted.

    `digest` is used only where the rule that it is written before is broken.
    """
    cell = p.segment.word[block]
    word = yield load(cell, "publish")
    if word.generation != generation or word.state not in (PARTIAL, REGISTERED):
        return GONE
    if word.state == REGISTERED:
        return ALREADY
    parent = yield load(p.segment.parent[block], "parent")
    if parent.block and p.rules.count_before_register:
        counted = yield from count_on_parent(p, parent)
        if not counted:
            return NO_PARENT
    filling = yield load(p.segment.placement[block], "placement")
    if filling.state == FILLING and filling.generation == generation:
        ready = filling._replace(state=READY)
        yield cas(p.segment.placement[block], filling, ready, "ready")
    while word.state == PARTIAL and word.generation == generation:
        registered = word._replace(state=REGISTERED, children=0)
        done, seen = yield cas(cell, word, registered, "[P2]")
        if done:
            if not p.rules.digest_before_publish:
                yield from write_digest(p, block, digest)
            if parent.block and not p.rules.count_before_register:
                yield from count_on_parent(p, parent)
            return PUBLISHED
        word = seen
    if parent.block and p.rules.loser_uncounts:
        yield from uncount_on_parent(p, parent)
    same = word.state == REGISTERED and word.generation == generation
    return ALREADY if same else GONE


# ---- evict and abandon ---------------------------------------------------------------------------
def evictable(p: Process, word: Word) -> bool:
    """What [E1] requires."""
    return (
        word.state == REGISTERED
        and not (word.holders and p.rules.evict_requires_no_holder)
        and not (word.children and p.rules.evict_requires_no_child)
    )


def moved(p: Process, word: Word, holders: int) -> Word:
    """The word of a block that leaves PARTIAL or REGISTERED."""
    return Word(EVICTING, holders, 0, word.generation + p.rules.generation_moves)


def block_evict(p: Process, block: int) -> Generator[Step, Any, int | None]:
    """REGISTERED -> EVICTING -> RESET; the host slot, None if the block cannot be evicted."""
    cell = p.segment.word[block]
    word = yield load(cell, "evictable?")
    if not evictable(p, word):
        return None
    early = Parent(0, 0)
    if not p.rules.move_before_uncount:
        early = yield load(p.segment.parent[block], "parent")
        if early.block:
            yield from uncount_on_parent(p, early)
    done, _ = yield cas(cell, word, moved(p, word, p.bit), "[E1]")
    if not done:
        if early.block:
            yield from count_on_parent(p, early)
        return None
    slot = yield from block_leave(p, block, p.rules.move_before_uncount)
    return slot


def block_abandon(p: Process, block: int, generation: int) -> Generator[Step, Any, int | None]:
    """PARTIAL -> EVICTING -> RESET; the host slot, None if it is not reserved any more."""
    cell = p.segment.word[block]
    word = yield load(cell, "abandon")
    while word.state == PARTIAL and word.generation == generation:
        done, seen = yield cas(cell, word, moved(p, word, p.bit), "abandon")
        if done:
            slot = yield from block_leave(p, block, False)
            return slot
        word = seen
    return None


def block_leave(p: Process, block: int, uncount_parent: bool) -> Generator[Step, Any, int | None]:
    """The rest of an eviction, from [E2] on; the host slot, None if it had none."""
    parent = yield load(p.segment.parent[block], "parent")
    if uncount_parent and parent.block:
        yield from uncount_on_parent(p, parent)
    digest = yield load(p.segment.digest[block][0], "digest")
    yield from index_delete(p, digest, block)
    word = yield load(p.segment.word[block], "word before [E5]")
    free = Word(RESET, 0, 0, word.generation)
    placement = yield load(p.segment.placement[block], "[E4]")
    if placement.state != EMPTY:
        yield store(p.segment.placement[block], NO_PLACEMENT, "[E4]")
    slot = None if placement.state == EMPTY else placement.slot
    if not p.rules.reset_before_give_back:
        yield from give_back(p, block, slot)
    yield store(p.segment.word[block], free, "[E5]")
    return slot


def give_back(p: Process, block: int, slot: int | None) -> Actions:
    """Record and slot return to their pools."""
    yield from pool_give_back(p, p.segment.free_blocks, block)
    if slot is not None:
        yield from pool_give_back(p, p.segment.free_slots, slot)
