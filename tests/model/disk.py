# SPDX-License-Identifier: Apache-2.0
"""What leaders do between two tables: kvbm/leader/disk_tier.py and kvbm/_fast/disk_table.pyx.

`p` is the leader in the host tier's segment, `p.disk` the same leader in the disk tier's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from tests.model.actors import (
    NOBODYS,
    ROOT,
    Chain,
    abandoner,
    await_end,
    collect_store,
    enter_later,
    evictor,
    publish_all,
    publish_or_abandon,
    recycler,
    storer_after_crash,
)
from tests.model.blocks import (
    Found,
    Process,
    Reserved,
    block_evict,
    block_pin,
    block_reserve,
    clear_holder,
    give_back,
    index_find,
    pool_give_back,
    pool_take,
    structure_enter,
    structure_exit,
)
from tests.model.cells import COMPLETE, FAILED, FETCH, SPILL, Header, Operation, Parent, Row
from tests.model.explore import Actions, Step, cas, fail, load, store, wait
from tests.model.operations import operation_recycle, operation_submit
from tests.model.recovery import is_not_zero, recover_after_crash
from tests.model.table import chain_slots, match, reserve_chain


def other(p: Process) -> Process:
    """The process in the disk tier's segment."""
    assert p.disk is not None
    return p.disk


def mixed(p: Process, chain: Chain) -> Generator[Step, Any, Chain]:
    """The digests of a chain under the key epoch that a table has now."""
    epoch = yield load(p.segment.epoch, "key epoch")
    return tuple(name + "'" * epoch for name in chain)


def below(found: Found | None) -> Parent:
    """What a block that follows this one names as its parent."""
    return ROOT if found is None else Parent(found.block + 1, found.word.generation)


def let_go(p: Process, found: Found | None) -> Actions:
    """Let go of what a match has held, if it has."""
    if found is not None:
        yield from clear_holder(p, found.block)


# ---- spills --------------------------------------------------------------------------------------
def hold(p: Process, digest: str) -> Generator[Step, Any, Found | None]:
    """Hold a registered block."""
    found = yield from index_find(p, digest)
    if found is None:
        return None
    held = yield from block_pin(p, found.block, digest)
    if not held:
        return None
    word = yield load(p.segment.word[found.block], "pinned")
    return Found(found.block, word)


def reserve_run(
    p: Process, chain: Chain, first: int, parent: Parent
) -> Generator[Step, Any, tuple[Reserved, ...]]:
    """Reserve neighbours of a chain from `first` on, or nothing."""
    inside = yield from structure_enter(p)
    if not inside:
        return ()
    found = yield from reserve_chain(p, chain[first:], (), parent)
    yield from structure_exit(p)
    if tuple(r.digest for r in found) != chain[first : first + len(found)]:
        yield from abandoner(p, found)
        return ()
    return found


def spiller(p: Process, chain: Chain) -> Actions:
    """Write what of a chain is in the host tier and not on disk, through operation 0."""
    disk = other(p)
    names = yield from mixed(disk, chain)
    depth, above = yield from match(disk, names)
    held = None
    if depth < len(chain):
        names = yield from mixed(p, chain)
        held = yield from hold(p, names[-1])
    if held is not None:
        labels = yield from mixed(disk, chain)
        found = yield from reserve_run(disk, labels, depth, below(above))
        if found:
            yield from spill(p, names, depth, held, found)
    yield from let_go(p, held)
    yield from let_go(disk, above)


def spill(
    p: Process, names: Chain, depth: int, held: Found, found: tuple[Reserved, ...]
) -> Actions:
    """Submit, collect, publish what has arrived or give it back."""
    places = yield from chain_slots(p, held, len(names))
    if places is None:
        yield fail("a held chain is broken")
        return
    rows = tuple(
        Row(*places[depth + i], names[depth + i], found[i].slot) for i in range(len(found))
    )
    if not p.rules.spill_published_last:
        yield from enter_later(other(p))
        for i in range(len(found)):
            yield from publish_or_abandon(other(p), found[i].block, found[i].generation, "")
        yield from structure_exit(other(p))
    generation = yield from operation_submit(p, 0, Operation(SPILL, rows))
    state = FAILED
    if generation is not None:
        state = yield from await_end(p, 0, generation)
        yield from operation_recycle(p, p.leader, 0)
    if state == COMPLETE:
        yield from publish_all(other(p), found)
    else:
        yield from abandoner(other(p), found)


# ---- fetches -------------------------------------------------------------------------------------
def fetcher(p: Process, chain: Chain) -> Actions:
    """Bring back what of a chain is on disk and not in the host tier, through operation 0."""
    disk = other(p)
    names = yield from mixed(p, chain)
    count, above = yield from match(p, names)
    labels = yield from mixed(disk, chain)
    end, source = yield from match(disk, labels)
    failed = None
    if source is not None and end > count:
        places = yield from chain_slots(disk, source, end)
        if places is None:
            yield fail("a held chain is broken")
            return
        failed = yield from fetch(p, names[:end], count, below(above), places)
    yield from let_go(disk, source)
    yield from let_go(p, above)
    if failed is not None:
        yield from retire(disk, labels, failed)


def fetch(
    p: Process, names: Chain, count: int, parent: Parent, places: tuple[tuple[int, int, int], ...]
) -> Generator[Step, Any, int | None]:
    """Reserve, submit, collect; the position of a block that could not be read."""
    inside = yield from structure_enter(p)
    if not inside:
        return None
    found = yield from reserve_chain(p, names[count:], (), parent)
    yield from structure_exit(p)
    if not found:
        return None
    rows = tuple(
        Row(r.block, r.generation, r.slot, r.digest, places[names.index(r.digest)][2])
        for r in found
    )
    yield store(p.segment.failed_row[p.leader][0], 0, "failed row")
    generation = yield from operation_submit(p, 0, Operation(FETCH, rows))
    if generation is None:
        yield from abandoner(p, found)
        return None
    state = yield from collect_store(p, 0, generation, rows)
    row = yield load(p.segment.failed_row[p.leader][0], "failed row")
    return names.index(rows[row - 1].digest) if state == FAILED and row else None


def retire(p: Process, chain: Chain, position: int) -> Actions:
    """Take a damaged block, and what follows it, out of the disk table; keep its slot a while."""
    inside = yield from structure_enter(p)
    if not inside:
        return
    kept = None
    for i in range(len(chain) - 1, position - 1, -1):
        found = yield from index_find(p, chain[i])
        if found is None:
            continue
        slot = yield from block_evict(p, found.block)
        if slot is None:
            break
        if i > position:
            yield from give_back(p, found.block, slot)
            continue
        kept = yield from block_reserve(p, found.block, slot, NOBODYS, ROOT)
        if kept is None:
            yield from give_back(p, found.block, slot)
    yield from structure_exit(p)
    if kept is not None:
        yield from abandoner(p, (kept,))


# ---- starts and resets ---------------------------------------------------------------------------
def restorer(p: Process, chain: Chain) -> Actions:
    """Register what the headers of a slab say, parents first, as a leader that comes later does."""
    disk = other(p)
    headers: tuple[Any, ...] = ()
    for slot in range(disk.segment.sizes.slots):
        header = yield load(disk.segment.header[slot][0], "slab")
        headers = (*headers, header)
    inside = yield from structure_enter(disk)
    if not inside:
        return
    for i in range(len(chain)):
        for slot in range(len(headers)):
            if headers[slot] is not None and headers[slot].digest == chain[i]:
                yield from restore_block(disk, chain[: i + 1], slot)
    yield from structure_exit(disk)


def restore_block(p: Process, chain: Chain, slot: int) -> Actions:
    """Register one block in the slot that it is in."""
    known = yield from index_find(p, chain[-1], True)
    above = None
    if known is None and len(chain) > 1:
        above = yield from index_find(p, chain[-2])
    if known is not None or (len(chain) > 1 and above is None):
        return
    free = yield load(p.segment.free_slots, "bits")
    taken = False
    while free >> slot & 1 and not taken:
        taken, free = yield cas(p.segment.free_slots, free, free & ~(1 << slot), "take")
    if not taken:
        return
    block = yield from pool_take(p, p.segment.free_blocks)
    if block is None:
        yield from pool_give_back(p, p.segment.free_slots, slot)
        return
    reserved = yield from block_reserve(p, block, slot, chain[-1], below(above))
    if reserved is None:
        yield from give_back(p, block, slot)
        return
    registered = yield from publish_or_abandon(p, block, reserved.generation, chain[-1])
    if registered:
        yield from clear_holder(p, block)


def resetter(p: Process, blocks: tuple[int, ...]) -> Actions:
    """Make all content unreachable: the disk tier's first, then the host tier's."""
    disk = other(p)
    if p.rules.epoch_moves:
        yield store(disk.segment.epoch, 1, "key epoch")
    yield from evictor(disk, blocks)
    if p.rules.epoch_moves:
        yield store(p.segment.epoch, 1, "key epoch")
    yield from evictor(p, blocks)
    yield store(p.segment.reset_done, 1, "reset")


def late_reader(p: Process, chain: Chain) -> Actions:
    """Once a reset is done nothing of before can be found."""
    yield wait(p.segment.reset_done, "a reset", is_not_zero)
    names = yield from mixed(p, chain)
    _, found = yield from match(p, names)
    if found is not None:
        yield fail("what was stored before a reset is found in the host tier after it")
    disk = other(p)
    labels = yield from mixed(disk, chain)
    count, source = yield from match(disk, labels)
    if source is None:
        return
    places = yield from chain_slots(disk, source, count)
    for i in range(count):
        header = yield load(disk.segment.header[places[i][2]][0], "header")
        if header is not None and header.digest == names[i]:
            yield fail("what was written before a reset is found on disk after it")
    yield from let_go(disk, source)


# ---- others at the disk table --------------------------------------------------------------------
def on_disk(p: Process, actor: Callable[..., Actions], *arguments: Any) -> Actions:
    """An actor of one table, at the disk tier's; what it copies has the headers of a slab."""
    yield from actor(other(p), *arguments)


def reader(p: Process, chain: Chain) -> Actions:
    """Read what of a chain is on disk, with the checks of a fetch."""
    disk = other(p)
    count, source = yield from match(disk, chain)
    if source is None:
        return
    places = yield from chain_slots(disk, source, count)
    if places is None:
        yield fail("a held chain is broken")
        return
    for i in range(count):
        header = yield load(disk.segment.header[places[i][2]][0], "header")
        data = yield load(disk.segment.bytes[places[i][2]][0], "read")
        if header == Header(chain[i], data) and data != chain[i]:
            yield fail(f"wrong bytes: {data} were read for {chain[i]}")
    yield from let_go(disk, source)


def storer_and_reader(p: Process, chain: Chain) -> Actions:
    """Once somebody has died, write a chain, and read it."""
    yield from storer_after_crash(other(p), chain)
    yield from reader(p, chain)


def recycler_after_recovery(p: Process, victims: tuple[int, ...], digest: str) -> Actions:
    """Return what the dead have held in both tables, and use a host slot for another block."""
    yield from recover_after_crash(p)
    yield from recycler(p, victims, digest)


def restorer_and_reader(p: Process, chain: Chain) -> Actions:
    """Once somebody has died, find a chain in the slab, and read it."""
    yield wait(p.segment.crashed, "a death", is_not_zero)
    yield from restorer(p, chain)
    yield from reader(p, chain)
