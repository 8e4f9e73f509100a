# SPDX-License-Identifier: Apache-2.0
"""The head of a slab, superblock and slot headers, as bytes and as what they say.

A slab outlives the shared memory, so it is read alone, too: after a reboot, or where it was copied
to. What is damaged is decoded as far as it goes: without a superblock the sizes are found from the
headers, each of which carries a checksum and says whose it is.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._fast.locks import held_by_other
from kvbm._fast.objects import open_file
from kvbm._fast.segment import LOCK_USERS_OFFSET
from kvbm._fast.slab import EMPTY, FOREIGN, SLAB_HEADER, TORN, VALID, header_conditions
from kvbm.config.settings import Settings
from kvbm.inspect.files import bytes_there, check_room, read_head
from kvbm.tiers.disk import MAGIC, PAGE_BYTES, SlabLayout, Superblock

__all__ = [
    "SlabFacts",
    "SlabHead",
    "find_slabs",
    "looks_like_slab",
    "read_slab_head",
    "slab_folder",
]

CONDITIONS = {EMPTY: "empty", VALID: "valid", TORN: "torn", FOREIGN: "foreign"}
GUESS_BYTES = 1 << 20
"""Of a slab without a superblock, where a header is looked for that tells its sizes."""

_NAME = re.compile(r"kvbm-(?P<instance>.+)\.disk\.(?P<rank>\d+)")
_IDENTITY = ["rank", "fingerprint", "payload_bytes"]

Headers = npt.NDArray[Any]


@dataclass(frozen=True)
class SlabHead:
    """Bytes of a slab up to its first slot.

    Attributes
    ----------
    path : str
        Where it was read.
    size : int
        Bytes of the file.
    data : bytes
        Superblock page and slot headers, as far as they are there.
    in_use : bool or None
        Whether somebody had it open; None: unknown.
    """

    path: str
    size: int
    data: bytes
    in_use: bool | None = None


def slab_folder() -> Path:
    """Folder of the slabs: `DYN_KVBM_DISK_CACHE_DIR`, or its default."""
    default = Settings.model_fields["disk_cache_dir"].default
    return Path(os.environ.get("DYN_KVBM_DISK_CACHE_DIR") or default)


def find_slabs() -> dict[str, dict[int, Path]]:
    """Named slabs in the folder, by instance and rank."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(slab_folder().glob("kvbm-*.disk.*")):
        name = _NAME.fullmatch(path.name)
        if name is not None:
            found.setdefault(name["instance"], {})[int(name["rank"])] = path
    return found


def looks_like_slab(path: Path) -> bool:
    """Whether a file has a slab's name or begins as one does."""
    if _NAME.fullmatch(path.name):
        return True
    with open(path, "rb", buffering=0) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_slab_head(path: Path) -> SlabHead:
    """Read a slab up to its first slot.

    Raises
    ------
    OSError
        It cannot be opened or read.
    InspectError
        It does not fit into memory.
    """
    fd = open_file(path, str(path), os.O_RDONLY, trusted=False)
    try:
        state = os.fstat(fd)
        superblock = Superblock.unpack(os.pread(fd, PAGE_BYTES, 0))
        layout = None if superblock is None else superblock.layout
        if layout is None:
            layout = _guessed_layout(read_head(fd, GUESS_BYTES), state.st_size)
        there = bytes_there(state)
        wanted = min(there, GUESS_BYTES if layout is None else layout.data_offset)
        check_room(wanted, path)
        return SlabHead(str(path), state.st_size, read_head(fd, wanted), _in_use(fd))
    finally:
        os.close(fd)


def _in_use(fd: int) -> bool | None:
    try:
        return held_by_other(fd, LOCK_USERS_OFFSET)
    except OSError:
        return None


def _guessed_layout(data: bytes, size: int) -> SlabLayout | None:
    """The layout that the headers speak of and that a file of this size has."""
    found = _first_whole(_all_headers(data))
    payload = 0 if found is None else int(found["payload_bytes"])
    if payload <= 0:
        return None
    slots = (size - PAGE_BYTES) // (SlabLayout(0, payload).stride + SLAB_HEADER.itemsize)
    layout = SlabLayout(max(0, slots), payload)
    while layout.slots > 0 and layout.total_bytes > size:
        layout = SlabLayout(layout.slots - 1, payload)
    return layout if layout.slots > 0 and layout.total_bytes == size else None


def _all_headers(data: bytes) -> Headers:
    table = data[PAGE_BYTES:]
    return np.frombuffer(table, SLAB_HEADER, len(table) // SLAB_HEADER.itemsize)


def _first_whole(headers: Headers) -> Any:
    """The first header that is valid for what it says itself; None if there is none."""
    for number in np.flatnonzero(headers["state"] == 1)[:64]:
        one = headers[number]
        rank, fingerprint, payload = (int(one[name]) for name in _IDENTITY)
        conditions = header_conditions(
            one.tobytes(),
            first=int(one["slot"]),
            rank=rank,
            fingerprint=fingerprint,
            payload_bytes=payload,
        )
        if int(conditions[0]) == VALID:
            return one
    return None


class SlabFacts:
    """What a slab's head says.

    Attributes
    ----------
    head : SlabHead
        The bytes.
    superblock : Superblock or None
        None if it is damaged.
    layout : SlabLayout or None
        Sizes; from the headers where there is no superblock, None where neither tells.
    damage : list of str
        What cannot be decoded, or is not as it must be.
    """

    def __init__(self, head: SlabHead) -> None:
        self.head = head
        self.damage: list[str] = []
        self.superblock = Superblock.unpack(head.data[:PAGE_BYTES])
        self.layout = None if self.superblock is None else self.superblock.layout
        if self.superblock is None:
            self.layout = _guessed_layout(head.data, head.size)
            sizes = "nothing else tells its sizes" if self.layout is None else "sizes from headers"
            self._damaged(f"its superblock cannot be read; {sizes}")
        if self.layout is not None and self.layout.total_bytes != head.size:
            self._damaged(f"it has {head.size} bytes of {self.layout.total_bytes}")
        if self.layout is not None and len(self.headers) < self.layout.slots:
            self._damaged(f"{len(self.headers)} of {self.layout.slots} headers are there")

    def _damaged(self, text: str) -> None:
        self.damage.append(f"{self.head.path}: {text}")

    @functools.cached_property
    def identity(self) -> tuple[int, int, int]:
        """Rank, fingerprint and bytes of a block that its headers must name."""
        if self.superblock is not None:
            own = self.superblock
            return own.rank, own.short_fingerprint, own.payload_bytes
        found = _first_whole(self.headers)
        if found is None:
            return 0, 0, 0
        return int(found["rank"]), int(found["fingerprint"]), int(found["payload_bytes"])

    @functools.cached_property
    def headers(self) -> Headers:
        """Headers of all slots, as far as they are there, whatever they are."""
        found = _all_headers(self.head.data)
        return found if self.layout is None else found[: self.layout.slots]

    @functools.cached_property
    def conditions(self) -> npt.NDArray[np.uint8]:
        """Of each header: empty, valid, torn or foreign."""
        rank, fingerprint, payload = self.identity
        return header_conditions(
            self.headers.tobytes(), rank=rank, fingerprint=fingerprint, payload_bytes=payload
        )

    @functools.cached_property
    def valid(self) -> Headers:
        """Headers of the slots that hold a block."""
        kept: Headers = self.headers[self.conditions == VALID]
        return kept

    @functools.cached_property
    def without_parent(self) -> npt.NDArray[np.bool_]:
        """Of each valid header, whether its parent is in no valid slot: not found after a start."""
        own = digests_of(self.valid, "digest")
        parents = digests_of(self.valid, "parent")
        lost: npt.NDArray[np.bool_] = (self.valid["position"] > 0) & ~np.isin(parents, own)
        return lost

    def row(self) -> dict[str, Any]:
        """Facts for people and for JSON."""
        own = self.superblock
        counts = np.bincount(self.conditions, minlength=len(CONDITIONS))
        return {
            "path": self.head.path,
            "rank": self.identity[0],
            "ranks": None if own is None else own.ranks,
            "bytes": self.head.size,
            "bytes_per_block": self.identity[2],
            "slots": len(self.headers),
            "headers": {name: int(counts[number]) for number, name in CONDITIONS.items()},
            "without_parent": int(self.without_parent.sum()),
            "in_use": self.head.in_use,
            "key_epoch": None if own is None else own.epoch,
            "nonce": None if own is None else f"{own.nonce:016x}",
            "fingerprint": None if own is None else own.fingerprint.hex(),
            "damage": list(self.damage),
        }


def digests_of(headers: Headers, name: str) -> npt.NDArray[Any]:
    """Digests of headers, or those of their parents, so that they can be compared."""
    both = np.empty((len(headers), 2), "<u8")
    both[:, 0], both[:, 1] = headers[f"{name}_lo"], headers[f"{name}_hi"]
    return np.ascontiguousarray(both).view("V16").ravel()
