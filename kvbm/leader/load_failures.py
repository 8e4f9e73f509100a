# SPDX-License-Identifier: Apache-2.0
"""What a leader learns from loads that failed: which blocks to avoid, and when to stop loading.

A block whose bytes are refused (a checksum, a damaged slot header) stays registered until it is
evicted, and would fail every request that shares it. So it is left out of matches for a while,
which ends the match before it; what follows it is recomputed.

Loads that fail one after the other, whatever the block, mean that the tier itself does not work: a
copy thread that died, an arena that cannot be read. Then nothing is loaded for a time that doubles
with each further failure, and one load is tried after it.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence

from kvbm._fast.keys import Keys
from kvbm.leader.failure_pause import FailurePause
from kvbm.leader.sequences import GroupBlocks

logger = logging.getLogger(__name__)

AVOID_SECS = 60.0
"""How long a block that could not be loaded is left out of matches."""

AVOID_MAX = 256
"""Blocks that are avoided at a time; the one that has been longest gives way."""

FAILURES_IN_A_ROW = 4
"""Failed loads, without one that arrived between them, after which loading pauses."""

PAUSE_SECS = 5.0
PAUSE_MAX_SECS = 300.0


class LoadFailures:
    """Failed loads of one leader.

    Parameters
    ----------
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._avoided: dict[tuple[int, int, bytes], float] = {}  # group, position, digest: until
        self._pause = FailurePause(FAILURES_IN_A_ROW, PAUSE_SECS, PAUSE_MAX_SECS, clock)

    def loads_allowed(self) -> bool:
        """Return whether loads may be submitted now."""
        return self._pause.is_over()

    def limit(self, group: int, keys: Keys, start: int, stop: int) -> int:
        """Return the end of the part of blocks `start` to `stop` that may be matched."""
        if not self._avoided:
            return stop
        now = self._clock()
        for (avoided_group, position, digest), until in list(self._avoided.items()):
            if until <= now:
                del self._avoided[avoided_group, position, digest]
            elif avoided_group == group and start <= position < min(stop, len(keys)):
                if keys.identity(position)[0] == digest:
                    stop = position
        return stop

    def avoid(self, group: int, keys: Keys, position: int) -> None:
        """Leave a block out of matches for a while."""
        if len(self._avoided) >= AVOID_MAX:
            del self._avoided[next(iter(self._avoided))]
        self._avoided[group, position, keys.identity(position)[0]] = self._clock() + AVOID_SECS

    def avoid_first(
        self, groups: Sequence[GroupBlocks], first: int, end: int, not_loaded: Collection[int]
    ) -> None:
        """In each group, avoid the first of blocks `first` to `end` whose device block is named."""
        for number, group in enumerate(groups):
            for position in range(first, min(end, len(group.device_blocks), len(group.keys))):
                if group.device_blocks[position] in not_loaded:
                    self.avoid(number, group.keys, position)
                    break

    def succeeded(self) -> None:
        """A load has arrived."""
        if self._pause.succeeded():
            logger.warning("loads from the cache work again")

    def failed(self) -> None:
        """A load has not arrived."""
        pause = self._pause.failed()
        if pause is not None:
            logger.error(
                "%d loads in a row failed: nothing is loaded from the cache for %.0f s",
                self._pause.in_a_row,
                pause,
            )

    def forget(self) -> None:
        """The cache was reset: none of its blocks can be matched any more."""
        self._avoided.clear()
