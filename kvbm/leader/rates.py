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

PERIOD_SECS = 1.0
"""Reads that never pause are measured over as long as this."""

SAMPLES_MIN = 3
SAMPLED_BYTES_MIN = 256 << 20
"""Samples, or bytes in them, without which a disk is not called slow."""

BURST_SECS = 3600.0
"""A write budget can be spent in bursts of what accrues in this time."""

DAY_SECS = 86400.0

FAILURES_IN_A_ROW = 4
"""Failures, without a success between them, after which the disk is left alone for a while."""

PAUSE_SECS = 10.0
PAUSE_MAX_SECS = 600.0


def mean_rate(mean: float, sample: float) -> float:
    """Smooth a rate, but for samples above it.

    Waiting makes steps and reads look long, nothing makes them look short.
    """
    return max(sample, (1 - SMOOTHING) * mean + SMOOTHING * sample)


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
            # A rate that is too high refuses a load that would pay, one too low starts a load that
            # does not.
            sample = self._tokens / (now - self._began)
            self.tokens_per_sec = mean_rate(self.tokens_per_sec, sample)
        self._tokens, self._began = tokens, now


class ReadRate:
    """Bytes a second that come from disk while reads are under way.

    Reads overlap, and their ends are seen when the engine looks, perhaps a long step later. So what
    is measured is all bytes over the time from the first read's begin until none is under way, or
    over `PERIOD_SECS` where that does not happen.

    Parameters
    ----------
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        self._bytes = 0
        self._samples = 0
        self._sampled_bytes = 0
        self.bytes_per_sec = 0.0

    def begin(self) -> None:
        """Reads have been submitted."""
        if self._began is None:
            self._began, self._bytes = self._clock(), 0

    def arrived(self, count: int) -> None:
        """So many bytes have arrived."""
        self._bytes += count

    def look(self, under_way: bool) -> None:
        """Take a sample if it is time for one; whether reads are under way still."""
        if self._began is None:
            return
        now = self._clock()
        if under_way and now < self._began + PERIOD_SECS:
            return
        if self._bytes and now > self._began:
            sample = self._bytes / (now - self._began)
            self.bytes_per_sec = mean_rate(self.bytes_per_sec, sample)
            self._samples += 1
            self._sampled_bytes += self._bytes
        self._began, self._bytes = now if under_way else None, 0

    def is_worth(self, count: int, tokens: int, tokens_per_sec: float) -> bool:
        """Return whether reading `count` bytes is faster than computing `tokens`.

        What has not been measured yet is tried, and a few small reads are no measurement: they took
        as long as the engine's steps beside them.
        """
        measured = self._samples >= SAMPLES_MIN or self._sampled_bytes >= SAMPLED_BYTES_MIN
        if not measured or tokens_per_sec == 0:
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
