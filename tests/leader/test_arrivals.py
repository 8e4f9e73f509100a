# SPDX-License-Identifier: Apache-2.0
"""Requests that wait for what another engine stores at this moment, on real segments."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment
from kvbm.instance import remove
from kvbm.leader.arrivals import SECS_MAX, TOKENS_MIN, UNMEASURED_TOKENS_PER_SEC, Arrivals
from kvbm.leader.load_failures import FAILURES_IN_A_ROW
from kvbm.leader.sequences import TrackedSequence
from tests.engines import MakeEngine
from tests.fast.instances import digests
from tests.leader.test_rates import Clock
from tests.small_engine import BLOCK_TOKENS, SmallEngine, unique_engine_id

COUNT = 2 * TOKENS_MIN // BLOCK_TOKENS
BLOCKS = list(range(COUNT))
TARGETS = list(range(COUNT, 2 * COUNT))
RATE = 1000.0
HALF_S = TOKENS_MIN / RATE
"""To compute half of the blocks."""


class Pair(NamedTuple):
    """Two engines of one instance; the second one's clock and rate are the test's."""

    first: SmallEngine
    second: SmallEngine
    clock: Clock

    def begin(self, upto: int = COUNT, request: str = "a") -> TrackedSequence:
        """The first engine begins to store; nothing is copied before its next step."""
        sequence = self.first.track(request, COUNT)
        self.first.place(sequence, BLOCKS)
        self.first.leader.store(sequence, upto)
        return sequence

    def end(self) -> None:
        """Its step computes and copies; afterwards these blocks are published."""
        self.first.step(lambda: self.first.fill(BLOCKS))
        self.first.run_until(lambda: not self.first.leader.storing())

    def ask(self, sequence: TrackedSequence) -> int | None:
        """Ask the second engine, as its scheduler does."""
        return self.second.leader.look_up(sequence, 0, COUNT)


@pytest.fixture(params=[1, 2], ids=["1 group", "2 groups"])
def pair(make_engine: MakeEngine, request: pytest.FixtureRequest) -> Iterator[Pair]:
    name = f"arrivals-{unique_engine_id()}"
    slots = 2 * COUNT * request.param
    first, second = (
        make_engine(slots, instance=name, groups=request.param, device_blocks=2 * COUNT)
        for _ in range(2)
    )
    clock = Clock()
    leader = second.leader
    leader.prefill.tokens_per_sec = RATE
    leader.arrivals = Arrivals(leader.table, BLOCK_TOKENS, leader.prefill, clock)
    yield Pair(first, second, clock)
    for request in list(leader.sequences):  # an engine proves at its end that nothing is held
        leader.abandon(request)
    for engine in (first, second):
        engine.close()
    remove(name)


def test_what_another_engine_stores_is_waited_for_and_loaded(pair: Pair) -> None:
    pair.begin()
    sequence = pair.second.track("b", COUNT)
    assert [pair.ask(sequence) for _ in range(3)] == [None] * 3
    assert pair.second.leader.table.held() == {}
    pair.end()
    assert pair.ask(sequence) == COUNT
    pair.second.place(sequence, TARGETS)
    pair.second.leader.load(sequence, COUNT)
    pair.second.run_until(lambda: "b" in pair.second.received)
    assert pair.second.values(TARGETS) == [1.0 + block for block in BLOCKS]


def test_what_the_engine_itself_stores_for_another_request_is_waited_for(pair: Pair) -> None:
    pair.begin()
    assert pair.first.leader.look_up(pair.first.track("c", COUNT), 0, COUNT) is None
    pair.end()


def test_the_wait_is_as_long_as_computing_the_same_would_take(pair: Pair) -> None:
    pair.begin()
    sequence = pair.second.track("b", COUNT)
    assert pair.ask(sequence) is None
    pair.clock.now += 2 * HALF_S - 0.01
    assert pair.ask(sequence) is None
    pair.clock.now += 0.01
    assert pair.ask(sequence) == 0
    pair.clock.now -= HALF_S
    assert pair.ask(sequence) == 0, "it has waited in this admission"
    pair.second.leader.preempt("b")
    assert pair.ask(sequence) is None
    pair.end()


def test_a_prefill_in_chunks_is_followed_while_it_is_as_fast_as_ours(pair: Pair) -> None:
    sequence = pair.begin(COUNT // 2)
    waiting = pair.second.track("b", COUNT)
    assert pair.ask(waiting) is None
    pair.clock.now += HALF_S - 0.01
    assert pair.ask(waiting) is None
    pair.end()
    pair.first.leader.store(sequence, COUNT)
    pair.clock.now += HALF_S - 0.01
    assert pair.ask(waiting) is None
    pair.clock.now += 0.03
    assert pair.ask(waiting) == COUNT // 2
    pair.end()


def test_no_wait_is_longer_than_its_bound_whatever_the_rate(pair: Pair) -> None:
    pair.begin()
    pair.second.leader.prefill.tokens_per_sec = 1e-9
    sequence = pair.second.track("b", COUNT)
    assert pair.ask(sequence) is None
    pair.clock.now += SECS_MAX
    assert pair.ask(sequence) == 0
    pair.end()


def test_an_engine_that_has_computed_nothing_yet_counts_as_fast(pair: Pair) -> None:
    pair.begin()
    pair.second.leader.prefill.tokens_per_sec = 0.0
    sequence = pair.second.track("b", COUNT)
    assert pair.ask(sequence) is None
    pair.clock.now += 1.01 * COUNT * BLOCK_TOKENS / UNMEASURED_TOKENS_PER_SEC
    assert pair.ask(sequence) == 0
    pair.end()


def test_a_few_blocks_are_computed_and_not_waited_for(pair: Pair) -> None:
    few = TOKENS_MIN // BLOCK_TOKENS - 1
    pair.begin(few)
    assert pair.ask(pair.second.track("b", COUNT)) == 0
    pair.end()


def test_nobody_waits_while_nothing_is_loaded(pair: Pair) -> None:
    pair.begin()
    for _ in range(FAILURES_IN_A_ROW):
        pair.second.leader.failures.failed()
    assert pair.ask(pair.second.track("b", COUNT)) == 0
    pair.end()


def test_blocks_that_are_avoided_are_not_waited_for(pair: Pair) -> None:
    pair.begin()
    sequence = pair.second.track("b", COUNT)
    pair.second.leader.failures.avoid(0, sequence.groups[0].keys, 0)
    assert pair.ask(sequence) == 0
    pair.end()


def fill_and_wait_to_be_killed(name: str) -> None:
    """A process that reserves the chain and then does nothing."""
    segment = Segment.attach(name)
    claim_leader(segment, os.getpid())
    OperationTable(segment).reserve(Keys(digests(COUNT)), 0, COUNT)
    signal.pause()


def test_the_death_of_who_stores_ends_the_wait_at_once(engine: SmallEngine) -> None:
    leader = engine.leader
    sequence = engine.track("b", COUNT)
    child = os.fork()
    if child == 0:
        try:
            fill_and_wait_to_be_killed(engine.segment.name)
        finally:
            os._exit(1)
    try:
        keys = sequence.groups[0].keys
        engine.run_until(lambda: leader.table.filling(keys, 0, COUNT)[0] == COUNT)
        leader.prefill.tokens_per_sec = 1e-9
        assert leader.look_up(sequence, 0, COUNT) is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert leader.look_up(sequence, 0, COUNT) == 0
    assert leader.table.filling(keys, 0, COUNT)[0] == COUNT, "before anybody has recovered"
    assert recover(engine.segment)
    assert leader.table.filling(keys, 0, COUNT) == (0, None)
