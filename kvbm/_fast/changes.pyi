# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

from typing_extensions import disjoint_base

from kvbm._fast.segment import Segment

class Delta(NamedTuple):
    added: list[tuple[int, int]]
    removed: list[tuple[int, int]]

@disjoint_base
class TableWatch:
    def __new__(cls, segment: Segment) -> TableWatch: ...
    def moved(self) -> bool: ...
    def delta(self) -> Delta: ...
