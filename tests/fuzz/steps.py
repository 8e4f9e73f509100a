# SPDX-License-Identifier: Apache-2.0
"""Walks through a segment: what leaders, workers, recoverers and controllers do."""

from __future__ import annotations

import threading
from random import Random

import numpy as np

import kvbm.shared
from kvbm._fast import participants as lines
from kvbm._fast.control import census, evict_subtrees, find_registered, identify
from kvbm._fast.copy import HostCopier
from kvbm._fast.host_backend import HostBackend
from kvbm._fast.keys import Keys
from kvbm._fast.recovery import recover
from kvbm._fast.segment import MAX_LEADERS, MAX_RANKS, Segment, SegmentFault
from kvbm._fast.worker_loop import WorkerLoop
from kvbm.fingerprint import Fingerprint
from kvbm.shared import SegmentSpec, open_as_leader
from kvbm.transfer.arena_layout import ArenaLayout
from tests.fast.instances import digests
from tests.fuzz.images import CHAINS
from tests.fuzz.world import World
from tests.leaks import wait_until

CHUNK = 256
DEVICE_BLOCKS = 64
COPY_SECS = 0.03
"""How long a walk waits for copies, which may never come to an end in a damaged segment."""


def keys_of(random: Random) -> Keys:
    """A chain that is in the image, or a new one that may begin like it."""
    chain = list(random.choice(CHAINS))
    if random.random() < 0.5:
        chain = chain[: random.randrange(len(chain))] + digests(1 + random.randrange(20), "new")
    return Keys(chain, 1, random.choice([0, 0, 0, 1]))


# ---- a leader ------------------------------------------------------------------------------------
def match(world: World, random: Random) -> None:
    """Look up, hold, follow the chain, let go."""
    table = world.leader(random)
    keys = keys_of(random)
    start = random.choice([0, 0, 1, 3])
    count, ref = table.match(keys, start, len(keys))
    assert 0 <= count <= len(keys)
    if ref is None:
        return
    assert len(table.digest_of(ref)) == 16
    table.is_current(ref)
    world.refs.append(ref)
    slots = table.slots_of(ref, min(count, 5))
    assert all(0 <= slot < table.segment.shape.host_slots for slot in slots)


def unpin(world: World, random: Random) -> None:
    """Let go of what is held, and of what is not."""
    table = world.leader(random)
    while world.refs:
        table.unpin(world.refs.pop())
    table.unpin(random.choice([0, 5, 7 << 32 | 3]))
    assert all(count > 0 for count in table.held().values())


def reserve(world: World, random: Random) -> None:
    """Reserve, and evict what is in the way; publish some and give the others back."""
    table = world.leader(random)
    keys = Keys(digests(1 + random.randrange(80), random.randrange(3)))
    parent = random.choice([None, *world.refs])
    found = table.reserve(keys, 0, len(keys), parent, random.choice([0, 9]))
    assert len(found) <= table.segment.shape.block_capacity
    world.reserved += [ref for ref, _ in found]
    if random.random() < 0.7:
        publish(world, random)


def publish(world: World, random: Random) -> None:
    """Publish reservations, or give them back."""
    table = world.leader(random)
    refs, world.reserved = world.reserved, []
    if random.random() < 0.7:
        assert table.publish(refs) <= len(refs)
    else:
        table.abandon_reserved(refs)
    for ref in refs:
        table.unpin(ref)


def operate(world: World, random: Random) -> None:
    """Submit operations of all kinds, ask about them, cancel and collect them."""
    table = world.leader(random)
    keys = keys_of(random)
    blocks = [random.randrange(DEVICE_BLOCKS) for _ in range(len(keys))]
    what = random.choice(["store", "fetch", "load", "spill"])
    handles: list[int] | None
    if what == "store":
        handles, _, _ = table.store(keys, 0, len(keys), blocks, None, random.choice([0, 1]))
    elif what == "fetch":
        handles, _, _ = table.fetch(keys, 0, len(keys), blocks, None)
    else:
        count, ref = table.match(keys, 0, len(keys))
        if ref is None:
            return
        world.refs.append(ref)
        targets = blocks[:count]
        handles = table.load(ref, 0, targets, 0) if what == "load" else table.spill(ref, 0, targets)
    world.handles += handles or []
    assert 0 <= table.free_operations() <= 128


def collect(world: World, random: Random) -> None:
    """Cancel some operations and collect what has ended."""
    table = world.leader(random)
    handles, world.handles = world.handles, []
    for handle in [*handles, *([3] if random.random() < 0.1 else [])]:
        if random.random() < 0.3:
            table.cancel(handle)
        assert table.first_failed_row(handle) >= 0
        if table.collect(handle) is None:
            world.handles.append(handle)


def scribble_rows(world: World, random: Random, leader: int) -> None:
    """Other numbers in the rows of the leader's own operations, or another number of them."""
    limit = world.image.shape.block_capacity
    for handle in world.handles:
        index = 128 * leader + (handle & 0xFFFFFFFF)
        for _ in range(random.randrange(3)):
            name = random.choice(["block", "slot", "generation", "device_block"])
            value = random.choice([0, limit - 1, limit, 2**31, 2**32 - 1, random.randrange(limit)])
            world.edit([("set", "operations", index, f"rows.{name}", random.randrange(3), value)])
        if random.random() < 0.2:
            count = random.choice([0, 128, 129, 2**32 - 1])
            world.edit([("set", "operations", index, "row_count", 0, count)])


def disturb(world: World, random: Random) -> None:
    """The leader's own operations end, without anybody who copied, with rows that name anything."""
    leader = world.leader(random).segment.leader
    assert leader is not None
    if not world.handles:
        operate(world, random)
    scribble_rows(world, random, leader)
    for handle in world.handles:
        if random.random() < 0.7:
            state = random.choice([3, 4, 4, 4, 5, 9])
            word = state << 60 | handle >> 32 << 32 | random.choice([0xAAAAAAAA, 0xFFFFFFFF, 0])
            index = 128 * leader + (handle & 0xFFFFFFFF)
            world.edit([("set", "operations", index, "word", 0, word)])
    if random.random() < 0.6:
        collect(world, random)


def disturb_chain(world: World, random: Random) -> None:
    """Scribble on the block that a match has just held, then use what it held."""
    table = world.leader(random)
    keys = Keys(list(random.choice(CHAINS)))
    count, ref = table.match(keys, 0, len(keys))
    if ref is None:
        return
    world.refs.append(ref)
    block, generation = ref & 0xFFFFFFFF, ref >> 32
    limit = world.image.shape.block_capacity
    number = random.choice([0, 1, block + 1, limit, limit + 1, 2**31, 2**32 - 1])
    values = {
        "placement": 2 << 60 | generation << 32 | number,
        "parent": number,
        "parent_generation": number,
        "word": random.choice([0, 1, 2, 3, 7]) << 61 | random.getrandbits(40) << 21 | generation,
        "digest_hi": number,
    }
    name = random.choice(["placement", "parent", *values])
    world.edit([("set", "blocks", block, name, 0, values[name])])
    slots = table.slots_of(ref, min(count, 5))
    assert all(0 <= slot < table.segment.shape.host_slots for slot in slots)
    world.handles += table.load(ref, 0, list(range(count)), 0) or []
    random.choice([unpin, collect, control, reserve, recovery])(world, random)


def control(world: World, random: Random) -> None:
    """What a controller does: count, find, evict by name, give identities late, reset."""
    table = world.leader(random)
    for tier in ("host", "disk"):
        assert census(table.segment, tier).empty >= 0
    hashes = [Keys(chain).identity(0)[1] for chain in CHAINS]
    found = [ref for refs in find_registered(table.segment, hashes).values() for ref in refs]
    anonymous = table.reserve(Keys(digests(1, "anonymous")), 0, 1)
    parent = random.choice([None, *world.refs])
    for ref, _ in anonymous:
        identify(table, ref, Keys(digests(1, "late")), 0, parent)
        table.publish([ref])
        table.unpin(ref)
    assert evict_subtrees(table, found) <= table.segment.shape.block_capacity
    if random.random() < 0.3:
        assert table.reset() <= table.segment.shape.block_capacity


# ---- everybody -----------------------------------------------------------------------------------
def look(world: World, random: Random) -> None:
    """What any attachment may ask, also one that only reads."""
    segment = world.attach(writable=random.random() < 0.5)
    assert len(lines.participants(segment)) <= MAX_LEADERS * (1 + MAX_RANKS)
    assert all(value >= 0 for value in segment.counters().values())
    assert segment.free_blocks() >= 0
    for rank in range(segment.shape.ranks):
        segment.ready_slots(rank)
    assert (len(segment.fingerprint), len(segment.description) <= 2048) == (32, True)
    assert (segment.nonce, segment.created_ns, segment.key_epoch) >= (0, 0, 0)
    segment.has_other_users()
    lines.find_leader(segment, random.choice([0, 0xE1, 0xF0]))
    for tier in ("host", "disk"):
        census(segment, tier)
    assert isinstance(segment.recovering, bool)


def recovery(world: World, random: Random) -> None:
    """Recover, twice."""
    segment = world.attach()
    for rebuild in (random.random() < 0.5, True):
        assert 0 <= recover(segment, rebuild) <= MAX_LEADERS * (1 + MAX_RANKS)
    if len(world.attached) == 1 and not world.racing:
        # Nobody else is there, whatever the lines say: it comes to its end, and all is found again.
        assert all(line.alive for line in lines.participants(segment))
        assert not segment.recovering
        assert segment.free_blocks() == world.blocks_of_state(0)


def take_part(world: World, random: Random) -> None:
    """Fill the leader slots, and ask about the engine of one."""
    for key in range(random.choice([2, MAX_LEADERS + 1])):
        segment = world.attach()
        recover(segment)
        lines.claim_leader(segment, key)
        lines.workers_attached(segment)
        lines.usable_disk_slots(segment)
        lines.engine_counters(segment)


def open_engine(world: World, random: Random) -> None:
    """What an engine does first: adopt the segment, or replace it and say why."""
    kvbm.shared.CREATOR_SECS = kvbm.shared.USER_SECS = 0.02
    shape = world.image.shape
    spec = SegmentSpec(
        world.instance,
        shape.host_slots,
        shape.ranks,
        shape.block_tokens,
        Fingerprint({"case": 0}),
        (),
        disk_slots=shape.disk_slots,
    )
    segment = open_as_leader(spec, 0xF2)
    world.attached.append(segment)
    assert segment.shape == spec.shape


# ---- a worker ------------------------------------------------------------------------------------
def worker(world: World, random: Random) -> None:
    """The copy threads of all ranks, with stores and loads; they end when they are told to."""
    table = world.leader(random)
    leader = table.segment.leader
    assert leader is not None
    for _ in range(3):
        operate(world, random)
    if random.random() < 0.6:
        scribble_rows(world, random, leader)
    loops = [start_loop(world, leader, rank) for rank in range(table.segment.shape.ranks)]
    for _ in range(2):
        for loop in loops:
            loop.bind_step(1)
            loop.fill_step(1)
        wait_until(lambda: _all_collected(world, random), COPY_SECS)
        operate(world, random)
    for loop in loops:
        for handle in world.handles:
            loop.rank_ended(handle)
            assert len(loop.failed_device_blocks(handle)) <= 128
            loop.cancel_and_wait(handle, 1)
            loop.fail(handle)


def _all_collected(world: World, random: Random) -> bool:
    collect(world, random)
    return not world.handles


def start_loop(world: World, leader: int, rank: int) -> WorkerLoop:
    """Claim a worker's line and run its loop in a thread, until the case is over."""
    segment = world.attach()
    lines.claim_worker(segment, leader, rank, random_key(segment, leader))
    lines.set_attached(segment)
    layout = ArenaLayout(world.image.shape.host_slots, (CHUNK,))
    arena = np.zeros(layout.total_bytes, np.uint8)
    device = np.zeros((DEVICE_BLOCKS, CHUNK), np.uint8)
    copier = HostCopier(
        [(device.ctypes.data, CHUNK, CHUNK)],
        layout,
        arena.data,
        device_blocks=DEVICE_BLOCKS,
        rank=rank,
        keep_alive=device,
    )
    loop = WorkerLoop(segment, HostBackend([copier], checksum=rank == 0))
    thread = threading.Thread(target=loop.run)
    thread.start()

    def stop() -> None:
        loop.stop()
        thread.join()

    world.closing.append(stop)
    return loop


def random_key(segment: Segment, leader: int) -> int | None:
    """Key of the leader as its line says it, as a worker knows it from its configuration."""
    for one in lines.participants(segment):
        if one.line == leader:
            return one.engine_key
    raise SegmentFault("full", "the leader's line is not in use any more")


WALKS = {
    "match": match,
    "unpin": unpin,
    "reserve": reserve,
    "publish": publish,
    "operate": operate,
    "collect": collect,
    "disturb": disturb,
    "disturb_chain": disturb_chain,
    "control": control,
    "look": look,
    "recovery": recovery,
    "take_part": take_part,
    "open_engine": open_engine,
    "worker": worker,
}
