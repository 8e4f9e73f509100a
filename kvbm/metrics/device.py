# SPDX-License-Identifier: Apache-2.0
"""The device under the disk tier, read rarely: a scrape does not ask a drive each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily

from kvbm.inspect.slab import slab_folder
from kvbm.tiers.disk_device import DiskDevice, device_of

__all__ = ["DeviceReader"]

AGAIN_SECS = 60.0
_SHOWN = {
    "kvbm_disk_device_written_bytes": "written_bytes",
    "kvbm_disk_device_lifetime_written_bytes": "lifetime_written_bytes",
    "kvbm_disk_device_wear_ratio": "wear",
    "kvbm_disk_device_spare_ratio": "spare",
}


class DeviceReader:
    """Shows what can be read of a device; what cannot has no sample.

    Parameters
    ----------
    folder : Path, optional
        Folder of the disk tier; by default that of `DYN_KVBM_DISK_CACHE_DIR`.
    look : callable
        Reads the device of a folder.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self,
        folder: Path | None = None,
        look: Callable[[Path], DiskDevice] = device_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._look = look
        self._clock = clock
        self._found: DiskDevice | None = None
        self._again_at = 0.0

    def fill(self, gauges: dict[str, GaugeMetricFamily], instance: str) -> None:
        """Add the device as that of an instance."""
        now = self._clock()
        if self._found is None or now >= self._again_at:
            self._found = self._look(self._folder or slab_folder())
            self._again_at = now + AGAIN_SECS
        for metric, attribute in _SHOWN.items():
            value = getattr(self._found, attribute)
            if value is not None:
                gauges[metric].add_metric([instance, self._found.name or ""], value)
