# SPDX-License-Identifier: Apache-2.0
"""What is learned from failed loads, with a clock of the test's own."""

from __future__ import annotations

import pytest

from kvbm._fast.keys import Keys
from kvbm.leader.load_failures import (
    AVOID_MAX,
    AVOID_SECS,
    FAILURES_IN_A_ROW,
    PAUSE_MAX_SECS,
    PAUSE_SECS,
    LoadFailures,
)
from tests.fast.instances import digests


class Clock:
    """Time that stands still between `advance`s."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failures(clock: Clock) -> LoadFailures:
    return LoadFailures(clock)


def test_a_match_ends_before_an_avoided_block(failures: LoadFailures) -> None:
    keys = Keys(digests(8))
    failures.avoid(0, keys, 5)
    assert failures.limit(0, keys, 0, 8) == 5
    assert failures.limit(0, keys, 5, 8) == 5
    assert failures.limit(0, keys, 6, 8) == 8
    assert failures.limit(0, keys, 0, 5) == 5
    assert failures.limit(0, keys, 0, 3) == 3


def test_the_first_of_several_avoided_blocks_counts(failures: LoadFailures) -> None:
    keys = Keys(digests(8))
    for position in (6, 2, 4):
        failures.avoid(0, keys, position)
    assert failures.limit(0, keys, 0, 8) == 2
    assert failures.limit(0, keys, 3, 8) == 4


def test_other_content_at_the_same_position_is_not_avoided(failures: LoadFailures) -> None:
    failures.avoid(0, Keys(digests(8)), 2)
    assert failures.limit(0, Keys(digests(8, "other")), 0, 8) == 8
    assert failures.limit(1, Keys(digests(8), 1, 1), 0, 8) == 8
    assert failures.limit(0, Keys(digests(2)), 0, 8) == 8


def test_a_block_is_avoided_for_a_while_only(failures: LoadFailures, clock: Clock) -> None:
    keys = Keys(digests(8))
    failures.avoid(0, keys, 2)
    clock.advance(AVOID_SECS - 1)
    assert failures.limit(0, keys, 0, 8) == 2
    clock.advance(1)
    assert failures.limit(0, keys, 0, 8) == 8


def test_a_reset_forgets_avoided_blocks(failures: LoadFailures) -> None:
    keys = Keys(digests(8))
    failures.avoid(0, keys, 2)
    failures.forget()
    assert failures.limit(0, keys, 0, 8) == 8


def test_the_number_of_avoided_blocks_is_bounded(failures: LoadFailures) -> None:
    keys = Keys(digests(AVOID_MAX + 1))
    for position in range(AVOID_MAX + 1):
        failures.avoid(0, keys, position)
    assert failures.limit(0, keys, 0, AVOID_MAX + 1) == 1  # block 0 gave way


def test_loading_pauses_after_failures_in_a_row_only(failures: LoadFailures) -> None:
    for _ in range(FAILURES_IN_A_ROW - 1):
        failures.failed()
    failures.succeeded()
    for _ in range(FAILURES_IN_A_ROW - 1):
        failures.failed()
        assert failures.loads_allowed()
    failures.failed()
    assert not failures.loads_allowed()


def test_each_further_failure_doubles_the_pause(failures: LoadFailures, clock: Clock) -> None:
    for _ in range(FAILURES_IN_A_ROW):
        failures.failed()
    pause = PAUSE_SECS
    while pause < PAUSE_MAX_SECS:
        clock.advance(pause - 0.5)
        assert not failures.loads_allowed()
        clock.advance(0.5)
        assert failures.loads_allowed()
        failures.failed()
        pause *= 2
    clock.advance(PAUSE_MAX_SECS)
    assert failures.loads_allowed()


def test_one_load_that_arrives_ends_the_pauses(failures: LoadFailures, clock: Clock) -> None:
    for _ in range(FAILURES_IN_A_ROW + 3):
        failures.failed()
    failures.succeeded()
    assert failures.loads_allowed()
    failures.failed()
    assert failures.loads_allowed()
