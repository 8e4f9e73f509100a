# SPDX-License-Identifier: Apache-2.0
"""What decides whether the disk is used: measured rates, the write budget, its health."""

from __future__ import annotations

import pytest

from kvbm.leader.rates import (
    BURST_SECS,
    FAILURES_IN_A_ROW,
    PAUSE_MAX_SECS,
    PAUSE_SECS,
    PERIOD_SECS,
    SAMPLED_BYTES_MIN,
    SAMPLES_MIN,
    DiskHealth,
    PrefillRate,
    ReadRate,
    WriteBudget,
)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock at 100 s."""
    return Clock()


def test_the_rate_of_prefill_is_that_of_large_steps(clock: Clock) -> None:
    rate = PrefillRate(clock)
    for tokens, secs in ((1000, 0.5), (1, 10.0), (100, 10.0)):
        rate.step(tokens)
        clock.now += secs
    rate.step(0)
    assert rate.tokens_per_sec == 2000


def test_an_idle_engine_lowers_the_rate_of_prefill_little_by_little(clock: Clock) -> None:
    rate = PrefillRate(clock)
    for secs in (0.5, 500.0):
        rate.step(1000)
        clock.now += secs
    rate.step(0)
    assert 1500 < rate.tokens_per_sec < 2000


def read(reads: ReadRate, clock: Clock, count: int, secs: float) -> None:
    """One read, alone."""
    reads.begin()
    clock.now += secs
    reads.arrived(count)
    reads.look(False)


def measured(clock: Clock, bytes_per_sec: int) -> ReadRate:
    """A disk that was read often enough."""
    reads = ReadRate(clock)
    for _ in range(SAMPLES_MIN):
        read(reads, clock, bytes_per_sec, 1.0)
    return reads


def test_a_read_is_worth_it_if_it_is_faster_than_computing(clock: Clock) -> None:
    assert ReadRate(clock).is_worth(10**12, 1, 1e9)  # not measured yet
    reads = measured(clock, 1000)
    assert reads.is_worth(10**12, 1, 0)  # prefill is not
    assert reads.is_worth(1000, 100, 100.0)
    assert not reads.is_worth(1001, 100, 100.0)


def test_a_first_read_that_took_long_does_not_condemn_a_disk(clock: Clock) -> None:
    reads = ReadRate(clock)
    read(reads, clock, 1000, 10.0)
    assert reads.is_worth(10_000, 100, 100.0)
    read(reads, clock, 10_000, 1.0)
    read(reads, clock, 10_000, 1.0)
    assert reads.is_worth(10_000, 100, 100.0)
    assert not reads.is_worth(10_001, 100, 100.0)


def test_one_large_read_is_a_measurement(clock: Clock) -> None:
    reads = ReadRate(clock)
    read(reads, clock, SAMPLED_BYTES_MIN, 1.0)
    assert not reads.is_worth(2 * SAMPLED_BYTES_MIN, 100, 100.0)


def test_a_disk_that_slows_down_is_called_slow_little_by_little(clock: Clock) -> None:
    reads = measured(clock, 1000)
    for _ in range(3):
        read(reads, clock, 10, 1.0)
    assert 500 < reads.bytes_per_sec < 600
    read(reads, clock, 2000, 1.0)
    assert reads.bytes_per_sec == 2000


def test_reads_that_overlap_are_measured_together(clock: Clock) -> None:
    reads = ReadRate(clock)
    for _ in range(4):
        reads.begin()
    for left in (3, 2, 1, 0):
        clock.now += 0.1
        reads.arrived(100)
        reads.look(left > 0)
    assert reads.bytes_per_sec == pytest.approx(1000)


def test_reads_that_never_pause_are_measured_all_the_same(clock: Clock) -> None:
    reads = ReadRate(clock)
    for _ in range(10):
        reads.begin()
        clock.now += PERIOD_SECS
        reads.arrived(500)
        reads.look(True)
    assert reads.bytes_per_sec == pytest.approx(500 / PERIOD_SECS)
    assert not reads.is_worth(10**6, 100, 100.0)


def test_a_slow_disk_is_tried_again_at_some_time(clock: Clock) -> None:
    reads = measured(clock, 1)
    tries = 0
    while not reads.is_worth(10, 1, 1.0):
        reads.try_again()
        tries += 1
    assert 10 < tries < 1000


def test_nothing_moved_says_nothing(clock: Clock) -> None:
    reads = ReadRate(clock)
    reads.look(False)
    read(reads, clock, 0, 1.0)
    read(reads, clock, 1, 0.0)
    assert reads.bytes_per_sec == 0


def test_a_budget_grows_up_to_its_burst(clock: Clock) -> None:
    budget = WriteBudget(24.0, clock)  # 1 GB an hour
    assert budget.blocks(10**8, 100) == 10
    budget.spend(10**9)
    assert budget.blocks(10**8, 100) == 0
    clock.now += BURST_SECS / 2 + 1
    assert budget.blocks(10**8, 100) == 5
    clock.now += 100 * BURST_SECS
    assert budget.blocks(10**8, 100) == 10
    assert budget.blocks(10**8, 3) == 3


def test_without_a_budget_everything_may_be_written(clock: Clock) -> None:
    budget = WriteBudget(None, clock)
    budget.spend(10**15)
    assert budget.blocks(10**9, 1000) == 1000


def test_failures_in_a_row_pause_the_disk_longer_each_time(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    health = DiskHealth(clock)
    for _ in range(FAILURES_IN_A_ROW - 1):
        health.failed()
    assert health.allows()
    health.succeeded()
    for _ in range(FAILURES_IN_A_ROW):
        health.failed()
    assert not health.allows()
    clock.now += PAUSE_SECS
    assert health.allows()
    health.failed()
    clock.now += PAUSE_SECS
    assert not health.allows()
    for _ in range(100):
        health.failed()
    clock.now += PAUSE_MAX_SECS
    assert health.allows()
    health.succeeded()
    assert health.allows()
    assert "works again" in caplog.text


def test_a_disk_that_hangs_is_off_for_good_and_said_so_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    health = DiskHealth(clock)
    health.hangs("a read", 31.0)
    health.hangs("a write", 32.0)
    health.succeeded()
    clock.now += 1e9
    assert not health.allows()
    assert caplog.text.count("the disk tier is off") == 1
