# SPDX-License-Identifier: Apache-2.0
"""Reading files that somebody else may change or remove meanwhile, and that may say anything."""

from __future__ import annotations

import os
from pathlib import Path

from kvbm.errors import InspectError

__all__ = ["bytes_there", "check_room", "read_all", "read_head"]

READ_BYTES = 1 << 24


def bytes_there(state: os.stat_result) -> int:
    """Bytes of a file that are worth reading: one with holes is not read to its end.

    A creator leaves no holes; a file may have any length without taking any room.
    """
    return min(state.st_size, state.st_blocks * 512)


def check_room(size: int, path: Path) -> None:
    """Refuse what this machine's memory cannot hold, before the system ends somebody for it."""
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        raise InspectError(f"{path} does not fit into memory")


def read_all(path: Path) -> bytes:
    """All of a file."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        check_room(size, path)
        return read_head(file.fileno(), size)


def read_head(fd: int, count: int) -> bytes:
    """At most `count` bytes from the start of a file: fewer where it ends before."""
    pieces = bytearray()
    while len(pieces) < count:
        piece = os.pread(fd, min(READ_BYTES, count - len(pieces)), len(pieces))
        if not piece:
            break
        pieces += piece
    return bytes(pieces)
