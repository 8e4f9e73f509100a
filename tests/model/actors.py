# SPDX-License-Identifier: Apache-2.0
"""The processes: what a leader, a worker or a survivor does from its start to its end."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tests.model.blocks import (
    GONE,
    NO_PARENT,
    Answer,
    Process,
    Reserved,
    block_abandon,
    block_evict,
    block_publish,
    block_reserve,
    clear_holder,
    give_back,
    index_delete,
    index_insert,
    pool_give_back,
    pool_take,
    structure_enter,
    structure_exit,
    write_digest,
)
from tests.model.cells import (
    COMPLETE,
    FETCH,
    FIRST_ENGINE,
    LEADER,
    LOAD,
    NO_ROLE,
    PARTIAL,
    REGISTERED,
    SPILL,
    STORE,
    TORN,
    WORKER,
    Header,
    Operation,
    Parent,
    Row,
)
from tests.model.disk_rows import move_row
from tests.model.explore import Actions, Step, cas, fail, load, store, wait
from tests.model.operations import (
    MUST_PUBLISH,
    has_ended,
    operation_cancel,
    operation_claim,
    operation_end,
    operation_finished,
    operation_publish,
    operation_recycle,
    operation_submit,
    ring_pop,
)
from tests.model.recovery import is_not_zero, is_zero
from tests.model.table import chain_slots, match, reserve_chain

Chain = tuple[str, ...]
ROOT = Parent(0, 0)
NOBODYS = "?"  # stands for a random digest


# ---- block table ---------------------------------------------------------------------------------
def enter_later(p: Process) -> Actions:
    """Enter the structure; where a recovery makes it decline, try again after it."""
    inside = yield from structure_enter(p)
    while not inside:
        yield wait(p.segment.recovering, "the end of a recovery", is_zero)
        inside = yield from structure_enter(p)


def reader(p: Process, chain: Chain) -> Actions:
    """Match a chain, read the bytes of all of its blocks, let go."""
    count, deepest = yield from match(p, chain)
    if deepest is None:
        return
    rows = yield from chain_slots(p, deepest, count)
    if rows is None:
        yield fail("a held chain is broken")
        return
    for i in range(count):
        for rank in range(p.segment.sizes.ranks):
            seen = yield load(p.segment.bytes[rows[i][2]][rank], "read")
            if seen != chain[i]:
                yield fail(f"wrong bytes: {seen} were read for {chain[i]}")
    yield from clear_holder(p, deepest.block)


def evictor(p: Process, victims: tuple[int, ...]) -> Actions:
    """Evict blocks and give their records and slots back."""
    inside = yield from structure_enter(p)
    if not inside:
        return
    for i in range(len(victims)):
        slot = yield from block_evict(p, victims[i])
        if slot is not None and p.rules.reset_before_give_back:
            yield from give_back(p, victims[i], slot)
    yield from structure_exit(p)


def copy_in(p: Process, slot: int, rank: int, digest: str) -> Actions:
    """Write the bytes of a block; they are worth nothing before the end."""
    on_disk = bool(p.segment.header)
    if on_disk:
        yield store(p.segment.header[slot][rank], None, "[B0]")
    yield store(p.segment.bytes[slot][rank], TORN, "copy")
    yield store(p.segment.bytes[slot][rank], digest, "copy")
    if on_disk:
        yield store(p.segment.header[slot][rank], Header(digest, digest), "[B4]")


def publish_or_abandon(p: Process, block: int, generation: int, digest: str) -> Answer:
    """Publish a block; where it has no parent, give it back. True if it is registered."""
    result = yield from block_publish(p, block, generation, digest)
    if result not in (GONE, NO_PARENT):
        return True
    slot = yield from block_abandon(p, block, generation)
    if slot is not None:
        yield from give_back(p, block, slot)
    return False


def storer(p: Process, chain: Chain, victims: tuple[int, ...] = ()) -> Actions:
    """Reserve a chain, fill it, publish it, let go; without operations."""
    inside = yield from structure_enter(p)
    if not inside:
        return
    found = yield from reserve_chain(p, chain, victims)
    yield from structure_exit(p)
    if not found:
        return
    for i in range(len(found)):
        for rank in range(p.segment.sizes.ranks):
            yield from copy_in(p, found[i].slot, rank, found[i].digest)
    yield from publish_all(p, found)


def recycler(p: Process, victims: tuple[int, ...], digest: str) -> Actions:
    """Evict blocks and store another in the last one's place, as a leader does with empty pools."""
    inside = yield from structure_enter(p)
    if not inside:
        return
    slot = None
    for i in range(len(victims)):
        if slot is not None:
            yield from give_back(p, victims[i - 1], slot)
        slot = yield from block_evict(p, victims[i])
    reserved = None
    if slot is not None:
        reserved = yield from block_reserve(p, victims[-1], slot, digest, ROOT)
        if reserved is None:
            yield from give_back(p, victims[-1], slot)
    yield from structure_exit(p)
    if reserved is None:
        return
    for rank in range(p.segment.sizes.ranks):
        yield from copy_in(p, reserved.slot, rank, digest)
    yield from publish_all(p, (reserved,))


def publish_all(p: Process, found: tuple[Reserved, ...]) -> Actions:
    """Publish reservations and let go of them."""
    yield from enter_later(p)
    for i in range(len(found)):
        registered = yield from publish_or_abandon(
            p, found[i].block, found[i].generation, found[i].digest
        )
        if registered:
            yield from clear_holder(p, found[i].block)
    yield from structure_exit(p)


def publisher(p: Process, found: tuple[Reserved, ...], owner: bool) -> Actions:
    """Publish reservations that are filled already; the owner lets go, a worker does not."""
    if owner:
        yield from publish_all(p, found)
        return
    inside = yield from structure_enter(p)
    if not inside:
        return
    for i in range(len(found)):
        yield from block_publish(p, found[i].block, found[i].generation, found[i].digest)
    yield from structure_exit(p)


def abandoner(p: Process, found: tuple[Reserved, ...]) -> Actions:
    """Give reservations back, the last first."""
    yield from enter_later(p)
    for i in range(len(found) - 1, -1, -1):
        slot = yield from block_abandon(p, found[i].block, found[i].generation)
        if slot is not None:
            yield from give_back(p, found[i].block, slot)
        else:  # somebody has published it
            yield from clear_holder(p, found[i].block)
    yield from structure_exit(p)


def pool_user(p: Process, rounds: int) -> Actions:
    """Take a slot and give it back, a few times."""
    for _ in range(rounds):
        slot = yield from pool_take(p, p.segment.free_slots)
        if slot is not None:
            yield from pool_give_back(p, p.segment.free_slots, slot)


def identify(p: Process, block: int, digest: str) -> Answer:
    """Give a reservation another digest: kvbm/_fast/control.pyx."""
    inside = yield from structure_enter(p)
    if not inside:
        return False
    old = yield load(p.segment.digest[block][0], "old digest")
    yield from index_delete(p, old, block)
    yield from write_digest(p, block, digest)
    yield store(p.segment.parent[block], ROOT, "parent")
    done = yield from index_insert(p, digest, block, False)
    yield from structure_exit(p)
    return done


def late_namer(p: Process, digests: Chain) -> Actions:
    """Reserve a block under a digest that nobody looks for, fill it, name it, publish it.

    Where the rule is broken it is named more than once, as if a first publication had failed.
    """
    inside = yield from structure_enter(p)
    if not inside:
        return
    found = yield from reserve_chain(p, (NOBODYS,), ())
    yield from structure_exit(p)
    if not found:
        return
    names = digests[:1] if p.rules.identified_once else digests
    for rank in range(p.segment.sizes.ranks):
        yield from copy_in(p, found[0].slot, rank, names[-1])
    for i in range(len(names)):
        named = yield from identify(p, found[0].block, names[i])
        if not named:
            yield from abandoner(p, found)
            return
    yield from publish_all(p, found)


# ---- operations ----------------------------------------------------------------------------------
def await_end(p: Process, index: int, generation: int) -> Generator[Step, Any, str]:
    """Wait for an operation; after a deadline cancel it, which leaves only what is running."""
    cell = p.segment.operation[p.leader][index]
    limited = p.rules.waits_have_deadlines
    word = yield wait(cell, "the end of its operation", has_ended, deadline=limited)
    if word is None:
        yield from operation_cancel(p, p.leader, index, generation)
        word = yield wait(cell, "the end of its operation", has_ended)
    return str(word.state)


def store_leader(
    p: Process, chain: Chain, victims: tuple[int, ...] = (), cancels: bool = False
) -> Actions:
    """Store a chain through operation 0: reserve, submit, collect."""
    inside = yield from structure_enter(p)
    if not inside:
        return
    found = yield from reserve_chain(p, chain, victims)
    yield from structure_exit(p)
    if not found:
        return
    rows = tuple(Row(r.block, r.generation, r.slot, r.digest) for r in found)
    generation = yield from operation_submit(p, 0, Operation(STORE, rows))
    if generation is None:
        yield from abandoner(p, found)
        return
    if cancels:
        yield from operation_cancel(p, p.leader, 0, generation)
    yield from collect_store(p, 0, generation, rows)


def collect_store(
    p: Process, index: int, generation: int, rows: tuple[Row, ...]
) -> Generator[Step, Any, str]:
    """Wait for a store or a fetch; publish what has arrived, give the rest back, recycle."""
    state = yield from await_end(p, index, generation)
    yield from enter_later(p)
    for i in range(len(rows)):
        if state == COMPLETE:
            registered = yield from publish_or_abandon(
                p, rows[i].block, rows[i].generation, rows[i].digest
            )
            if registered:
                yield from clear_holder(p, rows[i].block)
        else:
            slot = yield from block_abandon(p, rows[i].block, rows[i].generation)
            if slot is not None:
                yield from give_back(p, rows[i].block, slot)
    yield from structure_exit(p)
    yield from operation_recycle(p, p.leader, index)
    return state


def load_leader(p: Process, chain: Chain, skip: int = 0) -> Actions:
    """Match a chain and load it, but for the last `skip` blocks, through operation 0."""
    count, deepest = yield from match(p, chain)
    if deepest is None:
        return
    found = yield from chain_slots(p, deepest, count)
    if found is None:
        yield fail("a held chain is broken")
        return
    rows = tuple(
        Row(block, generation, slot, digest)
        for (block, generation, slot), digest in zip(found, chain[: count - skip], strict=False)
    )
    generation = yield from operation_submit(p, 0, Operation(LOAD, rows))
    if generation is not None:
        yield from await_end(p, 0, generation)
        yield from operation_recycle(p, p.leader, 0)
    yield from clear_holder(p, deepest.block)


def ring_leader(p: Process, script: tuple[str, ...]) -> Actions:
    """Submit ("s0") and cancel ("c0") empty stores, then collect what is not collected yet."""
    generations = (None,) * p.segment.sizes.operations
    for i in range(len(script)):
        index = int(script[i][1])
        if script[i][0] == "s":
            generation = yield from operation_submit(p, index, Operation(STORE, ()))
            generations = (*generations[:index], generation, *generations[index + 1 :])
        elif generations[index] is not None:
            yield from operation_cancel(p, p.leader, index, generations[index])
            yield from await_and_recycle(p, index)
            generations = (*generations[:index], None, *generations[index + 1 :])
    for index in range(len(generations)):
        if generations[index] is not None:
            yield from await_and_recycle(p, index)


def await_and_recycle(p: Process, index: int) -> Actions:
    """Wait for an operation, without a deadline, and free it."""
    cell = p.segment.operation[p.leader][index]
    yield wait(cell, f"the end of operation {index}", has_ended)
    yield from operation_recycle(p, p.leader, index)


def rows_are_valid(p: Process, what: Operation) -> Answer:
    """Compare state and generation of each row's block with what the row says."""
    wanted = PARTIAL if what.kind in (STORE, FETCH) else REGISTERED
    rows = what.rows
    for i in range(len(rows)):
        word = yield load(p.segment.word[rows[i].block], "row")
        if word.state != wanted or word.generation != rows[i].generation:
            return False
    return True


def run_rows(p: Process, what: Operation) -> Answer:
    """Copy the rows of an operation that this rank has claimed; True if all is well."""
    rows = what.rows
    if p.rules.rows_checked:
        valid = yield from rows_are_valid(p, what)
        if not valid:
            return False
    wrong = ""
    for i in range(len(rows)):
        if what.kind in (SPILL, FETCH):
            moved = yield from move_row(p, what.kind, rows[i])
            if not moved:
                yield store(p.segment.failed_row[p.leader][0], i + 1, "failed row")
                return False
            continue
        if what.kind == STORE:
            yield from copy_in(p, rows[i].slot, p.rank, rows[i].digest)
            continue
        seen = yield load(p.segment.bytes[rows[i].slot][p.rank], "copy")
        if seen != rows[i].digest:
            wrong = seen
    if p.rules.rows_checked:
        valid = yield from rows_are_valid(p, what)
        if not valid:
            return False
    if wrong:
        yield fail(f"wrong bytes: a load that passed its checks has brought {wrong}")
    return True


def worker(p: Process, operations: int, key: str = FIRST_ENGINE) -> Actions:
    """Run operations of the own engine from the ring."""
    for _ in range(operations):
        index, generation = yield from ring_pop(p)
        claimed = yield from operation_claim(p, index, generation)
        if not claimed:
            continue
        what = yield load(p.segment.fields[p.leader][index], "fields")
        found = yield load(p.segment.key[p.leader], "whose operation")
        if found != key:
            yield fail(f"a worker of the {key} runs an operation of the {found}")
        done = yield from run_rows(p, what)
        result = yield from operation_end(p, p.leader, index, p.rank, done)
        if result == MUST_PUBLISH:
            yield from operation_publish(p, index)
            yield from operation_finished(p, p.leader, index)


# ---- who comes and goes --------------------------------------------------------------------------
def take_line(p: Process) -> Answer:
    """Take the lock of a line once it is free; False if the line is still marked as used."""
    yield wait(p.segment.lock[p.line], "a free line", is_zero)
    taken, _ = yield cas(p.segment.lock[p.line], 0, p.number, "take lock")
    if not taken:
        return False
    if p.rules.claim_checks_role:
        role = yield load(p.segment.role[p.line], "role")
        if role != NO_ROLE:
            yield store(p.segment.lock[p.line], 0, "drop lock")
            return False
    return True


def leader_is(p: Process, key: str) -> Answer:
    """Whether the leader of a worker's line is alive and belongs to its engine."""
    role = yield load(p.segment.role[p.leader], "role of leader")
    alive = yield load(p.segment.lock[p.leader], "leader alive?")
    found = yield load(p.segment.key[p.leader], "key of leader")
    return bool(role == LEADER and alive and found == key)


def late_worker(p: Process, operations: int, key: str) -> Actions:
    """Become a rank of an engine's leader, then work."""
    taken = yield from take_line(p)
    if not taken:
        return
    if p.rules.claim_checks_leader:
        mine = yield from leader_is(p, key)
        if not mine:
            yield store(p.segment.lock[p.line], 0, "drop lock")
            return
    yield store(p.segment.inside[p.line], 0, "line")
    yield store(p.segment.role[p.line], WORKER, "line")
    yield from worker(p, operations, key)


def workers_are_gone(p: Process) -> Answer:
    """Whether no process holds the line of a worker of this leader slot."""
    for rank in range(p.segment.sizes.ranks):
        line = p.segment.worker_line(p.leader, rank)
        alive = yield load(p.segment.lock[line], "worker alive?")
        if alive:
            return False
    return True


def late_leader(p: Process, chain: Chain, key: str) -> Actions:
    """Become a leader, then store."""
    segment = p.segment
    taken = yield from take_line(p)
    if not taken:
        return
    gone = yield from workers_are_gone(p)
    if not gone:
        yield store(segment.lock[p.line], 0, "drop lock")
        return
    for rank in range(segment.sizes.ranks):
        yield store(segment.head[p.leader][rank], 0, "clear ring")
        yield store(segment.tail[p.leader][rank], 0, "clear ring")
    yield store(segment.inside[p.line], 0, "line")
    yield store(segment.key[p.leader], key, "line")
    yield store(segment.role[p.line], LEADER, "line")
    yield from store_leader(p, chain)


def storer_after_crash(p: Process, chain: Chain) -> Actions:
    """Store a chain once somebody has died."""
    yield wait(p.segment.crashed, "a death", is_not_zero)
    yield from storer(p, chain)
