# SPDX-License-Identifier: Apache-2.0
"""The end of an attachment: by `close`, by a fork, and what a child does not take with it."""

import os
from collections.abc import Callable

import pytest

from kvbm._fast.participants import claim_leader, line_is_alive
from kvbm._fast.segment import Segment, SegmentFault
from tests.fast.instances import Instance, run_in_fork
from tests.fast.raw_segment import RawSegment
from tests.leaks import snapshot

Make = Callable[..., Instance]


USES: list[Callable[[Segment], object]] = [
    lambda s: s.fingerprint,
    lambda s: s.description,
    lambda s: s.nonce,
    lambda s: s.created_ns,
    lambda s: s.key_epoch,
    lambda s: s.has_other_users(),
    lambda s: s.counters(),
    lambda s: s.free_blocks(),
    lambda s: s.ready_slots(0),
    lambda s: s.set_ready_slots(0, 1),
    lambda s: s.release_line(),
]


def test_a_closed_segment_refuses_every_use(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    segment.close()
    segment.close()
    for use in USES:
        with pytest.raises(SegmentFault, match="closed") as caught:
            use(segment)
        assert caught.value.kind == "closed"
    assert segment.shape == made.shape


def test_a_forked_child_may_not_use_the_segment(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()

    def check() -> None:
        for use in USES:
            with pytest.raises(SegmentFault) as caught:
                use(segment)
            assert caught.value.kind == "closed"
        now = snapshot()
        name = made.name.lstrip("/")
        assert (now.descriptors[name], now.mappings[name]) == (0, 0)
        segment.close()

    made.raw.close()
    run_in_fork(check)
    made.raw = RawSegment(made.name)
    assert segment.free_blocks() == 8


def test_a_child_that_ends_or_lives_changes_no_lock_of_its_parent(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    claim_leader(segment, 1)
    read, write = os.pipe()
    running, runs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.write(runs, b"!")
        os.read(read, 1)  # until the parent closes its end
        os._exit(0)
    os.close(read)
    try:
        assert os.read(running, 1) == b"!"
        assert made.creator.has_other_users()
        segment.close()
        assert not made.creator.has_other_users()
    finally:
        for descriptor in (write, running, runs):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_a_forked_childs_end_leaves_the_parents_line_alive(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    claim_leader(segment, 1)
    run_in_fork(segment.close)
    assert line_is_alive(made.creator, 0)
    assert made.raw.u32(made.raw.line_at(0) + 4) == 1


def test_a_child_can_attach_for_itself(make_instance: Make) -> None:
    made = make_instance(8)

    def check() -> None:
        segment = Segment.attach(made.name)
        assert segment.free_blocks() == 8
        segment.close()

    run_in_fork(check)
    assert not made.creator.has_other_users()
