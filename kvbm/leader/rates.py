# SPDX-License-Identifier: Apache-2.0
"""What a slower tier is worth, as measured: rates, a budget of writes, and whether it works."""

import logging
import time
from collections.abc import Callable

from kvbm.leader.failure_pause import FailurePause

logger = logging.getLogger(__name__)

STEP_TOKENS_MIN = 256
"""Tokens of a step that says something about the rate of prefill; smaller ones are decodes."""

SMOOTHING = 0.2
"""Share of a new sample in a mean."""

BURST_SECS = 3600.0
"""A write budget can be spent in bursts of what accrues in this time."""

DAY_SECS = 86400.0

FAILURES_IN_A_ROW = 4
"""Failures, without a success between them, after which the disk is left alone for a while."""

PAUSE_SECS = 10.0
PAUSE_MAX_SECS = 600.0


class PrefillRate:
    """Tokens a second that the engine computes, from its steps.

    Parameters
    ----------
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = 0
        self._began = 0.0
        self.tokens_per_sec = 0.0

    def step(self, tokens: int) -> None:
        """A step of so many tokens begins; the one before it has ended."""
        now = self._clock()
        if self._tokens >= STEP_TOKENS_MIN and now > self._began:
            sample = self._tokens / (now - self._began)
            # An idle engine makes a step look long, nothing makes it look short: a rate that is
            # too high refuses a load that would pay, one too low starts a load that does not.
            kept = (1 - SMOOTHING) * self.tokens_per_sec + SMOOTHING * sample
            self.tokens_per_sec = max(sample, kept)
        self._tokens, self._began = tokens, now


class ReadRate:
    """Bytes a second that come from disk, and how long the first of them takes."""

    def __init__(self) -> None:
        self.bytes_per_sec = 0.0

    def read(self, count: int, secs: float) -> None:
        """So many bytes have arrived in this time."""
        if count <= 0 or secs <= 0:
            return
        sample = count / secs
        if self.bytes_per_sec == 0:
            self.bytes_per_sec = sample
        self.bytes_per_sec += SMOOTHING * (sample - self.bytes_per_sec)

    def is_worth(self, count: int, tokens: int, tokens_per_sec: float) -> bool:
        """Return whether reading `count` bytes is faster than computing `tokens`.

        What has not been measured yet is tried.
        """
        if self.bytes_per_sec == 0 or tokens_per_sec == 0:
            return True
        return count / self.bytes_per_sec <= tokens / tokens_per_sec

    def try_again(self) -> None:
        """Forget a little of a slow past, so that a disk that has recovered is tried at some time.

        Called for each read that was not worth it.
        """
        self.bytes_per_sec *= 1.02


class WriteBudget:
    """Bytes that may still be written; grows steadily up to what accrues in an hour.

    Parameters
    ----------
    gb_per_day : float or None
        In GB of 1e9 bytes; None for no limit.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self, gb_per_day: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._per_sec = None if gb_per_day is None else gb_per_day * 1e9 / DAY_SECS
        self._burst = 0.0 if gb_per_day is None else gb_per_day * 1e9 * BURST_SECS / DAY_SECS
        self._left = self._burst
        self._at = clock()

    def blocks(self, bytes_per_block: int, wanted: int) -> int:
        """How many blocks may be written now, at most `wanted`."""
        if self._per_sec is None:
            return wanted
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_sec)
        self._at = now
        return min(wanted, int(self._left // bytes_per_block))

    def spend(self, count: int) -> None:
        """So many bytes are going to be written."""
        self._left -= count


class DiskHealth:
    """Whether a disk is used: not for a while after failures, and never again once it hangs.

    Parameters
    ----------
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause = FailurePause(FAILURES_IN_A_ROW, PAUSE_SECS, PAUSE_MAX_SECS, clock)
        self.is_off = False

    def allows(self) -> bool:
        """Return whether the disk may be used now."""
        return not self.is_off and self._pause.is_over()

    def succeeded(self) -> None:
        """Something was read or written."""
        if self._pause.succeeded():
            logger.warning("the disk tier works again")

    def failed(self) -> None:
        """Something could not be read or written."""
        pause = self._pause.failed()
        if pause is not None:
            logger.error(
                "%d operations of the disk tier in a row failed: it is left alone for %.0f s",
                self._pause.in_a_row,
                pause,
            )

    def hangs(self, what: str, secs: float) -> None:
        """Something has not ended in time."""
        if not self.is_off:
            logger.error(
                "the disk tier is off: %s has not ended after %.0f s; requests are computed",
                what,
                secs,
            )
        self.is_off = True
