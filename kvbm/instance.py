# SPDX-License-Identifier: Apache-2.0
"""Names and life of what an instance has in shared memory.

An *instance* is one cache: a segment `/kvbm-<instance>`, one arena a rank,
`/kvbm-<instance>.host.<rank>`, and with a disk tier its segment, `/kvbm-<instance>.disk`. An
instance named by `DYN_KVBM_INSTANCE` outlives its users. Without the variable the instance is
private to one engine: the last user out removes it, and what a killed engine left is removed by the
next start. In both cases the question "is anybody using it" is answered by the kernel: each user
holds a shared lock on each object that it has open, so whoever gets the exclusive lock is alone.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator

from kvbm._fast.locks import try_lock
from kvbm._fast.objects import SHARED_MEMORY, object_path, open_object
from kvbm._fast.segment import LOCK_USERS_OFFSET
from kvbm.config.sizes import how_to_make_room
from kvbm.errors import SegmentError

__all__ = [
    "SHARED_MEMORY",
    "arena_name",
    "arena_names",
    "cannot_make",
    "engine_key",
    "instances",
    "is_private",
    "private_instance",
    "remove",
    "remove_dead_private_instances",
    "remove_if_unused",
    "remove_ranks_from",
    "reserved_bytes",
    "segment_name",
]

logger = logging.getLogger(__name__)

PREFIX = "kvbm-"
PRIVATE = re.compile(r"p-[0-9a-f]{16}")
_OBJECT_SUFFIX = re.compile(r"\.(?:host\.\d+|disk)$")
_ARENA_SUFFIX = re.compile(r"\.host\.(\d+)$")


def engine_key(engine_id: str) -> int:
    """64-bit hash of an engine's id, by which its workers find their leader."""
    return int.from_bytes(hashlib.blake2b(engine_id.encode(), digest_size=8).digest(), "little")


def private_instance(engine_id: str) -> str:
    """Instance name of an engine that was given none."""
    return f"p-{engine_key(engine_id):016x}"


def is_private(instance: str) -> bool:
    """Return whether an instance is removed with its last user."""
    return PRIVATE.fullmatch(instance) is not None


def segment_name(instance: str) -> str:
    """Name of the shared-memory object that holds the block state."""
    return f"/{PREFIX}{instance}"


def arena_name(instance: str, rank: int) -> str:
    """Name of the shared-memory object that holds one rank's host tier."""
    return f"/{PREFIX}{instance}.host.{rank}"


def disk_instance(instance: str) -> str:
    """Name under which an instance's disk tier has its segment."""
    return f"{instance}.disk"


def instances() -> dict[str, list[str]]:
    """Instances that have objects on this host, with the names of their objects."""
    found: dict[str, list[str]] = {}
    for path in sorted(SHARED_MEMORY.glob(f"{PREFIX}*")):
        instance = _OBJECT_SUFFIX.sub("", path.name.removeprefix(PREFIX))
        found.setdefault(instance, []).append(f"/{path.name}")
    return found


def reserved_bytes(names: Iterable[str]) -> int:
    """Memory that objects hold; those that are not there hold none."""
    total = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(object_path(name), follow_symlinks=False).st_blocks * 512
    return total


def arena_names(instance: str) -> list[str]:
    """Arenas of an instance that are there."""
    return [name for name in instances().get(instance, []) if _ARENA_SUFFIX.search(name)]


def cannot_make(name: str, size: int, error: OSError) -> SegmentError:
    """Return the error for an object of `size` bytes that the system does not make."""
    reason = f"{size} bytes of it cannot be made in {SHARED_MEMORY}: {error.strerror}"
    if error.errno == errno.ENOSPC:
        reason += f". {how_to_make_room(size)}"
    return SegmentError(name, reason)


@contextlib.contextmanager
def _exclusive(names: list[str]) -> Iterator[bool]:
    """Hold the exclusive user lock of every object; yields False if somebody uses one of them."""
    fds: list[int] = []
    try:
        alone = True
        for name in names:
            try:
                fd = open_object(name, trusted=False)  # for its lock and its name alone
            except FileNotFoundError:
                continue
            except PermissionError:
                alone = False
                break
            fds.append(fd)
            ours = os.fstat(fd).st_uid == os.geteuid()
            if not ours or not try_lock(fd, LOCK_USERS_OFFSET, exclusive=True):
                alone = False
                break
        yield alone
    finally:
        for fd in fds:
            os.close(fd)


def remove_if_unused(instance: str) -> bool:
    """Remove an instance's objects unless somebody uses one of them.

    The locks are held while the names are removed, so a process that starts meanwhile either is
    seen, or finds that its object has no name any more and makes a new one.

    Returns
    -------
    bool
        True if nothing of the instance is left.
    """
    names = instances().get(instance, [])
    with _exclusive(names) as alone:
        if alone:
            remove(instance)
    return alone


def remove(instance: str) -> None:
    """Remove the names of an instance; who has its objects open keeps them."""
    for name in instances().get(instance, []):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(object_path(name))


def remove_ranks_from(instance: str, ranks: int) -> None:
    """Remove arenas of rank `ranks` and above unless somebody uses them."""
    for name in instances().get(instance, []):
        rank = _ARENA_SUFFIX.search(name)
        if rank is not None and int(rank[1]) >= ranks:
            with _exclusive([name]) as alone:
                if alone:
                    os.unlink(object_path(name))


def remove_dead_private_instances() -> list[str]:
    """Remove what killed engines left behind; returns the instances that were removed."""
    removed = [
        instance for instance in instances() if is_private(instance) and remove_if_unused(instance)
    ]
    for instance in removed:
        logger.info("removed what a dead engine left in shared memory: %s", instance)
    return removed
