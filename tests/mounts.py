# SPDX-License-Identifier: Apache-2.0
"""Real file systems that are small, read-only or without O_DIRECT, in a mount namespace of a child.

Nothing outside of the child sees them, so that `/dev/shm` can be one of them. As root a namespace
of mounts is enough; another user gets one of users with it, where the kernel allows that.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbm._fast.objects import SHARED_MEMORY
from tests.fast.instances import run_in_fork

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_RDONLY, MS_REC, MS_PRIVATE = 1, 0x4000, 0x40000
NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter_namespace() -> None:
    """Give this process, which must have one thread, mounts of its own."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _checked(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount")


def mount(
    folder: Path = SHARED_MEMORY, options: str = "", *, read_only: bool = False, kind: str = "tmpfs"
) -> None:
    """Mount a file system of memory; a read-only one is empty."""
    flags = MS_RDONLY if read_only else 0
    name = kind.encode()
    _checked(_libc.mount(name, os.fsencode(folder), name, flags, options.encode()), "mount")


def mount_small_shared_memory(size: int) -> None:
    """Enter a namespace whose `/dev/shm` has so many bytes."""
    enter_namespace()
    mount(options=f"size={size}")


def mount_read_only(folder: Path) -> None:
    """Enter a namespace in which nothing can be written to a folder."""
    enter_namespace()
    mount(folder, read_only=True)


def become_nobody() -> None:
    """Be another user from here on."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


@functools.cache
def why_no_mounts() -> str | None:
    """Why this process may have no mounts of its own; None if it may."""

    def attempt() -> None:
        enter_namespace()
        mount()

    try:
        run_in_fork(attempt)
    except AssertionError:
        return "the kernel gives this process no mounts of its own (unshare)"
    return None


def with_mounts(check: Callable[[], object]) -> None:
    """Run `check` in a child with mounts of its own; skip where that is not possible."""
    problem = why_no_mounts()
    if problem is not None:
        pytest.skip(problem)

    def inside() -> None:
        enter_namespace()
        check()

    run_in_fork(inside)
