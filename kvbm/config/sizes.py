# SPDX-License-Identifier: Apache-2.0
"""From configured sizes to slots and bytes, and whether the machine has them."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from kvbm.config.kinds import UINT32_MAX
from kvbm.errors import ConfigError

SHM_FOLDER = "/dev/shm"

CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where a container sees the limit of its memory, versions 2 and 1."""


def tier_slots(variable: str, size_gb: float, override: int, bytes_per_block: int) -> int:
    """Number of slots of a tier, as upstream counts them.

    Parameters
    ----------
    variable
        Name of the setting that `size_gb` is from, for the message.
    size_gb
        Size in GB of 1e9 bytes; 0 for none.
    override
        Number of slots that wins over the size; 0 for none.
    bytes_per_block
        Bytes of one block, summed over all ranks.

    Returns
    -------
    int
        The override, else floor(bytes / bytes per block); 0 without either.

    Raises
    ------
    ConfigError
        The size is too small for one block, or gives more slots than can be numbered.
    """
    if bytes_per_block < 1:
        raise ValueError(f"bytes per block must be >= 1, not {bytes_per_block}")
    if override > 0 or size_gb == 0:
        return override
    slots = int(size_gb * 1e9 / bytes_per_block)
    if 1 <= slots <= UINT32_MAX:
        return slots
    raise ConfigError(
        f"{variable}={size_gb} gives {slots} blocks of {bytes_per_block} bytes (all ranks "
        f"together); allowed: 1 to {UINT32_MAX} blocks, that is {bytes_per_block / 1e9:.9f} to "
        f"{UINT32_MAX * bytes_per_block / 1e9:.0f} GB"
    )


def check_shm_room(setting: str, bytes_needed: int, folder: str = SHM_FOLDER) -> None:
    """Check that shared memory has room, before it is reserved.

    Parameters
    ----------
    setting
        The setting that asks for it, with its value, for the message.
    bytes_needed
        Bytes that are going to be reserved, beyond what is reserved already.
    folder
        Where the system keeps POSIX shared memory.

    Raises
    ------
    ConfigError
        There is too little room, or too little memory for it, or `folder` is missing, read-only,
        or not this user's to write.
        The message says how to change that.
    """
    try:
        room, state = os.statvfs(folder), os.stat(folder)
    except OSError as error:
        raise ConfigError(
            f"{setting}: {folder} cannot be used: {error.strerror}. "
            "POSIX shared memory must be mounted there (mount -t tmpfs tmpfs /dev/shm)"
        ) from None
    if room.f_flag & os.ST_RDONLY:
        raise ConfigError(
            f"{setting}: {folder} is mounted read-only, the host tier has to write there "
            f"(mount -o remount,rw {folder})"
        )
    if bytes_needed <= 0:
        return
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(
            f"{setting}: user {os.geteuid()} may not make files in {folder}, which belongs to user "
            f"{state.st_uid} and has mode {stat.S_IMODE(state.st_mode):o}; allowed: a folder that "
            f"this user may write (chmod 1777 {folder})"
        )
    bytes_free = room.f_bavail * room.f_frsize
    if bytes_needed <= bytes_free:
        _check_memory(setting, bytes_needed)
        return
    raise ConfigError(
        f"{setting}: the host tier needs {bytes_needed} bytes ({bytes_needed / 1e9:.3f} GB) in "
        f"{folder}, which has {bytes_free} bytes ({bytes_free / 1e9:.3f} GB) free of "
        f"{room.f_blocks * room.f_frsize}. {how_to_make_room(bytes_needed, folder)}"
    )


def _check_memory(setting: str, bytes_needed: int) -> None:
    """Check that it can be in memory at all: shared memory may be mounted larger than that."""
    limit, whose = min(_memory_limits())
    if bytes_needed > limit:
        raise ConfigError(
            f"{setting}: the host tier needs {bytes_needed} bytes ({bytes_needed / 1e9:.3f} GB) of "
            f"memory, {whose} {limit} ({limit / 1e9:.3f} GB). Set DYN_KVBM_CPU_CACHE_GB lower, or "
            "allow more (with Docker `--memory`, in Kubernetes `resources.limits.memory`)"
        )


def _memory_limits() -> Iterator[tuple[int, str]]:
    """Bytes of memory that this process can have at most, and who says so."""
    yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine has"
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError):
            text = path.read_text().strip()
            if text.isdecimal():  # else "max"
                yield int(text), f"{path} allows"


def how_to_make_room(bytes_needed: int, folder: str = SHM_FOLDER) -> str:
    """What to do so that shared memory has room for `bytes_needed` more, as sentences."""
    room = os.statvfs(folder)
    bytes_used = (room.f_blocks - room.f_bavail) * room.f_frsize
    gib = -(-(bytes_used + bytes_needed) // 2**30)
    return (
        f"Set DYN_KVBM_CPU_CACHE_GB lower or enlarge {folder} to {gib} GiB: on a "
        f"host `mount -o remount,size={gib}G {folder}`, with Docker `--shm-size={gib}g`, in "
        f"Kubernetes an emptyDir volume with `medium: Memory` and `sizeLimit: {gib}Gi` mounted at "
        f"{folder}. `ls -l {folder}` shows what fills it"
    )
