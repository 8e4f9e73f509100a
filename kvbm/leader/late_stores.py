# SPDX-License-Identifier: Apache-2.0
"""Finished requests whose blocks could not be stored at once: no operation was free.

A store takes an operation of its own for each request, however few blocks it has: requests are
preempted, aborted and collected one by one, and a cancel stops an operation as a whole, so one that
carried rows of several requests would make them share their failures. An engine has 128 operations.
When more requests complete blocks in one step, those that go on try again in the next; those that
ended with this step have no next one, so they keep their device blocks and wait here. It is short:
what completes in a step is bounded by the tokens of a step, so these operations are nearly empty
and end within milliseconds. A larger table would only move the bound, for 0.5 MB of shared memory a
leader and 128 operations.
"""

import logging
import time
from collections.abc import Callable

from kvbm._fast.operation_table import OperationTable
from kvbm.leader.sequences import TrackedSequence

logger = logging.getLogger(__name__)

LATE_SECS = 0.5
"""Longest wait for an operation: a tier that is behind for longer must not hold up the engine."""


class LateStores:
    """Finished requests that wait for an operation, oldest first.

    Parameters
    ----------
    table : OperationTable
        The leader's.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(self, table: OperationTable, clock: Callable[[], float] = time.monotonic) -> None:
        self._table = table
        self._clock = clock
        self._waiting: dict[TrackedSequence, tuple[int, float]] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def waits(self, sequence: TrackedSequence, upto: int) -> bool:
        """Return whether a finished request has to wait; it does from the first such answer on."""
        deadline = self._waiting.pop(sequence, (upto, self._clock() + LATE_SECS))[1]
        if sequence.stale or self._clock() >= deadline or self._is_stored(sequence, upto):
            return False
        if self._table.free_operations() > 0:
            return False  # it was not for want of an operation: no slot, or a recovery
        self._waiting[sequence] = upto, deadline
        return True

    @staticmethod
    def _is_stored(sequence: TrackedSequence, upto: int) -> bool:
        return all(
            group.stored >= min(upto, len(group.keys), len(group.device_blocks))
            for group in sequence.groups
        )

    def retry(self, store: Callable[[TrackedSequence, int], None]) -> list[TrackedSequence]:
        """Store what waits, as far as operations go.

        Parameters
        ----------
        store : callable
            Called with a sequence and the end of its complete blocks.

        Returns
        -------
        list of TrackedSequence
            Requests that wait no longer, because all is stored or nothing more will be.
        """
        done = []
        for sequence, (upto, _) in list(self._waiting.items()):
            try:
                store(sequence, upto)
            except Exception:  # its device blocks must be given back all the same
                logger.exception("request %s: its late store failed", sequence.request_id)
                self._table.count("errors", 1)
                sequence.stale = True
            if not self.waits(sequence, upto):
                done.append(sequence)
        return done

    def give_up(self) -> None:
        """Nothing of them is to be stored any more; they are let go at the next look."""
        for sequence in self._waiting:
            sequence.stale = True

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()
