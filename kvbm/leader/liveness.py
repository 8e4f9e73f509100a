# SPDX-License-Identifier: Apache-2.0
"""Whether a leader's workers can copy, and the recovery of what dead participants held."""

import logging
import time

from kvbm._fast.operation_table import OperationTable
from kvbm._fast.participants import Participant, participants, workers_attached
from kvbm._fast.recovery import recover
from kvbm._fast.segment import Segment

logger = logging.getLogger(__name__)

LIVENESS_SECS = 1.0
"""How often a leader looks for dead participants."""

LIVENESS_MAX_SECS = 60.0
"""How often, at least, while a dead participant cannot be cleaned up yet."""


class Recoverer:
    """Looks for dead participants of a segment now and then, and returns what they held.

    Parameters
    ----------
    segment : Segment
        In which this process is a leader.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._look_at = time.monotonic() + LIVENESS_SECS
        self._look_every = LIVENESS_SECS

    def look(self) -> list[Participant] | None:
        """Return who was there, alive or dead, before dead ones were cleared; None: not due yet."""
        now = time.monotonic()
        if now < self._look_at:
            return None
        lines = participants(self._segment)
        fine = all(line.alive for line in lines) and not self._segment.recovering
        if fine or recover(self._segment):
            self._look_every = LIVENESS_SECS
        else:  # a dead engine whose workers live: nothing to do until they end
            self._look_every = min(LIVENESS_MAX_SECS, 2 * self._look_every)
        self._look_at = now + self._look_every
        return lines


class Liveness:
    """One leader's view of who is alive.

    Parameters
    ----------
    table : OperationTable
        The leader's handle on the segment.

    Attributes
    ----------
    workers_lost : bool
        A worker of this engine died; the cache is off.
    """

    def __init__(self, table: OperationTable) -> None:
        self.table = table
        self.workers_lost = False
        self._attached = False
        self._recoverer = Recoverer(table.segment)

    def wait_for_workers(self, timeout_secs: float) -> bool:
        """Wait until all ranks can copy, for content that is there already; for the start alone."""
        deadline = time.monotonic() + timeout_secs
        while not self.workers_ready() and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.workers_ready()

    def workers_ready(self) -> bool:
        """Return whether all ranks can copy: none before their arenas are open."""
        if not self._attached:
            self._attached = workers_attached(self.table.segment)
        return self._attached and not self.workers_lost

    def look(self) -> None:
        """Look for dead participants, now and then, and return what they held."""
        lines = self._recoverer.look()
        if lines is None:
            return
        mine = self.table.segment.leader
        alive = {line.rank for line in lines if line.leader == mine and line.alive}
        lost = sorted(set(range(self.table.segment.shape.ranks)) - alive)
        if lost and self._attached and not self.workers_lost:
            self.workers_lost = True
            logger.error("worker ranks %s are gone; the cache is off for this engine", lost)
