# SPDX-License-Identifier: Apache-2.0
"""Who is attached: claim a participant line, find a leader, tell the living from the dead.

A line belongs to the process that holds the exclusive lock on its byte; the kernel drops the lock
at death, so a line that is marked as used but not locked belonged to a dead process, and recovery
(kvbm/_fast/recovery.pyx) returns what it held before it can be claimed again.
"""
import os
import time
from typing import NamedTuple

from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport (
    kv_u32_load_acquire,
    kv_u32_load_relaxed,
    kv_u32_store_relaxed,
    kv_u32_store_release,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
)
from kvbm._fast.layout cimport (
    KV_COUNTERS,
    KV_LEADERS,
    KV_NONE,
    KV_PARTICIPANTS,
    KV_RANKS,
    KV_ROLE_LEADER,
    KV_ROLE_NONE,
    KV_ROLE_WORKER,
    kv_participant,
    kv_worker_line,
)
from kvbm._fast.locks cimport lock_drop, lock_held_by_other, lock_take
from kvbm._fast.segment cimport Segment, line_lock

from kvbm._fast.segment import COUNTER_NAMES, SegmentFault

ROLES = {KV_ROLE_LEADER: "leader", KV_ROLE_WORKER: "worker"}


class Participant(NamedTuple):
    """One attached process, as its line shows it."""

    line: int
    role: str
    leader: int
    rank: int | None
    pid: int
    epoch: int
    started_ns: int
    engine_key: int
    alive: bool
    inside: bool
    step_bound: int
    step_filled: int


def line_is_alive(Segment segment not None, line: int) -> bool:
    """True if a process holds the lock of a participant line (this one's own lines included)."""
    segment.check_open()
    if not 0 <= line < KV_PARTICIPANTS:
        raise IndexError(f"line {line} is outside 0..{KV_PARTICIPANTS - 1}")
    return line == segment.view.self or lock_held_by_other(segment.fd, line_lock(line)) == 1


cdef int check_without_line(Segment segment) except -1:
    segment.check_writable()
    if segment.view.self != KV_NONE:
        raise SegmentFault("full", f"this attachment to {segment.name} already has a line")
    return 0


def claim_leader(Segment segment not None, engine_key: int) -> int:
    """Become a leader: take the first leader slot whose own and whose workers' lines are unused.

    The caller recovers what dead owners left before it claims (`recovery.recover`): a line that is
    still marked as used is skipped.

    Parameters
    ----------
    engine_key : int
        64-bit hash of the engine's id; its workers find their leader by it.

    Raises
    ------
    SegmentFault
        All leader slots are taken ("full").
    """
    cdef uint32_t leader
    check_without_line(segment)
    for leader in range(KV_LEADERS):
        if not take_line(segment, leader):
            continue
        if (kv_u32_load_acquire(&segment.view.participants[leader].role) != KV_ROLE_NONE
                or not workers_are_gone(segment, leader)):
            lock_drop(segment.fd, line_lock(leader))
            continue
        clear_rings(segment, leader)
        mark_line(segment, leader, KV_ROLE_LEADER, leader, engine_key)
        return leader
    raise SegmentFault("full", f"{segment.name} has {KV_LEADERS} leaders already")


def claim_worker(Segment segment not None, leader: int, rank: int,
                 engine_key: int | None = None) -> None:
    """Become rank `rank` of a leader.

    Parameters
    ----------
    leader, rank : int
        Which line.
    engine_key : int, optional
        The leader must be alive and of this engine: its slot may be another engine's by now.

    Raises
    ------
    SegmentFault
        Another process is that rank, one that died as it is not cleaned up yet, or the leader is
        not the one that was meant ("full"); may pass, try again.
    """
    cdef kv_participant *owner
    check_without_line(segment)
    if not 0 <= leader < KV_LEADERS or not 0 <= rank < segment.view.shape.ranks:
        raise IndexError(
            f"leader {leader} rank {rank} is outside {KV_LEADERS} x {segment.view.shape.ranks}")
    line = kv_worker_line(leader, rank)
    if not take_line(segment, line):
        raise SegmentFault("full", f"rank {rank} of leader {leader} in {segment.name} is taken")
    owner = &segment.view.participants[leader]
    if (kv_u32_load_acquire(&segment.view.participants[line].role) != KV_ROLE_NONE
            or (engine_key is not None and (
                kv_u32_load_acquire(&owner.role) != KV_ROLE_LEADER
                or kv_u64_load_acquire(&owner.engine_key) != <uint64_t>engine_key
                or lock_held_by_other(segment.fd, line_lock(leader)) != 1))):
        lock_drop(segment.fd, line_lock(line))
        raise SegmentFault(
            "full", f"rank {rank} of leader {leader} in {segment.name} cannot be claimed now")
    mark_line(segment, line, KV_ROLE_WORKER, leader, kv_u64_load_acquire(&owner.engine_key))


def find_leader(Segment segment not None, engine_key: int) -> int | None:
    """Leader slot of a live engine, None if it has not claimed one yet."""
    cdef uint32_t leader
    cdef kv_participant *p
    segment.check_open()
    for leader in range(KV_LEADERS):
        p = &segment.view.participants[leader]
        if (kv_u32_load_acquire(&p.role) == KV_ROLE_LEADER
                and kv_u64_load_acquire(&p.engine_key) == <uint64_t>engine_key
                and (leader == segment.view.self
                     or lock_held_by_other(segment.fd, line_lock(leader)) == 1)):
            return leader
    return None


cdef bint take_line(Segment segment, uint32_t line) noexcept:
    return lock_take(segment.fd, line_lock(line), True) == 1


cdef bint workers_are_gone(Segment segment, uint32_t leader) noexcept:
    cdef uint32_t rank
    for rank in range(segment.view.shape.ranks):
        if lock_held_by_other(segment.fd, line_lock(kv_worker_line(leader, rank))) != 0:
            return False
    return True


cdef void clear_rings(Segment segment, uint32_t leader) noexcept:
    """Nobody reads or writes these rings now: the leader before is dead and so are its workers."""
    cdef uint32_t rank
    cdef uint64_t first = <uint64_t>leader * segment.view.shape.ranks
    for rank in range(segment.view.shape.ranks):
        kv_u32_store_relaxed(&segment.view.rings[first + rank].head, 0)
        kv_u32_store_relaxed(&segment.view.rings[first + rank].tail, 0)


cdef int mark_line(Segment segment, uint32_t line, uint32_t role, uint32_t leader,
                   uint64_t engine_key) except -1:
    cdef kv_participant *p = &segment.view.participants[line]
    kv_u32_store_relaxed(&p.inside, 0)
    kv_u32_store_relaxed(&p.pid, os.getpid())
    kv_u32_store_relaxed(&p.epoch, kv_u32_load_relaxed(&p.epoch) + 1)
    kv_u64_store_relaxed(&p.engine_key, engine_key)
    kv_u64_store_relaxed(&p.started_ns, time.time_ns())
    kv_u64_store_relaxed(&p.step_bound, 0)
    kv_u64_store_relaxed(&p.step_filled, 0)
    kv_u32_store_relaxed(&p.attached, 0)
    kv_u32_store_relaxed(&p.disk_slots, 0)
    kv_u32_store_release(&p.role, role)
    segment.view.self = line
    segment.view.leader = leader
    return 0


def participants(Segment segment not None) -> list[Participant]:
    """All lines that are marked as used, alive or dead."""
    cdef kv_participant *p
    cdef uint32_t line
    segment.check_open()
    found = []
    for line in range(KV_PARTICIPANTS):
        p = &segment.view.participants[line]
        role = kv_u32_load_acquire(&p.role)
        if role == KV_ROLE_NONE:
            continue
        is_leader = line < KV_LEADERS
        found.append(Participant(
            line, ROLES.get(role, f"role {role}"),
            line if is_leader else (line - KV_LEADERS) // KV_RANKS,
            None if is_leader else (line - KV_LEADERS) % KV_RANKS, kv_u32_load_relaxed(&p.pid),
            kv_u32_load_relaxed(&p.epoch), kv_u64_load_relaxed(&p.started_ns),
            kv_u64_load_relaxed(&p.engine_key), line_is_alive(segment, line),
            kv_u32_load_relaxed(&p.inside) != 0, kv_u64_load_relaxed(&p.step_bound),
            kv_u64_load_relaxed(&p.step_filled)))
    return found


def set_attached(Segment segment not None) -> None:
    """This worker can copy to and from all slots that are published as usable."""
    segment.check_open()
    if segment.view.self == KV_NONE:
        raise SegmentFault("closed", f"this attachment to {segment.name} has no line")
    kv_u32_store_release(&segment.view.participants[segment.view.self].attached, 1)


def workers_attached(Segment segment not None) -> bool:
    """True once every rank of this leader has said `set_attached`."""
    cdef uint32_t rank
    cdef kv_participant *p
    segment.check_open()
    for rank in range(segment.view.shape.ranks):
        p = &segment.view.participants[kv_worker_line(segment.view.leader, rank)]
        if kv_u32_load_acquire(&p.role) != KV_ROLE_WORKER or not kv_u32_load_acquire(&p.attached):
            return False
    return True


def engine_counters(Segment segment not None) -> dict[str, int]:
    """Counters of one engine: those on the lines of this leader slot and of its workers.

    Lines go on with what their owners before counted, so what this engine did is the difference to
    the moment at which it claimed its slot. Other engines count on lines of their own.

    Raises
    ------
    SegmentFault
        This attachment has no line ("closed").
    """
    cdef uint32_t rank
    cdef int i
    cdef uint64_t total[KV_COUNTERS]
    segment.check_open()
    if segment.view.leader == KV_NONE:
        raise SegmentFault("closed", f"this attachment to {segment.name} has no line")
    for i in range(KV_COUNTERS):
        total[i] = kv_u64_load_relaxed(&segment.view.counters[segment.view.leader].value[i])
        for rank in range(segment.view.shape.ranks):
            total[i] += kv_u64_load_relaxed(
                &segment.view.counters[kv_worker_line(segment.view.leader, rank)].value[i])
    return {name: total[i] for i, name in enumerate(COUNTER_NAMES)}


def set_disk_slots(Segment segment not None, count: int) -> None:
    """This worker can read and write the first `count` slots of its slab; 0 takes it back."""
    segment.check_open()
    if segment.view.self == KV_NONE:
        raise SegmentFault("closed", f"this attachment to {segment.name} has no line")
    kv_u32_store_release(&segment.view.participants[segment.view.self].disk_slots, count)


def usable_disk_slots(Segment segment not None) -> int:
    """Slots of the disk tier that all ranks of this leader can use; 0 before all have a slab."""
    cdef uint32_t rank, count, least = 0xFFFFFFFFU
    cdef kv_participant *p
    segment.check_open()
    for rank in range(segment.view.shape.ranks):
        p = &segment.view.participants[kv_worker_line(segment.view.leader, rank)]
        count = kv_u32_load_acquire(&p.disk_slots)
        if kv_u32_load_acquire(&p.role) != KV_ROLE_WORKER:
            count = 0
        least = min(least, count)
    return least
