# SPDX-License-Identifier: Apache-2.0
"""What the dead held comes back, what the living hold stays."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.participants import participants
from kvbm._fast.recovery import recover
from tests.fast.actors import (
    actor,
    hold_reserved_and_pinned,
    hold_submitted_operations,
    hold_worker_line,
)
from tests.fast.instances import Instance, block_of, cache, digests
from tests.fast.raw_segment import FREE, LINES, PARTIAL, REGISTERED, RESET

MakeInstance = Callable[..., Instance]


@pytest.fixture
def one(make_instance: MakeInstance) -> Instance:
    return make_instance(host_slots=32)


def states(one: Instance) -> list[int]:
    return [block.state for block in one.raw.blocks()]


def test_recovery_of_nobody_changes_nothing(one: Instance) -> None:
    table = one.leader()
    held = [ref for ref, _ in table.reserve(Keys(digests(3)), 0, 3)]
    before = one.raw.blocks()
    assert recover(table.segment) == 0
    assert one.raw.blocks() == before
    table.abandon_reserved(held)


def test_blocks_of_a_killed_leader_stay_registered_and_its_reservations_come_back(
    one: Instance,
) -> None:
    with actor(hold_reserved_and_pinned, one.name) as them:
        registered = them.result()
        assert states(one).count(PARTIAL) == 3
        them.kill()
    table = one.leader()
    assert recover(table.segment) == 1
    assert states(one).count(PARTIAL) == 0
    assert table.segment.counters()["recovered"] == 3
    assert table.segment.counters()["reserved"] == 7
    assert [one.raw.block(block_of(ref)).state for ref in registered] == [REGISTERED] * 4
    count, ref = table.match(Keys(digests(7, "theirs")), 0, 7)
    assert count == 4
    assert ref is not None
    table.unpin(ref)


def test_a_live_leader_keeps_its_pins_and_reservations_through_a_recovery(one: Instance) -> None:
    table = one.leader()
    mine = [ref for ref, _ in table.reserve(Keys(digests(5, "mine")), 0, 5)]
    table.publish(mine[:2])
    with actor(hold_reserved_and_pinned, one.name) as them:
        them.result()
        them.kill()
    assert recover(table.segment) == 1
    assert [one.raw.block(block_of(ref)).holders for ref in mine] == [frozenset({0})] * 5
    assert table.publish(mine) == 5
    for ref in mine:
        table.unpin(ref)


def test_a_second_recovery_finds_nothing_to_do(one: Instance) -> None:
    with actor(hold_reserved_and_pinned, one.name) as them:
        them.result()
        them.kill()
    assert recover(one.creator) == 1
    before = one.raw.blocks()
    assert recover(one.creator) == 0
    assert one.raw.blocks() == before


def test_operations_of_a_killed_leader_are_free_again(one: Instance) -> None:
    with actor(hold_submitted_operations, one.name) as them:
        leader, handles = them.result()
        them.kill()
    assert recover(one.creator) == 1
    assert [one.raw.operation_state(leader, handle & 0xFF) for handle in handles] == [FREE]
    assert set(states(one)) == {RESET}


def test_slots_that_a_live_worker_may_still_write_are_not_given_back(one: Instance) -> None:
    with (
        actor(hold_submitted_operations, one.name) as leader,
        actor(hold_worker_line, one.name) as worker,
    ):
        number, handles = leader.result()
        worker.pipe.send(number)
        assert worker.result() == "claimed"
        claim_rank(one, number, handles[0])
        leader.kill()
        recover(one.creator)
        assert states(one).count(PARTIAL) == 3
        assert [p.role for p in participants(one.creator)] == ["leader", "worker"]
        worker.kill()
        assert recover(one.creator) == 2
    assert set(states(one)) == {RESET}


def claim_rank(one: Instance, leader: int, handle: int) -> None:
    """Mark rank 0 of an operation as running, as its worker does before it copies."""
    with one.writable() as raw:
        at = raw.operation_at(leader, handle & 0xFF)
        raw.put_u64(at, raw.u64(at) & ~3 | 1)


def test_a_stopped_participant_stops_nobody(one: Instance) -> None:
    table = one.leader()
    with actor(hold_reserved_and_pinned, one.name) as them:
        them.result()
        them.signal(signal.SIGSTOP)
        keys = Keys(digests(20, "mine"))
        refs = [ref for ref, _ in table.reserve(keys, 0, 20)]
        assert table.publish(refs) == 20
        assert recover(table.segment) == 0, "a stopped process is alive"
        for ref in refs:
            table.unpin(ref)
        assert table.match(keys, 0, 20)[0] == 20
        table.unpin(refs[-1])
        them.signal(signal.SIGCONT)
        them.kill()
    assert recover(table.segment) == 1


def test_a_count_that_a_crash_left_too_high_is_recounted(one: Instance) -> None:
    table = one.leader()
    refs = [ref for ref, _ in table.reserve(Keys(digests(3)), 0, 3)]
    table.publish(refs)
    for ref in refs:
        table.unpin(ref)
    with one.writable() as raw:  # counted on the parent [P1], then the publisher died
        at = raw.block_at(block_of(refs[2]))
        raw.put_u64(at, raw.u64(at) + (1 << 24))
    assert one.raw.block(block_of(refs[2])).children == 1
    recover(table.segment, rebuild=True)
    assert [one.raw.block(block_of(ref)).children for ref in refs] == [1, 1, 0]


def test_a_slot_that_nobody_names_is_found_again(one: Instance) -> None:
    table = one.leader()
    with one.writable() as raw:  # taken from the pool, then the taker died
        raw.put_u64(raw.at["pool 1"], raw.u64(raw.at["pool 1"]) & ~0b1010)
    assert len(one.raw.free(1)) == 30
    recover(table.segment, rebuild=True)
    assert len(one.raw.free(1)) == 32


def test_a_recovery_flag_left_by_a_dead_recoverer_is_cleared(one: Instance) -> None:
    table = one.leader()
    with one.writable() as raw:
        raw.put_u32(192, 1)
    assert table.reserve(Keys(digests(1)), 0, 1) == [], "the structure declines while it is set"
    recover(table.segment)
    held = table.reserve(Keys(digests(1)), 0, 1)
    assert len(held) == 1
    table.abandon_reserved([ref for ref, _ in held])


@pytest.mark.parametrize("role", [0, 7])
def test_lines_that_nobody_has_locked_keep_no_recovery_from_its_end(
    make_instance: MakeInstance, role: int
) -> None:
    one = make_instance(host_slots=16)
    keys = Keys(digests(4))
    cache(one.leader(), keys)
    with one.writable() as raw:
        for line in range(1, LINES):
            raw.put_u32(raw.line_at(line), 0xFFFFFFFF)  # inside
            raw.put_u32(raw.line_at(line) + 4, role)
        raw.put_u64(raw.at["pool 0"], 0)
    assert recover(one.attach(), rebuild=True) == (0 if role == 0 else LINES - 1)
    assert len(one.raw.free(0)) == 12
    assert not any(one.raw.u32(one.raw.line_at(line)) for line in range(LINES))


def test_a_line_that_somebody_has_locked_does(make_instance: MakeInstance) -> None:
    one = make_instance(host_slots=16)
    one.leader()
    with one.writable() as raw:
        raw.put_u32(raw.line_at(0), 1)
        raw.put_u64(raw.at["pool 0"], 0)
        recover(one.attach(), rebuild=True)
        assert one.raw.free(0) == set()
        raw.put_u32(raw.line_at(0), 0)
        recover(one.attach(), rebuild=True)
    assert len(one.raw.free(0)) == 16
