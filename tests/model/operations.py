# SPDX-License-Identifier: Apache-2.0
"""Transfer requests and rings, access by access: kvbm/_fast/operations.pyx.

A process that waits does so in one step ("wait"), where the sources poll or sleep on a doorbell.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tests.model.blocks import Answer, Process, block_publish, structure_enter, structure_exit
from tests.model.cells import (
    CANCELLED,
    COMPLETE,
    DONE,
    FAILED,
    FETCH,
    FINISHING,
    FREE,
    PENDING,
    RANK_FAILED,
    RUNNING,
    STORE,
    SUBMITTED,
    Operation,
    OperationWord,
)
from tests.model.explore import Actions, Step, cas, load, store, wait

STILL_RUNNING, ENDED, MUST_PUBLISH = "still running", "ended", "must publish"


def with_rank(word: OperationWord, rank: int, state: str) -> OperationWord:
    """The word with one rank's two bits replaced."""
    ranks = word.ranks
    return word._replace(ranks=(*ranks[:rank], state, *ranks[rank + 1 :]))


def all_ended(word: OperationWord) -> bool:
    """No rank is pending or running."""
    return all(rank in (DONE, RANK_FAILED) for rank in word.ranks)


def is_free(word: OperationWord) -> bool:
    """Whether a leader may use an operation."""
    return word.state == FREE


def has_ended(word: OperationWord) -> bool:
    """Whether a leader may collect an operation."""
    return word.state in (COMPLETE, FAILED)


def operation_submit(p: Process, index: int, what: Operation) -> Generator[Step, Any, int | None]:
    """Hand an operation to all ranks; its generation, None when a rank's ring has no room."""
    segment, leader = p.segment, p.leader
    size = segment.sizes.ring
    if p.rules.ring_has_room:
        for rank in range(segment.sizes.ranks):
            head = yield load(segment.head[leader][rank], "room?")
            tail = yield load(segment.tail[leader][rank], "[R3]")
            if head - tail >= size:
                return None
    word = yield load(segment.operation[leader][index], "free")
    yield store(segment.fields[leader][index], what, "fields")
    submitted = OperationWord(SUBMITTED, 0, word.generation, (PENDING,) * segment.sizes.ranks)
    yield store(segment.operation[leader][index], submitted, "[O0]")
    for rank in range(segment.sizes.ranks):
        head = yield load(segment.head[leader][rank], "own head")
        entry = (index, word.generation)
        yield store(segment.ring[leader][rank][head % size], entry, "ring")
        yield store(segment.head[leader][rank], head + 1, "[R0]")
    return int(word.generation)


def not_empty(head: int, tail: int) -> bool:
    """Whether a ring has an entry."""
    return head != tail


def ring_pop(p: Process) -> Generator[Step, Any, tuple[int, int]]:
    """Wait for the next operation; (index, generation)."""
    segment = p.segment
    tail = yield load(segment.tail[p.leader][p.rank], "own tail")
    yield wait(segment.head[p.leader][p.rank], "[R1]", not_empty, tail)
    place = tail % segment.sizes.ring
    entry = yield load(segment.ring[p.leader][p.rank][place], "ring")
    yield store(segment.tail[p.leader][p.rank], tail + 1, "[R2]")
    return entry[0], entry[1]


def operation_claim(p: Process, index: int, generation: int) -> Answer:
    """pending -> running; False if the operation was cancelled or is another one by now."""
    cell = p.segment.operation[p.leader][index]
    word = yield load(cell, "claim")
    while True:
        if word.generation != generation or word.state != SUBMITTED:
            return False
        if word.ranks[p.rank] != PENDING:
            return False
        done, seen = yield cas(cell, word, with_rank(word, p.rank, RUNNING), "claim")
        if done:
            return True
        word = seen


def operation_end(
    p: Process, leader: int, index: int, rank: int, done: bool
) -> Generator[Step, Any, str]:
    """running -> done or failed; if it is the last rank, the same step decides about the whole."""
    cell = p.segment.operation[leader][index]
    word = yield load(cell, "end")
    kind = ""
    if done:
        fields = yield load(p.segment.fields[leader][index], "fields")
        kind = fields.kind
    while True:
        if word.ranks[rank] != RUNNING:
            return ENDED
        after = with_rank(word, rank, DONE if done else RANK_FAILED)
        result = STILL_RUNNING
        if all_ended(after):
            result = ENDED
            if RANK_FAILED in after.ranks:
                after = after._replace(state=FAILED)
            elif kind in (STORE, FETCH):
                after = after._replace(state=FINISHING, finisher=rank)
                result = MUST_PUBLISH
            else:
                after = after._replace(state=COMPLETE)
        swapped, seen = yield cas(cell, word, after, "end")
        if swapped:
            return result
        word = seen


def operation_publish(p: Process, index: int) -> Actions:
    """Publish the blocks of a store, parents first; what cannot be is left to the leader."""
    inside = yield from structure_enter(p)
    if not inside:
        return
    fields = yield load(p.segment.fields[p.leader][index], "fields")
    rows = fields.rows
    for i in range(len(rows)):
        yield from block_publish(p, rows[i].block, rows[i].generation, rows[i].digest)
    yield from structure_exit(p)


def operation_finished(p: Process, leader: int, index: int) -> Actions:
    """FINISHING -> COMPLETE, after the blocks have been published."""
    cell = p.segment.operation[leader][index]
    word = yield load(cell, "finished")
    while word.state == FINISHING:
        done, seen = yield cas(cell, word, word._replace(state=COMPLETE), "finished")
        if done:
            return
        word = seen


def operation_cancel(p: Process, leader: int, index: int, generation: int) -> Actions:
    """No rank that has not begun will begin."""
    cell = p.segment.operation[leader][index]
    word = yield load(cell, "cancel")
    while word.generation == generation and word.state == SUBMITTED:
        ranks = tuple(RANK_FAILED if rank == PENDING else rank for rank in word.ranks)
        after = word._replace(state=CANCELLED, ranks=ranks)
        if all_ended(after):
            after = after._replace(state=FAILED)
        done, seen = yield cas(cell, word, after, "cancel")
        if done:
            return
        word = seen


def operation_recycle(p: Process, leader: int, index: int) -> Actions:
    """COMPLETE or FAILED -> FREE with the next generation."""
    cell = p.segment.operation[leader][index]
    word = yield load(cell, "recycle")
    free = OperationWord(FREE, 0, word.generation + 1, word.ranks)
    yield store(cell, free, "recycle")
