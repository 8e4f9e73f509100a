# SPDX-License-Identifier: Apache-2.0
"""The real host and disk tables, and what moves blocks between them, under a trace."""

from __future__ import annotations

import pytest

from kvbm.replay.disk import replay_with_disk
from kvbm.replay.manager import Outcome, Pace, replay
from kvbm.replay.policies import lru_hits, unbounded_hits
from kvbm.replay.synthetic import conversations
from kvbm.replay.trace import Request, Trace

TRACE = conversations(400, 1)


def tiers(outcome: Outcome) -> tuple[int, int]:
    """Hits of both."""
    assert outcome.disk is not None
    return outcome.host_hits, outcome.disk.hits


def asked(*prompts: list[int]) -> Trace:
    """Requests of these blocks, a second apart."""
    requests = [Request(1000 * i, 512 * len(p), 0, p) for i, p in enumerate(prompts)]
    return Trace("t", requests, 512)


def test_the_same_trace_gives_the_same_decisions_bit_for_bit() -> None:
    pace = Pace(50_000, 1)
    first, again = (replay_with_disk(TRACE, 200, 300, pace=pace) for _ in range(2))
    assert first.decisions == again.decisions
    assert first.disk == again.disk
    assert first.disk is not None
    assert first.disk.hits > 0
    assert first.decisions != replay_with_disk(TRACE, 200, 200, pace=pace).decisions


@pytest.mark.parametrize("disk", [200, 1000])
def test_without_a_filter_the_disk_makes_the_cache_as_large_as_itself(disk: int) -> None:
    outcome = replay_with_disk(TRACE, 60, disk, filtered=False)
    assert abs(outcome.hits - lru_hits(TRACE, disk)) <= 0.005 * TRACE.references
    assert outcome.host_hits == pytest.approx(replay(TRACE, 60).hits, abs=0.005 * TRACE.references)


def test_a_disk_that_is_large_enough_hits_all_that_can_be_hit() -> None:
    outcome = replay_with_disk(TRACE, 60, TRACE.distinct, filtered=False)
    assert outcome.hits == unbounded_hits(TRACE, 0)
    assert outcome.disk is not None
    assert outcome.disk.evicted == 0
    assert outcome.disk.written == TRACE.distinct
    assert outcome.disk.read == outcome.disk.hits > 0


def test_with_the_filter_a_block_is_written_at_its_second_use() -> None:
    once = replay_with_disk(asked([1, 2], [3, 4]), 4, 10)
    assert once.disk is not None
    assert once.disk.written == 0
    twice = replay_with_disk(asked([1, 2], [1, 2], [3, 4], [5, 6], [1, 2]), 4, 10)
    assert twice.disk is not None
    assert twice.disk.written == 2
    assert tiers(twice) == (2, 2)


def test_the_filter_writes_less_and_hits_less() -> None:
    some = replay_with_disk(TRACE, 60, 1000)
    every = replay_with_disk(TRACE, 60, 1000, filtered=False)
    assert some.disk is not None
    assert every.disk is not None
    assert 0 < some.disk.written < every.disk.written
    assert replay(TRACE, 60).hits < some.hits < every.hits


def test_what_came_from_disk_is_in_the_host_tier_then() -> None:
    outcome = replay_with_disk(asked([1, 2], [3, 4], [1, 2], [1, 2]), 2, 10, filtered=False)
    assert tiers(outcome) == (2, 2)


def test_blocks_of_running_requests_leave_no_room_for_what_is_on_disk() -> None:
    first, long = Request(0, 512, 0, [1]), Request(1000, 512, 10_000, [2])
    trace = Trace("t", [first, long, Request(2000, 512, 0, [1])], 512)
    outcome = replay_with_disk(trace, 1, 10, filtered=False, pace=Pace(decode_ms=1))
    assert tiers(outcome) == (0, 0)
    assert tiers(replay_with_disk(trace, 1, 10, filtered=False)) == (0, 1)


@pytest.mark.parametrize(("host", "disk"), [(0, 10), (10, 0)])
def test_an_impossible_capacity_is_refused(host: int, disk: int) -> None:
    with pytest.raises(ValueError, match="capacity 0: 1 to"):
        replay_with_disk(TRACE, host, disk)
