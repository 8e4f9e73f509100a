# SPDX-License-Identifier: Apache-2.0
"""What the learning order learns."""

from __future__ import annotations

import numpy as np
import pytest

from bench.eviction import reuse
from bench.eviction.cache import LeastRecent, hits_of
from kvbm.replay.trace import Request, Trace


def two_kinds(requests: int, seed: int) -> Trace:
    """Chains with short answers that always come back, among twice as many that never do."""
    random = np.random.default_rng(seed)
    made: list[Request] = []
    waiting: list[tuple[int, list[int]]] = []  # when it comes back, its blocks
    fresh = iter(range(1, 1_000_000))
    for number in range(requests):
        if waiting and waiting[0][0] <= number:
            blocks = [*waiting.pop(0)[1], next(fresh)]
            made.append(Request(number, 1, 4, blocks))
            continue
        blocks = [0, *(next(fresh) for _ in range(9))]
        returns = bool(random.integers(0, 3) == 0)
        made.append(Request(number, 1, 4 if returns else 500, blocks))
        if returns:
            waiting.append((number + 60, blocks))
    return Trace("two kinds", made, 512)


def test_worth_is_the_rate_of_use_where_the_hazard_is_constant() -> None:
    rate = 1e-5
    hazard = -np.expm1(-rate * np.diff(reuse.EDGES))[None]
    assert reuse.worth_by_age(hazard)[0, :10] == pytest.approx(rate, rel=0.05)


def test_what_will_be_used_soon_is_worth_more_than_what_was_due_before() -> None:
    hazard = np.zeros((1, len(reuse.EDGES) - 1))
    hazard[0, 5] = 0.5
    worth = reuse.worth_by_age(hazard)[0]
    assert all(np.diff(worth[:6]) > 0)
    assert not worth[6:].any()


def test_it_learns_which_chains_come_back() -> None:
    trace = two_kinds(4000, seed=3)
    learning = reuse.Reuse(trace)
    learned = hits_of(trace, 350, learning)
    assert learned > 1.5 * hits_of(trace, 350, LeastRecent())
    answers = learning.logs[1]
    assert answers[(4).bit_length()] > answers[(500).bit_length()] + 1


def test_what_was_superseded_goes_first() -> None:
    trace = two_kinds(450, seed=1)
    learning = reuse.Reuse(trace)
    hits_of(trace, 350, learning)
    both = np.array([440, 441])
    worth = learning.worth(both, np.array([False, True]))
    assert worth[0] > worth[1] == reuse.SUPERSEDED


def test_it_remembers_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "REMEMBERED", 100)
    trace = two_kinds(450, seed=1)
    learning = reuse.Reuse(trace)
    hits_of(trace, 350, learning)
    assert len(learning.last_user) == 100
