# SPDX-License-Identifier: Apache-2.0
"""One object in shared memory that every case is put into, and those who are attached to it."""

from __future__ import annotations

import itertools
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvbm._fast import contract
from kvbm._fast.disk_table import DiskTable
from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import claim_leader
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment, SegmentFault
from kvbm.errors import KvbmError
from tests.fast.raw_segment import AT_HEADER_CHECK, PAGE, SHM, header_check
from tests.fuzz.cases import Case, Edit
from tests.fuzz.images import Image

REFUSALS = (KvbmError, SegmentFault, PermissionError, FileNotFoundError, LookupError)
"""What a walk may end with: our errors, and a reference or handle that means nothing any more."""


class World:
    """The object, the case that is in it, and what has attached.

    Parameters
    ----------
    prefix
        What the names of its instances begin with.
    images
        By name.
    folder
        For files.
    """

    def __init__(self, prefix: str, images: dict[str, Image], folder: Path) -> None:
        self.prefix = prefix
        self.images = images
        self.folder = folder
        self.image = next(iter(images.values()))
        self.maps: dict[str, tuple[int, mmap.mmap]] = {}
        self.attached: list[Segment] = []
        self.closing: list[Callable[[], object]] = []
        self.table: OperationTable | None = None
        self.refs: list[int] = []
        self.reserved: list[int] = []
        self.handles: list[int] = []
        self.racing = False

    @property
    def instance(self) -> str:
        """Name of the instance: each image has one of its own, since their lengths differ."""
        return f"{self.prefix}-{self.image.name}"

    @property
    def name(self) -> str:
        """Name of the object."""
        return f"/kvbm-{self.instance}"

    @property
    def path(self) -> Path:
        """Where the object is."""
        return SHM / f"kvbm-{self.instance}"

    # ---- the bytes -------------------------------------------------------------------------------
    def begin(self, image: Image) -> None:
        """Put an image in place; into a new object if the last case has changed or replaced it."""
        self.image = image
        data = self.mapped()
        if data is None:
            self.path.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(self.path, flags, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, len(image.data))
                data = mmap.mmap(descriptor, len(image.data))
                self.maps[image.name] = (os.fstat(descriptor).st_ino, data)
            finally:
                os.close(descriptor)
        data[:] = image.data

    def mapped(self) -> mmap.mmap | None:
        """The mapping of the object, if it is still the one that the image was put in."""
        inode, data = self.maps.get(self.image.name, (0, None))
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return None
        whole = len(self.image.data)
        same = state.st_ino == inode and state.st_size == whole and state.st_blocks * 512 >= whole
        return data if same else None

    def edit(self, edits: list[Edit]) -> None:
        """Change the bytes, if they are there."""
        for length in (edit[1] for edit in edits if edit[0] == "size"):
            os.truncate(self.path, length)
        data = self.mapped()
        if data is None:
            return
        for kind, *about in edits:
            if kind != "size":
                self.edit_bytes(data, kind, about)

    def edit_bytes(self, data: mmap.mmap, kind: str, about: list[Any]) -> None:
        """Change mapped bytes."""
        if kind == "seal":
            check = header_check(data[:PAGE])
            data[AT_HEADER_CHECK : AT_HEADER_CHECK + 4] = check.to_bytes(4, "little")
            return
        section = self.image.sections[about[0]]
        record = contract.RECORDS.get(section.record)
        size = 8 if record is None else record.size
        if kind == "fill":
            seed, count = about[1], section.length * size
            junk = bytes([seed]) * count if seed < 256 else random.Random(seed).randbytes(count)
            data[section.offset : section.offset + count] = junk
            return
        if kind == "copy":
            to, source = (section.offset + number * size for number in about[1:])
            data[to : to + size] = data[source : source + size]
            return
        if kind == "all":
            for index in range(section.length):
                self.put(data, [about[0], index, about[1], 0], about[2])
            return
        self.put(data, about[:4], about[4])

    def put(self, data: mmap.mmap, place: list[Any], value: int) -> None:
        """Write one field."""
        at, width = self.place(place)
        data[at : at + width] = value.to_bytes(width, "little")

    def place(self, about: list[Any]) -> tuple[int, int]:
        """Offset and bytes of a field: section, index, field, element."""
        name, index, field_name, element = about[:4]
        section = self.image.sections[name]
        if not section.record:
            return section.offset + 8 * index, 8
        record = contract.RECORDS[section.record]
        inner = field_name.removeprefix("rows.") if field_name.startswith("rows.") else ""
        outer = "rows" if inner else field_name
        field = next(field for field in record.fields if field.name == outer)
        at = section.offset + index * record.size + field.offset + element * field.size
        if inner:
            field = next(f for f in contract.RECORDS["kv_row"].fields if f.name == inner)
            at += field.offset
        return at, field.size

    def blocks_of_state(self, state: int) -> int:
        """How many blocks are in a state; -1 if the object is another one by now."""
        data, section = self.mapped(), self.image.sections["blocks"]
        if data is None:
            return -1
        words = np.frombuffer(data, "<u8", 8 * section.length, section.offset)[::8]
        return int((words >> np.uint64(61) == state).sum())

    # ---- participants ----------------------------------------------------------------------------
    def attach(self, writable: bool = True) -> Segment:
        """Attach once more."""
        segment = Segment.attach(self.name, writable)
        self.attached.append(segment)
        return segment

    def leader(self, random: random.Random) -> OperationTable:
        """The leader of this case; attaches, recovers and claims when there is none yet."""
        if self.table is None:
            segment = self.attach()
            recover(segment, rebuild=random.random() < 0.3)
            claim_leader(segment, 0xF0)
            self.table = OperationTable(segment)
        return self.table

    def disk_leader(self, random: random.Random) -> DiskTable:
        """One more leader, of a disk tier."""
        segment = self.attach()
        recover(segment, rebuild=random.random() < 0.3)
        claim_leader(segment, 0xF1)
        return DiskTable(segment)

    def end(self) -> None:
        """Stop, and detach everybody."""
        try:
            for close in reversed(self.closing):
                close()
        finally:
            self.closing.clear()
            self.table = None
            self.refs.clear()
            self.reserved.clear()
            self.handles.clear()
            for segment in self.attached:
                segment.close()
            self.attached.clear()

    def remove(self) -> None:
        """Remove the object, and what a walk may have put beside it."""
        for path in SHM.glob(f"kvbm-{self.prefix}-*"):
            path.unlink(missing_ok=True)


def run_case(world: World, case: Case, walks: dict[str, Callable[..., object]]) -> list[str]:
    """Run a case; what became of each walk. Anything but an answer or a refusal is raised."""
    world.begin(world.images[case.image])
    world.racing = case.racing
    found = []
    try:
        for walking, steps in itertools.groupby(case.steps, lambda step: step[0] == "walk"):
            if not walking:
                world.edit([*steps])
                continue
            for _, name, seed in steps:
                try:
                    walks[name](world, random.Random(seed))
                    found.append(f"{name} answered")
                except REFUSALS:
                    found.append(f"{name} refused")
    finally:
        world.end()
    return found
