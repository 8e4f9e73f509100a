# SPDX-License-Identifier: Apache-2.0
"""A live segment that is looked at again and again: read where it is, decoded in small steps.

What a look costs does not grow with the segment: counters, pools and operations are read whole, the
block table is swept a piece a look. It is read with `pread`, not through a mapping, without a lock
or a line: nothing that others do to the object, not even cutting it off, ends who looks.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract
from kvbm._fast.contract import Section
from kvbm._fast.objects import object_path, open_object
from kvbm._fast.segment import COUNTER_NAMES, Shape
from kvbm.errors import InspectError
from kvbm.inspect.capture import Locks
from kvbm.inspect.records import part, record_dtype, shape_of
from kvbm.instance import segment_name

SWEEP_BLOCKS = 4096
"""Blocks of the table that one look reads."""
LOCKS_SECS = 1.0
"""How often the kernel is asked who is alive."""
WINDOWS = (1, 10, 60)
"""Seconds over which rates are shown."""

LEADER_CPU = "leader_cpu_ns"
"""What leaders' calls took of the counter `cpu_ns`; the rest is that of copies."""
MOVING = (*COUNTER_NAMES, LEADER_CPU)
"""Names of what is counted here."""

WHOLE_BLOCKS = 1 << 16
"""Blocks that are read at once where the whole table is wanted."""

CPU = COUNTER_NAMES.index("cpu_ns")
Counters = npt.NDArray[np.uint64]


@dataclass
class Sweep:
    """What the sweep over the block table has found in its last whole turn, and finds in this one.

    Attributes
    ----------
    states : list of int
        Blocks by state.
    held : int
        Registered blocks that somebody holds.
    pins : list of int
        Blocks that each leader holds.
    branching : list of tuple
        The blocks with most children: children, block, position, tick.
    used : list of tuple
        The blocks at which most matches ended: matches, block, position.
    """

    states: list[int] = field(default_factory=lambda: [0] * 8)
    held: int = 0
    pins: list[int] = field(default_factory=lambda: [0] * contract.LEADERS)
    branching: list[tuple[int, int, int, int]] = field(default_factory=list)
    used: list[tuple[int, int, int]] = field(default_factory=list)


class LiveSegment:
    """An open segment; close it, or use it as a context manager.

    Parameters
    ----------
    instance : str
        Name of the instance.

    Raises
    ------
    InspectError
        There is none, it belongs to another user, or this version cannot decode it.
    """

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.swept = Sweep()
        self._found = Sweep()
        self._at = 0
        name = segment_name(instance)
        try:
            self._fd = open_object(name, os.O_RDONLY, trusted=False)
        except OSError as error:
            raise InspectError(f"{object_path(name)}: {error.strerror}") from None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        state = os.fstat(self._fd)
        size = state.st_size
        shape = shape_of(os.pread(self._fd, contract.PAGE_BYTES, 0))
        sections = {} if shape is None else contract.sections(shape)
        if shape is None or not sections or sections["end"].offset != size:
            raise InspectError(f"{self.instance} cannot be followed: its header is damaged")
        if state.st_blocks * 512 < size:  # or reading it would fill the machine's memory
            raise InspectError(f"{self.instance} cannot be followed: it has holes")
        self.shape: Shape = shape
        self._sections = sections
        header = self.header
        found = int(header["format_version"]), int(header["layout_check"])
        if found != (contract.FORMAT_VERSION, contract.LAYOUT_CHECK):
            raise InspectError(f"{self.instance} has another format: {found}")
        self._locks = Locks.of(self._fd)
        self._locks_at = time.monotonic()

    def _read(self, name: str, begin: int = 0, count: int | None = None) -> Any:
        """Read records of a section, all after `begin` if no number is given."""
        section: Section = self._sections[name]
        dtype = record_dtype(section.record)
        count = section.length - begin if count is None else count
        size = count * dtype.itemsize
        data = os.pread(self._fd, size, section.offset + begin * dtype.itemsize)
        if len(data) != size:
            raise InspectError(f"{self.instance} was cut off")
        return np.frombuffer(data, dtype)

    def __enter__(self) -> LiveSegment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def is_current(self) -> bool:
        """Whether the name still leads to this object: an engine may have made a new one."""
        return os.fstat(self._fd).st_nlink > 0

    # ---- looks -----------------------------------------------------------------------------------
    # Each may raise InspectError: somebody has cut the object off.
    @property
    def header(self) -> Any:
        """The header, as it is now."""
        return self._read("header")[0]

    @property
    def participants(self) -> Any:
        """The participant lines, as they are now."""
        return self._read("participants")

    def counters(self) -> dict[str, int]:
        """What is in `MOVING`, summed over all lines."""
        values = self.line_counters()
        total = values.sum(axis=0)
        found = {name: int(total[i]) for i, name in enumerate(COUNTER_NAMES)}
        return found | {LEADER_CPU: int(values[: contract.LEADERS, CPU].sum())}

    def line_counters(self) -> Counters:
        """Counters of each line: [line, counter]."""
        values: Counters = self._read("counters")["value"]
        return values

    def histograms(self) -> Any:
        """What operations took: [leader, rank, kind - 1, latency] of `contract`."""
        kinds, latencies = len(contract.OPERATION_KINDS), len(contract.LATENCIES)
        return self._read("histograms").reshape(-1, self.shape.ranks, kinds, latencies)

    def pools(self) -> dict[str, tuple[int, int]]:
        """Used and all records or slots of each pool that has any."""
        sizes = {"blocks": self.shape.block_capacity, "host": self.shape.host_slots}
        found = {}
        for name in contract.POOLS.values():
            total = sizes.get(name, self.shape.disk_slots)
            if total:
                found[name] = (total - contract.free_count(self._read(f"pool.{name}")), total)
        return found

    def locks(self) -> Locks:
        """Who is alive, as the kernel said within the last second."""
        if time.monotonic() - self._locks_at >= LOCKS_SECS:
            self._locks, self._locks_at = Locks.of(self._fd), time.monotonic()
        return self._locks

    def lines(self) -> list[int]:
        """Participant lines that are marked as used."""
        found: list[int] = np.flatnonzero(self.participants["role"]).tolist()
        return found

    def queued(self, leader: int, rank: int) -> int:
        """Entries that a worker has not taken from its ring."""
        ring = self._read("rings", leader * self.shape.ranks + rank, 1)[0]
        return (int(ring["head"]) - int(ring["tail"])) & 0xFFFFFFFF

    def in_flight(self) -> list[tuple[int, int, int, int, int]]:
        """Operations of living leaders: leader, kind, state, rows, time of submission."""
        found = []
        size = contract.OPERATIONS_PER_LEADER
        for leader in [line for line in self.lines() if line < contract.LEADERS]:
            mine = self._read("operations", leader * size, size)
            states = part(mine["word"], "operation", "state")
            for place in np.flatnonzero(states):
                one = mine[place]
                facts = (int(one["kind"]), int(states[place]), int(one["row_count"]))
                found.append((leader, *facts, int(one["submitted_ns"])))
        return found

    def sweep(self, count: int = SWEEP_BLOCKS) -> Sweep:
        """Read the next piece of the block table; returns what the last whole turn has found."""
        begin, length = self._at, self.shape.block_capacity
        self._at = min(begin + count, length)
        blocks = self._read("blocks", begin, self._at - begin)
        self._sweep_piece(blocks, begin)
        if count <= SWEEP_BLOCKS:  # who reads it all at once has no use for them
            self._sweep_uses(blocks["word"], begin)
        if self._at == length:
            self.swept, self._found, self._at = self._found, Sweep(), 0
        return self.swept

    def sweep_all(self) -> Sweep:
        """Read the whole block table at once: some milliseconds for a million blocks."""
        self._at, self._found = 0, Sweep()
        self.sweep(WHOLE_BLOCKS)
        while self._at != 0:
            self.sweep(WHOLE_BLOCKS)
        return self.swept

    def _sweep_piece(self, blocks: Any, begin: int) -> None:
        found = self._found
        words: Counters = blocks["word"].copy()
        states = part(words, "block", "state")
        counts = np.bincount(states, minlength=8)
        found.states = [a + int(b) for a, b in zip(found.states, counts, strict=True)]
        holders = part(words, "block", "holders")
        if holders.any():
            found.held += int(((holders != 0) & (states == 2)).sum())
            for leader in range(contract.LEADERS):
                found.pins[leader] += int((holders >> leader & 1).sum())
        children = part(words, "block", "children")
        least = max(2, found.branching[-1][0]) if len(found.branching) >= 5 else 2
        places = np.flatnonzero((children >= least) & (states == 2))
        if len(places) == 0:
            return
        for place in places[np.argsort(-children[places], kind="stable")][:5].tolist():
            block = begin + place
            position = int(self._read("cold", block, 1)["position"][0])
            tick = int(part(blocks["recency"][place], "recency", "tick"))
            found.branching.append((int(children[place]), block, position, tick))
        found.branching = sorted(found.branching, reverse=True)[:5]

    def _sweep_uses(self, words: Counters, begin: int) -> None:
        cold = self._read("cold", begin, len(words))
        uses = np.where(part(words, "block", "state") == 2, cold["uses"], 0)
        least = self._found.used[-1][0] if len(self._found.used) >= 5 else 0
        places = np.flatnonzero(uses > least)
        places = places[np.argsort(-uses[places].astype(np.int64), kind="stable")][:5]
        for place in places.tolist():
            entry = (int(uses[place]), begin + place, int(cold["position"][place]))
            self._found.used.append(entry)
        self._found.used = sorted(self._found.used, reverse=True)[:5]

    def digest(self, block: int) -> str:
        """Digest of a block, hexadecimal."""
        record = self._read("blocks", block, 1)[0]
        low, high = int(record["digest_lo"]), int(record["digest_hi"])
        return low.to_bytes(8, "little").hex() + high.to_bytes(8, "little").hex()


class Rates:
    """How fast counters move, over the last 1, 10 and 60 seconds.

    Parameters
    ----------
    every : float
        Least time between two samples that are kept, in seconds.
    """

    def __init__(self, every: float = 0.5) -> None:
        self._every = every
        self._samples: deque[tuple[float, dict[str, int]]] = deque()

    def add(self, now: float, counters: dict[str, int]) -> None:
        """Note the counters of a moment of the monotonic clock."""
        if self._samples and now - self._samples[-1][0] < self._every:
            return
        self._samples.append((now, counters))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOWS[-1]:
            self._samples.popleft()

    def moved(self, seconds: float) -> tuple[float, dict[str, int]]:
        """Time between the last sample and the one so many seconds before, and the differences."""
        if len(self._samples) < 2:
            return 0.0, dict.fromkeys(MOVING, 0)
        now, last = self._samples[-1]
        then, first = self._samples[0]
        for at, counters in reversed(self._samples):
            if at < now:
                then, first = at, counters
            if now - at >= seconds:
                break
        return now - then, {name: value - first[name] for name, value in last.items()}

    def share(self, seconds: float, part_name: str, whole: str) -> float | None:
        """How much of one counter's movement another one made; None if it did not move."""
        _, moved = self.moved(seconds)
        return moved[part_name] / moved[whole] if moved[whole] > 0 else None

    def per_second(self, seconds: float, name: str) -> float:
        """Movement of a counter a second."""
        elapsed, moved = self.moved(seconds)
        return moved[name] / elapsed if elapsed > 0 else 0.0
