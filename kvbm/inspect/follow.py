# SPDX-License-Identifier: Apache-2.0
"""Live segments that are followed by name, each with the rates of its counters.

An engine that starts may make a new object under an old name; whoever follows the name then sees
the new one, with rates that begin again.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from kvbm.errors import InspectError
from kvbm.inspect.live import LiveSegment, Rates
from kvbm.instance import disk_instance


class Follower:
    """Opens segments when they are asked for, and again where there is a new one; close it.

    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[LiveSegment, Rates]] = {}

    def look(self, instance: str) -> tuple[LiveSegment, Rates]:
        """The segment that has the name now, and its rates with a sample of this moment.

        Raises
        ------
        InspectError
            There is none, or it cannot be read.
        """
        found = self._open.get(instance)
        if found is not None and not found[0].is_current:
            self._open.pop(instance)[0].close()
            found = None
        if found is None:
            found = self._open[instance] = LiveSegment(instance), Rates()
        live, rates = found
        rates.add(time.monotonic(), live.counters())
        return found

    def look_with_disk(
        self, instance: str
    ) -> tuple[LiveSegment, Rates, tuple[LiveSegment, Rates] | None]:
        """As `look`, and the same of the instance's disk tier, if it has one that is open."""
        live, rates = self.look(instance)
        name = disk_instance(instance)
        there = live.shape.disk_slots and self.find(name) is not None
        return live, rates, self._open[name] if there else None

    def find(self, instance: str) -> LiveSegment | None:
        """The segment that has the name now; None where none can be read."""
        try:
            return self.look(instance)[0]
        except InspectError:
            return None

    def keep(self, instances: Collection[str]) -> None:
        """Close all others, but for the disk tiers of these."""
        wanted = {*instances, *map(disk_instance, instances)}
        for name in [name for name in self._open if name not in wanted]:
            self._open.pop(name)[0].close()

    def close(self) -> None:
        """Close all; a later look opens them again."""
        self.keep(())
