# SPDX-License-Identifier: Apache-2.0
"""An engine in this process with a disk tier, and what tests do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvbm.instance import remove
from kvbm.leader.disk_tier import DiskTier
from tests.leaks import wait_until
from tests.small_engine import SmallEngine

HOST, DISK = 12, 64
BLOCKS = list(range(8))
TARGETS = list(range(20, 28))


def disk_engines(tmp_path: Path) -> Iterator[Callable[..., SmallEngine]]:
    """Make engines with a disk tier; what a named instance leaves in memory is removed."""
    made: list[SmallEngine] = []

    def make(**options: Any) -> SmallEngine:
        options = {
            "host_slots": HOST,
            "disk_cache_override_num_blocks": DISK,
            "disk_cache_dir": tmp_path,
            "disable_disk_offload_filter": True,
        } | options
        made.append(SmallEngine(options.pop("host_slots"), **options))
        assert wait_until(lambda: tier(made[-1]).disk is not None)
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        remove(engine.instance)


def tier(engine: SmallEngine) -> DiskTier:
    """The engine's disk tier."""
    assert engine.leader.disk is not None
    return engine.leader.disk


def counters(engine: SmallEngine) -> dict[str, int]:
    """Counters of the disk tier."""
    disk = tier(engine).disk
    assert disk is not None
    return disk.segment.counters()


def idle(engine: SmallEngine) -> bool:
    """Whether nothing is on its way to or from disk."""
    own = tier(engine)
    storing = bool(engine.leader._storing)
    return not (storing or own._spills or own._fetches or own._candidates)


def settle(engine: SmallEngine) -> None:
    """Step until nothing is on its way."""
    engine.run_until(lambda: idle(engine))


def ask(engine: SmallEngine, request: str, seed: object, blocks: int = len(BLOCKS)) -> int:
    """Ask for a request's blocks as an engine does, again and again; returns the answer."""
    sequence = engine.track(request, blocks, seed)
    answers: list[int | None] = [None]

    def answered() -> bool:
        answers[0] = engine.leader.look_up(sequence, 0, blocks)
        return answers[0] is not None

    engine.run_until(answered)
    assert answers[0] is not None
    return answers[0]


def load(engine: SmallEngine, request: str, count: int) -> list[float | None]:
    """Load what was found to device blocks; returns their values."""
    sequence = engine.leader.sequences[request]
    targets = TARGETS[:count]
    engine.place(sequence, targets)
    engine.leader.load(sequence, count)
    engine.run_until(lambda: request in engine.received)
    assert not engine.missing
    return engine.values(targets)


def spill(engine: SmallEngine, seed: object = "a", value: float = 1.0) -> None:
    """Store a chain, let it reach the disk, and push it out of the host tier."""
    engine.store(f"store {seed}", BLOCKS, seed, value)
    settle(engine)
    for number in range(2):
        engine.store(f"push {seed} {number}", BLOCKS, f"push {seed} {number}", 500.0)
    settle(engine)


def expected(value: float, count: int = len(BLOCKS)) -> list[float]:
    """Values of the first blocks of a chain stored with this value."""
    return [value + i for i in range(count)]
