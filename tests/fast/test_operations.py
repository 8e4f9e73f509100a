# SPDX-License-Identifier: Apache-2.0
"""One word decides about an operation: who may begin, who ends it, what becomes of it."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.segment import Segment
from tests.fast.instances import Instance, digests, instance
from tests.fast.raw_segment import (
    CANCELLED,
    COMPLETE,
    DONE,
    FAILED,
    FINISHING,
    FREE,
    PENDING,
    RANK_FAILED,
    RANKS,
    RUNNING,
    SUBMITTED,
    RawSegment,
)
from tests.leaks import wait_until

Make = Callable[..., Instance]


class World(NamedTuple):
    """A leader and its workers."""

    made: Instance
    table: OperationTable
    workers: list[Segment]

    def store(self, count: int = 2, seed: object = 0) -> int:
        """Submit a store of `count` blocks."""
        keys = Keys(digests(count, seed))
        (handle,), upto, _ = self.table.store(keys, 0, count, list(range(count)), None, 1)
        assert upto == count
        return handle

    def state(self, handle: int) -> int:
        return self.made.raw.operation_state(0, handle & 0xFFFFFFFF)

    def ranks(self, handle: int) -> tuple[int, ...]:
        return self.made.raw.operation(0, handle & 0xFFFFFFFF).ranks[: len(self.workers)]


def world_of(made: Instance) -> World:
    table = made.leader()
    return World(made, table, [made.worker(0, rank) for rank in range(made.shape.ranks)])


@pytest.fixture(params=[1, 2, 3])
def world(make_instance: Make, request: pytest.FixtureRequest) -> World:
    return world_of(make_instance(32, ranks=request.param))


@pytest.fixture
def pair(make_instance: Make) -> World:
    return world_of(make_instance(32, ranks=2))


def test_ranks_that_the_instance_does_not_have_count_as_done(world: World) -> None:
    handle = world.store()
    operation = world.made.raw.operation(0, handle)
    ranks = len(world.workers)
    assert operation.state == SUBMITTED
    assert operation.ranks == (PENDING,) * ranks + (DONE,) * (RANKS - ranks)
    world.table.cancel(handle)
    assert world.table.collect(handle) is False


def test_each_ring_carries_each_operation_once_and_in_order(probe: Any, world: World) -> None:
    handles = [world.store(seed=i) for i in range(5)]
    for rank, worker in enumerate(world.workers):
        assert [probe.pop(worker, rank) for _ in range(5)] == handles
        assert probe.pop(worker, rank) is None
    for handle in handles:
        world.table.cancel(handle)
        assert world.table.collect(handle) is False


def test_a_rank_claims_an_operation_once(probe: Any, pair: World) -> None:
    handle = pair.store()
    assert probe.claim(pair.workers[1], handle, 1)
    assert not probe.claim(pair.workers[1], handle, 1)
    assert pair.ranks(handle) == (PENDING, RUNNING)
    pair.table.cancel(handle)
    assert probe.end(pair.workers[1], handle, 1, False) == "ended"
    assert pair.table.collect(handle) is False


def test_only_the_named_generation_can_be_claimed(probe: Any, pair: World) -> None:
    handle = pair.store()
    for other in (handle + (1 << 32), handle | 0xFFFFFF << 32):
        assert not probe.claim(pair.workers[0], other, 0)
    assert pair.ranks(handle) == (PENDING, PENDING)
    pair.table.cancel(handle)
    assert pair.table.collect(handle) is False
    assert not probe.claim(pair.workers[0], handle, 0)


def test_the_last_rank_publishes_whatever_the_order(probe: Any, world: World) -> None:
    ranks = list(range(len(world.workers)))
    for turn, order in enumerate((ranks, ranks[::-1])):
        handle = world.store(seed=turn)
        for rank in ranks:
            assert probe.claim(world.workers[rank], handle, rank)
        for rank in order[:-1]:
            assert probe.end(world.workers[rank], handle, rank, True) == "running"
            assert world.table.collect(handle) is None
        last = order[-1]
        assert probe.end(world.workers[last], handle, last, True) == "publish"
        operation = world.made.raw.operation(0, handle & 0xFFFFFFFF)
        assert (operation.state, operation.finisher) == (FINISHING, last)
        assert world.table.collect(handle) is None
        probe.publish_operation(world.workers[last], handle)
        probe.finish_operation(world.workers[last], handle)
        assert world.state(handle) == COMPLETE
        assert world.table.collect(handle) is True
    assert world.made.creator.counters()["stores"] == 2
    assert world.made.creator.counters()["published"] == 4


def test_one_failed_rank_fails_the_operation_once_all_have_ended(probe: Any, pair: World) -> None:
    for failing in (0, 1):
        handle = pair.store(seed=failing)
        for rank in (0, 1):
            assert probe.claim(pair.workers[rank], handle, rank)
        assert probe.end(pair.workers[0], handle, 0, failing != 0) == "running"
        assert pair.table.collect(handle) is None
        assert probe.end(pair.workers[1], handle, 1, failing != 1) == "ended"
        assert pair.state(handle) == FAILED
        assert pair.table.collect(handle) is False
    assert pair.made.creator.counters()["stores_failed"] == 2
    assert pair.made.creator.free_blocks() == 32


def test_a_rank_ends_once(probe: Any, pair: World) -> None:
    handle = pair.store()
    probe.claim(pair.workers[0], handle, 0)
    probe.claim(pair.workers[1], handle, 1)
    assert probe.end(pair.workers[0], handle, 0, False) == "running"
    assert probe.end(pair.workers[0], handle, 0, True) == "ended"
    assert pair.ranks(handle) == (RANK_FAILED, RUNNING)
    assert probe.end(pair.workers[1], handle, 1, True) == "ended"
    assert pair.table.collect(handle) is False


def test_a_cancelled_operation_that_nobody_began_has_failed_at_once(
    probe: Any, world: World
) -> None:
    handle = world.store()
    world.table.cancel(handle)
    assert world.state(handle) == FAILED
    for rank, worker in enumerate(world.workers):
        assert not probe.claim(worker, handle, rank)
    assert world.table.collect(handle) is False
    counters = world.made.creator.counters()
    assert (counters["stores_cancelled"], counters["stores_failed"]) == (1, 0)


def test_cancelling_waits_for_the_ranks_that_copy(probe: Any, pair: World) -> None:
    handle = pair.store()
    probe.claim(pair.workers[0], handle, 0)
    pair.table.cancel(handle)
    assert (pair.state(handle), pair.ranks(handle)) == (CANCELLED, (RUNNING, RANK_FAILED))
    assert pair.table.collect(handle) is None
    assert not probe.claim(pair.workers[1], handle, 1)
    assert probe.end(pair.workers[0], handle, 0, True) == "ended"
    assert pair.table.collect(handle) is False
    counters = pair.made.creator.counters()
    assert (counters["stores_cancelled"], counters["stores_failed"]) == (1, 0)


def test_cancelling_what_all_ranks_copy_leaves_the_result_to_them(probe: Any, pair: World) -> None:
    for done in (True, False):
        handle = pair.store(seed=done)
        for rank in (0, 1):
            probe.claim(pair.workers[rank], handle, rank)
        pair.table.cancel(handle)
        assert probe.end(pair.workers[0], handle, 0, True) == "running"
        assert probe.end(pair.workers[1], handle, 1, done) == ("publish" if done else "ended")
        if done:
            probe.publish_operation(pair.workers[1], handle)
            probe.finish_operation(pair.workers[1], handle)
        assert pair.table.collect(handle) is done


def test_cancelling_twice_or_too_late_changes_nothing(probe: Any, pair: World) -> None:
    handle = pair.store()
    for rank in (0, 1):
        probe.claim(pair.workers[rank], handle, rank)
        probe.end(pair.workers[rank], handle, rank, True)
    pair.table.cancel(handle)
    assert pair.state(handle) == FINISHING
    probe.publish_operation(pair.workers[1], handle)
    probe.finish_operation(pair.workers[1], handle)
    pair.table.cancel(handle)
    assert pair.table.collect(handle) is True
    probe.cancel(pair.table.segment, handle)
    assert pair.state(handle) == FREE


def test_a_recycled_operation_has_the_next_generation_and_wraps(pair: World) -> None:
    with RawSegment(pair.made.name, writable=True) as raw:
        for index in range(128):
            raw.put_u64(raw.operation_at(0, index), 0xFFFFFF << 32)
    first = pair.store()
    assert first >> 32 == 0xFFFFFF
    pair.table.cancel(first)
    assert pair.table.collect(first) is False
    assert pair.made.raw.u64(pair.made.raw.operation_at(0, first & 0xFFFFFFFF)) == 0


def test_what_a_worker_did_not_publish_the_leader_publishes(probe: Any, pair: World) -> None:
    """A recovery that is under way when the last rank ends makes it decline."""
    handle = pair.store(4)
    for rank in (0, 1):
        probe.claim(pair.workers[rank], handle, rank)
        probe.end(pair.workers[rank], handle, rank, True)
    with RawSegment(pair.made.name, writable=True) as raw:
        raw.put_u32(192, 1)
        probe.publish_operation(pair.workers[1], handle)
        probe.finish_operation(pair.workers[1], handle)
        assert pair.table.collect(handle) is None
        raw.put_u32(192, 0)
    assert pair.table.collect(handle) is True
    count, ref = pair.table.match(Keys(digests(4)), 0, 4)
    assert count == 4
    pair.table.unpin(ref or 0)


@pytest.mark.parametrize("kind", ["stores", "loads"])
def test_ends_are_counted_by_kind_and_result(probe: Any, world: World, kind: str) -> None:
    handle = world.store(3)
    run(probe, world, handle)
    assert world.table.collect(handle) is True
    counters = world.made.creator.counters()
    assert (counters["stores"], counters["blocks_stored"]) == (1, 3)
    _, ref = world.table.match(Keys(digests(3)), 0, 3)
    for done in (True, False):
        (load,) = world.table.load(ref or 0, 0, [5, 6, 7], 2) or []
        run(probe, world, load, done)
        assert world.table.collect(load) is done
    (load,) = world.table.load(ref or 0, 0, [5, 6, 7], 2) or []
    world.table.cancel(load)
    assert world.table.collect(load) is False
    world.table.unpin(ref or 0)
    counters = world.made.creator.counters()
    assert (counters["loads"], counters["blocks_loaded"], counters["loads_failed"]) == (1, 3, 1)
    assert (counters["loads_cancelled"], counters["stores_cancelled"]) == (1, 0)
    assert counters[kind] == 1


def run(probe: Any, world: World, handle: int, done: bool = True) -> None:
    """What the copy threads do, without copies."""
    for rank, worker in enumerate(world.workers):
        while probe.pop(worker, rank) is not None:
            pass
        assert probe.claim(worker, handle, rank)
        if probe.end(worker, handle, rank, done) == "publish":
            probe.publish_operation(worker, handle)
            probe.finish_operation(worker, handle)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["claim", "done", "fail", "cancel", "collect"]), st.integers(0, 2)),
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(ranks=st.integers(1, 3), events=EVENTS)
def test_the_result_is_what_the_ranks_say(
    probe: Any, ranks: int, events: list[tuple[str, int]]
) -> None:
    made = instance(8, ranks=ranks)
    try:
        world = world_of(made)
        handle = world.store()
        states = [PENDING] * ranks
        fate = SUBMITTED
        for event, number in events:
            rank = number % ranks
            expected = fate_after(event, rank, states, fate)
            apply(probe, world, handle, event, rank, fate)
            fate = expected
            assert (world.state(handle), world.ranks(handle)) == (fate, tuple(states))
        finish(probe, world, handle, states)
        assert world.table.collect(handle) is (states == [DONE] * ranks)
        made.prove()
    finally:
        made.remove()


def fate_after(event: str, rank: int, states: list[int], fate: int) -> int:
    """Move `states` as the event does; the state of the operation afterwards."""
    if fate not in (SUBMITTED, CANCELLED):
        return fate
    if event == "claim" and states[rank] == PENDING and fate == SUBMITTED:
        states[rank] = RUNNING
    elif event in ("done", "fail") and states[rank] == RUNNING:
        states[rank] = DONE if event == "done" else RANK_FAILED
    elif event == "cancel" and fate == SUBMITTED:
        states[:] = [RANK_FAILED if state == PENDING else state for state in states]
        fate = CANCELLED
    if all(state in (DONE, RANK_FAILED) for state in states):
        return FAILED if RANK_FAILED in states else FINISHING
    return fate


def apply(probe: Any, world: World, handle: int, event: str, rank: int, fate: int) -> None:
    if event == "claim":
        probe.claim(world.workers[rank], handle, rank)
    elif event == "cancel":
        world.table.cancel(handle)
    elif event == "collect" and fate in (SUBMITTED, CANCELLED, FINISHING):
        assert world.table.collect(handle) is None
    elif event in ("done", "fail"):
        probe.end(world.workers[rank], handle, rank, event == "done")


def finish(probe: Any, world: World, handle: int, states: list[int]) -> None:
    """Bring an operation to its end: what is pending does not begin."""
    world.table.cancel(handle)
    for rank, worker in enumerate(world.workers):
        if states[rank] in (PENDING, RUNNING):
            states[rank] = RANK_FAILED
            probe.end(worker, handle, rank, False)
    if world.state(handle) == FINISHING:
        probe.publish_operation(world.workers[0], handle)
        probe.finish_operation(world.workers[0], handle)


def test_a_doorbell_wakes_who_sleeps_on_it(probe: Any, pair: World) -> None:
    seen = probe.bell(pair.workers[0], 0, 1)
    ready = threading.Event()

    def sleep() -> None:
        ready.set()
        probe.wait(pair.workers[1], 0, 1, seen, 60_000_000_000)

    thread = threading.Thread(target=sleep)
    thread.start()
    ready.wait()
    handle = pair.store()
    assert wait_until(lambda: not thread.is_alive())
    thread.join()
    assert probe.bell(pair.workers[1], 0, 1) != seen
    probe.wait(pair.workers[1], 0, 1, seen, 60_000_000_000)  # rung before: does not sleep
    pair.table.cancel(handle)
    assert pair.table.collect(handle) is False


def test_a_wait_on_a_doorbell_ends_without_a_ring(probe: Any, pair: World) -> None:
    seen = probe.bell(pair.workers[0], 0, 0)
    probe.wait(pair.workers[0], 0, 0, seen, 1_000_000)
    assert probe.bell(pair.workers[0], 0, 0) == seen
