# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses a copy backend, by the kind of device that the KV cache is on.

A rank's arena is reserved piece by piece while the engine serves. `RankCopies.grow` makes the next
piece usable: on a CUDA device it is registered first, in pieces of whole groups of slots, since no
copy may cross from one registered piece into the next and none crosses a group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbm._fast.backend import CopyBackend
from kvbm._fast.copy import HostCopier
from kvbm._fast.cuda_backend import CudaBackend
from kvbm._fast.cuda_device import DRIVER_LIBRARY, CudaDevice, CudaFault
from kvbm._fast.host_backend import HostBackend
from kvbm.errors import ConfigError, TransferError
from kvbm.transfer import calibration
from kvbm.transfer.method import Crossover, copy_method
from kvbm.transfer.numa import cpus_near

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvbm.transfer.arena_layout import ArenaLayout
    from kvbm.transfer.geometry import KvGeometry

__all__ = ["DEVICE_KINDS", "Device", "RankCopies", "register_pieces"]

logger = logging.getLogger(__name__)

DEVICE_KINDS = ("cpu", "cuda")

REGISTER_BYTES = 64 << 20
"""Host memory registered in one call, in bytes: about 4 ms, in which the driver is busy."""


def no_stream() -> int:
    """Stream of a device that has none."""
    return 0


@dataclass(frozen=True)
class Device:
    """Where an engine's KV cache is.

    Attributes
    ----------
    kind
        One of `DEVICE_KINDS`.
    index
        Ordinal of the device, as the engine's process counts them.
    stream
        Handle of the stream on which the engine's thread works when it asks.
    library
        The driver's library.

    Raises
    ------
    ConfigError
        No backend serves this kind.
    """

    kind: str = "cpu"
    index: int = 0
    stream: Callable[[], int] = no_stream
    library: str = DRIVER_LIBRARY

    def __post_init__(self) -> None:
        if self.kind not in DEVICE_KINDS:
            raise ConfigError(
                f"KV caches on device {self.kind!r} are not supported: allowed is "
                + " or ".join(DEVICE_KINDS)
            )


def register_pieces(
    layout: ArenaLayout, done: int, reserved: int, piece_bytes: int = REGISTER_BYTES
) -> list[tuple[int, int]]:
    """Return (offset, bytes) of the pieces to register next.

    Parameters
    ----------
    layout
        Of the arena.
    done
        End of what is registered, 0 at first.
    reserved
        Bytes of the arena, from its begin, whose memory is reserved.
    piece_bytes
        Wanted size of a piece; it has at least one group of slots.

    Returns
    -------
    list of (int, int)
        Whole groups, in order. Slot headers are not registered: no device reads them.
    """
    usable = layout.usable_slots(reserved)
    end = layout.data_offset + usable // layout.group_slots * layout.group_bytes
    if usable == layout.slots:
        end = layout.total_bytes
    step = max(1, piece_bytes // layout.group_bytes) * layout.group_bytes
    at = max(done, layout.data_offset)
    pieces = []
    while at < end:
        size = min(step, end - at)
        pieces.append((at, size))
        at += size
    return pieces


class RankCopies:
    """The backend of one rank, and its arena as far as copies may use it.

    Parameters
    ----------
    device
        Where the KV cache is.
    geometries
        Of the KV-cache groups, in order.
    layout, memory
        Of the arena, and its mapping.
    rank
        Rank of the worker.
    checksum
        Write and verify checksums of slots.
    staged
        Short pieces may go through a buffer on the device.
    calibrated
        Measure the device, once, to choose between ways of copying.
    keep_alive
        Owner of the KV cache's memory.

    Raises
    ------
    TransferError
        The device cannot be used.
    """

    def __init__(
        self,
        device: Device,
        geometries: Sequence[KvGeometry],
        layout: ArenaLayout,
        memory: Buffer,
        *,
        rank: int,
        checksum: bool = False,
        staged: bool = True,
        calibrated: bool = False,
        keep_alive: object = None,
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._registered_end = 0
        self._usable = 0
        self._cuda: CudaDevice | None = None
        self.copiers = [
            HostCopier(
                geometry.address_table,
                layout,
                memory,
                device_blocks=geometry.num_blocks,
                rank=rank,
                group=number,
                keep_alive=keep_alive,
            )
            for number, geometry in enumerate(geometries)
        ]
        self.backend: CopyBackend
        if device.kind == "cpu":
            self.backend = HostBackend(self.copiers, checksum=checksum)
        else:
            self.backend = self._open_cuda(device, geometries, checksum, staged, calibrated)
        self.backend.set_usable_slots(0)

    def _open_cuda(
        self,
        device: Device,
        geometries: Sequence[KvGeometry],
        checksum: bool,
        staged: bool,
        calibrated: bool,
    ) -> CopyBackend:
        try:
            cuda = CudaDevice(device.index, library=device.library)
            limits: Crossover | None = None
            if calibrated and cuda.has_batches and calibration.matters(geometries):
                limits = calibration.crossover(cuda)
            methods = [
                copy_method(
                    g,
                    cuda.allocation_of,
                    has_batches=cuda.has_batches,
                    staged=staged,
                    crossover=limits,
                )
                for g in geometries
            ]
            backend = CudaBackend(cuda, self.copiers, methods, checksum=checksum)
        except CudaFault as fault:
            raise TransferError(f"CUDA device {device.index} cannot be used: {fault}") from fault
        self._cuda = cuda
        logger.info(
            "%s, driver for CUDA %d.%d: %s, %d bytes of staging buffers",
            cuda.name,
            *cuda.driver_version,
            ", ".join(
                f"2D copies at a pitch of {m.pitch_bytes} bytes" if m.pitch_bytes else "batches"
                for m in methods
            ),
            backend.staging_bytes,
        )
        return backend

    @property
    def cpus_near(self) -> frozenset[int]:
        """Processors near the device; none if it does not matter which."""
        return cpus_near(self._cuda.bus_id) if self._cuda is not None else frozenset()

    def grow(self, reserved: int) -> int:
        """Make what is reserved of the arena usable; returns the number of usable slots.

        Stays where it is if the device refuses to register more: the tier is smaller then.
        """
        usable = self._layout.usable_slots(reserved)
        if self._cuda is not None:
            try:
                for offset, count in register_pieces(self._layout, self._registered_end, reserved):
                    self._cuda.register(self._memory, offset, count)
                    self._registered_end = offset + count
            except CudaFault as fault:
                logger.error(
                    "the host tier stays at %d of %d blocks: %s",
                    self._usable,
                    self._layout.slots,
                    str(fault),  # whoever keeps the record keeps no frame of this
                )
                return self._usable
        self._usable = usable
        self.backend.set_usable_slots(usable)
        return usable

    def close(self) -> None:
        """Give everything back; no copy may be under way. May be called twice."""
        self.backend.close()
        if self._cuda is not None:
            self._cuda.close()
            self._cuda = None
