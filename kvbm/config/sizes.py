# SPDX-License-Identifier: Apache-2.0
"""From configured sizes to slots and bytes, and whether the machine has them."""

import os

from kvbm.config.kinds import UINT32_MAX
from kvbm.errors import ConfigError

SHM_FOLDER = "/dev/shm"


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
        There is too little room, or `folder` is missing or read-only. The message says how to
        enlarge it.
    """
    try:
        room = os.statvfs(folder)
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
    bytes_free = room.f_bavail * room.f_frsize
    if bytes_needed <= bytes_free:
        return
    bytes_total = room.f_blocks * room.f_frsize
    gib = -(-(bytes_total + bytes_needed - bytes_free) // 2**30)
    raise ConfigError(
        f"{setting}: the host tier needs {bytes_needed} bytes ({bytes_needed / 1e9:.3f} GB) in "
        f"{folder}, which has {bytes_free} bytes ({bytes_free / 1e9:.3f} GB) free of "
        f"{bytes_total}. Set DYN_KVBM_CPU_CACHE_GB lower or enlarge {folder} to {gib} GiB: on a "
        f"host `mount -o remount,size={gib}G {folder}`, with Docker `--shm-size={gib}g`, in "
        f"Kubernetes an emptyDir volume with `medium: Memory` and `sizeLimit: {gib}Gi` mounted at "
        f"{folder}. `ls -l {folder}` shows what fills it"
    )
