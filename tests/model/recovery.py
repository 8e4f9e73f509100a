# SPDX-License-Identifier: Apache-2.0
"""What a survivor does after a death, access by access: kvbm/_fast/recovery.pyx."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from tests.model.blocks import Answer, Process, block_leave, entry_is_stale, moved
from tests.model.cells import (
    DONE,
    EMPTY,
    EVICTING,
    FINISHING,
    FREE,
    NO_ROLE,
    PARTIAL,
    RANK_FAILED,
    REGISTERED,
    RESET,
)
from tests.model.explore import Actions, Step, cas, fetch_or, load, store, wait
from tests.model.operations import (
    has_ended,
    operation_cancel,
    operation_end,
    operation_finished,
    operation_recycle,
)


@dataclass(frozen=True)
class Dead:
    """What a recovery has found.

    Attributes
    ----------
    lines : frozenset of int
        Marked as used, not locked.
    leaders, busy : int
        Bits of dead leaders; of those that have a live worker.
    held : frozenset of int
        Lines whose locks the recovery holds.
    """

    lines: frozenset[int] = frozenset()
    leaders: int = 0
    busy: int = 0
    held: frozenset[int] = frozenset()


def is_not_zero(value: int) -> bool:
    """Whether something has happened."""
    return value != 0


def is_zero(value: int) -> bool:
    """Whether nothing is under way."""
    return value == 0


def take_if_free(p: Process, line: int) -> Answer:
    """True if nobody holds a line's lock; by taking it, so that nobody comes to life there."""
    if line == p.line:
        return False
    if p.rules.dead_lines_held:
        done, seen = yield cas(p.segment.lock[line], 0, p.number, "take lock")
        return bool(done) or seen == p.number
    holder = yield load(p.segment.lock[line], "locked?")
    return bool(holder == 0)


def find_dead(p: Process) -> Generator[Step, Any, Dead]:
    """Step 1."""
    dead = Dead()
    sizes = p.segment.sizes
    for line in p.segment.lines:
        role = yield load(p.segment.role[line], "role")
        if role == NO_ROLE:
            continue
        gone = yield from take_if_free(p, line)
        if gone:
            dead = Dead(dead.lines | {line}, dead.leaders, dead.busy, dead.held | {line})
    for leader in range(sizes.leaders):
        if leader not in dead.lines:
            continue
        busy = 0
        for rank in range(sizes.ranks):
            line = p.segment.worker_line(leader, rank)
            gone = yield from take_if_free(p, line)
            if gone:
                dead = Dead(dead.lines, dead.leaders, dead.busy, dead.held | {line})
            else:
                busy = 1 << leader
        dead = Dead(dead.lines, dead.leaders | 1 << leader, dead.busy | busy, dead.held)
    return dead


def recover_operation(
    p: Process, dead: Dead, leader: int, index: int
) -> Generator[Step, Any, frozenset[tuple[int, int]]]:
    """Step 2 for one operation; (block, generation) of what a live worker still fills."""
    nothing: frozenset[tuple[int, int]] = frozenset()
    cell = p.segment.operation[leader][index]
    leader_is_dead = bool(dead.leaders >> leader & 1)
    word = yield load(cell, "recover")
    if word.state == FREE:
        return nothing
    if leader_is_dead:
        yield from operation_cancel(p, leader, index, word.generation)
    for rank in range(p.segment.sizes.ranks):
        if p.segment.worker_line(leader, rank) not in dead.lines:
            continue
        if word.ranks[rank] not in (DONE, RANK_FAILED):
            yield from operation_cancel(p, leader, index, word.generation)
            yield from operation_end(p, leader, index, rank, False)
        elif p.rules.finishing_recovered and word.state == FINISHING and word.finisher == rank:
            yield from operation_finished(p, leader, index)
    if not leader_is_dead:
        return nothing
    word = yield load(cell, "recover")
    if has_ended(word):
        yield from operation_recycle(p, leader, index)
    elif dead.busy >> leader & 1:
        fields = yield load(p.segment.fields[leader][index], "rows")
        return frozenset((row.block, row.generation) for row in fields.rows)
    else:
        yield from operation_recycle(p, leader, index)
    return nothing


def recover_block(
    p: Process, dead: Dead, protected: frozenset[tuple[int, int]], block: int
) -> Actions:
    """Step 3 for one block."""
    cell = p.segment.word[block]
    word = yield load(cell, "sweep")
    while True:
        if not word.holders & dead.leaders or (block, word.generation) in protected:
            return
        if word.state == REGISTERED:
            after = word._replace(holders=word.holders & ~dead.leaders)
        elif word.state == PARTIAL:
            after = moved(p, word, word.holders)
        elif word.state == EVICTING:
            yield from block_leave(p, block, not p.rules.recovery_leaves_counts)
            return
        else:
            return
        done, seen = yield cas(cell, word, after, "sweep")
        if not done:
            word = seen
        elif word.state == PARTIAL:
            yield from block_leave(p, block, False)
            return
        else:
            return


def nobody_inside(p: Process, dead: Dead) -> Answer:
    """[S3]."""
    for line in p.segment.lines:
        if line == p.line or line in dead.lines:
            continue
        inside = yield load(p.segment.inside[line], "[S3]")
        if inside:
            return False
    return True


def recount(p: Process) -> Actions:
    """Children of all registered blocks."""
    count = p.segment.sizes.blocks
    children = (0,) * count
    for block in range(count):
        word = yield load(p.segment.word[block], "recount")
        if word.state != REGISTERED:
            continue
        parent = yield load(p.segment.parent[block], "recount")
        if parent.block:
            above = parent.block - 1
            children = (*children[:above], children[above] + 1, *children[above + 1 :])
    for block in range(count):
        word = yield load(p.segment.word[block], "recount")
        while word.state == REGISTERED and word.children != children[block]:
            exact = word._replace(children=children[block])
            done, seen = yield cas(p.segment.word[block], word, exact, "recount")
            if done:
                break
            word = seen


def rebuild_pools(p: Process) -> Actions:
    """Free is what no block names."""
    segment = p.segment
    all_blocks, all_slots = (1 << segment.sizes.blocks) - 1, (1 << segment.sizes.slots) - 1
    blocks, slots = all_blocks, all_slots
    for block in range(segment.sizes.blocks):
        word = yield load(segment.word[block], "rebuild")
        if word.state == RESET:
            continue
        blocks &= ~(1 << block)
        placement = yield load(segment.placement[block], "rebuild")
        if placement.state != EMPTY:
            slots &= ~(1 << placement.slot)
    if not p.rules.rebuild_final_words:
        yield store(segment.free_slots, all_slots, "rebuild")
    yield store(segment.free_blocks, blocks, "rebuild")
    yield store(segment.free_slots, slots, "rebuild")
    if segment.sizes.summary and slots:
        yield fetch_or(segment.summary, 1, "rebuild")


def index_purge(p: Process) -> Actions:
    """Delete every stale entry."""
    for e in range(p.segment.sizes.entries):
        seen = yield load(p.segment.entry[e], "purge")
        if seen is None:
            continue
        stale = yield from entry_is_stale(p, seen)
        if stale:
            yield cas(p.segment.entry[e], seen, None, "purge")


def rebuild(p: Process, dead: Dead) -> Answer:
    """Step 4. True if it could be done."""
    alone = False
    if not p.rules.recovering_before_look:
        alone = yield from nobody_inside(p, dead)
    yield store(p.segment.recovering, 1, "[S2]")
    if p.rules.recovering_before_look:
        alone = yield from nobody_inside(p, dead)
    if alone or not p.rules.recount_alone:
        yield from recount(p)
    if alone or not p.rules.rebuild_alone:
        yield from rebuild_pools(p)
    if alone:
        yield from index_purge(p)
    yield store(p.segment.recovering, 0, "recovered")
    return alone


def release_dead_lines(p: Process, dead: Dead) -> Actions:
    """Step 5."""
    for line in p.segment.lines:
        leader = line < p.segment.sizes.leaders
        if line not in dead.lines or (leader and dead.busy >> line & 1):
            continue
        yield store(p.segment.inside[line], 0, "line")
        yield store(p.segment.role[line], NO_ROLE, "line")


def recover(p: Process, always: bool = False) -> Actions:
    """All steps, by the holder of the recovery lock; `always`: also when nobody is dead."""
    segment = p.segment
    taken, _ = yield cas(segment.recovery_lock, 0, p.number, "recovery lock")
    if not taken:
        return
    dead = yield from find_dead(p)
    if dead.lines or always:
        protected: frozenset[tuple[int, int]] = frozenset()
        for leader in range(segment.sizes.leaders):
            for index in range(segment.sizes.operations):
                rows = yield from recover_operation(p, dead, leader, index)
                if p.rules.running_protected:
                    protected = protected | rows
        for block in range(segment.sizes.blocks):
            yield from recover_block(p, dead, protected, block)
        done = yield from rebuild(p, dead)
        if done or not p.rules.lines_after_rebuild:
            yield from release_dead_lines(p, dead)
    elif p.rules.left_recovering_is_cleared:
        left = yield load(segment.recovering, "left?")
        if left:
            yield store(segment.recovering, 0, "recovered")
    if p.rules.dead_lines_held:
        for line in segment.lines:
            if line in dead.held:
                yield store(segment.lock[line], 0, "drop lock")
    yield store(segment.recovery_lock, 0, "drop recovery lock")


def recover_all(p: Process) -> Actions:
    """The segments of all tiers, one after the other."""
    yield from recover(p)
    if p.disk is not None and p.rules.disk_recovered:
        yield from recover(p.disk)


def more_than(value: int, handled: int) -> bool:
    """Whether something has happened since."""
    return value > handled


def recover_after_crash(p: Process) -> Actions:
    """A process that recovers once it has noticed a death."""
    yield wait(p.segment.crashed, "a death", is_not_zero)
    yield from recover_all(p)


def recover_after_each_crash(p: Process) -> Actions:
    """A process that recovers again and again."""
    handled = 0
    while True:
        crashed = yield wait(p.segment.crashed, "a death", more_than, handled)
        yield from recover_all(p)
        handled = crashed
