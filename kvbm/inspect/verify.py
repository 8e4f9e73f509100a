# SPDX-License-Identifier: Apache-2.0
"""Check the invariants of docs/protocol.md on a captured segment.

What must hold after every step, deaths included, is always checked. What holds only at rest (nobody
attached that could be at work, nobody dead who was not recovered) is checked then, and otherwise
named as not checked. A segment in use moves while it is read: `verify` reads again, and what does
not stand in the same place with the same words in every reading was a step in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kvbm._fast import contract
from kvbm.inspect.capture import capture
from kvbm.inspect.decode import Mask, Segment
from kvbm.inspect.records import part
from kvbm.inspect.slab_segment import decoded
from kvbm.inspect.verify_rest import REST_CHECKS, resting_problem
from kvbm.inspect.verify_slabs import (
    BESIDE_TABLE,
    OF_SLABS,
    check_beside_table,
    check_slabs,
    unread_slabs,
)
from kvbm.inspect.violations import Violation, listed

READINGS = 8
"""Most readings: a busy small table may be caught three times in steps that look alike."""
PAUSE_SECS = 0.05


class Verdict(NamedTuple):
    """Result of a check.

    Attributes
    ----------
    violations : list of Violation
        What does not hold.
    unchecked : list of str
        What could not be checked, and why.
    checked : list of str
        Names of the rules that were checked.
    """

    violations: list[Violation]
    unchecked: list[str]
    checked: list[str]


def verify(source: str, slot_headers: bool = True) -> tuple[Segment, Verdict]:
    """Check an instance or a file.

    Raises
    ------
    InspectError
        It cannot be read.
    """
    segment = decoded(capture(source, slot_headers))
    verdict = check(segment)
    if segment.capture.kind not in ("live", "slab"):
        return segment, verdict
    for _ in range(READINGS - 1):
        if not verdict.violations or segment.capture.in_use is False:
            break
        time.sleep(PAUSE_SECS)
        again = check(decoded(capture(source, slot_headers)))
        keep = {violation.key for violation in again.violations}
        still = [violation for violation in verdict.violations if violation.key in keep]
        verdict = verdict._replace(violations=still)
    return segment, verdict


def check(segment: Segment) -> Verdict:
    """Check one reading: the tables of all tiers, and the slabs."""
    if segment.capture.kind == "slab":
        verdict = Verdict([*check_slabs(segment)], [], [OF_SLABS])
        verdict.unchecked.append("the bytes of the blocks: their checksums, when they are loaded")
        return verdict
    verdict = _check_table(segment)
    if segment.disk is not None:
        more = _check_disk(segment.disk)
        verdict.violations.extend(more.violations)
        verdict.unchecked.extend(more.unchecked)
        verdict.checked.extend(more.checked)
    return verdict


def _check_disk(disk: Segment) -> Verdict:
    """Check the disk tier; its rules carry the tier's name."""
    found = _check_table(disk)
    problem = unread_slabs(disk)
    found.checked.append(OF_SLABS)
    found.violations.extend(check_slabs(disk))
    if problem is None:
        found.checked.append(BESIDE_TABLE)
        found.violations.extend(check_beside_table(disk))
    else:
        found.unchecked.append(f"{BESIDE_TABLE}: {problem}")
    return Verdict(
        [Violation(f"disk {v.rule}", v.text, f"disk {v.key}") for v in found.violations],
        [f"disk {text}" for text in found.unchecked],
        [f"disk {rule}" for rule in found.checked],
    )


def _check_table(segment: Segment) -> Verdict:
    """Check one table."""
    verdict = Verdict([], [], [])
    if segment.shape is None:
        verdict.violations.append(Violation("layout", "the segment cannot be decoded", "layout"))
        return verdict
    verdict.violations.extend(Violation("layout", text, text) for text in segment.damage)
    for rule, rule_check in ALWAYS.items():
        verdict.checked.append(rule)
        verdict.violations.extend(rule_check(segment))
    if any(len(segment.slot_headers(rank)) for rank in segment.arenas):
        verdict.checked.append("I6 (arenas)")
        verdict.violations.extend(check_slot_headers(segment))
        if count := slots_written_meanwhile(segment):
            verdict.unchecked.append(f"I6 (arenas): {count} slots written during the snapshot")
    elif not segment.is_of_disk:
        verdict.unchecked.append("I6 (arenas): no headers of slots are in this capture")
    problem = resting_problem(segment)
    if problem is not None:
        verdict.unchecked.append(f"at rest ({', '.join(REST_CHECKS)}): {problem}")
        return verdict
    for rule, rule_check in REST_CHECKS.items():
        verdict.checked.append(rule)
        verdict.violations.extend(rule_check(segment))
    return verdict


# ---- after every step ----------------------------------------------------------------------------
def check_parents(segment: Segment) -> Iterator[Violation]:
    """I1: the parent of a registered block is registered, of the generation that the child names.

    What can be seen of "the block before it in the chain": one position further up, same group.
    """
    blocks = segment.blocks
    registered = blocks.of_state("registered")
    child = registered & (blocks.parent >= 0)
    outside = child & (blocks.parent >= len(blocks))
    yield from listed(
        "I1",
        outside,
        lambda b: f"block {b} names parent {blocks.parent[b]}, which is no block",
        blocks.words,
    )
    if len(blocks) == 0:
        return
    parent = np.where(blocks.parent_in_table, blocks.parent, 0)
    gone = child & ~outside & ~(registered[parent] & blocks.parent_found)
    yield from listed(
        "I1",
        gone,
        lambda b: (
            f"block {b} is registered below {blocks.parent[b]} of generation "
            f"{blocks.parent_generation[b]}, which is "
            f"{contract.BLOCK_STATES.get(int(blocks.state[parent[b]]), 'unknown')} "
            f"of generation {blocks.generation[parent[b]]}"
        ),
        blocks.words,
    )
    placed = child & ~outside & ~gone
    misplaced = placed & (
        (blocks.position != blocks.position[parent] + 1) | (blocks.group != blocks.group[parent])
    )
    yield from listed(
        "I1",
        misplaced,
        lambda b: (
            f"block {b} at position {blocks.position[b]} of group {blocks.group[b]} is below "
            f"block {blocks.parent[b]} at {blocks.position[parent[b]]} of {blocks.group[parent[b]]}"
        ),
        blocks.words,
    )


def check_counts(segment: Segment) -> Iterator[Violation]:
    """I2: a block counts at least the registered blocks below it."""
    blocks = segment.blocks
    found = blocks.registered_children
    few = blocks.of_state("registered") & (blocks.children < found)
    yield from listed(
        "I2",
        few,
        lambda b: f"block {b} counts {blocks.children[b]} children, it has {found[b]}",
        blocks.words,
    )


def check_slots(segment: Segment) -> Iterator[Violation]:
    """I4: a slot has one block, and no free slot or record is named by one."""
    blocks = segment.blocks
    live = ~blocks.of_state("reset")
    free = segment.free("blocks")
    yield from listed(
        "I4",
        live[: len(free)] & free[: len(live)],
        lambda b: f"record {b} is free and its block is not reset",
        blocks.words,
    )
    for tier, name in segment.checked_tiers.items():
        yield from _slots_of_tier(segment, tier, name)


def _slots_of_tier(segment: Segment, tier: int, name: str) -> Iterator[Violation]:
    blocks, capacity = segment.blocks, segment.capacity(name)
    placed = ~blocks.of_state("reset") & (blocks.placement_state[:, tier] != 0)
    slot = blocks.slot[:, tier]
    outside = placed & (slot >= capacity)
    yield from listed(
        "I4", outside, lambda b: f"block {b} has slot {slot[b]}: {name} has no such", blocks.words
    )
    named = np.bincount(slot[placed & ~outside], minlength=capacity)
    yield from listed("I4", named > 1, lambda s: f"{name} slot {s} is named by more than one block")
    yield from listed(
        "I4",
        (named > 0) & segment.free(name),
        lambda s: f"{name} slot {s} is free and named by a block",
    )


def check_placements(segment: Segment) -> Iterator[Violation]:
    """I6, as far as the segment shows it: a registered block is READY somewhere, of its life."""
    blocks = segment.blocks
    registered = blocks.of_state("registered")
    ready = (blocks.placement_state == 2) & (
        blocks.placement_generation == blocks.generation[:, None]
    )
    yield from listed(
        "I6",
        registered & ~ready.any(axis=1),
        lambda b: f"block {b} is registered without a ready placement of its generation",
        blocks.words,
    )
    yield from listed(
        "I6",
        registered & ((blocks.placement_state > 2).any(axis=1)),
        lambda b: f"block {b} has a placement in no known state",
        blocks.words,
    )


def check_slot_headers(segment: Segment) -> Iterator[Violation]:
    """I6, as far as the arenas show it: the slot of a registered block is filled with its bytes.

    The header of a slot, which its worker writes after the bytes, names digest and generation.
    """
    for rank in segment.arenas:
        yield from _headers_of_rank(segment, rank)


def _headers_of_rank(segment: Segment, rank: int) -> Iterator[Violation]:
    wrong, later = _wrong_headers(segment, rank)
    slot = segment.blocks.slot[:, 0]
    yield from listed(
        "I6 (arenas)",
        wrong & ~later if _was_in_use(segment) else wrong,
        lambda b: f"rank {rank}: slot {slot[b]} does not hold block {b}'s bytes",
        segment.blocks.words,
    )


def slots_written_meanwhile(segment: Segment) -> int:
    """Slots that got a newer block between the readings of table and arenas, in a snapshot.

    A live instance is read again instead.
    """
    if not _was_in_use(segment):
        return 0
    found = [_wrong_headers(segment, rank) for rank in segment.arenas]
    return sum(int((wrong & later).sum()) for wrong, later in found)


def _was_in_use(segment: Segment) -> bool:
    """Whether somebody worked in the instance when the snapshot was taken."""
    lines = np.flatnonzero(segment.participants["role"])
    return segment.capture.kind == "snapshot" and any(segment.is_alive(int(n)) for n in lines)


def _wrong_headers(segment: Segment, rank: int) -> tuple[Mask, Mask]:
    """Blocks whose slot's header is not of them, and those whose is of a later generation."""
    blocks, headers = segment.blocks, segment.slot_headers(rank)
    slot = blocks.slot[:, 0]
    seen = blocks.of_state("registered") & (blocks.placement_state[:, 0] == 2)
    seen &= slot < len(headers)
    if len(headers) == 0:
        return seen, seen
    header = headers[np.where(seen, slot, 0)]
    digest = blocks.digests.view("<u8")
    generation = (header["word"] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    right = (
        ((header["word"] >> np.uint64(60)) == 2)
        & (generation == blocks.generation)
        & (header["digest_lo"] == digest[:, 0])
        & (header["digest_hi"] == digest[:, 1])
    )
    ahead = (generation - blocks.generation) % (1 << 32)
    return seen & ~right, (ahead > 0) & (ahead < 1 << 31)


def check_words(segment: Segment) -> Iterator[Violation]:
    """The block words are ones that the protocol can make."""
    blocks = segment.blocks
    one = (blocks.holders != 0) & (blocks.holders & (blocks.holders - 1) == 0)
    yield from listed(
        "words",
        blocks.state > 3,
        lambda b: f"block {b} is in no known state ({blocks.state[b]})",
        blocks.words,
    )
    owned = blocks.of_state("partial") | blocks.of_state("evicting")
    yield from listed(
        "words",
        owned & ~one,
        lambda b: f"block {b} is between two states without one owner",
        blocks.words,
    )
    yield from listed(
        "words",
        blocks.of_state("reset") & (blocks.holders != 0),
        lambda b: f"block {b} is reset and held",
        blocks.words,
    )
    yield from listed(
        "words",
        blocks.of_state("partial") & (blocks.children != 0),
        lambda b: f"block {b} has children before it is registered",
        blocks.words,
    )


def check_pools(segment: Segment) -> Iterator[Violation]:
    """No record or slot beyond a pool's end is free."""
    for pool, section in segment.checked_pools.items():
        words = segment.array(f"pool.{section}")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        if bits[segment.capacity(pool) :].any():
            text = f"{pool} beyond the end of the pool are free"
            yield Violation("pools", text, text)


def check_operations(segment: Segment) -> Iterator[Violation]:
    """The operation words are ones that the protocol can make; rows name records that exist."""
    records = segment.operations
    ranks = segment.shape.ranks if segment.shape else 0
    state = part(records["word"], "operation", "state")
    progress = part(records["word"], "operation", "ranks") & ((1 << 2 * ranks) - 1)
    each = (progress[:, None] >> (2 * np.arange(ranks))) & 3
    in_use = state != 0
    running = (each < 2).any(axis=1)
    failed = (each == 3).any(axis=1)
    wrong = state > 5
    ended = (state == 3) | (state == 4)  # finishing, complete
    wrong |= ended & (running | failed)
    wrong |= (state == 5) & (running | ~failed)  # failed
    wrong |= (state == 2) & (each == 0).any(axis=1)  # cancelled: nothing pending
    kind: Mask = (records["kind"] == 0) | (records["kind"] > max(contract.OPERATION_KINDS))
    kind |= records["row_count"] > contract.ROWS
    yield from listed("operations", wrong, lambda n: f"{_place(n)}: impossible word")
    yield from listed(
        "operations", in_use & kind, lambda n: f"{_place(n)}: impossible kind or number of rows"
    )
    row = np.arange(contract.ROWS) < np.minimum(records["row_count"], contract.ROWS)[:, None]
    outside = row & (records["rows"]["block"] >= len(segment.blocks))
    yield from listed(
        "operations",
        in_use & outside.any(axis=1),
        lambda n: f"{_place(n)}: a row names a block that does not exist",
    )
    yield from _disk_slots_of_rows(segment, row & in_use[:, None])


def _disk_slots_of_rows(segment: Segment, rows: Mask) -> Iterator[Violation]:
    """Rows of a spill and of a fetch name disk slots."""
    records = segment.operations
    names = {name: number for number, name in contract.OPERATION_KINDS.items()}
    moves = (records["kind"] == names["spill"]) | (records["kind"] == names["fetch"])
    slots = segment.shape.disk_slots if segment.shape else 0
    outside: Mask = rows & (records["rows"]["device_block"] >= slots)
    yield from listed(
        "operations",
        moves & outside.any(axis=1),
        lambda n: f"{_place(n)}: a row names a disk slot that does not exist",
    )


def _place(number: int) -> str:
    leader, index = divmod(number, contract.OPERATIONS_PER_LEADER)
    return f"operation {index} of leader {leader}"


def check_rings(segment: Segment) -> Iterator[Violation]:
    """A ring has at most as many entries as it has places, and they name operations."""
    rings = segment.rings
    ranks = segment.shape.ranks if segment.shape else 1
    queued = (rings["head"] - rings["tail"]).astype(np.int64)
    size = contract.OPERATIONS_PER_LEADER
    full = queued > size
    yield from listed(
        "rings", full, lambda n: f"rank {n % ranks} of leader {n // ranks} has {queued[n]} entries"
    )
    place = (rings["tail"][:, None] + np.arange(size, dtype=np.uint32)) % size
    entry = np.take_along_axis(rings["entry"], place.astype(np.int64), axis=1)
    waiting = np.arange(size) < np.where(full, 0, queued)[:, None]
    outside: Mask = part(entry, "ring", "operation") >= size
    outside &= waiting
    yield from listed(
        "rings",
        np.logical_or.reduce(outside, axis=1),
        lambda n: f"rank {n % ranks} of leader {n // ranks} waits for no operation",
    )


def check_header(segment: Segment) -> Iterator[Violation]:
    """Lines have the roles of their places; no rank says more than there is."""
    role = segment.participants["role"]
    line = np.arange(len(role))
    wrong = (role != 0) & (role != np.where(line < contract.LEADERS, 1, 2))
    yield from listed("lines", wrong, lambda n: f"line {n} has role {role[n]}")
    header = segment.header
    capacity = segment.capacity("host")
    over = header["ready_slots"] > capacity
    yield from listed("header", over, lambda r: f"rank {r} says more slots usable than there are")


ALWAYS: dict[str, Callable[[Segment], Iterator[Violation]]] = {
    "I1": check_parents,
    "I2": check_counts,
    "I4": check_slots,
    "I6": check_placements,
    "words": check_words,
    "pools": check_pools,
    "operations": check_operations,
    "rings": check_rings,
    "header": check_header,
}
