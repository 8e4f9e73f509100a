# SPDX-License-Identifier: Apache-2.0
"""When to leave something alone that keeps failing, and for how long."""

from collections.abc import Callable


class FailurePause:
    """A pause after failures in a row that doubles with each further one.

    After it one attempt is allowed; a success ends the row.

    Parameters
    ----------
    failures : int
        In a row, before the first pause.
    first_secs, most_secs : float
        Length of the first pause and of the longest.
    clock : callable
        Monotonic time in seconds.

    Attributes
    ----------
    in_a_row : int
        Failures since the last success.
    """

    def __init__(
        self, failures: int, first_secs: float, most_secs: float, clock: Callable[[], float]
    ) -> None:
        self.in_a_row = 0
        self._failures = failures
        self._first_secs = first_secs
        self._most_secs = most_secs
        self._clock = clock
        self._until = 0.0

    def is_over(self) -> bool:
        """Return whether an attempt may be made now."""
        return self.in_a_row < self._failures or self._clock() >= self._until

    def succeeded(self) -> bool:
        """Note a success; True if it ends a row that had brought a pause."""
        recovered = self.in_a_row >= self._failures
        self.in_a_row = 0
        return recovered

    def failed(self) -> float | None:
        """Note a failure; the seconds of the pause that it brings, if any."""
        self.in_a_row += 1
        more = self.in_a_row - self._failures
        if more < 0:
            return None
        pause = min(self._most_secs, self._first_secs * 2.0 ** min(more, 16))
        self._until = self._clock() + pause
        return pause
