# SPDX-License-Identifier: Apache-2.0
"""What one process of the comparison does, on either table."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import posix_ipc

from bench.segment.build import load
from bench.segments import fill, leader
from kvbm._fast.keys import Keys

HASH_BYTES = 32
STEPS = ("first evict", "match", "evict", "reserve", "publish", "return", "reserve + evict")
TABLES = ("kvbm", "mutex")


class Plan(NamedTuple):
    """How much is done.

    Attributes
    ----------
    blocks
        Slots of the table; all are filled.
    chain
        Blocks of a resident chain, and of a match.
    call
        Blocks of a call of the other steps.
    rounds
        Calls of each step by each process.
    """

    blocks: int
    chain: int
    call: int
    rounds: int

    @property
    def chains(self) -> int:
        """Resident chains."""
        return self.blocks // self.chain


class Samples(NamedTuple):
    """Nanoseconds of each step, and of processor time in all."""

    spent: np.ndarray[Any, np.dtype[np.uint32]]
    cpu: int


def hashes(seed: str, count: int) -> list[bytes]:
    """Return the block hashes of a chain, the same in each process."""
    data = random.Random(seed).randbytes(HASH_BYTES * count)
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def pairs(chain: list[bytes]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return the digests of block hashes as the baseline takes them."""
    words = np.frombuffer(b"".join(chain), np.uint64).reshape(len(chain), HASH_BYTES // 8)
    return np.ascontiguousarray(words[:, :2])


class Kvbm:
    """The segment's block table."""

    def __init__(self, name: str, plan: Plan, number: int, create: bool) -> None:
        modules: ModuleType = load("_steps")
        self.table = leader(name, 1000 + number)
        self.steps = modules.Steps(self.table, np.zeros(plan.call, np.uint64))
        if create:
            for chain in range(plan.chains):
                fill(self.table, Keys(hashes(f"chain {chain}", plan.chain)))
            rest = plan.blocks - plan.chains * plan.chain
            fill(self.table, Keys(hashes("rest", rest)))

    def keys(self, chain: list[bytes]) -> Keys:
        """Return a chain as the steps take it."""
        return Keys(chain)

    def close(self) -> None:
        """Leave the table."""
        assert self.table.held() == {}
        self.table.segment.close()


class Mutex:
    """The baseline."""

    def __init__(self, name: str, plan: Plan, number: int, create: bool) -> None:
        modules: ModuleType = load("_guarded")
        shared = posix_ipc.SharedMemory(name)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(shared.fd, shared.size, flags=flags)
        shared.close_fd()
        most = max(plan.call, plan.chain)
        arguments = (plan.blocks, create, np.zeros(most, np.uint64))
        self.steps = modules.Guarded(memory, *arguments)
        if create:
            for chain in range(plan.chains):
                self._fill(hashes(f"chain {chain}", plan.chain))
            self._fill(hashes("rest", plan.blocks - plan.chains * plan.chain))

    def _fill(self, chain: list[bytes]) -> None:
        spent = np.zeros(len(chain), np.uint32)
        self.steps.reserve(self.keys(chain), spent)
        self.steps.publish(spent)
        self.steps.unpin(spent)

    def keys(self, chain: list[bytes]) -> Any:
        """Return a chain as the steps take it."""
        return pairs(chain)

    def close(self) -> None:
        """Leave the table."""
        del self.steps  # the mapping goes with the last reference to it


KINDS: dict[str, type[Kvbm] | type[Mutex]] = {"kvbm": Kvbm, "mutex": Mutex}


@contextmanager
def memory_of(name: str, plan: Plan) -> Iterator[None]:
    """Make the shared memory of the baseline."""
    size = load("_guarded").table_bytes(plan.blocks)
    posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size).close_fd()
    try:
        yield
    finally:
        posix_ipc.unlink_shared_memory(name)


def timed(kind: str, name: str, plan: Plan, number: int, barrier: Barrier) -> dict[str, Samples]:
    """Join a table that is full, do all steps beside the others, and leave."""
    table = KINDS[kind](name, plan, number, create=False)
    source = random.Random(number)
    # The chains that were stored last: the others' evictions take those that were stored first.
    late = range(plan.chains // 2, plan.chains)
    asked = [hashes(f"chain {source.choice(late)}", plan.chain) for _ in range(20)]
    asked_keys = [table.keys(chain) for chain in asked]
    new = [
        table.keys(hashes(f"new {number} {kind} {i}", plan.call)) for i in range(2 * plan.rounds)
    ]
    spent = {step: np.zeros((plan.rounds, plan.call), np.uint32) for step in STEPS}
    spent["match"] = np.zeros((plan.rounds, 1), np.uint32)
    spent["first evict"] = np.zeros((1, 1), np.uint32)
    cpu = dict.fromkeys(STEPS, 0)
    steps = table.steps

    def did(step: str) -> None:
        cpu[step] += steps.cpu

    steps.evict(spent["first evict"][0])  # a leader's first sweep, once in its life
    did("first evict")
    barrier.wait()
    for i in range(plan.rounds):
        found = steps.match(asked_keys[i % len(asked_keys)], spent["match"][i])
        assert found == plan.chain, (found, plan.chain)
        did("match")
        steps.evict(spent["evict"][i])
        did("evict")
        steps.reserve(new[2 * i], spent["reserve"][i])
        did("reserve")
        steps.publish(spent["publish"][i])
        did("publish")
        steps.unpin(spent["return"][i])
        did("return")
    barrier.wait()  # the pools are empty again: from here on each reservation evicts
    unused = np.zeros(plan.call, np.uint32)
    for i in range(plan.rounds):
        steps.reserve(new[2 * i + 1], spent["reserve + evict"][i])
        did("reserve + evict")
        steps.publish(unused)
        steps.unpin(unused)
    barrier.wait()
    table.close()
    return {step: Samples(spent[step].ravel(), cpu[step]) for step in STEPS}


def work(kind: str, name: str, plan: Plan, number: int, barrier: Barrier, results: Any) -> None:
    """Run in a process of its own; None if it failed, which ends the others as well."""
    found = None
    try:
        found = timed(kind, name, plan, number, barrier)
    finally:
        if found is None:
            barrier.abort()
        results.put(found)
