# SPDX-License-Identifier: Apache-2.0
"""Processes that do random transitions on a few blocks and record what they saw, and when.

Each process is a leader. It calls the transitions of kvbm/_fast/blocks.pyx themselves, through
tests/fast/_probe.pyx, so that one call is one operation of tests/stress/linearizable.py. There are
fewer blocks than digests, so that everything is evicted all the time, and everybody also publishes
what others have reserved, as workers do.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from kvbm._fast.participants import claim_leader
from kvbm._fast.segment import Segment
from tests.fast.instances import digests
from tests.fast.probe import load_probe
from tests.fast.raw_segment import PARTIAL, REGISTERED, RawSegment
from tests.stress.linearizable import Op

BLOCKS = 6
ROOTS, CHILDREN = 3, 2
POOL_BLOCKS, POOL_HOST = 0, 1


@dataclass(frozen=True)
class Name:
    """A block that may be stored: its digest and that of its parent."""

    digest: bytes
    parent: bytes | None = None


def names() -> list[Name]:
    """Roots and their children; more than there are blocks."""
    found = []
    for root in range(ROOTS):
        top = digests(1, f"root {root}")[0][:16]
        found.append(Name(top))
        found += [Name(d[:16], top) for d in digests(CHILDREN, f"child {root}")]
    return found


@dataclass
class Leader:
    """One process's transitions; `history` is what it saw.

    Attributes
    ----------
    held
        Blocks that this leader has pinned, by number.
    careless
        A wrong leader, to show that it is noticed: it evicts without a look at who holds a block.
    """

    probe: Any
    segment: Segment
    raw: RawSegment
    choose: random.Random
    careless: bool = False
    history: list[Op] = field(default_factory=list)
    held: dict[int, bytes] = field(default_factory=dict)

    def saw(
        self, start: int, kind: str, block: int, generation: int = -1, digest: bytes = b""
    ) -> None:
        """Record an operation that has just ended."""
        assert self.segment.leader is not None
        end = time.monotonic_ns()
        self.history.append(
            Op(start, end, self.segment.leader, kind, block, generation, digest.hex())
        )

    # ---- transitions -----------------------------------------------------------------------------
    def find(self, digest: bytes) -> tuple[int, int, int] | None:
        start = time.monotonic_ns()
        found: tuple[int, int, int] | None = self.probe.find(self.segment, digest, True)
        if found is None:
            self.saw(start, "missed", -1, digest=digest)
            return None
        block, generation, state = found
        kind = "found" if state == REGISTERED else "found filling"
        self.saw(start, kind, block, generation, digest)
        return found

    def pin(self, block: int, digest: bytes) -> None:
        if block in self.held:
            return
        start = time.monotonic_ns()
        if self.probe.pin(self.segment, block, digest):
            self.held[block] = digest
            self.saw(start, "pinned", block, self.raw.block(block).generation, digest)
        else:
            self.saw(start, "not pinned", block, digest=digest)

    def unpin(self, block: int) -> None:
        del self.held[block]
        start = time.monotonic_ns()
        self.probe.unpin(self.segment, block, 1)
        self.saw(start, "unpinned", block)

    def publish(self, block: int, generation: int) -> str:
        parent = self.raw.block(block)
        start = time.monotonic_ns()
        result: str = self.probe.publish(self.segment, block, generation)
        kinds = {
            "published": "published",
            "already": "published before",
            "no parent": "still filling",
            "gone": "not to publish",
        }
        self.saw(start, kinds[result], block, generation)
        if result == "published" and parent.parent is not None:
            # Written before the word moved: it was the parent of this generation.
            self.saw(start, "counted", parent.parent, parent.parent_generation)
        return result

    def evict(self, block: int) -> None:
        word = self.raw.u64(self.raw.block_at(block))
        now = self.raw.block(block)  # of the life of `word`, if the eviction finds the same word
        evictable = word >> 61 == REGISTERED and not word >> 24 & (1 << 37) - 1
        if not evictable and not (self.careless and now.state == REGISTERED):
            return
        start = time.monotonic_ns()
        gone = self.probe.evict(self.segment, block, word)
        if gone is None:
            return  # the word had moved: always allowed
        slot, parent = gone
        self.saw(start, "evicted", block, word & 0xFFFFFF)
        if parent is not None and parent != 0xFFFFFFFF:
            self.saw(start, "uncounted", parent, now.parent_generation)
        self.give_back(block, slot)

    def give_back(self, block: int, slot: int) -> None:
        self.probe.give_back(self.segment, POOL_BLOCKS, block)
        self.probe.give_back(self.segment, POOL_HOST, slot)

    def reserve(self, name: Name) -> tuple[int, int] | None:
        """(block, generation) of a reservation under this name, if there is room and a parent."""
        above = None
        if name.parent is not None:
            above = self.find(name.parent)
            if above is None:
                return None
        first, count, _ = self.probe.take_run(self.segment, POOL_BLOCKS, 1)
        if not count:
            return None
        slot, slots, _ = self.probe.take_run(self.segment, POOL_HOST, 1)
        if not slots:  # a slot comes back a moment after its block
            self.probe.give_back(self.segment, POOL_BLOCKS, first)
            return None
        where = (None, 0) if above is None else above[:2]
        before = self.raw.block(first).generation  # stays: the record is ours
        start = time.monotonic_ns()
        generation = self.probe.reserve(self.segment, first, slot, name.digest, *where)
        self.saw(start, "reserved", first, before, name.digest)
        if generation is None:  # somebody else was faster with this digest
            self.saw(start, "abandoned", first, before)
            self.give_back(first, slot)
            return None
        return first, before

    def abandon(self, block: int, generation: int) -> bool:
        start = time.monotonic_ns()
        slot = self.probe.abandon(self.segment, block, generation)
        kind = "not abandoned" if slot is None else "abandoned"
        self.saw(start, kind, block, generation)
        if slot is not None:
            self.give_back(block, slot)
        return slot is not None

    # ---- what a leader does ----------------------------------------------------------------------
    def store(self, name: Name) -> None:
        reserved = self.reserve(name)
        if reserved is None:
            return
        block, generation = reserved
        result = "gone"
        if self.choose.random() < 0.8:
            result = self.publish(block, generation)
        if result in ("published", "already") or not self.abandon(block, generation):
            self.held[block] = name.digest  # a publisher keeps the owner's hold
            self.unpin(block)

    def step(self, name: Name) -> None:
        """One random thing."""
        assert self.probe.enter(self.segment)
        found = self.find(name.digest)
        draw = self.choose.random()
        if found is None:
            if draw < 0.7:
                self.store(name)
        elif found[2] == PARTIAL:
            if draw < 0.3:
                self.publish(found[0], found[1])
        elif draw < 0.4:
            self.pin(found[0], name.digest)
        elif draw < 0.7:
            self.evict(found[0])
        if self.held and self.choose.random() < 0.5:
            self.unpin(self.choose.choice(list(self.held)))
        self.probe.leave(self.segment)

    def finish(self) -> None:
        for block in list(self.held):
            self.unpin(block)


def leader_of(name: str, seed: int, careless: bool = False) -> Leader:
    """Attach as a leader."""
    segment = Segment.attach(name)
    claim_leader(segment, os.getpid())
    return Leader(load_probe(), segment, RawSegment(name), random.Random(seed), careless)


def work(name: str, seed: int, steps: int, careless: bool, pipe: Connection) -> None:
    """A process: wait for the start, work, send the history."""
    one = leader_of(name, seed, careless)
    everything = names()
    pipe.send("ready")
    pipe.recv()
    for _ in range(steps):
        one.step(one.choose.choice(everything))
    one.finish()
    pipe.send(one.history)
    one.raw.close()
    one.segment.close()
    pipe.close()


def record(name: str, processes: int, steps: int, seed: int, careless: bool = False) -> list[Op]:
    """Let processes work on a segment at once; what all of them saw."""
    context = multiprocessing.get_context("forkserver")
    pipes, started = [], []
    for number in range(processes):
        mine, theirs = context.Pipe()
        wrong = careless and number == 0
        process = context.Process(
            target=work, args=(name, seed * 1000 + number, steps, wrong, theirs), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        started.append(process)
    try:
        for pipe in pipes:
            assert pipe.recv() == "ready"
        for pipe in pipes:
            pipe.send("go")
        return [op for pipe in pipes for op in pipe.recv()]
    finally:
        for process in started:
            process.join(30)
            process.kill()
        for pipe in pipes:
            pipe.close()
