# SPDX-License-Identifier: Apache-2.0
"""Following a live segment: the same numbers as a whole capture, in pieces, without a trace."""

from __future__ import annotations

import numpy as np
import pytest

from kvbm._fast.keys import Keys
from kvbm.errors import InspectError
from kvbm.inspect import report
from kvbm.inspect.capture import capture
from kvbm.inspect.decode import Segment
from kvbm.inspect.live import LiveSegment, Rates
from tests.fast.instances import cache, digests, instance
from tests.inspect.samples import Sample


def test_what_is_followed_is_what_is_captured(sample: Sample) -> None:
    whole = report.summary(Segment(capture(sample.name)))
    with LiveSegment(sample.name) as live:
        cpu = {"leader_cpu_ns": whole["cpu_seconds"]["leaders"]}
        assert live.counters() == whole["counters"] | cpu
        assert live.pools() == {
            name: (pool["used"], pool["total"]) for name, pool in whole["pools"].items()
        }
        swept = live.sweep()
        assert {
            "reset": swept.states[0],
            "partial": swept.states[1],
            "registered": swept.states[2],
            "evicting": swept.states[3],
            "held": swept.held,
        } == whole["blocks"]
        assert swept.pins[0] == 4
        assert [one[:3] for one in swept.branching] == [(2, 5, 5)]
        assert live.lines() == [0, 16, 17]
        assert live.locks().locked == {0, 16, 17}
        assert [live.queued(0, rank) for rank in (0, 1)] == [1, 1]
        assert [one[:4] for one in live.in_flight()] == [(0, 1, 1, 3)]


def test_it_shows_what_happens_while_it_is_open(sample: Sample) -> None:
    with LiveSegment(sample.name) as live:
        before = live.counters()["published"]
        cache(sample.table, Keys(digests(7, "while open")))
        assert live.counters()["published"] == before + 7
        assert live.pools()["host"] == (30, 64)
        assert np.array_equal(
            live.line_counters().sum(axis=0)[: len(live.counters())],
            list(live.counters().values()),
        )


def test_the_sweep_takes_pieces_and_then_knows_the_whole(sample: Sample) -> None:
    with LiveSegment(sample.name) as live:
        turns = [live.sweep(20).states[2] for _ in range(8)]
    assert turns == [0, 0, 0, 20, 20, 20, 20, 20]


def test_it_is_not_counted_as_a_user_and_cannot_write(sample: Sample) -> None:
    others = sample.instance.attached[1:]
    with LiveSegment(sample.name) as live:
        for segment in others:
            segment.close()
        assert not sample.instance.creator.has_other_users()
        with pytest.raises(ValueError, match="read-only"):
            live.header["tick"] = 0


def test_an_object_that_lost_its_name_is_noticed() -> None:
    one = instance(host_slots=8)
    with LiveSegment(one.name.removeprefix("/kvbm-")) as live:
        assert live.is_current
        one.remove()
        assert not live.is_current
        assert live.pools()["host"] == (0, 8)  # what it had can still be read
    with pytest.raises(InspectError, match="there is no such shared memory"):
        LiveSegment("no-such-instance")


def test_a_damaged_header_is_refused(sample: Sample) -> None:
    with sample.instance.writable() as raw:
        ranks = raw.u32(28)
        raw.put_u32(28, 3)
        try:
            with pytest.raises(InspectError, match="its header is damaged"):
                LiveSegment(sample.name)
        finally:
            raw.put_u32(28, ranks)


def test_rates_are_those_of_their_windows() -> None:
    rates = Rates(every=0.5)
    assert rates.per_second(1, "lookups") == 0.0
    assert rates.share(1, "matched_blocks", "lookup_blocks") is None
    zero = dict.fromkeys(rates.moved(1)[1], 0)
    for second in range(100):
        moved = {"lookups": second * 10 if second < 95 else 950 + 100 * (second - 95)}
        moved |= {"lookup_blocks": 4 * second, "matched_blocks": second}
        rates.add(float(second), zero | moved)
        rates.add(second + 0.1, zero | moved)  # too soon after the one before
    assert rates.per_second(1, "lookups") == 100.0
    assert rates.per_second(10, "lookups") == pytest.approx((4 * 100 + 60) / 10)
    assert rates.moved(60)[0] == 60.0
    assert rates.share(10, "matched_blocks", "lookup_blocks") == 0.25
