# SPDX-License-Identifier: Apache-2.0
"""What a case is, and cases made from seeds.

A case is data: an image, and a list of steps. A step is an edit of the segment's bytes or a walk
through it; edits stand before and after the attach. A place is named by section, index and field,
so that a kept case stays what it was when the layout moves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvbm._fast import contract
from tests.fuzz.images import Image

Edit = tuple[Any, ...]
"""("set", section, index, field, element, value): a value of a field; ("all", section, field,
value): the same in all records; ("fill", section, seed): bytes of a section; ("copy", section, to,
from): a record over another one; ("size", bytes): length of the object; ("seal",): a right checksum
in the header."""

WORDS = {
    ("kv_block", "word"): "block",
    ("kv_block", "placement"): "placement",
    ("kv_block", "recency"): "recency",
    ("kv_operation", "word"): "operation",
    ("kv_ring", "entry"): "ring",
}
DECISIVE = ("word", "parent", "placement", "head", "tail", "role", "inside", "row_count", "rows")
EIGHT = range(8)
LIKELY = ("blocks", "operations", "rings", "buckets", "participants", "header", "pool.blocks")


@dataclass(frozen=True)
class Case:
    """One case; `racing`: somebody goes on scribbling while the walks are under way."""

    image: str
    steps: tuple[tuple[Any, ...], ...]
    racing: bool = False
    seed: int | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Read one line."""
        found = json.loads(text)
        steps = tuple(tuple(step) for step in found["steps"])
        return cls(found["image"], steps, found["racing"], found["seed"])


class Maker:
    """Edits for an image, from a source of randomness."""

    def __init__(self, image: Image, choose: random.Random) -> None:
        self.image = image
        self.choose = choose
        self.sections = image.sections

    def value(self, bits: int, limit: int) -> int:
        """A number that is likely to be a limit of something."""
        choose = self.choose
        whole = (1 << bits) - 1
        found = choose.choice(
            [
                0,
                1,
                whole,
                1 << bits - 1,
                limit - 1,
                limit,
                limit + 1,
                choose.randrange(limit + 2),
                choose.getrandbits(bits),
                whole ^ 1 << choose.randrange(bits),
            ]
        )
        return max(0, found) & whole

    def word(self, kind: str, old: int) -> int:
        """A word of which one part is another one."""
        mask = self.choose.choice([*contract.BITS[kind].values()])
        shift = (mask & -mask).bit_length() - 1
        part = self.value((mask >> shift).bit_length(), self.image.shape.block_capacity)
        return old & ~mask | part << shift & mask

    def index(self, name: str) -> int:
        """A record of a section, mostly one that is in use."""
        length, used = self.sections[name].length, self.image.used[name]
        if self.choose.random() < 0.7 and used:
            return self.choose.choice(used)
        if name in ("participants", "counters", "rings", "operations"):
            return min(length - 1, self.choose.choice([0, 1, 2, 15, 16, 17, 128]))
        return self.choose.randrange(length)

    def one(self) -> Edit:
        """Another value for one field."""
        choose = self.choose
        name = choose.choice([*LIKELY, *LIKELY, *self.sections])
        index = self.index(name)
        record = contract.RECORDS.get(self.sections[name].record)
        if record is None:
            return ("set", name, index, "", 0, self.value(64, 64))
        decisive = [field for field in record.fields if field.name in DECISIVE]
        field = choose.choice(decisive or record.fields if choose.random() < 0.6 else record.fields)
        element = choose.randrange(field.length) if choose.random() < 0.4 else 0
        if field.name == "rows":
            inner = choose.choice(contract.RECORDS["kv_row"].fields)
            value = self.value(32, self.image.shape.block_capacity)
            return ("set", name, index, f"rows.{inner.name}", choose.randrange(4), value)
        if name == "buckets":
            return self.entry(index)
        kind = WORDS.get((self.sections[name].record, field.name))
        if kind is not None and choose.random() < 0.8:
            section = self.sections[name]
            at = section.offset + index * record.size + field.offset + element * field.size
            old = int.from_bytes(self.image.data[at : at + 8], "little")
            return ("set", name, index, field.name, element, self.word(kind, old))
        return ("set", name, index, field.name, element, self.value(8 * field.size, 64))

    def entry(self, bucket: int) -> Edit:
        """An entry of the index that leads elsewhere, mostly under the digest that it had."""
        at = self.sections["buckets"].offset + 64 * bucket
        old = [
            int.from_bytes(self.image.data[at + 8 * i : at + 8 * i + 8], "little") for i in EIGHT
        ]
        place = self.choose.choice([i for i in EIGHT if old[i]] or [*EIGHT])
        block = self.value(32, self.image.shape.block_capacity)
        tag = old[place] >> 32 if self.choose.random() < 0.9 else self.value(32, 64)
        return ("set", "buckets", bucket, "entry", place, tag << 32 | block)

    def ring(self) -> list[Edit]:
        """Blocks whose parents form a circle, registered and of the generations named."""
        count = self.choose.choice([1, 2, 3, 7, self.image.shape.block_capacity])
        blocks = self.choose.sample(range(self.image.shape.block_capacity), count)
        children = self.choose.choice([0, 1])
        word = 2 << 61 | children << 24 | 5
        edits: list[Edit] = []
        for block, parent in zip(blocks, [*blocks[1:], blocks[0]], strict=True):
            edits.append(("set", "blocks", block, "word", 0, word))
            edits.append(("set", "blocks", block, "parent", 0, parent + 1))
            edits.append(("set", "blocks", block, "parent_generation", 0, 5))
        return edits

    def column(self) -> list[Edit]:
        """One value of one field in all records of a section."""
        name = self.choose.choice(["blocks", "participants", "rings", "cold", "counters"])
        record = contract.RECORDS[self.sections[name].record]
        field = self.choose.choice(record.fields)
        value = self.value(8 * field.size, self.image.shape.block_capacity)
        return [("all", name, field.name, value)]

    def many(self) -> list[Edit]:
        """An edit of one of the sorts, as a list."""
        shape = self.choose.random()
        name = self.choose.choice([*LIKELY, *self.sections])
        if shape < 0.70:
            return [self.one() for _ in range(self.choose.choice([1, 1, 2, 5, 40]))]
        if shape < 0.78:
            return self.ring()
        if shape < 0.84:
            return self.column()
        if shape < 0.92:
            length = self.sections[name].length
            return [("copy", name, self.index(name), self.choose.randrange(length))]
        return [
            ("fill", name, self.choose.choice([0, 255, 1, self.choose.randrange(256, 1 << 32)]))
        ]

    def header(self) -> list[Edit]:
        """Other sizes, mostly under a right checksum."""
        fields = [f for f in contract.RECORDS["kv_header"].fields if f.name != "magic"]
        edits: list[Edit] = []
        for _ in range(self.choose.choice([1, 1, 2, 4])):
            field = self.choose.choice(fields)
            value = self.value(8 * field.size, 64)
            edits.append(
                ("set", "header", 0, field.name, self.choose.randrange(field.length), value)
            )
        return [*edits, ("seal",)] if self.choose.random() < 0.8 else edits

    def size(self) -> list[Edit]:
        """Another length of the object."""
        whole = len(self.image.data)
        choices = [0, 1, 4095, 4096, whole - 4096, whole - 1, whole + 1, whole + 4096, 4 * whole]
        return [("size", self.choose.choice([*choices, self.choose.randrange(whole)]))]


def make(seed: int, images: Sequence[Image], walks: Callable[[Image], Sequence[str]]) -> Case:
    """The case of a seed.

    Parameters
    ----------
    walks
        Names of the walks that an image allows, those that are wanted more often several times.
    """
    choose = random.Random(seed)
    image = choose.choice(images)
    maker = Maker(image, choose)
    steps: list[tuple[Any, ...]] = []
    sort = choose.random()
    if sort < 0.08:
        steps += maker.size()
    elif sort < 0.20:
        steps += maker.header()
    elif sort < 0.80:
        steps += maker.many()
    names = walks(image)
    for _ in range(choose.choice([1, 2, 4, 8])):
        steps.append(("walk", choose.choice(names), choose.getrandbits(32)))
        if choose.random() < (0.8 if sort >= 0.8 else 0.3):
            steps += maker.many()
    return Case(image.name, tuple(steps), choose.random() < 0.06, seed)
