# SPDX-License-Identifier: Apache-2.0
"""Random traffic of one leader on a shared segment, checked against what every slot must hold.

The payload of a slot is 16 bytes in a second shared-memory object: the digest of the block that was
stored there last. Whoever matches a chain reads the payload of each of its slots while the chain is
pinned; a payload that is not the digest it asked for is a wrong block. The traffic is a function of
the seed, so a failure can be run again.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import posix_ipc

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment, SegmentFault
from kvbm.eviction.policy import evict_by
from kvbm.eviction.reuse import Reuse
from tests.fast.instances import digests

PAYLOAD_BYTES = 16
CHAIN_BLOCKS = 24
"""Longest sequence, in blocks."""
SEQUENCES = 40
"""Different sequences; those with equal number modulo 8 share their first third."""


def sequence(number: int) -> list[bytes]:
    """Block hashes of one of the sequences of the traffic."""
    shared = CHAIN_BLOCKS // 3
    return digests(shared, f"shared {number % 8}") + digests(CHAIN_BLOCKS - shared, f"own {number}")


class Payloads:
    """What each slot holds: an object beside the segment, 16 bytes a slot."""

    def __init__(self, name: str, slots: int) -> None:
        self.path = Path("/dev/shm") / (name.lstrip("/") + ".payload")
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, slots * PAYLOAD_BYTES)
            self.bytes = mmap.mmap(fd, slots * PAYLOAD_BYTES)
        finally:
            os.close(fd)

    def write(self, slot: int, digest: bytes) -> None:
        self.bytes[slot * PAYLOAD_BYTES : (slot + 1) * PAYLOAD_BYTES] = digest[:PAYLOAD_BYTES]

    def read(self, slot: int) -> bytes:
        return self.bytes[slot * PAYLOAD_BYTES : (slot + 1) * PAYLOAD_BYTES]

    def close(self, remove: bool = False) -> None:
        self.bytes.close()
        if remove:
            self.path.unlink()


@dataclass
class Traffic:
    """One leader's random operations.

    Attributes
    ----------
    table, payloads
        The segment's handle and the contents of its slots.
    choose
        Source of all decisions.
    done
        Operations done, by kind; `wrong` counts wrong blocks, `lost` held ones that went away.
    """

    table: OperationTable
    payloads: Payloads
    choose: random.Random
    done: Counter[str] = field(default_factory=Counter)

    def step(self) -> None:
        """Do one random operation."""
        kinds: list[Callable[[Keys, list[bytes]], None]] = [self.match, self.store, self.give_up]
        hashes = sequence(self.choose.randrange(SEQUENCES))
        kind = self.choose.choices(kinds, (5, 4, 1))[0]
        kind(Keys(hashes), hashes)
        self.done[kind.__name__] += 1

    def match(self, keys: Keys, hashes: list[bytes]) -> None:
        """Match a prefix, pin it, and read what its slots hold."""
        count, ref = self.table.match(keys, 0, self.choose.randint(1, CHAIN_BLOCKS))
        if ref is None:
            return
        for position, slot in enumerate(self.table.slots_of(ref, count)):
            self.done["read"] += 1
            self.done["wrong"] += self.payloads.read(slot) != hashes[position][:PAYLOAD_BYTES]
        self.done["lost"] += not self.table.is_current(ref)
        self.table.unpin(ref)

    def reserve(self, keys: Keys) -> tuple[list[tuple[int, int]], int, int | None]:
        start, parent = self.table.match(keys, 0, CHAIN_BLOCKS)
        stop = self.choose.randint(start, CHAIN_BLOCKS)
        return self.table.reserve(keys, start, stop, parent), start, parent

    def store(self, keys: Keys, hashes: list[bytes]) -> None:
        """Reserve what is missing of a sequence, fill it, publish it."""
        reserved, _, parent = self.reserve(keys)
        position = {digest[:PAYLOAD_BYTES]: digest for digest in hashes}
        for ref, slot in reserved:
            digest = position[self.table.digest_of(ref)]
            self.payloads.write(slot, digest)
        refs = [ref for ref, _ in reserved]
        self.table.publish(refs)
        self.done["stored"] += len(refs)
        self.abandon(refs)  # those whose parent did not make it
        for ref in refs:
            self.table.unpin(ref)
        if parent is not None:
            self.table.unpin(parent)

    def abandon(self, refs: list[int]) -> None:
        """Give back what is still reserved; a recovery under way ends within milliseconds."""
        deadline = time.monotonic() + 30
        while not self.table.abandon_reserved(refs):
            assert time.monotonic() < deadline, "a recovery did not end within 30 s"

    def give_up(self, keys: Keys, hashes: list[bytes]) -> None:
        """Reserve, write half of it, and give it back."""
        reserved, _, parent = self.reserve(keys)
        for _, slot in reserved[: len(reserved) // 2]:
            self.payloads.write(slot, b"half done" + bytes(7))
        self.abandon([ref for ref, _ in reserved])
        if parent is not None:
            self.table.unpin(parent)


def run(name: str, seed: int, seconds: float, report: Callable[[Counter[str]], None]) -> None:
    """A leader's process: attach, recover what the dead left, and work until the time is over.

    `report` is called about ten times a second with what has been done since the last call, so that
    little is lost when the process is killed.
    """
    done: Counter[str] = Counter()
    segment = attach(name, done)
    payloads = Payloads(name, segment.shape.host_slots)
    table = OperationTable(segment)
    evict_by(table, Reuse if seed % 2 else None)  # leaders of both orders beside each other
    traffic = Traffic(table, payloads, random.Random(seed), done)
    end = time.monotonic() + seconds
    reported = time.monotonic()
    while time.monotonic() < end:
        traffic.step()
        if time.monotonic() - reported > 0.1:
            reported = time.monotonic()
            report(traffic.done)
            traffic.done.clear()
            recover_timed(segment, traffic.done)
    report(traffic.done)
    payloads.close()
    segment.close()


def recover_timed(segment: Segment, done: Counter[str]) -> None:
    """Recover; if somebody was dead, count it and how long it took."""
    began = time.monotonic_ns()
    if recover(segment):
        done["recoveries"] += 1
        done["recovery_us"] += (time.monotonic_ns() - began) // 1000


def attach(name: str, done: Counter[str]) -> Segment:
    """Attach and claim a leader line; recovers first, so that lines of the dead can be claimed."""
    deadline = time.monotonic() + 30
    while True:
        segment = Segment.attach(name)
        recover_timed(segment, done)
        try:
            claim_leader(segment, os.getpid())
            return segment
        except SegmentFault:
            segment.close()
            if time.monotonic() > deadline:
                raise


def remove(name: str) -> None:
    """Remove the segment's name."""
    posix_ipc.unlink_shared_memory(name)
