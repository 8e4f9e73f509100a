# SPDX-License-Identifier: Apache-2.0
"""The worker: steps, reports and threads, with a real arena and copy thread."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from kvbm._fast.segment import Segment
from kvbm.errors import GeometryError, SegmentInUse
from kvbm.instance import segment_name
from kvbm.step import LoadOrder, StepMetadata
from kvbm.tiers.host import HostArena
from kvbm.transfer.geometry import geometry_of
from kvbm.worker.worker import Worker, WorkerPlace
from tests.engines import MakeEngine
from tests.leaks import wait_until
from tests.small_engine import KvCache, settings_for


def stop_copy_thread(worker: Worker) -> None:
    """End the copy thread as an error in it would."""
    assert worker.loop is not None
    worker.loop.stop()
    assert wait_until(lambda: not worker.copying)


# ---- steps ---------------------------------------------------------------------------------------
def test_steps_that_came_before_the_segment_are_made_up_for(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    worker = engine.start_worker()
    worker.bind(StepMetadata(step=4))
    worker.filled()
    worker.bind(StepMetadata(step=5))
    leader = engine.start_leader()
    engine.wait_until_attached()
    leader._next = StepMetadata(step=4)
    sequence = engine.track("first", 1)
    engine.place(sequence, [1])
    engine.fill([1], 9)
    leader.store(sequence, 1)  # of step 4, which is filled
    assert wait_until(lambda: leader.collect() or not sequence.stores)
    assert engine.counter("published") == 1


def test_a_message_without_a_step_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    worker = engine.workers[0]
    worker.bind(StepMetadata())
    worker.filled()
    assert (worker.ended_stores(), worker.ended_loads()) == (set(), {})


def test_each_load_and_store_is_told_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    worker = engine.workers[0]
    engine.store("first", [1, 2])
    engine.load("second", [10, 11])
    worker.bind(engine.leader.build_step())
    told: list[str] = []
    assert wait_until(lambda: told.extend(worker.ended_loads()) or told)
    assert told == ["second"]
    assert worker.ended_loads() == {}
    engine.leader.loads_ended(told)


def test_an_order_that_failed_is_told_with_all_its_blocks(make_engine: MakeEngine) -> None:
    worker = make_engine().workers[0]
    order = LoadOrder([], [3, 4, 5], failed=True)
    worker.bind(StepMetadata(step=1, loads={"request": order}))
    assert worker.ended_loads() == {"request": [3, 4, 5]}


# ---- copies that do not happen -------------------------------------------------------------------
def test_without_a_copy_thread_loads_and_stores_end_at_once_as_failed(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(ranks=2)
    engine.store("first", [1, 2])
    stop_copy_thread(engine.workers[1])
    engine.load("second", [10, 11])
    storing = engine.track("third", 2, seed="other")
    engine.place(storing, [3, 4])
    engine.leader.store(storing, 2)
    metadata = engine.leader.build_step()
    held = engine.leader.finish("third", 2)
    assert held
    engine.bind(metadata)
    engine.output()
    engine.run_until(lambda: "second" in engine.received and "third" in engine.sent)
    assert {10, 11} <= engine.missing
    assert engine.counter("loads_failed") == 1


def test_an_arena_that_cannot_be_opened_fails_copies_and_nothing_else(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(start=False)
    monkeypatch.setattr(Worker, "_open_arena", lambda *_: 1 // 0)
    with caplog.at_level(logging.ERROR, "kvbm"):
        worker = engine.start_worker()
        engine.start_leader()
        assert wait_until(lambda: worker.loop is not None)
    assert worker.copying
    assert "arena cannot be used" in caplog.text
    sequence = engine.track("first", 2)
    engine.place(sequence, [1, 2])
    engine.leader.store(sequence, 2)
    engine.step()
    assert engine.leader.match(sequence, 0, 2) == 0
    assert not engine.leader.finish("first", 2)


def test_without_a_leader_the_worker_gives_up_and_loads_are_failed(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(start=False, leader_worker_init_timeout_secs=1)
    worker = engine.start_worker()
    order = LoadOrder([7], [3, 4])
    worker.bind(StepMetadata(step=1, loads={"request": order}, held={"other": [9]}))
    assert worker.ended_loads() == {}
    assert wait_until(lambda: not worker.copying)
    assert "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS=1" in caplog.text
    assert worker.ended_loads() == {"request": [3, 4]}
    assert worker.ended_stores() == {"other"}


def test_operations_that_cannot_be_looked_at_are_told_as_failed(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    worker = make_engine().workers[0]
    nonsense = LoadOrder([1 << 20], [5], failed=False)
    worker.bind(StepMetadata(step=1, loads={"request": nonsense}, held={"other": [1 << 20]}))
    assert worker.ended_loads() == {"request": [5]}
    assert worker.ended_stores() == {"other"}
    caplog.clear()  # the tracebacks in it refer to the arena's memory


def test_stopping_operations_that_are_over_is_harmless(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.store("first", [1, 2])
    worker = engine.workers[0]
    worker.stop_copies(StepMetadata(step=9, stop=[0]))
    worker.stop_copies(StepMetadata(step=9, stop=[0]))
    assert worker.copying


# ---- start and end -------------------------------------------------------------------------------
def test_groups_with_blocks_of_different_shapes_are_refused() -> None:
    small, large = KvCache(8, 2), KvCache(8, 2, row=64)
    geometries = [geometry_of(cache.tensors(0, 2), 8) for cache in (small, large)]
    place = WorkerPlace("p-0123456789abcdef", "engine", 0, 1)
    with pytest.raises(GeometryError, match="different shapes"):
        Worker(place, settings_for(4), geometries)


def test_a_second_engine_cannot_take_a_private_arena(make_engine: MakeEngine) -> None:
    engine = make_engine()
    cache = KvCache(8, 2)
    with pytest.raises(SegmentInUse, match=r"host\.0"):
        Worker(engine.workers[0].place, settings_for(4), [geometry_of(cache.tensors(0, 2), 8)])


def test_closing_twice_leaves_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.close()
    worker = engine.workers[0]
    worker.close()
    assert not worker.copying
    with pytest.raises(FileNotFoundError):
        Segment.attach(segment_name(engine.instance))


def test_a_worker_that_is_closed_before_its_leader_came_ends(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    worker = engine.start_worker()
    worker.close()
    assert not worker.copying
    assert worker.segment is None


def test_a_worker_that_is_closed_while_it_opens_its_arena_waits_for_its_threads(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(start=False)
    opening, go_on, reserved = threading.Event(), threading.Event(), threading.Event()
    real = Worker._open_arena

    def slowly(worker: Worker, segment: Segment) -> Any:
        opening.set()
        go_on.wait(20.0)
        return real(worker, segment)

    monkeypatch.setattr(Worker, "_open_arena", slowly)
    monkeypatch.setattr(HostArena, "reserve", lambda *_: reserved.wait(20.0))
    worker = engine.start_worker()
    engine.start_leader()
    assert opening.wait(20.0)
    closing = threading.Thread(target=worker.close)
    closing.start()
    assert wait_until(worker._closing.is_set)
    go_on.set()
    assert wait_until(lambda: not worker._copies.is_alive())
    closing.join(0.2)
    assert worker.segment is not None  # the thread that reserves memory still uses it
    reserved.set()
    closing.join()
    assert worker.segment is None


def test_all_slots_are_usable_after_a_while_and_the_engine_need_not_wait(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(host_slots=500)
    assert engine.segment.ready_slots(0) == 500
