# SPDX-License-Identifier: Apache-2.0
"""Hit rates over the last requests, and their log line."""

from __future__ import annotations

import logging

import pytest

from kvbm.metrics.cache_stats import CacheStats


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rates_are_those_of_all_blocks_asked_for() -> None:
    stats = CacheStats("e", 1000, 5)
    assert stats.rates() == (0.0, 0.0)
    stats.record(3, 1, 10)
    stats.record(0, 0, 10)
    assert stats.rates() == (0.15, 0.05)


def test_a_request_that_looked_nothing_up_does_not_count() -> None:
    stats = CacheStats("e", 1000, 5)
    stats.record(0, 0, 0)
    assert stats.rates() == (0.0, 0.0)
    stats.record(1, 0, 2)
    stats.record(0, 0, 0)
    assert stats.rates() == (0.5, 0.0)


def test_the_window_forgets_the_oldest_request() -> None:
    stats = CacheStats("e", 3, 5)
    for host in (10, 0, 0, 0):
        stats.record(host, 0, 10)
    assert stats.rates() == (0.0, 0.0)
    stats.record(10, 5, 10)
    assert stats.rates() == (10 / 30, 5 / 30)


def test_the_log_line_is_upstreams_and_comes_no_more_often_than_asked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kvbm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="kvbm.metrics.cache_stats")
    clock = Clock()
    stats = CacheStats("engine-7", 1000, 5, clock)
    stats.record(1, 0, 8)
    clock.now += 5
    stats.record(0, 1, 0)  # nothing was looked up: no line
    stats.record(0, 1, 8)
    clock.now += 4.5
    stats.record(8, 0, 8)
    clock.now += 0.5
    stats.record(8, 0, 8)
    assert [record.getMessage() for record in caplog.records] == [
        "KVBM [worker-engine-7] Cache Hit Rates - Host: 6.2% (1/16), Disk: 6.2% (1/16)",
        "KVBM [worker-engine-7] Cache Hit Rates - Host: 53.1% (17/32), Disk: 3.1% (1/32)",
    ]
