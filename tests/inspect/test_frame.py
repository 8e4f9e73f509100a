# SPDX-License-Identifier: Apache-2.0
"""One picture: all values, in a form that JSON carries."""

from __future__ import annotations

import json

import pytest

from kvbm.inspect.follow import Follower
from kvbm.inspect.frame import frame
from kvbm.inspect.live import MOVING, LiveSegment, Rates
from tests.inspect.disk_samples import DiskSample
from tests.inspect.samples import Sample


def test_a_picture_has_what_the_segment_has(sample: Sample) -> None:
    with LiveSegment(sample.name) as live:
        found = json.loads(json.dumps(frame(live, Rates())))
        pid = int(live.participants[0]["pid"])
    assert found["instance"] == sample.name
    assert found["pools"]["host"] == {"used": 23, "total": 64}
    assert found["blocks"] == {
        "reset": 41,
        "partial": 3,
        "registered": 20,
        "evicting": 0,
        "held": 1,
    }
    assert [one.pop("age_seconds") >= 0 for one in found["operations"]] == [True]
    assert found["operations"] == [
        {"leader": 0, "kind": "store", "state": "submitted", "blocks": 3}
    ]
    leader, *workers = found["participants"]
    assert leader == {
        "role": "leader",
        "leader": 0,
        "rank": None,
        "pid": pid,
        "alive": True,
        "pins": 4,
        "queued": None,
    }
    assert [(one["role"], one["rank"], one["queued"]) for one in workers] == [
        ("worker", 0, 1),
        ("worker", 1, 1),
    ]
    assert [(one["blocks"], one["continuations"]) for one in found["prefixes"]] == [(6, 2)]


def test_rates_are_those_of_the_windows(sample: Sample) -> None:
    rates = Rates(every=0)
    zero = dict.fromkeys(MOVING, 0)
    rates.add(100.0, zero)
    rates.add(110.0, zero | {"lookup_blocks": 40, "matched_blocks": 30})
    with LiveSegment(sample.name) as live:
        windows = frame(live, rates)["windows"]
    assert [window["seconds"] for window in windows] == [1, 10, 60]
    assert [window["hit_rate"] for window in windows] == [0.75] * 3
    assert windows[1]["per_second"]["matched_blocks"] == 3.0


def test_the_cpu_time_of_leaders_and_of_workers_is_told_apart(sample: Sample) -> None:
    sample.table.count("cpu_ns", 300_000_000)
    with LiveSegment(sample.name) as live:
        counters = live.counters()
        assert (counters["cpu_ns"], counters["leader_cpu_ns"]) == (300_000_000, 300_000_000)
        rates = Rates(every=0)
        rates.add(100.0, dict.fromkeys(MOVING, 0))
        rates.add(110.0, counters | {"cpu_ns": 2_300_000_000})
        for window in frame(live, rates)["windows"]:
            assert window["cpu"] == pytest.approx({"leaders": 0.03, "workers": 0.2})


def test_the_disk_tier_is_in_the_picture(disk: DiskSample) -> None:
    follower = Follower()
    found = json.loads(json.dumps(frame(*follower.look_with_disk(disk.name))))
    follower.close()
    assert found["pools"]["host"] == {"used": 23, "total": 64}
    assert found["pools"]["disk"] == {"used": 18, "total": 32}
    assert found["disk"]["blocks"]["registered"] == 16
    assert found["disk"]["blocks"]["partial"] == 2
    assert [window["seconds"] for window in found["disk"]["windows"]] == [1, 10, 60]


def test_without_a_disk_tier_the_picture_has_none(sample: Sample) -> None:
    follower = Follower()
    found = frame(*follower.look_with_disk(sample.name))
    follower.close()
    assert found["disk"] is None
    assert "disk" not in found["pools"]
