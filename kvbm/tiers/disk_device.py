# SPDX-License-Identifier: Apache-2.0
"""The block device under a folder: what was written to it, and how worn it is.

What anybody may read comes from sysfs: the device behind the folder's file system, through
partitions and stacked devices (LVM, RAID) down to the drives, and the sectors written since the
machine started (field 7 of `stat`, kernel documentation `block/stat.rst`).

Wear is only known to the drive. An NVMe drive tells it in its SMART / Health Information log (NVM
Express Base Specification, log page 02h), which the kernel hands out to who may open the
controller's device and has CAP_SYS_ADMIN. For anybody else, and for other drives, the answer is the
reason why it is not known.
"""

from __future__ import annotations

import array
import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["DiskDevice", "SmartLog", "device_of", "parse_smart_log"]

SYSFS, DEV = Path("/sys"), Path("/dev")
SECTOR_BYTES = 512  # of `stat`, whatever the drive's are
DRIVES_MAX = 64
"""Drives below one stacked device that are looked at."""

# struct nvme_admin_cmd of linux/nvme_ioctl.h: opcode, flags, reserved, nsid, cdw2, cdw3, metadata,
# addr, metadata_len, data_len, cdw10 to cdw15, timeout_ms, result.
_COMMAND = struct.Struct("<BBHIIIQQIIIIIIIIII")
_ADMIN_IOCTL = 0xC0484E41  # _IOWR('N', 0x41, 72 bytes)
_GET_LOG_PAGE, _SMART_PAGE, _ALL_NAMESPACES = 0x02, 0x02, 0xFFFFFFFF
_LOG_BYTES = 512
_TIMEOUT_MS = 2000
_UNIT_BYTES = 512_000  # a data unit is a thousand blocks of 512 bytes

Ask = Callable[[Path], bytes]


class SmartLog(NamedTuple):
    """What is of interest of a drive's SMART / Health Information log.

    Attributes
    ----------
    wear : float
        Share of its life that is used, by the maker's estimate; beyond 1 it goes on to 2.55.
    spare : float
        Share of its spare blocks that is left.
    written_bytes : int
        Written by hosts in its life.
    media_errors : int
        Times that data could not be read or written right.
    """

    wear: float
    spare: float
    written_bytes: int
    media_errors: int


@dataclass(frozen=True)
class DiskDevice:
    """A block device, as far as it can be read.

    Attributes
    ----------
    name, model : str or None
        Name in sysfs; what the drive calls itself.
    rotational : bool or None
        A disk that turns does not wear by writes.
    written_bytes : int or None
        Written since the machine started, by everybody.
    wear, spare : float or None
        The worst of its drives; see `SmartLog`.
    lifetime_written_bytes, media_errors : int or None
        The sum over its drives.
    problem : str or None
        Why wear, or all of it, is not known.
    """

    name: str | None = None
    model: str | None = None
    rotational: bool | None = None
    written_bytes: int | None = None
    wear: float | None = None
    spare: float | None = None
    lifetime_written_bytes: int | None = None
    media_errors: int | None = None
    problem: str | None = None

    def row(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def parse_smart_log(page: bytes) -> SmartLog:
    """Read log page 02h; the offsets are those of the specification.

    Raises
    ------
    ValueError
        It has not the page's 512 bytes, or is empty.
    """
    if len(page) != _LOG_BYTES or not any(page):
        raise ValueError("it is no SMART log")

    def number(at: int) -> int:
        return int.from_bytes(page[at : at + 16], "little")

    return SmartLog(page[5] / 100, page[3] / 100, number(48) * _UNIT_BYTES, number(160))


def read_smart_log(controller: Path) -> bytes:
    """Ask a drive for its log page 02h.

    Raises
    ------
    OSError
        The system or the drive refuses.
    """
    page = array.array("B", bytes(_LOG_BYTES))
    dwords = _LOG_BYTES // 4 - 1
    command = _COMMAND.pack(
        _GET_LOG_PAGE,
        *(0, 0, _ALL_NAMESPACES, 0, 0, 0),
        page.buffer_info()[0],
        *(0, _LOG_BYTES, _SMART_PAGE | dwords << 16, 0, 0, 0, 0, 0),
        _TIMEOUT_MS,
        0,
    )
    fd = os.open(controller, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = fcntl.ioctl(fd, _ADMIN_IOCTL, bytearray(command))
    finally:
        os.close(fd)
    if status != 0:
        raise OSError(status, f"the drive answered {status:#x}")
    return page.tobytes()


def device_of(
    path: Path, *, sysfs: Path = SYSFS, dev: Path = DEV, ask: Ask = read_smart_log
) -> DiskDevice:
    """Find the device under a file or folder and read what can be read; never fails.

    Parameters
    ----------
    path : Path
        A folder that need not be there yet, or a file.
    sysfs, dev : Path
        Where the kernel shows devices.
    ask : callable
        Returns the SMART log of an NVMe controller.
    """
    try:
        number = _number_of(path)
        whole = _whole_disk(sysfs, number)
    except OSError as error:
        return DiskDevice(problem=f"{path}: {error.strerror or error}")
    if whole is None:
        return DiskDevice(
            problem=f"the file system of {path} has no device in sysfs "
            "(tmpfs, btrfs, overlay, network)"
        )
    drives = _drives(whole)
    first = drives[0]
    found = DiskDevice(
        name=whole.name,
        model=_text(first / "device" / "model"),
        rotational={"0": False, "1": True}.get(_text(whole / "queue" / "rotational") or ""),
        written_bytes=_written(whole),
    )
    return _with_wear(found, drives, dev, ask)


def _number_of(path: Path) -> int:
    """Device number of the file system, of the nearest folder that is there."""
    for folder in (path, *path.absolute().parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.stat(folder).st_dev
    return os.stat("/").st_dev


def _whole_disk(sysfs: Path, number: int) -> Path | None:
    """The device in sysfs; the whole one of a partition."""
    link = sysfs / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    if not link.exists():
        return None
    device = link.resolve()
    return device.parent if (device / "partition").exists() else device


def _drives(whole: Path) -> list[Path]:
    """The drives that a device is made of; itself if it is one."""
    found: list[Path] = []
    waiting = [whole]
    seen: set[Path] = set()
    while waiting and len(seen) < DRIVES_MAX:
        device = waiting.pop(0)
        if device in seen:
            continue
        seen.add(device)
        parts = sorted((device / "slaves").glob("*"))
        if not parts:
            found.append(device)
        for part in (part.resolve() for part in parts):
            waiting.append(part.parent if (part / "partition").exists() else part)
    return found or [whole]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _written(whole: Path) -> int | None:
    fields = (_text(whole / "stat") or "").split()
    return int(fields[6]) * SECTOR_BYTES if len(fields) > 6 and fields[6].isdigit() else None


def _with_wear(found: DiskDevice, drives: list[Path], dev: Path, ask: Ask) -> DiskDevice:
    """Add what the drives say of themselves; all of them, or the reason why not."""
    logs = []
    for drive in drives:
        controller = (drive / "device").resolve().name
        if not drive.name.startswith("nvme") or not controller.startswith("nvme"):
            why = f"{drive.name} is no NVMe drive; the wear of others is not read"
            return DiskDevice(**found.row() | {"problem": why})
        try:
            logs.append(parse_smart_log(ask(dev / controller)))
        except PermissionError:
            why = (
                f"the wear of {controller} needs CAP_SYS_ADMIN and read access to /dev/{controller}"
            )
            return DiskDevice(**found.row() | {"problem": why})
        except (OSError, ValueError) as error:
            why = f"the wear of {controller} cannot be read: {error}"
            return DiskDevice(**found.row() | {"problem": why})
    worn = {
        "wear": max(log.wear for log in logs),
        "spare": min(log.spare for log in logs),
        "lifetime_written_bytes": sum(log.written_bytes for log in logs),
        "media_errors": sum(log.media_errors for log in logs),
    }
    return DiskDevice(**found.row() | worn)
