# SPDX-License-Identifier: Apache-2.0
"""The same random operations where one leader has a policy that changes its mind all the time."""

import numpy as np
from hypothesis import settings
from hypothesis.stateful import initialize

from kvbm._fast.keys import Keys
from kvbm._fast.ranks import AGES, CLASSES, Uses
from tests.fast.test_table_machine import Leader, TwoLeaders


class Whim:
    """Any classes, and every few sequences any other ranks."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses
        self.random = np.random.default_rng(0)

    def arrive(self, use: int, keys: Keys, stop: int, hits: int) -> int:
        self.uses.classify(int(self.random.integers(0, use + 1)), use % 5)
        if use % 3 == 0:
            self.uses.set_ranks(self.random.integers(0, 256, (CLASSES, AGES), dtype=np.uint8))
        return int(self.random.integers(0, CLASSES))


class RankedAndPlain(TwoLeaders):
    """What must hold holds whatever the order is."""

    @initialize()
    def attach(self) -> None:
        self.leaders = [Leader(self.made.leader(key)) for key in range(2)]
        table = self.leaders[0].table
        uses = Uses(table.segment)
        table.order_by(Whim(uses), uses)


RankedAndPlain.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestRankedAndPlain = RankedAndPlain.TestCase
