# SPDX-License-Identifier: Apache-2.0
"""What the policy learns, and that it is worth it in the real table."""

from __future__ import annotations

import numpy as np
import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.ranks import AGES
from kvbm.eviction import reuse
from kvbm.eviction.reuse import COHORTS, LEFT_BEHIND, NEW, TURNS, Reuse, next_factor
from kvbm.replay.manager import Outcome, replay
from kvbm.replay.trace import Request, Trace


def two_kinds(requests: int, seed: int) -> Trace:
    """Long prompts that always come back with one more block, among twice as many that never do."""
    random = np.random.default_rng(seed)
    made: list[Request] = []
    waiting: list[tuple[int, list[int]]] = []  # when it comes back, its blocks
    fresh = iter(range(1, 1_000_000))
    for number in range(requests):
        if waiting and waiting[0][0] <= number:
            blocks = [*waiting.pop(0)[1], next(fresh)]
            made.append(Request(number, 1, 1, blocks))
            continue
        returns = bool(random.integers(0, 3) == 0)
        blocks = [next(fresh) for _ in range(12 if returns else 5)]
        made.append(Request(number, 1, 1, blocks))
        if returns:
            waiting.append((number + 60, blocks))
    return Trace("two kinds", made, 512)


def system_prompts(requests: int, seed: int) -> Trace:
    """Conversations below three long prompts that all have in common, with pauses at random."""
    random = np.random.default_rng(seed)
    fresh = iter(range(10_000, 10_000_000))
    waiting: list[tuple[float, list[int]]] = []
    made: list[Request] = []
    for number in range(requests):
        due = [entry for entry in waiting if entry[0] <= number]
        if due and random.random() < 0.6:
            waiting.remove(due[0])
            blocks = due[0][1] + [next(fresh) for _ in range(int(random.integers(2, 9)))]
        else:
            first = 1000 * int(random.integers(0, 3))
            blocks = [*range(first, first + 40), *(next(fresh) for _ in range(5))]
        made.append(Request(number, 1, 1, blocks))
        if random.random() < 0.7:
            waiting.append((number + random.exponential(60), blocks))
    return Trace("system prompts", made, 16)


def outcomes(trace: Trace, capacity: int) -> tuple[Outcome, Outcome]:
    """In upstream's order, and with the policy."""
    return replay(trace, capacity), replay(trace, capacity, policy=Reuse)


def test_it_learns_which_requests_come_back() -> None:
    plain, learned = outcomes(two_kinds(4000, seed=3), 250)
    assert learned.hits > 1.3 * plain.hits


def test_what_all_prompts_have_in_common_misleads_it_little() -> None:
    """A prompt that many share is no conversation that goes on."""
    for capacity in (500, 1500):
        plain, learned = outcomes(system_prompts(4000, seed=1), capacity)
        assert learned.hit_rate > plain.hit_rate - 0.005


def test_the_same_trace_gives_the_same_decisions_bit_for_bit() -> None:
    trace = two_kinds(1500, seed=1)
    first, again = (replay(trace, 250, policy=Reuse) for _ in range(2))
    assert first.decisions == again.decisions
    assert first.decisions != replay(trace, 250).decisions


@pytest.mark.parametrize(
    ("known", "length", "forks", "goes_on"),
    [
        (10, 10, 0, True),
        (9, 10, 50, True),  # a repetition of all but the last block
        (6, 10, 0, True),
        (5, 10, 0, False),
        (6, 10, 3, True),
        (6, 10, 4, False),  # where many have parted
    ],
)
def test_what_a_continuation_is(known: int, length: int, forks: int, goes_on: bool) -> None:
    assert Reuse._goes_on(known, length, forks) is goes_on


def test_a_class_is_the_turn_and_the_new_blocks() -> None:
    classes: list[int] = []

    class Noted(Reuse):
        def arrive(self, use: int, keys: Keys, stop: int, hits: int) -> int:
            classes.append(super().arrive(use, keys, stop, hits))
            return classes[-1]

    chat = list(range(1, 400))
    prompts = [chat[:1], chat[:4], chat[:5], chat[:5], [900], chat[:390]]
    trace = Trace("t", [Request(i, 1, 1, b) for i, b in enumerate(prompts)], 512)
    replay(trace, 500, policy=Noted)
    turns_and_new = [divmod(c - 1, NEW) for c in classes]
    assert turns_and_new == [(0, 1), (1, 2), (2, 1), (3, 0), (0, 1), (4, NEW - 1)]


def test_a_request_of_no_complete_block_is_of_no_class() -> None:
    trace = Trace("t", [Request(0, 1, 1, []), Request(1, 1, 1, [1])], 512)
    outcome = replay(trace, 4, policy=Reuse)
    assert (outcome.references, outcome.stored) == (1, 1)


def test_what_a_later_turn_has_left_behind_goes_first() -> None:
    """The old end of an answer that was edited is of no use, although it was used of late."""
    prompts = [[21, 22], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 15, 16], [31, 32], [21, 22]]
    trace = Trace("t", [Request(i, 1, 1, b) for i, b in enumerate(prompts)], 512)
    plain, learned = outcomes(trace, 10)
    assert (plain.hits, learned.hits) == (4, 6)
    assert LEFT_BEHIND == COHORTS


def test_factors_are_what_was_observed_beside_what_all_have() -> None:
    """A class that is continued four times as often as the other, at the same ages."""
    reached = np.zeros((TURNS * NEW, 3))
    used = np.zeros_like(reached)
    reached[2], reached[3] = 4000, 4000
    used[2], used[3] = 400, 1600
    factor = np.ones(TURNS * NEW)
    for _ in range(reuse.PASSES):
        factor = next_factor(reached, used, factor)
    assert factor[3] / factor[2] == pytest.approx(4, rel=0.15)
    assert np.isfinite(factor).all()


@pytest.mark.parametrize("blocks", [1, 100, 10_000, 3_000_000, 2**31])
def test_ages_grow_with_the_table(blocks: int) -> None:
    first = min((max(blocks // 64, 1).bit_length() - 1) * 2, AGES - reuse.AGES_LEARNED)
    assert reuse.ages_of(blocks) == slice(first, first + reuse.AGES_LEARNED)
    assert (reuse.widths_of(blocks) > 0).all()
    assert len(reuse.widths_of(blocks)) == reuse.AGES_LEARNED
