# SPDX-License-Identifier: Apache-2.0
"""From which size of a piece on copies go straight: measured once a device, then remembered.

The constants of `kvbm.transfer.method` are those of one device and bus. Elsewhere the driver may be
slower, the bus faster, or a kernel dearer. So, before the first operation on a device, both
directions are run at once, by one thread, as in service: pieces of several sizes straight, through
the staging buffer, and as 2D copies. It takes a few tenths of a second, 96 MiB of the device and 64
of the host, all given back, and happens in the thread that opens the arena, while the engine
starts.

What comes out is kept in a small file for each device, driver and version of the measurement, in
``$XDG_CACHE_HOME/kvbm``. Several engines that start at once may all measure; the last one's file
stays, and each file is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbm._fast.copy import HostCopier
from kvbm._fast.cuda_backend import CudaBackend
from kvbm._fast.cuda_device import CudaDevice, CudaFault
from kvbm._fast.cuda_trial import copy_both
from kvbm.transfer.arena_layout import ArenaLayout
from kvbm.transfer.method import (
    SEGMENTS,
    STAGED_CHUNKS_AHEAD,
    STAGED_STREAMS,
    CopyMethod,
    Crossover,
)

if TYPE_CHECKING:
    from kvbm.transfer.geometry import KvGeometry

__all__ = ["Trial", "crossover", "crossover_from", "matters", "measure", "result_file"]

logger = logging.getLogger(__name__)

MEASUREMENT = 1
"""Version of what is measured and how; a file of another one is not used."""

GOOD = 0.97
"""Share of the other way's speed at which pieces go straight: that needs no kernel and no buffer
and disturbs the engine less."""

ALWAYS = 1 << 62
REGIONS = 8

Times = Mapping[str, Mapping[int, int]]
"""Way of copying -> bytes of a piece -> least nanoseconds."""


@dataclass(frozen=True)
class Trial:
    """What is measured.

    Attributes
    ----------
    sizes
        Bytes of a piece, ascending, each twice the one before.
    direction_bytes
        What is stored, and loaded at the same time.
    chunk_bytes
        Of each chunk; at least one block of `REGIONS` pieces.
    rounds
        The least time of so many is taken: whatever else happens makes it longer.
    """

    sizes: Sequence[int] = tuple(kib << 10 for kib in (8, 16, 32, 64, 128, 256))
    direction_bytes: int = 32 << 20
    chunk_bytes: int = 4 << 20
    rounds: int = 4

    def __post_init__(self) -> None:
        if any(b != 2 * a for a, b in pairwise(self.sizes)):
            raise ValueError(f"sizes={self.sizes} is not allowed: each is twice the one before")


def _ways(trial: Trial, size: int, blocks: int) -> dict[str, CopyMethod]:
    straight = CopyMethod(
        pitch_bytes=0,
        pitched_below_bytes=0,
        segments=SEGMENTS,
        chunk_bytes=trial.chunk_bytes,
        chunks_ahead=STAGED_CHUNKS_AHEAD,
        streams=STAGED_STREAMS,
    )
    return {
        "straight": straight,
        "staged": straight._replace(
            staged_loads_below_bytes=ALWAYS, staged_stores_below_bytes=ALWAYS
        ),
        "pitched": straight._replace(pitch_bytes=blocks * size, pitched_below_bytes=ALWAYS),
    }


def measure(device: CudaDevice, trial: Trial) -> dict[str, dict[int, int]]:
    """Nanoseconds of both directions at once, by way of copying and size of a piece.

    Parameters
    ----------
    device
        Opened for this alone: its memory is registered with it, and it is closed afterwards.
    trial
        What is measured.

    Raises
    ------
    CudaFault
        There is no room, or a copy fails.
    """
    layouts = {}
    for size in trial.sizes:
        rows = trial.direction_bytes // (REGIONS * size)
        layouts[size] = ArenaLayout(2 * rows, (size,) * REGIONS)
    # Unmapped with the last reference: a traceback may still have one when this returns.
    memory = mmap.mmap(-1, max(layout.total_bytes for layout in layouts.values()))
    base = 0
    try:
        base = device.allocate(2 * trial.direction_bytes)
        device.register(memory, 0, len(memory))
        return _measure_at(device, trial, layouts, memory, base)
    finally:
        if base:
            device.free(base)
        device.close()


def _measure_at(
    device: CudaDevice,
    trial: Trial,
    layouts: Mapping[int, ArenaLayout],
    memory: mmap.mmap,
    base: int,
) -> dict[str, dict[int, int]]:
    copiers, methods, groups = [], [], []
    for size, layout in layouts.items():
        blocks = layout.slots
        regions = [(base + r * blocks * size, size, size) for r in range(REGIONS)]
        for way, method in _ways(trial, size, blocks).items():
            groups.append((way, size))
            methods.append(method)
            copiers.append(
                HostCopier(
                    regions, layout, memory, device_blocks=blocks, group=len(groups) - 1, rank=0
                )
            )
    backend = CudaBackend(device, copiers, methods)
    times: dict[str, dict[int, int]] = {}
    try:
        for group, (way, size) in enumerate(groups):
            if way == "staged" and backend.staging_bytes == 0:
                continue
            rows = layouts[size].slots // 2
            # Every second block, so that none are neighbours.
            stores = [(2 * i, i) for i in range(rows)]
            loads = [(2 * i + 1, rows + i) for i in range(rows)]
            copy_both(backend, group, loads, [])
            least = min(copy_both(backend, group, stores, loads) for _ in range(trial.rounds))
            times.setdefault(way, {})[size] = least
    finally:
        backend.close()
    return times


def _straight_from(times: Times, other: str, default: int) -> int:
    """Size from which on, and for all greater ones, straight is as good as another way."""
    straight, others = times.get("straight", {}), times.get(other, {})
    sizes = sorted(straight.keys() & others.keys(), reverse=True)
    if not sizes:
        return default
    found = 2 * sizes[0]
    for size in sizes:
        if others[size] < GOOD * straight[size]:
            break
        found = size
    return found


def crossover_from(times: Times) -> Crossover:
    """Choose the sizes below which pieces go another way than straight.

    Beyond what was measured nothing is assumed: the greatest answer is twice the greatest size, and
    the least one is the least size.
    """
    default = Crossover()
    return Crossover(
        _straight_from(times, "staged", default.staged_below_bytes),
        _straight_from(times, "pitched", default.pitched_below_bytes),
    )


def matters(geometries: Sequence[KvGeometry]) -> bool:
    """Whether any pieces of a KV cache are so short that there is a choice."""
    return any(g.regions[0].chunk_bytes < 2 * Trial().sizes[-1] for g in geometries)


# ---- the file ------------------------------------------------------------------------------------
def _key(device: CudaDevice) -> dict[str, Any]:
    return {
        "measurement": MEASUREMENT,
        "device": device.name,
        "uuid": device.uuid,
        "driver": list(device.driver_version),
    }


def result_file(device: CudaDevice) -> Path:
    """Where the result of a device is kept."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # the specification says to ignore others
        folder = os.path.expanduser("~/.cache")
    name = hashlib.blake2b(json.dumps(_key(device)).encode(), digest_size=8).hexdigest()
    return Path(folder, "kvbm", f"copies-{name}.json")


def _read(path: Path, key: Mapping[str, Any], trial: Trial) -> Crossover | None:
    """Read what was kept; None, with one line in the log, if it cannot be used."""
    try:
        kept = json.loads(path.read_text())
        values = [kept["staged_below_bytes"], kept["pitched_below_bytes"]]
        allowed = (*trial.sizes, 2 * trial.sizes[-1])
        if kept["key"] != key or any(type(v) is not int or v not in allowed for v in values):
            raise ValueError("it is not this device's")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not used, copies are measured again: %s", path, error)
        return None
    return Crossover(*values)


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file in one step."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            temporary = file.name
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s cannot be written, the next start measures again: %s", path, error)
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def crossover(device: CudaDevice, trial: Trial | None = None) -> Crossover:
    """Return what is known of a device; measure it if nothing is. Raises nothing.

    Parameters
    ----------
    device
        No copy may be under way on its behalf.
    trial
        What is measured.
    """
    trial = trial or Trial()
    key, path = _key(device), result_file(device)
    found = _read(path, key, trial)
    if found is not None:
        return found
    try:
        times = measure(CudaDevice(device.index, library=device.library), trial)
    except (CudaFault, OSError, MemoryError) as error:
        logger.warning("copies could not be measured, those of an H100 are assumed: %s", str(error))
        return Crossover()
    found = crossover_from(times)
    gbytes = {
        way: {size: round(2 * trial.direction_bytes / ns, 1) for size, ns in some.items()}
        for way, some in times.items()
    }
    logger.info(
        "%s: pieces go straight from %d bytes on instead of staged, from %d on instead of as 2D "
        "copies; both directions at once, GB/s by bytes of a piece: %s",
        device.name,
        *found,
        gbytes,
    )
    _keep(path, {"key": key, **found._asdict(), "gbytes_per_second": gbytes})
    return found
