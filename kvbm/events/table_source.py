# SPDX-License-Identifier: Apache-2.0
"""What changes in the block tables of an instance, tier by tier.

The tables are read through attachments of their own. One is made only after the leader has opened
the table: a user of an object that the leader is about to replace would be in its way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvbm._fast.changes import Delta, TableWatch
from kvbm._fast.segment import Segment
from kvbm.events.model import Tier
from kvbm.instance import disk_instance, segment_name

LOOK_SECS = 1.0
"""Time after which a table is looked at even if nobody has counted a change."""
REST = 50
"""After a look, a table is left alone for so many times as long as the look took."""


class TableSource:
    """Follows one table.

    Parameters
    ----------
    tier : Tier
        What the table's slots are in.
    name : str
        Name of its segment.
    is_open : callable
        Whether the leader has opened it.
    """

    def __init__(self, tier: Tier, name: str, is_open: Callable[[], bool]) -> None:
        self.tier = tier
        self._name = name
        self._is_open = is_open
        self._segment: Segment | None = None
        self._watch: TableWatch | None = None
        self._looked_at = 0.0
        self._rest_until = 0.0

    def delta(self) -> Delta:
        """What has changed since the last call."""
        watch = self._watch or self._attach()
        if watch is None:
            return Delta([], [])
        now = time.monotonic()
        if now < self._rest_until or (now - self._looked_at < LOOK_SECS and not watch.moved()):
            return Delta([], [])
        delta = watch.delta()
        self._looked_at = now
        self._rest_until = now + REST * (time.monotonic() - now)
        return delta

    def _attach(self) -> TableWatch | None:
        if self._is_open():
            self._segment = Segment.attach(self._name, writable=False)
            self._watch = TableWatch(self._segment)
        return self._watch

    def close(self) -> None:
        """Detach."""
        self._watch = None
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def table_sources(instance: str, disk_is_open: Callable[[], bool]) -> list[TableSource]:
    """The tables of an instance whose host tier the leader has opened."""
    return [
        TableSource(Tier.HOST, segment_name(instance), lambda: True),
        TableSource(Tier.DISK, segment_name(disk_instance(instance)), disk_is_open),
    ]
