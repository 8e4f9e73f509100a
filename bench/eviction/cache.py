# SPDX-License-Identifier: Apache-2.0
"""A cache of prefix chains that evicts in an order that is given to it.

Blocks belong to the request that used them last; what a request owns is a piece of its chain, and
goes from the end, leaves first, as in the block table. So an order ranks requests, not blocks, and
a trace takes seconds.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvbm.replay.trace import Trace

Index = NDArray[np.int64]


class Order(Protocol):
    """What is evicted first.

    An order may look at a request when it has arrived, and at all that came before.
    """

    def arrive(self, request: int, hits: int) -> None:
        """Take note of a request and of how many of its leading blocks were cached."""

    def worth(self, requests: Index, superseded: NDArray[np.bool_]) -> NDArray[np.float64]:
        """How much the last used blocks of each request are worth; the smallest goes first.

        `superseded` are those whose chain another request has continued, without these blocks.
        """


class Cache:
    """`capacity` blocks, and who used each of them last."""

    def __init__(self, trace: Trace, capacity: int) -> None:
        count = len(trace.requests)
        self.blocks = [request.blocks for request in trace.requests]
        self.capacity = capacity
        self.used = 0
        self.owner: dict[int, int] = {}
        self.children: dict[int, int] = {}
        self.start = np.zeros(count, dtype=np.int64)  # of the piece that a request owns
        self.length = np.zeros(count, dtype=np.int64)
        self.superseded = np.zeros(count, dtype=np.bool_)
        self.owners: set[int] = set()  # those with a piece

    def use(self, request: int) -> int:
        """Take over the leading blocks that are cached; returns how many."""
        hits = 0
        former = set()
        for depth, block in enumerate(self.blocks[request]):
            owner = self.owner.get(block)
            if owner is None:
                break
            hits = depth + 1
            self.owner[block] = request
            self.start[owner] = hits
            self.length[owner] -= 1
            if self.length[owner] == 0:
                self.owners.discard(owner)
            if depth:  # the first block alone is what all prompts have in common
                former.add(owner)
        self.superseded[list(former)] = True
        return hits

    def store(self, request: int, hits: int) -> None:
        """Add the blocks that were not cached."""
        blocks = self.blocks[request]
        for depth in range(hits, len(blocks)):
            self.owner[blocks[depth]] = request
            if depth:
                parent = blocks[depth - 1]
                self.children[parent] = self.children.get(parent, 0) + 1
        self.start[request] = 0
        self.length[request] = len(blocks)
        self.owners.add(request)
        self.used += len(blocks) - hits

    def shrink(self, order: Order) -> None:
        """Evict until no more than `capacity` blocks are left."""
        if self.used <= self.capacity:
            return
        owners = np.fromiter(self.owners, dtype=np.int64, count=len(self.owners))
        worth = order.worth(owners, self.superseded[owners])
        while self.used > self.capacity:  # again only if a piece was in the way of an earlier one
            for owner in owners[np.lexsort((-self.start[owners], owners, worth))]:
                if self.used <= self.capacity:
                    break
                self._evict(int(owner))

    def _evict(self, owner: int) -> None:
        blocks = self.blocks[owner]
        while self.length[owner] and self.used > self.capacity:
            depth = int(self.start[owner] + self.length[owner]) - 1
            if self.children.get(blocks[depth], 0):
                return
            del self.owner[blocks[depth]]
            self.children.pop(blocks[depth], None)
            if depth:
                self.children[blocks[depth - 1]] -= 1
            self.length[owner] -= 1
            self.used -= 1
        if not self.length[owner]:
            self.owners.discard(owner)


def hits_of(trace: Trace, capacity: int, order: Order) -> int:
    """Hits of a trace; as in `kvbm.replay`, a hit is a block of a request's leading run."""
    cache = Cache(trace, capacity)
    total = 0
    for request in range(len(trace.requests)):
        hits = cache.use(request)
        order.arrive(request, hits)
        cache.store(request, hits)
        cache.shrink(order)
        total += hits
    return total


class LeastRecent:
    """Least recently used."""

    def arrive(self, request: int, hits: int) -> None:
        """Nothing to note."""

    def worth(self, requests: Index, superseded: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The later, the more."""
        return requests.astype(np.float64)
