# SPDX-License-Identifier: Apache-2.0
"""The yardsticks, on traces small enough to work out by hand and on random ones."""

import random

import pytest

from kvbm.replay.policies import POLICIES, arc_hits, lru_hits, optimum_hits, unbounded_hits
from kvbm.replay.synthetic import conversations
from kvbm.replay.trace import Request, Trace


def trace_of(*chains: list[int]) -> Trace:
    return Trace("t", [Request(i, 0, 0, chain) for i, chain in enumerate(chains)], 16)


def test_only_the_leading_run_of_a_request_counts() -> None:
    trace = trace_of([1, 2, 3], [1, 9, 3])
    assert [policy(trace, 10) for policy in POLICIES.values()] == [1, 1, 1, 1]


def test_lru_evicts_what_was_used_longest_ago_from_the_end_of_its_chain() -> None:
    # 3 blocks: [3] takes the place of 2, the end of the older chain; 1 is still there.
    assert lru_hits(trace_of([1, 2], [5], [3], [1], [2]), 3) == 1
    assert lru_hits(trace_of([1, 2], [5], [3], [5]), 3) == 1


def test_arc_keeps_what_was_used_twice_through_a_scan() -> None:
    scan = [[n] for n in range(10, 20)]
    trace = trace_of([1], [1], *scan, [1])
    assert arc_hits(trace, 4) == 2
    assert lru_hits(trace, 4) == 1


def test_the_optimum_keeps_what_comes_back() -> None:
    trace = trace_of([1], [2], [3], [1], [4], [1])
    assert optimum_hits(trace, 1) == 2
    assert lru_hits(trace, 1) == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_beats_the_optimum_and_none_beats_an_unbounded_cache(seed: int) -> None:
    rng = random.Random(seed)
    trace = conversations(300, seed)
    for capacity in (rng.randint(1, 50), rng.randint(50, 500), 10**6):
        ceiling = unbounded_hits(trace, capacity)
        best = optimum_hits(trace, capacity)
        assert lru_hits(trace, capacity) <= best <= ceiling
        assert arc_hits(trace, capacity) <= best
    assert best == ceiling == lru_hits(trace, 10**6) == arc_hits(trace, 10**6)


def test_every_policy_stores_answers_and_counts_hits_on_prompts() -> None:
    first = Request(0, 0, 0, [1], (2,))
    follow = Request(1, 0, 0, [1, 2, 3])
    for policy in POLICIES.values():
        assert policy(Trace("t", [first, follow], 16), 10) == 2
    # An answer takes room: 2 pushed 9 out, 9 then 2, the end of the older chain.
    other = Request(2, 0, 0, [9])
    trace = Trace("t", [other, first, other._replace(timestamp_ms=3), follow], 16)
    assert lru_hits(trace, 2) == 1


def test_the_optimum_does_not_keep_what_is_generated_again_before_it_is_asked_for() -> None:
    answered = [Request(n, 0, 0, [n], (7,)) for n in (1, 2)]
    asked = [Request(3, 0, 0, [5]), Request(4, 0, 0, [7])]
    trace = Trace("t", [asked[0], answered[0], asked[0], answered[1], asked[1]], 16)
    assert optimum_hits(trace, 1) == 2
