# SPDX-License-Identifier: Apache-2.0
"""The explorer finds what goes wrong in some interleaving, and visits all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.model.explore import (
    Actions,
    Actor,
    Explorer,
    Model,
    Violation,
    cas,
    explore,
    fail,
    load,
    store,
    wait,
)
from tests.model.rules import PROTOCOL
from tests.model.scenarios import scenarios
from tests.model.setting import build

TOTAL, LOCK, CRASHES = 0, 1, 2


def nothing(*_: Any) -> Iterable[str]:
    return ()


def total_is_two(memory: Sequence[Any]) -> Iterable[str]:
    if memory[TOTAL] != 2:
        yield f"the total is {memory[TOTAL]}"


def model(*actors: Actor, crashes: int = 0, check_end: Any = total_is_two) -> Model:
    return Model(
        ["total", "lock", "crashes"],
        [0, 0, 0],
        list(actors),
        [LOCK],
        CRASHES,
        nothing,
        nothing,
        check_end,
        crashes,
    )


def add_by_load_and_store() -> Actions:
    seen = yield load(TOTAL)
    yield store(TOTAL, seen + 1)


def add_by_cas() -> Actions:
    seen = yield load(TOTAL)
    done = False
    while not done:
        done, seen = yield cas(TOTAL, seen, seen + 1)


def is_free(value: int) -> bool:
    return value == 0


def add_under_lock(number: int) -> Actions:
    taken = False
    while not taken:
        yield wait(LOCK, "the lock", is_free)
        taken, _ = yield cas(LOCK, 0, number)
    yield from add_by_load_and_store()
    yield store(LOCK, 0)


def test_a_lost_update_is_found_by_the_shortest_trace() -> None:
    adders = [Actor(name, add_by_load_and_store) for name in "ab"]
    with pytest.raises(Violation) as caught:
        explore(lambda: model(*adders))
    assert caught.value.message == "at the end: the total is 1"
    assert len(caught.value.trace) == 4
    assert "load total: 0" in caught.value.trace[1]
    assert "store total: 0 -> 1" in caught.value.trace[2]


def test_an_atomic_update_is_not_lost_in_any_interleaving() -> None:
    adders = [Actor(name, add_by_cas) for name in "ab"]
    found = explore(lambda: model(*adders))
    assert found.ends == 1
    assert found.states > 4


def test_a_lock_excludes_and_is_dropped_at_death() -> None:
    def two_or_a_crash(memory: Sequence[Any]) -> Iterable[str]:
        if memory[TOTAL] + memory[CRASHES] < 2:
            yield f"the total is {memory[TOTAL]}"

    adders = [
        Actor("a", lambda: add_under_lock(1), crashes=True),
        Actor("b", lambda: add_under_lock(2)),
    ]
    assert explore(lambda: model(*adders, crashes=1, check_end=two_or_a_crash)).ends > 1


def test_who_waits_forever_is_named() -> None:
    def wait_for_one() -> Actions:
        yield wait(TOTAL, "the total", bool)

    with pytest.raises(Violation, match="a waits forever for the total"):
        explore(lambda: model(Actor("a", wait_for_one)))
    idle = Actor("a", wait_for_one, idles=True)
    assert explore(lambda: model(idle, check_end=nothing)).ends == 1


def test_a_deadline_passes_only_when_nothing_else_can_happen() -> None:
    def wait_for_two() -> Actions:
        seen = yield wait(TOTAL, "the total", lambda value: value == 2, deadline=True)
        if seen is None:
            yield fail("the deadline has passed")

    adders = [Actor(name, add_by_cas) for name in "ab"]
    assert explore(lambda: model(Actor("c", wait_for_two), *adders)).ends == 1
    with pytest.raises(Violation, match="the deadline has passed"):
        explore(lambda: model(Actor("c", wait_for_two), adders[0]))


def test_a_crash_is_tried_before_every_write() -> None:
    def three_stores() -> Actions:
        for value in range(1, 4):
            yield load(LOCK)
            yield store(TOTAL, value)

    ends: set[int] = set()

    def collect(memory: Sequence[Any]) -> Iterable[str]:
        ends.add(memory[TOTAL])
        return ()

    explore(lambda: model(Actor("a", three_stores, crashes=True), crashes=1, check_end=collect))
    assert ends == {0, 1, 2, 3}


def test_the_number_of_states_is_bounded() -> None:
    limited = model(*[Actor(name, add_by_cas) for name in "ab"])
    limited.states_max = 3
    with pytest.raises(RuntimeError, match="more than 3 states"):
        Explorer(limited).search()


@pytest.mark.parametrize("name", ["publish and evict", "look-up and reuse", "recovery by a guest"])
def test_merging_local_states_loses_no_memory(name: str) -> None:
    scenario = next(s for s in scenarios() if s.name == name)
    merged = explore(lambda: build(scenario, PROTOCOL))
    apart = explore(lambda: build(scenario, PROTOCOL), merge=False)
    assert merged.memories == apart.memories
    assert merged.ends <= apart.ends
    assert merged.states < apart.states
