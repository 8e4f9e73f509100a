# SPDX-License-Identifier: Apache-2.0
"""What must hold: after every step, at every write, and when everything has come to its end.

After every step, crashes included:
    I1  a registered block's parent is registered, of the generation the child names, and carries
        the digest that comes before the child's in the chain;
    I2  children(b) >= registered blocks whose parent is b;
    I4  a slot is named by at most one block that is not RESET, and no free slot or record is named
        by a block that is not RESET;
    I6  a registered block has a READY placement of its generation, and its slot holds, on every
        rank, the bytes that belong to its digest.
At every write:
    I3, I5 and the table of transitions of layout.h: a block leaves REGISTERED only with no holder
        and no child, PARTIAL and REGISTERED are left with the next generation and entered with the
        same one; a rank's progress never goes back.
In the actors: a reader that has pinned a block, and has compared its digest, reads the right bytes
in the slots of the whole chain (`actors.reader`, `actors.worker` for loads).
At the end (nobody inside, no step left; after a crash: recovery has run):
    children are exact, no block is PARTIAL or EVICTING, nobody holds anything, every record and
    slot that no block names is in its pool and findable there, the index has one entry for each
    registered block and no other, no operation is in use, no lock of a dead line is held, no dead
    line is marked as used, `recovering` is 0, and nobody who waits is left waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.model.cells import (
    COMPLETE,
    EMPTY,
    EVICTING,
    FAILED,
    FREE,
    NO_ROLE,
    PARTIAL,
    PENDING,
    READY,
    REGISTERED,
    RESET,
    RUNNING,
    TORN,
    Header,
    OperationWord,
    Segment,
    View,
    Word,
)

Chains = Mapping[str, str | None]


def registered_blocks(view: View) -> Iterator[tuple[int, Word]]:
    """Number and word of each registered block."""
    for block, word in enumerate(view.words):
        if word.state == REGISTERED:
            yield block, word


def check_parents(view: View, chains: Chains) -> Iterator[str]:
    """I1."""
    for block, _ in registered_blocks(view):
        parent = view.parents[block]
        above = None
        if parent.block:
            word = view.words[parent.block - 1]
            if word.state != REGISTERED or word.generation != parent.generation:
                yield f"I1: block {block} is registered below {parent}, which is {word}"
                continue
            above = view.digest(parent.block - 1)
        if chains.get(view.digest(block)) != above:
            yield f"I1: block {block} ({view.digest(block)}) is below {above}"


def check_counts(view: View, exact: bool) -> Iterator[str]:
    """I2."""
    children = [0] * len(view.words)
    for block, _ in registered_blocks(view):
        parent = view.parents[block]
        if parent.block:
            children[parent.block - 1] += 1
    for block, word in registered_blocks(view):
        if word.children < children[block]:
            yield f"I2: block {block} counts {word.children} children of {children[block]}"
        if exact and word.children != children[block]:
            yield f"block {block} counts {word.children} children, it has {children[block]}"


def check_slots(view: View) -> Iterator[str]:
    """I4."""
    owner: dict[int, int] = {}
    free_slots, free_blocks = view[view.segment.free_slots], view[view.segment.free_blocks]
    for block, word in enumerate(view.words):
        if word.state == RESET:
            continue
        if free_blocks >> block & 1:
            yield f"I4: record {block} is free, its word is {word}"
        placement = view.placements[block]
        if placement.state == EMPTY:
            continue
        if placement.slot in owner:
            yield f"I4: slot {placement.slot} is named by {owner[placement.slot]} and {block}"
        owner[placement.slot] = block
        if free_slots >> placement.slot & 1:
            yield f"I4: slot {placement.slot} is free and named by block {block}"


def check_bytes(view: View) -> Iterator[str]:
    """I6."""
    for block, word in registered_blocks(view):
        placement = view.placements[block]
        if placement.state != READY or placement.generation != word.generation:
            yield f"I6: block {block} is registered, its placement is {placement}"
        elif view.bytes_of(placement.slot) != {view.digest(block)}:
            yield (
                f"I6: block {block} ({view.digest(block)}) is registered, "
                f"slot {placement.slot} holds {sorted(view.bytes_of(placement.slot))}"
            )


def check_disk_bytes(view: View) -> Iterator[str]:
    """I6 of the disk tier, while nobody has died and no key epoch has moved.

    A worker may outlive its leader, whose disk slots go to others: then the slots' headers decide,
    and what a fetch brings is checked as the bytes of the host slots.
    """
    if view[view.segment.crashed] or view[view.segment.epoch]:
        return
    for block, _ in registered_blocks(view):
        slot = view.placements[block].slot
        found = {view[cell] for cell in view.segment.header[slot]}
        digest = view.digest(block)
        if found not in ({Header(digest, digest)}, {None}):
            yield f"I6: block {block} ({digest}) is on disk, slot {slot} has {found}"
        elif None in found and TORN not in view.bytes_of(slot):
            yield f"I6: block {block} ({digest}) is on disk, slot {slot} is empty"


def check_always(segment: Segment, chains: Chains, memory: Sequence[Any]) -> Iterator[str]:
    """I1, I2, I4 and I6 of one memory."""
    view = segment.view(memory)
    yield from check_slots(view)
    yield from check_parents(view, chains)
    yield from check_counts(view, exact=False)
    yield from check_disk_bytes(view) if segment.header else check_bytes(view)


# ---- writes --------------------------------------------------------------------------------------
def _one(holders: int) -> bool:
    return holders != 0 and holders & (holders - 1) == 0


def check_word_step(old: Word, new: Word) -> Iterator[str]:
    """I3, I5 and the table of transitions."""
    change = (old.state, new.state)
    same = new.generation == old.generation
    left = new.generation == old.generation + 1
    if change == (RESET, PARTIAL):
        legal = same and _one(new.holders) and not new.children
    elif change == (PARTIAL, REGISTERED):
        legal = same and new.holders == old.holders and not new.children
    elif change == (PARTIAL, EVICTING):
        legal = left and _one(new.holders)
    elif change == (REGISTERED, EVICTING):
        legal = left and _one(new.holders) and not old.holders and not old.children
    elif change == (EVICTING, RESET):
        legal = same and not new.holders
    else:
        legal = change == (REGISTERED, REGISTERED) and same
    if not legal:
        yield f"a word moves from {old} to {new}"


RANK_STEPS = {(PENDING, RUNNING), (PENDING, "failed"), (RUNNING, "done"), (RUNNING, "failed")}


def check_operation_step(old: OperationWord, new: OperationWord) -> Iterator[str]:
    """A generation of an operation only goes forward, and ends before the next begins."""
    if new.state == FREE:
        if new.generation != old.generation + 1:
            yield f"an operation is freed from {old} to {new}"
        return
    if new.generation != old.generation:
        yield f"an operation moves from {old} to {new}"
    elif old.state == FREE:
        return
    elif old.state in (COMPLETE, FAILED):
        yield f"an operation that has ended moves from {old} to {new}"
    else:
        for pair in zip(old.ranks, new.ranks, strict=True):
            if pair[0] != pair[1] and pair not in RANK_STEPS:
                yield f"a rank of an operation goes from {pair[0]} to {pair[1]}"


def check_step(old: Any, new: Any) -> Iterator[str]:
    """Check the words that have a table of transitions."""
    if new == old:
        return
    if isinstance(old, Word):
        yield from check_word_step(old, new)
    elif isinstance(old, OperationWord):
        yield from check_operation_step(old, new)


# ---- the end -------------------------------------------------------------------------------------
def has_live_worker(view: View, line: int) -> bool:
    """Whether a line is a leader's that has a live worker; recovery comes back for it later."""
    segment = view.segment
    if line >= segment.sizes.leaders:
        return False
    ranks = range(segment.sizes.ranks)
    return any(view[segment.lock[segment.worker_line(line, rank)]] for rank in ranks)


def check_nothing_held(view: View) -> Iterator[str]:
    """No block in between, no holder, no line of the dead, no recovery under way."""
    segment = view.segment
    for block, word in enumerate(view.words):
        if word.state in (PARTIAL, EVICTING) or word.holders:
            yield f"block {block} is left as {word}"
    for line in segment.lines:
        used, locked = view[segment.role[line]] != NO_ROLE, view[segment.lock[line]]
        if used and not locked and not has_live_worker(view, line):
            yield f"line {line} of a dead process is left marked as used"
        if view[segment.lock[line]] and view[segment.inside[line]]:
            yield f"line {line} is left inside"
    if view[segment.recovering] or view[segment.recovery_lock]:
        yield "a recovery is left under way"
    for leader in segment.operation:
        for cell in leader:
            if view[cell].state != FREE:
                yield f"an operation is left as {view[cell]}"


def check_pools(view: View) -> Iterator[str]:
    """Every record and slot that no block names is free, and can be found."""
    segment = view.segment
    blocks = slots = 0
    for block, word in enumerate(view.words):
        if word.state != RESET:
            blocks |= 1 << block
            if view.placements[block].state != EMPTY:
                slots |= 1 << view.placements[block].slot
    for what, cell, named, count in (
        ("records", segment.free_blocks, blocks, segment.sizes.blocks),
        ("slots", segment.free_slots, slots, segment.sizes.slots),
    ):
        if view[cell] | named != (1 << count) - 1:
            yield f"{what} are lost: {view[cell]:b} free, {named:b} named"
    if segment.sizes.summary and view[segment.free_slots] and not view[segment.summary]:
        yield "free slots are lost: the summary bit is clear"


def check_index(view: View) -> Iterator[str]:
    """One entry for each registered block, and no other."""
    found = sorted(view[cell] for cell in view.segment.entry if view[cell] is not None)
    wanted = sorted((view.digest(block), block) for block, _ in registered_blocks(view))
    if found != wanted:
        yield f"the index has {found} for {wanted}"


def check_end(segment: Segment, chains: Chains, memory: Sequence[Any]) -> Iterator[str]:
    """What must hold when nobody is inside and nothing is left to do."""
    view = segment.view(memory)
    yield from check_nothing_held(view)
    yield from check_counts(view, exact=True)
    yield from check_pools(view)
    yield from check_index(view)
