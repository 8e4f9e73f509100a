# SPDX-License-Identifier: Apache-2.0
"""Free pools: each index is handed out once, in runs, and comes back."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._fast.segment import Segment
from tests.fast.instances import Instance, instance
from tests.fast.raw_segment import BLOCKS, DISK, HOST

Make = Callable[..., Instance]


def take_all(probe: Any, segment: Segment, pool: int, wanted: int) -> list[tuple[int, int]]:
    """Take runs until the pool is empty."""
    runs, cursor = [], 0
    while True:
        first, count, cursor = probe.take_run(segment, pool, wanted, cursor=cursor)
        if count == 0:
            return runs
        runs.append((first, count))


def give_back(probe: Any, segment: Segment, pool: int, runs: list[tuple[int, int]]) -> None:
    for first, count in runs:
        for i in range(first, first + count):
            probe.give_back(segment, pool, i)


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 127, 128, 4096, 4097])
def test_a_new_pool_has_each_index_below_its_capacity_once(
    make_instance: Make, probe: Any, capacity: int
) -> None:
    made = make_instance(capacity, disk_slots=capacity)
    for pool in (HOST, DISK):
        assert made.raw.free(pool) == set(range(capacity))
        assert probe.free_count(made.creator, pool) == capacity
        runs = take_all(probe, made.creator, pool, 7)
        taken = [first + i for first, count in runs for i in range(count)]
        assert sorted(taken) == list(range(capacity))
        assert made.raw.free(pool) == set()
        give_back(probe, made.creator, pool, runs)
        assert made.raw.free(pool) == set(range(capacity))


def test_a_fresh_pool_is_handed_out_in_ascending_runs_of_the_wanted_length(
    make_instance: Make, probe: Any
) -> None:
    made = make_instance(256)
    runs = take_all(probe, made.creator, HOST, 32)
    assert runs == [(32 * i, 32) for i in range(8)]
    give_back(probe, made.creator, HOST, runs)


@pytest.mark.parametrize("wanted", [1, 5, 63, 64, 65, 1000])
def test_a_run_is_never_longer_than_wanted_nor_crosses_a_word(
    make_instance: Make, probe: Any, wanted: int
) -> None:
    made = make_instance(300)
    runs = take_all(probe, made.creator, HOST, wanted)
    assert all(
        count <= wanted and first // 64 == (first + count - 1) // 64 for first, count in runs
    )
    give_back(probe, made.creator, HOST, runs)


def test_a_run_stops_at_an_index_in_use(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    runs = take_all(probe, made.creator, HOST, 64)
    for i in (3, 4, 5, 9):
        probe.give_back(made.creator, HOST, i)
    assert probe.take_run(made.creator, HOST, 64)[:2] == (3, 3)
    assert probe.take_run(made.creator, HOST, 64)[:2] == (9, 1)
    assert probe.take_run(made.creator, HOST, 64)[1] == 0
    give_back(probe, made.creator, HOST, runs)


@pytest.mark.parametrize("limit", [0, 1, 64, 70, 128, 200])
def test_nothing_at_or_above_the_limit_is_taken(
    make_instance: Make, probe: Any, limit: int
) -> None:
    made = make_instance(128)
    taken: list[int] = []
    while (run := probe.take_run(made.creator, HOST, 9, limit))[1]:
        taken.extend(range(run[0], run[0] + run[1]))
    assert sorted(taken) == list(range(min(limit, 128)))
    for i in taken:
        probe.give_back(made.creator, HOST, i)


def test_nothing_wanted_takes_nothing(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    assert probe.take_run(made.creator, HOST, 0)[1] == 0


def test_an_empty_pool_gives_nothing(make_instance: Make, probe: Any) -> None:
    made = make_instance(64, disk_slots=0)
    assert probe.take_run(made.creator, DISK, 1)[1] == 0
    assert probe.free_count(made.creator, DISK) == 0


def test_giving_back_beyond_the_capacity_changes_nothing(make_instance: Make, probe: Any) -> None:
    made = make_instance(65)
    for index in (65, 127, 128, 2**32 - 1):
        probe.give_back(made.creator, HOST, index)
    assert made.raw.free(HOST) == set(range(65))


def test_a_taker_finds_bits_whatever_its_cursor_says(make_instance: Make, probe: Any) -> None:
    made = make_instance(64 * 64 * 3)
    runs = take_all(probe, made.creator, HOST, 64)
    for index in (0, 64 * 64 + 5, 64 * 64 * 3 - 1):
        for cursor in (0, 1, 2, 77):
            probe.give_back(made.creator, HOST, index)
            assert probe.take_run(made.creator, HOST, 4, cursor=cursor)[:2] == (index, 1)
    give_back(probe, made.creator, HOST, runs)


def test_a_summary_bit_without_free_bits_is_only_a_hint(make_instance: Make, probe: Any) -> None:
    made = make_instance(256)
    runs = take_all(probe, made.creator, HOST, 64)
    assert made.raw.summary(HOST) == set()
    probe.give_back(made.creator, HOST, 200)
    assert made.raw.summary(HOST) == {3}
    assert probe.take_run(made.creator, HOST, 1)[:2] == (200, 1)
    give_back(probe, made.creator, HOST, runs)
    assert made.raw.summary(HOST) == {0, 1, 2, 3}


def test_has_bit_says_what_is_free(make_instance: Make, probe: Any) -> None:
    made = make_instance(64)
    first = probe.take_run(made.creator, BLOCKS, 1)[0]
    assert not probe.has_bit(made.creator, BLOCKS, first)
    probe.give_back(made.creator, BLOCKS, first)
    assert probe.has_bit(made.creator, BLOCKS, first)


def test_set_word_replaces_a_word_and_its_hint(make_instance: Make, probe: Any) -> None:
    made = make_instance(128)
    take_all(probe, made.creator, HOST, 64)
    probe.set_word(made.creator, HOST, 1, 0b1010)
    assert made.raw.free(HOST) == {65, 67}
    assert probe.take_run(made.creator, HOST, 64)[:2] == (65, 1)
    probe.fill(made.creator, HOST)
    assert made.raw.free(HOST) == set(range(128))


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 300),
    moves=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 400)), max_size=60),
    seed=st.integers(0, 2**32),
)
def test_a_pool_agrees_with_a_set(
    probe: Any, capacity: int, moves: list[tuple[int, int]], seed: int
) -> None:
    made = instance(capacity)
    try:
        rng = random.Random(seed)
        free, taken = set(range(capacity)), []
        for wanted, limit in moves:
            if taken and rng.random() < 0.4:
                index = taken.pop(rng.randrange(len(taken)))
                probe.give_back(made.creator, HOST, index)
                free.add(index)
                continue
            first, count, _ = probe.take_run(made.creator, HOST, wanted, limit, rng.randrange(9))
            run = set(range(first, first + count))
            assert run <= {i for i in free if i < limit}
            assert count > 0 or wanted == 0 or not any(i < limit for i in free)
            free -= run
            taken.extend(run)
            assert made.raw.free(HOST) == free
            assert probe.free_count(made.creator, HOST) == len(free)
    finally:
        made.remove()


def test_two_takers_at_once_never_share_an_index(make_instance: Make, probe: Any) -> None:
    """Threads without the GIL over one mapping; a lost or doubled bit would change the sum."""
    made = make_instance(130)
    second = made.attach()
    totals: list[int] = []

    def work(segment: Segment) -> None:
        totals.append(probe.take_and_give_back(segment, HOST, 20000, 5))

    threads = [threading.Thread(target=work, args=(s,)) for s in (made.creator, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(total > 0 for total in totals)
    assert made.raw.free(HOST) == set(range(130))
    assert made.raw.summary(HOST) == {0, 1, 2}
