# SPDX-License-Identifier: Apache-2.0
"""What is remembered of past requests, and how it is counted."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.lifetimes import Lifetimes, best_rates
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.ranks import AGE_STARTS, AGES, USES_KNOWN, Uses
from tests.fast.instances import Instance, digests

Make = Callable[..., Instance]


class Asked:
    """A policy that only counts: what `arrive` is told to do, it does."""

    def __init__(self, uses: Uses, cohorts: int = 3, remembered: int = 1024) -> None:
        self.lifetimes = Lifetimes(uses, cohorts, remembered)
        self.cohort = 0
        self.found = (0, 0, 0)

    def arrive(self, use: int, keys: Keys, stop: int, hits: int) -> int:
        self.found = self.lifetimes.trace_back(keys, hits, stop, use)
        self.lifetimes.begin(use, self.cohort)
        if self.found[1]:
            self.lifetimes.used_again(self.found[1])
        self.lifetimes.count()
        return 0


@pytest.fixture
def table(make_instance: Make) -> OperationTable:
    return make_instance(64).leader()


@pytest.fixture
def asked(table: OperationTable) -> Asked:
    uses = Uses(table.segment)
    policy = Asked(uses)
    table.order_by(policy, uses)
    return policy


def ask(table: OperationTable, asked: Asked, hashes: list[bytes]) -> tuple[int, int, int]:
    """Look a sequence up that is not cached."""
    assert table.match(Keys(hashes), 0, len(hashes)) == (0, None)
    return asked.found


def pass_time(table: OperationTable, ticks: int) -> None:
    """Return a block of no interest so many times."""
    keys = Keys(digests(1, "clock"))
    for _ in range(ticks):
        held = table.hold(keys, 0)  # not a look-up
        if held is None:
            ((held, _),) = table.reserve(keys, 0, 1)
            table.publish([held])
        table.unpin(held)


def test_a_longer_prompt_is_traced_back_to_who_used_its_begin_last(
    table: OperationTable, asked: Asked
) -> None:
    whole = digests(9, "chat")
    assert ask(table, asked, whole[:4]) == (0, 0, 0)
    assert ask(table, asked, whole[:6]) == (4, 1, 0)
    assert ask(table, asked, whole) == (6, 2, 0)
    assert ask(table, asked, whole[:5] + digests(3, "other end")) == (5, 2, 0)
    assert ask(table, asked, whole[:5] + digests(3, "third end")) == (5, 4, 1)
    assert ask(table, asked, digests(3, "stranger")) == (0, 0, 0)


def test_what_is_cached_is_known_although_nothing_is_remembered_of_it(
    table: OperationTable, asked: Asked
) -> None:
    whole = digests(6, "warm")
    refs = [ref for ref, _ in table.reserve(Keys(whole[:4]), 0, 4)]
    table.publish(refs)
    _, held = table.match(Keys(whole), 0, 6)
    assert asked.found == (4, 0, 0)
    for ref in [*refs, held or 0]:
        table.unpin(ref)


def test_of_more_blocks_than_are_remembered_the_later_ones_are_known(
    table: OperationTable,
) -> None:
    uses = Uses(table.segment)
    asked = Asked(uses, remembered=16)
    table.order_by(asked, uses)
    for seed in range(200):
        ask(table, asked, digests(1, seed))
    known = [ask(table, asked, digests(1, seed))[0] for seed in reversed(range(190, 200))]
    assert sum(known) > 3
    assert sum(ask(table, asked, digests(1, seed))[0] for seed in range(100)) < 20


def test_each_request_is_counted_in_the_ages_that_it_has_left(
    table: OperationTable, asked: Asked
) -> None:
    column = AGE_STARTS.index(6)
    asked.cohort = 1
    ask(table, asked, digests(2, "used at 6"))
    asked.cohort = 2
    ask(table, asked, digests(2, "never used"))
    pass_time(table, 6)
    asked.cohort = 0
    ask(table, asked, digests(2, "used at 6"))
    reached, used = asked.lifetimes.reached, asked.lifetimes.used
    assert reached[1].tolist() == [1.0] * (column + 1) + [0.0] * (AGES - column - 1)
    assert used[1].tolist() == [0.0] * column + [1.0] + [0.0] * (AGES - column - 1)
    assert reached[2].tolist() == [1.0] * column + [0.0] * (AGES - column)
    asked.lifetimes.fade(0.5)
    assert used[1, column] == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_counts_are_those_of_a_plain_model(
    table: OperationTable, asked: Asked, seed: int
) -> None:
    """All requests that have ended, or become old enough, column by column, in their order."""
    rng = random.Random(seed)
    born: list[tuple[int, int]] = []  # cohort, tick
    ended: dict[int, int] = {}
    last_use: dict[int, int] = {}
    tick = 0
    for number in range(120):
        chain = rng.randrange(25)
        asked.cohort = rng.randrange(3)
        ask(table, asked, digests(1, chain))
        if chain in last_use:
            ended[last_use[chain]] = tick - born[last_use[chain]][1]
        born.append((asked.cohort, tick))
        last_use[chain] = number
        step = rng.randrange(4)
        pass_time(table, step)
        tick += step
    ask(table, asked, digests(1, "last"))
    reached, used = np.zeros((3, AGES)), np.zeros((3, AGES))
    for column, start in enumerate(AGE_STARTS):
        end = AGE_STARTS[column + 1] if column + 1 < AGES else 2**48
        for number, (cohort, at) in enumerate(born):
            if number not in ended and tick - at < end:
                break
            age = ended.get(number, 2**40)
            reached[cohort, column] += age >= start
            used[cohort, column] += start <= age < end
    assert np.array_equal(asked.lifetimes.used, used)
    assert np.array_equal(asked.lifetimes.reached, reached)


def test_requests_that_were_overtaken_are_left_out(table: OperationTable, asked: Asked) -> None:
    for number in range(USES_KNOWN + 300):
        table.match(Keys([number.to_bytes(16, "little")]), 0, 1)
    pass_time(table, 2)
    for number in range(20):
        table.match(Keys([bytes(15) + number.to_bytes(1, "little")]), 0, 1)
    first = asked.lifetimes.reached[0, 0]
    assert 0 < first <= USES_KNOWN


@pytest.mark.parametrize(("cohorts", "remembered"), [(0, 16), (257, 16), (1, 0)])
def test_impossible_sizes_are_refused(table: OperationTable, cohorts: int, remembered: int) -> None:
    with pytest.raises(ValueError, match="1 to 256, 1 to 2"):
        Lifetimes(Uses(table.segment), cohorts, remembered)


def test_a_cohort_that_there_is_not_is_refused(table: OperationTable) -> None:
    with pytest.raises(ValueError, match=r"cohort 2 is outside 0\.\.1"):
        Lifetimes(Uses(table.segment), 2, 16).begin(1, 2)


def test_the_best_rate_is_the_rate_of_use_where_the_hazard_is_constant() -> None:
    widths = np.diff(np.array(AGE_STARTS[14:42], np.float64))
    rate = 1e-5
    hazard = -np.expm1(-rate * widths)[None]
    assert best_rates(hazard, widths)[0, :10] == pytest.approx(rate, rel=0.05)


def test_what_will_be_used_soon_is_worth_more_than_what_was_due_before() -> None:
    widths = np.full(12, 10.0)
    hazard = np.zeros((1, 12))
    hazard[0, 5] = 0.5
    worth = best_rates(hazard, widths)[0]
    assert all(np.diff(worth[:6]) > 0)
    assert not worth[6:].any()
    with pytest.raises(ValueError, match="12 ages, 11 widths"):
        best_rates(hazard, widths[1:])
