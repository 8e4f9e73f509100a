# SPDX-License-Identifier: Apache-2.0
"""The cache of chains keeps what a cache of blocks keeps."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.eviction.cache import Cache, Index, LeastRecent, hits_of
from kvbm.replay.policies import lru_hits, unbounded_hits
from kvbm.replay.synthetic import conversations


class Shuffled:
    """An order without sense."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def arrive(self, request: int, hits: int) -> None:
        pass

    def worth(self, requests: Index, superseded: NDArray[np.bool_]) -> NDArray[np.float64]:
        return self.random.random(len(requests))


@pytest.mark.parametrize("capacity", [1, 50, 400, 3000])
def test_least_recently_used_hits_what_it_hits_block_by_block(capacity: int) -> None:
    trace = conversations(600, seed=5)
    assert hits_of(trace, capacity, LeastRecent()) == lru_hits(trace, capacity)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_order_a_cached_block_has_its_parent_and_room_is_kept(seed: int) -> None:
    trace = conversations(300, seed=seed)
    cache, order = Cache(trace, 150), Shuffled(seed)
    for number, request in enumerate(trace.requests):
        hits = cache.use(number)
        cache.store(number, hits)
        cache.shrink(order)
        assert cache.used == len(cache.owner) == int(cache.length.sum()) <= 150
        cached = [block in cache.owner for block in request.blocks]
        assert sorted(cached, reverse=True) == cached


def test_with_room_for_all_every_order_hits_all_that_is_known() -> None:
    trace = conversations(300, seed=1)
    assert hits_of(trace, trace.distinct, Shuffled(1)) == unbounded_hits(trace, 0)
