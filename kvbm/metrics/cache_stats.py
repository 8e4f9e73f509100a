# SPDX-License-Identifier: Apache-2.0
"""Hit rates over the last requests, and the log line about them: upstream's, in both."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)


class CacheStats:
    """Sliding window over the requests that looked something up.

    Parameters
    ----------
    engine : str
        Shown in the log line.
    max_requests : int
        Requests in the window.
    log_interval_secs : int
        Least time between two log lines.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        engine: str,
        max_requests: int,
        log_interval_secs: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._window: deque[tuple[int, int, int]] = deque(maxlen=max_requests)
        self._sums = (0, 0, 0)
        self._interval = log_interval_secs
        self._clock = clock
        self._logged = clock()

    def record(self, host_blocks: int, disk_blocks: int, queried: int) -> None:
        """Note a request: the blocks that it loaded from each tier, of so many looked up."""
        if queried <= 0:
            return
        host, disk, asked = self._sums
        if len(self._window) == self._window.maxlen:
            old = self._window[0]
            host, disk, asked = host - old[0], disk - old[1], asked - old[2]
        self._window.append((host_blocks, disk_blocks, queried))
        self._sums = (host + host_blocks, disk + disk_blocks, asked + queried)
        self._log()

    def rates(self) -> tuple[float, float]:
        """Hit rates of host and disk, 0 to 1; 0 when nothing was looked up."""
        host, disk, asked = self._sums  # one object: whole also for another thread
        return (host / asked, disk / asked) if asked else (0.0, 0.0)

    def _log(self) -> None:
        now = self._clock()
        if now - self._logged < self._interval:
            return
        self._logged = now
        host, disk, asked = self._sums
        logger.info(
            "KVBM [worker-%s] Cache Hit Rates - Host: %.1f%% (%d/%d), Disk: %.1f%% (%d/%d)",
            self._engine,
            100 * host / asked,
            host,
            asked,
            100 * disk / asked,
            disk,
            asked,
        )
