# SPDX-License-Identifier: Apache-2.0
"""Lines of participants: whose they are, and the living told from the dead."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.participants import (
    claim_leader,
    claim_worker,
    engine_counters,
    find_leader,
    line_is_alive,
    participants,
    set_attached,
    workers_attached,
)
from kvbm._fast.recovery import recover
from kvbm._fast.segment import COUNTER_NAMES, MAX_LEADERS, SegmentFault
from tests.fast.instances import Instance, digests
from tests.fast.raw_segment import COUNTERS_BYTES, LEADERS, LINES, RANKS, RawSegment

Make = Callable[..., Instance]

CHILD = """
import sys
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader, claim_worker
from kvbm._fast.segment import Segment
segment = Segment.attach(sys.argv[1])
if sys.argv[2] == "leader":
    claim_leader(segment, int(sys.argv[3]))
else:
    claim_worker(segment, int(sys.argv[3]), int(sys.argv[4]))
if sys.argv[2] == "leader" and len(sys.argv) > 4:
    table = OperationTable(segment)
    keys = Keys([bytes([i]) * 16 for i in range(int(sys.argv[4]))])
    table.publish([ref for ref, _ in table.reserve(keys, 0, len(keys) - 1)])
    table.reserve(keys, 0, len(keys))
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(made: Instance, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has a line, and is killed at the latest at the end."""
    command = [sys.executable, "-c", CHILD, made.name, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_leaders_get_the_slots_in_order_and_the_17th_is_refused(make_instance: Make) -> None:
    made = make_instance(8)
    segments = [made.attach() for _ in range(MAX_LEADERS + 1)]
    for i, segment in enumerate(segments[:-1]):
        assert claim_leader(segment, 100 + i) == i
        assert segment.leader == i
    with pytest.raises(SegmentFault, match="16 leaders already") as caught:
        claim_leader(segments[-1], 1)
    assert caught.value.kind == "full"
    assert segments[-1].leader is None
    segments[5].release_line()
    assert claim_leader(segments[-1], 1) == 5


def test_a_line_says_who_holds_it_and_since_when(make_instance: Make) -> None:
    made = make_instance(8, ranks=2)
    before = time.time_ns()
    leader = made.attach()
    claim_leader(leader, 2**64 - 7)
    worker = made.worker(0, 1)
    after = time.time_ns()
    first, second = participants(made.creator)
    assert (first.line, first.role, first.leader, first.rank) == (0, "leader", 0, None)
    assert (second.line, second.role, second.leader, second.rank) == (17, "worker", 0, 1)
    assert worker.leader == 0
    for one in (first, second):
        assert (one.pid, one.epoch, one.engine_key) == (os.getpid(), 1, 2**64 - 7)
        assert before <= one.started_ns <= after
        assert (one.alive, one.inside, one.step_bound, one.step_filled) == (True, False, 0, 0)


def test_each_claim_of_a_line_has_an_epoch_of_its_own(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    for epoch in range(1, 5):
        assert claim_leader(segment, epoch) == 0
        assert participants(made.creator)[0].epoch == epoch
        segment.release_line()
        assert participants(made.creator) == []


def test_a_closed_segment_leaves_no_line(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    claim_leader(segment, 1)
    worker = made.worker(0, 0)
    assert len(participants(made.creator)) == 2
    worker.close()
    segment.close()
    assert participants(made.creator) == []
    assert not line_is_alive(made.creator, 0)


def test_one_attachment_has_one_line(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    claim_leader(segment, 1)
    for again in (lambda: claim_leader(segment, 2), lambda: claim_worker(segment, 0, 0)):
        with pytest.raises(SegmentFault, match="already has a line"):
            again()
    assert [one.line for one in participants(made.creator)] == [0]
    assert segment.leader == 0


def test_two_attachments_in_one_process_have_lines_of_their_own(make_instance: Make) -> None:
    made = make_instance(8)
    first, second = made.attach(), made.attach()
    assert [claim_leader(first, 1), claim_leader(second, 2)] == [0, 1]
    first.close()
    assert [one.alive for one in participants(second)] == [True]
    assert line_is_alive(second, 1)
    assert line_is_alive(made.creator, 1)


def test_a_rank_can_be_claimed_once(make_instance: Make) -> None:
    made = make_instance(8, ranks=2)
    made.leader()
    made.worker(0, 0)
    other = made.attach()
    with pytest.raises(SegmentFault, match="rank 0 of leader 0") as caught:
        claim_worker(other, 0, 0)
    assert caught.value.kind == "full"
    claim_worker(other, 0, 1)


@pytest.mark.parametrize(
    ("leader", "rank"), [(-1, 0), (LEADERS, 0), (0, -1), (0, 2), (0, RANKS), (2**32, 0)]
)
def test_lines_outside_the_table_are_refused(make_instance: Make, leader: int, rank: int) -> None:
    made = make_instance(8, ranks=2)
    with pytest.raises(IndexError, match=f"leader {leader} rank {rank} is outside 16 x 2"):
        claim_worker(made.attach(), leader, rank)


@pytest.mark.parametrize("line", [-1, LINES, 2**32])
def test_liveness_of_lines_outside_the_table_is_refused(make_instance: Make, line: int) -> None:
    with pytest.raises(IndexError, match=f"line {line} is outside 0..271"):
        line_is_alive(make_instance(8).creator, line)


def test_a_leader_is_found_by_its_engines_key_while_it_lives(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    assert find_leader(segment, 42) is None
    with another_process(made, "leader", 41), another_process(made, "leader", 42) as second:
        assert find_leader(segment, 41) == 0
        assert find_leader(segment, 42) == 1
        assert find_leader(segment, 43) is None
        kill(second)
        assert find_leader(segment, 42) is None
    assert find_leader(segment, 41) is None
    assert recover(segment) == 2


def test_a_killed_leaders_line_is_seen_as_dead_until_it_is_recovered(make_instance: Make) -> None:
    made = make_instance(8)
    segment = made.attach()
    with another_process(made, "leader", 7) as process:
        (line,) = participants(segment)
        assert (line.pid, line.alive) == (process.pid, True)
        kill(process)
    (line,) = participants(segment)
    assert (line.role, line.alive) == ("leader", False)
    assert claim_leader(segment, 8) == 1
    assert recover(segment) == 1
    assert [one.line for one in participants(segment)] == [1]
    other = made.attach()
    assert claim_leader(other, 9) == 0


def test_a_stopped_process_is_alive(make_instance: Make) -> None:
    made = make_instance(8)
    with another_process(made, "leader", 7) as process:
        process.send_signal(signal.SIGSTOP)
        assert line_is_alive(made.creator, 0)
        assert recover(made.creator) == 0
        process.send_signal(signal.SIGCONT)
        kill(process)
    assert recover(made.creator) == 1


def test_what_a_killed_leader_held_is_returned(make_instance: Make) -> None:
    made = make_instance(8)
    with another_process(made, "leader", 7, 5) as process:
        blocks = made.raw.blocks()
        assert sorted(block.state for block in blocks) == [0, 0, 0, 1, 2, 2, 2, 2]
        kill(process)
    assert recover(made.creator) == 1
    made.raw.check_invariants()
    made.raw.check_idle()
    assert made.creator.free_blocks() == 4


def test_a_slot_of_a_dead_leader_with_a_live_worker_is_not_given_away(make_instance: Make) -> None:
    """The worker may still be writing into slots that its leader reserved."""
    made = make_instance(8)
    segment = made.attach()
    with another_process(made, "leader", 7) as leader, another_process(made, "worker", 0, 0) as w:
        kill(leader)
        assert recover(segment) == 0
        assert claim_leader(segment, 8) == 1
        kill(w)
    assert recover(segment) == 2
    assert claim_leader(made.attach(), 9) == 0


def test_a_line_that_is_closed_while_it_holds_blocks_stays_for_the_recovery(
    make_instance: Make,
) -> None:
    made = make_instance(8)
    table = made.leader(5)
    refs = [ref for ref, _ in table.reserve(Keys(digests(4)), 0, 4)]
    table.publish(refs[:2])
    table.segment.close()
    (line,) = participants(made.creator)
    assert (line.role, line.alive) == ("leader", False)
    assert recover(made.creator) == 1
    assert participants(made.creator) == []
    assert made.creator.free_blocks() == 6


def test_a_claim_empties_the_rings_of_the_slot(make_instance: Make, probe: object) -> None:
    made = make_instance(8, ranks=2)
    table = made.leader()
    handles, _, _ = table.store(Keys(digests(4)), 0, 4, [0, 1, 2, 3], None, 1)
    assert made.raw.ring(0, 1)[0] == 1
    table.cancel(handles[0])
    assert table.collect(handles[0]) is False
    table.segment.close()
    made.leader()
    assert [made.raw.ring(0, rank)[:2] for rank in range(2)] == [(0, 0), (0, 0)]


def test_all_workers_have_attached_once_each_has_said_so(make_instance: Make) -> None:
    made = make_instance(8, ranks=2)
    leader = made.leader().segment
    assert not workers_attached(leader)
    first, second = made.worker(0, 0), made.worker(0, 1)
    set_attached(first)
    assert not workers_attached(leader)
    set_attached(second)
    assert workers_attached(leader)
    second.close()
    assert not workers_attached(leader)


def test_who_has_no_line_cannot_say_that_it_attached(make_instance: Make) -> None:
    made = make_instance(8)
    with pytest.raises(SegmentFault, match="has no line"):
        set_attached(made.attach())


# ---- counters ------------------------------------------------------------------------------------
def test_an_engine_counts_on_its_own_lines_alone(make_instance: Make) -> None:
    made = make_instance(8, ranks=2)
    with RawSegment(made.name, writable=True) as writer:
        tables = [made.leader(engine_key=key) for key in (1, 2)]
        worker = made.worker(leader=1, rank=1)
        for table, number in zip(tables, (3, 50), strict=True):
            table.count("errors", number)
        for line, value in ((LEADERS + 1, 700), (LEADERS + RANKS, 9000), (LEADERS + RANKS + 1, 1)):
            at = writer.at["counters"] + line * COUNTERS_BYTES
            writer.put_u64(at + 8 * COUNTER_NAMES.index("errors"), value)
    first, second = (engine_counters(table.segment) for table in tables)
    assert (first["errors"], second["errors"]) == (703, 9051)
    assert engine_counters(worker) == second
    assert made.creator.counters()["errors"] == 703 + 9051
    assert list(first) == list(COUNTER_NAMES)


def test_what_the_dead_have_counted_stays_in_the_total(make_instance: Make) -> None:
    made = make_instance(8)
    made.exact = False
    with another_process(made, "leader", 7, 3) as process:
        counted = made.creator.counters()["reserved"]
        assert counted > 0
        kill(process)
    assert recover(made.creator)
    again = made.leader(engine_key=8)
    assert again.segment.leader == 0
    before = engine_counters(again.segment)["reserved"]
    assert made.creator.counters()["reserved"] == before == counted
    assert again.abandon_reserved([ref for ref, _ in again.reserve(Keys(digests(2)), 0, 2)])
    assert engine_counters(again.segment)["reserved"] == counted + 2


def test_without_a_line_there_is_no_engine_to_count_for(make_instance: Make) -> None:
    with pytest.raises(SegmentFault, match="no line"):
        engine_counters(make_instance(8).creator)
