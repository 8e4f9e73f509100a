# SPDX-License-Identifier: Apache-2.0
"""Whether a history of operations on blocks could have come from blocks whose steps are atomic.

Each operation has a moment before it began and one after it had ended. The history of one block is
linearizable if each of its operations can be given one moment in between at which it happens at
once, so that the specification below is obeyed. Blocks are judged one by one: a history is
linearizable if the history of each object is (Herlihy and Wing, 1990). What an operation does to a
second block, the count on a parent, is an operation on that one with the same two moments.

The search is the one of Wing and Gong with memory (Lowe, 2017), in the order in which operations
end: a configuration is a state and the operations under way that have had their moment.

A look-up that finds nothing has no block. It is judged by time: wrong is a miss while one and the
same block was registered under the digest from before it began until after it had ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

FREE, FILLING, REGISTERED = "free", "filling", "registered"


class Op(NamedTuple):
    """One operation on one block, as the process that did it saw it.

    Attributes
    ----------
    start, end
        CLOCK_MONOTONIC before and after it, ns; one clock for all processes.
    leader
        For whom.
    kind
        A name of `_STEPS`, or "missed".
    block, generation, digest
        On what; -1 or an empty string where the kind has none.
    """

    start: int
    end: int
    leader: int
    kind: str
    block: int
    generation: int = -1
    digest: str = ""


class State(NamedTuple):
    """A block."""

    state: str = FREE
    generation: int = 0
    digest: str = ""
    holders: frozenset[int] = frozenset()
    children: int = 0


class Violation(NamedTuple):
    """An operation that no order explains, and the states that the block may have been in."""

    op: Op
    states: tuple[State, ...]


def _is(s: State, op: Op, state: str) -> bool:
    return s.state == state and s.generation == op.generation


def _reserved(s: State, op: Op) -> State | None:
    if not _is(s, op, FREE):
        return None
    return State(FILLING, op.generation, op.digest, frozenset({op.leader}))


def _published(s: State, op: Op) -> State | None:
    return s._replace(state=REGISTERED) if _is(s, op, FILLING) else None


def _published_before(s: State, op: Op) -> State | None:
    return s if _is(s, op, REGISTERED) else None


def _still_filling(s: State, op: Op) -> State | None:
    return s if _is(s, op, FILLING) else None


def _not_to_publish(s: State, op: Op) -> State | None:
    return None if _is(s, op, FILLING) or _is(s, op, REGISTERED) else s


def _pinned(s: State, op: Op) -> State | None:
    if not _is(s, op, REGISTERED) or s.digest != op.digest:
        return None
    return s._replace(holders=s.holders | {op.leader})


def _not_pinned(s: State, op: Op) -> State | None:
    return None if s.state == REGISTERED and s.digest == op.digest else s


def _unpinned(s: State, op: Op) -> State | None:
    if s.state != REGISTERED or op.leader not in s.holders:
        return None
    return s._replace(holders=s.holders - {op.leader})


def _evicted(s: State, op: Op) -> State | None:
    if not _is(s, op, REGISTERED) or s.holders or s.children:
        return None
    return State(FREE, s.generation + 1)


def _abandoned(s: State, op: Op) -> State | None:
    if not _is(s, op, FILLING) or s.holders != {op.leader}:
        return None
    return State(FREE, s.generation + 1)


def _not_abandoned(s: State, op: Op) -> State | None:
    return None if _is(s, op, FILLING) else s


def _found(s: State, op: Op) -> State | None:
    return s if _is(s, op, REGISTERED) and s.digest == op.digest else None


def _found_filling(s: State, op: Op) -> State | None:
    return s if _is(s, op, FILLING) and s.digest == op.digest else None


def _counted(s: State, op: Op) -> State | None:
    return s._replace(children=s.children + 1) if _is(s, op, REGISTERED) else None


def _not_counted(s: State, op: Op) -> State | None:
    return None if _is(s, op, REGISTERED) else s


def _uncounted(s: State, op: Op) -> State | None:
    if not _is(s, op, REGISTERED) or not s.children:
        return None
    return s._replace(children=s.children - 1)


_STEPS = {
    "reserved": _reserved,
    "published": _published,
    "published before": _published_before,
    "still filling": _still_filling,
    "not to publish": _not_to_publish,
    "pinned": _pinned,
    "not pinned": _not_pinned,
    "unpinned": _unpinned,
    "evicted": _evicted,
    "abandoned": _abandoned,
    "not abandoned": _not_abandoned,
    "found": _found,
    "found filling": _found_filling,
    "counted": _counted,
    "not counted": _not_counted,
    "uncounted": _uncounted,
}

Configuration = tuple[State, frozenset[int]]


def _explain(
    before: Configuration, wanted: int, running: Sequence[int], ops: Sequence[Op]
) -> Iterator[Configuration]:
    """All ways to go on from a configuration until operation `wanted` has had its moment."""
    seen, stack = {before}, [before]
    while stack:
        state, moments = stack.pop()
        if wanted in moments:
            yield state, moments - {wanted}
            continue
        for number in running:
            if number in moments:
                continue
            after = _STEPS[ops[number].kind](state, ops[number])
            if after is None:
                continue
            following = (after, moments | {number})
            if following not in seen:
                seen.add(following)
                stack.append(following)


def check_block(ops: Sequence[Op]) -> Violation | None:
    """Judge the history of one block, which begins free; None if it is linearizable."""
    events = sorted(
        [(op.start, 0, number) for number, op in enumerate(ops)]
        + [(op.end, 1, number) for number, op in enumerate(ops)]
    )
    running: list[int] = []
    possible: set[Configuration] = {(State(), frozenset())}
    for _, is_end, number in events:
        if not is_end:
            running.append(number)
            continue
        left = {after for now in possible for after in _explain(now, number, running, ops)}
        if not left:
            return Violation(ops[number], tuple({state for state, _ in possible}))
        possible = left
        running.remove(number)
    return None


def _lives(ops: Iterable[Op]) -> dict[str, list[tuple[int, int]]]:
    """By digest: from when to when a block was registered under it for certain."""
    begun: dict[tuple[int, int], int] = {}
    digest_of: dict[tuple[int, int], str] = {}
    ended: dict[tuple[int, int], int] = {}
    for op in ops:
        key = (op.block, op.generation)
        if op.kind == "reserved":
            digest_of[key] = op.digest
        elif op.kind == "published":
            begun[key] = op.end
        elif op.kind == "evicted":
            ended[key] = op.start
    lives: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for key, since in begun.items():
        lives[digest_of.get(key, "")].append((since, ended.get(key, 2**63)))
    return lives


def check_misses(ops: Sequence[Op]) -> Violation | None:
    """Judge the look-ups that found nothing."""
    lives = _lives(ops)
    for op in ops:
        if op.kind == "missed":
            for since, until in lives.get(op.digest, ()):
                if since < op.start and op.end < until:
                    return Violation(op, (State(REGISTERED, digest=op.digest),))
    return None


def check(ops: Sequence[Op]) -> Violation | None:
    """Judge a whole history; None if it is linearizable."""
    by_block: dict[int, list[Op]] = defaultdict(list)
    for op in ops:
        if op.kind != "missed":
            by_block[op.block].append(op)
    for block in sorted(by_block):
        found = check_block(by_block[block])
        if found is not None:
            return found
    return check_misses(ops)
