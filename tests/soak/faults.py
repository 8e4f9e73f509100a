# SPDX-License-Identifier: Apache-2.0
"""What is broken while traffic runs: a few slots, copies in flight, hooks that raise for a while.

A fault is entered between two engine steps and left some steps later. Most are those of
`tests.e2e.load_faults`; those there that damage the whole arena would leave a soak without a cache,
so here only a few slots are hit at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from random import Random

from tests.e2e import load_faults
from tests.e2e.lives import Driver
from tests.e2e.load_faults import arena_of

Fault = Callable[[Driver, Random], AbstractContextManager[None]]
SLOTS_HIT = 3
HIT_BYTES = 8192
ON_THE_WORKER = {
    "damaged_bytes",
    "damaged_slot_headers",
    "reporting_raises",
    "stopping_raises",
    "filling_raises",
    "statistics_raise",
}


def _slots(driver: Driver, choose: Random) -> list[int]:
    """A few slots; none while copies are in flight.

    A byte that changes between its copy and the hashing of the copy would be stored as it is then,
    which no check can find.
    """
    leader = driver.side.leader
    if leader._storing or leader._loading or leader._uncollected:
        return []
    _, layout = arena_of(driver)
    return choose.sample(range(layout.slots), SLOTS_HIT)


@contextmanager
def damaged_bytes(driver: Driver, choose: Random) -> Iterator[None]:
    """Some KV rows of a few slots are others, so that outputs would change if they were used."""
    memory, layout = arena_of(driver)
    for slot in _slots(driver, choose):
        start = layout.offset(slot, 0)
        memory[start : start + HIT_BYTES] = memory[start : start + HIT_BYTES][::-1]
    yield


@contextmanager
def damaged_slot_headers(driver: Driver, choose: Random) -> Iterator[None]:
    """The headers of a few slots are gone."""
    memory, layout = arena_of(driver)
    for slot in _slots(driver, choose):
        start = layout.header_offset(slot)
        memory[start : start + 64] = bytes(64)
    yield


@contextmanager
def cancelled_copies(driver: Driver, choose: Random) -> Iterator[None]:
    """The copies in flight end as failed: loads and stores."""
    leader = driver.side.leader
    for sequence in [*leader._loading.values(), *leader._storing]:
        for handle in sequence.loads + sequence.stores:
            if choose.random() < 0.5:
                leader.table.cancel(handle)
    yield


def possible_faults(driver: Driver) -> list[str]:
    """All, or those of the scheduler's side where the worker is in a process of its own."""
    return [name for name in FAULTS if driver.worker is not None or name not in ON_THE_WORKER]


def _hook(fault: Callable[[Driver], AbstractContextManager[None]]) -> Fault:
    return lambda driver, _: fault(driver)


FAULTS: dict[str, Fault] = {
    "damaged_bytes": damaged_bytes,
    "damaged_slot_headers": damaged_slot_headers,
    "cancelled_copies": cancelled_copies,
} | {
    name: _hook(fault)
    for name, fault in load_faults.FAULTS.items()
    if name not in ("damaged_bytes", "damaged_slot_headers")
}
