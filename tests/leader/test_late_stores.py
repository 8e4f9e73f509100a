# SPDX-License-Identifier: Apache-2.0
"""More requests than operations: nothing is lost, stores come later, and nobody waits for long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvbm.leader.late_stores
from kvbm._fast.keys import Keys
from kvbm.leader.late_stores import LATE_SECS, LateStores
from kvbm.leader.sequences import GroupBlocks, TrackedSequence
from tests.fast.instances import digests
from tests.small_engine import DEADLINE_S, SmallEngine

MANY = 256  # twice the operations of a leader
EACH = 2  # blocks of a request


@pytest.fixture
def engine() -> Iterator[SmallEngine]:
    """An engine that holds the blocks of all requests, on the device and on the host."""
    made = SmallEngine(MANY * EACH + 8, device_blocks=MANY * EACH)
    yield made
    made.close()


def blocks_of(number: int) -> list[int]:
    """Device blocks of a request."""
    return list(range(number * EACH, (number + 1) * EACH))


def prefill_all(engine: SmallEngine, finish: bool) -> list[str]:
    """All requests complete their prompts in one step; with `finish` they end with it.

    No copy has begun when they end, as on an engine that is faster than its copies. Returns those
    that keep their device blocks.
    """
    for number in range(MANY):
        sequence = engine.track(f"{number}", EACH, seed=number)
        engine.place(sequence, blocks_of(number))
        engine.leader.store(sequence, EACH)
    engine.bind(engine.leader.build_step())
    engine.fill(range(MANY * EACH), 1.0)
    kept = [str(n) for n in range(MANY) if finish and engine.leader.finish(str(n), EACH)]
    engine.output()
    return kept


def assert_all_cached(engine: SmallEngine) -> None:
    """Fail unless the blocks of each request are cached, with what its forward pass wrote."""
    assert engine.counter("published") == MANY * EACH
    for cache in engine.caches:
        for block in range(MANY * EACH):
            cache.write(block, 0)
    for first in range(0, MANY, 64):
        names = [f"load {number}" for number in range(first, first + 64)]
        for number, name in enumerate(names, first):
            engine.load(name, blocks_of(number), seed=number)
        engine.run_until(lambda names=names: engine.received >= set(names))
        for name in names:
            engine.leader.finish(name, 0)
    assert engine.values(range(MANY * EACH)) == [1.0 + block for block in range(MANY * EACH)]


def test_256_requests_that_end_with_their_prefill_are_all_stored(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvbm.leader.late_stores, "LATE_SECS", DEADLINE_S)  # on any machine
    kept = prefill_all(engine, finish=True)
    assert len(kept) == MANY
    assert engine.counter("skipped_no_operation") > 0
    engine.run_until(lambda: engine.sent >= set(kept))
    engine.run_until(lambda: not engine.leader.holds_device_blocks)
    assert_all_cached(engine)


def test_256_requests_that_go_on_store_the_rest_in_later_steps(engine: SmallEngine) -> None:
    prefill_all(engine, finish=False)

    def store_again() -> bool:
        for sequence in engine.leader.sequences.values():
            engine.leader.store(sequence, EACH)
        return engine.counter("published") == MANY * EACH

    engine.run_until(store_again)
    for number in range(MANY):
        engine.leader.finish(str(number), EACH)
    engine.run_until(lambda: not engine.leader.holds_device_blocks)
    assert_all_cached(engine)


def test_a_reset_lets_go_of_those_who_wait(engine: SmallEngine) -> None:
    kept = prefill_all(engine, finish=True)
    assert len(engine.leader._late) > 0
    engine.leader.reset()
    engine.step()
    assert len(engine.leader._late) == 0
    engine.run_until(lambda: engine.sent >= set(kept))
    assert engine.leader.match(engine.track("again", EACH, seed=MANY - 1), 0, EACH) == 0


def test_a_late_store_that_fails_gives_the_device_blocks_back(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = prefill_all(engine, finish=True)
    waiting = len(engine.leader._late)
    monkeypatch.setattr(engine.leader, "_store", lambda *_: 1 // 0)
    engine.run_until(lambda: engine.sent >= set(kept))
    assert engine.counter("errors") == waiting > 0


class NoOperation:
    """A table that is always full."""

    def free_operations(self) -> int:
        return 0


def test_nobody_waits_longer_than_the_bound() -> None:
    now = [0.0]
    late = LateStores(NoOperation(), lambda: now[0])  # type: ignore[arg-type]
    sequence = TrackedSequence("request", [GroupBlocks(Keys(digests(EACH)), [1, 2])])
    assert late.waits(sequence, EACH)
    now[0] = LATE_SECS - 0.01
    assert late.retry(lambda *_: None) == []
    now[0] = LATE_SECS
    assert late.retry(lambda *_: None) == [sequence]
    assert len(late) == 0


@pytest.mark.parametrize("stored", [EACH, 0])
def test_only_what_lacks_an_operation_waits(stored: int) -> None:
    late = LateStores(NoOperation())  # type: ignore[arg-type]
    sequence = TrackedSequence("request", [GroupBlocks(Keys(digests(EACH)), [1, 2], stored)])
    assert late.waits(sequence, EACH) == (stored == 0)
    sequence.stale = True
    assert not late.waits(sequence, EACH)
