# SPDX-License-Identifier: Apache-2.0
"""What an order can win that tells blocks apart by a class and their age alone.

Each use of a block begins a stay that ends at its next use, or never. An order that knows a stay's
class and age can do no better than to let it go at a fixed age for each class; the bound picks
these ages in hindsight and asks only for the mean of the blocks kept to be the capacity. More
classes mean more hindsight: with a class for each stay it would be the optimum. So `held_out` takes
the ages from one half of the conversations and counts hits in the other.

Age is in seconds: an order that also follows the load (one that counts returned blocks does), or
knows how deep a block is in its chain, can be a little beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbm.replay.trace import Trace

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

AGES_MAX = 400  # tried for a class
BISECTIONS = 60


class Stays(NamedTuple):
    """One entry a use of a block; times in seconds."""

    until_use: Floats  # inf: never
    until_end: Floats  # of the trace
    classes: dict[str, Index]
    half: Index  # 0 or 1, the same for all of a conversation
    span: float


class _Curve(NamedTuple):
    """Of one class, by the age at which its stays are ended: hits, and the room they take."""

    ages: Floats
    hits: Floats
    cost: Floats


def _log2(values: list[int]) -> Index:
    return np.array([value.bit_length() for value in values], dtype=np.int64)


class _Past(NamedTuple):
    """Of each request: turn, known leading blocks, seconds since the turn before, conversation."""

    turn: list[int]
    known: list[int]
    pause: list[float]
    root: list[int]


def _past(trace: Trace) -> _Past:
    last: dict[int, int] = {}
    turn, known, pause, root = past = _Past([], [], [], [])
    for number, request in enumerate(trace.requests):
        run = 0
        while run < len(request.blocks) and request.blocks[run] in last:
            run += 1
        former = last[request.blocks[run - 1]] if run >= 2 else None
        root.append(number if former is None else root[former])
        turn.append(0 if former is None else turn[former] + 1)
        pause.append(
            0.0
            if former is None
            else (request.timestamp_ms - trace.requests[former].timestamp_ms) / 1000
        )
        known.append(run)
        last.update((block, number) for block in request.blocks)
    return past


def stays(trace: Trace) -> Stays:
    """All stays of a trace and the classes by which they may be told apart, coarse to fine."""
    requests = trace.requests
    end = requests[-1].timestamp_ms / 1000
    following: dict[int, float] = {}
    rows: list[tuple[float, float, int, int]] = []
    for number in range(len(requests) - 1, -1, -1):
        now = requests[number].timestamp_ms / 1000
        blocks = requests[number].blocks
        for depth, block in enumerate(blocks):
            end_of_chain = depth == len(blocks) - 1
            kind = min(depth, 1) + 2 * end_of_chain
            rows.append((following.get(block, np.inf) - now, end - now, number, kind))
        following.update((block, now) for block in blocks)
    until_use, until_end, numbers, place = (np.array(column) for column in zip(*rows, strict=True))
    turn, known, pause, root = _past(trace)
    new = _log2([len(r.blocks) - k for r, k in zip(requests, known, strict=True)])[numbers]
    answer = _log2([r.output_tokens for r in requests])[numbers]
    size = _log2([len(r.blocks) for r in requests])[numbers]
    paused = np.digitize(pause, [1, 30, 60, 120, 240, 480])[numbers]
    turns = place + 4 * np.minimum(turn, 5)[numbers]
    classes = {
        "none": np.zeros_like(numbers),
        "turn": turns,
        "turn, new blocks": turns + 32 * new,
        "turn, new blocks, answer": turns + 32 * (new + 64 * answer),
        "all": turns + 32 * (new + 64 * (answer + 64 * (size + 64 * paused))),
    }
    half = np.random.default_rng(0).integers(0, 2, len(requests))[root][numbers]
    return Stays(until_use, until_end, classes, half, end)


def _curve(until_use: Floats, until_end: Floats) -> _Curve:
    used = np.sort(until_use[np.isfinite(until_use)])
    ages = np.unique(used)
    if len(ages) > AGES_MAX:
        ages = np.unique(np.quantile(ages, np.linspace(0, 1, AGES_MAX + 1)))
    stay = np.sort(np.minimum(until_use, until_end))
    total = np.concatenate([[0.0], np.cumsum(stay)])
    ended = np.searchsorted(stay, ages, side="right")
    cost = total[ended] + (len(stay) - ended) * ages
    hits = np.searchsorted(used, ages, side="right").astype(np.float64)
    return _Curve(*(np.concatenate([[0.0], column]) for column in (ages, hits, cost)))


def _members(classes: Index) -> list[Index]:
    _, dense = np.unique(classes, return_inverse=True)
    order: Index = np.argsort(dense, kind="stable")
    return np.split(order, np.cumsum(np.bincount(dense))[:-1])


def _price(room: float, cost_at: Callable[[float], float]) -> float:
    """What a block and second must be worth for what is kept to fit into the room."""
    low, high = 1e-9, 1e3
    for _ in range(BISECTIONS):
        price = float(np.sqrt(low * high))
        if cost_at(price) > room:
            low = price
        else:
            high = price
    return high


def bound(of: Stays, name: str, capacity: int) -> float:
    """Hits that no such order exceeds (Lagrange's relaxation, so it may be loose)."""
    curves = [_curve(of.until_use[m], of.until_end[m]) for m in _members(of.classes[name])]
    room = capacity * of.span

    def at(price: float) -> tuple[float, float]:
        best = [(curve, int(np.argmax(curve.hits - price * curve.cost))) for curve in curves]
        return sum(c.hits[i] for c, i in best), sum(c.cost[i] for c, i in best)

    price = _price(room, lambda price: at(price)[1])
    hits, cost = at(price)
    return float(hits + price * (room - cost))  # the dual value: a bound at any price


def held_out(of: Stays, name: str, capacity: int) -> float:
    """Hits when the ages are those that are best for the other half of the conversations."""
    folds: list[tuple[_Curve, Floats, Floats]] = []
    for members in _members(of.classes[name]):
        for half in (0, 1):
            chosen = of.half[members] == half
            ours, others = members[chosen], members[~chosen]
            if len(ours):
                curve = _curve(of.until_use[others], of.until_end[others])
                folds.append((curve, of.until_use[ours], of.until_end[ours]))
    room = capacity * of.span

    def at(price: float) -> tuple[float, float]:
        hits = cost = 0.0
        for curve, until_use, until_end in folds:
            age = curve.ages[int(np.argmax(curve.hits - price * curve.cost))]
            hits += float(np.count_nonzero((until_use <= age) & (age > 0)))
            cost += float(np.minimum(np.minimum(until_use, until_end), age).sum())
        return hits, cost

    return at(_price(room, lambda price: at(price)[1]))[0]
