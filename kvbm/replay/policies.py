# SPDX-License-Identifier: Apache-2.0
"""What other policies would have hit: the yardsticks of a replay.

All count and store as kvbm does: a hit is a block of a prompt's leading run, and the blocks of an
answer are stored as well where the trace knows them. They see the blocks of a request from its end
to its start, so that a chain is evicted from its end.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Collection

from kvbm.replay.trace import Trace

NEVER = 1 << 62


def _leading_run(blocks: list[int], cached: Collection[int]) -> int:
    hits = 0
    for block in blocks:
        if block not in cached:
            break
        hits += 1
    return hits


def lru_hits(trace: Trace, capacity: int) -> int:
    """Hits of exact least-recently-used."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in trace.requests:
        hits += _leading_run(request.blocks, cached)
        for block in reversed(request.chain):
            if block in cached:
                cached.move_to_end(block)
                continue
            if len(cached) == capacity:
                cached.popitem(last=False)
            cached[block] = None
    return hits


class _Arc:
    """Adaptive replacement cache: Megiddo and Modha, FAST 2003, figure 4."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.target = 0.0  # of `once`, "p" in the paper
        self.once: OrderedDict[int, None] = OrderedDict()  # T1
        self.often: OrderedDict[int, None] = OrderedDict()  # T2
        self.once_ghosts: OrderedDict[int, None] = OrderedDict()  # B1
        self.often_ghosts: OrderedDict[int, None] = OrderedDict()  # B2

    def __contains__(self, block: int) -> bool:
        return block in self.once or block in self.often

    def _replace(self, in_often_ghosts: bool) -> None:
        once = len(self.once)
        if once and (once > self.target or (in_often_ghosts and once == self.target)):
            self.once_ghosts[self.once.popitem(last=False)[0]] = None
        else:
            self.often_ghosts[self.often.popitem(last=False)[0]] = None

    def access(self, block: int) -> None:
        """Use a block, cached or not; afterwards it is cached."""
        if block in self:
            self.once.pop(block, None)
            self.often[block] = None
            self.often.move_to_end(block)
            return
        ghosts, others = self.once_ghosts, self.often_ghosts
        if block in ghosts:
            self.target = min(self.capacity, self.target + max(1.0, len(others) / len(ghosts)))
        elif block in others:
            self.target = max(0.0, self.target - max(1.0, len(ghosts) / len(others)))
        else:
            self._miss()
            self.once[block] = None
            return
        self._replace(block in others)
        ghosts.pop(block, None)
        others.pop(block, None)
        self.often[block] = None

    def _miss(self) -> None:
        """Make room for a block of which nothing is known."""
        seen_once = len(self.once) + len(self.once_ghosts)
        seen = seen_once + len(self.often) + len(self.often_ghosts)
        if seen_once == self.capacity:
            if len(self.once) < self.capacity:
                self.once_ghosts.popitem(last=False)
                self._replace(False)
            else:
                self.once.popitem(last=False)
        elif seen >= self.capacity:
            if seen == 2 * self.capacity:
                self.often_ghosts.popitem(last=False)
            self._replace(False)


def arc_hits(trace: Trace, capacity: int) -> int:
    """Hits of ARC."""
    cache = _Arc(capacity)
    hits = 0
    for request in trace.requests:
        hits += sum(1 for _ in _run_of(request.blocks, cache))
        for block in reversed(request.chain):
            cache.access(block)
    return hits


def _run_of(blocks: list[int], cache: _Arc) -> list[int]:
    for count, block in enumerate(blocks):
        if block not in cache:
            return blocks[:count]
    return blocks


def optimum_hits(trace: Trace, capacity: int) -> int:
    """Hits of a policy that knows the future.

    Belady's: what is used last again goes first, a block that would go at once is not stored; of
    blocks that are used again by the same request, the deepest goes first. A block that is
    generated again before it is asked for is of no use until then.
    """
    following: list[list[int]] = [[] for _ in trace.requests]
    seen: dict[int, int] = {}
    for index in range(len(trace.requests) - 1, -1, -1):
        request = trace.requests[index]
        following[index] = [seen.get(block, NEVER) for block in request.chain]
        seen.update((block, NEVER) for block in request.generated)
        seen.update((block, index) for block in request.blocks)
    cached: dict[int, int] = {}
    order: list[tuple[int, int, int]] = []  # (- next use, - depth, block): the first to go
    hits = 0
    for index, request in enumerate(trace.requests):
        hits += _leading_run(request.blocks, cached)
        for depth, block in enumerate(request.chain):
            use = following[index][depth]
            if block not in cached and use == NEVER:
                continue
            cached[block] = use
            heapq.heappush(order, (-use, -depth, block))
        while len(cached) > capacity:
            use, _, block = heapq.heappop(order)
            if cached.get(block) == -use:
                del cached[block]
    return hits


def unbounded_hits(trace: Trace, capacity: int) -> int:
    """Hits of a cache that never evicts."""
    cached: set[int] = set()
    hits = 0
    for request in trace.requests:
        hits += _leading_run(request.blocks, cached)
        cached.update(request.chain)
    return hits


POLICIES: dict[str, Callable[[Trace, int], int]] = {
    "LRU": lru_hits,
    "ARC": arc_hits,
    "optimum": optimum_hits,
    "unbounded": unbounded_hits,
}
