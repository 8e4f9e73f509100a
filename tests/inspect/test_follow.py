# SPDX-License-Identifier: Apache-2.0
"""Following by name: one map a name, a new one where there is a new segment, none left."""

from __future__ import annotations

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.segment import shape_for
from kvbm.errors import InspectError
from kvbm.inspect.follow import Follower
from tests.fast.instances import Instance, cache, digests, instance
from tests.inspect.disk_samples import DiskSample
from tests.inspect.samples import Sample


def test_a_second_look_is_at_the_same_map_with_one_sample_more(sample: Sample) -> None:
    follower = Follower()
    live, rates = follower.look(sample.name)
    cache(sample.table, Keys(digests(7, "meanwhile")))
    rates._every = 0
    again, same = follower.look(sample.name)
    assert (again, same) == (live, rates)
    assert rates.moved(1)[1]["published"] == 7
    follower.close()


def test_a_new_segment_under_the_name_is_followed_with_rates_of_its_own() -> None:
    follower = Follower()
    first = instance(host_slots=64)
    name = first.name.removeprefix("/kvbm-")
    old, old_rates = follower.look(name)
    first.remove()
    second = Instance(shape_for(128, 0, 1, 16, True), first.name)
    try:
        live, rates = follower.look(name)
        assert live.shape.host_slots == 128
        assert rates is not old_rates
        assert live is not old
    finally:
        follower.close()
        second.remove()


def test_what_is_gone_is_an_error_or_none(sample: Sample) -> None:
    follower = Follower()
    with pytest.raises(InspectError, match="kvbm-gone"):
        follower.look("gone")
    assert follower.find("gone") is None
    assert follower.find(sample.name) is not None
    follower.keep(["another"])
    assert follower._open == {}


def test_a_disk_tier_is_followed_with_its_instance_and_let_go_with_it(disk: DiskSample) -> None:
    follower = Follower()
    live, _, tier = follower.look_with_disk(disk.name)
    assert tier is not None
    assert tier[0].instance == f"{disk.name}.disk"
    follower.keep([disk.name])
    assert len(follower._open) == 2
    assert follower.look_with_disk(disk.name)[0] is live
    follower.keep([])
    assert follower._open == {}
