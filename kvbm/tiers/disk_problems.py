# SPDX-License-Identifier: Apache-2.0
"""Why a slab cannot be made, and which settings change that."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kvbm.errors import SlabError

__all__ = ["cannot_reserve", "no_direct", "no_room", "not_writable"]


def not_writable(where: str, folder: Path, error: OSError) -> SlabError:
    """Return the error for a file that the system does not open or make in `folder`."""
    reason = "it is no folder" if error.errno == errno.EEXIST else error.strerror or str(error)
    return SlabError(
        where,
        f"{reason}; {_another_folder(folder)} (allowed: one that user {os.geteuid()} may write, or "
        "that can be made)",
    )


def no_room(where: str, folder: Path, wanted: int, bytes_free: int) -> SlabError:
    """Return the error for a file system that is too small."""
    return SlabError(
        where,
        f"{wanted} bytes ({wanted / 1e9:.3f} GB) do not fit, {bytes_free} "
        f"({bytes_free / 1e9:.3f} GB) are free; set DYN_KVBM_DISK_CACHE_GB lower, or "
        f"{_another_folder(folder)}",
    )


def cannot_reserve(where: str, folder: Path) -> SlabError:
    """Return the error for a file system without `fallocate`."""
    return SlabError(
        where,
        "the file system cannot reserve space; DYN_KVBM_DISK_ZEROFILL_FALLBACK=1 writes zeros "
        f"instead, or {_another_folder(folder)}",
    )


def no_direct(where: str, folder: Path, detail: str) -> SlabError:
    """Return the error for a file system on which O_DIRECT does not work."""
    return SlabError(
        where,
        f"O_DIRECT is not possible ({detail}); DYN_KVBM_DISK_ALLOCATOR_TYPE=open-direct opens the "
        "file so from the start, DYN_KVBM_DISK_DISABLE_O_DIRECT=1 goes through the page cache, or "
        f"{_another_folder(folder)}",
    )


def _another_folder(folder: Path) -> str:
    return f"change DYN_KVBM_DISK_CACHE_DIR={folder} to another folder"
