# SPDX-License-Identifier: Apache-2.0
"""Reset, deaths and the end of a leader, on a real segment with real workers and copies."""

from __future__ import annotations

import pytest

import kvbm.leader.liveness
from tests.engines import MakeEngine
from tests.leaks import wait_until
from tests.small_engine import SmallEngine


# ---- reset ---------------------------------------------------------------------------------------
def test_after_a_reset_nothing_is_found_and_new_content_is_stored(engine: SmallEngine) -> None:
    engine.store("first", [1, 2])
    assert engine.leader.reset() == 2
    assert engine.leader.match(engine.track("second", 2), 0, 2) == 0
    engine.leader.finish("second", 0)
    engine.store("third", [3, 4], value=50)
    engine.load("fourth", [10, 11])
    engine.run_until(lambda: "fourth" in engine.received)
    assert engine.values([10, 11]) == [50, 51]


def test_what_was_computed_before_a_reset_is_not_stored_after_it(engine: SmallEngine) -> None:
    sequence = engine.track("first", 3)
    engine.place(sequence, [1, 2, 3])
    engine.leader.store(sequence, 2)
    metadata = engine.leader.build_step()  # the copies wait for the forward pass
    engine.leader.reset()
    engine.bind(metadata)
    engine.fill([1, 2, 3])
    engine.output()
    engine.leader.store(sequence, 3)
    engine.step()
    assert not engine.leader.finish("first", 3)
    engine.step()
    assert engine.leader.match(engine.track("second", 3), 0, 3) == 0
    assert engine.counter("published") == 0


def test_a_request_preempted_after_a_reset_is_stored_again(engine: SmallEngine) -> None:
    sequence = engine.track("first", 2)
    engine.place(sequence, [1, 2])
    engine.leader.reset()
    engine.leader.preempt("first")
    engine.place(sequence, [3, 4])
    engine.leader.store(sequence, 2)
    engine.step(lambda: engine.fill([3, 4]))
    engine.run_until(lambda: not sequence.stores)
    assert engine.leader.match(engine.track("second", 2), 0, 2) == 2


def test_a_load_that_runs_during_a_reset_ends_and_is_not_stored_back(engine: SmallEngine) -> None:
    engine.store("first", [1, 2])
    sequence = engine.load("second", [10, 11])
    engine.leader.reset()
    engine.run_until(lambda: "second" in engine.received)
    engine.leader.store(sequence, 2)
    assert sequence.stores == []
    assert engine.leader.table.held() == {}


# ---- workers, errors, end ------------------------------------------------------------------------
def test_nothing_is_matched_or_stored_before_all_workers_are_there(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(ranks=2, start=False)
    engine.start_worker(0)
    second = engine.start_worker(1)
    second.close()  # announced itself, never copies
    engine.start_leader()
    sequence = engine.track("first", 2)
    engine.place(sequence, [1, 2])
    engine.leader.store(sequence, 2)
    assert sequence.stores == []
    assert engine.leader.match(sequence, 0, 2) == 0


def test_the_death_of_a_worker_turns_the_cache_off(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.store("first", [1, 2])
    monkeypatch.setattr(kvbm.leader.liveness, "LIVENESS_SECS", 0.0)
    monkeypatch.setattr(engine.leader.liveness._recoverer, "_look_at", 0.0)
    assert engine.leader.match(engine.track("second", 2), 0, 2) == 2
    engine.workers[0].close()
    assert wait_until(lambda: engine.leader.build_step() and engine.leader.liveness.workers_lost)
    assert engine.leader.match(engine.track("third", 2), 0, 2) == 0


def test_a_step_is_built_although_the_work_between_steps_fails(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.counter("errors")
    monkeypatch.setattr(engine.leader, "collect", lambda: 1 // 0)
    first, second = engine.leader.build_step(), engine.leader.build_step()
    assert second.step == first.step + 1
    assert engine.counter("errors") == before + 2


def test_closing_returns_what_requests_hold(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.store("first", [1, 2])
    engine.leader.match(engine.track("matched", 2), 0, 2)
    engine.load("loading", [10, 11])
    storing = engine.track("storing", 2, seed="other")
    engine.place(storing, [3, 4])
    engine.leader.store(storing, 2)
    leader = engine.leader
    assert leader.sequences
    engine.close()  # proves that nothing is held
    assert not leader.sequences
