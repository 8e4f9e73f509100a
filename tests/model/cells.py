# SPDX-License-Identifier: Apache-2.0
"""The segment as the model sees it: the words of kvbm/_fast/layout.h, one cell each.

What is left out, because nothing depends on it: recency and cold records (they decide order and
display only), the second of the two candidate buckets, and what lies between two accesses to
private memory. The disk tier is a second segment; its slots have the headers of a slab.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RESET, PARTIAL, REGISTERED, EVICTING = "RESET", "PARTIAL", "REGISTERED", "EVICTING"
EMPTY, FILLING, READY = "EMPTY", "FILLING", "READY"
FREE, SUBMITTED, CANCELLED = "FREE", "SUBMITTED", "CANCELLED"
FINISHING, COMPLETE, FAILED = "FINISHING", "COMPLETE", "FAILED"
PENDING, RUNNING, DONE, RANK_FAILED = "pending", "running", "done", "failed"
STORE, LOAD, SPILL, FETCH = "store", "load", "spill", "fetch"
NO_ROLE, LEADER, WORKER = "none", "leader", "worker"
TORN = "torn"  # bytes of a slot while somebody writes them
NO_DIGEST = "-"
FIRST_ENGINE, SECOND_ENGINE = "first engine", "second engine"


class Word(NamedTuple):
    """A block word."""

    state: str
    holders: int
    children: int
    generation: int

    def __repr__(self) -> str:
        return f"{self.state} h{self.holders:b} c{self.children} g{self.generation}"


class Placement(NamedTuple):
    """A placement word."""

    state: str
    generation: int
    slot: int


class Parent(NamedTuple):
    """The parent fields of a block: block + 1 (0 = root) and its generation."""

    block: int
    generation: int


class Entry(NamedTuple):
    """An index entry: the digest stands for its tag."""

    digest: str
    block: int


class OperationWord(NamedTuple):
    """An operation word."""

    state: str
    finisher: int
    generation: int
    ranks: tuple[str, ...]


class Row(NamedTuple):
    """One block of an operation."""

    block: int
    generation: int
    slot: int
    digest: str  # what the source holds, or has to hold after a load
    disk_slot: int = 0  # of a spill or a fetch


class Operation(NamedTuple):
    """The plain fields of an operation, written before [O0]."""

    kind: str
    rows: tuple[Row, ...]


class Header(NamedTuple):
    """The header of a disk slot: whose bytes it holds, and which they are by their checksum."""

    digest: str
    checksum: str


class Sizes(NamedTuple):
    """What a scenario's segment has of everything."""

    blocks: int = 3
    slots: int = 3
    leaders: int = 3
    ranks: int = 1
    operations: int = 1
    ring: int = 1
    entries: int = 4
    summary: bool = False
    digest_words: int = 1  # 2: digest_lo and digest_hi apart
    disk: bool = False  # the slots are those of a slab


NO_PLACEMENT = Placement(EMPTY, 0, 0)
NO_OPERATION = Operation(STORE, ())


class Seed(NamedTuple):
    """A block that is there before the actors start, in the slot of its own number."""

    digest: str
    parent: int | None = None
    holders: int = 0
    state: str = REGISTERED
    filled: bool = False  # its bytes have arrived although it is not registered
    damaged: bool = False  # the bytes in its disk slot are others by now


@dataclass(eq=False)
class Segment:
    """Cell numbers of a segment, and the first values of all cells."""

    sizes: Sizes
    names: list[str] = field(default_factory=list)
    initial: list[Hashable] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = self.sizes
        leaders, ranks = range(sizes.leaders), range(sizes.ranks)
        self.lines = range(sizes.leaders * (1 + sizes.ranks))
        self.crashed = self._cell("crashes", 0)
        self.epoch = self._cell("key epoch", 0)
        self.reset_done = self._cell("resets", 0)
        self.recovering = self._cell("recovering", 0)
        self.recovery_lock = self._cell("recovery lock", 0)
        self.inside = [self._cell(f"inside of line {line}", 0) for line in self.lines]
        self.role = [self._cell(f"role of line {line}", NO_ROLE) for line in self.lines]
        self.key = [
            self._cell(f"engine key of leader {leader}", FIRST_ENGINE) for leader in leaders
        ]
        self.lock = [self._cell(f"lock of line {line}", 0) for line in self.lines]
        blocks, slots = range(sizes.blocks), range(sizes.slots)
        self.word = [self._cell(f"word of block {b}", Word(RESET, 0, 0, 0)) for b in blocks]
        self.digest = [
            [self._cell(f"digest of block {b}", NO_DIGEST) for _ in range(sizes.digest_words)]
            for b in blocks
        ]
        self.parent = [self._cell(f"parent of block {b}", Parent(0, 0)) for b in blocks]
        self.placement = [self._cell(f"placement of block {b}", NO_PLACEMENT) for b in blocks]
        self.entry = [self._cell(f"index entry {e}", None) for e in range(sizes.entries)]
        self.free_blocks = self._cell("pool of blocks", (1 << sizes.blocks) - 1)
        self.free_slots = self._cell("pool of slots", (1 << sizes.slots) - 1)
        self.summary = self._cell("summary of the pool of slots", 1)
        self.bytes = [[self._cell(f"bytes of slot {s}", NO_DIGEST) for _ in ranks] for s in slots]
        self.header = [
            [self._cell(f"header of slot {s}", None) for _ in ranks]
            for s in (slots if sizes.disk else ())
        ]
        self.operation = [
            [
                self._cell(
                    f"operation {k} of leader {leader}",
                    OperationWord(FREE, 0, 0, (PENDING,) * sizes.ranks),
                )
                for k in range(sizes.operations)
            ]
            for leader in leaders
        ]
        self.fields = [
            [
                self._cell(f"fields of operation {k} of leader {leader}", NO_OPERATION)
                for k in range(sizes.operations)
            ]
            for leader in leaders
        ]
        self.failed_row = [
            [self._cell("failed row", 0) for _ in range(sizes.operations)] for _ in leaders
        ]
        self.head = [[self._cell("ring head", 0) for _ in ranks] for _ in leaders]
        self.tail = [[self._cell("ring tail", 0) for _ in ranks] for _ in leaders]
        self.ring = [
            [[self._cell("ring entry", None) for _ in range(sizes.ring)] for _ in ranks]
            for _ in leaders
        ]

    def _cell(self, name: str, value: Hashable) -> int:
        self.names.append(f"disk {name}" if self.sizes.disk else name)
        self.initial.append(value)
        return len(self.names) - 1

    def worker_line(self, leader: int, rank: int) -> int:
        """The participant line of a leader's worker."""
        return self.sizes.leaders + leader * self.sizes.ranks + rank

    def seed(self, *blocks: Seed) -> None:
        """Fill in blocks 0, 1, ... as if they had been stored before."""
        taken = 0
        for number, block in enumerate(blocks):
            registered = block.state == REGISTERED
            children = sum(b.parent == number and b.state == REGISTERED for b in blocks)
            self.initial[self.word[number]] = Word(block.state, block.holders, children, 0)
            for cell in self.digest[number]:
                self.initial[cell] = block.digest
            parent = Parent(0, 0) if block.parent is None else Parent(block.parent + 1, 0)
            self.initial[self.parent[number]] = parent
            placement = Placement(READY if registered else FILLING, 0, number)
            self.initial[self.placement[number]] = placement
            self.initial[self.entry[number]] = Entry(block.digest, number)
            for cell in self.bytes[number]:
                self.initial[cell] = block.digest if registered or block.filled else NO_DIGEST
                if block.damaged:
                    self.initial[cell] = TORN
            for cell in self.header[number] if self.header else ():
                self.initial[cell] = Header(block.digest, block.digest) if registered else None
            taken |= 1 << number
        for cell in (self.free_blocks, self.free_slots):
            bits = self.initial[cell]
            assert isinstance(bits, int)
            self.initial[cell] = bits & ~taken
        self.initial[self.summary] = int(self.initial[self.free_slots] != 0)

    def view(self, memory: Sequence[Any]) -> View:
        """The values of a memory under the names of the cells."""
        return View(self, memory)


class View:
    """One memory, decoded, for invariants."""

    def __init__(self, segment: Segment, memory: Sequence[Any]) -> None:
        self.segment = segment
        self.memory = memory
        self.words: list[Word] = [memory[cell] for cell in segment.word]
        self.parents: list[Parent] = [memory[cell] for cell in segment.parent]
        self.placements: list[Placement] = [memory[cell] for cell in segment.placement]

    def digest(self, block: int) -> str:
        """The digest of a block; its words joined if they differ."""
        words = {self.memory[cell] for cell in self.segment.digest[block]}
        return "/".join(sorted(words))

    def bytes_of(self, slot: int) -> set[str]:
        """What the slot holds, over all ranks."""
        return {self.memory[cell] for cell in self.segment.bytes[slot]}

    def __getitem__(self, cell: int) -> Any:
        return self.memory[cell]
