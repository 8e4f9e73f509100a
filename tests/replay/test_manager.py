# SPDX-License-Identifier: Apache-2.0
"""The real block table under a trace."""

import random
from collections.abc import Callable
from functools import partial

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.ranks import Uses
from kvbm.errors import KvbmError
from kvbm.replay.disk import replay_with_disk
from kvbm.replay.manager import CALLS, Outcome, Pace, replay
from kvbm.replay.policies import lru_hits, unbounded_hits
from kvbm.replay.synthetic import conversations
from kvbm.replay.trace import Request, Trace

TRACE = conversations(400, 1)


def talks(seed: int) -> Trace:
    """Conversations as a record has them: with answers, and with turns that are asked again."""
    rng = random.Random(seed)
    requests: list[Request] = []
    histories: list[list[int]] = []
    block = 1
    for number in range(300):
        if requests and rng.random() < 0.2:  # the same question: the same answer, again
            requests.append(rng.choice(requests[-60:])._replace(timestamp_ms=number))
            continue
        if len(histories) < 4 or rng.random() < 0.2:
            histories.append([0, -len(histories) - 1])
        history = rng.choice(histories[-8:])
        asked, answer = rng.randint(1, 4), rng.randint(0, 3)
        history += range(block, block + asked)
        generated = tuple(range(block + asked, block + asked + answer))
        requests.append(Request(number, 0, 0, list(history), generated))
        history += generated
        block += asked + answer
    return Trace(f"talks {seed}", requests, 16)


def test_the_same_trace_gives_the_same_decisions_bit_for_bit() -> None:
    first, again = (replay(TRACE, 300, Pace(5000, 20)) for _ in range(2))
    assert first.decisions == again.decisions
    assert (first.hits, first.evicted) == (again.hits, again.evicted)
    assert first.decisions != replay(TRACE, 301, Pace(5000, 20)).decisions


def test_the_decisions_of_upstreams_order_are_what_they_have_always_been() -> None:
    decisions = replay(TRACE, 300, Pace(5000, 20)).decisions
    assert decisions == "16d8368e625eb591e5157f6f494253f5eb36b5fa28793cb5829b2ac2071a725a"


class Fails:
    """A policy that fails at its fourth request."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses

    def arrive(self, use: int, keys: Keys, stop: int, hits: int) -> int:
        return 1 // (4 - use) - 1


@pytest.mark.parametrize("run", [replay, partial(replay_with_disk, disk_blocks=100)])
def test_a_policy_that_fails_is_no_result(run: Callable[..., Outcome]) -> None:
    with pytest.raises(KvbmError, match="the eviction policy failed"):
        run(TRACE, 100, policy=Fails)


@pytest.mark.parametrize("capacity", [40, 200, 1000])
def test_the_hits_are_those_of_exact_lru_within_half_a_point(capacity: int) -> None:
    outcome = replay(TRACE, capacity)
    assert outcome.evicted > 0
    assert abs(outcome.hits - lru_hits(TRACE, capacity)) <= 0.005 * TRACE.references


@pytest.mark.parametrize("capacity", [60, 100, 200, 400])
@pytest.mark.parametrize("seed", range(3))
def test_with_answers_that_are_used_and_generated_again_the_hits_are_those_of_exact_lru(
    seed: int, capacity: int
) -> None:
    trace = talks(seed)
    outcome = replay(trace, capacity)
    assert outcome.evicted > 0
    assert outcome.hits == lru_hits(trace, capacity)


def test_a_block_of_an_answer_that_is_there_already_is_neither_stored_nor_left_out() -> None:
    trace = talks(0)
    assert len({r.chain[-1] for r in trace.requests if r.generated}) < len(
        [r for r in trace.requests if r.generated]
    )
    outcome = replay(trace, trace.distinct)
    assert (outcome.stored, outcome.skipped) == (trace.distinct, 0)
    assert outcome.hits == unbounded_hits(trace, 0)


def test_a_table_that_is_large_enough_hits_all_that_can_be_hit_and_evicts_nothing() -> None:
    outcome = replay(TRACE, TRACE.distinct)
    assert outcome.hits == unbounded_hits(TRACE, 0)
    assert (outcome.evicted, outcome.skipped) == (0, 0)
    assert outcome.stored == TRACE.distinct


def test_each_reference_is_a_hit_or_stored_or_not_stored() -> None:
    for pace in (Pace(), Pace(2000, 50)):
        outcome = replay(TRACE, 60, pace)
        assert outcome.hits + outcome.stored + outcome.skipped == outcome.references


def test_blocks_of_running_requests_are_not_evicted() -> None:
    long_answer = Request(0, 1024, 1000, [1, 2])
    others = [Request(1 + i, 512, 0, [10 + i]) for i in range(3)]
    trace = Trace("t", [long_answer, *others, Request(10, 1024, 0, [1, 2])], 512)
    assert replay(trace, 2).hits == 0
    held = replay(trace, 2, Pace(decode_ms=1))
    assert (held.hits, held.skipped) == (2, 3)


def test_every_call_is_timed() -> None:
    outcome = replay(TRACE, 100)
    assert {call: len(us) for call, us in outcome.latency_us.items()} == dict.fromkeys(
        CALLS, len(TRACE.requests)
    )
    assert outcome.references_s > 0


def test_progress_adds_up_to_all_references() -> None:
    steps: list[int] = []
    replay(TRACE, 100, progress=steps.append)
    assert sum(steps) == TRACE.references


def test_an_impossible_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity 0: 1 to"):
        replay(TRACE, 0)


def test_blocks_of_answers_are_stored_and_hits_are_counted_on_prompts() -> None:
    first = Request(0, 512, 512, [1], (2,))
    second = Request(9, 1536, 0, [1, 2, 3])
    outcome = replay(Trace("t", [first, second], 512), 10)
    assert (outcome.references, outcome.hits, outcome.stored) == (4, 2, 3)
