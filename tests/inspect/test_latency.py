# SPDX-License-Identifier: Apache-2.0
"""Quantiles of what transfers took, and the prefixes at which most matches ended."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvbm._fast.contract import LATENCY_BOUNDS_NS
from kvbm._fast.keys import Keys
from kvbm.inspect.frame import frame
from kvbm.inspect.latency import latency_rows, quantile
from kvbm.inspect.live import LiveSegment, Rates
from kvbm.inspect.records import record_dtype
from kvbm.inspect.text import latency_lines, short_time
from kvbm.inspect.top_view import screen
from tests.fast.instances import digests
from tests.inspect.conftest import Inspect
from tests.inspect.samples import Sample
from tests.small_engine import SmallEngine

BUCKETS = len(LATENCY_BOUNDS_NS) + 1


def counts(**places: int) -> np.ndarray:
    """Buckets with some numbers in them, by place."""
    found = np.zeros(BUCKETS, np.uint64)
    for place, count in places.items():
        found[int(place.removeprefix("b"))] = count
    return found


@pytest.mark.parametrize("place", [1, 5, BUCKETS - 2])
def test_a_quantile_lies_in_the_bucket_that_has_it(place: int) -> None:
    low, high = LATENCY_BOUNDS_NS[place - 1] / 1e9, LATENCY_BOUNDS_NS[place] / 1e9
    buckets = counts(b0=98, **{f"b{place}": 4})
    assert quantile(buckets, 0.5) == pytest.approx(LATENCY_BOUNDS_NS[0] / 1e9 * 51 / 98)
    assert quantile(buckets, 0.99) == pytest.approx(low + (high - low) * 2.98 / 4)
    assert quantile(buckets, 1.0) == high


def test_what_is_beyond_all_bounds_is_the_last_of_them_and_nothing_is_none() -> None:
    assert quantile(counts(b23=7), 0.5) == LATENCY_BOUNDS_NS[-1] / 1e9
    assert quantile(counts(), 0.5) is None


def test_workers_are_added_up_and_the_end_of_a_cut_off_segment_is_left_out() -> None:
    records = np.zeros(3 * 8 + 5, record_dtype("kv_histogram"))
    for place, count in ((0, 3), (8, 4), (16, 5), (24, 900)):  # of stores, from submission
        records["bucket"][place, 2] = count
        records["bucket"][place + 1, 1] = count
    rows = latency_rows(records)
    assert [(row["kind"], row["count"]) for row in rows] == [("store", 12)]
    assert 8e-6 < rows[0]["total_p50_seconds"] <= rows[0]["total_p99_seconds"] <= 16e-6
    assert 4e-6 < rows[0]["copy_p50_seconds"] <= rows[0]["copy_p99_seconds"] <= 8e-6
    assert latency_rows(records[:0]) == []


def test_times_are_three_digits_of_a_unit_that_fits() -> None:
    assert [short_time(s) for s in (None, 3.2e-6, 0.00451, 1.5, 16.8)] == [
        "-",
        "3.2 us",
        "4.51 ms",
        "1.5 s",
        "16.8 s",
    ]


def test_show_and_top_say_what_transfers_took(engine: SmallEngine, inspect: Inspect) -> None:
    for number in range(3):
        engine.store(f"store {number}", range(6), number)
    done = engine.counter("stores")
    (row,) = json.loads(inspect("show", engine.instance, "--json").stdout)["latencies"]
    assert (row["kind"], row["count"]) == ("store", done)
    assert 0 < row["copy_p50_seconds"] <= row["copy_p99_seconds"] <= row["total_p99_seconds"]
    line = list(latency_lines([row]))[1]
    assert line in inspect("show", engine.instance).stdout
    with LiveSegment(engine.instance) as live:
        assert line in screen(frame(live, Rates()))


def test_the_prefixes_at_which_most_matches_ended_are_shown(
    sample: Sample, inspect: Inspect
) -> None:
    held = Keys(digests(5, "held"))
    for stop, times in ((5, 3), (2, 6)):
        for _ in range(times):
            _, ref = sample.table.match(held, 0, stop)
            assert ref is not None
            sample.table.unpin(ref)
    with LiveSegment(sample.name) as live:
        live.sweep()
        found = frame(live, Rates())
    assert [(one["blocks"], one["matches"]) for one in found["used"][:2]] == [(2, 6), (5, 4)]
    assert f"{found['used'][0]['digest'][:16]}       2 blocks long, 6 matches" in "\n".join(
        screen(found)
    )
    rows = json.loads(inspect("blocks", sample.name, "--sort", "uses", "--json").stdout)["blocks"]
    assert [row["uses"] for row in rows[-2:]] == [4, 6]
    assert rows[-1]["digest"] == found["used"][0]["digest"]
